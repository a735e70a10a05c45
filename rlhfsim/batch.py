"""Which samples a firing handles: the batch of an iteration cut in lanes and chunks.

A chunk is a quantity and a lane a share: sample ids are dealt to lanes first, so that a lane's data stay where they are
however many chunks a stage uses.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .firing import Firing
from .graph import Stage, StageGraph


def samples_of(graph: StageGraph, f: Firing, samples: int) -> np.ndarray:
    """Ids (0 to samples-1) of the samples that firing f handles, lane by lane."""
    stage = graph.at(f.stage)
    chunk = f.chunk % stage.chunks
    lanes = np.arange(stage.lanes_of(f.place).start, stage.lanes_of(f.place).stop)
    start = lanes * samples // graph.lanes
    size = (lanes + 1) * samples // graph.lanes - start
    low = start + chunk * size // stage.chunks
    high = start + (chunk + 1) * size // stage.chunks
    return np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)]) if len(lanes) else np.arange(0)


def per_replica(ids: np.ndarray, replicas: int) -> list[np.ndarray]:
    """Contiguous shares of a firing's samples, one for each data-parallel replica of its place."""
    cuts = np.arange(replicas + 1) * len(ids) // replicas
    return [ids[a:b] for a, b in pairwise(cuts)]


def even(graph: StageGraph, samples: int) -> bool:
    """Whether every firing of a stage handles equally many samples on every place and in every lane."""
    return all(samples % (graph.lanes * s.chunks) == 0 and _divides(s, graph, samples) for s in graph.stages())


def _divides(stage: Stage, graph: StageGraph, samples: int) -> bool:
    return (samples // graph.lanes * len(stage.serves) // stage.chunks) % stage.places == 0 or stage.spread != "each"
