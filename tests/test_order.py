"""`violations`: nothing to say of what an executor ran by the graph, and each broken order is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import by_stage, simulate, strategy_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim.algorithms import ppo
from rlhfsim.fold import fold
from rlhfsim.graph import StageGraph
from rlhfsim.layout import graph_of
from rlhfsim.order import violations
from rlhfsim.schedule import check
from rlhfsim.strategies import Devices, colocated, disaggregated
from rlhfsim.timeline import Span, Timeline

Change = Callable[[Span], Span]
EIGHT, FOUR = Devices(tuple(range(8)), 8), Devices(tuple(range(4)), 4)
SECONDS = {"gen": 4.0, "ref": 2.0, "values": 1.0, "reward": 1.5, "old_log_prob": 0.5}
SECONDS |= {"update_actor": 3.0, "update_critic": 2.5, "update_weights": 0.5}
OPTIONS = {
    "colocated": {"calls": 2},
    "interleaved": {"calls": 2, "mode": "sync"},
    "disaggregated": {"batches": 4, "split": dict.fromkeys(disaggregated.SHARES, 1.0) | {"shadow_actor": 2}},
}


# ---------------------------------------------------------------- obeyed


@settings(max_examples=100, deadline=None)
@given(strategy_graphs(), st.integers(0, 10**6), st.booleans())
def test_simulations_obey_their_graph(graph: StageGraph, seed: int, alike: bool) -> None:
    """Any strategy and options; every firing as long as chance says, or all of a stage (then ranks may be folded)."""
    chance = random.Random(seed)
    by_name = {s.name: chance.uniform(0.0, 2.0) for s in graph.stages()}
    if alike:
        timeline = simulate(fold(graph), lambda f: by_name[f.stage], 3)
    else:
        timeline = simulate(graph, lambda f: chance.uniform(0.0, 2.0), 3, message_bytes=0.3)
    assert violations(graph, timeline) == []


@pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)
@pytest.mark.parametrize("lengths", ["equal", "tail"])
def test_predictions_obey_their_graph(strategy: str, engine: str, lengths: str) -> None:
    found = scenario(
        strategy,
        engine,
        periodic={"validation_every": 2, "checkpoint_every": 3},
        **{f"strategy.{name}": value for name, value in OPTIONS[strategy].items()},
        **(TAIL if lengths == "tail" else {}),
    )
    timeline = timeline_of(found)
    assert timeline.iterations == 3
    assert violations(graph_of(found)[0], timeline) == []


# ---------------------------------------------------------------- broken


def run(graph: StageGraph) -> tuple[StageGraph, Timeline]:
    timeline = simulate(check(graph), by_stage(SECONDS), 3)
    assert violations(graph, timeline) == []
    return graph, timeline


def changed(timeline: Timeline, stage: str, change: Change, iteration: int = 1) -> Timeline:
    """The first span of a stage in an iteration is another."""
    old = timeline.of(stage=stage, iteration=iteration)[0]
    return replace(timeline, spans=[change(s) if s is old else s for s in timeline.spans])


def moved(seconds: float) -> Change:
    return lambda s: replace(s, start_seconds=s.start_seconds + seconds, end_seconds=s.end_seconds + seconds)


@pytest.fixture
def apart() -> tuple[StageGraph, Timeline]:
    return run(disaggregated.build(ppo.build(minibatches=2), EIGHT, batches=4))


def test_swapped_spans_are_found() -> None:
    """Two neighbours on the same ranks change places in time, so that nothing overlaps."""
    graph, timeline = run(colocated.build(ppo.build(), FOUR))
    gen, scored = timeline.of(stage="gen", iteration=1)[0], timeline.of(stage="old_log_prob", iteration=1)[0]
    assert gen.end_seconds == scored.start_seconds
    swapped = changed(timeline, "gen", moved(scored.seconds))
    swapped = changed(swapped, "old_log_prob", moved(-gen.seconds))
    assert violations(graph, swapped) == [
        "old_log_prob (iteration 1, chunk 0, place 0) started 4.5 s before the end of "
        "gen (iteration 1, chunk 0, place 0), which it needs"
    ]


@pytest.mark.parametrize("stage", ["ref", "reward", "update_actor", "update_weights", "gen"])
def test_a_span_before_what_it_needs_is_found(apart: tuple[StageGraph, Timeline], stage: str) -> None:
    """By one microsecond, where it had to wait; the same within the clocks' error is none."""
    graph, timeline = apart
    span = timeline.of(stage=stage, iteration=1)[0]
    cause = next(s for s in timeline.spans if s.firing == span.released_by)
    early = changed(timeline, stage, moved(cause.end_seconds - span.start_seconds - 1e-6))
    (text,) = [t for t in violations(graph, early) if t.startswith(f"{stage} (iteration 1") and "needs" in t]
    assert f"started 1e-06 s before the end of {cause.firing.stage} (iteration {cause.firing.iteration}" in text
    assert violations(graph, replace(early, info={"clock_error_seconds": 2e-6})) == []
    assert violations(graph, early, tolerance_seconds=2e-6) == []


def test_two_spans_on_one_rank_are_found(apart: tuple[StageGraph, Timeline]) -> None:
    graph, timeline = apart
    longer = changed(timeline, "ref", lambda s: replace(s, end_seconds=s.end_seconds + 0.001))
    rank = timeline.of(stage="ref")[0].ranks[0]
    following = timeline.of(stage="ref", iteration=1)[1]
    assert following.start_seconds > timeline.of(stage="ref", iteration=1)[0].end_seconds + 0.001  # it waits for gen
    into = following.start_seconds + 0.001
    overlapping = changed(timeline, "ref", lambda s: replace(s, end_seconds=into))
    assert any("needs" in t for t in violations(graph, longer))  # the reward model has already begun
    assert f"ref (iteration 1, chunk 1, place 0) started on rank {rank} during ref (iteration 1, chunk 0, place 0)" in (
        violations(graph, overlapping)
    )


def test_what_is_missing_or_elsewhere_is_found(apart: tuple[StageGraph, Timeline]) -> None:
    graph, timeline = apart
    lost = timeline.of(stage="values", iteration=2)[3]
    without = replace(timeline, spans=[s for s in timeline.spans if s is not lost])
    assert violations(graph, without) == [
        "reward (iteration 2, chunk 3, place 0) ran, but not values (iteration 2, chunk 3, place 0), which it needs"
    ]
    strange = changed(timeline, "ref", lambda s: replace(s, firing=s.firing._replace(stage="rerank")))
    assert violations(graph, strange)[0] == "the graph has no stage 'rerank'"
    elsewhere = changed(timeline, "ref", lambda s: replace(s, ranks=(*s.ranks, 7)))
    assert any("ran on ranks" in text and "no places of it" in text for text in violations(graph, elsewhere))


def test_the_first_free_place_may_take_any_chunk() -> None:
    """Batches are numbered as they end: whoever needs the first of them waits for the first that ends, for no other."""
    graph = check(disaggregated.build(ppo.build(), EIGHT, batches=6, replicas=2, spread="first", capacity=2))
    timeline = simulate(graph, lambda f: (5.0, 1.0)[f.place] if f.stage == "gen" else 0.1, 3)
    assert violations(graph, timeline) == []
    early = changed(timeline, "ref", moved(-0.2), iteration=0)
    assert any("needs" in t and t.startswith("ref (iteration 0, chunk 0") for t in violations(graph, early))
