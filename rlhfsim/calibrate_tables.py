"""From tables of other projects to a hardware spec: a shipped one, with curves and host times of the user's own GPU.

What the tables do not hold stays as it is in the spec that is started from, and the result says so. One group of rows
in four is held out of every fit (`rlhfsim.fitting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from .calibrate import MEMORY_KERNELS, Calibration, calibrate, split_arguments
from .checks import the_gpu
from .costs.kernels import Kernels
from .errors import InputError
from .fitting import (
    Data,
    fit_decode,
    fit_gemm,
    fit_memory,
    fit_prefill,
    fit_prefill_backward,
    fit_weight_gradient,
    measured_collective,
    split,
)
from .formats import format_of, microbench, read
from .kernel_errors import WIDTH, check_plausible, rates_of
from .measurements import Log, Measurements, Records, Served, Tables, cluster_of, joined
from .serving import host_times
from .simulate import kernels_of
from .spec.hardware import Cluster
from .training_log import report
from .validate import digest

LEAST_ROWS = 8  # of different shapes, for a curve of several coefficients
COLLECTIVE_SIZES = 16  # points of a curve: more say nothing more, single sizes are noisy
ATTENTION = ("batch", "heads", "kv_heads", "tokens", "head_dim")
GROUPS = {
    "gemm": ("n", "k"),
    "weight_gradient": ("n", "k"),
    "prefill": ("batch", "tokens"),
    "prefill_backward": ("batch", "tokens"),
    "decode": ("batch", "tokens"),
}


def calibrate_files(paths: Sequence[str], *, gpu: str | None, name: str) -> Calibration:
    """A spec from tables and served runs of one GPU. Raises InputError for files of several GPUs, and for files on
    which nothing can be fitted."""
    found = [read(path) for path in paths]
    for one in found:
        if isinstance(one, Records | Log):
            what = "hold whole runs, on which nothing is fitted: `rlhfsim validate` sets them beside predictions"
            raise InputError(
                f"the records {what}" if isinstance(one, Records) else f"its steps {what}", where=str(one.path)
            )
    gpus = {the_gpu(one, gpu) for one in found}
    if len(gpus) > 1:
        raise InputError(f"are of {', '.join(sorted(gpus))}; one spec is of one GPU", where=", ".join(paths))
    return _fitted(found, cluster_of(gpus.pop()), name, paths)


def _fitted(found: Sequence[Measurements], base: Cluster, name: str, paths: Sequence[str]) -> Calibration:
    tables = [one for one in found if isinstance(one, Tables)]
    precisions = {one.precision for one in tables}
    if len(precisions) > 1:
        raise InputError(f"are in {', '.join(sorted(precisions))}; one precision at a time", where=", ".join(paths))
    kernels, fits = _kernels(tables, base, name)
    cluster = _cluster(base, name, [digest(file) for file in _files(paths)])
    for one in found:
        if isinstance(one, Served):
            times, errors = host_times(one, base, Kernels.model_validate(kernels))
            cluster["overheads"] = cluster["overheads"] | times
            fits["time_per_output_token"] = {"rows": len(one.requests), "held_out_rows": 0} | errors
    missing = [
        (f"{curve} (as in {base.gpu.kernels}.yaml)", "a table with it")
        for curve in Kernels.model_validate(kernels).fits()
        if curve not in fits and not curve.startswith("collectives")
    ]
    return Calibration(cluster, kernels, fits, missing, {file.name: digest(file) for file in _files(paths)})


def _files(paths: Sequence[str]) -> list[Path]:
    return [file for path in map(Path, paths) for file in ([path / "requests.jsonl"] if path.is_dir() else [path])]


def _kernels(tables: Sequence[Tables], base: Cluster, name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The file of curves as plain data, and the errors of those that were fitted."""
    record = kernels_of(base.gpu.kernels).model_dump(exclude_unset=True)
    precision = tables[0].precision if tables else "bf16"
    rates, width = rates_of(base.gpu, precision), float(WIDTH[precision])
    own = {table for one in tables for table in one.tables}
    rows = {table: joined(one.tables[table] for one in tables if table in one.tables) for table in own}
    for one in tables:
        check_plausible(one, base.gpu)
    record |= {"name": name, "fitted": date.today().isoformat()}
    record["sources"] = record["sources"] | {
        "tables": "; ".join(f"{t.path.name}: {t.source}" for t in tables) or "none"
    }
    fits: dict[str, dict[str, Any]] = {}

    def done(curve: str, fit: dict[str, Any]) -> None:
        fits[curve] = {"held_out_rows": 0} | {
            key: value for key, value in fit.items() if key not in ("source", "measured", "note")
        }

    key = "fp8" if precision == "fp8" else "bf16"
    if "gemm" in rows:
        data = _data("gemm", rows["gemm"])
        curve = fit_gemm(data, rates, "tables", input_bytes=width, output_bytes=max(2.0, width))
        record["gemm"][key] = record["gemm"].get(key, record["gemm"]["bf16"]) | curve
        done(f"gemm.{key}", curve["fit"])
    if "weight_gradient" in rows:
        data = _data("weight_gradient", rows["weight_gradient"])
        gradient = fit_weight_gradient(record["gemm"][key], data, rates, "tables", width)
        record["gemm"][key] |= gradient
        done(f"gemm.{key}.weight_gradient", gradient["weight_gradient_fit"])
    if "prefill" in rows:
        curve = fit_prefill(_data("prefill", rows["prefill"]), rates, "tables", width)
        record["prefill"] |= curve
        done("prefill", curve["fit"])
    if "prefill_backward" in rows:
        data = _data("prefill_backward", rows["prefill_backward"])
        backward = fit_prefill_backward(record["prefill"], data, rates, "tables", width)
        record["prefill"] |= backward
        done("prefill.backward", backward["backward_fit"])
    if "decode" in rows:
        record["decode"] = fit_decode(_data("decode", rows["decode"]), rates, "tables", width)
        done("decode", record["decode"]["fit"])
    for kernel in MEMORY_KERNELS:
        part: Any = rows["memory"][rows["memory"].kernel == kernel] if "memory" in rows else []
        if len(part):
            data = split(part.groupby("bytes", as_index=False)["seconds"].median(), ["bytes"])
            record["memory"][kernel] = fit_memory(data, rates, "tables")
            done(f"memory.{kernel}", record["memory"][kernel]["fit"])
    if "collectives" in rows:
        _fit_collectives(rows["collectives"], base, record, done)
    return record, fits


def _data(name: str, rows: Any) -> Data:
    """The median of each shape. Raises InputError for too few of them."""
    columns = ["m", "n", "k"] if name in ("gemm", "weight_gradient") else list(ATTENTION)
    shapes = rows.groupby(columns, as_index=False)["seconds"].median()
    if len(shapes) < LEAST_ROWS:
        raise InputError(
            f"has {len(shapes)} different shapes; at least {LEAST_ROWS} are needed for a curve", field=name
        )
    return split(shapes.assign(weights_bytes=np.inf), list(GROUPS[name]))


def _fit_collectives(rows: Any, base: Cluster, record: dict[str, Any], done: Any) -> None:
    """Inside a node relative to the GPU's links; between nodes, one rank on each, relative to the NIC."""
    link = (base.gpu.nvlink_bytes_per_second or base.gpu.pcie_bytes_per_second).value
    nic = base.network.nic_bytes_per_second.value
    for (op, ranks, nodes), own in rows.groupby(["collective", "ranks", "nodes"]):
        if nodes > 1 and nodes != ranks:
            continue  # a mixture of both links: no curve of one
        bins = np.unique(np.round(np.geomspace(own["bytes"].min(), own["bytes"].max(), COLLECTIVE_SIZES + 1)))
        place = np.clip(np.searchsorted(bins, own["bytes"], side="right"), 1, len(bins) - 1)
        points = own.groupby(place)[["bytes", "seconds"]].median()
        data = split({"bytes": points["bytes"].to_numpy(), "seconds": points.seconds.to_numpy()}, ["bytes"])
        table, rate = ("collectives", link) if nodes == 1 else ("across_nodes", nic)
        curve = measured_collective(data, op, int(ranks), rate, "tables")
        record.setdefault(table, {}).setdefault(op, {})[int(ranks)] = curve
        done(f"{table}.{op}.{int(ranks)}", curve["fit"])


def _cluster(base: Cluster, name: str, fitted_on: list[str]) -> dict[str, Any]:
    found = base.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    found = {key: value for key, value in found.items() if key != "parts"}
    gpu = found["gpu"] | {"name": name, "kernels": f"./{name}.kernels.yaml", "fitted_on": fitted_on}
    return found | {"name": name, "gpu": gpu, "overheads": dict(found.get("overheads", {}))}


def workload_of_logs(paths: Sequence[str]) -> list[dict[str, Any]] | None:
    """The workloads of training logs, if all files are logs; None: none is one. Raises InputError for a mixture."""
    found = [read(path) for path in paths]
    logs = [one for one in found if isinstance(one, Log)]
    if not logs:
        return None
    if len(logs) < len(found):
        raise InputError("training logs give a workload, tables a spec: not both at once", where=str(logs[0].path))
    return [report(log).workload for log in logs]


def write_workload(found: dict[str, Any], out: str | Path, *, force: bool = False) -> None:
    """`workload:` of a scenario. Raises InputError rather than overwrite, unless forced."""
    from ruamel.yaml import YAML

    path = Path(out)
    if path.exists() and not force:
        raise InputError(f"{str(path)!r} exists already; --force overwrites it", field="--out")
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(found, file)


def calibrate_any(paths: Sequence[str], *, name: str | None, gpu: str | None) -> Calibration | dict[str, Any]:
    """A spec from whatever the files are; of training logs `{"workload": ...}` of the first.

    Raises InputError for options that these files do not need, and for a mixture of both kinds.
    """
    own = [path for path in paths if path.endswith((".jsonl", ".yaml", ".yml")) and not _of_another(path)]
    foreign = [path for path in paths if path not in own and format_of(path) not in (None, microbench)]
    if foreign and len(foreign) < len(paths):
        raise InputError("is no file of real.microbench, but others are: not both at once", where=foreign[0])
    if not foreign:
        if gpu is not None:
            raise InputError(
                "has no meaning for files of real.microbench, which say what they were measured on", field="--gpu"
            )
        return calibrate(*split_arguments(paths), name=_given(name))
    if (workloads := workload_of_logs(paths)) is not None:
        if name is not None or gpu is not None or len(workloads) > 1:
            raise InputError("a workload is made of one training log, without --name and --gpu", where=paths[0])
        return {"workload": workloads[0]}
    return calibrate_files(paths, gpu=gpu, name=_given(name))


def _of_another(path: str) -> bool:
    return format_of(path) is not None


def _given(name: str | None) -> str:
    if not name:
        raise InputError("is needed: what the machine is called", field="--name")
    return name
