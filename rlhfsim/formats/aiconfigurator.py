"""A table of aiconfigurator-core: `<table>_perf.parquet`.

https://pypi.org/project/aiconfigurator-core (NVIDIA, Apache-2.0), systems/data/<system>/<family>/<framework>/<version>.
Latencies are in milliseconds; `message_size` of collectives counts elements of two bytes (half, bfloat16); a decode
step's context is `step` + 1. Products, attention without a window over a cache of the model's precision, NCCL and
custom all-reduce are read; the others hold what the simulator has no kernel of.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfsim.errors import InputError, nearest
from rlhfsim.formats import Probe
from rlhfsim.measurements import Tables, needs_columns, needs_pandas, table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "table of aiconfigurator-core (*_perf.parquet)"
READ = ("gemm", "context_attention", "generation_attention", "nccl", "custom_allreduce")
NCCL_OPS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
            "alltoall": "all_to_all"}  # fmt: skip
SMALLEST = 512  # of n and k: smaller products are in no model's layer


def recognises(probe: Probe) -> bool:
    return probe.path.suffix == ".parquet"


def read(path: Path) -> Tables:
    """Raises InputError for a table that is not read, several GPUs, and times that are no positive numbers."""
    name = path.stem.removesuffix("_perf")
    if name not in READ:
        raise InputError(f"the table {name!r} is not read{nearest(name, READ)}", where=str(path))
    try:
        rows = needs_pandas().read_parquet(path)
    except ImportError:
        raise InputError("reading it needs pyarrow: pip install 'rlhfsim[measured]'", where=str(path)) from None
    except (ValueError, OSError) as error:
        raise InputError(f"is damaged: {str(error)[:100]}", where=str(path)) from None
    needs_columns(rows, ["device", "latency", "framework", "version"], path)
    devices = sorted(rows.device.unique())
    if len(devices) > 1:
        raise InputError(f"holds several GPUs: {', '.join(devices)}", field="device", where=str(path))
    if not (rows.latency > 0).all():
        at = int((~(rows.latency > 0)).to_numpy().argmax())
        raise InputError(
            f"is {rows.latency.iloc[at]} in row {at}, but must be positive", field="latency", where=str(path)
        )
    found = {"gemm": _gemm, "nccl": _collectives, "custom_allreduce": _collectives}.get(name, _attention)(
        rows, name, path
    )
    source = f"aiconfigurator-core (Apache-2.0), {rows.framework.iloc[0]} {rows.version.iloc[0]}"
    return Tables(path, source, found, device=devices[0])


def _gemm(rows: pd.DataFrame, name: str, path: Path) -> dict[str, Any]:
    needs_columns(rows, ["gemm_dtype", "m", "n", "k"], path)
    rows = rows[(rows.gemm_dtype == "bfloat16") & (rows[["n", "k"]].min(axis=1) >= SMALLEST)]
    columns = {column: rows[column].to_numpy() for column in "mnk"}
    return {"gemm": table("gemm", "gemm bfloat16", columns, rows.latency.to_numpy() * 1e-3, 0)}


def _attention(rows: pd.DataFrame, name: str, path: Path) -> dict[str, Any]:
    needs_columns(rows, ["batch_size", "num_heads", "num_key_value_heads", "head_dim", "isl", "step"], path)
    rows = rows[rows.kv_cache_dtype == "bfloat16"]
    rows = rows[rows.window_size == 0] if "window_size" in rows else rows
    kind = "prefill" if name == "context_attention" else "decode"
    tokens = rows.isl if kind == "prefill" else rows.step + 1
    columns = {
        "heads": rows.num_heads, "kv_heads": rows.num_key_value_heads, "head_dim": rows.head_dim,
        "batch": rows.batch_size, "tokens": tokens,
    }  # fmt: skip
    return {kind: table(kind, name, columns, rows.latency * 1e-3, 0)}


def _collectives(rows: pd.DataFrame, name: str, path: Path) -> dict[str, Any]:
    needs_columns(rows, ["num_gpus", "message_size"], path)
    if name == "nccl":
        rows = rows[(rows.nccl_dtype == "half") & rows.op_name.isin(NCCL_OPS)]
        ops = rows.op_name.map(NCCL_OPS)
    else:
        rows = rows[rows.kernel_source == "vLLM_custom_graph"] if "kernel_source" in rows else rows
        ops = "custom_all_reduce"
    columns = {"collective": ops, "ranks": rows.num_gpus, "nodes": 1, "bytes": 2 * rows.message_size}
    return {"collectives": table("collectives", ops, columns, rows.latency * 1e-3, 0)}
