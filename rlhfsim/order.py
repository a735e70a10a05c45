"""Whether a timeline, simulated or real, kept the order that its graph asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .firing import Firing
from .format import rank_text
from .graph import ANY_PLACE, StageGraph
from .timeline import Span, Timeline


def violations(graph: StageGraph, timeline: Timeline, *, tolerance_seconds: float = 1e-9) -> list[str]:
    """What broke the graph's order, a sentence each; empty where it was obeyed.

    Every span must be of a stage of the graph, on whole places of it, start when all that it needs has ended, and be
    alone on its ranks. Times may be off by the tolerance and, in a real timeline, by `info["clock_error_seconds"]`.
    (A simulation runs symmetric places as one: its span counts for each place whose ranks it holds.)
    """
    slack = tolerance_seconds + float(timeline.info.get("clock_error_seconds", 0.0))
    spans = sorted(timeline.spans, key=lambda s: (s.start_seconds, s.end_seconds, s.firing))
    known = [span for span in spans if span.firing.stage in graph]
    unknown = dict.fromkeys(span.firing.stage for span in spans if span.firing.stage not in graph)
    return [
        *(f"the graph has no stage {stage!r}" for stage in unknown),
        *_misplaced(graph, known),
        *_early(graph, known, slack),
        *_overlapping(spans, slack),
    ]


def _firings(graph: StageGraph, span: Span) -> list[Firing]:
    """All places of the stage whose ranks the span holds."""
    stage, ranks = graph.at(span.firing.stage), set(span.ranks)
    return [span.firing._replace(place=p) for p in range(stage.places) if not ranks.isdisjoint(stage.ranks_of(p))]


def _misplaced(graph: StageGraph, spans: Sequence[Span]) -> Iterator[str]:
    for span in spans:
        if sorted(r for f in _firings(graph, span) for r in graph.ranks(f)) != sorted(span.ranks):
            found, allowed = rank_text(span.ranks), rank_text(graph.at(span.firing.stage).ranks)
            yield f"{_words(span.firing)} ran on ranks {found}, which are no places of it (it has {allowed})"


def _early(graph: StageGraph, spans: Sequence[Span], slack: float) -> Iterator[str]:
    ends = _ends(graph, spans)
    begun = set[Firing]()
    for span in spans:
        firings = [f for f in _firings(graph, span) if f not in begun]  # an interrupted one goes on without asking
        begun.update(firings)
        late = graph.at(span.firing.stage).spread == "first"  # the next chunk is offered to whichever place is free
        for need in dict.fromkeys(n for f in firings for n in graph.needs(f._replace(place=ANY_PLACE) if late else f)):
            if need not in ends:
                yield f"{_words(span.firing)} ran, but not {_words(need)}, which it needs"
            elif (early := ends[need] - span.start_seconds) > slack:
                yield f"{_words(span.firing)} started {early:.3g} s before the end of {_words(need)}, which it needs"


def _ends(graph: StageGraph, spans: Sequence[Span]) -> dict[Firing, float]:
    """When each firing ended, by the name that consumers know: chunks of spread "first" are numbered as they end."""
    ends: dict[Firing, float] = {}
    for span in spans:
        for f in _firings(graph, span):
            ends[f] = max(span.end_seconds, ends.get(f, span.end_seconds))
    for stage in (s for s in graph.stages() if s.spread == "first"):
        for number, seconds in enumerate(sorted(ends[f] for f in ends if f.stage == stage.name)):
            iteration, chunk = divmod(number, stage.firings)
            ends[Firing(iteration, stage.name, chunk, ANY_PLACE)] = seconds
    return ends


def _overlapping(spans: Sequence[Span], slack: float) -> Iterator[str]:
    last: dict[int, Span] = {}  # on each rank, the one that ends last
    for span in spans:
        for rank in span.ranks:
            before = last.get(rank)
            if before is not None and before.end_seconds > span.start_seconds + slack:
                yield f"{_words(span.firing)} started on rank {rank} during {_words(before.firing)}"
            if before is None or before.end_seconds < span.end_seconds:
                last[rank] = span


def _words(f: Firing) -> str:
    place = "" if f.place == ANY_PLACE else f", place {f.place}"
    return f"{f.stage} (iteration {f.iteration}, chunk {f.chunk}{place})"
