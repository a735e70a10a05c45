"""Which samples a firing handles: the batch of an iteration cut in lanes and chunks.

Both are known by a sample's number. A chunk is a range of numbers, so that a mini-batch holds the same samples wherever
models are placed. Lanes take turns (prompt by prompt, where that is even): a lane's data stay where they are however
many chunks a stage uses, and every chunk has its share of each lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from .firing import Firing
from .graph import Stage, StageGraph


def samples_of(
    graph: StageGraph, f: Firing, samples: int, *, together: int = 1, lanes: range | None = None
) -> np.ndarray:
    """Numbers (0 to samples-1) of the samples that firing f handles, lane by lane.

    together: samples in a row that share a lane (see `kept_together`). lanes: only the samples of these.
    """
    stage = graph.at(f.stage)
    chunk, lanes = f.chunk % stage.chunks, stage.lanes_of(f.place) if lanes is None else lanes
    low, high = chunk * samples // stage.chunks, (chunk + 1) * samples // stage.chunks
    first, turns = low // together, -(-high // together)  # a turn gives one lane `together` samples
    of_lane = first + (_turns(graph.lanes)[lanes.start : lanes.stop] - first) % graph.lanes
    turn = of_lane[:, None] + np.arange(0, turns - first, graph.lanes)
    found = (turn[..., None] * together + np.arange(together)).ravel()
    return found[(low <= found) & (found < high)]


@lru_cache
def _turns(lanes: int) -> np.ndarray:
    """When each lane has its turn: neighbours far apart, as in van der Corput's sequence, so that samples that are too
    few for a round still spread evenly over places of many lanes."""
    bits = (lanes - 1).bit_length()
    order = sorted(range(lanes), key=lambda lane: int(f"{lane:0{bits}b}"[::-1], 2))
    return np.argsort(order)


def kept_together(graph: StageGraph, samples: int, responses_per_prompt: int) -> int:
    """Samples in a row that share a lane: a prompt's responses, where lanes and chunks are whole numbers of prompts."""
    whole = all(samples % (graph.lanes * s.chunks * responses_per_prompt) == 0 for s in graph.stages())
    return responses_per_prompt if whole else 1


def per_replica(ids: np.ndarray, replicas: int) -> list[np.ndarray]:
    """Contiguous shares of a firing's samples, one for each data-parallel replica of its place."""
    cuts = np.arange(replicas + 1) * len(ids) // replicas
    return [ids[a:b] for a, b in pairwise(cuts)]


def even(graph: StageGraph, samples: int) -> bool:
    """Whether every firing of a stage handles equally many samples on every place and in every lane."""
    return all(samples % (graph.lanes * s.chunks) == 0 and _divides(s, graph, samples) for s in graph.stages())


def _divides(stage: Stage, graph: StageGraph, samples: int) -> bool:
    return (samples // graph.lanes * len(stage.serves) // stage.chunks) % stage.places == 0 or stage.spread != "each"


@dataclass(frozen=True)
class Split:
    """How the samples of an iteration are split in lanes and over ranks. together: see `samples_of`."""

    graph: StageGraph
    samples: int
    together: int = 1

    def of_lane(self, f: Firing, lane: int) -> list[int]:
        """The samples of a firing that lie in a lane."""
        alone = range(lane, lane + 1)
        found: list[int] = samples_of(self.graph, f, self.samples, together=self.together, lanes=alone).tolist()
        return found

    def shares(self, f: Firing) -> dict[int, list[int]]:
        """The samples that each rank of the firing's place works on."""
        ids, ranks = samples_of(self.graph, f, self.samples, together=self.together), self.graph.ranks(f)
        return {rank: own.tolist() for rank, own in zip(ranks, per_replica(ids, len(ranks)), strict=True)}

    def share(self, f: Firing, rank: int) -> list[int]:
        return self.shares(f)[rank]

    def at_home(self, f: Firing) -> bool:
        """Whether every rank's share lies on it, in lanes whose home it is."""
        stage = self.graph.at(f.stage)
        homes = {s: stage.home(lane, f.place) for lane in stage.lanes_of(f.place) for s in self.of_lane(f, lane)}
        return all(homes[s] == rank for rank, own in self.shares(f).items() for s in own)
