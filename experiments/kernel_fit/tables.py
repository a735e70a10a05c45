"""Public tables of kernel measurements, as columns of sizes and seconds. See README.md beside this file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhfsim.costs.kernels import Rates


class Gpu(NamedTuple):
    """What one file of curves is fitted on; `name` and datasheet rates as in hw_specs/gpus."""

    name: str
    bf16: float
    fp8: float | None
    memory: float
    multiprocessors: int
    link: float
    system: str  # of aiconfigurator
    version: str  # vLLM of its tables
    nccl: str
    vidur: tuple[str, ...]  # prefixes of Vidur's *_mlp.csv

    def rates(self, precision: str = "bf16") -> Rates:
        return Rates(self.fp8 if precision == "fp8" and self.fp8 else self.bf16, self.memory, self.multiprocessors)


GPUS = {
    "ampere": Gpu("a100-80g-sxm", 312e12, None, 2.039e12, 108, 300e9, "a100_sxm", "0.14.0", "2.27.3",
                  ("a100_llama2_7b", "a100_llama3_70b")),
    "hopper": Gpu("h100-80g-sxm", 989.4e12, 1979e12, 3.35e12, 132, 450e9, "h100_sxm", "0.24.0", "2.29.2",
                  ("h100_llama2_70b",)),
    "ada": Gpu("l40s-48g", 362.05e12, 733e12, 0.864e12, 142, 31.5e9, "l40s", "0.24.0", "2.27.3", ()),
    "h200": Gpu("h200-141g-sxm", 989e12, 1979e12, 4.8e12, 132, 450e9, "h200_sxm", "0.24.0", "2.29.2", ()),
    "blackwell": Gpu("b200-180g-sxm", 2250e12, 4500e12, 7.672e12, 148, 900e9, "b200_sxm", "0.24.0", "2.29.2", ()),
    "gb200": Gpu("gb200-186g", 2500e12, 5000e12, 7.7e12, 148, 900e9, "gb200", "0.24.0", "2.29.2", ()),
    "gb300": Gpu("gb300-288g", 2500e12, 5000e12, 8e12, 148, 900e9, "gb300", "0.24.0", "2.29.2", ()),
}  # fmt: skip


# ---------------------------------------------------------------- tables


def aic_table(root: Path, gpu: Gpu, family: str, table: str) -> pd.DataFrame:
    framework, version = ("nccl", gpu.nccl) if table == "nccl" else ("vllm", gpu.version)
    rows = pd.read_parquet(
        root / "systems" / "data" / gpu.system / family / framework / version / f"{table}_perf.parquet"
    )
    return rows.assign(seconds=rows["latency"] * 1e-3)


def aic_gemm(root: Path, gpu: Gpu, precision: str) -> pd.DataFrame:
    rows = aic_table(root, gpu, "gemm", "gemm")
    rows = rows[rows.gemm_dtype == {"bf16": "bfloat16"}.get(precision, precision)]
    rows = rows[(rows[["n", "k"]].min(axis=1) >= 512) & (rows[["n", "k"]].min(axis=1) <= 32768)]
    return rows.groupby(["m", "n", "k"], as_index=False)["seconds"].median()


def aic_experts(root: Path, gpu: Gpu, precision: str) -> pd.DataFrame:
    """All products of a layer's experts on one GPU, with routing and activation: `rows` of each of `groups` experts.

    `width` is the experts' intermediate size on this rank. Balanced routing where it was measured; else that of the
    flattest power law, of which the experts that tokens reach are those of a uniform draw.
    """
    rows = aic_table(root, gpu, "moe", "moe")
    rows = rows[(rows.moe_dtype == {"bf16": "bfloat16"}.get(precision, precision)) & (rows.moe_ep_size == 1)]
    balanced = "balanced" in set(rows.distribution)
    rows = rows[rows.distribution == ("balanced" if balanced else "power_law_1.01")]
    rows = rows.assign(width=rows.inter_size // rows.moe_tp_size, chosen=rows.topk, experts=rows.num_experts)
    sizes = ["num_tokens", "hidden_size", "width", "experts", "chosen"]
    rows = rows[rows.width >= 256].groupby(sizes, as_index=False)["seconds"].median()
    routed = rows.num_tokens * rows.chosen
    drawn = rows.experts * (1 - (1 - rows.chosen / rows.experts) ** rows.num_tokens)
    groups = np.minimum(rows.experts, routed) if balanced else drawn
    return rows.assign(routed=routed, groups=groups, rows=routed / groups)


def vidur_tables(root: Path, gpu: Gpu) -> pd.DataFrame:
    tables = [pd.read_csv(root / f"{name}_mlp.csv") for name in gpu.vidur]
    return pd.concat(tables, ignore_index=True).rename(columns={"num_tensor_parallel_workers": "tp"})


def vidur_gemm(root: Path, gpu: Gpu) -> pd.DataFrame:
    t = vidur_tables(root, gpu)
    width, ffn, tp = t.n_embd, t.n_expanded_embd, t.tp
    qkv = width // t.n_head * (t.n_head + 2 * t.n_kv_head)
    shapes = {
        "attn_pre_proj": (qkv // tp, width),
        "attn_post_proj": (width, width // tp),
        "mlp_up_proj": (2 * ffn // tp, width),
        "mlp_down_proj": (width, ffn // tp),
    }
    parts = [
        pd.DataFrame({"m": t.num_tokens, "n": n, "k": k, "seconds": t[f"time_stats.{op}.median"] * 1e-3})
        for op, (n, k) in shapes.items()
    ]
    return pd.concat(parts).groupby(["m", "n", "k"], as_index=False)["seconds"].median()


def vidur_memory(root: Path, gpu: Gpu) -> dict[str, pd.DataFrame]:
    """Bytes moved and seconds per memory-bound kernel."""
    t = vidur_tables(root, gpu)
    m, width, tp = t.num_tokens, t.n_embd, t.tp
    heads = width // t.n_head * (t.n_head + t.n_kv_head) // tp
    moved = {
        "residual_add": {"add": 6 * m * width},
        "rms_norm": {"input_layernorm": 4 * m * width, "post_attention_layernorm": 4 * m * width},
        "rope": {"attn_rope": 4 * m * heads},
        "gated_activation": {"mlp_act": 6 * m * t.n_expanded_embd // tp},
        "embedding": {"emb": 4 * m * width},
    }
    return {
        kernel: pd.concat(
            pd.DataFrame({"bytes": size, "seconds": t[f"time_stats.{op}.median"] * 1e-3}) for op, size in ops.items()
        ).groupby("bytes", as_index=False)["seconds"].median()
        for kernel, ops in moved.items()
    }  # fmt: skip


def aic_attention(root: Path, gpu: Gpu, table: str) -> pd.DataFrame:
    """Head dimension 128, bf16 cache, no sliding window; `tokens` is the context of one sequence."""
    rows = aic_table(root, gpu, "attention", f"{table}_attention")
    rows = rows[(rows.head_dim == 128) & (rows.kv_cache_dtype == "bfloat16")]
    rows = rows[rows.window_size == 0] if "window_size" in rows else rows
    rows = rows.rename(columns={"batch_size": "batch", "num_heads": "heads", "num_key_value_heads": "kv_heads"})
    tokens = rows.isl if table == "context" else rows.step + 1
    rows = rows.assign(tokens=tokens)[tokens >= (64 if table == "context" else 16)]
    return rows.groupby(["batch", "heads", "kv_heads", "tokens", "head_dim"], as_index=False)["seconds"].median()


def aic_collective(root: Path, gpu: Gpu, op: str) -> pd.DataFrame:
    """`message_size` counts elements of two bytes."""
    if op == "custom_all_reduce":
        rows = aic_table(root, gpu, "comm", "custom_allreduce")
        rows = rows[rows.kernel_source == "vLLM_custom_graph"]
    else:
        rows = aic_table(root, gpu, "comm", "nccl")
        rows = rows[(rows.nccl_dtype == "half") & (rows.op_name == {"all_to_all": "alltoall"}.get(op, op))]
    rows = rows.assign(bytes=2 * rows.message_size).rename(columns={"num_gpus": "ranks"})
    return rows.groupby(["ranks", "bytes"], as_index=False)["seconds"].median()


def vidur_link(root: Path, op: str, nodes: int) -> pd.DataFrame:
    rows = pd.read_csv(root / f"a100_dgx_{op}.csv")
    rows = rows[(rows.num_workers == 2) & (rows.devices_per_node == 2 // nodes)]
    rows = pd.DataFrame({"bytes": rows["size"], "seconds": rows[f"time_stats.{op}.median"] * 1e-3})
    return rows.groupby("bytes", as_index=False)["seconds"].median()


def training_gemm(path: Path) -> pd.DataFrame:
    """SimuMax's training GEMMs on A100 PCIe; `layout` TN: forward, NN: data gradient, NT: weight gradient."""
    system = json.loads(path.read_text())["accelerator"]["op"]["matmul"]
    rows = []
    for key, efficiency in system["accurate_efficient_factor"].items():
        m, k, n, layout = re.match(r"b=1, m=(\d+), k=(\d+), n=(\d+), layout=(\w+)", key).groups()
        m, n, k = int(m), int(n), int(k)
        rows.append((m, n, k, layout, 2 * m * n * k / (system["tflops"] * 1e12 * efficiency)))
    return pd.DataFrame(rows, columns=["m", "n", "k", "layout", "seconds"])
