"""Published measurements, predicted: one file per source, with a base scenario and the cases that change it.

    framework: verl
    source: {title: ..., url: ..., location: table or file, date: 2025-06-18}
    assumptions: [what the source does not say of any case, and what is taken instead]
    scenario: {...}                     # inline, the usual fields
    tolerance:                          # by group; every group of the file is named
      verl/qwen2-7b/h20: {step_seconds: 0.3, stages: 0.3}
    cases:
      - id: verl-grpo-qwen2-7b
        quality: A                      # A full configuration and phases, B a key item missing, C partial
        role: prediction                # or calibration
        group: verl/qwen2-7b/h20        # framework, model, hardware
        overrides: {generation.tensor_parallel: 2, workload.response_tokens.sigma: {low: 0.5, high: 1.0}}
        measured:
          step_seconds: 165.3
          gen: {value: 41.3, stages: [update_weights, gen]}
          training: {value: 209, stages: [update_actor, update_critic], formula: "1024 samples / 4.9 samples a second"}
        assumptions: [the same of this case]

`{low, high}` in place of a value, here or in the base scenario, is an unknown: the case is simulated at both ends (with
several unknowns at every combination), and the prediction is an interval with the geometric mean of its ends in the
middle. A measured quantity is `step_seconds`, a stage, or the wall time in which at least one of `stages` runs.
`unscored` says why a case is simulated and shown, but not counted (a source that contradicts itself); `inexpressible`
says what no scenario can express yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from . import metrics
from .errors import DoesNotFit, InputError, NeverValid, nearest
from .simulate import prepare, simulate
from .spec.base import Record
from .spec.framework import Framework
from .spec.loader import scenario_from_dict
from .spec.overrides import apply_override
from .spec.problems import place_of
from .spec.problems import validate as validated
from .spec.scenario import Scenario
from .spec.yaml_file import Document, read_yaml
from .timeline import Timeline
from .uncertainty import phase_of, residual_of, widened
from .validate import STEP, Gap, Measured, Result, Tolerance, check_role, run_case

MAX_UNKNOWNS = 4  # of a case: each doubles what is simulated
ENDS = ("low", "high")

Text = Annotated[str, Field(min_length=1)]


class Source(Record):
    """Where the numbers were read. location: table, figure or file; date: of the document, or its commit (@...)."""

    title: Text
    url: Text
    location: str = ""
    date: str = ""


class PublishedValue(Measured):
    """A measured time in seconds.

    stages: what runs in it, in our names; absent: the stage of the quantity's own name. formula: how seconds came of
    what was published.
    """

    stages: list[Text] = Field(default_factory=list)
    formula: str = ""


class PublishedCase(Record):
    """One run: how it differs from the file's scenario, and what was measured (see the module's text)."""

    id: Text
    quality: Literal["A", "B", "C"]
    role: Literal["prediction", "calibration"]
    group: Text
    location: str = ""
    overrides: dict[str, Any] = Field(default_factory=dict)
    measured: dict[str, PublishedValue] = Field(min_length=1)
    assumptions: list[Text] = Field(default_factory=list)
    note: str = ""
    unscored: str = ""
    inexpressible: str = ""

    @model_validator(mode="after")
    def _step_is_whole(self) -> PublishedCase:
        if STEP in self.measured and self.measured[STEP].stages:
            raise ValueError(f"measured.{STEP} is a whole iteration; a part of it needs a name of its own")
        return self


class CaseFile(Record):
    """The cases of one source. assumptions: those that all of them share."""

    framework: Text
    source: Source
    assumptions: list[Text] = Field(default_factory=list)
    scenario: dict[str, Any]
    tolerance: dict[str, Tolerance]
    cases: list[PublishedCase] = Field(min_length=1)


def run_file(path: Path) -> tuple[list[Result], list[Gap]]:
    """What a file of recorded or published measurements holds, predicted, and what could not be.

    Raises InputError for a broken file.
    """
    document = read_yaml(path)
    if "cases" not in document.data:
        return run_case(path), []
    file = cases_of(document)
    results, gaps = list[Result](), list[Gap]()
    for number, case in enumerate(file.cases):
        found, gap = _run(file, case, document, number, path)
        results += found
        if gap:
            gaps.append(Gap(case.id, _role(case), case.group, *gap, file.framework))
    return results, gaps


def cases_of(document: Document) -> CaseFile:
    """The checked file. Raises InputError that names place, field, value and what is allowed."""
    file, where = validated(CaseFile, document.data, document.where), document.where
    numbers: dict[str, int] = {}
    for number, case in enumerate(file.cases):
        field = f"cases.{number}.{{}}"
        if (first := numbers.setdefault(case.id, number)) != number:
            message = f"is {case.id!r}, as that of case {first}; every case has its own"
            raise InputError(message, field=field.format("id"), where=place_of(where, field.format("id")))
        if case.group not in file.tolerance:
            message = f"is {case.group!r}, for which the file states no tolerance{nearest(case.group, file.tolerance)}"
            raise InputError(message, field=field.format("group"), where=place_of(where, field.format("group")))
    return file


def scenarios_of(case: PublishedCase, document: Document, number: int) -> Iterator[Scenario]:
    """The scenario of case `number` at every combination of the ends of what is unknown.

    Raises InputError for what is no scenario.
    """
    data = deepcopy(document.data["scenario"])
    own = "scenario."
    where = {field.removeprefix(own): place for field, place in document.where.items() if field.startswith(own)}
    for key, value in case.overrides.items():
        place = place_of(document.where, f"cases.{number}.overrides.{key}")
        apply_override(data, where, key, deepcopy(value), place)
    unknowns = list(_unknowns(data))
    if len(unknowns) > MAX_UNKNOWNS:
        names = ", ".join(".".join(path) for path in unknowns)
        raise NeverValid(
            f"has {len(unknowns)} unknowns ({names}); at most {MAX_UNKNOWNS} are simulated",
            field=f"cases.{number}",
            where=place_of(document.where, f"cases.{number}"),
        )
    for ends in product(ENDS, repeat=len(unknowns)):
        corner = {"name": case.id} | deepcopy(data)
        for (*parents, last), end in zip(unknowns, ends, strict=True):
            target = corner
            for name in parents:
                target = target[name]
            target[last] = target[last][end]
        yield scenario_from_dict(corner, document.folder, where)


def _unknowns(data: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where in plain data `{low, high}` stands."""
    for key, value in data.items():
        if isinstance(value, dict):
            if set(value) == set(ENDS):
                yield (*at, key)
            else:
                yield from _unknowns(value, (*at, key))


def predicted(file: CaseFile, case: PublishedCase, document: Document, number: int, path: Path) -> list[Result]:
    """The quantities of one case, with intervals of its unknown inputs alone; none of one that cannot be predicted."""
    return _run(file, case, document, number, path, widen=False)[0]


def _run(
    file: CaseFile, case: PublishedCase, document: Document, number: int, path: Path, *, widen: bool = True
) -> tuple[list[Result], tuple[str, str] | None]:
    """The quantities of one case, and what is wrong with its prediction: (kind, reason)."""
    if case.inexpressible:
        return [], ("inexpressible", case.inexpressible)
    seconds: dict[str, list[list[float]]] = {quantity: [] for quantity in case.measured}
    reasons = []
    try:
        for scenario in scenarios_of(case, document, number):
            check_role(_role(case), scenario, [path])
            _check_profile(case, scenario, place_of(document.where, f"cases.{number}.role"), number)
            setup = prepare(scenario)
            reasons.append(setup.fit().reason)
            seeds = range(scenario.simulation.seed, scenario.simulation.seed + scenario.simulation.draws)
            runs = [simulate(setup, seed=seed) for seed in seeds]
            for quantity, value in case.measured.items():
                place = place_of(document.where, f"cases.{number}.measured.{quantity}")
                seconds[quantity].append([seconds_of(run, quantity, value.stages, place) for run in runs])
    except DoesNotFit as error:
        return [], ("does not fit", str(error))
    except InputError as error:
        if isinstance(error, NeverValid) or error.field.startswith(("cases.", "role")) or "unknown key" in str(error):
            raise
        return [], ("refused", str(error))
    profile = scenario.framework if widen else None
    results = [_result(file, case, quantity, corners, profile) for quantity, corners in seconds.items()]
    return results, ("does not fit", reasons[0]) if all(reasons) else None


def _check_profile(case: PublishedCase, scenario: Scenario, place: str, number: int) -> None:
    """Raises InputError for a prediction of what the framework's profile was fitted on."""
    profile = scenario.framework
    if profile and case.role == "prediction" and case.group in profile.fitted_on:
        message = f"is 'prediction', but the profile {profile.name} was fitted on the group {case.group}"
        raise InputError(message, field=f"cases.{number}.role", where=place)


def seconds_of(run: Timeline, quantity: str, stages: list[str], place: str = "") -> float:
    """Of an iteration, or wall seconds in which one of the stages (absent: the one of that name) runs.

    Raises InputError for a stage that the run does not have.
    """
    if quantity == STEP:
        return metrics.step_seconds(run)
    there = list(dict.fromkeys(metrics.base_stage(span.firing.stage) for span in run.spans))
    wanted = set(stages or [quantity])
    if missing := sorted(wanted - set(there)):
        message = f"names the stage {missing[0]!r}, which the simulation does not have{nearest(missing[0], there)}"
        raise NeverValid(message, field=f"measured.{quantity}", where=place)
    iterations = metrics.measured_iterations(run)
    chosen = [s for s in run.spans if metrics.base_stage(s.firing.stage) in wanted and s.firing.iteration in iterations]
    total = sum(
        metrics.union_seconds((s.start_seconds, s.end_seconds) for s in chosen if s.firing.iteration == i)
        for i in iterations
    )
    return total / len(iterations)


def _result(
    file: CaseFile, case: PublishedCase, quantity: str, corners: list[list[float]], profile: Framework | None
) -> Result:
    value, tolerance = case.measured[quantity], file.tolerance[case.group]
    phase = phase_of(quantity, value.stages)
    medians = [float(np.median(draws)) for draws in corners]
    residual = residual_of(profile, phase)
    sure = len(corners) == 1 and len(corners[0]) == 1 and residual is None
    inputs = min(np.quantile(draws, 0.05) for draws in corners), max(np.quantile(draws, 0.95) for draws in corners)
    low, high = widened(float(inputs[0]), float(inputs[1]), residual)
    return Result(
        id=case.id,
        quantity=quantity,
        predicted=sqrt(min(medians) * max(medians)),
        measured=value.value,
        role=_role(case),
        group=case.group,
        spread=value.spread,
        tolerance=tolerance.step_seconds if quantity == STEP else tolerance.stages,
        low=None if sure else low,
        high=None if sure else high,
        framework=file.framework,
        quality=case.quality,
        phase=phase,
    )


def _role(case: PublishedCase) -> str:
    return "unscored" if case.unscored else case.role
