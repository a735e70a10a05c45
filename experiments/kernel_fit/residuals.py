"""Robust least squares of a grid of ratios (`rlhfsim.costs.residuals`) beside a curve that is already fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

OUTLIER = 0.05  # log error from which a row counts less and less
ROUNDS = 40
DIGITS = 3


class Part(NamedTuple):
    """A kernel's predicted seconds and its sizes in the order of the grid's axes; several may make up one row."""

    seconds: np.ndarray
    sizes: Sequence[np.ndarray]


def fit_residuals(
    parts: Sequence[Part],
    measured: np.ndarray,
    axes: Sequence[Sequence[float]],
    *,
    extra: np.ndarray | float = 0.0,
    smoothness: float = 0.3,
    unlike: Sequence[int] = (),
    curve: Callable[..., np.ndarray] | None = None,
    slopes: Sequence[tuple[float, float] | None] = (),
) -> dict[str, Any]:
    """The record of `Residuals` under which the parts and `extra` seconds add up to the measured ones.

    smoothness: weight of second differences, so that knots without rows follow their neighbours. unlike: axes along
    which neighbours say nothing of each other (another kernel runs). slopes: for each axis
    the least and largest slope of log seconds in log size from knot to knot; `curve` gives the seconds without ratios
    (more work never takes less time, and twice the work at most twice as long).
    """
    bases = [_basis(part.sizes, axes) for part in parts]
    shape = [len(axis) for axis in axes]
    smooth = _second_differences(shape, [axis for axis in range(len(shape)) if axis not in unlike])
    penalty = smoothness * (smooth.T @ smooth)
    steps, low, high = (
        _slope_bounds(curve, axes, slopes) if curve else (sparse.csr_matrix((0, bases[0].shape[1])), 0, 0)
    )
    logs = np.zeros(bases[0].shape[1])
    for _ in range(ROUNDS):
        each = [part.seconds * np.exp(basis @ logs) for part, basis in zip(parts, bases, strict=True)]
        predicted = extra + sum(each)
        jacobian = sum(
            basis.multiply((own / predicted)[:, None]) for own, basis in zip(each, bases, strict=True)
        ).tocsr()
        error = np.log(measured / predicted)
        weight = 1 / np.sqrt(1 + (error / OUTLIER) ** 2)
        left = (jacobian.T @ jacobian.multiply(weight[:, None]) + penalty).toarray()
        right = jacobian.T @ (weight * (error + jacobian @ logs))
        if steps.shape[0]:
            now = steps @ logs
            over = (now < low - 1e-4) | (now > high + 1e-4)
            bound, rows = np.clip(now, low, high)[over], steps[over]
            left += 1e3 * (rows.T @ rows).toarray()
            right = right + 1e3 * (rows.T @ bound)
        logs = logs + np.clip(np.linalg.solve(left, right) - logs, -0.5, 0.5)
    ratios = np.exp(logs).reshape(-1, shape[-1])
    return {
        "axes": [[float(knot) for knot in axis] for axis in axes],
        "ratios": [[float(f"{ratio:.{DIGITS}g}") for ratio in row] for row in ratios],
    }


def _basis(sizes: Sequence[np.ndarray], axes: Sequence[Sequence[float]]) -> sparse.csr_matrix:
    """Rows of weights of the knots, whose sum is one."""
    count = len(sizes[0])
    index, weight = np.zeros((count, 1), dtype=int), np.ones((count, 1))
    for size, axis in zip(sizes, axes, strict=True):
        knots = np.log(axis)
        log = np.clip(np.log(size), knots[0], knots[-1])
        low = np.clip(np.searchsorted(knots, log, side="right") - 1, 0, len(knots) - 2)
        share = ((log - knots[low]) / (knots[low + 1] - knots[low]))[:, None]
        first = index * len(knots) + low[:, None]
        index = np.concatenate([first, first + 1], axis=1)
        weight = np.concatenate([weight * (1 - share), weight * share], axis=1)
    rows = np.repeat(np.arange(count), index.shape[1])
    shape = (count, int(np.prod([len(axis) for axis in axes])))
    return sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=shape)


def _along(shape: Sequence[int], axis: int, stencil: Sequence[float]) -> sparse.csr_matrix:
    """The stencil applied along one axis of a grid of this shape, flattened."""
    size = shape[axis]
    band = sparse.diags_array([[float(s)] * size for s in stencil], offsets=range(len(stencil)),
                              shape=(size - len(stencil) + 1, size))  # fmt: skip
    before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    return sparse.csr_matrix(sparse.kron(sparse.kron(sparse.eye_array(before), band), sparse.eye_array(after)))


def _second_differences(shape: Sequence[int], axes: Sequence[int]) -> sparse.csr_matrix:
    """And a little of the values themselves: without any rows a ratio is 1."""
    rows = [_along(shape, axis, (1, -2, 1)) for axis in axes if shape[axis] > 2]
    return sparse.csr_matrix(sparse.vstack([*rows, 0.1 * sparse.eye_array(int(np.prod(shape)))]))


def _slope_bounds(
    curve: Callable[..., np.ndarray], axes: Sequence[Sequence[float]], slopes: Sequence[tuple[float, float] | None]
) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Differences of neighbouring knots' logarithms, and what they may be."""
    shape = [len(axis) for axis in axes]
    nodes = [grid.ravel() for grid in np.meshgrid(*axes, indexing="ij")]
    rows, low, high = [], [], []
    for axis, limits in enumerate(slopes):
        if limits is None:
            continue
        nearby = [size * 1.02 if i == axis else size for i, size in enumerate(nodes)]
        slope = np.log(curve(*nearby) / curve(*nodes)) / np.log(1.02)
        step, mean = _along(shape, axis, (-1, 1)), abs(_along(shape, axis, (-1, 1)))
        width = step @ np.log(nodes[axis])
        ends = mean @ slope  # of both knots together; their difference gives each
        gap = np.abs(step @ slope)
        rows.append(step)
        low.append((limits[0] - (ends - gap) / 2) * width)
        high.append((limits[1] - (ends + gap) / 2) * width)
    low, high = np.concatenate(low), np.concatenate(high)
    return sparse.csr_matrix(sparse.vstack(rows)), low, high
