"""States of trained models: in which precision gradients are kept, what leaves for the host between uses, and when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenarios import scenario, timeline_of
from test_passes import HOST, LLAMA, OPS, equal, layout, moved, seconds, use

from rlhfsim.costs.passes import train_program
from rlhfsim.errors import InputError
from rlhfsim.memory import (
    MASTER_BYTES,
    MOMENT_BYTES,
    RESERVED_BYTES,
    Bytes,
    gathered_bytes,
    rounding_bytes,
    scoring_bytes,
    static_bytes,
    training_bytes,
)
from rlhfsim.metrics import step_seconds
from rlhfsim.model import layer_parameters, parameters
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import prepare
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Timeline

approx = pytest.approx
COUNT = parameters(LLAMA)
LEVELS = ("optimizer", "all", "image")


# --- gradients in fp32 -----------------------------------------------------------------------------------------------


def test_megatron_keeps_18_bytes_a_parameter_of_which_the_distributed_optimizer_shards_12() -> None:
    """docs/user-guide/features/dist_optimizer.md of Megatron-LM: bf16 weights with fp32 gradients take 18 bytes a
    parameter, 6 + 12 / d with the distributed optimizer on d ranks."""
    for ranks in (1, 8):
        held = static_bytes(use(zero_stage=1, gradient_precision="fp32"), "train", ranks)
        assert held.total / COUNT == approx(6 + 12 / ranks)
    assert static_bytes(use(zero_stage=0, gradient_precision="fp32"), "train", 8).total / COUNT == approx(18)


def test_fsdp_shards_the_master_and_no_copy_of_it() -> None:
    """fp32 weights, gradients and moments: 16 bytes a parameter; two units are gathered at a time in bf16, one's
    gradients reduced."""
    u = use(zero_stage=3, gradient_precision="fp32")
    held = static_bytes(u, "train", 8)
    assert (held.weights, held.gradients, held.optimizer) == approx((COUNT / 2, COUNT / 2, COUNT))
    assert static_bytes(u, "frozen", 8) == static_bytes(use(zero_stage=3), "frozen", 8)
    layer = layer_parameters(LLAMA)  # larger than embedding and head
    assert gathered_bytes(u, 8) == 2 * layer * 2
    assert training_bytes(u, 8, 512, 512).buffers == layer * (2 + 4)


@pytest.mark.parametrize(
    ("stage", "op", "calls"),
    [(0, "all_reduce", 1), (1, "all_reduce", 1), (2, "all_reduce", 2), (3, "reduce_scatter", 2)],
)
def test_gradients_in_fp32_are_twice_the_bytes(stage: int, op: str, calls: int) -> None:
    """Once a micro-batch or once in all; weights are gathered as before."""
    found = []
    for precision in (None, "fp32"):
        u = use(zero_stage=stage, micro_batch_samples=2, gradient_precision=precision)
        found.append(moved(train_program(u, equal(8, 4), layout(u, 8), OPS)))
    half, whole = found
    assert half.pop(op) == approx(calls * 2 * COUNT)
    assert whole.pop(op) == approx(calls * 4 * COUNT)
    assert half == whole


def test_a_buffer_of_gradients_is_reduced_where_it_lies() -> None:
    for precision, buckets in ((None, 2 * 5e8 * 2), ("fp32", 0)):
        assert training_bytes(use(zero_stage=1, gradient_precision=precision), 8, 512, 512).buffers == buckets


# --- a part of the optimizer on the host -----------------------------------------------------------------------------


@given(st.floats(0.01, 1))
def test_a_part_of_the_optimizer_is_so_much_less_on_the_gpu(part: float) -> None:
    u = use(zero_stage=1, offload_optimizer=True, offload_optimizer_fraction=part)
    held, none = static_bytes(u, "train", 8), static_bytes(use(zero_stage=1), "train", 8)
    assert held.optimizer == approx((1 - part) * none.optimizer)
    assert held.host == approx(part * 16 * COUNT / 8)
    assert (held.weights, held.gradients) == (none.weights, none.gradients)
    found = moved(train_program(u, equal(8, 4), layout(u, 8), OPS, host=HOST))
    assert found["to_host"] == found["from_host"] == approx(part * 2 * COUNT)  # of 8 ranks together


def test_half_an_optimizer_on_the_host_takes_half_the_time_there() -> None:
    def step(**settings: Any) -> float:
        u = use(zero_stage=1, **settings)
        return seconds(train_program(u, equal(8, 4), layout(u, 8), OPS, host=HOST), 1e10)

    here, half, there = step(), *(step(offload_optimizer=True, offload_optimizer_fraction=f) for f in (0.5, 1))
    update = OPS.optimizer_step(use(), COUNT / 8).seconds
    assert half - (here - update) == approx((there - (here - update)) / 2)


# --- host memory beside states ---------------------------------------------------------------------------------------


def power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def test_pinned_tensors_take_powers_of_two() -> None:
    """LLaMA 7B, matrix by matrix: qkv in one, gate and up in one."""
    matrices = 32 * [3 * 4096 * 4096, 4096 * 4096, 2 * 11008 * 4096, 11008 * 4096] + 2 * [32000 * 4096]
    lost = {width: sum(power(width * m) - width * m for m in matrices) for width in (2, 4)}
    frozen = rounding_bytes(use(zero_stage=0, offload_parameters=True), "frozen", 1)
    assert frozen == approx(lost[2], rel=1e-3)  # norms are left out
    trained = rounding_bytes(use(zero_stage=1, offload_optimizer=True), "train", 8)
    assert trained == approx(2 * lost[4] / 8, rel=1e-3)  # master weights and gradients
    assert rounding_bytes(use(zero_stage=1), "train", 8) == 0
    assert rounding_bytes(use(zero_stage=1, offload_states="all"), "train", 8) == 0


def test_processes_take_host_and_device_memory() -> None:
    """One that trains and one of an engine on each of 4 GPUs; engines on GPUs of their own have them alone."""
    more = {"overheads.process_host_bytes": 3e9, "overheads.engine_process_bytes": RESERVED_BYTES}
    plain, both = (prepare(leaves("all", **extra)).fit() for extra in ({}, more))
    assert both.host == plain.host | {"processes": 4 * 2 * 3e9}
    for phase, instant in both.by_phase.items():
        assert instant.bytes.reserved == plain.by_phase[phase].bytes.reserved + RESERVED_BYTES
    apart = [prepare(scenario("disaggregated", "engine", **extra)).fit() for extra in ({}, more)]
    assert apart[0].worst.bytes == apart[1].worst.bytes
    assert apart[1].host_bytes == 4 * 3e9  # of a node


def test_a_share_of_host_memory_is_the_limit() -> None:
    needed = prepare(leaves("all")).fit().host_bytes
    memory = {"cluster.node.host_memory_bytes": {"value": needed / 0.95 - 1, "source": "unverified"}}
    assert prepare(leaves("all", **memory)).fit().fits
    tight = prepare(leaves("all", **memory, **{"overheads.host_memory_share": 0.95})).fit()
    assert not tight.fits and "host memory per node (states " in tight.reason


# --- what a pass keeps -----------------------------------------------------------------------------------------------


def test_outputs_of_experts_are_kept_by_transformers_only() -> None:
    """8 rows a token of 2,048 values in bf16, in every layer."""
    qwen = load_model("qwen3-30b-a3b")

    def kept(stage: int) -> float:
        return training_bytes(use(qwen, zero_stage=stage, recompute="none"), 1, 1000, 1000).activations

    assert kept(3) - kept(1) == approx(48 * 1000 * 8 * 2048 * 2)


def test_logits_that_are_not_upcast_stay_in_bf16_while_training() -> None:
    """2 bytes each (vocabulary 32000, 8192 tokens): gradients are written over them."""
    logits = training_bytes(use(logits_upcast=False), 8, 8192, 2048).logits
    assert logits == approx(2 * 8192 * 32000)
    assert scoring_bytes(use(logits_upcast=False), 8, 8192, 2048) == scoring_bytes(use(), 8, 8192, 2048)


def test_logits_in_place_take_one_buffer_in_fp32_and_one_in_bf16() -> None:
    u = use(logits_in_place=True)
    assert training_bytes(u, 1, 1000, 1000).logits == 1000 * 32000 * (4 + 2)


# --- states that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_there_of_states_that_leave(level: str, stage: int) -> None:
    whole = static_bytes(use(zero_stage=stage), "train", 8)
    u = use(zero_stage=stage, offload_states=level)
    copied = whole.optimizer
    copied += whole.weights if level != "optimizer" else 0
    copied += whole.gradients if level == "image" else 0
    rests, passes, updates = (static_bytes(u, "train", 8, doing=doing) for doing in ("rests", "passes", "updates"))
    assert updates == Bytes(whole.weights, whole.gradients, whole.optimizer, host=copied)
    assert passes == Bytes(whole.weights, host=copied)
    assert rests == Bytes(whole.weights if level == "optimizer" else 0.0, host=copied)
    assert static_bytes(u, "frozen", 8) == static_bytes(use(zero_stage=stage), "frozen", 8)


def test_what_is_on_the_host_anyway_does_not_move() -> None:
    u = use(zero_stage=1, offload_optimizer=True, offload_states="all")
    kept, resting = (static_bytes(u, "train", 8, doing=doing) for doing in ("updates", "rests"))
    assert (kept.weights, kept.gradients, kept.optimizer) == (2 * COUNT, 2 * COUNT, 0)
    assert resting.total == 0 and resting.host == approx(2 * COUNT + 16 * COUNT / 8)


def leaves(level: str | None, role: str = "actor", **changes: Any) -> Scenario:
    """Engines on all GPUs of a node, which train too."""
    fixed: dict[str, Any] = {"cluster.nodes": 1, "algorithm.minibatches": 2, f"models.{role}.offload_states": level}
    return scenario("colocated", "engine", **fixed | changes)


def seconds_of(timeline: Timeline, stage: str) -> list[float]:
    return [s.seconds for s in timeline.spans if s.firing.stage == stage]


@pytest.mark.parametrize("level", LEVELS)
def test_states_are_copied_where_a_stage_needs_them(level: str) -> None:
    """Weights come for the pass of log-probabilities and leave after the sync, optimizer states come before the first
    of two updates and leave after the last; each at the nominal rate of PCIe at best."""
    alone = {"cluster.gpus_per_node": 1}  # two GPUs share a switch
    stays, moves = (timeline_of(leaves(chosen, **alone)) for chosen in (None, level))
    found = leaves(level)
    held = static_bytes(found.models.actor.model_copy(update={"offload_states": None}), "train", 1)
    rate = found.cluster.gpu.pcie_bytes_per_second.value
    weights = held.weights / rate * (level != "optimizer")
    optimizer = (held.optimizer + held.gradients * (level == "image")) / rate
    expected = {"gen": [0.0], "ref": [0.0], "values": [0.0], "old_log_prob": [weights], "update_weights": [weights]}
    for stage, copies in (expected | {"update_actor": [optimizer, optimizer]}).items():
        pairs = zip(seconds_of(stays, stage), seconds_of(moves, stage), strict=True)
        more = [b - a for a, b in pairs]
        for index, extra in enumerate(more):
            copy = copies[index % len(copies)]
            assert copy * 0.999 - 1e-9 <= extra <= 2 * copy + 1e-9
    off = {"effects.sync": False}
    assert step_seconds(timeline_of(leaves(level, **off))) == step_seconds(timeline_of(leaves(None, **off)))


def test_calls_copy_states_from_and_to_pageable_memory() -> None:
    """Weights twice for every stage and sync of the actor, the optimizer's for the two updates, at the rate given."""
    rate = {"overheads.pageable_bytes_per_second": 1e9}
    stays, moves = (timeline_of(leaves(chosen, **rate)) for chosen in (None, "calls"))
    held, iterations = static_bytes(leaves(None).models.actor, "train", 4), leaves(None).simulation.iterations
    weights, optimizer = 2 * held.weights / 1e9, 2 * held.optimizer / 1e9
    expected = {"gen": 0.0, "ref": 0.0, "values": 0.0, "old_log_prob": weights, "update_weights": weights}
    for stage, more in (expected | {"update_actor": weights + optimizer}).items():
        assert sum(seconds_of(moves, stage)) - sum(seconds_of(stays, stage)) == approx(iterations * more)
    phases = [prepare(leaves(level)).fit().by_phase["ref"].bytes.weights for level in ("all", "calls")]
    assert phases[0] - phases[1] == approx(held.weights)  # not there while the reference works


def test_engines_have_the_room_that_states_leave() -> None:
    """While engines generate nothing of the actor is on the GPU; the update has it all."""
    stays, moves = (prepare(leaves(level)) for level in (None, "all"))
    states = static_bytes(stays.scenario.models.actor, "train", 4)
    before, after = stays.fit(), moves.fit()
    gone = {
        phase: before.by_phase[phase].bytes.weights - after.by_phase[phase].bytes.weights for phase in after.by_phase
    }
    assert gone["gen"] == gone["resting"] == approx(states.weights)
    assert gone["old_log_prob"] == gone["ref"] == gone["update_actor"] == gone["update_weights"] == 0
    optimizer = {
        phase: before.by_phase[phase].bytes.optimizer - i.bytes.optimizer for phase, i in after.by_phase.items()
    }
    assert optimizer["update_actor"] == 0 and optimizer["old_log_prob"] == approx(states.optimizer)
    assert after.host_bytes - before.host_bytes == approx(4 * (states.weights + states.optimizer))
    assert states.optimizer == approx(parameters(stays.scenario.models.actor.shape) * (MASTER_BYTES + MOMENT_BYTES) / 4)


def test_what_does_not_fit_beside_an_engine_fits_when_states_leave() -> None:
    """A GPU a little too small for engine, weights, gradients and optimizer together."""
    many = {"generation.batching": "static", "models.actor.micro_batch_samples": 1, "workload.prompts": 1024}
    roomy = prepare(leaves(None, **many)).fit()
    small = {"cluster.gpu.memory_bytes": {"value": roomy.by_phase["gen"].bytes.total - 1, "source": "unverified"}}
    assert not prepare(leaves(None, **many, **small)).fit().fits
    assert prepare(leaves("all", **many, **small)).fit().fits


def test_a_critic_moves_between_its_own_stages() -> None:
    stays, moves = (timeline_of(leaves(level, "critic")) for level in (None, "all"))
    for stage in ("values", "update_critic"):
        assert min(seconds_of(moves, stage)) > min(seconds_of(stays, stage))
    assert seconds_of(moves, "update_actor") == approx(seconds_of(stays, "update_actor"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_optimizer_fraction": 0.5}, "needs offload_optimizer: true"),
        ({"offload_states": "optimizer", "offload_optimizer": True}, r"on the host \(allowed: all, image\)"),
        ({"offload_states": "all", "offload_parameters": True}, "weights rest on the host"),
        ({"gradient_precision": "fp32", "offload_optimizer": True}, "offload_parameters must be true"),
    ],
)
def test_impossible_states_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(**{f"models.actor.{name}": value for name, value in settings.items()})


def test_weights_that_generate_do_not_leave() -> None:
    for level in ("all", "image", "calls"):
        with pytest.raises(InputError, match="generates from these weights") as error:
            prepare(scenario("colocated", "hybrid", **{"models.actor.offload_states": level}))
        assert error.value.field == "models.actor.offload_states"
    timeline_of(scenario("colocated", "hybrid", **{"models.actor.offload_states": "optimizer"}))


@pytest.mark.parametrize(("field", "value"), [("offload_states", "all"), ("gradient_precision", "fp32")])
def test_real_runs_have_neither(field: str, value: str) -> None:
    with pytest.raises(InputError) as error:
        check_real(scenario(**{f"models.actor.{field}": value}))
    assert error.value.field == f"models.actor.{field}"
