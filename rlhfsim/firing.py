"""The name of one piece of work, the same in the graph, the scheduler, every executor and every timeline."""

from __future__ import annotations

from typing import NamedTuple


class Firing(NamedTuple):
    """One chunk of one stage on one place in one iteration; firings sort by iteration first."""

    iteration: int
    stage: str
    chunk: int
    place: int
