"""Fractions of peak that kernels of training reach, as MooreThreads/SimuMax writes them.

https://github.com/MooreThreads/SimuMax, configs/system/<system>.json (Apache-2.0): `accelerator.op.<op>` with the peak
in `tflops` and `accurate_efficient_factor`, the efficiency by shape. Of `matmul` the layout tells the product: TN
forward, NN data gradient, NT weight gradient (accumulates in fp32). Attention counts the FLOPs of the whole
square of scores, 2 s^2 (d_qk + d_v) per head and sequence, of which the causal half is computed (efficiencies above 1),
and 2.5 times as many backward (simu_tools/efficency_test/test_fa_efficiency.py). `sys_name` names the GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfsim.errors import InputError, nearest
from rlhfsim.formats import Probe
from rlhfsim.measurements import Tables, finite, joined, table

TITLE = "system file of SimuMax (*.json)"
PRODUCTS = {"TN": "gemm", "NN": "gemm", "NT": "weight_gradient"}
ATTENTION = {"sdp_fwd": "prefill", "sdp_bwd": "prefill_backward"}
BACKWARD_FLOPS = 2.5  # over those of the forward pass


def recognises(probe: Probe) -> bool:
    return {"sys_name", "accelerator"} <= probe.keys


def read(path: Path) -> Tables:
    data = json.loads(path.read_text(encoding="utf-8"))
    accelerator = data["accelerator"]
    if not isinstance(accelerator, dict) or not isinstance(accelerator.get("op"), dict):
        raise InputError("is missing", field="accelerator.op", where=str(path))
    ops = accelerator["op"]
    rows: dict[str, list[Any]] = {}
    for key, efficiency, tflops, where in _entries(ops, "matmul", path):
        shape = _fields(key, ("m", "n", "k", "layout"), where, path)
        layout = shape["layout"]
        if layout not in PRODUCTS:
            raise InputError(f"has the layout {layout!r}{nearest(layout, PRODUCTS)}", field=where, where=str(path))
        m, n, k = (float(shape[name]) for name in "mnk")
        seconds = 2 * float(shape.get("b", 1)) * m * n * k / (tflops * 1e12 * efficiency)
        rows.setdefault(PRODUCTS[layout], []).append((f"matmul {layout}", {"m": m, "n": n, "k": k}, seconds))
    for op, name in ATTENTION.items():
        for key, efficiency, tflops, where in _entries(ops, op, path):
            names = ("batch", "seq_len", "head_num", "kv_head_num", "qk_head_dim", "v_head_dim")
            batch, tokens, heads, kv_heads, query, value = (float(_fields(key, names, where, path)[n]) for n in names)
            flops = 2 * batch * heads * tokens**2 * (query + value) * (BACKWARD_FLOPS if op == "sdp_bwd" else 1.0)
            columns = {
                "heads": heads, "kv_heads": kv_heads, "head_dim": (query + value) / 2, "batch": batch, "tokens": tokens,
            }  # fmt: skip
            rows.setdefault(name, []).append((op, columns, flops / (tflops * 1e12 * efficiency)))
    if not rows:
        raise InputError("has no `accurate_efficient_factor`", field="accelerator.op", where=str(path))
    tables = {
        name: joined(
            table(name, op, {c: [v] for c, v in columns.items()}, [seconds], 0) for op, columns, seconds in own
        )
        for name, own in rows.items()
    }
    return Tables(path, "MooreThreads/SimuMax, system file (Apache-2.0)", tables, device=str(data["sys_name"]))


def _entries(ops: dict[str, Any], op: str, path: Path) -> Iterator[tuple[str, float, float, str]]:
    """(shape, efficiency, peak in TFLOP/s, place) of every measured shape."""
    own = ops.get(op, {})
    for key, efficiency in own.get("accurate_efficient_factor", {}).items():
        where = f"accelerator.op.{op}.accurate_efficient_factor.{key}"
        if not finite(own.get("tflops")):
            raise InputError(
                f"is {own.get('tflops')!r}, but must be a positive number",
                field=f"accelerator.op.{op}.tflops",
                where=str(path),
            )
        most = 2.0 if op in ATTENTION else 1.0
        if not finite(efficiency) or efficiency > most:
            raise InputError(
                f"is {efficiency!r}, but an efficiency is above 0 and at most {most}", field=where, where=str(path)
            )
        yield key, efficiency, own["tflops"], where


def _fields(key: str, names: tuple[str, ...], where: str, path: Path) -> dict[str, str]:
    found = dict(re.findall(r"(\w+)=([^,\s]+)", key))
    for name in names:
        if name not in found:
            raise InputError(f"does not say {name}", field=where, where=str(path))
    return found
