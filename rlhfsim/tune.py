"""The settings that suit a strategy best: micro-batches, size of the engine, split of the ranks, batches.

A small search, one dimension after the other from a start that fits. What the user set on the command line, in a row
of `compare` or in `keep` stays as it is, and the scenario as given is always among the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Any

from .errors import DoesNotFit, InputError
from .fits import Fit
from .layout import graph_of
from .metrics import step_seconds
from .model import pipeline_parallel_choices, tensor_parallel_choices
from .simulate import prepare, simulate
from .spec.scenario import ModelUse, Scenario, StrategyChoice

# Shares tried for disaggregation, in eighths: generation, scoring (all its models), training (all its models).
SPLITS = [(g, s, 8 - g - s) for g in (1, 2, 3, 4, 5) for s in (1, 2, 3) if 8 - g - s >= 1]
HALVES = range(1, 8)  # shares tried for generation, in eighths, where a strategy parts the ranks in two
BATCHES = (1, 2, 4, 8, 16)
REPLICAS = (1, 2, 4)


@dataclass(frozen=True, order=True)
class _Score:
    """Smaller is better: what fits before what does not, then seconds, or how much too large it is."""

    excess_bytes: float
    seconds: float


NOTHING = _Score(inf, inf)


def tuned(scenario: Scenario) -> Scenario:
    """The fastest candidate; where none fits, the one that is the least too large.

    The search: of all engine sizes and splits those that fit (with pipeline stages only where none fits without); from
    the middle one of these, best split, best engine size, best split again, number of batches and replicas, and last
    the micro-batches of training.
    """
    search = _Search(scenario)
    for candidates in (_layouts, _splits, _tensor_parallel, _splits, _batches, _replicas, _train_micro_batches):
        search.among(candidates(search.best, scenario))
        if search.score.seconds == inf:  # not even the layouts fit: nothing further can
            break
    return search.best


class _Search:
    """The best candidate so far."""

    def __init__(self, given: Scenario) -> None:
        self.best, self.score = given, _score(given)
        self._seen = [given]

    def among(self, candidates: Iterable[Scenario]) -> None:
        for candidate in candidates:
            if candidate not in self._seen:
                self._seen.append(candidate)
                score = _score(candidate)
                if score < self.score:
                    self.best, self.score = candidate, score


def _score(scenario: Scenario) -> _Score:
    """Step time over two iterations of the first draw."""
    short = scenario.simulation.model_copy(update={"iterations": min(2, scenario.simulation.iterations), "draws": 1})
    try:
        setup = prepare(scenario.model_copy(update={"simulation": short}))
        fit = setup.fit()
        return _Score(0.0, step_seconds(simulate(setup))) if fit.fits else _Score(_excess(fit), inf)
    except DoesNotFit:
        return _Score(1.0, inf)
    except InputError:
        return NOTHING


def _excess(fit: Fit) -> float:
    """Bytes that are missing; a trifle where only an engine's cache is too small for one sequence."""
    return max(1.0, fit.worst.missing_bytes, fit.host_bytes - fit.host_capacity_bytes)


def _kept(key: str, given: Scenario) -> bool:
    return any(key == kept or key.startswith(kept + ".") for kept in given.keep)


# -- dimensions ---------------------------------------------------------------------------------------------------


def _layouts(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    """One engine size and split to start from: the middle one of those that fit, with as few pipeline stages in the
    engine as do; else the least too large."""
    too_large: list[tuple[float, Scenario]] = []
    for staged in _stage_counts(best, given):
        engines = _engine_sizes(staged, given)
        candidates = [_with_micro_batches(split, given) for engine in engines for split in _shares(engine, given)]
        by_excess = [(_fit_excess(c), c) for c in candidates]
        if fitting := [c for excess, c in by_excess if excess <= 0]:
            yield fitting[len(fitting) // 2]
            return
        too_large += by_excess
    if too_large:
        yield min(too_large, key=lambda entry: entry[0])[1]


def _fit_excess(scenario: Scenario) -> float:
    """Bytes that are missing, without simulating; infinite where the layout is impossible."""
    try:
        fit = prepare(scenario).memory.fit()
    except InputError:
        return inf
    return 0.0 if fit.fits else _excess(fit)


def _splits(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    return (_with_micro_batches(c, given) for c in _shares(best, given))


def _tensor_parallel(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    return (_with_micro_batches(c, given) for c in _engine_sizes(best, given))


def _engine_sizes(best: Scenario, given: Scenario) -> list[Scenario]:
    """Engine sizes inside a node that divide the heads."""
    generation, nodes = best.generation, [part.node.gpus_per_node for part in best.cluster.all_parts]
    if generation.engine == "zero3_per_token" or _kept("generation.tensor_parallel", given):
        return [best]
    choices = tensor_parallel_choices(best.models.actor.shape)
    sizes = [t for t in choices if all(node % t == 0 for node in nodes) and t & (t - 1) == 0]
    return [_with_generation(best, tensor_parallel=t) for t in sizes]


def _stage_counts(best: Scenario, given: Scenario) -> list[Scenario]:
    """Engines of one pipeline stage, then of several, at most one a node."""
    generation, actor, cluster = best.generation, best.models.actor, best.cluster
    fixed = generation.engine == "zero3_per_token" or generation.in_stages_of(actor) or generation.speculative
    if fixed or _kept("generation.pipeline_parallel", given):
        return [best]
    most = cluster.gpus // cluster.node.gpus_per_node
    counts = [p for p in pipeline_parallel_choices(actor.shape) if p <= most and p & (p - 1) == 0]
    return [_with_generation(best, pipeline_parallel=p) for p in counts]


def _shares(best: Scenario, given: Scenario) -> list[Scenario]:
    kept = "split" in given.strategy.options or _kept("strategy.split", given)
    if not kept and _halves(best):
        return [_with_options(best, split={"generation": float(g), "training": 8.0 - g}) for g in HALVES]
    if not _free(given, "split") or not _free(given, "ranks"):
        return [best]
    try:
        graph, _ = graph_of(best)
        stages = graph.stages()
    except InputError:  # too few ranks for this engine size under the default split, say
        stages = []
    trained = list(dict.fromkeys(s.model for s in stages if s.kind == "train"))
    scoring = list(dict.fromkeys(s.model for s in stages if s.kind == "score" and s.model not in trained))
    judges = [m for m in scoring if m.removeprefix("shadow_") in best.roles]  # a function has no ranks of its own
    if not trained:
        return [best]
    return [
        _with_options(
            best,
            split={"shadow_actor": float(generate)}
            | {m: score / len(judges) for m in judges}
            | {m: train / len(trained) for m in trained},
        )
        for generate, score, train in SPLITS
    ]


def _halves(best: Scenario) -> bool:
    """Whether the strategy has ranks for generation and ranks for training."""
    try:
        graph_of(_with_options(best, split={"generation": 1.0, "training": 1.0}))
    except InputError:
        return False
    return True


def _batches(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    return (_with_micro_batches(_with_options(best, batches=n), given) for n in BATCHES if _free(given, "batches"))


def _replicas(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    """Groups of engines that take batches in turn; more groups want more batches."""
    for count, factor in product(REPLICAS, (1, 2)):
        batches = best.strategy.options.get("batches", 4) * (factor if _free(given, "batches") else 1)
        if _free(given, "replicas"):
            yield _with_micro_batches(_with_options(best, replicas=count, batches=batches), given)


def _train_micro_batches(best: Scenario, given: Scenario) -> Iterator[Scenario]:
    """Halves, quarters, ... of the largest: they fill a pipeline better and wait less for the longest sample."""
    for halvings in range(1, 8):
        models = best.models
        for role in ("actor", "critic"):
            use: ModelUse = getattr(models, role)
            name = "micro_batch_samples" if use.micro_batch_tokens is None else "micro_batch_tokens"
            if not _kept(f"models.{role}.{name}", given):
                size = max(_least(name, best), getattr(use, name) >> halvings)
                models = models.model_copy(update={role: use.model_copy(update={name: size})})
        yield best.model_copy(update={"models": models})


# -- changes ------------------------------------------------------------------------------------------------------


def _free(given: Scenario, option: str) -> bool:
    """Whether an option of disaggregation may be chosen."""
    is_set = option in given.strategy.options or _kept(f"strategy.{option}", given)
    return given.strategy.name == "disaggregated" and not is_set


def _with_micro_batches(scenario: Scenario, given: Scenario) -> Scenario:
    """Each model's largest micro-batches that fit, as powers of two (one where nothing fits)."""
    try:
        scenario = _with_generation_batches(scenario, given)
        largest = prepare(scenario).memory.largest_micro_batches()
    except InputError:
        return scenario
    models = scenario.models
    for key, size in largest.items():
        _, role, name = key.split(".")
        if not _kept(key, given):
            power = max(_least(name, scenario), 1 << max(0, size.bit_length() - 1))
            models = models.model_copy(update={role: getattr(models, role).model_copy(update={name: power})})
    return scenario.model_copy(update={"models": models})


def _least(name: str, scenario: Scenario) -> int:
    """The smallest micro-batch: one sample, or the tokens of the longest."""
    workload = scenario.workload
    return workload.longest_sample if name.endswith("_tokens") else 1


def _with_generation_batches(scenario: Scenario, given: Scenario) -> Scenario:
    """Static generation: all samples at once, or in halves, quarters, ... until the KV cache fits."""
    if scenario.generation.continuous or given.generation.batch_samples is not None:
        return scenario
    scenario = _with_generation(scenario, batch_samples=None)
    memory = prepare(scenario).memory
    stage = next(s for s in memory.graph.stages() if s.kind == "generate")
    size = memory.samples_per_replica(stage)
    while size > 1 and any(i.missing_bytes > 0 for i in memory.of_stage(stage)):
        size = -(-size // 2)
        scenario = _with_generation(scenario, batch_samples=size)
        memory = prepare(scenario).memory
    return scenario


def _with_generation(scenario: Scenario, **changes: Any) -> Scenario:
    return scenario.model_copy(update={"generation": scenario.generation.model_copy(update=changes)})


def _with_options(scenario: Scenario, **options: Any) -> Scenario:
    choice = StrategyChoice(name=scenario.strategy.name, **(scenario.strategy.options | options))
    return scenario.model_copy(update={"strategy": choice})
