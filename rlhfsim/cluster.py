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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .costs.segment import Op, Route
from .errors import InputError

if TYPE_CHECKING:
    import networkx as nx

    from .spec.hardware import Cluster
    from .spec.scenario import Effects

Groups = tuple[tuple[int, ...], ...]


class Curve(NamedTuple):
    """Seconds of a call = (latency^p + (bytes/rate)^p)^(1/p), p = exponent.

    efficiency: bus bandwidth (in the convention of nccl-tests) over one direction of the port's nominal rate. It may
    exceed 1 where the switch reduces (NVLink SHARP moves the payload once, the convention counts it almost twice).
    """

    latency_seconds: float
    efficiency: float
    exponent: float


@dataclass(frozen=True)
class Collectives:
    """What collectives reach on a machine.

    inside: per operation, in one node, latency as measured with `measured_ranks` ranks (2 for send).
    hop_seconds: one more rank of the same node; network_hop_seconds (ring) and network_tree_hop_seconds: one more node.
    network_efficiency: of the NICs' nominal rate; pcie_efficiency: of a PCIe slot's.
    two_node_tree_efficiency: rate of the tree all-reduce relative to the ring, where it is used for large messages. It
        matters between exactly two nodes, where it sends the payload once and the ring almost twice.

    Hops are the LL protocol's of NCCL's own model: src/graph/tuning.cc, commit 01afd20, table hwLat. network_exponent
    0.7: unverified, mimics that model's change from LL to LL128 to Simple as messages grow.
    network_efficiency: 46-48 of 50 GB/s (NDR, maintainer, NVIDIA/nccl-tests issue 290, 2025-03-03), 24 of 25 (HDR,
    maintainer, NVIDIA/nccl issue 412, 2023-04-24); all_to_all and send across nodes: unverified, taken as equal.
    pcie_efficiency: 25.1 of 32 GB/s (A100, host to device, NVIDIA/nvbandwidth issue 42, 2025-07-05), 52.8 of 64 (H100,
    device to host, issue 24, 2024-09-11), 26.3 of 32 between GPUs (A6000, issue 50, 2025-11-03).
    """

    inside: dict[Op, Curve]
    measured_ranks: int = 8
    hop_seconds: float = 0.47e-6
    network_hop_seconds: float = 2.7e-6
    network_tree_hop_seconds: float = 5.0e-6
    network_efficiency: float = 0.94
    network_exponent: float = 0.7
    pcie_efficiency: float = 0.8
    two_node_tree_efficiency: float | None = None


COPY = Curve(10e-6, 1.0, 1.0)  # latency of a pinned copy: unverified; its rate is pcie_efficiency

# A100, 8 ranks. all_reduce: p-norm fitted to the NCCL table of aiconfigurator-core 0.12.0: 22 us, 130 GB/s of payload
# (227 GB/s bus bandwidth) of 300, p 0.6. send: 14 us, 297 GB/s, Vidur's A100 profile of send/recv. The others: unverified,
# taken as equal to all_reduce. No tree: two nodes with 4 HDR NICs give 86-96 GB/s (NVIDIA/nccl issue 1048, 2023-11-01),
# as the ring does.
_A100 = Curve(22e-6, 227 / 300, 0.6)
AMPERE = Collectives(inside={
    "all_reduce": _A100, "all_gather": _A100, "reduce_scatter": _A100, "all_to_all": _A100, "broadcast": _A100,
    "send": Curve(14e-6, 297 / 300, 1.0), "to_host": COPY, "from_host": COPY})

# H100, 8 ranks, same table: all_reduce 15 us, 283 GB/s of payload (495 bus) of 450, p 0.6; all_gather at most 335 of 450.
# send: 380 of 450 (NVIDIA/nccl issue 1264, 2024-04-24), latency unverified. The others: unverified, as all_gather.
# Tree 0.92 of ring: unverified; two nodes of 8 NDR NICs give about 470 GB/s (NVIDIA/nccl issue 2409, 2026-09-14).
_H100 = Curve(15e-6, 335 / 450, 0.6)
HOPPER = Collectives(inside={
    "all_reduce": Curve(15e-6, 495 / 450, 0.6), "all_gather": _H100, "reduce_scatter": _H100, "all_to_all": _H100,
    "broadcast": _H100, "send": Curve(10e-6, 380 / 450, 1.0), "to_host": COPY, "from_host": COPY},
    two_node_tree_efficiency=0.92)

# GPUs without NVLink; hop as above, PCI row of the same table. Rate as a copy between two GPUs; latency, p: unverified.
_PCIE = Curve(22e-6, 0.8, 0.6)
PCIE = Collectives(inside={
    "all_reduce": _PCIE, "all_gather": _PCIE, "reduce_scatter": _PCIE, "all_to_all": _PCIE, "broadcast": _PCIE,
    "send": Curve(14e-6, 0.8, 1.0), "to_host": COPY, "from_host": COPY}, hop_seconds=1.0e-6)

# NCCL's model multiplies the LL hop inside a node by this when the group spans nodes (same file as above).
_HOP_FACTOR_ACROSS = 1.8


def default_collectives(cluster: Cluster) -> Collectives:
    """The set measured on the most similar machine; replace parts with `dataclasses.replace`."""
    if cluster.node.gpu_link == "pcie":
        return PCIE
    return HOPPER if cluster.gpu.architecture.lower() in ("hopper", "blackwell") else AMPERE


class ClusterTopology:
    """Links of a cluster. Rank r is GPU r % gpus_per_node of node r // gpus_per_node.

    capacities: nominal bytes/s of every link, one direction each ("gpu3 nvlink out", "node0 nic1 in", "leaf0 up");
    only host memory has a single one for both directions. warnings: what a user should know about the placement.
    """

    def __init__(self, cluster: Cluster, collectives: Collectives | None = None, effects: Effects | None = None) -> None:
        self.cluster = cluster
        self.collectives = collectives or default_collectives(cluster)
        self.free = effects is not None and not effects.links
        self.warnings: list[str] = []
        self._routes: dict[tuple[Op, Groups], Route] = {}

        node, network = cluster.node, cluster.network
        self._nvlink = node.gpu_link != "pcie"
        if self._nvlink and cluster.gpu.nvlink_bytes_per_second is None:
            raise InputError(f"is {node.gpu_link!r}, but GPU {cluster.gpu.name!r} has no nvlink_bytes_per_second; "
                             "allowed for it: 'pcie'", field="node.gpu_link")
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

    def expect_one_node(self, what: str, ranks: Sequence[int]) -> None:
        """Warn when ranks that talk at every layer (a tensor-parallel group) do not share a node."""
        if self.crosses_nodes(ranks):
            text = (f"{what}: ranks {min(ranks)}..{max(ranks)} are on {len({self.node_of(r) for r in ranks})} nodes "
                    f"of {self.cluster.node.gpus_per_node} GPUs; their traffic goes through the NICs")
            if text not in self.warnings:
                self.warnings.append(text)

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
                for i in np.flatnonzero(self._nic_share[local]):
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
        copy = op in ("to_host", "from_host")
        talking = [g for g in groups if copy or len(g) > 1]
        if self.free or not talking:
            return Route({}, 0.0, 1.0)
        ranks = np.concatenate([np.asarray(g, dtype=np.int64) for g in talking])
        sizes = np.array([len(g) for g in talking])
        assert ranks.min() >= 0 and ranks.max() < self.cluster.gpus, "rank outside the cluster"
        members = _Members(ranks, np.repeat(np.arange(len(sizes)), sizes), sizes)
        if copy:
            usage = self._copy_usage(op, ranks)
            return Route(self._named(usage), self.collectives.inside[op].latency_seconds,
                         self.collectives.inside[op].exponent)
        usage, nodes = self._usage(op, members)
        latency = max(self._latency(op, n, k) for n, k in set(zip(sizes.tolist(), nodes.tolist(), strict=True)))
        exponent = self.collectives.network_exponent if nodes.max() > 1 else self.collectives.inside[op].exponent
        return Route(self._named(usage), latency, exponent)

    def _named(self, usage: np.ndarray) -> dict[str, float]:
        used = np.flatnonzero(usage)
        return dict(zip([self._names[i] for i in used], usage[used].tolist(), strict=True))

    def _sum(self, unit_of_rank: np.ndarray, units: int, values: np.ndarray) -> np.ndarray:
        return np.bincount(unit_of_rank, weights=values, minlength=units)

    def _units(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """PCIe switch, node and leaf of each rank."""
        per_node = self.cluster.node.gpus_per_node
        node = ranks // per_node
        switch = node * self._switches + ranks % per_node // self.cluster.node.pcie_gpus_per_switch
        return switch, node, node // (self.cluster.network.nodes_per_leaf or self.cluster.nodes)

    def _copy_usage(self, op: Op, ranks: np.ndarray) -> np.ndarray:
        """GPU to or from host memory: its slot, the uplink it shares, and the memory."""
        c = self.cluster
        switch, node, _ = self._units(ranks)
        load = np.full(len(ranks), 1 / self.collectives.pcie_efficiency)
        out, none = (load, 0 * load) if op == "to_host" else (0 * load, load)
        return self._assemble(ranks, inside=(0 * load, 0 * load), pcie=(out, none), switch=(out, none),
                              memory=self._sum(node, c.nodes, np.ones(len(ranks))), network=(0 * load, 0 * load),
                              leaf=(0 * load, 0 * load))

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
        alone = on_node.members == 1
        inside = tuple(np.where(alone, 0.0, np.maximum(r - n, 0)) for r, n in zip(by_rank, by_node, strict=True))
        crossing = (np.zeros(len(ranks)),) * 2
        if self._switched and not self._nvlink:
            by_switch = _traffic(op, members, members.level(switch))
            crossing = tuple(np.maximum(s - n, 0) for s, n in zip(by_switch, by_node, strict=True))
        if c.node.gpu_link == "nvlink_mesh":
            # Without a switch only the cables to the group's own members help; cables taken as evenly spread over the
            # node's other GPUs (exact for four fully connected GPUs, unverified for a cube mesh).
            cables = (c.node.gpus_per_node - 1) / np.maximum(on_node.members - 1, 1)
            inside = tuple(x * cables for x in inside)
        port = curves.inside[op].efficiency
        pcie = tuple(n / curves.pcie_efficiency + (0 if self._nvlink else i / port)
                     for n, i in zip(by_node, inside, strict=True))
        usage = self._assemble(
            ranks, inside=tuple(x / port for x in inside), pcie=pcie, switch=tuple(x / port for x in crossing),
            memory=np.zeros(c.nodes), network=tuple(x / self._network_efficiency for x in by_node),
            leaf=tuple(x / self._network_efficiency for x in by_leaf))
        return usage, on_node.units_of_group

    def _assemble(self, ranks: np.ndarray, *, inside: tuple, pcie: tuple, switch: tuple, memory: np.ndarray,
                  network: tuple, leaf: tuple) -> np.ndarray:
        """Per-member (out, in) loads summed up on the links, in the order of `_links`."""
        c = self.cluster
        switch_of, _, leaf_of = self._units(ranks)
        blocks = [self._sum(ranks, c.gpus, x) for x in inside] if self._nvlink else []
        blocks += [self._sum(ranks, c.gpus, x) for x in pcie]
        if self._switched:
            blocks += [self._sum(switch_of, c.nodes * self._switches, x) for x in switch]
        blocks += [memory]
        by_gpu = (self._sum(ranks, c.gpus, x).reshape(c.nodes, -1) for x in network)
        blocks += [(x @ self._nic_share).ravel() for x in by_gpu]
        if self._leaves:
            blocks += [self._sum(leaf_of, self._leaves, x) for x in leaf]
        return np.concatenate(blocks)

    def _latency(self, op: Op, ranks: int, nodes: int) -> float:
        """Seconds of one call of no bytes: what launching takes, and the hops of NCCL's model (ring or tree).

        Source of the step counts: ncclTopoTuneModel in src/graph/tuning.cc, commit 01afd20.
        """
        m, given = self.collectives, self.cluster.network.latency_seconds
        ring_hop = given.value if given else m.network_hop_seconds
        tree_hop = given.value if given else m.network_tree_hop_seconds
        rounds = 2 if op == "all_reduce" else 1
        measured = 2 if op == "send" else m.measured_ranks
        launch = max(m.inside[op].latency_seconds - rounds * (measured - 1) * m.hop_seconds, 0.0)
        hop = m.hop_seconds * (_HOP_FACTOR_ACROSS if nodes > 1 else 1)
        steps = rounds * ((ranks - nodes) * hop + (nodes - 1) * ring_hop)
        if op == "all_to_all" and nodes > 1:  # all peers at once: only one message's way across
            steps = (ranks - 2) * hop + ring_hop
        if op == "all_reduce":
            steps = min(steps, 2 * ((ranks / nodes - 1) * hop + math.ceil(math.log2(nodes)) * tree_hop))
        return launch + steps


class _Level(NamedTuple):
    """Of each member: how many members share its unit, how many units its group has, whether the root is in its unit."""

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
        return self.sizes[self.group]

    def level(self, unit: np.ndarray) -> _Level:
        width = int(unit.max()) + 1
        keys, inverse, counts = np.unique(self.group * width + unit, return_inverse=True, return_counts=True)
        units_of_group = np.bincount(keys // width, minlength=len(self.sizes))
        root = unit == unit[self.first][self.group]
        return _Level(counts[inverse], units_of_group[self.group], root, units_of_group)


def _traffic(op: Op, members: _Members, level: _Level, tree: float | None = None,
             nodes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes per payload byte that leave and enter a unit, spread evenly over the group's members in it.

    Rings: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005). A broadcast
    is a pipelined chain whose order differs between channels, so that every unit but the root's is last equally often.
    """
    n, inside, units = members.size, level.members, level.units
    outside = units > 1
    if op in ("all_gather", "reduce_scatter"):
        out = into = (n - 1) / n
    elif op == "all_reduce":
        out = 2 * (n - 1) / n
        if tree is not None and nodes is not None:
            out = np.where(nodes == 2, np.minimum(out, 1 / tree), out)
        into = out
    elif op == "all_to_all":
        out = into = inside * (n - inside) / (n - 1)
    else:
        assert op in ("broadcast", "send"), op
        out = np.where(level.root, 1.0, (units - 2) / np.maximum(units - 1, 1))
        into = np.where(level.root, 0.0, 1.0)
    return outside * out / inside, outside * into / inside


def _nic_share(gpus: int, nics: int) -> np.ndarray:
    """(gpus, nics): how a GPU's network traffic is split over the NICs nearest to it; rows sum to 1."""
    share = np.zeros((gpus, nics))
    for gpu in range(gpus):
        first, last = gpu * nics // gpus, (gpu + 1) * nics // gpus
        share[gpu, first:max(last, first + 1)] = 1 / max(last - first, 1)
    return share
