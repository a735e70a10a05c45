"""What a timeline says: step time, stages, where every rank-second went, the critical path, memory peaks.

All functions take a `Timeline`, real or simulated, and nothing else that was computed from the scenario. Stage names
are verl's; `ref.0` and `ref.1`, halves of one stage in different places, both count as `ref`.

The *measured iterations* are all but the first, which also fills the pipeline; the only one, if there is one. The
*measured window* reaches from the end of the first iteration to the end of the last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np

from .firing import Firing
from .format import rank_text
from .timeline import MemorySample, Span, Timeline, per_replica

T = TypeVar("T")
BUSY_PARTS = ("compute", "communication", "wait_peers", "wait_data", "wait_link")
PARTS = (*BUSY_PARTS, "idle")
# How the causes on a critical path are called; compute is split by what bounds it.
EXPOSED, PEERS, DATA, LINK, GAP = (
    "exposed communication",
    "waiting for peers",
    "waiting for data",
    "shared links",
    "dispatch",
)


PERIODIC_STAGES = ("testing", "save_checkpoint")


class Window(NamedTuple):
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


STEP = "step_seconds"  # what a whole iteration takes, beside the names of stages


def base_stage(name: str) -> str:
    """`ref.0` -> `ref`."""
    return name.partition(".")[0]


# ---------------------------------------------------------------- steps and stages


def whole(timeline: Timeline) -> Window:
    """First start to last end; its length is the makespan."""
    if not timeline.spans:
        return Window(0.0, 0.0)
    return Window(min(s.start_seconds for s in timeline.spans), timeline.end_seconds)


def iteration_ends(timeline: Timeline) -> list[float]:
    """The instant at which each iteration's last span ends, ascending."""
    ends: dict[int, float] = {}
    for span in timeline.spans:
        ends[span.firing.iteration] = max(span.end_seconds, ends.get(span.firing.iteration, 0.0))
    return sorted(ends.values())


def measured(timeline: Timeline) -> Window:
    """The window in which a running training is observed (see the module's text)."""
    ends = iteration_ends(timeline)
    return Window(ends[0], ends[-1]) if len(ends) > 1 else whole(timeline)


def measured_iterations(timeline: Timeline) -> list[int]:
    numbers = sorted({span.firing.iteration for span in timeline.spans})
    return numbers[1:] or numbers


def step_intervals(timeline: Timeline) -> list[float]:
    """Seconds from each iteration's end to the next one's; the makespan alone if there is one iteration."""
    return list(_intervals(timeline).values())


def _intervals(timeline: Timeline) -> dict[int, float]:
    """By the iteration that ends the interval. An iteration ends with its last stage that is in every iteration."""
    regular = replace(timeline, spans=[s for s in timeline.spans if s.firing.stage not in PERIODIC_STAGES])
    ends = iteration_ends(regular)
    if len(ends) < 2:
        return {0: whole(timeline).seconds}
    numbers = sorted({span.firing.iteration for span in regular.spans})
    return {i: b - a for i, a, b in zip(numbers[1:], ends, ends[1:], strict=False)}


def step_seconds(timeline: Timeline) -> float:
    """Seconds per iteration in steady state: the median interval between the ends of consecutive iterations.

    Where iterations overlap, the first also fills the pipeline and the last few run while it drains; the first is in
    no interval, and the median does not follow the last. With one iteration: its makespan. Intervals that begin with a
    validation or a checkpoint, of the iteration before, are left out where there are others.
    """
    extra: dict[int, set[str]] = defaultdict(set)
    for span in timeline.spans:
        if span.seconds > 0 and span.firing.stage in PERIODIC_STAGES:
            extra[span.firing.iteration + 1].add(span.firing.stage)
    intervals = _intervals(timeline)
    fewest = min(len(extra[i]) for i in intervals)
    return median(seconds for i, seconds in intervals.items() if len(extra[i]) == fewest)


def stage_seconds(timeline: Timeline) -> dict[str, float]:
    """Wall seconds per iteration in which at least one span of the stage runs, mean over the measured iterations.

    In the order in which stages first start. Stages that overlap sum to more than the step.
    """
    iterations = measured_iterations(timeline)
    intervals: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    order: dict[str, None] = {}
    for span in sorted(timeline.spans, key=lambda s: (s.start_seconds, s.end_seconds, s.firing)):
        stage = base_stage(span.firing.stage)
        order[stage] = None
        intervals[stage, span.firing.iteration].append((span.start_seconds, span.end_seconds))
    return {stage: sum(union_seconds(intervals[stage, i]) for i in iterations) / len(iterations) for stage in order}


def union_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds covered by at least one of the intervals."""
    covered, reach = 0.0, -np.inf
    for start, end in sorted(intervals):
        if end > reach:
            covered += end - max(start, reach)
            reach = end
    return float(covered)


def overlap_share(timeline: Timeline) -> dict[str, float]:
    """Share of each stage's wall time in the measured window in which another stage runs as well (0: never hidden)."""
    window = measured(timeline)
    changes: dict[float, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for span in timeline.spans:
        start, end = max(span.start_seconds, window.start_seconds), span.end_seconds
        if end > start:
            changes[start][base_stage(span.firing.stage)] += 1
            changes[end][base_stage(span.firing.stage)] -= 1
    running: dict[str, int] = defaultdict(int)
    alone: dict[str, float] = defaultdict(float)
    shared: dict[str, float] = defaultdict(float)
    instants = sorted(changes)
    for now, then in pairwise(instants):
        for stage, change in changes[now].items():
            running[stage] += change
        active = [stage for stage, count in running.items() if count]
        for stage in active:
            (shared if len(active) > 1 else alone)[stage] += then - now
    return {stage: shared[stage] / (shared[stage] + alone[stage]) for stage in running}


# ---------------------------------------------------------------- generation


class GenerationSummary(NamedTuple):
    """What all engines (replicas) did in one iteration, mean over the measured ones; validation is left out.

    low_occupancy_share: of their time (compute, without transfers), with less than 10 % of an engine's largest batch.
    mean_running, most_running: sequences on an engine while it generates, over the time and at once.
    """

    preemptions: float
    recomputed_tokens: float
    low_occupancy_share: float
    mean_running: float
    most_running: float


def generation_summary(timeline: Timeline) -> GenerationSummary | None:
    """From the counts of `gen`'s spans; None where they have none (real runs, or generation without steps)."""
    iterations = measured_iterations(timeline)
    chosen = [
        s.counts
        for s in timeline.spans
        if "replica_seconds" in s.counts and base_stage(s.firing.stage) == "gen" and s.firing.iteration in iterations
    ]
    if not chosen:
        return None
    total = _sums(chosen)
    seconds = total["replica_seconds"] or 1.0
    return GenerationSummary(
        total["preemptions"] / len(iterations),
        total["recomputed_tokens"] / len(iterations),
        total["low_occupancy_seconds"] / seconds,
        total["sequence_seconds"] / seconds,
        max(counts.get("most_running", 0.0) for counts in chosen),
    )


class ToolSummary(NamedTuple):
    """Calls of tools between the turns of responses; mean over the measured iterations.

    seconds_per_call: from the end of a turn until the tool's answer is there, a queue at the tool included.
    idle_share: of the engines' time, with every sample of an engine at its tool.
    """

    calls: float
    seconds_per_call: float
    idle_share: float


def tool_summary(timeline: Timeline) -> ToolSummary | None:
    """None where responses have one turn."""
    iterations = measured_iterations(timeline)
    total = _sums(
        [s.counts for s in timeline.spans if base_stage(s.firing.stage) == "gen" and s.firing.iteration in iterations]
    )
    if not (calls := total["tool_calls"]):
        return None
    return ToolSummary(
        calls / len(iterations), total["tool_seconds"] / calls, total["idle_seconds"] / total["replica_seconds"]
    )


def _sums(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name; 0 for what nobody counted."""
    total: dict[str, float] = defaultdict(float)
    for one in counts:
        for name, value in one.items():
            total[name] += value
    return total


class OffPolicySummary(NamedTuple):
    """How old the data are that train, and what that costs; mean over the measured iterations, but the maximum.

    Age: by how many updates the weights that train a response are newer than those that drew it, by its tokens where
    several versions drew it. max_age_steps: of the oldest token of all. thrown_away_tokens: drawn and never trained.
    interrupts: of generation, by new weights. recomputed_tokens: whose cache was lost (preemptions included).
    """

    mean_age_steps: float
    max_age_steps: float
    thrown_away_tokens: float
    interrupts: float
    recomputed_tokens: float


def off_policy_summary(timeline: Timeline) -> OffPolicySummary | None:
    """None where every response is drawn by the weights that it trains, and none is stopped."""
    iterations = measured_iterations(timeline)
    chosen = [
        s.counts for s in timeline.spans if base_stage(s.firing.stage) == "gen" and s.firing.iteration in iterations
    ]
    total = _sums(chosen)
    if "samples" not in total:
        return None
    return OffPolicySummary(
        total["age_steps"] / (total["samples"] or 1.0),
        max(counts.get("oldest_steps", 0.0) for counts in chosen),
        total["thrown_away_tokens"] / len(iterations),
        total["interrupts"] / len(iterations),
        total["recomputed_tokens"] / len(iterations),
    )


# ---------------------------------------------------------------- rank-seconds


def rank_seconds(timeline: Timeline, window: Window | None = None) -> dict[str, np.ndarray]:
    """Seconds of every rank (an array over ranks) as exactly one of `PARTS`; together ranks x window.

    window: the whole timeline if not given. Of a span that reaches out of the window, every part counts in
    proportion to what lies inside.
    """
    window = window or whole(timeline)
    busy = np.zeros((timeline.ranks, len(BUSY_PARTS)))
    for span in timeline.spans:
        inside = min(span.end_seconds, window.end_seconds) - max(span.start_seconds, window.start_seconds)
        if inside > 0:
            parts = np.array(per_replica(span)) * (inside / span.seconds)
            busy[list(span.ranks)] += np.repeat(parts, len(span.ranks) // len(parts), axis=0)
    # Idle is what no span holds; rounding must not make it negative.
    idle = np.maximum(window.seconds - busy.sum(axis=1), 0.0)
    return dict(zip(PARTS, (*busy.T, idle), strict=True))


def total_seconds(account: Mapping[str, np.ndarray], ranks: Sequence[int] | None = None) -> dict[str, float]:
    """Rank-seconds by part over these ranks (all, if not given)."""
    chosen = slice(None) if ranks is None else list(ranks)
    return {part: float(seconds[chosen].sum()) for part, seconds in account.items()}


def idle_share(timeline: Timeline, window: Window | None = None) -> float:
    """Idle rank-seconds over all rank-seconds, in the measured window if no other is given."""
    total = total_seconds(rank_seconds(timeline, window or measured(timeline)))
    return total["idle"] / (sum(total.values()) or 1.0)


class RankGroup(NamedTuple):
    """Ranks that are held by like stages at the same times, and the spans of the first of them, by start."""

    ranks: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def label(self) -> str:
        return rank_text(self.ranks)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, in order of their first start."""
        return tuple(dict.fromkeys(base_stage(span.firing.stage) for span in self.spans))


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, from the first on."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def spans_by_rank(timeline: Timeline) -> dict[int, list[Span]]:
    """What each rank ran, by start; idle ranks have an empty list."""
    spans_of: dict[int, list[Span]] = {rank: [] for rank in range(timeline.ranks)}
    for span in sorted(timeline.spans, key=lambda s: (s.start_seconds, s.end_seconds, s.firing)):
        for rank in span.ranks:
            spans_of[rank].append(span)
    return spans_of


def rank_groups(timeline: Timeline) -> list[RankGroup]:
    """Ranks folded by what they do: the same stages of the same iterations at the same times (to 1e-9 of the end).

    Idle ranks form a group of their own; groups are in the order of their first rank.
    """
    digit = (timeline.end_seconds or 1.0) * 1e-9
    spans_of = spans_by_rank(timeline)
    keys = {
        id(s): (s.firing.iteration, s.firing.stage, round(s.start_seconds / digit), round(s.end_seconds / digit))
        for s in timeline.spans
    }
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for rank, spans in spans_of.items():
        groups[tuple(keys[id(s)] for s in spans)].append(rank)
    return [RankGroup(tuple(ranks), tuple(spans_of[ranks[0]])) for ranks in groups.values()]


def group_seconds(timeline: Timeline, window: Window | None = None) -> dict[tuple[int, ...], dict[str, float]]:
    """Rank-seconds by part for ranks that run the same stages (gen here, training there), by their ranks.

    In the measured window if no other is given.
    """
    pools: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for group in rank_groups(timeline):
        pools[tuple(sorted(group.stages))] += group.ranks
    account = rank_seconds(timeline, window or measured(timeline))
    return {tuple(sorted(ranks)): total_seconds(account, ranks) for ranks in pools.values()}


# ---------------------------------------------------------------- critical path


class PathStep(NamedTuple):
    """A span on the critical path: from where it takes over to its end, and its seconds by cause."""

    span: Span
    start_seconds: float
    causes: dict[str, float]


@dataclass(frozen=True)
class CriticalPath:
    """Spans that let one another start, earliest first. No two overlap, so `seconds` is at most the window's length."""

    steps: tuple[PathStep, ...]
    window: Window

    @property
    def seconds(self) -> float:
        return sum(sum(step.causes.values()) for step in self.steps)

    def table(self) -> dict[tuple[str, str], float]:
        """Seconds by (stage, cause), longest first."""
        table: dict[tuple[str, str], float] = defaultdict(float)
        for step in self.steps:
            for cause, seconds in step.causes.items():
                table[base_stage(step.span.firing.stage), cause] += seconds
        return dict(sorted(table.items(), key=lambda item: (-item[1], item[0])))


def critical_path(timeline: Timeline) -> CriticalPath:
    """Back from the last span of the measured window, from each span to the one that released it.

    Of a span that runs on several replicas, the one that waits least for its peers counts; its compute is split as the
    span's `bound` is. Time between a release and the start is `dispatch`. Of a span that began before the window, or
    before its releaser ended, only the later part counts (its waiting for data goes first).
    """
    window = measured(timeline)
    by_firing: dict[Firing, list[Span]] = defaultdict(list)
    for one in timeline.spans:
        by_firing[one.firing].append(one)
    steps: list[PathStep] = []
    seen: set[int] = set()
    span: Span | None = max(timeline.spans, key=lambda s: (s.end_seconds, s.seconds, s.firing), default=None)
    while span is not None and id(span) not in seen and span.end_seconds > window.start_seconds:
        seen.add(id(span))
        before = _releaser(span, by_firing)
        begin = max(window.start_seconds, before.end_seconds if before else span.start_seconds)
        steps.append(PathStep(span, begin, _causes(span, begin)))
        span = before
    return CriticalPath(tuple(reversed(steps)), window)


def _releaser(span: Span, by_firing: Mapping[Firing, list[Span]]) -> Span | None:
    """The releasing firing's last span that ended by then (an interrupted firing has several)."""
    if span.released_by is None:
        return None
    ended = [s for s in by_firing.get(span.released_by, ()) if s.end_seconds <= span.end_seconds and s is not span]
    return max(ended, key=lambda s: s.end_seconds, default=None)


def _causes(span: Span, begin: float) -> dict[str, float]:
    """Seconds of a span by cause, from `begin` (before its start: dispatch; after it: a cut) to its end."""
    compute, communication, peers, data, link = min(per_replica(span), key=lambda parts: parts[2])
    causes = {EXPOSED: communication, PEERS: peers, DATA: data, LINK: link, **_split(compute, span.bound)}
    cut = max(0.0, begin - span.start_seconds)
    from_data = min(cut, data)
    causes[DATA] -= from_data
    rest = sum(causes.values())
    scale = max(0.0, rest - (cut - from_data)) / rest if rest else 0.0
    causes = {cause: seconds * scale for cause, seconds in causes.items()}
    causes[GAP] = max(0.0, span.start_seconds - begin)
    return {cause: seconds for cause, seconds in causes.items() if seconds > 0}


def _split(compute: float, bound: Mapping[str, float]) -> dict[str, float]:
    total = sum(bound.values())
    return {name: compute * seconds / total for name, seconds in bound.items()} if total else {"compute": compute}


def bound_by(timeline: Timeline) -> str:
    """What to work on: the largest (stage, cause) on the critical path, `gen: hbm (62 % of the critical path)`."""
    path = critical_path(timeline)
    if not path.seconds:
        return "nothing"
    (stage, cause), seconds = next(iter(path.table().items()))
    return f"{stage}: {cause} ({100 * seconds / path.seconds:.0f} % of the critical path)"


def slack_seconds(timeline: Timeline, needs: Callable[[Firing], Iterable[Firing]] | None = None) -> dict[str, float]:
    """How much longer each stage could take, anywhere in the measured iterations, without a later end.

    A span delays the next one on each of its ranks, and those that it released; one that waits for data inside itself
    has that much room. A timeline does not know which other firings use an output: without `needs` (the firings that
    one waits for) this is an upper bound. Zero on the critical path.
    """
    spans = sorted(timeline.spans, key=lambda s: (s.end_seconds, s.start_seconds, s.firing))
    first_of: dict[Firing, int] = {}
    last_of: dict[Firing, int] = {}
    for index, span in enumerate(spans):
        first_of.setdefault(span.firing, index)
        last_of[span.firing] = index
    after: list[set[int]] = [set() for _ in spans]
    on_rank: dict[int, int] = {}
    for index, span in enumerate(spans):
        before = {on_rank[rank] for rank in span.ranks if rank in on_rank}
        givers = {span.released_by} if span.released_by else set()
        if needs is not None and first_of[span.firing] == index:
            givers |= set(needs(span.firing))
        # A giver that ends later was interrupted by this span: its end does not bind it.
        before |= {last_of[giver] for giver in givers if last_of.get(giver, index) < index}
        for earlier in before:
            after[earlier].add(index)
        on_rank.update(dict.fromkeys(span.ranks, index))
    end = timeline.end_seconds
    slack = [0.0] * len(spans)
    for index in range(len(spans) - 1, -1, -1):
        room = [spans[n].start_seconds + spans[n].data_seconds + slack[n] for n in after[index]]
        slack[index] = max(0.0, min(room, default=end) - spans[index].end_seconds)
    iterations = set(measured_iterations(timeline))
    least: dict[str, float] = {}
    for span, seconds in zip(spans, slack, strict=True):
        if span.firing.iteration in iterations:
            stage = base_stage(span.firing.stage)
            least[stage] = min(seconds, least.get(stage, np.inf))
    return least


# ---------------------------------------------------------------- memory


class MemoryPeak(NamedTuple):
    """The most bytes that a rank held at once: when, in which phase, and what they were."""

    rank: int
    seconds: float
    phase: str
    bytes: float
    bytes_by_component: dict[str, float]


def _peak(samples: Iterable[MemorySample]) -> MemoryPeak:
    # Of equal peaks the earliest on the lowest rank, so that the answer does not depend on the order of samples.
    top = min(samples, key=lambda m: (-sum(m.bytes_by_component.values()), m.seconds, m.rank))
    return MemoryPeak(top.rank, top.seconds, top.phase, sum(top.bytes_by_component.values()), top.bytes_by_component)


def peaks_by_phase(timeline: Timeline) -> dict[str, MemoryPeak]:
    """The worst rank of each phase, phases in the order in which they first occur."""
    samples: dict[str, list[MemorySample]] = defaultdict(list)
    for sample in sorted(timeline.memory, key=lambda m: (m.seconds, m.rank)):
        samples[sample.phase].append(sample)
    return {phase: _peak(of_phase) for phase, of_phase in samples.items()}


def memory_peak(timeline: Timeline) -> MemoryPeak | None:
    """The worst rank at its worst instant; None without memory samples."""
    return _peak(timeline.memory) if timeline.memory else None
