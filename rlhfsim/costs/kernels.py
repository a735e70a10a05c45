"""Seconds of one kernel on one GPU, from fitted efficiency curves.

A curve is a few coefficients per architecture (`hw_specs/kernels/*.yaml`), relative to the datasheet rates that are
passed in as `Rates`; `experiments/kernel_fit` fits them and states how far off they are. All functions are pure, and
take numbers or numpy arrays that broadcast.

`ideal=True` is the switch for constant efficiency: the curve's asymptotic efficiency at every size and no fixed time
per kernel. `launch_seconds` of a `KernelTime` is the fixed time on the device (fill, drain, tail); what the host needs
to launch a kernel eagerly is `Kernels.host_launch_seconds`, and hides in a CUDA graph or behind a deep queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from rlhfsim.errors import InputError
from rlhfsim.linear_attention import DeltaWork
from rlhfsim.spec.base import Count, Fraction, NonNegativeCount, Record, Seconds, Sourced

from .residuals import Residuals

Numbers = float | np.ndarray
NonNegative = Annotated[float, Field(ge=0, le=1e12)]
Exponent = Annotated[float, Field(gt=0, le=64)]
CurvePrecision = Literal["bf16", "fp8"]
MemoryKernel = Literal[
    "residual_add", "rms_norm", "rope", "gated_activation", "embedding", "cross_entropy", "optimizer"
]
Collective = Literal[
    "all_reduce",
    "custom_all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send",
    "to_host",
    "from_host",
]

QUERY_TILE_ROWS = 128  # FlashAttention-2's forward block of query rows at head dimension 128


class Fit(Record):
    """Where coefficients come from and how far off they are: errors are |predicted / measured - 1|.

    source: a key of the file's `sources`. measured: False where the values were copied from another GPU.
    rows: fitted; held_out_rows: scored and not fitted, the errors below are theirs.
    weighted_error: sum of |error| over sum of time, what a sum of kernels feels. bias: sum predicted / measured - 1.
    """

    source: str
    measured: bool = True
    rows: NonNegativeCount = 0
    held_out_rows: NonNegativeCount = 0
    mean_error: NonNegative | None = None
    weighted_error: NonNegative | None = None
    worst_error: NonNegative | None = None
    bias: float | None = None
    note: str = ""


class GemmCurve(Record):
    """seconds = t0 + p-norm(2 (m+m0)(n+n0)(k+k0) / (peak ec), (bytes+b0) / (bandwidth eb)).

    The paddings are efficiencies that saturate: m / (m+m0) and so on. `kernel_seconds` is t0.
    residuals: over n, k, m; they multiply all of it, but nothing is faster than the asymptotic efficiencies allow.
    weight_gradient_ratio: seconds of a weight-gradient GEMM (accumulates in fp32) over a forward one of its shape.
    cache_bytes: part of what a small model's products read is still in a cache from their last use: of all weights
        that take turns, weights / (weights + cache_bytes) come from memory. For CPUs; 0: not fitted.
    """

    compute_efficiency: Fraction
    memory_efficiency: Fraction
    kernel_seconds: Seconds
    padding_m: NonNegative
    padding_n: NonNegative
    padding_k: NonNegative
    padding_bytes: NonNegative
    exponent: Exponent
    cache_bytes: NonNegative = 0.0
    residuals: Residuals | None = None
    weight_gradient_ratio: Annotated[float, Field(ge=1, le=3)]
    fit: Fit
    weight_gradient_fit: Fit


class PrefillCurve(Record):
    """Causal attention over whole sequences: t0 + p-norm(mean work per multiprocessor, longest tile) + bytes.

    residuals: over query heads per key-value head, batch x heads, tokens of a sequence; as for products.
    backward_ratio: seconds of the backward kernels over those of the forward one, both without t0.
    """

    compute_efficiency: Fraction
    memory_efficiency: Fraction
    kernel_seconds: Seconds
    exponent: Exponent
    residuals: Residuals | None = None
    backward_ratio: Annotated[float, Field(ge=1, le=10)]
    fit: Fit
    backward_fit: Fit


class DecodeCurve(Record):
    """Attention of one new token per sequence: t0 + KV bytes / (bandwidth e) + c batch kv_heads / multiprocessors.

    residuals: over query heads per key-value head, batch x key-value heads, cached tokens of the mean sequence; as for
    products.
    """

    memory_efficiency: Fraction
    kernel_seconds: Seconds
    tile_seconds: Seconds
    residuals: Residuals | None = None
    fit: Fit


class MemoryCurve(Record):
    """A kernel that only streams memory: t0 + bytes / (bandwidth e). residuals: over bytes; as for products."""

    memory_efficiency: Fraction
    kernel_seconds: Seconds
    residuals: Residuals | None = None
    fit: Fit


class CollectiveCurve(Record):
    """A collective: (alpha^p + (bus bytes / (link e))^p)^(1/p), or by `measured` points.

    measured: (bus bytes / (link e), seconds of the call), both rising: where a formula with one rate does not hold (on
    CPUs: sockets and caches). Between points on straight lines of the logarithms; smaller messages take as long as the
    smallest, larger ones in proportion to the largest.
    efficiency is relative to one direction of the link: inside a node the GPU's (above 1 where the switch reduces,
    NVLS), across nodes the NIC's; of a copy to or from the host (measured on one rank) the PCIe slot's.
    """

    alpha_seconds: Seconds
    efficiency: Annotated[float, Field(gt=0, le=1.5)]
    exponent: Exponent
    measured: tuple[tuple[Seconds, Seconds], ...] = ()
    fit: Fit


class InterNodeLatency(Record):
    """Seconds of a small message between two nodes."""

    all_reduce_seconds: Seconds
    send_seconds: Seconds
    fit: Fit


class Reference(Record):
    """The rates that the efficiencies are relative to: another datasheet value needs another efficiency.

    gpu: the file of `hw_specs/gpus/` that was measured.
    link_bytes_per_second: NVLink (or, without it, PCIe) of one GPU, one direction.
    """

    gpu: str
    flops_per_second: dict[CurvePrecision, float]
    memory_bytes_per_second: float
    multiprocessors: Count
    link_bytes_per_second: float


class Kernels(Record):
    """All curves of one architecture."""

    name: str
    fitted: str
    sources: dict[str, str]
    reference: Reference
    host_launch_seconds: Sourced
    gemm: dict[CurvePrecision, GemmCurve]
    fused_experts: dict[CurvePrecision, GemmCurve] = Field(default_factory=dict)
    prefill: PrefillCurve
    decode: DecodeCurve
    memory: dict[MemoryKernel, MemoryCurve]
    collectives: dict[Collective, dict[Count, CollectiveCurve]]
    inter_node: InterNodeLatency
    across_nodes: dict[Collective, dict[Count, CollectiveCurve]] = Field(default_factory=dict)  # by ranks, one a node

    @model_validator(mode="after")
    def _sources_exist(self) -> Kernels:
        for name, fit in self.fits().items():
            if fit.source not in self.sources:
                raise ValueError(f"{name}: source {fit.source!r} is not among the keys of 'sources'")
        if self.host_launch_seconds.verified and self.host_launch_seconds.source not in self.sources:
            raise ValueError(f"host_launch_seconds: source {self.host_launch_seconds.source!r} is not in 'sources'")
        return self

    def fits(self) -> dict[str, Fit]:
        """Every curve's provenance by its dotted name."""
        found: dict[str, Fit] = {}
        for table in ("gemm", "fused_experts"):
            for name, curve in getattr(self, table).items():
                found |= {f"{table}.{name}": curve.fit, f"{table}.{name}.weight_gradient": curve.weight_gradient_fit}
        found |= {"prefill": self.prefill.fit, "prefill.backward": self.prefill.backward_fit}
        found |= {"decode": self.decode.fit, "inter_node": self.inter_node.fit}
        found |= {f"memory.{name}": curve.fit for name, curve in self.memory.items()}
        for table in ("collectives", "across_nodes"):
            for op, curves in getattr(self, table).items():
                found |= {f"{table}.{op}.{ranks}": curve.fit for ranks, curve in curves.items()}
        return found

    def gemm_curve(self, precision: str, *, fused_experts: bool = False) -> GemmCurve:
        """fp16 and fp32 follow the bf16 curve (with their own peak); fp8 too where it was not measured.

        fused_experts: of the kernels in which serving engines run all experts' products, where they were measured.
        Training's grouped products are as fast as others: README.md of experiments/kernel_fit.
        """
        curves = self.fused_experts if fused_experts and self.fused_experts else self.gemm
        return curves["fp8"] if precision == "fp8" and "fp8" in curves else curves["bf16"]

    def collective(self, op: Collective, ranks: int) -> CollectiveCurve:
        """The curve measured at the number of ranks nearest in ratio (the fewer ranks when two are as near).

        Without a measured custom all-reduce (no NVLink) an engine uses NCCL's.
        """
        curves = self.collectives.get(op) or self.collectives["all_reduce"]
        return curves[min(curves, key=lambda measured: (abs(math.log(measured / ranks)), measured))]


def load_kernels(path: Path) -> Kernels:
    """Read one file of `hw_specs/kernels/`."""
    from ruamel.yaml import YAML  # only the loader needs it

    try:
        return Kernels.model_validate(YAML(typ="safe").load(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], field=".".join(map(str, first["loc"])), where=str(path)) from error


class Rates(NamedTuple):
    """Datasheet rates of one GPU: dense peak of the precision in use, device memory, multiprocessors."""

    flops_per_second: float
    memory_bytes_per_second: float
    multiprocessors: int


class KernelTime(NamedTuple):
    """Seconds, and their split by what limits: the fixed part is `launch`, the rest goes to the larger term."""

    seconds: Numbers
    flops_seconds: Numbers
    memory_seconds: Numbers
    launch_seconds: Numbers


def gemm_time(
    curve: GemmCurve,
    rates: Rates,
    m: Numbers,
    n: Numbers,
    k: Numbers,
    *,
    input_bytes: float = 2.0,
    output_bytes: float = 2.0,
    weight_gradient: bool = False,
    ideal: bool = False,
    weights_bytes: Numbers = math.inf,
    groups: Numbers = 1.0,
) -> KernelTime:
    """(m, k) @ (k, n): 2mnk FLOPs, every operand moved once. `input_bytes`, `output_bytes`: per element.

    groups: so many products of this shape, each with operands of its own, in one kernel (grouped GEMM). They fill the
    device like one product with as many times the columns; what a short m costs, each of them pays.
    weights_bytes: of all layers that take turns, this one among them (see `GemmCurve.cache_bytes`).
    weight_gradient: the GEMM with tokens as the summed dimension k.
    """
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    moved = groups * (input_bytes * (m * k + k * n) + output_bytes * m * n)
    peak = rates.flops_per_second * curve.compute_efficiency
    bandwidth = rates.memory_bytes_per_second * curve.memory_efficiency
    if ideal:
        return _limited(groups * (2 * m * n * k / peak), moved / bandwidth)
    padded = (m + curve.padding_m) * (groups * n + curve.padding_n) * (k + curve.padding_k)
    compute, memory = 2 * padded / peak, (moved + curve.padding_bytes) / bandwidth
    if curve.cache_bytes:
        memory = memory / (1 + curve.cache_bytes / np.asarray(weights_bytes))
    body, launch = p_norm(compute, memory, curve.exponent), np.asarray(curve.kernel_seconds)
    if curve.residuals:
        ratio = curve.residuals(n, k, m)
        quickest = np.maximum(groups * 2 * m * n * k / peak, moved / bandwidth)
        body, launch = np.maximum(ratio * body, quickest), ratio * launch
    return _limited(compute, memory, body * (curve.weight_gradient_ratio if weight_gradient else 1.0), launch)


def attention_prefill_time(
    curve: PrefillCurve,
    rates: Rates,
    batch: Numbers,
    heads: Numbers,
    kv_heads: Numbers,
    sequence: Numbers,
    head_dim: float,
    *,
    backward: bool = False,
    element_bytes: float = 2.0,
    ideal: bool = False,
) -> KernelTime:
    """Causal self-attention of `batch` sequences of equal length: 2 s(s+1) d FLOPs per head and sequence.

    The blocks of 128 query rows are spread over the multiprocessors; the last block of a sequence sees every key and
    bounds the time when there are few. backward: the backward kernels alone.
    """
    batch, sequence = np.asarray(batch, dtype=float), np.asarray(sequence, dtype=float)
    peak = rates.flops_per_second * curve.compute_efficiency
    mean = 2 * batch * heads * sequence * (sequence + 1) * head_dim / peak
    moved = 2 * element_bytes * batch * sequence * head_dim * (np.asarray(heads) + kv_heads)
    memory = moved / (rates.memory_bytes_per_second * curve.memory_efficiency)
    passes = curve.backward_ratio if backward else 1.0
    if ideal:
        return _limited(passes * mean, passes * memory)
    longest = 4 * np.minimum(QUERY_TILE_ROWS, sequence) * sequence * head_dim / (peak / rates.multiprocessors)
    compute = p_norm(mean, longest, curve.exponent)
    body, launch = compute + memory, np.asarray(curve.kernel_seconds)
    if curve.residuals:
        ratio = curve.residuals(np.asarray(heads) / kv_heads, batch * heads, sequence)
        body, launch = np.maximum(ratio * body, np.maximum(mean, memory)), ratio * launch
    return _limited(passes * compute, passes * memory, passes * body, launch)


def attention_decode_time(
    curve: DecodeCurve,
    rates: Rates,
    batch: Numbers,
    kv_heads: Numbers,
    context_tokens: Numbers,
    head_dim: float,
    *,
    kv_bytes: float = 2.0,
    flops_per_token: float = 0.0,
    compute_efficiency: float = 1.0,
    query_heads: float | None = None,
    ideal: bool = False,
) -> KernelTime:
    """One new token for each of `batch` sequences that together hold `context_tokens` in the KV cache.

    Memory-bound, so the number of query heads does not enter, unless `flops_per_token` (of context) says what there is
    to compute, at `compute_efficiency` of the peak. `kv_bytes`: per cached element. query_heads: applies the residuals.

    Piecewise linear in the tokens of the mean sequence, between the knots of the residuals: s steps of a fixed batch
    that stay between two of them take s times the seconds at the mean context, context_tokens + batch (s-1)/2.
    """
    context_tokens, batch = np.asarray(context_tokens, dtype=float), np.asarray(batch, dtype=float)

    def at(context: np.ndarray, refine: Callable[[np.ndarray], Numbers] | None = None) -> KernelTime:
        moved = 2 * kv_bytes * kv_heads * head_dim * context
        memory = moved / (rates.memory_bytes_per_second * curve.memory_efficiency)
        compute = flops_per_token * context / (rates.flops_per_second * compute_efficiency)
        if ideal:
            return _limited(compute, memory)
        limit, launch = np.maximum(compute, memory), np.asarray(curve.kernel_seconds)
        body = limit + curve.tile_seconds * batch * kv_heads / rates.multiprocessors
        if refine:
            ratio = refine(context)
            body, launch = np.maximum(ratio * body, limit), ratio * launch
        return _limited(compute, memory, body, launch)

    residuals = curve.residuals
    if residuals is None or query_heads is None or ideal:
        return at(context_tokens)
    sequences, group = np.maximum(batch, 1), query_heads / kv_heads

    def ratio(context: np.ndarray) -> np.ndarray:
        return residuals(group, batch * kv_heads, context / sequences)

    knots = np.array(residuals.axes[-1])
    tokens = context_tokens / sequences
    after = np.searchsorted(knots, tokens)
    inside = (after > 0) & (after < len(knots))
    low = np.where(inside, knots[np.maximum(after - 1, 0)], tokens)
    high = np.where(inside, knots[np.minimum(after, len(knots) - 1)], tokens)
    share = np.divide(tokens - low, high - low, out=np.zeros(np.shape(tokens)), where=inside)
    below, above = (at(ends * sequences, ratio) for ends in (low, high))
    return KernelTime(*((1 - share) * a + share * b for a, b in zip(below, above, strict=True)))


def delta_rule_time(
    prefill: PrefillCurve, memory: MemoryCurve, rates: Rates, tokens: Numbers, work: DeltaWork, *, ideal: bool = False
) -> KernelTime:
    """The kernels of a chunked delta rule, one after the other, each at the slower of its two rates.

    At the efficiencies of attention's products and of a residual addition (unverified: no such kernel was measured).
    That few sequences leave multiprocessors idle while states pass from chunk to chunk is left out.
    """
    tokens = np.asarray(tokens, dtype=float)
    compute = tokens * work.flops / (rates.flops_per_second * prefill.compute_efficiency)
    moved = tokens * work.moved_bytes / (rates.memory_bytes_per_second * memory.memory_efficiency)
    return _limited(compute, moved, launch=0.0 if ideal else work.kernels * memory.kernel_seconds)


def memory_time(curve: MemoryCurve, rates: Rates, moved_bytes: Numbers, *, ideal: bool = False) -> KernelTime:
    """A kernel that reads and writes `moved_bytes` in all.

    The curves were fitted with these bytes per token, 2 per element: residual add 6 hidden, RMS norm 4 hidden, rope
    4 (query + key width), gated activation 6 ffn, embedding 4 hidden.
    """
    moved_bytes = np.asarray(moved_bytes, dtype=float)
    memory = moved_bytes / (rates.memory_bytes_per_second * curve.memory_efficiency)
    body, launch = memory, np.asarray(0.0 if ideal else curve.kernel_seconds)
    if curve.residuals and not ideal:
        ratio = curve.residuals(moved_bytes)
        body, launch = np.maximum(ratio * body, memory), ratio * launch
    return _limited(np.zeros_like(memory), memory, body, launch)


def bus_factor(op: Collective, ranks: int) -> float:
    """Bytes per payload byte through each rank's link.

    nccl-tests, doc/PERFORMANCE.md: the payload is a rank's whole buffer: the output of an all_gather, the input of a
    reduce_scatter and of an all_to_all (its own share included).
    """
    if op in ("send", "broadcast", "to_host", "from_host"):
        return 1.0
    share = (ranks - 1) / ranks
    return 2 * share if op in ("all_reduce", "custom_all_reduce") else share


def collective_seconds(
    curve: CollectiveCurve,
    op: Collective,
    ranks: int,
    payload_bytes: Numbers,
    link_bytes_per_second: Numbers,
    *,
    ideal: bool = False,
) -> Numbers:
    """One collective inside a node with the links to itself."""
    wire = np.asarray(payload_bytes, dtype=float) * bus_factor(op, ranks) / (link_bytes_per_second * curve.efficiency)
    if ideal:
        return wire
    if curve.measured:
        return interpolated_seconds(curve.measured, wire)
    return p_norm(np.full_like(wire, curve.alpha_seconds), wire, curve.exponent)


def interpolated_seconds(measured: Sequence[tuple[float, float]], wire_seconds: np.ndarray) -> np.ndarray:
    """See `CollectiveCurve.measured`; nothing takes no time."""
    wire, seconds = np.array(measured).T
    inside = np.exp(np.interp(np.log(np.maximum(wire_seconds, wire[0])), np.log(wire), np.log(seconds)))
    return np.asarray(np.where(wire_seconds > 0, inside * np.maximum(1.0, wire_seconds / wire[-1]), 0.0))


def p_norm(a: Numbers, b: Numbers, exponent: float) -> np.ndarray:
    """(a^p + b^p)^(1/p), scaled by the larger one so that high powers of microseconds do not underflow."""
    large, small = np.maximum(a, b), np.minimum(a, b)
    ratio = np.divide(small, large, out=np.zeros_like(large, dtype=float), where=large > 0)
    norm: np.ndarray = large * (1 + ratio**exponent) ** (1 / exponent)
    return norm


def _limited(compute: Numbers, memory: Numbers, body: Numbers | None = None, launch: Numbers = 0.0) -> KernelTime:
    """`body` seconds (default: the larger term) given to the larger of compute and memory, plus `launch`."""
    body = np.maximum(compute, memory) if body is None else body
    by_flops = np.where(np.asarray(compute) > memory, body, 0.0)
    return KernelTime(body + launch, by_flops, body - by_flops, np.broadcast_to(launch, np.shape(body)))
