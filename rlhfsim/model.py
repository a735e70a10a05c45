"""Transformer arithmetic: parameters, matrix shapes, FLOPs and bytes of a `ModelSpec`.

Pure functions of shapes; no hardware and no time. A multiply-add counts as two FLOPs. `tensor_parallel` and
`pipeline_parallel` give the share of one rank (the largest one where shares differ). Token counts may be numpy
arrays: the arithmetic is elementwise.

Korthikanti et al. is "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, 2022. Its
table 2 was read in NVIDIA/Megatron-LM, megatron/training/theoretical_memory_usage.py (commit 00caa53), the equation
numbers in public notes on the paper; the paper itself was not opened.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .errors import InputError
from .spec.model_spec import ModelSpec

Head = Literal["lm", "value", "none"]
Recompute = Literal["none", "selective", "full"]

# Gradients of both operands of every product: twice the products of the forward pass.
BACKWARD_TO_FORWARD = 2.0


class Gemm(NamedTuple):
    """One dense product ``y[m, n] = x[m, k] w[k, n]`` on one rank; m is the number of tokens."""

    name: str
    n: int
    k: int

    @property
    def parameters(self) -> int:
        return self.n * self.k

    def flops(self, tokens: float) -> float:
        return 2.0 * tokens * self.n * self.k


# --- layouts ---------------------------------------------------------------------------------------------------------


def tensor_parallel_choices(spec: ModelSpec, largest: int = 64) -> list[int]:
    """Degrees that split heads and MLP evenly, and KV heads evenly or with whole copies."""
    return [t for t in range(1, min(largest, spec.heads) + 1) if not _tensor_parallel_problem(spec, t)]


def pipeline_parallel_choices(spec: ModelSpec, largest: int = 64) -> list[int]:
    """Degrees that give each stage equally many layers."""
    return [p for p in range(1, min(largest, spec.layers) + 1) if spec.layers % p == 0]


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
    if spec.ffn % degree:
        return f"its MLP is {spec.ffn} wide"
    if spec.kv_heads % degree and degree % spec.kv_heads:
        return f"it has {spec.kv_heads} KV heads, which must be split evenly or copied whole"
    return ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def kv_heads_per_rank(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """KV heads on one rank; with more ranks than KV heads each rank holds a copy of one."""
    return max(1, spec.kv_heads // tensor_parallel)


# --- parameters ------------------------------------------------------------------------------------------------------


def layer_gemms(spec: ModelSpec, tensor_parallel: int = 1) -> list[Gemm]:
    """The dense products of one layer on one rank: fused qkv, attention output, MLP up (with gate) and down."""
    check_layout(spec, tensor_parallel)
    t = tensor_parallel
    heads, kv_heads = spec.heads // t, kv_heads_per_rank(spec, t)
    return [
        Gemm("qkv", (heads + 2 * kv_heads) * spec.head_dim, spec.hidden),
        Gemm("attention_output", spec.hidden, heads * spec.head_dim),
        Gemm("mlp_up", (2 if spec.gated_mlp else 1) * spec.ffn // t, spec.hidden),
        Gemm("mlp_down", spec.hidden, spec.ffn // t),
    ]


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


def attention_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Projections of one layer with their biases, and query and key norms."""
    qkv, output, _, _ = layer_gemms(spec, tensor_parallel)
    biases = qkv.n * spec.qkv_bias + output.n * spec.attention_output_bias
    return qkv.parameters + output.parameters + biases + 2 * spec.head_dim * spec.qk_norm


def mlp_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Matrices and biases of one layer's MLP."""
    _, _, up, down = layer_gemms(spec, tensor_parallel)
    return up.parameters + down.parameters + (up.n + down.n) * spec.mlp_bias


def norm_parameters(spec: ModelSpec) -> int:
    """The norms of one layer over the hidden dimension; each rank of a tensor-parallel group holds all of them."""
    return spec.norms_per_layer * _norm(spec)


def layer_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Everything in one layer."""
    return attention_parameters(spec, tensor_parallel) + mlp_parameters(spec, tensor_parallel) + norm_parameters(spec)


def matmul_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """The matrices of one layer, without biases and norms: what FLOPs and weight reads come from."""
    return sum(gemm.parameters for gemm in layer_gemms(spec, tensor_parallel))


def embedding_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Word embedding (split over the vocabulary), learned positions, OPT-350M's projection in."""
    width = spec.embedding_width
    words = _ceil_div(spec.vocabulary, tensor_parallel) * width
    return words + spec.learned_positions * spec.hidden + (width * spec.hidden if width != spec.hidden else 0)


def head_parameters(spec: ModelSpec, head: Head = "lm", tensor_parallel: int = 1) -> int:
    """Parameters after the last layer that are not also the embedding's: final norm, projection out, head."""
    gemms = head_gemms(spec, head, tensor_parallel)
    own = sum(gemm.parameters for gemm in gemms if not (gemm.name == "lm_head" and spec.tied_embeddings))
    return own + _norm(spec) * spec.final_norm


def parameters(spec: ModelSpec, head: Head = "lm") -> int:
    """All parameters of the model with a language-model head, a value head or none; shared ones counted once."""
    return embedding_parameters(spec) + spec.layers * layer_parameters(spec) + head_parameters(spec, head)


def rank_parameters(
    spec: ModelSpec, head: Head = "lm", *, tensor_parallel: int = 1, pipeline_parallel: int = 1, stage: int = 0
) -> int:
    """Parameters held by one rank of pipeline stage `stage` (0 is the first).

    The first stage has the embedding, the last the head; with tied embeddings a last stage that is not the first
    holds a second copy of the word embedding.
    """
    check_layout(spec, tensor_parallel, pipeline_parallel)
    if not 0 <= stage < pipeline_parallel:
        raise InputError(f"stage is {stage}, but there are {pipeline_parallel} (counted from 0)", field="stage")
    held = spec.layers // pipeline_parallel * layer_parameters(spec, tensor_parallel)
    if stage == 0:
        held += embedding_parameters(spec, tensor_parallel)
    if stage == pipeline_parallel - 1:
        held += head_parameters(spec, head, tensor_parallel)
        if head == "lm" and spec.tied_embeddings and stage > 0:
            held += _ceil_div(spec.vocabulary, tensor_parallel) * spec.embedding_width
    return held


def lora_parameters(spec: ModelSpec, rank: int, layers: int | None = None) -> int:
    """Two factors, rank x inputs and outputs x rank, at each of the 6 or 7 linear modules of every layer.

    `layers`: only so many layers have them.
    """
    h, q, kv, f = spec.hidden, spec.query_width, spec.kv_width, spec.ffn
    modules = [(h, q), (h, kv), (h, kv), (q, h), (h, f), (f, h)] + ([(h, f)] if spec.gated_mlp else [])
    return rank * sum(inputs + outputs for inputs, outputs in modules) * (spec.layers if layers is None else layers)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def attention_flops(
    spec: ModelSpec, new_tokens: float, cached_tokens: float = 0, *, causal: bool = True, tensor_parallel: int = 1
) -> float:
    """Scores and weighted values of one layer for one sequence, forward, on one rank.

    4 x query width per pair of query and key. A causal query attends to the cached tokens, to those before it and
    to itself: ``n c + n (n + 1) / 2`` pairs. Decoding one token is ``new_tokens=1``. The backward pass takes
    `BACKWARD_TO_FORWARD` as many (FlashAttention kernels compute the scores once more; that is not counted).
    """
    within = new_tokens * (new_tokens + 1) / 2 if causal else new_tokens * new_tokens
    return 4.0 * spec.query_width / tensor_parallel * (new_tokens * cached_tokens + within)


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
    core = spec.layers * sequences * attention_flops(spec, tokens_per_sequence, causal=causal)
    forward = forward_flops(spec, sequences, tokens_per_sequence, head, causal=causal)
    # products with frozen weights need only the gradient of their input; the attention core has no weights
    backward = forward + core if frozen_weights else BACKWARD_TO_FORWARD * forward
    return forward + backward + {"none": 0.0, "selective": core, "full": layers}[recompute]


def _layers_forward_flops(spec: ModelSpec, sequences: float, tokens_per_sequence: float, causal: bool) -> float:
    products = 2.0 * sequences * tokens_per_sequence * matmul_parameters(spec)
    return spec.layers * (products + sequences * attention_flops(spec, tokens_per_sequence, causal=causal))


# --- KV cache --------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(
    spec: ModelSpec, element_bytes: float = 2, *, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> float:
    """Keys and values of one token in all layers of one rank: 2 x layers x KV heads x head dimension x bytes."""
    check_layout(spec, tensor_parallel, pipeline_parallel)
    layers = spec.layers // pipeline_parallel
    return 2 * layers * kv_heads_per_rank(spec, tensor_parallel) * spec.head_dim * element_bytes


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
) -> float:
    """What one layer keeps for the backward pass, per token, on one rank.

    Korthikanti et al., equations 1 (no split), 2 (tensor), 4 (and sequence) and 6 (selective), written for any KV
    and MLP width; with `dropout`, multi-head attention and a plain MLP of 4 x hidden they give ``34 h + 5 a s``.

    recompute: `selective` drops what is quadratic in the sequence, `full` all but the layer's input (split too under
        sequence parallelism, as Megatron-LM keeps it).
    flash_attention: the quadratic part is never stored; one fp32 log-sum-exp per head is.
    fused: norm, activation and softmax kernels keep their inputs or outputs only, as Megatron-LM's do. The plain
        modules of transformers keep more: an fp32 input and the normalised values of each RMSNorm, the activated gate,
        fp32 scores and repeated keys and values (counted by autograd hooks on LlamaDecoderLayer of transformers 5.24,
        see tests/test_model.py).
    """
    check_layout(spec, tensor_parallel)
    serial_share = tensor_parallel if sequence_parallel else 1
    h, e = spec.hidden, element_bytes
    if recompute == "full":
        return e * h / serial_share
    serial = spec.norms_per_layer * _norm_bytes(spec, e, fused) + 2 * e * h  # inputs of qkv and of the up projection
    if dropout:
        serial += 2 * h  # one-byte masks after attention and after the MLP
    inside = _attention_bytes(spec, tokens_per_sequence, recompute, flash_attention, tensor_parallel, e, dropout, fused)
    inside += e * _mlp_widths_kept(spec, fused) * spec.ffn / tensor_parallel
    return serial / serial_share + inside


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
    kept = element_bytes * (2 * heads + 2 * kv_heads) * spec.head_dim
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


def _norm(spec: ModelSpec) -> int:
    return spec.hidden * (2 if spec.norm == "layer" else 1)


def _ceil_div(value: int, parts: int) -> int:
    return -(-value // parts)
