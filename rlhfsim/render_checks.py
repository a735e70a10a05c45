"""What `rlhfsim validate` found, as people read it; in JSON it is `Checks.as_json`."""

from __future__ import annotations

from itertools import groupby

from rich.table import Table

from .checks import Checks
from .format import three
from .kernel_errors import OperatorError
from .render import console, print_validation
from .training_log import LogReport


def print_checks(found: Checks) -> None:
    """Tables of kernels, then whole runs."""
    if found.operators:
        _print_operators(found.operators)
    for log in found.logs:
        _print_log(log)
    if found.results or found.gaps or not (found.operators or found.logs):
        print_validation(found.results, found.summary)


def _print_operators(errors: list[OperatorError]) -> None:
    """One line an operator: errors over its rows, and the line of the worst one."""
    out = console()
    for (file, gpu), group in groupby(errors, key=lambda e: (e.file, e.gpu)):
        own = list(group)
        table = Table(box=None, pad_edge=False, title=f"{file} on {gpu}", title_justify="left")
        table.add_column("operator", overflow="fold")
        for name in ("rows", "mean error", "median", "weighted", "bias", "worst", "at line", "tolerance"):
            table.add_column(name, justify="right")
        table.add_column("")
        for e in own:
            table.add_row(
                e.operator,
                str(e.rows),
                f"{e.mean_error:.1%}",
                f"{e.median_error:.1%}",
                f"{e.weighted_error:.1%}",
                f"{e.bias:+.1%}",
                f"{e.worst_error:+.1%}",
                str(e.worst_at or ""),
                f"{e.tolerance:.0%}",
                "ok" if e.ok else "TOO FAR",
            )
        out.print(table)
        if not all(e.measured for e in own):
            out.print("Some of these curves were not measured on this architecture: `rlhfsim show kernels`.")


def _print_log(log: LogReport) -> None:
    """Medians after the first step and the noise of each timer, then lengths and notes."""
    out = console()
    table = Table(box=None, pad_edge=False, title=f"{log.file}: {log.steps} steps", title_justify="left")
    table.add_column("timer")
    table.add_column("stages", overflow="fold")
    for name in ("first s", "median s", "noise", "steps"):
        table.add_column(name, justify="right")
    for timer in log.timers:
        noise = "" if timer.noise is None else f"{timer.noise:.1%}"
        stages = ", ".join(timer.stages)
        table.add_row(timer.name, stages, three(timer.first), three(timer.median), noise, str(timer.steps))
    out.print(table)
    for side, lengths in log.workload.items():
        out.print(f"workload.{side}: {lengths}")
    for note in log.notes:
        out.print(f"note: {note}")
