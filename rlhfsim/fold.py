"""Symmetric ranks once: a graph in which one rank stands for a block of ranks that all do the same.

The rank axis and the lane axis are cut wherever any stage begins or ends; inside a block all ranks run the same stages
with partners in the same blocks. It holds only for equal work: ranks whose lengths differ must not be folded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from .firing import Firing
from .graph import Stage, StageGraph


@dataclass(frozen=True)
class Fold:
    """A smaller graph and what its ranks and lanes stand for in the original one."""

    original: StageGraph
    graph: StageGraph
    ranks: tuple[tuple[int, ...], ...]
    lanes: tuple[range, ...]

    def places(self, f: Firing) -> list[int]:
        """The places of the original stage for which this firing stands."""
        stage, small = self.original.at(f.stage), self.graph.at(f.stage)
        if small.places == stage.places:
            return [f.place]
        block = set(self.ranks[small.ranks_of(f.place)[0]])
        return [p for p in range(stage.places) if stage.ranks_of(p)[0] in block]


def unfolded(graph: StageGraph) -> Fold:
    """Every rank for itself."""
    highest = max(r for s in graph.stages() for r in s.ranks)
    return Fold(
        graph, graph, tuple((r,) for r in range(highest + 1)), tuple(range(k, k + 1) for k in range(graph.lanes))
    )


def fold(graph: StageGraph, cuts: Iterable[int] = ()) -> Fold:
    """The smallest equivalent graph that contiguous blocks allow; the graph itself where there is none.

    cuts: ranks at which a block must end, as those on both sides are no equals.
    """
    stages = graph.stages()
    axis = sorted({r for s in stages for r in s.ranks})
    position = {rank: k for k, rank in enumerate(axis)}
    runs = {}
    for s in stages:
        spots = [position[r] for r in s.ranks]
        if spots != sorted(spots) and s.places > 1:
            return unfolded(graph)
        runs[s.name] = _runs(sorted(spots))
        if s.places > 1 and len(runs[s.name]) > 1:
            return unfolded(graph)
    rank_cuts = {cut for rs in runs.values() for r in rs for cut in (r.start, r.stop)}
    rank_cuts |= {bisect_left(axis, cut) for cut in cuts}
    lane_cuts = {0, graph.lanes} | {cut for s in stages for cut in (s.serves.start, s.serves.stop)}
    for s in stages:
        if s.spread != "each":  # places that take turns differ in time
            rank_cuts |= {position[s.ranks[0]] + k * s.size for k in range(s.places)}
    if not _propagate([s for s in stages if _tied(s, runs[s.name])], position, rank_cuts, lane_cuts):
        return unfolded(graph)

    ends, lanes = sorted(rank_cuts), sorted(lane_cuts)
    block_at, lane_at = {c: k for k, c in enumerate(ends)}, {c: k for k, c in enumerate(lanes)}
    small = StageGraph(lanes=len(lanes) - 1)
    for s in stages:
        blocks = tuple(b for run in runs[s.name] for b in range(block_at[run.start], block_at[run.stop]))
        size = len(blocks) if s.places == 1 else 1 if s.spread == "each" else len(blocks) // s.places
        serves = range(lane_at[s.serves.start], lane_at[s.serves.stop])
        small.add_node(s.name, stage=replace(s, ranks=blocks, size=size, serves=serves))
    small.add_edges_from(graph.edges(data=True))
    rank_counts = [b - a for a, b in pairwise(ends)]
    lane_counts = [b - a for a, b in pairwise(lanes)]
    if not all(_alike(s, small.at(s.name), rank_counts, lane_counts) for s in stages):
        return unfolded(graph)
    return Fold(
        graph, small, tuple(tuple(axis[a:b]) for a, b in pairwise(ends)), tuple(range(a, b) for a, b in pairwise(lanes))
    )


def _alike(stage: Stage, folded: Stage, rank_counts: list[int], lane_counts: list[int]) -> bool:
    """Whether each place of the folded stage stands for whole places of the stage, with their lanes."""
    if stage.places == 1:
        return True
    if stage.spread == "each" and len(folded.serves) % folded.places:
        return False
    for place in range(folded.places):
        whole, inside = divmod(sum(rank_counts[block] for block in folded.ranks_of(place)), stage.size)
        if inside or (stage.spread != "each" and whole != 1):
            return False
        lanes = sum(lane_counts[k] for k in folded.lanes_of(place))
        if stage.spread == "each" and lanes * stage.places != whole * len(stage.serves):
            return False
    return True


def _runs(spots: list[int]) -> list[range]:
    """Maximal runs of consecutive positions."""
    starts = [k for k, x in enumerate(spots) if k == 0 or spots[k - 1] != x - 1]
    return [range(spots[a], spots[b - 1] + 1) for a, b in zip(starts, [*starts[1:], len(spots)], strict=True)]


def _tied(stage: Stage, runs: list[range]) -> bool:
    """Whether a cut among the stage's ranks is a cut among its lanes."""
    one_lane_per_rank = len(stage.ranks) == len(stage.serves) and len(runs) == 1
    return stage.spread == "each" and (stage.places > 1 or one_lane_per_rank)


def _propagate(stages: list[Stage], position: dict[int, int], rank_cuts: set[int], lane_cuts: set[int]) -> bool:
    """Carry cuts from lanes to ranks and back until nothing changes; False where one falls inside a place."""
    while True:
        before = len(rank_cuts), len(lane_cuts)
        for s in stages:
            parts = s.places if s.places > 1 else len(s.ranks)
            start, first = position[s.ranks[0]], s.serves.start
            per_part, lanes_per_part = len(s.ranks) // parts, len(s.serves) // parts
            for cut in list(lane_cuts):
                if first < cut < s.serves.stop:
                    part, inside = divmod(cut - first, lanes_per_part)
                    rank_cuts |= {start + (part + k) * per_part for k in ((0, 1) if inside else (0,))}
            for cut in list(rank_cuts):
                if start < cut < start + len(s.ranks):
                    part, inside = divmod(cut - start, per_part)
                    if inside:
                        return False
                    lane_cuts.add(first + part * lanes_per_part)
        if before == (len(rank_cuts), len(lane_cuts)):
            return True
