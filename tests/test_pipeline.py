"""The executed pipeline schedule against closed forms, against a longest-path search, and against its own limits."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.costs.pipeline import PipelineSegment, Step, makespan, stage_order
from rlhfsim.costs.segment import Route, Transfer

SHAPES = [(1, 1, 5), (4, 1, 8), (4, 1, 2), (8, 1, 64), (4, 2, 8), (2, 2, 6), (8, 4, 32), (3, 2, 9), (1, 3, 4)]


def equal_stages(stages: int, chunks: int, micro_batches: int, seconds: float) -> np.ndarray:
    """`seconds` per stage and micro-batch, split evenly over the chunks."""
    return np.full((stages * chunks, micro_batches, 1), seconds / chunks)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SHAPES)
def test_bubble_of_equal_stages(stages: int, chunks: int, micro_batches: int) -> None:
    """Narayanan et al. 2021, section 2.2: the bubble is (p - 1) / v micro-batches of forward and backward."""
    forward = equal_stages(stages, chunks, micro_batches, 1.0)
    seconds = makespan(forward, 2 * forward, np.zeros(micro_batches), stages)
    ideal, bubble = 3 * micro_batches, 3 * (stages - 1) / chunks
    assert seconds == pytest.approx(ideal + bubble)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SHAPES)
def test_forward_only(stages: int, chunks: int, micro_batches: int) -> None:
    forward = equal_stages(stages, chunks, micro_batches, 1.0)
    seconds = makespan(forward, None, np.zeros(micro_batches), stages)
    assert seconds == pytest.approx(micro_batches + (stages - 1) / chunks)


def test_a_hop_delays_each_stage_once_when_filling_and_once_when_draining() -> None:
    """One micro-batch crosses p - 1 borders forwards and p - 1 backwards."""
    forward = equal_stages(4, 1, 1, 1.0)
    assert makespan(forward, 2 * forward, np.array([0.5]), 4) == pytest.approx(4 * 3 + 2 * 3 * 0.5)


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("chunks", range(1, 4))
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 6, 12, 13])
def test_every_step_once_and_no_deadlock(stages: int, chunks: int, micro_batches: int) -> None:
    """Uneven numbers of micro-batches too: the interleaved schedule is filled up with empty ones."""
    forward = equal_stages(stages, chunks, micro_batches, 1.0)
    seconds = float(makespan(forward, 2 * forward, np.zeros(micro_batches), stages)[0])
    assert 3 * micro_batches - 1e-9 <= seconds <= 3 * micro_batches * stages + 1e-9
    for stage in range(stages):
        order = stage_order(stage, stages, chunks, micro_batches)
        own = range(stage, stages * chunks, stages)
        assert sorted(order) == sorted(Step(b, v, m) for b in (False, True) for v in own for m in range(micro_batches))


@pytest.mark.parametrize("stage", range(4))
def test_1f1b_keeps_at_most_as_many_micro_batches_as_stages_behind_it(stage: int) -> None:
    in_flight, most = 0, 0
    for step in stage_order(stage, 4, 1, 16):
        in_flight += -1 if step.backward else 1
        most = max(most, in_flight)
    assert most == 4 - stage


@settings(max_examples=40, deadline=None)
@given(
    stages=st.integers(1, 4),
    chunks=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    hop=st.floats(0, 1),
)
def test_makespan_is_the_longest_path(stages: int, chunks: int, groups: int, seed: int, hop: float) -> None:
    """Brute force: the steps as a graph (order on each stage, inputs from other stages), longest path through it."""
    micro_batches, last = groups * stages, stages * chunks - 1
    rng = np.random.default_rng(seed)
    forward, backward = rng.uniform(0.1, 2, (2, stages * chunks, micro_batches, 1))
    graph = nx.DiGraph()
    end = Step(True, last + 1, 0)
    for stage in range(stages):
        order = stage_order(stage, stages, chunks, micro_batches)
        for step, following in zip(order, [*order[1:], end], strict=True):
            seconds = (backward if step.backward else forward)[step.virtual_stage, step.micro_batch, 0]
            graph.add_edge(("start", step), ("end", step), seconds=seconds)
            graph.add_edge(("end", step), ("start", following), seconds=0.0)
            neighbour = step.virtual_stage + (-1 if step.backward else 1)
            if 0 <= neighbour <= last:
                consumer = step._replace(virtual_stage=neighbour)
                way = hop if stages > 1 else 0.0
                graph.add_edge(("end", step), ("start", consumer), seconds=way)
    longest = nx.dag_longest_path_length(graph, weight="seconds")
    assert makespan(forward, backward, np.full(micro_batches, hop), stages)[0] == pytest.approx(longest)


def segment(forward: np.ndarray, stages: int, payload: float) -> PipelineSegment:
    micro_batches = forward.shape[1]
    busy = 3 * forward.sum(axis=0).T / stages
    transfers = (Transfer("all_reduce", ((0, 1),), np.full(micro_batches, payload)), Transfer("send", ((0, 2),), 1.0))
    return PipelineSegment(
        "pass",
        busy,
        np.ones(micro_batches),
        transfers,
        stages=stages,
        forward_seconds=forward,
        backward_seconds=2 * forward,
        roles=("forward", "hop"),
    )


def test_a_segment_accounts_for_every_second_and_shrinks_with_faster_links() -> None:
    forward = np.random.default_rng(0).uniform(1, 2, (4, 8, 3))
    routes = [Route({}, 0.0, 1.0)] * 2
    slow, fast, free = (segment(forward, 4, 1.0).elapsed(routes, [rate] * 2) for rate in (2.0, 4.0, np.inf))
    for elapsed in (slow, fast, free):
        parts = elapsed.compute + elapsed.communication + elapsed.peers
        assert parts == pytest.approx(np.full(3, elapsed.seconds))
        assert (elapsed.peers >= 0).all()
    assert slow.seconds > fast.seconds > free.seconds
    assert free.seconds == pytest.approx(makespan(forward, 2 * forward, np.zeros(8), 4).max())
    assert free.communication == pytest.approx(np.zeros(3))


def test_collectives_inside_a_stage_block_it() -> None:
    """8 micro-batches of 1 + 2 seconds and 1 second of all-reduce in the forward, on 4 stages."""
    forward = equal_stages(4, 1, 8, 1.0)
    routes = [Route({}, 0.0, 1.0)] * 2
    elapsed = segment(forward, 4, 1.0).elapsed(routes, [1.0, np.inf])
    assert elapsed.seconds == pytest.approx((8 + 3) * 4)
    assert elapsed.communication == pytest.approx([8.0])
