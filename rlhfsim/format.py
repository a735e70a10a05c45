"""Numbers as people read them: three significant digits (no prediction is better than that), units always shown."""

from __future__ import annotations

import math
from collections.abc import Sequence


def three(value: float) -> str:
    """Three significant digits without exponent where it is readable: ``0.0123``, ``1.50``, ``12300``, ``1.23e+09``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    rounded = float(f"{value:.2e}")
    if not 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:.2e}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def human_seconds(seconds: float) -> str:
    """``85.0 µs``, ``12.3 ms``, ``4.50 s``, ``2 min 5 s``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 0:
        return "-" + human_seconds(-seconds)
    if not math.isfinite(seconds):
        return f"{seconds} s"
    # The thresholds are half a digit early, so that 59.96 s is "1 min 0 s" and never "60.0 s".
    if seconds == 0 or 0.9995 <= seconds < 59.95:
        return f"{three(seconds)} s"
    if seconds < 0.9995e-3:
        return f"{three(seconds * 1e6)} µs"
    if seconds < 0.9995:
        return f"{three(seconds * 1e3)} ms"
    for name, size, small, small_size in (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600)):
        units = round(seconds / small_size)
        per = size // small_size
        if name == "d" or units < per * (60 if name == "min" else 24):
            return f"{units // per} {name} {units % per} {small}"
    raise AssertionError("days end the list")


def gib(count: float) -> str:
    """Bytes in GiB: ``79.2 GiB``."""
    return f"{three(count / 2**30)} GiB"


def rank_text(ranks: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
