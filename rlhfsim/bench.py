"""Files of `real.microbench`: how they are written, from the rows of several ranks, and read; without torch."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from .errors import InputError
from .spec.base import Count, Record
from .spec.problems import validate as validated

Row = dict[str, Any]

VERSION = 1
MAX_BYTES = 64 << 20
MEASURED = ("seconds", "low", "high", "repeats")  # columns of a row; the others say what was measured

# The numbers that every row of a table has, besides `seconds`.
COLUMNS: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k", "weights_bytes"),
    "weight_gradient": ("m", "n", "k", "weights_bytes"),
    "prefill": ("heads", "kv_heads", "head_dim", "batch", "tokens"),
    "prefill_backward": ("heads", "kv_heads", "head_dim", "batch", "tokens"),
    "decode": ("heads", "kv_heads", "head_dim", "batch", "tokens"),
    "memory": ("bytes",),
    "collectives": ("ranks", "nodes", "bytes"),
    "copies": ("bytes",),
    "passes": ("zero_stage", "batch", "tokens", "ranks"),
    "decode_step": ("rows", "tokens"),
}


class Bench(Record):
    """A file of `real.microbench`."""

    kind: Literal["rlhfsim microbench"]
    version: Literal[1]
    machine: dict[str, Any]
    precision: Literal["fp32", "bf16", "fp16"]
    ranks: Count
    ranks_per_node: Count
    quick: bool = False
    nic_bytes_per_second: float | None = Field(default=None, gt=0)
    started: str = ""
    seconds: float = 0.0
    clocks: list[str | None] = Field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]]


# --- writing ---------------------------------------------------------------------------------------------------------


def merged(ranks: Iterable[dict[str, list[Row]]]) -> dict[str, list[Row]]:
    """Tables of all ranks as one: medians over the ranks that have a row, with the ranks' full range."""
    same: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for table, row in ((table, row) for tables in ranks for table, rows in tables.items() for row in rows):
        same[table, json.dumps({k: v for k, v in row.items() if k not in MEASURED})].append(row)
    found: dict[str, list[Row]] = defaultdict(list)
    for (table, _), rows in same.items():
        seconds, low, high = ([row[column] for row in rows] for column in ("seconds", "low", "high"))
        found[table].append(rows[0] | {"seconds": median(seconds), "low": min(low), "high": max(high)})
    return found


def write(
    path: Path, tables: dict[str, list[Row]], about: dict[str, Any], machine: dict[str, Any], begun: float
) -> float:
    """The file that `rlhfsim calibrate` reads; begun: when measuring began (`time.time`). Returns how long it took."""
    seconds = round(time.time() - begun, 1)
    started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(begun))
    found = {
        "kind": "rlhfsim microbench",
        "version": VERSION,
        "machine": machine,
        "started": started,
        "seconds": seconds,
    }
    path.write_text(json.dumps(found | about | {"tables": tables}, indent=1))
    return seconds


def machine(gpu: Any = None) -> dict[str, Any]:
    """What is measured on: a GPU, given as torch's properties of it, or the CPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = {package: version(package) for package in ("torch", "transformers", "deepspeed")}
    return {
        "device": "cuda" if gpu else "cpu",
        "name": gpu.name if gpu else _cpu_info("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "multiprocessors": gpu.multi_processor_count if gpu else 1,
        "memory_bytes": gpu.total_memory if gpu else memory,
        "host_memory_bytes": memory,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | packages,
    }


def clocks(device: str) -> str | None:
    """Clocks, power and temperature of the GPUs, or the CPU's clock; None where they cannot be read."""
    if device == "cpu":
        return _cpu_info("cpu MHz")
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        return subprocess.check_output(["nvidia-smi", query, "--format=csv"], text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_info(name: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_bench(path: str | Path) -> Bench:
    """Raises InputError for a file that is missing, damaged, empty or something else."""
    path = Path(path)
    try:
        size = path.stat().st_size
        data = json.loads(path.read_text(encoding="utf-8")) if size <= MAX_BYTES else None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise InputError(f"is damaged, or no JSON: {str(error)[:100]}", where=str(path)) from None
    if not isinstance(data, dict) or data.get("kind") != "rlhfsim microbench":
        raise InputError("is no file of `python -m real.microbench`", where=str(path))
    bench = validated(Bench, data, {"": str(path)})
    if not any(bench.tables.values()):
        raise InputError("has no measurements", field="tables", where=str(path))
    for table, rows in bench.tables.items():
        for i, row in enumerate(rows):
            _check_row(table, row, f"tables.{table}.{i}", path)
    return bench


def _check_row(table: str, row: Row, place: str, path: Path) -> None:
    for name in (*COLUMNS.get(table, ()), "seconds"):
        value = row.get(name)
        least = 0 if name == "zero_stage" else 1e-12
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise InputError(f"is {value!r}, but must be a positive number", field=f"{place}.{name}", where=str(path))
