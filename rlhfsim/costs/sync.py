"""Programs of weight transfer: from a trained copy of a model to the copies that generate or score with it.

What differs between frameworks is who sends (`WeightSync.senders`), and what the weights go through. A sender uses the
links of its own rank only, so a single one has a single NIC.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction as Ratio
from typing import Literal

import numpy as np

from rlhfsim import linear_attention
from rlhfsim.lora import lora_factors
from rlhfsim.model import Head, attention_gemms, layers_routed_parameters, parameters
from rlhfsim.spec.scenario import ModelUse, WeightSync

from .operators import Operators, OperatorTime
from .passes import Layout, add_bound, as_groups, end_matrices, messages_of, weight_tensors
from .segment import Segment, Transfer

SyncMethod = Literal["p2p", "broadcast", "reshard"]
Senders = Literal["replica", "stage_heads", "first_rank", "all_ranks"]
Shards = list[tuple[int, list[int]]]  # a rank that sends, and those that need any of what it has
Fetched = tuple[list[tuple[int, int]], float]


def sync_program(
    use: ModelUse,
    source: Layout,
    destination: Layout,
    operators: Operators,
    *,
    method: SyncMethod,
    bucket_bytes: float,
    head: Head = "lm",
    path: WeightSync | None = None,
    rank_nodes: Sequence[int] = (),
) -> list[Segment]:
    """Weights (only LoRA's factors, with LoRA) from the trained copy to `destination`, every replica of which gets all.

    p2p: one destination replica after the other, blocking sends between the ranks whose shards overlap; replicas x
        weights on the wire. broadcast: what a rank sends goes once to all ranks that need any of it (they keep their
        part). reshard: the same GPUs change from the training layout to the destination's by all-gathers, and each
        copies what it has got into the destination's weights.
    path: `senders`, `through` and the storage's rate (default: the ranks of the first replica, from GPU to GPU).
    rank_nodes: the node of every rank, needed through host or disk.
    Before sending, the senders gather what they do not have: ZeRO-3 shards tensor by tensor, experts, shards of a
    tensor-parallel group, pipeline stages. With `effects.sync` off there is nothing to do: an empty program.
    """
    if not operators.effects.sync:
        return []
    source, destination = (replace(side, context_parallel=1) for side in (source, destination))  # a copy each
    path = path or WeightSync()
    spec = use.shape
    count = use.lora_parameters() if use.lora_rank else parameters(spec, head)
    total = float(count * use.bytes_per_parameter)
    replicas = _replicas(destination)
    if method == "reshard":
        width = (
            2 if use.shards_master else 1
        )  # verl gathers fp32 shards as they are (fsdp_vllm.py @v0.5.0, full_tensor)
        sharded = _gathered(use, source, width * total) if use.zero_stage == 3 else None
        transfers = [*_expert_gather(use, source, bucket_bytes), sharded, _reshard(use, source, destination, total)]
        copied = total / _ranks_per_copy(destination)
        if path.in_place == "tensors" and not sharded:
            transfers, copied = list(_whole_tensors(use, source, total)), total
        copies = _copy(operators.copy(use, copied))
        return [*_segments(transfers), *_overhead(operators, use, 1, total, 1, bucket_bytes), *copies]
    gathers = [] if path.senders == "all_ranks" else _gathers(use, source, total, bucket_bytes, path.senders)
    to_each = [_shards(source, replica, path.senders) for replica in replicas]
    at_once = len(to_each[0])
    rounds = len(replicas) if method == "p2p" else 1
    overhead = _overhead(operators, use, _parts(use, source, path.senders), total / at_once, rounds, bucket_bytes)
    if path.through != "gpu":
        fetched = _fetched(to_each, total, method, rank_nodes)
        moved = _through_host(to_each[0], fetched, destination, total, bucket_bytes, path)
        return [*_segments(gathers), *moved, *overhead]
    if method == "broadcast":
        transfers = [_broadcast(_shards(source, destination, path.senders), total, bucket_bytes)]
    else:
        transfers = [_sends(pairs, total, bucket_bytes) for pairs in to_each]
    return [*_segments(gathers), *_segments(transfers), *overhead]


def sync_tensors(use: ModelUse) -> int:
    """Tensors that a framework names one by one: those of a Hugging Face checkpoint, each expert's own among them (or
    LoRA's two factors of every module that has them)."""
    spec, found = use.shape, 0
    kinds = spec.layer_kinds()
    if use.lora_rank:
        return lora_factors(spec, use.lora_target_modules)
    mlp = 2 + spec.gated_mlp
    norm = 2 if spec.norm == "layer" else 1
    attention = 4
    if spec.latent_attention:  # with a norm of each latent vector
        attention = len(attention_gemms(spec)) + 1 + (spec.q_lora_rank > 0)
    attention += 3 * spec.qkv_bias + spec.attention_output_bias + 2 * spec.qk_norm + norm * spec.norms_per_layer
    for kind, count in kinds.items():
        shared = mlp * (spec.shared_expert_ffn > 0) + spec.shared_expert_gate
        routed = 1 + spec.router_bias + spec.experts * mlp * (1 + spec.expert_bias) + shared
        each = routed if kind.experts else mlp * (1 + spec.mlp_bias)
        before = attention
        if kind.linear:  # with convolution, A_log, dt_bias, norm and output
            before = len(linear_attention.projections(spec)) + 5 + norm * spec.norms_per_layer
        found += count * (before + each)
    ends = norm * (spec.final_norm + spec.embedding_norm) + (spec.learned_positions > 0) + spec.head_bias
    return found + end_matrices(spec) + ends


def _overhead(
    operators: Operators, use: ModelUse, parts: int, sent_bytes: float, rounds: int, bucket_bytes: float
) -> list[Segment]:
    """The host's time on the busiest sender: once to gather, then as often as it sends. parts: senders among which the
    tensors are divided."""
    overheads = operators.overheads
    tensors, messages = sync_tensors(use) / parts, messages_of(sent_bytes, bucket_bytes)
    each = tensors * overheads.sync_tensor_seconds + messages * overheads.sync_bucket_seconds
    seconds = use.shape.layers * overheads.sync_layer_seconds + rounds * each
    if not seconds or operators.ideal:
        return []
    return [Segment("sync_overhead", np.full((1, 1), seconds), bound={"host": seconds})]


def _parts(use: ModelUse, source: Layout, senders: Senders) -> int:
    """Senders among which tensors are divided: stages have layers of their own; ranks of a tensor-parallel group or of
    ZeRO-3 each have a part of every tensor. Where all ranks send, each goes through every tensor and keeps its own
    (verl: cache_actor_weights_to_cpu, verl/experimental/fully_async_policy/megatron_worker.py @8dc3303a)."""
    return source.pipeline_parallel if use.zero_stage < 3 and senders in ("replica", "stage_heads") else 1


def _gathers(use: ModelUse, source: Layout, total: float, bucket_bytes: float, senders: Senders) -> list[Transfer]:
    """What the senders do not have."""
    whole = _gathered(use, source, total) if use.zero_stage == 3 else None
    found = [whole] if whole else []
    found += _expert_gather(use, source, bucket_bytes)
    if senders == "replica":
        return found
    if source.tensor_parallel > 1:
        tensors = max(1.0, weight_tensors(use.shape) / source.pipeline_parallel)
        found.append(Transfer("all_gather", source.tensor_groups, total / source.pipeline_parallel, tensors))
    if senders == "first_rank" and source.pipeline_parallel > 1:
        heads = tuple(map(int, source.grid[:, 0, 0]))
        found.append(Transfer("all_gather", (heads,), total, float(weight_tensors(use.shape))))
    return found


def _expert_gather(use: ModelUse, source: Layout, bucket_bytes: float) -> list[Transfer]:
    """The ranks that send hold a part of the experts only."""
    if use.expert_parallel == 1 or use.lora_rank:
        return []
    routed = layers_routed_parameters(use.shape) * use.bytes_per_parameter
    payload = routed / source.pipeline_parallel / source.experts.tensor
    return [Transfer("all_gather", source.expert_groups, payload, messages_of(payload, bucket_bytes))]


def _fetched(copies: list[Shards], total: float, method: SyncMethod, rank_nodes: Sequence[int]) -> Fetched:
    """(sender, a rank on whose host its bytes arrive) of all copies that are fetched, and the bytes of each pair."""
    if method == "p2p":
        pairs = [(rank, other) for copy in copies for rank, others in copy for other in others]
        return pairs, total * len(copies) / len(pairs)
    pairs = []
    for k, parts in enumerate(zip(*copies, strict=True)):  # of one sender
        on_node: dict[int, list[int]] = {}
        for other in (other for _, ranks in parts for other in ranks):
            on_node.setdefault(rank_nodes[other], []).append(other)
        # Any NIC of the node will do: other senders use those of other ranks.
        pairs += [(parts[0][0], ranks[k % len(ranks)]) for ranks in on_node.values()]
    return pairs, total / len(copies[0])


def _through_host(
    senders: Shards, fetched: Fetched, destination: Layout, total: float, bucket_bytes: float, path: WeightSync
) -> list[Segment]:
    """Down to the host, to the other hosts (or to the storage and back), up to the GPUs."""
    pairs, payload = fetched
    sent, kept = total / len(senders), total / _ranks_per_copy(destination)
    down = Transfer("to_host", tuple((rank,) for rank, _ in senders), sent, messages_of(sent, bucket_bytes))
    up = Transfer("from_host", tuple((r,) for r in destination.ranks), kept, messages_of(kept, bucket_bytes))
    between = _segments([Transfer("host_send", tuple(pairs), payload, messages_of(payload, bucket_bytes))])
    if path.through == "disk":
        assert path.storage_bytes_per_second is not None
        moved = {"sync_write": total, "sync_read": len(pairs) * payload}
        seconds = {label: count / path.storage_bytes_per_second for label, count in moved.items()}
        between = [Segment(n, np.full((1, 1), spent), bound={"storage": spent}) for n, spent in seconds.items()]
    return [*_segments([down]), *between, *_segments([up])]


def _copy(time: OperatorTime) -> list[Segment]:
    bound: dict[str, float] = {}
    add_bound(bound, time, 1, 1)
    return [Segment("sync_copy", np.full((1, 1), float(time.seconds)), bound=bound)]


def _replicas(layout: Layout) -> list[Layout]:
    """Each replica of a layout as one of its own."""
    return [
        Layout(tuple(map(int, layout.grid[:, r].ravel())), layout.tensor_parallel, layout.pipeline_parallel)
        for r in range(layout.replicas)
    ]


def _shards(source: Layout, destination: Layout, senders: Senders) -> Shards:
    """Of each rank that sends: the ranks of the destination with overlapping shards."""
    s, d = source.tensor_parallel, destination.tensor_parallel
    of_replica = slice(None) if senders == "all_ranks" else slice(1)
    alone, whole = senders == "first_rank", senders in ("stage_heads", "first_rank")
    found = []
    for k, stage in enumerate(source.grid[:1] if alone else source.grid):
        stages = _overlapping(k, 1 if alone else source.pipeline_parallel, destination.pipeline_parallel)
        for replica in stage[of_replica]:
            for i, rank in enumerate(replica[:1] if whole else replica):
                shards = range(d) if whole else _overlapping(i, s, d)
                needing = destination.grid[list(stages)][:, :, list(shards)]
                found.append((int(rank), [int(r) for r in needing.ravel()]))
    return found


def _overlapping(part: int, parts: int, others: int) -> range:
    """Which of so many other equal parts of the same have something of this one."""
    return range(part * others // parts, -(-(part + 1) * others // parts))


def _ranks_per_copy(layout: Layout) -> int:
    return layout.tensor_parallel * layout.pipeline_parallel


def _sends(shards: Shards, total: float, bucket_bytes: float) -> Transfer:
    """All pairs of overlapping shards at once, blocking bucket by bucket (pairs of one rank share its links)."""
    pairs = tuple((rank, other) for rank, others in shards for other in others)
    payload = total / len(pairs)
    return Transfer("send", pairs, payload, messages_of(payload, bucket_bytes))


def _broadcast(shards: Shards, total: float, bucket_bytes: float) -> Transfer:
    groups = tuple((rank, *others) for rank, others in shards)
    payload = total / len(groups)
    return Transfer("broadcast", groups, payload, messages_of(payload, bucket_bytes))


def _reshard(use: ModelUse, source: Layout, destination: Layout, total: float) -> Transfer | None:
    """A rank gathers its new shard from the ranks that hold pieces of it; a finer split needs nothing.

    Where the destination has stages too, a rank that does not hold all of its part gets it from the others, and so do
    all at once.
    """
    if destination.pipeline_parallel > 1:
        payload = total / _ranks_per_copy(destination)
        have, need = _parts_held(source), _parts_held(destination)
        if all(_contains(have[rank], need[rank]) for rank in need):
            return None
        return Transfer("all_to_all", (destination.ranks,), payload, float(use.shape.layers))
    size = source.tensor_parallel * source.pipeline_parallel // destination.tensor_parallel
    if size <= 1:
        return None
    by_replica = source.grid.transpose(1, 2, 0).reshape(-1, size)
    return Transfer("all_gather", as_groups(by_replica), total / destination.tensor_parallel, float(use.shape.layers))


def _parts_held(layout: Layout) -> dict[int, tuple[tuple[Ratio, Ratio], ...]]:
    """Of each rank: from where to where in the layers, and in the shards of each, as shares of the whole."""
    stages, _, shards = layout.grid.shape
    return {
        int(rank): ((Ratio(s, stages), Ratio(s + 1, stages)), (Ratio(t, shards), Ratio(t + 1, shards)))
        for (s, _, t), rank in np.ndenumerate(layout.grid)
    }


def _contains(held: tuple[tuple[Ratio, Ratio], ...], needed: tuple[tuple[Ratio, Ratio], ...]) -> bool:
    return all(h[0] <= n[0] and n[1] <= h[1] for h, n in zip(held, needed, strict=True))


def _whole_tensors(use: ModelUse, source: Layout, total: float) -> Iterator[Transfer]:
    """Every rank gathers all weights, a collective for each tensor: along the pipeline what its tensor- and
    expert-parallel rank has of other stages, then the shards of a tensor, and the experts of other ranks."""
    spec, split = use.shape, source.experts
    routed = 0.0 if use.lora_rank else float(layers_routed_parameters(spec) * use.bytes_per_parameter)
    experts = spec.experts * sum(count for kind, count in spec.layer_kinds().items() if kind.experts) if routed else 0
    dense, tensors = total - routed, float(sync_tensors(use) - (2 + spec.gated_mlp) * experts)
    own_experts = 2.0 * experts / split.parallel  # Megatron-LM keeps gate and up as one matrix
    if source.pipeline_parallel > 1:
        stages = as_groups(source.grid.reshape(source.pipeline_parallel, -1).T)
        yield Transfer("all_gather", stages, dense / source.tensor_parallel, tensors)
        if routed:
            yield Transfer("all_gather", stages, routed / split.parallel / split.tensor, own_experts)
    if source.tensor_parallel > 1:
        yield Transfer("all_gather", source.tensor_groups, dense, tensors)
    if routed and split.tensor > 1:
        yield Transfer("all_gather", source.expert_tensor_groups, routed / split.parallel, own_experts)
    if routed and split.parallel > 1:
        yield Transfer("all_gather", source.expert_groups, routed, own_experts)


def _gathered(use: ModelUse, source: Layout, total: float) -> Transfer | None:
    """ZeRO-3: every rank gathers its part of the weights (all of them, without tensor parallelism), tensor by tensor,
    from those that hold it once together (DeepSpeed's hybrid engine)."""
    groups, part = use.shard_groups(source.ranks), total / use.tensor_parallel
    return Transfer("all_gather", groups, part, float(weight_tensors(use.shape))) if len(groups[0]) > 1 else None


def _segments(transfers: Iterable[Transfer | None]) -> list[Segment]:
    """One after the other."""
    return [Segment(f"sync_{t.op}", np.zeros((1, 1)), transfers=(t,)) for t in transfers if t is not None]
