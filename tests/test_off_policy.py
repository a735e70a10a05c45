"""Strategies whose iterations overlap or leave responses unfinished: ceilings, bounds on age, and conservation."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from typing import Any

import pytest
from conftest import by_stage, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import TAIL, scenario, timeline_of

from rlhfsim.algorithms import ppo
from rlhfsim.costs.rollout import Rollouts
from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.graph import StageGraph
from rlhfsim.layout import strategy_names
from rlhfsim.metrics import off_policy_summary, step_seconds
from rlhfsim.order import violations
from rlhfsim.schedule import check
from rlhfsim.simulate import prepare
from rlhfsim.simulate import simulate as run
from rlhfsim.strategies import (
    Devices,
    asynchronous,
    disaggregated,
    one_step_off,
    partial_rollout,
    reallocation,
    split_placement,
    stage_fusion,
    streaming,
)
from rlhfsim.timeline import Timeline
from rlhfsim.timeline import check as check_timeline

EIGHT = Devices(tuple(range(8)), 8)
ENGINES = Devices(tuple(range(8)), 8, {"gen": 1}, own_engine=True)
SMALL = TAIL | {
    "cluster.nodes": 1,
    "workload.prompts": 16,
    "workload.padded": False,
    "algorithm.minibatches": 1,
    "simulation.iterations": 5,
}

durations = st.floats(0.1, 10).map(lambda x: round(x, 3))


def varying(gen: float, train: float, spread: float, seed: int) -> Any:
    """Seconds that vary from firing to firing, the same at every call; everything else takes no time."""

    def of(f: Firing) -> float:
        mean = {"gen": gen, "update_actor": train}.get(f.stage, 0.0)
        return mean * (1 + spread * random.Random(f"{seed} {f}").uniform(-1, 1))

    return of


# ---------------------------------------------------------------- the ceiling


@settings(max_examples=40, deadline=None)
@given(durations, durations, st.integers(0, 4))
def test_staleness_reaches_the_ceiling_and_no_more(gen: float, train: float, staleness: int) -> None:
    """(gen + train) / max(gen, train) with any staleness, 1 without: durations are fixed, weights arrive at once."""
    graph = one_step_off.build(ppo.build(), EIGHT, staleness=staleness)
    timeline = simulate(graph, by_stage({"gen": gen, "update_actor": train}), 12)
    speedup = (gen + train) / step_seconds(timeline)
    assert speedup == pytest.approx((gen + train) / max(gen, train) if staleness else 1.0)


@settings(max_examples=40, deadline=None)
@given(
    durations,
    durations,
    st.floats(0, 0.9),
    st.integers(0, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_bounds_with_varying_durations(
    gen: float, train: float, spread: float, staleness: int, chunks: int, interrupt: bool, stream: bool, seed: int
) -> None:
    """Never faster than its slower half, never slower than one after the other, and never staler than allowed."""
    options = {"staleness": staleness, "chunks": chunks, "interrupt": interrupt, "stream": stream}
    graph = asynchronous.build(ppo.build(), EIGHT, **options)
    seconds, iterations = varying(gen, train, spread, seed), 8
    timeline = simulate(graph, seconds, iterations)
    busy = {name: sum(s.seconds for s in timeline.of(stage=name)) for name in ("gen", "update_actor")}
    assert max(busy.values()) <= timeline.end_seconds + 1e-9
    assert timeline.end_seconds <= sum(busy.values()) + 1e-9
    assert busy["gen"] == pytest.approx(
        sum(seconds(Firing(i, "gen", c, 0)) for i, c in product(range(8), range(chunks)))
    )
    arrived = {s.firing.iteration: s.end_seconds for s in timeline.of(stage="update_weights")}
    for span in timeline.of(stage="gen"):
        version = sum(end <= span.start_seconds for end in arrived.values())
        assert span.firing.iteration - version <= staleness


def test_without_staleness_it_is_synchronous() -> None:
    """Whatever the options; with every model on its own ranks, and no time but that of generation and training, too."""
    seconds = by_stage({"gen": 5.0, "update_actor": 3.0, "update_weights": 0.5})
    graphs = [
        one_step_off.build(ppo.build(), EIGHT, staleness=0),
        asynchronous.build(ppo.build(), EIGHT, staleness=0, chunks=1),
        asynchronous.build(ppo.build(), EIGHT, staleness=0, chunks=1, interrupt=False, recompute_log_probs=False),
        disaggregated.build(ppo.build(), EIGHT, batches=1),
        split_placement.build(ppo.build(), EIGHT),
    ]
    assert [simulate(check(graph), seconds, 4).end_seconds for graph in graphs] == [4 * 8.5] * len(graphs)


@pytest.mark.parametrize("interrupt", [True, False])
def test_without_staleness_engines_do_what_plain_generation_does(interrupt: bool) -> None:
    """To the last digit, with long tails: all responses of a batch are begun together and awaited."""
    plain = timeline_of(scenario("one_step_off", "engine", **SMALL, **{"strategy.staleness": 0}))
    options = {"strategy.staleness": 0, "strategy.chunks": 1, "strategy.interrupt": interrupt}
    found = timeline_of(scenario("asynchronous", "engine", **SMALL, **options))
    assert step_seconds(found) == pytest.approx(step_seconds(plain), rel=1e-9)
    assert found.end_seconds == pytest.approx(plain.end_seconds, rel=1e-9)


# ---------------------------------------------------------------- age


def summary_of(strategy: str, **changes: Any) -> Any:
    return off_policy_summary(timeline_of(scenario(strategy, "engine", **(SMALL | changes))))


def test_one_step_off_is_one_step_off() -> None:
    """From the second iteration on; a longer lag is used only where training is slower."""
    age = summary_of("one_step_off")
    assert (age.mean_age_steps, age.max_age_steps) == (1.0, 1.0)
    assert summary_of("one_step_off", **{"strategy.staleness": 2}).max_age_steps == 1
    slow = {"strategy.staleness": 2, "workload.response_tokens.mean_tokens": 4, "algorithm.epochs": 20}
    assert summary_of("one_step_off", **slow).max_age_steps == 2


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from((1, 2, 4)),
    st.floats(0.1, 1.2),
    st.integers(0, 99),
    st.sampled_from((1, 4)),
)
def test_strict_staleness_is_never_exceeded(
    staleness: int, interrupt: bool, chunks: int, sigma: float, seed: int, responses_per_prompt: int
) -> None:
    """By any token, with tails that others overtake: what would be too old is thrown away."""
    changes = {
        "strategy.staleness": staleness,
        "strategy.interrupt": interrupt,
        "strategy.chunks": chunks,
        "strategy.strict": True,
        "workload.prompts": 16 // responses_per_prompt,
        "workload.responses_per_prompt": responses_per_prompt,
        "workload.response_tokens.sigma": sigma,
        "simulation.seed": seed,
    }
    age = summary_of("asynchronous", **changes)
    assert 0 <= age.mean_age_steps <= age.max_age_steps <= staleness


def test_what_is_overtaken_may_be_older() -> None:
    """Why `strict` is there: counting what is begun does not bound the age of every token."""
    changes = {"strategy.staleness": 1, "workload.response_tokens.sigma": 1.2, "simulation.iterations": 8}
    loose = summary_of("asynchronous", **changes)
    assert loose.max_age_steps > 1 and loose.thrown_away_tokens == 0
    assert summary_of("asynchronous", **changes, **{"strategy.strict": True}).thrown_away_tokens > 0


def test_interrupts_cost_caches() -> None:
    stopped = summary_of("asynchronous")
    assert stopped.interrupts > 0 and stopped.recomputed_tokens > 0
    in_flight = summary_of("asynchronous", **{"strategy.recompute": False})
    assert in_flight.interrupts > 0 and in_flight.recomputed_tokens == 0
    assert summary_of("asynchronous", **{"strategy.interrupt": False}).interrupts == 0


def test_streaming_is_on_policy_and_hides_training() -> None:
    changes = {"algorithm.minibatches": 4, "workload.response_tokens.sigma": 1.2, "strategy.chunks": 8}
    timeline = timeline_of(scenario("streaming", "engine", **(SMALL | changes)))
    age = off_policy_summary(timeline)
    assert age and age.max_age_steps == 0
    for i in range(5):
        last = max(s.end_seconds for s in timeline.of(stage="gen", iteration=i))
        first = min(s.start_seconds for s in timeline.of(stage="update_actor", iteration=i))
        assert first < last  # training begins while the tail is generated
        arrived = [s.end_seconds for s in timeline.of(stage="update_weights", iteration=i - 1)]
        assert all(s.start_seconds >= arrived[0] for s in timeline.of(stage="gen", iteration=i) if arrived)


def test_validation_enters_between_two_firings() -> None:
    """It would hold engines back for a whole iteration if it had a turn among their firings."""
    changes = {"periodic.validation_every": 2, "periodic.validation_prompts": 16}
    timeline = timeline_of(scenario("asynchronous", "engine", **(SMALL | changes)))
    assert sum(s.seconds > 0 for s in timeline.of(stage="testing")) == 2
    assert summary_of("asynchronous", **changes).mean_age_steps > 0


# ---------------------------------------------------------------- partial rollout, over-sampling


def test_nothing_more_than_needed_is_plain_generation() -> None:
    plain = timeline_of(scenario("colocated", "engine", **SMALL))
    for resume in (True, False):
        options = {"strategy.oversampling": 1.0, "strategy.resume": resume}
        found = timeline_of(scenario("partial_rollout", "engine", **SMALL, **options))
        assert found.end_seconds == pytest.approx(plain.end_seconds, rel=1e-9)


def tokens(timeline: Timeline, name: str) -> float:
    return sum(s.counts.get(name, 0.0) for s in timeline.spans)


@pytest.mark.parametrize("responses_per_prompt, minibatches", [(1, 3), (4, 3), (4, 5)])
@pytest.mark.parametrize("strategy", ["asynchronous", "partial_rollout", "stage_fusion", "streaming"])
def test_any_numbers_of_samples(strategy: str, responses_per_prompt: int, minibatches: int) -> None:
    """Chunks that are no whole numbers of prompts; every iteration trains all of its samples."""
    changes = {"workload.responses_per_prompt": responses_per_prompt, "algorithm.minibatches": minibatches}
    chunks = {"strategy.chunks": 3} if strategy in ("asynchronous", "streaming") else {}
    timeline = timeline_of(scenario(strategy, "engine", **(SMALL | changes | {"workload.prompts": 7}), **chunks))
    for i in range(5):
        spans = [s for s in timeline.spans if s.firing.iteration == i]
        assert sum(s.counts.get("samples", 0) for s in spans) == 7 * responses_per_prompt


def test_partial_rollout_shortens_generation_and_loses_nothing() -> None:
    long = {"simulation.iterations": 10, "workload.response_tokens.sigma": 1.0}
    plain = timeline_of(scenario("colocated", "engine", **(SMALL | long)))
    resumed = timeline_of(scenario("partial_rollout", "engine", **(SMALL | long)))
    dropped = timeline_of(scenario("partial_rollout", "engine", **(SMALL | long), **{"strategy.resume": False}))
    assert step_seconds(resumed) < step_seconds(plain)
    assert tokens(resumed, "thrown_away_tokens") == 0 < tokens(resumed, "recomputed_tokens")
    assert tokens(dropped, "thrown_away_tokens") > 0 == tokens(dropped, "recomputed_tokens")
    ages = off_policy_summary(resumed), off_policy_summary(dropped)
    assert ages[0] and ages[0].mean_age_steps > 0 and ages[1] and ages[1].max_age_steps == 0
    bounded = timeline_of(scenario("partial_rollout", "engine", **(SMALL | long), **{"strategy.max_age": 1}))
    age = off_policy_summary(bounded)
    assert age and age.max_age_steps <= 1 and tokens(bounded, "thrown_away_tokens") > 0


# ---------------------------------------------------------------- placements


@st.composite
def overlapping(draw: st.DrawFn) -> StageGraph:
    """Graphs of the strategies that are not the paper's, with any options."""
    algorithm = ppo.build(
        epochs=draw(st.integers(1, 2)),
        minibatches=draw(st.sampled_from((1, 2, 3))),
        share_actor_critic=draw(st.booleans()),
    )
    size = draw(st.sampled_from((None, 1, 2)))  # None: ZeRO-3 domains
    together = {} if size is None else dict.fromkeys(("old_log_prob", "ref", "reward", "values"), size)
    replica = dict.fromkeys(("actor", "critic", "reference", "reward"), size or 1)
    where = Devices(tuple(range(12)), 8, together | {"gen": 1}, replica, own_engine=True)
    flag, pieces = st.booleans(), st.integers(1, 4)
    builders = {
        asynchronous: {
            "staleness": st.integers(0, 3),
            "interrupt": flag,
            "chunks": pieces,
            "stream": flag,
            "whole_batches": flag,
            "recompute_log_probs": flag,
        },
        one_step_off: {"staleness": st.integers(0, 2), "recompute_log_probs": flag},
        streaming: {"chunks": pieces, "staleness": st.integers(0, 1)},
        partial_rollout: {"resume": flag},
        stage_fusion: {"tail": st.sampled_from((0.05, 0.2, 0.5)), "tail_ranks": st.sampled_from((0.1, 0.25, 0.5))},
        split_placement: {"colocate_actor_ref": flag, "colocate_critic_reward": flag},
        reallocation: {},
    }
    module = draw(st.sampled_from(list(builders)))
    return check(module.build(algorithm, where, **{k: draw(values) for k, values in builders[module].items()}))


@settings(max_examples=80, deadline=None)
@given(overlapping(), st.lists(st.floats(0, 9), min_size=8, max_size=8), st.floats(0, 0.9), st.integers(0, 99))
def test_every_strategy_keeps_the_order_of_its_graph(
    graph: StageGraph, seconds: list[float], spread: float, seed: int
) -> None:
    """Nothing starts before what it needs has ended, no rank does two things (`simulate` checks), all of it is done."""
    names = {name: k for k, name in enumerate(sorted({s.name.partition(".")[0] for s in graph.stages()}))}

    def of(f: Firing) -> float:
        return seconds[names[f.stage.partition(".")[0]]] * (1 + spread * random.Random(f"{seed} {f}").uniform(-1, 1))

    timeline = simulate(graph, of, 4)
    ends: dict[Firing, float] = {}
    for span in timeline.spans:
        ends[span.firing] = max(span.end_seconds, ends.get(span.firing, 0.0))
    assert len(ends) == 4 * sum(s.firings * s.places for s in graph.stages())
    for span in timeline.spans:
        assert all(ends[need] <= span.start_seconds + 1e-9 for need in graph.needs(span.firing)), span.firing


def test_split_placement_shares_ranks_as_asked() -> None:
    ranks = lambda graph: {s.name: s.ranks for s in graph.stages()}  # noqa: E731
    apart = ranks(split_placement.build(ppo.build(), ENGINES))
    assert not set(apart["update_actor"]) & set(apart["ref"]) and not set(apart["update_critic"]) & set(apart["reward"])
    shared = ranks(
        split_placement.build(
            ppo.build(), ENGINES, colocate_actor_ref=True, colocate_critic_reward=True, vllm_num_engines=4
        )
    )
    assert shared["gen"] == (0, 1, 2, 3)
    assert shared["update_actor"] == shared["ref"] and shared["update_critic"] == shared["reward"] == shared["values"]
    with pytest.raises(ValueError, match="vllm_num_engines is 8"):
        split_placement.build(ppo.build(), ENGINES, vllm_num_engines=8)


def test_reallocation_sends_weights_where_calls_moved() -> None:
    graph = reallocation.build(ppo.build(), ENGINES, ranks={"values": [6, 7], "update_critic": [4, 5, 6, 7]})
    syncs = {s.name: s for s in graph.stages() if s.kind == "sync"}
    assert set(syncs) == {"update_weights", "update_weights.critic"}
    assert (syncs["update_weights.critic"].target, graph.at("values").model) == ("shadow_critic", "shadow_critic")
    same = reallocation.build(ppo.build(), ENGINES, ranks={"values": [4, 5, 6, 7], "update_critic": [4, 5, 6, 7]})
    assert {s.name for s in same.stages() if s.kind == "sync"} == {"update_weights"}


def test_stage_fusion_scores_while_the_tail_is_generated() -> None:
    timeline = timeline_of(scenario("stage_fusion", "engine", **SMALL))
    (tail,) = timeline.of(stage="gen.tail", iteration=1)
    (early,) = timeline.of(stage="ref.0", iteration=1)
    assert early.start_seconds < tail.end_seconds and not set(early.ranks) & set(tail.ranks)
    assert tail.counts["samples"] < timeline.of(stage="gen", iteration=1)[0].counts["samples"]


def test_elastic_trainers_help_between_two_updates() -> None:
    """They generate when the engines have finished their share, which those do while the trainers train."""
    timeline = timeline_of(scenario("elastic", "engine", **SMALL))
    for i in range(1, 5):
        (alone,), (all_of_them,) = timeline.of(stage="gen", iteration=i), timeline.of(stage="gen.tail", iteration=i)
        (arrived,) = timeline.of(stage="update_weights", iteration=i - 1)
        (update,) = timeline.of(stage="update_actor", iteration=i - 1)
        assert set(alone.ranks).isdisjoint(update.ranks) and set(all_of_them.ranks) == set(alone.ranks) | set(
            update.ranks
        )
        assert alone.start_seconds < update.end_seconds and alone.end_seconds <= arrived.start_seconds
        assert arrived.end_seconds <= all_of_them.start_seconds
        assert alone.counts["samples"] + all_of_them.counts["samples"] == 16
    age = off_policy_summary(timeline)
    assert age is not None and 0 < age.mean_age_steps < age.max_age_steps == 1


# ---------------------------------------------------------------- nothing is lost

FAMILY: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "asynchronous": {
        "staleness": st.sampled_from((0, 1, 4, 16)),
        "interrupt": st.booleans(),
        "recompute": st.booleans(),
        "strict": st.booleans(),
        "chunks": st.sampled_from((1, 3, 4)),
        "stream": st.booleans(),
        "whole_batches": st.booleans(),
    },
    "one_step_off": {"staleness": st.sampled_from((0, 1, 4, 16))},
    "streaming": {"staleness": st.sampled_from((0, 1, 4, 16)), "chunks": st.sampled_from((1, 3, 8))},
    "partial_rollout": {
        "oversampling": st.sampled_from((1.0, 1.3, 4.0)),
        "resume": st.booleans(),
        "max_age": st.sampled_from((None, 0, 2)),
    },
    "stage_fusion": {"tail": st.sampled_from((0.05, 0.5, 0.9)), "tail_ranks": st.sampled_from((0.25, 0.9))},
    "elastic": {"alone": st.sampled_from((0.05, 0.5, 0.95))},
    "reallocation": {},
}
CLUSTERS = {
    "cluster.gpus_per_node": st.sampled_from((2, 3, 4, 8)),
    "workload.prompts": st.sampled_from((4, 8, 12)),
    "workload.responses_per_prompt": st.sampled_from((1, 2, 4)),
    "workload.response_tokens.mean_tokens": st.sampled_from((8, 60)),
    "workload.response_tokens.sigma": st.sampled_from((0.1, 1.5)),
    "workload.turns": st.sampled_from(
        (None, {"number": {"distribution": "uniform", "max_tokens": 3}, "observation_tokens": 9, "tool_latency": 0.1})
    ),
    "algorithm.minibatches": st.sampled_from((1, 4)),
    "simulation.iterations": st.sampled_from((1, 4)),
    "simulation.seed": st.integers(0, 99),
    "generation.tensor_parallel": st.sampled_from((1, 1, 2)),
    "generation.max_sequences": st.sampled_from((1, 4, 64)),
    "generation.prefix_caching": st.booleans(),
    "generation.speculative": st.sampled_from((None, {"tokens": 2, "acceptance_length": 1.7})),
    "periodic.validation_every": st.sampled_from((0, 0, 2)),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    strategy = draw(st.sampled_from(sorted(FAMILY)))
    options = {f"strategy.{name}": draw(values) for name, values in FAMILY[strategy].items()}
    return strategy, SMALL | {name: draw(values) for name, values in CLUSTERS.items()} | options


@settings(max_examples=12, deadline=None)
@given(cases())
def test_every_response_is_trained_once(case: tuple[str, dict[str, Any]]) -> None:
    """On small clusters of any kind: no deadlock, no time before it has passed, no token lost or drawn twice."""
    strategy, changes = case
    try:
        setup = prepare(scenario(strategy, "engine", **changes))
    except InputError:  # too few ranks for these engines
        return
    given: list[tuple[Firing, list[Any], Any]] = []
    hand_over = Rollouts._hand_over

    def watched(self: Rollouts, f: Firing, pool: Any) -> list[Any]:
        given.append((f, hand_over(self, f, pool), pool))
        return given[-1][1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Rollouts, "_hand_over", watched)
        timeline = check_timeline(run(setup))
    assert violations(setup.graph, timeline) == []
    for span in timeline.spans:
        waits = span.data_seconds, span.link_seconds, *span.peer_seconds, *span.compute_seconds
        assert min(waits) >= -1e-9
    samples = setup.scenario.workload.samples
    handed = [s.number for _, done, _ in given for s in done]
    assert len(handed) == len(set(handed))
    assert all(s.tokens_by_version.total() == s.generated for _, done, _ in given for s in done)
    batches = Counter(f.iteration for f, done, _ in given for _ in done)
    assert not batches or batches == dict.fromkeys(range(setup.scenario.simulation.iterations), samples)
    for pool in {id(pool): pool for *_, pool in given}.values():
        inside = sum(len(e.unfinished()) + len(e.late) for e in pool.engines) + len(pool.outside) + len(pool.ready)
        inside += sum(map(len, pool.ended.values()))
        assert pool.begun == pool.handed_over + pool.thrown_away + inside
    age = off_policy_summary(timeline)
    if age and changes.get("strategy.strict"):
        assert age.max_age_steps <= changes["strategy.staleness"]
    if age and changes.get("strategy.staleness") == 0:
        assert age.max_age_steps == 0


# ---------------------------------------------------------------- users


def test_static_batches_cannot_be_stopped() -> None:
    with pytest.raises(InputError, match="static batches cannot") as error:
        prepare(scenario("partial_rollout", "hybrid"))
    assert error.value.field == "generation.engine"
    assert prepare(scenario("partial_rollout", "hybrid", **{"generation.batching": "continuous"})).graph.off_policy
    with pytest.raises(InputError, match=r"is static: strategy asynchronous.*allowed: continuous") as error:
        prepare(scenario("asynchronous", "engine", **{"generation.batching": "static"}))
    assert error.value.field == "generation.batching"


@pytest.mark.parametrize("strategy", strategy_names())
@pytest.mark.parametrize("engine", ["hybrid", "zero3_per_token"])
def test_who_needs_an_engine_says_so(strategy: str, engine: str) -> None:
    """Whatever a strategy misses of an engine, the message names the setting that gives it."""
    try:
        prepare(scenario(strategy, engine))
    except InputError as error:
        assert "generation.engine" in str(error)
        prepare(scenario(strategy, "engine"))
        if "hybrid for plain batches" in str(error):
            prepare(scenario(strategy, "hybrid"))
    else:
        assert strategy in ("colocated", "interleaved") or engine == "hybrid"


def test_only_stale_strategies_are_another_algorithm() -> None:
    stale = {name for name in strategy_names() if prepare(scenario(name, "engine")).graph.off_policy}
    assert stale == {"asynchronous", "elastic", "one_step_off", "partial_rollout"}
    assert not prepare(scenario("partial_rollout", "engine", **{"strategy.resume": False})).graph.off_policy
    assert not prepare(scenario("asynchronous", "engine", **{"strategy.staleness": 0})).graph.off_policy
