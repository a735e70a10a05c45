"""Seconds of a transformer layer's operators on one GPU: sums of the kernels in `kernels.py`.

Everything takes numbers or numpy arrays and is vectorised: an array of token counts gives an array of times. Nothing
here knows of ranks, micro-batches or links; `passes.py` and `generation.py` put operators together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhfsim import linear_attention
from rlhfsim.errors import InputError
from rlhfsim.lora import lora_factors, lora_modules
from rlhfsim.model import Gemm, Head, head_gemms, kv_heads_per_rank, layer_gemms, parameters
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
    delta_rule_time,
    gemm_time,
    memory_time,
)
from .measured import measured_kernels

Trainable = Literal["all", "lora", "none"]
Product = Literal["forward", "data", "weights"]

# Backward of a streaming kernel over its forward: it also reads the incoming gradient (unverified).
ELEMENTWISE_BACKWARD_RATIO = 2.0

# Kernels that eager PyTorch launches for one decoder layer's forward: operators that are not views, counted with a
# TorchDispatchMode (torch 2.13, transformers 5.24.0, Llama and Qwen2 with sdpa, 3 layers minus 2 layers); the backward
# launches 71 to 74, about twice as many. Python's own time is not in the count: a lower limit.
EAGER_KERNELS_PER_LAYER = 38

# Bytes per element that eager PyTorch reads and writes for a 16-bit tensor in Hugging Face's modules, where each
# operation is a kernel: forward, backward. `python experiments/eager_traffic/measure.py` counts them (torch 2.13,
# transformers 5.24.0: Llama, Qwen2, Qwen3). RMS norm: of its input, with casts to fp32 and back; rotary: of queries and
# keys; gated activation: of the MLP's width. Joins: sums of the gradients that projections of one input give back.
EAGER_BYTES = {"rms_norm": (36, 92), "rope": (20, 32), "gated_activation": (10, 18), "residual_add": (6, 6)}
EAGER_JOINS = 3

# Bytes per logit of eager PyTorch: cast to fp32 (2 read, 4 written), log_softmax (4 + 4); backward 4 + 4, cast 4 + 2.
LOG_SOFTMAX_BYTES = 14

# What Megatron-LM's vocab_parallel_cross_entropy reads and writes per logit (megatron/core/tensor_parallel/
# cross_entropy.py): cast to fp32 (2 + 4), maximum (4), subtraction (8), exponential (8), sum (4), division (8), all in
# place; backward: product with the incoming gradient (8), cast (4 + 2).
IN_PLACE_SOFTMAX_BYTES, IN_PLACE_SOFTMAX_BACKWARD_BYTES = 38, 14

# Unfused attention between its products, bytes per score (head x query x key) in 16-bit: softmax reads and writes (4),
# its dropout too, with a mask (5); backward: dropout (5), softmax with its output and the gradient (6). The kernels:
# megatron/core/fusions/fused_softmax.py, torch's dropout.
UNFUSED_FORWARD_BYTES, UNFUSED_BACKWARD_BYTES = (4, 5), (5, 6)

# Products that run in pieces of their rows beside a collective of tensor-parallel ranks: with what is gathered one
# piece from each rank ("ring_exchange"), with what is scattered four ("pipeline"); all others are whole, beside
# collectives of other tensors ("bulk"): NVIDIA/TransformerEngine fecb10bd, transformer_engine/pytorch/module/base.py,
# initialize_ub.
GATHERED, SCATTERED, SCATTERED_PIECES = ("qkv", "mlp_up"), ("attention_output", "mlp_down"), 4


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
    runs at its curve's asymptotic efficiency, and nothing takes a fixed time. host_gpus: of one host; None: any number.
    """

    def __init__(
        self, gpu: Gpu, kernels: Kernels, effects: Effects, overheads: Overheads, *, host_gpus: int | None = None
    ) -> None:
        self.gpu, self.kernels, self.effects, self.overheads = gpu, kernels, effects, overheads
        self.ideal, self.host_gpus = not effects.efficiency, host_gpus
        self.measured = None if self.ideal else measured_kernels(gpu, kernels)

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

    def unit_launches(self, use: ModelUse, tokens: Numbers, *, backward: bool = False) -> OperatorTime:
        """Host time of a layer's LoRA factors as sharded units of their own, in a forward or a backward pass."""
        if self.ideal or use.zero_stage < 3 or not use.lora_rank:
            return NO_TIME
        seconds = self.overheads.lora_unit_seconds
        if backward and self.overheads.lora_unit_backward_seconds is not None:
            seconds = self.overheads.lora_unit_backward_seconds
        units = lora_factors(use.shape, use.lora_target_modules) / use.shape.layers
        return _host(np.where(np.asarray(tokens) > 0, units * seconds, 0.0))

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
        self,
        use: ModelUse,
        tokens: Numbers,
        tensor_parallel: int,
        *,
        adapters: bool = True,
        serving: bool = False,
        beside: bool = False,
    ) -> OperatorTime:
        """Projections, MLP or experts, norms, residuals, rotary embedding, activation; attention itself is apart.

        adapters: run LoRA's low-rank products beside the weights (False: they are merged into the weights).
        serving: with the kernels in which serving engines run all experts. beside: collectives of tensor-parallel ranks
        run beside the products.
        """

        def of(kind: LayerKind) -> OperatorTime:
            gemms = layer_gemms(use.shape, tensor_parallel, kind, use.expert_split(tensor_parallel))
            precision = self._layer_precision(use)
            time = self._products("forward", use, tokens, gemms, precision, serving=serving)
            if beside:
                in_pieces = [(GATHERED, tensor_parallel), (SCATTERED, SCATTERED_PIECES)]
                time += total(self._pieces("forward", use, tokens, gemms, precision, *named) for named in in_pieces)
            if adapters and use.lora_rank:
                time += self._products("forward", use, tokens, lora_gemms(use, tensor_parallel, kind))
            if not use.fused_kernels:
                return time + self._eager_elementwise(use, tokens, tensor_parallel, kind)
            return time + self._elementwise(use, tokens, tensor_parallel, kind)

        return _mean_of_layers(use, of)

    def layer_backward(
        self,
        use: ModelUse,
        tokens: Numbers,
        tensor_parallel: int,
        trainable: Trainable = "all",
        *,
        beside: bool = False,
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
            if beside:
                time += self._pieces("data", use, tokens, base, precision, SCATTERED, tensor_parallel)
            if trainable == "lora":
                adapters = lora_gemms(use, tensor_parallel, kind)
                time += self._products("data", use, tokens, adapters) + self._products("weights", use, tokens, adapters)
            else:
                time += self._products("weights", use, tokens, base, precision)
            if not use.fused_kernels:
                return time + self._eager_elementwise(use, tokens, tensor_parallel, kind, backward=True)
            return time + ELEMENTWISE_BACKWARD_RATIO * self._elementwise(use, tokens, tensor_parallel, kind)

        return _mean_of_layers(use, of)

    def weight_gradients(self, use: ModelUse, tokens: Numbers, tensor_parallel: int) -> OperatorTime:
        """Of the products of one layer whose rows are gathered from tensor-parallel ranks."""

        def of(kind: LayerKind) -> OperatorTime:
            gemms = layer_gemms(use.shape, tensor_parallel, kind, use.expert_split(tensor_parallel))
            gathered = [gemm for gemm in gemms if gemm.name in GATHERED]
            return self._products("weights", use, tokens, gathered, self._layer_precision(use))

        return _mean_of_layers(use, of)

    def attention_prefill(
        self,
        use: ModelUse,
        sequence_tokens: Numbers,
        tensor_parallel: int,
        *,
        backward: bool = False,
        tokens: Numbers | None = None,
    ) -> OperatorTime:
        """Causal attention of one layer over whole sequences, all in one kernel.

        sequence_tokens: array whose last axis is the sequences of one call; zeros are absent sequences. Unequal lengths
        count as equal ones with the same sum of squares (the work is quadratic); so does a window of w tokens, with
        w (2 n - w) for n^2 above it (of a later piece of a long prompt that is too much). Linear attention takes time
        by tokens: as many as the lengths together, or `tokens` where the lengths stand for later pieces of prompts.
        """
        lengths = np.atleast_1d(np.asarray(sequence_tokens, dtype=float))
        count = lengths.sum(axis=-1) if tokens is None else np.asarray(tokens, dtype=float)

        def of(kind: LayerKind) -> OperatorTime:
            if kind.linear:
                return self._delta_rule(use, count, tensor_parallel, backward)
            return self._attention_prefill(use, lengths, tensor_parallel, backward, kind.window)

        return _mean_of_layers(use, of)

    def _delta_rule(self, use: ModelUse, tokens: np.ndarray, tensor_parallel: int, backward: bool) -> OperatorTime:
        of = linear_attention.backward_work if backward else linear_attention.forward_work
        work = of(use.shape, tensor_parallel, use.bytes_per_parameter)
        curves = self.kernels.prefill, self.kernels.memory["residual_add"]
        return _where(tokens > 0, _operator(delta_rule_time(*curves, self._rates(use), tokens, work, ideal=self.ideal)))

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
        if self.measured and not backward:
            _refuse_latent(use)
            time = self.measured.prefill(time, heads, kv_heads, shape.head_dim, batch, length)
        if use.flash_attention:
            return _where(batch > 0, _operator(time))
        length = np.sqrt(squares / np.maximum(batch, 1))
        return _where(batch > 0, self._unfused_attention(use, batch * heads, np.maximum(length, 1), backward))

    def _unfused_attention(self, use: ModelUse, groups: np.ndarray, tokens: np.ndarray, backward: bool) -> OperatorTime:
        """Scores and their product with the values, each a batched product over the whole square; softmax and its
        dropout between them. The backward has two products for each."""
        shape, curve = use.shape, self.kernels.gemm_curve(use.precision)

        def product(n: Numbers, k: Numbers) -> OperatorTime:
            width = use.bytes_per_parameter
            time = gemm_time(
                curve, self._rates(use), tokens, n, k,
                input_bytes=width, output_bytes=width, ideal=self.ideal, groups=groups,
            )  # fmt: skip
            return _operator(time)

        # Of scores: tokens x head_dim x tokens, and of their gradient back to queries and keys; likewise of the values.
        wide, narrow = (tokens, shape.head_dim), (shape.value_head_dim, tokens)
        if backward:
            wide, narrow = (tokens, shape.value_head_dim), (shape.head_dim, tokens)
        products = product(*wide) + product(*narrow)
        if backward:
            products += product(shape.value_head_dim, tokens) + product(shape.head_dim, tokens)
        scores = groups * tokens**2 * use.bytes_per_parameter / 2
        kernels = UNFUSED_BACKWARD_BYTES if backward else UNFUSED_FORWARD_BYTES
        return products + total(self._memory(use, "residual_add", moved * scores) for moved in kernels)

    def attention_decode(
        self,
        use: ModelUse,
        sequences: Numbers,
        context_tokens_sum: Numbers,
        tensor_parallel: int,
        *,
        kv_bytes: float | None = None,
        queries: int = 1,
    ) -> OperatorTime:
        """Attention of the mean layer for one new token of each sequence; `context_tokens_sum` are in their caches.

        kv_bytes: of one cached element, if not the model's. queries: new tokens of each sequence, where several are
        verified at once; they read the cache together. Latent attention reads one vector for all heads, which compute
        with it in the latent space; it can be bound by either. Linear attention reads and writes the state of each
        sequence, at the rate of a residual addition (unverified).
        """
        sequences, context = np.asarray(sequences, dtype=float), context_tokens_sum
        linear = sum(count for kind, count in use.shape.layer_kinds().items() if kind.linear) / use.shape.layers
        time = self._attention_decode(use, sequences, context, tensor_parallel, kv_bytes, queries)
        if not linear:
            return time
        moved = linear_attention.step_bytes(use.shape, use.bytes_per_parameter, tensor_parallel, queries=queries)
        states = self._memory(use, "residual_add", moved * sequences)
        return (1 - linear) * time + linear * states

    def _attention_decode(
        self,
        use: ModelUse,
        sequences: np.ndarray,
        context_tokens_sum: Numbers,
        tensor_parallel: int,
        kv_bytes: float | None,
        queries: int,
    ) -> OperatorTime:
        shape, heads = use.shape, use.shape.heads / tensor_parallel
        kv_heads, width, flops = float(kv_heads_per_rank(shape, tensor_parallel)), float(shape.head_dim), 0.0
        if shape.latent_attention:
            cached = shape.kv_lora_rank + shape.qk_rope_head_dim
            kv_heads, width = 1.0, cached / 2  # no values beside the keys
            flops = 2 * heads * (cached + shape.kv_lora_rank) * queries
        if self.measured:
            _refuse_latent(use)
            width_bytes = use.bytes_per_parameter if kv_bytes is None else kv_bytes
            measured = self.measured.decode(heads, kv_heads, width, width_bytes, sequences, context_tokens_sum)
            return _where(np.asarray(sequences) > 0, _operator(measured))
        time = attention_decode_time(
            self.kernels.decode, self._rates(use), sequences, kv_heads, context_tokens_sum, width,
            kv_bytes=use.bytes_per_parameter if kv_bytes is None else kv_bytes,
            flops_per_token=flops, compute_efficiency=self.kernels.prefill.compute_efficiency,
            query_heads=None if shape.latent_attention else heads, ideal=self.ideal,
        )  # fmt: skip
        return _where(sequences > 0, _operator(time))

    def decode_knots(self, use: ModelUse) -> tuple[float, ...]:
        """Tokens of the mean sequence between which `attention_decode` is linear."""
        residuals = self.kernels.decode.residuals
        if residuals is None or use.shape.latent_attention or self.measured or self.ideal:
            return ()
        return residuals.axes[-1]

    # --- before and after the layers ---------------------------------------------------------------------------------

    def embedding(self, use: ModelUse, tokens: Numbers) -> OperatorTime:
        """Lookup of the token embeddings: a row read and written per token."""
        return self._memory(use, "embedding", 2 * use.bytes_per_parameter * use.shape.hidden * np.asarray(tokens))

    def head_forward(self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm") -> OperatorTime:
        """`lm`: logits and their log-softmax over the vocabulary (vocabulary-parallel). `value`: one number a token."""
        time = self._products("forward", use, tokens, head_gemms(use.shape, kind, tensor_parallel))
        moved = IN_PLACE_SOFTMAX_BYTES if use.logits_in_place else LOG_SOFTMAX_BYTES
        return time + self._log_softmax(use, tokens, tensor_parallel, moved) if kind == "lm" else time

    def head_backward(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: Head = "lm", *, trained: bool = True
    ) -> OperatorTime:
        """Gradients of `head_forward`; `trained` adds those of the head's own weights."""
        gemms = head_gemms(use.shape, kind, tensor_parallel)
        time = self._products("data", use, tokens, gemms) + self._products(
            "weights", use, tokens, gemms if trained else []
        )
        moved = IN_PLACE_SOFTMAX_BACKWARD_BYTES if use.logits_in_place else LOG_SOFTMAX_BYTES
        return time + self._log_softmax(use, tokens, tensor_parallel, moved) if kind == "lm" else time

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
        """Seconds of Adam on the CPU at the host's memory bandwidth, which `sharing_ranks` ranks share, or at
        what one process reaches (`host_adam_bytes_per_second`)."""
        alone = self.overheads.host_adam_bytes_per_second
        per_byte = sharing_ranks / host_bytes_per_second
        if alone is not None and not self.ideal:
            per_byte = np.maximum(per_byte, 1 / alone)
        return np.asarray(adam_bytes(use) * parameters * per_byte)

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

    def _pieces(
        self, product: Product, use: ModelUse, tokens: Numbers, gemms: Iterable[Gemm], precision: Precision,
        names: tuple[str, ...], pieces: int,
    ) -> OperatorTime:  # fmt: skip
        """What the products of these names take longer in so many pieces than as a whole.

        Pieces are on several streams: the fixed time of one passes beside the next.
        """
        named = [gemm for gemm in gemms if gemm.name in names]
        whole = self._products(product, use, tokens, named, precision)
        piece = self._products(product, use, np.asarray(tokens) / pieces, named, precision)
        fixed = OperatorTime(piece.launch, 0.0, 0.0, piece.launch)
        return pieces * piece + -1.0 * whole + (1.0 - pieces) * fixed

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
            output_bytes=self._written_bytes(use, product),
            weight_gradient=product == "weights", ideal=self.ideal, weights_bytes=weights_bytes, groups=groups,
        )  # fmt: skip
        if self.measured and product == "forward" and gemm.chosen >= 1:
            time = self.measured.gemm(time, precision or use.precision, np.maximum(m, 1), n, k)
        return _operator(time)

    @staticmethod
    def _written_bytes(use: ModelUse, product: Product) -> int:
        """Of one element of a product; gradients of weights are added to the fp32 buffer by the product itself
        (megatron/core/tensor_parallel/layers.py, wgrad_gemm_accum_fp32)."""
        adds = product == "weights" and use.gradient_precision and not use.shards_master
        return 2 * use.gradient_bytes if adds else use.bytes_per_parameter

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
        if kind.linear:
            inner = tokens * linear_attention.elementwise_widths(shape, tensor_parallel) * width
            time += self._memory(use, "rms_norm", inner)
        elif not shape.learned_positions:
            time += self._memory(use, "rope", 2 * heads)
        if shape.attention_gate and not kind.linear:
            gated = tokens * shape.heads * shape.value_head_dim / tensor_parallel * width
            time += self._memory(use, "gated_activation", 3 * gated)
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

    def _eager_elementwise(
        self, use: ModelUse, tokens: Numbers, tensor_parallel: int, kind: LayerKind, *, backward: bool = False
    ) -> OperatorTime:
        """What `_elementwise` is for, one kernel per operation, each at the rate of a residual addition.

        A layer norm and activations of MLPs without a gate are one kernel in PyTorch too.
        """
        shape, width, way = use.shape, use.bytes_per_parameter, int(backward)
        if shape.norm == "layer":
            time = self._elementwise(use, tokens, tensor_parallel, kind)
            return ELEMENTWISE_BACKWARD_RATIO * time if backward else time
        tokens = np.asarray(tokens, dtype=float)
        split = use.expert_split(tensor_parallel)
        hidden = tokens / (tensor_parallel if use.sequence_parallel else 1) * shape.hidden
        heads = tokens * _rotary_width(use) / tensor_parallel
        norms = shape.norms_per_layer * hidden + (heads if shape.qk_norm else 0)
        if shape.latent_attention:
            norms = norms + tokens * (shape.q_lora_rank + shape.kv_lora_rank)
        joined = (2 + EAGER_JOINS * way) * hidden
        activated = tokens * shape.ffn / tensor_parallel
        if kind.experts:
            rows = tokens * shape.experts_per_token * split.tensor / tensor_parallel * self._imbalance(use)
            activated = tokens * shape.shared_expert_ffn / tensor_parallel + rows * shape.expert_ffn / split.tensor
            joined = joined + 2 * rows * shape.hidden * 2 / 3  # a row to its expert and back: read and written
        elements = {"rms_norm": norms, "rope": heads, "gated_activation": activated, "residual_add": joined}
        moved = ((EAGER_BYTES[name][way] * width / 2 * count) for name, count in elements.items())
        return total(self._memory(use, "residual_add", count) for count in moved)

    def _log_softmax(self, use: ModelUse, tokens: Numbers, tensor_parallel: int, moved: int) -> OperatorTime:
        """moved: bytes per logit."""
        columns = -(-use.shape.vocabulary // tensor_parallel)
        return self._memory(use, "cross_entropy", moved * columns * np.asarray(tokens, dtype=float))


def lora_gemms(use: ModelUse, tensor_parallel: int, kind: LayerKind = DENSE) -> list[Gemm]:
    """LoRA's factors on one rank, down to the rank and up from it, at each adapted module of a layer."""
    rank = use.lora_rank
    modules = lora_modules(use.shape, kind, use.lora_target_modules, tensor_parallel) if rank else []
    pairs = [
        (Gemm(f"{name}_lora_a", rank, inputs), Gemm(f"{name}_lora_b", outputs, rank))
        for name, inputs, outputs in modules
    ]
    return [factor for pair in pairs for factor in pair]


def adam_bytes(use: ModelUse) -> int:
    """Memory traffic of one Adam update per parameter.

    Master weight and two moments in fp32 are read and written (24), the gradient is read; in 16-bit the working weight
    is written besides the master. 16-bit: 24 + 2 + 2; fp32: the master is the weight: 24 + 4.
    optimizer_passes: gradients in 16 bits are cast to fp32 first (2 + 4); with fp16 those are unscaled (4 + 4); they
    are read for their norm (4) and by Adam (4), and the master is read (4) to write the weight (2).
    """
    if use.optimizer_passes:
        cast = 0 if use.gradient_bytes == 4 else use.gradient_bytes + 4
        return cast + (8 if use.precision == "fp16" else 0) + 4 + 28 + 4 + use.bytes_per_parameter
    return 24 + use.gradient_bytes + (0 if use.precision == "fp32" or use.shards_master else use.bytes_per_parameter)


def _mean_of_layers(use: ModelUse, of: Callable[[LayerKind], OperatorTime]) -> OperatorTime:
    kinds = use.shape.layer_kinds()
    if len(kinds) == 1:
        return of(next(iter(kinds)))
    return total(count / use.shape.layers * of(kind) for kind, count in kinds.items())


def _refuse_latent(use: ModelUse) -> None:
    if use.shape.latent_attention:
        raise InputError(
            f"has no table of latent attention, which {use.spec} has; leave it out", field="cluster.gpu.measured"
        )


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
