"""Engines that share their GPUs with training, and states of trained models: how they make room and come back.

Sleeping gives the memory of weights and KV cache back and forgets the cache; at level 1 the weights are copied to host
memory first, at level 2 they are forgotten too (docs.vllm.ai, "Sleep Mode"). Weights wake up before new ones are
written into them, the cache when generation begins, as the same page advises for training (`wake_up(tags=...)`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .segment import Op, Segment, Transfer


def wake_program(
    ranks: Sequence[int],
    *,
    weight_bytes: float = 0.0,
    cache_bytes: float = 0.0,
    from_host: bool = False,
    map_bytes_per_second: float | None = None,
) -> list[Segment]:
    """Memory for so many bytes on each rank is there again, and weights are copied into it `from_host`."""
    mapped = _mapped("wake_memory", weight_bytes + cache_bytes, map_bytes_per_second)
    return mapped + (_copied("wake_weights", "from_host", ranks, weight_bytes) if from_host else [])


def sleep_program(
    ranks: Sequence[int],
    *,
    weight_bytes: float,
    cache_bytes: float,
    to_host: bool,
    map_bytes_per_second: float | None = None,
) -> list[Segment]:
    """Weights are copied `to_host`, and all memory is given back."""
    copied = _copied("sleep_weights", "to_host", ranks, weight_bytes) if to_host else []
    return copied + _mapped("sleep_memory", weight_bytes + cache_bytes, map_bytes_per_second)


def states_program(
    op: Op, ranks: Sequence[int], moved_bytes: float, pageable_bytes_per_second: float | None = None
) -> list[Segment]:
    """A trained model's states, so many bytes on each rank, come back from the host or leave for it.

    pageable_bytes_per_second: of a copy that the driver stages through pinned memory of its own, on each rank.
    """
    if pageable_bytes_per_second is not None and moved_bytes:
        seconds = moved_bytes / pageable_bytes_per_second
        return [Segment(f"states_{op}", np.full((1, 1), seconds), bound={"host": seconds})]
    return _copied(f"states_{op}", op, ranks, moved_bytes)


def _copied(label: str, op: Op, ranks: Sequence[int], payload_bytes: float) -> list[Segment]:
    if not payload_bytes:
        return []
    return [Segment(label, np.zeros((1, 1)), transfers=(Transfer(op, tuple((r,) for r in ranks), payload_bytes),))]


def _mapped(label: str, moved_bytes: float, bytes_per_second: float | None) -> list[Segment]:
    if not moved_bytes or bytes_per_second is None:
        return []
    seconds = moved_bytes / bytes_per_second
    return [Segment(label, np.full((1, 1), seconds), bound={"host": seconds})]
