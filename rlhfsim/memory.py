"""Bytes on one rank, in closed form: no simulation, no graph.

A rank's memory is a sum of `Bytes`: `static_bytes` of every model that it holds, `working_bytes` of the one that runs,
`engine_bytes` of an inference engine, and `reserved_bytes`. Counts are per rank, for the pipeline stage that is asked
for; what a stage holds differs, so look at the first and the last one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal

from . import linear_attention
from .model import (
    Head,
    activation_bytes_per_token,
    embedding_parameters,
    head_parameters,
    kv_bytes_per_token,
    kv_heads_per_rank,
    layer_gemms,
    layer_parameters,
    layers_parameters,
    layers_routed_parameters,
    logits_bytes,
    matmul_parameters,
    output_activation_bytes_per_token,
    rank_parameters,
    stage_layers,
)
from .spec.model_spec import LayerKind
from .spec.scenario import Generation, ModelUse, Overheads

Held = Literal["train", "frozen"]

# What a copy of a model does at a time, on which depends what of it is on the device: nothing, a pass, or updates.
Doing = Literal["rests", "passes", "updates"]

# Adam in mixed precision: fp32 master weights and two fp32 moments, Rajbhandari et al., "ZeRO: Memory Optimizations
# Toward Training Trillion Parameter Models", 2020, section 3.1. In fp32 the weights are the master.
MASTER_BYTES, MOMENT_BYTES = 4, 8

# Gradients wait in fp32 on the host for an offloaded Adam: 16 bytes a parameter with master and moments, as DeepSpeed's
# estimate_zero2_model_states_mem_needs counts (deepspeed/runtime/zero/stage_1_and_2.py).
HOST_GRADIENT_BYTES = 4

# Peak while log-probabilities are taken from logits, in fp32 copies of the logits: (902 - 44) MB over 310 MB,
# github.com/huggingface/trl issue 3678 (2025): H100, 2 x 256 tokens, vocabulary 151,665.
LOGITS_COPIES = 2.77

# Parameters that ZeRO-3 keeps gathered at a time, prefetches and reduces at a time: DeepSpeed's defaults of
# stage3_max_live_parameters, stage3_prefetch_bucket_size and reduce_bucket_size, deepspeed/runtime/zero/config.py at
# 1b88ac36.
LIVE_PARAMETERS, PREFETCH_PARAMETERS, REDUCE_BUCKET_PARAMETERS = 1e9, 5e7, 5e8

# Of FSDP, the unit that computes and the one that is gathered beside it: PyTorch, torch/distributed/fsdp/_fully_shard/
# _fsdp_param_group.py, implicit prefetch of one group (and a reduction ends before the next one begins).
UNITS_AT_ONCE = 2

# One bucket fills while the other is reduced (overlap_comm; deepspeed/runtime/zero/stage_1_and_2.py, ipg buffers);
# without overlap there is one.
REDUCE_BUCKETS = 2

# One layer's activations leave for the host while the next one's are made: the double buffer of Transformer Engine's
# AsyncDoubleBufferGroupOffloadHandler (transformer_engine/pytorch/cpu_offload.py).
LAYERS_ON_DEVICE = 2
# fp32 tensors of rows x vocabulary while vLLM draws tokens: logits, probabilities, noise. Top-k and top-p mask in place
# (vllm/v1/sample/ops/topk_topp_sampler.py, without sorting since pull request 33538, 2026-02).
SAMPLER_FP32_COPIES = 3

# What the profile run of vLLM 0.19 left out of the KV cache besides weights, hidden states and drawing: Llama-3.1-8B on
# RTX 4090, 2,588 blocks (casys-kaist/LLMServingSim, MIT, 2026-08, meta.json: 0.9 x 25,250,627,584 - 16,060,522,496 -
# 2,588 x 16 x 131,072 - 16,777,216 - 459,669,504 bytes). It holds the rotary table (34 MB), the masking kernel's buffer
# (66 MB; one row a program, vllm/v1/sample/ops/topk_topp_triton.py), kernels loaded by then and workspaces; one run, so
# what grows with the model or the batch cannot be told apart.
PROFILE_REST_BYTES = 7.61e8

# CUDA context, NCCL buffers and allocator slack (unverified).
RESERVED_BYTES = 1.5 * 2**30


@dataclass(frozen=True)
class Bytes:
    """Bytes on one rank by what they are for; `host` is host memory and no part of `total`."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    kv_cache: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    gathered: float = 0.0
    engine: float = 0.0
    buffers: float = 0.0
    reserved: float = 0.0
    host: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.components.values())

    @property
    def components(self) -> dict[str, float]:
        """The device's part by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "host"}


# --- what rests on a rank --------------------------------------------------------------------------------------------


def static_bytes(
    use: ModelUse,
    held: Held,
    data_parallel: int,
    *,
    head: Head = "lm",
    stage: int = 0,
    stepped: bool = True,
    doing: Doing = "updates",
) -> Bytes:
    """Weights, gradients and optimizer states of one model, sharded over `data_parallel` ranks by its ZeRO stage.

    stepped: False before the first optimizer step, when Adam has no moments yet. doing: while it rests, offloaded
    weights are on the host (under ZeRO-3 they stay there, and only what is gathered is on the device), and states leave
    as `ModelUse.offload_states` says; their room on the host is kept.
    """
    shards = Shards.of(use, data_parallel)
    width = MASTER_BYTES if held == "train" and use.shards_master else use.bytes_per_parameter
    weights = shards.largest(_weights(use, head, stage), _routed(use, use.stage_layers(stage)), 3) * width
    if use.offload_parameters:
        there = doing != "rests" and use.zero_stage < 3
        resting = Bytes(weights=weights if there else 0.0, host=weights)
    else:
        resting = Bytes(weights=weights)
    if held == "frozen":
        return resting
    trained, routed = trained_parameters(use, head, stage), trained_routed_parameters(use, stage)
    gradients = shards.largest(trained, routed, 2) * use.gradient_bytes
    has_master = use.precision != "fp32" and not use.shards_master
    per_parameter = MOMENT_BYTES * stepped + MASTER_BYTES * has_master
    share = shards.largest(trained, routed, 1)
    away = use.offload_optimizer_fraction if use.offload_optimizer else 0.0
    states = Bytes(
        gradients=0.0 if use.offload_gradients else gradients,
        optimizer=(1 - away) * share * per_parameter,
        host=away * share * (per_parameter + HOST_GRADIENT_BYTES),
    )
    return _moved(use, resting + states, doing)


def _moved(use: ModelUse, held: Bytes, doing: Doing) -> Bytes:
    """What is on the device of a trained model's states, and the room for the others that is kept on the host."""
    if use.offload_states is None:
        return held
    leaving = leaving_bytes(use, held)
    there = replace(held, host=held.host + leaving.total)
    if doing != "updates":
        there = replace(there, optimizer=0.0, gradients=0.0)
    return replace(there, weights=held.weights - leaving.weights) if doing == "rests" else there


def leaving_bytes(use: ModelUse, held: Bytes) -> Bytes:
    """Of a trained model's states, those that are copied to the host while they are not needed."""
    if use.offload_states is None:
        return Bytes()
    return Bytes(
        weights=0.0 if use.offload_states == "optimizer" else held.weights,
        gradients=held.gradients if use.offload_states == "image" else 0.0,
        optimizer=held.optimizer,
    )


def rounding_bytes(use: ModelUse, held: Held, data_parallel: int, *, head: Head = "lm", stage: int = 0) -> float:
    """Host memory lost on one rank because PyTorch pins memory in powers of two.

    ATen/core/CachingHostAllocator.h, `allocate`, rounds by PowerOf2Ceil. Pinned are weights that rest on the host, and
    of an optimizer there the master weights and gradients (pin_cpu_params and pin_cpu_grads of Megatron-LM's
    HybridDeviceOptimizer), tensor by tensor; moments are not, nor does another library's copy round.
    """
    lost = 0.0
    if use.offload_parameters:
        weights = static_bytes(use, held, data_parallel, head=head, stage=stage, doing="passes")
        lost += (_rounded(use, use.bytes_per_parameter) - 1) * (weights.host if held == "frozen" else 0.0)
    if held == "train" and use.offload_optimizer:
        trained, routed = trained_parameters(use, head, stage), trained_routed_parameters(use, stage)
        share = Shards.of(use, data_parallel).largest(trained, routed, 1) * use.offload_optimizer_fraction
        lost += (_rounded(use, 4) - 1) * share * (MASTER_BYTES + HOST_GRADIENT_BYTES)
    return lost


def _rounded(use: ModelUse, width: int) -> float:
    """Bytes of all matrices, each rounded up to a power of two, over their bytes."""
    spec, t = use.shape, use.tensor_parallel
    sizes: Counter[int] = Counter({width * embedding_parameters(spec, t): 1 if spec.tied_embeddings else 2})
    for kind, layers in spec.layer_kinds().items():
        for gemm in layer_gemms(spec, t, kind, use.expert_split()):
            sizes[width * gemm.n * gemm.k] += layers * gemm.copies
    rounded = sum(n * (1 << (size - 1).bit_length()) for size, n in sizes.items())
    return rounded / sum(n * size for size, n in sizes.items())


@dataclass(frozen=True)
class Shards:
    """Ranks that hold the same part of a model, over which ZeRO can shard it: other ones for routed experts."""

    zero_stage: int
    data_parallel: int
    expert_data_parallel: float

    @classmethod
    def of(cls, use: ModelUse, data_parallel: int) -> Shards:
        ranks = data_parallel * use.tensor_parallel
        sharing = use.shard_ranks or data_parallel
        return cls(use.zero_stage, sharing, ranks / use.expert_ranks)

    def largest(self, count: float, routed: float, from_stage: int) -> float:
        """What one rank keeps of `count` parameters (`routed` of them in routed experts) that a ZeRO stage shards."""
        if self.zero_stage < from_stage:
            return count
        if not routed:
            return count / self.data_parallel
        return (count - routed) / self.data_parallel + routed / self.expert_data_parallel


def trained_parameters(use: ModelUse, head: Head, stage: int = 0) -> float:
    """Parameters of a pipeline stage that have gradients: all, LoRA's factors, or the top layers and the head."""
    spec, t, p = use.shape, use.tensor_parallel, use.pipeline_parallel
    layers = _trained_layers(use, stage)
    if use.lora_rank:
        return use.lora_parameters(len(layers)) / t
    if use.trainable_layers is None or use.trainable_layers == spec.layers:
        return held_parameters(use, head, stage)
    at_top = head_parameters(spec, head, t) if stage == p - 1 else 0
    return layers_parameters(spec, t, use.expert_split(), layers) + at_top


def held_parameters(use: ModelUse, head: Head, stage: int = 0) -> int:
    """Parameters of a pipeline stage on one rank, without LoRA's factors."""
    return rank_parameters(
        use.shape,
        head,
        tensor_parallel=use.tensor_parallel,
        pipeline_parallel=use.pipeline_parallel,
        stage=stage,
        split=use.expert_split(),
        layers=use.stage_layers(stage),
    )


def trained_routed_parameters(use: ModelUse, stage: int = 0) -> float:
    """Those of `trained_parameters` that are in routed experts."""
    return 0.0 if use.lora_rank else _routed(use, _trained_layers(use, stage))


def engine_bytes(
    use: ModelUse, generation: Generation, kv_tokens: float, *, own_weights: bool = True, stage: int = 0
) -> Bytes:
    """An inference engine: its copy of the weights (unless it uses the resting ones) and a cache of `kv_tokens`."""
    per_token = cache_bytes_per_token(use, generation)
    held = engine_weight_bytes(use, generation, stage) if own_weights else 0.0
    return Bytes(engine=held, kv_cache=per_token * kv_tokens)


def cache_bytes_per_token(use: ModelUse, generation: Generation, sequence_tokens: float | None = None) -> float:
    """KV cache of one token on one rank of an engine, with that of the model that drafts.

    sequence_tokens: the mean over a sequence of so many (see `kv_bytes_per_token`).
    """
    return sum(
        kv_bytes_per_token(
            cached.shape,
            generation.kv_bytes(cached),
            tensor_parallel=generation.tensor_parallel,
            pipeline_parallel=generation.pipeline_parallel,
            sequence_tokens=sequence_tokens,
        )
        for cached in (use, generation.draft_use(use))
        if cached is not None
    )


def sequence_state_bytes(use: ModelUse, generation: Generation) -> float:
    """What linear attention keeps of one sequence on one rank of an engine (of the pipeline stage with most of it),
    besides the cache of its tokens."""
    spec, stages = use.shape, generation.pipeline_parallel
    layers = max(
        sum(n for kind, n in spec.layer_kinds(stage_layers(spec, stages, stage)).items() if kind.linear)
        for stage in range(stages)
    )
    if not layers:
        return 0.0
    drafts = generation.speculative.tokens if generation.speculative else 0
    degree = generation.tensor_parallel
    return layers * linear_attention.state_bytes(spec, use.bytes_per_parameter, degree, drafts=drafts)


def state_blocks(use: ModelUse, generation: Generation) -> int:
    """Blocks of the paged cache that these take, as in vLLM, where they lie in pages of the same size as the tokens'
    (vllm/v1/core/kv_cache_utils.py; it makes blocks so long that a page holds one layer's state)."""
    state = sequence_state_bytes(use, generation)
    return ceil(state / (cache_bytes_per_token(use, generation) * generation.block_tokens)) if state else 0


def engine_weight_bytes(use: ModelUse, generation: Generation, stage: int = 0) -> float:
    """Weights of an engine on one rank of a pipeline stage, with `served` LoRA factors and what drafts; quantised: the
    layers' matrices in one byte each (not those of what drafts).

    Scales of quantised blocks are left out (below 0.1 % for blocks of 128 x 128).
    """
    spec, width, t, p = use.shape, use.bytes_per_parameter, generation.tensor_parallel, generation.pipeline_parallel
    held = float(rank_parameters(spec, "lm", tensor_parallel=t, pipeline_parallel=p, stage=stage) * width)
    layers = stage_layers(spec, p, stage)
    if generation.weights_precision:
        matrices = sum(n * matmul_parameters(spec, t, kind) for kind, n in spec.layer_kinds(layers).items())
        held -= matrices * (width - 1)
    if generation.lora == "served" and use.lora_rank:
        held += use.lora_parameters(len(layers)) / t * width
    drafting, draft = generation.speculative, generation.draft_use(use)
    if drafting and draft:
        whole = drafting.draft is not None  # else layers without embedding and head of their own
        drafts = rank_parameters(draft.shape, "lm", tensor_parallel=t) if whole else layers_parameters(draft.shape, t)
        held += drafts * width
    return held


def profile_bytes(use: ModelUse, generation: Generation, stage: int = 0) -> Bytes:
    """Peak of one step at the scheduler's limits, which vLLM runs before it sizes the KV cache.

    All `prefill_tokens` go through the layers, then tokens are drawn for `max_sequences` rows over the whole vocabulary
    (vllm/v1/worker/gpu_model_runner.py, profile_run and _dummy_sampler_run). The larger of the two counts; the hidden
    states of all tokens are still there while tokens are drawn, which the last pipeline stage does.
    """
    tokens, width = generation.prefill_tokens, use.bytes_per_parameter
    rows = min(generation.max_sequences, tokens)
    hidden = float(tokens * use.shape.hidden * width)
    layers = tokens * max(_inference_bytes(use, generation, kind) for kind in use.shape.layer_kinds())
    drawing = float(rows * use.shape.vocabulary * (width + 4 * SAMPLER_FP32_COPIES))
    draws = stage == generation.pipeline_parallel - 1
    peak = Bytes(activations=hidden, logits=drawing)
    if layers > hidden + drawing or not draws:
        peak = Bytes(activations=layers)
    return peak + Bytes(buffers=PROFILE_REST_BYTES)


def _inference_bytes(use: ModelUse, generation: Generation, kind: LayerKind) -> float:
    """Alive at once in one layer of an engine, per token on one rank: the residual, and the input and output of the
    widest step (queries, keys and values; the activation of the MLP; of experts the rows of all that a token chose)."""
    spec, t = use.shape, generation.tensor_parallel
    attention = spec.hidden + ((1 + spec.attention_gate) * spec.query_width + 2 * spec.kv_width) / t
    if kind.linear:
        attention = spec.hidden + sum(outputs for _, outputs in linear_attention.projections(spec, t))
    up = 2 if spec.gated_mlp else 1
    mlp = (up + 1) * spec.ffn / t
    if kind.experts:
        rows, own = spec.experts_per_token, spec.expert_ffn / t
        mlp = rows * (max(up * own, spec.hidden) + own) + (up + 1) * spec.shared_expert_ffn / t
    return use.bytes_per_parameter * (spec.hidden + max(attention, mlp))


def reserved_bytes(overheads: Overheads) -> Bytes:
    """What no tensor uses."""
    given = overheads.reserved_bytes
    return Bytes(reserved=RESERVED_BYTES if given is None else given)


# --- what a phase needs besides --------------------------------------------------------------------------------------


def training_bytes(
    use: ModelUse,
    data_parallel: int,
    micro_batch_tokens: float,
    sequence_tokens: float,
    *,
    head: Head = "lm",
    stage: int = 0,
    micro_batches: int = 1,
) -> Bytes:
    """Forward and backward of micro-batches of so many tokens in sequences of up to `sequence_tokens`.

    Activations of trained layers are kept for all micro-batches in flight; with recomputation one layer is whole again
    at a time. Buffers: gradients on their way to the other ranks, and what ranks that share sequences exchange.
    """
    micro_batch_tokens = micro_batch_tokens / use.context_parallel
    spec, layers = use.shape, _trained_layers(use, stage)
    kept = sum(
        micro_batch_tokens * kept_activation_bytes(use, sequence_tokens, kind) * (count / use.pipeline_chunks)
        for kind, count in spec.layer_kinds(layers).items()
    )
    activations, host = kept * chunks_in_flight(use, stage, micro_batches), 0.0
    if use.offload_activations and layers:
        largest = max(kept_activation_bytes(use, sequence_tokens, kind) for kind in spec.layer_kinds(layers))
        activations, host = min(activations, LAYERS_ON_DEVICE * micro_batch_tokens * largest), activations
    if use.recompute != "none":
        activations += micro_batch_tokens * _largest_activation_bytes(use, sequence_tokens, stage)
    logits = 0.0
    if stage == use.pipeline_parallel - 1:
        output = output_activation_bytes_per_token(
            spec,
            tensor_parallel=use.tensor_parallel,
            sequence_parallel=use.sequence_parallel,
            element_bytes=use.bytes_per_parameter,
        )
        activations += micro_batch_tokens * output
        logits = _logits(use, micro_batch_tokens, head, trains=True)
    buffers = _reduced(use, head, stage) if data_parallel > 1 else 0.0
    gathered = gathered_bytes(use, data_parallel, head)
    buffers += _exchanged(use, micro_batch_tokens, backward=True)
    return Bytes(activations=activations, logits=logits, gathered=gathered, buffers=buffers, host=host)


def scoring_bytes(
    use: ModelUse,
    data_parallel: int,
    micro_batch_tokens: float,
    sequence_tokens: float,
    *,
    head: Head = "lm",
    stage: int = 0,
) -> Bytes:
    """A forward pass without gradients: one layer's activations at a time, then the logits."""
    last = stage == use.pipeline_parallel - 1
    micro_batch_tokens = micro_batch_tokens / use.context_parallel
    return Bytes(
        activations=micro_batch_tokens * _largest_activation_bytes(use, sequence_tokens, stage),
        logits=_logits(use, micro_batch_tokens, head) if last else 0.0,
        gathered=gathered_bytes(use, data_parallel, head),
        buffers=_exchanged(use, micro_batch_tokens),
    )


def gathered_bytes(use: ModelUse, data_parallel: int, head: Head = "lm") -> float:
    """Weights that ZeRO-3 has gathered at a time: never more than the model, never less than its largest layer.

    An upper limit where FSDP is not known to be at work (`ModelUse.shards_master`).
    """
    if use.zero_stage != 3 or (use.shard_ranks or data_parallel) == 1:
        return 0.0
    largest = _largest_unit(use, head)
    live = UNITS_AT_ONCE * largest if use.shards_master else max(largest, LIVE_PARAMETERS) + PREFETCH_PARAMETERS
    return min(live, held_parameters(use, head)) * use.bytes_per_parameter


def _largest_unit(use: ModelUse, head: Head) -> int:
    """Parameters of the largest layer, embedding or head, the part of a tensor-parallel rank."""
    spec, t = use.shape, use.tensor_parallel
    layer = max(layer_parameters(spec, t, kind, use.expert_split()) for kind in spec.layer_kinds())
    return max(layer, embedding_parameters(spec, t), head_parameters(spec, head, t))


def _reduced(use: ModelUse, head: Head, stage: int) -> float:
    """Gradients on their way to the other ranks: DeepSpeed's buckets. FSDP has a unit's, whole, and their fp32 copy;
    a buffer of fp32 gradients is reduced where it lies (megatron/core/distributed/param_and_grad_buffer.py)."""
    trained = trained_parameters(use, head, stage)
    if use.shards_master:
        return min(trained, _largest_unit(use, head)) * (use.bytes_per_parameter + use.gradient_bytes)
    if use.zero_stage == 0 or use.gradient_precision:
        return 0.0
    buckets = 1 if use.overlap_grad_reduce is False else REDUCE_BUCKETS
    return buckets * min(trained, REDUCE_BUCKET_PARAMETERS) * use.gradient_bytes


def chunks_in_flight(use: ModelUse, stage: int, micro_batches: int) -> int:
    """Forward chunks of layers whose backward has not come yet, at most: the schedule's warm-up and one more.

    1F1B: stages - stage micro-batches; interleaved: 2 (stages - stage - 1) + (chunks - 1) stages + 1 chunks.
    """
    behind, chunks = use.pipeline_parallel - 1 - stage, use.pipeline_chunks
    warm_up = behind if chunks == 1 else 2 * behind + (chunks - 1) * use.pipeline_parallel
    return min(warm_up + 1, micro_batches * chunks)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _weights(use: ModelUse, head: Head, stage: int) -> float:
    adapters = use.lora_parameters(len(use.stage_layers(stage))) / use.tensor_parallel
    return held_parameters(use, head, stage) + adapters


def _routed(use: ModelUse, layers: range) -> float:
    return float(layers_routed_parameters(use.shape, use.tensor_parallel, use.expert_split(), layers))


def _trained_layers(use: ModelUse, stage: int) -> range:
    """Trained layers on a pipeline stage; the top layers are on the last stages.

    (With several chunks layers lie otherwise, but the fullest stage is as full.)
    """
    own = use.stage_layers(stage)
    frozen = use.shape.layers - (use.trainable_layers or use.shape.layers)
    return range(min(max(own.start, frozen), own.stop), own.stop)


def _largest_activation_bytes(use: ModelUse, sequence_tokens: float, stage: int) -> float:
    """Per token, of the largest layer of a pipeline stage, whole."""
    kinds = use.shape.layer_kinds(use.stage_layers(stage))
    return max(_activation_bytes(use, sequence_tokens, "none", kind) for kind in kinds)


def kept_activation_bytes(use: ModelUse, sequence_tokens: float, kind: LayerKind) -> float:
    """Per token, what a layer keeps from its forward for its backward."""
    return _activation_bytes(use, sequence_tokens, use.recompute, kind)


def _activation_bytes(
    use: ModelUse, sequence_tokens: float, recompute: Literal["none", "selective", "full"], kind: LayerKind
) -> float:
    """Per token and layer; of experts on the busiest rank, whose rows may be `routing_imbalance` times the mean.

    Models of transformers train at zero_stage 3, experts below it are Megatron-LM's.
    """
    return activation_bytes_per_token(
        use.shape,
        sequence_tokens,
        recompute=recompute,
        flash_attention=use.flash_attention,
        tensor_parallel=use.tensor_parallel,
        sequence_parallel=use.sequence_parallel,
        element_bytes=use.bytes_per_parameter,
        kind=kind,
        split=use.expert_split(),
        routing_imbalance=use.routing_imbalance if use.expert_parallel > 1 else 1.0,
        expert_outputs=use.zero_stage == 3,
    )


def _exchanged(use: ModelUse, tokens: float, *, backward: bool = False) -> float:
    """Attention's inputs from other ranks, of one layer: the next piece of keys and values, all pieces, or one's heads.

    With the gradients of as many in the backward (layouts of the exchanges in `costs.passes`; not compared with a
    framework).
    """
    shape, t, c = use.shape, use.tensor_parallel, use.context_parallel
    if c == 1:
        return 0.0
    per_head = tokens * (shape.head_dim + shape.value_head_dim) * use.bytes_per_parameter * (2 if backward else 1)
    kv_heads = kv_heads_per_rank(shape, t)
    if use.context_exchange == "all_to_all":
        return per_head * (shape.heads // t + max(kv_heads, c))
    return per_head * kv_heads * (c if use.context_exchange == "all_gather" else 1)


def _logits(use: ModelUse, tokens: float, head: Head, *, trains: bool = False) -> float:
    if head != "lm":
        return 0.0
    at_once = min(tokens, use.logits_chunk_tokens or tokens)
    own = use.bytes_per_parameter / 4  # one in the model's precision
    copies = 1 + own if use.logits_in_place else LOGITS_COPIES
    if trains and not use.logits_upcast:
        copies = own
    return logits_bytes(use.shape, at_once, copies, tensor_parallel=use.tensor_parallel)
