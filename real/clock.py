"""One clock for all ranks: how far each rank's monotonic clock is from rank 0's, and how wrong that may be."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

ROUNDS = 30
_TAG = 2**30  # no message of the executor has it


@dataclass(frozen=True)
class Clock:
    """offset_ns: to add to this rank's readings to get rank 0's. error_ns: the offset is right to within that."""

    offset_ns: int = 0
    error_ns: int = 0

    @staticmethod
    def read() -> int:
        """Nanoseconds of this rank's own clock."""
        return time.monotonic_ns()


def align(rank: int, ranks: int, rounds: int = ROUNDS) -> Clock:
    """Measure this rank's offset; all ranks call it together.

    Each rank in turn asks rank 0 for the time. The reading was taken somewhere within the round trip, so its middle is
    right to half of it (Cristian, "Probabilistic clock synchronization", 1989); the shortest round trip counts. An
    offset within its error is none: the ranks share one machine's clock.
    """
    clock, reading = Clock(), torch.zeros(1, dtype=torch.int64)
    for other in range(1, ranks):
        if rank == 0:
            for _ in range(rounds):
                dist.recv(reading, other, tag=_TAG)
                reading[0] = Clock.read()
                dist.send(reading, other, tag=_TAG)
        elif rank == other:
            trips = []
            for _ in range(rounds):
                asked = Clock.read()
                dist.send(reading, 0, tag=_TAG)
                dist.recv(reading, 0, tag=_TAG)
                answered = Clock.read()
                trips.append((answered - asked, int(reading[0]) - (asked + answered) // 2))
            trip, offset = min(trips)
            error = trip // 2 + 1
            clock = Clock(0 if abs(offset) <= error else offset, error)
    return clock
