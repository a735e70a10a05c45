"""Transformer arithmetic: parameters, matrix shapes, FLOPs and bytes of a `ModelSpec`.

Pure functions of shapes; no hardware and no time. A multiply-add counts as two FLOPs. `tensor_parallel` and
`pipeline_parallel` give the share of one rank (the largest one where shares differ). Token counts may be numpy
arrays: the arithmetic is elementwise.

Korthikanti et al. is "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, 2022. Its
table 2 was read in NVIDIA/Megatron-LM, megatron/training/theoretical_memory_usage.py (commit 00caa53), the equation
numbers in public notes on the paper; the paper itself was not opened.

Layers may differ (`LayerKind`). A function with a `kind` is about one layer of that kind (default: an MLP and full
attention); the others sum over the layers that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from . import linear_attention
from .errors import InputError
from .spec.model_spec import DENSE, ExpertSplit, LayerKind, ModelSpec

Head = Literal["lm", "value", "none"]
Recompute = Literal["none", "selective", "full"]

# Gradients of both operands of every product: twice the products of the forward pass.
BACKWARD_TO_FORWARD = 2.0


class Gemm(NamedTuple):
    """One dense product ``y[m, n] = x[m, k] w[k, n]`` on one rank, or as many as there are routed experts on it.

    copies: experts on this rank; a token goes to each of them with probability `chosen`. rows_per_token: rows of x of
    all copies together, when experts are equally loaded, per token of the replica.
    """

    name: str
    n: int
    k: int
    copies: int = 1
    rows_per_token: float = 1.0
    chosen: float = 1.0

    @property
    def parameters(self) -> int:
        return self.copies * self.n * self.k

    def flops(self, tokens: float) -> float:
        return 2.0 * tokens * self.rows_per_token * self.n * self.k

    def touched(self, tokens: Any) -> Any:
        """Copies that at least one token goes to, on average, when every token chooses at random."""
        if self.chosen == 1.0:
            return self.copies
        tokens_of_group = tokens * self.rows_per_token / (self.copies * self.chosen)
        return self.copies * (1.0 - (1.0 - self.chosen) ** tokens_of_group)


# --- layouts ---------------------------------------------------------------------------------------------------------


def tensor_parallel_choices(spec: ModelSpec, largest: int = 64) -> list[int]:
    """Degrees that split heads, MLP and experts evenly, and KV heads evenly or with whole copies."""
    return [t for t in range(1, min(largest, spec.heads) + 1) if not _tensor_parallel_problem(spec, t)]


def pipeline_parallel_choices(spec: ModelSpec, largest: int = 64) -> list[int]:
    """Degrees that give each stage equally many layers."""
    return [p for p in range(1, min(largest, spec.layers) + 1) if spec.layers % p == 0]


def expert_parallel_choices(spec: ModelSpec, largest: int = 512) -> list[int]:
    """Degrees that give each rank equally many routed experts."""
    return [p for p in range(1, min(largest, max(spec.experts, 1)) + 1) if spec.experts % p == 0]


def stage_layers(spec: ModelSpec, pipeline_parallel: int, stage: int) -> range:
    """The layers of one pipeline stage, both counted from 0."""
    each = spec.layers // pipeline_parallel
    return range(stage * each, (stage + 1) * each)


def check_layout(spec: ModelSpec, tensor_parallel: int = 1, pipeline_parallel: int = 1, *, field: str = "") -> None:
    """Raise InputError, naming the allowed degrees, when the model cannot be split like that."""
    prefix = f"{field}." if field else ""
    problem = _tensor_parallel_problem(spec, tensor_parallel)
    if problem:
        allowed = _listed(tensor_parallel_choices(spec))
        raise InputError(
            f"{tensor_parallel} does not divide {spec.name}: {problem} (allowed: {allowed})",
            field=prefix + "tensor_parallel",
        )
    if pipeline_parallel < 1 or spec.layers % pipeline_parallel:
        raise InputError(
            f"{pipeline_parallel} does not divide {spec.name}: it has {spec.layers} layers "
            f"(allowed: {_listed(pipeline_parallel_choices(spec))})",
            field=prefix + "pipeline_parallel",
        )


def _tensor_parallel_problem(spec: ModelSpec, degree: int) -> str:
    if degree < 1:
        return "the degree must be at least 1"
    if spec.heads % degree:
        return f"it has {spec.heads} attention heads"
    widths = {"MLP is": spec.ffn * spec.has_mlp, "shared expert is": spec.shared_expert_ffn}
    for name, width in (widths | {"experts are": spec.expert_ffn}).items():
        if width % degree:
            return f"its {name} {width} wide"
    for number, of_what in ((spec.linear_key_heads, "key"), (spec.linear_value_heads, "value")):
        if number % degree:
            return f"its linear attention has {number} {of_what} heads"
    if spec.kv_heads % degree and degree % spec.kv_heads:
        return f"it has {spec.kv_heads} KV heads, which must be split evenly or copied whole"
    return ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def kv_heads_per_rank(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """KV heads on one rank; with more ranks than KV heads each rank holds a copy of one."""
    return max(1, spec.kv_heads // tensor_parallel)


# --- parameters ------------------------------------------------------------------------------------------------------


def layer_gemms(
    spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE, split: ExpertSplit | None = None
) -> list[Gemm]:
    """The dense products of one layer on one rank: attention's, and the MLP's or the experts'."""
    check_layout(spec, tensor_parallel)
    mlp = (
        expert_gemms(spec, tensor_parallel, split)
        if kind.experts
        else _mlp_gemms(spec, "mlp", spec.ffn, tensor_parallel)
    )
    return attention_gemms(spec, tensor_parallel, kind) + mlp


def attention_gemms(spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE) -> list[Gemm]:
    """Fused qkv (with the gate of the output) and attention output; likewise of linear attention.

    Latent attention: down to the latent vectors (whole on every rank) and up from them to this rank's heads. While
    decoding, engines apply the up-projection of keys and values to queries and outputs: as many FLOPs and bytes.
    """
    t = tensor_parallel
    if kind.linear:
        values = spec.linear_value_heads // t * spec.linear_value_head_dim
        inputs = [Gemm(f"linear_{name}", n, spec.hidden) for name, n in linear_attention.projections(spec, t)]
        return [*inputs, Gemm("linear_output", spec.hidden, values)]
    heads = spec.heads // t
    output = Gemm("attention_output", spec.hidden, heads * spec.value_head_dim)
    if not spec.latent_attention:
        columns = heads * (1 + spec.attention_gate) + 2 * kv_heads_per_rank(spec, t)
        return [Gemm("qkv", columns * spec.head_dim, spec.hidden), output]
    q_from = spec.q_lora_rank or spec.hidden
    down = [Gemm("q_down", spec.q_lora_rank, spec.hidden)] if spec.q_lora_rank else []
    return [
        *down,
        Gemm("q", heads * spec.head_dim, q_from),
        Gemm("kv_down", spec.kv_lora_rank + spec.qk_rope_head_dim, spec.hidden),
        Gemm("kv", heads * (spec.qk_nope_head_dim + spec.value_head_dim), spec.kv_lora_rank),
        output,
    ]


def expert_gemms(spec: ModelSpec, tensor_parallel: int = 1, split: ExpertSplit | None = None) -> list[Gemm]:
    """Router (whole on every rank), shared expert (split like an MLP) and routed experts.

    split: of the routed experts; absent: like an MLP. The ranks of a replica share its tokens, so that with e-way
    tensor parallelism of experts a rank has ``experts_per_token e / tensor_parallel`` rows per token.
    """
    split = split or ExpertSplit(1, tensor_parallel)
    _check_split(spec, split)
    gemms = [Gemm("router", spec.experts, spec.hidden)]
    if spec.shared_expert_gate:
        gemms.append(Gemm("shared_gate", 1, spec.hidden))
    if spec.shared_expert_ffn:
        gemms += _mlp_gemms(spec, "shared", spec.shared_expert_ffn, tensor_parallel)
    copies, chosen = spec.experts // split.parallel, spec.experts_per_token / spec.experts
    rows = spec.experts_per_token * split.tensor / tensor_parallel
    routed = _mlp_gemms(spec, "expert", spec.expert_ffn, split.tensor)
    return gemms + [g._replace(copies=copies, rows_per_token=rows, chosen=chosen) for g in routed]


def _check_split(spec: ModelSpec, split: ExpertSplit) -> None:
    if split.parallel < 1 or spec.experts % split.parallel:
        raise InputError(
            f"{split.parallel} does not divide the {spec.experts} experts of {spec.name} (allowed: "
            f"{_listed(expert_parallel_choices(spec))})",
            field="expert_parallel",
        )
    if split.tensor < 1 or spec.expert_ffn % split.tensor:
        raise InputError(
            f"{split.tensor} does not divide {spec.name}: its experts are {spec.expert_ffn} wide",
            field="expert_tensor_parallel",
        )


def _mlp_gemms(spec: ModelSpec, name: str, width: int, tensor_parallel: int) -> list[Gemm]:
    """Up (with gate) and down."""
    own = width // tensor_parallel
    return [Gemm(f"{name}_up", (2 if spec.gated_mlp else 1) * own, spec.hidden), Gemm(f"{name}_down", spec.hidden, own)]


def head_gemms(spec: ModelSpec, head: Head = "lm", tensor_parallel: int = 1) -> list[Gemm]:
    """The dense products after the last layer on one rank.

    The vocabulary is split, rounded up. A value head is one column without bias on what the LM head would read
    (as in DeepSpeed-Chat's RewardModel.v_head); it is not split. OPT-350M first projects `hidden` down, with any head.
    """
    width = spec.embedding_width
    gemms = [Gemm("project_out", width, spec.hidden)] if width != spec.hidden else []
    if head == "lm":
        gemms.append(Gemm("lm_head", _ceil_div(spec.vocabulary, tensor_parallel), width))
    elif head == "value":
        gemms.append(Gemm("value_head", 1, width))
    return gemms


def attention_parameters(spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE) -> int:
    """Projections of one layer with their biases, norms inside attention, and sinks."""
    check_layout(spec, tensor_parallel)
    gemms = {gemm.name: gemm for gemm in attention_gemms(spec, tensor_parallel, kind)}
    if kind.linear:
        inner = linear_attention.inner_parameters(spec, tensor_parallel)
        return sum(gemm.parameters for gemm in gemms.values()) + inner
    biased = [gemms[name].n for name in ("qkv", "q_down", "kv_down") if name in gemms]
    biases = sum(biased) * spec.qkv_bias + spec.hidden * spec.attention_output_bias
    norms = 2 * spec.head_dim * spec.qk_norm + spec.q_lora_rank + spec.kv_lora_rank
    sinks = spec.heads // tensor_parallel * spec.attention_sinks
    return sum(gemm.parameters for gemm in gemms.values()) + biases + norms + sinks


def mlp_parameters(
    spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE, split: ExpertSplit | None = None
) -> int:
    """Matrices and biases of one layer's MLP, or of its router and experts on one rank."""
    if not kind.experts:
        check_layout(spec, tensor_parallel)
        gemms = _mlp_gemms(spec, "mlp", spec.ffn, tensor_parallel)
        return sum(gemm.parameters + gemm.n * spec.mlp_bias for gemm in gemms)
    return unrouted_parameters(spec, tensor_parallel) + routed_parameters(spec, tensor_parallel, split)


def unrouted_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Router and shared expert of one layer on one rank."""
    gemms = [gemm for gemm in expert_gemms(spec, tensor_parallel) if not gemm.name.startswith("expert")]
    biases = sum(gemm.n for gemm in gemms if gemm.name.startswith("shared_") and gemm.name != "shared_gate")
    return sum(gemm.parameters for gemm in gemms) + biases * spec.mlp_bias + spec.experts * spec.router_bias


def routed_parameters(spec: ModelSpec, tensor_parallel: int = 1, split: ExpertSplit | None = None) -> int:
    """The routed experts of one layer on one rank; 0 without experts."""
    if not spec.experts:
        return 0
    gemms = [gemm for gemm in expert_gemms(spec, tensor_parallel, split) if gemm.name.startswith("expert")]
    return sum(gemm.parameters + gemm.copies * gemm.n * spec.expert_bias for gemm in gemms)


def norm_parameters(spec: ModelSpec) -> int:
    """The norms of one layer over the hidden dimension; each rank of a tensor-parallel group holds all of them."""
    return spec.norms_per_layer * _norm(spec)


def layer_parameters(
    spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE, split: ExpertSplit | None = None
) -> int:
    """Everything in one layer."""
    mlp = mlp_parameters(spec, tensor_parallel, kind, split)
    return attention_parameters(spec, tensor_parallel, kind) + mlp + norm_parameters(spec)


def layers_parameters(
    spec: ModelSpec, tensor_parallel: int = 1, split: ExpertSplit | None = None, layers: Iterable[int] | None = None
) -> int:
    """Everything in all layers, or in those given, on one rank."""
    kinds = spec.layer_kinds(layers)
    return sum(count * layer_parameters(spec, tensor_parallel, kind, split) for kind, count in kinds.items())


def layers_routed_parameters(
    spec: ModelSpec, tensor_parallel: int = 1, split: ExpertSplit | None = None, layers: Iterable[int] | None = None
) -> int:
    """The part of `layers_parameters` that is routed experts: sharded over other ranks than the rest."""
    routed = routed_parameters(spec, tensor_parallel, split)
    return sum(count * routed for kind, count in spec.layer_kinds(layers).items() if kind.experts)


def matmul_parameters(spec: ModelSpec, tensor_parallel: int = 1, kind: LayerKind = DENSE) -> int:
    """The matrices of one layer, without biases and norms: what weight reads come from."""
    return sum(gemm.parameters for gemm in layer_gemms(spec, tensor_parallel, kind))


def embedding_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Word embedding (split over the vocabulary), its norm, learned positions, OPT-350M's projection in."""
    width = spec.embedding_width
    words = _ceil_div(spec.vocabulary, tensor_parallel) * width + _norm(spec) * spec.embedding_norm
    return words + spec.learned_positions * spec.hidden + (width * spec.hidden if width != spec.hidden else 0)


def head_parameters(spec: ModelSpec, head: Head = "lm", tensor_parallel: int = 1) -> int:
    """Parameters after the last layer that are not also the embedding's: final norm, projection out, head."""
    gemms = head_gemms(spec, head, tensor_parallel)
    own = sum(gemm.parameters for gemm in gemms if not (gemm.name == "lm_head" and spec.tied_embeddings))
    biases = sum(gemm.n for gemm in gemms if gemm.name == "lm_head") * spec.head_bias
    return own + biases + _norm(spec) * spec.final_norm


def parameters(spec: ModelSpec, head: Head = "lm") -> int:
    """All parameters of the model with a language-model head, a value head or none; shared ones counted once."""
    return embedding_parameters(spec) + layers_parameters(spec) + head_parameters(spec, head)


def active_parameters(spec: ModelSpec, head: Head = "lm") -> int:
    """Those that work on one token: all but the experts that it is not routed to."""
    idle = spec.experts - spec.experts_per_token
    return parameters(spec, head) - (layers_routed_parameters(spec) // spec.experts * idle if spec.experts else 0)


def rank_parameters(
    spec: ModelSpec,
    head: Head = "lm",
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    stage: int = 0,
    split: ExpertSplit | None = None,
    layers: range | None = None,
) -> int:
    """Parameters held by one rank of pipeline stage `stage` (0 is the first).

    The first stage has the embedding, the last the head; with tied embeddings a last stage that is not the first
    holds a second copy of the word embedding. layers: those of the stage, where stages have unequally many.
    """
    check_layout(spec, tensor_parallel, pipeline_parallel if layers is None else 1)
    if not 0 <= stage < pipeline_parallel:
        raise InputError(f"stage is {stage}, but there are {pipeline_parallel} (counted from 0)", field="stage")
    own = stage_layers(spec, pipeline_parallel, stage) if layers is None else layers
    held = layers_parameters(spec, tensor_parallel, split, own)
    if stage == 0:
        held += embedding_parameters(spec, tensor_parallel)
    if stage == pipeline_parallel - 1:
        held += head_parameters(spec, head, tensor_parallel)
        if head == "lm" and spec.tied_embeddings and stage > 0:
            held += _ceil_div(spec.vocabulary, tensor_parallel) * spec.embedding_width
    return held


# --- experts over ranks ----------------------------------------------------------------------------------------------


def expert_exchange_bytes(spec: ModelSpec, tokens: float, split: ExpertSplit, element_bytes: float = 2) -> float:
    """What one rank sends to other ranks to dispatch `tokens` of its own to their experts, in one layer.

    Each token goes out once for each of its experts, a share ``(p - 1) / p`` of them to other ranks:
    ``tokens x experts_per_token x hidden x bytes x (p - 1) / p``. Combining sends as much back; so does the backward
    pass, once for each. (Dispatchers that send a token once to each node or rank move less.)
    """
    elsewhere = (split.parallel - 1) / split.parallel
    return tokens * spec.experts_per_token * spec.hidden * element_bytes * elsewhere


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def attended_pairs(new_tokens: float, cached_tokens: float = 0, window: int = 0) -> float:
    """Pairs of query and key in causal attention; a query attends to itself too.

    ``n c + n (n + 1) / 2``. With a window of w tokens, itself included, it is w for each query, less what the first
    ``w - 1 - c`` of them do not find.
    """
    if not window:
        return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) / 2
    missing = _at_least(window - 1 - cached_tokens, 0)  # of the first query
    short = missing - _at_least(missing - new_tokens, 0)  # queries that find fewer than the window
    return window * new_tokens - short * missing + short * (short - 1) / 2


def attention_flops(
    spec: ModelSpec,
    new_tokens: float,
    cached_tokens: float = 0,
    *,
    causal: bool = True,
    tensor_parallel: int = 1,
    window: int = 0,
) -> float:
    """Scores and weighted values of one layer for one sequence, forward, on one rank.

    2 x (width of queries + width of values, all heads) per pair of query and key. Decoding one token is
    ``new_tokens=1``. The backward pass takes `BACKWARD_TO_FORWARD` as many (FlashAttention kernels compute the scores
    once more; that is not counted). Latent attention as in prefill, with keys and values per head.
    """
    pairs = attended_pairs(new_tokens, cached_tokens, window)
    if not causal:
        pairs = new_tokens * cached_tokens + new_tokens * new_tokens
    return 2.0 * spec.heads * (spec.head_dim + spec.value_head_dim) / tensor_parallel * pairs


def forward_flops(
    spec: ModelSpec,
    sequences: float,
    tokens_per_sequence: float,
    head: Head = "lm",
    *,
    head_tokens: float | None = None,
    causal: bool = True,
) -> float:
    """One forward pass of the entire model; `head_tokens` when the head reads fewer than all tokens."""
    at_head = sequences * tokens_per_sequence if head_tokens is None else head_tokens
    layers = _layers_forward_flops(spec, sequences, tokens_per_sequence, causal)
    return layers + sum(gemm.flops(at_head) for gemm in head_gemms(spec, head))


def training_flops(
    spec: ModelSpec,
    sequences: float,
    tokens_per_sequence: float,
    head: Head = "lm",
    *,
    recompute: Recompute = "none",
    frozen_weights: bool = False,
    causal: bool = True,
) -> float:
    """Forward, backward and recomputation of one pass over the sequences.

    Full recomputation repeats the layers, selective only the attention core; neither repeats the head.
    `frozen_weights` (LoRA) leaves out the weight gradients of all matrices; the adapters' own work is not counted.
    """
    layers = _layers_forward_flops(spec, sequences, tokens_per_sequence, causal)
    core = sequences * _attention_forward_flops(spec, tokens_per_sequence, causal)
    forward = forward_flops(spec, sequences, tokens_per_sequence, head, causal=causal)
    # products with frozen weights need only the gradient of their input; the attention core has no weights
    backward = forward + core if frozen_weights else BACKWARD_TO_FORWARD * forward
    return forward + backward + {"none": 0.0, "selective": core, "full": layers}[recompute]


def _layers_forward_flops(spec: ModelSpec, sequences: float, tokens_per_sequence: float, causal: bool) -> float:
    tokens, kinds = sequences * tokens_per_sequence, spec.layer_kinds()
    products = sum(n * sum(gemm.flops(tokens) for gemm in layer_gemms(spec, 1, kind)) for kind, n in kinds.items())
    return products + sequences * _attention_forward_flops(spec, tokens_per_sequence, causal)


def _attention_forward_flops(spec: ModelSpec, tokens: float, causal: bool) -> float:
    """Of all layers, for one sequence."""
    return sum(
        count * tokens * linear_attention.forward_work(spec).flops
        if kind.linear
        else count * attention_flops(spec, tokens, causal=causal, window=kind.window)
        for kind, count in spec.layer_kinds().items()
    )


# --- KV cache --------------------------------------------------------------------------------------------------------


def layer_kv_bytes(spec: ModelSpec, element_bytes: float = 2, tensor_parallel: int = 1) -> float:
    """Keys and values of one token in one layer of one rank: 2 x KV heads x head dimension x bytes.

    Latent attention caches the latent vector and the shared rotary key, whole on every rank.
    """
    if spec.latent_attention:
        return (spec.kv_lora_rank + spec.qk_rope_head_dim) * element_bytes
    return kv_heads_per_rank(spec, tensor_parallel) * (spec.head_dim + spec.value_head_dim) * element_bytes


def kv_bytes_per_token(
    spec: ModelSpec,
    element_bytes: float = 2,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    sequence_tokens: float | None = None,
) -> float:
    """Cache of one token in all layers of one rank, on the fullest pipeline stage; linear attention has none.

    sequence_tokens: the mean over a sequence of so many, of which a layer with a window keeps the last ones only;
    absent: of a short one.
    """
    check_layout(spec, tensor_parallel, pipeline_parallel)

    def kept_share(window: int) -> float:
        return min(1.0, window / sequence_tokens) if window and sequence_tokens else 1.0

    stages = (stage_layers(spec, pipeline_parallel, stage) for stage in range(pipeline_parallel))
    layers = max(
        sum(n * kept_share(k.window) for k, n in spec.layer_kinds(stage).items() if not k.linear) for stage in stages
    )
    return layers * layer_kv_bytes(spec, element_bytes, tensor_parallel)


# --- activations -----------------------------------------------------------------------------------------------------


def activation_bytes_per_token(
    spec: ModelSpec,
    tokens_per_sequence: float,
    *,
    recompute: Recompute = "none",
    flash_attention: bool = True,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    element_bytes: float = 2,
    dropout: bool = False,
    fused: bool = True,
    kind: LayerKind = DENSE,
    split: ExpertSplit | None = None,
    routing_imbalance: float = 1.0,
    expert_outputs: bool = True,
) -> float:
    """What one layer keeps for the backward pass, per token of the replica, on one rank.

    Korthikanti et al., equations 1 (no split), 2 (tensor), 4 (and sequence) and 6 (selective), written for any KV
    and MLP width; with `dropout`, multi-head attention and a plain MLP of 4 x hidden they give ``34 h + 5 a s``.

    recompute: `selective` drops what is quadratic in the sequence, `full` all but the layer's input (split too under
        sequence parallelism, as Megatron-LM keeps it).
    flash_attention: the quadratic part is never stored; one fp32 log-sum-exp per head is.
    fused: norm, activation and softmax kernels keep their inputs or outputs only, as Megatron-LM's do. The plain
        modules of transformers keep more: an fp32 input and the normalised values of each RMSNorm, the activated gate,
        fp32 scores and repeated keys and values (counted by autograd hooks on LlamaDecoderLayer of transformers 5.24,
        see tests/test_model.py).
    kind, split: with experts, also what is routed to this rank: inputs and activations of its rows, of which there are
        `routing_imbalance` times as many as on average.
    expert_outputs: whether those of routed experts are kept, as where the router's weights come after the down
        projection (transformers); Megatron-LM weights the activations before it (megatron/core/transformer/moe/
        experts.py and fusions/fused_bias_swiglu.py, WeightedSwiGLUFunction).
    """
    check_layout(spec, tensor_parallel)
    serial_share = tensor_parallel if sequence_parallel else 1
    h, e = spec.hidden, element_bytes
    if recompute == "full":
        return e * h / serial_share
    serial = spec.norms_per_layer * _norm_bytes(spec, e, fused) + 2 * e * h  # inputs of qkv and of the up projection
    if dropout:
        serial += 2 * h  # one-byte masks after attention and after the MLP
    inside = (
        linear_attention.kept_bytes(spec, tensor_parallel, e)
        if kind.linear
        else _attention_bytes(spec, tokens_per_sequence, recompute, flash_attention, tensor_parallel, e, dropout, fused)
    )
    widths = _mlp_widths_kept(spec, fused)
    if not kind.experts:
        return serial / serial_share + inside + e * widths * spec.ffn / tensor_parallel
    serial += 8 * spec.experts  # fp32 logits and probabilities of the router
    split = split or ExpertSplit(1, tensor_parallel)
    rows = spec.experts_per_token * split.tensor / tensor_parallel * routing_imbalance
    routed = rows * ((1 + expert_outputs) * h + widths * spec.expert_ffn / split.tensor)
    shared = widths * spec.shared_expert_ffn / tensor_parallel
    return serial / serial_share + inside + e * (routed + shared)


def _norm_bytes(spec: ModelSpec, element_bytes: float, fused: bool) -> float:
    """Kept by one norm over the hidden dimension, per token."""
    unfused_rms = spec.norm == "rms" and not fused  # PyTorch's LayerNorm is one kernel
    return spec.hidden * (element_bytes + 4 if unfused_rms else element_bytes)


def _attention_bytes(
    spec: ModelSpec,
    tokens_per_sequence: float,
    recompute: Recompute,
    flash_attention: bool,
    tensor_parallel: int,
    element_bytes: float,
    dropout: bool,
    fused: bool,
) -> float:
    """Queries, keys, values, scores and the input of the output projection, per token of one rank."""
    heads = spec.heads // tensor_parallel
    kv_heads = kv_heads_per_rank(spec, tensor_parallel) if fused or flash_attention else heads
    kept = element_bytes * (heads + kv_heads) * (spec.head_dim + spec.value_head_dim)
    if spec.latent_attention:  # latent vectors before and after their norms
        kept += element_bytes * (2 * spec.q_lora_rank + 2 * spec.kv_lora_rank + spec.qk_rope_head_dim)
    if spec.attention_gate:  # the gate, and the output before it
        kept += 2 * element_bytes * heads * spec.value_head_dim
    if spec.qk_norm:
        kept += element_bytes * (heads + kv_heads) * spec.head_dim
    if flash_attention:
        return kept + 4 * heads
    if recompute == "selective":
        return kept
    per_score = element_bytes  # the softmax's output, which the product with the values reads as well
    if not fused and element_bytes != 4:
        per_score += 4
    if dropout:
        per_score += 1 + element_bytes  # mask and output of the dropout
    return kept + per_score * heads * tokens_per_sequence


def _mlp_widths_kept(spec: ModelSpec, fused: bool) -> int:
    """Tensors as wide as the MLP that are kept: inputs of the activation, input of the down projection."""
    if spec.gated_mlp:
        return 3 if fused else 4
    return 1 if spec.relu else 2  # ReLU needs only its output, which is the next product's input


def output_activation_bytes_per_token(
    spec: ModelSpec, *, tensor_parallel: int = 1, sequence_parallel: bool = False, element_bytes: float = 2
) -> float:
    """Kept after the last layer besides the logits: inputs of the final norm and of the head, per token and rank."""
    tensors = spec.hidden * spec.final_norm + spec.embedding_width
    return element_bytes * tensors / (tensor_parallel if sequence_parallel else 1)


def logits_bytes(spec: ModelSpec, tokens: float, copies: float, *, tensor_parallel: int = 1) -> float:
    """fp32 logits of `tokens` tokens on one rank, `copies` times (upcast, softmax, gradient: the caller knows)."""
    return 4.0 * tokens * _ceil_div(spec.vocabulary, tensor_parallel) * copies


# --- helpers ---------------------------------------------------------------------------------------------------------


def _at_least(value: float, least: float) -> float:
    """The larger one, also of arrays."""
    return value + (least - value) * (value < least)


def _norm(spec: ModelSpec) -> int:
    return spec.hidden * (2 if spec.norm == "layer" else 1)


def _ceil_div(value: int, parts: int) -> int:
    return -(-value // parts)
