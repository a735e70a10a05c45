"""The simulator with costs that are fixed seconds: every rank-second is accounted for, and messages take their time."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from conftest import SCORES, FixedCost, OneLink, by_stage, simulate, strategy_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim import metrics
from rlhfsim.algorithms import ppo
from rlhfsim.costs.segment import Segment, Transfer
from rlhfsim.fold import fold, unfolded
from rlhfsim.graph import Firing, Message, StageGraph
from rlhfsim.schedule import check
from rlhfsim.sim.run import run
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved
from rlhfsim.timeline import Span, Timeline

NAMES = ("gen", *SCORES, "update_actor", "update_critic", "update_weights", "ids")
seconds_of = st.lists(st.sampled_from((0.0, 0.25, 1.0, 1.0, 3.0)), min_size=len(NAMES), max_size=len(NAMES)).map(
    lambda drawn: dict(zip(NAMES, drawn, strict=True))
)
wires = st.sampled_from((0.0, 0.5, 2.0))
EIGHT = Devices(tuple(range(8)), 8)


@settings(max_examples=80, deadline=None)
@given(strategy_graphs(), seconds_of, wires)
def test_every_rank_second_is_one_thing(graph: StageGraph, seconds: dict[str, float], wire: float) -> None:
    """Busy time is what the stages compute, counted here without the timeline's parts; the rest is waiting or idle."""
    timeline = simulate(graph, by_stage(seconds), 2, message_bytes=wire)
    account = metrics.rank_seconds(timeline)
    total = sum(account.values())
    np.testing.assert_allclose(total, timeline.end_seconds, rtol=1e-9)
    computed = np.zeros(timeline.ranks)
    for stage in graph.stages():
        for chunk in range(stage.firings):
            for place in stage.all_places(chunk):
                if place >= 0:
                    computed[list(stage.ranks_of(place))] += 2 * by_stage(seconds)(Firing(0, stage.name, chunk, place))
    late = {r for s in graph.stages() if s.spread == "first" for r in s.ranks}  # who runs what there depends on time
    fixed = [r for r in range(timeline.ranks) if r not in late]
    np.testing.assert_allclose(account["compute"][fixed], computed[fixed], atol=1e-9)
    if not wire:
        assert not account["wait_data"].any()


@settings(max_examples=80, deadline=None)
@given(strategy_graphs(), seconds_of, wires)
def test_critical_path_is_at_most_the_iteration(graph: StageGraph, seconds: dict[str, float], wire: float) -> None:
    timeline = simulate(graph, by_stage(seconds), message_bytes=wire)
    path = metrics.critical_path(timeline)
    assert path.seconds <= timeline.end_seconds + 1e-9
    work = sum(
        seconds[metrics.base_stage(f.stage)]
        for s in graph.stages()
        for c in range(s.firings)
        for p in s.all_places(c)
        for f in [Firing(0, s.name, c, p)]
    )
    messages = sum(1 for f in {s.firing for s in timeline.spans} for _ in graph.receives(f))
    assert timeline.end_seconds <= work + wire * 2 * messages + 1e-9
    if not wire:  # spans that release one another leave no gap: the path explains all of the time
        assert path.seconds == pytest.approx(timeline.end_seconds)


@settings(max_examples=60, deadline=None)
@given(strategy_graphs(), seconds_of, wires, st.integers(1, 3))
def test_twice_the_seconds_is_twice_the_timeline(
    graph: StageGraph, seconds: dict[str, float], wire: float, iterations: int
) -> None:
    once = simulate(graph, by_stage(seconds), iterations, message_bytes=wire)
    twice = simulate(graph, by_stage({s: 2 * x for s, x in seconds.items()}), iterations, message_bytes=2 * wire)
    assert [s.firing for s in once.spans] == [s.firing for s in twice.spans]
    for a, b in zip(once.spans, twice.spans, strict=True):
        assert (b.start_seconds, b.end_seconds) == pytest.approx((2 * a.start_seconds, 2 * a.end_seconds))


@settings(max_examples=40, deadline=None)
@given(strategy_graphs(), seconds_of, wires)
def test_same_inputs_same_spans(graph: StageGraph, seconds: dict[str, float], wire: float) -> None:
    first, second = (simulate(graph, by_stage(seconds), 2, message_bytes=wire).spans for _ in range(2))
    assert first == second


@settings(max_examples=80, deadline=None)
@given(strategy_graphs(), seconds_of)
def test_released_by_is_the_last_that_had_to_end(graph: StageGraph, seconds: dict[str, float]) -> None:
    """Nothing starts later than it could: each span starts when the one that it names ends, or at 0."""
    timeline = simulate(graph, by_stage(seconds), 2)
    ends = {s.firing: s.end_seconds for s in timeline.spans}
    for span in timeline.spans:
        assert span.start_seconds == (ends[span.released_by] if span.released_by else 0.0)
        if graph.at(span.firing.stage).spread != "first":
            needed = [ends[n] for n in graph.needs(span.firing) if n.place >= 0]
            assert max(needed, default=0.0) <= span.start_seconds


def test_released_by_names_needs_and_ranks() -> None:
    graph = StageGraph()
    graph.stage("long", "score", "m", (0,))
    graph.stage("short", "score", "m", (1,))
    graph.stage("after", "score", "m", (1,), after=["long", "short"])
    graph.stage("next", "score", "m", (1,))
    spans = simulate(graph, by_stage({"long": 3.0, "short": 1.0, "after": 1.0, "next": 1.0})).spans
    causes = {s.firing.stage: s.released_by and s.released_by.stage for s in spans}
    assert causes == {"long": None, "short": None, "after": "long", "next": "after"}


@pytest.mark.parametrize("spread", ["robin", "first"])
def test_released_by_a_replica(spread: str) -> None:
    """A result that is numbered when it completes still names the span that made it."""
    graph = disaggregated.build(ppo.build(), EIGHT, batches=2, replicas=2, spread=spread)
    gen = {0: 5.0, 1: 2.0}
    spans = simulate(graph, lambda f: gen[f.chunk] if f.stage == "gen" else 1.0).spans
    causes = {s.firing[1:3]: s.released_by and s.released_by[1:] for s in spans}
    slow, fast = ("gen", 0, 0), ("gen", 1, 1)
    # Strict turns take batch 0 first, though it is late; otherwise what completes first is batch 0.
    assert causes["ref", 0] == (slow if spread == "robin" else fast)
    starts = [s.start_seconds for s in spans if s.firing.stage == "ref"]
    assert starts == ([5.0, 6.0] if spread == "robin" else [2.0, 5.0])


def test_all_that_ends_at_an_instant_ends_before_anyone_decides() -> None:
    """Both places are free at 2 s; the next chunk goes to the first, although the other's end was known earlier."""
    graph = StageGraph()
    graph.stage("gen", "generate", "m", (0, 1), size=1, chunks=5, spread="first")
    seconds = {0: 1.0, 1: 2.0, 2: 1.0}
    spans = simulate(graph, lambda f: seconds.get(f.chunk, 1.0)).spans
    assert [(s.firing.chunk, s.firing.place, s.start_seconds) for s in spans] == [
        (0, 0, 0.0),
        (1, 1, 0.0),
        (2, 0, 1.0),
        (3, 0, 2.0),
        (4, 1, 2.0),
    ]


# ---------------------------------------------------------------- messages


def chain(stream: bool = True) -> StageGraph:
    graph = StageGraph()
    graph.stage("u", "score", "m", (0,), chunks=2)
    graph.stage("v", "score", "m", (1,), chunks=2)
    graph.link("u", "v", stream=stream, carries=("x",))
    return check(graph)


def test_a_message_delays_its_consumer() -> None:
    """6 bytes at 4 bytes/s: 1.5 s after each result; the producer goes on meanwhile. The wait is booked as such."""
    spans = simulate(chain(), by_stage({"u": 2.0, "v": 1.0}), message_bytes=6.0, bytes_per_second=4.0).spans
    times = {s.firing[1:3]: (s.start_seconds, s.data_seconds, s.end_seconds) for s in spans}
    assert times == {
        ("u", 0): (0.0, 0.0, 2.0),
        ("u", 1): (2.0, 0.0, 4.0),
        ("v", 0): (2.0, 1.5, 4.5),
        ("v", 1): (4.5, 1.0, 6.5),
    }  # the second arrives at 5.5


def test_messages_share_a_link() -> None:
    """Both results leave together: 6 bytes each at 2 bytes/s for each, 3 s."""
    graph = StageGraph()
    for name, ranks in (("u", (0, 1)), ("w", (2, 3))):
        graph.stage(name, "score", "m", ranks[:1])
        graph.stage(f"{name}_reader", "score", "m", ranks[1:])
        graph.link(name, f"{name}_reader", carries=("x",))
    spans = simulate(graph, by_stage({"u": 1.0, "w": 1.0}), message_bytes=6.0, bytes_per_second=4.0).spans
    assert {s.firing.stage: s.end_seconds for s in spans} == {"u": 1.0, "w": 1.0, "u_reader": 4.0, "w_reader": 4.0}


def test_a_barrier_waits_for_the_first_chunks_message_too() -> None:
    """v starts after u's last chunk; the first chunk's message is slow and still must have arrived."""

    class FirstIsLarge(FixedCost):
        def message(self, messages: list[Message]) -> Transfer:
            return Transfer("send", ((0, 1),), 10.0 if messages[0].producer.chunk == 0 else 1.0)

    spans = run(unfolded(chain(stream=False)), FirstIsLarge(lambda f: 1.0), OneLink(), 1)  # type: ignore[arg-type]
    first = next(s for s in spans if s.firing.stage == "v")
    # u: 0-1 and 1-2. 10 bytes at 1 byte/s from 1; the other byte shares the link from 2 to 4: all arrived at 12.
    assert (first.start_seconds, first.data_seconds) == (2.0, pytest.approx(10.0))


def test_later_epochs_do_not_wait_again() -> None:
    graph = disaggregated.build(ppo.build(epochs=3), EIGHT, batches=1)
    timeline = simulate(
        graph,
        by_stage({"reward": 1.0, "update_actor": 1.0, "update_critic": 1.0}),
        message_bytes=1.0,
        bytes_per_second=1e3,
    )
    waits = {s.firing[1:3]: s.data_seconds for s in timeline.spans if s.data_seconds}
    assert ("update_actor", 0) in waits and ("update_actor", 1) not in waits


# ---------------------------------------------------------------- spans


def test_replicas_wait_for_the_slowest() -> None:
    class Uneven(FixedCost):
        def program(self, f: Firing) -> list[Segment]:
            return [Segment("a", np.array([[1.0], [3.0]])), Segment("b", np.array([[2.0], [1.0]]), np.array([2.0]))]

    graph = StageGraph()
    graph.stage("u", "score", "m", range(4))
    (span,) = run(unfolded(check(graph)), Uneven(lambda f: 0.0), OneLink(), 1)  # type: ignore[arg-type]
    assert (span.seconds, span.compute_seconds, span.peer_seconds) == (7.0, (5.0, 5.0), (2.0, 2.0))
    assert span.detail == {"a": 3.0, "b": 4.0}


def test_a_folded_span_holds_all_its_ranks() -> None:
    graph = colocated.build(ppo.build(), Devices(tuple(range(16)), 8, {"gen": 2}))
    spans = simulate(fold(graph), by_stage({"gen": 1.0})).spans
    assert all(s.ranks == tuple(range(16)) for s in spans)
    assert len(spans) == 7


def test_an_impossible_graph_says_who_is_stuck() -> None:
    graph = StageGraph()
    graph.stage("u", "score", "m", (0,))
    graph.stage("v", "score", "m", (1,), after=["u"])
    graph.needs = lambda f: [Firing(9, "u", 0, 0)] if f.stage == "v" else []  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"v\[0\] waits for u\[0\]"):
        run(unfolded(graph), FixedCost(lambda f: 1.0), OneLink(), 1)  # type: ignore[arg-type]


# ---------------------------------------------------------------- steady state


def test_the_interval_between_iterations_is_the_steady_state() -> None:
    """Ranks shared: every iteration is as long. Disaggregated with an equally fast critic: the depth of a batch."""
    seconds = dict.fromkeys(NAMES, 1.0)
    for graph in (colocated.build(ppo.build(), EIGHT), interleaved.build(ppo.build(), EIGHT)):
        timeline = simulate(graph, by_stage(seconds), 4)
        assert metrics.step_seconds(timeline) == pytest.approx(timeline.end_seconds / 4)
    graph = disaggregated.build(ppo.build(), EIGHT, batches=1)
    timeline = simulate(graph, by_stage(seconds), 4)
    assert metrics.step_intervals(timeline) == pytest.approx([1 + 1 + 1 + 1 + 1] * 3)


def test_a_lag_lets_iterations_overlap() -> None:
    """Generation 5 s and training 3 s on their own ranks. On-policy: 8 s each; one iteration ahead: the longer one."""
    for lag, interval in ((1, 8.0), (2, 5.0)):
        graph = StageGraph()
        graph.stage("gen", "generate", "actor", (0,))
        graph.stage("update_actor", "train", "actor", (1,), after=["gen"])
        graph.link("update_actor", "gen", lag=lag)
        timeline = simulate(graph, by_stage({"gen": 5.0, "update_actor": 3.0}), 8)
        assert metrics.step_seconds(timeline) == interval


def order_of(spans: list[Span]) -> dict[int, list[Firing]]:
    order: dict[int, list[Firing]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start_seconds, s.end_seconds)):
        for rank in span.ranks:
            order[rank].append(span.firing)  # type: ignore[arg-type]
    return order


@settings(max_examples=40, deadline=None)
@given(strategy_graphs(), seconds_of)
def test_ranks_follow_the_program(graph: StageGraph, seconds: dict[str, float]) -> None:
    """Each rank's firings are its part of the graph's program, once an iteration, whatever the durations."""
    if any(s.spread == "first" for s in graph.stages()):
        return
    positive = by_stage({s: x + 0.001 for s, x in seconds.items()})  # firings of no length have no order in time
    found = order_of(simulate(graph, positive, 2).spans)
    for rank, firings in found.items():
        program = [f for f in graph.program() if rank in graph.ranks(f)]
        assert firings == [f._replace(iteration=i) for i in (0, 1) for f in program]


def test_timeline_counts_idle_ranks() -> None:
    where = {m: [k] for k, m in enumerate(("shadow_actor", "reference", "shadow_critic", "reward", "actor", "critic"))}
    graph = disaggregated.build(ppo.build(), EIGHT, ranks=where, batches=1)
    timeline = simulate(graph, by_stage({"gen": 1.0}))
    whole = Timeline(timeline.spans, 8, 1)
    assert metrics.rank_seconds(whole)["idle"].tolist() == [0.0] + [1.0] * 7
