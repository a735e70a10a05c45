"""Strategies side by side, on equal terms: the same samples, lengths and optimizer steps, each tuned for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DoesNotFit, InputError, nearest
from .fits import Fit
from .layout import graph_of
from .metrics import bound_by, critical_path, step_seconds
from .model import tensor_parallel_choices
from .simulate import Setup, prepare, simulate
from .spec.loader import load_rows, load_scenario
from .spec.scenario import Scenario, StrategyChoice
from .timeline import Timeline

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

# Shares that tuning tries for disaggregation: generation, scoring (over its models), training (over its models).
SPLITS = [(g, s, 8 - g - s) for g in (1, 2, 3, 4, 5) for s in (1, 2, 3) if 8 - g - s >= 1]
BATCHES = (2, 4, 8, 16)


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
    rows = {}
    for label, (strategy, engine) in DEFAULT_ROWS.items():
        choice = scenario.strategy if scenario.strategy.name == strategy else StrategyChoice(name=strategy)
        generation = scenario.generation.model_copy(
            update={"engine": engine} | ({} if engine == "engine" else {"batching": None})
        )
        if engine == "zero3_per_token":
            generation = generation.model_copy(update={"tensor_parallel": 1})
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
    if scenario.generation.batch_samples is not None:
        used["generation.batch_samples"] = scenario.generation.batch_samples
    for role in ("actor", "critic"):
        if any(s.model == role and s.kind == "train" for s in graph.stages()):
            used[f"models.{role}.micro_batch_samples"] = getattr(scenario.models, role).micro_batch_samples
    for role in ("actor", "critic", "reference", "reward"):
        if any(s.model.endswith(role) and s.kind == "score" for s in graph.stages()):
            used[f"models.{role}.score_micro_batch_samples"] = getattr(scenario.models, role).score_micro_batch_samples
    used |= {f"strategy.{name}": value for name, value in scenario.strategy.options.items()}
    if scenario.strategy.name == "disaggregated":
        used["ranks"] = {name: len(held.ranks) for name, held in setup.holdings.items()}
    return used


# -- tuning -------------------------------------------------------------------------------------------------------


def tuned(scenario: Scenario) -> Scenario:
    """The scenario with the best micro-batches, engine TP and (disaggregated) split and batches that fit.

    A small grid, one dimension after the other; what the scenario's strategy states explicitly stays as it is.
    """
    best, seconds = _with_micro_batches(scenario), None
    for candidates in (_splits, _tensor_parallel, _batches, _replicas):
        for candidate in candidates(best, scenario):
            candidate = _with_micro_batches(candidate)
            if candidate == best and seconds is not None:
                continue
            found = _seconds(candidate)
            if found is not None and (seconds is None or found < seconds):
                best, seconds = candidate, found
    return best


def _seconds(scenario: Scenario) -> float | None:
    """Step time over two iterations of the first draw; None where it does not fit or cannot be built."""
    short = scenario.simulation.model_copy(update={"iterations": min(2, scenario.simulation.iterations), "draws": 1})
    try:
        setup = prepare(scenario.model_copy(update={"simulation": short}))
        return step_seconds(simulate(setup)) if setup.fit().fits else None
    except (InputError, DoesNotFit):
        return None


def _with_micro_batches(scenario: Scenario) -> Scenario:
    """Each model's largest micro-batches that fit, as powers of two (one where nothing fits)."""
    try:
        scenario = _with_generation_batches(scenario)
        largest = prepare(scenario).memory.largest_micro_batches()
    except InputError:
        return scenario
    models = scenario.models
    for key, size in largest.items():
        _, role, name = key.split(".")
        use = getattr(models, role).model_copy(update={name: 1 << max(0, size.bit_length() - 1) if size else 1})
        models = models.model_copy(update={role: use})
    return scenario.model_copy(update={"models": models})


def _with_generation_batches(scenario: Scenario) -> Scenario:
    """Static generation in batches of halves, quarters, ... until the KV cache fits."""
    if scenario.generation.continuous or scenario.generation.batch_samples is not None:
        return scenario
    memory = prepare(scenario).memory
    stage = next(s for s in memory.graph.stages() if s.kind == "generate")
    size = memory.samples_per_replica(stage)
    while size > 1 and memory.fit().by_phase[stage.name].bytes.total > memory.capacity_bytes:
        size = -(-size // 2)
        generation = scenario.generation.model_copy(update={"batch_samples": size})
        scenario = scenario.model_copy(update={"generation": generation})
        memory = prepare(scenario).memory
    return scenario


def _tensor_parallel(best: Scenario, _given: Scenario) -> Iterable[Scenario]:
    """Engine sizes inside a node that divide the heads."""
    generation, node = best.generation, best.cluster.node.gpus_per_node
    if generation.engine == "zero3_per_token":
        return [best]
    sizes = [
        t for t in tensor_parallel_choices(best.models.actor.shape) if t <= node and node % t == 0 and t & (t - 1) == 0
    ]
    return [best.model_copy(update={"generation": generation.model_copy(update={"tensor_parallel": t})}) for t in sizes]


def _splits(best: Scenario, given: Scenario) -> Iterable[Scenario]:
    if best.strategy.name != "disaggregated" or {"split", "ranks"} & set(given.strategy.options):
        return [best]
    graph, _ = graph_of(best)
    stages = graph.stages()
    trained = list(dict.fromkeys(s.model for s in stages if s.kind == "train"))
    scoring = list(dict.fromkeys(s.model for s in stages if s.kind == "score" and s.model not in trained))
    found = []
    for generate, score, train in SPLITS:
        split = {"shadow_actor": float(generate)}
        split |= {m: score / len(scoring) for m in scoring} | {m: train / len(trained) for m in trained}
        found.append(_with_options(best, split=split))
    return found


def _batches(best: Scenario, given: Scenario) -> Iterable[Scenario]:
    if best.strategy.name != "disaggregated" or "batches" in given.strategy.options:
        return []
    return [_with_options(best, batches=n) for n in BATCHES]


def _replicas(best: Scenario, given: Scenario) -> Iterable[Scenario]:
    if best.strategy.name != "disaggregated" or "replicas" in given.strategy.options:
        return []
    return [_with_options(best, replicas=n) for n in (2, 4)]


def _with_options(scenario: Scenario, **options: Any) -> Scenario:
    choice = StrategyChoice(name=scenario.strategy.name, **(scenario.strategy.options | options))
    return scenario.model_copy(update={"strategy": choice})


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
        f"{winner.label} wins over {base.label} ({base.step_seconds:.3g} s to {winner.step_seconds:.3g} s per "
        f"iteration) mainly because {saved[0]} spends {gains[saved]:.3g} s less on {saved[1]} on the critical path"
    )
    if by_stage[lost] < -0.02 * (base.step_seconds or 0):
        text += f"; it pays {-by_stage[lost]:.3g} s more for {lost}"
    return text + f". It is bound by {bound_by(winner.timeline)}."
