"""Arithmetic of a gated delta net, the linear attention of Qwen3-Next and Qwen3.5: shapes, FLOPs and bytes.

Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464, 2024. A head keeps a matrix of
(key dimension x value dimension) instead of keys and values; training and prefill compute it chunk by chunk. Products
and tensors are those of flash-linear-attention's kernels (fla/ops/gated_delta_rule/chunk.py and wy_fast.py,
fla/ops/common/chunk_o.py and chunk_delta_h.py at 0315a70e), per value head: keys and queries, of which there may be
fewer heads, are repeated. Functions of one layer and one rank; they trust that `tensor_parallel` divides the heads.
"""

from __future__ import annotations

from typing import NamedTuple

from .spec.model_spec import ModelSpec

CHUNK_TOKENS = 64  # chunk_size=64 in chunk_gated_delta_rule_fwd

# Launches of chunk_gated_delta_rule_fwd and _bwd, without norms of queries and keys.
FORWARD_KERNELS, BACKWARD_KERNELS = 6, 9


class DeltaWork(NamedTuple):
    """Of one token: floating-point operations, and bytes that kernels read and write."""

    flops: float
    moved_bytes: float
    kernels: int


def projections(spec: ModelSpec, tensor_parallel: int = 1) -> list[tuple[str, int]]:
    """(name, outputs) of the linear modules that read the hidden state, as the model's checkpoint has them.

    z gates the output; a and b give the decay and the strength of each head's update.
    """
    t = tensor_parallel
    qkv, values, heads = conv_channels(spec, t), _value_width(spec, t), spec.linear_value_heads // t
    if spec.family == "qwen3_next":
        return [("qkvz", qkv + values), ("ba", 2 * heads)]
    return [("qkv", qkv), ("z", values), ("b", heads), ("a", heads)]


def conv_channels(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """Queries, keys and values, over which a short causal convolution runs."""
    keys = spec.linear_key_heads // tensor_parallel * spec.linear_key_head_dim
    return 2 * keys + _value_width(spec, tensor_parallel)


def inner_parameters(spec: ModelSpec, tensor_parallel: int = 1) -> int:
    """All but the projections: convolution, A_log and dt_bias of each head, and the norm over a head's output."""
    convolution = spec.linear_conv_kernel * conv_channels(spec, tensor_parallel)
    return convolution + 2 * (spec.linear_value_heads // tensor_parallel) + spec.linear_value_head_dim


def forward_work(spec: ModelSpec, tensor_parallel: int = 1, element_bytes: float = 2) -> DeltaWork:
    """The chunked delta rule, per token: ``6 K V + C (6 K + 4 V) + C^2 / 3`` FLOPs a head, in chunks of C tokens.

    K K^T (2 C K), inverse of a triangle (C^2 / 3), w and u from it (2 C K + 2 C V), states (4 K V), output (2 K V +
    2 C K + 2 C V). Short sequences compute whole chunks all the same, which is left out.
    """
    k, v, c, heads = _dims(spec, tensor_parallel)
    flops = 6 * k * v + c * (6 * k + 4 * v) + c**2 / 3
    return DeltaWork(heads * flops, heads * _bytes(element_bytes, 7, 6, 6, 2, k, v, c), FORWARD_KERNELS)


def backward_work(spec: ModelSpec, tensor_parallel: int = 1, element_bytes: float = 2) -> DeltaWork:
    """The kernels of the backward pass, per token: ``16 K V + C (20 K + 10 V) + 4 C^2`` FLOPs a head.

    w, u and the states again (2 C K + 2 C V + 4 K V), then dv inside chunks (2 C K + 2 C V), dh (6 K V), dq, dk and dw
    (6 K V + 6 C K + 2 C V), and the gradient through the inverse (10 C K + 4 C V + 4 C^2).
    """
    k, v, c, heads = _dims(spec, tensor_parallel)
    flops = 16 * k * v + c * (20 * k + 10 * v) + 4 * c**2
    return DeltaWork(heads * flops, heads * _bytes(element_bytes, 23, 15, 2, 4, k, v, c), BACKWARD_KERNELS)


def _bytes(
    element_bytes: float, keys: float, values: float, squares: float, states: float, k: int, v: int, c: int
) -> float:
    """Of one head and token: so many rows as wide as keys and as values, rows of C x C matrices (in fp32 two), and
    states (one a chunk), each read or written once by a kernel."""
    return element_bytes * (keys * k + values * v + squares * c + states * k * v / c)


def state_bytes(spec: ModelSpec, element_bytes: float = 2, tensor_parallel: int = 1, *, drafts: int = 0) -> float:
    """What an engine keeps of one sequence, however long: the heads' matrices and the inputs of the convolution.

    vLLM (MambaStateShapeCalculator.gated_delta_net_state_shape, vllm/model_executor/layers/mamba/mamba_utils.py at
    02d71083): the convolution's last ``kernel - 1 + drafts`` inputs in the model's precision, the matrices in that of
    `linear_state_bytes`; one more of both for each drafted token, to which the sequence may have to go back.
    """
    inputs = (spec.linear_conv_kernel - 1 + drafts) * conv_channels(spec, tensor_parallel)
    return (1 + drafts) * (_matrix_bytes(spec, tensor_parallel) + inputs * element_bytes)


def step_bytes(spec: ModelSpec, element_bytes: float = 2, tensor_parallel: int = 1, *, queries: int = 1) -> float:
    """Read and written of one sequence's state in a decode step: its matrices once read, and written after each of
    `queries` tokens; the convolution's inputs read and written (vLLM's fused_recurrent_gated_delta_rule and
    causal_conv1d_update)."""
    inputs = (spec.linear_conv_kernel - 1) * conv_channels(spec, tensor_parallel)
    return (1 + queries) * _matrix_bytes(spec, tensor_parallel) + 2 * inputs * element_bytes


def kept_bytes(spec: ModelSpec, tensor_parallel: int = 1, element_bytes: float = 2) -> float:
    """Kept for the backward pass between the input's norm and the output projection, per token.

    Inputs of the convolution; queries, keys, values, a row of the inverse, decay and strength (fp32) of each head,
    which the delta rule saves; its output, the gate, and their product.
    """
    k, v, c, heads = _dims(spec, tensor_parallel)
    saved = element_bytes * (2 * k + v + c) + 2 * 4
    return element_bytes * (conv_channels(spec, tensor_parallel) + 3 * heads * v) + heads * saved


def elementwise_widths(spec: ModelSpec, tensor_parallel: int = 1) -> float:
    """Read and written per token outside the delta rule: convolution, norms of queries and keys, gated norm."""
    k, v, _, heads = _dims(spec, tensor_parallel)
    return 2 * conv_channels(spec, tensor_parallel) + 2 * 2 * heads * k + 3 * heads * v


def _dims(spec: ModelSpec, tensor_parallel: int) -> tuple[int, int, int, int]:
    heads = spec.linear_value_heads // tensor_parallel
    return spec.linear_key_head_dim, spec.linear_value_head_dim, CHUNK_TOKENS, heads


def _matrix_bytes(spec: ModelSpec, tensor_parallel: int) -> float:
    k, v, _, heads = _dims(spec, tensor_parallel)
    return heads * k * v * spec.linear_state_bytes


def _value_width(spec: ModelSpec, tensor_parallel: int) -> int:
    return spec.linear_value_heads // tensor_parallel * spec.linear_value_head_dim
