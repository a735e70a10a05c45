"""The keys of a Hugging Face `config.json`, as the fields of a `ModelSpec`.

Key names and defaults are those of the configuration classes of transformers 5.24.0
(`models/*/configuration_*.py`); tests/test_model.py compares the resulting parameter counts with its models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from reprlib import repr  # bounded: a nest of lists can print without end
from typing import Any, Literal, TypeVar

from ..errors import InputError

T = TypeVar("T")

MAX_LAYERS = 10_000  # far above any model; a pattern is a list

AttentionSpan = Literal["full", "window", "linear"]


def shape_of(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fields of the model that a parsed config.json describes; of a multimodal one the text part (`text_config`).

    Raises InputError, naming file and key, for what is missing or not modelled.
    """
    config = _Config(values, path)
    if "text_config" in config.values:
        beside = {key: value for key, value in values.items() if key == "tie_word_embeddings"}
        config = _Config(beside | config.get("text_config", dict), path)
    model_type = config.get("model_type", str)
    if model_type not in _READERS:
        raise InputError(
            f"model_type {model_type!r} is not modelled; supported: {', '.join(sorted(_READERS))}",
            field="model_type",
            where=str(path),
        )
    positions = ("max_position_embeddings", "max_sequence_length", "n_positions", "model_max_length", "seq_length")
    max_positions = config.first(positions, _DEFAULT_POSITIONS.get(model_type))
    shape = _windows(config, model_type, max_positions) | _READERS[model_type](config)
    if not shape.get("experts"):
        _refuse_experts(config)
    return {"family": model_type, "max_positions": max_positions} | shape


class _Config:
    """Typed access to a parsed config.json; every complaint names file and key."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`; JSON null counts as absent. Without a default the key is required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if type(value) is not kind:  # bool is an int in Python, but not a layer count
            raise self.fail(key, f"must be of type {kind.__name__}, given {repr(value)}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        return self.get(key, int, default)

    def flag(self, key: str, default: bool) -> bool:
        return self.get(key, bool, default)

    def first(self, keys: tuple[str, ...], default: int | None = None) -> int:
        """The first of several names of the same number."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.integer(key)
        return self.integer(keys[0], default)

    def fail(self, key: str, message: str) -> InputError:
        return InputError(message, field=key, where=str(self.path))


def _refuse_experts(config: _Config) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.integer(key, 0) > 1:
            raise config.fail(key, f"experts are not modelled for model_type {config.get('model_type', str)!r}")


# BLOOM's ALiBi has no limit; it was trained with so many (unverified). Falcon: transformers' default.
_DEFAULT_POSITIONS = {"bloom": 2048, "falcon": 2048}

# Which layers have a window where a config.json has no `layer_types`: all, or by the pattern of the family.
_WINDOW_PATTERNS: dict[str, tuple[AttentionSpan, ...]] = {
    "mistral": ("window",),
    "mixtral": ("window",),
    "phi3": ("window",),
    "gemma2": ("window", "full"),
    "gpt_oss": ("window", "full"),
}
# Families with gated delta nets in between.
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# Windows that transformers' configuration classes take when the key is absent (null is no window).
_DEFAULT_WINDOWS = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "gpt_oss": 128}


def _windows(config: _Config, model_type: str, max_positions: int) -> dict[str, Any]:
    """`window` and `attention_pattern`; nothing where no layer ever attends to less than everything before."""
    if model_type in _HYBRIDS:
        return {"attention_pattern": _layer_types(config, linear=True) or _every_fourth(config)}
    switchable = model_type.startswith("qwen")
    if model_type not in (*_WINDOW_PATTERNS, "gemma3_text") and not switchable:
        _layer_types(config)
        return {}
    window = _DEFAULT_WINDOWS.get(model_type, 0)
    if "sliding_window" in config.values:
        window = config.integer("sliding_window", 0)
    elif switchable:
        window = 4096
    if switchable and not config.flag("use_sliding_window", False):
        window = 0
    spans = _layer_types(config) or _default_spans(config, model_type)
    if window < 0:
        raise config.fail("sliding_window", f"must not be negative, given {window}")
    if not 0 < window < max_positions or "window" not in spans:
        return {}
    return {"window": window, "attention_pattern": spans}


def _layer_types(config: _Config, *, linear: bool = False) -> tuple[AttentionSpan, ...]:
    other: AttentionSpan = "linear" if linear else "window"
    names: dict[str, AttentionSpan] = {
        "full_attention": "full",
        f"{'linear' if linear else 'sliding'}_attention": other,
    }
    types = config.get("layer_types", list, [])
    others = [kind for kind in types if not isinstance(kind, str) or kind not in names]
    if others:
        raise config.fail("layer_types", f"{repr(others[0])} layers are not modelled; only {' and '.join(names)} are")
    layers = config.first(("num_hidden_layers", "n_layer"))
    if types and len(types) != layers:
        raise config.fail("layer_types", f"names {len(types)} layers, but there are {layers}")
    return tuple(names[kind] for kind in types)


def _default_spans(config: _Config, model_type: str) -> tuple[AttentionSpan, ...]:
    window: tuple[AttentionSpan, ...] = ("window",)
    full: tuple[AttentionSpan, ...] = ("full",)
    layers = min(config.integer("num_hidden_layers"), MAX_LAYERS)
    if model_type == "gemma3_text":
        period = config.integer("sliding_window_pattern", 6)
        return window * (period - 1) + full if 0 < period <= layers else window
    if model_type in _WINDOW_PATTERNS:
        return _WINDOW_PATTERNS[model_type]
    first = max(0, min(layers, config.integer("max_window_layers", 28)))
    return (full * first + window * (layers - first)) or full


def _every_fourth(config: _Config) -> tuple[AttentionSpan, ...]:
    layers = min(config.integer("num_hidden_layers"), MAX_LAYERS)
    every = config.integer("full_attention_interval", 4)
    if every < 1:
        raise config.fail("full_attention_interval", f"must be at least 1, given {every}")
    return tuple("linear" if (layer + 1) % every else "full" for layer in range(layers)) or ("full",)


def _llama_like(config: _Config) -> dict[str, Any]:
    """What llama, mistral, qwen2, qwen3 and gemma share; each reader adds its own."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return {
        "layers": config.integer("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", heads),
        "head_dim": _head_dim(config, hidden, heads),
        "ffn": config.integer("intermediate_size"),
        "gated_mlp": True,
        "vocabulary": config.integer("vocab_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "norm": "rms",
    }


def _head_dim(config: _Config, hidden: int, heads: int) -> int:
    if config.values.get("head_dim") is not None:
        return config.integer("head_dim")
    if heads < 1 or hidden % heads:
        raise config.fail("num_attention_heads", f"{heads} heads do not divide the hidden size {hidden}")
    return hidden // heads


def _attention_bias(config: _Config) -> dict[str, bool]:
    bias = config.flag("attention_bias", False)
    return {"qkv_bias": bias, "attention_output_bias": bias}


def _llama(config: _Config) -> dict[str, Any]:
    return _llama_like(config) | _attention_bias(config) | {"mlp_bias": config.flag("mlp_bias", False)}


def _qwen2(config: _Config) -> dict[str, Any]:
    return _llama_like(config) | {"qkv_bias": True}


def _qwen3(config: _Config) -> dict[str, Any]:
    head_dim = config.integer("head_dim", 128)
    return _llama_like(config) | _attention_bias(config) | {"head_dim": head_dim, "qk_norm": True}


def _gemma(config: _Config) -> dict[str, Any]:
    own = {"head_dim": config.integer("head_dim", 256), "tied_embeddings": config.flag("tie_word_embeddings", True)}
    return _llama_like(config) | _attention_bias(config) | own


def _gemma2(config: _Config) -> dict[str, Any]:
    return _gemma(config) | {"norms_per_layer": 4}


def _gemma3(config: _Config) -> dict[str, Any]:
    return _gemma2(config) | {"qk_norm": True}


def _glm4(config: _Config) -> dict[str, Any]:
    own = {"norms_per_layer": 4, "head_dim": config.integer("head_dim", 128)}
    return _llama_like(config) | {"qkv_bias": config.flag("attention_bias", True)} | own


def _internlm2(config: _Config) -> dict[str, Any]:
    bias = config.flag("bias", False)
    return _llama_like(config) | {"qkv_bias": bias, "attention_output_bias": bias}


# --- experts, latent attention ---------------------------------------------------------------------------------------


# Two names of the same number; transformers reads both, whichever its configuration class has.
_EXPERT_COUNTS = ("num_experts", "num_local_experts")


def _routed(config: _Config, counts: tuple[str, ...], width: str, **more: Any) -> dict[str, Any]:
    """Keys that all families with experts share; `counts` and `width` are the names of two of them."""
    step = config.integer("decoder_sparse_step", 1)
    if step != 1 or config.get("mlp_only_layers", list, []):
        key = "decoder_sparse_step" if step != 1 else "mlp_only_layers"
        raise config.fail(key, "dense layers between those with experts are not modelled, only in front of them")
    return {
        "experts": config.first(counts),
        "experts_per_token": config.integer("num_experts_per_tok"),
        "expert_ffn": config.integer(width),
    } | more


def _mixtral(config: _Config) -> dict[str, Any]:
    return _llama_like(config) | _routed(config, _EXPERT_COUNTS[::-1], "intermediate_size")


def _qwen2_moe(config: _Config) -> dict[str, Any]:
    shared = config.integer("shared_expert_intermediate_size")
    routed = _routed(
        config, _EXPERT_COUNTS, "moe_intermediate_size", shared_expert_ffn=shared, shared_expert_gate=shared > 0
    )
    return _llama_like(config) | {"qkv_bias": config.flag("qkv_bias", True)} | routed


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    own = _attention_bias(config) | {"qk_norm": True}
    return _llama_like(config) | own | _routed(config, _EXPERT_COUNTS, "moe_intermediate_size")


def _gated_delta(config: _Config) -> dict[str, Any]:
    """What all families with gated delta nets share; values missing are those of Qwen3-Next's configuration class."""
    if not config.flag("attn_output_gate", True):
        raise config.fail("attn_output_gate", "without the gate the family is not modelled")
    own = {
        "head_dim": config.integer("head_dim", 256),
        "qk_norm": True,
        "attention_gate": True,
        "linear_state_bytes": 4 if config.get("mamba_ssm_dtype", str, "") == "float32" else 2,
    }
    if "linear" in (_layer_types(config, linear=True) or _every_fourth(config)):
        own |= {
            "linear_key_heads": config.integer("linear_num_key_heads", 16),
            "linear_value_heads": config.integer("linear_num_value_heads", 32),
            "linear_key_head_dim": config.integer("linear_key_head_dim", 128),
            "linear_value_head_dim": config.integer("linear_value_head_dim", 128),
            "linear_conv_kernel": config.integer("linear_conv_kernel_dim", 4),
        }
    return _attention_bias(config) | own


def _qwen3_5(config: _Config) -> dict[str, Any]:
    return _llama_like(config) | _gated_delta(config)


def _qwen3_next(config: _Config) -> dict[str, Any]:
    """Qwen3.5 with experts has no dense layers, so that its config.json has no width for them."""
    shared = config.integer("shared_expert_intermediate_size", 512)
    experts = _routed(
        config, _EXPERT_COUNTS, "moe_intermediate_size", shared_expert_ffn=shared, shared_expert_gate=shared > 0
    )
    width = {"intermediate_size": config.integer("intermediate_size", config.integer("moe_intermediate_size"))}
    return _llama_like(_Config(config.values | width, config.path)) | _gated_delta(config) | experts


def _gpt_oss(config: _Config) -> dict[str, Any]:
    bias = config.flag("attention_bias", True)
    own: dict[str, Any] = {"qkv_bias": bias, "attention_output_bias": bias, "attention_sinks": True}
    own["head_dim"] = config.integer("head_dim", 64)
    biases = {"router_bias": True, "expert_bias": True}
    return _llama_like(config) | own | _routed(config, _EXPERT_COUNTS[::-1], "intermediate_size", **biases)


def _deepseek_experts(config: _Config) -> dict[str, Any]:
    if config.values.get("n_routed_experts") is None:
        return {}
    if config.integer("moe_layer_freq", 1) != 1:
        raise config.fail("moe_layer_freq", "dense layers between those with experts are not modelled")
    shared = config.integer("n_shared_experts", 0) * config.integer("moe_intermediate_size")
    dense = config.integer("first_k_dense_replace", 0)
    widths = {"shared_expert_ffn": shared, "first_dense_layers": dense}
    return _routed(config, ("n_routed_experts",), "moe_intermediate_size", **widths)


def _deepseek(config: _Config) -> dict[str, Any]:
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    latent = {
        "q_lora_rank": config.integer("q_lora_rank", 0),
        "kv_lora_rank": config.integer("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": config.integer("v_head_dim"),
        "head_dim": nope + rope,
        "kv_heads": config.integer("num_attention_heads"),
    }
    plain = _Config({k: v for k, v in config.values.items() if k != "head_dim"} | {"head_dim": 1}, config.path)
    return _llama(plain) | latent | _deepseek_experts(config)


def _glm4_moe(config: _Config) -> dict[str, Any]:
    own = {"qkv_bias": config.flag("attention_bias", False), "qk_norm": config.flag("use_qk_norm", False)}
    return _llama_like(config) | own | _deepseek_experts(config)


# --- with LayerNorm --------------------------------------------------------------------------------------------------


def _with_layer_norm(config: _Config, hidden: int, heads: int, *, bias: bool) -> dict[str, Any]:
    """What opt, gpt2 and gpt_neox share: multi-head attention, a plain MLP, LayerNorm, biases."""
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": _head_dim(config, hidden, heads),
        "gated_mlp": False,
        "vocabulary": config.integer("vocab_size"),
        "norm": "layer",
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


def _opt(config: _Config) -> dict[str, Any]:
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.fail("layer_norm_elementwise_affine", "norms without parameters are not modelled")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    width = config.integer("word_embed_proj_dim", hidden)
    return _with_layer_norm(config, hidden, heads, bias=config.flag("enable_bias", True)) | {
        "layers": config.integer("num_hidden_layers"),
        "ffn": config.integer("ffn_dim"),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "embedding_size": width if width != hidden else None,
        # OPT offsets positions by two rows that are never used (transformers, OPTLearnedPositionalEmbedding)
        "learned_positions": config.integer("max_position_embeddings") + 2,
        "relu": config.get("activation_function", str, "relu") == "relu",
        "final_norm": config.flag("do_layer_norm_before", True) and not config.flag("_remove_final_layer_norm", False),
    }


def _gpt2(config: _Config) -> dict[str, Any]:
    if config.flag("add_cross_attention", False):
        raise config.fail("add_cross_attention", "cross-attention is not modelled")
    hidden = config.first(("n_embd", "hidden_size"))
    heads = config.first(("n_head", "num_attention_heads"))
    return _with_layer_norm(config, hidden, heads, bias=True) | {
        "layers": config.first(("n_layer", "num_hidden_layers")),
        "ffn": config.integer("n_inner", 4 * hidden),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "learned_positions": config.first(("max_position_embeddings", "n_positions")),
    }


def _gpt_neox(config: _Config) -> dict[str, Any]:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    attention_bias = config.flag("attention_bias", True)
    return _with_layer_norm(config, hidden, heads, bias=True) | {
        "layers": config.integer("num_hidden_layers"),
        "ffn": config.integer("intermediate_size"),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "qkv_bias": attention_bias,
        "attention_output_bias": attention_bias,
    }


def _bloom(config: _Config) -> dict[str, Any]:
    hidden = config.first(("hidden_size", "n_embed"))
    heads = config.first(("n_head", "num_attention_heads"))
    return _with_layer_norm(config, hidden, heads, bias=True) | {
        "layers": config.first(("n_layer", "num_hidden_layers")),
        "ffn": 4 * hidden,
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "embedding_norm": True,
    }


def _gptj(config: _Config) -> dict[str, Any]:
    hidden = config.first(("n_embd", "hidden_size"))
    heads = config.first(("n_head", "num_attention_heads"))
    tied = config.flag("tie_word_embeddings", False)
    return _with_layer_norm(config, hidden, heads, bias=False) | {
        "layers": config.first(("n_layer", "num_hidden_layers")),
        "ffn": config.integer("n_inner", 4 * hidden),
        "tied_embeddings": tied,
        "norms_per_layer": 1,
        "mlp_bias": True,
        "head_bias": True,
    }


def _falcon(config: _Config) -> dict[str, Any]:
    hidden = config.first(("hidden_size", "n_embed"))
    heads = config.first(("num_attention_heads", "n_head"))
    new = config.flag("new_decoder_architecture", False)
    old_kv_heads = 1 if config.flag("multi_query", True) else heads
    side_by_side = config.flag("parallel_attn", True)
    return _with_layer_norm(config, hidden, heads, bias=config.flag("bias", False)) | {
        "layers": config.first(("num_hidden_layers", "n_layer")),
        "kv_heads": config.integer("num_kv_heads", heads) if new else old_kv_heads,
        "ffn": config.integer("ffn_hidden_size", 4 * hidden),
        "tied_embeddings": config.flag("tie_word_embeddings", True),
        "norms_per_layer": config.integer("num_ln_in_parallel_attn", 2 if new else 1) if side_by_side else 2,
    }


_READERS: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama_like,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _llama_like,
    "glm4": _glm4,
    "internlm2": _internlm2,
    "baichuan": _llama_like,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5_text": _qwen3_5,
    "qwen3_5_moe_text": _qwen3_next,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "glm4_moe": _glm4_moe,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "bloom": _bloom,
    "falcon": _falcon,
}
