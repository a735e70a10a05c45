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
from refined import CAMPAIGN, collective, decode, experts, gemm, memory, prefill, slower_than
from tables import (
    GPUS,
    Gpu,
    aic_attention,
    aic_collective,
    aic_experts,
    aic_gemm,
    training_gemm,
    vidur_gemm,
    vidur_link,
    vidur_memory,
)

from rlhfsim.costs.kernels import GemmCurve, Kernels, Rates, gemm_time
from rlhfsim.costs.residuals import Residuals
from rlhfsim.fitting import Data, errors, fit_collective, split, write_kernels

ROOT = Path(__file__).resolve().parents[2]
COMMENT = (
    "Efficiency curves of GPU kernels, fitted by experiments/kernel_fit/fit.py: do not edit by hand.\n"
    "Seconds and bytes; efficiencies are relative to `reference`. Errors: on the rows held out."
)
AIC = "aiconfigurator-core 0.12.0 (PyPI, Apache-2.0, NVIDIA): systems/data"
VIDUR = "microsoft/vidur, data/profiling (MIT, 2024)"


# ---------------------------------------------------------------- fits


def on_training(curve: GemmCurve, rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Errors of a curve on the training GEMMs, by layout."""
    rates = Rates(312e12, 1.935e12, 108)  # A100 PCIe 80 GB datasheet
    found = {}
    for layout, part in rows.groupby("layout"):
        found[layout] = errors(gemm_time(curve, rates, part.m, part.n, part.k).seconds, part.seconds.to_numpy())
    return found


def evaluated(record: dict[str, Any]) -> GemmCurve:
    """A curve without its provenance."""
    return GemmCurve.model_construct(**(record | {"residuals": Residuals(**record["residuals"])}))


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
        "vidur_and_aic": "`vidur` and `aic_gemm` together, aic_gemm's seconds brought to the level of Vidur's",
        "aic_moe": f"{tables}/moe/vllm/{gpu.version}/moe_perf.parquet; one rank's experts",
        "aic_attention": f"{tables}/attention/vllm/{gpu.version}/{{context,generation}}_attention_perf.parquet; "
        "head dimension 128, bf16, no window",
        "aic_nccl": f"{tables}/comm/nccl/{gpu.nccl}/nccl_perf.parquet; half, one node",
        "aic_custom": f"{tables}/comm/vllm/{gpu.version}/custom_allreduce_perf.parquet; under CUDA graphs",
        "simumax": "MooreThreads/SimuMax (Apache-2.0, 2026), A100-PCIe bf16 system file: matmul, sdp_fwd, sdp_bwd, "
        "bandwidth; its simu_tools/efficency_test/test_fa_efficiency.py counts 2.5x FLOPs backward",
        "superbench": "microsoft/superbenchmark (MIT), tests/analyzer/test_generate_baseline.py: "
        "kernel-launch/event_time 5.5 us (from the launch call to the kernel's start); the machine is not named",
    }  # fmt: skip


def level(args: argparse.Namespace, gpu: Gpu) -> tuple[np.ndarray, Data]:
    """Seconds of Vidur's products over those of aiconfigurator's curve, by m, and aiconfigurator's rows."""
    rows = split(aic_gemm(args.aiconfigurator, gpu, "bf16"), ["n", "k"])
    return slower_than(
        gemm(rows, gpu.rates(), "aic_gemm"), split(vidur_gemm(args.vidur, gpu), ["n", "k"]), gpu.rates()
    ), rows


def at_level(rows: Data, ratios: np.ndarray) -> Data:
    """Rows of one campaign with the seconds that another one would have measured."""
    m = rows.column("m")
    slower = np.exp(np.interp(np.log(m), np.log(CAMPAIGN), np.log(ratios)))
    return Data(rows.columns | {"seconds": slower * rows.column("seconds")}, rows.held_out)


def together(first: Data, second: Data) -> Data:
    columns = {name: np.concatenate([first.column(name), second.column(name)]) for name in ("m", "n", "k", "seconds")}
    return Data(columns, np.concatenate([first.held_out, second.held_out]))


def bf16_gemm(args: argparse.Namespace, gpu: Gpu, keep: dict[str, Data]) -> dict[str, Any]:
    """Of both campaigns where there are two; see README.md."""
    rates = gpu.rates()
    if gpu.vidur:
        ratios, rows = level(args, gpu)
        vidur = keep["gemm"] = split(vidur_gemm(args.vidur, gpu), ["n", "k"])
        at = ", ".join(f"{m}: {ratio:g}" for m, ratio in zip(CAMPAIGN, ratios, strict=True))
        curve = gemm(
            together(vidur, at_level(rows, ratios)), rates, "vidur_and_aic", note=f"aic_gemm's seconds by m x {at}"
        )
        model = evaluated(curve)
        scores = {"vidur": vidur, "aic_gemm": at_level(rows, ratios), "aic_gemm as measured": rows}
        stated = []
        for name, data in scores.items():
            m, n, k, seconds = (data.column(column)[data.held_out] for column in ("m", "n", "k", "seconds"))
            found = errors(np.asarray(gemm_time(model, rates, m, n, k).seconds), seconds)
            stated.append(f"{name} {found['mean_error']}, weighted {found['weighted_error']}, bias {found['bias']:+}")
        curve["fit"]["note"] += "; held out: " + "; ".join(stated)
        return curve
    rows = split(aic_gemm(args.aiconfigurator, gpu, "bf16"), ["n", "k"])
    note = "isolated kernels; on A100 and H100 this campaign is 10-30 % faster from 128 rows on than Vidur's"
    if gpu is GPUS["h200"]:  # the same processor as H100, whose two campaigns can be compared
        ratios, _ = level(args, GPUS["hopper"])
        rows, note = at_level(rows, ratios), "seconds by m as for H100, see hopper.yaml: Vidur's over this campaign's"
    keep["gemm"] = rows
    return gemm(rows, rates, "aic_gemm", note=note)


def gemm_curves(args: argparse.Namespace, gpu: Gpu, keep: dict[str, Data], gradient: dict[str, Any]) -> dict[str, Any]:
    curves = {"bf16": bf16_gemm(args, gpu, keep)}
    if gpu.fp8:
        data = split(aic_gemm(args.aiconfigurator, gpu, "fp8"), ["n", "k"])
        curves["fp8"] = gemm(data, gpu.rates("fp8"), "aic_gemm", input_bytes=1.0, note="per-tensor scales")
    return {precision: curve | gradient for precision, curve in curves.items()}


def expert_curves(
    args: argparse.Namespace, gpu: Gpu, memory: dict[str, Any], gradient: dict[str, Any]
) -> dict[str, Any]:
    curves = {}
    for precision in ("bf16", *(["fp8"] if gpu.fp8 else [])):
        data = split(aic_experts(args.aiconfigurator, gpu, precision), ["hidden_size", "width", "experts"])
        curves[precision] = gradient | experts(
            data, gpu.rates(precision), "aic_moe", memory, input_bytes=1.0 if precision == "fp8" else 2.0,
            note="both products of all experts with routing and activation",
        )  # fmt: skip
    return curves


def compare_campaigns(args: argparse.Namespace) -> None:
    """Print what training GEMMs of a third party say of curves from either campaign, and from both."""
    gpu, rows = GPUS["ampere"], training_gemm(args.simumax)
    curves = {
        "vidur": gemm(split(vidur_gemm(args.vidur, gpu), ["n", "k"]), gpu.rates(), "vidur"),
        "aic": gemm(split(aic_gemm(args.aiconfigurator, gpu, "bf16"), ["n", "k"]), gpu.rates(), "aic_gemm"),
        "both": bf16_gemm(args, gpu, {}),
    }
    for name, curve in curves.items():
        for layout, error in on_training(evaluated(curve), rows).items():
            print(f"campaign {name:6s} on SimuMax training GEMMs {layout}: {error}")


def memory_curves(args: argparse.Namespace, arch: str, gpu: Gpu, keep: dict[str, Data]) -> dict[str, Any]:
    base = arch if gpu.vidur else "ampere" if arch == "ada" else "hopper"
    curves = {}
    for kernel, rows in vidur_memory(args.vidur, GPUS[base]).items():
        data = split(rows, ["bytes"])
        curves[kernel] = memory(data, GPUS[base].rates(), "vidur")
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
            curves[op][int(ranks)] = collective(data, op, int(ranks), gpu.link, source, note)
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
    curve = bf16_gemm(args, GPUS["ampere"], {})
    gradient = weight_gradient(evaluated(curve), args.simumax)
    if arch != "ampere":
        gradient["weight_gradient_fit"] = copied(gradient["weight_gradient_fit"], "ampere")
    streaming = memory_curves(args, arch, gpu, keep)
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
        "gemm": gemm_curves(args, gpu, keep, gradient),
        "fused_experts": expert_curves(args, gpu, streaming, gradient),
        "prefill": prefill(keep["prefill"], rates, "aic_attention") | ratio,
        "decode": decode(keep["decode"], rates, "aic_attention"),
        "memory": streaming,
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
    "gemm": 24, "gemm_decode": 12, "prefill": 16, "decode": 32, "residual_add": 4, "rms_norm": 4, "gated_activation": 4,
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
