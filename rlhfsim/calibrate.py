"""From measurements of a machine to its hardware spec: kernel curves, links, and what the host needs.

Kernels and collectives are fitted to `real.microbench`'s isolated calls. What passes of whole models, DeepSpeed's
engines and decode steps take beyond those curves becomes the host times of `Overheads`: non-negative least squares of
relative errors on the microbenchmark's rows, never on whole runs. Timelines of whole runs, where given, say how well
the spec predicts them, and what a stage's turn takes on the host (`firing_seconds`), which no microbenchmark sees.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from . import metrics, timeline
from .bench import COLUMNS, Bench, Row, read_bench
from .costs.kernels import Kernels, Rates, bus_factor, collective_seconds
from .costs.operators import Operators, OperatorTime
from .errors import InputError
from .fitting import (
    Data,
    errors,
    fit_decode,
    fit_gemm,
    fit_memory,
    fit_prefill,
    fit_prefill_backward,
    fit_weight_gradient,
    measured_collective,
    number,
    split,
    write_kernels,
)
from .model import parameters
from .simulate import prepare, simulate
from .spec.data import data_dir
from .spec.hardware import Cluster
from .spec.loader import load_scenario
from .spec.model_spec import ModelSpec
from .spec.overheads import Overheads
from .spec.scenario import Effects, ModelUse
from .validate import digest

NOISY = 0.5  # range of the middle 80 % of the repeats, over their median
FEW_ROWS = 8  # for a curve of several coefficients
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2}

MEMORY_KERNELS = ("residual_add", "rms_norm", "rope", "gated_activation", "embedding", "cross_entropy", "optimizer")
REQUIRED = ("gemm", "weight_gradient", "prefill", "prefill_backward", "decode", "memory")

Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Calibration:
    """cluster, kernels: the two files as plain data. fits: errors of every curve, and of passes put together from them.

    undetermined: what no given file tells, and what would. fitted_on: file name -> SHA-256.
    """

    cluster: dict[str, Any]
    kernels: dict[str, Any]
    fits: dict[str, dict[str, Any]]
    undetermined: list[tuple[str, str]]
    fitted_on: dict[str, str]
    paths: list[Path] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.cluster["name"],
            "files": [str(p) for p in self.paths],
            "residuals": self.fits,
            "overheads": self.cluster["overheads"],
            "fitted_on": self.fitted_on,
            "undetermined": [{"what": what, "run": run} for what, run in self.undetermined],
        }


# --- reading ---------------------------------------------------------------------------------------------------------


def _merged(benches: Mapping[str, Bench]) -> Tables:
    """The rows of all files by table. Raises InputError for different machines, and for what no spec can do without."""
    first, *others = benches.items()
    for path, bench in others:
        for name, mine, its in (
            ("machine.name", first[1].machine.get("name"), bench.machine.get("name")),
            ("precision", first[1].precision, bench.precision),
        ):
            if mine != its:
                raise InputError(
                    f"is {its!r}, but {mine!r} in {first[0]}: one spec is of one kind of machine",
                    field=name,
                    where=path,
                )
    tables: Tables = {}
    for bench in benches.values():
        for table, rows in bench.tables.items():
            if table == "collectives" and (rate := bench.nic_bytes_per_second):
                rows = [row | {"link": rate} if row["nodes"] > 1 else row for row in rows]
            tables.setdefault(table, []).extend(rows)
    missing = [t for t in REQUIRED if not tables.get(t)]
    missing += [k for k in MEMORY_KERNELS if tables.get("memory") and not _of(tables["memory"], kernel=k)]
    if missing:
        raise InputError(
            f"nothing was measured of {', '.join(missing)}; `torchrun --nproc-per-node N -m "
            "real.microbench --out bench.json` measures all of it",
            where=", ".join(benches),
        )
    return tables


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _data(rows: Sequence[Row], columns: Sequence[str], groups: Sequence[str]) -> Data:
    return split({name: np.array([row[name] for row in rows], dtype=float) for name in (*columns, "seconds")}, groups)


# --- curves ----------------------------------------------------------------------------------------------------------


def calibrate(bench_paths: Sequence[str | Path], runs: Sequence[tuple[str, str]] = (), *, name: str) -> Calibration:
    """bench_paths: files of real.microbench on one kind of machine. runs: (timeline, scenario) of real runs on it."""
    if not bench_paths:
        raise InputError("at least one file of `python -m real.microbench` is needed", field="bench.json")
    benches = {str(path): read_bench(path) for path in bench_paths}
    tables = _merged(benches)
    fitted_on = {Path(path).name: digest(Path(path)) for path in benches}
    for recorded, _ in runs:
        timeline.read(recorded)  # complains before any work is done
        fitted_on[Path(recorded).name] = digest(Path(recorded))
    kernels, link, nic = _kernels(name, benches, tables)
    if any(bench.machine.get("device") == "cpu" for bench in benches.values()):
        kernels = _as_in_models(kernels, _cluster(name, benches, tables, kernels, link, nic, []), tables, link)
    cluster = _cluster(name, benches, tables, kernels, link, nic, list(fitted_on.values()))
    fits = {
        curve: fit.model_dump(exclude={"source", "measured", "note"})
        for curve, fit in Kernels.model_validate(kernels).fits().items()
        if fit.mean_error is not None
    }
    host = _Host(kernels, cluster, tables, link)
    cluster["overheads"] = host.overheads()
    fits |= host.fits
    undetermined = _undetermined(benches, tables, fits, host, bool(runs))
    found = Calibration(cluster, kernels, fits, undetermined, fitted_on)
    return _with_runs(found, runs) if runs else found


def _kernels(name: str, benches: Mapping[str, Bench], tables: Tables) -> tuple[dict[str, Any], float, float]:
    """The file of curves, and the nominal rates of links inside a node and of the NIC in bytes per second."""
    bench = next(iter(benches.values()))
    width = WIDTH[bench.precision]
    peak = max(2 * r["m"] * r["n"] * r["k"] / r["seconds"] for r in tables["gemm"])
    bandwidth = max(
        max(r["bytes"] / r["seconds"] for r in tables["memory"]),
        max(width * r["n"] * r["k"] / r["seconds"] for r in tables["gemm"]),
    )
    rates = Rates(peak, bandwidth, int(bench.machine.get("multiprocessors", 1)))
    gemm = fit_gemm(
        _data(tables["gemm"], COLUMNS["gemm"], ["n", "k"]),
        rates,
        "bench",
        width,
        width,
        cached=bench.machine.get("device") == "cpu",
    )
    attention = ("batch", "heads", "kv_heads", "tokens", "head_dim")
    prefill = fit_prefill(_data(tables["prefill"], attention, ["batch", "tokens"]), rates, "bench", width)
    decode = fit_decode(_data(tables["decode"], attention, ["batch", "tokens"]), rates, "bench", width)
    memory = {
        kernel: fit_memory(_data(_of(tables["memory"], kernel=kernel), ["bytes"], ["bytes"]), rates, "bench")
        for kernel in MEMORY_KERNELS
    }
    inside, link = _collectives(_of(tables.get("collectives", []), nodes=1))
    across, nic = _collectives([r for r in tables.get("collectives", []) if r["nodes"] == r["ranks"]])
    copies, _ = _collectives([r | {"ranks": 1} for r in tables.get("copies", [])])
    small = min((r["seconds"] for r in tables.get("collectives", [])), default=0.0)
    between = [r for r in tables.get("collectives", []) if r["nodes"] > 1]
    record: dict[str, Any] = {
        "name": name,
        "fitted": date.today().isoformat(),
        "sources": {"bench": _source(benches)},
        "reference": {
            "gpu": name,
            "flops_per_second": {"bf16": peak},
            "memory_bytes_per_second": bandwidth,
            "multiprocessors": rates.multiprocessors,
            "link_bytes_per_second": link,
        },
        # what host_launch_seconds is for is measured per layer (overheads.eager_layer_seconds)
        "host_launch_seconds": {"value": min(r["seconds"] for r in tables["memory"]), "source": "bench"},
        "gemm": {
            "bf16": gemm
            | fit_weight_gradient(
                gemm, _data(tables["weight_gradient"], COLUMNS["weight_gradient"], ["n", "k"]), rates, "bench", width
            )
        },
        "prefill": prefill
        | fit_prefill_backward(
            prefill, _data(tables["prefill_backward"], attention, ["batch", "tokens"]), rates, "bench", width
        ),
        "decode": decode,
        "memory": memory,
        "collectives": inside | copies,
        "across_nodes": across,
        "inter_node": {
            f"{op}_seconds": min((r["seconds"] for r in _of(between, op=op)), default=small)
            for op in ("all_reduce", "send")
        }
        | {"fit": {"source": "bench", "measured": bool(between)}},
    }
    Kernels.model_validate(record)
    return record, link, nic


# Shares of the bandwidth that products and attention over the cache have alone; see `_as_in_models`.
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def _as_in_models(kernels: dict[str, Any], cluster: dict[str, Any], tables: Tables, link: float) -> dict[str, Any]:
    """The curves with the bandwidths under which passes and decode steps of the benches fit best.

    On a CPU all that streams by in a model (other weights, activations, the interpreter) competes for the caches, and
    products and attention read their weights and keys slower than alone.
    """

    def scaled(gemm: float, decode: float) -> dict[str, Any]:
        slower = {p: _slower(curve, gemm) for p, curve in kernels["gemm"].items()}
        return kernels | {"gemm": slower, "decode": _slower(kernels["decode"], decode)}

    def misfit(shares: tuple[float, float]) -> float:
        host = _Host(scaled(*shares), cluster, tables, link)
        host.overheads()
        fits = [host.fits.get(name) for name in ("passes.forward", "passes.backward", "decode_step")]
        return float(sum(fit["mean_error"] for fit in fits if fit))

    return scaled(*min(product(SHARES, SHARES), key=misfit))


def _slower(curve: dict[str, Any], share: float) -> dict[str, Any]:
    return curve | {"memory_efficiency": number(share * curve["memory_efficiency"])}


def _collectives(rows: list[Row]) -> tuple[dict[str, dict[int, dict[str, Any]]], float]:
    """Curves by operation and ranks, and the fastest link's rate.

    A curve is relative to its row's nominal rate (`link`), and where none was given to the fastest that was seen.
    """
    rows = [row | {"seconds": row["seconds"] / row.get("calls", 1)} for row in rows]
    if not rows:
        return {}, 1e9
    seen = max(r["bytes"] * bus_factor(r["op"], int(r["ranks"])) / r["seconds"] for r in rows)
    rows = [{"link": seen} | row for row in rows]
    curves: dict[str, dict[int, dict[str, Any]]] = {}
    for op, ranks in dict.fromkeys((r["op"], int(r["ranks"])) for r in rows):
        data = _data(_of(rows, op=op, ranks=ranks), ["link", "bytes"], ["link", "bytes"])
        curves.setdefault(op, {})[ranks] = measured_collective(data, op, ranks, data.column("link"), "bench")
    return curves, max(r["link"] for r in rows)


# --- what the host needs ---------------------------------------------------------------------------------------------


class _Host:
    """Host times: what measured passes take beyond the curves. `fits`: how well both together give the passes."""

    def __init__(self, kernels: dict[str, Any], cluster: dict[str, Any], tables: Tables, link: float) -> None:
        self.kernels, self.link = Kernels.model_validate(kernels), link
        gpu = Cluster.model_validate(cluster).gpu
        self.precision = next(iter(gpu.flops_per_second))
        self.operators = Operators(gpu, self.kernels, Effects(), Overheads(eager_layer_seconds=0.0))
        rows = tables.get("passes", [])
        self.plain = [r for r in rows if r["backend"] == "torch"]
        self.engines = [r for r in rows if r["backend"] == "deepspeed"]
        self.steps = tables.get("decode_step", [])
        self.fits: dict[str, dict[str, Any]] = {}

    def overheads(self) -> dict[str, Any]:
        """The fields of `Overheads` that could be determined."""
        found: dict[str, Any] = {}
        if self.plain:
            layers = np.array([[self._shape(r).layers, 1.0] for r in self._phases("score", "forward")])
            layer, once = self._solve("passes.forward", self._phases("score", "forward"), layers, self._forward)
            back, _ = self._solve(
                "passes.backward",
                self._phases("backward"),
                np.array([[self._shape(r).layers, 0.0] for r in self._phases("backward")]),
                lambda r: self._backward(r) + once,
            )
            found |= {"eager_layer_seconds": layer, "eager_layer_backward_seconds": back, "eager_pass_seconds": once}
        if self.steps and self.plain:
            terms = np.array([[self._shape(r).layers, 1.0, r["rows"]] for r in self.steps])
            layer, step, sequence = self._solve(
                "decode_step", self.steps, terms, lambda r: self._decode(r) + found["eager_pass_seconds"]
            )
            found |= {"decode_layer_seconds": layer, "decode_step_seconds": step, "decode_sequence_seconds": sequence}
        if engines := self._deepspeed():
            found["deepspeed"] = engines
        return found

    def _deepspeed(self) -> dict[str, Any]:
        """Engine minus plain model minus collectives, by ZeRO stage and phase."""
        found: dict[str, Any] = {}
        for stage in sorted({int(r["zero_stage"]) for r in self.engines}):
            own = [r for r in _of(self.engines, zero_stage=stage) if r["phase"] in ("step", "gather") or self._base(r)]
            for phase in ("forward", "backward", "step", "gather"):
                rows = _of(own, phase=phase)
                if phase == "forward" and stage == 3:  # passes without a backward have the engine's hooks too
                    rows += _of(own, phase="score_again")
                if not rows:
                    continue
                terms = np.array([[1.0, self._shape(r).layers, parameters(self._shape(r), "lm")] for r in rows])
                call, layer, parameter = self._solve(f"deepspeed.zero_{stage}.{phase}", rows, terms, self._engine)
                times = {"call_seconds": call, "layer_seconds": layer, "parameter_seconds": parameter}
                found.setdefault(f"zero_{stage}", {})[phase] = times
        return found

    def _solve(self, name: str, rows: list[Row], terms: np.ndarray, known: Callable[[Row], float]) -> np.ndarray:
        """Non-negative coefficients of `terms` beside what is known of each row; least squares of relative errors."""
        from scipy.optimize import nnls

        measured, base = np.array([r["seconds"] for r in rows]), np.array([known(r) for r in rows])
        scale = np.abs(terms).max(axis=0)
        scale[scale == 0] = 1.0
        found, _ = nnls(terms / scale / measured[:, None], (measured - base) / measured)
        found = found / scale
        self.fits[name] = {"rows": len(rows), "held_out_rows": 0} | errors(base + terms @ found, measured)
        return np.array([number(float(x)) for x in found])

    def _phases(self, *names: str) -> list[Row]:
        return [r for r in self.plain if r["phase"] in names]

    def _shape(self, row: Row) -> ModelSpec:
        return ModelSpec.model_validate(
            {"name": row["model"], "family": "llama", "source": "unverified", "norm": "rms"} | row["shape"]
        )

    def _use(self, row: Row) -> ModelUse:
        return ModelUse(spec=row["model"], shape=self._shape(row), precision=self.precision, zero_stage=0)

    def _forward(self, row: Row) -> float:
        """By the curves alone: a pass of `batch` samples of `tokens` through a model with a language-model head."""
        use, ops, tokens = self._use(row), self.operators, row["batch"] * row["tokens"]
        layer = ops.layer_forward(use, tokens, 1) + ops.attention_prefill(use, self._lengths(row), 1)
        return _seconds(use.shape.layers * layer + ops.embedding(use, tokens) + ops.head_forward(use, tokens, 1))

    def _backward(self, row: Row) -> float:
        use, ops, tokens = self._use(row), self.operators, row["batch"] * row["tokens"]
        layer = ops.layer_backward(use, tokens, 1) + ops.attention_prefill(use, self._lengths(row), 1, backward=True)
        return _seconds(use.shape.layers * layer + ops.embedding(use, tokens) + ops.head_backward(use, tokens, 1))

    def _decode(self, row: Row) -> float:
        use, ops, rows = self._use(row), self.operators, row["rows"]
        layer = ops.layer_forward(use, rows, 1) + ops.attention_decode(use, rows, rows * row["tokens"], 1)
        return _seconds(use.shape.layers * layer + ops.embedding(use, rows) + ops.head_forward(use, rows, 1))

    def _lengths(self, row: Row) -> np.ndarray:
        return np.full(int(row["batch"]), float(row["tokens"]))

    def _base(self, row: Row) -> Row | None:
        """The same pass of the same model without an engine."""
        same = _of(self.plain, model=row["model"], phase=row["phase"], batch=row["batch"], tokens=row["tokens"])
        return same[0] if same else None

    def _engine(self, row: Row) -> float:
        """What the engine's phase takes without DeepSpeed's own host time; an update is Adam on this rank's share."""
        moved, stage = row["collectives"], int(row["zero_stage"])
        if row["phase"] == "gather":
            return self._moving(row, moved)
        if row["phase"] != "step":
            return float((self._base(row) or row)["seconds"]) + self._moving(row, moved)
        whole = {op: calls for op, calls in moved.items() if op == "all_gather" and stage in (1, 2)}
        share = parameters(self._shape(row), "lm") / (row["ranks"] if stage else 1)
        return _seconds(self.operators.optimizer_step(self._use(row), share)) + self._moving(row, whole)

    def _moving(self, row: Row, moved: dict[str, list[float]]) -> float:
        """Collectives of a pass: name -> (calls, bytes of all together)."""
        total, ranks = 0.0, int(row["ranks"])
        for op, (calls, moved_bytes) in moved.items():
            if ranks > 1 and op in self.kernels.collectives:
                curve = self.kernels.collective(op, ranks)
                each = collective_seconds(curve, op, ranks, moved_bytes / calls, self.link)
                total += calls * float(each)
        return total


def _seconds(time: OperatorTime) -> float:
    return float(time.seconds)


# --- the cluster -----------------------------------------------------------------------------------------------------


def _source(benches: Mapping[str, Bench]) -> str:
    parts = [
        f"{Path(path).name} ({b.ranks} ranks, {b.ranks_per_node} a node, {b.started} UTC)"
        for path, b in benches.items()
    ]
    machine = next(iter(benches.values())).machine
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    on = f"{machine.get('name')}, {machine.get('cores')} cores, {versions}"
    return f"python -m real.microbench on {on}: {'; '.join(parts)}"


def _cluster(
    name: str,
    benches: Mapping[str, Bench],
    tables: Tables,
    kernels: dict[str, Any],
    link: float,
    nic: float,
    fitted_on: list[str],
) -> dict[str, Any]:
    """As many nodes, with as many ranks each, as any of the files had."""
    bench = next(iter(benches.values()))
    machine, reference, cuda = bench.machine, kernels["reference"], bench.machine.get("device") == "cuda"
    per_node = max(b.ranks_per_node for b in benches.values())
    sources = {"bench": kernels["sources"]["bench"]}

    def measured(value: float, known: bool = True) -> dict[str, Any]:
        return {"value": number(float(value)), "source": "bench" if known else "unverified"}

    copied = [r["bytes"] / r["seconds"] for r in tables.get("copies", [])]
    memory = machine.get("memory_bytes", 1 << 30) / (1 if cuda else per_node)
    streamed = max((r["bytes"] / r["seconds"] for r in _of(tables["memory"], kernel="copy")), default=0.0)
    ports = cuda and bool(copied) and link > 1.5 * max(copied)  # faster than the slot: NVLink
    slot = max(copied) if copied else link
    between = any(r["nodes"] > 1 for r in tables.get("collectives", []))
    gpu: dict[str, Any] = {
        "name": name,
        "description": str(machine.get("name", "")),
        "architecture": "cuda" if cuda else "cpu",
        "kernels": f"./{name}.kernels.yaml",
        "overlaps_communication": cuda,
        "overlaps_launches": cuda,
        "fitted_on": fitted_on,
        "sources": sources,
        "memory_bytes": measured(memory, "memory_bytes" in machine),
        "memory_bytes_per_second": measured(reference["memory_bytes_per_second"]),
        "flops_per_second": {bench.precision: measured(reference["flops_per_second"]["bf16"])},
        "multiprocessors": measured(reference["multiprocessors"]),
        "pcie_bytes_per_second": measured(slot, bool(copied or tables.get("collectives"))),
    }
    if ports:
        gpu["nvlink_bytes_per_second"] = measured(link)
    host_rate = (streamed or reference["memory_bytes_per_second"]) * per_node
    node = {
        "name": name,
        "gpu": name,
        "gpus_per_node": per_node,
        "gpu_link": "nvswitch" if ports else "pcie",
        "sources": sources,
        "host_memory_bytes": measured(machine.get("host_memory_bytes", 1 << 30)),
        "host_memory_bytes_per_second": measured(host_rate, not cuda),
    }
    network = {"nics_per_node": 1, "nic_bytes_per_second": measured(nic, between), "sources": sources}
    return {
        "name": name,
        "description": f"Measured by real.microbench on {machine.get('name')}.",
        "node": node,
        "gpu": gpu,
        "nodes": max(b.ranks // b.ranks_per_node for b in benches.values()),
        "network": network,
    }


def _undetermined(
    benches: Mapping[str, Bench], tables: Tables, fits: dict[str, dict[str, Any]], host: _Host, has_runs: bool
) -> list[tuple[str, str]]:
    """What no file tells, and the run that would."""
    run = "torchrun --nproc-per-node {} -m real.microbench --out more.json"
    collectives, found = tables.get("collectives", []), []
    most = max((int(r["ranks"]) for r in _of(collectives, nodes=1)), default=1)
    if most == 1:
        found.append(("collectives inside a node (built-in defaults are used)", run.format(2)))
    else:
        found.append(
            (f"collectives of more than {most} ranks in a node (taken as those of {most})", run.format(2 * most))
        )
    if not any(r["nodes"] > 1 for r in collectives):
        found.append(
            (
                "the network between nodes (nic_bytes_per_second is a placeholder)",
                "torchrun --nnodes 2 --nproc-per-node 1 ... -m real.microbench --out nodes.json "
                "--nic-bytes-per-second B",
            )
        )
    found.append(("all_to_all (a default is used; no strategy here needs it)", "none yet"))
    if not host.plain:
        found.append(("host time of layers and passes (taken as nothing)", run.format("N")))
    if missing := {0, 1, 2, 3} - {int(r["zero_stage"]) for r in host.engines}:
        stages = ", ".join(map(str, sorted(missing)))
        found.append((f"DeepSpeed's host time at ZeRO {stages} (taken as nothing)", run.format("N")))
    if not host.steps:
        found.append(("decode_step_seconds", run.format("N")))
    if not tables.get("copies"):
        found.append(("copies between host and device", "the same on a machine with CUDA"))
    curves = ("gemm", "prefill", "decode")
    few = sorted(n for n, f in fits.items() if n.split(".")[0] in curves and f["rows"] < FEW_ROWS)
    if few:
        found.append((f"curves from too few rows: {', '.join(few)}", run.format("N")))
    if any(b.quick for b in benches.values()):
        found.append(("anything to rely on: a --quick file is a trial", run.format("N")))
    noisy = [r for rows in tables.values() for r in rows if r.get("high", 0) - r.get("low", 0) > NOISY * r["seconds"]]
    if noisy:
        found.append(
            (
                f"{len(noisy)} of {sum(map(len, tables.values()))} rows vary by more than {NOISY:.0%}",
                "the same with nothing else running",
            )
        )
    if not has_runs:
        found.append(
            (
                "firing_seconds, host time around a stage's work (taken as nothing)",
                "torchrun ... -m real.run scenario.yaml --out run.jsonl, then add `run.jsonl scenario.yaml`",
            )
        )
    return found


# --- whole runs ------------------------------------------------------------------------------------------------------


def _with_runs(found: Calibration, runs: Sequence[tuple[str, str]]) -> Calibration:
    """What a stage's turn takes beyond its work, the median over stages and runs; then the errors of the runs."""
    with tempfile.TemporaryDirectory(prefix="rlhfsim-") as folder:
        path = _write(found, Path(folder) / f"{found.cluster['name']}.yaml")[0]
        beyond = []
        for recorded, scenario in runs:
            measured = timeline.read(recorded)
            predicted, _ = _predicted(scenario, path)
            turns = _turns(measured)
            beyond += [
                (seconds - predicted[stage]) / turns[stage]
                for stage, seconds in metrics.stage_seconds(measured).items()
                if stage in predicted and seconds > 0
            ]
        overheads = found.cluster["overheads"] | {"firing_seconds": number(max(0.0, median(beyond)) if beyond else 0.0)}
        fits = dict(found.fits)
        done = replace(found, cluster=found.cluster | {"overheads": overheads}, fits=fits)
        path = _write(done, path)[0]
        for recorded, scenario in runs:
            measured = timeline.read(recorded)
            predicted, step = _predicted(scenario, path)
            stages = {s: v for s, v in metrics.stage_seconds(measured).items() if s in predicted and v > 0}
            fits[f"{Path(recorded).name}: stages"] = {"rows": len(stages), "held_out_rows": 0} | errors(
                np.array([predicted[s] for s in stages]), np.array(list(stages.values()))
            )
            fits[f"{Path(recorded).name}: step_seconds"] = {"rows": 1, "held_out_rows": 0} | errors(
                np.array([step]), np.array([metrics.step_seconds(measured)])
            )
    return done


def _predicted(scenario: str, cluster: Path) -> tuple[dict[str, float], float]:
    """Seconds by stage, and of a step, on the calibrated cluster with the scenario's own ranks and network rate."""
    own = load_scenario(scenario).cluster
    if own.parts:
        raise InputError("has parts; a calibration is of machines of one kind", field="cluster", where=scenario)
    calibrated: dict[str, Any] = {"spec": str(cluster), "nodes": own.nodes, "gpus_per_node": own.node.gpus_per_node}
    if own.nodes > 1:
        calibrated["network"] = {"nic_bytes_per_second": own.network.nic_bytes_per_second.value}
    run = simulate(prepare(load_scenario(scenario, {"cluster": calibrated})))
    return metrics.stage_seconds(run), metrics.step_seconds(run)


def _turns(run: timeline.Timeline) -> dict[str, float]:
    """Firings of a stage that follow each other on a place, per iteration."""
    counts: dict[str, set[Any]] = {}
    for span in run.spans:
        counts.setdefault(metrics.base_stage(span.firing.stage), set()).add(span.firing._replace(place=0))
    return {stage: len(firings) / run.iterations for stage, firings in counts.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def write(found: Calibration, out: str | Path, *, force: bool = False) -> Calibration:
    """The cluster at `out` and its curves beside it. Raises InputError rather than overwrite, unless forced."""
    path = Path(out)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"is {path.name!r}, but must end in .yaml", field="--out")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {str(path.parent)!r}", field="--out")
    for target in (path, _kernels_path(path)):
        if data_dir("hw_specs").resolve() in target.resolve().parents:
            raise InputError(f"{str(target)!r} lies among the shipped specs, which stay as they are", field="--out")
        if target.exists() and not force:
            raise InputError(f"{str(target)!r} exists already; --force overwrites it", field="--out")
    return replace(found, paths=_write(found, path))


def _kernels_path(path: Path) -> Path:
    return path.with_suffix(".kernels.yaml")


def _write(found: Calibration, path: Path) -> list[Path]:
    from ruamel.yaml import YAML

    kernels = _kernels_path(path)
    write_kernels(
        found.kernels,
        kernels,
        "Efficiency curves fitted by `rlhfsim calibrate`: do not edit by hand.\n"
        "Seconds and bytes; efficiencies are relative to `reference`. Errors: on the rows held out.",
    )
    yaml = YAML()
    yaml.width = 4096
    yaml.default_flow_style = False
    cluster = found.cluster | {"gpu": found.cluster["gpu"] | {"kernels": f"./{kernels.name}"}}
    with path.open("w", encoding="utf-8") as out:
        out.write("# Measured; written by `rlhfsim calibrate`.\n")
        yaml.dump(json.loads(json.dumps(cluster)), out)
    return [path, kernels]


def split_arguments(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Benchmarks (.json), and timelines (.jsonl) each followed by its scenario (.yaml)."""
    benches, runs, rest = [], [], list(paths)
    while rest:
        path = rest.pop(0)
        if path.endswith(".jsonl"):
            if not rest or not rest[0].endswith((".yaml", ".yml")):
                raise InputError("is a timeline; its scenario file (.yaml) must follow it", where=path)
            runs.append((path, rest.pop(0)))
        elif path.endswith((".yaml", ".yml")):
            raise InputError("is a scenario without a timeline (.jsonl) before it", where=path)
        else:
            benches.append(path)
    return benches, runs
