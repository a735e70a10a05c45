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


def max_min_rates(
    usages: Sequence[Mapping[str, float]], capacities: Mapping[str, float], demands: Sequence[float]
) -> list[float]:
    """Max-min fair rates in payload bytes/s, at most `demands`.

    Flows are compared by the bandwidth that they take on their own busiest link (largest usage / capacity). Progressive
    filling (Bertsekas, Gallager, "Data Networks", 2nd ed. 1992, section 6.5.2): all rise together; whoever meets a full
    link or has enough stops. At most one round a flow.
    """
    users = Counter(link for usage in usages for link, u in usage.items() if u > 0)
    limits = [
        min(demand, lone_rate({link: u for link, u in usage.items() if users[link] == 1}, capacities))
        for usage, demand in zip(usages, demands, strict=True)
    ]
    shared = [link for link, count in users.items() if count > 1]
    if not shared:
        return limits
    load = np.array([[usage.get(link, 0.0) for link in shared] for usage in usages])
    room = np.array([capacities[link] for link in shared])
    binding = [binding_link(usage, capacities) for usage in usages]
    weight = np.array([usage[link] if link else 0.0 for usage, link in zip(usages, binding, strict=True)])
    limit = np.array(limits)
    rates, growth = np.where(weight > 0, 0.0, limit), 1 / np.where(weight > 0, weight, 1.0)
    rising = weight > 0
    while rising.any():
        filling = (growth * rising) @ load
        to_full = np.divide(room, filling, out=np.full(len(room), math.inf), where=filling > 0)
        to_enough = np.subtract(limit, rates, out=np.full(len(limit), math.inf), where=rising) / growth
        step = max(min(to_full.min(), to_enough.min()), 0.0)
        rates = rates + step * growth * rising
        room = np.maximum(room - step * filling, 0.0)
        enough = rising & (to_enough <= step * (1 + _EXACT))
        rates[enough] = limit[enough]
        full = to_full <= step * (1 + _EXACT)
        rising &= ~enough & ~(load[:, full] > 0).any(axis=1)
    return [float(rate) for rate in rates]


def binding_link(usage: Mapping[str, float], capacities: Mapping[str, float]) -> str | None:
    """The link that limits a lone flow; ties go to the larger usage."""
    return max(
        (link for link, u in usage.items() if u > 0),
        default=None,
        key=lambda link: (usage[link] / capacities[link], usage[link]),
    )


@dataclass(eq=False)
class _Flow:
    """A running segment. Rates and demand in payload bytes/s, all its transfers and groups' payloads together."""

    segment: Segment
    routes: tuple[Route, ...]
    lone_rates: tuple[float, ...]
    loading: list[tuple[Route, float]]  # routes that carry bytes, and their shares of the payload
    full_rate: float
    demand: float
    alone: Elapsed
    now: Elapsed  # of the whole segment at the current rate
    number: int = 0  # in order of start
    rate: float = 0.0
    since: float = 0.0
    done: float = 0.0
    parts: list[tuple[float, Elapsed]] = field(default_factory=list)
    timer: simpy.Timeout | None = None

    def usage(self, links: Iterable[str]) -> dict[str, float]:
        """Bytes on these links per byte of the payload."""
        return {link: sum(share * route.usage.get(link, 0.0) for route, share in self.loading) for link in links}

    def advance(self, seconds: float) -> None:
        """Book the time since the last change."""
        share = min((seconds - self.since) / self.now.seconds, 1.0 - self.done) if self.now.seconds > 0 else 0.0
        self.done += share
        if share > 0:
            self.parts.append((share, self.now))
        self.since = seconds

    def at(self, rate: float) -> Elapsed:
        """The whole segment at this rate."""
        if rate >= self.demand * (1 - 1e-9):
            return self.alone
        if self.segment.prefetch:  # the transfers' bytes at this average rate take so long, whatever they hide behind
            longer = self.alone.seconds * (self.demand / rate - 1)
            return self.alone._replace(
                seconds=self.alone.seconds + longer, communication=self.alone.communication + longer
            )
        return self.segment.elapsed(self.routes, [r * rate / self.full_rate for r in self.lone_rates])

    def result(self) -> Elapsed:
        """Mean of the breakdowns, each weighted by the share of the segment done that way."""
        parts = [(share / self.done, e) for share, e in self.parts] if self.done > 0 else [(1.0, self.now)]
        return Elapsed(
            sum(s * e.seconds for s, e in parts),
            np.sum([s * e.compute for s, e in parts], axis=0),
            np.sum([s * e.communication for s, e in parts], axis=0),
            np.sum([s * e.peers for s, e in parts], axis=0),
        )


class Stopped(simpy.Interrupt):
    """A segment was interrupted. share: how much of it was done; elapsed, alone_seconds: of that part."""

    def __init__(self, cause: object, share: float, elapsed: Elapsed, alone_seconds: float) -> None:
        super().__init__(cause)
        self.share, self.elapsed, self.alone_seconds = share, elapsed, alone_seconds


class LinkPool:
    """Runs segments on the links of a topology: `elapsed, alone_seconds = yield from pool.run(segment)`.

    A segment that starts or ends changes the rates only of those that share links with it, directly or through others.
    An interrupt of the running process takes its flow off the links and goes on to the caller as `Stopped`.
    """

    def __init__(self, env: simpy.Environment, topology: Topology) -> None:
        self.env, self.topology = env, topology
        self._started = 0
        self._flows: dict[int, dict[int, _Flow]] = {}  # running, by id of their routes, then number
        self._routes: dict[int, tuple[Route, float]] = {}  # all seen, by id, with the rate alone
        self._touching: dict[int, list[int]] = {}  # routes that load a link that this one loads, itself included
        self._deciding: dict[tuple[int, ...], list[str]] = {}

    def run(self, segment: Segment) -> Generator[simpy.Event, Any, tuple[Elapsed, float]]:
        """Run the segment to its end; its breakdown, and the seconds that it would have taken alone.

        Raises Stopped where the process was interrupted.
        """
        flow, alone = self._flow(segment)
        if flow is None:
            start = self.env.now
            try:
                yield self.env.timeout(alone.seconds)
            except simpy.Interrupt as interrupt:
                share = (self.env.now - start) / alone.seconds
                raise Stopped(interrupt.cause, share, _scaled(alone, share), share * alone.seconds) from None
            return alone, alone.seconds
        flow.number, flow.since = self._started, self.env.now
        self._started += 1
        for route, _ in flow.loading:
            self._flows[id(route)][flow.number] = flow
        self._share(flow)
        try:
            assert flow.timer is not None
            yield flow.timer
            flow.advance(self.env.now)
        except simpy.Interrupt as interrupt:
            flow.advance(self.env.now)
            share = flow.done
            raise Stopped(interrupt.cause, share, _scaled(flow.result(), share), share * alone.seconds) from None
        finally:
            self._cancel(flow)
            for route, _ in flow.loading:
                self._flows[id(route)].pop(flow.number, None)
            self._share(flow)
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
        return _Flow(segment, routes, rates, loading, full, demand, alone, now=alone), alone

    def _lone_rate(self, route: Route) -> float:
        """Also makes the route known to the pool."""
        key = id(route)
        if key not in self._routes:
            self._routes[key] = (route, lone_rate(route.usage, self.topology.capacities))
            self._flows[key] = {}
            self._touching[key] = []
            for other, (known, _) in self._routes.items():
                if not route.usage.keys().isdisjoint(known.usage.keys()):
                    self._touching[key].append(other)
                    if other != key:
                        self._touching[other].append(key)
        return self._routes[key][1]

    def _share(self, changed: _Flow) -> None:
        """New rates for all that the change reaches."""
        reached = {changed.number: changed}
        walk = [changed]
        for flow in walk:  # grows meanwhile
            for route, _ in flow.loading:
                for other in self._touching[id(route)]:
                    new = [f for f in self._flows[other].values() if f.number not in reached]
                    reached.update((f.number, f) for f in new)
                    walk += new
        if changed.number not in self._flows[id(changed.loading[0][0])]:
            del reached[changed.number]  # it has left
        flows = [reached[number] for number in sorted(reached)]
        rates = [f.demand for f in flows]
        if len(flows) > 1:
            links = self._deciding_links({id(route): route for f in flows for route, _ in f.loading})
            rates = max_min_rates([f.usage(links) for f in flows], self.topology.capacities, rates)
        for flow, rate in zip(flows, rates, strict=True):
            self._set_rate(flow, rate)

    def _deciding_links(self, routes: dict[int, Route]) -> list[str]:
        """Links that decide the rates of flows on these routes: one of each kind that several routes load alike, and
        the one that binds each route alone (the others of a single route are behind its demand already)."""
        key = tuple(routes)
        if key not in self._deciding:
            capacities = self.topology.capacities
            column: dict[str, list[tuple[int, float]]] = {}
            for number, route in routes.items():
                for link, u in route.usage.items():
                    column.setdefault(link, []).append((number, u))
            binding = {binding_link(r.usage, capacities) for r in routes.values()}
            kinds = {
                (capacities[link], *loads): link for link, loads in column.items() if len(loads) > 1 or link in binding
            }
            self._deciding[key] = list(kinds.values())
        return self._deciding[key]

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


def _scaled(elapsed: Elapsed, share: float) -> Elapsed:
    return Elapsed(
        share * elapsed.seconds, share * elapsed.compute, share * elapsed.communication, share * elapsed.peers
    )


def _payload(transfer: Transfer, segment: Segment) -> float:
    """Bytes of all repeats, one group."""
    each = np.broadcast_to(np.asarray(transfer.payload_bytes, dtype=float), np.shape(segment.repeats))
    return float(each @ segment.repeats)
