"""The shape of a dense decoder, from `hw_specs/models/*.yaml` or from a Hugging Face `config.json`.

Key names and defaults of `config.json` are those of the configuration classes of transformers 5.24.0
(`models/*/configuration_*.py`); tests/test_model.py compares the resulting parameter counts with its models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from reprlib import repr  # bounded: a nest of YAML aliases can print without end
from typing import Any, Literal, TypeVar

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..errors import InputError, nearest
from .base import Count, NonNegativeCount, Sourced
from .data import data_dir
from .hardware import Sources

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20  # a config.json has a few kB; more is some other file, such as weights


class ModelSpec(Sources):
    """One decoder-only transformer: all layers alike, dense MLP, full causal attention.

    family: the `model_type` of Hugging Face. source: where the shape is from, a key of `sources` or `unverified`.
    ffn: width of the MLP; gated_mlp: three matrices (gate, up, down) instead of two.
    relu: the activation is ReLU, which keeps one tensor less for the backward pass than GELU or SiLU.
    learned_positions: rows of a learned position table; 0 with rotary positions, which have no parameters.
    norm: `rms` has a weight, `layer` a weight and a bias; norms_per_layer: 4 where attention and MLP outputs are
    normalised too (Gemma 2). qk_norm: one more RMS norm over the head dimension of queries and of keys.
    embedding_size: width of the word embedding if it is not `hidden`; it is then projected in and out (OPT-350M).
    max_positions: the longest sequence for which every layer attends to everything before.
    published_parameters: what the authors or the checkpoint state, for comparison only.
    """

    name: str
    description: str = ""
    family: str
    source: str
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn: Count
    gated_mlp: bool
    relu: bool = False
    vocabulary: Count
    tied_embeddings: bool
    learned_positions: NonNegativeCount = 0
    norm: Literal["rms", "layer"]
    norms_per_layer: Literal[2, 4] = 2
    final_norm: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    embedding_size: Count | None = None
    max_positions: Count
    published_parameters: Sourced | None = None

    @model_validator(mode="after")
    def _shape_is_possible(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is no multiple of kv_heads ({self.kv_heads})")
        if self.source != "unverified" and self.source not in self.sources:
            raise ValueError(f"source {self.source!r} is not among the keys of 'sources'")
        return self

    @property
    def embedding_width(self) -> int:
        """Width of the word embedding and of what the head reads."""
        return self.embedding_size or self.hidden

    @property
    def query_width(self) -> int:
        """Columns of the query projection, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection (and of the value projection), all heads together."""
        return self.kv_heads * self.head_dim


def model_names() -> list[str]:
    """The shipped models, sorted."""
    return sorted(path.stem for path in (data_dir("hw_specs") / "models").glob("*.yaml"))


def load_model(name_or_path: str | Path, base_dir: str | Path = ".") -> ModelSpec:
    """A shipped model by name, else a `config.json`, a folder with one, or a YAML of the shipped form.

    Paths are relative to `base_dir`. Raises InputError with the nearest name when there is no such thing.
    """
    names = model_names()
    if str(name_or_path) in names:
        return _from_yaml(data_dir("hw_specs") / "models" / f"{name_or_path}.yaml")
    path = Path(base_dir) / Path(name_or_path).expanduser()
    if not _exists(path):
        raise InputError(
            f"{str(name_or_path)!r} is neither a shipped model nor a file or folder below {str(base_dir)!r}"
            + nearest(str(name_or_path), names)
        )
    return _from_yaml(path) if path.suffix in (".yaml", ".yml") else from_hf_config(path)


def from_hf_config(path: str | Path) -> ModelSpec:
    """The shape in a Hugging Face `config.json` (or in the folder that holds one).

    Raises InputError for an unreadable or broken file, a missing key, an architecture that is not modelled, experts,
    and attention windows shorter than `max_position_embeddings`.
    """
    path = Path(path)
    if _exists(path) and path.is_dir():
        path = path / "config.json"
    config = _Config(_read_json(path), path)
    model_type = config.get("model_type", str)
    if model_type not in _READERS:
        raise InputError(
            f"model_type {model_type!r} is not modelled; supported: {', '.join(sorted(_READERS))}",
            field="model_type",
            where=str(path),
        )
    _refuse_experts(config)
    max_positions = config.first(("max_position_embeddings", "max_sequence_length", "n_positions"))
    _refuse_short_windows(config, model_type, max_positions)
    shape = _READERS[model_type](config)
    name = path.parent.name or path.parent.resolve().name or model_type
    return _build(
        {"name": name, "family": model_type, "sources": {"config": str(path)}, "source": "config"}
        | {"max_positions": max_positions}
        | shape,
        path,
    )


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The keys of a `config.json` of this shape, as `from_hf_config` reads them, with full attention everywhere.

    Raises InputError for a family that is not modelled.
    """
    heads = {"num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim}
    llama_like = heads | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias, "use_sliding_window": False}
    own: dict[str, dict[str, Any]] = dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2"), llama_like) | {
        "mistral": llama_like | {"sliding_window": None},
        "opt": {
            "ffn_dim": spec.ffn,
            "word_embed_proj_dim": spec.embedding_width,
            "do_layer_norm_before": spec.final_norm,
            "enable_bias": spec.qkv_bias,
            "activation_function": "relu" if spec.relu else "gelu",
        },
        "gpt2": {"n_inner": spec.ffn},
        "gpt_neox": {"attention_bias": spec.qkv_bias},
    }
    if spec.family not in own:
        raise InputError(f"{spec.family!r} is not modelled; supported: {', '.join(sorted(own))}", field="family")
    return own[spec.family] | {
        "model_type": spec.family,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
    }


# --- reading files ---------------------------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or with a null byte
        return False


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():  # a device or a pipe would never end
            raise InputError("no such file" if not path.exists() else "is not a regular file", where=str(path))
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"is larger than {MAX_FILE_BYTES} bytes, so it is no model description", where=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", where=str(path)) from None
    if not text.strip():
        raise InputError("is empty", where=str(path))
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer with thousands of digits
        if isinstance(error, InputError):
            raise
        raise InputError(f"is not usable JSON: {type(error).__name__}", where=str(path)) from None
    if not isinstance(data, dict):
        raise InputError(f"must hold an object, not {type(data).__name__}", where=str(path))
    return data


def _from_yaml(path: Path) -> ModelSpec:
    try:
        data = YAML(typ="safe").load(_read_text(path))
    except (YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"is not YAML: {problem}", where=where) from None
    if not isinstance(data, dict):
        raise InputError(f"must hold a mapping, not {type(data).__name__}", where=str(path))
    return _build({"name": path.stem} | data, path)


def _build(values: dict[str, Any], path: Path) -> ModelSpec:
    """A validated record; pydantic's first complaint becomes an InputError."""
    try:
        return ModelSpec(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        hint = nearest(field, ModelSpec.model_fields) if first["type"] == "extra_forbidden" else ""
        given = (
            "" if not field or first["type"] in ("missing", "extra_forbidden") else f", given {repr(first['input'])}"
        )
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{message}{given}{hint}", field=field, where=str(path)) from None
    except TypeError:  # a key that is not a string
        raise InputError("all keys must be text", where=str(path)) from None


# --- config.json -----------------------------------------------------------------------------------------------------


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

    def first(self, keys: tuple[str, ...]) -> int:
        """The first of several names of the same number."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.integer(key)
        return self.integer(keys[0])

    def fail(self, key: str, message: str) -> InputError:
        return InputError(message, field=key, where=str(self.path))


def _refuse_experts(config: _Config) -> None:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.integer(key, 0) > 1:
            raise config.fail(key, "mixture-of-experts models are not modelled")


def _refuse_short_windows(config: _Config, model_type: str, max_positions: int) -> None:
    """Full attention is modelled; a window is fine only where it is never shorter than the sequence."""
    always = model_type in ("mistral", "gemma2")
    window = 0
    if always or config.flag("use_sliding_window", False):
        # an absent key is transformers' default of 4096, null is no window
        window = config.integer("sliding_window", 0) if "sliding_window" in config.values else 4096
    types = config.get("layer_types", list, ["full_attention"])
    other = next((kind for kind in types if kind not in ("full_attention", "sliding_attention")), None)
    if other is not None:
        raise config.fail("layer_types", f"{other!r} layers are not modelled; only full attention is")
    if 0 < window < max_positions:
        raise config.fail(
            "sliding_window",
            f"layers attend to {window} of up to {max_positions} tokens, but only full attention is modelled; "
            f"for sequences up to {window} tokens the two are the same: give a copy of this file with "
            f"max_position_embeddings: {window}",
        )


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


_READERS: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama_like,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
