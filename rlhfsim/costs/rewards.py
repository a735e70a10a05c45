"""Seconds until rewards are there that no model of ours gives: a function on the host, a judge, a sandbox.

A judge is one queue for all samples; a sandbox is one queue on each node, for the samples of the ranks there. Both take
samples first come, first served.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import numpy as np

from rlhfsim.batch import per_replica
from rlhfsim.graph import Stage
from rlhfsim.spec.algorithm import Algorithm


def function_seconds(stage: Stage, samples: int, chosen: Algorithm, rank_nodes: Sequence[int]) -> float:
    """The host's time for the samples of one place, in rounds of one a process.

    A node's processes are shared by all ranks of the stage there, equally; the node with the most ranks is slowest.
    """
    ranks = max(Counter(rank_nodes[rank] for rank in stage.ranks).values())
    rounds = ceil(Fraction(samples * ranks, stage.size * (chosen.reward_function_workers or ranks)))
    return rounds * chosen.reward_function_seconds


def queue_seconds(
    ranks: Sequence[int],
    arrival_seconds: np.ndarray,
    latency_seconds: np.ndarray,
    chosen: Algorithm,
    rank_nodes: Sequence[int],
) -> float:
    """From second 0, when the stage starts, until the last sample of a place with these ranks has its reward.

    arrival_seconds: when each sample came to the queue, negative if that was before the stage started. rank_nodes: the
    node of every rank of the cluster.
    """
    queues = [np.arange(len(arrival_seconds))]
    if chosen.reward == "sandbox":
        by_node: dict[int, list[np.ndarray]] = {}
        for rank, share in zip(ranks, per_replica(queues[0], len(ranks)), strict=True):
            by_node.setdefault(rank_nodes[rank], []).append(share)
        queues = [np.concatenate(shares) for shares in by_node.values()]
    done = [completions(arrival_seconds[q], latency_seconds[q], chosen.reward_concurrency) for q in queues]
    return max(0.0, *(float(d.max(initial=0.0)) for d in done))


def completions(arrival_seconds: np.ndarray, latency_seconds: np.ndarray, servers: int | None) -> np.ndarray:
    """When each request is done by so many equal servers, first come, first served (None: each has its own)."""
    if servers is None or servers >= len(arrival_seconds):
        return np.asarray(arrival_seconds + latency_seconds)
    free = [-np.inf] * servers
    done = np.zeros(len(arrival_seconds))
    for k in np.argsort(arrival_seconds, kind="stable").tolist():
        done[k] = max(free[0], arrival_seconds[k]) + latency_seconds[k]
        heapq.heapreplace(free, done[k])
    return done
