"""Curves of few coefficients with a coarse grid of ratios beside them, as records of `rlhfsim.costs.kernels`.

The coefficients are fitted first, the grid to what they leave; both on the rows that are not held out, and the errors
are those of the whole curve, with its rounded ratios, on the rows that are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from residuals import Part, fit_residuals

from rlhfsim.costs.kernels import (
    DecodeCurve,
    GemmCurve,
    MemoryCurve,
    PrefillCurve,
    Rates,
    attention_decode_time,
    attention_prefill_time,
    gemm_time,
    memory_time,
)
from rlhfsim.costs.residuals import Residuals
from rlhfsim.fitting import (
    Data,
    fit_collective,
    fit_decode,
    fit_gemm,
    fit_memory,
    fit_prefill,
    fitted,
    measured_collective,
    solve,
)

GEMM = ([512, 2048, 4096, 8192, 32768], [512, 1024, 2048, 8192, 32768], [1, 16, 64, 128, 256, 1024, 4096, 16384])
PREFILL = ([1, 4, 16], [1, 8, 32, 128, 512, 4096], [64, 256, 1024, 4096, 16384])
DECODE = ([1, 2, 4, 8, 16, 64], [1, 4, 16, 64, 256, 1024, 4096], [16, 64, 256, 1024, 4096, 16384, 65536])
MEMORY = ([1e4, 1e5, 1e6, 4e6, 1.6e7, 6.4e7, 2.56e8, 1e9],)
CAMPAIGN = [1, 64, 128, 256, 512, 1024, 2048, 4096]
# Slope of log seconds: more work never takes less time (with room for rounded ratios). Above 1: long kernels run at
# lower clocks (power).
MORE_WORK = (0.01, 1.1)


def _refined(curve: dict[str, Any], residuals: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in curve.items() if name != "fit"} | {"residuals": residuals}


def _model(kind: type, record: dict[str, Any]) -> Any:
    """A curve without its provenance."""
    given = record.get("residuals")
    return kind.model_construct(**(record | {"residuals": Residuals(**given) if given else None}))


def _reachable(curve: dict[str, Any], name: str, reached: np.ndarray) -> dict[str, Any]:
    """The asymptotic efficiency not below what nearly all rows stay under: no shape is faster than it."""
    best = min(1.0, max(curve[name], float(np.quantile(reached, 0.99))))
    return curve | {name: float(f"{best:.4g}")}


def gemm(data: Data, rates: Rates, source: str, *, input_bytes: float = 2.0, note: str = "") -> dict[str, Any]:
    """Columns m, n, k."""
    m, n, k, measured = (data.column(name) for name in ("m", "n", "k", "seconds"))
    train = ~data.held_out

    def seconds(record: dict[str, Any], n: np.ndarray, k: np.ndarray, m: np.ndarray) -> np.ndarray:
        return np.asarray(gemm_time(_model(GemmCurve, record), rates, m, n, k, input_bytes=input_bytes).seconds)

    curve = fit_gemm(data, rates, source, input_bytes)
    curve = _reachable(curve, "compute_efficiency", (2 * m * n * k / measured / rates.flops_per_second)[train])
    part = Part(seconds(curve, n, k, m)[train], (n[train], k[train], m[train]))
    residuals = fit_residuals(
        [part], measured[train], GEMM, curve=lambda *sizes: seconds(curve, *sizes), slopes=[MORE_WORK] * 3
    )
    curve = _refined(curve, residuals)
    return curve | {"fit": fitted(source, seconds(curve, n, k, m), data, note)}


def slower_than(reference: dict[str, Any], data: Data, rates: Rates) -> np.ndarray:
    """Seconds of `data` over those of the curve `reference`, a ratio for each value of m in CAMPAIGN."""
    m, n, k, measured = (data.column(name)[~data.held_out] for name in ("m", "n", "k", "seconds"))
    seconds = np.asarray(gemm_time(_model(GemmCurve, reference), rates, m, n, k).seconds)
    return np.array(fit_residuals([Part(seconds, (m,))], measured, [CAMPAIGN])["ratios"][0])


def experts(
    data: Data,
    rates: Rates,
    source: str,
    memory: dict[str, dict[str, Any]],
    *,
    input_bytes: float = 2.0,
    note: str = "",
) -> dict[str, Any]:
    """Columns of `tables.aic_experts`. What is not a product (routing, activation) counts as in a layer's operators.

    Without a grid: of a sum of two products it follows the shapes that were fitted, and is worse on the others.
    """
    rows, groups, routed, hidden, width = (
        data.column(name) for name in ("rows", "groups", "routed", "hidden_size", "width")
    )
    moved = {"gated_activation": 6 * routed * width, "residual_add": 8 * routed * hidden}
    calls = {"gated_activation": 1, "residual_add": 2}
    extra = sum(
        calls[name] * np.asarray(memory_time(_model(MemoryCurve, memory[name]), rates, size / calls[name]).seconds)
        for name, size in moved.items()
    )
    names = ("compute_efficiency", "memory_efficiency", "kernel_seconds", "padding_m", "padding_n", "padding_k",
             "padding_bytes", "exponent")  # fmt: skip
    units = (1, 1, 1e-6, 1, 1, 1, 1e6, 1)

    def record(x: np.ndarray) -> dict[str, Any]:
        return {name: float(value * unit) for name, value, unit in zip(names, x, units, strict=True)}

    def products(record: dict[str, Any]) -> list[np.ndarray]:
        curve = _model(GemmCurve, record)
        return [
            np.asarray(gemm_time(curve, rates, rows, n, k, groups=groups, input_bytes=input_bytes).seconds)
            for n, k in ((2 * width, hidden), (hidden, width))
        ]

    x = solve(
        lambda x: extra + sum(products(record(x))), data, [0.6, 0.8, 4, 50, 500, 60, 1, 4],
        [0.05, 0.05, 0.1, 0, 0, 0, 0, 1], [1, 1, 40, 10000, 10000, 10000, 50, 16],
    )  # fmt: skip
    curve = record(x)
    return curve | {"fit": fitted(source, extra + sum(products(curve)), data, note)}


def prefill(data: Data, rates: Rates, source: str, note: str = "") -> dict[str, Any]:
    """Columns batch, heads, kv_heads, tokens, head_dim."""
    batch, heads, kv_heads, tokens, head_dim, measured = (
        data.column(name) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim", "seconds")
    )
    train = ~data.held_out

    def seconds(record: dict[str, Any]) -> np.ndarray:
        curve = _model(PrefillCurve, record | {"backward_ratio": 1.0})
        return np.asarray(attention_prefill_time(curve, rates, batch, heads, kv_heads, tokens, head_dim).seconds)

    def of_grid(group: np.ndarray, calls: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        model = _model(PrefillCurve, curve | {"backward_ratio": 1.0})
        return np.asarray(attention_prefill_time(model, rates, calls / group, group, 1, tokens, 128).seconds)

    curve = {name: value for name, value in fit_prefill(data, rates, source).items() if name != "backward_ratio"}
    work = 2 * batch * heads * tokens * (tokens + 1) * head_dim
    curve = _reachable(curve, "compute_efficiency", (work / measured / rates.flops_per_second)[train])
    sizes = (heads / kv_heads, batch * heads, tokens)
    residuals = fit_residuals(
        [Part(seconds(curve)[train], [size[train] for size in sizes])], measured[train], PREFILL,
        curve=of_grid, slopes=[None, MORE_WORK, (0.01, 2.1)],
    )  # fmt: skip
    curve = _refined(curve, residuals)
    return curve | {"fit": fitted(source, seconds(curve), data, note)}


def decode(data: Data, rates: Rates, source: str, note: str = "") -> dict[str, Any]:
    """Columns batch, heads, kv_heads, tokens, head_dim.

    FlashAttention-2 does not split the keys of a sequence where every query head has its own key-value head: with few
    sequences these kernels reach 1 % of A100's bandwidth for each of them, and tell nothing of grouped ones.
    """
    batch, heads, kv_heads, tokens, head_dim, measured = (
        data.column(name) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim", "seconds")
    )
    train = ~data.held_out

    def seconds(record: dict[str, Any]) -> np.ndarray:
        curve = _model(DecodeCurve, record)
        time = attention_decode_time(curve, rates, batch, kv_heads, batch * tokens, head_dim, query_heads=heads)
        return np.asarray(time.seconds)

    def of_grid(group: np.ndarray, calls: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(attention_decode_time(model, rates, calls, 1, calls * tokens, 128).seconds)

    curve = fit_decode(data, rates, source)
    moved = 4 * batch * kv_heads * tokens * head_dim / measured / rates.memory_bytes_per_second
    curve = _reachable(curve, "memory_efficiency", moved[train])
    model = _model(DecodeCurve, curve)
    sizes = (heads / kv_heads, batch * kv_heads, tokens)
    residuals = fit_residuals(
        [Part(seconds(curve)[train], [size[train] for size in sizes])], measured[train], DECODE,
        curve=of_grid, slopes=[None, MORE_WORK, MORE_WORK], unlike=[0],
    )  # fmt: skip
    curve = _refined(curve, residuals)
    return curve | {"fit": fitted(source, seconds(curve), data, note)}


def memory(data: Data, rates: Rates, source: str) -> dict[str, Any]:
    """Column bytes."""
    moved, measured, train = data.column("bytes"), data.column("seconds"), ~data.held_out

    def seconds(record: dict[str, Any], moved: np.ndarray) -> np.ndarray:
        return np.asarray(memory_time(_model(MemoryCurve, record), rates, moved).seconds)

    curve = fit_memory(data, rates, source)
    curve = _reachable(curve, "memory_efficiency", (moved / measured / rates.memory_bytes_per_second)[train])
    residuals = fit_residuals(
        [Part(seconds(curve, moved)[train], (moved[train],))], measured[train], MEMORY, smoothness=0.1,
        curve=lambda moved: seconds(curve, moved), slopes=[MORE_WORK],
    )  # fmt: skip
    curve = _refined(curve, residuals)
    return curve | {"fit": fitted(source, seconds(curve, moved), data)}


def collective(data: Data, op: str, ranks: int, link: float, source: str, note: str = "") -> dict[str, Any]:
    """Column bytes: the measured points inside a node, and a p-norm for what composes it across nodes."""
    formula = fit_collective(data, op, ranks, link, source, note)
    points = measured_collective(data, op, ranks, link * formula["efficiency"], source)
    fit = points["fit"] | {"note": "; ".join(filter(None, (points["fit"]["note"], note)))}
    return formula | {"measured": points["measured"], "fit": fit}
