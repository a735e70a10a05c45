"""How sure a prediction is: 90 % intervals in logarithms, and how sure a share of cases is."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log, sqrt
from statistics import NormalDist

from .metrics import STEP, base_stage
from .spec.framework import Framework, Residual

COVERAGE = 0.9
_Z = NormalDist().inv_cdf((1 + COVERAGE) / 2)


def t_quantile(count: int) -> float:
    """Of Student's t with so many degrees of freedom, for both sides of `COVERAGE`.

    The expansion in 1/count of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), formula 26.7.5.
    """
    z, n = _Z, float(count)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (k + 1) for k, term in enumerate(terms))


def widened(low: float, high: float, residual: Residual | None) -> tuple[float, float]:
    """An interval of what is unknown of the inputs, and of what the model does not know, together.

    Both are taken as independent: half widths, in logarithms, add as squares about the geometric middle.
    """
    middle, half = sqrt(low * high), log(high / low) / 2
    if residual:
        half = sqrt(half**2 + (t_quantile(residual.count) * residual.log_sd) ** 2)
    return middle * exp(-half), middle * exp(half)


def residual_of(framework: Framework | None, phase: str) -> Residual | None:
    """How far predictions of a phase were off with that profile; None where nobody has measured it."""
    return framework.residuals.get(phase) if framework else None


def share_limits(successes: int, count: int) -> tuple[float, float]:
    """90 % limits of a share: E. B. Wilson, 'Probable inference, the law of succession, and statistical inference',
    Journal of the American Statistical Association 22 (1927). (0, 1) of none."""
    if not count:
        return 0.0, 1.0
    share, z = successes / count, _Z
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def phase_of(quantity: str, stages: list[str]) -> str:
    """step, generation (with whatever the source counts to it), training, weight sync or scoring."""
    named = {base_stage(stage) for stage in stages or [quantity]}
    if quantity == STEP:
        return "step"
    if "gen" in named:
        return "generation"
    if named == {"update_weights"}:
        return "weight sync"
    return "training" if named & {"update_actor", "update_critic"} else "scoring"


def intervals(framework: Framework | None, seconds: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """90 % of what was measured lay within, for stages and the step; nothing of a phase that nobody has measured."""
    residuals = {name: residual_of(framework, phase_of(name, [])) for name in seconds}
    return {name: widened(seconds[name], seconds[name], r) for name, r in residuals.items() if r and seconds[name]}
