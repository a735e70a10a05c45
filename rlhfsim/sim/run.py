"""Run a StageGraph in simulated time: start what the scheduler starts, let its segments run on the shared links."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import simpy

from rlhfsim.cluster import ClusterTopology
from rlhfsim.costs.segment import Segment, Transfer
from rlhfsim.firing import Firing
from rlhfsim.fold import Fold
from rlhfsim.graph import ANY_PLACE, Message
from rlhfsim.schedule import Scheduler
from rlhfsim.timeline import Span

from .links import LinkPool, Stopped


class Cost(Protocol):
    """What the simulator asks of a cost model."""

    def program(self, f: Firing) -> list[Segment]:
        """The segments of a firing of the folded graph."""

    def message(self, messages: list[Message]) -> Transfer | None:
        """The transfer that carries these lanes of one result to one place; None where nothing leaves a rank."""

    def ended(self, f: Firing, name: Firing) -> dict[str, float]:
        """f has ended, and consumers know it by `name`; what to add to the counts of its span."""

    def stop_share(self, f: Firing, share: float) -> float | None:
        """Where f stops that is asked to when `share` of its stoppable segment is done; None: at its end, for good."""

    def paused(self, f: Firing, share: float) -> dict[str, float]:
        """f has stopped at that share, and `program` will be asked for the rest; counts as of `ended`."""


@dataclass
class _Parts:
    """What the seconds of a firing were spent on, per replica."""

    compute: np.ndarray = field(default_factory=lambda: np.zeros(1))
    communication: np.ndarray = field(default_factory=lambda: np.zeros(1))
    peers: np.ndarray = field(default_factory=lambda: np.zeros(1))
    link_seconds: float = 0.0
    detail: dict[str, float] = field(default_factory=dict)
    bound: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


def run(fold: Fold, cost: Cost, topology: ClusterTopology, iterations: int) -> list[Span]:
    """Simulate `iterations` iterations; spans in order of their start. Deterministic.

    Raises RuntimeError where the graph cannot finish (`schedule.check` finds that beforehand).
    """
    graph, env = fold.graph, simpy.Environment()
    scheduler, pool = Scheduler(graph, iterations), LinkPool(env, topology)
    arriving: dict[tuple[Firing, str, int], simpy.Event] = {}
    ended: dict[Firing, float] = {}
    ran: dict[Firing, Firing] = {}  # by the name that consumers know (another only with spread "first")
    last_on_rank: dict[int, Firing] = {}
    running: dict[Firing, simpy.Process] = {}  # firings that an interrupt reaches: while they can stop
    stopping: set[Firing] = set()
    spans: list[Span] = []

    def deliver(transfer: Transfer, arrived: simpy.Event) -> Generator[Any, Any, None]:
        yield from pool.run(Segment("exchange", np.zeros((1, 1)), transfers=(transfer,)))
        arrived.succeed()

    def send(name: Firing, place: int) -> None:
        bundles: dict[tuple[str, int], list[Message]] = {}
        for message in graph.sends(name, place):
            bundles.setdefault((message.consumer, message.place), []).append(message)
        for (consumer, to), messages in bundles.items():
            if (transfer := cost.message(messages)) is not None:
                arrived = arriving[name, consumer, to] = env.event()
                env.process(deliver(transfer, arrived))

    def fire(f: Firing) -> Generator[Any, Any, None]:
        start = env.now
        offered = f._replace(place=ANY_PLACE) if graph.at(f.stage).spread == "first" else f
        cause = _released_by(graph.needs(offered), [last_on_rank.get(r) for r in graph.ranks(f)], ended)
        inputs = {(g, f.stage, f.place) for g, *_ in graph.receives(f)}
        yield env.all_of([arriving[key] for key in sorted(inputs & arriving.keys())])
        data_seconds, parts = env.now - start, _Parts()
        stopped_at: float | None = None
        for segment in cost.program(f):
            if segment.stops:
                stopped_at = yield from run_until_stopped(f, segment, parts)
                if stopped_at is not None:
                    break
            else:
                elapsed, alone_seconds = yield from pool.run(segment)
                _add(parts, segment, elapsed, alone_seconds)
        if stopped_at is not None:
            parts.counts |= cost.paused(f, stopped_at) | {"interrupts": 1.0}
            name = f
            scheduler.paused(f)
        else:
            name = scheduler.done(f)
            parts.counts |= cost.ended(f, name)
            ended[name], ran[name] = env.now, f
        spans.append(_span(f, fold, start, env.now, data_seconds, parts, ran.get(cause) if cause else None))
        stopping.discard(f)
        if stopped_at is None:
            last_on_rank.update(dict.fromkeys(graph.ranks(f), name))
            send(name, f.place)

    def run_until_stopped(f: Firing, segment: Segment, parts: _Parts) -> Generator[Any, Any, float | None]:
        """Run a segment that may stop before its end: the share of it that was done, or None for all."""
        if f in stopping:
            return 0.0
        assert env.active_process is not None
        running[f] = env.active_process
        try:
            elapsed, alone_seconds = yield from pool.run(segment)
            _add(parts, segment, elapsed, alone_seconds)
            return None
        except Stopped as stop:
            _add(parts, segment.part(stop.share), stop.elapsed, stop.alone_seconds)
            share = stop.share
        finally:
            del running[f]
        until = cost.stop_share(f, share)
        rest = segment.part((1.0 if until is None else until) - share)
        elapsed, alone_seconds = yield from pool.run(rest)
        _add(parts, rest, elapsed, alone_seconds)
        return until

    while True:
        while env.peek() == env.now:  # all that happens at this instant, before anyone decides
            env.step()
        starts = scheduler.step()
        for f in starts:
            env.process(fire(f))
        for f in scheduler.pauses:
            if f not in stopping:
                stopping.add(f)
                if f in running:
                    running[f].interrupt()
        if starts or env.peek() == env.now:
            continue
        if env.peek() == float("inf"):
            break
        env.step()
    if scheduler.left:
        raise RuntimeError(f"stuck at {env.now} s: {scheduler.stuck()}")
    return sorted(spans, key=lambda s: (s.start_seconds, s.firing))


def _released_by(needs: list[Firing], before: list[Firing | None], ended: dict[Firing, float]) -> Firing | None:
    """Of all that had to end before a firing, the last."""
    candidates = {g for g in (*needs, *before) if g is not None and g in ended}
    return max(candidates, key=lambda g: (ended[g], g), default=None)


def _add(parts: _Parts, segment: Segment, elapsed: Any, alone_seconds: float) -> None:
    shared = max(0.0, elapsed.seconds - alone_seconds)
    parts.link_seconds += shared
    parts.compute = parts.compute + elapsed.compute
    # Extra time through sharing shows up in the replica's transfers first, else in its wait for the others.
    in_transfers = np.minimum(shared, elapsed.communication)
    parts.communication = parts.communication + elapsed.communication - in_transfers
    parts.peers = parts.peers + np.maximum(elapsed.peers - (shared - in_transfers), 0.0)  # never below, by rounding
    parts.detail[segment.label] = parts.detail.get(segment.label, 0.0) + elapsed.seconds
    for cause, seconds in segment.bound.items():
        parts.bound[cause] = parts.bound.get(cause, 0.0) + seconds
    parts.counts.update(segment.counts)  # one segment of a firing has them


def _span(
    f: Firing, fold: Fold, start: float, end: float, data_seconds: float, parts: _Parts, cause: Firing | None
) -> Span:
    stage = fold.graph.at(f.stage)
    ranks = tuple(rank for block in stage.ranks_of(f.place) for rank in fold.ranks[block])
    compute, communication, peers = np.broadcast_arrays(parts.compute, parts.communication, parts.peers)
    return Span(
        f,
        stage.kind,
        stage.model,
        ranks,
        start,
        end,
        tuple(compute.tolist()),
        tuple(communication.tolist()),
        tuple(peers.tolist()),
        data_seconds,
        parts.link_seconds,
        parts.detail,
        parts.bound,
        cause,
        parts.counts,
    )
