"""Seconds of an engine's steps through pipeline stages: a stage is busy with one micro-batch, others with others.

The running sequences of an engine are in as many micro-batches as it has stages (fewer where there are fewer of them).
A micro-batch goes through all stages, and its next step begins when the token of this one is drawn. That is how ReaLHF
and Megatron run a static batch (realhf/impl/model/backend/pipe_runner.py @be75fce9: generate with `default_inf_mbs`
micro-batches), and vLLM a continuous one: as many batches as stages are in flight, first in, first out, and those that
are in flight are left out of the next one (vllm/v1/engine/core.py @00080ee1, step_with_batch_queue).

A round is one step of every micro-batch. With f_i seconds of one micro-batch on stage i, n micro-batches take

    max(sum of f_i + what the host takes + hops between stages, n x the slowest f_i, n x the host's)

a round once the pipe is full: the cycle time of the max-plus system, exact for equal micro-batches. One token is never
sooner there than without stages; more sequences at a time are what stages bring.

Not modelled: micro-batches of unequal size (vLLM fills one to its token budget before it begins the next, so a few
short prompts may all be in one), the end of a rollout as the pipe runs empty, stages with layers of different kinds
(each has so many of the mean layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STRAIGHT = 1e-12  # relative: rounding of a mean of two numbers


@dataclass(frozen=True)
class StageSteps:
    """Steps of one micro-batch on each of `count` pipeline stages that are alike. Arrays have one entry per run.

    work: seconds of all steps by what limits them (flops, hbm, launch). first: seconds of the first step on the device,
    of which every next one takes `growth` more; none takes less than `floor`.
    """

    count: int
    work: np.ndarray
    first: np.ndarray
    growth: np.ndarray
    floor: float

    def seconds(self, run: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(self.first[run] + self.growth[run] * step, self.floor))


def rounds(
    stages: Sequence[StageSteps], host: np.ndarray, parts: np.ndarray, steps: np.ndarray, fills: np.ndarray
) -> np.ndarray:
    """Seconds of each run of so many rounds: flops, hbm, launch, host, and a fifth row in which a micro-batch waits for
    the others, so that hops between stages can pass beside it.

    host: its seconds for a step of one micro-batch. parts: micro-batches. fills: the pipe is empty before this round
    (of one step): the others begin behind the first.
    """

    def through(run: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.asarray(host[run] + sum(s.count * s.seconds(run, step) for s in stages))

    def slowest(run: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.asarray(np.max([host[run], *(s.seconds(run, step) for s in stages)], axis=0))

    def round_seconds(run: np.ndarray, step: np.ndarray) -> np.ndarray:
        alone, behind = through(run, step), slowest(run, step)
        full = np.maximum(alone, parts[run] * behind)
        return np.asarray(np.where(fills[run], alone + (parts[run] - 1) * behind, full))

    own = np.vstack([np.sum([s.count * s.work for s in stages], axis=0), host * steps])
    waits = np.maximum(sum_of_steps(round_seconds, steps) - own.sum(axis=0), 0.0)
    return np.vstack([own, waits])


def sum_of_steps(seconds: Callable[[np.ndarray, np.ndarray], np.ndarray], steps: np.ndarray) -> np.ndarray:
    """Of each run, the sum of `seconds(run, step)` over its steps; exact for convex, piecewise linear seconds.

    Such a function is a straight line between two points where its value half-way is the mean of theirs; other
    intervals are halved.
    """
    total = np.zeros(len(steps))
    run = np.flatnonzero(steps > 0)
    low, high = np.zeros(len(run)), steps[run] - 1.0
    while len(run):
        mean = (seconds(run, low) + seconds(run, high)) / 2
        straight = (high - low <= 1) | (seconds(run, (low + high) / 2) >= mean * (1 - STRAIGHT))
        np.add.at(total, run[straight], (mean * (high - low + 1))[straight])
        cut = np.floor((low + high) / 2)
        run, low, high, cut = (x[~straight] for x in (run, low, high, cut))
        run, low, high = np.tile(run, 2), np.concatenate([low, cut + 1]), np.concatenate([cut, high])
    return total
