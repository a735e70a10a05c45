"""Files of microbenchmarks, as far as they need no torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

from rlhfsim import bench
from rlhfsim.bench import read_bench


def row(seconds: float, **what: int) -> bench.Row:
    return what | {"seconds": seconds, "low": seconds / 2, "high": 2 * seconds, "repeats": 5}


def test_rows_of_ranks_become_one_row_of_what_was_measured() -> None:
    ranks = [
        {"gemm": [row(1.0, m=1), row(5.0, m=2)], "copies": []},
        {"gemm": [row(7.0, m=2), row(3.0, m=1)]},
        {"gemm": [row(2.0, m=1)], "decode": [row(4.0, m=1)]},
    ]
    assert bench.merged(ranks) == {
        "gemm": [
            {"m": 1, "seconds": 2.0, "low": 0.5, "high": 6.0, "repeats": 5},
            {"m": 2, "seconds": 6.0, "low": 2.5, "high": 14.0, "repeats": 5},
        ],
        "decode": [{"m": 1, "seconds": 4.0, "low": 2.0, "high": 8.0, "repeats": 5}],
    }


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    about = {"precision": "bf16", "ranks": 2, "ranks_per_node": 1, "quick": True, "nic_bytes_per_second": 1e9}
    gpu = SimpleNamespace(name="a GPU", multi_processor_count=132, total_memory=80 << 30)
    path, tables = tmp_path / "bench.json", {"memory": [row(1.0, bytes=1)]}
    seconds = bench.write(path, tables, about, {"device": "cuda", "name": gpu.name}, time.time() - 2.0)
    found = read_bench(path)
    assert (found.ranks, found.precision, found.machine["name"]) == (2, "bf16", "a GPU")
    assert found.tables == tables and 2.0 <= found.seconds == seconds < 10.0
    assert json.loads(path.read_text())["version"] == bench.VERSION
