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
from conftest import by_stage, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import OFF, PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim import simulate as simulation
from rlhfsim.costs import model as cost_model
from rlhfsim.costs.segment import Elapsed, Segment
from rlhfsim.errors import DoesNotFit, InputError
from rlhfsim.fold import unfolded
from rlhfsim.graph import StageGraph
from rlhfsim.metrics import critical_path, rank_seconds, stage_seconds, step_seconds, total_seconds, whole
from rlhfsim.sim.links import LinkPool
from rlhfsim.timeline import Timeline, check, write

approx = pytest.approx
few = settings(max_examples=25, deadline=None)
everywhere = pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)

# Micro-batches of one sample: then an ideal GPU's seconds are proportional to samples, wherever they are.
EQUAL = OFF | {
    f"models.{role}.{field}": 1
    for role in ("actor", "critic", "reference", "reward")
    for field in ("micro_batch_samples", "score_micro_batch_samples")
}


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
        chosen |= {
            "ratio": draw(st.sampled_from((0.25, 0.4, 0.5, 0.75))),
            "mode": draw(st.sampled_from(("sync", "async"))),
            "concat": draw(st.booleans()),
        }
    if strategy == "disaggregated":
        shadow = draw(st.booleans())  # with a shadow critic two of eight ranks generate
        chosen |= {
            "batches": draw(st.sampled_from((2, 4, 8))),
            "capacity": draw(st.integers(1, 2)),
            "shadow_critic": shadow,
            "replicas": draw(st.sampled_from((1, 2))) if shadow else 1,
            "spread": draw(st.sampled_from(("robin", "first"))),
            "recompute_log_probs": equal_work or draw(st.booleans()),
        }
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
    """All lanes in one pass: a reference owner has 8/owners times a rank's work, a reward owner 8/(8-owners)."""
    alone = colocated_stages()
    scores = max(8 / owners * alone["ref"], 8 / (8 - owners) * alone["reward"])
    expected = sum(alone.values()) - alone["ref"] - alone["reward"] + scores
    found = steps_of("interleaved", "hybrid", **EQUAL, **options(ratio=owners / 8, concat=True))
    assert found == approx(expected, rel=1e-9)


@pytest.mark.parametrize("concat", [False, True])
def test_without_effects_interleaving_ties_at_the_ratio_of_the_work(
    monkeypatch: pytest.MonkeyPatch, concat: bool
) -> None:
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
    assert set(stage_seconds(timeline)) == {
        "gen",
        "old_log_prob",
        "ref",
        "reward",
        "values",
        "update_critic",
        "update_actor",
    }
    assert step_seconds(timeline) == approx(sum(stage_seconds(timeline).values()), rel=1e-9)


@pytest.mark.parametrize("batches", [1, 4])
def test_disaggregated_depth(batches: int) -> None:
    """Fill once, then the slowest stage sets the pace; the last update ends the iteration."""
    timeline = timeline_of(
        scenario("disaggregated", "engine", algorithm__minibatches=batches, **EQUAL, **options(batches=batches))
    )
    stages = stage_seconds(timeline)
    one = {name: seconds / batches for name, seconds in stages.items()}
    update = max(one["update_actor"], one["update_critic"])
    score = max(one["ref"], one["values"])
    pace = max(one["gen"], score, one["reward"], update)
    expected = one["gen"] + score + one["reward"] + update + (batches - 1) * pace
    assert step_seconds(timeline) == approx(expected, rel=1e-9)


# ---------------------------------------------------------------- five effects

EFFECTS = ("decode", "links", "memory", "sync", "efficiency")
# Little memory for the engine, lengths with a tail, offloaded Adam: every effect has something to take away.
TIGHT = TAIL | {
    "models.actor.offload_optimizer": True,
    "generation.memory_fraction": 0.0107,
    "overheads.reserved_bytes": 0.0,
    "workload.prompts": 256,
}


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
    return sum(
        float(np.sum(t.payload_bytes)) * len(t.groups)
        for one in ran
        if one.segment.label.startswith("sync_")
        for t in one.segment.transfers
        if t.op == op
    )


LAYER = 4 * 512 * 512 + 3 * 512 * 1408  # of small-8x512: attention, gated MLP
BODY = 8 * (LAYER + 2 * 512) + 512 + 4096 * 512  # norms, embedding
ACTOR, CRITIC = BODY + 4096 * 512, BODY + 512


@pytest.mark.parametrize(("tensor_parallel", "replicas"), [(1, 2), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize(
    "layout", [{"models.actor.zero_stage": 3}, {"models.actor.zero_stage": 1, "models.actor.tensor_parallel": 2}]
)
def test_p2p_sync_sends_every_replica_all_weights(
    ran: list[Ran], tensor_parallel: int, replicas: int, layout: dict[str, Any]
) -> None:
    engine_ranks = tensor_parallel * replicas
    ranks = {
        "shadow_actor": range(engine_ranks),
        "reference": [8, 9],
        "reward": [10],
        "shadow_critic": [11],
        "actor": [12, 13],
        "critic": [14, 15],
    }
    found = scenario(
        "disaggregated",
        "engine",
        cluster__nodes=4,
        generation__tensor_parallel=tensor_parallel,
        weight_sync__method="p2p",
        **layout,
        **{f"models.{m}.tensor_parallel": 1 for m in ("critic", "reference", "reward")},
        **options(ranks={m: list(r) for m, r in ranks.items()}),
    )
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
    timeline_of(
        scenario("disaggregated", "engine", **{"models.actor.lora_rank": rank, "models.critic.lora_rank": rank})
    )
    replicas = 2  # of two ranks that generate by default
    assert synced_bytes(ran, "send") == 3 * 2 * (replicas * factors + factors)


# ---------------------------------------------------------------- static memory


LLAMA_13B = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120 + 32000 * 5120  # and a head
PARAMETERS = {
    "actor": LLAMA_13B + 32000 * 5120,
    "reference": LLAMA_13B + 32000 * 5120,
    "critic": LLAMA_13B + 5120,
    "reward": LLAMA_13B + 5120,
}
MODEL_STATES = ("weights", "gradients", "optimizer")


def static_bytes_of(strategy: str, zero_stage: int, **changes: Any) -> dict[int, float]:
    """Model states by rank on 32 GPUs."""
    models = {f"models.{role}.zero_stage": zero_stage for role in PARAMETERS}
    setup = simulation.prepare(
        scenario(
            strategy,
            cluster__nodes=4,
            cluster__gpus_per_node=8,
            models__actor={"spec": "llama-13b"},
            **models,
            **changes,
        )
    )
    return {rank: sum(setup.memory.resting(rank).components[name] for name in MODEL_STATES) for rank in range(32)}


@pytest.mark.parametrize(
    ("strategy", "zero_stage", "by_hand_gigabytes"),
    [
        ("colocated", 2, 63.5 + 52.1),
        ("colocated", 3, 13.0 + 1.6),
        ("interleaved", 2, 63.5 + 26.0),
        ("interleaved", 3, 13.0 + 1.6),
    ],
)
def test_model_states_are_those_of_zero(strategy: str, zero_stage: int, by_hand_gigabytes: float) -> None:
    """Per GPU, 13B on 32: two trained models (ZeRO-2: 2 + 14/32, ZeRO-3: 16/32 bytes a parameter), and frozen ones.

    ZeRO's bytes a parameter: Rajbhandari et al., "ZeRO", 2020, section 3.1. by_hand: for four models of 13.02e9
    parameters, heads alike.
    """
    trained = 2 + 14 / 32 if zero_stage == 2 else 16 / 32
    found = static_bytes_of(strategy, zero_stage)
    owners = {"reference": range(32), "reward": range(32)}
    if strategy == "interleaved":
        owners = {"reference": range(16), "reward": range(16, 32)}
    for rank in (0, 15, 16, 31):
        frozen = sum(
            2 * PARAMETERS[m] / (1 if zero_stage == 2 else len(own)) for m, own in owners.items() if rank in own
        )
        assert found[rank] == approx(trained * (PARAMETERS["actor"] + PARAMETERS["critic"]) + frozen, rel=1e-9)
        assert found[rank] == approx(by_hand_gigabytes * 1e9, rel=0.015)


def test_model_states_of_disaggregation_are_of_one_model_each() -> None:
    """Predictors hold 2 bytes a parameter over their tensor-parallel ranks, trainers 16 over all of theirs."""
    split = {"shadow_actor": 8, "reference": 4, "shadow_critic": 4, "reward": 4, "actor": 8, "critic": 4}
    layout = {f"models.{m}.tensor_parallel": 4 for m in ("actor", "critic", "reference", "reward")}
    found = static_bytes_of(
        "disaggregated", 1, generation__engine="engine", generation__tensor_parallel=2, **layout, **options(split=split)
    )
    assert found[0] == 0  # the engine's own copy counts as `engine`
    order = list(split)
    first = {m: sum(split[o] for o in order[:k]) for k, m in enumerate(order)}
    tied = {"reference": 2, "shadow_critic": 2, "reward": 2}
    for model, width in tied.items():
        size = PARAMETERS[model.removeprefix("shadow_")]
        assert found[first[model]] == approx(width * size / 4, rel=1e-3)  # norms are whole on every rank
    assert found[first["actor"]] == approx(PARAMETERS["actor"] / 4 * (2 + 2 + 12 / 2), rel=1e-3)
    assert found[first["critic"]] == approx(PARAMETERS["critic"] / 4 * 16, rel=1e-3)


# ---------------------------------------------------------------- where time goes


@few
@given(placements(), st.integers(0, 3), st.sampled_from(({}, TAIL)))
def test_every_rank_second_is_counted_once(placement: dict[str, Any], seed: int, lengths: dict[str, Any]) -> None:
    timeline = timeline_of(scenario(**placement, **lengths), seed)  # its spans are checked
    account = rank_seconds(timeline)
    assert all((seconds >= 0).all() for seconds in account.values())
    np.testing.assert_allclose(sum(account.values()), whole(timeline).seconds, rtol=1e-9)
    stages = sum(stage_seconds(timeline).values())
    path = critical_path(timeline)
    assert path.seconds <= path.window.seconds * (1 + 1e-9)
    # Data on their way between stages take time in no stage: they are waited for or hidden.
    waits = sum(s.data_seconds for s in timeline.spans) / max(1, timeline.iterations - 1)
    assert step_seconds(timeline) <= stages + waits + 1e-9


FASTER = {
    "compute": "gpu.flops_per_second.bf16",
    "memory": "gpu.memory_bytes_per_second",
    "nvlink": "gpu.nvlink_bytes_per_second",
    "pcie": "gpu.pcie_bytes_per_second",
    "nic": "network.nic_bytes_per_second",
    "host": "node.host_memory_bytes_per_second",
}


def with_faster(part: str, factor: float, **placement: Any) -> float:
    """Step time with one rate of the cluster times `factor`."""
    found = scenario(**placement)
    if factor == 1:
        return step_seconds(timeline_of(found))
    value: Any = found.cluster
    for name in FASTER[part].split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return step_seconds(
        timeline_of(
            scenario(
                **placement, **{f"cluster.{FASTER[part]}": {"value": factor * value.value, "source": "unverified"}}
            )
        )
    )


@few
@given(
    st.sampled_from(PLACEMENTS),
    st.sampled_from(sorted(FASTER)),
    st.floats(1.1, 10),
    st.sampled_from(({}, TAIL)),
    st.sampled_from((0, 1, 2, 3)),
)
def test_faster_hardware_is_never_slower(
    placement: tuple[str, str], part: str, factor: float, lengths: dict[str, Any], zero_stage: int
) -> None:
    changes = {
        "strategy": placement[0],
        "engine": placement[1],
        "models.actor.offload_optimizer": part in ("pcie", "host"),
        "models.actor.zero_stage": zero_stage,
        **lengths,
    }
    assert with_faster(part, factor, **changes) <= with_faster(part, 1, **changes) * (1 + 1e-9)


def test_on_a_shared_link_faster_can_be_slower() -> None:
    """Why the law above is no theorem where transfers share links: `late` ends earlier, so its message gets in the way.

    Messages of 10 bytes at 1 byte/s. Alone, that of `early` is there at 15 s; it shares the link from 10 s on if `late`
    takes 10 s instead of 20, and is there at 20 s.
    """
    graph = StageGraph()
    for giver, taker, ranks in (("early", "critical", (0, 2)), ("late", "short", (1, 3))):
        graph.stage(giver, "score", giver, ranks[:1])
        graph.stage(taker, "score", taker, ranks[1:])
        graph.link(giver, taker, stream=True, carries=("tokens",))
    seconds = {"early": 5.0, "late": 20.0, "critical": 100.0, "short": 1.0}
    ends = [
        simulate(graph, by_stage(seconds | {"late": late}), message_bytes=10.0).end_seconds for late in (20.0, 10.0)
    ]
    assert ends == approx([115, 120])


@pytest.mark.parametrize("part", sorted(FASTER))
def test_every_rate_matters_somewhere(part: str) -> None:
    changes = {
        "strategy": "disaggregated",
        "engine": "engine",
        "models.actor.offload_optimizer": True,
        "models.critic.offload_optimizer": True,
        "models.actor.spec": "qwen2.5-0.5b",
    }
    assert with_faster(part, 1, **changes) < with_faster(part, 0.25, **changes)


# ---------------------------------------------------------------- no more than the hardware gives

PEAK_FLOPS, HBM, NIC = 312e12, 2039e9, 25e9  # of an A100-SXM 80 GB and its cluster, one direction


@everywhere
@pytest.mark.parametrize("effects", [OFF, {}])
def test_no_stage_computes_faster_than_the_peak(strategy: str, engine: str, effects: dict[str, Any]) -> None:
    """Products alone: 2 operations a weight and token forward; training 6 and 2 more of layers that are recomputed."""
    one_iteration = {"simulation.iterations": 1, "models.actor.spec": "llama-7b", **effects, "effects.memory": False}
    timeline = timeline_of(scenario(strategy, engine, **one_iteration))
    layers, head, tokens = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096, 64 * (64 + 128)
    work = {
        "gen": 2 * layers,
        "old_log_prob": 2 * (layers + head),
        "ref": 2 * (layers + head),
        "reward": 2 * layers,
        "values": 2 * layers,
        "update_actor": 8 * layers + 6 * head,
        "update_critic": 8 * layers,
    }
    spent: dict[str, float] = dict.fromkeys(work, 0.0)
    for span in timeline.spans:
        if span.kind in ("generate", "score", "train"):
            stage = span.firing.stage.partition(".")[0]
            spent[stage] += sum(span.compute_seconds) / len(span.compute_seconds) * len(span.ranks)
    for stage, seconds in spent.items():
        if seconds > 0:
            share = work[stage] * tokens / seconds / PEAK_FLOPS
            assert share <= 1, stage
            assert share > 0.55 or not effects, stage  # ideal kernels come near it, so that the law can fail


@pytest.mark.parametrize(
    ("engine", "tensor_parallel"), [("zero3_per_token", 1), ("hybrid", 1), ("hybrid", 2), ("engine", 2)]
)
def test_decoding_reads_weights_no_faster_than_the_memory(engine: str, tensor_parallel: int) -> None:
    """One sequence per engine, no host time: a step reads all weights but the embedding, little else, and launches."""
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096) / tensor_parallel
    timeline = timeline_of(
        scenario(
            "colocated",
            engine,
            cluster__nodes=1,
            workload__prompts=4 // tensor_parallel,
            generation__tensor_parallel=tensor_parallel,
            generation__cuda_graphs=True,
            overheads__decode_step_seconds=0.0,
            algorithm__minibatches=1,
            simulation__iterations=1,
            **{"models.actor.spec": "llama-7b"},
        )
    )
    for span in timeline.of(stage="gen"):
        read_seconds = 127 * weights / HBM
        assert read_seconds < span.bound["hbm"] < 1.35 * read_seconds
        assert all(seconds > span.bound["hbm"] for seconds in span.compute_seconds)


@everywhere
def test_no_link_carries_more_than_its_rate(ran: list[Ran], strategy: str, engine: str) -> None:
    timeline = timeline_of(scenario(strategy, engine, **TAIL))
    carried: dict[str, float] = {}
    for one in ran:
        topology = one.pool.topology
        for t in one.segment.transfers:
            payload = float(
                np.broadcast_to(np.asarray(t.payload_bytes, float), one.segment.repeats.shape) @ one.segment.repeats
            )
            for link, per_byte in topology.route(t.op, t.groups).usage.items():
                assert payload * per_byte <= topology.capacities[link] * one.elapsed.seconds * (1 + 1e-9)
                carried[link] = carried.get(link, 0.0) + payload * per_byte
    assert carried
    for link, byte_count in carried.items():
        assert byte_count <= ran[0].pool.topology.capacities[link] * timeline.end_seconds * (1 + 1e-9)


def test_weights_cross_nodes_no_faster_than_the_network() -> None:
    """Into each of 4 engines of one GPU in turn; a GPU has two NICs in a node of four GPUs and eight NICs."""
    ranks = {
        "shadow_actor": [0, 1, 2, 3],
        "reference": [8],
        "reward": [9],
        "shadow_critic": [10],
        "actor": [4, 5, 6, 7],
        "critic": [11],
    }
    found = scenario(
        "disaggregated", "engine", cluster__nodes=3, **options(ranks=ranks), **{"models.actor.spec": "qwen2.5-0.5b"}
    )
    weights = 2 * 494_032_768  # huggingface.co/Qwen/Qwen2.5-0.5B, number of parameters, tied embeddings
    seconds = stage_seconds(timeline_of(found))["update_weights"]
    assert 4 * weights / (2 * NIC) < seconds < 4 * weights / (0.2 * NIC)


# ---------------------------------------------------------------- the tail of response lengths

UNPADDED = {"workload.padded": False, "effects.links": False, "models.actor.micro_batch_samples": 2}


def update_seconds(zero_stage: int, **lengths: Any) -> tuple[float, float]:
    """Of the actor's updates in all iterations: seconds, and mean seconds of waiting for peers."""
    spans = timeline_of(
        scenario(
            "colocated",
            "hybrid",
            models__actor={"spec": "small-8x512", "zero_stage": zero_stage},
            **UNPADDED,
            **lengths,
        )
    ).of(stage="update_actor")
    return sum(s.seconds for s in spans), sum(float(np.mean(s.peer_seconds)) for s in spans)


def test_ranks_wait_for_the_slowest_where_the_framework_lets_them_meet() -> None:
    """ZeRO-3: at every layer. ZeRO-2: at every backward. ZeRO-1: at the accumulation boundary."""
    (three, waits3), (two, waits2), (one, waits1) = (update_seconds(stage, **TAIL) for stage in (3, 2, 1))
    assert three >= two * (1 - 1e-9) and two > one * 1.001
    assert waits3 >= waits2 * (1 - 1e-9) and waits2 > waits1 * 1.001 and waits1 > 0


def test_equal_lengths_leave_nothing_to_wait_for() -> None:
    found = [update_seconds(stage) for stage in (3, 2, 1)]
    assert [waits for _, waits in found] == approx([0, 0, 0], abs=1e-12)
    assert len({round(seconds, 9) for seconds, _ in found}) == 1


@pytest.mark.parametrize("engine", ["hybrid", "engine"])
def test_a_tail_of_lengths_makes_ranks_differ(engine: str) -> None:
    """Every replica generates until its own longest response."""
    for lengths, alike in ((TAIL, False), ({}, True)):
        spans = timeline_of(scenario("colocated", engine, **lengths)).of(stage="gen", iteration=0)
        computing = [seconds for s in spans for seconds in s.compute_seconds]
        assert (max(computing) < min(computing) * 1.001) == alike


# ---------------------------------------------------------------- periods

PERIODS = {"periodic.checkpoint_every": 2, "periodic.validation_every": 3, "periodic.validation_prompts": 64}


@everywhere
def test_steps_are_without_validation_and_checkpoints(strategy: str, engine: str) -> None:
    plain = steps_of(strategy, engine, simulation__iterations=6)
    assert steps_of(strategy, engine, simulation__iterations=6, **PERIODS) == approx(plain, rel=1e-9)


def test_periodic_seconds_are_amortised() -> None:
    """Weights, master weights and two moments over the storage's rate, every 2nd iteration; generation, every 3rd."""
    found = scenario("colocated", "engine", periodic__checkpoint_bytes_per_second=1e9, **PERIODS)
    generation = stage_seconds(timeline_of(scenario("colocated", "engine")))["gen"]  # of 64 prompts, too
    expected = (ACTOR + CRITIC) * (2 + 4 + 8) / 1e9 / 2 + generation / 3
    assert simulation.periodic_seconds(simulation.prepare(found)) == approx(expected, rel=1e-9)


def test_what_comes_in_every_iteration_is_part_of_the_step() -> None:
    plain = steps_of("colocated", "engine")
    found = scenario("colocated", "engine", periodic__checkpoint_every=1, periodic__checkpoint_bytes_per_second=1e9)
    assert step_seconds(timeline_of(found)) == approx(plain + (ACTOR + CRITIC) * 14 / 1e9, rel=1e-9)
    assert simulation.periodic_seconds(simulation.prepare(found)) == 0


# ---------------------------------------------------------------- the same again


def written(timeline: Timeline, path: Path) -> bytes:
    write(timeline, path)
    return path.read_bytes()


AGAIN = """
import sys
from scenarios import TAIL, scenario, timeline_of
from rlhfsim.timeline import write
write(timeline_of(scenario("disaggregated", "engine", **TAIL), int(sys.argv[2])), sys.argv[1])
"""


def test_same_seed_same_bytes_in_any_process(tmp_path: Path) -> None:
    here = written(timeline_of(scenario("disaggregated", "engine", **TAIL), 7), tmp_path / "here")
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    for hash_seed in ("1", "2"):
        there = tmp_path / hash_seed
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(folders)}
        subprocess.run([sys.executable, "-c", AGAIN, str(there), "7"], env=environment, check=True, timeout=60)
        assert there.read_bytes() == here
    assert written(timeline_of(scenario("disaggregated", "engine", **TAIL), 8), tmp_path / "other") != here


@everywhere
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"models.actor.zero_stage": 1},
        {"algorithm.epochs": 2, "workload.padded": False},
        {"models.share_actor_critic": True},
        {"models.actor.zero_stage": 1, "models.actor.tensor_parallel": 2},
        {"weight_sync.method": "broadcast"},
        OFF,
    ],
)
def test_folding_symmetric_ranks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, strategy: str, engine: str, changes: dict[str, Any]
) -> None:
    placed = (
        {"generation.tensor_parallel": 2}
        if engine != "zero3_per_token" and "models.actor.tensor_parallel" in changes
        else {}
    )
    if "models.actor.tensor_parallel" in changes and strategy == "disaggregated":
        placed |= {"cluster.nodes": 4}
    found = scenario(strategy, engine, **changes, **placed)
    folded = timeline_of(found)
    monkeypatch.setattr(simulation, "folded_graph", lambda setup, lengths: unfolded(setup.graph))
    plain = timeline_of(found)
    assert len(folded.spans) <= len(plain.spans)
    assert step_seconds(folded) == approx(step_seconds(plain), rel=1e-9)
    for ours, theirs in (
        (stage_seconds(folded), stage_seconds(plain)),
        (total_seconds(rank_seconds(folded)), total_seconds(rank_seconds(plain))),
    ):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == approx([theirs[key] for key in ours], rel=1e-9, abs=1e-9 * step_seconds(plain))


# ---------------------------------------------------------------- options

HOLDERS = ("actor", "critic", "reference", "reward")


def everyone(**fields: Any) -> dict[str, Any]:
    """The same for all four models."""
    return {f"models.{role}.{name}": value for role in HOLDERS for name, value in fields.items()}


def trained(**fields: Any) -> dict[str, Any]:
    return {f"models.{role}.{name}": value for role in ("actor", "critic") for name, value in fields.items()}


def seconds_and_bytes(strategy: str, engine: str, changes: dict[str, Any]) -> tuple[float, float]:
    """Of a step, and on a rank that trains the actor; of models that are large enough to be bound by products."""
    setup = simulation.prepare(
        scenario(
            strategy,
            engine,
            cluster__nodes=4,
            effects__memory=False,
            workload__prompts=128,
            **{"models.actor.spec": "llama-7b"},
            **changes,
        )
    )
    return step_seconds(check(simulation.simulate(setup))), setup.fit().by_phase["update_actor"].bytes.total


@pytest.mark.parametrize(
    ("strategy", "engine"), [("colocated", "hybrid"), ("interleaved", "engine"), ("disaggregated", "engine")]
)
@pytest.mark.parametrize(
    ("base", "change", "slower", "fuller"),
    [
        # What each option does to the step's time and to the bytes: +1 more, -1 less, 0 either.
        ({}, {"models.share_actor_critic": True}, -1, 0),
        ({}, trained(lora_rank=8), 0, -1),
        ({}, trained(trainable_layers=2), -1, -1),
        ({}, trained(offload_optimizer=True), 1, -1),
        ({}, everyone(offload_parameters=True), 1, -1),
        ({"effects.links": False}, everyone(recompute="none"), -1, 1),  # else it may hide behind ZeRO-3's gathers
        ({"effects.links": False}, everyone(recompute="selective"), -1, 1),
        ({}, everyone(precision="fp32"), 1, 1),
        ({}, everyone(micro_batch_samples=1, score_micro_batch_samples=1), 1, -1),
        ({}, everyone(flash_attention=False), 0, 1),  # of so short sequences about as fast
        ({}, {"workload.padded": False} | TAIL, -1, 0),
        (everyone(zero_stage=0), everyone(zero_stage=1), 0, -1),
        (everyone(zero_stage=1), everyone(zero_stage=2), 0, -1),
        (everyone(zero_stage=2), everyone(zero_stage=3), 1, -1),
    ],
)
def test_options_change_what_they_should(
    strategy: str, engine: str, base: dict[str, Any], change: dict[str, Any], slower: int, fuller: int
) -> None:
    if "workload.padded" in change:
        base = base | TAIL
    (before, bytes_before), (after, bytes_after) = (
        seconds_and_bytes(strategy, engine, c) for c in (base, base | change)
    )
    if strategy == "disaggregated" and "models.share_actor_critic" in change:
        slower = 0  # the ranks are divided anew
    if slower:
        assert slower * (after - before) > 0
    if fuller:
        assert fuller * (bytes_after - bytes_before) > 0


SIZES = (1, 2, 4)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "models.share_actor_critic": st.booleans(),
    "models.actor.lora_rank": st.sampled_from((0, 4)),
    "models.critic.trainable_layers": st.sampled_from((None, 1, 5)),
    "models.actor.offload_optimizer": st.booleans(),
    "models.reference.offload_parameters": st.booleans(),
    "models.actor.offload_parameters": st.booleans(),
    "models.actor.zero_stage": st.integers(0, 3),
    "models.critic.zero_stage": st.integers(0, 3),
    "models.actor.tensor_parallel": st.sampled_from(SIZES),
    "models.actor.pipeline_parallel": st.sampled_from(SIZES),
    "models.reward.tensor_parallel": st.sampled_from(SIZES),
    "models.actor.pipeline_chunks": st.sampled_from((1, 2)),
    "models.actor.precision": st.sampled_from(("bf16", "fp16", "fp32")),
    "models.actor.sequence_parallel": st.booleans(),
    "models.actor.recompute": st.sampled_from(("none", "selective", "full")),
    "models.actor.micro_batch_samples": st.integers(1, 40),
    "models.actor.logits_chunk_tokens": st.sampled_from((None, 100)),
    "models.actor.flash_attention": st.booleans(),
    "workload.padded": st.booleans(),
    "workload.prompts": st.integers(1, 70),
    "workload.responses_per_prompt": st.integers(1, 3),
    "workload.response_tokens": st.sampled_from((1, 128, TAIL["workload.response_tokens"])),
    "algorithm.epochs": st.integers(1, 2),
    "algorithm.minibatches": st.integers(1, 3),
    "generation.tensor_parallel": st.sampled_from(SIZES),
    "generation.batching": st.sampled_from((None, "static", "continuous")),
    "generation.batch_samples": st.sampled_from((None, 1, 3)),
    "generation.max_sequences": st.sampled_from((1, 5, 256)),
    "generation.memory_fraction": st.sampled_from((None, 0.002, 0.5)),
    "generation.routing": st.sampled_from(("static", "least_loaded")),
    "generation.prefill_tokens": st.sampled_from((16, 8192)),
    "generation.memory_fraction_covers": st.sampled_from(("profile", "profile_and_graphs", "static")),
    "generation.kv_cache_tokens": st.sampled_from((None, 64, 2000)),
    "generation.prefix_caching": st.booleans(),
    "generation.speculative": st.sampled_from((None, {"tokens": 3, "acceptance_length": 2.4})),
    "generation.sleep": st.sampled_from((None, "level_1", "level_2")),
    "models.actor.offload_states": st.sampled_from((None, "optimizer", "all", "image", "calls")),
    "models.critic.offload_states": st.sampled_from((None, "optimizer", "all")),
    "models.actor.gradient_precision": st.sampled_from((None, "fp32")),
    "weight_sync.method": st.sampled_from(("p2p", "broadcast")),
    "weight_sync.bucket_bytes": st.sampled_from((1e6, 1e9)),
    "overheads.controller_bytes_per_second": st.sampled_from((None, 1e9)),
    "cluster.nodes": st.integers(1, 4),
    "cluster.gpus_per_node": st.sampled_from((1, 3, 4)),
    "cluster.spec": st.sampled_from(("a100-80g-sxm", "h100-80g-pcie", "v100-32g-sxm", "h100-80g-sxm-oversubscribed")),
    "periodic.validation_every": st.integers(0, 2),
    "periodic.checkpoint_every": st.integers(0, 2),
    **{f"effects.{name}": st.booleans() for name in EFFECTS},
}


@settings(max_examples=80, deadline=None)
@given(placements(), st.data())
def test_any_options_simulate_or_are_refused(placement: dict[str, Any], data: st.DataObject) -> None:
    """Nothing but InputError and DoesNotFit comes out, and every timeline keeps its promises."""
    names = data.draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=6, unique=True))
    changes = {name: data.draw(CHANGES[name], label=name) for name in names}
    try:
        setup = simulation.prepare(scenario(**placement, **{"simulation.iterations": 2} | changes))
        fit = setup.fit()
        timeline = check(simulation.simulate(setup))
    except (InputError, DoesNotFit) as error:
        assert str(error)
        return
    assert step_seconds(timeline) >= 0 and fit.worst.bytes.total > 0
    assert {s.firing.iteration for s in timeline.spans} == {0, 1}
