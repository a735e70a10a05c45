"""Speedup curves over a named baseline, from a table of `sweep`, with measured points beside the simulated ones.

A speedup is a ratio of samples per second, so that it also means something where the work grows along the curve.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import InputError, nearest
from .plot import speedup_figure

Row = Mapping[str, Any]
Table = Sequence[Row]
Scaling = Literal["strong", "weak", "mixed"]

INTERVAL = (0.05, 0.95)  # quantiles over the length draws


class Curve(NamedTuple):
    """Rows along x that have everything else in common: the label and the values of other swept columns."""

    label: str
    others: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return ", ".join([self.label, *(f"{column}={value}" for column, value in self.others)])


def curves(table: Table, x: str) -> dict[Curve, list[Row]]:
    """The valid rows by curve, along ascending `x` (names: in the order of the table). Raises InputError."""
    _check_column(table, x)
    valid = [row for row in table if row["gpus"] is not None]
    others = [c for c in swept_columns(table) if c != x and not _determined(valid, c, (x, "strategy"))]
    found: dict[Curve, list[Row]] = defaultdict(list)
    for row in valid:
        found[Curve(row["strategy"], tuple((c, row[c]) for c in others))].append(row)
    place = {value: number for number, value in enumerate(_values(valid, x))}
    return {curve: sorted(rows, key=lambda row: place[row[x]]) for curve, rows in found.items()}


def _check_column(table: Table, x: str) -> None:
    columns = [*swept_columns(table), "gpus", "samples"]
    if x not in columns:
        raise InputError(f"there is no such column{nearest(x, columns)}", field=f"x {x!r}")


def swept_columns(table: Table) -> list[str]:
    columns = list(table[0]) if table else []
    return columns[: columns.index("strategy")] if table else []


def _determined(table: Table, column: str, by: Sequence[str]) -> bool:
    """Whether rows that agree in the columns `by` agree in `column`."""
    seen: dict[tuple[Any, ...], Any] = {}
    return all(seen.setdefault(tuple(row[b] for b in by), row[column]) == row[column] for row in table)


def _values(table: Table, column: str) -> list[Any]:
    values = list(dict.fromkeys(row[column] for row in table))
    return sorted(values) if all(isinstance(value, (int, float)) for value in values) else values


def scaling(table: Table, x: str) -> Scaling | None:
    """strong: the same work at every point of a curve; weak: the same work per GPU. None: the GPUs do not vary.

    Work is the same where the samples are and no other swept column than the cluster varies along x.
    """
    found: set[Scaling] = set()
    for rows in curves(table, x).values():
        if len({row["gpus"] for row in rows}) < 2:
            continue
        along = [c for c in swept_columns(table) if len({row[c] for row in rows}) > 1]
        sized = ("workload.prompts", "workload.responses_per_prompt")
        if any(c not in sized and not c.startswith("cluster") for c in along):
            found.add("mixed")
        elif len({row["samples"] for row in rows}) == 1:
            found.add("strong")
        else:
            found.add("weak" if len({row["samples"] / row["gpus"] for row in rows}) == 1 else "mixed")
    return (found.pop() if len(found) == 1 else "mixed") if found else None


def default_x(table: Table) -> str:
    """The number of GPUs if it varies, else the first swept column. Raises InputError if nothing is swept."""
    if len({row["gpus"] for row in table} - {None}) > 1:
        return "gpus"
    if not (swept := swept_columns(table)):
        raise InputError("a figure needs an axis: sweep something, for example cluster.nodes=1,2,4", field="--plot")
    return swept[0]


def scales(table: Table, x: str) -> bool:
    """Whether `x` is a number of GPUs or in proportion to it, so that one can ask what more of them bring."""
    _check_column(table, x)
    valid = [row for row in table if row["gpus"] is not None]
    numbers = all(isinstance(row[x], (int, float)) and row[x] > 0 for row in valid)
    return numbers and len({row[x] for row in valid}) > 1 and len({row["gpus"] / row[x] for row in valid}) == 1


def speedups(table: Table, baseline: str, x: str, *, same_point: bool, measured: Sequence[Measured] = ()) -> Table:
    """Rows for `plot.speedup_figure`: samples per second over those of the baseline, with an interval over draws.

    The baseline is a label (compared where the other swept values are the same) or a whole curve. same_point: at the
    same x; else at the baseline's smallest x that fits. Where either has no time the speedup is NaN, a gap.
    """
    by_curve = curves(table, x)
    bases = _bases(by_curve, baseline)
    seen = _measured_speedups(by_curve, bases, measured, x, same_point)
    found: list[dict[str, Any]] = []
    for curve, rows in by_curve.items():
        drawn = []
        for row in rows:
            values = _speedup(row, _reference(by_curve[bases[curve]], row, x, same_point))
            point = {"measured": seen[curve.name, row[x]]} if (curve.name, row[x]) in seen else {}
            drawn.append({"strategy": curve.name, x: row[x], **values, **point})
        if any(math.isfinite(row["speedup"]) or "measured" in row for row in drawn):
            found += drawn
    return found


def _bases(by_curve: Mapping[Curve, Any], baseline: str) -> dict[Curve, Curve]:
    """The curve that each one is measured against."""
    whole = next((curve for curve in by_curve if curve.name == baseline), None)
    bases = {curve: whole or Curve(baseline, curve.others) for curve in by_curve}
    if any(base not in by_curve for base in bases.values()):
        names = {curve.name for curve in by_curve} | {curve.label for curve in by_curve}
        raise InputError(f"there is no row {baseline!r}{nearest(baseline, names)}", field="baseline")
    return bases


def _reference(base: Table, row: Row, x: str, same_point: bool) -> Row | None:
    timed = (b for b in base if b["step_seconds"] is not None)
    return next((b for b in timed if not same_point or b[x] == row[x]), None)


def _speedup(row: Row, base: Row | None) -> dict[str, float]:
    if base is None or row["step_seconds"] is None:
        return {"speedup": math.nan}
    found = {"speedup": row["samples_per_second"] / base["samples_per_second"]}
    ours, theirs = (np.array(json.loads(r["draw_seconds"])) / r["samples"] for r in (row, base))
    if len(ours) == len(theirs) > 1:  # equal seeds: draw by draw
        low, high = interval(theirs / ours, found["speedup"])
        found |= {"low": low, "high": high}
    return found


def interval(draws: Sequence[float] | np.ndarray, mean: float) -> tuple[float, float]:
    """5th and 95th percentile over length draws, widened to hold `mean` (equal draws differ from it by rounding)."""
    low, high = np.quantile(draws, INTERVAL)
    return min(float(low), mean), max(float(high), mean)


# -- measured points ----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A measured point: its speedup, or its seconds per step."""

    where: str
    strategy: str
    x: str
    speedup: float | None
    step_seconds: float | None


def read_measured(path: str, x: str) -> list[Measured]:
    """A CSV file with columns `strategy`, x, and `speedup` or `step_seconds`. Raises InputError with the line."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=path) from None
    needed = [name for name in ("strategy", x) if name not in columns]
    if needed or not {"speedup", "step_seconds"} & set(columns):
        raise InputError(
            f"must have the columns strategy, {x}, and speedup or step_seconds, but has {', '.join(columns) or 'none'}",
            where=f"{path}:1",
        )
    if not rows:
        raise InputError("has no points", where=path)
    return [_measured(f"{path}:{line}", row, x) for line, row in rows]


def _measured(where: str, row: Mapping[str | None, Any], x: str) -> Measured:
    if None in row or None in row.values():
        raise InputError("has another number of cells than line 1 (a label with a comma needs quotes)", where=where)
    given = [name for name in ("speedup", "step_seconds") if row.get(name, "").strip()]
    numbers = {name: _positive(row[name], name, where) for name in given}
    if len(numbers) != 1:
        raise InputError("needs either a speedup or step_seconds", where=where)
    return Measured(where, row["strategy"].strip(), row[x].strip(), numbers.get("speedup"), numbers.get("step_seconds"))


def _positive(text: str, field: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"is {text!r}, but must be a positive number", field=field, where=where)
    return value


def _measured_speedups(
    by_curve: Mapping[Curve, Table],
    bases: Mapping[Curve, Curve],
    measured: Sequence[Measured],
    x: str,
    same_point: bool,
) -> dict[tuple[str, Any], float]:
    """By curve and x. Measured seconds are compared with the baseline's measured ones, never with simulated ones."""
    points = _placed(by_curve, measured, x)
    found = {}
    for (curve, at), (point, row) in points.items():
        if point.speedup is not None:
            found[curve.name, at] = point.speedup
            continue
        base = bases[curve]
        base_at = at if same_point else _smallest(by_curve[base])[x]
        other, base_row = points.get((base, base_at), (None, row))
        if other is None or other.step_seconds is None or point.step_seconds is None:
            raise InputError(
                f"needs measured step_seconds of the baseline {base.name!r} at {x} {base_at}",
                field="step_seconds",
                where=point.where,
            )
        rates = [r["samples"] / p.step_seconds for r, p in ((row, point), (base_row, other))]
        found[curve.name, at] = rates[0] / rates[1]
    return found


def _placed(
    by_curve: Mapping[Curve, Table], measured: Sequence[Measured], x: str
) -> dict[tuple[Curve, Any], tuple[Measured, Row]]:
    """Every measured point with its row of the table, by curve and x."""
    named = {curve.name: curve for curve in by_curve}
    points: dict[tuple[Curve, Any], tuple[Measured, Row]] = {}
    for point in measured:
        if (curve := named.get(point.strategy)) is None:
            raise InputError(
                f"is {point.strategy!r}, which is no curve{nearest(point.strategy, named)}",
                field="strategy",
                where=point.where,
            )
        row = next((row for row in by_curve[curve] if _same(row[x], point.x)), None)
        if row is None:
            raise InputError(f"is {point.x!r}, which is no point of the sweep", field=x, where=point.where)
        if (curve, row[x]) in points:
            raise InputError("is there twice", field=f"{curve.name} at {x} {point.x}", where=point.where)
        points[curve, row[x]] = point, row
    return points


def _smallest(base: Table) -> Row:
    """The row that a curve starts from: the first that fits, or before anything is simulated the first."""
    return next((row for row in base if row["step_seconds"] is not None), base[0])


def _same(value: Any, text: str) -> bool:
    try:
        return float(value) == float(text)
    except ValueError:
        return str(value) == text


def draw(
    table: Table,
    baseline: str,
    x: str,
    path: str | Path,
    *,
    same_point: bool,
    measured: Sequence[Measured] = (),
    title: str = "",
) -> None:
    """Speedup curves over the baseline, with the ideal line where x counts GPUs, and a CSV file of them beside it."""
    by_curve = curves(table, x)
    bases = set(_bases(by_curve, baseline).values())
    starts = {(row["gpus"], row[x]) for row in (_smallest(by_curve[base]) for base in bases)}
    gpus, start = min(starts)
    common = not same_point and len(starts) == 1  # all curves have speedup 1 at one point: the ideal line's too
    name = f"{baseline} on {gpus} GPUs" if common else baseline
    kind = scaling(table, x)
    rows = speedups(table, baseline, x, same_point=same_point, measured=measured)
    notes = [title, "speedup in samples per second"]
    if kind == "mixed":
        notes.append("mixed scaling (neither the work nor the work per rank is the same)")
    if any(math.isnan(row["speedup"]) for row in rows):
        notes.append("gaps: does not fit")
    speedup_figure(
        rows,
        name,
        x,
        path,
        scaling=None if kind == "mixed" else kind,
        ideal="linear" if common and scales(table, x) else None,
        ideal_from=start if common and scales(table, x) else None,
        x_label="GPUs" if x == "gpus" else x,
        title=", ".join(filter(None, notes)),
    )
