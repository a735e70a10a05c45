"""Partial rollout: more prompts are begun than a batch needs, and generation stops when enough of them have ended.

Co-located otherwise. What has not ended is stopped: with `resume` its tokens are kept, and the next iteration goes on
with it before it begins new prompts (its cache is computed again, and its tokens are of several versions); without, it
is lost (over-sampling with abort, which favours short responses).

In the frameworks: slime's --partial-rollout and --over-sampling-batch-size (THUDM/slime,
slime/rollout/sglang_rollout.py @0044b40d), which implements APRIL (arXiv 2509.18521); Kimi k1.5 (arXiv 2501.12599,
"partial rollout"), which cuts by a token budget instead of by what has ended: not modelled. verl's over_sample_rate.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, colocated


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    oversampling: float = 1.5,
    resume: bool = True,
    max_age: int | None = None,
) -> StageGraph:
    """oversampling: prompts at work for each one that the batch needs, those that are resumed included.

    resume: unfinished responses are continued in the next iteration; otherwise they are thrown away.
    max_age: prompts with tokens older than so many steps are thrown away (resume only).
    """
    graph = colocated.build(algorithm, devices)
    graph.alter(
        "gen",
        size=len(devices.ranks),
        oversampling=oversampling,
        unfinished="carry" if resume else "drop",
        max_age=max_age if resume else None,
    )
    return graph
