"""Folding: one rank for a block of ranks that do the same gives the same timeline, or the graph stays as it is."""

from __future__ import annotations

import time
from typing import Any

import pytest
from conftest import SCORES, by_stage, simulate, strategy_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.algorithms import ppo
from rlhfsim.fold import Fold, fold, unfolded
from rlhfsim.graph import Firing, StageGraph
from rlhfsim.schedule import check
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved
from rlhfsim.timeline import Timeline

NAMES = ("gen", *SCORES, "update_actor", "update_critic", "update_weights", "ids")
durations = st.lists(st.sampled_from((0.0, 0.3, 1.0, 2.7)), min_size=len(NAMES), max_size=len(NAMES))


def by_rank(timeline: Timeline) -> dict[tuple[int, int, str, int], tuple[float, float]]:
    return {(rank, *s.firing[:3]): (s.start_seconds, s.end_seconds) for s in timeline.spans for rank in s.ranks}


def compare(graph: StageGraph, seconds: dict[str, float]) -> Fold:
    """That every rank does the same at the same times; the fold."""
    small = fold(graph)
    one, other = (by_rank(simulate(f, by_stage(seconds), 2)) for f in (unfolded(graph), small))
    assert one.keys() == other.keys()
    for key, times in one.items():
        assert times == pytest.approx(other[key], rel=1e-9, abs=1e-9), key
    if small.graph is not graph:
        used = {r for s in graph.stages() for r in s.ranks}
        assert sorted(rank for block in small.ranks for rank in block) == sorted(used)
    assert [lane for block in small.lanes for lane in block] == list(range(graph.lanes))
    return small


@settings(max_examples=150, deadline=None)
@given(strategy_graphs(), durations)
def test_folded_equals_unfolded(graph: StageGraph, drawn: list[float]) -> None:
    compare(graph, dict(zip(NAMES, drawn, strict=True)))


@settings(max_examples=150, deadline=None)
@given(strategy_graphs())
def test_a_firing_stands_for_whole_places_with_their_lanes(graph: StageGraph) -> None:
    """Each place of the graph is stood for once, and by a firing that has exactly its ranks and lanes."""
    small = fold(graph)
    for stage in graph.stages():
        folded, seen = small.graph.at(stage.name), []
        for place in range(folded.places):
            places = small.places(Firing(0, stage.name, 0, place))
            seen += places
            assert sorted(r for block in folded.ranks_of(place) for r in small.ranks[block]) == sorted(
                r for p in places for r in stage.ranks_of(p)
            )
            lanes = {lane for block in folded.lanes_of(place) for lane in small.lanes[block]}
            assert lanes == {lane for p in places for lane in stage.lanes_of(p)}
        assert sorted(seen) == list(range(stage.places))


def test_places_that_lanes_cut_are_not_folded() -> None:
    """u's owners hold two lanes each; a stage that handles 3 of the 8 lanes cuts one of them in two."""
    graph = StageGraph(lanes=8)
    graph.stage("gen", "generate", "m", range(4), size=1)
    graph.stage("part", "score", "m", range(4, 7), size=1, serves=range(3))
    graph.link("gen", "part", stream=True)
    assert compare(check(graph), {"gen": 1.0}).graph is graph


def test_ranks_in_another_order_are_not_folded() -> None:
    graph = StageGraph(lanes=4)
    graph.stage("gen", "generate", "m", range(4), size=1)
    graph.stage("ref", "score", "m", (3, 1, 2, 0), size=1)
    graph.link("gen", "ref", stream=True)
    assert fold(graph).graph is graph
    split = StageGraph(lanes=4)
    split.stage("gen", "generate", "m", range(6), size=6)
    split.stage("ref", "score", "m", (0, 1, 4, 5), size=2)
    assert fold(split).graph is split


def test_a_cut_inside_a_place_is_not_folded() -> None:
    graph = StageGraph(lanes=8)
    graph.stage("gen", "generate", "m", range(8), size=4)
    graph.stage("ref", "score", "m", range(2), size=1)
    graph.link("gen", "ref", stream=True)
    assert compare(check(graph), {"gen": 1.0}).graph is graph


W = tuple(range(1024))
ALONE = Devices(W, 8, dict.fromkeys(SCORES, 1) | {"gen": 1})
PAIRS = Devices(W, 8, dict.fromkeys(SCORES, 2) | {"gen": 8})


@pytest.mark.parametrize(
    "build, where, options, blocks, spans",
    [
        (colocated.build, Devices(W, 8), {"calls": 4}, 1, 4 * 5 + 4 * 2),
        (colocated.build, ALONE, {"calls": 4}, 1, 4 * 5 + 4 * 2),
        (colocated.build, PAIRS, {"calls": 4}, 1, 4 * 5 + 4 * 2),
        (interleaved.build, Devices(W, 8), {"mode": "sync"}, 2, None),
        (interleaved.build, ALONE, {"mode": "sync"}, 2, None),
        (interleaved.build, PAIRS, {}, 2, None),
        (interleaved.build, ALONE, {"ratio": 0.25}, 4, None),
        (interleaved.build, ALONE, {"ratio": 0.25, "mode": "sync", "calls": 3}, 4, None),
        (interleaved.build, Devices(W, 8), {"concat": True}, 2, None),
        (disaggregated.build, Devices(W, 8), {"batches": 16}, 6, 16 * 4 + 4 * 2 + 2),
        (disaggregated.build, Devices(W, 8), {"batches": 16, "replicas": 16}, 21, 16 * 4 + 4 * 2 + 2),
    ],
)
def test_a_thousand_ranks_are_a_handful(
    build: Any, where: Devices, options: dict[str, Any], blocks: int, spans: int | None
) -> None:
    graph = build(ppo.build(minibatches=4), where, **options)
    small = fold(graph)
    assert len(small.ranks) == blocks
    assert sorted(rank for block in small.ranks for rank in block) == list(W)
    started = time.process_time()
    timeline = simulate(small, by_stage(dict.fromkeys(NAMES, 1.0)))
    assert time.process_time() - started < 2.0
    assert len(timeline.spans) <= 150
    if spans is not None:
        assert len(timeline.spans) == spans
    assert sum(len(s.ranks) for s in timeline.spans) == sum(
        len(graph.at(f.stage).ranks_of(f.place)) for f in graph.program()
    )
