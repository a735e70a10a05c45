"""The shape of a decoder, from `hw_specs/models/*.yaml` or from a Hugging Face `config.json` (see `config_json.py`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr  # bounded: a nest of YAML aliases can print without end
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..errors import InputError, nearest
from .base import Count, NonNegativeCount, Sourced
from .config_json import MAX_LAYERS, AttentionSpan, shape_of
from .data import data_dir
from .hardware import Sources

MAX_FILE_BYTES = 1 << 20  # a config.json has a few kB; more is some other file, such as weights


class LayerKind(NamedTuple):
    """What distinguishes the layers of one model.

    experts: routed experts instead of one MLP. window: the layer attends to the last so many tokens; 0: to all.
    linear: a gated delta net instead of attention.
    """

    experts: bool = False
    window: int = 0
    linear: bool = False


DENSE = LayerKind()


class ExpertSplit(NamedTuple):
    """How routed experts are split: the experts over `parallel` ranks, the matrices of each over `tensor` ranks."""

    parallel: int = 1
    tensor: int = 1


UNSPLIT = ExpertSplit()


class ModelSpec(Sources):
    """One decoder-only transformer. Layers differ in two things only: an MLP or experts; full attention, a window, or
    linear attention.

    family: the `model_type` of Hugging Face. source: where the shape is from, a key of `sources` or `unverified`.
    ffn: width of the MLP; gated_mlp: three matrices (gate, up, down) instead of two.
    relu: the activation is ReLU, which keeps one tensor less for the backward pass than GELU or SiLU.
    learned_positions: rows of a learned position table; 0 with rotary positions, which have no parameters.
    norm: `rms` has a weight, `layer` a weight and a bias; norms_per_layer: 4 where attention and MLP outputs are
    normalised too (Gemma 2), 1 where attention and MLP run side by side on one norm's output (GPT-J).
    embedding_norm: one more norm after the word embedding (BLOOM).
    qk_norm: one more RMS norm over the head dimension of queries and of keys.
    attention_sinks: one learned logit per head, to which no token belongs (gpt-oss).
    attention_gate: the query projection has as many more columns, which gate attention's output (`attn_output_gate`).
    embedding_size: width of the word embedding if it is not `hidden`; it is then projected in and out (OPT-350M).
    max_positions: the longest sequence.
    window, attention_pattern: layers named `window` attend to the last `window` tokens only; the pattern repeats.

    Layers named `linear` are gated delta nets (Qwen3-Next): linear_key_heads of linear_key_head_dim (as many queries),
    linear_value_heads of linear_value_head_dim, and a convolution over the last linear_conv_kernel tokens. What one
    keeps of a sequence has a fixed size; linear_state_bytes: of an element of the heads' matrices (an engine takes
    `mamba_ssm_dtype`, or the model's precision).

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
    attention_gate: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    embedding_size: Count | None = None
    max_positions: Count
    window: NonNegativeCount = 0
    attention_pattern: tuple[AttentionSpan, ...] = Field(default=("full",), min_length=1)
    linear_key_heads: NonNegativeCount = 0
    linear_value_heads: NonNegativeCount = 0
    linear_key_head_dim: NonNegativeCount = 0
    linear_value_head_dim: NonNegativeCount = 0
    linear_conv_kernel: NonNegativeCount = 0
    linear_state_bytes: Literal[2, 4] = 2
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

    @model_validator(mode="after")
    def _linear_layers_are_whole(self) -> ModelSpec:
        names = ("key_heads", "value_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        given = {f"linear_{name}": getattr(self, f"linear_{name}") for name in names}
        if not self.linear:
            unused = [name for name, value in given.items() if value]
            if unused:
                raise ValueError(f"{unused[0]} is {given[unused[0]]}, but attention_pattern names no linear layers")
            return self
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise ValueError(f"attention_pattern names linear layers, but {missing[0]!r} is not given")
        if self.linear_value_heads % self.linear_key_heads:
            raise ValueError(
                f"linear_value_heads ({self.linear_value_heads}) is no multiple of linear_key_heads "
                f"({self.linear_key_heads})"
            )
        if self.latent_attention or all(kind.linear for kind in self.layer_kinds()):
            raise ValueError("linear layers need others with plain attention beside them")
        return self

    def kind_of(self, layer: int) -> LayerKind:
        """The kind of one layer, counted from 0."""
        span = self.attention_pattern[layer % len(self.attention_pattern)]
        return LayerKind(
            self.experts > 0 and layer >= self.first_dense_layers,
            self.window if span == "window" and self.window < self.max_positions else 0,
            span == "linear",
        )

    def layer_kinds(self, layers: Iterable[int] | None = None) -> dict[LayerKind, int]:
        """How many of all layers, or of those given, are of each kind."""
        if len(self.attention_pattern) == 1 and not self.first_dense_layers and layers is None:
            return {self.kind_of(0): self.layers}
        return dict(Counter(self.kind_of(layer) for layer in (range(self.layers) if layers is None else layers)))

    @property
    def linear(self) -> bool:
        """Whether any layer is a gated delta net."""
        return "linear" in self.attention_pattern

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
    shape = shape_of(_read_json(path), path)
    name = path.parent.name or path.parent.resolve().name or shape["family"]
    return _build({"name": name, "sources": {"config": str(path)}, "source": "config"} | shape, path)


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The keys of a `config.json` of this shape, as `from_hf_config` reads them; for models that a real run can build.

    Full attention everywhere: a window is only as good as sequences within it. Raises InputError for other families,
    experts, latent and linear attention.
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
    unlike = (spec.experts, "experts"), (spec.kv_lora_rank, "latent attention"), (spec.linear, "linear attention")
    for value, what in unlike:
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
