"""Bytes on a rank against published tables, reports of users, and the pipeline's executed schedule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.costs.pipeline import stage_order
from rlhfsim.lora import lora_parameters
from rlhfsim.memory import (
    LOGITS_COPIES,
    Bytes,
    chunks_in_flight,
    engine_bytes,
    gathered_bytes,
    reserved_bytes,
    scoring_bytes,
    static_bytes,
    trained_parameters,
    training_bytes,
)
from rlhfsim.model import kv_bytes_per_token, layer_parameters, parameters, rank_parameters
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Generation, ModelUse, Overheads, Speculative

LLAMA = load_model("llama-7b")
GIB = 2**30


def use(shape: ModelSpec = LLAMA, **settings: object) -> ModelUse:
    return ModelUse(spec=shape.name, shape=shape, **settings)


# --- what rests on a rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "trainable_gb", "co_located_gb", "interleaved_gb"), [(2, 63.5, 52.1, 26.0), (3, 13.0, 1.6, 1.6)]
)
def test_four_models_of_13b_on_32_ranks(
    stage: int, trainable_gb: float, co_located_gb: float, interleaved_gb: float
) -> None:
    """Actor and critic, reference and reward of one size: 2 (2 + 14/32) and 2 x 16/32 bytes a parameter trained; 4, or
    2 where each rank holds one of the two, frozen (ZeRO-3: 4/32 either way, over 32 or 16 ranks)."""
    u = use(load_model("llama-13b"), zero_stage=stage)
    trained = 2 * static_bytes(u, "train", 32).total
    assert trained / 1e9 == pytest.approx(trainable_gb, abs=0.05)
    co_located = 2 * static_bytes(u, "frozen", 32).total
    assert co_located / 1e9 == pytest.approx(co_located_gb, abs=0.05)
    assert static_bytes(u, "frozen", 16).total / 1e9 == pytest.approx(interleaved_gb, abs=0.05)


def test_llama_3_8b_on_one_a100() -> None:
    """github.com/OpenRLHF/OpenRLHF issue 698 (2025-01): 46 GB once prepared, 61 GB after the backward, out of memory in
    the first optimizer step on 80 GB, cured by adam_offload. The states alone: 44.9, 59.8 and 119.7 GiB."""
    u = use(load_model("llama-3-8b"), zero_stage=2)
    before, after = static_bytes(u, "train", 1, stepped=False), static_bytes(u, "train", 1)
    prepared = before.weights + before.optimizer
    assert prepared / GIB == pytest.approx(44.9, abs=0.05)
    assert before.total / GIB == pytest.approx(59.8, abs=0.05)
    assert after.total / GIB == pytest.approx(119.7, abs=0.05)
    offloaded = static_bytes(use(load_model("llama-3-8b"), zero_stage=2, offload_optimizer=True), "train", 1)
    assert offloaded.total < 40 * GIB


@pytest.mark.parametrize(("stage", "expected"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_bytes_per_parameter(stage: int, expected: float) -> None:
    """Rajbhandari et al. 2020, figure 1, with K = 12 and 8 ranks."""
    total = static_bytes(use(zero_stage=stage), "train", 8).total
    assert total / parameters(LLAMA) == pytest.approx(expected)


def test_fp32_has_no_second_master() -> None:
    held = static_bytes(use(zero_stage=0, precision="fp32"), "train", 1)
    per_parameter = [x / parameters(LLAMA) for x in (held.weights, held.gradients, held.optimizer)]
    assert per_parameter == pytest.approx([4, 4, 8])


def test_lora_holds_states_of_its_factors_only() -> None:
    factors = lora_parameters(LLAMA, 128)
    held = static_bytes(use(zero_stage=0, lora_rank=128), "train", 1)
    assert held.weights == pytest.approx(2 * (parameters(LLAMA) + factors))
    assert held.gradients + held.optimizer == pytest.approx(14 * factors)


def test_frozen_layers_have_no_states() -> None:
    trained = trained_parameters(use(trainable_layers=8), "lm")
    head = 32000 * 4096 + 4096
    assert trained == pytest.approx(8 * layer_parameters(LLAMA) + head)
    assert trained_parameters(use(trainable_layers=32), "lm") == parameters(LLAMA)
    lower, upper = (
        trained_parameters(use(zero_stage=1, pipeline_parallel=2, trainable_layers=8), "lm", stage) for stage in (0, 1)
    )
    assert (lower, upper) == (0, trained)


def test_tensor_and_pipeline_shares() -> None:
    u = use(zero_stage=0, tensor_parallel=4, pipeline_parallel=2)
    held = sum(static_bytes(u, "frozen", 1, stage=stage).weights for stage in (0, 1)) * 4
    assert held == pytest.approx(2 * parameters(LLAMA), rel=1e-3)  # norms are on every rank
    assert static_bytes(u, "train", 1).total == 16 * rank_parameters(LLAMA, tensor_parallel=4, pipeline_parallel=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_offloaded_is_on_the_host(stage: int) -> None:
    here = static_bytes(use(zero_stage=stage), "train", 8)
    there = static_bytes(use(zero_stage=stage, offload_optimizer=True), "train", 8)
    share = parameters(LLAMA) / (8 if stage else 1)
    assert (there.optimizer, here.host) == (0, 0)
    assert there.host == pytest.approx(here.optimizer + 4 * share)  # and gradients in fp32
    assert there.weights == here.weights and there.gradients == here.gradients
    frozen = use(zero_stage=stage, offload_parameters=True)
    resting, running = (static_bytes(frozen, "frozen", 8, doing=doing) for doing in ("rests", "passes"))
    whole = 2 * parameters(LLAMA) / (8 if stage == 3 else 1)
    assert resting == Bytes(host=whole)
    assert running == Bytes(host=whole, weights=0 if stage == 3 else whole)


@settings(max_examples=60, deadline=None)
@given(stage=st.integers(0, 3), ranks=st.integers(1, 64), lora=st.sampled_from([0, 16]), adam=st.booleans())
def test_more_ranks_and_higher_stages_never_hold_more(stage: int, ranks: int, lora: int, adam: bool) -> None:
    u = use(zero_stage=stage, lora_rank=lora, offload_optimizer=adam)
    held = static_bytes(u, "train", ranks)
    assert static_bytes(u, "train", ranks + 1).total <= held.total
    assert static_bytes(u, "train", ranks, stepped=False).total <= held.total
    if stage:
        assert held.total <= static_bytes(u.model_copy(update={"zero_stage": stage - 1}), "train", ranks).total


# --- what a phase needs besides --------------------------------------------------------------------------------------


def test_logits_peak_of_a_tiny_model() -> None:
    """github.com/huggingface/trl issue 3678 (2025): 2 x 256 tokens, vocabulary 151,665: 310 MB in fp32; 902 MB peak."""
    shape = load_model("tiny-2x128").model_copy(update={"vocabulary": 151665})
    logits = scoring_bytes(use(shape, zero_stage=0), 1, 512, 256).logits
    assert logits / LOGITS_COPIES / 1e6 == pytest.approx(310, abs=1)
    assert (44e6 + logits) / 1e6 == pytest.approx(902, rel=0.01)


def test_logits_in_chunks_over_ranks_and_not_at_all() -> None:
    whole = training_bytes(use(zero_stage=0), 1, 8192, 2048).logits
    assert whole == pytest.approx(LOGITS_COPIES * 4 * 8192 * 32000)
    assert training_bytes(use(zero_stage=0, logits_chunk_tokens=1024), 1, 8192, 2048).logits == whole / 8
    assert training_bytes(use(zero_stage=0, tensor_parallel=8), 1, 8192, 2048).logits == whole / 8
    assert training_bytes(use(zero_stage=0), 1, 8192, 2048, head="value").logits == 0
    staged = use(zero_stage=0, pipeline_parallel=2)
    assert [training_bytes(staged, 1, 8192, 2048, stage=s).logits for s in (0, 1)] == [0, whole]


def test_full_recomputation_keeps_layer_inputs_and_one_layer() -> None:
    """Korthikanti et al. 2022, section 5: 2 s b h bytes a layer; without, 34 s b h less the masks, plus attention."""
    tokens, hidden = 4096, 4096
    kept, whole = (
        training_bytes(use(zero_stage=0, recompute=r), 1, tokens, 2048, head="value").activations
        for r in ("full", "none")
    )
    one_layer = (whole - 2 * 2 * tokens * hidden) / 32
    assert kept == pytest.approx(32 * 2 * tokens * hidden + one_layer + 2 * 2 * tokens * hidden)
    assert 10 * kept / 4 < whole


@pytest.mark.parametrize(("stages", "chunks"), [(1, 1), (4, 1), (4, 2), (3, 3), (8, 2)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_activations_in_flight_are_those_of_the_executed_schedule(stages: int, chunks: int, groups: int) -> None:
    micro_batches = groups * stages
    u = use(LLAMA.model_copy(update={"layers": 48}), zero_stage=0, pipeline_parallel=stages, pipeline_chunks=chunks)
    for stage in range(stages):
        in_flight, most = 0, 0
        for step in stage_order(stage, stages, chunks, micro_batches):
            in_flight += -1 if step.backward else 1
            most = max(most, in_flight)
        assert chunks_in_flight(u, stage, micro_batches) == most


def test_the_first_stage_keeps_the_most_micro_batches() -> None:
    """1F1B: p - s micro-batches of L/p layers; value head, so only the last stage's output comes on top."""
    u = use(zero_stage=0, pipeline_parallel=4, recompute="none")
    kept = [training_bytes(u, 1, 2048, 2048, head="value", stage=s, micro_batches=16).activations for s in range(3)]
    assert kept == pytest.approx([kept[2] * 2, kept[2] * 1.5, kept[2]])


def test_zero3_gathers_no_more_than_there_is() -> None:
    """DeepSpeed's stage3_max_live_parameters (1e9) and stage3_prefetch_bucket_size (5e7)."""
    assert gathered_bytes(use(), 8) == 2 * (1e9 + 5e7)
    small = load_model("qwen2.5-0.5b")
    assert gathered_bytes(use(small), 8) == 2 * parameters(small)
    assert gathered_bytes(use(), 1) == gathered_bytes(use(zero_stage=2), 8) == 0


def test_reduction_buckets_only_where_gradients_move() -> None:
    assert training_bytes(use(zero_stage=2), 8, 512, 512).buffers == 2 * 2 * 5e8
    assert training_bytes(use(zero_stage=2, lora_rank=8), 8, 512, 512).buffers == 4 * lora_parameters(LLAMA, 8)
    assert training_bytes(use(zero_stage=2), 1, 512, 512).buffers == 0


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 100_000),
    length=st.integers(1, 4096),
    recompute=st.sampled_from(["none", "selective", "full"]),
    flash=st.booleans(),
    t=st.sampled_from([1, 2, 8]),
)
def test_phases_grow_with_tokens_and_shrink_with_ranks(
    tokens: int, length: int, recompute: str, flash: bool, t: int
) -> None:
    u = use(zero_stage=1, recompute=recompute, flash_attention=flash, tensor_parallel=t)
    train, score = training_bytes(u, 8, tokens, length), scoring_bytes(u, 8, tokens, length)
    assert training_bytes(u, 8, 2 * tokens, length).total >= train.total
    assert scoring_bytes(u, 8, 2 * tokens, length).total >= score.total
    assert train.total >= score.total
    halved = u.model_copy(update={"tensor_parallel": 2 * t})
    assert training_bytes(halved, 8, tokens, length).activations <= train.activations


def test_engine_holds_its_copy_and_the_cache() -> None:
    """Llama-3-8B: 8.03e9 parameters, 2 x 32 layers x 8 heads x 128 x 2 bytes a token."""
    u = use(load_model("llama-3-8b"))
    engine = engine_bytes(u, Generation(engine="engine"), 1000)
    assert engine.engine == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert engine.kv_cache == 131072 * 1000
    split = engine_bytes(u, Generation(engine="engine", tensor_parallel=8), 1000, own_weights=False)
    assert (split.engine, split.kv_cache) == (0, 131072 * 1000 / 8)


def test_what_drafts_is_in_the_engine_and_in_the_cache() -> None:
    """A head has layers like the model's and no embedding; a model of its own has everything."""
    u, small = use(load_model("llama-3-8b")), load_model("qwen2.5-0.5b")

    def engine(**drafting: object) -> Bytes:
        given = Speculative(tokens=3, acceptance_length=2, **drafting) if drafting else None
        return engine_bytes(u, Generation(engine="engine", speculative=given), 1000)

    plain, head, model, free = engine(), engine(layers=1), engine(draft="qwen2.5-0.5b", shape=small), engine(layers=0)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert head.engine - plain.engine == 2 * layer
    assert head.kv_cache == plain.kv_cache * 33 / 32
    assert model.engine - plain.engine == 2 * parameters(small)
    assert model.kv_cache - plain.kv_cache == 1000 * kv_bytes_per_token(small)
    assert free == plain


def test_bytes_add_up_by_component() -> None:
    both = Bytes(weights=1, kv_cache=2, host=5) + Bytes(weights=10, reserved=4, host=1)
    assert both == Bytes(weights=11, kv_cache=2, reserved=4, host=6)
    assert both.total == 17
    assert "host" not in both.components
    assert reserved_bytes(Overheads(reserved_bytes=7)).total == 7
    assert reserved_bytes(Overheads()).total > 0
