"""StageGraph: what a firing needs, what moves, in which order; and that impossible graphs are refused."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import networkx as nx
import pytest
from conftest import devices, strategy_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.algorithms import ppo
from rlhfsim.batch import even, kept_together, per_replica, samples_of
from rlhfsim.graph import ANY_PLACE, Firing, Stage, StageGraph
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved


def firings(graph: StageGraph, iteration: int = 0) -> list[Firing]:
    return [Firing(iteration, s.name, c, p) for s in graph.stages() for c in range(s.firings) for p in s.all_places(c)]


def pair(u: dict[str, object], v: dict[str, object], lanes: int = 4, **edge: object) -> StageGraph:
    """u on ranks 0-3, v on ranks 4-7."""
    graph = StageGraph(lanes=lanes)
    graph.stage("u", "score", "m", range(4), **u)  # type: ignore[arg-type]
    graph.stage("v", "score", "m", range(4, 8), **v)  # type: ignore[arg-type]
    graph.link("u", "v", **edge)  # type: ignore[arg-type]
    return graph


def needs(graph: StageGraph, chunk: int = 0, place: int = 0, iteration: int = 0) -> set[tuple[int, int, int]]:
    """(iteration, chunk, place) of u that v needs."""
    return {
        (n.iteration, n.chunk, n.place) for n in graph.needs(Firing(iteration, "v", chunk, place)) if n.stage == "u"
    }


# ---------------------------------------------------------------- needs


def test_a_barrier_waits_for_the_last_chunk_of_every_place() -> None:
    graph = pair({"size": 1, "chunks": 3, "epochs": 2}, {"chunks": 2})
    assert needs(graph, 0) == needs(graph, 1) == {(0, 5, p) for p in range(4)}


def test_a_barrier_waits_for_every_firing_where_places_take_turns() -> None:
    # Chunk 4 on place 0 does not say that chunk 3 on place 1 is done, but place 0's chunk 4 implies its chunk 0.
    graph = pair({"size": 2, "chunks": 5, "spread": "robin"}, {})
    assert needs(graph) == {(0, 4, 0), (0, 3, 1)}


@pytest.mark.parametrize(
    "u_chunks, v_chunks, expected",
    [
        (4, 4, [{0}, {1}, {2}, {3}]),
        (4, 2, [{1}, {3}]),  # chunks 0 and 2 are implied: a place fires in order
        (2, 4, [{0}, {0}, {1}, {1}]),
        (3, 2, [{1}, {2}]),  # chunk 0 of 2 overlaps two thirds
        (2, 3, [{0}, {1}, {1}]),
    ],
)
def test_streams_overlap_chunks(u_chunks: int, v_chunks: int, expected: list[set[int]]) -> None:
    graph = pair({"chunks": u_chunks}, {"chunks": v_chunks}, stream=True)
    assert [{c for _, c, _ in needs(graph, k)} for k in range(v_chunks)] == expected


def test_streams_overlap_lanes() -> None:
    graph = pair({"size": 1}, {"size": 2}, stream=True)
    assert [needs(graph, place=p) for p in (0, 1)] == [{(0, 0, 0), (0, 0, 1)}, {(0, 0, 2), (0, 0, 3)}]
    graph = pair({"size": 2}, {"size": 1}, stream=True)
    assert [needs(graph, place=p) for p in range(4)] == [{(0, 0, p // 2)} for p in range(4)]
    graph = pair({"size": 1}, {"size": 4, "serves": range(1, 3)}, stream=True)
    assert needs(graph) == {(0, 0, 1), (0, 0, 2)}


def test_later_epochs_use_the_same_chunks() -> None:
    graph = pair({"chunks": 2}, {"chunks": 2, "epochs": 3}, stream=True)
    assert [needs(graph, k) for k in range(6)] == 3 * [{(0, 0, 0)}, {(0, 1, 0)}]


def test_the_last_of_several_epochs_is_used() -> None:
    graph = pair({"chunks": 2, "epochs": 3}, {"chunks": 2}, stream=True, carries=("x",))
    assert [needs(graph, k) for k in range(2)] == [{(0, 4, 0)}, {(0, 5, 0)}]
    same(graph)


def test_lag() -> None:
    graph = pair({"chunks": 2}, {}, lag=2)
    assert needs(graph, iteration=1) == set()
    assert needs(graph, iteration=2) == {(0, 1, 0)}
    assert needs(graph, iteration=7) == {(5, 1, 0)}


# ---------------------------------------------------------------- messages


def same(graph: StageGraph) -> int:
    """That what leaves is what is expected, over two iterations; the number of messages.

    A message is a lane of a producer's firing on its way to a consumer's place. Later epochs and chunks read what lies
    there, so that a consumer may expect one message several times; nothing may leave twice.
    """
    sent: Counter[tuple[object, ...]] = Counter()
    expected: set[tuple[object, ...]] = set()
    for iteration in (0, 1):
        for f in firings(graph, iteration):
            for place in range(graph.at(f.stage).places) if f.place == ANY_PLACE else (f.place,):
                for m in graph.sends(f, place):
                    lag = graph.edges[f.stage, m.consumer]["lag"]
                    if place == max(f.place, 0) and iteration + lag < 2:
                        sent[m.producer, m.consumer, m.place, m.lane, m.fields] += 1
                    producer, consumer = graph.at(f.stage), graph.at(m.consumer)
                    assert m.source in producer.ranks_of(place)
                    assert m.destination in consumer.ranks_of(m.place)
                    assert m.lane in producer.lanes_of(place)
                    assert m.lane in consumer.lanes_of(m.place)
            expected |= {(g, f.stage, f.place, lane, fields) for g, lane, fields in graph.receives(f)}
    assert set(sent) == expected
    assert not sent or max(sent.values()) == 1
    return len(sent)


@settings(max_examples=150, deadline=None)
@given(strategy_graphs())
def test_what_is_sent_is_received(graph: StageGraph) -> None:
    same(graph)


def test_some_strategies_send() -> None:
    algorithm = ppo.build(minibatches=2)
    where = Devices(tuple(range(8)), 8)
    # 4 batches: tokens to ref, values, reward; two scores to reward; rewards to both trainers, each one lane.
    assert same(disaggregated.build(algorithm, where, batches=4)) == 2 * 4 * (3 + 2 + 2)
    assert same(colocated.build(algorithm, where)) == 0


def test_a_barrier_receives_every_chunk() -> None:
    graph = pair({"chunks": 3, "size": 2}, {"chunks": 2}, carries=("x",))
    assert needs(graph) == {(0, 2, 0), (0, 2, 1)}
    assert same(graph) == 2 * 3 * 4


stages = st.fixed_dictionaries(
    {
        "size": st.sampled_from((1, 2, 4)),
        "chunks": st.integers(1, 4),
        "epochs": st.integers(1, 3),
        "spread": st.sampled_from(("each", "robin")),
        "serves": st.sampled_from((range(8), range(4), range(2, 6))),
    }
)


@settings(max_examples=200, deadline=None)
@given(stages | stages.map(lambda s: {**s, "spread": "first"}), stages, st.booleans(), st.integers(0, 1))
def test_any_edge_sends_what_is_received(u: dict[str, object], v: dict[str, object], stream: bool, lag: int) -> None:
    same(pair(u, v, lanes=8, stream=stream, lag=lag, carries=("x",)))


# ---------------------------------------------------------------- samples


@settings(max_examples=100, deadline=None)
@given(strategy_graphs(), st.integers(1, 40))
def test_samples_are_handled_once_and_made_before(graph: StageGraph, samples: int) -> None:
    """Every epoch of a stage (all turns together) handles each sample once; what it reads, its needs have made."""
    handled: dict[tuple[str, int], list[int]] = defaultdict(list)
    for f in firings(graph):
        stage, ids = graph.at(f.stage), samples_of(graph, f, samples).tolist()
        handled[f.stage.partition(".")[0] if stage.kind == "score" else f.stage, f.chunk // stage.chunks] += ids
        if f.stage in ("gen", "update_weights"):
            continue
        before = reachable(graph, f)
        for u, _, edge in graph.in_edges(f.stage, data=True):
            if not edge["lag"]:
                made, ever = (
                    {i for g in some if g.stage == u for i in samples_of(graph, g, samples).tolist()}
                    for some in (before, firings(graph))
                )
                assert set(ids) & ever <= made, (f, u)
    for (stage, _), ids in handled.items():
        if not stage.startswith("ids"):
            assert sorted(ids) == list(range(samples)), stage


def reachable(graph: StageGraph, f: Firing) -> set[Firing]:
    """Every firing that is done before f starts: its needs, theirs, and what its places ran before."""
    found, todo = set(), [f]
    while todo:
        g = todo.pop()
        before = list(graph.needs(g))
        makers = graph.at(g.stage).makers
        if g.chunk >= makers:
            before.append(g._replace(chunk=g.chunk - makers))
        todo += [n for n in before if n not in found]
        found |= set(before)
    return found


def test_shares() -> None:
    graph = colocated.build(ppo.build(minibatches=3), Devices(tuple(range(4)), 4, {"gen": 1}), calls=2)
    assert [samples_of(graph, Firing(0, "gen", c, 1), 24).tolist() for c in (0, 1)] == [[2, 6, 10], [14, 18, 22]]
    assert samples_of(graph, Firing(0, "update_actor", 1, 0), 24).tolist() == [8, 12, 10, 14, 9, 13, 11, 15]
    shares = per_replica(samples_of(graph, Firing(0, "ref", 0, 0), 24), 4)  # a call takes the first half of each lane
    assert [ids.tolist() for ids in shares] == [[0, 4, 8], [2, 6, 10], [1, 5, 9], [3, 7, 11]]
    assert even(graph, 24)
    assert not even(graph, 12)  # 3 samples a rank do not divide into 2 calls
    assert [samples_of(graph, Firing(0, "gen", c, 1), 48, together=2).tolist() for c in (0, 1)] == [
        [4, 5, 12, 13, 20, 21],
        [28, 29, 36, 37, 44, 45],
    ]
    assert kept_together(graph, 48, 2) == 2
    assert kept_together(graph, 24, 2) == 1  # six samples of a rank do not divide into 2 calls of whole prompts


@given(st.integers(1, 6), st.integers(1, 64), st.integers(0, 3))
def test_samples_that_do_not_divide_spread_evenly_over_places(log_places: int, samples: int, per_place: int) -> None:
    """With 2^n lanes, places of 2^m lanes get the same number of samples, or one more."""
    places = 2**log_places
    graph = StageGraph(lanes=places * 2**per_place)
    graph.stage("s", "score", "m", range(graph.lanes), size=2**per_place)
    counts = [len(samples_of(graph, Firing(0, "s", 0, place), samples)) for place in range(places)]
    assert sum(counts) == samples and max(counts) - min(counts) <= 1


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[StageGraph], int, int, int]:
    """Graphs of different strategies, ranks and lanes with the same mini-batches; samples, how many stay together."""
    minibatches = draw(st.integers(1, 5))
    algorithm = ppo.build(minibatches=minibatches, epochs=draw(st.integers(1, 2)))
    counts = draw(st.lists(st.integers(2, 12), min_size=2, max_size=4))
    graphs = [colocated.build(algorithm, Devices(tuple(range(n)), 4), calls=draw(st.integers(1, 3))) for n in counts]
    pair = Devices(tuple(range(draw(st.integers(2, 8)))), 4)
    graphs += [
        interleaved.build(algorithm, pair, concat=draw(st.booleans())),
        disaggregated.build(algorithm, Devices(tuple(range(8)), 8), batches=draw(st.integers(1, 6))),
    ]
    return graphs, minibatches, draw(st.integers(minibatches, 60)), draw(st.integers(1, 4))


@settings(max_examples=100, deadline=None)
@given(batches())
def test_a_mini_batch_holds_the_same_samples_in_every_placement(
    given: tuple[list[StageGraph], int, int, int],
) -> None:
    """Whatever the lanes, ranks and chunks, and whether they divide the samples; also as the replicas share them."""
    graphs, minibatches, samples, together = given
    for graph in graphs:
        for update in ("update_actor", "update_critic"):
            stage = graph.at(update)
            for chunk in range(stage.firings):
                ids = samples_of(graph, Firing(0, update, chunk, 0), samples, together=together)
                j = chunk % minibatches
                wanted = list(range(j * samples // minibatches, (j + 1) * samples // minibatches))
                assert sorted(ids.tolist()) == wanted
                shares = per_replica(ids, stage.size)
                assert sorted(i for share in shares for i in share.tolist()) == wanted


@settings(max_examples=100, deadline=None)
@given(strategy_graphs(), st.integers(1, 4), st.integers(1, 3))
def test_lanes_keep_their_samples_and_prompts(graph: StageGraph, prompts: int, responses: int) -> None:
    """In all stages and chunks a sample is in the same lane, and so are all responses to its prompt."""
    samples = prompts * responses * graph.lanes * math.lcm(*(s.chunks for s in graph.stages()))
    together = kept_together(graph, samples, responses)
    assert together == responses
    lane_of: dict[int, set[int]] = defaultdict(set)
    for f in firings(graph):
        stage = graph.at(f.stage)
        lanes, per_lane = stage.lanes_of(f.place), samples // graph.lanes // stage.chunks
        for lane in lanes:
            ids = samples_of(graph, f, samples, together=together, lanes=range(lane, lane + 1)).tolist()
            assert len(ids) == per_lane
            for i in ids:
                lane_of[i // responses].add(lane)
        whole = samples_of(graph, f, samples, together=together).tolist()
        assert len(whole) == len(set(whole)) == per_lane * len(lanes)
    assert all(len(lanes) == 1 for lanes in lane_of.values())
    assert sorted(lane_of) == list(range(samples // responses))


# ---------------------------------------------------------------- order


@settings(max_examples=100, deadline=None)
@given(strategy_graphs())
def test_the_program_is_complete_and_keeps_order(graph: StageGraph) -> None:
    program = graph.program()
    assert sorted(program) == sorted(f for f in firings(graph) if f.place != ANY_PLACE)
    position = {f: k for k, f in enumerate(program)}
    for f in program:
        assert all(position[n] < position[f] for n in graph.needs(f) if n in position)
    for stage in graph.stages():
        for place in range(stage.places):
            chunks = [f.chunk for f in program if (f.stage, f.place) == (stage.name, place)]
            assert chunks == sorted(chunks)


def test_colocated_program() -> None:
    """The order of the published code: call by call, then mini-batch by mini-batch, actor and critic in turn."""
    graph = colocated.build(ppo.build(epochs=2, minibatches=2), Devices((0, 1), 2), calls=2)
    names = [f.stage for f in graph.program()]
    assert names == 2 * ["gen", "old_log_prob", "ref", "reward", "values"] + 4 * ["update_critic", "update_actor"]
    shared = colocated.build(ppo.build(share_actor_critic=True), Devices((0, 1), 2, own_engine=True))
    assert [f.stage for f in shared.program()] == [
        "gen",
        "ref",
        "reward",
        "old_log_prob",
        "update_actor",
        "update_weights",
    ]


def test_a_loop_of_unequal_pieces_alternates_in_proportion() -> None:
    graph = StageGraph()
    graph.stage("fine", "score", "m", (0,), chunks=4)
    graph.stage("coarse", "train", "m", (0,), chunks=2, epochs=2, loop="fine")
    names = "".join(f.stage[0] + str(f.chunk) for f in graph.program())
    assert names == "f0f1c0f2f3c1c2c3"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "more, said",
    [
        ({"ranks": ()}, "no ranks"),
        ({"ranks": (0, 1, 0)}, "named twice"),
        ({"ranks": range(6), "size": 4}, "6 ranks do not divide into places of 4"),
        ({"ranks": range(6), "size": 0}, "places of 0"),
        ({"ranks": range(6), "size": 2}, "4 lanes do not spread over 3 places"),
        ({"ranks": range(4), "chunks": 0}, "0 chunks"),
        ({"ranks": range(4), "epochs": 0}, "0 epochs"),
    ],
)
def test_impossible_stages(more: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"stage s: .*{said}"):
        StageGraph(lanes=4).stage("s", "score", "m", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("edge, said", [({"lag": -1}, "lag -1"), ({"capacity": 0}, "capacity 0")])
def test_impossible_edges(edge: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pair({}, {}, **edge)
    with pytest.raises(ValueError, match="no stage 'w'"):
        pair({}, {}).link("u", "w")
    with pytest.raises(ValueError, match="no stage 'w'"):
        StageGraph().stage("v", "score", "m", (0,), after=["w"])
    with pytest.raises(ValueError, match="'first'"):
        pair({}, {"spread": "first"}, carries=("x",))


def test_a_circle_is_refused() -> None:
    graph = pair({}, {})
    graph.link("v", "u")
    with pytest.raises(ValueError, match=r"needs itself: (u\[0\] -> v\[0\]|v\[0\] -> u\[0\])"):
        graph.program()


def test_what_was_remembered_goes_when_the_graph_changes() -> None:
    graph = pair({}, {}, stream=True)
    assert len(graph.program()) == 2
    graph.stage("w", "score", "m", (8,), after=["v"])
    assert [f.stage for f in graph.program()] == ["u", "v", "w"]
    assert [n.stage for n in graph.needs(Firing(0, "w", 0, 0))] == ["v"]
    graph.link("u", "w")
    assert [n.stage for n in graph.needs(Firing(0, "w", 0, 0))] == ["v", "u"]
    assert len(graph.program()) == 3
    graph.stage("x", "score", "m", (9,))
    assert len(graph.program()) == 4


def test_many_batches() -> None:
    """Back-pressure reaches from each batch to all before; that must not exhaust Python's stack."""
    graph = disaggregated.build(ppo.build(minibatches=4), Devices(tuple(range(8)), 8), batches=1024)
    assert len(graph.program()) == 1024 * 4 + 2 * 4 + 2
    assert nx.is_directed_acyclic_graph(graph.edge_subgraph(e for e in graph.edges if not graph.edges[e]["lag"]))


@given(devices(), st.integers(0, 7))
def test_home_is_the_rank_of_a_lane(where: Devices, lane: int) -> None:
    """With one lane a rank, lane k lives on rank k, whatever the places."""
    for stage in colocated.build(ppo.build(), where).stages():
        assert owner_of(stage, lane) == [lane]


def owner_of(stage: Stage, lane: int) -> list[int]:
    return [stage.home(lane, p) for p in stage.places_for(range(lane, lane + 1), 0)]
