"""Pipeline parallelism as an executed schedule: bubbles come out of it, they are not a formula.

A *virtual stage* is a chunk of layers on a stage; chunk c of stage s is virtual stage ``c * stages + s``, and a
micro-batch passes them in that order (and back). Each stage executes its forwards and backwards in a fixed order: 1F1B
(Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021, section 2.2), with several
chunks its interleaved form, as in Megatron-LM's `forward_backward_pipelining_with_interleaving`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from .segment import Elapsed, Route, Segment, exposed_seconds

Role = Literal["forward", "backward", "hop", "gather", "reduce"]


class Step(NamedTuple):
    """A micro-batch through one virtual stage."""

    backward: bool
    virtual_stage: int
    micro_batch: int


def stage_order(stage: int, stages: int, chunks: int, micro_batches: int, *, forward_only: bool = False) -> list[Step]:
    """The order in which one stage executes its steps.

    Micro-batches advance in groups of `stages`: a group goes through chunk 0, then chunk 1, ...; with one chunk that is
    simply one micro-batch after the other. So many forwards come first that the first backward can arrive.
    """
    turns = [
        (chunk, micro_batch)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + stages, micro_batches))
    ]
    forwards = [Step(False, chunk * stages + stage, m) for chunk, m in turns]
    if forward_only:
        return forwards
    backwards = [Step(True, (chunks - 1 - chunk) * stages + stage, m) for chunk, m in turns]
    behind = stages - 1 - stage
    warm_up = min(behind if chunks == 1 else 2 * behind + (chunks - 1) * stages, len(turns))
    steady = [step for pair in zip(forwards[warm_up:], backwards, strict=False) for step in pair]
    return forwards[:warm_up] + steady + backwards[len(turns) - warm_up :]


@lru_cache(maxsize=64)
def execution_order(stages: int, chunks: int, micro_batches: int, forward_only: bool) -> tuple[Step, ...]:
    """All steps of all stages, each after those that it needs."""
    queues = [stage_order(s, stages, chunks, micro_batches, forward_only=forward_only) for s in range(stages)]
    position = [0] * stages
    done: set[Step] = set()
    order: list[Step] = []
    last = stages * chunks - 1
    while len(order) < sum(map(len, queues)):
        before = len(order)
        for s, queue in enumerate(queues):
            while position[s] < len(queue) and _input_of(queue[position[s]], last, done):
                step = queue[position[s]]
                done.add(step)
                order.append(step)
                position[s] += 1
        assert len(order) > before, "the pipeline schedule is circular"
    return tuple(order)


def _input_of(step: Step, last: int, done: set[Step]) -> bool:
    needed = _predecessor(step, last)
    return needed is None or needed in done


def _predecessor(step: Step, last: int) -> Step | None:
    """The step on another virtual stage whose output this one uses; the last stage's backward uses its own forward."""
    if step.backward:
        if step.virtual_stage == last:
            return Step(False, last, step.micro_batch)
        return Step(True, step.virtual_stage + 1, step.micro_batch)
    return Step(False, step.virtual_stage - 1, step.micro_batch) if step.virtual_stage else None


def makespan(
    forward: np.ndarray,
    backward: np.ndarray | None,
    hop: np.ndarray,
    stages: int,
    *,
    gather: float = 0.0,
    reduce: float = 0.0,
    pieces: float = 1.0,
) -> np.ndarray:
    """Seconds until the last step and the last transfer have ended, one per replica.

    forward, backward: seconds, shape (virtual stages, micro-batches, replicas); backward None: forward passes only.
    hop: seconds, shape (micro-batches,), between a virtual stage and the next; it delays the receiver, not the sender
    (sends are asynchronous, as with Megatron-LM's overlapped p2p; its blocking p2p is slower by up to one hop a step).
    With several chunks Megatron-LM wants a multiple of `stages` micro-batches: empty ones fill up.
    gather, reduce: seconds of a virtual stage's weights, ahead of its first micro-batch, and of its gradients, behind
    the backward of its last one; each stage moves one virtual stage after the other. The very first, which nothing else
    can hide, moves in `pieces` (layers), of which the last is computed with once it has come, or sent once it is
    computed; the others as a whole (Megatron-LM, megatron/core/distributed/distributed_data_parallel.py).
    """
    virtual, micro_batches, replicas = forward.shape
    final = micro_batches - 1
    if micro_batches == 0:
        return np.zeros(replicas)
    if virtual > stages and micro_batches % stages:
        empty = -micro_batches % stages
        filled = ((0, 0), (0, empty), (0, 0))
        forward, hop = np.pad(forward, filled), np.pad(hop, (0, empty))
        backward = None if backward is None else np.pad(backward, filled)
        micro_batches += empty
    last = virtual - 1
    clock, reduced = np.zeros((stages, replicas)), np.zeros((stages, replicas))
    ended: dict[Step, np.ndarray] = {}
    for step in execution_order(stages, virtual // stages, micro_batches, backward is None):
        stage = step.virtual_stage % stages
        start = clock[stage]
        needed = _predecessor(step, last)
        if needed is not None:
            delay = hop[step.micro_batch] if needed.virtual_stage % stages != stage else 0.0
            start = np.maximum(start, ended[needed] + delay)
        seconds = backward if step.backward else forward
        assert seconds is not None
        own = seconds[step.virtual_stage, step.micro_batch]
        split = 1.0 if step.virtual_stage else pieces
        end = start + own
        if gather and not step.backward and step.micro_batch == 0:
            end = np.maximum(end, gather * (step.virtual_stage // stages + 1) + own / split)
        clock[stage] = ended[step] = end
        if reduce and step.backward and step.micro_batch == final:
            reduced[stage] = np.maximum(np.maximum(reduced[stage], start) + reduce, end + reduce / split)
    return np.asarray(np.maximum(clock, reduced).max(axis=0))


@dataclass(frozen=True)
class PipelineSegment(Segment):
    """All micro-batches of one pass through a pipeline; the kinds of the segment are its micro-batches.

    compute_seconds: mean over stages, forward and backward. forward_seconds, backward_seconds: as in `makespan`.
    roles: what each transfer belongs to. A `forward` or `backward` transfer carries the collectives of one micro-batch
    inside one stage (all its chunks); it blocks, or runs beside the stage's compute. A `hop` carries one micro-batch
    from one virtual stage to the next. A `gather` or `reduce` carries weights or gradients of one stage (all its
    chunks), beside its first forward or last backward; its payload is in the first kind. `pieces`: see `makespan`.
    Bubbles are `peers`: a stage that waits for another one.
    """

    stages: int = 1
    forward_seconds: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 1)))
    backward_seconds: np.ndarray | None = None
    roles: tuple[Role, ...] = ()
    pieces: float = 1.0

    def slowed(self, factor: float) -> PipelineSegment:
        busy = super().slowed(factor)
        backward = None if self.backward_seconds is None else self.backward_seconds * factor
        return replace(
            self,
            compute_seconds=busy.compute_seconds,
            bound=busy.bound,
            forward_seconds=self.forward_seconds * factor,
            backward_seconds=backward,
        )

    def elapsed(self, routes: Sequence[Route], rates: Sequence[float]) -> Elapsed:
        roles: tuple[Role, ...] = ("forward", "backward", "hop", "gather", "reduce")
        blocking, beside = ({role: np.zeros(len(self.repeats)) for role in roles} for _ in range(2))
        for transfer, role, route, rate in zip(self.transfers, self.roles, routes, rates, strict=True):
            blocks = role in ("forward", "backward") and (transfer.blocking or not self.prefetch)
            elapsed = exposed_seconds(transfer, route, rate)
            seconds = blocking if blocks else beside
            seconds[role] = seconds[role] + elapsed
            if not blocks:
                blocking[role] = blocking[role] + transfer.slows * elapsed
        chunks = len(self.forward_seconds) // self.stages
        collectives: float | np.ndarray = 0.0  # how much longer they make the steps of the mean stage

        def occupied(compute: np.ndarray, role: Role) -> np.ndarray:
            nonlocal collectives
            hidden = beside[role][:, None] / chunks
            collectives = collectives + blocking[role].sum()
            collectives = collectives + np.maximum(hidden - compute, 0.0).sum(axis=(0, 1)) / self.stages
            return np.asarray(np.maximum(compute, hidden) + blocking[role][:, None] / chunks)

        forward = occupied(self.forward_seconds, "forward")
        backward = None if self.backward_seconds is None else occupied(self.backward_seconds, "backward")
        hop = beside["hop"]
        steps = total = float(makespan(forward, backward, hop, self.stages).max())
        gather, reduce = (float(beside[role].sum()) / chunks for role in ("gather", "reduce"))
        if gather or reduce:
            moved = {"gather": gather, "reduce": reduce, "pieces": self.pieces}
            total = float(makespan(forward, backward, hop, self.stages, **moved).max())
        busy = self.compute_seconds @ self.repeats
        exposed = np.minimum(collectives, steps - busy) + (total - steps)
        return Elapsed(total, busy, exposed, total - busy - exposed)
