"""The links of a cluster, and how collectives load them.

A collective is described by what every unit of the tree (a GPU, a PCIe switch, a node, a leaf) sends out and takes in;
the same formula serves all levels, so that a group of 1024 ranks is a handful of array operations.

Usage is *link time*: bytes divided by the share of the nominal rate that the operation reaches on that kind of link.
Capacities are nominal rates, hence a lone collective moves at its measured bandwidth and operations of different
efficiency still share a link correctly.

Left out: ECMP collisions, limits of the CPU's own bus between PCIe root ports or sockets, a blocking spine. Nodes of
a group are taken in topology order (a ring enters and leaves every leaf once).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from .costs.segment import Op, Route
from .errors import InputError

if TYPE_CHECKING:
    import networkx as nx

    from .costs.kernels import Collective, CollectiveCurve, Kernels
    from .spec.hardware import Cluster
    from .spec.scenario import Effects

Groups = tuple[tuple[int, ...], ...]
_OutIn = tuple[np.ndarray, np.ndarray]


class Curve(NamedTuple):
    """Seconds of a call = (latency^p + (bytes/rate)^p)^(1/p), p = exponent.

    efficiency: bus bandwidth (in the convention of nccl-tests) over one direction of the port's nominal rate. It may
    exceed 1 where the switch reduces (NVLink SHARP moves the payload once, the convention counts it almost twice).
    """

    latency_seconds: float
    efficiency: float
    exponent: float
    measured: tuple[tuple[float, float], ...] = ()  # see CollectiveCurve; instead of the formula


@dataclass(frozen=True)
class Collectives:
    """What collectives reach on a machine.

    inside: in one node, per operation and number of ranks that it was measured with.
    hop_seconds: one more rank of the same node; network_hop_seconds (ring) and network_tree_hop_seconds: one more node.
    across: measured between nodes, per operation and number of nodes with one rank each; without it, as NCCL's model.
    network_efficiency: of the NICs' nominal rate; pcie_efficiency: of a PCIe slot's, on the way to the NIC.
    two_node_tree_efficiency: rate of the tree all-reduce relative to the ring, where it is used for large messages. It
        matters between exactly two nodes, where it sends the payload once and the ring almost twice.

    Hops are the LL protocol's of NCCL's own model: src/graph/tuning.cc, commit 01afd20, table hwLat. network_exponent:
    together with them it follows that model's ring, best of its three protocols, within 6 % (mean; worst 29 %) for 16
    to 1024 ranks, 8 a node, 1 MB to 10 GB. The model is NCCL's, not a measurement.
    network_efficiency: 46-48 of 50 GB/s (NDR, maintainer, NVIDIA/nccl-tests issue 290, 2025-03-03), 24 of 25 (HDR,
    maintainer, NVIDIA/nccl issue 412, 2023-04-24); all_to_all and send across nodes: unverified, taken as equal.
    pcie_efficiency: 25.1 of 32 GB/s (A100, host to device, NVIDIA/nvbandwidth issue 42, 2025-07-05), 52.8 of 64 (H100,
    device to host, issue 24, 2024-09-11), 26.3 of 32 between GPUs (A6000, issue 50, 2025-11-03).
    """

    inside: Mapping[Op, Mapping[int, Curve]]
    hop_seconds: float = 0.47e-6
    network_hop_seconds: float = 2.7e-6
    network_tree_hop_seconds: float = 5.0e-6
    network_efficiency: float = 0.94
    network_exponent: float = 0.65
    pcie_efficiency: float = 0.8
    two_node_tree_efficiency: float | None = None
    across: Mapping[Op, Mapping[int, Curve]] = field(default_factory=dict)

    def measured(self, op: Op, ranks: int) -> int:
        """The measured number of ranks nearest in ratio (the fewer when two are as near)."""
        return _nearest(self.inside[op], ranks)

    def curve(self, op: Op, ranks: int) -> Curve:
        return self.inside[op][self.measured(op, ranks)]

    def across_curve(self, op: Op, nodes: int) -> Curve | None:
        """Measured between about so many nodes; None: not measured."""
        curves = self.across.get(op)
        return curves[_nearest(curves, nodes)] if curves else None

    def updated(self, kernels: Kernels) -> Collectives:
        """With the curves that a file of kernels has; a broadcast that was not measured is as its all_gather.

        Those of `hw_specs/kernels/` were measured over NVLink: not for a node without it.
        """
        inside = _by_op(kernels.collectives)
        if "broadcast" not in inside and "all_gather" in inside:
            inside["broadcast"] = inside["all_gather"]
        return replace(self, inside={**self.inside, **inside}, across=_by_op(kernels.across_nodes))


def _nearest(measured: Iterable[int], number: int) -> int:
    return min(measured, key=lambda n: (abs(math.log(n / number)), n))


def _by_op(measured: Mapping[Collective, Mapping[int, CollectiveCurve]]) -> dict[Op, dict[int, Curve]]:
    return {
        op: {n: Curve(c.alpha_seconds, c.efficiency, c.exponent, c.measured) for n, c in curves.items()}
        for op, curves in measured.items()
    }


_RINGS: Final[tuple[Op, ...]] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")


def _curves(ring: Curve, send: Curve, **other: Curve) -> dict[Op, dict[int, Curve]]:
    """Curves measured with 8 ranks; a pinned copy's 10 us: unverified, its rate is that of pcie_efficiency."""
    curves: dict[Op, dict[int, Curve]] = {op: {8: other.get(op, ring)} for op in _RINGS}
    copy = Curve(10e-6, 0.8, 1.0)
    return {**curves, "send": {2: send}, "to_host": {1: copy}, "from_host": {1: copy}}


# A100, 8 ranks. all_reduce: p-norm fitted to the NCCL table of aiconfigurator-core 0.12.0: 22 us, 130 GB/s of payload
# (227 GB/s bus bandwidth) of 300, p 0.6. send: 14 us, 297 GB/s, Vidur's A100 profile of send/recv. The others:
# unverified, taken as equal to all_reduce. No tree: two nodes with 4 HDR NICs reach 86 GB/s (NVIDIA/nccl issue 1048,
# 2023-11-01), what a ring does.
AMPERE = Collectives(_curves(ring=Curve(22e-6, 227 / 300, 0.6), send=Curve(14e-6, 297 / 300, 1.0)))

# H100, 8 ranks, same table: all_reduce 15 us, 283 GB/s of payload (495 bus) of 450, p 0.6; all_gather at most 335 of
# 450. send: 380 of 450 (NVIDIA/nccl issue 1264, 2024-04-24), latency unverified. The others: unverified, as all_gather.
# Tree 0.92 of ring: unverified; two nodes of 8 NDR NICs give about 470 GB/s (NVIDIA/nccl issue 2409, 2026-09-14).
HOPPER = Collectives(
    _curves(
        ring=Curve(15e-6, 335 / 450, 0.6), send=Curve(10e-6, 380 / 450, 1.0), all_reduce=Curve(15e-6, 495 / 450, 0.6)
    ),
    two_node_tree_efficiency=0.92,
)

# GPUs without NVLink; hop: row PCI of the table named above. Rate of a copy between two GPUs; the rest: unverified.
PCIE = Collectives(_curves(ring=Curve(22e-6, 0.8, 0.6), send=Curve(14e-6, 0.8, 1.0)), hop_seconds=1.0e-6)

# NCCL's model multiplies the LL hop inside a node by this when the group spans nodes (same file as above).
_HOP_FACTOR_ACROSS = 1.8


def default_collectives(cluster: Cluster) -> Collectives:
    """The set of the most similar machine; `updated` and `dataclasses.replace` change parts of it."""
    if cluster.node.gpu_link == "pcie":
        return PCIE
    return HOPPER if cluster.gpu.architecture.lower() in ("hopper", "blackwell") else AMPERE


class ClusterTopology:
    """Links of a cluster. Rank r is GPU r % gpus_per_node of node r // gpus_per_node.

    capacities: nominal bytes/s of every link, one direction each ("gpu3 nvlink out", "node0 nic1 in", "leaf0 up");
    only host memory has a single one for both directions.
    """

    def __init__(
        self, cluster: Cluster, collectives: Collectives | None = None, effects: Effects | None = None
    ) -> None:
        self.cluster = cluster
        self.collectives = collectives or default_collectives(cluster)
        self.free = effects is not None and not effects.links
        self._routes: dict[tuple[Op, Groups], Route] = {}

        node, network = cluster.node, cluster.network
        self._nvlink = node.gpu_link != "pcie"
        if self._nvlink and cluster.gpu.nvlink_bytes_per_second is None:
            raise InputError(
                f"is {node.gpu_link!r}, but GPU {cluster.gpu.name!r} has no nvlink_bytes_per_second; "
                "allowed for it: 'pcie'",
                field="node.gpu_link",
            )
        self._switched = node.pcie_gpus_per_switch > 1  # otherwise a GPU's slot is its own way to the host
        self._switches = math.ceil(node.gpus_per_node / node.pcie_gpus_per_switch)
        self._leaves = math.ceil(cluster.nodes / network.nodes_per_leaf) if network.nodes_per_leaf else 0
        self._network_efficiency = network.efficiency or self.collectives.network_efficiency
        self._nic_share = _nic_share(node.gpus_per_node, network.nics_per_node)
        self._names, self._nominal = self._links()
        self.capacities: dict[str, float] = dict(zip(self._names, self._nominal.tolist(), strict=True))

    # --- where ranks are ---------------------------------------------------------------------------------------------

    def node_of(self, rank: int) -> int:
        return rank // self.cluster.node.gpus_per_node

    def crosses_nodes(self, ranks: Iterable[int]) -> bool:
        return len({self.node_of(r) for r in ranks}) > 1

    # --- links -------------------------------------------------------------------------------------------------------

    def _links(self) -> tuple[list[str], np.ndarray]:
        """Names and nominal rates (bytes/s), block by block in the order that `_usage` fills them."""
        c, node, network = self.cluster, self.cluster.node, self.cluster.network
        gpus = [f"gpu{r}" for r in range(c.gpus)]
        switches = [f"node{n} switch{s}" for n in range(c.nodes) for s in range(self._switches)]
        nics = [f"node{n} nic{i}" for n in range(c.nodes) for i in range(network.nics_per_node)]
        nvlink = c.gpu.nvlink_bytes_per_second.value if self._nvlink and c.gpu.nvlink_bytes_per_second else 0.0
        pcie, nic = c.gpu.pcie_bytes_per_second.value, network.nic_bytes_per_second.value
        uplink = (network.nodes_per_leaf or 0) * network.nics_per_node * nic / network.oversubscription
        blocks = [(gpus, "nvlink out", nvlink), (gpus, "nvlink in", nvlink)] if self._nvlink else []
        blocks += [(gpus, "pcie out", pcie), (gpus, "pcie in", pcie)]
        if self._switched:
            blocks += [(switches, "up", pcie), (switches, "down", pcie)]
        blocks += [([f"node{n}" for n in range(c.nodes)], "memory", node.host_memory_bytes_per_second.value)]
        blocks += [(nics, "out", nic), (nics, "in", nic)]
        leaves = [f"leaf{i}" for i in range(self._leaves)]
        blocks += [(leaves, "up", uplink), (leaves, "down", uplink)]
        names = [f"{unit} {port}" for units, port, _ in blocks for unit in units]
        return names, np.concatenate([np.full(len(units), rate) for units, _, rate in blocks])

    def _edges(self) -> Iterator[tuple[str, str, str | None]]:
        """(from, to, link); link None: not a limit of its own."""
        node, network = self.cluster.node, self.cluster.network
        for n in range(self.cluster.nodes):
            above = f"leaf{n // network.nodes_per_leaf}" if network.nodes_per_leaf else "spine"
            host = f"node{n} host"
            yield host, f"node{n} memory", f"node{n} memory"
            yield f"node{n} memory", host, f"node{n} memory"
            for s in range(self._switches if self._switched else 0):
                yield f"node{n} switch{s}", host, f"node{n} switch{s} up"
                yield host, f"node{n} switch{s}", f"node{n} switch{s} down"
            for i in range(network.nics_per_node):
                yield f"node{n} nic{i}", above, f"node{n} nic{i} out"
                yield above, f"node{n} nic{i}", f"node{n} nic{i} in"
            for local in range(node.gpus_per_node):
                gpu = f"gpu{n * node.gpus_per_node + local}"
                hub = f"node{n} switch{local // node.pcie_gpus_per_switch}" if self._switched else host
                yield gpu, hub, f"{gpu} pcie out"
                yield hub, gpu, f"{gpu} pcie in"
                if self._nvlink:
                    yield gpu, f"node{n} {node.gpu_link}", f"{gpu} nvlink out"
                    yield f"node{n} {node.gpu_link}", gpu, f"{gpu} nvlink in"
                for i in np.flatnonzero(self._nic_share[local]).tolist():
                    yield hub, f"node{n} nic{i}", None
                    yield f"node{n} nic{i}", hub, None
        for i in range(self._leaves):
            yield f"leaf{i}", "spine", f"leaf{i} up"
            yield "spine", f"leaf{i}", f"leaf{i} down"

    @cached_property
    def graph(self) -> nx.DiGraph:
        """Devices and switches; edges carry `link` (a key of `capacities`) and `bytes_per_second`."""
        import networkx as nx

        graph = nx.DiGraph(name=self.cluster.name)
        for source, target, link in self._edges():
            graph.add_edge(source, target, link=link, bytes_per_second=self.capacities[link] if link else math.inf)
        return graph

    # --- routes ------------------------------------------------------------------------------------------------------

    def route(self, op: Op, groups: Groups) -> Route:
        """How `op`, run by all groups at once, loads the links (see `Transfer` for what a payload byte is)."""
        key = (op, groups)
        found = self._routes.get(key)
        if found is None:
            found = self._routes[key] = self._route(op, groups)
        return found

    def _route(self, op: Op, groups: Groups) -> Route:
        if op == "host_memory":
            return self._host_memory_route(groups)
        copy = op in ("to_host", "from_host")
        talking = [g for g in groups if copy or len(g) > 1]
        if self.free or not talking:
            return Route({}, 0.0, 1.0)
        ranks = np.concatenate([np.asarray(g, dtype=np.int64) for g in talking])
        sizes = np.array([len(g) for g in talking])
        assert ranks.min() >= 0 and ranks.max() < self.cluster.gpus, "rank outside the cluster"
        members = _Members(ranks, np.repeat(np.arange(len(sizes)), sizes), sizes)
        if op == "custom_all_reduce" and not self._can_read_peers(talking):
            op = "all_reduce"
        if copy:
            curve = self.collectives.curve(op, 1)
            return Route(
                self._named(self._copy_usage(op, ranks)), curve.latency_seconds, curve.exponent, curve.measured
            )
        usage, nodes = self._usage(op, members)
        latency = max(self._latency(op, n, k) for n, k in set(zip(sizes.tolist(), nodes.tolist(), strict=True)))
        exponent, measured = self._shape(op, int(sizes.max()), int(nodes.max()))
        return Route(self._named(usage), latency, exponent, measured)

    def _host_memory_route(self, groups: Groups) -> Route:
        """Every rank's bytes on its node's memory, at the nominal rate. No link between devices, yet others wait."""
        if self.free:
            return Route({}, 0.0, 1.0)
        ranks = np.array([rank for group in groups for rank in group])
        return Route(self._named(self._assemble(ranks, pcie=None, switch=None, memory=np.ones(len(ranks)))), 0.0, 1.0)

    def _shape(self, op: Op, ranks: int, nodes: int) -> tuple[float, tuple[tuple[float, float], ...]]:
        """Exponent and measured points of a curve."""
        if nodes == 1:
            curve = self.collectives.curve(op, ranks)
            return curve.exponent, curve.measured
        across = self.collectives.across_curve(op, nodes)
        return (across.exponent, across.measured) if across else (self.collectives.network_exponent, ())

    def _can_read_peers(self, groups: list[tuple[int, ...]]) -> bool:
        """Whether an engine's own all-reduce works: each group in one node with NVLink, and a curve for it."""
        within = self._nvlink and not any(self.crosses_nodes(group) for group in groups)
        return within and "custom_all_reduce" in self.collectives.inside

    def _named(self, usage: np.ndarray) -> dict[str, float]:
        used = np.flatnonzero(usage)
        return dict(zip([self._names[i] for i in used], usage[used].tolist(), strict=True))

    def _units(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """PCIe switch, node and leaf of each rank."""
        per_node = self.cluster.node.gpus_per_node
        node = ranks // per_node
        switch = node * self._switches + ranks % per_node // self.cluster.node.pcie_gpus_per_switch
        return switch, node, node // (self.cluster.network.nodes_per_leaf or self.cluster.nodes)

    def _copy_usage(self, op: Op, ranks: np.ndarray) -> np.ndarray:
        """GPU to or from host memory: its slot, the uplink it shares, and the memory."""
        load = np.full(len(ranks), 1 / self.collectives.curve(op, 1).efficiency)
        slot = (load, 0 * load) if op == "to_host" else (0 * load, load)
        return self._assemble(ranks, pcie=slot, switch=slot, memory=np.ones(len(ranks)))

    def _usage(self, op: Op, members: _Members) -> tuple[np.ndarray, np.ndarray]:
        """Link time per payload byte on every link, and how many nodes each group spans."""
        c, curves, ranks = self.cluster, self.collectives, members.ranks
        switch, node, leaf = self._units(ranks)
        on_node = members.level(node)
        tree = curves.two_node_tree_efficiency if op == "all_reduce" else None
        by_rank = _traffic(op, members, members.level(ranks))
        by_node = _traffic(op, members, on_node, tree, on_node.units)
        by_leaf = _traffic(op, members, members.level(leaf), tree, on_node.units)
        # What a GPU does not pass to or take from a NIC goes to or comes from GPUs of its node.
        inside = _beyond(by_rank, by_node, on_node.members > 1)
        crossing = None  # between PCIe switches
        if self._switched and not self._nvlink:
            crossing = _beyond(_traffic(op, members, members.level(switch)), by_node, on_node.members > 1)
        if c.node.gpu_link == "nvlink_mesh":
            # Without a switch only the cables to the group's own members help; cables taken as evenly spread over the
            # node's other GPUs (exact for four fully connected GPUs, unverified for a cube mesh).
            inside = _times(inside, (c.node.gpus_per_node - 1) / np.maximum(on_node.members - 1, 1))
        port = np.empty(len(ranks))
        for m in np.unique(on_node.members):
            port[on_node.members == m] = 1 / curves.curve(op, int(m)).efficiency
        across = curves.across_curve(op, int(on_node.units_of_group.max()))
        inside, network = _times(inside, port), 1 / (across.efficiency if across else self._network_efficiency)
        slot = _times(by_node, 1 / curves.pcie_efficiency)
        if not self._nvlink:
            slot = (slot[0] + inside[0], slot[1] + inside[1])
        usage = self._assemble(
            ranks,
            inside=inside,
            pcie=slot,
            switch=_times(crossing, port) if crossing else None,
            network=_times(by_node, network),
            leaf=_times(by_leaf, network),
        )
        return usage, on_node.units_of_group

    def _assemble(
        self,
        ranks: np.ndarray,
        *,
        pcie: _OutIn | None,
        switch: _OutIn | None,
        inside: _OutIn | None = None,
        memory: np.ndarray | None = None,
        network: _OutIn | None = None,
        leaf: _OutIn | None = None,
    ) -> np.ndarray:
        """Loads of the members summed up on the links, in the order of `_links`."""
        c = self.cluster
        none = np.zeros(len(ranks))
        switch_of, node_of, leaf_of = self._units(ranks)

        def total(unit: np.ndarray, units: int, loads: _OutIn | None) -> list[np.ndarray]:
            return [np.bincount(unit, weights=x, minlength=units) for x in loads or (none, none)]

        blocks = total(ranks, c.gpus, inside) if self._nvlink else []
        blocks += total(ranks, c.gpus, pcie)
        blocks += total(switch_of, c.nodes * self._switches, switch) if self._switched else []
        blocks += total(node_of, c.nodes, (none if memory is None else memory, none))[:1]
        blocks += [(x.reshape(c.nodes, -1) @ self._nic_share).ravel() for x in total(ranks, c.gpus, network)]
        blocks += total(leaf_of, self._leaves, leaf) if self._leaves else []
        return np.concatenate(blocks)

    def _latency(self, op: Op, ranks: int, nodes: int) -> float:
        """Seconds of one call of no bytes: the measured latency, corrected by the hops of NCCL's model (ring or tree).

        Source of the step counts: ncclTopoTuneModel in src/graph/tuning.cc, commit 01afd20.
        """
        c, given = self.collectives, self.cluster.network.latency_seconds
        across = c.across_curve(op, nodes) if nodes > 1 else None
        if across:  # measured with one rank a node; the others of a node come on top
            return across.latency_seconds + (ranks - nodes) * c.hop_seconds * _HOP_FACTOR_ACROSS
        ring_hop = given.value if given else c.network_hop_seconds
        tree_hop = ring_hop * c.network_tree_hop_seconds / c.network_hop_seconds
        rounds = 2 if op in ("all_reduce", "custom_all_reduce") else 1
        measured = c.measured(op, math.ceil(ranks / nodes))
        launch = max(c.inside[op][measured].latency_seconds - rounds * (measured - 1) * c.hop_seconds, 0.0)
        hop = c.hop_seconds * (_HOP_FACTOR_ACROSS if nodes > 1 else 1)
        if op == "all_to_all" and nodes > 1:  # all peers at once: only one message's way across
            return launch + (ranks - 2) * hop + ring_hop
        steps = rounds * ((ranks - nodes) * hop + (nodes - 1) * ring_hop if nodes > 1 else (ranks - 1) * hop)
        if op == "all_reduce" and nodes > 1:
            steps = min(steps, 2 * ((ranks / nodes - 1) * hop + math.ceil(math.log2(nodes)) * tree_hop))
        return launch + steps


class _Level(NamedTuple):
    """Of each member: members of its group in its unit, units of its group, whether the group's root is in its unit."""

    members: np.ndarray
    units: np.ndarray
    root: np.ndarray
    units_of_group: np.ndarray


class _Members:
    """Ranks of all groups in one array; the first of each group is the root (source) of a broadcast or send."""

    def __init__(self, ranks: np.ndarray, group: np.ndarray, sizes: np.ndarray) -> None:
        self.ranks, self.group, self.sizes = ranks, group, sizes
        self.first = np.concatenate(([0], np.cumsum(sizes)[:-1]))

    @property
    def size(self) -> np.ndarray:
        return np.take(self.sizes, self.group)

    def level(self, unit: np.ndarray) -> _Level:
        width = int(unit.max()) + 1
        keys, inverse, counts = np.unique(self.group * width + unit, return_inverse=True, return_counts=True)
        units_of_group = np.bincount(keys // width, minlength=len(self.sizes))
        root = unit == unit[self.first][self.group]
        return _Level(counts[inverse], units_of_group[self.group], root, units_of_group)


def _traffic(
    op: Op, members: _Members, level: _Level, tree: float | None = None, nodes: np.ndarray | None = None
) -> _OutIn:
    """Bytes per payload byte that leave and enter a unit, spread evenly over the group's members in it.

    Rings: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
    A broadcast is a pipelined chain whose order differs between channels: all units but the root's are last as often.
    """
    n, inside, units = members.size, level.members, level.units
    outside = units > 1
    if op in ("all_gather", "reduce_scatter"):
        out = into = (n - 1) / n
    elif op in ("all_reduce", "custom_all_reduce"):
        out = 2 * (n - 1) / n
        if tree is not None and nodes is not None:
            out = np.where(nodes == 2, np.minimum(out, 1 / tree), out)
        into = out
    elif op == "all_to_all":
        out = into = inside * (n - inside) / n
    else:
        assert op in ("broadcast", "send"), op
        out = np.where(level.root, 1.0, (units - 2) / np.maximum(units - 1, 1))
        into = np.where(level.root, 0.0, 1.0)
    return outside * out / inside, outside * into / inside


def _beyond(total: _OutIn, outer: _OutIn, where: np.ndarray) -> _OutIn:
    """The part of `total` that does not go through the outer level."""
    return (where * np.maximum(total[0] - outer[0], 0.0), where * np.maximum(total[1] - outer[1], 0.0))


def _times(loads: _OutIn, factor: np.ndarray | float) -> _OutIn:
    return (loads[0] * factor, loads[1] * factor)


def _nic_share(gpus: int, nics: int) -> np.ndarray:
    """(gpus, nics): how a GPU's network traffic is split over the NICs nearest to it; rows sum to 1."""
    share = np.zeros((gpus, nics))
    for gpu in range(gpus):
        first, last = gpu * nics // gpus, (gpu + 1) * nics // gpus
        share[gpu, first : max(last, first + 1)] = 1 / max(last - first, 1)
    return share
