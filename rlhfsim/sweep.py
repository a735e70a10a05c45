"""A table over swept values that survives being killed.

One line per point and row of `compare` (or the scenario's own strategy). Columns: the swept keys; `strategy`, the
row's label; `gpus`, `samples` per iteration; `fits` (empty: the point is invalid), `reason`; `step_seconds`, the mean
over the length draws, with its 5th and 95th percentile and all draws (JSON); rates; `timing_s/<stage>` in verl's
names, of the first draw; `peak_memory_bytes` of the fullest rank at maximum lengths; `bound_by`; `used`, the settings
that tuning chose (JSON); and `key`, a hash of what the line answers, by which a later run knows what is done.

Lines are appended as workers return them; the complete table is sorted into the sweep's order and replaces the file
at once, so that it does not depend on the number of workers. A Parquet table is written from the CSV file beside it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from joblib import Parallel, delayed

from . import __version__
from .compare import DEFAULT_BASELINE, DEFAULT_ROWS, compare, default_rows
from .errors import DoesNotFit, InputError, NeverValid, nearest
from .metrics import base_stage, bound_by, stage_seconds
from .output import check_writable, replacing
from .plot import STAGE_COLOURS
from .render import progress, tokens_per_iteration
from .simulate import prepare
from .spec.loader import expand_sweep, load_scenario
from .spec.overrides import parse_override, single_overrides
from .spec.scenario import Compare, Scenario
from .speedups import Table, default_x, draw, interval, read_measured, scales, speedups

TABLE_VERSION = 1
FEW_POINTS = 32  # are resolved sooner than workers start (20 to 40 ms each, `plan` of the quickstart on one core)
BAD_INPUT, FITS_NOT, INTERRUPTED = 2, 3, 130

Point = dict[str, Any]  # overrides by dotted key

BEFORE_STAGES = (
    "strategy",
    "gpus",
    "samples",
    "fits",
    "reason",
    "step_seconds",
    "step_seconds_low",
    "step_seconds_high",
    "draw_seconds",
    "samples_per_second",
    "tokens_per_second",
)
AFTER_STAGES = ("peak_memory_bytes", "bound_by", "used", "key")
TEXTS = ("strategy", "reason", "draw_seconds", "bound_by", "used", "key")


# -- what to run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One line to be: `swept` values as text by column, and the scenario, or the reason why there is none."""

    key: str
    label: str
    swept: dict[str, str]
    scenario: Scenario | None
    reason: str = ""
    stages: tuple[str, ...] = ()

    @property
    def known(self) -> dict[str, Any]:
        """The columns that need no simulation."""
        cluster, workload = (self.scenario.cluster, self.scenario.workload) if self.scenario else (None, None)
        return self.swept | {
            "strategy": self.label,
            "gpus": cluster and cluster.gpus,
            "samples": workload and workload.samples,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Sweep:
    """All lines in order. At least one of them is valid."""

    tasks: tuple[Task, ...]
    columns: tuple[str, ...]
    baseline: str
    tune: bool

    @property
    def table(self) -> Table:
        """What is known before anything is simulated, typed as `read_table` does it."""
        return _typed([{name: _cell(task.known.get(name)) for name in self.columns} for task in self.tasks])


def points_of(overrides: Sequence[str], zipped: bool = False) -> tuple[list[Point], list[str]]:
    """The points, and the keys that have several values. zipped: such lists are as long as each other and paired."""
    parsed = [parse_override(text) for text in overrides]
    swept = [key for key, values in parsed if len(values) > 1]
    if not zipped:
        return expand_sweep(overrides), swept
    counts = {key: len(values) for key, values in parsed if len(values) > 1}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise InputError(f"pairs values, so all lists must have the same length, but {lengths}", field="--zip")
    points = max(counts.values(), default=1)
    single_overrides(f"{key}=0" for key, _ in parsed)  # raises where a key is given twice
    return [{key: values[i % len(values)] for key, values in parsed} for i in range(points)], swept


def plan(
    path: str,
    overrides: Sequence[str],
    *,
    strategies: bool = False,
    tune: bool = True,
    zipped: bool = False,
    jobs: int | None = None,
) -> Sweep:
    """Resolve and check every point. strategies: all rows of `compare`, else only the scenario's own strategy.

    Raises InputError if nothing can be simulated, and NeverValid where a value is wrong whatever the others are;
    another invalid point (a layout that does not divide) becomes a line with its reason.
    """
    points, swept = points_of(overrides, zipped)
    rows = _compared(path, points) if strategies else None
    resolve = delayed(_tasks)
    workers = Parallel(n_jobs=1 if len(points) <= FEW_POINTS else jobs or -1)
    found = workers(resolve(path, point, swept, strategies, rows, tune) for point in points)
    tasks = list({task.key: task for of_point in found for task in of_point}.values())  # a=1,1 is one point
    valid = [task for task in tasks if task.scenario]
    if not valid:
        raise InputError(tasks[0].reason)
    labels = list(dict.fromkeys(task.label for task in valid))
    if rows is None and len(labels) == 1:  # an invalid point has no strategy of its own to name it after
        tasks = [replace(task, label=labels[0]) for task in tasks]
    stages = {stage for task in valid for stage in task.stages}
    ordered = [s for s in STAGE_COLOURS if s in stages] + sorted(stages - set(STAGE_COLOURS))
    columns = (*dict.fromkeys(map(_column, swept)), *BEFORE_STAGES, *(f"timing_s/{s}" for s in ordered), *AFTER_STAGES)
    default = rows.baseline if rows else DEFAULT_BASELINE if strategies else labels[0]
    return Sweep(tuple(tasks), columns, _one_line(default), tune)


def _compared(path: str, points: Sequence[Point]) -> Compare | None:
    """The file's `compare`, from the first valid point. Raises the first point's InputError if there is none."""
    first: InputError | None = None
    for point in points:
        try:
            return load_scenario(path, point).compare
        except InputError as error:
            first = first or error
    raise first or InputError("there are no points")


def _tasks(
    path: str, point: Point, swept: Sequence[str], strategies: bool, rows: Compare | None, tune: bool
) -> list[Task]:
    scenarios = _scenarios(path, point, strategies, rows)
    return [_task(row, scenario, point, swept, tune) for row, scenario in scenarios.items()]


def _scenarios(path: str, point: Point, strategies: bool, rows: Compare | None) -> dict[str, Scenario | InputError]:
    """The rows at a point by label; the scenario's own strategy has the label ''."""
    if rows:
        point = {key: value for key, value in point.items() if key.partition(".")[0] != "compare"}
        return {label: _loaded(path, point | row | {"compare": None}) for label, row in rows.rows.items()}
    own = _loaded(path, point)
    if not strategies:
        return {"": own}
    return dict.fromkeys(DEFAULT_ROWS, own) if isinstance(own, InputError) else {**default_rows(own)}


def _loaded(path: str, overrides: Point) -> Scenario | InputError:
    try:
        return load_scenario(path, overrides).model_copy(update={"compare": None})
    except InputError as error:
        return error


def _task(row: str, found: Scenario | InputError, point: Point, swept: Sequence[str], tune: bool) -> Task:
    texts = {_column(key): _cell(point[key]) for key in swept}
    scenario, label, stages, reason = None, row, tuple[str, ...](), ""
    try:
        if isinstance(found, InputError):
            raise found
        setup = prepare(found)
        scenario, label = found, row or setup.label
        stages = tuple(dict.fromkeys(base_stage(stage.name) for stage in setup.graph.stages()))
    except NeverValid:
        raise
    except InputError as error:
        reason = _one_line(str(error))
    resolved = scenario.model_dump_json() if scenario else f"{point}: {reason}"
    asked = json.dumps([TABLE_VERSION, __version__, tune, row, texts, resolved])
    key = hashlib.sha256(asked.encode()).hexdigest()[:24]
    return Task(key, _one_line(label), texts, scenario, reason, stages)


def _column(key: str) -> str:
    """`strategy=a,b` sweeps the strategy's name; a column `strategy` is there anyway."""
    return "strategy.name" if key == "strategy" else key


# -- running it ---------------------------------------------------------------------------------------------------


def run(sweep: Sweep, out: str | Path, jobs: int | None = None) -> Table:
    """Simulate what has no line in `out` yet, and return the complete table. jobs: worker processes, default all cores.

    Raises InputError, before anything is simulated, where `out` is another sweep's or cannot be written. After a
    KeyboardInterrupt, or a kill, what was done is in the file and the same call continues.
    """
    path = csv_path(out)
    with _opened(path) as file:
        done = _lines_in(file, path, sweep)
        todo = [task for task in sweep.tasks if task.key not in done]
        _append(file, b"" if file.tell() else _line(sweep.columns))
        workers = Parallel(n_jobs=jobs or -1, return_as="generator_unordered")
        results = workers(delayed(_simulated)(task, sweep.tune) for task in todo)
        try:
            with closing(results), progress(len(todo)) as show:
                show(f"{len(todo)} rows to simulate, {len(done)} done before")
                for task, values in results:
                    cells = [_cell(values.get(name)) for name in sweep.columns]
                    _append(file, _line(cells))
                    done[task.key] = cells
                    show(task.label)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {len(done)} of {len(sweep.tasks)} rows are in {path}; the same command continues there"
            ) from None
        _replace(path, b"".join(map(_line, [sweep.columns, *(done[task.key] for task in sweep.tasks)])))
    if Path(out) != path:
        _write_parquet(path, Path(out), sweep.columns)
    return read_table(path)


def _simulated(task: Task, tune: bool) -> tuple[Task, dict[str, Any]]:
    """The task (only what names it) and its line's values."""
    name, values = Task(task.key, task.label, {}, None), task.known | {"key": task.key}
    if task.scenario is None:
        return name, values
    try:
        row = compare({task.label: task.scenario}, task.label, tune=tune).rows[0]
    except InputError as error:
        return name, values | {"reason": str(error)}
    except DoesNotFit as error:
        return name, values | {"fits": False, "reason": str(error)}
    values |= {
        "fits": row.fits,
        "reason": row.reason,
        "used": json.dumps(row.used),
        "peak_memory_bytes": row.fit and float(row.fit.worst.bytes.total),
    }
    if row.timeline is None or row.step_seconds is None:
        return name, values
    low, high = interval(row.draws, row.step_seconds)
    return name, values | {
        "step_seconds": row.step_seconds,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "draw_seconds": json.dumps([float(s) for s in row.draws]),
        "samples_per_second": row.scenario.workload.samples / row.step_seconds,
        "tokens_per_second": tokens_per_iteration(row.scenario) / row.step_seconds,
        "bound_by": bound_by(row.timeline),
        **{f"timing_s/{stage}": seconds for stage, seconds in stage_seconds(row.timeline).items()},
    }


# -- the file -----------------------------------------------------------------------------------------------------


def csv_path(out: str | Path) -> Path:
    """Where lines are written: `out`, or for a Parquet table the CSV file beside it. Raises InputError."""
    path = Path(out)
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError("a Parquet table needs pyarrow (pip install pyarrow)", where=str(out)) from None
        return path.with_suffix(".csv")
    if path.suffix.lower() != ".csv":
        raise InputError(f"tables are .csv or .parquet files, not {path.suffix!r}", where=str(out))
    return path


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file for reading and appending, held against a second sweep. Raises InputError if it cannot be written."""
    if path.exists() and not path.is_file():
        raise InputError("is no regular file", where=str(path))
    try:
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from None
    with file:
        _lock(file, path)
        yield file


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError("another sweep is writing it", where=str(path)) from None
    except (ImportError, OSError):
        pass  # no such locks on this system or file system: as good as it gets


def _lines_in(file: BinaryIO, path: Path, sweep: Sweep) -> dict[str, list[str]]:
    """The cells of the lines that are there, by key; a last line without its end is cut off.

    Raises InputError, with the file untouched, if there is anything else than lines of this sweep.
    """
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if not _line(sweep.columns).startswith(content[: len(_line(sweep.columns))]):
        raise _foreign(path, 1, "other columns")
    try:
        lines = list(csv.reader(io.StringIO(whole.decode(), newline=""), strict=True))[1:]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _foreign(path, 1, str(error)) from None
    keys = {task.key for task in sweep.tasks}
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(sweep.columns):
            raise _foreign(path, number, f"{len(cells)} cells instead of {len(sweep.columns)}")
        if cells[-1] not in keys:
            raise _foreign(path, number, "a row that is not in this sweep")
    if len(whole) < len(content):
        file.truncate(len(whole))
    file.seek(0, os.SEEK_END)
    return {cells[-1]: cells for cells in lines}


def _foreign(path: Path, line: int, found: str) -> InputError:
    return InputError(
        f"is not this sweep's table ({found}; the scenario, the values, the rows or the version of "
        "rlhfsim differ) and stays as it is: name another --out",
        where=f"{path}:{line}",
    )


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    """Numbers with all their digits, text on one line; None is empty, other values are JSON."""
    if value is None or isinstance(value, str):
        return _one_line(value or "")
    return repr(value) if type(value) in (int, float) else json.dumps(value, allow_nan=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _append(file: BinaryIO, line: bytes) -> None:
    """Onto the disk, so that a kill can cost only what comes after it."""
    file.write(line)
    file.flush()
    os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    if path.read_bytes() != content:
        with replacing(path) as place, place.open("wb") as file:
            _append(file, content)


def read_table(path: str | Path) -> Table:
    """The rows of a table that `run` wrote; a column whose cells are all numbers has numbers, an empty cell is None."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return _typed(list(csv.DictReader(file)))


def _typed(rows: Sequence[Mapping[str, str]]) -> Table:
    columns = list(rows[0]) if rows else []
    converters = {name: str if name in TEXTS else _converter([row[name] for row in rows]) for name in columns}
    return [{name: converters[name](row[name]) if row[name] else None for name in columns} for row in rows]


def _converter(cells: Sequence[str]) -> Any:
    for kind in (int, float):
        try:
            for cell in filter(None, cells):
                kind(cell)
            return kind
        except ValueError:
            continue
    return {"true": True, "false": False}.__getitem__ if {*cells} <= {"true", "false", ""} else str


def _write_parquet(source: Path, out: Path, columns: Sequence[str]) -> None:
    from pyarrow import csv as arrow_csv
    from pyarrow import float64, parquet, string

    numbers = [name for name in columns if "second" in name or "bytes" in name or name.startswith("timing_s/")]
    types = dict.fromkeys(numbers, float64()) | dict.fromkeys(TEXTS, string())
    table = arrow_csv.read_csv(
        source, arrow_csv.ReadOptions(use_threads=False), convert_options=arrow_csv.ConvertOptions(column_types=types)
    )
    with replacing(out) as place:
        parquet.write_table(table, place)


# -- the verb -----------------------------------------------------------------------------------------------------


def main(
    scenario: str,
    overrides: Sequence[str],
    *,
    out: str = "sweep.csv",
    strategies: bool = False,
    baseline: str | None = None,
    as_given: bool = False,
    zipped: bool = False,
    plot_path: str | None = None,
    x: str | None = None,
    measured: str | None = None,
    jobs: int | None = None,
    same_point: bool | None = None,
) -> int:
    """Run a sweep and draw its curves; the exit code. Everything given is checked before anything is simulated.

    same_point: speedups over the baseline at the same x; default: over the baseline at its smallest x where x counts
    GPUs (with the ideal line), at the same x elsewhere.
    """
    table_path = csv_path(out)
    if plot_path:
        _check_plot_path(plot_path, table_path)
    elif measured or x:
        raise InputError("is for a figure: name it with --plot", field="--measured" if measured else "--x")
    sweep = plan(scenario, overrides, strategies=strategies, tune=not as_given, zipped=zipped, jobs=jobs)
    baseline = _one_line(baseline or sweep.baseline)
    x = x or (default_x(sweep.table) if plot_path else None)
    if x:
        points = read_measured(measured, x) if measured else []
        same_point = not scales(sweep.table, x) if same_point is None else same_point
        speedups(_without_times(sweep.table), baseline, x, same_point=same_point, measured=points)
    elif baseline not in (labels := {task.label for task in sweep.tasks}):
        raise InputError(f"there is no row {baseline!r}{nearest(baseline, labels)}", field="baseline")
    try:
        table = run(sweep, out, jobs)
    except KeyboardInterrupt as stop:
        print(*stop.args, file=sys.stderr)
        return INTERRUPTED
    timed = sum(row["step_seconds"] is not None for row in table)
    invalid = sum(row["fits"] is None for row in table)
    print(
        f"{out}: {len(table)} rows, {len(table) - timed - invalid} of them do not fit, {invalid} are invalid",
        file=sys.stderr,
    )
    if plot_path and x and timed:
        draw(table, baseline, x, plot_path, same_point=bool(same_point), measured=points, title=Path(scenario).stem)
        print(f"{plot_path}, {Path(plot_path).with_suffix('.csv')}", file=sys.stderr)
    return 0 if timed else BAD_INPUT if invalid == len(table) else FITS_NOT


def _without_times(table: Table) -> Table:
    return [{**row, "step_seconds": None} for row in table]


def _check_plot_path(plot_path: str, table_path: Path) -> None:
    path = Path(plot_path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"figures are .png or .svg files, not {path.suffix!r}", field="--plot", where=plot_path)
    check_writable(path, path.with_suffix(".csv"))
    if path.with_suffix(".csv").resolve() == table_path.resolve():
        raise InputError(
            f"the figure's numbers would go to {table_path}, which is the table: give one another name",
            field="--plot",
            where=plot_path,
        )
