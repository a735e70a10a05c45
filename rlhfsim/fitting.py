"""Least squares of the curves in `rlhfsim.costs.kernels` to measured kernels, and the file that holds them.

One group of rows in four is held out: it is scored and never fitted, and a curve's stated errors are those of the rows
held out. Used by `rlhfsim calibrate` on a machine's own measurements and by experiments/kernel_fit on published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from pydantic import BaseModel

from .costs.kernels import (
    Collective,
    CollectiveCurve,
    DecodeCurve,
    GemmCurve,
    Kernels,
    MemoryCurve,
    PrefillCurve,
    Rates,
    attention_decode_time,
    attention_prefill_time,
    bus_factor,
    collective_seconds,
    gemm_time,
    interpolated_seconds,
    memory_time,
)
from .errors import InputError

HELD_OUT_EVERY = 4
LONGEST_FIXED_MICROSECONDS = 40.0  # of a kernel on a GPU; where even the quickest call takes longer, that is the bound


class Data(NamedTuple):
    """Measured rows, column by column (`seconds` is the measurement), and which of them are held out."""

    columns: dict[str, np.ndarray]
    held_out: np.ndarray

    def column(self, name: str) -> np.ndarray:
        return np.asarray(self.columns[name], dtype=float)

    @property
    def scored(self) -> np.ndarray:
        """The rows that errors are stated for: those held out, or all where there are too few to hold any out."""
        return self.held_out if self.held_out.any() else ~self.held_out


def split(rows: Mapping[str, Any], groups: Sequence[str]) -> Data:
    """Hold out whole groups: every fourth in the order of the product of the group's values, then of the values."""
    columns = {name: np.asarray(rows[name]) for name in rows}
    order = np.lexsort([columns[name] for name in reversed(columns)])
    columns = {name: values[order] for name, values in columns.items()}
    members = np.stack([columns[name] for name in groups], axis=1)
    keys = np.unique(members, axis=0)
    keys = keys[np.argsort(keys.prod(axis=1), kind="stable")]
    out = {tuple(key) for key in keys[1::HELD_OUT_EVERY]} if len(keys) >= HELD_OUT_EVERY else set()
    return Data(columns, np.array([tuple(key) in out for key in members]))


def solve(
    predict: Callable[[np.ndarray], np.ndarray],
    data: Data,
    start: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
) -> np.ndarray:
    """Least squares of log(predicted / measured) on the rows that are not held out; outliers count linearly."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise InputError("fitting needs scipy: pip install 'rlhfsim[calibrate]'") from None
    train, measured = ~data.held_out, data.column("seconds")
    scale = np.maximum(np.abs(start), 1e-3)
    found = least_squares(
        lambda x: np.log(predict(x)[train] / measured[train]),
        np.clip(start, low, high),
        bounds=(low, high),
        x_scale=scale,
        loss="soft_l1",
        f_scale=0.1,
        max_nfev=300,
    )
    return np.array([float(f"{value:.4g}") if value > 1e-4 else 0.0 for value in found.x])


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """The errors of a `Fit` record."""
    relative = np.abs(predicted / measured - 1)
    values = {
        "mean_error": relative.mean(),
        "weighted_error": np.abs(predicted - measured).sum() / measured.sum(),
        "worst_error": relative.max(),
        "bias": predicted.sum() / measured.sum() - 1,
    }
    return {name: round(float(value), 3) + 0.0 for name, value in values.items()}  # + 0.0: no -0.0


def fitted(source: str, predicted: np.ndarray, data: Data, note: str = "") -> dict[str, Any]:
    """A `Fit` record as a dict."""
    out = data.held_out
    record: dict[str, Any] = {"source": source, "rows": int((~out).sum()), "held_out_rows": int(out.sum())}
    record |= errors(predicted[data.scored], data.column("seconds")[data.scored])
    return record | ({"note": note} if note else {})


C = TypeVar("C", bound=BaseModel)


def _curve(kind: type[C], **values: Any) -> C:
    """A curve without its provenance, to be evaluated only."""
    return kind.model_construct(**values)


# --- curves: each returns the record of its curve as a dict, with the fit's errors -----------------------------------


def fit_gemm(
    data: Data,
    rates: Rates,
    source: str,
    input_bytes: float = 2.0,
    output_bytes: float = 2.0,
    note: str = "",
    cached: bool = False,
) -> dict[str, Any]:
    """Columns m, n, k, and weights_bytes where `cached`: whether small models may lie in a cache in part."""
    m, n, k = (data.column(name) for name in "mnk")

    def curve(x: np.ndarray) -> GemmCurve:
        names = (
            "compute_efficiency",
            "memory_efficiency",
            "kernel_seconds",
            "padding_m",
            "padding_n",
            "padding_k",
            "padding_bytes",
            "exponent",
            "cache_bytes",
        )
        values = dict(zip(names, map(float, x), strict=False))
        values["kernel_seconds"] *= 1e-6
        values["padding_bytes"] *= 1e6
        values["cache_bytes"] = values.get("cache_bytes", 0.0) * 1e6
        return _curve(GemmCurve, **values)

    def predict(x: np.ndarray) -> np.ndarray:
        time = gemm_time(
            curve(x), rates, m, n, k, input_bytes=input_bytes, output_bytes=output_bytes, weights_bytes=weights
        )
        return np.asarray(time.seconds)

    def error(x: np.ndarray) -> float:
        return float(np.abs(np.log(predict(x) / data.column("seconds")))[~data.held_out].mean())

    weights = data.column("weights_bytes") if cached else np.inf
    starts = [[0.75, 0.8, 4.0, 90.0, 60.0, 60.0, 0.1, 6.0]]
    low, high = [0.05, 0.05, 0.1, 0, 0, 0, 0, 1], [1, 1, _longest_fixed(data), 10000, 10000, 10000, 50, 16]
    if cached:  # paddings, bandwidth and cache can stand for each other: the best of several minima
        low, high = [*low, 0], [*high, 1000]
        starts = [
            [0.9, bandwidth, 4.0, padding, padding, padding, 0.1, 3.0, cache]
            for bandwidth in (0.2, 0.8)
            for padding in (1.0, 20.0)
            for cache in (0.0, 30.0)
        ]
    x = min((solve(predict, data, start, low, high) for start in starts), key=error)
    found = {name: value for name, value in dict(curve(x)).items() if cached or name != "cache_bytes"}
    return found | {"fit": fitted(source, predict(x), data, note)}


def fit_prefill(data: Data, rates: Rates, source: str, element_bytes: float = 2.0) -> dict[str, Any]:
    """Columns batch, heads, kv_heads, tokens (of one sequence), head_dim."""
    shape = [data.column(name) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim")]

    def curve(x: np.ndarray) -> PrefillCurve:
        return _curve(
            PrefillCurve,
            compute_efficiency=float(x[0]),
            memory_efficiency=float(x[1]),
            kernel_seconds=float(x[2]) * 1e-6,
            exponent=float(x[3]),
            backward_ratio=1.0,
        )

    def predict(x: np.ndarray) -> np.ndarray:
        time = attention_prefill_time(curve(x), rates, *shape, element_bytes=element_bytes)  # type: ignore[arg-type]
        return np.asarray(time.seconds)

    high = [1, 1, max(60.0, _longest_fixed(data)), 16]
    x = solve(predict, data, [0.6, 0.5, 8.0, 3.0], [0.05, 0.05, 0.1, 1], high)
    return dict(curve(x)) | {"fit": fitted(source, predict(x), data)}


def fit_weight_gradient(
    gemm: dict[str, Any], data: Data, rates: Rates, source: str, width: float = 2.0
) -> dict[str, Any]:
    """Columns m, n, k, weights_bytes: seconds of weight gradients over those of forward products of their shapes."""
    curve = _curve(GemmCurve, **(gemm | {"weight_gradient_ratio": 1.0}))
    m, n, k = (data.column(name) for name in "mnk")
    time = gemm_time(
        curve, rates, m, n, k, input_bytes=width, output_bytes=width, weights_bytes=data.column("weights_bytes")
    )
    forward = np.asarray(time.seconds)
    ratio = _ratio(data.column("seconds"), forward, 1.0, 3.0)
    fit = {"source": source, "rows": len(m)} | errors(ratio * forward, data.column("seconds"))
    return {"weight_gradient_ratio": ratio, "weight_gradient_fit": fit}


def fit_prefill_backward(
    prefill: dict[str, Any], data: Data, rates: Rates, source: str, element_bytes: float = 2.0
) -> dict[str, Any]:
    """Columns as of `fit_prefill`: seconds of backward kernels over forward ones by `prefill`, both without t0."""
    curve = _curve(PrefillCurve, **(prefill | {"backward_ratio": 1.0}))
    shape = [data.column(name) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim")]
    time = attention_prefill_time(curve, rates, *shape, element_bytes=element_bytes)  # type: ignore[arg-type]
    fixed, measured = float(prefill["kernel_seconds"]), data.column("seconds")
    forward = np.asarray(time.seconds) - fixed
    ratio = _ratio(measured - fixed, forward, 1.0, 10.0)
    fit = {"source": source, "rows": len(measured)} | errors(fixed + ratio * forward, measured)
    return {"backward_ratio": ratio, "backward_fit": fit}


def _ratio(measured: np.ndarray, forward: np.ndarray, low: float, high: float) -> float:
    """The median: large calls do not outweigh small ones, as in the fits of the curves. Within what a file may say."""
    return float(f"{min(high, max(low, float(np.median(measured / forward)))):.4g}")


def fit_decode(data: Data, rates: Rates, source: str, kv_bytes: float = 2.0) -> dict[str, Any]:
    """Columns batch, kv_heads, tokens (in the cache of one sequence), head_dim."""
    batch, kv_heads, tokens, head_dim = (data.column(name) for name in ("batch", "kv_heads", "tokens", "head_dim"))

    def curve(x: np.ndarray) -> DecodeCurve:
        return _curve(
            DecodeCurve,
            memory_efficiency=float(x[0]),
            kernel_seconds=float(x[1]) * 1e-6,
            tile_seconds=float(x[2]) * 1e-6,
        )

    def predict(x: np.ndarray) -> np.ndarray:
        time = attention_decode_time(
            curve(x),
            rates,
            batch,
            kv_heads,
            batch * tokens,
            head_dim,  # type: ignore[arg-type]
            kv_bytes=kv_bytes,
        )
        return np.asarray(time.seconds)

    x = solve(predict, data, [0.8, 12.0, 2.5], [0.02, 0.1, 0], [1, max(60.0, _longest_fixed(data)), 100])
    return dict(curve(x)) | {"fit": fitted(source, predict(x), data)}


def fit_memory(data: Data, rates: Rates, source: str) -> dict[str, Any]:
    """Column bytes: read and written, as `memory_time` says."""

    def curve(x: np.ndarray) -> MemoryCurve:
        return _curve(MemoryCurve, memory_efficiency=float(x[0]), kernel_seconds=float(x[1]) * 1e-6)

    def predict(x: np.ndarray) -> np.ndarray:
        return np.asarray(memory_time(curve(x), rates, data.column("bytes")).seconds)

    x = solve(predict, data, [0.6, 2.5], [0.002, 0], [1, max(60.0, _longest_fixed(data))])
    return dict(curve(x)) | {"fit": fitted(source, predict(x), data)}


def fit_collective(data: Data, op: str, ranks: int, link: float, source: str, note: str = "") -> dict[str, Any]:
    """Column bytes: the payload. link: bytes per second."""

    def curve(x: np.ndarray) -> CollectiveCurve:
        return _curve(CollectiveCurve, alpha_seconds=float(x[0]) * 1e-6, efficiency=float(x[1]), exponent=float(x[2]))

    def predict(x: np.ndarray) -> np.ndarray:
        return np.asarray(collective_seconds(curve(x), cast(Collective, op), ranks, data.column("bytes"), link))

    fastest = 1.3 if op.endswith("all_reduce") else 1.0  # NVLS reduces inside the switch
    quickest = float(data.column("seconds").min() * 1e6)
    start = [quickest, 0.7 if link > 40e9 else 0.2, 0.8]
    x = solve(predict, data, start, [0.5, 0.005, 0.3], [max(200.0, quickest), fastest, 8])
    return dict(curve(x)) | {"fit": fitted(source, predict(x), data, note)}


def measured_collective(data: Data, op: str, ranks: int, link: float | np.ndarray, source: str) -> dict[str, Any]:
    """A curve through the measured points themselves, rising with the size; times of equal wire time are averaged.

    link: bytes per second, of all rows or of each. The stated errors are those of each inner point, predicted from the
    others.
    """
    from scipy.optimize import isotonic_regression

    seconds = data.column("seconds")
    wire = data.column("bytes") * bus_factor(cast(Collective, op), ranks) / link
    sizes, at = np.unique(wire, return_inverse=True)
    mean = np.bincount(at, np.log(seconds)) / np.bincount(at)
    rising = np.exp(isotonic_regression(mean, weights=np.bincount(at)).x)
    points = [(number(float(w)), number(float(t))) for w, t in zip(sizes, rising, strict=True)]
    inner = range(1, len(points) - 1)
    predicted = [float(interpolated_seconds(points[:i] + points[i + 1 :], np.array(points[i][0]))) for i in inner]
    fit: dict[str, Any] = {"source": source, "rows": len(points), "note": "points, each predicted from the others"}
    if predicted:
        fit |= errors(np.array(predicted), np.array([points[i][1] for i in inner]))
    curve = {"alpha_seconds": points[0][1], "efficiency": 1.0, "exponent": 1.0}
    return curve | {"measured": [list(point) for point in points], "fit": fit}


def _longest_fixed(data: Data) -> float:
    """Microseconds: what a call takes at least cannot be more than the quickest call."""
    return max(LONGEST_FIXED_MICROSECONDS, float(data.column("seconds").min() * 1e6))


# --- the file --------------------------------------------------------------------------------------------------------


def write_kernels(record: dict[str, Any], path: Path, comment: str) -> None:
    """One curve per block; its provenance on one line, and a grid of ratios by rows."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    Kernels.model_validate(record)
    yaml = YAML()
    yaml.width = 4096

    def styled(node: Any, key: str = "") -> Any:
        if isinstance(node, list | tuple):
            rows = CommentedSeq(styled(item) for item in node)
            if key not in ("axes", "ratios"):  # of these a line a row
                rows.fa.set_flow_style()
            return rows
        if not isinstance(node, dict):
            return number(node)
        mapping = CommentedMap((k, styled(v, str(k))) for k, v in node.items())
        leaf = not any(isinstance(v, dict) for v in node.values()) and key != "residuals"
        if leaf and key not in ("sources", "reference") and key:
            mapping.fa.set_flow_style()
        return mapping

    body = styled(record)
    body.yaml_set_start_comment(comment)
    with path.open("w", encoding="utf-8") as out:
        yaml.dump(body, out)


def number(value: Any) -> Any:
    """Six digits of a float, a plain number of a numpy one."""
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.6g}") if isinstance(value, float) else value
