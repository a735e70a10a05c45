"""Collectives beside compute, against closed forms: max(compute, transfer) a layer and what nothing can hide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, timeline_of
from test_passes import LLAMA, OPS, equal, layout, moved, seconds, use

from rlhfsim.costs.passes import score_program, train_program
from rlhfsim.costs.pipeline import makespan
from rlhfsim.costs.segment import Route, Segment, Transfer
from rlhfsim.errors import InputError
from rlhfsim.memory import training_bytes
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real

FREE_ROUTE = Route({}, 0.0, 1.0)
MEGATRON = {"zero_stage": 1, "tensor_parallel": 2}
BESIDE = {"overlap_grad_reduce": True, "overlap_param_gather": True}
approx = pytest.approx


def took(program: list[Segment], label: str, rate: float = math.inf) -> float:
    return seconds([s for s in program if s.label == label], rate)


# --- segments --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(compute=st.floats(0, 9), blocking=st.floats(0, 9), beside=st.floats(0, 9), repeats=st.integers(1, 9))
def test_blocking_transfers_add_to_the_compute_that_others_hide_behind(
    compute: float, blocking: float, beside: float, repeats: int
) -> None:
    groups = ((0, 1),)
    transfers = (Transfer("all_gather", groups, beside), Transfer("all_reduce", groups, blocking, blocking=True))
    segment = Segment("both", np.full((1, 1), compute), np.array([float(repeats)]), transfers, prefetch=1)
    elapsed = segment.elapsed([FREE_ROUTE] * 2, [1.0, 1.0])
    busy = compute + blocking
    assert elapsed.seconds == approx(repeats * max(busy, beside) + min(busy, beside))
    assert elapsed.compute[0] + elapsed.communication[0] == approx(elapsed.seconds)


# --- reductions and gathers ------------------------------------------------------------------------------------------


def test_reductions_hide_behind_the_last_backward_layer_by_layer() -> None:
    """4 micro-batches, tensor-parallel links free: layer by layer the longer of the backward and its reduction, in one
    micro-batch; the first reduction is exposed, as is what is longer of embedding and head."""
    plain, beside = (use(**MEGATRON, **o) for o in ({}, {"overlap_grad_reduce": True}))
    apart, together = (train_program(u, equal(4, 4 * 4), layout(u, 8), OPS) for u in (plain, beside))
    whole = 2 * parameters(LLAMA) / 2
    assert moved(together) == moved(apart)
    compute = took(apart, "forward_backward")
    (segment,) = (s for s in together if s.label == "forward_backward")
    layer, ends = segment.compute_seconds[0, 0], segment.compute_seconds[0, -1]
    for share in (0.1, 1.0, 3.0):  # of a layer's backward
        rate = whole / 32 / (share * layer)
        reduction = [t for t in segment.transfers if t.op == "reduce_scatter" and len(t.groups[0]) == 4]
        only = [t.payload_bytes for t in reduction]
        assert len(only) == 1
        in_layer, in_ends = only[0][0] / rate, only[0][12] / rate
        tensor = sum((t.payload_bytes @ segment.repeats) / rate for t in segment.transfers if len(t.groups[0]) == 2)
        in_tensor = sum(t.payload_bytes[0] / rate for t in segment.transfers if len(t.groups[0]) == 2)
        of_ends = sum(t.payload_bytes[12] / rate for t in segment.transfers if len(t.groups[0]) == 2)
        busy = layer + in_tensor
        expected = compute + tensor + 32 * max(0, in_layer - busy) + min(in_layer, busy)
        expected += max(0, in_ends - ends - of_ends)
        assert took(together, "forward_backward", rate) == approx(expected)


@pytest.mark.parametrize(
    "settings_",
    [
        MEGATRON,
        {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2},
        {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_chunks": 2},
        {"zero_stage": 1, "micro_batch_samples": 2},
        {"zero_stage": 0, "pipeline_parallel": 4},
    ],
)
@pytest.mark.parametrize("rate", [1e9, 1e10, 1e11, 1e12])
def test_overlap_is_between_the_longer_of_both_and_their_sum(settings_: dict[str, Any], rate: float) -> None:
    gathers = settings_["zero_stage"] > 0
    apart = use(**settings_, overlap_grad_reduce=False)
    beside = use(**settings_, overlap_grad_reduce=True, **({"overlap_param_gather": True} if gathers else {}))
    programs = [
        train_program(u, equal(8 // u.ranks_per_replica, 16), layout(u, 8), OPS, first=False, last=False)
        for u in (apart, beside)
    ]
    assert moved(programs[1]) == approx(moved(programs[0]))
    summed, found = (seconds(p, rate) for p in programs)
    data = [s for s in programs[0] if s.label in ("reduce_gradients", "gather_weights")]
    assert seconds(programs[0]) * (1 - 1e-9) <= found < summed
    assert found >= seconds(data, rate) * (1 - 1e-9)
    assert seconds(programs[1]) == approx(seconds(programs[0]))


def test_only_updates_between_updates_gather_in_the_next_forward() -> None:
    """n updates gather n times, the last one at the end: a first one nothing, others what the one before has left."""
    u, whole = use(**MEGATRON, **BESIDE), 2 * parameters(LLAMA) / 2

    def gathered(first: bool, last: bool) -> tuple[float, float]:
        program = train_program(u, equal(4, 4), layout(u, 8), OPS, first=first, last=last)
        by_label = {
            ahead: sum(
                float(np.broadcast_to(t.payload_bytes, len(s.repeats)) @ s.repeats)
                for s in program
                for t in s.transfers
                if t.op == "all_gather" and len(t.groups[0]) == 4 and (s.label == "forward_backward") == ahead
            )
            for ahead in (True, False)
        }
        return by_label[True], by_label[False]

    assert gathered(True, True) == approx((0, whole), rel=1e-3)  # norms are on every rank
    assert gathered(True, False) == (0, 0)
    assert gathered(False, False) == approx((whole, 0), rel=1e-3)
    assert gathered(False, True) == approx((whole, whole), rel=1e-3)


def test_an_iteration_of_several_updates_gains_by_it() -> None:
    """On NICs of 1 GB/s; with one update an iteration there is no next forward pass to hide behind."""
    slow = {"cluster.network.nic_bytes_per_second": {"value": 1e9, "source": "unverified"}}
    split = {"models.actor.zero_stage": 1, "models.actor.tensor_parallel": 2, "models.actor.overlap_grad_reduce": True}

    def updates(count: int, ahead: bool) -> float:
        found = scenario(
            "colocated", "engine", **slow, **split,
            **{"algorithm.minibatches": count, "models.actor.overlap_param_gather": ahead},
        )  # fmt: skip
        return sum(s.seconds for s in timeline_of(found).spans if s.firing.stage == "update_actor")

    assert updates(1, True) == approx(updates(1, False))
    assert updates(4, True) < updates(4, False)


def test_zero3_without_overlap_adds_up() -> None:
    """Gathers and reductions stop the compute: DeepSpeed without overlap_comm."""
    u = use(zero_stage=3, overlap_grad_reduce=False, overlap_param_gather=False)
    program = train_program(u, equal(4, 8), layout(u, 4), OPS)
    for rate in (1e10, 1e12):
        assert seconds(program, rate) == approx(seconds(program) + sum(moved(program).values()) / rate)
    scored = score_program(u, equal(4, 8), layout(u, 4), OPS)
    assert seconds(scored, 1e11) == approx(seconds(scored) + sum(moved(scored).values()) / 1e11)


# --- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (4, 8), (8, 8)])
@pytest.mark.parametrize(("gather", "reduce"), [(0.0, 0.3), (0.3, 0.0), (0.9, 1.9), (1.5, 3.5)])
def test_the_first_stage_exposes_what_its_own_pass_cannot_hide(
    stages: int, micro_batches: int, gather: float, reduce: float
) -> None:
    """Forward 1, backward 2, 10 layers a stage. Ahead: the last layer's 0.1 come after the gather. Behind: all but what
    2 hide, at least the last layer's tenth. The other stages have time while the pipeline fills and drains."""
    forward = np.ones((stages, micro_batches, 1))
    found = makespan(forward, 2 * forward, np.zeros(micro_batches), stages, gather=gather, reduce=reduce, pieces=10)
    ahead, behind = max(0.0, gather + 0.1 - 1) if gather else 0.0, max(reduce - 2, reduce / 10)
    later = max(0.0, gather - 1 - ahead) if stages > 1 else 0.0  # the second stage starts with whole weights
    assert found[0] == approx(3 * (micro_batches + stages - 1) + ahead + later + behind)


def test_other_virtual_stages_move_as_a_whole() -> None:
    """One stage of two chunks, one micro-batch, forward 0.5 and backward 1 each, 2 seconds a transfer, 10 pieces.
    Behind: the second chunk's gradients go when its backward has ended (at 2), then the first's. Ahead: the second
    chunk's weights are there at 4."""
    forward = np.full((2, 1, 1), 0.5)
    behind = makespan(forward, 2 * forward, np.zeros(1), 1, reduce=2.0, pieces=10)
    assert behind[0] == approx(2 + 2 + 2)
    ahead = makespan(forward, 2 * forward, np.zeros(1), 1, gather=2.0, pieces=10)
    assert ahead[0] == approx(4 + 0.5 + 2)


@settings(max_examples=30, deadline=None)
@given(
    stages=st.integers(1, 4), chunks=st.integers(1, 3), rounds=st.integers(1, 3), seed=st.integers(0, 10**6),
    gather=st.floats(0, 5), reduce=st.floats(0, 5),
)  # fmt: skip
def test_pipelines_expose_no_more_than_all(
    stages: int, chunks: int, rounds: int, seed: int, gather: float, reduce: float
) -> None:
    forward, backward = np.random.default_rng(seed).uniform(0.1, 2, (2, stages * chunks, rounds * stages, 1))
    hop = np.zeros(rounds * stages)
    alone = makespan(forward, backward, hop, stages)[0]
    found = makespan(forward, backward, hop, stages, gather=gather, reduce=reduce, pieces=4)[0]
    assert max(alone, chunks * gather, chunks * reduce) - 1e-9 <= found <= alone + chunks * (gather + reduce) + 1e-9


# --- tensor parallelism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e10, 1e11, 1e12])
def test_tensor_parallel_collectives_hide_all_pieces_but_one(rate: float) -> None:
    """Four of a layer's forward, of 4 ranks: x seconds, x/4 of them blocking; those of embedding and head block."""
    u = use(zero_stage=0, tensor_parallel=4, score_micro_batch_samples=4, overlap_tensor_parallel=True)
    program = score_program(u, equal(1, 4), layout(u, 4), OPS)
    (segment,) = program
    layer, ends = segment.compute_seconds[0]
    x = 4 * (4 * 512 * 4096 * 2) / rate
    # Half of it is gathered, by one multiprocessor, half is scattered, by 16.
    slowed = 0.75 * x / 2 * (1 + 16) / OPS.gpu.multiprocessors.value
    busy, beside = layer + x / 4 + slowed, 0.75 * x
    assert seconds(program, rate) == approx(32 * max(busy, beside) + min(busy, beside) + ends + x / 2)
    plain = use(zero_stage=0, tensor_parallel=4, score_micro_batch_samples=4)
    assert moved(program) == approx(moved(score_program(plain, equal(1, 4), layout(plain, 4), OPS)))
    if rate < 1e12:  # else products in pieces cost more than is hidden
        assert seconds(program, rate) < seconds(score_program(plain, equal(1, 4), layout(plain, 4), OPS), rate)


def test_tensor_parallel_collectives_hide_in_pipelines_too() -> None:
    settings_: dict[str, Any] = {"zero_stage": 0, "tensor_parallel": 2, "pipeline_parallel": 2}
    apart, beside = (
        train_program(u, equal(2, 16), layout(u, 8), OPS)
        for u in (use(**settings_), use(**settings_, overlap_tensor_parallel=True))
    )
    assert moved(beside) == approx(moved(apart))
    for rate in (1e10, 1e11):
        assert seconds(apart) < took(beside, "forward_backward", rate) < took(apart, "forward_backward", rate)


@pytest.mark.parametrize("rate", [1e9, 1e10, 1e11, 1e12])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_input_gradients_are_summed_beside_weight_gradients(rate: float, sequence_parallel: bool) -> None:
    """Two of a layer's collectives hide, behind its products for weight gradients of qkv and the first half of the MLP,
    and take 16 multiprocessors from them meanwhile."""
    settings_ = {"zero_stage": 0, "tensor_parallel": 2, "recompute": "none", "sequence_parallel": sequence_parallel}
    plain, beside = use(**settings_), use(**settings_, overlap_tensor_gradients=True)
    apart, together = (
        train_program(u, equal(1, plain.micro_batch_samples), layout(u, 2), OPS) for u in (plain, beside)
    )
    assert moved(together) == approx(moved(apart))
    tokens = plain.micro_batch_samples * 512
    products = float(OPS.weight_gradients(plain, tokens, 2).seconds)
    hidden = min(2 * tokens * 4096 * 2 / rate, products)
    gained = 32 * hidden * (1 - 16 / OPS.gpu.multiprocessors.value)
    assert seconds(apart, rate) - seconds(together, rate) == approx(gained, rel=1e-6)


# --- memory and bad settings -----------------------------------------------------------------------------------------


def test_one_bucket_without_overlap_two_with_it() -> None:
    one, two = (training_bytes(use(zero_stage=2, overlap_grad_reduce=o), 8, 512, 512).buffers for o in (False, True))
    assert (one, two) == (2 * 5e8, 2 * 2 * 5e8)
    assert training_bytes(use(zero_stage=2), 8, 512, 512).buffers == two


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"zero_stage": 0, "overlap_param_gather": True}, "at zero_stage 0 no weights are gathered"),
        ({**MEGATRON, "overlap_param_gather": True}, "needs overlap_grad_reduce"),
        ({"zero_stage": 0, "overlap_tensor_parallel": True}, "needs tensor_parallel above 1"),
        (
            {**MEGATRON, "overlap_tensor_parallel": True, "sequence_parallel": False},
            "sequence_parallel, given 2 and false",
        ),
        ({"zero_stage": 0, "overlap_tensor_gradients": True}, "overlap_tensor_gradients needs tensor_parallel above 1"),
        ({"precision": "fp32", "optimizer_passes": True}, "optimizer_passes needs a master"),
    ],
)
def test_impossible_overlap_is_refused(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(**{f"models.actor.{name}": value for name, value in given_.items()})


@pytest.mark.parametrize("field", ["overlap_grad_reduce", "overlap_param_gather"])
def test_real_runs_overlap_as_deepspeed_does(field: str) -> None:
    with pytest.raises(InputError) as error:
        check_real(scenario(**{f"models.actor.{field}": True}))
    assert error.value.field == f"models.actor.{field}"
