"""Spans and timelines: what every executor gives back and everything else reads.

A rank-second is exactly one of compute, exposed communication, waiting (for a peer, for data, for a link) or idle;
a real and a simulated timeline mean the same by each.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .firing import Firing
from .output import replacing

VERSION = 1
STRICT = {"extra": "forbid", "allow_inf_nan": False}  # for pydantic, when `read` checks what a file holds


@dataclass(frozen=True)
class Span:
    """Ranks that were held by one firing from start to end (an interrupted firing has several spans).

    ranks: all ranks held, replica by replica in equal shares. Per replica, in that order (or one entry for all, where
    they are alike): compute_seconds, communication_seconds (exposed), peer_seconds (waiting for the slowest replica).
    data_seconds: waiting for inputs; link_seconds: extra time since others used the same links. So for each replica
    compute + communication + peer + data + link = end - start.
    detail: seconds by named component ("prefill", "decode", "controller", ...), mean over replicas.
    bound: seconds by what limits the compute ("flops", "hbm", "launch", "host", ...), mean over replicas.
    released_by: the firing whose end let this one start; None for the first.
    counts: what happened beside time passing, over all ranks held (generation: see `metrics.GenerationSummary`).
    """

    firing: Firing
    kind: str
    model: str
    ranks: tuple[int, ...]
    start_seconds: float
    end_seconds: float
    compute_seconds: tuple[float, ...] = (0.0,)
    communication_seconds: tuple[float, ...] = (0.0,)
    peer_seconds: tuple[float, ...] = (0.0,)
    data_seconds: float = 0.0
    link_seconds: float = 0.0
    detail: dict[str, float] = field(default_factory=dict)
    bound: dict[str, float] = field(default_factory=dict)
    released_by: Firing | None = None
    counts: dict[str, float] = field(default_factory=dict)

    __pydantic_config__ = STRICT

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True)
class MemorySample:
    """Bytes on one rank from this instant on, by component."""

    rank: int
    seconds: float
    phase: str
    bytes_by_component: dict[str, float]

    __pydantic_config__ = STRICT


@dataclass
class Timeline:
    """Spans of some iterations on some ranks.

    source: "simulated" or "real". ranks: how many devices there are (idle ones count). info: scenario name, strategy,
    cluster, seed, versions, clock error: whatever identifies the run.
    """

    spans: list[Span]
    ranks: int
    iterations: int
    source: str = "simulated"
    memory: list[MemorySample] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def end_seconds(self) -> float:
        return max((s.end_seconds for s in self.spans), default=0.0)

    def of(self, *, stage: str | None = None, iteration: int | None = None) -> list[Span]:
        return [
            s
            for s in self.spans
            if (stage is None or s.firing.stage == stage) and (iteration is None or s.firing.iteration == iteration)
        ]


def write(timeline: Timeline, path: str | Path) -> None:
    """JSON Lines: a header, then one line a span, then one line a memory sample. Same timeline, same bytes.

    The header counts both, so that a file that was cut off is noticed. `info` must be JSON data without tuples.
    """
    header = {
        "rlhfsim_timeline": VERSION,
        "source": timeline.source,
        "ranks": timeline.ranks,
        "iterations": timeline.iterations,
        "info": timeline.info,
        "spans": len(timeline.spans),
        "memory_samples": len(timeline.memory),
    }
    lines: Iterable[dict[str, Any]] = (
        header,
        *({"span": asdict(s)} for s in timeline.spans),
        *({"memory": asdict(m)} for m in timeline.memory),
    )
    text = "".join(json.dumps(line, sort_keys=True, allow_nan=False) + "\n" for line in lines)
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


@dataclass
class _Header:
    rlhfsim_timeline: int
    source: str
    ranks: int
    iterations: int
    info: dict[str, Any]
    spans: int
    memory_samples: int

    __pydantic_config__ = STRICT


@dataclass
class _Row:
    span: Span | None = None
    memory: MemorySample | None = None

    __pydantic_config__ = STRICT


def read(path: str | Path) -> Timeline:
    """The timeline that `write` wrote, exactly. InputError names the file and line of whatever is wrong."""
    from pydantic import TypeAdapter, ValidationError  # not needed by those who only make timelines

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read as a timeline ({getattr(error, 'strerror', None) or error})", where=str(path)
        ) from None

    def parse(adapter: TypeAdapter[Any], number: int) -> Any:
        try:
            return adapter.validate_json(lines[number - 1], strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(first["msg"], field=".".join(map(str, first["loc"])), where=f"{path}:{number}") from None

    if not lines or '"rlhfsim_timeline"' not in lines[0]:
        raise InputError("not a timeline: the first line must be a header with rlhfsim_timeline", where=f"{path}:1")
    _check_version(lines[0], path)
    header = parse(TypeAdapter(_Header), 1)
    adapter: TypeAdapter[Any] = TypeAdapter(_Row)
    spans, memory = [], []
    for number in range(2, len(lines) + 1):
        row = parse(adapter, number)
        if (row.span is None) == (row.memory is None):
            raise InputError("a line holds either a span or a memory sample", where=f"{path}:{number}")
        if row.span is not None:
            spans.append(row.span)
        else:
            memory.append(row.memory)
    if (len(spans), len(memory)) != (header.spans, header.memory_samples):
        raise InputError(
            f"holds {len(spans)} spans and {len(memory)} memory samples, but the header promises "
            f"{header.spans} and {header.memory_samples}: was it cut off?",
            where=f"{path}:{len(lines)}",
        )
    return Timeline(spans, header.ranks, header.iterations, header.source, memory, header.info)


def _check_version(line: str, path: str | Path) -> None:
    """Before anything else of the header, since another version may have other fields."""
    try:
        version = json.loads(line)["rlhfsim_timeline"]
    except (ValueError, KeyError, TypeError):
        raise InputError("the header is not a JSON object with rlhfsim_timeline", where=f"{path}:1") from None
    if version != VERSION:
        raise InputError(
            f"version {version!r}, but this program reads version {VERSION}: write the file again with "
            "the same version of rlhfsim",
            field="rlhfsim_timeline",
            where=f"{path}:1",
        )


def check(timeline: Timeline) -> Timeline:
    """Raise AssertionError unless the timeline keeps its promises; gives it back otherwise.

    No rank is in two spans at once; the parts of every span are not negative and sum to its duration (1e-9 relative,
    plus the rounding of its end); released_by names a firing that had ended. In a real timeline the clocks of two
    ranks may differ by `info["clock_error_seconds"]`.
    """
    ends = defaultdict(list)
    for span in timeline.spans:
        _check_span(span, timeline)
        ends[span.firing].append(span.end_seconds)
    skew = float(timeline.info.get("clock_error_seconds", 0.0))
    for span in timeline.spans:
        if span.released_by is not None:
            _require(span.released_by in ends, span, f"released_by {span.released_by}, which has no span")
            # A span may begin with waiting for data, and that data's firing ends within the wait.
            latest = span.start_seconds + span.data_seconds + _rounding(span) + skew
            _require(min(ends[span.released_by]) <= latest, span, f"starts before {span.released_by} ends")
    last: dict[int, Span] = {}
    for span in sorted(timeline.spans, key=lambda s: (s.start_seconds, s.end_seconds)):
        for rank in span.ranks:
            before = last.get(rank)
            _require(
                before is None or before.end_seconds <= span.start_seconds + _rounding(span),
                span,
                f"rank {rank} is still held by {before and before.firing}",
            )
            last[rank] = span
    for sample in timeline.memory:
        if not 0 <= sample.rank < timeline.ranks or any(not b >= 0 for b in sample.bytes_by_component.values()):
            raise AssertionError(f"{sample}: rank or bytes out of range")
    return timeline


def _check_span(span: Span, timeline: Timeline) -> None:
    _require(math.isfinite(span.start_seconds) and math.isfinite(span.end_seconds), span, "times are not finite")
    _require(span.end_seconds >= span.start_seconds, span, "ends before it starts")
    _require(0 <= span.firing.iteration < timeline.iterations, span, f"of {timeline.iterations} iterations")
    _require(len(span.ranks) == len(set(span.ranks)) > 0, span, "no ranks, or one of them twice")
    _require(all(0 <= rank < timeline.ranks for rank in span.ranks), span, f"of {timeline.ranks} ranks")
    _require(span.released_by != span.firing, span, "released by itself")
    _require(
        all(value >= 0 for value in (*span.detail.values(), *span.bound.values(), *span.counts.values())),
        span,
        "negative detail, bound or counts",
    )
    replicas = per_replica(span)
    _require(len(span.ranks) % len(replicas) == 0, span, f"{len(replicas)} replicas do not share the ranks equally")
    for parts in replicas:
        _require(all(part >= 0 for part in parts), span, f"negative part in {parts}")
        _require(
            abs(sum(parts) - span.seconds) <= 1e-9 * span.seconds + _rounding(span),
            span,
            f"compute, communication, peer, data, link {parts} do not sum to {span.seconds} s",
        )


def per_replica(span: Span) -> list[tuple[float, float, float, float, float]]:
    """Seconds of compute, communication, waiting for peers, data, links: one entry a replica, or one for all."""
    columns = (span.compute_seconds, span.communication_seconds, span.peer_seconds)
    count = max(map(len, columns))
    _require({len(column) for column in columns} <= {1, count}, span, "parts of different numbers of replicas")
    full = [column * count if len(column) == 1 else column for column in columns]
    return [
        (compute, communication, peers, span.data_seconds, span.link_seconds)
        for compute, communication, peers in zip(*full, strict=True)
    ]


def _rounding(span: Span) -> float:
    """Seconds by which a sum of parts may miss: a clock that shows `end_seconds` has no finer digits."""
    return 64 * sys.float_info.epsilon * abs(span.end_seconds)


def _require(condition: bool, span: Span, message: str) -> None:
    if not condition:
        raise AssertionError(f"{span.firing} [{span.start_seconds}, {span.end_seconds}]: {message}")
