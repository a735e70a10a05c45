"""GPUs, nodes and clusters as records. One YAML file each under `hw_specs/`; the file name is the name.

Directions and units: every `*_bytes_per_second` of a link is **one direction**; peaks are **dense** (no sparsity).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..format import three
from .base import Count, Fraction, Record, Sourced
from .overheads import Overheads

# Below these (least, its unit) a number is more likely in the last unit; calibrated CPU machines may have such numbers.
PLAUSIBLE = {
    "network.nic_bytes_per_second": (1e8, "bytes/s", "GB/s"),
    "gpu.nvlink_bytes_per_second": (1e8, "bytes/s", "GB/s"),
    "gpu.pcie_bytes_per_second": (1e8, "bytes/s", "GB/s"),
    "gpu.memory_bytes": (1e9, "bytes", "GB"),
    "gpu.flops_per_second": (1e11, "FLOP/s", "TFLOP/s"),
}

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


class Sources(Record):
    """`sources` maps a short key to a document: title, table, date and where it was found."""

    sources: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sources_exist(self) -> Sources:
        for name, value in self.quantities().items():
            if value.verified and value.source not in self.sources:
                raise ValueError(f"{name}: source {value.source!r} is not among the keys of 'sources'")
        return self

    def quantities(self) -> dict[str, Sourced]:
        """Every sourced number of this record by its dotted name."""
        found: dict[str, Sourced] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Sourced):
                found[name] = value
            elif isinstance(value, dict):
                found.update({f"{name}.{k}": v for k, v in value.items() if isinstance(v, Sourced)})
            elif isinstance(value, Sources):
                found.update({f"{name}.{k}": v for k, v in value.quantities().items()})
        return found


class MeasuredTables(Record):
    """Measured kernels in place of the curves (the extra `rlhfsim[measured]`; see rlhfsim/costs/measured.py).

    framework, version: whose kernels, and of which release: each has tables of its own.
    system: the folder of the tables, where the GPU's name does not say it.
    folder: where the tables are; absent: in the installed package aiconfigurator-core.
    """

    framework: Literal["vllm", "sglang", "trtllm"]
    version: str
    system: str | None = None
    folder: str | None = None


class Gpu(Sources):
    """One accelerator.

    memory_bytes: what the device offers to a process (before context and framework reserve).
    flops_per_second: dense tensor-core peak by precision; `fp32` is what matrix products in fp32 reach
    with the framework's default (TF32 off).
    nvlink_bytes_per_second: all NVLink ports of the GPU together, one direction; absent without NVLink.
    pcie_bytes_per_second: the GPU's own PCIe slot, one direction.
    kernels: efficiency curves, a file of `hw_specs/kernels/` or the path of one.
    measured: tables of measured kernels in place of the curves, for forward products, attention, and collectives in a
        node. framework (`vllm`, `sglang`, `trtllm`) and version say whose. Absent: none.
    overlaps_communication: whether it computes and communicates at the same time; a CPU rank has one stream for both.
    overlaps_launches: whether the host launches kernels ahead of the device; a CPU rank is its own host, and the time
        to launch adds up.
    fitted_on: SHA-256 of the files that a calibration used; they are no predictions of this spec.
    """

    name: str = "custom"
    description: str = ""
    architecture: str
    kernels: str
    measured: MeasuredTables | None = None
    overlaps_communication: bool = True
    overlaps_launches: bool = True
    fitted_on: list[str] = Field(default_factory=list)
    memory_bytes: Sourced
    memory_bytes_per_second: Sourced
    flops_per_second: dict[Precision, Sourced]
    multiprocessors: Sourced
    nvlink_bytes_per_second: Sourced | None = None
    pcie_bytes_per_second: Sourced


class Node(Sources):
    """A server.

    gpu_link: `nvswitch` (any pair at full port speed), `nvlink_mesh` (direct cables, no switch) or `pcie`.
    gpus_per_host: GPUs of one operating system, where NVLink joins several (the trays of a rack); absent: all.
    pcie_gpus_per_switch: GPUs that share one PCIe uplink to the host.
    host_memory_bytes_per_second: what CPU Adam can stream, all sockets together.
    """

    name: str = "custom"
    description: str = ""
    gpu: str
    gpus_per_node: Count
    gpu_link: Literal["nvswitch", "nvlink_mesh", "pcie"]
    gpus_per_host: Count | None = None
    pcie_gpus_per_switch: Count = 1
    host_memory_bytes: Sourced
    host_memory_bytes_per_second: Sourced

    @property
    def host_gpus(self) -> int:
        """GPUs of one operating system."""
        return min(self.gpus_per_host or self.gpus_per_node, self.gpus_per_node)


class Network(Sources):
    """What joins the nodes.

    nic_bytes_per_second: one NIC, one direction. nodes_per_leaf and oversubscription describe a two-level tree:
    below a leaf all NICs at full speed, above it the leaf's uplinks carry 1/oversubscription of that.
    latency_seconds: one small message from GPU to GPU across nodes.
    """

    nics_per_node: Count
    nic_bytes_per_second: Sourced
    nodes_per_leaf: Count | None = None
    oversubscription: float = Field(default=1.0, ge=1.0, le=1000.0)
    latency_seconds: Sourced | None = None
    efficiency: Fraction | None = None


class Interconnect(Sources):
    """What joins the parts of a cluster, where that is less than their own networks.

    bytes_per_second: between one part and all others, one direction, all its nodes together; absent: the NICs of both
        sides are all that limits.
    latency_seconds: one small message from a GPU of one part to one of another; absent: the longer one of the two
        parts' own networks.
    """

    bytes_per_second: Sourced | None = None
    latency_seconds: Sourced | None = None


class Cluster(Record):
    """Nodes of one kind and their network. `node` and `gpu` are filled in by name when a file is loaded.

    overheads: host times measured on these machines; a scenario's own `overheads` go first, value by value.
    parts: clusters of different machines that are one: `parts: [{spec: h100-80g-sxm, nodes: 4}, {spec: h20-96g}]`.
        Ranks and nodes are numbered through the parts in this order, so a strategy's `split` or `ranks` says which
        model is on which part (shares of `split` take ranks in the order in which they are written). An override names
        a part by its number, `cluster.parts.1.nodes=2`. Each part has overheads of its own. Beside `parts` only `name`,
        `description` and `between` are given; `nodes` is then the number of all nodes, and node, gpu and network are
        those of the first part.
    between: what joins the parts.
    """

    name: str = "custom"
    description: str = ""
    parts: list[Cluster] = Field(default_factory=list)
    between: Interconnect | None = None
    node: Node
    gpu: Gpu
    nodes: Count
    network: Network
    overheads: Overheads = Overheads()

    @property
    def all_parts(self) -> list[Cluster]:
        """The parts, each of one kind of machine; a cluster without any is its own only part."""
        return self.parts or [self]

    @property
    def gpus(self) -> int:
        return sum(part.nodes * part.node.gpus_per_node for part in self.all_parts)

    @property
    def part_kinds(self) -> list[int]:
        """Of each part, the number of the first part with the same machines: what takes equal time on both."""
        machines = [(part.gpu, part.node, part.overheads) for part in self.all_parts]
        return [machines.index(machine) for machine in machines]

    @property
    def rank_kinds(self) -> list[int]:
        """The same of each rank."""
        parts = zip(self.part_kinds, self.all_parts, strict=True)
        return [kind for kind, part in parts for _ in range(part.gpus)]

    @property
    def rank_nodes(self) -> list[int]:
        """The node of each rank; nodes are numbered through all parts."""
        sizes = [part.node.gpus_per_node for part in self.all_parts for _ in range(part.nodes)]
        return [node for node, gpus in enumerate(sizes) for _ in range(gpus)]

    @property
    def doubts(self) -> list[str]:
        """Questions about numbers that look as if they were given in another unit."""
        if self.parts:
            return [d for k, part in enumerate(self.parts) for d in part._doubts(f"cluster.parts.{k}")]
        return self._doubts("cluster")

    def _doubts(self, prefix: str) -> list[str]:
        numbers = {f"gpu.{name}": number.value for name, number in self.gpu.quantities().items()}
        numbers["network.nic_bytes_per_second"] = self.network.nic_bytes_per_second.value
        return [
            f"{prefix}.{name} is {three(value)} {unit}: is this in {likely} instead of {unit}?"
            for name, value in numbers.items()
            for field, (least, unit, likely) in PLAUSIBLE.items()
            if name in (field, f"{field}.{name.rpartition('.')[2]}") and value < least
        ]
