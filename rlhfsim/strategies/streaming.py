"""Streaming: responses go to scoring and training as they end, on other ranks, while the rest is still generated.

On-policy: all responses of an iteration are begun with its weights; new ones wait for the update. What a long tail
costs is hidden behind the training of what has ended, as far as mini-batches allow. Behaviour log-probs come from the
engine: by the time that a chunk arrives the actor may have trained on the one before.

In the frameworks: StreamRL (Zhong et al. 2025, arXiv 2504.15930, "stream generation" and "dynamic-batch pipelining"),
RLinf's spatial pipelining. With `staleness` 1 the next iteration's generation overlaps too, as in StreamRL's
asynchronous mode. Not modelled: StreamRL's length-aware dispatch; gradients that accumulate below a mini-batch.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, asynchronous


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    chunks: int = 8,
    staleness: int = 0,
    split: dict[str, float] | None = None,
) -> StageGraph:
    """chunks: pieces in which responses that have ended go on. staleness: as in `asynchronous`.

    split: shares of the ranks, by `generation` and `training`.
    """
    return asynchronous.build(
        algorithm,
        devices,
        staleness=staleness,
        interrupt=False,
        chunks=chunks,
        stream=True,
        recompute_log_probs=False,
        split=split,
    )
