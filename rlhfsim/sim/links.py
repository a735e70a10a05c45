"""Concurrent transfers on shared links: max-min fair rates, and segments that run at the rates they get.

A segment is one flow: its transfers follow each other, so together they load the links by their payload-weighted mean.
A segment whose transfers block asks for the full rate for as long as it runs, also while it computes: that is
conservative where it transfers only a small part of the time. One whose transfers run beside the compute asks for
no more than the average rate that it needs when it is alone.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import simpy

from ..costs.segment import Elapsed, Op, Route, Segment, Transfer

_EXACT = 1e-12  # relative; below this two loads or rates are the same number


class Topology(Protocol):
    """What the pool needs of `rlhfsim.cluster.ClusterTopology`."""

    capacities: dict[str, float]

    def route(self, op: Op, groups: tuple[tuple[int, ...], ...]) -> Route: ...


def lone_rate(usage: Mapping[str, float], capacities: Mapping[str, float]) -> float:
    """Payload bytes/s of a flow that has all links for itself (inf: it uses none)."""
    return min((capacities[link] / u for link, u in usage.items() if u > 0), default=math.inf)


def max_min_rates(usages: Sequence[Mapping[str, float]], capacities: Mapping[str, float],
                  demands: Sequence[float]) -> list[float]:
    """Max-min fair rates in payload bytes/s, at most `demands`.

    Flows are compared by the bandwidth that they take on their own busiest link (largest usage / capacity). Progressive
    filling (Bertsekas, Gallager, "Data Networks", 2nd ed. 1992, section 6.5.2): all rise together; whoever meets a full
    link or has enough stops. At most one round a flow.
    """
    users = Counter(link for usage in usages for link, u in usage.items() if u > 0)
    limits = [min(demand, lone_rate({link: u for link, u in usage.items() if users[link] == 1}, capacities))
              for usage, demand in zip(usages, demands, strict=True)]
    shared = [link for link, count in users.items() if count > 1]
    if not shared:
        return limits
    load = np.array([[usage.get(link, 0.0) for link in shared] for usage in usages])
    room = np.array([capacities[link] for link in shared])
    weight = np.array([_busiest(usage, capacities) for usage in usages])
    limit = np.array(limits)
    rates, growth = np.where(weight > 0, 0.0, limit), 1 / np.where(weight > 0, weight, 1.0)
    rising = weight > 0
    while rising.any():
        filling = (growth * rising) @ load
        to_full = np.divide(room, filling, out=np.full(len(room), math.inf), where=filling > 0)
        to_enough = np.where(rising, (limit - rates) / growth, math.inf)
        step = max(min(to_full.min(), to_enough.min()), 0.0)
        rates = rates + step * growth * rising
        room = np.maximum(room - step * filling, 0.0)
        enough = rising & (to_enough <= step * (1 + _EXACT))
        rates[enough] = limit[enough]
        full = to_full <= step * (1 + _EXACT)
        rising &= ~enough & ~(load[:, full] > 0).any(axis=1)
    return rates.tolist()


def _busiest(usage: Mapping[str, float], capacities: Mapping[str, float]) -> float:
    """Usage on the link that would bind the flow first; 0 without links. Ties go to the larger usage."""
    return max(((u / capacities[link], u) for link, u in usage.items() if u > 0), default=(0.0, 0.0))[1]


@dataclass(eq=False)
class _Flow:
    """A running segment. Rates and demand in payload bytes/s, all its transfers and groups' payloads together."""

    segment: Segment
    routes: tuple[Route, ...]
    lone_rates: tuple[float, ...]
    usage: Mapping[str, float]
    full_rate: float
    alone: Elapsed
    demand: float
    rate: float = 0.0
    now: Elapsed = field(init=False)  # of the whole segment at the current rate
    since: float = 0.0
    done: float = 0.0
    parts: list[tuple[float, Elapsed]] = field(default_factory=list)
    timer: simpy.Timeout | None = None

    def __post_init__(self) -> None:
        self.now = self.alone

    def advance(self, seconds: float) -> None:
        """Book the time since the last change."""
        share = min((seconds - self.since) / self.now.seconds, 1.0 - self.done) if self.now.seconds > 0 else 0.0
        self.done += share
        self.parts.append((share, self.now))
        self.since = seconds

    def at(self, rate: float) -> Elapsed:
        """The whole segment at this rate."""
        if rate >= self.demand * (1 - 1e-9):
            return self.alone
        if self.segment.prefetch:  # the transfers' bytes at this average rate take so long, whatever they hide behind
            longer = self.alone.seconds * (self.demand / rate - 1)
            return self.alone._replace(seconds=self.alone.seconds + longer,
                                       communication=self.alone.communication + longer)
        return self.segment.elapsed(self.routes, [r * rate / self.full_rate for r in self.lone_rates])

    def result(self) -> Elapsed:
        """Mean of the breakdowns, each weighted by the share of the segment done that way."""
        parts = [(share / self.done, e) for share, e in self.parts] if self.done > 0 else [(1.0, self.now)]
        return Elapsed(sum(s * e.seconds for s, e in parts), *(
            np.sum([s * e[i] for s, e in parts], axis=0) for i in (1, 2, 3)))


class LinkPool:
    """Runs segments on the links of a topology: `elapsed, alone_seconds = yield from pool.run(segment)`.

    A segment that starts or ends changes the rates only of those that share links with it, directly or through others.
    `Interrupt` thrown into the running process takes its flow off the links before it goes on to the caller.
    """

    def __init__(self, env: simpy.Environment, topology: Topology) -> None:
        self.env, self.topology = env, topology
        self._flows: list[_Flow] = []  # in order of start, which makes every result reproducible
        self._lone: dict[int, float] = {}
        self._common: dict[tuple[int, int], frozenset[str]] = {}
        self._kept: list[Route] = []  # keeps routes alive, whose ids are keys above

    def run(self, segment: Segment) -> Generator[simpy.Event, Any, tuple[Elapsed, float]]:
        """Run the segment to its end; its breakdown, and the seconds that it would have taken alone."""
        flow, alone = self._flow(segment)
        if flow is None:
            yield self.env.timeout(alone.seconds)
            return alone, alone.seconds
        flow.since = self.env.now
        self._flows.append(flow)
        self._share(flow)
        try:
            assert flow.timer is not None
            yield flow.timer
            flow.advance(self.env.now)
        finally:
            self._cancel(flow)
            self._flows.remove(flow)
            self._share(flow, leaving=True)
        return flow.result(), alone.seconds

    def _flow(self, segment: Segment) -> tuple[_Flow | None, Elapsed]:
        """The segment as a flow (None: no bytes on any link) and what it takes alone."""
        routes = tuple(self.topology.route(t.op, t.groups) for t in segment.transfers)
        rates = tuple(self._lone_rate(r) for r in routes)
        alone = segment.elapsed(routes, rates)
        payload = [_payload(t, segment) if r.usage else 0.0 for t, r in zip(segment.transfers, routes, strict=True)]
        total = sum(payload)
        if total <= 0 or alone.seconds <= 0:
            return None, alone
        full = total / sum(p / r for p, r in zip(payload, rates, strict=True) if p > 0)
        demand = min(full, total / alone.seconds) if segment.prefetch else full
        loading = [(r, p / total) for r, p in zip(routes, payload, strict=True) if p > 0]
        usage = loading[0][0].usage if len(loading) == 1 else _mixed(loading)
        return _Flow(segment, routes, rates, usage, full, alone, demand), alone

    def _lone_rate(self, route: Route) -> float:
        if id(route) not in self._lone:
            self._kept.append(route)
            self._lone[id(route)] = lone_rate(route.usage, self.topology.capacities)
        return self._lone[id(route)]

    def _common_links(self, a: _Flow, b: _Flow) -> frozenset[str]:
        """Links that both load."""
        found: frozenset[str] = frozenset()
        for x in a.routes:
            for y in b.routes:
                key = (id(x), id(y))
                if key not in self._common:
                    self._common[key] = self._common[key[::-1]] = frozenset(x.usage.keys() & y.usage.keys())
                found |= self._common[key]
        return found

    def _share(self, changed: _Flow, leaving: bool = False) -> None:
        """New rates for all that the change reaches."""
        reached: list[_Flow] = [changed]
        contested: set[str] = set()
        for flow in reached:  # grows while it is walked
            for other in self._flows:
                if other is not flow and (common := self._common_links(flow, other)):
                    contested |= common
                    if other not in reached:
                        reached.append(other)
        flows = [f for f in self._flows if f is not changed or not leaving]
        flows = [f for f in flows if f in reached]
        capacities = self.topology.capacities
        usages = [_only(f.usage, contested, capacities) for f in flows] if len(flows) > 1 else []
        rates = max_min_rates(usages, capacities, [f.demand for f in flows]) if usages else [f.demand for f in flows]
        for flow, rate in zip(flows, rates, strict=True):
            self._set_rate(flow, rate)

    def _set_rate(self, flow: _Flow, rate: float) -> None:
        if flow.timer is not None and math.isclose(rate, flow.rate, rel_tol=_EXACT):
            return
        flow.advance(self.env.now)
        flow.rate, flow.now = rate, flow.at(rate)
        remaining = max(1.0 - flow.done, 0.0) * flow.now.seconds
        if flow.timer is None:
            flow.timer = self.env.timeout(remaining)
        else:
            self._cancel(flow)
            self.env.schedule(flow.timer, delay=remaining)

    def _cancel(self, flow: _Flow) -> None:
        """Take the flow's timer out of the calendar. SimPy cannot, and one left behind would prolong `env.run()`."""
        queue = self.env._queue
        kept = [entry for entry in queue if entry[3] is not flow.timer]
        if len(kept) < len(queue):
            queue[:] = kept
            heapq.heapify(queue)


def _payload(transfer: Transfer, segment: Segment) -> float:
    """Bytes of all repeats, one group."""
    each = np.broadcast_to(np.asarray(transfer.payload_bytes, dtype=float), np.shape(segment.repeats))
    return float(each @ segment.repeats)


def _mixed(loading: Iterable[tuple[Route, float]]) -> dict[str, float]:
    """Usage per byte of the payload of several transfers, weighted by their shares."""
    usage: dict[str, float] = {}
    for route, share in loading:
        for link, u in route.usage.items():
            usage[link] = usage.get(link, 0.0) + share * u
    return usage


def _only(usage: Mapping[str, float], contested: set[str], capacities: Mapping[str, float]) -> dict[str, float]:
    """The part of a flow's usage that can matter: contested links and the one that binds it alone."""
    busiest = max(usage, key=lambda link: (usage[link] / capacities[link], usage[link]))
    return {link: usage[link] for link in usage if link in contested or link == busiest}
