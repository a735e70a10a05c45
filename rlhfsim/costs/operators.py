"""Seconds of a transformer layer's operators on one GPU: sums of the kernels in `kernels.py`.

Everything takes numbers or numpy arrays and is vectorised: an array of token counts gives an array of times. Nothing
here knows of ranks, micro-batches or links; `passes.py` and `generation.py` put operators together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhfsim.errors import InputError
from rlhfsim.model import Gemm, Head, head_gemms, kv_heads_per_rank, layer_gemms, lora_modules, parameters
from rlhfsim.spec.hardware import Gpu, Precision
from rlhfsim.spec.model_spec import DENSE, LayerKind
from rlhfsim.spec.overheads import EnginePhase, HostTime, Overheads, ZeroStage
from rlhfsim.spec.scenario import Effects, ModelUse

from .kernels import (
    Kernels,
    KernelTime,
    MemoryKernel,
    Numbers,
    Rates,
    attention_decode_time,
    attention_prefill_time,
    gemm_time,
    memory_time,
)

Trainable = Literal["all", "lora", "none"]
Product = Literal["forward", "data", "weights"]

# Backward of a streaming kernel over its forward: it also reads the incoming gradient (unverified).
ELEMENTWISE_BACKWARD_RATIO = 2.0

# Kernels that eager PyTorch launches for one decoder layer's forward: operators that are not views, counted with a
# TorchDispatchMode (torch 2.13, transformers 5.24.0, Llama and Qwen2 with sdpa, 3 layers minus 2 layers); the backward
# launches 71 to 74, about twice as many. Python's own time is not in the count: a lower limit.
EAGER_KERNELS_PER_LAYER = 38

# Bytes per logit of eager PyTorch: cast to fp32 (2 read, 4 written), log_softmax (4 + 4); backward 4 + 4, cast 4 + 2.
LOG_SOFTMAX_BYTES = 14

# Unfused attention, bytes per score (head x query x key) in 16-bit: scores, mask, softmax, dropout (unverified).
UNFUSED_FORWARD_BYTES, UNFUSED_BACKWARD_BYTES = 13, 19


@dataclass(frozen=True)
class OperatorTime:
    """Seconds, and their split by what limits them: flops + hbm + launch = seconds. Numbers or arrays of one shape."""

    seconds: Numbers
    flops: Numbers
    hbm: Numbers
    launch: Numbers

    __array_ufunc__ = None  # so that array * time is time.__rmul__, not an array of objects

    def __add__(self, other: OperatorTime) -> OperatorTime:
        return OperatorTime(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, factor: Numbers) -> OperatorTime:
        return OperatorTime(*(part * factor for part in self.parts))

    __rmul__ = __mul__

    @property
    def parts(self) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        return self.seconds, self.flops, self.hbm, self.launch


NO_TIME = OperatorTime(0.0, 0.0, 0.0, 0.0)


def total(times: Iterable[OperatorTime]) -> OperatorTime:
    """The sum; zero seconds for none."""
    return sum(times, NO_TIME)


class Operators:
    """The kernels of one GPU type under the scenario's effects.

    Zero tokens take zero seconds (no kernel is launched for an empty batch). With `effects.efficiency` off every kernel
    runs at its curve's asymptotic efficiency, and nothing takes a fixed time.
    """

    def __init__(self, gpu: Gpu, kernels: Kernels, effects: Effects, overheads: Overheads) -> None:
        self.gpu, self.kernels, self.effects, self.overheads = gpu, kernels, effects, overheads
        self.ideal = not effects.efficiency

    @property
    def eager_layer_seconds(self) -> float:
        """Host time to launch one layer's forward: kernels per layer times the host's time per launch."""
        if self.ideal:
            return 0.0
        if self.overheads.eager_layer_seconds is not None:
            return self.overheads.eager_layer_seconds
        return EAGER_KERNELS_PER_LAYER * self.kernels.host_launch_seconds.value

    def with_launches(self, time: OperatorTime, layer_passes: Numbers = 1.0) -> OperatorTime:
        """`time` of so many forward passes of a layer, or the host's time to launch them eagerly if that is longer.

        Where the host does not run ahead of the device, both add up. Under a CUDA graph there is no such floor: do not
        call this.
        """
        return self._launched(time, self.eager_layer_seconds * np.asarray(layer_passes))

    def with_backward_launches(self, time: OperatorTime) -> OperatorTime:
        """Likewise for a layer's backward; as two forward passes where nothing else was measured."""
        measured = self.overheads.eager_layer_backward_seconds
        if self.ideal or measured is None:
            return self.with_launches(time, 2.0)
        return self._launched(time, np.asarray(measured))

    def _launched(self, time: OperatorTime, host_seconds: np.ndarray) -> OperatorTime:
        floor = np.where(np.asarray(time.seconds) > 0, host_seconds, 0.0)
        waiting = np.maximum(floor - time.seconds, 0.0) if self.gpu.overlaps_launches else floor
        return OperatorTime(time.seconds + waiting, time.flops, time.hbm, time.launch + waiting)

    def pass_launches(self, tokens: Numbers) -> OperatorTime:
        """Host time of one pass of a micro-batch outside the layers."""
        seconds = 0.0 if self.ideal else self.overheads.eager_pass_seconds
        return _host(np.where(np.asarray(tokens) > 0, seconds, 0.0))

    def engine_launches(self, use: ModelUse, phase: EnginePhase, parameters: float) -> OperatorTime:
        """Host time that DeepSpeed adds to a pass of one micro-batch, or to an update."""
        stages: dict[int, ZeroStage] = {0: "zero_0", 1: "zero_1", 2: "zero_2", 3: "zero_3"}
        added = self.overheads.deepspeed.get(stages[use.zero_stage])
        if self.ideal or added is None or use.backend != "deepspeed":
            return NO_TIME
        time: HostTime = getattr(added, phase)
        return _host(np.asarray(time.of(use.shape.layers, parameters)))

    # --- one layer: the mean of all, where layers differ ---------------------------------------------------------

    def layer_forward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, *, adapters: bool = True, serving: bool = False
    ) -> OperatorTime:
        """Projections, MLP or experts, norms, residuals, rotary embedding, activation; attention itself is apart.

        adapters: run LoRA's low-rank products beside the weights (False: they are merged into the weights).
        serving: with the kernels in which serving engines run all experts.
        """

        def of(kind: LayerKind) -> OperatorTime:
            gemms = layer_gemms(use.shape, tensor_parallel, kind, use.expert_split(tensor_parallel))
            time = self._products("forward", use, tokens, gemms, self._layer_precision(use), serving=serving)
            if adapters and use.lora_rank:
                time += self._products("forward", use, tokens, lora_gemms(use, tensor_parallel, kind))
            return time + self._elementwise(use, tokens, tensor_parallel, kind)

        return _mean_of_layers(use, of)

    def layer_backward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, trainable: Trainable = "all"
    ) -> OperatorTime:
        """Data gradients and weight gradients of `layer_forward`.

        trainable: `lora` has no weight gradients of the base; `none` is a layer below every trained one: no backward.
        """
        if trainable == "none":
            return 0.0 * self._memory(use, "residual_add", tokens)
        precision = self._layer_precision(use)

        def of(kind: LayerKind) -> OperatorTime:
            base = layer_gemms(use.shape, tensor_parallel, kind, use.expert_split(tensor_parallel))
            time = self._products("data", use, tokens, base, precision)
            if trainable == "lora":
                adapters = lora_gemms(use, tensor_parallel, kind)
                time += self._products("data", use, tokens, adapters) + self._products("weights", use, tokens, adapters)
            else:
                time += self._products("weights", use, tokens, base, precision)
            return time + ELEMENTWISE_BACKWARD_RATIO * self._elementwise(use, tokens, tensor_parallel, kind)

        return _mean_of_layers(use, of)

    def attention_prefill(
        self, use: ModelUse, sequence_tokens: Numbers, tensor_parallel: int, *, backward: bool = False
    ) -> OperatorTime:
        """Causal attention of one layer over whole sequences, all in one kernel.

        sequence_tokens: array whose last axis is the sequences of one call; zeros are absent sequences. Unequal lengths
        count as equal ones with the same sum of squares (the work is quadratic); so does a window of w tokens, with
        w (2 n - w) for n^2 above it (of a later piece of a long prompt that is too much).
        """
        lengths = np.atleast_1d(np.asarray(sequence_tokens, dtype=float))
        return _mean_of_layers(
            use, lambda kind: self._attention_prefill(use, lengths, tensor_parallel, backward, kind.window)
        )

    def _attention_prefill(
        self, use: ModelUse, lengths: np.ndarray, tensor_parallel: int, backward: bool, window: int
    ) -> OperatorTime:
        batch = (lengths > 0).sum(axis=-1)
        squares = (lengths**2).sum(axis=-1)
        attended = squares
        if window:
            attended = np.where(lengths > window, window * (2 * lengths - window), lengths**2).sum(axis=-1)
        length = np.sqrt(attended / np.maximum(batch, 1))
        shape = use.shape
        heads, kv_heads = shape.heads / tensor_parallel, kv_heads_per_rank(shape, tensor_parallel)
        time = attention_prefill_time(
            self.kernels.prefill, self._rates(use), batch, heads, kv_heads, length,
            (shape.head_dim + shape.value_head_dim) / 2,
            backward=backward, element_bytes=use.bytes_per_parameter, ideal=self.ideal,
        )  # fmt: skip
        fused = _where(batch > 0, _operator(time))
        if use.flash_attention:
            return fused
        per_score = (UNFUSED_BACKWARD_BYTES if backward else UNFUSED_FORWARD_BYTES) * use.bytes_per_parameter / 2
        scores = memory_time(
            self.kernels.memory["residual_add"], self._rates(use), per_score * heads * squares, ideal=self.ideal
        )
        return fused + _where(batch > 0, _operator(scores))

    def attention_decode(
        self,
        use: ModelUse,
        sequences: Numbers,
        context_tokens_sum: Numbers,
        tensor_parallel: int,
        *,
        kv_bytes: float | None = None,
        queries: int = 1,
        refined: bool = True,
    ) -> OperatorTime:
        """Attention of one layer for one new token of each sequence; `context_tokens_sum` are in their caches.

        refined: with the curve's residuals (not measured for latent attention); without, linear in the tokens.
        kv_bytes: of one cached element, if not the model's. queries: new tokens of each sequence, where several are
        verified at once; they read the cache together. Latent attention reads one vector for all heads, which compute
        with it in the latent space; it can be bound by either.
        """
        shape, heads = use.shape, use.shape.heads / tensor_parallel
        kv_heads, width, flops = float(kv_heads_per_rank(shape, tensor_parallel)), float(shape.head_dim), 0.0
        if shape.latent_attention:
            cached = shape.kv_lora_rank + shape.qk_rope_head_dim
            kv_heads, width = 1.0, cached / 2  # no values beside the keys
            flops = 2 * heads * (cached + shape.kv_lora_rank) * queries
        time = attention_decode_time(
            self.kernels.decode, self._rates(use), sequences, kv_heads, context_tokens_sum, width,
            kv_bytes=use.bytes_per_parameter if kv_bytes is None else kv_bytes,
            flops_per_token=flops, compute_efficiency=self.kernels.prefill.compute_efficiency,
            query_heads=None if shape.latent_attention or not refined else heads, ideal=self.ideal,
        )  # fmt: skip
        return _where(np.asarray(sequences) > 0, _operator(time))

    # --- before and after the layers ---------------------------------------------------------------------------------

    def embedding(self, use: ModelUse, tokens: Numbers) -> OperatorTime:
        """Lookup of the token embeddings: a row read and written per token."""
        return self._memory(use, "embedding", 2 * use.bytes_per_parameter * use.shape.hidden * np.asarray(tokens))

    def head_forward(self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm") -> OperatorTime:
        """`lm`: logits and their log-softmax over the vocabulary (vocabulary-parallel). `value`: one number a token."""
        time = self._products("forward", use, tokens, head_gemms(use.shape, kind, tensor_parallel))
        return time + self._log_softmax(use, tokens, tensor_parallel) if kind == "lm" else time

    def head_backward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm", *, trained: bool = True
    ) -> OperatorTime:
        """Gradients of `head_forward`; `trained` adds those of the head's own weights."""
        gemms = head_gemms(use.shape, kind, tensor_parallel)
        time = self._products("data", use, tokens, gemms) + self._products(
            "weights", use, tokens, gemms if trained else []
        )
        return time + self._log_softmax(use, tokens, tensor_parallel) if kind == "lm" else time

    def copy(self, use: ModelUse, copied_bytes: Numbers) -> OperatorTime:
        """Of tensors in device memory, read and written at the rate of a residual addition."""
        return self._memory(use, "residual_add", 2 * np.asarray(copied_bytes, dtype=float))

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def optimizer_step(self, use: ModelUse, parameters: Numbers) -> OperatorTime:
        """Fused Adam over the parameters that this rank updates."""
        return self._memory(use, "optimizer", adam_bytes(use) * np.asarray(parameters, dtype=float))

    def optimizer_step_host(
        self, use: ModelUse, parameters: float, host_bytes_per_second: float, sharing_ranks: np.ndarray
    ) -> np.ndarray:
        """Seconds of Adam on the CPU at the host's memory bandwidth, which `sharing_ranks` ranks of the node share."""
        return adam_bytes(use) * parameters * sharing_ranks / host_bytes_per_second

    # --- kernels -----------------------------------------------------------------------------------------------------

    def _rates(self, use: ModelUse, precision: Precision | None = None) -> Rates:
        peaks, precision = self.gpu.flops_per_second, precision or use.precision
        if precision not in peaks:
            raise InputError(
                f"{self.gpu.name} has no peak for precision {precision!r} (it has: {', '.join(sorted(peaks))})",
                field="precision",
            )
        bandwidth, processors = self.gpu.memory_bytes_per_second.value, self.gpu.multiprocessors.value
        return Rates(peaks[precision].value, bandwidth, int(processors))

    def _layer_precision(self, use: ModelUse) -> Precision:
        """Of the layers' products: `gemm_precision` where the GPU has such a rate, else weights are unpacked."""
        wanted = use.gemm_precision
        return wanted if wanted and wanted in self.gpu.flops_per_second else use.precision

    def _products(
        self, product: Product, use: ModelUse, tokens: Numbers, gemms: Iterable[Gemm],
        precision: Precision | None = None, *, serving: bool = False,
    ) -> OperatorTime:  # fmt: skip
        """Forward products, or gradients of the data or of the weights, of all gemms."""
        times = (self._gemm(use, g, tokens, product, precision, serving) for g in gemms)
        return _where(np.asarray(tokens) > 0, total(times))

    def _gemm(
        self, use: ModelUse, gemm: Gemm, tokens: Numbers, product: Product, precision: Precision | None, serving: bool
    ) -> OperatorTime:
        """One product, or those of all experts that tokens go to, on the busiest of the ranks that share the experts.

        precision: None for products outside the layers' own weights, which stay in the model's.
        """
        groups: Numbers = 1.0
        rows: Numbers = tokens
        if gemm.chosen < 1:
            tokens = np.asarray(tokens, dtype=float)
            groups = np.maximum(gemm.touched(tokens), 1e-9)  # of no tokens nothing is computed; `_where` sees to it
            rows = tokens * gemm.rows_per_token * self._imbalance(use) / groups
        m, n, k = {
            "forward": (rows, gemm.n, gemm.k),
            "data": (rows, gemm.k, gemm.n),
            "weights": (gemm.k, gemm.n, rows),
        }[product]
        curve = self.kernels.gemm_curve(precision or use.precision, fused_experts=serving and gemm.chosen < 1)
        weights_bytes = parameters(use.shape) * use.bytes_per_parameter if curve.cache_bytes else np.inf
        time = gemm_time(
            curve, self._rates(use, precision), m, n, k,
            input_bytes=use.matrix_bytes if precision else use.bytes_per_parameter,
            output_bytes=use.bytes_per_parameter,
            weight_gradient=product == "weights", ideal=self.ideal, weights_bytes=weights_bytes, groups=groups,
        )  # fmt: skip
        return _operator(time)

    def _imbalance(self, use: ModelUse) -> float:
        return use.routing_imbalance if use.expert_parallel > 1 and not self.ideal else 1.0

    def _memory(self, use: ModelUse, kernel: MemoryKernel, moved_bytes: Numbers) -> OperatorTime:
        time = memory_time(self.kernels.memory[kernel], self._rates(use), moved_bytes, ideal=self.ideal)
        return _where(np.asarray(moved_bytes) > 0, _operator(time))

    def _elementwise(self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: LayerKind) -> OperatorTime:
        """Norms, residual additions, rotary embedding, activation, with the bytes of each curve's fit.

        Sequence parallel splits norms and residuals over the tensor-parallel ranks. Experts: each routed row is read
        and written on its way to its expert and back, beside the activations.
        """
        shape, width = use.shape, use.bytes_per_parameter
        tokens = np.asarray(tokens, dtype=float)
        whole = tokens / (tensor_parallel if use.sequence_parallel else 1) * shape.hidden * width
        heads = tokens * _rotary_width(use) / tensor_parallel * width
        norms = shape.norms_per_layer * self._memory(use, "rms_norm", 2 * whole)
        time = norms + 2 * self._memory(use, "residual_add", 3 * whole)
        if shape.latent_attention:
            latent = tokens * (shape.q_lora_rank + shape.kv_lora_rank) * width
            time += self._memory(use, "rms_norm", 2 * latent)
        if not shape.learned_positions:
            time += self._memory(use, "rope", 2 * heads)
        tensors = 3 if shape.gated_mlp else 2
        if not kind.experts:
            mlp = tokens * shape.ffn / tensor_parallel * width
            return time + self._memory(use, "gated_activation", tensors * mlp)
        split = use.expert_split(tensor_parallel)
        rows = tokens * shape.experts_per_token * split.tensor / tensor_parallel * self._imbalance(use)
        time += 2 * self._memory(use, "residual_add", 2 * rows * shape.hidden * width)
        shared = tokens * shape.shared_expert_ffn / tensor_parallel * width
        time += self._memory(use, "gated_activation", tensors * shared)
        return time + self._memory(use, "gated_activation", tensors * rows * shape.expert_ffn / split.tensor * width)

    def _log_softmax(self, use: ModelUse, tokens: Numbers, tensor_parallel: int) -> OperatorTime:
        columns = -(-use.shape.vocabulary // tensor_parallel)
        return self._memory(use, "cross_entropy", LOG_SOFTMAX_BYTES * columns * np.asarray(tokens, dtype=float))


def lora_gemms(use: ModelUse, tensor_parallel: int, kind: LayerKind = DENSE) -> list[Gemm]:
    """LoRA's factors on one rank, down to the rank and up from it, at each linear module of a layer.

    As Megatron and PEFT split them: with the outputs of qkv and up, with the inputs of the output and down projection;
    those of latent vectors are whole.
    """
    rank, shape, t = use.lora_rank, use.shape, tensor_parallel
    if not rank:
        return []
    kv = kv_heads_per_rank(shape, t) * shape.head_dim
    factors = []
    for name, inputs, outputs in lora_modules(shape, kind):
        split_inputs = name in ("output", "down")
        whole = name in ("q_down", "kv_down")
        n = kv if name in ("k", "v") else outputs // (1 if split_inputs or whole else t)
        factors.append(Gemm(f"{name}_lora_a", rank, inputs // t if split_inputs else inputs))
        factors.append(Gemm(f"{name}_lora_b", n, rank))
    return factors


def adam_bytes(use: ModelUse) -> int:
    """Memory traffic of one Adam update per parameter.

    Master weight and two moments in fp32 are read and written (24), the gradient is read; in 16-bit the working weight
    is written besides the master. 16-bit: 24 + 2 + 2; fp32: the master is the weight: 24 + 4.
    """
    return 28


def _mean_of_layers(use: ModelUse, of: Callable[[LayerKind], OperatorTime]) -> OperatorTime:
    kinds = use.shape.layer_kinds()
    if len(kinds) == 1:
        return of(next(iter(kinds)))
    return total(count / use.shape.layers * of(kind) for kind, count in kinds.items())


def _rotary_width(use: ModelUse) -> int:
    """Of queries and keys, all heads together."""
    shape = use.shape
    if shape.latent_attention:
        return (shape.heads + 1) * shape.qk_rope_head_dim
    return shape.query_width + shape.kv_width


def _host(seconds: np.ndarray) -> OperatorTime:
    return OperatorTime(seconds, 0.0 * seconds, 0.0 * seconds, seconds)


def _operator(time: KernelTime) -> OperatorTime:
    return OperatorTime(time.seconds, time.flops_seconds, time.memory_seconds, time.launch_seconds)


def _where(condition: np.ndarray, time: OperatorTime) -> OperatorTime:
    """`time` where the condition holds, else zero seconds."""
    return OperatorTime(*(np.where(condition, part, 0.0) for part in time.parts))
