"""What the ranks of a real run write down about their firings, and the timeline that comes of it."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from .firing import Firing
from .graph import ANY_PLACE, StageGraph
from .timeline import MemorySample, Span, Timeline


@dataclass(frozen=True)
class Clock:
    """offset_ns: to add to this rank's readings to get rank 0's. error_ns: the offset is right to within that."""

    offset_ns: int = 0
    error_ns: int = 0

    @staticmethod
    def read() -> int:
        """Nanoseconds of this rank's own clock."""
        return time.monotonic_ns()


# When a rank called a collective, and from when to when it was held up by it, in nanoseconds.
Call = tuple[int, int, int]


@dataclass
class Measured:
    """Of one firing on one rank: calls by group of ranks, bytes in collectives, seconds by section, peak bytes.

    counts: what is to be added up over ranks for `Span.counts`.
    """

    calls: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)
    collective_bytes: int = 0
    detail: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One firing on one rank, or a part of one that was stopped, in nanoseconds of that rank's clock.

    begin: the rank came to it; data: its inputs had arrived; start to end: its work. part: how often it was stopped
    before.
    """

    firing: Firing
    rank: int
    begin: int
    data: int
    start: int
    end: int
    measured: Measured
    part: int = 0


def record_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.jsonl"


class RecordFile:
    """Records of one rank as JSON Lines, each written at once, so that nothing is lost when the process ends."""

    def __init__(self, folder: Path, rank: int, clock: Clock) -> None:
        self._file = record_path(folder, rank).open("w", encoding="utf-8")
        self._write({"offset_ns": clock.offset_ns, "error_ns": clock.error_ns})

    def add(self, r: Record) -> None:
        calls = [[ranks, found] for ranks, found in r.measured.calls.items()]
        self._write(
            {
                "firing": r.firing,
                "part": r.part,
                "times": [r.begin, r.data, r.start, r.end],
                "calls": calls,
                "bytes": r.measured.collective_bytes,
                "detail": r.measured.detail,
                "peak": r.measured.peak_bytes,
                "counts": r.measured.counts,
            }
        )

    def named(self, f: Firing, name: Firing) -> None:
        """Consumers know the result of f by another name."""
        self._write({"firing": f, "name": name})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclass
class Recorded:
    """What the files of all ranks hold, on rank 0's clock: by firing and part, then by rank."""

    records: dict[tuple[Firing, int], dict[int, Record]] = field(default_factory=lambda: defaultdict(dict))
    names: dict[Firing, Firing] = field(default_factory=dict)
    error_ns: int = 0


def read(folder: Path, ranks: int) -> Recorded:
    """Every whole line of every rank's file; a line that was cut off is left out."""
    found = Recorded()
    for rank in range(ranks):
        path = record_path(folder, rank)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if not lines:
            continue
        header = json.loads(lines[0])
        offset = header["offset_ns"]
        found.error_ns = max(found.error_ns, header["error_ns"])
        for line in map(json.loads, lines[1:]):
            f = Firing(*line["firing"])
            if "name" in line:
                found.names[f] = Firing(*line["name"])
                continue
            calls = {
                tuple(ranks): [(a + offset, b + offset, c + offset) for a, b, c in times]
                for ranks, times in line["calls"]
            }
            measured = Measured(calls, line["bytes"], line["detail"], line["peak"], line["counts"])
            begin, data, start, end = (t + offset for t in line["times"])
            part = line["part"]
            found.records[f, part][rank] = Record(f, rank, begin, data, start, end, measured, part)
    return found


def timeline(
    graph: StageGraph,
    found: Recorded,
    ranks: int,
    iterations: int,
    *,
    warmup: int = 0,
    info: dict[str, Any] | None = None,
) -> Timeline:
    """The spans of all firings that ended, or stopped, on every rank of their place; time starts with the first kept.

    The first `warmup` iterations are left out and the others count from 0.
    """
    whole = {
        (f, part): [by_rank[rank] for rank in graph.ranks(f)]
        for (f, part), by_rank in sorted(found.records.items())
        if set(by_rank) == set(graph.ranks(f)) and f.iteration >= warmup
    }
    # By the name that consumers know: when it ended, and what ran.
    ended = {found.names.get(f, f): (max(r.end for r in records), f) for (f, _), records in whole.items()}
    zero = min((r.begin for records in whole.values() for r in records), default=0)
    last: dict[int, tuple[int, Firing]] = {}  # on each rank: when it became free, and of what
    spans, memory, moved = [], [], dict[str, int]()
    for (f, _), records in sorted(whole.items(), key=lambda item: (min(r.begin for r in item[1]), item[0])):
        # Clocks may be wrong by error_ns: a rank that was still busy by another rank's clock was not.
        free = max((last[r.rank][0] for r in records if r.rank in last), default=zero)
        earliest = max(zero, free - 2 * found.error_ns)
        span = _span(graph, f, records, earliest, free, zero, _released_by(graph, f, records, ended, last))
        spans.append(span)
        last |= {r.rank: (max(r.end for r in records), f) for r in records}
        memory += [
            MemorySample(r.rank, span.start_seconds, f.stage, {"peak": float(r.measured.peak_bytes)}) for r in records
        ]
        moved[f.stage] = moved.get(f.stage, 0) + sum(r.measured.collective_bytes for r in records)
    spans = [_counted_from(s, warmup) for s in sorted(spans, key=lambda s: (s.start_seconds, s.firing))]
    about = {"clock_error_seconds": 2 * found.error_ns / 1e9, "collective_bytes": dict(sorted(moved.items()))}
    return Timeline(spans, ranks, iterations, "real", memory, about | (info or {}))


def _counted_from(span: Span, warmup: int) -> Span:
    f, cause = span.firing, span.released_by
    cause = cause and cause._replace(iteration=cause.iteration - warmup)
    return replace(span, firing=f._replace(iteration=f.iteration - warmup), released_by=cause)


def _released_by(
    graph: StageGraph,
    f: Firing,
    records: list[Record],
    ended: dict[Firing, tuple[int, Firing]],
    last: dict[int, tuple[int, Firing]],
) -> Firing | None:
    """Of all that had to end before f, the last."""
    offered = f._replace(place=ANY_PLACE) if graph.at(f.stage).spread == "first" else f
    candidates = [ended[n] for n in graph.needs(offered) if n in ended]
    candidates += [last[r.rank] for r in records if r.rank in last]
    before = [c for c in candidates if c[0] <= max(r.data for r in records) and c[1] != f]
    return max(before, default=(0, None))[1]


def _span(
    graph: StageGraph, f: Firing, records: list[Record], earliest: int, not_before: int, zero: int, cause: Firing | None
) -> Span:
    """One span of all ranks; what is no collective and no waiting of a rank is its compute."""
    stage = graph.at(f.stage)
    begin, end = min(r.begin for r in records), max(r.end for r in records)
    if earliest <= begin < not_before:
        begin = not_before
    end = max(begin, end)
    data = min(max((r.data for r in records if r.data > r.begin), default=begin), end)
    data = max(data, begin)
    waited = _waited_in_calls(records)
    parts = []
    for r in records:
        start = min(max(r.start, data), end)
        done = min(max(r.end, start), end)
        held = sum(left - entered for times in r.measured.calls.values() for _, entered, left in times)
        held = min(held, done - start)
        in_calls = min(waited[r.rank], held)
        peers = (start - data) + (end - done) + in_calls
        parts.append((done - start - held, held - in_calls, peers))
    compute, communication, peers_seconds = (tuple(x / 1e9 for x in column) for column in zip(*parts, strict=True))
    names = sorted({name for r in records for name in r.measured.detail})
    counted = sorted({name for r in records for name in r.measured.counts})
    return Span(
        f,
        stage.kind,
        stage.model,
        stage.ranks_of(f.place),
        (begin - zero) / 1e9,
        (end - zero) / 1e9,
        compute,
        communication,
        peers_seconds,
        data_seconds=(data - begin) / 1e9,
        detail={name: fmean(r.measured.detail.get(name, 0.0) for r in records) for name in names},
        released_by=cause,
        counts={name: sum(r.measured.counts.get(name, 0.0) for r in records) for name in counted},
    )


def _waited_in_calls(records: Iterable[Record]) -> dict[int, int]:
    """Nanoseconds that each rank was held up in collectives by ranks that had not yet called them."""
    of_group: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    for r in records:
        for ranks, times in r.measured.calls.items():
            of_group[ranks][r.rank] = times
    waited = {r.rank: 0 for r in records}
    for by_rank in of_group.values():
        for calls in zip(*by_rank.values(), strict=False):
            slowest = max(called for called, _, _ in calls)
            for rank, (_, entered, left) in zip(by_rank, calls, strict=True):
                waited[rank] += max(0, min(slowest, left) - entered)
    return waited
