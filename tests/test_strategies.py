"""Strategies against closed forms (zero communication) and against the paper's processes written out in SimPy."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import simpy
from conftest import SCORES, by_stage, devices, per_sample, simulate, strategy_graphs
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.algorithms import ppo
from rlhfsim.graph import Firing, StageGraph
from rlhfsim.schedule import check
from rlhfsim.strategies import Devices, colocated, disaggregated, divide, interleaved

EIGHT = Devices(tuple(range(8)), 8)
ALONE = Devices(tuple(range(8)), 8, dict.fromkeys(SCORES, 1))  # ZeRO below 3: every rank scores for itself
SECONDS = {
    "gen": 8.0,
    "old_log_prob": 1.0,
    "ref": 2.0,
    "reward": 3.0,
    "values": 1.5,
    "update_actor": 4.0,
    "update_critic": 5.0,
    "update_weights": 0.5,
}
fixed = by_stage(SECONDS)


def end(graph: StageGraph, seconds: dict[str, float], iterations: int = 1) -> float:
    return simulate(graph, by_stage(seconds), iterations).end_seconds


# ---------------------------------------------------------------- co-located


@settings(max_examples=40, deadline=None)
@given(devices(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_colocated_is_a_sum(where: Devices, calls: int, epochs: int, minibatches: int, iterations: int) -> None:
    graph = colocated.build(ppo.build(epochs=epochs, minibatches=minibatches), where, calls=calls)
    once = calls * sum(SECONDS[s] for s in ("gen", *SCORES)) + epochs * minibatches * (4.0 + 5.0)
    refresh = 0.5 if where.own_engine else 0.0
    assert end(graph, SECONDS, iterations) == pytest.approx(iterations * (once + refresh))


def test_colocated_with_a_value_head() -> None:
    graph = colocated.build(ppo.build(share_actor_critic=True), EIGHT)
    assert {s.name for s in graph.stages()} == {"gen", "ref", "reward", "old_log_prob", "update_actor"}
    assert end(graph, SECONDS) == 8 + 2 + 3 + 1 + 4


# ---------------------------------------------------------------- interleaving

scores = st.floats(0.1, 10).map(lambda x: round(x, 3))


@settings(max_examples=60, deadline=None)
@given(scores, scores, st.sampled_from((EIGHT, ALONE)), st.booleans(), st.integers(1, 3))
def test_interleaved_halves(t_ref: float, t_reward: float, where: Devices, concat: bool, calls: int) -> None:
    """Two turns each. async: the slower half counts; sync: the second reward turn waits for the reference owners.

    With `concat` an owner runs one pass over both lanes: the same seconds in async, and sync waits with all of it.
    """
    seconds = {"gen": 4.0, "old_log_prob": 1.0, "values": 2.0, "ref": t_ref, "reward": t_reward}
    for mode, path in (
        ("async", max(2 * t_ref, 2 * t_reward)),
        ("sync", 2 * t_ref + 2 * t_reward if concat else max(2 * t_ref, t_reward) + t_reward),
    ):
        graph = check(interleaved.build(ppo.build(), where, mode=mode, concat=concat, calls=calls))
        assert simulate(graph, per_sample(graph, seconds, 48)).end_seconds == pytest.approx(7.0 + path)


@settings(max_examples=60, deadline=None)
@given(scores, scores, st.integers(1, 15), st.booleans(), st.sampled_from(("sync", "async")))
def test_interleaving_is_never_faster_than_colocated(
    t_ref: float, t_reward: float, owners: int, concat: bool, mode: str
) -> None:
    """Linear costs: an owner fraction a does 1/a the work, and max(t_ref/a, t_reward/(1-a)) >= t_ref + t_reward."""
    seconds, where = {"ref": t_ref, "reward": t_reward}, Devices(tuple(range(16)), 8)
    graph = check(interleaved.build(ppo.build(), where, ratio=owners / 16, concat=concat, mode=mode))
    took = simulate(graph, per_sample(graph, seconds, 960)).end_seconds
    slower = max(t_ref * 16 / owners, t_reward * 16 / (16 - owners))
    assert took >= t_ref + t_reward - 1e-9
    if mode == "async":
        assert took == pytest.approx(slower, rel=1e-2)  # 960 samples do not divide by every number of owners
    else:
        assert took >= slower * 0.99


@pytest.mark.parametrize("t_ref, t_reward", [(1, 1), (1, 3), (3, 1), (3, 5), (7, 1)])
@pytest.mark.parametrize("where", [EIGHT, ALONE])
def test_the_best_ratio_only_equals_colocated(t_ref: int, t_reward: int, where: Devices) -> None:
    """At a = t_ref / (t_ref + t_reward). Ranks that score alone lose where lanes do not spread evenly over them."""
    seconds, samples = {"ref": float(t_ref), "reward": float(t_reward)}, 8 * 105
    graph = check(interleaved.build(ppo.build(), where, ratio=t_ref / (t_ref + t_reward), concat=where is ALONE))
    owners = graph.at("ref" if where is ALONE else "ref.0").ranks
    assert len(owners) == 8 * t_ref // (t_ref + t_reward)
    flat = colocated.build(ppo.build(), where)
    together = simulate(flat, per_sample(flat, seconds, samples)).end_seconds
    assert together == pytest.approx(t_ref + t_reward)
    assert simulate(graph, per_sample(graph, seconds, samples)).end_seconds == pytest.approx(together)


@pytest.mark.parametrize(
    "ref, reward, turns",
    [
        (6, 2, {"ref": [6, 2], "reward": [2, 2, 2, 2]}),
        (5, 3, {"ref": [5, 3], "reward": [3, 3, 2]}),
        (2, 3, {"ref": [2, 2, 2, 2], "reward": [3, 2, 3]}),
    ],
)
def test_owners_take_turns(ref: int, reward: int, turns: dict[str, list[int]]) -> None:
    """Own lanes first, then as many others at a time as there are owners; a last turn occupies only some of them."""
    owners = {"reference": list(range(ref)), "reward": list(range(ref, ref + reward))}
    graph = check(interleaved.build(ppo.build(), ALONE, owners=owners))
    for step, sizes in turns.items():
        own = [s for s in graph.stages() if s.name.startswith(f"{step}.")]
        assert [len(s.serves) for s in own] == [len(s.ranks) for s in own] == sizes
        assert sorted(lane for s in own for lane in s.serves) == list(range(8))
    seconds = {"ref": 1.0, "reward": 1.0}  # of a turn
    assert end(graph, seconds) == max(map(len, turns.values()))


def test_a_last_turn_uses_every_place_that_it_can() -> None:
    """8 owners in 4 replicas of two, and 5 lanes left: one for each replica, then one more, not five on one."""
    where = Devices(tuple(range(14)), 8, {"ref": 2, "reward": 1})
    owners = {"reference": list(range(8)), "reward": [12]}
    graph = check(interleaved.build(ppo.build(), where, owners=owners))
    assert [(len(s.serves), s.places) for s in graph.stages() if s.name.startswith("ref.")] == [(8, 4), (4, 4), (2, 2)]


def test_sync_mode_waits_for_the_rank_whose_tokens_are_needed() -> None:
    """Ranks 0-1 own the reference, 2-3 the reward model, 4-7 neither: those ask as soon as they have log-probs."""
    graph = check(interleaved.build(ppo.build(), ALONE, mode="sync", owners={"reference": [0, 1], "reward": [2, 3]}))
    starts = {s.firing.stage: s.start_seconds for s in simulate(graph, by_stage({"ref": 10.0, "reward": 1.0})).spans}
    by_lanes = {s.serves: starts[s.name] for s in graph.stages() if s.name.startswith("reward.")}
    # In order of turns: own lanes, those of the reference owners (four turns of 10 s later), then the others.
    assert by_lanes == {range(2, 4): 0.0, range(0, 2): 40.0, range(4, 6): 41.0, range(6, 8): 42.0}


@pytest.mark.parametrize("concat", [False, True])
def test_sync_mode_with_uneven_owners(concat: bool) -> None:
    """Each lane's tokens come from its own rank, so that the last reference owner delays only its own lanes."""
    where = Devices(tuple(range(6)), 8, dict.fromkeys(SCORES, 1))
    graph = check(
        interleaved.build(
            ppo.build(), where, mode="sync", concat=concat, owners={"reference": [0, 1, 2, 3], "reward": [4, 5]}
        )
    )
    for asked in (s for s in graph.stages() if s.kind == "swap"):
        assert set(asked.ranks) <= {0, 1, 2, 3}
        for place in range(asked.places):
            for lane in asked.lanes_of(place):
                assert (
                    graph.at("old_log_prob").home(
                        lane, next(iter(graph.at("old_log_prob").places_for(range(lane, lane + 1), 0)))
                    )
                    == asked.ranks_of(place)[0]
                )


def test_critic_on_a_part() -> None:
    """The critic of 4 ranks scores in two turns and trains where it lies; both beside what others do."""
    owners = {"reference": [0, 1, 2, 3], "reward": [4, 5, 6, 7], "critic": [4, 5, 6, 7]}
    graph = check(interleaved.build(ppo.build(), EIGHT, owners=owners))
    assert graph.at("update_critic").ranks == (4, 5, 6, 7)
    assert [s.serves for s in graph.stages() if s.model == "critic" and s.kind == "score"] == [range(4, 8), range(4)]
    assert end(graph, {"ref": 5.0, "reward": 1.0, "values": 2.0}) == max(2 * 5, 2 * 1 + 2 * 2)
    assert end(graph, {"update_actor": 2.0, "update_critic": 3.0}) == 2 + 3  # both need ranks 4-7


def test_critic_on_scattered_ranks() -> None:
    """Ranks that are no range of lanes; named in any order, each still keeps its own lane where it serves it."""
    owners = {"reference": [0, 1, 2, 3], "reward": [4, 5, 6, 7], "critic": [7, 4, 6, 5]}
    graph = check(interleaved.build(ppo.build(), ALONE, owners=owners))
    assert [graph.at("values.0").home(lane, lane - 4) for lane in range(4, 8)] == [4, 5, 6, 7]
    check(interleaved.build(ppo.build(), ALONE, owners={**owners, "critic": [0, 3, 5, 6]}))


def test_owners_in_any_order_keep_their_lanes() -> None:
    owners = {"reference": [6, 1, 4, 3], "reward": [0, 7, 2, 5]}
    graph = check(interleaved.build(ppo.build(), EIGHT, owners=owners))
    moving = [m for m in graph.sends(Firing(0, "gen", 0, 0)) if m.consumer in ("ref.0", "reward.0")]
    assert len(moving) == 8
    assert all(m.source == m.destination for m in moving)


def test_interleaved_with_a_value_head() -> None:
    graph = check(interleaved.build(ppo.build(share_actor_critic=True), EIGHT, mode="async"))
    assert end(graph, SECONDS) == 8 + max(2 * 2, 2 * 3) + 1 + 4
    with pytest.raises(ValueError, match="owners names 'critic'"):
        interleaved.build(
            ppo.build(share_actor_critic=True), EIGHT, owners={"reference": [0], "reward": [1], "critic": [2]}
        )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"mode": "asynch"}, "mode is 'asynch'"),
        ({"ratio": 0.0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1"),
        ({"owners": {"reference": [0, 1], "reward": [1, 2]}}, r"share the ranks \[1\]"),
        ({"owners": {"reference": [0, 1]}}, "lacks reward"),
        ({"owners": {"reference": [0], "reward": [1], "gen": [2]}}, "owners names 'gen'"),
        ({"owners": {"reference": [0], "reward": [8]}}, r"owners.reward is \[8\]"),
        ({"owners": {"reference": [0, 0], "reward": [1]}}, r"owners.reference is \[0, 0\]"),
        ({"owners": {"reference": [], "reward": [1]}}, r"owners.reference is \[\]"),
        ({"calls": 0}, "0 chunks"),
    ],
)
def test_impossible_interleaving(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        interleaved.build(ppo.build(), EIGHT, **options)


def test_owners_are_whole_replicas() -> None:
    """A rank that would hold half a replica is named, not dropped; a ratio is rounded to whole replicas."""
    pairs = Devices(tuple(range(8)), 8, {"ref": 2, "reward": 2}, {"reference": 2, "reward": 2})
    with pytest.raises(ValueError, match=r"owners\.reference has 3 ranks"):
        interleaved.build(ppo.build(), pairs, owners={"reference": [0, 1, 2], "reward": [4, 5]})
    graph = check(interleaved.build(ppo.build(), pairs, ratio=0.4))
    assert {len(s.ranks) for s in graph.stages() if s.name in ("ref.0", "reward.0")} == {4}
    domain = Devices(tuple(range(8)), 8, {}, {"reference": 4, "reward": 4})  # ZeRO-3 over replicas of 4
    with pytest.raises(ValueError, match=r"owners\.reference has 2 ranks"):
        interleaved.build(ppo.build(), domain, owners={"reference": [0, 1], "reward": [4, 5, 6, 7]})


# ---------------------------------------------------------------- disaggregated

EDGES = [
    ("gen", "ref"),
    ("gen", "values"),
    ("gen", "reward"),
    ("ref", "reward"),
    ("values", "reward"),
    ("reward", "update_critic"),
    ("reward", "update_actor"),
]
Times = dict[tuple[int, str, int], float]
Process = Generator[simpy.Event, Any, None]
SYNCS = ("update_weights", "update_weights.critic")


class Channel:
    """Messages from one process to another. `posted[k]`: it lies there; `taken[k]`: the receiver has come for it."""

    def __init__(self, env: simpy.Environment, messages: int) -> None:
        self.posted = [env.event() for _ in range(messages)]
        self.taken = [env.event() for _ in range(messages)]

    def receive(self, k: int) -> simpy.Event:
        self.taken[k].succeed()
        return self.posted[k]


def written_out(
    batches: int,
    steps: int,
    epochs: int,
    replicas: int,
    capacity: int,
    seconds: Callable[[str, int, int], float],
    iterations: int,
) -> Times:
    """Start of every firing, from the processes as the paper describes them: no graph, no scheduler.

    A rank receives from its sources in their order, works, and before it sends batch k to all its consumers waits until
    each has come for batch k - capacity (times the senders that take turns). A trainer receives what one step needs, in
    the first epoch only. An iteration ends with the weights' way to the copies, for which generation and values wait.
    """
    env, starts = simpy.Environment(), Times()
    channels = {edge: Channel(env, batches * iterations) for edge in EDGES}
    weights = {(i, name): env.event() for i in range(iterations) for name in ("gen", "values")}
    before: dict[str, simpy.Event] = {}

    def stage(name: str, i: int, chunks: range, senders: int, previous: simpy.Event | None) -> Process:
        if previous is not None:
            yield previous
        if name in ("gen", "values") and i:
            yield weights[i - 1, name]
        for k in chunks:
            for edge in EDGES:
                if edge[1] == name:
                    yield channels[edge].receive(i * batches + k)
            starts[i, name, k] = env.now
            yield env.timeout(seconds(name, i, k))
            outs = [channels[edge] for edge in EDGES if edge[0] == name]
            if (full := i * batches + k - capacity * senders) >= 0:
                yield env.all_of([channel.taken[full] for channel in outs])
            for channel in outs:
                channel.posted[i * batches + k].succeed()

    def trainer(name: str, i: int, copy: str, previous: simpy.Event | None, reader: simpy.Event) -> Process:
        if previous is not None:
            yield previous
        for epoch in range(epochs):
            for step in range(steps):
                if epoch == 0:
                    for k in range(step * batches // steps, (step + 1) * batches // steps):
                        yield channels["reward", name].receive(i * batches + k)
                starts[i, name, epoch * steps + step] = env.now
                yield env.timeout(seconds(name, i, epoch * steps + step))
        yield reader  # the copy's ranks have done their part of this iteration long before
        sync = "update_weights" if copy == "gen" else "update_weights.critic"
        starts[i, sync, 0] = env.now
        yield env.timeout(seconds(sync, i, 0))
        weights[i, copy].succeed()

    for i in range(iterations):
        generators = [
            env.process(stage("gen", i, range(r, batches, replicas), replicas, before.get(f"gen{r}")))
            for r in range(replicas)
        ]
        before |= {f"gen{r}": process for r, process in enumerate(generators)}
        for name in ("ref", "values", "reward"):
            before[name] = env.process(stage(name, i, range(batches), 1, before.get(name)))
        for name, copy, reader in (
            ("update_actor", "gen", env.all_of(generators)),
            ("update_critic", "values", before["values"]),
        ):
            before[name] = env.process(trainer(name, i, copy, before.get(name), reader))
    env.run()
    return starts


@pytest.mark.parametrize("seed", range(150))
def test_disaggregated_equals_the_processes_written_out(seed: int) -> None:
    chance = random.Random(seed)
    steps, epochs, replicas = chance.choice((1, 2, 3)), chance.choice((1, 2)), chance.choice((1, 2, 3))
    batches, capacity = steps * chance.choice((1, 2, 3, 5)), chance.choice((1, 1, 2, 3))
    weight = {name: chance.choice((0.3, 1.0, 3.0)) for name in (*{name for edge in EDGES for name in edge}, *SYNCS)}
    drawn: dict[tuple[str, int, int], float] = {}

    def seconds(name: str, iteration: int, chunk: int) -> float:
        return drawn.setdefault((name, iteration, chunk), weight[name] * chance.uniform(0.5, 1.5))

    where = {
        "shadow_actor": list(range(2 * replicas)),
        "reference": [20],
        "shadow_critic": [21],
        "reward": [22],
        "actor": [23],
        "critic": [24],
    }
    algorithm = ppo.build(epochs=epochs, minibatches=steps)
    graph = disaggregated.build(
        algorithm,
        Devices(tuple(range(25)), 8),
        barrier=False,
        batches=batches,
        replicas=replicas,
        capacity=capacity,
        ranks=where,
    )
    spans = simulate(graph, lambda f: seconds(f.stage, f.iteration, f.chunk), 3).spans
    found = {s.firing[:3]: s.start_seconds for s in spans}
    expected = written_out(batches, steps, epochs, replicas, capacity, seconds, 3)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, algorithm, depth",
    [
        ({}, {}, 8 + max(2, 1.5) + 3 + max(4, 5) + 0.5),
        (
            {"shadow_critic": False},
            {},
            8 + max(2, 1.5) + 3 + max(5, 4 + 0.5),
        ),  # nothing to send the critic's weights to
        ({"recompute_log_probs": True}, {}, 8 + max(2, 1.5, 1) + 3 + 5 + 0.5),
        ({}, {"share_actor_critic": True}, 8 + max(2, 1) + 3 + 4 + 0.5),
        ({"batches": 3}, {}, 3 * 8 + 2 + 3 + 5 + 0.5),
        ({"batches": 4, "replicas": 2}, {}, 2 * 8 + 2 + 3 + 3 + 5 + 0.5),  # two results arrive at once
    ],
)
def test_depth(options: dict[str, Any], algorithm: dict[str, Any], depth: float) -> None:
    """D_gen + max(ref, values) + reward + max(trains): reward waits for both others; then the weights."""
    graph = disaggregated.build(ppo.build(**algorithm), EIGHT, **{"batches": 1, **options})
    assert end(graph, SECONDS) == pytest.approx(depth)


def test_nothing_overlaps_across_iterations_behind_the_barrier() -> None:
    for shadow_critic in (True, False):
        graph = disaggregated.build(ppo.build(), EIGHT, batches=4, shadow_critic=shadow_critic)
        spans = simulate(graph, by_stage(SECONDS | {"update_critic": 20.0}), 3).spans
        for i in (1, 2):
            before = max(s.end_seconds for s in spans if s.firing.iteration == i - 1)
            assert min(s.start_seconds for s in spans if s.firing.iteration == i) == pytest.approx(before)


def test_without_barrier_generation_waits_for_the_actor_only() -> None:
    """As in the paper's code, where the copy of the actor waits for the actor's weights: a slower critic goes on
    training beside the next generation, and only values wait for it."""
    graph = disaggregated.build(ppo.build(), EIGHT, batches=1, barrier=False)
    for critic, extra in ((3.0, 0.0), (5.0, 1.0)):  # a faster critic: iterations follow each other
        assert end(graph, SECONDS | {"update_critic": critic}, 3) == pytest.approx(3 * (8 + 2 + 3 + 4 + 0.5) + extra)
    slow = simulate(graph, by_stage(SECONDS | {"update_critic": 20.0}), 2)
    assert {s.firing.stage: s.start_seconds for s in slow.spans if s.firing.iteration == 1} == {
        "gen": 17.5,
        "ref": 25.5,
        "values": 33.5,
        "reward": 35.0,
        "update_actor": 38.0,
        "update_critic": 38.0,
        "update_weights": 42.0,
        "update_weights.critic": 58.0,
    }


def test_who_holds_what() -> None:
    stages = {s.name: s for s in disaggregated.build(ppo.build(), EIGHT).stages()}
    assert (stages["gen"].model, stages["values"].model) == ("shadow_actor", "shadow_critic")
    assert "old_log_prob" not in stages
    assert stages["update_weights"].target == "shadow_actor"
    assert set(stages["update_weights"].ranks) == {*stages["gen"].ranks, *stages["update_actor"].ranks}
    borrowed = {s.name: s for s in disaggregated.build(ppo.build(), EIGHT, shadow_critic=False).stages()}
    assert borrowed["values"].ranks == borrowed["update_critic"].ranks
    assert "update_weights.critic" not in borrowed
    again = disaggregated.build(ppo.build(), EIGHT, recompute_log_probs=True)
    assert again.at("old_log_prob").ranks == again.at("update_actor").ranks


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_frozen_trainer_stalls_generation(capacity: int, replicas: int) -> None:
    """It has taken one batch. Every channel on the way fills, and every stage holds one more that it cannot send."""
    frozen = {"gen": 1.0, "ref": 0.1, "values": 0.1, "reward": 0.1, "update_actor": 1e6, "update_critic": 1e6}
    graph = disaggregated.build(ppo.build(minibatches=24), EIGHT, batches=24, capacity=capacity, replicas=replicas)
    started = [s.firing for s in simulate(graph, by_stage(frozen)).spans if s.start_seconds < 1e5]
    count = {name: sum(f.stage == name for f in started) for name in ("gen", "ref", "reward", "update_actor")}
    assert count["update_actor"] == 1
    assert count["reward"] == 1 + (capacity + 1)
    posted = count["reward"] + capacity * replicas  # tokens that reward took, and those that lie before it
    assert count["gen"] == posted + replicas
    assert count["ref"] == min(posted, count["reward"] + capacity + 1)


def test_whoever_is_free_against_strict_turns() -> None:
    """Uneven durations: strict turns wait for the slow replica at the head of the line. Same durations for both."""
    chance, totals = random.Random(5), {"robin": 0.0, "first": 0.0}
    for _ in range(30):
        durations = [chance.choice((1.0, 1.0, 1.0, 8.0)) for _ in range(24)]
        for spread in totals:
            graph = disaggregated.build(
                ppo.build(),
                Devices(tuple(range(9)), 8),
                batches=24,
                replicas=4,
                spread=spread,
                split={"shadow_actor": 4, "reference": 1, "shadow_critic": 1, "reward": 1, "actor": 1, "critic": 1},
            )
            gen = lambda f: durations[f.chunk] if f.stage == "gen" else 0.01  # noqa: B023, E731
            totals[spread] += simulate(graph, gen).end_seconds
    assert totals["first"] < 0.85 * totals["robin"]


def test_steady_state_follows_the_bottleneck() -> None:
    """Many batches: each costs what the slowest stage takes for it."""
    for slow, options, each in (("gen", {"replicas": 2}, 6.0 / 2), ("ref", {}, 6.0), ("reward", {}, 6.0)):
        seconds = dict.fromkeys(SECONDS, 0.1) | {slow: 6.0}
        few, many = (end(disaggregated.build(ppo.build(), EIGHT, batches=n, **options), seconds) for n in (20, 60))
        assert many - few == pytest.approx(40 * each)


@settings(max_examples=40, deadline=None)
@given(strategy_graphs(), st.lists(st.sampled_from((0.0, 0.5, 1.0, 3.0)), min_size=9, max_size=9))
def test_weights_are_new_before_they_are_used(graph: StageGraph, drawn: list[float]) -> None:
    """No generation starts before the actor's update of the iteration before and its way to the copy have ended, and no
    values before the critic's; on every rank iterations follow each other."""
    names = ("gen", *SCORES, "update_actor", "update_critic", "update_weights", "ids")
    timeline = simulate(graph, by_stage(dict(zip(names, drawn, strict=True))), 3)
    ends: dict[tuple[str, int], float] = {}
    for span in sorted(timeline.spans, key=lambda s: s.end_seconds):
        ends[span.firing.stage, span.firing.iteration] = span.end_seconds
    for span in timeline.spans:
        i = span.firing.iteration
        if i and span.firing.stage == "gen":
            assert span.start_seconds >= max(ends.get((s, i - 1), 0.0) for s in ("update_actor", "update_weights"))
        if i and span.firing.stage.partition(".")[0] == "values":
            assert span.start_seconds >= max(
                ends.get((s, i - 1), 0.0) for s in ("update_critic", "update_weights.critic")
            )
    for rank in range(timeline.ranks):
        order = [s.firing.iteration for s in timeline.spans if rank in s.ranks]
        assert order == sorted(order)


@settings(max_examples=30, deadline=None)
@given(strategy_graphs(("colocated", "interleaved")))
def test_nothing_overlaps_across_iterations_where_ranks_are_shared(graph: StageGraph) -> None:
    timeline = simulate(graph, fixed, 3)
    for before, after in pairwise([[s for s in timeline.spans if s.firing.iteration == i] for i in range(3)]):
        assert max(s.end_seconds for s in before) <= min(s.start_seconds for s in after)


SIX = ("shadow_actor", "reference", "shadow_critic", "reward", "actor", "critic")


def test_models_may_share_ranks_on_either_side() -> None:
    """Training on rank 0, everything else on rank 1: two streams, joined by the channels and the weights."""
    ranks = {model: [0 if model in ("actor", "critic") else 1] for model in SIX}
    algorithm = ppo.build(minibatches=4)
    timeline = simulate(disaggregated.build(algorithm, EIGHT, batches=4, capacity=4, ranks=ranks), fixed, 2)
    first = [s for s in timeline.spans if s.firing.iteration == 0]
    trained, rest = ([s for s in first if (s.kind == "train") == own and s.kind != "sync"] for own in (True, False))
    assert {s.ranks for s in trained} == {(0,)} and {s.ranks for s in rest} == {(1,)}
    assert trained[0].start_seconds < max(s.end_seconds for s in rest)  # it streams through


@pytest.mark.parametrize(
    "options, said",
    [
        ({"spread": "each"}, "spread is 'each'"),
        ({"replicas": 3}, "replicas is 3"),
        ({"replicas": 0}, "replicas is 0"),
        ({"batches": 0}, "0 chunks"),
        ({"capacity": 0}, "capacity 0"),
        ({"split": {"actor": 1}}, "split must name exactly shadow_actor, .*check critic, .*"),
        ({"split": {**dict.fromkeys(SIX, 1), "crtic": 1}}, "check crtic"),
        ({"split": dict.fromkeys(SIX, 0)}, "share of shadow_actor is 0"),
        ({"split": {**dict.fromkeys(SIX, 1), "reward": -1}}, "share of reward is -1"),
        ({"ranks": {m: [k] for k, m in enumerate(SIX[:5])}}, "check critic"),
        ({"ranks": {m: [k % 4] for k, m in enumerate(SIX)}}, r"ranks.actor and ranks.shadow_actor share rank 0"),
        ({"ranks": {m: [k + 4] for k, m in enumerate(SIX)}}, "rank 8; there are ranks 0 to 7"),
        ({"ranks": {m: [k] * (m != "reward") for k, m in enumerate(SIX)}}, "reward: it has no ranks"),
        ({"split": dict.fromkeys((*SIX[:2], *SIX[3:]), 1)}, "check shadow_critic"),
    ],
)
def test_impossible_disaggregation(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        disaggregated.build(ppo.build(), EIGHT, **options)


def test_explicit_ranks() -> None:
    where = {m: [7 - k] for k, m in enumerate(SIX)}
    graph = check(disaggregated.build(ppo.build(), EIGHT, ranks=where))
    used = {s.model: list(s.ranks) for s in graph.stages() if s.kind != "sync"}
    assert used == where  # ranks 0 and 1 stay idle


# ---------------------------------------------------------------- dividing ranks


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.sampled_from((1, 2, 4))), min_size=1, max_size=6), st.integers(1, 64))
def test_divide(parts: list[tuple[float, int]], count: int) -> None:
    """Disjoint, in order, whole units; within a unit of the share where no unit forces more; no unit is left over."""
    shares = {str(k): share for k, (share, _) in enumerate(parts)}
    units = {str(k): unit for k, (_, unit) in enumerate(parts)}
    if sum(units.values()) > count:
        with pytest.raises(ValueError, match=f"at least {sum(units.values())} are needed"):
            divide(tuple(range(count)), shares, units)
        return
    found = divide(tuple(range(count)), shares, units)
    flat = [rank for own in found.values() for rank in own]
    assert flat == list(range(len(flat)))
    assert count - len(flat) < min(units.values())
    total = sum(shares.values())
    forced = any(units[n] > count * share / total for n, share in shares.items())
    for name, own in found.items():
        assert len(own) % units[name] == 0
        if not forced:
            assert len(own) > count * shares[name] / total - max(units.values())


def test_divide_by_shares_that_fit_is_exact() -> None:
    assert {m: len(r) for m, r in divide(tuple(range(32)), disaggregated.SHARES).items()} == {
        "shadow_actor": 8,
        "reference": 4,
        "shadow_critic": 4,
        "reward": 4,
        "actor": 8,
        "critic": 4,
    }
    thirds = divide(tuple(range(9)), {"ref": float(Fraction(1, 3)), "reward": float(Fraction(2, 3))})
    assert thirds == {"ref": (0, 1, 2), "reward": (3, 4, 5, 6, 7, 8)}


def test_actor_on_a_part_generates_and_trains_there() -> None:
    """Half of the ranks: two generate calls one after the other, old log-probs likewise, one update."""
    owners = {"reference": [0, 1, 2, 3], "reward": [4, 5, 6, 7], "actor": [0, 1, 2, 3]}
    graph = check(interleaved.build(ppo.build(), ALONE, owners=owners))
    for name in ("gen.0", "gen.1", "old_log_prob.0", "old_log_prob.1"):
        assert set(graph.at(name).ranks) == {0, 1, 2, 3}
    assert [list(graph.at(f"gen.{k}").serves) for k in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert graph.at("update_actor").ranks == (0, 1, 2, 3)
    assert len(graph.at("update_critic").ranks) == 8
