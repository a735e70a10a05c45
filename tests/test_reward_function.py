"""A reward that a function computes on the host: seconds in closed form, and no model in memory, costs or tables."""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import PLACEMENTS, scenario, timeline_of

from rlhfsim.compare import compare, default_rows, settings
from rlhfsim.errors import InputError
from rlhfsim.layout import graph_of, strategy_names
from rlhfsim.memory import static_bytes
from rlhfsim.metrics import step_seconds
from rlhfsim.order import violations
from rlhfsim.simulate import prepare
from rlhfsim.spec.loader import scenario_sources
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Span


def judged(strategy: str = "colocated", engine: str = "hybrid", **changes: Any) -> Scenario:
    """64 samples on 2 nodes of 4 ranks, half a second each."""
    function = {"algorithm__reward": "function", "algorithm__reward_function_seconds": 0.5}
    return scenario(strategy, engine, **function | changes)


def reward_spans(found: Scenario) -> list[Span]:
    return [s for s in timeline_of(found).of(iteration=0) if s.firing.stage.startswith("reward")]


@pytest.mark.parametrize(
    ("workers", "seconds"),
    [
        (None, 8 * 0.5),  # each rank its 8 samples
        (2, 32 / 2 * 0.5),  # a node's 32 samples by two processes
        (3, 11 * 0.5),  # 10 2/3 rounds are 11
        (4, 8 * 0.5),
        (64, 0.5),  # more processes than samples: one round
    ],
)
def test_a_node_computes_its_samples_in_rounds(workers: int | None, seconds: float) -> None:
    spans = reward_spans(judged(algorithm__reward_function_workers=workers))
    assert {s.detail["reward function"] for s in spans} == {seconds}
    assert {s.bound["host"] for s in spans} == {seconds}


def test_where_ranks_are_disjoint_few_compute_many() -> None:
    """One rank judges batches of 16; an owner that is named judges its own 8 samples, then those of its partner."""
    apart = judged("disaggregated", "engine", strategy__batches=4)
    assert len(graph_of(apart)[0].at("reward").ranks) == 1
    assert [s.detail["reward function"] for s in reward_spans(apart)] == [16 * 0.5] * 4
    owners = {"reference": [0, 1, 2, 3], "reward": [4, 5, 6, 7]}
    turns = reward_spans(judged("interleaved", strategy__owners=owners))
    assert {s.detail["reward function"] for s in turns} == {8 * 0.5}
    assert {s.firing.stage for s in turns} == {"reward.0", "reward.1"}


REWARDS = {"function": {}, "judge": {"algorithm__reward_latency": 0.5}, "sandbox": {"algorithm__reward_latency": 0.5}}
EVERYWHERE = [(name, "engine", algorithm) for name in strategy_names() for algorithm in ("ppo", "grpo", "gpg")]


@pytest.mark.parametrize(("strategy", "engine", "algorithm"), [*EVERYWHERE, ("interleaved", "hybrid", "ppo")])
@pytest.mark.parametrize("reward", REWARDS)
def test_what_is_no_model_gets_no_gpu_of_its_own(strategy: str, engine: str, algorithm: str, reward: str) -> None:
    """Every rank that waits for a reward has other work, and the others have all ranks between them."""
    given = {"algorithm__name": algorithm, "algorithm__reward": reward, "workload__responses_per_prompt": 4}
    found = scenario(strategy, engine, **given, **REWARDS[reward])
    setup, timeline = prepare(found), timeline_of(found)
    assert not any("its GPU idles" in note for note in setup.notes)
    held = {rank for stage in setup.graph.stages() if stage.model != "reward" for rank in stage.ranks}
    assert held == set(range(8))
    assert violations(setup.graph, timeline) == []


def test_without_a_reward_model_interleaving_is_colocation() -> None:
    """Nothing is left that could run beside the reference."""
    seconds = [step_seconds(timeline_of(judged(name))) for name in ("interleaved", "colocated")]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-12)


def test_ranks_for_a_function_may_be_named() -> None:
    """... and then only they compute it; a share of the ranks is for models."""
    ranks = {
        "shadow_actor": [0, 1],
        "reference": [2],
        "shadow_critic": [3],
        "reward": [4],
        "actor": [5, 6],
        "critic": [7],
    }
    found = judged("disaggregated", "engine", strategy__ranks=ranks)
    assert graph_of(found)[0].at("reward").ranks == (4,)
    assert any("rank 4 only has the reward function; its GPU idles" in note for note in prepare(found).notes)
    without = {model: own for model, own in ranks.items() if model != "reward"}
    assert graph_of(judged("disaggregated", "engine", strategy__ranks=without))[0].at("reward").ranks == (2,)
    with pytest.raises(InputError, match="check reward"):
        graph_of(judged("disaggregated", "engine", strategy__split=dict.fromkeys(ranks, 1)))
    with pytest.raises(InputError, match="no reward model needs a place"):
        graph_of(judged("split_placement", "engine", strategy__colocate_critic_reward=True))


@pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)
def test_without_seconds_it_only_saves_what_the_model_cost(strategy: str, engine: str) -> None:
    free = judged(strategy, engine, algorithm__reward_function_seconds=0.0)
    timeline = timeline_of(free)
    assert violations(graph_of(free)[0], timeline) == []
    assert step_seconds(timeline) <= step_seconds(timeline_of(scenario(strategy, engine)))
    with_model, without = prepare(scenario(strategy, engine)), prepare(free)
    assert set(with_model.holdings) - set(without.holdings) == {"reward"}
    assert "reward" not in without.fit().by_phase and without.fit().by_phase
    assert not any("reward" in key for key in without.fit().micro_batches)
    if strategy == "colocated":
        use = with_model.holdings["reward"].use
        saved = static_bytes(use, "frozen", 8, head="value").total
        assert with_model.memory.resting(0).total - without.memory.resting(0).total == pytest.approx(saved)


def test_tables_do_not_name_a_model_that_is_not_there() -> None:
    found = judged()
    assert not any("reward" in name for name in settings(prepare(found)))
    fields = [field for field, *_ in scenario_sources(found)]
    assert not any(field.startswith("models.reward") for field in fields)
    assert any(field.startswith("models.reference") for field in fields)


def test_compare_gives_a_function_no_rank() -> None:
    comparison = compare(default_rows(judged(workload__prompts=32)), "colocated, hybrid")
    apart = next(row for row in comparison.rows if "disaggregated" in row.label)
    assert comparison.winner is not None and apart.fit is not None
    assert "reward" not in apart.used["ranks"]
    graph = graph_of(apart.scenario)[0]
    assert graph.at("reward").ranks == graph.at("ref").ranks


def test_notes_say_what_is_not_used() -> None:
    notes = prepare(judged("disaggregated", "engine")).notes
    assert any("no reward model is held or run" in note and "0.5 s a sample" in note for note in notes)
    assert any(
        "settings of a reward function are not used" in note
        for note in prepare(scenario(algorithm__reward_function_workers=4)).notes
    )
    assert not any("reward" in note for note in prepare(scenario()).notes)


@pytest.mark.parametrize(
    ("field", "value"), [("reward_function_seconds", -1), ("reward_function_workers", 0), ("reward", "rule")]
)
def test_impossible_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        judged(**{f"algorithm__{field}": value})
    assert error.value.field == f"algorithm.{field}"
