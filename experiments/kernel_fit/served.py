"""Fit hw_specs/kernels/geforce_ada.yaml: products of an RTX 4090 from a served run of vLLM.

No table of its kernels is public. See README.md beside this file.

python experiments/kernel_fit/served.py RUN [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from fit import COMMENT, ROOT, copied
from ruamel.yaml import YAML
from scipy.optimize import minimize

from rlhfsim.costs.kernels import Kernels
from rlhfsim.fitting import write_kernels
from rlhfsim.formats.vllm_bench import read
from rlhfsim.measurements import Served, cluster_of
from rlhfsim.serving import Replay, request_errors

BASE, GPU, SOURCE = "ada", "rtx-4090-24g", "served_run"
FITTED_REQUESTS = 150  # the first ones; the others are the check


def record_with(base: dict[str, Any], compute: float, memory: float) -> dict[str, Any]:
    """Ada's curves with these efficiencies of bf16 products, without the L40S's residuals."""
    record: dict[str, Any] = json.loads(json.dumps(base))
    record["collectives"] = {op: {int(n): c for n, c in by.items()} for op, by in record["collectives"].items()}
    product = record["gemm"]["bf16"]
    product |= {"compute_efficiency": float(f"{compute:.4g}"), "memory_efficiency": float(f"{memory:.4g}")}
    product.pop("residuals", None)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with meta.json and requests.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "hw_specs" / "kernels")
    args = parser.parse_args()
    served, cluster = read(args.run), cluster_of(GPU)
    base = YAML(typ="safe").load(args.out / f"{BASE}.yaml")

    def errors_with(point: np.ndarray, rows: slice) -> dict[str, np.ndarray]:
        replay = Replay(served, cluster, Kernels.model_validate(record_with(base, *point)))
        replay.replay()
        return {name: each[rows] for name, each in request_errors(replay).items()}

    def loss(point: np.ndarray) -> float:
        """The median of the time per output token: the mean sits in the few requests that were preempted."""
        found = errors_with(point, slice(FITTED_REQUESTS))
        return float(found["request_latency"].mean() + np.median(found["time_per_output_token"]))

    options = {"maxfev": 60, "xatol": 1e-3, "fatol": 1e-5}
    best = minimize(loss, (0.95, 0.93), method="Nelder-Mead", bounds=((0.5, 1), (0.5, 1)), options=options)
    record = finished(record_with(base, *best.x), served, errors_with(best.x, slice(FITTED_REQUESTS, None)))
    write_kernels(record, args.out / "geforce_ada.yaml", COMMENT.replace("fit.py", "served.py"))
    print(record["gemm"]["bf16"]["fit"])


def finished(record: dict[str, Any], served: Served, held_out: dict[str, np.ndarray]) -> dict[str, Any]:
    """With its provenance."""
    mark(record)
    stated = ", ".join(f"{name} {each.mean():.3f}" for name, each in held_out.items())
    record["name"] = "geforce_ada"
    record["fitted"] = date.today().isoformat()
    record["sources"] = {
        BASE: f"Values of {BASE}.yaml (L40S), which names theirs.",
        SOURCE: f"casys-kaist/LLMServingSim (MIT, 2026-08), bench run {served.path.name}: {served.engine}, "
        f"{served.model}, {served.device}; {len(served.requests)} requests",
    }
    record["host_launch_seconds"]["source"] = BASE
    card = cluster_of(GPU).gpu
    record["reference"] |= {
        "gpu": GPU,
        "flops_per_second": {name: float(card.flops_per_second[name].value) for name in ("bf16", "fp8")},
        "memory_bytes_per_second": float(card.memory_bytes_per_second.value),
        "multiprocessors": int(card.multiprocessors.value),
    }
    record["gemm"]["bf16"]["fit"] = {
        "source": SOURCE,
        "rows": FITTED_REQUESTS,
        "held_out_rows": len(served.requests) - FITTED_REQUESTS,
        "note": f"requests of a run, replayed; two efficiencies fitted, paddings and exponent of {BASE}.yaml, host "
        f"hidden (async scheduling); mean errors of the requests held out: {stated}. L40S reaches a "
        "smaller part of its peak: its tensor cores are twice as fast at three quarters of the power",
    }
    return record


def mark(node: Any) -> None:
    """Every fit is another card's."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if str(key).endswith("fit"):
            node[key] = copied({"source": BASE}, BASE)
        else:
            mark(value)


if __name__ == "__main__":
    main()
