"""What files of measurements hold, whatever their format: tables of kernels, records of runs, a served run, a log.

Readers are in `rlhfsim.formats`. Everything is in seconds, bytes, tokens and FLOP/s here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bench import COLUMNS
from .errors import InputError, nearest
from .spec.data import data_dir
from .spec.hardware import Cluster
from .spec.loader import load_cluster

if TYPE_CHECKING:
    import pandas as pd

TEXTS = {"memory": ("kernel",), "collectives": ("collective",)}  # columns of words, besides bench.COLUMNS


@dataclass(frozen=True)
class Tables:
    """Measured kernels and collectives: tables as in `bench.COLUMNS` with `seconds`, `op` and `line`.

    op: the file's own name of what was timed. line: of the file (0: it has none). step: rows that are executed one
    after the other, such as the products of one layer, share a number; -1: no such sum makes sense.
    device: what the file calls its GPU; empty: it does not say.
    """

    path: Path
    source: str
    tables: dict[str, pd.DataFrame]
    precision: str = "bf16"
    device: str = ""


@dataclass(frozen=True)
class Record:
    """One published run: what ran, in the file's words, and seconds by quantity. where: its place in the file.

    tolerance: what its file states for its source.
    """

    id: str
    kind: str
    device: str
    fields: dict[str, Any]
    measured: dict[str, float]
    where: str
    source: str = ""
    tolerance: float | None = None


@dataclass(frozen=True)
class Records:
    path: Path
    records: list[Record]


@dataclass(frozen=True)
class Served:
    """A run of an inference engine, request by request (columns input_tokens, output_tokens, arrival_seconds,
    scheduled_seconds, first_seconds, last_seconds, on one clock that starts with the first arrival).

    kv_blocks: that sequences can use. prefix_caching: whether blocks that were given back are found again.
    async_scheduling: whether a step is scheduled while the one before it runs."""

    path: Path
    model: str
    engine: str
    device: str
    requests: pd.DataFrame
    tensor_parallel: int
    max_sequences: int
    step_tokens: int
    block_tokens: int
    kv_blocks: int
    prefix_caching: bool
    async_scheduling: bool


@dataclass(frozen=True)
class Log:
    """A console log of a training run: one row a step (`step`, `line`, and the log's own numbers by name).

    options: of the launch command or of the configuration that the log prints, by dotted name. truncated: the line
    of a last step that was cut off, which is left out; 0: none was.
    """

    path: Path
    framework: str
    steps: pd.DataFrame
    options: dict[str, str] = field(default_factory=dict)
    truncated: int = 0


Measurements = Tables | Records | Served | Log


def needs_pandas() -> Any:
    """The module pandas. Raises InputError that says how to install it."""
    try:
        import pandas
    except ImportError:
        raise InputError("reading tables needs pandas: pip install 'rlhfsim[calibrate]'") from None
    return pandas


# --- tables ----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> pd.DataFrame:
    """The rows with their `line`. Raises InputError for a row with too many fields, and for a file without rows."""
    pandas = needs_pandas()
    try:
        rows = pandas.read_csv(path, skip_blank_lines=False, dtype=str, keep_default_na=False)
    except pandas.errors.EmptyDataError:
        raise InputError("is empty", where=str(path)) from None
    except pandas.errors.ParserError as error:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if not found:
            raise InputError(f"is damaged: {error}", where=str(path)) from None
        raise InputError(
            f"has {found[3]} fields, but the header names {found[1]}", where=f"{path}:{found[2]}"
        ) from None
    except UnicodeDecodeError:
        raise InputError("is no text", where=str(path)) from None
    rows["line"] = np.arange(2, len(rows) + 2)
    blank = (rows.drop(columns="line") == "").all(axis=1)
    rows = rows[~blank].reset_index(drop=True)
    if rows.empty:
        raise InputError("has a header and no rows", where=str(path))
    return rows


def needs_columns(rows: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Raises InputError that names a missing column."""
    for column in columns:
        if column not in rows:
            raise InputError(
                f"the column is missing{nearest(column, map(str, rows.columns))}", field=column, where=str(path)
            )


def numbers(rows: pd.DataFrame, columns: Sequence[str], path: Path, least: float = 0.0) -> pd.DataFrame:
    """rows with these columns as numbers. Raises InputError for the first one that is none, or not above `least`."""
    pandas = needs_pandas()
    needs_columns(rows, columns, path)
    found = rows.copy()
    for column in columns:
        values = pandas.to_numeric(rows[column], errors="coerce").astype(float)
        bad = ~(np.isfinite(values) & (values > least))
        if bad.any():
            at = int(bad.to_numpy().argmax())
            given = rows[column].iloc[at]
            raise InputError(
                f"is {given!r}, but must be a number above {least:g}" if str(given) else "is missing",
                field=column,
                where=f"{path}:{rows['line'].iloc[at]}",
            )
        found[column] = values
    return found


def table(
    name: str, op: str | Sequence[str], columns: Mapping[str, Any], seconds: Any, line: Any, step: Any = -1
) -> pd.DataFrame:
    """A table of `Tables`; several rows of the same shape stay several."""
    pandas = needs_pandas()
    wanted = (*TEXTS.get(name, ()), *(c for c in COLUMNS[name] if c != "weights_bytes"))
    values = {column: columns[column] for column in wanted}
    return pandas.DataFrame({"op": op, **values, "seconds": seconds, "line": line, "step": step})


def joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    found = needs_pandas().concat(list(parts), ignore_index=True)
    return found


# --- models ----------------------------------------------------------------------------------------------------------

# Names that papers use: of the same shape as the shipped one (Llama 3.3 70B is a fine-tune of 3.1's).
SAME_SHAPE = {"llama3.370b": "llama-3.1-70b", "llama70b": "llama-2-70b"}


def model_named(name: str, field: str = "model", where: str = "") -> str:
    """The shipped model of a Hugging Face name, a path of one, or a name as papers write it (`LLaMA 7B`, `LLAMA3_8B`),
    without what says how it was tuned.

    Raises InputError for one that is not shipped.
    """
    last = re.sub(r"/snapshots/.*$", "", name).split("--")[-1].rstrip("/").rpartition("/")[2].lower()
    last = re.sub(r"-(instruct|it|chat|base|sft)(-hf)?$|-hf$", "", last)

    def squashed(text: str) -> str:
        return re.sub(r"[^a-z0-9.]", "", text)

    known = {squashed(file.stem): file.stem for file in (data_dir("hw_specs") / "models").glob("*.yaml")}
    known |= SAME_SHAPE
    if squashed(last) not in known:
        raise InputError(
            f"is {name!r}, which is no model of hw_specs/models{nearest(last, known.values())}",
            field=field,
            where=where,
        )
    return known[squashed(last)]


# --- GPUs ------------------------------------------------------------------------------------------------------------


@cache
def gpu_names() -> tuple[str, ...]:
    """The GPUs of `hw_specs/gpus`."""
    return tuple(sorted(path.stem for path in (data_dir("hw_specs") / "gpus").glob("*.yaml")))


def gpu_named(device: str, field: str = "gpu", where: str = "") -> str:
    """The GPU of `hw_specs/gpus` that a file means, such as `NVIDIA H100 80GB HBM3` or `A100-PCIe`.

    Of several of one family, one with the memory and the form factor that it names; else SXM with the most memory.
    Raises InputError for an unknown one.
    """
    text = device.lower()
    if text in gpu_names():
        return text
    words = set(re.findall(r"[a-z]+\d+[a-z]*|\d{4}|[a-z]+", text.replace("_", " ").replace("-", " ")))
    memory = re.search(r"(?<!\d)(\d{2,3}) ?g(?:i?b)?\b", text)
    form = "pcie" if "pcie" in text else "sxm"

    def family(name: str) -> str:
        first, second = name.split("-")[:2]
        return second if first in ("rtx", "ascend") else first

    known = [name for name in gpu_names() if family(name) in words]
    if not known:
        raise InputError(
            f"is {device!r}, which is no GPU of hw_specs/gpus{nearest(device, gpu_names())}", field=field, where=where
        )

    def rank(name: str) -> tuple[bool, bool, int]:
        size = re.search(r"-(\d+)g", name)
        bytes_ = int(size[1]) if size else 0
        return bool(memory and int(memory[1]) == bytes_), name.endswith(form), bytes_

    return max(known, key=rank)


def cluster_of(gpu: str, field: str = "--gpu", where: str = "") -> Cluster:
    """The cluster that a GPU's numbers come with: a cluster's file, or the shipped cluster of that GPU.

    Raises InputError for what is neither.
    """
    if "/" in gpu or gpu.endswith((".yaml", ".yml")):
        return load_cluster(gpu)
    name = gpu_named(gpu, field, where)
    clusters = sorted((data_dir("hw_specs") / "clusters").glob("*.yaml"), key=lambda path: (path.stem != name, path))
    for path in clusters:
        if path.stem.startswith(name):
            return load_cluster(path.stem)
    raise InputError(f"is {gpu!r}, of which there is no cluster in hw_specs/clusters", field=field, where=where)


def device_of(found: Measurements) -> set[str]:
    """GPUs that the file names, by `gpu_named`; empty: it names none."""
    if isinstance(found, Records):
        return {gpu_named(record.device, "gpu", record.where) for record in found.records}
    device = "" if isinstance(found, Log) else found.device
    return {gpu_named(device, "device", str(found.path))} if device else set()


def finite(value: Any) -> bool:
    """Whether it is a positive number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
