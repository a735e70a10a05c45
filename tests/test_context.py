"""Ranks that share sequences: who exchanges what, against closed forms, and what that needs and refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenarios import scenario, timeline_of
from test_passes import IDEAL, OPS, equal, layout, moved, seconds, use

from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.memory import scoring_bytes, static_bytes, training_bytes
from rlhfsim.metrics import step_seconds
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import prepare
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import ModelUse

LLAMA = load_model("llama-7b")
GROUPED = load_model("llama-3-8b")  # 32 layers, 32 heads and 8 KV heads of 128, hidden size 4096
EXCHANGES = ("ring", "all_gather", "all_to_all")
approx = pytest.approx


def shared(degree: int, exchange: str = "ring", **settings: Any) -> ModelUse:
    """Grouped-query attention without any other parallelism, unless it is given."""
    given = {"zero_stage": 0, "score_micro_batch_samples": 4, "micro_batch_samples": 4, "recompute": "none"} | settings
    return use(GROUPED, context_parallel=degree, context_exchange=exchange, **given)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_ranks_are_tensor_then_context_then_data_then_pipeline() -> None:
    """Megatron-LM's default order, tp-cp-ep-dp-pp, 2 of each: gradients are summed over data and context."""
    grid = Layout(tuple(range(16)), tensor_parallel=2, pipeline_parallel=2, context_parallel=2)
    assert grid.replicas == 2
    assert grid.tensor_groups == tuple((r, r + 1) for r in range(0, 16, 2))
    assert sorted(grid.context_groups) == [(k, k + 2) for k in (0, 1, 4, 5, 8, 9, 12, 13)]
    assert sorted(grid.data_groups) == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert sorted(grid.hops) == [(k, k + 8) for k in range(8)]
    with pytest.raises(InputError, match=r"4 ranks cannot be split .* context_parallel 3 x"):
        Layout(tuple(range(4)), context_parallel=3)


# --- bytes -----------------------------------------------------------------------------------------------------------


def exchanged(u: ModelUse, tokens: int = 4 * 1024) -> dict[str, float]:
    """Payload of the group of one replica, in a forward pass of all layers."""
    ranks = u.ranks_per_replica
    return dict(moved(score_program(u, equal(1, 4, tokens // 4), layout(u, ranks), OPS)))


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_bytes_of_a_forward_pass(degree: int) -> None:
    """T tokens, 2 bytes, KV of 2 x 8 x 128. Ring: each rank passes on degree - 1 pieces. All-gather: all of it on every
    rank. All-to-all: a rank's queries, outputs, keys and values."""
    layers, kv, q, tokens = 32, 2 * 8 * 128 * 2, 32 * 128 * 2, 4096
    assert exchanged(shared(degree)) == {"send": approx(layers * degree * (degree - 1) * kv * tokens / degree)}
    assert exchanged(shared(degree, "all_gather")) == {"all_gather": approx(layers * kv * tokens)}
    assert exchanged(shared(degree, "all_to_all")) == {"all_to_all": approx(layers * (2 * q + kv) * tokens / degree)}


def test_ulysses_volume_of_its_paper() -> None:
    """Jacobs et al. 2023, section 3.2: 4 N h elements over P ranks, for N tokens and equally many KV heads."""
    u = use(LLAMA, zero_stage=0, context_parallel=4, context_exchange="all_to_all")
    (found,) = moved(score_program(u, equal(1, 4), layout(u, 4), OPS)).values()
    assert found == approx(32 * 4 * (4 * 512) * 4096 / 4 * 2)


def test_kv_heads_are_copied_for_more_ranks() -> None:
    """8 KV heads on 16 ranks: each has one, so 16 are sent."""
    tokens, head = 4096 / 16, 2 * 128 * 2
    assert exchanged(shared(16, "all_to_all"))["all_to_all"] == approx(32 * tokens * head * (32 + 16))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("selective", 1), ("full", 1)])
def test_the_backward_exchanges_gradients_too(exchange: str, recompute: str, again: int) -> None:
    """Ring: twice a forward. All-gather: a forward, and a reduce-scatter of as much. All-to-all: as a forward."""
    u = shared(4, exchange, recompute=recompute)
    (forward,) = exchanged(u).values()
    found = dict(moved(train_program(u, equal(1, 4, 1024), layout(u, 4), OPS)))
    found.pop("all_reduce")  # of gradients
    if exchange == "ring":
        assert found == {"send": approx((3 + again) * forward)}
    elif exchange == "all_gather":
        assert found == {"all_gather": approx((2 + again) * forward), "reduce_scatter": approx(forward)}
    else:
        assert found == {"all_to_all": approx((2 + again) * forward)}


def test_tensor_parallel_ranks_exchange_their_own_heads() -> None:
    u = shared(4, tensor_parallel=2)
    found = exchanged(u)
    assert found["send"] == approx(exchanged(shared(4))["send"])  # half the heads on twice the ranks
    assert found["all_gather"] == approx((32 * 2 + 1) * 4096 * 4096 * 2)  # on every context rank its part of the tokens


def test_gradients_are_reduced_over_all_that_hold_them() -> None:
    u = shared(2, zero_stage=1, overlap_grad_reduce=False)
    program = train_program(u, equal(2, 4), layout(u, 4), OPS)
    (reduced,) = (t for s in program if s.label == "reduce_gradients" for t in s.transfers)
    assert reduced.groups == ((0, 1, 2, 3),)
    adam = next(s for s in program if s.label == "optimizer")
    assert float(adam.compute_seconds[0, 0]) == approx(float(OPS.optimizer_step(u, parameters(GROUPED) / 4).seconds))


# --- seconds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_work_is_divided(exchange: str) -> None:
    """At constant efficiency and on free links; weights are read by every rank, which counts for little here."""
    alone, together = (
        seconds(score_program(u, equal(1, 4, 8192), layout(u, u.ranks_per_replica), IDEAL))
        for u in (shared(1), shared(4, exchange))
    )
    assert together == approx(alone / 4, rel=0.02)


@pytest.mark.parametrize("rate", [1e9, 1e10, 1e11])
def test_a_ring_hides_behind_attention(rate: float) -> None:
    """c turns of attention, c - 1 transfers beside them: (c - 1) max(0, transfer - attention / c) exposed a layer."""
    c, u = 4, shared(4)
    (segment,) = score_program(u, equal(1, 4, 8192), layout(u, c), OPS)
    layer, ends = segment.compute_seconds[0]
    attention = float(OPS.attention_prefill(u, np.full(4, 8192), c).seconds)
    transfer = 4 * 8192 / c * (2 * 8 * 128 * 2) / rate
    exposed = (c - 1) * max(0.0, transfer - attention / c)
    assert seconds([segment], rate) == approx(32 * (layer + exposed) + ends)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_other_exchanges_stop_the_compute(exchange: str) -> None:
    u = shared(4, exchange)
    program = score_program(u, equal(1, 4, 1024), layout(u, 4), OPS)
    assert seconds(program, 1e11) == approx(seconds(program) + sum(moved(program).values()) / 1e11)


@pytest.mark.parametrize("settings_", [{"zero_stage": 3}, {"zero_stage": 1, "pipeline_parallel": 2}])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_faster_links_are_never_slower(settings_: dict[str, Any], exchange: str) -> None:
    u = shared(2, exchange, **settings_)
    place = layout(u, 8)
    for program in (
        train_program(u, equal(place.replicas, 8), place, OPS),
        score_program(u, equal(place.replicas, 8), place, OPS),
    ):
        times = [seconds(program, rate) for rate in (1e9, 1e10, 1e11, 1e13)]
        assert times == sorted(times, reverse=True) and times[0] > times[-1]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_activations_are_divided_and_states_sharded_over_all() -> None:
    """What is exchanged comes on top: a piece of keys and values, all pieces, or what one rank sends, and gradients."""
    tokens = 32768
    alone, kv, q = training_bytes(shared(1), 1, tokens, 8192), 2 * 8 * 128 * 2, 32 * 128 * 2
    for exchange, buffer in (("ring", kv), ("all_gather", 4 * kv), ("all_to_all", 2 * q + kv)):
        found = training_bytes(shared(4, exchange), 4, tokens, 8192)
        assert found.activations == approx(alone.activations / 4)
        assert found.logits == approx(alone.logits / 4)
        assert found.buffers == approx(2 * buffer * tokens / 4)
        assert scoring_bytes(shared(4, exchange), 4, tokens, 8192).buffers == approx(buffer * tokens / 4)
    u = shared(4, zero_stage=3)
    setup = {"models.actor.context_parallel": 4}
    assert static_bytes(u, "train", 8).total == approx(16 * parameters(GROUPED) / 8)
    plain, found_ = (prepare(scenario(**changes)) for changes in ({}, setup))
    assert found_.holdings["actor"].data_parallel == plain.holdings["actor"].data_parallel == 8
    assert found_.memory.samples_per_replica(found_.graph.at("update_actor")) == 4 * plain.memory.samples_per_replica(
        plain.graph.at("update_actor")
    )


# --- whole scenarios -------------------------------------------------------------------------------------------------

LONG = {
    "workload.prompt_tokens": 1024,
    "workload.response_tokens": 15360,
    "workload.prompts": 8,
    "workload.padded": False,
}


@pytest.mark.parametrize(
    "split",
    [
        {"zero_stage": 3, "context_parallel": 4, "context_exchange": "all_to_all"},
        {"zero_stage": 1, "context_parallel": 2, "tensor_parallel": 2},
        {"zero_stage": 1, "context_parallel": 2, "pipeline_parallel": 2},
    ],
)
@pytest.mark.parametrize("strategy", ["colocated", "disaggregated"])
def test_whole_scenarios(strategy: str, split: dict[str, Any]) -> None:
    """Long sequences that 8 replicas cannot share, on ranks that share each of them; memory below that of one rank."""
    found = scenario(
        strategy, "engine", cluster__nodes=4, **LONG, **{f"models.actor.{name}": value for name, value in split.items()}
    )
    assert found.models.reference.context_parallel == split["context_parallel"]
    assert step_seconds(timeline_of(found)) > 0


def test_sharing_sequences_helps_where_there_are_fewer_than_ranks() -> None:
    """Two samples of 16k tokens a minibatch for 8 ranks."""
    two = LONG | {"workload.prompts": 4}

    def update(**split: Any) -> float:
        found = scenario("colocated", "engine", **two, **{f"models.actor.{k}": v for k, v in split.items()})
        return sum(s.seconds for s in timeline_of(found).spans if s.firing.stage == "update_actor")

    assert update(context_parallel=4, context_exchange="all_to_all") < 0.5 * update()


def test_copies_that_share_sequences_send_weights_once() -> None:
    u = shared(2, zero_stage=1, tensor_parallel=2)
    engines = Layout(tuple(range(8, 16)), tensor_parallel=4)
    found = moved(sync_program(u, layout(u, 8), engines, OPS, method="p2p", bucket_bytes=100e6))
    assert found == {"send": approx(2 * 2 * parameters(GROUPED))}
    to_copies = sync_program(u, Layout((20, 21), 2), Layout.of(range(8), u), OPS, method="p2p", bucket_bytes=1e8)
    assert moved(to_copies) == {"send": approx(4 * 2 * parameters(GROUPED))}  # every rank its half


@pytest.mark.parametrize(("degree", "tensor", "allowed"), [(3, 1, "1, 2, 4, 8, 16, 32"), (32, 2, "1, 2, 4, 8, 16")])
def test_heads_must_split_evenly(degree: int, tensor: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"context_parallel is {degree}, but all_to_all .*\(allowed: {allowed};"):
        shared(degree, "all_to_all", tensor_parallel=tensor)
    shared(degree, "ring", tensor_parallel=tensor)


def test_heads_that_only_some_ranks_could_have_are_refused() -> None:
    """28 heads and 4 KV heads: 7 divides the heads, but neither divides nor is divided by 4."""
    with pytest.raises(ValueError, match=r"allowed: 1, 2, 4, 28;"):
        use(load_model("qwen2.5-7b"), context_parallel=7, context_exchange="all_to_all")


def test_ranks_must_be_there_and_real_runs_have_none() -> None:
    with pytest.raises(InputError, match=r"x context_parallel x pipeline_parallel is 16, but the cluster has 8"):
        scenario(**{"models.actor.context_parallel": 16})
    with pytest.raises(InputError, match="2 ranks per replica"):
        check_real(scenario(**{"models.actor.context_parallel": 2}))
