"""A timeline as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

One process per timeline and node, one thread per rank. Ranks that do the same at the same times are one thread.
Format: "Trace Event Format" (Google, document of the Catapult project): `ts` and `dur` are microseconds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError
from .firing import Firing
from .format import rank_text
from .metrics import base_stage, evenly, rank_groups, spans_by_rank
from .output import replacing
from .timeline import Span, Timeline, per_replica

MAX_TRACKS = 64
Event = dict[str, Any]


class _Track(NamedTuple):
    name: str
    rank: int
    process: int
    spans: Sequence[Span]


def write_trace(
    timelines: Mapping[str, Timeline],
    path: str | Path,
    *,
    ranks: Sequence[int] | None = None,
    max_tracks: int = MAX_TRACKS,
    flows: bool = True,
) -> None:
    """Write the timelines, each under its label, into one trace file. Same timelines, same bytes.

    ranks: show these, unfolded. Otherwise groups of like ranks, evenly chosen where there are more than `max_tracks`
    a timeline. flows: arrows from each span to those that it released. Which ranks share a node comes from
    `info["nodes"]` (the node of each rank) or `info["ranks_per_node"]`; without them there is one node.
    """
    events: list[Event] = []
    processes = itertools.count(1)
    arrows = itertools.count(1)
    for label, timeline in timelines.items():
        per_node = int(timeline.info.get("ranks_per_node") or max(1, timeline.ranks))
        nodes = timeline.info.get("nodes") or [rank // per_node for rank in range(timeline.ranks)]
        shown, skipped = _shown(timeline, ranks, max_tracks)
        name = label if timeline.source in label else f"{label} ({timeline.source})"
        note = f", {skipped} more groups of ranks not shown" if skipped else ""
        process_of: dict[int, int] = {}
        for _, rank, _ in shown:
            node = nodes[rank]
            if node not in process_of:
                process_of[node] = next(processes)
                events.append(_meta(process_of[node], 0, "process_name", {"name": f"{name}: node {node}{note}"}))
                events.append(_meta(process_of[node], 0, "process_sort_index", {"sort_index": process_of[node]}))
        tracks = [_Track(name, rank, process_of[nodes[rank]], spans) for name, rank, spans in shown]
        for track in tracks:
            events.append(_meta(track.process, track.rank, "thread_name", {"name": track.name}))
            events.append(_meta(track.process, track.rank, "thread_sort_index", {"sort_index": track.rank}))
            events += [_slice(track, span) for span in track.spans]
            events += _counters(track, timeline)
        if flows:
            events += _flows(tracks, arrows)
    text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, sort_keys=True, separators=(",", ":"))
    with replacing(path) as file:
        file.write_text(text + "\n", encoding="utf-8")


def _shown(
    timeline: Timeline, ranks: Sequence[int] | None, max_tracks: int
) -> tuple[list[tuple[str, int, Sequence[Span]]], int]:
    """(name, first rank, spans) of each track, and how many groups of ranks have none."""
    if ranks is not None:
        for rank in ranks:
            if not 0 <= rank < timeline.ranks:
                raise InputError(f"there is no rank {rank} (allowed: 0 to {timeline.ranks - 1})", field="ranks")
        spans_of = spans_by_rank(timeline)
        return [(f"rank {rank}", rank, spans_of[rank]) for rank in sorted(set(ranks))], 0
    groups = rank_groups(timeline)
    kept = evenly(groups, max_tracks)
    return [(f"rank{'s' * (len(g.ranks) > 1)} {g.label}", g.ranks[0], g.spans) for g in kept], len(groups) - len(kept)


def _meta(process: int, thread: int, name: str, args: Event) -> Event:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}


def _microseconds(seconds: float) -> float:
    """To whole nanoseconds: both ends of a span are rounded alike, so that neighbours never overlap."""
    return round(seconds * 1e9) / 1e3


def _slice(track: _Track, span: Span) -> Event:
    """A complete event. Where the replicas differ, its seconds are those of the replica of the track's rank."""
    replicas = per_replica(span)
    compute, communication, peers, data, link = replicas[
        span.ranks.index(track.rank) * len(replicas) // len(span.ranks)
    ]
    start, end = round(span.start_seconds * 1e9), round(span.end_seconds * 1e9)
    args = {
        "iteration": span.firing.iteration,
        "chunk": span.firing.chunk,
        "place": span.firing.place,
        "model": span.model,
        "kind": span.kind,
        "ranks": rank_text(span.ranks),
        "compute_seconds": compute,
        "communication_seconds": communication,
        "wait_peers_seconds": peers,
        "wait_data_seconds": data,
        "wait_link_seconds": link,
        "released_by": "nothing" if span.released_by is None else _text(span.released_by),
        "detail_seconds": span.detail,
        "bound_seconds": span.bound,
        "counts": span.counts,
    }
    return {
        "ph": "X",
        "name": span.firing.stage,
        "cat": base_stage(span.firing.stage),
        "pid": track.process,
        "tid": track.rank,
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
        "args": args,
    }


def _text(firing: Firing) -> str:
    return f"{firing.stage}, iteration {firing.iteration}, chunk {firing.chunk}, place {firing.place}"


def _counters(track: _Track, timeline: Timeline) -> Iterator[Event]:
    """Bytes by component on the track's rank; a component that is gone must be set to zero."""
    samples = sorted((m for m in timeline.memory if m.rank == track.rank), key=lambda m: m.seconds)
    components = sorted({name for sample in samples for name in sample.bytes_by_component})
    for sample in samples:
        values = {name: sample.bytes_by_component.get(name, 0.0) for name in components}
        yield {
            "ph": "C",
            "name": f"memory of rank {track.rank} (bytes)",
            "pid": track.process,
            "tid": track.rank,
            "ts": _microseconds(sample.seconds),
            "args": values,
        }


def _flows(tracks: Sequence[_Track], arrows: Iterator[int]) -> Iterator[Event]:
    """An arrow from the end of a releaser to the start of what it released, if both are on a track."""
    shown: dict[Firing, tuple[_Track, Span]] = {}
    for track in tracks:
        for span in track.spans:
            if span.firing not in shown or shown[span.firing][1].end_seconds < span.end_seconds:
                shown[span.firing] = (track, span)
    for track in tracks:
        for span in track.spans:
            if span.released_by not in shown or span.released_by is None:
                continue
            giver, before = shown[span.released_by]
            number = next(arrows)
            common = {"name": "releases", "cat": "release", "id": number}
            # One nanosecond before the end, since a viewer ties an arrow to the slice in which it begins.
            out = max(_microseconds(before.start_seconds), _microseconds(before.end_seconds) - 1e-3)
            yield {**common, "ph": "s", "pid": giver.process, "tid": giver.rank, "ts": round(out, 3)}
            yield {
                **common,
                "ph": "f",
                "bp": "e",
                "pid": track.process,
                "tid": track.rank,
                "ts": _microseconds(span.start_seconds),
            }
