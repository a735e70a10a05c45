"""The scheduler, driven by an executor of a few lines with random durations: what it promises holds for any graph."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict

import pytest
from conftest import strategy_graphs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhfsim.graph import ANY_PLACE, Firing, StageGraph
from rlhfsim.schedule import Scheduler, check


def drive(graph: StageGraph, iterations: int, seed: int) -> dict[int, list[Firing]]:
    """Run the graph with random durations, many of them zero or equal; the order of firings on every rank.

    Asserts that no firing starts before what it needs is done (asked of the graph, not of the scheduler), that no rank
    is held twice, that every firing runs once, and that nothing is left. A firing that is asked to stop does so after
    a while, unless it ends before; it starts again later. Nothing overtakes a stage that enters when ready.
    """
    chance, scheduler = random.Random(seed), Scheduler(graph, iterations)
    running: list[tuple[float, int, Firing]] = []
    busy: set[int] = set()
    log: set[Firing] = set()
    order: dict[int, list[Firing]] = defaultdict(list)
    now, count = 0.0, 0
    stops: dict[Firing, float] = {}
    paused: set[Firing] = set()
    while True:
        starts = scheduler.step()
        for g in scheduler.pauses:
            assert graph.at(g.stage).kind == "generate" and g in {f for *_, f in running}
            stops.setdefault(g, now + chance.choice((0.0, chance.random())))
        entering = {r for f in starts if graph.at(f.stage).enters != "in_order" for r in graph.ranks(f)}
        for f in starts:
            stage, ranks = graph.at(f.stage), graph.ranks(f)
            if f in paused:  # only what interrupted it may have gone before
                paused.discard(f)
                count -= 1
                for rank in ranks:
                    assert order[rank].pop() == f
            assert stage.enters != "in_order" or not entering & set(ranks)
            needs = graph.needs(f._replace(place=ANY_PLACE) if stage.spread == "first" else f)
            assert log.issuperset(needs), (f, set(needs) - log)
            assert not busy & set(ranks), f
            busy |= set(ranks)
            if stage.enters == "in_order":
                for rank in ranks:
                    order[rank].append(f)
            count += 1
            heapq.heappush(running, (now + chance.choice((0.0, 1.0, chance.random(), 9 * chance.random())), count, f))
        if not running:
            break
        now = min(running[0][0], min(stops.values(), default=float("inf")))
        while running and running[0][0] == now:  # all that ends at one instant, before anyone decides
            f = heapq.heappop(running)[2]
            stops.pop(f, None)
            busy -= set(graph.ranks(f))
            log.add(scheduler.done(f))
        for f in [f for f, instant in stops.items() if instant <= now]:
            del stops[f]
            running = [entry for entry in running if entry[2] != f]
            heapq.heapify(running)
            busy -= set(graph.ranks(f))
            scheduler.paused(f)
            paused.add(f)
    assert scheduler.left == 0, scheduler.stuck()
    assert log == {
        Firing(i, s.name, c, p)
        for i in range(iterations)
        for s in graph.stages()
        for c in range(s.firings)
        for p in s.all_places(c)
    }
    assert count == len(log)
    return order


TURNS = ({}, {}, {"spread": "robin"}, {"spread": "first"}, {"enters": "when_ready"}, {"enters": "interrupts"})


@st.composite
def graphs(draw: st.DrawFn) -> StageGraph:
    """Any stages on any of 6 ranks, with barriers, streams, capacities, lags, turns or none; many cannot finish."""
    graph, names = StageGraph(lanes=4), []
    for k in range(draw(st.integers(2, 6))):
        ranks = draw(st.permutations(range(6)))[: draw(st.sampled_from((1, 2, 4)))]
        size = draw(st.sampled_from((None, 1)))
        after = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        names.append(
            graph.stage(
                f"s{k}",
                draw(st.sampled_from(("score", "generate"))),
                "m",
                ranks,
                size=size,
                chunks=draw(st.integers(1, 4)),
                epochs=draw(st.sampled_from((1, 1, 2))),
                **draw(st.sampled_from(TURNS)),
            )
        )
        for u in after:
            stream = draw(st.booleans())
            graph.link(u, names[-1], stream=stream, capacity=draw(st.sampled_from((None, 1, 2))) if stream else None)
    for _ in range(draw(st.integers(0, 2))):
        u, v = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        if not graph.has_edge(u, v):
            graph.link(u, v, lag=draw(st.integers(1, 2)))
    return graph


def passes(graph: StageGraph) -> bool:
    try:
        check(graph)
    except ValueError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(graphs(), st.integers(0, 2**16))
def test_what_passes_check_never_gets_stuck(graph: StageGraph, seed: int) -> None:
    assume(passes(graph))
    orders = [drive(graph, 4, seed + k) for k in range(3)]
    if all(s.spread != "first" for s in graph.stages()):  # a static order depends on no duration
        assert orders[0] == orders[1] == orders[2]


@settings(max_examples=80, deadline=None)
@given(strategy_graphs(), st.integers(0, 2**16))
def test_strategies(graph: StageGraph, seed: int) -> None:
    orders = [drive(graph, 3, seed + k) for k in range(2)]
    if all(s.spread != "first" for s in graph.stages()):
        assert orders[0] == orders[1]


def free_pipeline(capacity: int, chunks: int, spread: str = "each", stages: int = 2) -> StageGraph:
    """Stages on their own ranks, each streaming to the next, that nothing but back-pressure holds back."""
    graph = StageGraph()
    for k in range(stages):
        size = 2 if spread != "each" and k == 0 else 1
        graph.stage(
            f"s{k}",
            "score",
            "m",
            range(2 * k, 2 * k + size),
            size=1,
            chunks=chunks,
            spread=spread if k == 0 else "each",
        )  # type: ignore[arg-type]
        if k:
            graph.link(f"s{k - 1}", f"s{k}", stream=True, capacity=capacity)
    return check(graph)


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("capacity", [1, 2, 7])
@pytest.mark.parametrize("spread", ["each", "robin", "first"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_back_pressure_across_iterations(capacity: int, chunks: int, spread: str, stages: int) -> None:
    """The last stage never ends its first firing: the first one makes what fits in hands and channels, then stops.

    The last stage has come for one chunk and holds it. Every channel holds its capacity, and every stage before the
    last has one more made that it cannot hand over (one on each place; a channel takes `capacity` from each maker).
    """
    graph = free_pipeline(capacity, chunks, spread, stages)
    scheduler, made = Scheduler(graph, 60), 0
    running = scheduler.step()
    while running:
        f = running.pop(0)
        if f.stage != f"s{stages - 1}":
            made += f.stage == "s0"
            scheduler.done(f)
            running += scheduler.step()
    makers = 1 if spread == "each" else 2
    assert made == 1 + makers * (capacity + 1) + (stages - 2) * (capacity + 1)


def test_all_ranks_of_a_place_or_none() -> None:
    """A firing takes its ranks at once: with one of them busy it holds none, and others may not overtake on a rank."""
    graph = StageGraph()
    graph.stage("short", "score", "m", (0,))
    graph.stage("long", "score", "m", (1,))
    graph.stage("both", "score", "m", (0, 1))
    graph.stage("after", "score", "m", (0,))
    scheduler = Scheduler(graph, 1)
    short, long = sorted(scheduler.step(), reverse=True)
    assert (short.stage, long.stage) == ("short", "long")
    scheduler.done(short)
    assert scheduler.step() == []
    scheduler.done(long)
    assert [f.stage for f in scheduler.step()] == ["both"]


def test_first_numbers_results_as_they_complete() -> None:
    graph = StageGraph()
    graph.stage("gen", "generate", "m", range(2), size=1, chunks=3, spread="first")
    graph.stage("ref", "score", "m", (2,), chunks=3)
    graph.link("gen", "ref", stream=True)
    scheduler = Scheduler(check(graph), 1)
    assert scheduler.step() == [Firing(0, "gen", 0, 0), Firing(0, "gen", 1, 1)]
    assert scheduler.done(Firing(0, "gen", 1, 1)) == Firing(0, "gen", 0, ANY_PLACE)
    assert sorted(scheduler.step()) == [Firing(0, "gen", 2, 1), Firing(0, "ref", 0, 0)]


def test_what_has_its_place_goes_before_what_takes_any() -> None:
    graph = StageGraph()
    graph.stage("any", "generate", "m", (0, 1), size=1, chunks=1, spread="first")
    graph.stage("fixed", "score", "m", (0,))
    assert Scheduler(check(graph), 1).step() == [Firing(0, "fixed", 0, 0), Firing(0, "any", 0, 1)]


def test_stuck_says_who_waits_for_whom() -> None:
    graph = StageGraph()
    graph.stage("a", "score", "m", (0,), chunks=4)
    graph.stage("b", "score", "m", (1,), after=["a"])
    graph.stage("c", "score", "m", (2,), after=["b"])
    scheduler = Scheduler(graph, 1)
    assert scheduler.step() == [Firing(0, "a", 0, 0)]
    assert scheduler.stuck() == "b[0] waits for a[3]; c[0] waits for b[0]"


def test_check_names_the_circle_that_capacity_makes() -> None:
    """w begins when all four chunks of u are done: one in w's hands, one in u's, the others must fit the channel."""

    def graph(capacity: int) -> StageGraph:
        graph = StageGraph()
        graph.stage("u", "score", "m", (0,), chunks=4)
        graph.stage("v", "score", "m", (1,))
        graph.stage("w", "score", "m", (2,), after=["v"], chunks=4)
        graph.link("u", "w", stream=True, capacity=capacity)
        graph.link("u", "v")
        return graph

    check(graph(2))
    with pytest.raises(ValueError, match=r"needs itself: .*u\[3\]"):
        check(graph(1))


def test_lag_of_a_stage_that_whoever_is_free_runs() -> None:
    graph = StageGraph()
    graph.stage("gen", "generate", "m", (0, 1), size=1, chunks=2, spread="first")
    graph.stage("ref", "score", "m", (2,), after=["gen"])
    graph.link("ref", "gen", lag=2)
    assert drive(check(graph), 4, 0)
    scheduler = Scheduler(graph, 4)
    started = 0
    while starts := [f for f in scheduler.step() if f.stage == "gen"]:  # the score never ends
        started += len(starts)
        for f in starts:
            scheduler.done(f)
    assert started == 4  # two iterations of two chunks


# ---------------------------------------------------------------- stages that enter when they are ready


def never_ending(enters: str, lag: int = 2) -> StageGraph:
    """Generation and training on their own ranks; new weights enter as `enters` says."""
    graph = StageGraph()
    graph.stage("gen", "generate", "shadow_actor", (0,), chunks=2)
    graph.stage("update_actor", "train", "actor", (1,), after=["gen"])
    graph.stage("update_weights", "sync", "actor", (0, 1), target="shadow_actor", enters=enters, after=["update_actor"])
    graph.link("update_weights", "gen", lag=lag)
    return check(graph)


def test_weights_enter_between_two_firings_and_nothing_overtakes_them() -> None:
    scheduler = Scheduler(never_ending("when_ready"), 4)
    gen, train, sync = (
        lambda i, c, name=name: Firing(i, name, c, 0) for name in ("gen", "update_actor", "update_weights")
    )
    for firing in (gen(0, 0), gen(0, 1)):
        assert scheduler.step() == [firing]
        scheduler.done(firing)
    assert scheduler.step() == [train(0, 0), gen(1, 0)]
    scheduler.done(train(0, 0))
    assert scheduler.step() == [] and scheduler.pauses == []  # it waits for the end of the running firing
    scheduler.done(gen(1, 0))
    assert scheduler.step() == [sync(0, 0)]  # before the second chunk, which was ready too
    scheduler.done(sync(0, 0))
    assert scheduler.step() == [gen(1, 1)]


def test_weights_interrupt_and_the_firing_goes_on() -> None:
    scheduler = Scheduler(never_ending("interrupts"), 4)
    for _ in range(2):
        (firing,) = scheduler.step()
        scheduler.done(firing)
    train, gen = scheduler.step()
    scheduler.done(train)
    assert scheduler.step() == [] and scheduler.pauses == [gen]
    assert scheduler.step() == [] and scheduler.pauses == [gen]  # asked again it says the same
    scheduler.paused(gen)
    (sync,) = scheduler.step()
    assert (sync.stage, scheduler.pauses) == ("update_weights", [])
    scheduler.done(sync)
    assert scheduler.step() == [gen]
    assert scheduler.done(gen) == gen
    assert scheduler.step() == [gen._replace(chunk=1)]


def test_an_end_before_the_stop_is_an_end() -> None:
    scheduler = Scheduler(never_ending("interrupts"), 4)
    for _ in range(2):
        scheduler.done(scheduler.step()[0])
    train, gen = scheduler.step()
    scheduler.done(train)
    assert scheduler.step() == [] and scheduler.pauses == [gen]
    scheduler.done(gen)
    assert [f.stage for f in scheduler.step()] == ["update_weights"]


def test_training_is_not_interrupted() -> None:
    graph = StageGraph()
    graph.stage("work", "train", "m", (0,))
    graph.stage("ready", "score", "m", (1,))
    graph.stage("enter", "sync", "m", (0, 1), target="m", enters="interrupts", after=["ready"])
    scheduler = Scheduler(check(graph), 1)
    ready, work = scheduler.step()
    assert (ready.stage, work.stage) == ("ready", "work")
    scheduler.done(ready)
    assert scheduler.step() == [] and scheduler.pauses == []
    scheduler.done(work)
    assert [f.stage for f in scheduler.step()] == ["enter"]
