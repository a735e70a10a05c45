"""A coarse grid of ratios beside a curve of few coefficients: what measurements show that the formula does not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from rlhfsim.spec.base import Record

Numbers = float | np.ndarray
MOST_TABLES = 4096
Knots = Annotated[tuple[Annotated[float, Field(gt=0, le=1e12)], ...], Field(min_length=2)]
Ratio = Annotated[float, Field(gt=0, le=100)]


class Residuals(Record):
    """Measured over predicted seconds at the knots of a grid.

    Between knots the logarithm of the ratio is linear in the logarithm of every size; outside the grid it is that of
    the nearest knot. axes: the rising knots of every size (which sizes, the curve says). ratios: a row for every
    combination of knots of all but the last axis, in their order; a column for every knot of the last.
    """

    axes: Annotated[tuple[Knots, ...], Field(min_length=1)]
    ratios: tuple[tuple[Ratio, ...], ...]

    @model_validator(mode="after")
    def _is_a_grid(self) -> Residuals:
        if any(low >= high for axis in self.axes for low, high in pairwise(axis)):
            raise ValueError("the knots of every axis must rise")
        rows, columns = prod(len(axis) for axis in self.axes[:-1]), len(self.axes[-1])
        if len(self.ratios) != rows or any(len(row) != columns for row in self.ratios):
            raise ValueError(f"ratios must have {rows} rows of {columns}, as the axes say")
        return self

    @cached_property
    def _logarithms(self) -> tuple[list[np.ndarray], np.ndarray]:
        shape = [len(axis) for axis in self.axes]
        return [np.log(axis) for axis in self.axes], np.log(np.array(self.ratios)).reshape(shape)

    @cached_property
    def _known(self) -> dict[tuple[tuple[int, ...], tuple[float, ...]], np.ndarray]:
        return {}

    def __call__(self, *sizes: Numbers) -> np.ndarray:
        """The ratio at these sizes, one per axis, which broadcast."""
        many = tuple(axis for axis, size in enumerate(sizes) if np.ndim(size)) or (len(sizes) - 1,)
        table = self._reduced(many, tuple(float(size) for axis, size in enumerate(sizes) if axis not in many))
        knots = [self._logarithms[0][axis] for axis in many]
        logs = [np.log(np.maximum(sizes[axis], self.axes[axis][0])) for axis in many]
        log = np.interp(logs[0], knots[0], table) if len(many) == 1 else _between(logs, knots, table)
        return np.asarray(np.exp(log))

    def _reduced(self, many: tuple[int, ...], others: tuple[float, ...]) -> np.ndarray:
        """Logarithms at the knots of some axes, the others at one size: kept, as only tokens differ."""
        table = self._known.get((many, others))
        if table is None:
            if len(self._known) >= MOST_TABLES:
                self._known.clear()
            axes, whole = self._logarithms
            single = [axis for axis in range(len(axes)) if axis not in many]
            table = np.moveaxis(whole, single, range(len(single)))
            for axis, size in zip(single, others, strict=True):
                low, share = _place(np.log(max(size, self.axes[axis][0])), axes[axis])
                table = table[low] + share * (table[low + 1] - table[low])
            self._known[many, others] = table
        return table


def _between(logs: Sequence[np.ndarray], knots: Sequence[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Linear along every axis: the knots around each point, weighted."""
    places = [_place(log, axis) for log, axis in zip(logs, knots, strict=True)]
    total: np.ndarray = np.zeros(())
    for corner in product((0, 1), repeat=len(places)):
        weight: Numbers = 1.0
        for side, (_, share) in zip(corner, places, strict=True):
            weight = weight * (share if side else 1 - share)
        total = total + weight * table[tuple(low + side for side, (low, _) in zip(corner, places, strict=True))]
    return total


def _place(log: Numbers, knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The knot below each value, and how far it is from there to the next one."""
    low = np.clip(np.searchsorted(knots, log, side="right") - 1, 0, len(knots) - 2)
    return low, np.clip((log - knots[low]) / (knots[low + 1] - knots[low]), 0.0, 1.0)
