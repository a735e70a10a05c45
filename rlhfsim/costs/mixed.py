"""Programs of places whose ranks are of different machines.

The program is made once for each kind of machine, as if all ranks were of it; then every replica takes its own seconds.
A replica that is spread over several kinds takes those of the slowest, a pipeline stage its own. Replicas meet where
the program says so: a place goes at the pace of its slowest rank where ranks meet, and only there. Transfers are the
same in every program; the links know whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .pipeline import PipelineSegment
from .segment import Segment


def mixed_program(programs: Mapping[int, list[Segment]], kinds: np.ndarray) -> list[Segment]:
    """One program out of one per kind of machine. kinds: of each rank, by (stage, replica, rank of the replica)."""
    if len(programs) == 1:
        return next(iter(programs.values()))
    here = np.array([(kinds == kind).any(axis=2) for kind in programs])  # by kind, stage, replica
    return [_mixed(list(segments), here) for segments in zip(*programs.values(), strict=True)]


def _mixed(segments: list[Segment], here: np.ndarray) -> Segment:
    shares = here.mean(axis=(1, 2)) / here.mean(axis=(1, 2)).sum()
    bound: dict[str, float] = {}
    for segment, share in zip(segments, shares.tolist(), strict=True):
        for cause, seconds in segment.bound.items():
            bound[cause] = bound.get(cause, 0.0) + share * seconds
    first = segments[0]
    if isinstance(first, PipelineSegment):
        return _mixed_pipeline([s for s in segments if isinstance(s, PipelineSegment)], here, bound)
    compute = np.array([s.compute_seconds for s in segments])
    of_replica: np.ndarray = np.asarray(here.any(axis=1))[:, :, None]
    if compute.shape[1] == 1:  # the same on all
        of_replica = np.ones((len(segments), 1, 1), dtype=bool)
    return replace(first, compute_seconds=_slowest(compute, of_replica), bound=bound)


def _mixed_pipeline(segments: list[PipelineSegment], here: np.ndarray, bound: dict[str, float]) -> PipelineSegment:
    first, virtual = segments[0], len(segments[0].forward_seconds)
    of_stage = here[:, np.arange(virtual) % first.stages][:, :, None]  # by kind, virtual stage, micro-batch, replica
    forward = _slowest(np.array([s.forward_seconds for s in segments]), of_stage)
    busy, backward = forward.sum(axis=0), None
    if first.backward_seconds is not None:
        backward = _slowest(np.array([s.backward_seconds for s in segments]), of_stage)
        busy = busy + backward.sum(axis=0)
    return replace(
        first, compute_seconds=busy.T / first.stages, forward_seconds=forward, backward_seconds=backward, bound=bound
    )


def _slowest(seconds: np.ndarray, here: np.ndarray) -> np.ndarray:
    """Of the kinds (first axis) that are there."""
    return np.asarray(np.where(here, seconds, 0.0).max(axis=0))
