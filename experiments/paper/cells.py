"""What the tables' columns are named after, and how a table is read: for `run.py` and `figures.py`."""

from __future__ import annotations

import csv
from pathlib import Path

BASELINES = ("colocated, zero3_per_token", "colocated, hybrid", "colocated, engine")
DISAGGREGATED = "disaggregated, engine"
EFFECTS = ("decode", "links", "memory", "sync", "efficiency")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
