"""Shards inside groups of ranks, and what leaves for the host: who moves what, how long that takes, who holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenarios import scenario, timeline_of
from test_passes import HOST, LLAMA, OPS, equal, layout, moved, operators, seconds, use

from rlhfsim.costs.generation import generation_program
from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.memory import gathered_bytes, static_bytes, training_bytes
from rlhfsim.metrics import step_seconds
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import prepare
from rlhfsim.spec.scenario import ModelUse

approx = pytest.approx
LENGTHS = np.full(2, 64)
WHOLE = 2 * parameters(LLAMA)


# --- shards inside groups --------------------------------------------------------------------------------------------


def test_groups_gather_reduce_and_then_sum_their_shards() -> None:
    """8 ranks in groups of 4: two gathers and a reduce-scatter of the whole in both, an all-reduce of a quarter by the
    two copies of each shard."""
    u = use(shard_ranks=4)
    program = train_program(u, equal(8, 4), layout(u, 8), OPS)
    assert moved(program) == {
        "all_gather": approx(2 * 2 * WHOLE),
        "reduce_scatter": approx(2 * WHOLE),
        "all_reduce": approx(4 * WHOLE / 4),
    }
    groups = {t.op: t.groups for s in program for t in s.transfers}
    assert groups["all_gather"] == groups["reduce_scatter"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups["all_reduce"] == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_one_group_is_no_group_and_groups_of_one_are_data_parallel() -> None:
    whole, all_ranks, single = use(), use(shard_ranks=4), use(shard_ranks=1)
    lengths = equal(4, 8)
    programs = [train_program(u, lengths, layout(u, 4), OPS) for u in (whole, all_ranks, single)]
    assert moved(programs[0]) == moved(programs[1])
    assert seconds(programs[0], 1e11) == approx(seconds(programs[1], 1e11))
    assert moved(programs[2]) == {"all_reduce": approx(2 * WHOLE)}  # in both micro-batches


def test_a_rank_holds_what_its_group_does_not() -> None:
    u = use(shard_ranks=4)
    for held in ("train", "frozen"):
        assert static_bytes(u, held, 32) == static_bytes(use(), held, 4)
    assert gathered_bytes(use(shard_ranks=1), 8) == 0


def test_weights_come_from_every_group_that_holds_them() -> None:
    u, engines = use(shard_ranks=4), Layout(tuple(range(8, 16)), tensor_parallel=4)
    found = sync_program(u, layout(u, 8), engines, OPS, method="broadcast", bucket_bytes=1e8)
    assert found[0].transfers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert moved(found)["broadcast"] == approx(WHOLE)


def test_groups_inside_a_node_help_on_slow_networks() -> None:
    slow = {"cluster.network.nic_bytes_per_second": {"value": 5e9, "source": "unverified"}}

    def step(**settings: Any) -> float:
        return step_seconds(timeline_of(scenario("colocated", "engine", **slow, **settings)))

    inside = {f"models.{role}.shard_ranks": 4 for role in ("actor", "critic", "reference", "reward")}
    assert step(**inside) < step()


@pytest.mark.parametrize("engine", ["zero3_per_token", "hybrid"])
def test_generation_gathers_inside_groups_too(engine: str) -> None:
    found = prepare(scenario("colocated", engine, **{"models.actor.shard_ranks": 4}))
    stage = found.graph.at("gen")
    held = found.holdings["actor"]
    program = generation_program(
        held.use, found.scenario.generation, [LENGTHS] * 8, [LENGTHS] * 8, stage.ranks, OPS,
        kv_capacity_tokens=None, domain=held.ranks,
    )  # fmt: skip
    gathers = {t.groups for s in program.segments for t in s.transfers if t.op == "all_gather"}
    assert gathers == {((0, 1, 2, 3), (4, 5, 6, 7))}


def test_bad_groups_are_refused() -> None:
    with pytest.raises(InputError, match="weights are sharded at zero_stage 3 only"):
        scenario(**{"models.actor.shard_ranks": 4, "models.actor.zero_stage": 1})
    with pytest.raises(InputError, match=r"is 3, which does not divide the 8 ranks of actor") as error:
        prepare(scenario(**{"models.actor.shard_ranks": 3}))
    assert error.value.field == "models.actor.shard_ranks"
    with pytest.raises(InputError, match="real runs shard over all ranks"):
        check_real(scenario(**{"models.actor.shard_ranks": 4}))


def test_scoring_gathers_inside_groups() -> None:
    u = use(shard_ranks=2, score_micro_batch_samples=4)
    found = moved(score_program(u, equal(8, 4), layout(u, 8), OPS))
    assert found == {"all_gather": approx(4 * WHOLE)}


# --- activations on the host -----------------------------------------------------------------------------------------


def trained(**settings: Any) -> ModelUse:
    return use(zero_stage=0, micro_batch_samples=4, **settings)


@pytest.mark.parametrize("stages", [1, 4])
def test_activations_cross_pcie_twice(stages: int) -> None:
    """Recomputed layers keep their inputs: 2 bytes x hidden size, to the host and back, in every micro-batch."""
    u = trained(offload_activations=True, pipeline_parallel=stages)
    found = moved(train_program(u, equal(1, 8), layout(u, stages), OPS))
    assert found["to_host"] == found["from_host"] == approx(32 * 2 * 4096 * 8 * 512)
    off = moved(train_program(u, equal(1, 8), layout(u, stages), operators(sync=False)))
    assert off["to_host"] == off["from_host"] == 0


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("rate", [1e9, 1e10, 1e12])
def test_activations_hide_behind_the_compute_of_their_layer(recompute: str, rate: float) -> None:
    """The longer of copy and compute, in each layer's forward and in its backward (with recomputation)."""
    u = trained(offload_activations=True, recompute=recompute)
    program = train_program(u, equal(1, 4), layout(u, 1), OPS)
    segment = program[0]
    backward, forward = segment.compute_seconds[0, 0], segment.compute_seconds[0, 1]
    copy = moved(program)["to_host"] / 32 / rate
    exposed = 32 * (max(0.0, copy - forward) + max(0.0, copy - backward))
    assert seconds(program, rate) == approx(seconds(program) + exposed)


def test_activations_of_two_layers_stay() -> None:
    tokens = 8192
    here, there = (training_bytes(trained(offload_activations=o), 1, tokens, 2048, head="value") for o in (False, True))
    one = 2 * 4096 * tokens
    assert here.activations - there.activations == approx((32 - 2) * one)
    assert there.host == approx(32 * one)
    assert here.host == 0


def test_what_does_not_fit_fits_with_activations_on_the_host() -> None:
    """And host memory is counted: all ranks of the node leave theirs there."""
    settings = {"models.actor.recompute": "none", "workload.prompts": 256}
    here, there = (
        prepare(scenario("colocated", "engine", **settings, **{"models.actor.offload_activations": o})).fit()
        for o in (False, True)
    )
    device = here.by_phase["update_actor"].bytes, there.by_phase["update_actor"].bytes
    assert device[0].activations > 3 * device[1].activations
    assert there.host_bytes == approx(4 * device[1].host) and device[1].host > 0
    assert here.host_bytes == 0
    small = device[0].total - 1.0
    memory = {"cluster.gpu.memory_bytes": {"value": small, "source": "unverified"}}
    fits = [
        prepare(scenario("colocated", "engine", **settings, **memory, **{"models.actor.offload_activations": o}))
        for o in (False, True)
    ]
    assert [setup.fit().by_phase["update_actor"].bytes.total <= small for setup in fits] == [False, True]


# --- gradients on the host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_leave_with_every_backward(stage: int, accumulated: int) -> None:
    """A rank's share leaves k times and comes back k - 1 times; updated weights come once, with or without."""
    settings: dict[str, Any] = {"zero_stage": stage, "offload_optimizer": True, "micro_batch_samples": 4}
    early, late = (use(**settings, offload_gradients=o) for o in (True, False))
    lengths = equal(8, 4 * accumulated)
    found, plain = (dict(moved(train_program(u, lengths, layout(u, 8), OPS, host=HOST))) for u in (early, late))
    assert found.pop("to_host") == approx(accumulated * WHOLE)
    assert found.pop("from_host") == approx((accumulated - 1) * WHOLE + WHOLE)
    assert plain.pop("to_host") == plain.pop("from_host") == approx(WHOLE)
    assert found == approx(plain)


def test_gradients_that_leave_early_hide() -> None:
    settings: dict[str, Any] = {"zero_stage": 2, "offload_optimizer": True, "micro_batch_samples": 4}
    early, late = (
        train_program(use(**settings, offload_gradients=o), equal(8, 4), layout(use(), 8), OPS, host=HOST)
        for o in (True, False)
    )
    for rate in (1e10, 1e11):
        assert seconds(early) < seconds(early, rate) < seconds(late, rate)


def test_gradients_go_both_ways_in_one_stream() -> None:
    """What two directions take beyond the backward pass, of which half hides each: k - 1 times back, k times away."""
    settings: dict[str, Any] = {"zero_stage": 3, "offload_optimizer": True, "micro_batch_samples": 4}
    lengths, count = equal(8, 4 * 3), 3
    [one] = [
        s for s in train_program(use(**settings, offload_gradients=True), lengths, layout(use(), 8), OPS, host=HOST)
        if s.label == "forward_backward"
    ]  # fmt: skip
    hidden = {t.op: np.asarray(t.hidden_seconds) for t in one.transfers if np.any(t.hidden_seconds)}
    layers = {op: hidden[op][np.flatnonzero(hidden[op])] for op in ("to_host", "from_host")}
    assert (len(layers["to_host"]), len(layers["from_host"])) == (count, count - 1)
    whole = layers["to_host"].max()
    assert layers["to_host"] == approx([whole, whole / 2, whole / 2])
    assert layers["from_host"] == approx([whole / 2] * (count - 1))


def test_gradients_that_wait_for_reductions_hide_nowhere() -> None:
    settings: dict[str, Any] = {"zero_stage": 2, "offload_optimizer": True, "offload_gradients": True}
    program = train_program(use(**settings, overlap_grad_reduce=False), equal(8, 4), layout(use(), 8), OPS, host=HOST)
    copies = [t for s in program for t in s.transfers if t.op == "to_host"]
    assert copies and not any(np.any(t.hidden_seconds) for t in copies)


def test_gradients_summed_in_fp32_are_twice_as_many_bytes() -> None:
    settings: dict[str, Any] = {"zero_stage": 3, "offload_optimizer": True, "offload_gradients": True}
    uses = (use(**settings, host_gradient_precision=precision) for precision in (None, "fp32"))
    programs = (train_program(u, equal(8, 4), layout(u, 8), OPS, host=HOST) for u in uses)
    half, whole = (dict(moved(program))["to_host"] for program in programs)
    assert whole == approx(2 * half)


def test_gradients_on_the_host_are_nowhere_else() -> None:
    settings: dict[str, Any] = {"zero_stage": 2, "offload_optimizer": True}
    early, late = (static_bytes(use(**settings, offload_gradients=o), "train", 8) for o in (True, False))
    assert (early.gradients, late.gradients) == (0, approx(WHOLE / 8))
    assert early.host == late.host and early.weights == late.weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload_gradients": True}, "needs offload_optimizer: true"),
        ({"host_gradient_precision": "fp32"}, "gradients stay on the GPU"),
        (
            {"offload_gradients": True, "offload_optimizer": True, "zero_stage": 1},
            "zero_stage 2 or 3, given true and 1",
        ),
        (
            {"offload_gradients": True, "offload_optimizer": True, "zero_stage": 2, "tensor_parallel": 2},
            "replicas of one rank",
        ),
        ({"offload_activations": True, "flash_attention": False, "recompute": "none"}, "scores of attention"),
    ],
)
def test_impossible_offload_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(**{f"models.actor.{name}": value for name, value in settings.items()})


@pytest.mark.parametrize("field", ["offload_gradients", "offload_activations"])
def test_real_runs_do_not_offload_them(field: str) -> None:
    others = {"models.actor.offload_optimizer": True} if field == "offload_gradients" else {}
    with pytest.raises(InputError) as error:
        check_real(scenario(**others, **{f"models.actor.{field}": True}))
    assert error.value.field == f"models.actor.{field}"


def test_offload_in_whole_scenarios() -> None:
    settings = {
        f"models.actor.{name}": True for name in ("offload_optimizer", "offload_gradients", "offload_activations")
    }
    assert step_seconds(timeline_of(scenario("colocated", "engine", **settings))) > 0
