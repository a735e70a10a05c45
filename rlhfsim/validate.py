"""Predicted against measured, case by case: what is off, by how much, and whether that was within the tolerance.

A case is a YAML file:

    id: quickstart-2-ranks
    role: prediction            # or calibration: what something was fitted on is never counted as a prediction
    group: real_cpu/loopback    # cases that may be ranked against each other
    scenario: {...}             # inline, or the path of a scenario file
    overrides: {...}            # optional, dotted keys
    timeline: run.jsonl         # a measured timeline, and / or
    measured: {step_seconds: 12.3, gen: {value: 4.5, low: 4.3, high: 4.8}}
    tolerance: {step_seconds: 0.1, stages: 0.1}
    source: where the measurement is from

Quantities are `step_seconds` and stages in verl's names. Files of many published cases are read by `published`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from . import metrics, timeline
from .errors import InputError
from .metrics import STEP as STEP
from .order import violations
from .simulate import Setup, prepare, simulate
from .spec.base import Record
from .spec.loader import load_scenario, scenario_from_dict
from .spec.problems import validate as validated
from .spec.scenario import Scenario
from .spec.yaml_file import read_yaml
from .uncertainty import share_limits

Positive = Annotated[float, Field(gt=0, le=1e12)]

PATTERNS = ("*.case.yaml", "*.cases.yaml")  # one recorded run; the published ones of a source


class Measured(Record):
    """A measured value in seconds and, where the measurement was repeated, its spread."""

    value: Positive
    low: Positive | None = None
    high: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, (int, float)) and not isinstance(data, bool) else data

    @model_validator(mode="after")
    def _ordered(self) -> Measured:
        if not (self.low or self.value) <= self.value <= (self.high or self.value):
            raise ValueError(f"low {self.low}, value {self.value}, high {self.high} are not in order")
        return self

    @property
    def spread(self) -> float:
        """Half the measured range over the value: errors below it say nothing."""
        return ((self.high or self.value) - (self.low or self.value)) / 2 / self.value


class Tolerance(Record):
    """Largest allowed |predicted / measured - 1|."""

    step_seconds: Annotated[float, Field(gt=0, le=100)] = 0.1
    stages: Annotated[float, Field(gt=0, le=100)] = 0.1


class Case(Record):
    """One measured run and the scenario that describes it (see the module's text)."""

    id: str
    role: Literal["prediction", "calibration"]
    group: str = ""
    scenario: dict[str, Any] | str
    overrides: dict[str, Any] = Field(default_factory=dict)
    timeline: str | None = None
    measured: dict[str, Measured] = Field(default_factory=dict)
    tolerance: Tolerance = Tolerance()
    source: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _has_a_measurement(self) -> Case:
        if self.timeline is None and not self.measured:
            raise ValueError("a case needs a timeline or measured values")
        return self


@dataclass(frozen=True)
class Result:
    """One quantity of one case. excess_seconds: measured minus predicted, what the model does not explain.

    role: prediction, calibration, or unscored. framework, quality, phase: of a published case.
    """

    id: str
    quantity: str
    predicted: float
    measured: float
    role: str
    group: str
    spread: float
    tolerance: float
    low: float | None = None
    high: float | None = None
    framework: str = ""
    quality: str = ""
    phase: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def excess_seconds(self) -> float:
        return self.measured - self.predicted

    @property
    def ok(self) -> bool:
        """Within the tolerance beyond the measurement's own spread; only predictions can fail."""
        return self.role != "prediction" or abs(self.error) <= self.tolerance + self.spread

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "quantity": self.quantity,
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
            "excess_seconds": self.excess_seconds,
            "role": self.role,
            "group": self.group,
            "spread": self.spread,
            "low": self.low,
            "high": self.high,
            "tolerance": self.tolerance,
            "ok": self.ok,
        } | {name: value for name in ("framework", "quality", "phase") if (value := getattr(self, name))}


@dataclass(frozen=True)
class Gap:
    """What is wrong with the prediction of a case as a whole.

    kind: `refused` (the simulator does not take the scenario), `does not fit` (it says so of a run that there was), or
    `inexpressible` (no scenario says it yet, which is no wrong prediction).
    """

    id: str
    role: str
    group: str
    kind: str
    reason: str
    framework: str = ""

    @property
    def ok(self) -> bool:
        return self.role != "prediction" or self.kind == "inexpressible"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def is_run(folder: Path) -> bool:
    """Whether a folder is one measurement (a served run) and not a collection of case files."""
    return (folder / "requests.jsonl").exists()


def find_cases(paths: Iterable[str | Path]) -> list[Path]:
    """Case files among paths: files as they are, folders searched for PATTERNS. Raises InputError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir() and not is_run(path):
            found += sorted(file for pattern in PATTERNS for file in path.rglob(pattern))
        elif path.exists():
            found.append(path)
        else:
            raise InputError("does not exist", where=str(path))
    if not found:
        raise InputError(f"there are no case files ({', '.join(PATTERNS)})", where=", ".join(map(str, paths)))
    return found


def run_case(path: Path) -> list[Result]:
    """Predict one case and set it beside its measurement. Raises InputError for a broken case or a wrong role."""
    document = read_yaml(path)
    case = validated(Case, document.data, document.where)
    scenario = _scenario(case, path.parent)
    setup = prepare(scenario)
    measured = _measured(case, setup, path)
    check_role(case.role, scenario, [path] + ([path.parent / case.timeline] if case.timeline else []))
    draws = [simulate(setup, seed=scenario.simulation.seed + k) for k in range(scenario.simulation.draws)]
    predictions = [_quantities(t) for t in draws]
    results = []
    for quantity, value in measured.items():
        values = [p[quantity] for p in predictions if quantity in p]
        if not values:
            raise InputError(
                f"the simulation has no {quantity!r} (it has {', '.join(predictions[0])})",
                where=str(path),
                field=f"measured.{quantity}",
            )
        tolerance = case.tolerance.step_seconds if quantity == STEP else case.tolerance.stages
        interval = (
            (float(np.quantile(values, 0.05)), float(np.quantile(values, 0.95))) if len(values) > 1 else (None, None)
        )
        results.append(
            Result(
                case.id,
                quantity,
                float(np.median(values)),
                value.value,
                case.role,
                case.group,
                value.spread,
                tolerance,
                *interval,
            )
        )
    return results


def _scenario(case: Case, folder: Path) -> Scenario:
    if isinstance(case.scenario, str):
        return load_scenario(folder / case.scenario, case.overrides)
    data = dict(case.scenario)
    if case.overrides:
        raise InputError("go with a scenario file; write them into the inline scenario", field="overrides")
    return scenario_from_dict(data, folder)


def _measured(case: Case, setup: Setup, path: Path) -> dict[str, Measured]:
    """From the timeline (medians over iterations, with their range), overridden by what the case states.

    Raises InputError for a timeline that did not keep the order of the scenario's graph: it measured something else.
    """
    found: dict[str, Measured] = {}
    if case.timeline is not None:
        run = timeline.read(path.parent / case.timeline)
        if wrong := violations(setup.graph, run):
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise InputError(
                f"{case.timeline} breaks the order of the scenario's graph: {wrong[0]}{more}",
                field="timeline",
                where=str(path),
            )
        intervals = metrics.step_intervals(run)
        found[STEP] = Measured(value=metrics.step_seconds(run), low=min(intervals), high=max(intervals))
        found |= {
            stage: Measured(value=seconds) for stage, seconds in metrics.stage_seconds(run).items() if seconds > 0
        }
    return found | case.measured


def _quantities(run: timeline.Timeline) -> dict[str, float]:
    return {STEP: metrics.step_seconds(run), **metrics.stage_seconds(run)}


def digest(path: Path) -> str:
    """What a calibrated spec remembers of a file that it was fitted on."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_role(role: str, scenario: Scenario, files: list[Path]) -> None:
    """A spec remembers what it was fitted on: raises InputError where that is called a prediction."""
    fitted_on = {used for part in scenario.cluster.all_parts for used in part.gpu.fitted_on}
    if role == "prediction" and fitted_on and (used := [f.name for f in files if digest(f) in fitted_on]):
        raise InputError(
            f"is 'prediction', but {scenario.cluster.name} was fitted on {', '.join(used)}",
            field="role",
            where=str(files[0]),
        )


def summary(results: list[Result], gaps: Iterable[Gap] = ()) -> dict[str, Any]:
    """Over predictions only: errors of iterations and of stages, ranking of comparable pairs, coverage of intervals."""
    gaps = list(gaps)
    predictions = [r for r in results if r.role == "prediction"]
    steps = [r for r in predictions if r.quantity == STEP] or predictions
    errors = np.array([r.error for r in steps])
    with_interval = [r for r in predictions if r.low is not None and r.high is not None]
    worst = max(steps, key=lambda r: abs(r.error), default=None)
    return {
        "predictions": len(steps),
        "groups": len({r.group for r in steps}),
        "mean_abs_error": float(np.abs(errors).mean()) if len(errors) else None,
        "bias": float(errors.mean()) if len(errors) else None,
        "worst": {"id": worst.id, "quantity": worst.quantity, "error": worst.error} if worst else None,
        "ranking": _share(_ranking(steps)),
        "coverage": _share([bool(r.low <= r.measured <= r.high) for r in with_interval]),  # type: ignore[operator]
        "interval_factor": float(np.median([sqrt(r.high / r.low) for r in with_interval])) if with_interval else None,  # type: ignore[operator]
        "failed": [f"{r.id}: {r.quantity}" for r in results if not r.ok]
        + [f"{gap.id}: {gap.kind}" for gap in gaps if not gap.ok],
        "frameworks": _by_framework(predictions),
        "gaps": [gap.as_json() for gap in gaps],
    }


def _by_framework(predictions: list[Result]) -> list[dict[str, Any]]:
    """Errors of published cases, by framework and phase."""
    cells: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in predictions:
        if r.framework:
            cells[r.framework, r.phase].append(r)
    return [{"framework": name, "phase": phase} | _errors(cell) for (name, phase), cell in sorted(cells.items())]


def _errors(cell: list[Result]) -> dict[str, Any]:
    errors = np.array([r.error for r in cell])
    worst = cell[int(np.abs(errors).argmax())]
    return {
        "count": len(cell),
        "mean_abs_error": float(np.abs(errors).mean()),
        "median_abs_error": float(np.median(np.abs(errors))),
        "bias": float(errors.mean()),
        "worst": {"id": worst.id, "quantity": worst.quantity, "error": worst.error},
    }


def _share(found: list[bool]) -> dict[str, Any] | None:
    """Of those that are right, with its 90 % limits."""
    if not found:
        return None
    low, high = share_limits(sum(found), len(found))
    return {"share": sum(found) / len(found), "low": low, "high": high, "count": len(found)}


def _ranking(steps: list[Result]) -> list[bool]:
    """Whether each pair of one group, measured further apart than their spread, is predicted in the right order."""
    by_group: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in steps:
        by_group[r.group, r.quantity].append(r)
    right = []
    for members in by_group.values():
        for a, b in combinations(members, 2):
            if abs(a.measured - b.measured) > a.spread * a.measured + b.spread * b.measured:
                right.append((a.measured < b.measured) == (a.predicted < b.predicted))
    return right
