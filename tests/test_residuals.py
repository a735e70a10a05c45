"""Grids of ratios against scipy's interpolation and their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.interpolate import RegularGridInterpolator

from rlhfsim.costs.residuals import Residuals

AXES = ((512, 2048, 32768), (1, 4, 16, 64), (16, 1024))
RATIOS = 0.5 + np.random.default_rng(0).random((12, 2))
GRID = Residuals(axes=AXES, ratios=RATIOS.tolist())
SIZE = st.floats(1, 1e6)


def expected(*sizes: float | np.ndarray) -> np.ndarray:
    logs = RegularGridInterpolator([np.log(axis) for axis in AXES], np.log(RATIOS).reshape(3, 4, 2))
    inside = [np.clip(size, axis[0], axis[-1]) for size, axis in zip(sizes, AXES, strict=True)]
    return np.exp(logs(np.stack(np.broadcast_arrays(*np.log(np.broadcast_arrays(*inside))), axis=-1)))


@given(SIZE, SIZE, SIZE)
def test_numbers(n, k, m):
    assert GRID(n, k, m) == pytest.approx(float(expected(n, k, m).item()), rel=1e-12)


@pytest.mark.parametrize("many", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_arrays_on_any_axes(many):
    draws = np.random.default_rng(1).uniform(1, 1e5, (3, 50))
    sizes = [draws[axis] if axis in many else 700.0 for axis in range(3)]
    for _ in range(2):  # the second call finds the tables of the first
        np.testing.assert_allclose(GRID(*sizes), expected(*sizes), rtol=1e-12)


def test_arrays_broadcast():
    n, m = np.array([[512.0], [9000.0]]), np.array([1.0, 50.0, 1e6])
    assert GRID(n, 4, m).shape == (2, 3)
    np.testing.assert_allclose(GRID(n, 4, m), expected(n, 4, m), rtol=1e-12)


def test_at_knots_between_and_outside():
    line = Residuals(axes=[[1, 100]], ratios=[[1.0, 4.0]])
    assert line(1) == pytest.approx(1) and line(100) == pytest.approx(4)
    assert line(10) == pytest.approx(2)  # half-way in the logarithms of both
    assert line(0) == pytest.approx(1) and line(1e9) == pytest.approx(4)


@pytest.mark.parametrize(
    ("axes", "ratios", "message"),
    [
        ([[1, 2], [1]], [[1], [1]], "at least 2"),
        ([[2, 1]], [[1, 1]], "must rise"),
        ([[1, 2], [1, 2]], [[1, 1]], "2 rows of 2"),
        ([[1, 2]], [[1, 1, 1]], "1 rows of 2"),
        ([[1, 2]], [[1, 0]], "greater than 0"),
    ],
)
def test_what_is_no_grid_is_refused(axes, ratios, message):
    with pytest.raises(ValidationError, match=message):
        Residuals(axes=axes, ratios=ratios)
