"""`calibrate`: a machine whose times are known is found again; damaged input, roles, files; the real benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rlhfsim import timeline
from rlhfsim.bench import read_bench
from rlhfsim.calibrate import Calibration, calibrate, split_arguments, write
from rlhfsim.cli import cli
from rlhfsim.costs.kernels import CollectiveCurve, collective_seconds, load_kernels
from rlhfsim.errors import InputError
from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.model import layer_gemms, parameters
from rlhfsim.simulate import kernels_of, prepare, simulate
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import load_cluster, scenario_from_dict
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.validate import run_case

ROOT = Path(__file__).parents[1]
NOISE = 0.01
PEAK, BANDWIDTH, LINK, NIC = 1e11, 1e10, 2e9, 1.25e7  # FLOP/s, bytes/s
COPIES = {
    "residual_add": 1.0,
    "rms_norm": 0.4,
    "rope": 0.5,
    "gated_activation": 0.8,
    "embedding": 0.3,
    "cross_entropy": 0.6,
    "optimizer": 0.7,
}  # of the bandwidth
LAYER, LAYER_BACK, PASS, STEP, SEQUENCE = 5e-4, 8e-4, 3e-4, 4e-4, 2e-5  # host seconds
WEIGHT_GRADIENT, ATTENTION_BACK, WIDTH = 1.2, 2.5, 4
ENGINE = {0: (1e-3, 2e-4, 1e-9), 2: (2e-3, 1e-4, 2e-9), 3: (5e-4, 3e-3, 5e-10)}  # call, layer, parameter
MODELS = [load_model(name) for name in ("tiny-2x128", "tiny-4x256", "small-8x512")]
LATENCY = {1: 2e-4, 2: 1e-3}  # by nodes


class Machine:
    """Times by plain formulas: work over rate plus a fixed time, nothing else."""

    def gemm(self, m: float, n: float, k: float) -> float:
        return 2e-6 + max(2 * m * n * k / PEAK, WIDTH * (m * k + k * n + m * n) / BANDWIDTH)

    def memory(self, kernel: str, moved: float) -> float:
        return 3e-6 + moved / (BANDWIDTH * COPIES[kernel])

    def prefill(self, batch: float, heads: float, tokens: float, dim: float, backward: bool = False) -> float:
        """A flop rate of 0.3 of the peak, and 0.5 of the bandwidth for q, k, v and the result."""
        flops, moved = 2 * batch * heads * tokens * (tokens + 1) * dim, 4 * WIDTH * batch * heads * tokens * dim
        work = flops / (0.3 * PEAK) + moved / (0.5 * BANDWIDTH)
        return 1e-5 + (ATTENTION_BACK if backward else 1.0) * work

    def decode(self, batch: float, heads: float, tokens: float, dim: float) -> float:
        return 2e-5 + 2 * WIDTH * heads * dim * batch * tokens / (0.4 * BANDWIDTH) + 1e-6 * batch * heads

    def collective(self, op: str, ranks: int, size: float, nodes: int = 1) -> float:
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0, "send": 1.0}.get(op, (ranks - 1) / ranks)
        return LATENCY[nodes] + size * share / (LINK if nodes == 1 else 0.9 * NIC)

    # -- a Llama of `layers` layers, `t` tokens at a time ------------------------------------------------------------

    def elementwise(self, s: ModelSpec, t: float) -> float:
        hidden, ffn = WIDTH * t * s.hidden, WIDTH * t * s.ffn
        norms, residuals = 2 * self.memory("rms_norm", 2 * hidden), 2 * self.memory("residual_add", 3 * hidden)
        return norms + residuals + self.memory("rope", 4 * hidden) + self.memory("gated_activation", 3 * ffn)

    def layer(self, s: ModelSpec, t: float) -> float:
        return sum(self.gemm(t, g.n, g.k) for g in layer_gemms(s)) + self.elementwise(s, t)

    def head(self, s: ModelSpec, t: float) -> float:
        return (
            self.gemm(t, s.vocabulary, s.hidden)
            + self.memory("cross_entropy", 14 * t * s.vocabulary)
            + self.memory("embedding", 2 * WIDTH * t * s.hidden)
            + PASS
        )

    def forward(self, s: ModelSpec, batch: int, tokens: int) -> float:
        layer = self.layer(s, batch * tokens) + self.prefill(batch, s.heads, tokens, s.head_dim) + LAYER
        return s.layers * layer + self.head(s, batch * tokens)

    def backward(self, s: ModelSpec, batch: int, tokens: int) -> float:
        t = batch * tokens

        def products(n: int, k: int) -> float:
            return self.gemm(t, k, n) + 2e-6 + WEIGHT_GRADIENT * (self.gemm(k, n, t) - 2e-6)

        layer = (
            sum(products(g.n, g.k) for g in layer_gemms(s))
            + 2 * self.elementwise(s, t)
            + self.prefill(batch, s.heads, tokens, s.head_dim, True)
            + LAYER_BACK
        )
        ends = products(s.vocabulary, s.hidden) + self.memory("cross_entropy", 14 * t * s.vocabulary)
        return s.layers * layer + ends + self.memory("embedding", 2 * WIDTH * t * s.hidden) + PASS

    def decode_step(self, s: ModelSpec, rows: int, tokens: float) -> float:
        layer = self.layer(s, rows) + self.decode(rows, s.kv_heads, tokens, s.head_dim) + LAYER
        return s.layers * layer + self.head(s, rows) + STEP + SEQUENCE * rows


def numbers(s: ModelSpec) -> dict[str, Any]:
    return {k: v for k, v in s.model_dump(exclude_defaults=True).items() if isinstance(v, bool | int)}


def tables(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    machine, noise = Machine(), np.random.default_rng(seed)
    found: dict[str, list[dict[str, Any]]] = {}

    def add(table: str, seconds: float, **row: Any) -> None:
        seconds *= float(np.exp(NOISE * noise.standard_normal()))
        spread = {"seconds": seconds, "low": 0.98 * seconds, "high": 1.02 * seconds, "repeats": 9}
        found.setdefault(table, []).append(row | spread)

    for s in MODELS:
        for g in layer_gemms(s):
            for m in (1, 4, 16, 64, 256, 1024):
                add("gemm", machine.gemm(m, g.n, g.k), m=m, n=g.n, k=g.k, weights_bytes=WIDTH * parameters(s))
                if m > 8:
                    again = 2e-6 + WEIGHT_GRADIENT * (machine.gemm(g.n, g.k, m) - 2e-6)
                    add("weight_gradient", again, m=g.n, n=g.k, k=m, weights_bytes=WIDTH * parameters(s))
        shape = {"heads": s.heads, "kv_heads": s.heads, "head_dim": s.head_dim}
        for batch in (1, 4, 16):
            for t in (16, 64, 128, 256):
                row = shape | {"batch": batch, "tokens": t}
                add("prefill", machine.prefill(batch, s.heads, t, s.head_dim), **row)
                add("prefill_backward", machine.prefill(batch, s.heads, t, s.head_dim, True), **row)
                add("decode", machine.decode(batch, s.heads, t, s.head_dim), **row)
    for kernel in COPIES:
        for moved in np.geomspace(1e4, 1e8, 12).astype(int).tolist():
            add("memory", machine.memory(kernel, moved), kernel=kernel, bytes=moved)
    for nodes in (1, 2):
        for op in ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "send"):
            for size in (2**b for b in range(10, 28, 2)):
                calls = 2 if op == "send" else 1
                add(
                    "collectives",
                    calls * machine.collective(op, 2, size, nodes),
                    op=op,
                    ranks=2,
                    nodes=nodes,
                    bytes=size,
                    calls=calls,
                )
    for s in MODELS:
        add_passes(machine, s, add)
    return found


def add_passes(machine: Machine, s: ModelSpec, add: Any) -> None:
    row, size = {"model": s.name, "shape": numbers(s), "ranks": 2}, parameters(s, "lm")
    for batch, t in ((1, 32), (4, 64), (4, 128)):
        common = row | {"backend": "torch", "zero_stage": 0, "batch": batch, "tokens": t, "collectives": {}}
        for phase, seconds in (
            ("score", machine.forward(s, batch, t)),
            ("forward", machine.forward(s, batch, t)),
            ("backward", machine.backward(s, batch, t)),
        ):
            add("passes", seconds, phase=phase, **common)
    for stage, (call, layer, parameter) in ENGINE.items():
        more = call + s.layers * layer + size * parameter
        common = row | {"backend": "deepspeed", "zero_stage": stage, "batch": 4, "tokens": 64}
        reduced = {"reduce_scatter" if stage == 3 else "all_reduce": [1, WIDTH * size]}
        moving = sum(machine.collective(op, 2, b) for op, (_, b) in reduced.items())
        add("passes", machine.forward(s, 4, 64) + more, phase="forward", collectives={}, **common)
        add("passes", machine.backward(s, 4, 64) + more + moving, phase="backward", collectives=reduced, **common)
        adam = machine.memory("optimizer", 28 * size / (2 if stage else 1))
        gather = {"all_gather": [1, WIDTH * size]} if stage == 2 else {}
        again = sum(machine.collective(op, 2, b) for op, (_, b) in gather.items())
        add("passes", adam + more + again, phase="step", collectives=gather, **common)
    for rows in (1, 4, 16, 32):
        add("decode_step", machine.decode_step(s, rows, 64), model=s.name, shape=numbers(s), rows=rows, tokens=64)


def write_bench(folder: Path, name: str = "bench.json", **changes: Any) -> Path:
    bench = {
        "kind": "rlhfsim microbench",
        "version": 1,
        "precision": "fp32",
        "ranks": 2,
        "ranks_per_node": 2,
        "machine": {
            "device": "cpu",
            "name": "synthetic",
            "cores": 2,
            "multiprocessors": 1,
            "versions": {},
            "memory_bytes": 2**34,
            "host_memory_bytes": 2**34,
        },
        "nic_bytes_per_second": NIC,
        "started": "2026-01-01 00:00",
        "tables": tables(),
    } | changes
    path = folder / name
    path.write_text(json.dumps(bench))
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def found(bench: Path) -> Calibration:
    return calibrate([bench], name="synthetic")


def scenario(cluster: Path | str, model: str = "tiny-2x128", **changes: Any) -> dict[str, Any]:
    """A small run on two CPU ranks."""
    use = {
        "spec": model,
        "precision": "fp32",
        "zero_stage": 2,
        "recompute": "none",
        "micro_batch_samples": 2,
        "score_micro_batch_samples": 2,
    }
    return {
        "cluster": {"spec": str(cluster), "nodes": 1, "gpus_per_node": 2},
        "models": {"actor": use, "critic": use},
        "workload": {"prompts": 8, "prompt_tokens": 32, "response_tokens": 16},
    } | changes


# --- what is found again ---------------------------------------------------------------------------------------------


def test_curves_follow_a_known_machine(found: Calibration) -> None:
    """1 % of noise on every row; held-out rows are met, and rates and fixed times are the ones put in."""
    for name, fit in found.fits.items():
        # a collective's points are each predicted from their neighbours, up to 8 times away
        points = name.split(".")[0] in ("collectives", "across_nodes")
        assert fit["mean_error"] < (0.15 if points else 0.06), f"{name}: {fit}"
    for kernel, share in COPIES.items():
        curve = found.kernels["memory"][kernel]
        rate = curve["memory_efficiency"] * found.kernels["reference"]["memory_bytes_per_second"]
        assert rate == pytest.approx(share * BANDWIDTH, rel=0.03)
        assert curve["kernel_seconds"] == pytest.approx(3e-6, rel=0.1)
    gemm, reference = found.kernels["gemm"]["bf16"], found.kernels["reference"]
    assert gemm["compute_efficiency"] * reference["flops_per_second"]["bf16"] == pytest.approx(PEAK, rel=0.05)
    assert gemm["memory_efficiency"] * reference["memory_bytes_per_second"] == pytest.approx(BANDWIDTH, rel=0.1)
    assert gemm["weight_gradient_ratio"] == pytest.approx(WEIGHT_GRADIENT, rel=0.05)
    assert found.kernels["prefill"]["backward_ratio"] == pytest.approx(ATTENTION_BACK, rel=0.05)


@pytest.mark.parametrize(("table", "nodes"), [("collectives", 1), ("across_nodes", 2)])
def test_collectives_of_any_size(found: Calibration, table: str, nodes: int) -> None:
    """Small ones take the latency, large ones go at the rate, those between measured sizes lie on the chord."""
    nominal = found.kernels["reference"]["link_bytes_per_second"] if nodes == 1 else NIC
    assert set(found.kernels[table]) == {"all_gather", "reduce_scatter", "all_reduce", "broadcast", "send"}
    for op, curves in found.kernels[table].items():
        curve = CollectiveCurve.model_validate(curves[2])
        for size, tolerance in ((64, 0.1), (3e4, 0.15), (3e6, 0.15), (1e9, 0.05)):
            seconds = collective_seconds(curve, op, 2, size, nominal)
            assert seconds == pytest.approx(Machine().collective(op, 2, size, nodes), rel=tolerance), (op, size)
        assert collective_seconds(curve, op, 2, 0, nominal) == 0


def test_host_times(found: Calibration) -> None:
    """What is left after kernels and collectives: as accurate as the passes are long beside it."""
    overheads = found.cluster["overheads"]
    assert overheads["eager_layer_seconds"] == pytest.approx(LAYER, rel=0.1)
    assert overheads["eager_layer_backward_seconds"] == pytest.approx(LAYER_BACK, rel=0.1)
    assert overheads["eager_pass_seconds"] == pytest.approx(PASS, rel=0.3)
    assert overheads["decode_layer_seconds"] == pytest.approx(LAYER, rel=0.1)
    assert overheads["decode_step_seconds"] == pytest.approx(STEP, rel=0.3)
    assert overheads["decode_sequence_seconds"] == pytest.approx(SEQUENCE, rel=0.3)
    assert set(overheads["deepspeed"]) == {f"zero_{stage}" for stage in ENGINE}
    _, per_layer, _ = ENGINE[3]
    assert overheads["deepspeed"]["zero_3"]["forward"]["layer_seconds"] == pytest.approx(per_layer, rel=0.2)


def test_several_files_add_up(bench: Path, tmp_path: Path) -> None:
    """Links between nodes from a second file; a spec of both knows what only one of them measured."""
    all_tables = tables()
    between = [r for r in all_tables["collectives"] if r["nodes"] == 2]
    alone = all_tables | {"collectives": [r for r in all_tables["collectives"] if r["nodes"] == 1]}
    one = write_bench(tmp_path, "one.json", tables=alone, nic_bytes_per_second=None)
    two = write_bench(tmp_path, "two.json", tables={"collectives": between}, ranks_per_node=1)
    only = calibrate([one], name="x")
    assert not only.kernels["across_nodes"]
    assert any("network" in what for what, _ in only.undetermined)
    both = calibrate([one, two], name="x")
    assert set(both.kernels["across_nodes"]) == set(both.kernels["collectives"])
    assert both.cluster["nodes"] == 2
    assert both.cluster["node"]["gpus_per_node"] == 2
    assert set(both.fitted_on) == {"one.json", "two.json"}


# --- the written spec ------------------------------------------------------------------------------------------------


def test_written_spec_simulates_as_the_machine_works(found: Calibration, tmp_path: Path) -> None:
    """A stage that scores in two micro-batches on each rank takes what the formulas say; host times are the spec's."""
    path, kernels = write(found, tmp_path / "box.yaml").paths
    assert load_kernels(kernels) == kernels_of(load_cluster(path).gpu.kernels)
    data = scenario("box.yaml")
    data["models"]["reference"] = {"score_micro_batch_samples": 2}
    ready = scenario_from_dict(data, tmp_path)
    assert ready.overheads.eager_layer_seconds == pytest.approx(LAYER, rel=0.1)
    stages = stage_seconds(simulate(prepare(ready)))
    assert stages["ref"] == pytest.approx(2 * Machine().forward(MODELS[0], 2, 48), rel=0.03)
    other = scenario_from_dict(data | {"overheads": {"firing_seconds": 0.5}}, tmp_path)
    assert other.overheads.eager_layer_seconds == ready.overheads.eager_layer_seconds
    assert stage_seconds(simulate(prepare(other)))["ref"] == pytest.approx(stages["ref"] + 0.5)


def test_links_between_nodes_are_those_measured(found: Calibration, tmp_path: Path) -> None:
    """Gradients and weights of an update: reduced in each of two micro-batches, gathered once."""
    write(found, tmp_path / "box.yaml")
    step = {}
    for nodes, per_node in ((1, 2), (2, 1)):
        data = scenario("box.yaml", "tiny-4x256")
        data["cluster"] |= {"nodes": nodes, "gpus_per_node": per_node}
        step[nodes] = stage_seconds(simulate(prepare(scenario_from_dict(data, tmp_path))))["update_actor"]
    machine, size = Machine(), WIDTH * parameters(MODELS[1], "lm")
    slower = sum(
        times * (machine.collective(op, 2, size, 2) - machine.collective(op, 2, size))
        for op, times in (("all_reduce", 2), ("all_gather", 1))
    )
    assert step[2] - step[1] == pytest.approx(slower, rel=0.1)


def test_calibrated_spec_cannot_predict_what_it_was_fitted_on(bench: Path, tmp_path: Path) -> None:
    """A run that was fitted on is refused as a prediction and taken as calibration; its fixed time is found."""
    (tmp_path / "scenario.yaml").write_text(json.dumps(scenario(tmp_path / "first.yaml")))
    write(calibrate([bench], name="box"), tmp_path / "first.yaml")
    late = scenario_from_dict(scenario(tmp_path / "first.yaml", overheads={"firing_seconds": 0.25}))
    timeline.write(simulate(prepare(late)), tmp_path / "run.jsonl")
    found = calibrate([bench], [(str(tmp_path / "run.jsonl"), str(tmp_path / "scenario.yaml"))], name="box")
    assert found.cluster["overheads"]["firing_seconds"] == pytest.approx(0.25, rel=0.01)
    assert found.fits["run.jsonl: step_seconds"]["mean_error"] < 0.01
    write(found, tmp_path / "second.yaml")
    for role in ("prediction", "calibration"):
        case = {"id": "a", "role": role, "timeline": "run.jsonl", "scenario": scenario("second.yaml")}
        path = tmp_path / f"{role}.case.yaml"
        path.write_text(json.dumps(case))
        if role == "prediction":
            with pytest.raises(InputError, match=r"was fitted on run\.jsonl"):
                run_case(path)
        else:
            assert all(abs(r.error) < 0.01 for r in run_case(path))


def test_nothing_is_overwritten(found: Calibration, tmp_path: Path) -> None:
    write(found, tmp_path / "box.yaml")
    before = (tmp_path / "box.yaml").read_text()
    with pytest.raises(InputError, match="exists already"):
        write(found, tmp_path / "box.yaml")
    (tmp_path / "box.yaml").unlink()
    with pytest.raises(InputError, match=r"box\.kernels\.yaml.*exists already"):
        write(found, tmp_path / "box.yaml")
    write(found, tmp_path / "box.yaml", force=True)
    assert (tmp_path / "box.yaml").read_text() == before
    specs = data_dir("hw_specs")
    for shipped in (specs / "clusters" / "a100-80g-sxm.yaml", specs / "kernels" / "new.yaml"):
        held = shipped.read_bytes() if shipped.exists() else None
        with pytest.raises(InputError, match="shipped specs"):
            write(found, shipped, force=True)
        assert (shipped.read_bytes() if shipped.exists() else None) == held


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "damaged"),
        ('{"kind": "rlhfsim', "damaged"),
        ("[1, 2]", "no file of"),
        ('{"kind": "other"}', "no file of"),
        ("\xff\xfe", "damaged"),
        (json.dumps({"kind": "rlhfsim microbench", "version": 2}), "version"),
        (
            json.dumps(
                {
                    "kind": "rlhfsim microbench",
                    "version": 1,
                    "machine": {},
                    "precision": "fp32",
                    "ranks": 1,
                    "ranks_per_node": 1,
                    "tables": {},
                }
            ),
            "no measurements",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=said) as caught:
        read_bench(path)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize("seconds", [None, 0.0, -1.0, float("nan"), float("inf"), "1.0", True])
def test_rows_without_a_time_are_named(tmp_path: Path, seconds: Any) -> None:
    row = {"m": 1, "n": 1, "k": 1, "weights_bytes": 1}
    broken = {"gemm": [row | {"seconds": 1.0}, row | {"seconds": seconds}]}
    with pytest.raises(InputError, match=r"tables\.gemm\.1\.seconds"):
        read_bench(write_bench(tmp_path, tables=broken))


def test_missing_file_missing_tables_and_other_machines(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_bench(tmp_path / "absent.json")
    with pytest.raises(InputError, match="at least one file"):
        calibrate([], name="x")
    partly = {k: v for k, v in tables().items() if k not in ("decode", "prefill")}
    with pytest.raises(InputError, match=r"nothing was measured of prefill, decode; `torchrun"):
        calibrate([write_bench(tmp_path, "partly.json", tables=partly)], name="x")
    other = write_bench(tmp_path, "other.json", machine={"name": "another"})
    with pytest.raises(InputError, match="one kind of machine"):
        calibrate([bench, other], name="x")


def test_arguments() -> None:
    assert split_arguments(["a.json", "r.jsonl", "s.yaml", "b.json"]) == (["a.json", "b.json"], [("r.jsonl", "s.yaml")])
    for wrong in (["r.jsonl"], ["r.jsonl", "a.json"], ["s.yaml"]):
        with pytest.raises(InputError):
            split_arguments(wrong)


def test_command(bench: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "box.yaml")
    done = CliRunner().invoke(cli, ["calibrate", str(bench), "--name", "box", "--out", out, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["files"] == [out, str(tmp_path / "box.kernels.yaml")]
    assert {"gemm.bf16", "decode_step", "deepspeed.zero_3.forward"} <= set(found["residuals"])
    assert any("ZeRO 1" in row["what"] and row["run"] for row in found["undetermined"])
    printed = CliRunner().invoke(cli, ["calibrate", str(bench), "--name", "box", "--out", out, "--force"])
    assert printed.exit_code == 0
    for text in ("gemm.bf16", "Not determined:", "eager_layer_seconds"):
        assert text in printed.output


# --- the real benchmark ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("torch") is None or find_spec("deepspeed") is None, reason="needs torch and deepspeed")
def test_microbenchmark_on_two_processes(tmp_path: Path) -> None:
    """From two gloo processes to a spec that simulates; what was measured is positive and says where it was."""
    out = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29533",
        "-m",
        "real.microbench",
        "--quick",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = read_bench(out)
    assert measured.ranks == measured.ranks_per_node == 2
    assert {"torch", "deepspeed"} <= set(measured.machine["versions"])
    zero3 = [
        r for r in measured.tables["passes"] if r["zero_stage"] == 3 and r["phase"] not in ("score", "step", "gather")
    ]
    calls = {r["phase"]: r["collectives"]["all_gather"][0] for r in zero3}
    assert calls == {
        "score_again": 1,
        "forward": 1,
        "backward": 2 * 7 + 2,
    }  # all at once; one for each matrix, embedding and head
    found = write(calibrate([out], name="here"), tmp_path / "here.yaml")
    assert any("--quick" in what for what, _ in found.undetermined)
    run = simulate(prepare(scenario_from_dict(scenario(tmp_path / "here.yaml"))))
    assert 0 < step_seconds(run) < 60
