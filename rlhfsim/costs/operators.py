"""Seconds of a transformer layer's operators on one GPU: sums of the kernels in `kernels.py`.

Everything takes numbers or numpy arrays and is vectorised: an array of token counts gives an array of times. Nothing
here knows of ranks, micro-batches or links; `passes.py` and `generation.py` put operators together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhfsim.errors import InputError
from rlhfsim.model import Gemm, Head, head_gemms, kv_heads_per_rank, layer_gemms, parameters
from rlhfsim.spec.hardware import Gpu
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

    # --- one layer -------------------------------------------------------------------------------------------------

    def layer_forward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, *, adapters: bool = True
    ) -> OperatorTime:
        """Projections, MLP, norms, residuals, rotary embedding, activation; attention itself is apart.

        adapters: run LoRA's low-rank products beside the weights (False: they are merged into the weights).
        """
        gemms = layer_gemms(use.shape, tensor_parallel) + (lora_gemms(use, tensor_parallel) if adapters else [])
        return self._forward(use, tokens, gemms) + self._elementwise(use, tokens, tensor_parallel)

    def layer_backward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, trainable: Trainable = "all"
    ) -> OperatorTime:
        """Data gradients and weight gradients of `layer_forward`.

        trainable: `lora` has no weight gradients of the base; `none` is a layer below every trained one: no backward.
        """
        if trainable == "none":
            return 0.0 * self._memory(use, "residual_add", tokens)
        base = layer_gemms(use.shape, tensor_parallel)
        adapters = lora_gemms(use, tensor_parallel) if trainable == "lora" else []
        time = self._data_gradients(use, tokens, base + adapters)
        time += self._weight_gradients(use, tokens, adapters if trainable == "lora" else base)
        return time + ELEMENTWISE_BACKWARD_RATIO * self._elementwise(use, tokens, tensor_parallel)

    def attention_prefill(
        self, use: ModelUse, sequence_tokens: Numbers, tensor_parallel: int, *, backward: bool = False
    ) -> OperatorTime:
        """Causal attention of one layer over whole sequences, all in one kernel.

        sequence_tokens: array whose last axis is the sequences of one call; zeros are absent sequences. Unequal lengths
        count as equal ones with the same sum of squares (the work is quadratic).
        """
        lengths = np.atleast_1d(np.asarray(sequence_tokens, dtype=float))
        batch = (lengths > 0).sum(axis=-1)
        squares = (lengths**2).sum(axis=-1)
        length = np.sqrt(squares / np.maximum(batch, 1))
        heads, kv_heads = use.shape.heads / tensor_parallel, kv_heads_per_rank(use.shape, tensor_parallel)
        time = attention_prefill_time(
            self.kernels.prefill, self._rates(use), batch, heads, kv_heads, length, use.shape.head_dim,
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
        self, use: ModelUse, sequences: Numbers, context_tokens_sum: Numbers, tensor_parallel: int
    ) -> OperatorTime:
        """Attention of one layer for one new token of each sequence; `context_tokens_sum` are in their caches."""
        time = attention_decode_time(
            self.kernels.decode, self._rates(use), sequences, kv_heads_per_rank(use.shape, tensor_parallel),
            context_tokens_sum, use.shape.head_dim, kv_bytes=use.bytes_per_parameter, ideal=self.ideal,
        )  # fmt: skip
        return _where(np.asarray(sequences) > 0, _operator(time))

    # --- before and after the layers ---------------------------------------------------------------------------------

    def embedding(self, use: ModelUse, tokens: Numbers) -> OperatorTime:
        """Lookup of the token embeddings: a row read and written per token."""
        return self._memory(use, "embedding", 2 * use.bytes_per_parameter * use.shape.hidden * np.asarray(tokens))

    def head_forward(self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm") -> OperatorTime:
        """`lm`: logits and their log-softmax over the vocabulary (vocabulary-parallel). `value`: one number a token."""
        time = self._forward(use, tokens, head_gemms(use.shape, kind, tensor_parallel))
        return time + self._log_softmax(use, tokens, tensor_parallel) if kind == "lm" else time

    def head_backward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm", *, trained: bool = True
    ) -> OperatorTime:
        """Gradients of `head_forward`; `trained` adds those of the head's own weights."""
        gemms = head_gemms(use.shape, kind, tensor_parallel)
        time = self._data_gradients(use, tokens, gemms) + self._weight_gradients(use, tokens, gemms if trained else [])
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

    def _rates(self, use: ModelUse) -> Rates:
        peaks = self.gpu.flops_per_second
        if use.precision not in peaks:
            raise InputError(
                f"{self.gpu.name} has no peak for precision {use.precision!r} (it has: {', '.join(sorted(peaks))})",
                field="precision",
            )
        bandwidth, processors = self.gpu.memory_bytes_per_second.value, self.gpu.multiprocessors.value
        return Rates(peaks[use.precision].value, bandwidth, int(processors))

    def _forward(self, use: ModelUse, tokens: Numbers, gemms: Iterable[Gemm]) -> OperatorTime:
        """(tokens, k) @ (k, n) of each."""
        return _where(np.asarray(tokens) > 0, total(self._gemm(use, tokens, g.n, g.k) for g in gemms))

    def _data_gradients(self, use: ModelUse, tokens: Numbers, gemms: Iterable[Gemm]) -> OperatorTime:
        """(tokens, n) @ (n, k) of each."""
        return _where(np.asarray(tokens) > 0, total(self._gemm(use, tokens, g.k, g.n) for g in gemms))

    def _weight_gradients(self, use: ModelUse, tokens: Numbers, gemms: Iterable[Gemm]) -> OperatorTime:
        """(k, tokens) @ (tokens, n) of each."""
        time = total(self._gemm(use, g.k, g.n, tokens, weight_gradient=True) for g in gemms)
        return _where(np.asarray(tokens) > 0, time)

    def _gemm(self, use: ModelUse, m: Numbers, n: Numbers, k: Numbers, weight_gradient: bool = False) -> OperatorTime:
        curve = self.kernels.gemm_curve(use.precision)
        weights_bytes = parameters(use.shape) * use.bytes_per_parameter if curve.cache_bytes else np.inf
        time = gemm_time(
            curve, self._rates(use), m, n, k,
            input_bytes=use.bytes_per_parameter, output_bytes=use.bytes_per_parameter,
            weight_gradient=weight_gradient, ideal=self.ideal, weights_bytes=weights_bytes,
        )  # fmt: skip
        return _operator(time)

    def _memory(self, use: ModelUse, kernel: MemoryKernel, moved_bytes: Numbers) -> OperatorTime:
        time = memory_time(self.kernels.memory[kernel], self._rates(use), moved_bytes, ideal=self.ideal)
        return _where(np.asarray(moved_bytes) > 0, _operator(time))

    def _elementwise(self, use: ModelUse, tokens: Numbers, tensor_parallel: int) -> OperatorTime:
        """Norms, residual additions, rotary embedding, activation, with the bytes of each curve's fit.

        Sequence parallel splits norms and residuals over the tensor-parallel ranks.
        """
        shape, width = use.shape, use.bytes_per_parameter
        tokens = np.asarray(tokens, dtype=float)
        whole = tokens / (tensor_parallel if use.sequence_parallel else 1) * shape.hidden * width
        heads = tokens * (shape.query_width + shape.kv_width) / tensor_parallel * width
        mlp = tokens * shape.ffn / tensor_parallel * width
        norms = shape.norms_per_layer * self._memory(use, "rms_norm", 2 * whole)
        time = norms + 2 * self._memory(use, "residual_add", 3 * whole)
        if not shape.learned_positions:
            time += self._memory(use, "rope", 2 * heads)
        return time + self._memory(use, "gated_activation", (3 if shape.gated_mlp else 2) * mlp)

    def _log_softmax(self, use: ModelUse, tokens: Numbers, tensor_parallel: int) -> OperatorTime:
        columns = -(-use.shape.vocabulary // tensor_parallel)
        return self._memory(use, "cross_entropy", LOG_SOFTMAX_BYTES * columns * np.asarray(tokens, dtype=float))


def lora_gemms(use: ModelUse, tensor_parallel: int) -> list[Gemm]:
    """LoRA's factors on one rank, down to the rank and up from it, at each linear module of a layer.

    As Megatron and PEFT split them: with the outputs of qkv and up, with the inputs of the output and down projection.
    """
    rank, shape, t = use.lora_rank, use.shape, tensor_parallel
    if not rank:
        return []
    kv = kv_heads_per_rank(shape, t) * shape.head_dim
    ups = ["gate", "up"] if shape.gated_mlp else ["up"]
    modules = [("q", shape.query_width // t, shape.hidden), ("k", kv, shape.hidden), ("v", kv, shape.hidden)]
    modules += [("output", shape.hidden, shape.query_width // t), ("down", shape.hidden, shape.ffn // t)]
    modules += [(name, shape.ffn // t, shape.hidden) for name in ups]
    factors = [(Gemm(f"{name}_lora_a", rank, k), Gemm(f"{name}_lora_b", n, rank)) for name, n, k in modules]
    return [factor for pair in factors for factor in pair]


def adam_bytes(use: ModelUse) -> int:
    """Memory traffic of one Adam update per parameter.

    Master weight and two moments in fp32 are read and written (24), the gradient is read; in 16-bit the working weight
    is written besides the master. 16-bit: 24 + 2 + 2; fp32: the master is the weight: 24 + 4.
    """
    return 28


def _host(seconds: np.ndarray) -> OperatorTime:
    return OperatorTime(seconds, 0.0 * seconds, 0.0 * seconds, seconds)


def _operator(time: KernelTime) -> OperatorTime:
    return OperatorTime(time.seconds, time.flops_seconds, time.memory_seconds, time.launch_seconds)


def _where(condition: np.ndarray, time: OperatorTime) -> OperatorTime:
    """`time` where the condition holds, else zero seconds."""
    return OperatorTime(*(np.where(condition, part, 0.0) for part in time.parts))
