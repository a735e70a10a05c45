"""Sharing out sequences by tokens: over data-parallel replicas, and in micro-batches of a limited size.

Both as verl does it (verl-project/verl, verl/utils/seqlen_balancing.py at 0db13434): by Karmarkar and Karp's largest
differencing method, and with equally many micro-batches on every replica, the most that any of them needs (an
all-reduce of the maximum there and in NVIDIA-NeMo/RL, nemo_rl/models/automodel/data.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def balanced_parts(weights: np.ndarray, parts: int, *, equal_counts: bool = False) -> list[list[int]]:
    """Indices of `weights` in so many parts of nearly equal sums; the heaviest first.

    equal_counts: parts have equally many entries (they differ by one where the number does not divide): one of the
    heaviest, one of the next heaviest, and so on, so that a few that are very heavy stay unbalanced, as in verl.

    Largest differencing: what is shared out so far are ways to fill all parts. The two whose parts differ most are
    joined, the fullest part of one with the emptiest of the other, until one is left.
    """
    order = np.argsort(-weights, kind="stable")
    size = parts if equal_counts else 1
    # A part is a number in `joined`: 0 is empty, 1 + k holds entry k, those after are two other numbers together.
    joined: list[tuple[int, int]] = []
    ways = []
    for number, first in enumerate(range(0, len(order), size)):
        chosen = order[first : first + size]
        sums, held = np.zeros(parts), np.zeros(parts, dtype=np.int64)
        sums[: len(chosen)] = weights[chosen]
        held[: len(chosen)] = 1 + chosen
        ways.append((sums[-1] - sums[0], number, sums, held))
    heapq.heapify(ways)
    while len(ways) > 1:
        _, number, sums, held = heapq.heappop(ways)
        _, _, other_sums, other_held = heapq.heappop(ways)
        sums, other_held = sums + other_sums[::-1], other_held[::-1]
        both = np.flatnonzero((held > 0) & (other_held > 0))
        together = held + other_held
        together[both] = 1 + len(weights) + len(joined) + np.arange(len(both))
        joined += zip(held[both].tolist(), other_held[both].tolist(), strict=True)
        fullest = np.argsort(-sums, kind="stable")
        sums = sums[fullest]
        heapq.heappush(ways, (sums[-1] - sums[0], number, sums, together[fullest]))
    return (
        [_entries(part, len(weights), joined) for part in ways[0][3].tolist()] if ways else [[] for _ in range(parts)]
    )


def _entries(part: int, count: int, joined: list[tuple[int, int]]) -> list[int]:
    """The entries of a part, in the order in which they were joined."""
    found, left = list[int](), [part] if part else []
    while left:
        part = left.pop()
        if part <= count:
            found.append(part - 1)
        else:
            one, other = joined[part - count - 1]
            left += (other, one)
    return found


def first_fit_decreasing(weights: np.ndarray, limit: float) -> list[list[int]]:
    """Indices of `weights` in bins of at most `limit`: each, the heaviest first, in the first bin that has room.

    At most 11/9 of the fewest possible bins and 6/9 (Dosa, "The tight bound of first fit decreasing bin-packing
    algorithm is FFD(I) <= 11/9 OPT(I) + 6/9", 2007; the title only was read, the tests compare with brute force).
    """
    bins: list[list[int]] = []
    room = np.full(len(weights), float(limit))
    for k in np.argsort(-weights, kind="stable"):
        where = int(np.argmax(room >= weights[k]))
        if where == len(bins):
            bins.append([])
        bins[where].append(int(k))
        room[where] -= weights[k]
    return bins


def shares_by_tokens(tokens: np.ndarray, replicas: int) -> list[np.ndarray]:
    """`tokens` shared among replicas: equally many sequences (or one more) each, and nearly as many tokens."""
    return [tokens[sorted(part)] for part in balanced_parts(tokens, replicas, equal_counts=True)]


def packed_micro_batches(lengths: Sequence[np.ndarray], limit: int, *, multiple_of: int = 1) -> np.ndarray:
    """Tokens of sequences by (replica, micro-batch, place in it), zeros where there is none.

    No micro-batch has more than `limit` tokens (or more than one sequence, where that alone is longer). All replicas
    have equally many: as few as the tokens allow if they can be balanced over so few, else as first fit decreasing
    needs; a multiple of `multiple_of`. (verl never asks whether the balanced ones are within the limit, and exceeds it
    where few long sequences make a micro-batch.)
    Like verl, the heaviest lie in the middle, where a pipeline is full, and meet the heaviest of other replicas.
    """
    limit = max(limit, *(int(own.max(initial=0)) for own in lengths))
    fewest = max(1, *(-(-int(own.sum()) // limit) for own in lengths))
    packed = [balanced_parts(own, _whole(fewest, multiple_of)) for own in lengths]
    if any(own[part].sum() > limit for own, parts in zip(lengths, packed, strict=True) for part in parts):
        bins = [first_fit_decreasing(own, limit) for own in lengths]
        count = _whole(max(map(len, bins)), multiple_of)
        packed = [_balanced_or(bins_, own, count, limit) for bins_, own in zip(bins, lengths, strict=True)]
    width = max(1, max(len(part) for parts in packed for part in parts))
    batches = np.zeros((len(lengths), len(packed[0]), width))
    for batch, own, parts in zip(batches, lengths, packed, strict=True):
        for row, part in zip(batch, _smallest_outside(parts, own), strict=True):
            row[: len(part)] = own[part]
    return batches


def _whole(count: int, multiple_of: int) -> int:
    return -(-count // multiple_of) * multiple_of


def _balanced_or(bins: list[list[int]], own: np.ndarray, count: int, limit: int) -> list[list[int]]:
    """Balanced parts if they are within the limit, else these bins and empty ones."""
    parts = balanced_parts(own, count)
    fits = all(own[part].sum() <= limit for part in parts)
    return parts if fits else bins + [[] for _ in range(count - len(bins))]


def _smallest_outside(parts: list[list[int]], own: np.ndarray) -> list[list[int]]:
    ordered = sorted(parts, key=lambda part: -float(own[part].sum()))
    return ordered[::2][::-1] + ordered[1::2]
