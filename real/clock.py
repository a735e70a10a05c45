"""One clock for all ranks: how far each rank's monotonic clock is from rank 0's, and how wrong that may be."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from rlhfsim.records import Clock

ROUNDS = 30
_TAG = 2**30  # no message of the executor has it


def align(rank: int, ranks: int, rounds: int = ROUNDS, machine: int | None = None) -> Clock:
    """Measure this rank's offset; all ranks call it together.

    Ranks on rank 0's machine (`machine` tells machines apart; default: its boot) read the same clock, without error.
    Any other rank asks rank 0 for the time. The answer was read somewhere within the round trip, so its middle is right
    to half of it (Cristian, "Probabilistic clock synchronization", 1989); the shortest round trip counts.
    """
    clock, reading = Clock(), torch.zeros(2, dtype=torch.int64)  # time, machine
    mine = this_machine() if machine is None else machine
    for other in range(1, ranks):
        if rank == 0:
            for _ in range(rounds):
                dist.recv(reading, other, tag=_TAG)
                reading[0], reading[1] = Clock.read(), mine
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
            clock = Clock() if int(reading[1]) == mine else Clock(offset, trip // 2 + 1)
    return clock


def this_machine() -> int:
    """A number for this boot of this machine, whose processes all read the same CLOCK_MONOTONIC."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:15], 16)
    except OSError:
        return uuid.getnode()
