"""The shape of a decoder, from `hw_specs/models/*.yaml` or from a Hugging Face `config.json`.

Key names and defaults of `config.json` are those of the configuration classes of transformers 5.24.0
(`models/*/configuration_*.py`); tests/test_model.py compares the resulting parameter counts with its models.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from reprlib import repr  # bounded: a nest of YAML aliases can print without end
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..errors import InputError, nearest
from .base import Count, NonNegativeCount, Sourced
from .data import data_dir
from .hardware import Sources

T = TypeVar("T")

MAX_LAYERS = 10_000  # far above any model; a pattern is a list
MAX_FILE_BYTES = 1 << 20  # a config.json has a few kB; more is some other file, such as weights


AttentionSpan = Literal["full", "window"]


class LayerKind(NamedTuple):
    """What distinguishes the layers of one model.

    experts: routed experts instead of one MLP. window: the layer attends to the last so many tokens; 0: to all.
    """

    experts: bool = False
    window: int = 0


DENSE = LayerKind()


class ExpertSplit(NamedTuple):
    """How routed experts are split: the experts over `parallel` ranks, the matrices of each over `tensor` ranks."""

    parallel: int = 1
    tensor: int = 1


UNSPLIT = ExpertSplit()


class ModelSpec(Sources):
    """One decoder-only transformer. Layers differ in two things only: an MLP or experts, full attention or a window.

    family: the `model_type` of Hugging Face. source: where the shape is from, a key of `sources` or `unverified`.
    ffn: width of the MLP; gated_mlp: three matrices (gate, up, down) instead of two.
    relu: the activation is ReLU, which keeps one tensor less for the backward pass than GELU or SiLU.
    learned_positions: rows of a learned position table; 0 with rotary positions, which have no parameters.
    norm: `rms` has a weight, `layer` a weight and a bias; norms_per_layer: 4 where attention and MLP outputs are
    normalised too (Gemma 2), 1 where attention and MLP run side by side on one norm's output (GPT-J).
    embedding_norm: one more norm after the word embedding (BLOOM).
    qk_norm: one more RMS norm over the head dimension of queries and of keys.
    attention_sinks: one learned logit per head, to which no token belongs (gpt-oss).
    embedding_size: width of the word embedding if it is not `hidden`; it is then projected in and out (OPT-350M).
    max_positions: the longest sequence.
    window, attention_pattern: layers named `window` attend to the last `window` tokens only; the pattern repeats.

    Multi-head latent attention (DeepSeek-V2), with Hugging Face's names, where kv_lora_rank is not 0: keys and values
    are projected up from a vector of kv_lora_rank, to which one rotary key of qk_rope_head_dim for all heads is added;
    the two are all that is cached. q_lora_rank: likewise of queries; 0: one matrix. head_dim is that of queries and
    keys, qk_nope_head_dim + qk_rope_head_dim; v_head_dim that of values (absent: head_dim).

    Mixture of experts where `experts` is not 0: each token goes to experts_per_token of them, MLPs of width expert_ffn,
    and to one shared MLP of width shared_expert_ffn (0: none; shared_expert_gate: weighted by one more column). The
    first_dense_layers have the ordinary MLP. router_bias, expert_bias: of router and expert matrices.
    published_parameters, published_active_parameters: what the authors or the checkpoint state, for comparison only.
    """

    name: str
    description: str = ""
    family: str
    source: str
    layers: Annotated[Count, Field(le=MAX_LAYERS)]
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
    norms_per_layer: Literal[1, 2, 4] = 2
    final_norm: bool = True
    embedding_norm: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    embedding_size: Count | None = None
    max_positions: Count
    window: NonNegativeCount = 0
    attention_pattern: tuple[AttentionSpan, ...] = Field(default=("full",), min_length=1)
    q_lora_rank: NonNegativeCount = 0
    kv_lora_rank: NonNegativeCount = 0
    qk_nope_head_dim: NonNegativeCount = 0
    qk_rope_head_dim: NonNegativeCount = 0
    v_head_dim: Count | None = None
    experts: NonNegativeCount = 0
    experts_per_token: NonNegativeCount = 0
    expert_ffn: NonNegativeCount = 0
    shared_expert_ffn: NonNegativeCount = 0
    shared_expert_gate: bool = False
    first_dense_layers: NonNegativeCount = 0
    router_bias: bool = False
    expert_bias: bool = False
    published_parameters: Sourced | None = None
    published_active_parameters: Sourced | None = None

    @model_validator(mode="after")
    def _shape_is_possible(self) -> ModelSpec:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is no multiple of kv_heads ({self.kv_heads})")
        if self.source != "unverified" and self.source not in self.sources:
            raise ValueError(f"source {self.source!r} is not among the keys of 'sources'")
        if "window" in self.attention_pattern and not self.window:
            raise ValueError("attention_pattern names layers with a window, but 'window' is not given")
        parts = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.latent_attention and (parts != self.head_dim or not self.qk_rope_head_dim):
            raise ValueError(
                f"head_dim ({self.head_dim}) must be qk_nope_head_dim ({self.qk_nope_head_dim}) + qk_rope_head_dim "
                f"({self.qk_rope_head_dim}), both above 0"
            )
        if self.experts and not (1 <= self.experts_per_token <= self.experts and self.expert_ffn):
            raise ValueError(
                f"{self.experts} experts need an expert_ffn, given {self.expert_ffn}, and experts_per_token from 1 to "
                f"{self.experts}, given {self.experts_per_token}"
            )
        if self.first_dense_layers > self.layers:
            raise ValueError(f"first_dense_layers is {self.first_dense_layers}, but there are {self.layers} layers")
        return self

    def kind_of(self, layer: int) -> LayerKind:
        """The kind of one layer, counted from 0."""
        windowed = self.attention_pattern[layer % len(self.attention_pattern)] == "window"
        return LayerKind(
            self.experts > 0 and layer >= self.first_dense_layers,
            self.window if windowed and self.window < self.max_positions else 0,
        )

    def layer_kinds(self, layers: Iterable[int] | None = None) -> dict[LayerKind, int]:
        """How many of all layers, or of those given, are of each kind."""
        if len(self.attention_pattern) == 1 and not self.first_dense_layers and layers is None:
            return {self.kind_of(0): self.layers}
        return dict(Counter(self.kind_of(layer) for layer in (range(self.layers) if layers is None else layers)))

    @property
    def latent_attention(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has the ordinary MLP."""
        return not self.experts or self.first_dense_layers > 0

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim or self.head_dim

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

    Of a multimodal model the text part (`text_config`). Raises InputError for an unreadable or broken file, a missing
    key, and an architecture that is not modelled.
    """
    path = Path(path)
    if _exists(path) and path.is_dir():
        path = path / "config.json"
    config = _Config(_read_json(path), path)
    if "text_config" in config.values:
        config = _Config(config.get("text_config", dict), path)
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
    name = path.parent.name or path.parent.resolve().name or model_type
    return _build(
        {"name": name, "family": model_type, "sources": {"config": str(path)}, "source": "config"}
        | {"max_positions": max_positions}
        | shape,
        path,
    )


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The keys of a `config.json` of this shape, as `from_hf_config` reads them; for models that a real run can build.

    Full attention everywhere: a window is only as good as sequences within it. Raises InputError for other families,
    experts and latent attention.
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
        message = f"{spec.family!r} cannot be built for a real run; supported: {', '.join(sorted(own))}"
        raise InputError(message, field="family")
    for value, what in ((spec.experts, "experts"), (spec.kv_lora_rank, "latent attention")):
        if value:
            raise InputError(f"{spec.name} has {what}, which a real run does not", field="spec")
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
# Windows that transformers' configuration classes take when the key is absent (null is no window).
_DEFAULT_WINDOWS = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "gpt_oss": 128}


def _windows(config: _Config, model_type: str, max_positions: int) -> dict[str, Any]:
    """`window` and `attention_pattern`; nothing where no layer ever attends to less than everything before."""
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


def _layer_types(config: _Config) -> tuple[AttentionSpan, ...]:
    names: dict[str, AttentionSpan] = {"full_attention": "full", "sliding_attention": "window"}
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
