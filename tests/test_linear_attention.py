"""Gated delta nets: FLOPs against PyTorch's counter, state and blocks against vLLM's numbers and brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, timeline_of

from rlhfsim import linear_attention, model
from rlhfsim.costs.engine import continuous_runs
from rlhfsim.costs.kernels import load_kernels
from rlhfsim.costs.operators import Operators
from rlhfsim.costs.passes import layer_matrices
from rlhfsim.costs.sync import sync_tensors
from rlhfsim.errors import InputError
from rlhfsim.memory import cache_bytes_per_token, sequence_state_bytes, state_blocks
from rlhfsim.metrics import stage_seconds
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import load_cluster
from rlhfsim.spec.model_spec import LayerKind, ModelSpec, load_model
from rlhfsim.spec.scenario import Effects, Generation, ModelUse, Overheads, Speculative

QWEN = load_model("qwen3.5-9b")
LINEAR = LayerKind(linear=True)
FULL = ModelSpec(**{k: v for k, v in QWEN.model_dump().items() if not k.startswith(("linear_", "attention_pattern"))})


def use(shape: ModelSpec = QWEN, **options: Any) -> ModelUse:
    return ModelUse(spec=shape.name, shape=shape, **options)


def generation(**options: Any) -> Generation:
    return Generation(engine="engine", **options)


@pytest.mark.parametrize("chunks", [1, 3])
def test_flops_are_those_of_the_products_in_transformers(chunks: int) -> None:
    """Its plain version solves with the triangle instead of inverting it, which the counter does not see."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason="no transformers")
    from torch.utils.flop_counter import FlopCounterMode

    c, heads, tokens = linear_attention.CHUNK_TOKENS, 2, chunks * linear_attention.CHUNK_TOKENS
    shape = QWEN.model_copy(update={"linear_value_heads": heads, "linear_key_head_dim": 24})
    keys = torch.randn(1, tokens, heads, shape.linear_key_head_dim)
    values, gate = torch.randn(1, tokens, heads, shape.linear_value_head_dim), torch.rand(1, tokens, heads)
    with FlopCounterMode(display=False) as counter:
        module.torch_chunk_gated_delta_rule(keys, keys, values, -gate, gate, chunk_size=c)
    solved = heads * (c**2 / 3 + 2 * c * (shape.linear_key_head_dim + shape.linear_value_head_dim))
    assert tokens * (linear_attention.forward_work(shape).flops - solved) == pytest.approx(counter.get_total_flops())


def test_kernels_of_the_backward_compute_more_than_autograd_would() -> None:
    """Twice the forward's products, and those that are computed again: w, u and the states."""
    forward, backward = linear_attention.forward_work(QWEN).flops, linear_attention.backward_work(QWEN).flops
    again = 32 * (4 * 128 * 128 + 64 * (2 * 128 + 2 * 128))
    assert 1 < backward / (2 * forward + again) < 1.2


def test_half_the_heads_are_half_the_work() -> None:
    for of in (linear_attention.forward_work, linear_attention.backward_work):
        assert of(QWEN, 2).flops * 2 == of(QWEN).flops and of(QWEN, 2).moved_bytes * 2 == of(QWEN).moved_bytes
    assert linear_attention.state_bytes(QWEN, 2, 4) * 4 == linear_attention.state_bytes(QWEN)


def test_the_state_of_a_layer_is_as_long_as_524_tokens_of_attention() -> None:
    """32 matrices of 128 x 128 in fp32 and three inputs of 8192 channels; a token has 2 x 4 heads x 256 in bf16."""
    assert linear_attention.state_bytes(QWEN) == 32 * 128 * 128 * 4 + 3 * 8192 * 2
    engine = generation(block_tokens=528)  # the next multiple of 16, as vLLM sets it
    assert cache_bytes_per_token(use(), engine) == 8 * 4096
    assert sequence_state_bytes(use(), engine) == 24 * linear_attention.state_bytes(QWEN)
    assert state_blocks(use(), engine) == 3  # three groups of eight linear layers: a page each
    assert state_blocks(use(load_model("qwen3-8b")), engine) == 0


def test_drafts_keep_a_state_each_and_are_made_by_full_attention() -> None:
    engine = generation(speculative=Speculative(tokens=3, acceptance_length=2.5))
    draft = engine.draft_use(use())
    assert draft and draft.shape.layer_kinds() == {LayerKind(): 1}
    assert cache_bytes_per_token(use(), engine) == 9 * 4096
    matrices, channels = 32 * 128 * 128 * 4, 8192 * 2
    assert sequence_state_bytes(use(), engine) == 24 * 4 * (matrices + (3 + 3) * channels)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=12), st.integers(0, 5), st.data()
)
def test_states_fill_the_cache_as_longer_prompts_would(
    samples: list[tuple[int, int]], states: int, data: st.DataObject
) -> None:
    """With room in a step for all prompts, so that their length delays nothing."""
    prompts, responses = map(np.array, zip(*samples, strict=True))
    block = data.draw(st.sampled_from([4, 16]))
    longest = max(-(-(p + r) // block) for p, r in samples) + states
    options: dict[str, Any] = {
        "max_sequences": 8,
        "step_tokens": 1 << 20,
        "block_tokens": block,
        "kv_blocks": data.draw(st.integers(longest, 4 * longest)),
    }
    runs = continuous_runs(prompts, responses, state_blocks=states, **options)
    longer = continuous_runs(prompts + states * block, responses, **options)
    assert runs.running.tolist() == longer.running.tolist() and runs.steps.tolist() == longer.steps.tolist()
    assert runs.preemptions == longer.preemptions


def operators(*, efficiency: bool = True) -> Operators:
    gpu = load_cluster("h100-80g-sxm").gpu
    kernels = load_kernels(data_dir("hw_specs") / "kernels" / f"{gpu.kernels}.yaml")
    return Operators(gpu, kernels, Effects(efficiency=efficiency), Overheads())


def test_only_full_attention_takes_longer_with_the_context() -> None:
    ops, sequences = operators(), np.array([8.0])

    def longer(of: ModelUse) -> float:
        short, long = (ops.attention_decode(of, sequences, tokens, 1).seconds for tokens in (0.0, 1e6))
        return float(np.squeeze(long - short))

    assert longer(use()) == pytest.approx(longer(use(FULL)) / 4) and longer(use(FULL)) > 0


def test_a_decode_step_reads_and_writes_every_state() -> None:
    ideal = operators(efficiency=False)
    rate = ideal.gpu.memory_bytes_per_second.value * ideal.kernels.memory["residual_add"].memory_efficiency
    of_mean_layer = ideal.attention_decode(use(), np.array([64.0]), 0.0, 1).seconds
    moved = 64 * (2 * 32 * 128 * 128 * 4 + 2 * 3 * 8192 * 2)
    assert float(of_mean_layer[0]) == pytest.approx(24 / 32 * moved / rate)


def test_prefill_of_linear_layers_is_linear() -> None:
    ops = operators(efficiency=False)

    def seconds(length: float, **options: Any) -> float:
        """Of a linear layer: what the mean layer takes, less the share of those with attention."""
        mean, full = (
            ops.attention_prefill(u, np.array([[length]]), 1, **options).seconds[0] for u in (use(), use(FULL))
        )
        return float(mean - full / 4) * 4 / 3

    assert seconds(8192.0) == pytest.approx(4 * seconds(2048.0))
    assert seconds(8192.0, tokens=np.array([2048.0])) == pytest.approx(seconds(2048.0))
    assert 2 < seconds(8192.0, backward=True) / seconds(8192.0) < 4


def test_a_layer_on_two_ranks_is_held_once() -> None:
    """The norm over a head's output is copied, and those over the hidden state."""
    whole, half = model.layer_parameters(QWEN, 1, LINEAR), model.layer_parameters(QWEN, 2, LINEAR)
    assert 2 * half - whole == 128 + 2 * 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"linear_key_heads": 0}, "linear_key_heads"),
        ({"linear_value_heads": 24}, "no multiple"),
        ({"attention_pattern": ("linear",)}, "plain attention beside them"),
        ({"attention_pattern": ("full",)}, "names no linear layers"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(**(QWEN.model_dump() | change))


@pytest.mark.parametrize(
    "options, message",
    [({"models.actor.context_parallel": 2}, "linear attention"), ({"generation.prefix_caching": True}, "not shared")],
)
def test_what_is_not_modelled_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(engine="engine", **({"models.actor.spec": "qwen3.5-9b"} | options))


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text"])
def test_tensors_are_those_of_transformers(model_type: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name = {"qwen3_next": "qwen3-next-80b-a3b", "qwen3_5_text": "qwen3.5-9b"}[model_type]
    shape = load_model(name)
    small = {"hidden_size": 64, "vocab_size": 64, "num_hidden_layers": shape.layers}
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **small))
    names = [name for name, _ in built.named_parameters() if ".experts." not in name]
    assert sync_tensors(use(shape)) == len(names) + shape.layers * shape.experts * 3  # each expert on its own
    matrices = [p for _, p in built.model.layers[0].linear_attn.named_parameters() if p.dim() > 1]
    assert layer_matrices(shape, LINEAR) == len(matrices) + 3  # and its MLP


@pytest.mark.parametrize("strategy", ["colocated", "asynchronous"])
def test_a_model_with_experts_and_linear_attention_runs(strategy: str) -> None:
    """Split over ranks in every way, with engines that go on from firing to firing in one of the strategies."""
    made = scenario(
        strategy,
        "engine",
        **{
            "algorithm.name": "grpo",
            "algorithm.reward": "function",
            "workload.responses_per_prompt": 8,
            "models.actor": {
                "spec": "qwen3.5-35b-a3b",
                "zero_stage": 1,
                "tensor_parallel": 2,
                "expert_parallel": 4,
                "expert_tensor_parallel": 1,
                "offload_optimizer": True,
            },
            "generation.tensor_parallel": 4,
            "effects.memory": False,
        },
    )
    seconds = stage_seconds(timeline_of(made))
    assert seconds["gen"] > 0 and seconds["update_actor"] > 0
