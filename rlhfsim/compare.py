"""Strategies side by side, on equal terms: the same samples, lengths and optimizer steps, each tuned for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DoesNotFit, InputError, nearest
from .fits import Fit
from .format import human_seconds
from .metrics import bound_by, critical_path, step_seconds
from .simulate import Setup, prepare, simulate
from .spec.loader import load_rows, load_scenario
from .spec.scenario import ModelUse, Scenario, StrategyChoice
from .timeline import Timeline
from .tune import tuned

# What `compare` shows for a scenario that names no rows: the paper's placements, co-location with each engine.
DEFAULT_ROWS = {
    "colocated, zero3_per_token": ("colocated", "zero3_per_token"),
    "colocated, hybrid": ("colocated", "hybrid"),
    "colocated, engine": ("colocated", "engine"),
    "interleaved, hybrid": ("interleaved", "hybrid"),
    "interleaved, engine": ("interleaved", "engine"),
    "disaggregated, engine": ("disaggregated", "engine"),
}
DEFAULT_BASELINE = "colocated, hybrid"


@dataclass(frozen=True)
class Row:
    """One strategy: what it used, how long it takes, and what it is bound by. `reason` says why it has no time."""

    label: str
    scenario: Scenario
    fit: Fit | None = None
    timeline: Timeline | None = None
    step_seconds: float | None = None
    reason: str = ""
    used: dict[str, Any] = field(default_factory=dict)
    draws: tuple[float, ...] = ()

    @property
    def fits(self) -> bool:
        return self.step_seconds is not None

    @property
    def off_policy(self) -> bool:
        """Whether it trains on responses of older weights: then it is another algorithm."""
        return self.timeline is not None and bool(self.timeline.info.get("off_policy"))


@dataclass(frozen=True)
class Comparison:
    """Rows in the order given, and the one that the others are measured against."""

    baseline: str
    rows: tuple[Row, ...]
    tuned: bool

    @property
    def base(self) -> Row:
        return next(r for r in self.rows if r.label == self.baseline)

    @property
    def winner(self) -> Row | None:
        timed = [r for r in self.rows if r.fits]
        return min(timed, key=lambda r: (r.step_seconds, r.label)) if timed else None

    def speedup(self, row: Row) -> float | None:
        """Of the baseline's step time over the row's; None where either has none."""
        if row.step_seconds is None or self.base.step_seconds is None:
            return None
        return self.base.step_seconds / row.step_seconds

    def speedup_interval(self, row: Row) -> tuple[float, float] | None:
        """5th and 95th percentile over the length draws, pairwise; None with fewer than two draws."""
        if len(row.draws) < 2 or len(self.base.draws) != len(row.draws):
            return None
        ratios = np.array(self.base.draws) / np.array(row.draws)
        return float(np.quantile(ratios, 0.05)), float(np.quantile(ratios, 0.95))

    def win_share(self, row: Row) -> float | None:
        """Share of the length draws in which this row is the fastest."""
        timed = [r for r in self.rows if r.fits]
        if len(row.draws) < 2 or row not in timed:
            return None
        fastest = np.argmin([r.draws for r in timed], axis=0)
        return float(np.mean(fastest == timed.index(row)))


def compare(
    scenarios: dict[str, Scenario],
    baseline: str,
    *,
    tune: bool = True,
    progress: Callable[[str], None] = lambda label: None,
) -> Comparison:
    """Simulate every row, each with the settings that suit it best unless `tune` is off.

    Raises InputError where the baseline is unknown or cannot be built; another row that cannot (a cluster too small for
    its strategy) has a reason instead of a time.
    """
    if baseline not in scenarios:
        raise InputError(f"there is no row {baseline!r}{nearest(baseline, scenarios)}", field="baseline")
    rows = []
    for label, scenario in scenarios.items():
        progress(label)
        try:
            rows.append(_row(label, tuned(scenario) if tune else scenario))
        except InputError as error:
            if label == baseline:
                raise
            rows.append(Row(label, scenario, reason=str(error)))
    return Comparison(baseline, tuple(rows), tune)


def rows_of(path: str, overrides: Iterable[str]) -> tuple[dict[str, Scenario], str]:
    """The rows of a scenario file (its `compare`, else the paper's placements) and the baseline among them."""
    scenario = load_scenario(path, overrides)
    if scenario.compare is not None:
        return load_rows(path, overrides), scenario.compare.baseline
    return default_rows(scenario), DEFAULT_BASELINE


def default_rows(scenario: Scenario) -> dict[str, Scenario]:
    """The scenario under each of the paper's placements; options of the scenario's own strategy are kept for it."""
    rows, actor = {}, scenario.models.actor
    for label, (strategy, engine) in DEFAULT_ROWS.items():
        choice = scenario.strategy if scenario.strategy.name == strategy else StrategyChoice(name=strategy)
        generation = scenario.generation.model_copy(
            update={"engine": engine} | ({} if engine == "engine" else {"batching": None})
        )
        if engine == "zero3_per_token":
            generation = generation.model_copy(update={"tensor_parallel": 1, "pipeline_parallel": 1})
        elif generation.in_stages_of(actor) and generation.pipeline_parallel != actor.pipeline_parallel:
            generation = generation.model_copy(update={"pipeline_parallel": 1})
        rows[label] = scenario.model_copy(update={"strategy": choice, "generation": generation})
    return rows


def _row(label: str, scenario: Scenario) -> Row:
    try:
        setup = prepare(scenario)
        fit = setup.fit()
        if not fit.fits:
            return Row(label, scenario, fit, reason=fit.reason, used=settings(setup))
        timeline = simulate(setup)
    except DoesNotFit as error:
        return Row(label, scenario, reason=str(error))
    draws = scenario.simulation.draws
    seconds = [step_seconds(timeline)]
    seconds += [step_seconds(simulate(setup, seed=scenario.simulation.seed + k)) for k in range(1, draws)]
    return Row(label, scenario, fit, timeline, float(np.mean(seconds)), used=settings(setup), draws=tuple(seconds))


def settings(setup: Setup) -> dict[str, Any]:
    """What a row used, as overrides that can be pasted."""
    scenario, graph = setup.scenario, setup.graph
    used: dict[str, Any] = {"generation.tensor_parallel": scenario.generation.tensor_parallel}
    if (stages := scenario.generation.pipeline_parallel) > 1:
        used["generation.pipeline_parallel"] = stages
    if scenario.generation.batch_samples is not None:
        used["generation.batch_samples"] = scenario.generation.batch_samples
    for role in ("actor", "critic"):
        if any(s.model == role and s.kind == "train" for s in graph.stages()):
            used |= _micro_batch(role, getattr(scenario.models, role), "")
    for role in scenario.roles:
        if any(s.model.endswith(role) and s.kind == "score" for s in graph.stages()):
            used |= _micro_batch(role, getattr(scenario.models, role), "score_")
    used |= {f"strategy.{name}": value for name, value in scenario.strategy.options.items()}
    if scenario.strategy.name == "disaggregated":
        used["ranks"] = {name: len(held.ranks) for name, held in setup.holdings.items()}
    return used


def _micro_batch(role: str, use: ModelUse, prefix: str) -> dict[str, int]:
    """The limit of a model's micro-batches: in tokens where it has that, else in samples."""
    unit = "samples" if getattr(use, f"{prefix}micro_batch_tokens") is None else "tokens"
    name = f"{prefix}micro_batch_{unit}"
    return {f"models.{role}.{name}": getattr(use, name)}


# -- words --------------------------------------------------------------------------------------------------------


def why(comparison: Comparison) -> str:
    """One sentence: where the winner's time goes less than the baseline's, along the two critical paths."""
    winner, base = comparison.winner, comparison.base
    if winner is None:
        return "No strategy fits."
    assert winner.timeline is not None
    if base.timeline is None:
        return f"{winner.label} is the fastest that fits; the baseline {base.label} does not fit."
    if winner is base:
        return f"{winner.label} is the fastest itself; it is bound by {bound_by(winner.timeline)}."
    ours, theirs = critical_path(winner.timeline).table(), critical_path(base.timeline).table()
    per_iteration = max(1, base.timeline.iterations - 1)
    gains = {key: (theirs.get(key, 0.0) - ours.get(key, 0.0)) / per_iteration for key in {*ours, *theirs}}
    saved = max(gains, key=lambda k: (gains[k], k))
    stages = {stage for stage, _ in gains}
    by_stage = {s: sum(v for (stage, _), v in gains.items() if stage == s) for s in sorted(stages)}
    lost = min(by_stage, key=lambda s: (by_stage[s], s))
    text = (
        f"{winner.label} wins over {base.label} ({human_seconds(base.step_seconds or 0)} to "
        f"{human_seconds(winner.step_seconds or 0)} per iteration) mainly because {saved[0]} spends "
        f"{gains[saved]:.3g} s less on {saved[1]} on the critical path"
    )
    if by_stage[lost] < -0.02 * (base.step_seconds or 0):
        text += f"; it pays {-by_stage[lost]:.3g} s more for {lost}"
    return text + f". It is bound by {bound_by(winner.timeline)}."
