"""For the tests of graph, scheduler and simulator: costs that are fixed seconds, links that are free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rlhfsim.algorithms import Algorithm, grpo, ppo
from rlhfsim.batch import samples_of
from rlhfsim.costs.segment import Route, Segment, Transfer
from rlhfsim.fold import Fold, unfolded
from rlhfsim.graph import Firing, Message, StageGraph
from rlhfsim.metrics import base_stage
from rlhfsim.schedule import check
from rlhfsim.sim.run import run
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved
from rlhfsim.timeline import Timeline
from rlhfsim.timeline import check as check_timeline

Seconds = Callable[[Firing], float]


class FixedCost:
    """Every firing computes for as long as `seconds` says; results move along one link, each of `message_bytes`.

    Firings of `gen` may stop at any instant, and go on with what is left.
    """

    def __init__(self, seconds: Seconds, message_bytes: float = 0.0) -> None:
        self.seconds, self.message_bytes = seconds, message_bytes
        self.left: dict[Firing, float] = {}

    def program(self, f: Firing) -> list[Segment]:
        self.left.setdefault(f, self.seconds(f))
        return [Segment("work", np.full((1, 1), self.left[f]), stops=base_stage(f.stage) == "gen")]

    def ended(self, f: Firing, name: Firing) -> dict[str, float]:
        return {}

    def stop_share(self, f: Firing, share: float) -> float:
        return share

    def paused(self, f: Firing, share: float) -> dict[str, float]:
        self.left[f] *= 1 - share
        return {}

    def message(self, messages: list[Message]) -> Transfer | None:
        moving = [m for m in messages if m.source != m.destination]
        if not moving or not self.message_bytes:
            return None
        return Transfer("send", ((moving[0].source, moving[0].destination),), self.message_bytes)


class OneLink:
    """A topology in which every transfer takes the same link, of so many bytes a second, with no latency."""

    def __init__(self, bytes_per_second: float = 1.0) -> None:
        self.capacities = {"link": bytes_per_second}
        self._route = Route({"link": 1.0}, 0.0, 1.0)

    def route(self, op: str, groups: tuple[tuple[int, ...], ...]) -> Route:
        return self._route


def by_stage(seconds: dict[str, float]) -> Seconds:
    """The same seconds for every firing of a stage (`ref` for `ref.0` too); 0 where none are given."""
    return lambda f: seconds.get(base_stage(f.stage), 0.0)


def per_sample(graph: StageGraph, seconds: dict[str, float], samples: int) -> Seconds:
    """Seconds that grow with a firing's samples per rank; those given are for an iteration's samples on all ranks."""
    everyone = len({r for s in graph.stages() for r in s.ranks})

    def of(f: Firing) -> float:
        share = len(samples_of(graph, f, samples)) / samples
        return seconds.get(base_stage(f.stage), 0.0) * share * everyone / graph.at(f.stage).size

    return of


def simulate(
    graph: StageGraph | Fold,
    seconds: Seconds,
    iterations: int = 1,
    *,
    message_bytes: float = 0.0,
    bytes_per_second: float = 1.0,
) -> Timeline:
    """The checked timeline of a checked graph."""
    fold = graph if isinstance(graph, Fold) else unfolded(check(graph))
    spans = run(fold, FixedCost(seconds, message_bytes), OneLink(bytes_per_second), iterations)  # type: ignore[arg-type]
    ranks = 1 + max(r for s in fold.original.stages() for r in s.ranks)
    return check_timeline(Timeline(spans, ranks, iterations))


SCORES = ("old_log_prob", "ref", "reward", "values")
STAGES = ("gen", *SCORES, "update_actor", "update_critic", "update_weights", "ids")


@st.composite
def devices(draw: st.DrawFn, ranks: int = 8) -> Devices:
    """ZeRO-3 domains, single ranks or replicas of two, with or without an engine of its own."""
    unit = draw(st.sampled_from((None, 1, 2)))
    together = {} if unit is None else dict.fromkeys(SCORES, unit)
    if (tensor_parallel := draw(st.sampled_from((None, 1, 2)))) is not None:
        together["gen"] = tensor_parallel
    return Devices(tuple(range(ranks)), 8, together, own_engine=draw(st.booleans()))


@st.composite
def algorithms(draw: st.DrawFn) -> Algorithm:
    """With and without critic, reference, a pass for log-probabilities, and rounds."""
    updates = {"epochs": draw(st.integers(1, 2)), "minibatches": draw(st.sampled_from((1, 2, 3)))}
    if draw(st.booleans()):
        return ppo.build(**updates, share_actor_critic=draw(st.booleans()), reference=draw(st.booleans()))
    return grpo.build(
        **updates,
        reference=draw(st.booleans()),
        old_log_prob=draw(st.sampled_from(("always", "if_needed", "engine"))),
        rounds=draw(st.sampled_from((1, 3))),
    )


@st.composite
def strategy_graphs(
    draw: st.DrawFn, names: tuple[str, ...] = ("colocated", "interleaved", "disaggregated")
) -> StageGraph:
    """Graphs of all strategies with any options that can finish."""
    algorithm = draw(algorithms())
    name, where = draw(st.sampled_from(names)), draw(devices())
    if name == "colocated":
        return check(colocated.build(algorithm, where, calls=draw(st.integers(1, 3))))
    if name == "interleaved":
        return check(interleaved.build(algorithm, where, **_interleaved(draw, algorithm.models)))
    pieces, replicas = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2)))
    split = draw(st.sampled_from((None, "engine")))
    models = ["shadow_actor", *dict.fromkeys(s.model for s in algorithm.of_kind("score", "train"))]
    shadow = draw(st.booleans()) and "critic" in models
    shares = dict.fromkeys([*models, *(["shadow_critic"] if shadow else [])], 1.0) | {"shadow_actor": 2.0}
    return check(
        disaggregated.build(
            algorithm,
            Devices(tuple(range(8)), 8, replica={"shadow_actor": 2}),
            batches=pieces * algorithm.minibatches,
            replicas=replicas,
            spread=draw(st.sampled_from(("robin", "first"))),
            capacity=draw(st.integers(1, 3)),
            shadow_critic=shadow,
            recompute_log_probs=draw(st.booleans()) and any(s.name == "old_log_prob" for s in algorithm.steps),
            split=split and shares,
        )
    )


def _interleaved(draw: st.DrawFn, models: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "calls": draw(st.integers(1, 2)),
        "mode": draw(st.sampled_from(("sync", "async"))),
        "concat": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return options | {"ratio": draw(st.sampled_from((0.25, 0.5, 0.75)))}
    order = draw(st.permutations(range(8)))
    cut, end = draw(st.sampled_from(((2, 8), (4, 8), (6, 8), (2, 4), (4, 6))))
    owners = {"reference": order[:cut], "reward": order[cut:end]}
    if "reference" not in models:
        del owners["reference"]
    if draw(st.booleans()) and "critic" in models:
        start = draw(st.sampled_from((0, 2, 4)))
        owners["critic"] = sorted(order[start : start + 4]) if draw(st.booleans()) else order[start : start + 4]
    return options | {"owners": owners}
