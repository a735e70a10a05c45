"""What each weight sync of a scenario takes by itself: the floor that the wires set, and the host's overhead on top."""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import ClusterTopology
from .costs.segment import Segment
from .firing import Firing
from .fold import unfolded
from .sim.links import binding_link, lone_rate
from .simulate import Setup, costs_of, lengths_of, topology_of


@dataclass(frozen=True)
class SyncCost:
    """A weight sync that has all links for itself.

    floor_seconds: bytes over the rates of links, storage and device memory. overhead_seconds: of the host, per tensor
    and bucket. What is left of `seconds` are latencies, and messages too small for the full rate.
    sent_bytes: that leave the trained copy for the other one (a broadcast counts once); none through a storage.
    busiest_link: the one that bounds the longest transfer; empty where none is used. parts: seconds by label.
    """

    stage: str
    seconds: float
    floor_seconds: float
    overhead_seconds: float
    sent_bytes: float
    busiest_link: str
    parts: dict[str, float]


def weight_syncs(setup: Setup) -> list[SyncCost]:
    """Each weight sync of an iteration."""
    topology, lengths = topology_of(setup.scenario), lengths_of(setup.scenario, 0)
    costs = costs_of(setup, unfolded(setup.graph), lengths, 0)
    syncs = [stage.name for stage in setup.graph.stages() if stage.kind == "sync" and stage.works_in(0)]
    return [_cost(name, costs.program(Firing(0, name, 0, 0)), topology) for name in syncs]


def _cost(name: str, program: list[Segment], topology: ClusterTopology) -> SyncCost:
    floor = sent = longest = 0.0
    busiest, parts = "", dict[str, float]()
    for segment in program:
        routes = [topology.route(t.op, t.groups) for t in segment.transfers]
        rates = [lone_rate(route.usage, topology.capacities) for route in routes]
        seconds = segment.elapsed(routes, rates).seconds
        parts[segment.label] = parts.get(segment.label, 0.0) + seconds
        if not segment.transfers and segment.label != "sync_overhead":
            floor += seconds
        for transfer, route, rate in zip(segment.transfers, routes, rates, strict=True):
            payload = float(transfer.payload_bytes)
            floor += payload / rate
            if transfer.op in ("send", "broadcast", "host_send"):
                sent += payload * len(transfer.groups)
            if payload / rate > longest:
                longest, busiest = payload / rate, binding_link(route.usage, topology.capacities) or ""
    return SyncCost(name, sum(parts.values()), floor, parts.get("sync_overhead", 0.0), sent, busiest, parts)
