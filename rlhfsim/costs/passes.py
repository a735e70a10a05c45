"""Programs of scoring and training: what each replica of a place computes, and when it must move what.

`lengths` holds one array of token counts per replica, a number per sample (prompt and response; the caller pads where
the scenario says so). Samples fill micro-batches in the given order, or are packed by tokens (`packing`). Where ranks
wait for each other is part of the program: at every layer under ZeRO-3 (each gather is a meeting), at every backward
under ZeRO-2, at the optimizer step under ZeRO-0 and 1.

A transfer has one payload for all replicas of a place; where their token counts differ it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from rlhfsim import linear_attention
from rlhfsim.errors import InputError
from rlhfsim.memory import (
    PREFETCH_PARAMETERS,
    REDUCE_BUCKET_PARAMETERS,
    Shards,
    held_parameters,
    kept_activation_bytes,
    trained_parameters,
    trained_routed_parameters,
)
from rlhfsim.model import (
    Head,
    embedding_parameters,
    head_parameters,
    kv_heads_per_rank,
    layer_gemms,
    layers_parameters,
    layers_routed_parameters,
    parameters,
)
from rlhfsim.packing import packed_micro_batches
from rlhfsim.spec.model_spec import DENSE, UNSPLIT, ExpertSplit, LayerKind, ModelSpec
from rlhfsim.spec.overheads import EnginePhase
from rlhfsim.spec.scenario import ModelUse

from .kernels import Numbers
from .operators import NO_TIME, Operators, OperatorTime, adam_bytes, total
from .pipeline import PipelineSegment, Role
from .segment import HostSegment, Op, Segment, Transfer

Lengths = Sequence[np.ndarray]

# In which backward passes gradients are reduced: of every micro-batch, of the last, or once all have ended.
Reduced = Literal["each", "last", "after"]

# Parameters that one gather of updated weights covers: default of allgather_bucket_size, DeepSpeed,
# deepspeed/runtime/zero/config.py at 1b88ac36.
ALLGATHER_BUCKET_PARAMETERS = 5e8


@dataclass(frozen=True)
class Layout:
    """The ranks of a place: tensor-parallel ranks are neighbours, then those that share sequences, then data-parallel
    replicas, then pipeline stages.

    That is Megatron-LM's default order (tp-cp-ep-dp-pp). Routed experts are split in an order of their own over the
    ranks of a stage: the tensor-parallel ranks of an expert are neighbours, then those of the other experts.
    """

    ranks: tuple[int, ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    experts: ExpertSplit = UNSPLIT
    context_parallel: int = 1

    def __post_init__(self) -> None:
        if len(self.ranks) % (self.tensor_parallel * self.context_parallel * self.pipeline_parallel):
            shared = f"context_parallel {self.context_parallel} x " if self.context_parallel > 1 else ""
            raise InputError(
                f"{len(self.ranks)} ranks cannot be split in replicas of tensor_parallel {self.tensor_parallel} x "
                f"{shared}pipeline_parallel {self.pipeline_parallel}"
            )

    @classmethod
    def of(cls, ranks: Sequence[int], use: ModelUse) -> Layout:
        return cls(tuple(ranks), use.tensor_parallel, use.pipeline_parallel, use.expert_split(), use.context_parallel)

    @property
    def replicas(self) -> int:
        return self.copies // self.context_parallel

    @property
    def copies(self) -> int:
        """Ranks that hold the same part of the weights."""
        return len(self.ranks) // (self.tensor_parallel * self.pipeline_parallel)

    @cached_property
    def grid(self) -> np.ndarray:
        """Ranks by (stage, copy of the weights, shard); a replica is so many copies in a row as share its sequences."""
        return np.array(self.ranks).reshape(self.pipeline_parallel, self.copies, self.tensor_parallel)

    @cached_property
    def context_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that share sequences and hold the same shard."""
        grid = self.grid.reshape(-1, self.context_parallel, self.tensor_parallel)
        return as_groups(grid.transpose(0, 2, 1).reshape(-1, self.context_parallel))

    @cached_property
    def tensor_groups(self) -> tuple[tuple[int, ...], ...]:
        return as_groups(self.grid.reshape(-1, self.tensor_parallel))

    @cached_property
    def data_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same shard of the weights, one of every copy."""
        return as_groups(self.grid.transpose(0, 2, 1).reshape(-1, self.copies))

    @cached_property
    def expert_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold all routed experts together and exchange tokens."""
        return as_groups(self._expert_grid.transpose(0, 2, 1).reshape(-1, self.experts.parallel))

    @cached_property
    def expert_tensor_groups(self) -> tuple[tuple[int, ...], ...]:
        return as_groups(self._expert_grid.reshape(-1, self.experts.tensor))

    @cached_property
    def expert_data_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same shard of the same experts."""
        by_stage = self._expert_grid.reshape(self.pipeline_parallel, -1, self.experts.parallel, self.experts.tensor)
        return as_groups(by_stage.transpose(0, 2, 3, 1).reshape(-1, by_stage.shape[1]))

    @property
    def _expert_grid(self) -> np.ndarray:
        """Ranks by (set of all experts, part of the experts, shard of an expert); sets lie within a stage."""
        return self.grid.reshape(-1, self.experts.parallel, self.experts.tensor)

    @cached_property
    def hops(self) -> tuple[tuple[int, ...], ...]:
        """(source, destination) of the activations between neighbouring stages."""
        return as_groups(np.stack([self.grid[:-1].ravel(), self.grid[1:].ravel()], axis=-1))

    @property
    def single_ranks(self) -> tuple[tuple[int, ...], ...]:
        return tuple((rank,) for rank in self.ranks)


@dataclass(frozen=True)
class Host:
    """What offloaded work shares: the memory bandwidth of a node. rank_nodes: the node of every rank of the cluster."""

    memory_bytes_per_second: float
    rank_nodes: Sequence[int]

    def sharing_ranks(self, layout: Layout) -> np.ndarray:
        """Of each replica: how many of the layout's ranks are on its fullest node."""
        nodes = np.asarray(self.rank_nodes)[layout.grid]
        _, inverse, counts = np.unique(nodes, return_inverse=True, return_counts=True)
        by_replica = counts[inverse].reshape(layout.pipeline_parallel, layout.replicas, -1)
        return np.asarray(by_replica.max(axis=(0, 2)))


def micro_batches(lengths: Lengths, samples: int, tokens: int | None = None, *, multiple_of: int = 1) -> np.ndarray:
    """Token counts, shape (replicas, micro-batches, samples), filled up with zeros.

    Of so many samples in the given order, or of at most so many tokens. Every replica has a first micro-batch; uneven
    numbers are filled up with empty ones.
    """
    if tokens is not None:
        return packed_micro_batches(lengths, tokens, multiple_of=multiple_of)
    count = max(1, max((-(-len(own) // samples) for own in lengths), default=1))
    batches = np.zeros((len(lengths), count, samples))
    for batch, own in zip(batches, lengths, strict=True):
        batch.reshape(-1)[: len(own)] = own
    return batches


# --- scoring ---------------------------------------------------------------------------------------------------------


def score_program(
    use: ModelUse, lengths: Lengths, layout: Layout, operators: Operators, *, head: Head = "lm"
) -> list[Segment]:
    """One forward pass over all samples, micro-batch by micro-batch: log-probs or values."""
    batches = micro_batches(lengths, use.score_micro_batch_samples, use.score_micro_batch_tokens)
    work = _Work(use, batches, layout, operators, head)
    load = _load_parameters(use, work, head)
    if use.pipeline_parallel > 1 and operators.effects.efficiency:
        return [*load, work.pipeline("forward")]
    zero3 = use.zero_stage == 3
    layers = _Part(work.layer_forward(), use.shape.layers, work.gathers_layer() + work.inside_forward())
    ends = _Part(work.ends_forward(), 1, work.gathers_ends() + work.tensor_ends())
    engine = work.engine("forward") if zero3 else []  # what is not sharded is scored without an engine
    overlapped = zero3 or use.overlap_tensor_parallel
    return [*load, work.segment("forward", [layers, ends, *engine], overlapped=overlapped, lockstep=zero3)]


# --- training --------------------------------------------------------------------------------------------------------


def train_program(
    use: ModelUse,
    lengths: Lengths,
    layout: Layout,
    operators: Operators,
    *,
    head: Head = "lm",
    host: Host | None = None,
    first: bool = True,
    last: bool = True,
) -> list[Segment]:
    """One minibatch: forward, recomputation and backward of every micro-batch, gradient reduction, optimizer step.

    ZeRO-3 gathers a layer's weights for the forward, and once more for recomputation and backward, which share it:
    DeepSpeed keeps what is used again within `stage3_max_reuse_distance` (1e9 parameters by default; deepspeed/runtime/
    zero/partitioned_param_coordinator.py, `__params_to_release`), FSDP unshards once before a checkpointed layer's
    backward. Gradients are reduced in the precision in which they are kept.
    Reductions hide behind the backward, or follow the last one, as `ModelUse.reduces_beside` says. With tensor,
    pipeline or expert parallelism ZeRO-2 is as ZeRO-1.
    `host` is needed for an offloaded optimizer. first, last: of the updates between two other uses of the weights; only
    between updates can the gather of updated weights wait for the next forward pass.
    """
    # The interleaved schedule wants whole rounds of its stages.
    whole = use.pipeline_parallel if use.pipeline_chunks > 1 else 1
    batches = micro_batches(lengths, use.micro_batch_samples, use.micro_batch_tokens, multiple_of=whole)
    work = _Work(use, batches, layout, operators, head)
    program = _load_parameters(use, work, head)
    if use.pipeline_parallel > 1 and operators.effects.efficiency:
        beside = operators.gpu.overlaps_communication
        reduced: Reduced = "last" if use.reduces_beside and beside else "after"
        gathered = use.gathers_ahead and not first and beside
        program.append(work.pipeline("forward_backward", reduced, gathered=gathered))
        program += work.reduction_after() if reduced == "after" else []
    elif use.zero_stage == 3:
        program.append(work.segment("forward_backward", work.passes_zero3(), overlapped=True, lockstep=True))
    elif use.zero_stage == 2 and use.ranks_together == 1:
        parts = work.passes("each", gathered=use.gathers_ahead and not first)
        every = work.segment("forward_backward", parts, overlapped=True)
        program += _by_micro_batch(every, work.batches.shape[1])
    else:
        reduced = "last" if use.reduces_beside else "after"
        parts = work.passes(reduced, gathered=use.gathers_ahead and not first)
        overlapped = use.reduces_beside or use.overlap_tensor_parallel
        program.append(work.segment("forward_backward", parts, overlapped=overlapped))
        program += work.reduction_after() if reduced == "after" else []
    return program + _optimizer_program(use, work, host, gather=last or not use.gathers_ahead)


def _optimizer_program(use: ModelUse, work: _Work, host: Host | None, *, gather: bool) -> list[Segment]:
    """Adam on this rank's share (on the GPU or the host), and the gather of updated weights under ZeRO-1 and 2.

    gather: not left to the next forward pass.
    """
    trained, width = work.trained_rank_parameters(), use.bytes_per_parameter
    routed = work.trained_rank_routed_parameters()
    share = Shards.of(use, work.layout.copies).largest(trained, routed, 1)
    if use.offload_optimizer and work.operators.effects.sync:
        if host is None:
            raise InputError("offload_optimizer needs the host's memory bandwidth", field="offload_optimizer")
        single, here = work.layout.single_ranks, (1 - use.offload_optimizer_fraction) * share
        share -= here
        adam = work.operators.optimizer_step_host(
            use, share, host.memory_bytes_per_second, host.sharing_ranks(work.layout)
        )
        if here:  # the two halves of the optimizer work at the same time
            adam = np.maximum(adam, float(work.operators.optimizer_step(use, here).seconds))
        streamed = Transfer("host_memory", single, adam_bytes(use) * share)
        leaving = [] if use.offload_gradients else [Transfer("to_host", single, share * use.gradient_bytes)]
        program = [
            *(work.transfer_only("gradients_to_host", t) for t in leaving),
            HostSegment("optimizer", adam[:, None], transfers=(streamed,), bound={"host": float(adam.mean())}),
            work.transfer_only("weights_from_host", Transfer("from_host", single, share * width)),
        ]
    else:
        program = [work.uniform("optimizer", work.operators.optimizer_step(use, share))]
    program += [work.uniform("engine_step", part.time) for part in work.engine("step")]
    if use.zero_stage in (1, 2) and gather:
        program += [work.transfer_only("gather_weights", t) for t in work.gathers_updated(trained, routed)]
    return program


def _load_parameters(use: ModelUse, work: _Work, head: Head) -> list[Segment]:
    """Offloaded weights come from the host before the pass; under ZeRO-3 they come with each gather instead."""
    if not use.offload_parameters or use.zero_stage == 3 or not work.operators.effects.sync:
        return []
    held = _largest_stage(use, head) * use.bytes_per_parameter
    return [work.transfer_only("weights_from_host", Transfer("from_host", work.layout.single_ranks, held))]


def layer_matrices(spec: ModelSpec, kind: LayerKind = DENSE) -> int:
    """Weight matrices of a layer; qkv is one product, as are gate and up. Linear attention has its convolution too."""
    if kind.linear:
        return len(linear_attention.projections(spec)) + 2 + 2 + spec.gated_mlp
    return len(layer_gemms(spec)) + 2 + spec.gated_mlp


def end_matrices(spec: ModelSpec, head: Head = "lm") -> int:
    """Embedding and head; a value head is too small to be sharded."""
    return 1 if head != "lm" or spec.tied_embeddings else 2


def weight_tensors(spec: ModelSpec) -> int:
    """Matrices and norms of a model with a language-model head, each a call of DeepSpeed's GatheredParameters (counted
    with 0.19.8, `python -m real.microbench`)."""
    return _matrices(spec) + spec.layers * spec.norms_per_layer + end_matrices(spec) + 1


def _matrices(spec: ModelSpec) -> int:
    """Of all layers."""
    return sum(count * layer_matrices(spec, kind) for kind, count in spec.layer_kinds().items())


def controller_program(moved_bytes: float, operators: Operators, replicas: int = 1) -> list[Segment]:
    """A single controller serialises what it hands out and collects, one worker after the other; none without one."""
    overheads, rate = operators.overheads, operators.overheads.controller_bytes_per_second
    seconds = overheads.controller_call_seconds + (moved_bytes / rate if rate else 0.0)
    if not seconds or operators.ideal:
        return []
    return [Segment("controller", np.full((replicas, 1), seconds), bound={"host": seconds})]


def firing_program(operators: Operators) -> list[Segment]:
    """What the host needs to begin and end a stage's turn; nothing where it was not measured."""
    seconds = operators.overheads.firing_seconds
    if not seconds or operators.ideal:
        return []
    return [Segment("firing", np.full((1, 1), seconds), bound={"host": seconds})]


# --- building segments -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Work that every micro-batch repeats so many times, and its transfers (payloads per micro-batch)."""

    time: OperatorTime
    repeats: float
    transfers: tuple[Transfer, ...] = ()


class _Work:
    """The micro-batches of one place: operator times of shape (replicas, micro-batches), and their transfers."""

    def __init__(self, use: ModelUse, batches: np.ndarray, layout: Layout, operators: Operators, head: Head) -> None:
        self.use, self.batches, self.layout, self.operators, self.head = use, batches, layout, operators, head
        # Of one rank: what ranks share is padded to a multiple of them.
        self.tokens = np.ceil(batches.sum(axis=-1) / use.context_parallel)
        self.trainable: Literal["all", "lora"] = "lora" if use.lora_rank else "all"
        self.trained_layers = use.trainable_layers or use.shape.layers

    # Operator times.

    def layer_forward(self) -> OperatorTime:
        t, ops = self.use.tensor_parallel, self.operators
        return ops.with_launches(ops.layer_forward(self.use, self.tokens, t) + self.attention())

    def attention(self, *, backward: bool = False) -> OperatorTime:
        """Of whole sequences; ranks that share them have equal parts (of heads, or early and late pieces)."""
        degree = self.use.tensor_parallel * self.use.context_parallel
        return self.operators.attention_prefill(self.use, self.batches, degree, backward=backward)

    def layer_backward(self) -> OperatorTime:
        """Backward of a trained layer, after what has to be computed again."""
        t, ops, use = self.use.tensor_parallel, self.operators, self.use
        attention = self.attention(backward=True)
        time = ops.with_backward_launches(ops.layer_backward(use, self.tokens, t, self.trainable) + attention)
        if use.recompute == "full":
            return time + self.layer_forward()
        if use.recompute == "selective":
            return time + self.attention()
        return time

    def embedding(self) -> OperatorTime:
        return self.operators.embedding(self.use, self.tokens)

    def head_forward(self) -> OperatorTime:
        return self.operators.head_forward(self.use, self.tokens, self.use.tensor_parallel, self.head)

    def head_backward(self) -> OperatorTime:
        trained = self.trainable == "all"
        return self.operators.head_backward(self.use, self.tokens, self.use.tensor_parallel, self.head, trained=trained)

    def ends_forward(self) -> OperatorTime:
        return self.embedding() + self.head_forward() + self.operators.pass_launches(self.tokens)

    def ends_backward(self) -> OperatorTime:
        trains_all = self.trainable == "all" and self.trained_layers == self.use.shape.layers
        time = self.head_backward() + self.operators.pass_launches(self.tokens)
        return time + self.embedding() if trains_all else time

    def engine(self, *phases: EnginePhase) -> list[_Part]:
        """What DeepSpeed adds on the host to each micro-batch, on ranks without tokens too."""
        count = parameters(self.use.shape, self.head)
        time = total(self.operators.engine_launches(self.use, phase, count) for phase in phases)
        return [_Part(time, 1)] if time.seconds else []

    # Parameters.

    def trained_layer_parameters(self) -> float:
        """Of the mean layer on one rank."""
        spec, t = self.use.shape, self.use.tensor_parallel
        if self.use.lora_rank:
            return self.use.lora_parameters(1) / t
        return layers_parameters(spec, t, self.use.expert_split()) / spec.layers

    def _layer_routed_parameters(self) -> float:
        """The part of `trained_layer_parameters` that is in routed experts."""
        spec, t = self.use.shape, self.use.tensor_parallel
        return 0.0 if self.use.lora_rank else layers_routed_parameters(spec, t, self.use.expert_split()) / spec.layers

    def trained_end_parameters(self) -> float:
        """Embedding and head on one rank; neither with LoRA, only the head with the lower layers frozen."""
        if self.use.lora_rank:
            return 0.0
        spec, t = self.use.shape, self.use.tensor_parallel
        head = head_parameters(spec, self.head, t)
        return head + (embedding_parameters(spec, t) if self.trained_layers == spec.layers else 0)

    def trained_rank_parameters(self) -> float:
        """On the fullest pipeline stage."""
        return trained_parameters(self.use, self.head, self._fullest_stage())

    def trained_rank_routed_parameters(self) -> float:
        """The part of them that is in routed experts."""
        return trained_routed_parameters(self.use, self._fullest_stage())

    def _fullest_stage(self) -> int:
        return max(_different_stages(self.use), key=lambda stage: trained_parameters(self.use, self.head, stage))

    def replicated(self, count: float, routed: float) -> list[tuple[tuple[tuple[int, ...], ...], float]]:
        """Groups of ranks with the same parameters, and how many: routed experts are copied on fewer ranks."""
        if self.layout.experts == ExpertSplit(1, self.use.tensor_parallel):
            parts = [(self.layout.data_groups, count)]
        else:
            parts = [(self.layout.data_groups, count - routed), (self.layout.expert_data_groups, routed)]
        return [(groups, number) for groups, number in parts if len(groups[0]) > 1 and number]

    # Transfers.

    def gathers_updated(self, count: float, routed: float) -> list[Transfer]:
        """ZeRO-1 and 2: of so many updated weights, `routed` of them in routed experts."""
        width = self.use.bytes_per_parameter
        return [
            Transfer("all_gather", groups, number * width, messages_of(number, ALLGATHER_BUCKET_PARAMETERS))
            for groups, number in self.replicated(count, routed)
        ]

    def gathers_layer(self, *, one_by_one: bool = False) -> tuple[Transfer, ...]:
        spec, use = self.use.shape, self.use
        held = layers_parameters(spec, use.tensor_parallel, use.expert_split())
        return self._gathers(held / spec.layers, _matrices(spec) / spec.layers if one_by_one else 0)

    def gathers_ends(self, *, one_by_one: bool = False) -> tuple[Transfer, ...]:
        spec, matrices = self.use.shape, end_matrices(self.use.shape, self.head) if one_by_one else 0
        t = self.use.tensor_parallel
        return self._gathers(embedding_parameters(spec, t) + head_parameters(spec, self.head, t), matrices)

    def _gathers(self, count: float, matrices: float = 0) -> tuple[Transfer, ...]:
        """ZeRO-3: weights of this rank's part from all ranks, ahead of their use; offloaded shards cross PCIe first.

        A forward pass fetches a bucket at a time, across the bounds of layers; a backward pass one of `matrices` at a
        time. DeepSpeed fetches ahead along the trace of an earlier pass, and the backward pass never meets the trace
        that it would need: forward passes alone (generation, scoring) come between updates. Counted with DeepSpeed
        0.19.8 at its defaults: one call in the forward pass of a model smaller than the bucket, one for each matrix in
        the backward pass, embedding and head among them (`python -m real.microbench`, column collectives).
        """
        if self.use.zero_stage != 3:
            return ()
        payload, groups = count * self.use.bytes_per_parameter, self.use.shard_groups(self.layout.ranks)
        whole = held_parameters(self.use, self.head)
        ahead = messages_of(whole, PREFETCH_PARAMETERS) * count / whole
        messages = max(matrices, ahead)
        load: tuple[Transfer, ...] = ()
        blocking = not self.use.gathers_ahead
        if self.use.offload_parameters and self.operators.effects.sync:
            shard = payload / len(groups[0]) * (2 if self.use.shards_master else 1)  # in fp32
            load = (Transfer("from_host", self.layout.single_ranks, shard, messages, blocking),)
        return load + ((Transfer("all_gather", groups, payload, messages, blocking),) if len(groups[0]) > 1 else ())

    def reduces(self, count: float, routed: float = 0.0) -> tuple[Transfer, ...]:
        """The gradients of `count` parameters, `routed` of them in routed experts, over the ranks that have copies.

        Shards of a group of ranks are summed with those of the other groups. Buckets cross the bounds of layers. ZeRO-1
        and 2 of DeepSpeed reduce whole buckets to every rank, which then keeps its part (deepspeed/runtime/zero/
        stage_1_and_2.py, `allreduce_and_scatter`: `use_multi_rank_bucket_allreduce` is true by default in 0.19.8).
        Megatron's distributed optimizer scatters them.
        """
        stage = self.use.zero_stage
        op: Op = "reduce_scatter" if stage == 3 or (stage and self.use.ranks_per_replica > 1) else "all_reduce"

        def messages(number: float) -> float:
            trained = self.trained_rank_parameters()
            return messages_of(trained, REDUCE_BUCKET_PARAMETERS) * number / trained

        width, blocking = self.use.gradient_bytes, not self.use.reduces_beside
        if self.use.shard_ranks:
            inside = self.use.shard_groups(self.layout.ranks)
            across, shard = self._across(inside), count * width / self.use.shard_ranks
            both = (
                Transfer("reduce_scatter", inside, count * width, messages(count), blocking),
                Transfer("all_reduce", across, shard, messages(count), blocking),
            )
            return tuple(t for t in both if len(t.groups[0]) > 1)
        return tuple(
            Transfer(op, groups, number * width, messages(number), blocking)
            for groups, number in self.replicated(count, routed)
        )

    def _across(self, inside: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Ranks with the same shard of the same tensor-parallel part, of groups that each hold that part once."""
        size = len(inside) // self.use.tensor_parallel
        parts = (inside[first : first + size] for first in range(0, len(inside), size))
        return tuple(shard for part in parts for shard in zip(*part, strict=True))

    # What a layer leaves on the host, over PCIe beside its own compute: a copy takes longer only where that is shorter.

    def layer_leaves(self) -> tuple[Transfer, ...]:
        """Offloaded activations of the mean layer, from its forward."""
        return self._activations("to_host", self.layer_forward())

    def layer_returns(self) -> tuple[Transfer, ...]:
        """They come back for its backward; its offloaded gradients leave."""
        return self._activations("from_host", self.layer_backward()) + self.gradients_leave(
            self.trained_layer_parameters(), self.layer_backward()
        )

    def _activations(self, op: Op, beside: OperatorTime) -> tuple[Transfer, ...]:
        use, kinds = self.use, self.use.shape.layer_kinds()
        if not use.offload_activations or not self.operators.effects.sync:
            return ()
        # Without the scores of attention no layer keeps anything that depends on the length of its sequences.
        layers = use.shape.layers
        per_token = sum(n / layers * kept_activation_bytes(use, 1, kind) for kind, n in kinds.items())
        trained = self.trained_layers / layers if op == "to_host" else 1.0
        return (self._to_or_from_host(op, trained * per_token * self.tokens.mean(axis=0), beside),)

    def gradients_leave(self, count: float, beside: OperatorTime = NO_TIME) -> tuple[Transfer, ...]:
        """Offloaded gradients of `count` parameters, this rank's share; those of earlier micro-batches come first.

        Both ways go through the one stream in which gradients are reduced, one after the other (DeepSpeed 0.13.2 and
        0.19.8, deepspeed/runtime/zero/stage3.py, `partition_grads`; stage_1_and_2.py, `async_accumulate_grad_in_cpu_
        via_gpu`), so half of the compute hides each, and none does where reductions wait for it.
        """
        use = self.use
        if not use.offload_gradients or not self.operators.effects.sync:
            return ()
        width = 4 if use.host_gradient_precision else use.gradient_bytes
        share = Shards.of(use, self.layout.copies).largest(count, 0.0, 2) * width
        earlier = np.ones(self.batches.shape[1])
        earlier[0] = 0.0
        beside = beside if use.reduces_beside else NO_TIME
        back = self._to_or_from_host("from_host", share, beside * 0.5)
        leaving = self._to_or_from_host("to_host", share, beside * (1 - earlier / 2))
        return (_scaled(back, earlier), leaving)

    def _to_or_from_host(self, op: Op, payload: Numbers, beside: OperatorTime) -> Transfer:
        hidden: Numbers = 0.0
        if self.operators.gpu.overlaps_communication:
            hidden = np.broadcast_to(np.asarray(beside.seconds), self.tokens.shape).mean(axis=0)
        return Transfer(op, self.layout.single_ranks, payload, blocking=True, hidden_seconds=hidden)

    def tensor_forward(self, collectives: float = 2) -> tuple[Transfer, ...]:
        """Collectives over activations; one layer's forward has two, after attention and after the MLP.

        All-reduces, or all-gather and reduce-scatter with sequence parallelism (Korthikanti et al., "Reducing
        Activation Recomputation in Large Transformer Models", 2022, section 4.2.2). The backward has as many; the
        all-gather that it adds hides behind a product there.
        """
        if self.use.tensor_parallel == 1:
            return ()
        payload = collectives * self.tokens.mean(axis=0) * self.use.shape.hidden * self.use.bytes_per_parameter
        ops: tuple[Op, ...] = ("all_gather", "reduce_scatter") if self.use.sequence_parallel else ("all_reduce",)
        return tuple(Transfer(op, self.layout.tensor_groups, payload, collectives, blocking=True) for op in ops)

    def inside_forward(self) -> tuple[Transfer, ...]:
        """What the ranks of a replica, and those that share experts, exchange in a forward pass of the mean layer."""
        return self._between(1) + self.context(1)

    def _between(self, passes: int) -> tuple[Transfer, ...]:
        """Collectives between the operators of the mean layer in so many passes.

        Where experts are split in their own way, their all-to-alls take the place of the MLP's collective, unless a
        shared expert needs that too.
        """
        exchange = self.exchange(passes)
        instead = self.expert_share if exchange and not self.use.shape.shared_expert_ffn else 0
        return self._beside_products(self.tensor_forward(passes * (2 - instead))) + exchange

    def context(self, passes: int, *, backward: bool = False) -> tuple[Transfer, ...]:
        """What ranks that share sequences exchange for the attention of one layer, in so many passes.

        ring: keys and values of c - 1 other ranks pass by, with their gradients in the backward, while the attention
        with the piece before is computed; that takes a c-th of the whole each. all_gather: keys and values of whole
        sequences; the backward gathers them again and scatters their gradients. all_to_all: queries, keys, values and
        outputs, or their gradients (Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509, 2023, section 3); KV heads
        are repeated until every rank has one (verl, verl/models/transformers/monkey_patch.py).
        """
        use, shape, t, c = self.use, self.use.shape, self.use.tensor_parallel, self.use.context_parallel
        if c == 1 or not passes:
            return ()
        groups = self.layout.context_groups
        per_head = self.tokens.mean(axis=0) * use.bytes_per_parameter * passes
        widths = shape.head_dim + shape.value_head_dim
        kv_heads = kv_heads_per_rank(shape, t)
        if use.context_exchange == "all_to_all":
            sent = per_head * widths * (shape.heads // t + max(kv_heads, c))
            return (Transfer("all_to_all", groups, sent, 4.0 * passes, blocking=True),)
        kv = per_head * widths * kv_heads
        if use.context_exchange == "all_gather":
            gather = Transfer("all_gather", groups, c * kv, 2.0 * passes, blocking=True)
            scatter = Transfer("reduce_scatter", groups, c * kv, 2.0 * passes, blocking=True)
            return (gather, scatter) if backward else (gather,)
        pairs = tuple(
            (rank, other) for group in groups for rank, other in zip(group, group[1:] + group[:1], strict=True)
        )
        hidden: Numbers = 0.0
        if self.operators.gpu.overlaps_communication:
            attention = np.asarray(self.attention(backward=backward).seconds).mean(axis=0)
            hidden = passes * (c - 1) / c * attention
        sent = (c - 1) * kv * (2 if backward else 1)
        return (Transfer("send", pairs, sent, passes * (c - 1.0), blocking=True, hidden_seconds=hidden),)

    def _beside_products(self, transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
        """The first piece of each collective, of as many as ranks, blocks; the others run beside the layer's products.

        As in Transformer Engine's ring exchange of user buffers, where a product starts with the piece that is there
        (unverified). Here they may hide behind all of a layer's compute, which is products for the most part.
        """
        if not self.use.overlap_tensor_parallel:
            return transfers
        first = 1 / self.use.tensor_parallel
        return tuple(
            _scaled(replace(t, blocking=blocking), share)
            for t in transfers
            for blocking, share in ((False, 1 - first), (True, first))
        )

    def inside_backward(self) -> tuple[Transfer, ...]:
        """With full recomputation the forward's collectives are repeated too."""
        again = self.use.recompute == "full"
        others = self._between(2 if again else 1)
        return others + self.context(int(self.use.recompute != "none")) + self.context(1, backward=True)

    @property
    def expert_share(self) -> float:
        """Of the layers, those with experts."""
        kinds = self.use.shape.layer_kinds()
        return sum(count for kind, count in kinds.items() if kind.experts) / self.use.shape.layers

    def exchange(self, passes: int) -> tuple[Transfer, ...]:
        """Dispatch to the experts and combination of their outputs, in so many passes of the mean layer.

        Each rank sends its tokens once to each of their experts (`model.expert_exchange_bytes`); with tensor-parallel
        experts the ranks of one expert then gather what each has received, and scatter the sums. The busiest rank
        receives `routing_imbalance` times the mean.
        """
        use, spec, split = self.use, self.use.shape, self.use.expert_split()
        if split == ExpertSplit(1, use.tensor_parallel):
            return ()
        rows = self.tokens.mean(axis=0) / use.tensor_parallel * spec.experts_per_token
        if self.operators.effects.efficiency:
            rows = rows * use.routing_imbalance
        one = rows * spec.hidden * use.bytes_per_parameter * self.expert_share * passes
        calls = self.expert_share * passes
        transfers: list[Transfer] = []
        if split.parallel > 1:
            transfers.append(Transfer("all_to_all", self.layout.expert_groups, 2 * one, 2 * calls, blocking=True))
        if split.tensor > 1:
            groups = self.layout.expert_tensor_groups
            transfers += [
                Transfer("all_gather", groups, one * split.tensor, calls, blocking=True),
                Transfer("reduce_scatter", groups, one * split.tensor, calls, blocking=True),
            ]
        return tuple(transfers)

    def tensor_ends(self) -> tuple[Transfer, ...]:
        """Vocabulary-parallel embedding (forward) or head (backward): one collective over activations."""
        return self.tensor_forward(1)

    # Passes of training: parts in the order backward of layers, forward of layers, ends.

    def passes(self, reduced: Reduced, *, gathered: bool = False) -> list[_Part]:
        """Forward and backward with full weights; gradients are reduced in each or the last micro-batch, or not here.

        Order among the micro-batches of a step is free, so the first, which every replica has, is taken as the last.
        gathered: updated weights come beside the first forward pass; embedding and head have nothing to hide behind.
        """
        layers, spec = self.trained_layers, self.use.shape
        in_layer = self.trained_layer_parameters(), self._layer_routed_parameters()
        in_ends = self.trained_end_parameters(), 0.0
        of_layer, of_ends = (() if reduced == "after" else self.reduces(*part) for part in (in_layer, in_ends))
        if reduced == "last":
            of_layer, of_ends = self._only_in_first(of_layer), self._only_in_first(of_ends)
        updated_layer: tuple[Transfer, ...] = ()
        updated_ends: tuple[Transfer, ...] = ()
        if gathered:
            share = layers / spec.layers
            updated_layer = self._only_in_first(tuple(_scaled(t, share) for t in self.gathers_updated(*in_layer)))
            ends = self.gathers_updated(*in_ends)
            updated_ends = self._only_in_first(tuple(replace(t, blocking=True) for t in ends))
        return [
            _Part(self.layer_backward(), layers, of_layer + self.inside_backward() + self.layer_returns()),
            _Part(self.layer_forward(), spec.layers, updated_layer + self.inside_forward() + self.layer_leaves()),
            _Part(self.ends_forward(), 1, updated_ends + self.tensor_ends()),
            _Part(self.ends_backward(), 1, of_ends + self.tensor_ends() + self.gradients_leave(in_ends[0])),
            *self.engine("forward", "backward"),
        ]

    def passes_zero3(self) -> list[_Part]:
        """Forward and backward with weights gathered for each, gradients reduced at every backward."""
        gather, gather_ends = self.gathers_layer(), self.gathers_ends()
        return [
            _Part(self.layer_forward(), self.use.shape.layers, gather + self.inside_forward() + self.layer_leaves()),
            _Part(
                self.layer_backward(),
                self.trained_layers,
                self.gathers_layer(one_by_one=True)
                + self.reduces(self.trained_layer_parameters())
                + self.inside_backward()
                + self.layer_returns(),
            ),
            _Part(self.ends_forward(), 1, gather_ends + self.tensor_ends()),
            _Part(
                self.ends_backward(),
                1,
                self.gathers_ends(one_by_one=True)
                + self.reduces(self.trained_end_parameters())
                + self.tensor_ends()
                + self.gradients_leave(self.trained_end_parameters()),
            ),
            *self.engine("forward", "backward"),
        ]

    def _only_in_first(self, transfers: tuple[Transfer, ...]) -> tuple[Transfer, ...]:
        first = np.zeros(self.batches.shape[1])
        first[0] = 1.0
        return tuple(_scaled(t, first) for t in transfers)

    def reduction_after(self) -> list[Segment]:
        """The reduction of all gradients once the last backward has ended."""
        reduced = self.reduces(self.trained_rank_parameters(), self.trained_rank_routed_parameters())
        return [self.transfer_only("reduce_gradients", t) for t in reduced]

    # Segments.

    def segment(
        self, label: str, parts: Sequence[_Part], *, overlapped: bool = False, lockstep: bool = False
    ) -> Segment:
        """All micro-batches of all parts; the kinds are part by part, micro-batch by micro-batch."""
        count = self.batches.shape[1]
        compute = np.concatenate([self._spread(part.time.seconds) for part in parts], axis=1)
        # Only without bubbles does a pipeline come here: its stages then share the work evenly.
        stages = self.use.pipeline_parallel
        repeats = np.repeat([part.repeats / stages for part in parts], count)
        bound: dict[str, float] = {}
        for part in parts:
            add_bound(bound, part.time, part.repeats / stages, len(self.batches))
        transfers = _merge([part.transfers for part in parts], count)
        return Segment(label, compute, repeats, transfers, int(overlapped), lockstep, bound)

    def _spread(self, seconds: Numbers) -> np.ndarray:
        """Seconds as (replicas, micro-batches); without imbalance every replica has the mean."""
        seconds = np.broadcast_to(np.asarray(seconds, dtype=float), self.tokens.shape)
        if self.operators.ideal:
            seconds = np.broadcast_to(seconds.mean(axis=0), seconds.shape)
        return seconds

    def uniform(self, label: str, time: OperatorTime) -> Segment:
        """The same on every replica."""
        bound: dict[str, float] = {}
        add_bound(bound, time, 1, 1)
        return Segment(label, np.full((len(self.batches), 1), float(time.seconds)), bound=bound)

    def transfer_only(self, label: str, transfer: Transfer) -> Segment:
        return Segment(label, np.zeros((len(self.batches), 1)), transfers=(transfer,))

    def pipeline(self, label: str, reduced: Reduced | None = None, *, gathered: bool = False) -> PipelineSegment:
        """1F1B over the pipeline stages; embedding and head are at the two ends.

        reduced: None: forward passes only. gathered: updated weights come beside the first forward passes.
        """
        backward = reduced is not None
        use, spec = self.use, self.use.shape
        stages, virtual = use.pipeline_parallel, use.pipeline_parallel * use.pipeline_chunks
        if spec.layers % virtual and not use.given_stages:
            raise InputError(
                f"{spec.layers} layers cannot be split evenly in {stages} stages x {use.pipeline_chunks} chunks",
                field="pipeline_chunks",
            )
        counts = [spec.layers // virtual] * virtual
        if use.given_stages:
            counts = [len(use.stage_layers(stage)) for stage in range(stages)]
        ends, frozen = np.cumsum(counts).tolist(), spec.layers - self.trained_layers
        layer, embedding, head = self.layer_forward(), self.embedding(), self.head_forward()
        forward = _stack([layer * count for count in counts], first=embedding, last=head)
        trained = [max(0, min(count, end - frozen)) for count, end in zip(counts, ends, strict=True)]
        back = None
        times = [(layer, spec.layers), (embedding, 1), (head, 1)]
        if backward:
            layer_back, head_back = self.layer_backward(), self.head_backward()
            back = _stack([layer_back * n for n in trained], first=NO_TIME, last=head_back)
            times += [(layer_back, self.trained_layers), (head_back, 1)]
        busy = (forward.sum(axis=0) + (back.sum(axis=0) if back is not None else 0.0)).T / stages
        bound: dict[str, float] = {}
        for time, repeats in times:
            add_bound(bound, time, repeats / stages, len(self.batches))
        per_stage = spec.layers / stages
        ahead, behind = self.inside_forward(), self.inside_backward()
        if backward:
            ahead, behind = ahead + self.layer_leaves(), behind + self.layer_returns()
        collectives: list[tuple[Role, Transfer]] = [("forward", _scaled(t, per_stage)) for t in ahead]
        if backward:
            collectives += [("backward", _scaled(t, per_stage)) for t in behind]
        whole = self.trained_rank_parameters(), self.trained_rank_routed_parameters()
        if reduced == "last":
            collectives += [("reduce", t) for t in self._only_in_first(self.reduces(*whole))]
        if gathered:
            collectives += [("gather", t) for t in self._only_in_first(tuple(self.gathers_updated(*whole)))]
        hop_bytes = self.tokens.mean(axis=0) * spec.hidden * use.bytes_per_parameter
        hop = Transfer("send", self.layout.hops, hop_bytes / (use.tensor_parallel if use.sequence_parallel else 1))
        roles, transfers = zip(*collectives, ("hop", hop), strict=True)
        return PipelineSegment(
            label,
            busy,
            np.ones(self.batches.shape[1]),
            transfers,
            int(use.overlap_tensor_parallel),
            bound=bound,
            stages=stages,
            forward_seconds=forward,
            backward_seconds=back,
            roles=roles,
            pieces=spec.layers / virtual,
        )


def _by_micro_batch(segment: Segment, count: int) -> list[Segment]:
    """One segment for each micro-batch, after each of which the replicas meet."""
    mean = segment.compute_seconds.mean(axis=0) * segment.repeats
    pieces = []
    for own in (slice(k, None, count) for k in range(count)):
        share = float(mean[own].sum() / mean.sum()) if mean.sum() else 0.0
        transfers = tuple(
            replace(
                t,
                payload_bytes=np.asarray(t.payload_bytes)[own],
                messages=np.asarray(t.messages)[own],
                hidden_seconds=np.broadcast_to(t.hidden_seconds, len(segment.repeats))[own],
            )
            for t in segment.transfers
        )
        bound = {limit: seconds * share for limit, seconds in segment.bound.items()}
        piece = replace(
            segment, compute_seconds=segment.compute_seconds[:, own], repeats=segment.repeats[own], transfers=transfers,
            bound=bound,
        )  # fmt: skip
        pieces.append(piece)
    return pieces


def _stack(times: list[OperatorTime], first: OperatorTime, last: OperatorTime) -> np.ndarray:
    """Seconds by (virtual stage, micro-batch, replica)."""
    times = [times[0] + first, *times[1:]]
    times = [*times[:-1], times[-1] + last]
    return np.stack([np.asarray(t.seconds).T for t in times])


def _scaled(transfer: Transfer, factor: Numbers) -> Transfer:
    return replace(
        transfer,
        payload_bytes=transfer.payload_bytes * factor,
        messages=transfer.messages * factor,
        hidden_seconds=transfer.hidden_seconds * factor,
    )


def _merge(by_part: list[tuple[Transfer, ...]], micro_batch_count: int) -> tuple[Transfer, ...]:
    """Transfers of the same operation and groups as one, with payloads and messages by kind (0: none).

    Those that hide behind compute of their own stay apart.
    """
    kinds = len(by_part) * micro_batch_count
    merged: dict[tuple[Op, tuple[tuple[int, ...], ...], bool, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for p, transfers in enumerate(by_part):
        own = slice(p * micro_batch_count, (p + 1) * micro_batch_count)
        alone = 0
        for t in transfers:
            alone += bool(np.any(t.hidden_seconds))
            key = t.op, t.groups, t.blocking, alone if np.any(t.hidden_seconds) else 0
            payload, messages, hidden = merged.setdefault(key, (np.zeros(kinds), np.zeros(kinds), np.zeros(kinds)))
            payload[own] += t.payload_bytes
            messages[own] += t.messages
            hidden[own] += t.hidden_seconds
    return tuple(
        Transfer(op, groups, payload, messages, blocking, hidden if alone else 0.0)
        for (op, groups, blocking, alone), (payload, messages, hidden) in merged.items()
    )


def add_bound(bound: dict[str, float], time: OperatorTime, repeats: float, replicas: int) -> None:
    """Adds the seconds of all micro-batches by limit, mean over replicas."""
    for limit, part in zip(("flops", "hbm", "launch"), time.parts[1:], strict=True):
        bound[limit] = bound.get(limit, 0.0) + float(np.sum(part)) * repeats / replicas


def _largest_stage(use: ModelUse, head: Head) -> int:
    """Parameters on a rank of the fullest pipeline stage."""
    return max(held_parameters(use, head, stage) for stage in _different_stages(use))


def _different_stages(use: ModelUse) -> tuple[int, int, int]:
    """Pipeline stages that can differ: the ends, and one of those between."""
    return 0, use.pipeline_parallel // 2, use.pipeline_parallel - 1


def messages_of(amount: float, bucket: float) -> float:
    return float(max(1, np.ceil(amount / bucket)))


def as_groups(ranks: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, group)) for group in ranks)
