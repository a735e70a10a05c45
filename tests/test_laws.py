"""Laws of whole scenarios, with real costs, links and memory: what must hold whatever the coefficients are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scenarios import OFF, PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim import simulate as simulation
from rlhfsim.costs import model as cost_model
from rlhfsim.costs.segment import Elapsed, Segment, transfer_seconds
from rlhfsim.errors import DoesNotFit, InputError
from rlhfsim.fold import unfolded
from rlhfsim.metrics import critical_path, rank_seconds, stage_seconds, step_seconds, total_seconds, whole
from rlhfsim.sim.links import LinkPool
from rlhfsim.timeline import Timeline, write

approx = pytest.approx
few = settings(max_examples=25, deadline=None)
everywhere = pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)

# Micro-batches of one sample: then an ideal GPU's seconds are proportional to samples, wherever they are.
EQUAL = OFF | {f"models.{role}.{field}": 1 for role in ("actor", "critic", "reference", "reward")
               for field in ("micro_batch_samples", "score_micro_batch_samples")}


def steps_of(strategy: str, engine: str, **changes: Any) -> float:
    return step_seconds(timeline_of(scenario(strategy, engine, **changes)))


def options(**chosen: Any) -> dict[str, Any]:
    return {f"strategy.{name}": value for name, value in chosen.items()}


# ---------------------------------------------------------------- placement wins nothing by itself


@st.composite
def placements(draw: st.DrawFn, *, equal_work: bool = False) -> dict[str, Any]:
    """A strategy, an engine, and options of the strategy."""
    strategy, engine = draw(st.sampled_from(PLACEMENTS))
    chosen: dict[str, Any] = {}
    if strategy != "disaggregated":
        chosen["calls"] = draw(st.sampled_from((1, 2)))
    if strategy == "interleaved":
        chosen |= {"ratio": draw(st.sampled_from((0.25, 0.4, 0.5, 0.75))), "mode": draw(st.sampled_from(("sync", "async"))),
                   "concat": draw(st.booleans())}
    if strategy == "disaggregated":
        chosen |= {"batches": draw(st.sampled_from((2, 4, 8))), "capacity": draw(st.integers(1, 2)),
                   "shadow_critic": draw(st.booleans()), "replicas": draw(st.sampled_from((1, 2))),
                   "spread": draw(st.sampled_from(("robin", "first"))),
                   "recompute_log_probs": equal_work or draw(st.booleans())}
    return {"strategy": strategy, "engine": engine, **options(**chosen)}


@few
@given(placements(equal_work=True), st.sampled_from((1, 2)))
def test_without_effects_no_placement_beats_colocation(placement: dict[str, Any], epochs: int) -> None:
    changes = {"algorithm.epochs": epochs, **EQUAL}
    assert steps_of(**placement, **changes) >= steps_of("colocated", "hybrid", **changes) * (1 - 1e-9)


def colocated_stages(**changes: Any) -> dict[str, float]:
    return stage_seconds(timeline_of(scenario("colocated", "hybrid", **EQUAL, **changes)))


@pytest.mark.parametrize("owners", range(1, 8))
def test_without_effects_interleaving_costs_the_slower_part(owners: int) -> None:
    """All lanes in one pass: every reference owner has 8/owners times a rank's work, every reward owner 8/(8-owners)."""
    alone = colocated_stages()
    scores = max(8 / owners * alone["ref"], 8 / (8 - owners) * alone["reward"])
    expected = sum(alone.values()) - alone["ref"] - alone["reward"] + scores
    found = steps_of("interleaved", "hybrid", **EQUAL, **options(ratio=owners / 8, concat=True))
    assert found == approx(expected, rel=1e-9)


@pytest.mark.parametrize("concat", [False, True])
def test_without_effects_interleaving_ties_at_the_ratio_of_the_work(monkeypatch: pytest.MonkeyPatch, concat: bool) -> None:
    """With equal heads reference and reward model take equally long: at one half nothing is lost."""
    monkeypatch.setattr(cost_model, "head_of", lambda model: "value")
    ties = steps_of("interleaved", "hybrid", **EQUAL, **options(ratio=0.5, concat=concat))
    assert ties == approx(steps_of("colocated", "hybrid", **EQUAL), rel=1e-9)


def test_sync_interleaving_serialises_reward_behind_the_reference() -> None:
    alone = colocated_stages()
    scores = max(2 * alone["ref"], alone["reward"]) + alone["reward"]
    expected = sum(alone.values()) - alone["ref"] - alone["reward"] + scores
    assert steps_of("interleaved", "hybrid", **EQUAL, **options(mode="sync")) == approx(expected, rel=1e-9)


@pytest.mark.parametrize("strategy", ["colocated", "interleaved"])
def test_without_effects_engines_are_equal(strategy: str) -> None:
    plain = steps_of(strategy, "hybrid", **EQUAL)
    assert steps_of(strategy, "engine", **EQUAL) == approx(plain, rel=1e-9)
    assert steps_of(strategy, "zero3_per_token", **EQUAL) == approx(plain, rel=1e-9)


@pytest.mark.parametrize("effects", [OFF, {}])
def test_colocated_depth_is_the_sum_of_its_stages(effects: dict[str, Any]) -> None:
    timeline = timeline_of(scenario("colocated", "hybrid", **effects))
    assert set(stage_seconds(timeline)) == {"gen", "old_log_prob", "ref", "reward", "values", "update_critic", "update_actor"}
    assert step_seconds(timeline) == approx(sum(stage_seconds(timeline).values()), rel=1e-9)


@pytest.mark.parametrize("batches", [1, 4])
def test_disaggregated_depth(batches: int) -> None:
    """Fill once, then the slowest stage sets the pace; the last update ends the iteration."""
    stages = stage_seconds(timeline_of(scenario("disaggregated", "engine", algorithm__minibatches=batches, **EQUAL,
                                                **options(batches=batches))))
    one = {name: seconds / batches for name, seconds in stages.items()}
    update = max(one["update_actor"], one["update_critic"])
    score = max(one["ref"], one["values"])
    pace = max(one["gen"], score, one["reward"], update)
    expected = one["gen"] + score + one["reward"] + update + (batches - 1) * pace
    found = steps_of("disaggregated", "engine", algorithm__minibatches=batches, **EQUAL, **options(batches=batches))
    assert found == approx(expected, rel=1e-9)


# ---------------------------------------------------------------- five effects

EFFECTS = ("decode", "links", "memory", "sync", "efficiency")
# Little memory for the engine, lengths with a tail, offloaded Adam: every effect has something to take away.
TIGHT = TAIL | {"models.actor.offload_optimizer": True, "generation.memory_fraction": 0.0025,
                "overheads.reserved_bytes": 0.0, "workload.prompts": 256}


@everywhere
def test_an_effect_less_is_never_slower(strategy: str, engine: str) -> None:
    whole_truth = steps_of(strategy, engine, **TAIL)
    for effect in EFFECTS:
        assert steps_of(strategy, engine, **TAIL, **{f"effects.{effect}": False}) <= whole_truth * (1 + 1e-9), effect


@pytest.mark.parametrize("effect", EFFECTS)
def test_every_effect_alone_makes_a_difference(effect: str) -> None:
    """With the other four off as well as on."""
    off = {f"effects.{effect}": False}
    on = {key: value for key, value in OFF.items() if key not in off}
    assert steps_of("colocated", "engine", **TIGHT, **off) < steps_of("colocated", "engine", **TIGHT) * 0.999
    if effect not in ("links", "memory"):  # links alone: nothing that takes time is left out; memory: decode spends it
        assert steps_of("colocated", "engine", **TIGHT, **OFF) < steps_of("colocated", "engine", **TIGHT, **on)


# ---------------------------------------------------------------- bytes of a weight sync


@dataclass
class Ran:
    """A segment that the simulator ran, and how long it took."""

    segment: Segment
    elapsed: Elapsed
    pool: LinkPool


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """All segments that are simulated from here on."""
    seen: list[Ran] = []

    class Recording(LinkPool):
        def run(self, segment: Segment) -> Generator[Any, Any, tuple[Elapsed, float]]:
            elapsed, alone = yield from super().run(segment)
            seen.append(Ran(segment, elapsed, self))
            return elapsed, alone

    monkeypatch.setattr("rlhfsim.sim.run.LinkPool", Recording)
    return seen


def synced_bytes(ran: list[Ran], op: str) -> float:
    """Of all transfers of one kind in weight syncs: payload times groups."""
    return sum(float(np.sum(t.payload_bytes)) * len(t.groups) for one in ran if one.segment.label.startswith("sync_")
               for t in one.segment.transfers if t.op == op)


LAYER = 4 * 512 * 512 + 3 * 512 * 1408  # of small-8x512: attention, gated MLP
BODY = 8 * (LAYER + 2 * 512) + 512 + 4096 * 512  # norms, embedding
ACTOR, CRITIC = BODY + 4096 * 512, BODY + 512


@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(1, 2), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("layout", [{"models.actor.zero_stage": 3}, {"models.actor.zero_stage": 1, "models.actor.tensor_parallel": 2}])
def test_p2p_sync_sends_every_replica_all_weights(
    ran: list[Ran], tensor_parallel: int, replicas: int, layout: dict[str, Any]
) -> None:
    engine_ranks = tensor_parallel * replicas
    ranks = {"shadow_actor": range(engine_ranks), "reference": [8, 9], "reward": [10], "shadow_critic": [11],
             "actor": [12, 13], "critic": [14, 15]}
    found = scenario("disaggregated", "engine", cluster__nodes=4, generation__tensor_parallel=tensor_parallel,
                     weight_sync__method="p2p", **layout, **{f"models.{m}.tensor_parallel": 1 for m in ("critic", "reference", "reward")},
                     **options(ranks={m: list(r) for m, r in ranks.items()}))
    timeline_of(found)
    assert synced_bytes(ran, "send") == 3 * 2 * (replicas * ACTOR + CRITIC)


def test_broadcast_sync_sends_weights_once(ran: list[Ran]) -> None:
    timeline_of(scenario("disaggregated", "engine", weight_sync__method="broadcast"))
    assert synced_bytes(ran, "broadcast") == 3 * 2 * (ACTOR + CRITIC)
    assert synced_bytes(ran, "send") == 0


def test_lora_sync_sends_only_the_factors(ran: list[Ran]) -> None:
    """A pair of factors beside every product of a layer: rank x (inputs + outputs)."""
    rank = 8
    factors = 8 * rank * (4 * (512 + 512) + 3 * (512 + 1408))
    timeline_of(scenario("disaggregated", "engine", **{"models.actor.lora_rank": rank, "models.critic.lora_rank": rank}))
    replicas = 2  # of two ranks that generate by default
    assert synced_bytes(ran, "send") == 3 * 2 * (replicas * factors + factors)


# ---------------------------------------------------------------- static memory


LLAMA_13B = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120 + 32000 * 5120  # and a head
PARAMETERS = {"actor": LLAMA_13B + 32000 * 5120, "reference": LLAMA_13B + 32000 * 5120,
              "critic": LLAMA_13B + 5120, "reward": LLAMA_13B + 5120}
MODEL_STATES = ("weights", "gradients", "optimizer")


def static_bytes_of(strategy: str, zero_stage: int, **changes: Any) -> dict[int, float]:
    """Model states by rank on 32 GPUs."""
    models = {f"models.{role}.zero_stage": zero_stage for role in PARAMETERS}
    setup = simulation.prepare(scenario(strategy, cluster__nodes=4, cluster__gpus_per_node=8, models__actor={"spec": "llama-13b"},
                                        **models, **changes))
    return {rank: sum(setup.memory.resting(rank).components[name] for name in MODEL_STATES) for rank in range(32)}


@pytest.mark.parametrize(("strategy", "zero_stage", "published_gigabytes"), [
    ("colocated", 2, 63.5 + 52.1), ("colocated", 3, 13.0 + 1.6), ("interleaved", 2, 63.5 + 26.0), ("interleaved", 3, 13.0 + 1.6)])
def test_model_states_are_those_of_zero(strategy: str, zero_stage: int, published_gigabytes: float) -> None:
    """Per GPU, 13B on 32: two trained models (ZeRO-2: 2 + 14/32, ZeRO-3: 16/32 bytes a parameter) and the frozen ones.

    published: Rajbhandari et al., "ZeRO", 2020, table 1, applied to four models of equal size (heads are ignored there).
    """
    trained = 2 + 14 / 32 if zero_stage == 2 else 16 / 32
    found = static_bytes_of(strategy, zero_stage)
    owners = {"reference": range(32), "reward": range(32)}
    if strategy == "interleaved":
        owners = {"reference": range(16), "reward": range(16, 32)}
    for rank in (0, 15, 16, 31):
        frozen = sum(2 * PARAMETERS[m] / (1 if zero_stage == 2 else len(own)) for m, own in owners.items() if rank in own)
        assert found[rank] == approx(trained * (PARAMETERS["actor"] + PARAMETERS["critic"]) + frozen, rel=1e-9)
        assert found[rank] == approx(published_gigabytes * 1e9, rel=0.015)


def test_model_states_of_disaggregation_are_of_one_model_each() -> None:
    """Predictors hold 2 bytes a parameter over their tensor-parallel ranks, trainers 16 over all of theirs."""
    split = {"shadow_actor": 8, "reference": 4, "shadow_critic": 4, "reward": 4, "actor": 8, "critic": 4}
    layout = {f"models.{m}.tensor_parallel": 4 for m in ("actor", "critic", "reference", "reward")}
    found = static_bytes_of("disaggregated", 1, generation__engine="engine", generation__tensor_parallel=2,
                            **layout, **options(split=split))
    engine = simulation.prepare  # the engine's own copy counts as `engine`, not as model states
    del engine
    assert found[0] == 0
    order = list(split)
    first = {m: sum(split[o] for o in order[:k]) for k, m in enumerate(order)}
    tied = {"reference": 2, "shadow_critic": 2, "reward": 2}
    for model, width in tied.items():
        size = PARAMETERS[model.removeprefix("shadow_")]
        assert found[first[model]] == approx(width * size / 4, rel=1e-3)  # norms are whole on every rank
    assert found[first["actor"]] == approx(PARAMETERS["actor"] / 4 * (2 + 2 + 12 / 2), rel=1e-3)
    assert found[first["critic"]] == approx(PARAMETERS["critic"] / 4 * 16, rel=1e-3)
