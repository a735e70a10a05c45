"""Forward times of a layer's operators, as microsoft/vidur profiles them.

https://github.com/microsoft/vidur, data/profiling/compute/<gpu>/<model>/mlp.csv (MIT): one row for each number of
tokens and of tensor-parallel workers; `time_stats.<operator>.{min,max,mean,median,std}` in milliseconds.
`attn_pre_proj` is the projection to queries, keys and values, `mlp_up_proj` holds the gate too where the MLP is gated
(vidur/profiling/mlp/mlp_impl.py). The medians are read. The file names neither GPU nor software.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhfsim.formats import Probe
from rlhfsim.measurements import Tables, joined, needs_columns, numbers, read_csv, table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "operator table of vidur (*_mlp.csv)"
SHAPE = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens", "num_tensor_parallel_workers")
GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
MEMORY = {  # operator: kernel
    "emb": "embedding",
    "input_layernorm": "rms_norm",
    "post_attention_layernorm": "rms_norm",
    "attn_rope": "rope",
    "mlp_act": "gated_activation",
    "add": "residual_add",
}


def recognises(probe: Probe) -> bool:
    return any(name.startswith("time_stats.mlp_up_proj") for name in probe.columns)


def read(path: Path) -> Tables:
    rows = read_csv(path)
    operators = (*GEMMS, *MEMORY)
    needs_columns(rows, ["use_gated_mlp"], path)
    rows = numbers(rows, [*SHAPE, *(_column(op) for op in operators)], path)
    tokens, width, tp = rows.num_tokens, rows.n_embd, rows.num_tensor_parallel_workers
    head = width // rows.n_head
    gated = rows.use_gated_mlp.astype(str).str.lower().isin(["true", "1"])
    ffn = rows.n_expanded_embd // tp
    shapes = {
        "attn_pre_proj": (head * (rows.n_head + 2 * rows.n_kv_head) // tp, width),
        "attn_post_proj": (width, width // tp),
        "mlp_up_proj": (ffn.where(~gated, 2 * ffn), width),
        "mlp_down_proj": (width, ffn),
    }
    gemms = [
        table("gemm", op, {"m": tokens, "n": n, "k": k}, _seconds(rows, op), rows.line, rows.line)
        for op, (n, k) in shapes.items()
    ]
    elements = {
        "emb": 2 * tokens * width,
        "input_layernorm": 2 * tokens * width,
        "post_attention_layernorm": 2 * tokens * width,
        "attn_rope": 2 * tokens * head * (rows.n_head + rows.n_kv_head) // tp,
        "mlp_act": tokens * ffn.where(~gated, 3 * ffn / 2) * 2,
        "add": 3 * tokens * width,
    }
    memory = [
        table("memory", op, {"kernel": kernel, "bytes": 2 * elements[op]}, _seconds(rows, op), rows.line, rows.line)
        for op, kernel in MEMORY.items()
    ]
    return Tables(path, "microsoft/vidur, compute profile (MIT)", {"gemm": joined(gemms), "memory": joined(memory)})


def _column(op: str) -> str:
    return f"time_stats.{op}.median"


def _seconds(rows: pd.DataFrame, op: str) -> pd.Series:
    return rows[_column(op)] * 1e-3
