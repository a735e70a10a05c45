"""What a file of microbenchmarks says beside its measurements, and one row of several ranks' rows; without torch."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]

VERSION = 1
MEASURED = ("seconds", "low", "high", "repeats")  # columns of a row; the others say what was measured


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
