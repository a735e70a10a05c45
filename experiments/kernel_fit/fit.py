"""Fit the curves of hw_specs/kernels/ from public kernel measurements. See README.md beside this file.

python experiments/kernel_fit/fit.py --vidur DIR --aiconfigurator DIR --simumax FILE [--out DIR] [--samples DIR]
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlhfsim.costs.kernels import GemmCurve, Kernels, Rates, gemm_time
from rlhfsim.fitting import (
    Data,
    errors,
    fit_collective,
    fit_decode,
    fit_gemm,
    fit_memory,
    fit_prefill,
    split,
    write_kernels,
)

ROOT = Path(__file__).resolve().parents[2]
COMMENT = (
    "Efficiency curves of GPU kernels, fitted by experiments/kernel_fit/fit.py: do not edit by hand.\n"
    "Seconds and bytes; efficiencies are relative to `reference`. Errors: on the rows held out."
)
AIC = "aiconfigurator-core 0.12.0 (PyPI, Apache-2.0, NVIDIA): systems/data"
VIDUR = "microsoft/vidur, data/profiling (MIT, 2024)"


class Gpu(NamedTuple):
    """What one architecture is fitted on; `name` and datasheet rates as in hw_specs/gpus."""

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
    "blackwell": Gpu("b200-180g-sxm", 2250e12, 4500e12, 7.672e12, 148, 900e9, "b200_sxm", "0.24.0", "2.29.2", ()),
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


# ---------------------------------------------------------------- fits


def training_gemm(path: Path) -> pd.DataFrame:
    """SimuMax's training GEMMs on A100 PCIe; `layout` TN: forward, NN: data gradient, NT: weight gradient."""
    system = json.loads(path.read_text())["accelerator"]["op"]["matmul"]
    rows = []
    for key, efficiency in system["accurate_efficient_factor"].items():
        m, k, n, layout = re.match(r"b=1, m=(\d+), k=(\d+), n=(\d+), layout=(\w+)", key).groups()
        m, n, k = int(m), int(n), int(k)
        rows.append((m, n, k, layout, 2 * m * n * k / (system["tflops"] * 1e12 * efficiency)))
    return pd.DataFrame(rows, columns=["m", "n", "k", "layout", "seconds"])


def on_training(curve: GemmCurve, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Errors of a curve on the training GEMMs, by layout."""
    rates = Rates(312e12, 1.935e12, 108)  # A100 PCIe 80 GB datasheet
    found = {}
    for layout, part in rows.groupby("layout"):
        found[layout] = errors(gemm_time(curve, rates, part.m, part.n, part.k).seconds, part.seconds.to_numpy())
    return found


def weight_gradient(ampere: GemmCurve, path: Path) -> dict[str, Any]:
    """Seconds of a weight-gradient GEMM (fp32 accumulation into memory) over those of a forward one of its shape."""
    rows = training_gemm(path)
    bias = on_training(ampere, rows)
    ratio = float(f"{(1 + bias['TN']['bias']) / (1 + bias['NT']['bias']):.3g}")
    note = f"A100 PCIe; against this curve, forward mean {bias['TN']['mean_error']}, bias {bias['TN']['bias']:+}"
    fit = {"source": "simumax", "rows": int((rows.layout == "NT").sum()), "note": note}
    return {"weight_gradient_ratio": ratio, "weight_gradient_fit": fit}


def backward_ratio(path: Path) -> dict[str, Any]:
    """FlashAttention backward over forward seconds, the total over SimuMax's shapes of head dimension 128.

    Its efficiencies count 2 and 5 units of FLOPs: 2.5 times the work, as flash-attention's own benchmark does.
    """
    op = json.loads(path.read_text())["accelerator"]["op"]
    forward, backward = (op[name]["accurate_efficient_factor"] for name in ("sdp_fwd", "sdp_bwd"))
    keys = [key for key in forward if "qk_head_dim=128" in key]
    heads = np.array([float(re.search(r"head_num=(\d+)", key)[1]) for key in keys])
    forward_time = 2 * heads / np.array([forward[key] for key in keys])
    backward_time = 5 * heads / np.array([backward[key] for key in keys])
    ratio = float(f"{backward_time.sum() / forward_time.sum():.3g}")
    ratios = backward_time / forward_time
    note = f"per shape {ratios.min():.2f} (4 heads) to {ratios.max():.2f}; errors are of the rows fitted"
    fit = {"source": "simumax", "rows": len(keys), "note": note} | errors(ratio * forward_time, backward_time)
    return {"backward_ratio": ratio, "backward_fit": fit}


def sources(arch: str, gpu: Gpu) -> dict[str, str]:
    tables = f"{AIC}/{gpu.system}"
    return {
        "vidur": f"{VIDUR}: {', '.join(f'{name}_mlp.csv' for name in gpu.vidur) or 'A100 and H100 compute tables'}; "
        "median over repeats",
        "vidur_network": f"{VIDUR}: a100_dgx_all_reduce.csv, a100_dgx_send_recv.csv",
        "aic_gemm": f"{tables}/gemm/vllm/{gpu.version}/gemm_perf.parquet; n, k >= 512",
        "aic_attention": f"{tables}/attention/vllm/{gpu.version}/{{context,generation}}_attention_perf.parquet; "
        "head dimension 128, bf16, no window",
        "aic_nccl": f"{tables}/comm/nccl/{gpu.nccl}/nccl_perf.parquet; half, one node",
        "aic_custom": f"{tables}/comm/vllm/{gpu.version}/custom_allreduce_perf.parquet; under CUDA graphs",
        "simumax": "MooreThreads/SimuMax (Apache-2.0, 2026), A100-PCIe bf16 system file: matmul, sdp_fwd, sdp_bwd, "
        "bandwidth; its simu_tools/efficency_test/test_fa_efficiency.py counts 2.5x FLOPs backward",
        "superbench": "microsoft/superbenchmark (MIT), tests/analyzer/test_generate_baseline.py: "
        "kernel-launch/event_time 5.5 us (from the launch call to the kernel's start); the machine is not named",
    }  # fmt: skip


def gemm_curves(args: argparse.Namespace, gpu: Gpu, keep: dict[str, Data]) -> dict[str, Any]:
    curves = {}
    ampere = split(vidur_gemm(args.vidur, GPUS["ampere"]), ["n", "k"])
    ampere_curve = GemmCurve.model_construct(**fit_gemm(ampere, GPUS["ampere"].rates(), "vidur"))
    gradient = weight_gradient(ampere_curve, args.simumax)
    if gpu is not GPUS["ampere"]:
        gradient["weight_gradient_fit"] = copied(gradient["weight_gradient_fit"], "ampere")
    if gpu.vidur:
        data = keep["gemm"] = split(vidur_gemm(args.vidur, gpu), ["n", "k"])
        curves["bf16"] = fit_gemm(data, gpu.rates(), "vidur")
        other = aic_gemm(args.aiconfigurator, gpu, "bf16")
        curve = GemmCurve.model_construct(**curves["bf16"])
        across = errors(gemm_time(curve, gpu.rates(), other.m, other.n, other.k).seconds, other.seconds.to_numpy())
        curves["bf16"]["fit"]["note"] = (
            f"on aiconfigurator's {len(other)} shapes: mean {across['mean_error']}, weighted "
            f"{across['weighted_error']}, bias {across['bias']:+}"
        )
    else:
        data = keep["gemm"] = split(aic_gemm(args.aiconfigurator, gpu, "bf16"), ["n", "k"])
        note = "isolated kernels; on A100 and H100 this campaign is 10-20 % faster than Vidur's and training GEMMs"
        curves["bf16"] = fit_gemm(data, gpu.rates(), "aic_gemm", note=note)
    if gpu.fp8:
        data = split(aic_gemm(args.aiconfigurator, gpu, "fp8"), ["n", "k"])
        curves["fp8"] = fit_gemm(data, gpu.rates("fp8"), "aic_gemm", input_bytes=1.0, note="per-tensor scales")
    return {precision: curve | gradient for precision, curve in curves.items()}


def compare_campaigns(args: argparse.Namespace) -> None:
    """Print why Vidur's campaign is shipped: training GEMMs of a third party against a fit of either."""
    gpu, rows = GPUS["ampere"], training_gemm(args.simumax)
    for name, table in (("vidur", vidur_gemm(args.vidur, gpu)), ("aic", aic_gemm(args.aiconfigurator, gpu, "bf16"))):
        curve = GemmCurve.model_construct(**fit_gemm(split(table, ["n", "k"]), gpu.rates(), name))
        for layout, error in on_training(curve, rows).items():
            print(f"campaign {name:6s} on SimuMax training GEMMs {layout}: {error}")


def memory_curves(args: argparse.Namespace, arch: str, gpu: Gpu, keep: dict[str, Data]) -> dict[str, Any]:
    base = arch if gpu.vidur else {"ada": "ampere", "blackwell": "hopper"}[arch]
    curves = {}
    for kernel, rows in vidur_memory(args.vidur, GPUS[base]).items():
        data = split(rows, ["bytes"])
        curves[kernel] = fit_memory(data, GPUS[base].rates(), "vidur")
        if gpu.vidur:
            keep[kernel] = data
    # SimuMax states an efficiency of 1600 GB/s; the A100 PCIe 80 GB's datasheet says 1935 GB/s.
    system = json.loads(args.simumax.read_text())["accelerator"]["bandwidth"]
    for kernel, name in (("optimizer", "default"), ("cross_entropy", "ce")):
        efficiency = system[name]["efficient_factor"] * system[name]["gbps"] / 1935
        note = f"A100 PCIe, bandwidth.{name}; latency as stated there, which includes launches"
        curves[kernel] = {
            "memory_efficiency": float(f"{efficiency:.4g}"),
            "kernel_seconds": system[name]["latency_us"] * 1e-6,
            "fit": {"source": "simumax", "rows": 1, "note": note},
        }
    for curve in curves.values():
        measured_on = "ampere" if curve["fit"]["source"] == "simumax" else base
        if measured_on != arch:
            curve["fit"] = copied(curve["fit"], measured_on)
    return curves


def collective_curves(args: argparse.Namespace, gpu: Gpu, keep: dict[str, Data]) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    nvlink = gpu.link > 40e9  # vLLM's custom all-reduce needs peer access between all ranks
    note = "PCIe host without peer access at 4 and 8 ranks, far below the slot's rate" if not nvlink else ""
    for op in ("all_reduce", *(["custom_all_reduce"] if nvlink else []), "all_gather", "reduce_scatter", "all_to_all"):
        source = "aic_custom" if op == "custom_all_reduce" else "aic_nccl"
        rows = aic_collective(args.aiconfigurator, gpu, op)
        curves[op] = {}
        for ranks, part in rows.groupby("ranks"):
            data = keep[f"{op}.{ranks}"] = split(part, ["bytes"])
            curves[op][int(ranks)] = fit_collective(data, op, int(ranks), gpu.link, source, note)
    a100 = GPUS["ampere"]
    send = split(vidur_link(args.vidur, "send_recv", 1), ["bytes"])
    curves["send"] = {2: fit_collective(send, "send", 2, a100.link, "vidur_network")}
    if gpu is not a100:
        curves["send"][2]["fit"] = copied(curves["send"][2]["fit"], "ampere")
    return curves


def inter_node(args: argparse.Namespace, measured: bool) -> dict[str, Any]:
    seconds = {}
    for op, name in (("all_reduce", "all_reduce_seconds"), ("send_recv", "send_seconds")):
        rows = vidur_link(args.vidur, op, 2)
        small = rows[rows.bytes <= 32768].seconds
        seconds[name] = float(f"{small.median():.3g}")
    note = "weak: median of small messages, one A100 on each of two nodes of one slow fabric, 2024"
    return seconds | {"fit": {"source": "vidur_network", "measured": measured, "rows": len(small), "note": note}}


def copied(fit: dict[str, Any], base: str) -> dict[str, Any]:
    return {"source": fit["source"], "measured": False, "note": f"copied from {base}.yaml, not measured on this GPU"}


def build(arch: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Data]]:
    gpu, keep = GPUS[arch], {}
    rates = gpu.rates()
    keep["prefill"] = split(aic_attention(args.aiconfigurator, gpu, "context"), ["heads", "kv_heads"])
    keep["decode"] = split(aic_attention(args.aiconfigurator, gpu, "generation"), ["heads", "kv_heads"])
    ratio = backward_ratio(args.simumax)
    if arch != "ampere":
        ratio["backward_fit"] = copied(ratio["backward_fit"], "ampere")
    peaks = {"bf16": gpu.bf16} | ({"fp8": gpu.fp8} if gpu.fp8 else {})
    record = {
        "name": arch,
        "fitted": date.today().isoformat(),
        "sources": sources(arch, gpu),
        "reference": {
            "gpu": gpu.name,
            "flops_per_second": peaks,
            "memory_bytes_per_second": gpu.memory,
            "multiprocessors": gpu.multiprocessors,
            "link_bytes_per_second": gpu.link,
        },
        "host_launch_seconds": {"value": 5.5e-6, "source": "superbench"},
        "gemm": gemm_curves(args, gpu, keep),
        "prefill": fit_prefill(keep["prefill"], rates, "aic_attention") | ratio,
        "decode": fit_decode(keep["decode"], rates, "aic_attention"),
        "memory": memory_curves(args, arch, gpu, keep),
        "collectives": collective_curves(args, gpu, keep),
        "inter_node": inter_node(args, arch == "ampere"),
    }
    return record, keep


class Unmeasured(NamedTuple):
    """An architecture of which no public kernel table was found: another one's curves against its own datasheet."""

    base: str
    device: str
    gpu: str
    peaks: dict[str, float]
    memory: float
    multiprocessors: int
    link: float


UNMEASURED = {
    "volta": Unmeasured("ampere", "V100", "v100-32g-sxm", {"bf16": 125e12}, 0.9e12, 80, 150e9),
    "cdna3": Unmeasured("hopper", "MI300X", "mi300x-192g", {"bf16": 1307.4e12, "fp8": 2614.9e12}, 5.3e12, 304, 448e9),
    "ascend": Unmeasured("ampere", "Ascend 910B", "ascend-910b-64g", {"bf16": 320e12}, 1.6e12, 24, 196e9),
}


def unmeasured(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """The curves of `base` under another name, all marked as not measured."""
    own = UNMEASURED[name]
    record = json.loads(json.dumps(base))
    for op, by in record["collectives"].items():
        if any(
            curve["efficiency"] > 1 for curve in by.values()
        ):  # the base's switch reduces; nothing says that this does
            record["collectives"][op] = json.loads(json.dumps(base["collectives"]["all_gather"]))
    record["collectives"] = {op: {int(n): c for n, c in by.items()} for op, by in record["collectives"].items()}
    record["name"] = name
    measured_on = base["reference"]["gpu"].split("-")[0].upper()
    record["sources"] = {
        own.base: f"No measurement of {own.device} was found. Values of {own.base}.yaml ({measured_on}), "
        "which names theirs."
    }
    record["host_launch_seconds"]["source"] = "unverified"
    record["reference"] = {
        "gpu": own.gpu, "flops_per_second": own.peaks, "memory_bytes_per_second": own.memory,
        "multiprocessors": own.multiprocessors, "link_bytes_per_second": own.link,
    }  # fmt: skip

    def mark(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if str(key).endswith("fit"):
                node[key] = {"source": own.base, "measured": False}
            else:
                mark(value)

    mark(record)
    return record


# ---------------------------------------------------------------- output


SAMPLES = {  # rows per architecture; the collectives at one number of ranks each
    "gemm": 12, "gemm_decode": 6, "prefill": 8, "decode": 8, "residual_add": 4, "rms_norm": 4, "gated_activation": 4,
    "all_reduce.8": 3, "all_gather.8": 3, "reduce_scatter.4": 3,
}  # fmt: skip


def samples(record: dict[str, Any], keep: dict[str, Data]) -> dict[str, list[dict[str, Any]]]:
    """Held-out rows for the test-suite, evenly spaced in the order of their measured seconds."""
    keep = {name: pd.DataFrame(data.columns)[data.held_out] for name, data in keep.items()}
    for name in ("prefill", "decode"):
        keep[name] = keep[name].drop(columns="head_dim")  # 128 everywhere
    keep["gemm_decode"] = keep["gemm"][keep["gemm"].m <= 64]  # few of the rows, and the ones that memory limits
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name, count in SAMPLES.items():
        rows = keep[name].sort_values("seconds", kind="stable")
        picks = rows.iloc[[int((i + 0.5) / count * len(rows)) for i in range(count)]]
        kernel = name.split(".")[0].removesuffix("_decode")
        table = "collectives" if "." in name else kernel if kernel in ("gemm", "prefill", "decode") else "memory"
        source = "microsoft/vidur (MIT)" if table in ("gemm", "memory") else "aiconfigurator-core 0.12.0 (Apache-2.0)"
        for row in picks.to_dict("records"):
            row["seconds"] = f"{row['seconds']:.6g}"
            row = {"architecture": record["name"], "kernel": kernel, **row, "held_out": True, "source": source}
            chosen.setdefault(table, []).append(row)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vidur", type=Path, required=True, help="folder with *_mlp.csv and a100_dgx_*.csv")
    parser.add_argument("--aiconfigurator", type=Path, required=True, help="folder of the package aiconfigurator_core")
    parser.add_argument("--simumax", type=Path, required=True, help="A100-PCIe system file (JSON)")
    parser.add_argument("--out", type=Path, default=ROOT / "hw_specs" / "kernels")
    parser.add_argument("--samples", type=Path, default=ROOT / "traces" / "kernels")
    args = parser.parse_args()
    compare_campaigns(args)
    tables: dict[str, list[dict[str, Any]]] = {}
    for arch, gpu in GPUS.items():
        record, keep = build(arch, args)
        write_kernels(record, args.out / f"{arch}.yaml", COMMENT)
        for name in (name for name, own in UNMEASURED.items() if own.base == arch):
            write_kernels(unmeasured(name, record), args.out / f"{name}.yaml", COMMENT)
        if gpu.vidur:
            for table, rows in samples(record, keep).items():
                tables.setdefault(table, []).extend(rows)
        for name, fit in Kernels.model_validate(record).fits().items():
            print(f"{arch:10s} {name:32s} rows {fit.rows:6d}  mean {fit.mean_error}  weighted {fit.weighted_error}")
    for table, rows in tables.items():
        with (args.samples / f"{table}.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
