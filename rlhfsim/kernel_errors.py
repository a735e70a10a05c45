"""Tables of measured kernels against the curves of a GPU: errors by operator, and of the sums that a layer feels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .cluster import ClusterTopology
from .costs.kernels import (
    Kernels,
    Rates,
    attention_decode_time,
    attention_prefill_time,
    bus_factor,
    gemm_time,
    memory_time,
)
from .costs.segment import Op, Transfer, transfer_seconds
from .errors import InputError
from .measurements import TEXTS, Tables, joined
from .sim.links import lone_rate
from .simulate import collectives_of, kernels_of
from .spec.hardware import Cluster, Gpu, Precision

if TYPE_CHECKING:
    import pandas as pd

# Largest mean error of an operator that passes: the same 864 products, measured in two campaigns on the same GPU,
# differ by 9.9 % (A100) and 12.9 % (H100) on average (microsoft/vidur 2024 against aiconfigurator-core 0.12.0), and
# memory-bound kernels and collectives of one campaign by as much between neighbours.
TOLERANCE = 0.2

# What a kernel may reach of the datasheet's rate before its time is taken for an error: clocks boost, caches hold part
# of what a small kernel moves, and NVLink switches reduce.
MOST_OF_PEAK, MOST_OF_BANDWIDTH, MOST_OF_LINK = 1.1, 1.5, 1.6
LARGE_BYTES = 256e6  # no cache holds that
LEAST_OF_PEAK = 0.01  # that the best large product of any table reaches
WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class OperatorError:
    """Errors of one operator, |predicted / measured - 1| over rows. measured: whether the curve was fitted on this GPU.

    weighted_error: sum of |error| over sum of time. worst_at: line of the file, 0: it has none.
    """

    file: str
    gpu: str
    operator: str
    rows: int
    mean_error: float
    median_error: float
    weighted_error: float
    bias: float
    worst_error: float
    worst_at: int
    tolerance: float
    measured: bool

    @property
    def ok(self) -> bool:
        return self.mean_error <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def operator_errors(found: Tables, cluster: Cluster, tolerance: float = TOLERANCE) -> list[OperatorError]:
    """Errors of every operator of the file, then of the sums over rows of one step.

    Raises InputError where a time cannot be this GPU's.
    """
    gpu, kernels = cluster.gpu, kernels_of(cluster.gpu.kernels)
    check_plausible(found, gpu)
    parts = [frame.assign(predicted=predicted(name, frame, found, cluster)) for name, frame in found.tables.items()]
    measured = _measured(kernels, found)
    errors = [
        _errors(found, gpu, _label(name, key), own, tolerance, measured[name])
        for name, frame in zip(found.tables, parts, strict=True)
        for key, own in frame.groupby(_grouping(name), sort=False)
    ]
    return errors + [_errors(found, gpu, label, own, tolerance, all(measured.values())) for label, own in _sums(parts)]


def predicted(name: str, rows: pd.DataFrame, found: Tables, cluster: Cluster) -> np.ndarray:
    """Seconds of the rows of one table by the curves of the cluster's GPU."""
    gpu, kernels = cluster.gpu, kernels_of(cluster.gpu.kernels)
    if name == "collectives":
        return _collective_seconds(rows, cluster)
    rates, width = rates_of(gpu, found.precision), float(WIDTH[found.precision])

    def columns(*names: str) -> list[Any]:
        return [rows[column].to_numpy(dtype=float) for column in names]

    if name in ("gemm", "weight_gradient"):
        curve = kernels.gemm_curve(found.precision)
        time = gemm_time(
            curve, rates, *columns("m", "n", "k"), input_bytes=width, output_bytes=max(2.0, width),
            weight_gradient=name == "weight_gradient",
        )  # fmt: skip
    elif name in ("prefill", "prefill_backward"):
        shape = columns("batch", "heads", "kv_heads", "tokens", "head_dim")
        time = attention_prefill_time(
            kernels.prefill, rates, *shape, backward=name == "prefill_backward", element_bytes=width
        )
    elif name == "decode":
        batch, kv_heads, tokens, head_dim = columns("batch", "kv_heads", "tokens", "head_dim")
        time = attention_decode_time(kernels.decode, rates, batch, kv_heads, batch * tokens, head_dim, kv_bytes=width)
    else:
        seconds = np.zeros(len(rows))
        for kernel, at in rows.groupby("kernel").indices.items():
            moved = rows["bytes"].to_numpy(dtype=float)[at]
            seconds[at] = memory_time(kernels.memory[cast(Any, kernel)], rates, moved).seconds
        return seconds
    return np.asarray(time.seconds, dtype=float)


def rates_of(gpu: Gpu, precision: str) -> Rates:
    """Raises InputError where the GPU has no such peak."""
    peak = gpu.flops_per_second.get(cast(Precision, precision))
    if peak is None:
        known = ", ".join(sorted(gpu.flops_per_second))
        raise InputError(f"{gpu.name} has no peak for {precision!r} (it has: {known})", field="precision")
    return Rates(peak.value, gpu.memory_bytes_per_second.value, int(gpu.multiprocessors.value))


def _collective_seconds(rows: pd.DataFrame, cluster: Cluster) -> np.ndarray:
    seconds = np.zeros(len(rows))
    for (op, ranks, nodes), at in rows.groupby(["collective", "ranks", "nodes"]).indices.items():
        payload = rows["bytes"].to_numpy(dtype=float)[at]
        seconds[at] = collective_seconds_on(cluster, op, int(ranks), int(nodes), payload)
    return seconds


def collective_seconds_on(cluster: Cluster, op: str, ranks: int, nodes: int, payload_bytes: np.ndarray) -> np.ndarray:
    """Of one collective alone on the cluster's links, with equally many ranks on each of so many nodes."""
    per_node = -(-ranks // nodes)
    node = cluster.node.model_copy(update={"gpus_per_node": max(per_node, cluster.node.gpus_per_node)})
    wide = cluster.model_copy(update={"nodes": nodes, "node": node})
    topology = ClusterTopology(wide, collectives_of(wide))
    group = tuple(n * node.gpus_per_node + i for n in range(nodes) for i in range(per_node))[:ranks]
    transfer = Transfer(cast(Op, op), (group,), payload_bytes)
    route = topology.route(transfer.op, transfer.groups)
    return transfer_seconds(transfer, route, lone_rate(route.usage, topology.capacities))


# --- errors ----------------------------------------------------------------------------------------------------------


def _grouping(name: str) -> list[str]:
    return ["op", "ranks", "nodes"] if name == "collectives" else ["op"]


def _label(name: str, key: tuple[Any, ...]) -> str:
    if name == "collectives":
        return f"{key[0]}, {int(key[1])} ranks, {int(key[2])} node{'s' if key[2] > 1 else ''}"
    return str(key[0])


def _sums(parts: list[pd.DataFrame]) -> Iterator[tuple[str, pd.DataFrame]]:
    """All products of a step, and all its operators, one row for each step of the file."""
    products = [p[p.step >= 0] for p in parts if "m" in p]
    everything = [p[p.step >= 0] for p in parts]
    for label, chosen in (("sum of a layer's products", products), ("sum of all operators", everything)):
        rows = joined(chosen) if any(map(len, chosen)) else None
        if rows is not None and rows.op.nunique() > 1:
            yield (
                label,
                rows.groupby("step", as_index=False)[["seconds", "predicted", "line"]].agg(
                    {"seconds": "sum", "predicted": "sum", "line": "first"}
                ),
            )


def _errors(
    found: Tables, gpu: Gpu, operator: str, rows: pd.DataFrame, tolerance: float, measured: bool
) -> OperatorError:
    predicted, seconds = rows.predicted.to_numpy(), rows.seconds.to_numpy()
    relative = predicted / seconds - 1
    worst = int(np.abs(relative).argmax())
    return OperatorError(
        file=found.path.name,
        gpu=gpu.name,
        operator=operator,
        rows=len(rows),
        mean_error=float(np.abs(relative).mean()),
        median_error=float(np.median(np.abs(relative))),
        weighted_error=float(np.abs(predicted - seconds).sum() / seconds.sum()),
        bias=float(predicted.sum() / seconds.sum() - 1),
        worst_error=float(relative[worst]),
        worst_at=int(rows.line.iloc[worst]),
        tolerance=tolerance,
        measured=measured,
    )


def _measured(kernels: Kernels, found: Tables) -> dict[str, bool]:
    """By table: whether the curves of all its rows were fitted on this architecture, and not copied from another."""
    fits = kernels.fits()
    products = "gemm.fp8" if found.precision == "fp8" and "fp8" in kernels.gemm else "gemm.bf16"
    curves = {
        "gemm": products,
        "weight_gradient": f"{products}.weight_gradient",
        "prefill_backward": "prefill.backward",
    }

    def of(name: str, rows: pd.DataFrame) -> bool:
        kinds = rows["kernel" if name == "memory" else "collective"].unique() if name in TEXTS else [None]
        starts = [f"{name}.{kind}" if kind else curves.get(name, name) for kind in kinds]
        return all(
            fit.measured
            for key, fit in fits.items()
            for start in starts
            if key == start or (name in TEXTS and key.startswith(f"{start}."))
        )

    return {name: of(name, rows) for name, rows in found.tables.items()}


# --- what cannot be --------------------------------------------------------------------------------------------------


def check_plausible(found: Tables, gpu: Gpu) -> None:
    """Raises InputError where times are shorter than the GPU's datasheet allows, or all of them absurdly long: the
    wrong unit, the wrong GPU, or a damaged row."""
    rates = rates_of(gpu, found.precision)
    link = (gpu.nvlink_bytes_per_second or gpu.pcie_bytes_per_second).value
    for name, rows in found.tables.items():
        if name in ("gemm", "weight_gradient"):
            work, rate, most, what = 2 * rows.m * rows.n * rows.k, rates.flops_per_second, MOST_OF_PEAK, "FLOP/s"
        elif name == "memory":
            rows = rows[rows["bytes"] >= LARGE_BYTES]
            work, rate, most, what = rows["bytes"], rates.memory_bytes_per_second, MOST_OF_BANDWIDTH, "bytes/s"
        elif name == "collectives":
            rows = rows[rows.nodes == 1]
            factor = [bus_factor(op, int(n)) for op, n in zip(rows.collective, rows.ranks, strict=True)]
            work, rate, most, what = rows["bytes"] * np.array(factor), link, MOST_OF_LINK, "bytes/s on its links"
        else:
            continue
        share = (work / rows.seconds / rate).to_numpy(dtype=float)
        if not len(share):
            continue
        at = int(share.argmax())
        row = rows.iloc[at]
        where = f"{found.path}:{row.line}" if row.line else str(found.path)
        if share[at] > most:
            raise InputError(
                f"is {row.seconds:.4g} s, {share[at]:.3g} times as fast as the {rate:.4g} {what} of {gpu.name} allow: "
                "another unit of time, another GPU, or a damaged row",
                field=str(row.op),
                where=where,
            )
        if name == "gemm" and share[at] < LEAST_OF_PEAK and float(work.max()) > 1e12:
            raise InputError(
                f"is {row.seconds:.4g} s, {share[at]:.2g} of the peak of {gpu.name}, and no other row is faster: "
                "another unit of time (microseconds, read as milliseconds?), or another GPU",
                field=str(row.op),
                where=where,
            )
