"""The command line: one function per verb, no logic. Heavy modules are imported by the verb that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    from .compare import Comparison

FITS_NOT, BAD_INPUT, FAILED = 3, 2, 1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Predict how long an RLHF iteration takes on a cluster, and whether it fits, before burning a GPU hour.

    Every verb takes a scenario file and overrides: rlhfsim simulate scenario.yaml cluster.nodes=4
    generation.engine=engine. Exit codes: 0 fine, 2 bad input, 3 does not fit, 1 anything else.
    """


def scenario_command(name: str) -> Callable[..., Any]:
    """A verb on one scenario: its arguments, and errors as messages instead of tracebacks."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @cli.command(name, help=function.__doc__)
        @click.argument("scenario", type=str)
        @click.argument("overrides", nargs=-1)
        @wraps(function)
        def verb(*args: Any, **kwargs: Any) -> None:
            sys.exit(function(*args, **kwargs) or 0)

        return verb

    return decorate


as_json = click.option("--json", "json_output", is_flag=True, help="One JSON object on stdout and nothing else.")


@scenario_command("fits")
@as_json
@click.option("--plot", "plot_path", type=str, help="Draw the memory of each phase (PNG or SVG).")
def fits(scenario: str, overrides: tuple[str, ...], json_output: bool, plot_path: str | None) -> int:
    """Does it run out of memory: where, by how much, and what helps. Does not simulate. Exit code 3: does not fit."""
    from .render import draw_fit, fit_json, print_fit
    from .simulate import prepare
    from .spec.loader import load_scenario

    _drawable(plot_path)
    setup = prepare(load_scenario(scenario, overrides))
    fit = setup.fit()
    _note(setup.notes)
    if plot_path:
        draw_fit(setup, fit, plot_path)
    if json_output:
        _print_json(fit_json(fit))
    else:
        print_fit(setup, fit)
    return 0 if fit.fits else FITS_NOT


@scenario_command("simulate")
@as_json
@click.option("--timeline", "timeline_path", type=str, help="Write the spans as JSON Lines.")
@click.option("--plot", "plot_path", type=str, help="Draw the timeline (PNG or SVG).")
@click.option("--trace", "trace_path", type=str, help="Write a trace for Perfetto (ui.perfetto.dev).")
def simulate(
    scenario: str,
    overrides: tuple[str, ...],
    json_output: bool,
    timeline_path: str | None,
    plot_path: str | None,
    trace_path: str | None,
) -> int:
    """How long is an iteration: seconds per stage in verl's names, throughput, peak memory."""
    from . import timeline as timelines
    from .render import print_fit_reason, print_simulation, simulation_json
    from .simulate import prepare
    from .simulate import simulate as run
    from .spec.loader import load_scenario

    _writable(timeline_path, trace_path)
    _drawable(plot_path)
    setup = prepare(load_scenario(scenario, overrides))
    fit = setup.fit()
    _note(setup.notes)
    if not fit.fits:
        if json_output:
            _print_json(simulation_json(setup, fit, None))
        else:
            print_fit_reason(fit)
        return FITS_NOT
    timeline = run(setup)
    if timeline_path:
        timelines.write(timeline, timeline_path)
    if plot_path:
        from .plot import gantt

        gantt({setup.label: timeline}, plot_path)
    if trace_path:
        from .trace import write_trace

        write_trace({setup.label: timeline}, trace_path)
    if json_output:
        _print_json(simulation_json(setup, fit, timeline))
    else:
        print_simulation(setup, fit, timeline)
    return 0


@scenario_command("compare")
@as_json
@click.option("--baseline", type=str, help="The row that the others are measured against.")
@click.option(
    "--as-given", is_flag=True, help="Take micro-batches, TP and split as written instead of tuning each row."
)
@click.option("--out", "out", type=str, help="Folder for a speedup figure and a timeline figure.")
def compare(
    scenario: str, overrides: tuple[str, ...], json_output: bool, baseline: str | None, as_given: bool, out: str | None
) -> int:
    """Which placement is fastest: one row per strategy, speedup over a named baseline, what binds each, and why."""
    from .compare import compare as run
    from .compare import rows_of
    from .render import comparison_json, print_comparison, progress

    folder = _folder(out)
    rows, default_baseline = rows_of(scenario, overrides)
    _note(doubt for row in rows.values() for doubt in row.cluster.doubts)
    with progress(len(rows)) as advance:
        comparison = run(rows, baseline or default_baseline, tune=not as_given, progress=advance)
    if folder:
        _draw_comparison(comparison, folder)
    if json_output:
        _print_json(comparison_json(comparison))
    else:
        print_comparison(comparison)
    return 0 if comparison.winner else FITS_NOT


@scenario_command("sweep")
@click.option(
    "--out",
    "out",
    type=str,
    default="results.csv",
    show_default=True,
    help="The table (CSV), written as it goes; an existing one is continued.",
)
@click.option("--strategies", is_flag=True, help="Run every row of `compare` at every point.")
@click.option("--baseline", type=str, help="The row that speedups are measured against.")
@click.option("--as-given", is_flag=True, help="Do not tune each row.")
@click.option("--zip", "zipped", is_flag=True, help="Pair the swept lists instead of taking their product.")
@click.option("--plot", "plot_path", type=str, help="Draw speedup curves (PNG or SVG; its CSV is written beside it).")
@click.option("--x", type=str, help="Column on the horizontal axis; default: GPUs, else the first swept one.")
@click.option("--measured", type=str, help="CSV with measured points to draw.")
@click.option("--jobs", type=click.IntRange(min=1), help="Worker processes; default: all cores.")
def sweep(scenario: str, overrides: tuple[str, ...], **options: Any) -> int:
    """A table over swept values (a=1,2,4 sweeps, a=[0,1] is one value), and speedup curves."""
    from .sweep import main

    return main(scenario, overrides, **options)


@cli.command("trace")
@click.argument("timelines", nargs=-1, required=True)
@click.option("-o", "--out", type=str, default="trace.json", show_default=True)
def trace(timelines: tuple[str, ...], out: str) -> None:
    """Timeline files (from simulate --timeline, or a real run) side by side as one Perfetto / Chrome trace."""
    from . import timeline as reader
    from .trace import write_trace

    _writable(out)
    write_trace({name: reader.read(path) for name, path in _named(timelines).items()}, out)
    click.echo(f"{out}: open it at https://ui.perfetto.dev", err=True)


@cli.command("plot")
@click.argument("timelines", nargs=-1, required=True)
@click.option("-o", "--out", type=str, default="timeline.png", show_default=True)
@click.option("--iteration", type=click.IntRange(min=0), help="Show this one only, each timeline's from 0 s on.")
def plot(timelines: tuple[str, ...], out: str, iteration: int | None) -> None:
    """Timeline files, simulated and real ones, one above the other on one time axis (PNG or SVG)."""
    from . import timeline as reader
    from .plot import gantt

    _drawable(out)
    gantt({name: reader.read(path) for name, path in _named(timelines).items()}, out, iteration=iteration)


@cli.command("validate")
@click.argument("paths", nargs=-1, required=True)
@click.option("--gpu", type=str, help="The GPU of a file that names none, or a cluster's file; see `show gpus`.")
@click.option("--scenario", type=str, help="What ran, for a training log whose options do not say all of it.")
@click.option(
    "--tolerance", type=click.FloatRange(0, 100, min_open=True), help="Largest error of these files that passes."
)
@as_json
def validate(
    paths: tuple[str, ...], gpu: str | None, scenario: str | None, tolerance: float | None, json_output: bool
) -> None:
    """Predicted against measured: recorded runs (*.case.yaml) and published cases (*.cases.yaml), files or folders, and
    files of other projects as they are: docs/formats.md lists them.

    Exit code 1 where a prediction is beyond its tolerance, or a run that there was is said not to fit.
    """
    from .checks import check
    from .render import progress
    from .render_checks import print_checks
    from .validate import find_cases

    files = find_cases(paths)
    with progress(len(files)) as advance:
        found = check(files, gpu=gpu, scenario=scenario, tolerance=tolerance, progress=advance)
    if json_output:
        _print_json(found.as_json())
    else:
        print_checks(found)
    sys.exit(FAILED if found.failed else 0)


@cli.command("calibrate")
@click.argument("measurements", nargs=-1, required=True)
@click.option("--name", help="What the machine is called.")
@click.option("--out", required=True, help="The cluster file (.yaml); its kernel curves are written beside it.")
@click.option("--gpu", type=str, help="For tables of other projects: the GPU whose spec is started from.")
@click.option("--force", is_flag=True, help="Overwrite files of an earlier calibration.")
@as_json
def calibrate(
    measurements: tuple[str, ...], name: str | None, out: str, gpu: str | None, force: bool, json_output: bool
) -> None:
    """A hardware spec of this machine from files of real.microbench (.json), and from real runs, each a timeline
    (.jsonl) followed by its scenario (.yaml); or from operator and collective tables and served runs of other projects
    (docs/formats.md). From a training log: its workload, for a scenario."""
    from .calibrate import write
    from .calibrate_tables import calibrate_any, write_workload
    from .render import print_calibration

    _writable(out)
    found = calibrate_any(measurements, name=name, gpu=gpu)
    if isinstance(found, dict):
        write_workload(found, out, force=force)
        _print_json(found)
        return
    found = write(found, out, force=force)
    if json_output:
        _print_json(found.as_json())
    else:
        print_calibration(found)


@cli.command("show")
@click.argument("what", type=str, required=False)
@click.argument("overrides", nargs=-1)
@as_json
def show(what: str | None, overrides: tuple[str, ...], json_output: bool) -> None:
    """What there is: show models, gpus, nodes, clusters, strategies, algorithms, fields; or, for a scenario file, where
    each of its numbers comes from."""
    from .show import shown

    listing = shown(what, overrides)
    if json_output:
        _print_json(listing)
    elif isinstance(listing, dict):
        click.echo("\n\n".join(f"{name}: {text}" for name, text in listing.items()))
    elif listing and isinstance(listing[0], dict):
        from .render import print_sources

        print_sources(listing)
    else:
        click.echo("\n".join(listing))


def main(argv: list[str] | None = None) -> None:
    """Entry point: what a user got wrong is one message and exit code 2, never a traceback."""
    from .errors import DoesNotFit, InputError

    try:
        cli.main(args=argv, standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except DoesNotFit as error:
        _fail(str(error), FITS_NOT)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


# -- helpers ------------------------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> None:
    click.echo(f"rlhfsim: {message}", err=True)
    sys.exit(code)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def _note(notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        click.echo(f"note: {note}", err=True)


def _writable(*paths: str | None) -> None:
    from .output import check_writable

    check_writable(*paths)


def _drawable(path: str | None) -> None:
    """`_writable`, for a figure."""
    from .errors import InputError

    if path and Path(path).suffix.lower() not in (".png", ".svg"):
        raise InputError(f"figures are .png or .svg files, not {Path(path).suffix!r}", where=path)
    _writable(path)


def _named(paths: tuple[str, ...]) -> dict[str, str]:
    """Files by their stems, or by their whole paths where stems are equal."""
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}


def _folder(path: str | None) -> Path | None:
    from .errors import InputError

    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made a folder: {error.strerror}", where=path) from None
    _writable(str(Path(path) / "file"))
    return Path(path)


def _draw_comparison(comparison: Comparison, folder: Path) -> None:
    from .plot import gantt, speedup_bars
    from .render import comparison_table, comparison_title

    drawn = []
    if table := comparison_table(comparison):
        drawn.append(folder / "speedup.png")
        speedup_bars(table, comparison.baseline, drawn[-1], title=comparison_title(comparison))
    timed = {row.label: row.timeline for row in comparison.rows if row.timeline is not None}
    if timed:  # the second iteration: the first also fills the pipeline
        drawn.append(folder / "timeline.png")
        gantt(timed, drawn[-1], iteration=1)
    if drawn:
        click.echo(", ".join(map(str, drawn)), err=True)


if __name__ == "__main__":
    main()
