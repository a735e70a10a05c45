"""A file of our own `real.microbench`: see `rlhfsim.bench`, which reads it."""

from __future__ import annotations

from pathlib import Path

from rlhfsim.bench import COLUMNS, read_bench
from rlhfsim.formats import Probe
from rlhfsim.measurements import TEXTS, Tables, needs_pandas, table

TITLE = "file of real.microbench (*.json)"


def recognises(probe: Probe) -> bool:
    return {"kind", "machine", "tables"} <= probe.keys


def read(path: Path) -> Tables:
    """Kernels and collectives alone: passes and steps of whole models are no tables of kernels."""
    bench, pandas, tables = read_bench(path), needs_pandas(), {}
    for name in ("gemm", "weight_gradient", "prefill", "prefill_backward", "decode", "memory", "collectives"):
        rows = pandas.DataFrame(bench.tables.get(name, []))
        if len(rows):
            if name == "collectives":
                rows = rows.rename(columns={"op": "collective"})
            kept = {c: rows[c] for c in (*TEXTS.get(name, ()), *COLUMNS[name]) if c in rows}
            calls = rows["calls"].fillna(1) if "calls" in rows else 1
            if name == "memory":
                rows = rows[rows.kernel != "copy"]
            op = next((rows[c] for c in ("collective", "kernel") if c in rows), name)
            tables[name] = table(name, op, kept, rows.seconds / calls, 0)
    return Tables(path, f"real.microbench, {bench.started} UTC", tables, bench.precision, bench.machine.get("name", ""))
