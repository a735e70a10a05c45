"""What engines can do, in whole scenarios: shared prompts, drafts, sleep."""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import scenario, timeline_of

from rlhfsim.errors import InputError
from rlhfsim.memory import cache_bytes_per_token, engine_weight_bytes
from rlhfsim.metrics import step_seconds
from rlhfsim.simulate import prepare
from rlhfsim.timeline import Timeline

approx = pytest.approx

# One GPU, links whose speed is all that counts for a copy, no other time of the host.
ALONE: dict[str, Any] = {
    "cluster.nodes": 1,
    "cluster.gpus_per_node": 1,
    "algorithm.minibatches": 1,
    "simulation.iterations": 3,
}
GROUPED = {"workload.responses_per_prompt": 8, "workload.prompt_tokens": 257, "workload.response_tokens": 40}


def spans(timeline: Timeline, stage: str) -> list[float]:
    return [s.seconds for s in timeline.spans if s.firing.stage == stage]


def counted(timeline: Timeline, name: str) -> float:
    return sum(s.counts.get(name, 0.0) for s in timeline.spans)


# ---------------------------------------------------------------- shared prompts and drafts


@pytest.mark.parametrize("strategy", ["colocated", "disaggregated", "partial_rollout", "asynchronous"])
def test_shared_prompts_are_computed_once_in_every_strategy(strategy: str) -> None:
    """Seven of eight responses find 256 of their 257 prompt tokens, where all are admitted together."""
    plain, shared = (
        timeline_of(scenario(strategy, "engine", **GROUPED | {"generation.prefix_caching": on})) for on in (False, True)
    )
    assert counted(plain, "reused_tokens") == 0
    samples = 64 * 8 * 3
    assert 0.8 * 7 / 8 * 256 * samples < counted(shared, "reused_tokens") < 1.4 * 7 / 8 * 256 * samples
    assert counted(shared, "replica_seconds") < counted(plain, "replica_seconds")


def test_a_place_with_whole_prompts_reuses_exactly_what_they_share() -> None:
    found = timeline_of(scenario("colocated", "engine", **ALONE | GROUPED | {"generation.prefix_caching": True}))
    assert counted(found, "reused_tokens") == 3 * 64 * 7 * 256


@pytest.mark.parametrize("strategy", ["colocated", "disaggregated", "asynchronous"])
def test_good_drafts_save_time_in_every_strategy(strategy: str) -> None:
    changes = {"workload.response_tokens": 400, "workload.prompts": 16}
    drafting = {"tokens": 3, "acceptance_length": 3.0, "layers": 0}
    plain = step_seconds(timeline_of(scenario(strategy, "engine", **changes)))
    fast = step_seconds(timeline_of(scenario(strategy, "engine", **changes, **{"generation.speculative": drafting})))
    useless = drafting | {"acceptance_length": 1, "layers": 4}
    slow = step_seconds(timeline_of(scenario(strategy, "engine", **changes, **{"generation.speculative": useless})))
    assert fast < plain < slow


def test_a_model_that_drafts_is_found_by_its_name() -> None:
    drafting = {"tokens": 4, "acceptance_length": 2.5, "draft": "opt-125m"}
    found = scenario("colocated", "engine", **{"generation.speculative": drafting}).generation.speculative
    assert found is not None and found.shape is not None and found.shape.layers == 12
    with pytest.raises(InputError, match="opt-125m") as error:
        scenario("colocated", "engine", **{"generation.speculative": drafting | {"draft": "opt-125"}})
    assert error.value.field == "generation.speculative.draft"


# ---------------------------------------------------------------- sleep


def copies(level: str | None, **changes: Any) -> Timeline:
    return timeline_of(scenario("colocated", "engine", **ALONE | {"generation.sleep": level} | changes))


def rate_of_copies() -> tuple[float, float]:
    """Bytes of the engine's weights, and the seconds that copying them once takes at the nominal rate."""
    found = scenario("colocated", "engine", **ALONE)
    held = engine_weight_bytes(found.models.actor, found.generation)
    return held, held / found.cluster.gpu.pcie_bytes_per_second.value


def test_level_1_copies_the_weights_out_and_in_once_an_iteration() -> None:
    """Out after generation, in before the sync; the copies reach most of the link's rate and no more than all of it."""
    awake, asleep = copies(None), copies("level_1")
    _, once = rate_of_copies()
    for stage in ("gen", "update_weights"):
        more = [b - a for a, b in zip(spans(awake, stage), spans(asleep, stage), strict=True)]
        assert all(once < m < 2 * once for m in more)
    assert spans(asleep, "update_actor") == approx(spans(awake, "update_actor"))


def test_level_2_forgets_the_weights_in_no_time() -> None:
    assert step_seconds(copies("level_2")) == step_seconds(copies(None))


@pytest.mark.parametrize("level", ["level_1", "level_2"])
def test_memory_that_is_mapped_takes_its_time(level: str) -> None:
    """Weights in the sync; weights and cache after generation, the cache before it."""
    rate = {"overheads.map_bytes_per_second": 50e9}
    plain, mapped = copies(level), copies(level, **rate)
    setup = prepare(scenario("colocated", "engine", **ALONE))
    tokens = setup.memory.kv_capacity_tokens
    assert tokens is not None
    weights, _ = rate_of_copies()
    cache = tokens * cache_bytes_per_token(setup.scenario.models.actor, setup.scenario.generation)
    expected = {"gen": (weights + 2 * cache) / 50e9, "update_weights": weights / 50e9}
    for stage, seconds in expected.items():
        assert [b - a for a, b in zip(spans(plain, stage), spans(mapped, stage), strict=True)] == approx([seconds] * 3)


def test_an_engine_that_sleeps_between_calls_brings_its_weights_back_itself() -> None:
    """Two calls an iteration: the first finds the weights of the sync, the second copies them in."""
    calls = {"strategy.calls": 2}
    awake, asleep = copies(None, **calls), copies("level_1", **calls)
    more = [b - a for a, b in zip(spans(awake, "gen"), spans(asleep, "gen"), strict=True)]
    assert more[1::2] == approx([2 * m for m in more[::2]], rel=0.01)
    with pytest.raises(InputError, match="2 times for each sync"):
        copies("level_2", **calls)


def test_an_engine_on_ranks_of_its_own_never_sleeps() -> None:
    def steps(level: str | None) -> float:
        return step_seconds(timeline_of(scenario("disaggregated", "engine", **{"generation.sleep": level})))

    assert steps("level_1") == steps("level_2") == steps(None)


def test_without_the_sync_effect_sleep_is_free() -> None:
    off = {"effects.sync": False, "overheads.map_bytes_per_second": 1e9}
    assert step_seconds(copies("level_1", **off)) == step_seconds(copies(None, **off))


def test_level_1_keeps_the_weights_on_the_host() -> None:
    """Of every rank of a node of four; level 2 keeps none."""
    weights, _ = rate_of_copies()
    for level, kept in (("level_1", 4 * weights), ("level_2", 0.0), (None, 0.0)):
        assert prepare(scenario("colocated", "engine", **{"generation.sleep": level})).fit().host_bytes == kept
    assert prepare(scenario("disaggregated", "engine", **{"generation.sleep": "level_1"})).fit().host_bytes == 0


def test_validation_leaves_the_weights_where_they_are() -> None:
    """It wakes the cache only; generation after it too."""
    changes = {"periodic.validation_every": 1}
    awake, asleep = copies(None, **changes), copies("level_1", **changes)
    assert spans(asleep, "testing") == approx(spans(awake, "testing"))
    _, once = rate_of_copies()
    more = [b - a for a, b in zip(spans(awake, "gen"), spans(asleep, "gen"), strict=True)]
    assert all(once < m < 2 * once for m in more)


def test_only_an_engine_with_weights_of_its_own_sleeps() -> None:
    with pytest.raises(InputError, match="sleep must be absent"):
        scenario("colocated", "hybrid", **{"generation.sleep": "level_1"})
