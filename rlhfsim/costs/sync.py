"""Programs of weight transfer: from a trained copy of a model to the copies that generate or score with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from rlhfsim.errors import InputError
from rlhfsim.model import Head, layers_routed_parameters, lora_parameters, parameters
from rlhfsim.spec.scenario import ModelUse

from .operators import Operators, OperatorTime
from .passes import Layout, add_bound, as_groups, messages_of, weight_tensors
from .segment import Segment, Transfer

SyncMethod = Literal["p2p", "broadcast", "reshard"]


def sync_program(
    use: ModelUse,
    source: Layout,
    destination: Layout,
    operators: Operators,
    *,
    method: SyncMethod,
    bucket_bytes: float,
    head: Head = "lm",
) -> list[Segment]:
    """Weights (only LoRA's factors, with LoRA) from the trained copy to `destination`, every replica of which gets all.

    p2p: one destination replica after the other, blocking sends between the ranks whose shards overlap; replicas x
        weights on the wire. broadcast: every source shard once to all ranks that need any of it (they keep their part).
    reshard: the same GPUs change from the training layout to the destination's by all-gathers, and each copies what it
        has got into the destination's weights.
    A ZeRO-3 source first gathers what it sends, tensor by tensor. With `effects.sync` off there is nothing to do: an
    empty program.
    """
    if not operators.effects.sync:
        return []
    source, destination = (replace(side, context_parallel=1) for side in (source, destination))  # a copy each
    if destination.pipeline_parallel > 1:
        raise InputError("weights can only be sent to engines without pipeline parallelism", field="pipeline_parallel")
    spec = use.shape
    count = lora_parameters(spec, use.lora_rank) if use.lora_rank else parameters(spec, head)
    total = float(count * use.bytes_per_parameter)
    copies: list[Segment] = []
    transfers: list[Transfer | None]
    if method == "reshard":
        transfers = [_reshard(use, source, destination, total)]
        copies = _copy(operators.copy(use, total / destination.tensor_parallel))
    elif method == "broadcast":
        transfers = [_broadcast(source, destination, total, bucket_bytes)]
    else:
        transfers = [_sends(source, replica, total, bucket_bytes) for replica in _replicas(destination)]
    if use.expert_parallel > 1 and not use.lora_rank:
        # The ranks that send hold a part of the experts only.
        routed = layers_routed_parameters(spec) * use.bytes_per_parameter
        payload = routed / source.pipeline_parallel / source.experts.tensor
        gather = Transfer("all_gather", source.expert_groups, payload, messages_of(payload, bucket_bytes))
        transfers = [gather, *transfers]
    if method != "reshard" and use.zero_stage == 3:
        transfers = [_gathered(use, source, total), *transfers]
    return [_transfer_segment(f"sync_{t.op}", t) for t in transfers if t is not None] + copies


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


def _shards(source: Layout, destination: Layout) -> list[tuple[int, list[int]]]:
    """Of each rank of the first source replica: the ranks of a destination replica with overlapping shards."""
    s, d = source.tensor_parallel, destination.tensor_parallel
    pairs = []
    for stage in source.grid[:, 0]:
        for i, rank in enumerate(stage):
            shards = range(i * d // s, -(-(i + 1) * d // s))
            pairs.append((int(rank), [int(r) for r in destination.grid[:, :, list(shards)].ravel()]))
    return pairs


def _sends(source: Layout, replica: Layout, total: float, bucket_bytes: float) -> Transfer:
    """All pairs of overlapping shards at once, blocking bucket by bucket (pairs of one rank share its links)."""
    pairs = tuple((rank, other) for rank, others in _shards(source, replica) for other in others)
    payload = total / len(pairs)
    return Transfer("send", pairs, payload, messages_of(payload, bucket_bytes))


def _broadcast(source: Layout, destination: Layout, total: float, bucket_bytes: float) -> Transfer:
    groups = tuple((rank, *others) for rank, others in _shards(source, destination))
    payload = total / len(groups)
    return Transfer("broadcast", groups, payload, messages_of(payload, bucket_bytes))


def _reshard(use: ModelUse, source: Layout, destination: Layout, total: float) -> Transfer | None:
    """ZeRO-3: every rank gathers all weights, tensor by tensor, and keeps its part (DeepSpeed's hybrid engine).

    Megatron layouts: a rank gathers its new shard from the ranks that hold pieces of it; a finer split needs nothing.
    """
    if use.zero_stage == 3:
        return _gathered(use, source, total)
    size = source.tensor_parallel * source.pipeline_parallel // destination.tensor_parallel
    if size <= 1:
        return None
    by_replica = source.grid.transpose(1, 2, 0).reshape(-1, size)
    return Transfer("all_gather", as_groups(by_replica), total / destination.tensor_parallel, float(use.shape.layers))


def _gathered(use: ModelUse, source: Layout, total: float) -> Transfer | None:
    """ZeRO-3: all weights on every rank, from those that hold them once together."""
    groups = use.shard_groups(source.ranks)
    return Transfer("all_gather", groups, total, float(weight_tensors(use.shape))) if len(groups[0]) > 1 else None


def _transfer_segment(label: str, transfer: Transfer) -> Segment:
    return Segment(label, np.zeros((1, 1)), transfers=(transfer,))
