"""The shipped hardware files: they load, name each other rightly, and agree with independent physics.

Clock rates, core counts, bus widths and link counts below come from the white papers and device queries that the
files cite; the tests recompute rates from them, so a slip in a file (a factor of two, GB for GiB, both directions
for one, sparse for dense) cannot pass.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from rlhfsim.spec.base import Sourced
from rlhfsim.spec.hardware import Cluster, Gpu, Node

ROOT = Path(__file__).resolve().parents[1] / "hw_specs"
KINDS = ("gpus", "nodes", "clusters")
FILES = sorted(path for kind in KINDS for path in (ROOT / kind).glob("*.yaml"))

PROMISED_GPUS = {
    "v100-32g-sxm", "v100-32g-pcie", "a100-40g-sxm", "a100-40g-pcie", "a100-80g-sxm", "a100-80g-pcie",
    "a800-80g-sxm", "h100-80g-sxm", "h100-80g-pcie", "h800-80g-sxm", "h20-96g", "h200-141g-sxm", "b200-180g-sxm",
    "l20-48g", "l40s-48g", "rtx-4090-24g", "gb200-186g", "gb300-288g", "mi300x-192g", "ascend-910b-64g",
    "ascend-910c-128g",
}  # fmt: skip


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / kind).glob("*.yaml"))


@cache
def read(path: Path) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    return yaml.load(path.read_text(encoding="utf-8"))


def gpu(name: str) -> Gpu:
    return Gpu.model_validate(read(ROOT / "gpus" / f"{name}.yaml"))


def node(name: str) -> Node:
    return Node.model_validate(read(ROOT / "nodes" / f"{name}.yaml"))


def cluster(name: str) -> Cluster:
    data = dict(read(ROOT / "clusters" / f"{name}.yaml"))
    data["node"] = node(data["node"])
    data["gpu"] = gpu(data["node"].gpu)
    return Cluster.model_validate(data)


def quantities(path: Path) -> dict[str, Sourced]:
    record = {"gpus": gpu, "nodes": node, "clusters": cluster}[path.parent.name](path.stem)
    return record.network.quantities() if isinstance(record, Cluster) else record.quantities()


# --- files and names ---------------------------------------------------------------------------------------------


def test_promised_gpus_are_complete() -> None:
    assert set(names("gpus")) == PROMISED_GPUS


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_loads_and_is_named_after_its_file(path: Path) -> None:
    assert read(path)["name"] == path.stem
    assert quantities(path)


def test_every_gpu_has_a_node_and_every_node_a_cluster() -> None:
    used_gpus = {node(name).gpu for name in names("nodes")}
    used_nodes = {read(ROOT / "clusters" / f"{name}.yaml")["node"] for name in names("clusters")}
    assert used_gpus == set(names("gpus"))
    assert used_nodes == set(names("nodes"))
    assert set(names("gpus")) <= set(names("clusters"))  # the GPU's name alone picks a cluster


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_number_has_a_source_and_every_source_a_number(path: Path) -> None:
    data = read(path)
    documents = (data["network"] if path.parent.name == "clusters" else data)["sources"]
    cited = {q.source for q in quantities(path).values() if q.verified}
    assert cited == set(documents)
    for key, text in documents.items():
        assert len(text) > 40, key
        assert re.search(r"https://|opened \d{4}-\d\d-\d\d|as in \w+|as H100", text), key


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_numbers_are_numbers_for_every_yaml_reader(path: Path) -> None:
    """YAML 1.1 takes 1e12 and 1.0e12 for text: it wants a dot and a signed exponent."""
    for text in re.findall(r"value: *([^,}]+)", path.read_text(encoding="utf-8")):
        assert re.fullmatch(r"[0-9]+|[0-9]+\.[0-9]+e[+-][0-9]+", text.strip()), text


# --- arithmetic --------------------------------------------------------------------------------------------------

# (multiprocessors, FP32 lanes a multiprocessor, maximal or boost clock in Hz)
FP32_CORES = {
    "v100-32g-sxm": (80, 64, 1.53e9),
    "v100-32g-pcie": (80, 64, 1.38e9),
    "a100-40g-sxm": (108, 64, 1.41e9),
    "a100-40g-pcie": (108, 64, 1.41e9),
    "a100-80g-sxm": (108, 64, 1.41e9),
    "a100-80g-pcie": (108, 64, 1.41e9),
    "a800-80g-sxm": (108, 64, 1.41e9),
    "h100-80g-sxm": (132, 128, 1.98e9),
    "h100-80g-pcie": (114, 128, 1.755e9),
    "h800-80g-sxm": (132, 128, 1.98e9),
    "h200-141g-sxm": (132, 128, 1.98e9),
    "b200-180g-sxm": (148, 128, 1.965e9),
    "l20-48g": (92, 128, 2.52e9),
    "l40s-48g": (142, 128, 2.52e9),
    "rtx-4090-24g": (128, 128, 2.52e9),
}


@pytest.mark.parametrize("name", FP32_CORES)
def test_fp32_peak_is_lanes_times_clock(name: str) -> None:
    multiprocessors, lanes, clock = FP32_CORES[name]
    assert gpu(name).multiprocessors.value == multiprocessors
    assert gpu(name).flops_per_second["fp32"].value == pytest.approx(multiprocessors * lanes * 2 * clock, rel=0.012)


# Dense FP16 flops a multiprocessor and cycle, with FP32 accumulation: tensor cores x fused multiply-adds x 2.
TENSOR_FLOPS_PER_CYCLE = {"volta": 8 * 64 * 2, "ampere": 4 * 256 * 2, "hopper": 4 * 512 * 2, "blackwell": 4 * 1024 * 2}
ADA_TENSOR_FLOPS_PER_CYCLE = {"l20-48g": 512, "rtx-4090-24g": 512, "l40s-48g": 1024}  # GeForce and L20: half rate


@pytest.mark.parametrize("name", FP32_CORES)
def test_fp16_peak_is_tensor_cores_times_clock(name: str) -> None:
    """Equality where the data sheet uses the boost clock; Hopper and Blackwell are rated at a lower one."""
    g, (multiprocessors, _, clock) = gpu(name), FP32_CORES[name]
    per_cycle = ADA_TENSOR_FLOPS_PER_CYCLE.get(name) or TENSOR_FLOPS_PER_CYCLE[g.architecture]
    bound = multiprocessors * per_cycle * clock
    if g.architecture in ("hopper", "blackwell"):
        assert 0.9 * bound < g.flops_per_second["fp16"].value < bound
    else:
        assert g.flops_per_second["fp16"].value == pytest.approx(bound, rel=0.015)


def test_h20_is_capped_far_below_its_silicon() -> None:
    h20 = gpu("h20-96g")
    assert h20.flops_per_second["bf16"].value < 0.25 * h20.multiprocessors.value * 4096 * 1.98e9


# (bus width in bits, memory clock in Hz, tolerance): double data rate, so bits / 8 x clock x 2
MEMORY_BUS = {
    "v100-32g-sxm": (4096, 877.5e6, 0.005),
    "v100-32g-pcie": (4096, 877.5e6, 0.005),
    "a100-40g-sxm": (5120, 1215e6, 0.001),
    "a100-40g-pcie": (5120, 1215e6, 0.001),
    "a100-80g-sxm": (5120, 1593e6, 0.001),
    "a100-80g-pcie": (5120, 1512e6, 0.001),
    "a800-80g-sxm": (5120, 1593e6, 0.001),
    "h100-80g-sxm": (5120, 2619e6, 0.001),
    "h800-80g-sxm": (5120, 2619e6, 0.001),
    "h20-96g": (6144, 2619e6, 0.01),
    "h200-141g-sxm": (6144, 3201e6, 0.03),
    "b200-180g-sxm": (7680, 3996e6, 0.001),
    "l20-48g": (384, 9001e6, 0.001),
    "l40s-48g": (384, 9001e6, 0.001),
    "rtx-4090-24g": (384, 10501e6, 0.001),
}


@pytest.mark.parametrize("name", MEMORY_BUS)
def test_memory_bandwidth_is_bus_width_times_data_rate(name: str) -> None:
    bits, clock, tolerance = MEMORY_BUS[name]
    assert gpu(name).memory_bytes_per_second.value == pytest.approx(bits / 8 * clock * 2, rel=tolerance)


# (links, bytes per second of one link in one direction)
NVLINKS = {
    "v100-32g-sxm": (6, 25e9),
    "a100-40g-sxm": (12, 25e9),
    "a100-80g-sxm": (12, 25e9),
    "a800-80g-sxm": (8, 25e9),
    "h100-80g-sxm": (18, 25e9),
    "h800-80g-sxm": (8, 25e9),
    "h20-96g": (18, 25e9),
    "h200-141g-sxm": (18, 25e9),
    "b200-180g-sxm": (18, 50e9),
    "gb200-186g": (18, 50e9),
    "gb300-288g": (18, 50e9),
    "mi300x-192g": (7, 64e9),
    "ascend-910b-64g": (7, 28e9),
    "ascend-910c-128g": (7, 28e9),
}


@pytest.mark.parametrize("name", sorted(PROMISED_GPUS))
def test_nvlink_is_links_times_rate_of_one_direction(name: str) -> None:
    port = gpu(name).nvlink_bytes_per_second
    if name in NVLINKS:
        links, rate = NVLINKS[name]
        assert port is not None and port.value == pytest.approx(links * rate, rel=1e-9)
    else:
        assert port is None


PCIE_GENERATION = {"volta": 3, "ampere": 4, "ada": 4, "hopper": 5, "blackwell": 5, "cdna3": 5, "ascend": 5}
CHIP_TO_CHIP = 450e9  # NVLink-C2C between Grace and its two GPUs, one direction


@pytest.mark.parametrize("name", sorted(PROMISED_GPUS))
def test_pcie_is_sixteen_lanes_of_its_generation(name: str) -> None:
    transfers = 8e9 * 2 ** (PCIE_GENERATION[gpu(name).architecture] - 3)
    if name.startswith("gb"):  # no PCIe to the host
        assert gpu(name).pcie_bytes_per_second.value == CHIP_TO_CHIP / 2
        return
    assert gpu(name).pcie_bytes_per_second.value == pytest.approx(16 * transfers * 128 / 130 / 8, rel=0.001)


# What the data sheets print with structured sparsity: exactly twice the dense rate.
SPARSE = {
    ("a100-40g-sxm", "bf16"): 624e12, ("a100-80g-sxm", "bf16"): 624e12, ("a100-80g-sxm", "int8"): 1248e12,
    ("h100-80g-sxm", "bf16"): 1978.9e12, ("h100-80g-sxm", "fp8"): 3958e12,
    ("h100-80g-pcie", "bf16"): 1513e12, ("h100-80g-pcie", "fp8"): 3026e12,
    ("h200-141g-sxm", "fp8"): 3958e12, ("b200-180g-sxm", "bf16"): 4500e12, ("b200-180g-sxm", "fp8"): 9000e12,
    ("l40s-48g", "bf16"): 733e12, ("l40s-48g", "fp8"): 1466e12,
    ("rtx-4090-24g", "bf16"): 330.4e12, ("rtx-4090-24g", "fp8"): 660.6e12, ("rtx-4090-24g", "int8"): 1321.2e12,
}  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), SPARSE)
def test_peaks_are_dense(name: str, precision: Any) -> None:
    dense = gpu(name).flops_per_second[precision].value
    assert dense == pytest.approx(SPARSE[name, precision] / 2, rel=0.015)


@pytest.mark.parametrize("name", sorted(PROMISED_GPUS))
def test_precisions_follow_the_architecture(name: str) -> None:
    g = gpu(name)
    have = set(g.flops_per_second)
    no_fp8 = {"fp32", "fp16", "bf16", "int8"}
    expected = {"volta": {"fp32", "fp16"}, "ampere": no_fp8, "ascend": no_fp8}
    assert have == expected.get(g.architecture, {"fp32", "fp16", "bf16", "fp8", "int8"})
    flops = {precision: q.value for precision, q in g.flops_per_second.items()}
    assert flops["fp32"] < flops["fp16"] == flops.get("bf16", flops["fp16"])
    if "fp8" in flops:
        assert flops["fp8"] == pytest.approx(2 * flops["fp16"], rel=0.015)
    own = {"h200-141g-sxm": "h200", "gb200-186g": "gb200", "gb300-288g": "gb300"}  # measured themselves
    own["rtx-4090-24g"] = "geforce_ada"
    assert g.kernels == own.get(name, g.architecture)


@pytest.mark.parametrize("name", sorted(PROMISED_GPUS))
def test_memory_is_the_size_in_the_name_less_a_little(name: str) -> None:
    """ECC on GDDR6 takes a sixteenth; HBM parts lose under 1 % (GB300 is named by its chips).

    Decimal gigabytes would fail for the 80 GB parts.
    """
    size = re.search(r"-(\d+)g", name)
    assert size is not None
    share = gpu(name).memory_bytes.value / (int(size[1]) * 2**30)
    assert (0.93 if name in ("l20-48g", "l40s-48g", "gb300-288g") else 0.99) < share <= 1.0
    assert gpu(name).memory_bytes.value % 2**20 == 0


# sockets, channels a socket, transfers per second; 8 bytes a transfer
HOST_MEMORY = {
    "v100-32g-sxm-x8": (2, 4, 2133.3e6),
    "v100-32g-sxm-x16": (2, 6, 2666.7e6),
    "v100-32g-pcie-x8": (2, 6, 2666.7e6),
    "a100-40g-sxm-x8": (2, 8, 3200e6),
    "a100-80g-sxm-x8": (2, 8, 3200e6),
    "a100-40g-pcie-x8": (2, 8, 3200e6),
    "a100-80g-pcie-x8": (2, 8, 3200e6),
    "a800-80g-sxm-x8": (2, 8, 3200e6),
    "rtx-4090-24g-x8": (2, 8, 3200e6),
    "h100-80g-sxm-x8": (2, 8, 4400e6),
    "h100-80g-pcie-x8": (2, 8, 4400e6),
    "h200-141g-sxm-x8": (2, 8, 4400e6),
    "h800-80g-sxm-x8": (2, 8, 4400e6),
    "h20-96g-x8": (2, 8, 4400e6),
    "b200-180g-sxm-x8": (2, 8, 4400e6),
    "l20-48g-x8": (2, 8, 4400e6),
    "l40s-48g-x8": (2, 8, 4400e6),
    "gb200-186g-x72": (36, 16, 4000e6),  # LPDDR5X, in channels of 8 bytes
    "gb300-288g-x72": (36, 16, 4000e6),
    "mi300x-192g-x8": (2, 12, 4800e6),
    "ascend-910b-64g-x8": (4, 8, 3200e6),
    "ascend-910c-128g-x384": (192, 8, 3200e6),
}


@pytest.mark.parametrize("name", names("nodes"))
def test_host_bandwidth_is_channels_times_rate(name: str) -> None:
    sockets, channels, transfers = HOST_MEMORY[name]
    n = node(name)
    assert n.host_memory_bytes_per_second.value == pytest.approx(sockets * channels * transfers * 8, rel=0.001)
    module = 480 if n.gpu.startswith("gb") else 256  # of LPDDR5X on each Grace; else whole DIMMs
    assert n.host_memory_bytes.value % (module * 2**30) == 0


@pytest.mark.parametrize("name", names("nodes"))
def test_node_link_fits_its_gpu(name: str) -> None:
    n = node(name)
    assert (gpu(n.gpu).nvlink_bytes_per_second is None) == (n.gpu_link == "pcie")
    assert n.gpus_per_node % n.pcie_gpus_per_switch == 0
    assert name == f"{n.gpu}-x{n.gpus_per_node}"


@pytest.mark.parametrize("name", names("clusters"))
def test_network_is_slower_than_the_node_that_feeds_it(name: str) -> None:
    """NICs sit on the same PCIe as the GPUs, so together they carry no more; and Gbit/s is not GB/s."""
    c = cluster(name)
    nics = c.network.nics_per_node * c.network.nic_bytes_per_second.value
    assert nics <= c.node.gpus_per_node * c.gpu.pcie_bytes_per_second.value
    gigabits = c.network.nic_bytes_per_second.value * 8 / 1e9
    assert any(gigabits == pytest.approx(rate) for rate in (25, 100, 200, 400, 800))
    if c.gpu.nvlink_bytes_per_second:
        assert nics / c.node.gpus_per_node < c.gpu.nvlink_bytes_per_second.value
    assert c.network.latency_seconds is not None and 1e-6 < c.network.latency_seconds.value < 1e-4
    assert c.gpus == c.nodes * c.node.gpus_per_node


def test_an_oversubscribed_network_is_among_the_examples() -> None:
    shared = [c for c in map(cluster, names("clusters")) if c.network.oversubscription > 1]
    assert shared
    for c in shared:  # an oversubscribed leaf matters only if the cluster has more than one
        assert c.network.nodes_per_leaf is not None and c.nodes > c.network.nodes_per_leaf
