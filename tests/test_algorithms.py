"""Algorithms: which stages and models they have, on every placement; rounds of dynamic sampling; what is refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from conftest import by_stage, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim.algorithms import Algorithm, named, options_of
from rlhfsim.batch import first_kept
from rlhfsim.compare import settings as settings_of
from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.layout import algorithm_names, graph_of, strategy_names
from rlhfsim.memory import static_bytes
from rlhfsim.metrics import base_stage, stage_seconds, step_seconds
from rlhfsim.order import violations
from rlhfsim.render import print_simulation, simulation_json
from rlhfsim.schedule import check
from rlhfsim.simulate import (
    costs_of,
    folded_graph,
    lengths_of,
    model_flops_utilisation,
    prepare,
    rounds_of,
    trained_lengths_of,
)
from rlhfsim.spec.loader import scenario_sources
from rlhfsim.spec.scenario import Scenario
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved

approx = pytest.approx
ONE = Devices((0,), 1)

# Stages in the order of a co-located rank, and the responses to a prompt that are needed.
TABLE = {
    "ppo": ("gen old_log_prob ref reward values update_critic update_actor", 1),
    "grpo": ("gen old_log_prob ref reward update_actor", 2),
    "rloo": ("gen old_log_prob ref reward update_actor", 2),
    "reinforce_plus_plus": ("gen old_log_prob ref reward update_actor", 1),
    "reinforce_plus_plus_baseline": ("gen old_log_prob ref reward update_actor", 2),
    "gpg": ("gen old_log_prob reward update_actor", 2),
    "dapo": ("gen old_log_prob reward update_actor", 2),
}
OF_STAGE = {
    "gen": "actor",
    "old_log_prob": "actor",
    "ref": "reference",
    "reward": "reward",
    "values": "critic",
    "update_critic": "critic",
    "update_actor": "actor",
}
GROUPS = {"workload.prompts": 16, "workload.responses_per_prompt": 4}


def under(algorithm: str, strategy: str = "colocated", engine: str = "hybrid", **changes: Any) -> Scenario:
    """64 samples, four to a prompt."""
    return scenario(strategy, engine, **{"algorithm.name": algorithm} | GROUPS | changes)


def names(algorithm: Algorithm) -> list[str]:
    return [step.name for step in algorithm.steps]


# ---------------------------------------------------------------- stages and models


def test_every_algorithm_is_in_the_table() -> None:
    assert algorithm_names() == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_stages_and_models(name: str) -> None:
    stages, responses = TABLE[name]
    algorithm = named(name, epochs=2, minibatches=3)
    assert (algorithm.name, names(algorithm)) == (name, stages.split())
    assert {s.name: s.model for s in algorithm.steps} == {s: OF_STAGE[s] for s in stages.split()}
    assert set(algorithm.models) == {OF_STAGE[s] for s in stages.split()}
    assert (algorithm.epochs, algorithm.minibatches, algorithm.least_responses) == (2, 3, responses)
    made = {field for step in algorithm.steps for field in step.fields} | {"rewards"}
    assert set(algorithm.batch) <= made and {"tokens", "mask", "log_probs", "rewards"} <= set(algorithm.batch)
    assert ("values" in algorithm.batch) == (name == "ppo")


@pytest.mark.parametrize("name", TABLE)
def test_old_log_probs_are_computed_where_they_are_needed(name: str) -> None:
    once, twice = (
        {origin: names(named(name, epochs=1, minibatches=count, old_log_prob=origin)) for origin in ORIGINS}
        for count in (1, 2)
    )
    assert [o for o in ORIGINS if "old_log_prob" in once[o]] == ["always"]
    assert [o for o in ORIGINS if "old_log_prob" in twice[o]] == ["always", "if_needed"]
    by_engine = named(name, epochs=1, minibatches=2, old_log_prob="engine")
    assert "log_probs" in by_engine.step("gen").fields and "log_probs" in by_engine.batch
    assert "log_probs" not in named(name, epochs=1, minibatches=1, old_log_prob="if_needed").batch


ORIGINS = ("always", "if_needed", "engine")


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("reference", [True, False])
def test_the_reference_may_be_there_or_not(name: str, reference: bool) -> None:
    assert ("ref" in names(named(name, epochs=1, minibatches=1, reference=reference))) == reference
    assert ("reference" in under(name, **{"algorithm.reference": reference}).roles) == reference
    assert "reference" not in under(name, **{"algorithm.kl_coefficient": 0}).roles


@pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)
@pytest.mark.parametrize("name", TABLE)
def test_placements_hold_and_run_what_there_is(name: str, strategy: str, engine: str) -> None:
    reward = "function" if name in ("rloo", "dapo") else "model"
    found = under(name, strategy, engine, **TAIL, **{"algorithm.reward": reward, "simulation.iterations": 1})
    setup, timeline = prepare(found), timeline_of(found)
    assert violations(setup.graph, timeline) == []
    expected = set(TABLE[name][0].split())
    if strategy == "disaggregated":
        expected -= {"old_log_prob"}  # the engine's log-probabilities are taken
    ran = {base_stage(s.firing.stage) for s in timeline.spans}
    assert ran - {"update_weights", "update_weights.critic", "ids"} == expected
    roles = {OF_STAGE[s] for s in expected} - ({"reward"} if reward == "function" else set())
    assert {h.removeprefix("shadow_") for h in setup.holdings} == roles
    assert set(found.roles) == roles | ({"reference"} & set(found.roles))
    assert ("shadow_critic" in setup.holdings) == (strategy == "disaggregated" and name == "ppo")
    assert {key.split(".")[1] for key in setup.fit().micro_batches} == roles
    assert {key.split(".")[1] for key in settings_of(setup) if key.startswith("models.")} == roles
    assert {field.split(".")[1] for field, *_ in scenario_sources(found) if field.startswith("models.")} == roles


def test_resting_memory_is_what_the_models_take() -> None:
    """ZeRO-3 over 8 ranks: 16 bytes a trained parameter, 2 a frozen one."""
    ppo, grpo, gpg = (prepare(under(name, strategy="colocated")) for name in ("ppo", "grpo", "gpg"))
    critic = static_bytes(ppo.holdings["critic"].use, "train", 8, head="value").total
    reference = static_bytes(ppo.holdings["reference"].use, "frozen", 8).total
    resting = [setup.memory.resting(0).total for setup in (ppo, grpo, gpg)]
    assert resting[0] - resting[1] == approx(critic)
    assert resting[1] - resting[2] == approx(reference)


@pytest.mark.parametrize("name", TABLE)
def test_an_iteration_on_one_rank_is_the_sum_of_its_stages(name: str) -> None:
    seconds = {"gen": 8.0, "old_log_prob": 1.0, "ref": 2.0, "reward": 3.0, "values": 1.5}
    seconds |= {"update_actor": 4.0, "update_critic": 5.0}
    once = sum(seconds[s] for s in TABLE[name][0].split())
    updates = sum(seconds[s] for s in TABLE[name][0].split() if s.startswith("update"))
    for calls, epochs, minibatches in ((1, 1, 1), (3, 2, 4)):
        graph = colocated.build(named(name, epochs=epochs, minibatches=minibatches), ONE, calls=calls)
        expected = calls * (once - updates) + epochs * minibatches * updates
        assert simulate(graph, by_stage(seconds), 2).end_seconds == approx(2 * expected)


def test_prompts_in_rounds_go_through_generation_and_rewards_again() -> None:
    seconds = {"gen": 8.0, "old_log_prob": 1.0, "ref": 2.0, "reward": 3.0, "update_actor": 4.0}
    graph = colocated.build(named("grpo", epochs=1, minibatches=2, rounds=3), ONE)
    assert simulate(graph, by_stage(seconds)).end_seconds == 3 * (8 + 3) + 1 + 2 + 2 * 4
    spans = simulate(graph, by_stage(seconds)).spans
    assert [s.firing.stage for s in spans[:7]] == ["gen", "reward"] * 3 + ["old_log_prob"]


# ---------------------------------------------------------------- placements without all of PPO's models


def test_without_reference_the_reward_model_lies_on_all_ranks() -> None:
    where = Devices(tuple(range(4)), 4, {"reward": 1})
    graph = check(interleaved.build(named("gpg", epochs=1, minibatches=1), where))
    assert [(s.name, s.ranks) for s in graph.stages() if s.model == "reward"] == [("reward.0", (0, 1, 2, 3))]
    plain = colocated.build(named("gpg", epochs=1, minibatches=1), where)
    fixed = by_stage({"gen": 2.0, "old_log_prob": 1.0, "reward": 3.0, "update_actor": 1.0})
    assert simulate(graph, fixed).end_seconds == simulate(plain, fixed).end_seconds
    parts = {"owners": {"reward": [2, 3]}}  # ... unless a part is named
    graph = check(interleaved.build(named("gpg", epochs=1, minibatches=1), where, **parts))
    assert [s.ranks for s in graph.stages() if s.model == "reward"] == [(2, 3), (2, 3)]
    with pytest.raises(ValueError, match="owners names 'reference'"):
        interleaved.build(
            named("gpg", epochs=1, minibatches=1), where, owners={"reference": [0], "reward": [1]}
        )  # fmt: skip
    with pytest.raises(ValueError, match="owners lacks reward"):
        interleaved.build(named("gpg", epochs=1, minibatches=1), where, owners={})


def test_slots_are_needed_for_the_models_that_there_are() -> None:
    slots = {"strategy.slots": {"reward": 0.5}}
    assert graph_of(under("gpg", "interleaved", **slots))[0].at("reward.0").ranks == (0, 1, 2, 3)
    with pytest.raises(InputError, match=r"'initial' \(the reference\) and 'reward'"):
        graph_of(under("grpo", "interleaved", **slots))


def test_disaggregation_names_the_models_that_there_are() -> None:
    shares = {"shadow_actor": 4, "reference": 1, "reward": 1, "actor": 2}
    graph = graph_of(under("grpo", "disaggregated", "engine", **{"strategy.split": shares}))[0]
    assert {s.model: len(s.ranks) for s in graph.stages() if s.kind in ("generate", "score")} == {
        "shadow_actor": 4, "reference": 1, "reward": 1
    }  # fmt: skip
    assert not any("critic" in s.name or "values" in s.name for s in graph.stages())
    with pytest.raises(InputError, match="check shadow_critic"):
        graph_of(under("grpo", "disaggregated", "engine", **{"strategy.split": shares | {"shadow_critic": 1}}))
    again = {"strategy.recompute_log_probs": True}
    assert "old_log_prob" in graph_of(under("grpo", "disaggregated", "engine", **again))[0]
    with pytest.raises(InputError, match="leaves that pass out"):
        graph_of(under("grpo", "disaggregated", "engine", **again, **{"algorithm.old_log_prob": "engine"}))


OVERLAPPING = sorted(set(strategy_names()) - {"colocated", "interleaved", "disaggregated"})


@pytest.mark.parametrize("strategy", OVERLAPPING)
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_other_strategies_follow_the_models_too(strategy: str, name: str) -> None:
    reward = {"algorithm.reward": "judge", "algorithm.reward_latency": 0.1, "algorithm.reward_streams": True}
    for changes in ({}, reward, {"algorithm.reference": name == "dapo", "algorithm.old_log_prob": "engine"}):
        found = under(name, strategy, "engine", **TAIL, **changes)
        setup, timeline = prepare(found), timeline_of(found)
        assert violations(setup.graph, timeline) == []
        assert {h.removeprefix("shadow_") for h in setup.holdings} == set(found.roles)
        ran = {base_stage(s.firing.stage) for s in timeline.spans}
        assert ran >= {"gen", "reward", "update_actor"} and not ran & {"values", "update_critic"}
        assert ("ref" in ran) == ("reference" in found.roles)


@pytest.mark.parametrize("strategy", OVERLAPPING)
def test_strategies_without_rounds_say_so(strategy: str) -> None:
    for rounds in (4, 10):  # also where there are as many chunks
        with pytest.raises(InputError, match=f"{strategy} does not generate in rounds"):
            graph_of(sampling(strategy, "engine", **{"algorithm.max_rounds": rounds}))


def test_ppo_carries_what_it_did() -> None:
    """The fields of the authors' code; GRPO's trainer reads no values, but the reference's log-probabilities."""
    eight = Devices(tuple(range(8)), 8)
    for name, fields in (
        ("ppo", ("tokens", "mask", "log_probs", "values", "rewards")),
        ("grpo", ("tokens", "mask", "log_probs", "ref_log_probs", "rewards")),
        ("rloo", ("tokens", "mask", "log_probs", "rewards")),
    ):
        graph = disaggregated.build(named(name, epochs=1, minibatches=1), eight)
        assert graph.edges["reward", "update_actor"]["carries"] == fields


# ---------------------------------------------------------------- dynamic sampling


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 8), st.integers(1, 3))
def test_rounds_go_on_until_the_batch_is_full(kept: list[bool], prompts: int, per_round: int, responses: int) -> None:
    """Against a loop that generates, filters and stops."""
    batch: list[int] = []
    rounds = 0
    while len(batch) < prompts and rounds * per_round < len(kept):
        new = range(rounds * per_round, min((rounds + 1) * per_round, len(kept)))
        batch += [p for p in new if kept[p]]
        rounds += 1
    if len(batch) < prompts:
        with pytest.raises(ValueError, match=f"{len(batch)} of {len(kept)}"):
            first_kept(np.array(kept), prompts, per_round, responses)
        return
    found, samples = first_kept(np.array(kept), prompts, per_round, responses)
    assert found == rounds
    assert samples.tolist() == [p * responses + r for p in batch[:prompts] for r in range(responses)]


def sampling(strategy: str = "colocated", engine: str = "hybrid", **changes: Any) -> Scenario:
    return under("dapo", strategy, engine, **{"algorithm.filter_accept_probability": 0.5} | changes)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 1), st.sampled_from((4, 16, 24)), st.integers(0, 99), st.sampled_from(PLACEMENTS), st.booleans())
def test_every_kept_sample_trains_once(
    probability: float, per_round: int, seed: int, placement: tuple[str, str], calls: bool
) -> None:
    pieces = {"strategy.batches" if placement[0] == "disaggregated" else "strategy.calls": 2} if calls else {}
    changes = {"algorithm.filter_accept_probability": probability, "algorithm.gen_prompts": per_round}
    found = sampling(*placement, **changes, **pieces, **{"algorithm.reference": True, "algorithm.max_rounds": 40})
    setup, lengths = prepare(found), lengths_of(found, seed)
    graph, cost = setup.graph, costs_of(setup, folded_graph(setup, lengths), lengths, seed)
    for iteration, (rounds, kept) in enumerate(rounds_of(found, seed)):
        assert 1 <= rounds <= found.rounds
        generated = rounds * per_round * 4 if found.rounds > 1 else 64
        assert len(lengths[iteration][0]) == generated
        handled: dict[str, Counter[int]] = defaultdict(Counter)
        for stage in graph.stages():
            if stage.kind in ("generate", "score", "train"):
                for chunk, place in ((c, p) for c in range(stage.firings) for p in stage.all_places(c)):
                    f = Firing(iteration, stage.name, chunk, max(place, 0))
                    handled[base_stage(stage.name)].update(cost.numbers(f).tolist())
        assert {"gen", "reward", "ref", "update_actor"} <= set(handled)
        for name, numbers in handled.items():
            assert numbers == Counter(range(generated) if name in ("gen", "reward") else kept.tolist()), name


def test_rounds_take_as_long_as_calls_of_their_size() -> None:
    """Equal lengths: every round is one generation and one scoring; the batch then costs what GRPO's does."""
    fixed = {"algorithm.reference": True}
    found = sampling(**fixed)
    counts = [rounds for rounds, _ in rounds_of(found, 0)]
    timeline, once = timeline_of(found), timeline_of(under("grpo", **fixed))
    assert len(set(counts)) > 1 or counts[0] > 1

    def seconds(of: Any, stage: str, iteration: int) -> float:
        return max(sum(s.end_seconds - s.start_seconds for s in of.of(stage=stage, iteration=iteration) if r in s.ranks)
                   for r in range(8))  # fmt: skip

    for iteration, rounds in enumerate(counts):
        for stage in ("gen", "reward"):
            assert seconds(timeline, stage, iteration) == approx(rounds * seconds(once, stage, 0), rel=1e-3)
        for stage in ("old_log_prob", "ref", "update_actor"):
            assert seconds(timeline, stage, iteration) == approx(seconds(once, stage, 0), rel=1e-6)


def test_the_seed_draws_the_same_prompts_everywhere() -> None:
    first, second = (rounds_of(sampling(strategy), 3) for strategy in ("colocated", "interleaved"))
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(first, rounds_of(sampling(), 4), strict=True))
    many = sampling(**{"workload.prompts": 4096, "algorithm.filter_accept_probability": 0.3})
    (rounds, kept), *_ = rounds_of(many, 0)
    assert rounds == 4  # 4096 / 0.3 = 13 653 prompts
    assert int(kept[-1]) // 4 == approx(4096 / 0.3, rel=0.05)


def test_what_is_thrown_away_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    setup = prepare(sampling(**TAIL))
    timeline = timeline_of(setup.scenario)
    found = simulation_json(setup, setup.fit(), timeline)["dynamic_sampling"]
    rounds = np.mean([count for count, _ in rounds_of(setup.scenario, 0)])
    assert found == {
        "rounds": approx(rounds), "generated_samples": approx(64 * rounds), "dropped_samples": approx(64 * rounds - 64)
    }  # fmt: skip
    print_simulation(setup, setup.fit(), timeline)
    assert "Dynamic sampling: " in capsys.readouterr().out
    assert "dynamic_sampling" not in simulation_json(prepare(under("grpo")), prepare(under("grpo")).fit(), timeline)


def test_utilisation_counts_what_is_thrown_away_where_it_was_computed() -> None:
    """Generation and rewards of all rounds, the rest of the batch."""
    dropped, kept = prepare(sampling()), prepare(sampling(**{"algorithm.filter_accept_probability": 1.0}))
    rounds = np.mean([count for count, _ in rounds_of(dropped.scenario, 0)])
    only = {"algorithm.old_log_prob": "engine", "algorithm.reward": "function"}
    more, less = prepare(sampling(**only)), prepare(sampling(**only, **{"algorithm.filter_accept_probability": 1.0}))
    generation = (model_flops_utilisation(more, 1.0) - model_flops_utilisation(less, 1.0)) / (rounds - 1)
    reward = (
        model_flops_utilisation(dropped, 1.0) - model_flops_utilisation(kept, 1.0)
    ) / (rounds - 1) - generation  # fmt: skip
    assert generation > 0 and reward == approx(generation, rel=0.1)  # a forward pass of small-8x512 each, other heads
    assert [len(p) for p, _ in trained_lengths_of(dropped.scenario, 0)] == [64] * 3


def test_one_round_is_grpo_without_reference() -> None:
    all_kept, grpo = sampling(**{"algorithm.filter_accept_probability": 1.0}), under("grpo")
    without = under("grpo", **{"algorithm.reference": False})
    assert stage_seconds(timeline_of(all_kept)) == stage_seconds(timeline_of(without))
    assert step_seconds(timeline_of(without)) < step_seconds(timeline_of(grpo))
    assert any("no prompt is dropped" in note for note in prepare(all_kept).notes)


def test_a_round_larger_than_the_batch_is_memory_too() -> None:
    plain, large = (prepare(sampling("colocated", "engine", **{"algorithm.gen_prompts": n})) for n in (16, 64))
    assert [s.memory.samples_per_replica(s.graph.at("gen")) for s in (plain, large)] == [8, 32]
    assert [s.memory.samples_per_replica(s.graph.at("update_actor")) for s in (plain, large)] == [4, 4]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"workload.responses_per_prompt": 1}, "workload.responses_per_prompt", "at least 2"),
        ({"models.share_actor_critic": True}, "models.share_actor_critic", "grpo has nothing"),
        ({"algorithm.name": "ppo", "algorithm.filter_accept_probability": 0.5}, "algorithm.filter_accept_probability",
         "ppo has nothing"),
        ({"algorithm.name": "reinforce_plus_plus", "algorithm.gen_prompts": 8}, "algorithm.gen_prompts", "nothing"),
        ({"algorithm.name": "ppo", "models.share_actor_critic": True, "algorithm.old_log_prob": "engine"}, "algorithm",
         "gives the values"),
        ({"algorithm.gen_prompts": 2, "algorithm.max_rounds": 7}, "algorithm.gen_prompts", "never fill"),
        ({"algorithm.max_rounds": 1}, "algorithm.max_rounds", "at least 2"),
        ({"algorithm.gen_prompts": 10**6, "algorithm.max_rounds": 1000}, "algorithm.max_rounds", "at most"),
        ({"algorithm.filter_accept_probability": 0}, "algorithm.filter_accept_probability", "above 0"),
        ({"algorithm.old_log_prob": "sometimes"}, "algorithm.old_log_prob", "always, if_needed, engine"),
        ({"algorithm.name": "gropo"}, "algorithm.name", "did you mean 'grpo'"),
        ({"algorithm.reference": True, "algorithm.kl_coefficient": 0}, "algorithm", "nothing reads it"),
    ],
)  # fmt: skip
def test_impossible_choices(changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        under("grpo", **changes)
    assert error.value.field == field


def test_a_batch_that_is_never_full_is_an_error() -> None:
    found = sampling(**{"algorithm.filter_accept_probability": 0.01})
    with pytest.raises(InputError, match=r"not full by then: [0-9]+ of 160 prompts") as error:
        timeline_of(found)
    assert error.value.field == "algorithm.max_rounds"


def test_only_what_build_takes_can_be_chosen() -> None:
    assert "share_actor_critic" in options_of("ppo") and "rounds" not in options_of("ppo")
    assert "rounds" in options_of("dapo")
