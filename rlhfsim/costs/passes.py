"""Programs of scoring and training: what each replica of a place computes, and when it must move what.

`lengths` holds one array of token counts per replica, a number per sample (prompt and response; the caller pads where
the scenario says so). Samples fill micro-batches in the given order. Where ranks wait for each other is part of the
program: at every layer under ZeRO-3 (each gather is a meeting), at every backward under ZeRO-2, at the optimizer step
under ZeRO-0 and 1.

A transfer has one payload for all replicas of a place; where their token counts differ it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from rlhfsim.errors import InputError
from rlhfsim.memory import (
    PREFETCH_PARAMETERS,
    REDUCE_BUCKET_PARAMETERS,
    Shards,
    held_parameters,
    trained_parameters,
    trained_routed_parameters,
)
from rlhfsim.model import (
    Head,
    embedding_parameters,
    head_parameters,
    layer_gemms,
    layers_parameters,
    lora_parameters,
    parameters,
)
from rlhfsim.spec.model_spec import UNSPLIT, ExpertSplit, ModelSpec
from rlhfsim.spec.overheads import EnginePhase
from rlhfsim.spec.scenario import ModelUse

from .kernels import Numbers
from .operators import NO_TIME, Operators, OperatorTime, adam_bytes, total
from .pipeline import PipelineSegment, Role
from .segment import HostSegment, Op, Segment, Transfer

Lengths = Sequence[np.ndarray]

# Parameters that one gather of updated weights covers: default of allgather_bucket_size, DeepSpeed,
# deepspeed/runtime/zero/config.py at 1b88ac36.
ALLGATHER_BUCKET_PARAMETERS = 5e8


@dataclass(frozen=True)
class Layout:
    """The ranks of a place: tensor-parallel ranks are neighbours, then data-parallel replicas, then pipeline stages.

    That is Megatron-LM's default order (tp-cp-ep-dp-pp). Routed experts are split in an order of their own over the
    ranks of a stage: the tensor-parallel ranks of an expert are neighbours, then those of the other experts.
    """

    ranks: tuple[int, ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    experts: ExpertSplit = UNSPLIT

    def __post_init__(self) -> None:
        if len(self.ranks) % (self.tensor_parallel * self.pipeline_parallel):
            raise InputError(
                f"{len(self.ranks)} ranks cannot be split in replicas of tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel}"
            )

    @classmethod
    def of(cls, ranks: Sequence[int], use: ModelUse) -> Layout:
        return cls(tuple(ranks), use.tensor_parallel, use.pipeline_parallel, use.expert_split())

    @property
    def replicas(self) -> int:
        return len(self.ranks) // (self.tensor_parallel * self.pipeline_parallel)

    @cached_property
    def grid(self) -> np.ndarray:
        """Ranks by (stage, replica, shard)."""
        return np.array(self.ranks).reshape(self.pipeline_parallel, self.replicas, self.tensor_parallel)

    @cached_property
    def tensor_groups(self) -> tuple[tuple[int, ...], ...]:
        return as_groups(self.grid.reshape(-1, self.tensor_parallel))

    @cached_property
    def data_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same shard of the weights, one of every replica."""
        return as_groups(self.grid.transpose(0, 2, 1).reshape(-1, self.replicas))

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
        return np.asarray(counts[inverse].reshape(layout.grid.shape).max(axis=(0, 2)))


def micro_batches(lengths: Lengths, samples: int) -> np.ndarray:
    """Token counts, shape (replicas, micro-batches, samples), filled up with zeros.

    Every replica has a first micro-batch; uneven numbers are filled up with empty ones.
    """
    count = max(1, max((-(-len(own) // samples) for own in lengths), default=1))
    batches = np.zeros((len(lengths), count, samples))
    for batch, own in zip(batches, lengths, strict=True):
        batch.reshape(-1)[: len(own)] = own
    return batches


# --- scoring ---------------------------------------------------------------------------------------------------------


def score_program(
    use: ModelUse, lengths: Lengths, layout: Layout, operators: Operators, *, head: Head = "lm"
) -> list[Segment]:
    """One forward pass over all samples, in micro-batches of `score_micro_batch_samples`: log-probs or values."""
    work = _Work(use, micro_batches(lengths, use.score_micro_batch_samples), layout, operators, head)
    load = _load_parameters(use, work, head)
    if use.pipeline_parallel > 1 and operators.effects.efficiency:
        return [*load, work.pipeline("forward", backward=False)]
    zero3 = use.zero_stage == 3
    layers = _Part(work.layer_forward(), use.shape.layers, work.gathers_layer() + work.inside_forward())
    ends = _Part(work.ends_forward(), 1, work.gathers_ends() + work.tensor_ends())
    engine = work.engine("forward") if zero3 else []  # what is not sharded is scored without an engine
    return [*load, work.segment("forward", [layers, ends, *engine], overlapped=zero3, lockstep=zero3)]


# --- training --------------------------------------------------------------------------------------------------------


def train_program(
    use: ModelUse,
    lengths: Lengths,
    layout: Layout,
    operators: Operators,
    *,
    head: Head = "lm",
    host: Host | None = None,
) -> list[Segment]:
    """One minibatch: forward, recomputation and backward of every micro-batch, gradient reduction, optimizer step.

    ZeRO-3 gathers a layer's weights for the forward, and once more for recomputation and backward, which share it:
    DeepSpeed keeps what is used again within `stage3_max_reuse_distance` (1e9 parameters by default; deepspeed/runtime/
    zero/partitioned_param_coordinator.py, `__params_to_release`), FSDP unshards once before a checkpointed layer's
    backward. Gradients are reduced in the model's precision.
    Reductions hide behind the backward where a replica is one rank (DeepSpeed with overlap_comm, DDP, FSDP). With
    tensor, pipeline or expert parallelism they follow the last one (Megatron-LM without --overlap-grad-reduce, its
    default), and ZeRO-2 is as ZeRO-1.
    `host` is needed for an offloaded optimizer.
    """
    work = _Work(use, micro_batches(lengths, use.micro_batch_samples), layout, operators, head)
    program = _load_parameters(use, work, head)
    if use.pipeline_parallel > 1 and operators.effects.efficiency:
        program += [work.pipeline("forward_backward", backward=True), *work.reduction_after()]
    elif use.zero_stage == 3:
        program.append(work.segment("forward_backward", work.passes_zero3(), overlapped=True, lockstep=True))
    elif use.ranks_together > 1:
        program += [work.segment("forward_backward", work.passes("after")), *work.reduction_after()]
    elif use.zero_stage == 2:
        every = work.segment("forward_backward", work.passes("each"), overlapped=True)
        program += _by_micro_batch(every, work.batches.shape[1])
    else:
        program.append(work.segment("forward_backward", work.passes("last"), overlapped=True))
    return program + _optimizer_program(use, work, host)


def _optimizer_program(use: ModelUse, work: _Work, host: Host | None) -> list[Segment]:
    """Adam on this rank's share (on the GPU or the host), and the gather of updated weights under ZeRO-1 and 2."""
    trained, width = work.trained_rank_parameters(), use.bytes_per_parameter
    routed = work.trained_rank_routed_parameters()
    share = Shards.of(use, work.layout.replicas).largest(trained, routed, 1)
    if use.offload_optimizer and work.operators.effects.sync:
        if host is None:
            raise InputError("offload_optimizer needs the host's memory bandwidth", field="offload_optimizer")
        single = work.layout.single_ranks
        adam = work.operators.optimizer_step_host(
            use, share, host.memory_bytes_per_second, host.sharing_ranks(work.layout)
        )
        streamed = Transfer("host_memory", single, adam_bytes(use) * share)
        program = [
            work.transfer_only("gradients_to_host", Transfer("to_host", single, share * width)),
            HostSegment("optimizer", adam[:, None], transfers=(streamed,), bound={"host": float(adam.mean())}),
            work.transfer_only("weights_from_host", Transfer("from_host", single, share * width)),
        ]
    else:
        program = [work.uniform("optimizer", work.operators.optimizer_step(use, share))]
    program += [work.uniform("engine_step", part.time) for part in work.engine("step")]
    if use.zero_stage in (1, 2):
        for groups, count in work.replicated(trained, routed):
            messages = messages_of(count, ALLGATHER_BUCKET_PARAMETERS)
            program.append(
                work.transfer_only("gather_weights", Transfer("all_gather", groups, count * width, messages))
            )
    return program


def _load_parameters(use: ModelUse, work: _Work, head: Head) -> list[Segment]:
    """Offloaded weights come from the host before the pass; under ZeRO-3 they come with each gather instead."""
    if not use.offload_parameters or use.zero_stage == 3 or not work.operators.effects.sync:
        return []
    held = _largest_stage(use, head) * use.bytes_per_parameter
    return [work.transfer_only("weights_from_host", Transfer("from_host", work.layout.single_ranks, held))]


def layer_matrices(spec: ModelSpec) -> int:
    """Weight matrices of a layer; qkv is one product, as are gate and up."""
    return len(layer_gemms(spec)) + 2 + spec.gated_mlp


def end_matrices(spec: ModelSpec, head: Head = "lm") -> int:
    """Embedding and head; a value head is too small to be sharded."""
    return 1 if head != "lm" or spec.tied_embeddings else 2


def weight_tensors(spec: ModelSpec) -> int:
    """Matrices and norms of a model with a language-model head, each a call of DeepSpeed's GatheredParameters (counted
    with 0.19.8, `python -m real.microbench`)."""
    return spec.layers * (layer_matrices(spec) + spec.norms_per_layer) + end_matrices(spec) + 1


def controller_program(moved_bytes: float, operators: Operators, replicas: int = 1) -> list[Segment]:
    """A single controller serialises what it hands out and collects, one worker after the other; none without one."""
    overheads = operators.overheads
    if overheads.controller_bytes_per_second is None or operators.ideal:
        return []
    seconds = moved_bytes / overheads.controller_bytes_per_second + overheads.controller_call_seconds
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
        self.tokens = batches.sum(axis=-1)
        self.trainable: Literal["all", "lora"] = "lora" if use.lora_rank else "all"
        self.trained_layers = use.trainable_layers or use.shape.layers

    # Operator times.

    def layer_forward(self) -> OperatorTime:
        t, ops = self.use.tensor_parallel, self.operators
        time = ops.layer_forward(self.use, self.tokens, t) + ops.attention_prefill(self.use, self.batches, t)
        return ops.with_launches(time)

    def layer_backward(self) -> OperatorTime:
        """Backward of a trained layer, after what has to be computed again."""
        t, ops, use = self.use.tensor_parallel, self.operators, self.use
        attention = ops.attention_prefill(use, self.batches, t, backward=True)
        time = ops.with_backward_launches(ops.layer_backward(use, self.tokens, t, self.trainable) + attention)
        if use.recompute == "full":
            return time + self.layer_forward()
        if use.recompute == "selective":
            return time + ops.attention_prefill(use, self.batches, t)
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
            return lora_parameters(spec, self.use.lora_rank, 1) / t
        return layers_parameters(spec, t, self.use.expert_split()) / spec.layers

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

    def gathers_layer(self, *, one_by_one: bool = False) -> tuple[Transfer, ...]:
        spec = self.use.shape
        return self._gathers(layers_parameters(spec) / spec.layers, layer_matrices(spec) if one_by_one else 0)

    def gathers_ends(self, *, one_by_one: bool = False) -> tuple[Transfer, ...]:
        spec, matrices = self.use.shape, end_matrices(self.use.shape, self.head) if one_by_one else 0
        return self._gathers(embedding_parameters(spec) + head_parameters(spec, self.head), matrices)

    def _gathers(self, count: float, matrices: int = 0) -> tuple[Transfer, ...]:
        """ZeRO-3: weights from all ranks, ahead of their use; offloaded shards cross PCIe first.

        A forward pass fetches a bucket at a time, across the bounds of layers; a backward pass one of `matrices` at a
        time. DeepSpeed fetches ahead along the trace of an earlier pass, and the backward pass never meets the trace
        that it would need: forward passes alone (generation, scoring) come between updates. Counted with DeepSpeed
        0.19.8 at its defaults: one call in the forward pass of a model smaller than the bucket, one for each matrix in
        the backward pass, embedding and head among them (`python -m real.microbench`, column collectives).
        """
        if self.use.zero_stage != 3:
            return ()
        payload, ranks = count * self.use.bytes_per_parameter, self.layout.ranks
        whole = parameters(self.use.shape, self.head)
        ahead = messages_of(whole, PREFETCH_PARAMETERS) * count / whole
        messages = max(matrices, ahead)
        load: tuple[Transfer, ...] = ()
        if self.use.offload_parameters and self.operators.effects.sync:
            load = (Transfer("from_host", self.layout.single_ranks, payload / len(ranks), messages),)
        return load + ((Transfer("all_gather", (ranks,), payload, messages),) if len(ranks) > 1 else ())

    def reduces(self, count: float, routed: float = 0.0) -> tuple[Transfer, ...]:
        """The gradients of `count` parameters, `routed` of them in routed experts, over the ranks that have copies.

        Buckets cross the bounds of layers. ZeRO-1 and 2 of DeepSpeed reduce whole buckets to every rank, which then
        keeps its part (deepspeed/runtime/zero/stage_1_and_2.py, `allreduce_and_scatter`:
        `use_multi_rank_bucket_allreduce` is true by default in 0.19.8). Megatron's distributed optimizer scatters them.
        """
        stage = self.use.zero_stage
        op: Op = "reduce_scatter" if stage == 3 or (stage and self.use.ranks_per_replica > 1) else "all_reduce"

        def messages(number: float) -> float:
            trained = self.trained_rank_parameters()
            return messages_of(trained, REDUCE_BUCKET_PARAMETERS) * number / trained

        width = self.use.bytes_per_parameter
        return tuple(
            Transfer(op, groups, number * width, messages(number)) for groups, number in self.replicated(count, routed)
        )

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
        return tuple(Transfer(op, self.layout.tensor_groups, payload, collectives) for op in ops)

    def inside_forward(self, passes: int = 1) -> tuple[Transfer, ...]:
        """What the ranks of a replica, and those that share experts, exchange in so many passes of the mean layer.

        Where experts are split in their own way, their all-to-alls take the place of the MLP's collective, unless a
        shared expert needs that too.
        """
        exchange = self.exchange(passes)
        instead = self.expert_share if exchange and not self.use.shape.shared_expert_ffn else 0
        return self.tensor_forward(passes * (2 - instead)) + exchange

    def inside_backward(self) -> tuple[Transfer, ...]:
        """With full recomputation the forward's collectives are repeated too."""
        return self.inside_forward(2 if self.use.recompute == "full" else 1)

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
            transfers.append(Transfer("all_to_all", self.layout.expert_groups, 2 * one, 2 * calls))
        if split.tensor > 1:
            groups = self.layout.expert_tensor_groups
            transfers += [
                Transfer("all_gather", groups, one * split.tensor, calls),
                Transfer("reduce_scatter", groups, one * split.tensor, calls),
            ]
        return tuple(transfers)

    def tensor_ends(self) -> tuple[Transfer, ...]:
        """Vocabulary-parallel embedding (forward) or head (backward): one collective over activations."""
        return self.tensor_forward(1)

    # Passes of training: parts in the order backward of layers, forward of layers, ends.

    def passes(self, reduced: Literal["each", "last", "after"]) -> list[_Part]:
        """Forward and backward with full weights; gradients are reduced in each or the last micro-batch, or not here.

        Order among the micro-batches of a step is free, so the first, which every replica has, is taken as the last.
        """
        layers, spec = self.trained_layers, self.use.shape
        of_layer, of_ends = (  # experts are split only where reductions come after
            () if reduced == "after" else self.reduces(count)
            for count in (self.trained_layer_parameters(), self.trained_end_parameters())
        )
        if reduced == "last":
            of_layer, of_ends = self._only_in_first(of_layer), self._only_in_first(of_ends)
        return [
            _Part(self.layer_backward(), layers, of_layer + self.inside_backward()),
            _Part(self.layer_forward(), spec.layers, self.inside_forward()),
            _Part(self.ends_forward(), 1, self.tensor_ends()),
            _Part(self.ends_backward(), 1, of_ends + self.tensor_ends()),
            *self.engine("forward", "backward"),
        ]

    def passes_zero3(self) -> list[_Part]:
        """Forward and backward with weights gathered for each, gradients reduced at every backward."""
        gather, gather_ends = self.gathers_layer(), self.gathers_ends()
        return [
            _Part(self.layer_forward(), self.use.shape.layers, gather),
            _Part(
                self.layer_backward(),
                self.trained_layers,
                self.gathers_layer(one_by_one=True) + self.reduces(self.trained_layer_parameters()),
            ),
            _Part(self.ends_forward(), 1, gather_ends),
            _Part(
                self.ends_backward(),
                1,
                self.gathers_ends(one_by_one=True) + self.reduces(self.trained_end_parameters()),
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

    def pipeline(self, label: str, *, backward: bool) -> PipelineSegment:
        """1F1B over the pipeline stages; embedding and head are at the two ends."""
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
        collectives: list[tuple[Role, Transfer]] = [("forward", _scaled(t, per_stage)) for t in self.inside_forward()]
        if backward:
            collectives += [("backward", _scaled(t, per_stage)) for t in self.inside_backward()]
        hop_bytes = self.tokens.mean(axis=0) * spec.hidden * use.bytes_per_parameter
        hop = Transfer("send", self.layout.hops, hop_bytes / (use.tensor_parallel if use.sequence_parallel else 1))
        roles, transfers = zip(*collectives, ("hop", hop), strict=True)
        return PipelineSegment(
            label,
            busy,
            np.ones(self.batches.shape[1]),
            transfers,
            bound=bound,
            stages=stages,
            forward_seconds=forward,
            backward_seconds=back,
            roles=roles,
        )


def _by_micro_batch(segment: Segment, count: int) -> list[Segment]:
    """One segment for each micro-batch, after each of which the replicas meet."""
    mean = segment.compute_seconds.mean(axis=0) * segment.repeats
    pieces = []
    for own in (slice(k, None, count) for k in range(count)):
        share = float(mean[own].sum() / mean.sum()) if mean.sum() else 0.0
        transfers = tuple(
            Transfer(t.op, t.groups, np.asarray(t.payload_bytes)[own], np.asarray(t.messages)[own])
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
    return Transfer(transfer.op, transfer.groups, transfer.payload_bytes * factor, transfer.messages * factor)


def _merge(by_part: list[tuple[Transfer, ...]], micro_batch_count: int) -> tuple[Transfer, ...]:
    """Transfers of the same operation and groups as one, with payloads and messages by kind (0: none)."""
    merged: dict[tuple[Op, tuple[tuple[int, ...], ...]], tuple[np.ndarray, np.ndarray]] = {}
    for p, transfers in enumerate(by_part):
        own = slice(p * micro_batch_count, (p + 1) * micro_batch_count)
        for t in transfers:
            kinds = len(by_part) * micro_batch_count
            payload, messages = merged.setdefault((t.op, t.groups), (np.zeros(kinds), np.zeros(kinds)))
            payload[own] += t.payload_bytes
            messages[own] += t.messages
    return tuple(Transfer(op, groups, payload, messages) for (op, groups), (payload, messages) in merged.items())


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
