"""Transformer arithmetic and model files, against transformers, autograd, brute force and published numbers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim import model
from rlhfsim.errors import InputError
from rlhfsim.lora import lora_parameters
from rlhfsim.spec import data
from rlhfsim.spec.model_spec import (
    ExpertSplit,
    LayerKind,
    ModelSpec,
    from_hf_config,
    hf_config,
    load_model,
    model_names,
)

SHIPPED = model_names()
REAL_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "opt", "gpt2", "gpt_neox")


def plain(**changes: Any) -> ModelSpec:
    """A small gated decoder; every test changes what it is about."""
    shape: dict[str, Any] = {
        "name": "plain",
        "family": "llama",
        "source": "unverified",
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 16,
        "ffn": 96,
        "gated_mlp": True,
        "vocabulary": 100,
        "tied_embeddings": False,
        "norm": "rms",
        "max_positions": 128,
    }
    return ModelSpec(**(shape | changes))


def gpt3_like(layers: int, hidden: int, heads: int) -> ModelSpec:
    """The shape for which Megatron's papers state their formulas: multi-head, MLP of 4 x hidden, GELU."""
    return plain(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        gated_mlp=False,
        vocabulary=51200,
        norm="layer",
        max_positions=2048,
    )


@st.composite
def shapes(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    hidden = draw(st.sampled_from([32, 64, 96]))
    return plain(
        layers=draw(st.integers(1, 6)),
        hidden=hidden,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        head_dim=draw(st.sampled_from([4, 16])),
        ffn=draw(st.sampled_from([48, 96, 240])),
        gated_mlp=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        vocabulary=draw(st.integers(1, 16)) * 48,
        norm=draw(st.sampled_from(["rms", "layer"])),
        qkv_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        embedding_size=draw(st.sampled_from([None, 16, hidden])),
        learned_positions=draw(st.sampled_from([0, 50])),
    )


# --- parameters ------------------------------------------------------------------------------------------------------

GQA: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}  # fmt: skip
MLA: dict[str, Any] = EXPERTS | {
    "num_key_value_heads": 6, "kv_lora_rank": 24, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 16,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "num_hidden_layers": 5, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3, "pad_token_id": 0,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
}  # fmt: skip
HF_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GQA | {"attention_bias": True, "mlp_bias": True},
    "mistral": GQA | {"num_key_value_heads": 3, "head_dim": 24, "sliding_window": None},
    "qwen2": GQA | {"tie_word_embeddings": True},
    "qwen3": GQA | {"head_dim": 32},
    "gemma": GQA | {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": GQA | {"head_dim": 32, "num_hidden_layers": 4},
    "opt": {
        "hidden_size": 96,
        "ffn_dim": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 211,
        "word_embed_proj_dim": 40,
        "do_layer_norm_before": False,
        "max_position_embeddings": 77,
    },
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 77, "vocab_size": 211},
    "gpt_neox": {k: v for k, v in GQA.items() if k != "num_key_value_heads"},
    "gemma3_text": GQA | {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 16},
    "phi3": GQA | {"sliding_window": 63, "pad_token_id": 0},
    "glm4": GQA | {"head_dim": 16, "pad_token_id": 0},
    "mixtral": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": GQA | {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72,
    },
    "qwen3_moe": GQA | {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "gpt_oss": GQA | {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "deepseek_v2": GQA | MLA | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": GQA | MLA | {"q_lora_rank": 48, "attention_bias": True, "n_group": 2, "topk_group": 1},
    "glm4_moe": GQA | EXPERTS | {"head_dim": 32, "use_qk_norm": True, "attention_bias": True},
    "qwen3_5_text": GQA | DELTA,
    "qwen3_next": GQA | DELTA | ROUTED,
    "qwen3_5_moe_text": {k: v for k, v in (GQA | DELTA | ROUTED).items() if k != "intermediate_size"},
    "bloom": {"hidden_size": 96, "n_layer": 3, "n_head": 6, "vocab_size": 211, "seq_length": 77},
    "gptj": {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 77, "vocab_size": 211, "rotary_dim": 8},
    "falcon": {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_kv_heads": 2, "vocab_size": 211,
        "new_decoder_architecture": True,
    },
}  # fmt: skip
NOT_IN_TRANSFORMERS = {"internlm2": GQA, "baichuan": GQA, "kimi_k2": GQA | MLA | {"q_lora_rank": 48}}


def hf_config_of(spec: ModelSpec) -> dict[str, Any]:
    """The config.json that describes `spec`, written independently of the reader under test."""
    if spec.linear:
        names = {"linear": "linear_attention", "full": "full_attention"}
        return _hf_config_of_attention(spec) | {
            "layer_types": [names[spec.attention_pattern[k % 4]] for k in range(spec.layers)],
            "linear_num_key_heads": spec.linear_key_heads,
            "linear_num_value_heads": spec.linear_value_heads,
            "linear_key_head_dim": spec.linear_key_head_dim,
            "linear_value_head_dim": spec.linear_value_head_dim,
            "linear_conv_kernel_dim": spec.linear_conv_kernel,
        }
    return _hf_config_of_attention(spec)


def _hf_config_of_attention(spec: ModelSpec) -> dict[str, Any]:
    if spec.experts:
        return _hf_config_with_experts(spec)
    if spec.family == "gptj":
        return {
            "model_type": "gptj",
            "n_embd": spec.hidden,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "vocab_size": spec.vocabulary,
        }
    if spec.family == "falcon":
        return {
            "model_type": "falcon",
            "hidden_size": spec.hidden,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_kv_heads": spec.kv_heads,
            "new_decoder_architecture": True,
            "vocab_size": spec.vocabulary,
        }
    if spec.family == "opt":
        return {
            "model_type": "opt",
            "hidden_size": spec.hidden,
            "ffn_dim": spec.ffn,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "vocab_size": spec.vocabulary,
            "max_position_embeddings": spec.max_positions,
            "word_embed_proj_dim": spec.embedding_width,
            "do_layer_norm_before": spec.final_norm,
        }
    return {
        "model_type": spec.family,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": spec.tied_embeddings,
        "max_position_embeddings": spec.max_positions,
        "sliding_window": spec.window or None,
        "pad_token_id": None,
    }


def _hf_config_with_experts(spec: ModelSpec) -> dict[str, Any]:
    llama = {
        "model_type": spec.family.replace("kimi_k2", "deepseek_v3"),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": spec.tied_embeddings,
        "num_experts_per_tok": spec.experts_per_token,
        "num_experts": spec.experts,
        "num_local_experts": spec.experts,
        "n_routed_experts": spec.experts,
        "moe_intermediate_size": spec.expert_ffn,
        "head_dim": spec.head_dim,
        "pad_token_id": None,
    }
    shared = {
        "first_k_dense_replace": spec.first_dense_layers,
        "n_shared_experts": spec.shared_expert_ffn // spec.expert_ffn,
        "shared_expert_intermediate_size": spec.shared_expert_ffn,
    }
    latent = {
        "q_lora_rank": spec.q_lora_rank or None,
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_nope_head_dim": spec.qk_nope_head_dim,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "v_head_dim": spec.v_head_dim,
    }
    names = {
        "mixtral": set(llama) - {"num_experts", "n_routed_experts", "moe_intermediate_size"},
        "gpt_oss": set(llama) - {"num_experts", "n_routed_experts", "moe_intermediate_size"},
        "qwen3_moe": set(llama) - {"num_local_experts", "n_routed_experts"},
        "qwen3_next": (set(llama) | {"shared_expert_intermediate_size"}) - {"num_local_experts", "n_routed_experts"},
        "qwen3_5_moe_text": (set(llama) | {"shared_expert_intermediate_size"})
        - {"num_local_experts", "n_routed_experts", "intermediate_size"},
        "qwen2_moe": (set(llama) | {"shared_expert_intermediate_size"}) - {"num_local_experts", "n_routed_experts"},
    }
    own = names.get(spec.family) or (set(llama | shared | latent) - {
        "num_experts", "num_local_experts", "head_dim", "shared_expert_intermediate_size"
    })  # fmt: skip
    return {key: value for key, value in (llama | shared | latent).items() if key in own}


def count_in_transformers(config: dict[str, Any], auto_class: str, **more: Any) -> int:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    values = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = transformers.AutoConfig.for_model(config["model_type"], **values, **more)
    with torch.device("meta"):
        built = getattr(transformers, auto_class).from_config(hf_config)
    return sum(parameter.numel() for parameter in built.parameters())


def read(config: dict[str, Any], folder: Path) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return from_hf_config(folder)


@pytest.mark.parametrize("model_type", HF_CONFIGS)
def test_parameters_equal_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    config = {"model_type": model_type} | HF_CONFIGS[model_type]
    spec = read(config, tmp_path)
    assert model.parameters(spec, "lm") == count_in_transformers(config, "AutoModelForCausalLM")
    assert model.parameters(spec, "none") == count_in_transformers(config, "AutoModel")
    if model_type in ("glm4_moe", "qwen3_5_moe_text"):
        return  # transformers has no such class
    value = count_in_transformers(config, "AutoModelForSequenceClassification", num_labels=1)
    assert model.parameters(spec, "value") == value


@pytest.mark.parametrize("model_type", ["falcon", "falcon-40b", "gemma3"])
def test_variants_equal_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    """Falcon 7B (multi-query, one norm) and the older 40B without it; the text part of a multimodal configuration."""
    if model_type == "gemma3":
        text = {"model_type": "gemma3_text"} | HF_CONFIGS["gemma3_text"]
        spec = read({"model_type": "gemma3", "text_config": text, "vision_config": {}}, tmp_path)
        assert model.parameters(spec) == count_in_transformers(text, "AutoModelForCausalLM")
        return
    old = {k: v for k, v in HF_CONFIGS["falcon"].items() if k not in ("num_kv_heads", "new_decoder_architecture")}
    config = {"model_type": "falcon"} | old | {"multi_query": model_type == "falcon", "parallel_attn": True}
    assert model.parameters(read(config, tmp_path)) == count_in_transformers(config, "AutoModelForCausalLM")


@pytest.mark.parametrize("beside, inside, tied", [(True, None, True), (True, False, False), (None, None, False)])
def test_tied_embeddings_may_be_said_beside_the_text_part(
    beside: bool | None, inside: bool | None, tied: bool, tmp_path: Path
) -> None:
    text = HF_CONFIGS["qwen3_5_text"] | {"model_type": "qwen3_5_text", "tie_word_embeddings": inside}
    config = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": beside}
    if inside is None:
        del text["tie_word_embeddings"]
    assert read(config, tmp_path).tied_embeddings == tied


@pytest.mark.parametrize(
    "model_type, twin", [("internlm2", "llama"), ("baichuan", "llama"), ("kimi_k2", "deepseek_v3")]
)
def test_families_outside_transformers_are_like_their_twins(model_type: str, twin: str, tmp_path: Path) -> None:
    config = NOT_IN_TRANSFORMERS[model_type]
    spec = read({"model_type": model_type} | config, tmp_path)
    assert model.parameters(spec) == count_in_transformers({"model_type": twin} | config, "AutoModelForCausalLM")


@pytest.mark.parametrize("model_type", HF_CONFIGS)
def test_what_transformers_saves_can_be_read(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.AutoConfig.for_model(model_type, **HF_CONFIGS[model_type]).save_pretrained(tmp_path)
    written = {"model_type": model_type} | HF_CONFIGS[model_type]
    assert model.parameters(from_hf_config(tmp_path)) == count_in_transformers(written, "AutoModelForCausalLM")


@pytest.mark.parametrize(
    "name",
    [
        "llama-33b", "llama-3-8b", "opt-125m", "opt-350m", "opt-66b", "qwen2.5-0.5b", "gemma-2-2b", "mistral-7b",
        "llama-3.1-405b", "qwen3-4b", "gemma-3-27b", "phi-4", "r1-distill-qwen-1.5b", "falcon-180b", "gpt-j-6b",
        "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b",
        "mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "deepseek-v2-lite", "deepseek-v3",
    ],
)  # fmt: skip
def test_shipped_shapes_equal_transformers(name: str) -> None:
    spec = load_model(name)
    assert model.parameters(spec) == count_in_transformers(hf_config_of(spec), "AutoModelForCausalLM")


@pytest.mark.parametrize(
    "name, billions", [("deepseek-v3", 37), ("deepseek-v2", 21), ("gpt-oss-120b", 5.1), ("gpt-oss-20b", 3.6)]
)
def test_active_parameters_are_those_published(name: str, billions: float) -> None:
    """Rounded by the authors, who count the head and not the input embedding."""
    spec = load_model(name)
    assert spec.published_active_parameters and spec.published_active_parameters.value == billions * 1e9
    active = model.active_parameters(spec) - model.embedding_parameters(spec)
    assert round(active / 1e9, 1 if billions < 10 else None) == billions


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_of_a_shape_gives_that_shape(name: str, tmp_path: Path) -> None:
    """Or says why there can be none."""
    spec = load_model(name)
    if spec.experts or spec.kv_lora_rank or spec.linear or spec.family not in REAL_FAMILIES:
        with pytest.raises(InputError, match="real run"):
            hf_config(spec)
        return
    (tmp_path / "config.json").write_text(json.dumps(hf_config(spec)))
    texts = {"name", "description", "source", "sources", "published_parameters"}
    texts |= {"window", "attention_pattern"}  # full attention everywhere
    assert from_hf_config(tmp_path).model_dump(exclude=texts) == spec.model_dump(exclude=texts)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_name_their_source_and_match_what_is_published(name: str) -> None:
    spec = load_model(name)
    assert spec.name == name
    assert spec.source in spec.sources and len(spec.sources[spec.source]) > 20
    if spec.published_parameters:
        assert model.parameters(spec) == pytest.approx(spec.published_parameters.value, rel=0.005)


def test_nominal_size_of_opt_350m_is_not_its_size() -> None:
    assert round(model.parameters(load_model("opt-350m")) / 1e6) == 331


@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-33b", "llama-65b"])
def test_twelve_l_h_squared_is_slightly_low_for_llama(name: str) -> None:
    """12 L h^2 + V h counts one embedding and an MLP of 4 x hidden: 0.9 to 2.5 % below the truth."""
    spec = load_model(name)
    estimate = 12 * spec.layers * spec.hidden**2 + spec.vocabulary * spec.hidden
    assert 0.009 <= 1 - estimate / model.parameters(spec) <= 0.025


@given(shapes())
def test_gemms_are_the_matrices_of_a_layer(spec: ModelSpec) -> None:
    mlp = (3 if spec.gated_mlp else 2) * spec.hidden * spec.ffn
    attention = 2 * spec.hidden * spec.head_dim * (spec.heads + spec.kv_heads)
    assert sum(gemm.n * gemm.k for gemm in model.layer_gemms(spec)) == attention + mlp == model.matmul_parameters(spec)


@given(shapes(), st.data())
def test_tensor_parallel_ranks_hold_the_layer_once_and_copies_of_kv_heads(spec: ModelSpec, draw: st.DataObject) -> None:
    t = draw.draw(st.sampled_from(model.tensor_parallel_choices(spec)))
    copies = max(0, t - spec.kv_heads) * 2 * spec.head_dim * spec.hidden
    assert t * model.matmul_parameters(spec, t) == model.matmul_parameters(spec) + copies


@given(shapes(), st.data(), st.sampled_from(["lm", "value", "none"]))
def test_stages_hold_the_model_once_and_tied_embeddings_twice(spec: ModelSpec, draw: st.DataObject, head: Any) -> None:
    p = draw.draw(st.sampled_from(model.pipeline_parallel_choices(spec)))
    held = sum(model.rank_parameters(spec, head, pipeline_parallel=p, stage=stage) for stage in range(p))
    twice = head == "lm" and spec.tied_embeddings and p > 1
    assert held == model.parameters(spec, head) + twice * spec.vocabulary * spec.embedding_width


@given(shapes(), st.data())
def test_tensor_parallel_copies_only_what_is_not_split(spec: ModelSpec, draw: st.DataObject) -> None:
    t = draw.draw(st.sampled_from([t for t in model.tensor_parallel_choices(spec) if spec.kv_heads % t == 0]))
    norm = spec.hidden * (2 if spec.norm == "layer" else 1)
    projections = 2 * spec.hidden * spec.embedding_width if spec.embedding_width != spec.hidden else 0
    copied = spec.layers * (2 * norm + spec.hidden * spec.mlp_bias) + norm  # the bias after a split sum is whole
    copied += spec.learned_positions * spec.hidden + projections
    ranks = t * model.rank_parameters(spec, tensor_parallel=t)
    rounding = 2 * t * spec.embedding_width  # the vocabulary is split upwards
    assert 0 <= ranks - (t - 1) * copied - model.parameters(spec) <= rounding


@pytest.mark.parametrize(
    "name, gigabytes", [("llama-7b", 0.64), ("llama-13b", 1.00), ("llama-33b", 1.95), ("llama-65b", 3.20)]
)
def test_lora_factors_of_rank_128_in_fp16(name: str, gigabytes: float) -> None:
    assert 2 * lora_parameters(load_model(name), 128) / 1e9 == pytest.approx(gigabytes, abs=0.006)


@pytest.mark.parametrize("name, modules", [("llama-3-8b", 7), ("opt-350m", 6)])
def test_lora_of_some_layers_adds_two_factors_per_module(name: str, modules: int) -> None:
    spec = load_model(name)
    per_layer = lora_parameters(spec, 1, layers=1)
    widths = 2 * spec.hidden + 2 * spec.query_width + 2 * (spec.hidden + spec.kv_width)
    assert per_layer == widths + (modules - 4) * (spec.hidden + spec.ffn)
    assert lora_parameters(spec, 16) == 16 * spec.layers * per_layer


# --- experts ---------------------------------------------------------------------------------------------------------


def routed(**changes: Any) -> ModelSpec:
    experts = {"experts": 8, "experts_per_token": 2, "expert_ffn": 48, "shared_expert_ffn": 24, "first_dense_layers": 1}
    return plain(**(experts | {"layers": 4, "expert_bias": True} | changes))


@pytest.mark.parametrize("parallel, tensor", [(1, 1), (2, 1), (8, 1), (1, 4), (4, 2), (8, 16)])
def test_ranks_that_share_the_experts_hold_each_once(parallel: int, tensor: int) -> None:
    spec, split = routed(expert_bias=False), ExpertSplit(parallel, tensor)
    assert parallel * tensor * model.routed_parameters(spec, 1, split) == model.routed_parameters(spec)
    assert model.routed_parameters(spec) == 8 * 3 * 48 * 64
    dense = model.layers_parameters(spec) - model.layers_routed_parameters(spec)
    assert model.rank_parameters(spec, split=split) == (
        model.embedding_parameters(spec) + dense + 3 * model.routed_parameters(spec, 1, split)
        + model.head_parameters(spec)
    )  # fmt: skip


def test_active_parameters_leave_out_the_experts_of_other_tokens() -> None:
    spec = routed()
    per_expert = 3 * 48 * 64 + 2 * 48 + 64
    assert model.parameters(spec) - model.active_parameters(spec) == 3 * 6 * per_expert
    assert model.active_parameters(load_model("llama-7b")) == model.parameters(load_model("llama-7b"))


@pytest.mark.parametrize("t, parallel, tensor", [(1, 1, 1), (1, 8, 1), (4, 2, 4), (4, 8, 1), (2, 4, 2)])
def test_rows_of_all_ranks_are_the_tokens_times_top_k(t: int, parallel: int, tensor: int) -> None:
    """Ranks that share the experts hold tokens / t each; every row is computed in `tensor` shards of an expert."""
    spec, tokens = routed(), 96
    up, down = model.expert_gemms(spec, t, ExpertSplit(parallel, tensor))[-2:]
    ranks = parallel * tensor
    assert ranks * up.rows_per_token * tokens == tensor * (ranks * tokens / t) * spec.experts_per_token
    assert sum(g.flops(tokens) for g in (up, down)) * ranks == pytest.approx(
        2 * (ranks * tokens / t) * spec.experts_per_token * 3 * 48 * 64
    )


@given(st.integers(0, 40), st.integers(1, 4))
def test_experts_that_tokens_touch_are_those_of_random_choices(tokens: int, top_k: int) -> None:
    gemm = model.expert_gemms(routed(experts=8, experts_per_token=top_k))[-1]
    # Each token misses a given expert with probability 1 - k / E, independently of the other tokens.
    missed = 1.0
    for _ in range(tokens):
        missed *= 1 - top_k / 8
    assert gemm.touched(tokens) == pytest.approx(8 * (1 - missed))
    assert gemm.touched(10**6) == pytest.approx(8)


def test_bytes_of_the_all_to_all() -> None:
    """DeepSeek-V3 with 64-way expert parallelism: 8 x 7168 x 2 bytes a token, 63 of 64 of them to other ranks."""
    spec = load_model("deepseek-v3")
    assert model.expert_exchange_bytes(spec, 4096, ExpertSplit(64)) == 4096 * 8 * 7168 * 2 * 63 / 64
    assert model.expert_exchange_bytes(spec, 4096, ExpertSplit(1, 8)) == 0


@pytest.mark.parametrize(
    "split, field, message",
    [
        (ExpertSplit(3), "expert_parallel", "allowed: 1, 2, 4, 8"),
        (ExpertSplit(0), "expert_parallel", "0 does not divide the 8 experts"),
        (ExpertSplit(1, 5), "expert_tensor_parallel", "its experts are 48 wide"),
    ],
)
def test_splits_that_do_not_divide_are_refused(split: ExpertSplit, field: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        model.expert_gemms(routed(), 1, split)
    assert error.value.field == field and message in str(error.value)


def test_tensor_parallelism_must_divide_experts_and_shared_expert() -> None:
    assert model.tensor_parallel_choices(routed(heads=8, kv_heads=8)) == [1, 2, 4, 8]
    assert model.tensor_parallel_choices(routed(heads=8, kv_heads=8, shared_expert_ffn=6, ffn=5)) == [1]
    assert model.tensor_parallel_choices(routed(first_dense_layers=0, ffn=5)) == [1, 2, 4]  # no layer has that MLP


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor, pipeline, field, allowed",
    [
        ("llama-13b", 3, 1, "tensor_parallel", "1, 2, 4, 8"),  # 40 heads, an MLP of 13824 = 2^9 x 27
        ("llama-33b", 8, 1, "tensor_parallel", "1, 2, 4"),  # 52 heads, an MLP of 17920 = 2^9 x 35
        ("qwen2.5-7b", 7, 1, "tensor_parallel", "1, 2, 4"),
        ("llama-7b", 0, 1, "tensor_parallel", "1, 2, 4, 8, 16, 32"),
        ("llama-7b", 1, 3, "pipeline_parallel", "1, 2, 4, 8, 16, 32"),
        ("llama-7b", 1, -1, "pipeline_parallel", "1, 2, 4, 8, 16, 32"),
    ],
)
def test_layouts_that_do_not_divide_name_those_that_do(
    name: str, tensor: int, pipeline: int, field: str, allowed: str
) -> None:
    with pytest.raises(InputError) as error:
        model.check_layout(load_model(name), tensor, pipeline, field="models.actor")
    assert error.value.field == f"models.actor.{field}"
    assert f"(allowed: {allowed})" in str(error.value)


def test_every_tensor_parallel_function_checks_the_layout() -> None:
    spec = load_model("llama-13b")
    for call in (model.layer_gemms, model.matmul_parameters, model.layer_parameters):
        with pytest.raises(InputError):
            call(spec, 3)
    for call in (model.kv_bytes_per_token, model.rank_parameters):
        with pytest.raises(InputError):
            call(spec, tensor_parallel=3)
    with pytest.raises(InputError):
        model.activation_bytes_per_token(spec, 512, tensor_parallel=3)
    with pytest.raises(InputError, match="counted from 0"):
        model.rank_parameters(spec, pipeline_parallel=2, stage=2)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 40), st.booleans())
def test_attention_flops_count_every_pair(new: int, cached: int, causal: bool) -> None:
    spec = plain(heads=4, head_dim=16)
    pairs = sum(cached + (query + 1 if causal else new) for query in range(new))
    # two products (scores, weighted values) of two FLOPs per element of the head dimension
    assert model.attention_flops(spec, new, cached, causal=causal) == pairs * 2 * 2 * 4 * 16


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 60))
def test_windowed_attention_flops_count_every_pair(new: int, cached: int, window: int) -> None:
    pairs = sum(min(cached + query + 1, window) for query in range(new))
    assert model.attended_pairs(new, cached, window) == pairs
    assert model.attention_flops(plain(), new, cached, window=window) == pairs * 2 * 2 * 4 * 16


def test_flops_of_experts_and_latent_attention_equal_pytorchs_counter() -> None:
    """Experts run as loops of products in transformers, so that PyTorch counts what the router chose."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    for model_type in ("mixtral", "qwen2_moe", "deepseek_v3"):
        config = HF_CONFIGS[model_type] | {"attn_implementation": "eager", "experts_implementation": "eager"}
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
        with tempfile.TemporaryDirectory() as folder:
            spec = read({"model_type": model_type} | HF_CONFIGS[model_type], Path(folder))
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            built(inputs_embeds=torch.randn(2, 48, spec.hidden), use_cache=False)
        assert model.forward_flops(spec, 2, 48, causal=False) == counter.get_total_flops(), model_type


@given(st.integers(1, 30), st.integers(1, 30))
def test_prefill_and_decode_together_are_one_forward(prompt: int, response: int) -> None:
    spec = load_model("llama-3-8b")
    steps = sum(model.attention_flops(spec, 1, prompt + step) for step in range(response))
    whole = model.attention_flops(spec, prompt + response)
    assert model.attention_flops(spec, prompt) + steps == pytest.approx(whole)


@given(st.integers(1, 8), st.sampled_from([512, 2048]), st.sampled_from([(24, 2048, 16), (96, 12288, 96)]))
def test_training_flops_are_megatrons(batch: int, sequence: int, shape: tuple[int, int, int]) -> None:
    """Megatron-LM's 96 B s l h^2 (1 + s/6h + V/16lh), with full recomputation.

    It takes attention as dense and recomputes no logits.
    """
    layers, hidden, heads = shape
    spec = gpt3_like(layers, hidden, heads)
    vocabulary = spec.vocabulary / (16 * layers * hidden)
    expected = 96 * batch * sequence * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary)
    assert model.training_flops(spec, batch, sequence, recompute="full", causal=False) == pytest.approx(expected)


def count_flops(frozen: bool) -> tuple[ModelSpec, int, int]:
    """Products counted by PyTorch in one forward and one backward pass of a small Llama."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    spec = load_model("tiny-2x128")
    config = transformers.AutoConfig.for_model(
        "llama", attn_implementation="eager", **{k: v for k, v in hf_config_of(spec).items() if k != "model_type"}
    )
    built = transformers.AutoModelForCausalLM.from_config(config)
    embedded = torch.zeros(2, 48, spec.hidden, requires_grad=True)
    if frozen:
        built.requires_grad_(False)
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward:
        built(inputs_embeds=embedded, use_cache=False)
    with both:
        built(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    return spec, forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_equal_pytorchs_counter(frozen: bool) -> None:
    spec, forward, both = count_flops(frozen)
    assert model.forward_flops(spec, 2, 48, causal=False) == forward
    assert model.training_flops(spec, 2, 48, frozen_weights=frozen, causal=False) == both


def test_the_head_reads_only_the_tokens_asked_for() -> None:
    spec = load_model("llama-7b")
    none, last, all_tokens = (model.forward_flops(spec, 4, 256, head_tokens=n) for n in (0, 4, None))
    assert last - none == 2 * 4 * spec.vocabulary * spec.hidden
    assert all_tokens - none == 2 * 4 * 256 * spec.vocabulary * spec.hidden


# --- KV cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor, pipeline, kibibytes",
    [
        ("llama-2-7b", 1, 1, 512),
        ("llama-3-8b", 1, 1, 128),
        ("llama-2-70b", 1, 1, 320),
        ("llama-3-8b", 8, 1, 16),
        ("llama-3-8b", 16, 1, 16),  # 8 KV heads on 16 ranks: each head is held twice
        ("llama-2-7b", 2, 4, 64),
    ],
)
def test_kv_bytes_per_token(name: str, tensor: int, pipeline: int, kibibytes: int) -> None:
    spec = load_model(name)
    per_token = model.kv_bytes_per_token(spec, 2, tensor_parallel=tensor, pipeline_parallel=pipeline)
    assert per_token == kibibytes * 1024


@pytest.mark.parametrize("name, bytes_per_layer", [("deepseek-v3", 1152), ("deepseek-v2-lite", 1152)])
def test_latent_attention_caches_one_vector_whatever_the_split(name: str, bytes_per_layer: int) -> None:
    """512 + 64 elements of two bytes (DeepSeek-V2 report, section 2.1.4: 4.5 head dimensions' worth of 128)."""
    spec = load_model(name)
    for tensor in (1, 8):
        assert model.kv_bytes_per_token(spec, 2, tensor_parallel=tensor) == spec.layers * bytes_per_layer


@given(st.integers(1, 300), st.integers(1, 64), st.sampled_from([("full",), ("window",), ("window", "full", "full")]))
def test_windows_keep_the_last_tokens_only(tokens: int, window: int, pattern: tuple[str, ...]) -> None:
    spec = plain(layers=5, window=window, attention_pattern=pattern)
    per_layer = [min(tokens, spec.window) if pattern[i % len(pattern)] == "window" else tokens for i in range(5)]
    held = tokens * model.kv_bytes_per_token(spec, 2, sequence_tokens=tokens)
    assert held == pytest.approx(sum(per_layer) * 2 * 2 * 4 * 16)


# --- activations -----------------------------------------------------------------------------------------------------

MEGATRON = {"flash_attention": False, "dropout": True}


@pytest.mark.parametrize("hidden, heads, layers", [(6144, 64, 48), (12288, 96, 96), (20480, 128, 105)])
@pytest.mark.parametrize("t", [1, 8])
def test_activations_are_korthikantis(hidden: int, heads: int, layers: int, t: int) -> None:
    """Table 2 of Korthikanti et al. 2022, for its 22B, 175B and 530B models."""
    spec, s = gpt3_like(layers, hidden, heads), 2048
    scores = 5 * heads * s / hidden

    def kept(**options: Any) -> float:
        return model.activation_bytes_per_token(spec, s, tensor_parallel=t, **MEGATRON, **options) / hidden

    assert kept() == pytest.approx(10 + 24 / t + scores / t)
    assert kept(sequence_parallel=True) == pytest.approx((34 + scores) / t)
    assert kept(recompute="selective") == pytest.approx(10 + 24 / t)
    assert kept(recompute="selective", sequence_parallel=True) == pytest.approx(34 / t)
    assert kept(recompute="full") == pytest.approx(2)


@pytest.mark.parametrize("hidden, heads, quadratic, saved", [(12288, 96, 80, 80 / 114), (20480, 128, 64, 64 / 98)])
def test_what_selective_recomputation_saves(hidden: int, heads: int, quadratic: int, saved: float) -> None:
    """Korthikanti et al. (read in public notes): 5 a s / h is 80 for GPT-3 and 64 for MT-NLG, beside 34 that stay."""
    spec = gpt3_like(1, hidden, heads)
    everything = model.activation_bytes_per_token(spec, 2048, **MEGATRON)
    selective = model.activation_bytes_per_token(spec, 2048, recompute="selective", **MEGATRON)
    assert (everything - selective) / hidden == pytest.approx(quadratic)
    assert 1 - selective / everything == pytest.approx(saved)


def saved_for_backward(spec: ModelSpec, tokens: int, attention: str, precision: str) -> int:
    """Bytes that autograd keeps in one LlamaDecoderLayer, without its parameters and rotary tables."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama import modeling_llama as llama

    dtype = getattr(torch, precision)
    values = {key: value for key, value in hf_config_of(spec).items() if key not in ("model_type", "sliding_window")}
    config = transformers.LlamaConfig(**values, attn_implementation=attention)
    layer = llama.LlamaDecoderLayer(config, 0).to(dtype)
    hidden = torch.randn(1, tokens, spec.hidden, dtype=dtype, requires_grad=True)
    positions = llama.LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *positions)}
    kept: dict[int, Any] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden * 1.0, position_embeddings=positions, attention_mask=None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision, element_bytes", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_activations_of_plain_modules_are_what_autograd_keeps(
    kv_heads: int, attention: str, precision: str, element_bytes: int
) -> None:
    spec, tokens = plain(hidden=512, heads=8, kv_heads=kv_heads, head_dim=64, ffn=1408, norm="rms"), 128
    expected = model.activation_bytes_per_token(
        spec, tokens, flash_attention=attention == "sdpa", element_bytes=element_bytes, fused=False
    )
    inverse_deviations = 2 * 4  # one fp32 number per norm and token, which the formulas leave out
    assert saved_for_backward(spec, tokens, attention, precision) == tokens * (expected + inverse_deviations)


@given(shapes(), st.data())
def test_recomputation_and_splitting_never_keep_more(spec: ModelSpec, draw: st.DataObject) -> None:
    t = draw.draw(st.sampled_from(model.tensor_parallel_choices(spec)))
    options = draw.draw(st.fixed_dictionaries({"flash_attention": st.booleans(), "fused": st.booleans()}))

    def kept(**more: Any) -> float:
        return model.activation_bytes_per_token(spec, 256, tensor_parallel=t, **(options | more))

    assert kept(recompute="full") < kept(recompute="selective") <= kept()
    assert kept(sequence_parallel=True) <= kept()
    assert kept(flash_attention=True) < kept(flash_attention=False)
    assert kept(fused=True) <= kept(fused=False)


def test_logits_and_what_the_head_reads() -> None:
    spec = load_model("llama-3-8b")
    assert model.logits_bytes(spec, 1000, 1) == 1000 * 128256 * 4
    assert model.logits_bytes(spec, 1000, 2.5, tensor_parallel=8) == 1000 * 128256 / 8 * 4 * 2.5
    assert model.output_activation_bytes_per_token(spec) == 2 * 2 * 4096
    assert model.output_activation_bytes_per_token(load_model("opt-350m")) == 2 * 512  # no final norm


# --- files -----------------------------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama"} | HF_CONFIGS["llama"]


def test_a_file_a_folder_and_a_relative_path_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    spec = read(LLAMA, folder)
    assert spec.name == "my-model"
    assert load_model("my-model", tmp_path) == spec == load_model("my-model/config.json", tmp_path)


def test_numbers_that_a_config_leaves_out(tmp_path: Path) -> None:
    spec = read({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"head_dim": None}, tmp_path)
    assert (spec.kv_heads, spec.head_dim) == (6, 16)
    old = {k: v for k, v in LLAMA.items() if k != "max_position_embeddings"} | {"max_sequence_length": 99}
    assert read(old, tmp_path).max_positions == 99  # as in huggyllama/llama-65b


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\x80\x02\xff\x00binary", "is not UTF-8 text"),
        (b'{"model_type": ', ":1: is not JSON"),
        (b"[1, 2]", "must hold an object, not list"),
        (b"[" * 100_000, "is not usable JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not usable JSON"),
        (b" " * (1 << 20) + b"{}", "is larger than"),
    ],
)
def test_broken_files_are_input_errors(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        from_hf_config(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("path", ["nothing.json", ".", "/dev/zero", "a\0b", "x" * 5000])
def test_files_that_cannot_be_read_are_input_errors(path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        from_hf_config(tmp_path / path)
    with pytest.raises(InputError):
        load_model(path, tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing") as error:
        read({k: v for k, v in LLAMA.items() if k != key}, tmp_path)
    assert error.value.field == key


@pytest.mark.parametrize(
    "change, field, message",
    [
        ({"hidden_size": "96"}, "hidden_size", "must be of type int, given '96'"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "must be of type int"),
        ({"num_hidden_layers": 0}, "layers", "greater than or equal to 1"),
        ({"vocab_size": 10**15}, "vocabulary", "unreasonably large"),
        ({"num_attention_heads": 5}, "num_attention_heads", "5 heads do not divide the hidden size 96"),
        ({"num_attention_heads": 0}, "num_attention_heads", "0 heads"),
        ({"num_key_value_heads": 4}, "", "heads (6) is no multiple of kv_heads (4)"),
        ({"model_type": "lama"}, "model_type", "'lama' is not modelled; supported: baichuan, bloom, deepseek_v2"),
        ({"model_type": "jamba"}, "model_type", "'jamba' is not modelled"),
        ({"num_local_experts": 8}, "num_local_experts", "experts are not modelled for model_type 'llama'"),
        ({"model_type": "mixtral"}, "num_local_experts", "is missing"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window", "must not be negative"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "",
            "experts_per_token from 1 to 4, given 5",
        ),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            "decoder_sparse_step",
            "dense layers between those with experts are not modelled",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types", "'linear_attention' layers are not modelled"),
    ],
)
def test_what_is_not_modelled_is_refused(change: dict[str, Any], field: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read(LLAMA | change, tmp_path)
    assert error.value.field == field and message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "sliding_window": 128},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64},
        {"layer_types": ["full_attention"] * 3},
    ],
)
def test_windows_that_never_bite_are_fine(change: dict[str, Any], tmp_path: Path) -> None:
    spec = read(LLAMA | change, tmp_path)
    assert spec.max_positions == 128 and spec.layer_kinds() == {LayerKind(): 3}


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "phi3"])
@pytest.mark.parametrize("layers", [2, 5, 13])
def test_windows_are_in_the_layers_where_transformers_has_them(model_type: str, layers: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = HF_CONFIGS[model_type] | {"num_hidden_layers": layers, "sliding_window": 32}
    if model_type.startswith("qwen"):
        config |= {"use_sliding_window": True, "max_window_layers": 3}
    theirs = transformers.AutoConfig.for_model(model_type, **config)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * layers
    spec = read({"model_type": model_type} | config, tmp_path)
    assert [spec.kind_of(i).window for i in range(layers)] == [32 * (t == "sliding_attention") for t in types]


NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 96, 10**9, 10**30, 1.5, float("nan"), float("inf")])
JSON = NUMBERS | st.sampled_from([None, True, False, "", "relu", "full_attention", {}, {"a": 1}])
JSON |= st.lists(JSON, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(HF_CONFIGS)), st.data())
def test_any_json_is_a_model_or_an_input_error(model_type: str, draw: st.DataObject) -> None:
    config: dict[str, Any] = {"model_type": model_type} | HF_CONFIGS[model_type]
    keys = st.sampled_from([*config, "head_dim", "sliding_window", "layer_types", "tie_word_embeddings", "num_experts"])
    config |= draw.draw(st.dictionaries(keys, JSON, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        try:
            spec = read(config, Path(folder))
        except InputError:
            return
    assert model.parameters(spec) > 0


def test_more_layers_than_any_model_has_are_an_error(tmp_path: Path) -> None:
    """(Counting them one by one would take minutes.)"""
    config = {"model_type": "deepseek_v3"} | HF_CONFIGS["deepseek_v3"] | {"num_hidden_layers": 10**9}
    with pytest.raises(InputError, match="10000"):
        read(config, tmp_path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'llama-2-7b'"):
        load_model("lama-2-7b")


@pytest.mark.parametrize(
    "text, message",
    [
        ("layers: [1", "is not YAML"),
        ("- 1", "must hold a mapping, not list"),
        ("1: 2", "all keys must be text"),
        ("layers: 2", "Field required"),
        ("laiers: 2", "did you mean 'layers'"),
    ],
)
def test_broken_yaml_is_an_input_error(text: str, message: str, tmp_path: Path) -> None:
    whole = Path(data.data_dir("hw_specs") / "models" / "tiny-2x128.yaml").read_text()
    (tmp_path / "own.yaml").write_text(whole + text if text.startswith("laiers") else text)
    with pytest.raises(InputError) as error:
        load_model("own.yaml", tmp_path)
    assert message in str(error.value) and "own.yaml" in str(error.value)


def test_an_own_yaml_is_named_by_its_file(tmp_path: Path) -> None:
    text = (data.data_dir("hw_specs") / "models" / "tiny-2x128.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("layers: 2", "layers: 3"))
    spec = load_model("mine.yaml", tmp_path)
    assert (spec.name, spec.layers) == ("mine", 3)
    (tmp_path / "mine.yaml").write_text(text.replace("source: own", "source: elsewhere"))
    with pytest.raises(InputError, match="'elsewhere' is not among the keys of 'sources'"):
        load_model("mine.yaml", tmp_path)


def test_data_lies_in_the_wheel_or_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "rlhfsim"
    (tmp_path / "site" / "traces").mkdir(parents=True)
    monkeypatch.setattr(data, "PACKAGE", package)
    assert data.data_dir("traces") == tmp_path / "site" / "traces"
    (package / "_data" / "traces").mkdir(parents=True)
    assert data.data_dir("traces") == package / "_data" / "traces"
    with pytest.raises(FileNotFoundError, match="hw_specs"):
        data.data_dir("hw_specs")


def test_vectors_of_token_counts() -> None:
    numpy = pytest.importorskip("numpy")
    spec, lengths = load_model("llama-7b"), numpy.array([1, 17, 300])
    assert model.attention_flops(spec, lengths).tolist() == [model.attention_flops(spec, n) for n in (1, 17, 300)]
