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
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


class _Part:
    """A part of the cluster: where its units begin among those of all parts, and what its machines reach."""

    def __init__(self, cluster: Cluster, collectives: Collectives, before: _Part | None, field: str) -> None:
        self.cluster, self.collectives = cluster, collectives
        node, network = cluster.node, cluster.network
        self.nvlink = node.gpu_link != "pcie"
        if self.nvlink and cluster.gpu.nvlink_bytes_per_second is None:
            raise InputError(
                f"is {node.gpu_link!r}, but GPU {cluster.gpu.name!r} has no nvlink_bytes_per_second; "
                "allowed for it: 'pcie'",
                field=f"{field}node.gpu_link",
            )
        self.switched = node.pcie_gpus_per_switch > 1  # otherwise a GPU's slot is its own way to the host
        self.switches_per_node = math.ceil(node.gpus_per_node / node.pcie_gpus_per_switch)
        self.nodes_per_leaf = network.nodes_per_leaf or cluster.nodes  # without leaves all are below one, of no limit
        self.network_efficiency = network.efficiency or collectives.network_efficiency
        self.nic_share = _nic_share(node.gpus_per_node, network.nics_per_node)
        leaves = math.ceil(cluster.nodes / self.nodes_per_leaf)
        self.gpus: range = _next(before.gpus if before else None, cluster.gpus)
        self.nodes: range = _next(before.nodes if before else None, cluster.nodes)
        self.switches: range = _next(before.switches if before else None, cluster.nodes * self.switches_per_node)
        self.leaves: range = _next(before.leaves if before else None, leaves)

    def units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Node, PCIe switch and leaf of each GPU."""
        rank, per_node = np.arange(len(self.gpus)), self.cluster.node.gpus_per_node
        node = rank // per_node
        switch = node * self.switches_per_node + rank % per_node // self.cluster.node.pcie_gpus_per_switch
        leaf = node // self.nodes_per_leaf
        return node + self.nodes.start, switch + self.switches.start, leaf + self.leaves.start

    def hosts(self) -> np.ndarray:
        """A number for the operating system of each GPU."""
        rank, node = np.arange(len(self.gpus)), self.cluster.node
        local = rank % node.gpus_per_node
        return self.gpus.start + rank - local + local // node.host_gpus  # that of the node's first GPU, counted on

    def rates(self) -> dict[str, float]:
        """Nominal bytes/s of a link of each kind; 0 where there is none."""
        c, network = self.cluster, self.cluster.network
        nvlink = c.gpu.nvlink_bytes_per_second.value if self.nvlink and c.gpu.nvlink_bytes_per_second else 0.0
        pcie, nic = c.gpu.pcie_bytes_per_second.value, network.nic_bytes_per_second.value
        return {
            "nvlink": nvlink,
            "pcie": pcie,
            "switch": pcie if self.switched else 0.0,
            "memory": c.node.host_memory_bytes_per_second.value,
            "nic": nic,
            "leaf": (network.nodes_per_leaf or 0) * network.nics_per_node * nic / network.oversubscription,
        }


def _next(before: range | None, count: int) -> range:
    start = before.stop if before else 0
    return range(start, start + count)


class ClusterTopology:
    """Links of a cluster. GPUs, nodes, switches and leaves are numbered through its parts.

    capacities: nominal bytes/s of every link, one direction each ("gpu3 nvlink out", "node0 nic1 in", "leaf0 up");
    only host memory has a single one for both directions.

    A group with ranks in several parts sends and receives on each rank's own links, at the efficiency of its own
    machines; latency and curve are those of the slowest part.
    """

    def __init__(
        self,
        cluster: Cluster,
        collectives: Collectives | Sequence[Collectives] | None = None,
        effects: Effects | None = None,
    ) -> None:
        """collectives: one for all parts, or one for each (default: `default_collectives` of each)."""
        self.cluster = cluster
        self.free = effects is not None and not effects.links
        self._routes: dict[tuple[Op, Groups], Route] = {}
        self._parts: list[_Part] = []
        for k, part in enumerate(cluster.all_parts):
            reached = default_collectives(part)
            if collectives is not None:
                reached = collectives if isinstance(collectives, Collectives) else collectives[k]
            before = self._parts[-1] if self._parts else None
            self._parts.append(_Part(part, reached, before, f"parts.{k}." if cluster.parts else ""))
        node, switch, leaf = zip(*(part.units() for part in self._parts), strict=True)
        self._node_of, self._switch_of, self._leaf_of = (np.concatenate(unit) for unit in (node, switch, leaf))
        self._host_of = np.concatenate([part.hosts() for part in self._parts])
        self._part_of = np.repeat(np.arange(len(self._parts)), [len(part.gpus) for part in self._parts])
        self._nvlink, self._switched, self._mesh, self._leaved = (
            np.array(flags)
            for flags in (
                [part.nvlink for part in self._parts],
                [part.switched for part in self._parts],
                [part.cluster.node.gpu_link == "nvlink_mesh" for part in self._parts],
                [part.cluster.network.nodes_per_leaf is not None for part in self._parts],
            )
        )
        between = cluster.between if cluster.parts else None
        rate, latency = (between.bytes_per_second, between.latency_seconds) if between else (None, None)
        self._between_rate = rate.value if rate else 0.0
        self._between_latency = latency.value if latency else None
        self._names, self._nominal = self._links()
        self.capacities: dict[str, float] = {
            name: rate for name, rate in zip(self._names, self._nominal.tolist(), strict=True) if rate
        }

    # --- where ranks are ---------------------------------------------------------------------------------------------

    def node_of(self, rank: int) -> int:
        return int(self._node_of[rank])

    def crosses_nodes(self, ranks: Iterable[int]) -> bool:
        return len({self.node_of(r) for r in ranks}) > 1

    # --- links -------------------------------------------------------------------------------------------------------

    def _links(self) -> tuple[list[str], np.ndarray]:
        """Names and nominal rates (bytes/s), block by block in the order that `_assemble` fills them; rate 0: a link
        that the units of a part do not have."""
        parts = self._parts
        gpus = [[f"gpu{r}" for r in part.gpus] for part in parts]
        switches = [[f"node{n} switch{s}" for n in p.nodes for s in range(p.switches_per_node)] for p in parts]
        nodes = [[f"node{n}" for n in part.nodes] for part in parts]
        nics = [[f"node{n} nic{i}" for n in p.nodes for i in range(p.cluster.network.nics_per_node)] for p in parts]
        leaves = [[f"leaf{i}" for i in part.leaves] for part in parts]
        hubs = [[f"part{k}"] for k in range(len(parts))]
        blocks = [(gpus, "nvlink out", "nvlink"), (gpus, "nvlink in", "nvlink")] if self._nvlink.any() else []
        blocks += [(gpus, "pcie out", "pcie"), (gpus, "pcie in", "pcie")]
        if self._switched.any():
            blocks += [(switches, "up", "switch"), (switches, "down", "switch")]
        blocks += [(nodes, "memory", "memory"), (nics, "out", "nic"), (nics, "in", "nic")]
        if self._leaved.any():
            blocks += [(leaves, "up", "leaf"), (leaves, "down", "leaf")]
        if self._between_rate:
            blocks += [(hubs, "up", "between"), (hubs, "down", "between")]
        rates = [part.rates() | {"between": self._between_rate} for part in parts]
        names = [f"{unit} {port}" for units, port, _ in blocks for own in units for unit in own]
        nominal = [
            np.full(len(own), rate[kind]) for units, _, kind in blocks for own, rate in zip(units, rates, strict=True)
        ]
        return names, np.concatenate(nominal)

    def _edges(self) -> Iterator[tuple[str, str, str | None]]:
        """(from, to, link); link None: not a limit of its own."""
        for k, part in enumerate(self._parts):
            spine = f"part{k} spine" if self._between_rate else "spine"
            yield from self._edges_of(part, spine)
            if self._between_rate:
                yield spine, "spine", f"part{k} up"
                yield "spine", spine, f"part{k} down"

    def _edges_of(self, part: _Part, spine: str) -> Iterator[tuple[str, str, str | None]]:
        node, network = part.cluster.node, part.cluster.network
        for n in part.nodes:
            leaf = f"leaf{part.leaves.start + (n - part.nodes.start) // part.nodes_per_leaf}"
            above = leaf if network.nodes_per_leaf else spine
            host = f"node{n} host"
            yield host, f"node{n} memory", f"node{n} memory"
            yield f"node{n} memory", host, f"node{n} memory"
            for s in range(part.switches_per_node if part.switched else 0):
                yield f"node{n} switch{s}", host, f"node{n} switch{s} up"
                yield host, f"node{n} switch{s}", f"node{n} switch{s} down"
            for i in range(network.nics_per_node):
                yield f"node{n} nic{i}", above, f"node{n} nic{i} out"
                yield above, f"node{n} nic{i}", f"node{n} nic{i} in"
            for local in range(node.gpus_per_node):
                gpu = f"gpu{part.gpus.start + (n - part.nodes.start) * node.gpus_per_node + local}"
                hub = f"node{n} switch{local // node.pcie_gpus_per_switch}" if part.switched else host
                yield gpu, hub, f"{gpu} pcie out"
                yield hub, gpu, f"{gpu} pcie in"
                if part.nvlink:
                    yield gpu, f"node{n} {node.gpu_link}", f"{gpu} nvlink out"
                    yield f"node{n} {node.gpu_link}", gpu, f"{gpu} nvlink in"
                for i in np.flatnonzero(part.nic_share[local]).tolist():
                    yield hub, f"node{n} nic{i}", None
                    yield f"node{n} nic{i}", hub, None
        for i in part.leaves if network.nodes_per_leaf else ():
            yield f"leaf{i}", spine, f"leaf{i} up"
            yield spine, f"leaf{i}", f"leaf{i} down"

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
        parts = [self._parts[k] for k in np.unique(self._part_of[ranks])]
        if copy:
            curve = max((part.collectives.curve(op, 1) for part in parts), key=lambda c: c.latency_seconds)
            return Route(
                self._named(self._copy_usage(op, ranks)), curve.latency_seconds, curve.exponent, curve.measured
            )
        usage, nodes = self._usage(op, members)
        op = "send" if op == "host_send" else op  # through shared memory or the network, as late as from GPU to GPU
        latency = max(self._latency(op, *group) for group in self._kinds_of_groups(members, nodes))
        shapes = [self._shape(op, int(sizes.max()), int(nodes.max()), part.collectives) for part in parts]
        return Route(self._named(usage), latency, *min(shapes))

    def _kinds_of_groups(self, members: _Members, nodes: np.ndarray) -> set[tuple[int, int, int, _Part]]:
        """(ranks, nodes, parts that it spans, one of these) of the groups that differ."""
        keys = np.unique(members.group * len(self._parts) + self._part_of[members.ranks])
        group, part = keys // len(self._parts), keys % len(self._parts)
        spanned = np.bincount(group)
        found = zip(members.sizes[group].tolist(), nodes[group].tolist(), spanned[group].tolist(), part, strict=True)
        return {(n, k, parts, self._parts[own]) for n, k, parts, own in found}

    def _host_memory_route(self, groups: Groups) -> Route:
        """Every rank's bytes on its node's memory, at the nominal rate. No link between devices, yet others wait."""
        if self.free:
            return Route({}, 0.0, 1.0)
        ranks = np.array([rank for group in groups for rank in group])
        return Route(self._named(self._assemble(ranks, pcie=None, switch=None, memory=np.ones(len(ranks)))), 0.0, 1.0)

    @staticmethod
    def _shape(op: Op, ranks: int, nodes: int, c: Collectives) -> tuple[float, tuple[tuple[float, float], ...]]:
        """Exponent and measured points of a curve."""
        if nodes == 1:
            curve = c.curve(op, ranks)
            return curve.exponent, curve.measured
        across = c.across_curve(op, nodes)
        return (across.exponent, across.measured) if across else (c.network_exponent, ())

    def _can_read_peers(self, groups: list[tuple[int, ...]]) -> bool:
        """Whether an engine's own all-reduce works: each group in one host with NVLink, and a curve for it (vLLM's
        custom_all_reduce.py: "not supported ... across nodes", which it tells by shared memory)."""
        parts = (self._parts[self._part_of[group[0]]] for group in groups)
        able = all(part.nvlink and "custom_all_reduce" in part.collectives.inside for part in parts)
        return able and all(len(set(self._host_of[list(group)].tolist())) == 1 for group in groups)

    def _named(self, usage: np.ndarray) -> dict[str, float]:
        """By link; what would be on links that there are not is left out."""
        used = np.flatnonzero((usage != 0) & (self._nominal > 0))
        return dict(zip([self._names[i] for i in used], usage[used].tolist(), strict=True))

    def _per_part(self, ranks: np.ndarray, values: Iterable[float]) -> np.ndarray:
        """Of each rank, the value of its part."""
        return np.asarray(np.array(list(values), dtype=float)[self._part_of[ranks]])

    def _copy_usage(self, op: Op, ranks: np.ndarray) -> np.ndarray:
        """GPU to or from host memory: its slot, the uplink it shares, and the memory."""
        load = self._per_part(ranks, (1 / part.collectives.curve(op, 1).efficiency for part in self._parts))
        slot = (load, 0 * load) if op == "to_host" else (0 * load, load)
        return self._assemble(ranks, pcie=slot, switch=slot, memory=np.ones(len(ranks)))

    def _usage(self, op: Op, members: _Members) -> tuple[np.ndarray, np.ndarray]:
        """Link time per payload byte on every link, and how many nodes each group spans."""
        ranks, parts, on_hosts = members.ranks, self._parts, op == "host_send"
        op = "send" if on_hosts else op
        part = self._part_of[ranks]
        on_node = members.level(self._node_of[ranks])
        trees = [parts[k].collectives.two_node_tree_efficiency for k in np.unique(part)]
        built = [tree for tree in trees if tree is not None] if op == "all_reduce" else []
        tree = min(built) if built and len(built) == len(trees) else None
        by_rank = _traffic(op, members, members.level(ranks))
        by_node = _traffic(op, members, on_node, tree, on_node.units)
        by_leaf = _traffic(op, members, members.level(self._leaf_of[ranks]), tree, on_node.units)
        by_part = None
        if self._between_rate:
            by_part = _traffic(op, members, members.level(part), tree, on_node.units)
        # What a GPU does not pass to or take from a NIC goes to or comes from GPUs of its node.
        inside = _beyond(by_rank, by_node, on_node.members > 1)
        crossing = None  # between PCIe switches
        if (through_switch := self._switched & ~self._nvlink).any():
            by_switch = _traffic(op, members, members.level(self._switch_of[ranks]))
            crossing = _times(_beyond(by_switch, by_node, on_node.members > 1), through_switch[part])
        if self._mesh.any():
            # Without a switch only the cables to the group's own members help; cables taken as evenly spread over the
            # node's other GPUs (exact for four fully connected GPUs, unverified for a cube mesh).
            others = self._per_part(ranks, (p.cluster.node.gpus_per_node - 1 for p in parts))
            inside = _times(inside, np.where(self._mesh[part], others / np.maximum(on_node.members - 1, 1), 1.0))
        port = np.empty(len(ranks))
        for k in np.unique(part):
            for m in np.unique(on_node.members[part == k]):
                port[(part == k) & (on_node.members == m)] = 1 / parts[k].collectives.curve(op, int(m)).efficiency
        most = int(on_node.units_of_group.max())
        across = [p.collectives.across_curve(op, most) for p in parts]
        reached = [c.efficiency if c else p.network_efficiency for c, p in zip(across, parts, strict=True)]
        inside, network = _times(inside, port), self._per_part(ranks, (1 / efficiency for efficiency in reached))
        slot = _times(by_node, self._per_part(ranks, (1 / p.collectives.pcie_efficiency for p in parts)))
        if not self._nvlink.all():
            by_slot = _times(inside, ~self._nvlink[part])
            slot = (slot[0] + by_slot[0], slot[1] + by_slot[1])
        usage = self._assemble(
            ranks,
            inside=None if on_hosts else inside,
            pcie=None if on_hosts else slot,
            switch=_times(crossing, port) if crossing and not on_hosts else None,
            memory=np.ones(len(ranks)) if on_hosts else None,  # read there, written here; in one node both
            network=_times(by_node, network),
            leaf=_times(by_leaf, network),
            between=_times(by_part, network) if by_part else None,
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
        between: _OutIn | None = None,
    ) -> np.ndarray:
        """Loads of the members summed up on the links, in the order of `_links`."""
        none, last = np.zeros(len(ranks)), self._parts[-1]

        def total(unit: np.ndarray, units: int, loads: _OutIn | None) -> list[np.ndarray]:
            return [np.bincount(unit, weights=x, minlength=units) for x in loads or (none, none)]

        blocks = total(ranks, last.gpus.stop, inside) if self._nvlink.any() else []
        blocks += total(ranks, last.gpus.stop, pcie)
        blocks += total(self._switch_of[ranks], last.switches.stop, switch) if self._switched.any() else []
        blocks += total(self._node_of[ranks], last.nodes.stop, (none if memory is None else memory, none))[:1]
        for x in total(ranks, last.gpus.stop, network):
            own = ((part, x[part.gpus.start : part.gpus.stop]) for part in self._parts)
            blocks += [(loads.reshape(len(part.nodes), -1) @ part.nic_share).ravel() for part, loads in own]
        blocks += total(self._leaf_of[ranks], last.leaves.stop, leaf) if self._leaved.any() else []
        blocks += total(self._part_of[ranks], len(self._parts), between) if self._between_rate else []
        return np.concatenate(blocks)

    def _latency(self, op: Op, ranks: int, nodes: int, spanned: int, part: _Part) -> float:
        """Seconds of one call of no bytes: the measured latency, corrected by the hops of NCCL's model (ring or tree).

        Of a group that spans so many parts, as if all were machines of this one; hops between parts may be longer.
        Source of the step counts: ncclTopoTuneModel in src/graph/tuning.cc, commit 01afd20.
        """
        c, given = part.collectives, part.cluster.network.latency_seconds
        across = c.across_curve(op, nodes) if nodes > 1 else None
        ring_hop = given.value if given else c.network_hop_seconds
        rounds = 2 if op in ("all_reduce", "custom_all_reduce") else 1
        longer = 0.0
        if spanned > 1 and self._between_latency is not None:
            longer = rounds * (spanned - 1) * max(self._between_latency - ring_hop, 0.0)
        if across:  # measured with one rank a node; the others of a node come on top
            return across.latency_seconds + (ranks - nodes) * c.hop_seconds * _HOP_FACTOR_ACROSS + longer
        tree_hop = ring_hop * c.network_tree_hop_seconds / c.network_hop_seconds
        measured = c.measured(op, math.ceil(ranks / nodes))
        launch = max(c.inside[op][measured].latency_seconds - rounds * (measured - 1) * c.hop_seconds, 0.0)
        hop = c.hop_seconds * (_HOP_FACTOR_ACROSS if nodes > 1 else 1)
        if op == "all_to_all" and nodes > 1:  # all peers at once: only one message's way across
            return launch + (ranks - 2) * hop + ring_hop + longer
        steps = rounds * ((ranks - nodes) * hop + (nodes - 1) * ring_hop if nodes > 1 else (ranks - 1) * hop)
        if op == "all_reduce" and nodes > 1:
            steps = min(steps, 2 * ((ranks / nodes - 1) * hop + math.ceil(math.log2(nodes)) * tree_hop))
        return launch + steps + longer


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
