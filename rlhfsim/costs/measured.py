"""Kernels as they were measured, in place of the curves: the tables of aiconfigurator-core, read from its files.

The optional extra `rlhfsim[measured]` (pip) brings them: `systems/data/<system>/<family>/<framework>/<version>/
<table>_perf.parquet`, NVIDIA, Apache-2.0, https://pypi.org/project/aiconfigurator-core. Latencies are in milliseconds,
NCCL's `message_size` counts elements of two bytes, a decode step's context is `step` + 1. They hold forward passes of
inference on one node: gradients, the optimizer, streaming kernels, experts and all that crosses nodes keep the curves.

A product or a prefill is its curve times the measured ratio to it, interpolated linearly in the logarithms of the
shape: exact where a shape was measured, the nearest one's ratio beyond the table. Attention in a decode step stays
linear in the cached tokens, as the simulator needs it: of each measured batch a line through its contexts (least
squares of relative errors), and both its coefficients interpolated between batches.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib.metadata import version as version_of
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhfsim.errors import InputError, nearest
from rlhfsim.fitting import measured_collective, split
from rlhfsim.spec.hardware import Gpu

from .kernels import Kernels, KernelTime, Numbers, Rates, attention_prefill_time, gemm_time

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = "aiconfigurator_core"
SYSTEMS = {  # GPU of hw_specs/gpus: folder of the tables
    "a100-80g-sxm": "a100_sxm",
    "a100-80g-pcie": "a100_pcie",
    "h100-80g-sxm": "h100_sxm",
    "h100-80g-pcie": "h100_pcie",
    "h200-141g-sxm": "h200_sxm",
    "b200-180g-sxm": "b200_sxm",
    "gb200-186g": "gb200",
    "gb300-288g": "gb300",
    "l40s-48g": "l40s",
}
DTYPES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8"}
NCCL_OPS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
            "all_to_all": "alltoall"}  # fmt: skip
LEAST_DIMENSION = 16  # of n and k: smaller products are not in any model


class Grid:
    """Values at the points of a grid, linear in the logarithms of its axes; the nearest value outside."""

    def __init__(self, axes: list[np.ndarray], values: np.ndarray) -> None:
        self.axes, self.values = [np.log(axis) for axis in axes], values

    @classmethod
    def of(cls, rows: pd.DataFrame, columns: list[str], value: str) -> Grid:
        """Of rows that fill the grid but for holes; a hole has the value of its neighbours along the first axis, or
        where there are none, along the others."""
        table = rows.pivot_table(index=columns[0], columns=columns[1:], values=value, aggfunc="median")
        axes = [np.sort(rows[c].unique()).astype(float) for c in columns]
        full = table.sort_index()
        if len(columns) > 1:
            full = full.reindex(columns=list(product(*axes[1:])) if len(columns) > 2 else axes[1])
        full = full.interpolate(limit_direction="both")
        values = full.to_numpy(dtype=float).reshape([len(axis) for axis in axes])
        for axis in range(1, values.ndim):
            values = _filled(values, axis)
        return cls(axes, values)

    def at(self, *where: Numbers) -> np.ndarray:
        points = np.broadcast_arrays(*(np.log(np.maximum(np.asarray(x, dtype=float), 1e-9)) for x in where))
        places = [self._place(axis, x) for axis, x in zip(self.axes, points, strict=True)]
        total = np.zeros(np.shape(points[0]))
        for corner in product((0, 1), repeat=len(places)):
            weight = np.ones_like(total)
            index = []
            for end, (left, share) in zip(corner, places, strict=True):
                weight = weight * (share if end else 1 - share)
                index.append(left + end)
            total = total + weight * self.values[tuple(index)]
        return total

    @staticmethod
    def _place(axis: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The point to the left, and how far x is on the way to the next one."""
        if len(axis) == 1:
            return np.zeros(np.shape(x), dtype=int) - 1, np.ones(np.shape(x))
        left = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
        return left, np.clip((x - axis[left]) / (axis[left + 1] - axis[left]), 0.0, 1.0)


def _filled(values: np.ndarray, axis: int) -> np.ndarray:
    """Holes take the value before them on this axis, else the one after them."""
    values = np.moveaxis(values, axis, 0).copy()
    for steps in (range(1, len(values)), range(len(values) - 2, -1, -1)):
        for i in steps:
            other = values[i - 1] if steps.step > 0 else values[i + 1]
            values[i] = np.where(np.isnan(values[i]), other, values[i])
    return np.moveaxis(values, 0, axis)


class MeasuredKernels:
    """The tables of one GPU at one framework's version. Each is read when it is first asked for."""

    def __init__(self, gpu: Gpu, kernels: Kernels) -> None:
        assert gpu.measured is not None
        if gpu.name not in SYSTEMS and gpu.measured.system is None:
            raise InputError(
                f"has no tables of {gpu.name}{nearest(gpu.name, SYSTEMS)}; `system` names a folder of others",
                field="cluster.gpu.measured",
            )
        self.gpu, self.kernels, self.source = gpu, kernels, gpu.measured
        self.system = self.source.system or SYSTEMS[gpu.name]
        self.folder, self.package = _data_folder(self.source.folder)
        self._grids: dict[tuple[Any, ...], Any] = {}
        for family, name in (
            ("gemm", "gemm"),
            ("attention", "context_attention"),
            ("attention", "generation_attention"),
        ):
            self._path(family, self.source.framework, self.source.version, name)

    @property
    def label(self) -> str:
        """What a result says of its numbers."""
        return (
            f"forward products, attention and collectives in a node of {self.gpu.name} as measured: {self.package}, "
            f"{self.system}, {self.source.framework} {self.source.version}, NCCL {self._nccl_version}; gradients, "
            "optimizer, streaming kernels, experts and what crosses nodes by the curves"
        )

    # -- products and attention -----------------------------------------------------------------------------

    def gemm(self, time: KernelTime, precision: str, m: Numbers, n: Numbers, k: Numbers) -> KernelTime:
        """The curve's time of a forward product, as measured."""
        return _scaled(time, np.exp(self._gemm_grid(precision).at(m, n, k)))

    def prefill(self, time: KernelTime, heads: float, kv_heads: float, head_dim: float, batch: Numbers,
                tokens: Numbers) -> KernelTime:  # fmt: skip
        grid = self._prefill_grid(heads, kv_heads, head_dim)
        return _scaled(time, np.exp(grid.at(np.maximum(batch, 1), np.maximum(tokens, 1))))

    def decode(self, heads: float, kv_heads: float, head_dim: float, kv_bytes: float, batch: Numbers,
               context_tokens: Numbers) -> KernelTime:  # fmt: skip
        fixed, slope = self._decode_lines(heads, kv_heads, head_dim, kv_bytes)
        batch = np.maximum(np.asarray(batch, dtype=float), 1.0)
        once = np.exp(fixed.at(batch))
        memory = np.exp(slope.at(batch)) * np.asarray(context_tokens, dtype=float)
        return KernelTime(once + memory, 0.0 * memory, memory, once + 0.0 * memory)

    def _gemm_grid(self, precision: str) -> Grid:
        key = ("gemm", precision)
        if key not in self._grids:
            rows = self._table("gemm", self.source.framework, self.source.version, "gemm")
            rows = self._of(rows, "gemm_dtype", DTYPES.get(precision, precision), "product")
            rows = rows[(rows.n >= LEAST_DIMENSION) & (rows.k >= LEAST_DIMENSION)]
            width = 1.0 if precision == "fp8" else 2.0
            time = gemm_time(
                self.kernels.gemm_curve(precision), self._rates(precision), rows.m.to_numpy(), rows.n.to_numpy(),
                rows.k.to_numpy(), input_bytes=width, output_bytes=2.0,
            )  # fmt: skip
            rows = rows.assign(ratio=np.log(rows.seconds / time.seconds))
            self._grids[key] = Grid.of(rows, ["m", "n", "k"], "ratio")
        return self._grids[key]  # type: ignore[no-any-return]

    def _prefill_grid(self, heads: float, kv_heads: float, head_dim: float) -> Grid:
        key = ("prefill", heads, kv_heads, head_dim)
        if key not in self._grids:
            rows = self._attention("context", head_dim, 2.0)
            rows = _nearest_heads(rows, heads, kv_heads)
            time = attention_prefill_time(
                self.kernels.prefill, self._rates("bf16"), rows.batch_size.to_numpy(), rows.num_heads.to_numpy(),
                rows.num_key_value_heads.to_numpy(), rows.isl.to_numpy(), head_dim,
            )  # fmt: skip
            rows = rows.assign(ratio=np.log(rows.seconds / time.seconds))
            self._grids[key] = Grid.of(rows, ["batch_size", "isl"], "ratio")
        return self._grids[key]  # type: ignore[no-any-return]

    def _decode_lines(self, heads: float, kv_heads: float, head_dim: float, kv_bytes: float) -> tuple[Grid, Grid]:
        """Logarithms of the fixed seconds, and of the seconds per cached token, over the batch."""
        key = ("decode", heads, kv_heads, head_dim, kv_bytes)
        if key not in self._grids:
            rows = _nearest_heads(self._attention("generation", head_dim, kv_bytes), heads, kv_heads)
            found = []
            for batch, own in rows.groupby("batch_size"):
                if len(own) > 1:
                    context = batch * (own.step.to_numpy(dtype=float) + 1)
                    found.append((float(batch), *_line(context, own.seconds.to_numpy(dtype=float))))
            batches, fixed, slope = (np.array(column) for column in zip(*found, strict=True))
            self._grids[key] = (Grid([batches], np.log(fixed)), Grid([batches], np.log(slope)))
        return self._grids[key]  # type: ignore[no-any-return]

    def _attention(self, name: str, head_dim: float, kv_bytes: float) -> pd.DataFrame:
        rows = self._table("attention", self.source.framework, self.source.version, f"{name}_attention")
        rows = self._of(rows, "kv_cache_dtype", "fp8" if kv_bytes < 2 else "bfloat16", "attention")
        rows = rows[rows.window_size == 0] if "window_size" in rows else rows
        return self._of(rows, "head_dim", int(head_dim), "attention")

    # -- collectives ----------------------------------------------------------------------------------------

    @cached_property
    def with_collectives(self) -> Kernels:
        """The kernels with the curves through measured points inside a node; the rest as they are."""
        link = (self.gpu.nvlink_bytes_per_second or self.gpu.pcie_bytes_per_second).value
        rows = self._table("comm", "nccl", self._nccl_version, "nccl")
        rows = self._of(rows, "nccl_dtype", "half", "collective")
        found: dict[Any, dict[int, Any]] = {op: dict(curves) for op, curves in self.kernels.collectives.items()}
        source = next(iter(self.kernels.sources))
        tables = [(op, rows[rows.op_name == name]) for op, name in NCCL_OPS.items()]
        if (custom := self._custom_all_reduce()) is not None:
            tables.append(("custom_all_reduce", custom))
        for op, own in tables:
            if len(own):
                found[op] = {}
            for ranks, part in own.groupby("num_gpus"):
                points = part.groupby("message_size", as_index=False)["seconds"].median()
                data = split({"bytes": 2 * points.message_size, "seconds": points.seconds}, ["bytes"])
                found[op][int(ranks)] = measured_collective(data, op, int(ranks), link, source)
        record = self.kernels.model_dump() | {"collectives": found}
        return Kernels.model_validate(record)

    @cached_property
    def _nccl_version(self) -> str:
        versions = _names(self.folder / self.system / "comm" / "nccl")
        if not versions:
            raise InputError(f"there is no NCCL table of {self.system}", field="cluster.gpu.measured")
        return max(versions, key=lambda text: [int(part) for part in text.split(".")])

    def _custom_all_reduce(self) -> pd.DataFrame | None:
        """Of vLLM under CUDA graphs; None: not measured at this version."""
        place = self.folder / self.system / "comm" / self.source.framework / self.source.version
        if self.source.framework != "vllm" or not (place / "custom_allreduce_perf.parquet").exists():
            return None
        rows = self._table("comm", self.source.framework, self.source.version, "custom_allreduce")
        return rows[rows.kernel_source == "vLLM_custom_graph"]

    # -- files ----------------------------------------------------------------------------------------------

    def _table(self, family: str, framework: str, version: str, name: str) -> pd.DataFrame:
        """A table with `seconds`."""
        rows = _parquet(self._path(family, framework, version, name))
        return rows.assign(seconds=rows["latency"] * 1e-3)

    def _path(self, family: str, framework: str, version: str, name: str) -> Path:
        """Raises InputError that lists what there is."""
        place = self.folder
        for part, field in (
            (self.system, "system"), (family, "system"), (framework, "framework"), (version, "version"),
        ):  # fmt: skip
            if part not in _names(place):
                known = ", ".join(_names(place)) or "nothing"
                raise InputError(
                    f"is {part!r}, but {place.relative_to(self.folder.parent)} has {known}",
                    field=f"cluster.gpu.measured.{field}",
                )
            place = place / part
        path = place / f"{name}_perf.parquet"
        if not path.exists():
            raise InputError(
                f"{framework} {version} on {self.system} has no table {name!r}", field="cluster.gpu.measured"
            )
        return path

    def _of(self, rows: pd.DataFrame, column: str, value: Any, what: str) -> pd.DataFrame:
        """Rows with this value. Raises InputError that lists the measured ones."""
        found = rows[rows[column] == value]
        if not len(found):
            known = ", ".join(map(str, sorted(rows[column].unique())))
            raise InputError(
                f"no {what} with {column} {value} was measured with {self.source.framework} {self.source.version} on "
                f"{self.system} (there is: {known})",
                field="cluster.gpu.measured",
            )
        return found

    def _rates(self, precision: str) -> Rates:
        peak: Any = self.gpu.flops_per_second
        return Rates(peak[precision].value, self.gpu.memory_bytes_per_second.value, int(self.gpu.multiprocessors.value))


@lru_cache(maxsize=16)
def _measured(gpu: str, kernels: str) -> MeasuredKernels:
    return MeasuredKernels(Gpu.model_validate_json(gpu), Kernels.model_validate_json(kernels))


def measured_kernels(gpu: Gpu, kernels: Kernels) -> MeasuredKernels | None:
    """The tables that the GPU asks for, read once; None: it asks for none.

    Raises InputError where they are not installed, or not of this GPU.
    """
    if gpu.measured is None:
        return None
    return _measured(gpu.model_dump_json(), kernels.model_dump_json())


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Positive (a, b) of y = a + b x, least squares of relative errors."""
    weights = 1 / y
    terms = np.stack([weights, x * weights], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(terms, np.ones(len(y)), rcond=None)
    return max(float(fixed), 1e-9), max(float(slope), 1e-15)


def _nearest_heads(rows: pd.DataFrame, heads: float, kv_heads: float) -> pd.DataFrame:
    """The rows of the measured layout that is nearest in ratio: first the key-value heads, which are what is read."""
    layouts = rows[["num_heads", "num_key_value_heads"]].drop_duplicates().to_numpy()
    distance = np.abs(np.log(layouts / [heads, kv_heads])) @ [1.0, 10.0]
    chosen = layouts[distance.argmin()]
    return rows[(rows.num_heads == chosen[0]) & (rows.num_key_value_heads == chosen[1])]


def _scaled(time: KernelTime, ratio: np.ndarray) -> KernelTime:
    return KernelTime(*(np.asarray(part) * ratio for part in time))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _data_folder(given: str | None) -> tuple[Path, str]:
    """Where the tables are, and what they are called. Raises InputError where they are not installed."""
    if given is not None:
        if not Path(given).is_dir():
            raise InputError(f"there is no folder {given!r}", field="cluster.gpu.measured.folder")
        return Path(given), f"tables of {given}"
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "measured tables are an optional extra: pip install 'rlhfsim[measured]'", field="cluster.gpu.measured"
        )
    return Path(found.submodule_search_locations[0]) / "systems" / "data", (
        f"aiconfigurator-core {version_of('aiconfigurator-core')}"
    )


@lru_cache(maxsize=32)
def _parquet(path: Path) -> pd.DataFrame:
    try:
        import pandas

        return pandas.read_parquet(path)
    except ImportError:
        raise InputError(
            "measured tables are an optional extra: pip install 'rlhfsim[measured]'", field="cluster.gpu.measured"
        ) from None
