"""`rlhfsim validate`: every file, whatever its format, predicted; what was found, and what failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import run_records, serving, training_log
from .errors import InputError
from .formats import format_of
from .kernel_errors import TOLERANCE, OperatorError, operator_errors
from .measurements import Log, Measurements, Records, Served, Tables, cluster_of, device_of, gpu_named
from .published import run_file
from .training_log import LogReport, report, results_of, scenario_of
from .validate import Gap, Result, summary


@dataclass
class Checks:
    """results, gaps: of whole runs; operators: of tables of kernels; logs: what training logs say themselves."""

    results: list[Result] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    operators: list[OperatorError] = field(default_factory=list)
    logs: list[LogReport] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        return summary(self.results, self.gaps)

    @property
    def failed(self) -> list[str]:
        return [*self.summary["failed"], *(f"{e.file}: {e.operator}" for e in self.operators if not e.ok)]

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"cases": [r.as_json() for r in self.results], "summary": self.summary}
        if self.operators:
            found["operators"] = [e.as_json() for e in self.operators]
        if self.logs:
            found["logs"] = [log.as_json() for log in self.logs]
        return found


def check(
    files: Sequence[Path],
    *,
    gpu: str | None = None,
    scenario: str | None = None,
    tolerance: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Checks:
    """Raises InputError for a broken file, and for an option that no file needs."""
    found = Checks()
    used: set[str] = set()
    for file in files:
        progress(file.name)
        module = format_of(file)
        if module is None:
            results, gaps = run_file(file)
            found.results += results
            found.gaps += gaps
            continue
        measured: Measurements = module.read(file)
        if isinstance(measured, Tables):
            used |= {"--gpu", "--tolerance"}
            cluster = cluster_of(the_gpu(measured, gpu))
            found.operators += operator_errors(measured, cluster, tolerance or TOLERANCE)
        elif isinstance(measured, Records):
            used |= {"--gpu", "--tolerance"}
            if gpu is not None:
                the_gpu(measured, gpu)
            results, gaps = run_records.results_of(measured, gpu, tolerance)
            found.results += results
            found.gaps += gaps
        elif isinstance(measured, Served):
            used |= {"--gpu", "--tolerance"}
            cluster = cluster_of(the_gpu(measured, gpu))
            found.results += serving.results_of(measured, cluster, tolerance or serving.TOLERANCE)
        elif isinstance(measured, Log):
            used |= {"--gpu", "--scenario", "--tolerance"}
            log = report(measured)
            found.logs.append(log)
            if gpu is None and scenario is None:
                log.notes.append("nothing is predicted without --gpu NAME or --scenario FILE")
                continue
            what_ran = scenario_of(measured, log, gpu, scenario)
            results, gaps = results_of(measured, log, what_ran, tolerance or training_log.TOLERANCE)
            found.results += results
            found.gaps += gaps
    for option, given in (("--gpu", gpu), ("--scenario", scenario), ("--tolerance", tolerance)):
        if given is not None and option not in used:
            raise InputError("has no meaning for these files", field=option)
    return found


def the_gpu(found: Measurements, given: str | None) -> str:
    """The one given, or that the file names. Raises InputError for none, several, or another than the one given."""
    named = device_of(found)
    if given is None:
        if not named:
            raise InputError("the file does not name its GPU: --gpu NAME (`rlhfsim show gpus`)", where=str(found.path))
        if len(named) > 1:
            raise InputError(
                f"holds measurements of {', '.join(sorted(named))}, but one GPU at a time is wanted",
                field="gpu",
                where=str(found.path),
            )
        return named.pop()
    if "/" not in given and not given.endswith((".yaml", ".yml")):
        name = gpu_named(given, "--gpu")
        if named and name not in named:
            raise InputError(
                f"is {name}, but the file says {', '.join(sorted(named))}", field="--gpu", where=str(found.path)
            )
    return given
