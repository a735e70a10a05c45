"""Operator times against FLOP and byte counts, hardware limits, and monotonicity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.costs.kernels import Rates, gemm_time, load_kernels
from rlhfsim.costs.operators import NO_TIME, Operators, OperatorTime, adam_bytes, lora_gemms, total
from rlhfsim.errors import InputError
from rlhfsim.lora import lora_parameters
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.hardware import Gpu
from rlhfsim.spec.loader import load_cluster
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Effects, ModelUse, Overheads

A100 = load_cluster("a100-80g-sxm").gpu
KERNELS = load_kernels(data_dir("hw_specs") / "kernels" / f"{A100.kernels}.yaml")
LLAMA = load_model("llama-7b")


def operators(gpu: Gpu = A100, *, efficiency: bool = True, **overheads: float) -> Operators:
    return Operators(gpu, KERNELS, Effects(efficiency=efficiency), Overheads(**overheads))


def use(shape: ModelSpec = LLAMA, **settings: object) -> ModelUse:
    return ModelUse(spec=shape.name, shape=shape, **settings)


def gpt(hidden: int, layers: int) -> ModelSpec:
    """GPT as in Megatron-LM's FLOP formula: multi-head attention, an MLP of 4 x hidden."""
    return ModelSpec(
        name="gpt", family="gpt2", source="unverified", layers=layers, hidden=hidden, heads=hidden // 128,
        kv_heads=hidden // 128, head_dim=128, ffn=4 * hidden, gated_mlp=False, vocabulary=51200, tied_embeddings=True,
        learned_positions=2048, norm="layer", qkv_bias=True, attention_output_bias=True, mlp_bias=True,
        max_positions=2048,
    )  # fmt: skip


def scaled(gpu: Gpu, *, flops: float = 1.0, bandwidth: float = 1.0) -> Gpu:
    """The GPU with faster units."""
    peaks = {k: v.model_copy(update={"value": v.value * flops}) for k, v in gpu.flops_per_second.items()}
    memory = gpu.memory_bytes_per_second
    memory = memory.model_copy(update={"value": memory.value * bandwidth})
    return gpu.model_copy(update={"flops_per_second": peaks, "memory_bytes_per_second": memory})


def every_operator(ops: Operators, u: ModelUse, tokens: float, t: int) -> dict[str, OperatorTime]:
    sequences = np.full(4, tokens / 4)
    return {
        "layer_forward": ops.layer_forward(u, tokens, t),
        "layer_backward": ops.layer_backward(u, tokens, t),
        "attention": ops.attention_prefill(u, sequences, t),
        "attention_backward": ops.attention_prefill(u, sequences, t, backward=True),
        "decode": ops.attention_decode(u, 8, tokens, t),
        "embedding": ops.embedding(u, tokens),
        "head": ops.head_forward(u, tokens, t),
        "head_backward": ops.head_backward(u, tokens, t),
        "value_head": ops.head_forward(u, tokens, t, "value"),
        "value_head_backward": ops.head_backward(u, tokens, t, "value"),
        "optimizer": ops.optimizer_step(u, tokens * 1e3),
    }


@pytest.mark.parametrize("hidden", [4096, 12288])
def test_megatron_flop_formula(hidden: int) -> None:
    """Narayanan et al. 2021, equation 3 without recomputation: 72 B S L h^2 (1 + S/6h + V/12Lh).

    Without fixed times, and seconds turned back to FLOPs by each kernel's asymptotic rate; causal attention computes
    (S + 1)/2S of what the formula counts. The weight-gradient and attention-backward ratios are ratios of time.
    """
    u, ops = use(gpt(hidden, 8)), operators(efficiency=False)
    b, s, layers, vocabulary = 4, 2048, 8, 51200
    peak = A100.flops_per_second["bf16"].value
    gemm, prefill = peak * KERNELS.gemm["bf16"].compute_efficiency, peak * KERNELS.prefill.compute_efficiency
    matrices = layers * (ops.layer_forward(u, b * s, 1) + ops.layer_backward(u, b * s, 1))
    head = ops.head_forward(u, b * s, 1) + ops.head_backward(u, b * s, 1)
    sequences = np.full(b, s)
    attention = layers * ops.attention_prefill(u, sequences, 1)
    flops = (matrices.flops + head.flops) * gemm + 3 * attention.flops * prefill * 2 * s / (s + 1)
    formula = 72 * b * s * layers * hidden**2 * (1 + s / (6 * hidden) + vocabulary / (12 * layers * hidden))
    assert flops == pytest.approx(formula, rel=0.001)


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 200_000), t=st.sampled_from([1, 2, 4, 8]), efficiency=st.booleans())
def test_parts_add_up(tokens: int, t: int, efficiency: bool) -> None:
    for name, time in every_operator(operators(efficiency=efficiency), use(), tokens, t).items():
        assert np.isfinite(time.seconds) and time.seconds > 0, name
        assert min(time.flops, time.hbm, time.launch) >= 0, name
        assert time.flops + time.hbm + time.launch == pytest.approx(float(time.seconds)), name


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 100_000), t=st.sampled_from([1, 2, 8]))
def test_faster_hardware_and_fewer_tokens_are_never_slower(tokens: int, t: int) -> None:
    u, base = use(), every_operator(operators(), use(), tokens, t)
    for gpu in (scaled(A100, bandwidth=2), scaled(A100, flops=2)):
        for name, time in every_operator(operators(gpu), u, tokens, t).items():
            assert time.seconds <= base[name].seconds * (1 + 1e-9), name
    for name, time in every_operator(operators(), u, 2 * tokens, t).items():
        assert time.seconds >= base[name].seconds, name


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 50_000), t=st.sampled_from([1, 4]))
def test_never_above_the_peaks(tokens: int, t: int) -> None:
    """Achieved FLOP/s and bytes/s: a layer's 2 x parameters x tokens, and its weights read once, bound it below."""
    u = use()
    weights = (4 * 4096 * 4096 + 3 * 4096 * 11008) / t
    peak, bandwidth = A100.flops_per_second["bf16"].value, A100.memory_bytes_per_second.value
    forward, backward = operators().layer_forward(u, tokens, t), operators().layer_backward(u, tokens, t)
    assert forward.seconds >= max(2 * weights * tokens / peak, 2 * weights / bandwidth)
    assert backward.seconds >= max(4 * weights * tokens / peak, 4 * weights / bandwidth)


def test_arrays_are_as_good_as_loops() -> None:
    u, ops = use(lora_rank=16), operators()
    tokens = np.array([[0, 1, 17], [2048, 5, 100_000]])
    for call in (
        lambda m: ops.layer_forward(u, m, 2),
        lambda m: ops.with_launches(ops.layer_backward(u, m, 2, "lora"), 2.0),
        lambda m: ops.head_backward(u, m, 2),
        lambda m: ops.attention_decode(u, m, 100 * m, 2),
    ):
        together = call(tokens)
        alone = [[float(call(int(m)).seconds) for m in row] for row in tokens]
        assert np.asarray(together.seconds) == pytest.approx(np.array(alone))
    sequences = np.array([[[100, 200, 0], [0, 0, 0]], [[50, 50, 50], [1, 2, 3]]])
    together = ops.attention_prefill(u, sequences, 2).seconds
    alone = [[float(ops.attention_prefill(u, s, 2).seconds) for s in row] for row in sequences]
    assert together == pytest.approx(np.array(alone))


def test_nothing_takes_no_time() -> None:
    u, ops = use(), operators()
    empty = [ops.layer_forward(u, 0, 1), ops.layer_backward(u, 0, 1), ops.head_forward(u, 0, 1), ops.embedding(u, 0),
             ops.head_backward(u, 0, 1), ops.attention_prefill(u, np.zeros(3), 1), ops.attention_decode(u, 0, 0, 1),
             ops.layer_backward(u, 100, 1, "none"), ops.optimizer_step(u, 0), total([]), NO_TIME]  # fmt: skip
    for time in [*empty, ops.with_launches(empty[0])]:
        assert time.parts == (0, 0, 0, 0)


def test_the_host_bounds_a_small_layer() -> None:
    ops = operators(eager_layer_seconds=1e-3)
    small, large = ops.layer_forward(use(), 1, 1), ops.layer_forward(use(), 100_000, 1)
    assert ops.with_launches(small).seconds == pytest.approx(1e-3)
    assert ops.with_launches(small, 2.0).seconds == pytest.approx(2e-3)
    assert ops.with_launches(small).flops == small.flops  # the wait is launch time
    assert ops.with_launches(large).seconds == large.seconds
    assert operators().eager_layer_seconds == pytest.approx(38 * KERNELS.host_launch_seconds.value)
    assert operators(efficiency=False, eager_layer_seconds=1e-3).eager_layer_seconds == 0


def test_without_efficiency_time_is_proportional_to_work() -> None:
    """Compute-bound sizes: twice the tokens are twice the time, half the matrix half of it."""
    ops, u = operators(efficiency=False), use()
    assert ops.layer_forward(u, 32768, 1).flops == pytest.approx(2 * ops.layer_forward(u, 16384, 1).flops)
    assert ops.layer_forward(u, 32768, 2).flops == pytest.approx(ops.layer_forward(u, 32768, 1).flops / 2)
    assert ops.layer_forward(u, 32768, 1).launch == 0


def test_streaming_kernels_of_a_layer_by_their_bytes() -> None:
    """Per token: two norms of 4 h bytes, two residual additions of 6 h, rope 4 (q + kv), gated activation 6 ffn. The
    products are compute-bound at this size, so all that memory limits is these."""
    tokens, hidden, ffn = 32768, 4096, 11008
    moved = {"rms_norm": 2 * 4 * hidden, "residual_add": 2 * 6 * hidden, "rope": 4 * 2 * hidden}
    moved["gated_activation"] = 6 * ffn
    bandwidth = A100.memory_bytes_per_second.value
    expected = sum(tokens * n / (bandwidth * KERNELS.memory[k].memory_efficiency) for k, n in moved.items())
    ops = operators(efficiency=False)
    assert ops.layer_forward(use(), tokens, 1).hbm == pytest.approx(expected)
    assert ops.layer_backward(use(), tokens, 1).hbm == pytest.approx(2 * expected)


def test_log_softmax_moves_14_bytes_a_logit() -> None:
    """Eager: 16-bit read, fp32 written, read and written again; the product before it is compute-bound."""
    rate = A100.memory_bytes_per_second.value * KERNELS.memory["cross_entropy"].memory_efficiency
    for t in (1, 8):
        head = operators(efficiency=False).head_forward(use(), 8192, t)
        assert head.hbm == pytest.approx((2 + 4 + 4 + 4) * 8192 * 32000 / t / rate)


def test_weight_gradients_have_their_own_rate() -> None:
    """The head's: (hidden, tokens) @ (tokens, vocabulary), slower than a forward product of that shape."""
    tokens, ops, curve = 4096, operators(), KERNELS.gemm["bf16"]
    trained, frozen = (ops.head_backward(use(), tokens, 1, trained=trained).seconds for trained in (True, False))
    rates = Rates(A100.flops_per_second["bf16"].value, A100.memory_bytes_per_second.value, 108)
    forward = gemm_time(curve, rates, 4096, 32000, tokens)
    expected = curve.weight_gradient_ratio * (forward.seconds - forward.launch_seconds) + forward.launch_seconds
    assert trained - frozen == pytest.approx(expected)
    assert curve.weight_gradient_ratio > 1


def test_lora_trains_little_and_adds_little() -> None:
    plain, lora, ops = use(), use(lora_rank=16), operators()
    tokens = 8192
    assert ops.layer_backward(lora, tokens, 1, "lora").seconds < 0.75 * ops.layer_backward(plain, tokens, 1).seconds
    added = ops.layer_forward(lora, tokens, 1).seconds / ops.layer_forward(plain, tokens, 1).seconds
    assert 1 < added < 1.25
    assert ops.layer_forward(lora, tokens, 1, adapters=False) == ops.layer_forward(plain, tokens, 1)
    assert sum(g.parameters for g in lora_gemms(lora, 1)) == lora_parameters(LLAMA, 16, 1)


def test_unequal_sequences_count_by_their_squares() -> None:
    ops, u = operators(efficiency=False), use()
    mixed = ops.attention_prefill(u, np.array([3000, 4000]), 1)
    equal = ops.attention_prefill(u, np.array([5000 / 2**0.5] * 2), 1)
    one = ops.attention_prefill(u, np.array([5000]), 1)
    assert mixed.flops == pytest.approx(equal.flops)
    assert mixed.flops == pytest.approx(one.flops, rel=1e-3)


def test_unfused_attention_is_two_products_and_the_scores_between() -> None:
    """32 heads x 4 sequences; 9 bytes a score go through softmax and its dropout, and each product moves them once."""
    sequences, ops = np.full(4, 2048), operators(efficiency=False)
    unfused = ops.attention_prefill(use(flash_attention=False), sequences, 1)
    gemm, scores = KERNELS.gemm["bf16"], 32 * 4 * 2048**2
    stream = A100.memory_bytes_per_second.value * KERNELS.memory["residual_add"].memory_efficiency
    flops_per_second = A100.flops_per_second["bf16"].value * gemm.compute_efficiency
    bytes_per_second = A100.memory_bytes_per_second.value * gemm.memory_efficiency
    moved = 2 * (scores + 2 * 32 * 4 * 2048 * 128)
    product = max(2 * scores * 128 / flops_per_second, moved / bytes_per_second)
    assert unfused.seconds == pytest.approx(2 * product + 9 * scores / stream)
    assert unfused.seconds > 1.5 * ops.attention_prefill(use(), sequences, 1).seconds
    backward = ops.attention_prefill(use(flash_attention=False), sequences, 1, backward=True)
    assert backward.seconds == pytest.approx(4 * product + 11 * scores / stream)


def test_products_beside_collectives_run_in_pieces() -> None:
    """Fewer rows are less efficient; in the backward only half of the products have pieces."""
    ops, u = operators(), use()
    whole, pieces = ops.layer_forward(u, 8192, 8), ops.layer_forward(u, 8192, 8, beside=True)
    assert whole.seconds < pieces.seconds < 1.6 * whole.seconds
    gradients = [ops.layer_backward(u, 8192, 8, beside=beside).seconds for beside in (False, True)]
    assert gradients[0] < gradients[1] < gradients[0] + pieces.seconds - whole.seconds


def test_the_loss_in_place_moves_52_bytes_a_logit() -> None:
    """38 in the forward and 14 in the backward, by the list of Megatron-LM's operations; 14 + 14 otherwise."""
    ops = operators(efficiency=False)
    rate = A100.memory_bytes_per_second.value * KERNELS.memory["cross_entropy"].memory_efficiency
    tokens, columns = 4096, LLAMA.vocabulary
    for way, moved in (("head_forward", 38), ("head_backward", 14)):
        plain, in_place = (getattr(ops, way)(use(logits_in_place=place), tokens, 1) for place in (False, True))
        assert in_place.seconds - plain.seconds == pytest.approx((moved - 14) * tokens * columns / rate)


def test_passes_of_the_optimizer() -> None:
    """fp16: cast 6, unscaled 8, norm 4, Adam 28, copy 6; bf16 with gradients in fp32: norm 4, Adam 28, copy 6."""
    assert adam_bytes(use(precision="fp16", optimizer_passes=True)) == 6 + 8 + 4 + 28 + 6
    assert adam_bytes(use(gradient_precision="fp32", optimizer_passes=True, zero_stage=1)) == 4 + 28 + 6


def test_adam_moves_28_bytes_a_parameter() -> None:
    """Master and two moments in fp32 read and written, a 16-bit gradient read, a 16-bit weight written."""
    ops = operators(efficiency=False)
    rate = A100.memory_bytes_per_second.value * KERNELS.memory["optimizer"].memory_efficiency
    assert ops.optimizer_step(use(), 1e9).seconds == pytest.approx((3 * 8 + 2 + 2) * 1e9 / rate)
    assert ops.optimizer_step_host(use(), 1e9, 100e9, 8) == pytest.approx(28e9 * 8 / 100e9)


def test_sequence_parallel_splits_norms_and_residuals() -> None:
    ops = operators(efficiency=False)
    together, split = (ops.layer_forward(use(sequence_parallel=sp), 8192, 8).hbm for sp in (False, True))
    assert split < together


def test_unknown_precision_names_the_gpus_own() -> None:
    gpu = A100.model_copy(update={"flops_per_second": {"fp16": A100.flops_per_second["bf16"]}})
    with pytest.raises(InputError, match=r"no peak for precision 'bf16'.*fp16"):
        operators(gpu).layer_forward(use(), 8, 1)


def test_operator_times_are_values() -> None:
    time = OperatorTime(3.0, 1.0, 1.5, 0.5)
    assert 2 * time == time + time == time * 2
    doubled = np.array([1.0, 2.0]) * time
    assert list(doubled.seconds) == [3.0, 6.0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        time.seconds = 1.0  # type: ignore[misc]
