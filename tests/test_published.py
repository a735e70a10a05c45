"""Published case files: what they say is what is simulated, and a wrong file or a wrong number is seen."""

from __future__ import annotations

import importlib.util
import json
from copy import deepcopy
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_validate import CASE_KEYS

from rlhfsim.cli import cli
from rlhfsim.errors import InputError
from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.published import cases_of, phase_of, run_file
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import scenario_from_dict
from rlhfsim.spec.yaml_file import read_yaml
from rlhfsim.timeline import Timeline
from rlhfsim.validate import find_cases

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "traces" / "published"
FILES = sorted(FOLDER.rglob("*.cases.yaml"))

SCENARIO: dict[str, Any] = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 1},
    "models": {"actor": {"spec": "tiny-4x256"}},
    "workload": {"prompts": 64, "prompt_tokens": {"tokens": 32}, "response_tokens": {"tokens": 32}},
    "simulation": {"iterations": 2},
}
SCORES = ("old_log_prob", "ref", "reward", "values")


def run_of(**changes: Any) -> Timeline:
    data = deepcopy(SCENARIO)
    for key, value in changes.items():
        data["workload"][key] = value
    return simulate(prepare(scenario_from_dict(data)))


def case(**changes: Any) -> dict[str, Any]:
    found = {"id": "a", "quality": "B", "role": "prediction", "group": "g", "measured": {"step_seconds": 1.0}}
    return found | changes


def write(folder: Path, *cases: dict[str, Any], **changes: Any) -> Path:
    data = {
        "framework": "verl",
        "source": {"title": "t", "url": "u"},
        "scenario": SCENARIO,
        "tolerance": {"g": {"step_seconds": 0.1, "stages": 0.1}},
        "cases": list(cases) or [case()],
    }
    path = folder / "source.cases.yaml"
    path.write_text(json.dumps(data | changes))  # JSON is YAML
    return path


def validate(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(cli, ["validate", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_measured_values_by_construction(tmp_path: Path) -> None:
    """Stages run one after the other when co-located, so several of them last for the sum."""
    run = run_of()
    parts = stage_seconds(run)
    whole = {"value": sum(parts[s] for s in ("gen", *SCORES)), "stages": ["gen", *SCORES]}
    measured = {"step_seconds": step_seconds(run), "ref": parts["ref"], "experience": whole}
    path = write(tmp_path, case(measured=measured))
    results, gaps = run_file(path)
    assert not gaps
    assert [r.quantity for r in results] == ["step_seconds", "ref", "experience"]
    assert all(r.error == pytest.approx(0, abs=1e-9) and r.low is None for r in results)
    assert [r.phase for r in results] == ["step", "scoring", "generation"]
    code, found = validate(str(path))
    assert code == 0
    assert {(c["framework"], c["phase"], c["count"]) for c in found["summary"]["frameworks"]} == {
        ("verl", "step", 1), ("verl", "scoring", 1), ("verl", "generation", 1)
    }  # fmt: skip
    wrong = deepcopy(measured) | {"ref": 1.2 * parts["ref"]}
    code, found = validate(str(write(tmp_path, case(measured=wrong))))
    assert code == 1
    assert found["summary"]["failed"] == ["a: ref"]
    errors = {c["quantity"]: c["error"] for c in found["cases"]}
    assert errors["ref"] == pytest.approx(1 / 1.2 - 1)
    assert set(found["cases"][0]) >= CASE_KEYS


def test_overrides_and_unknowns(tmp_path: Path) -> None:
    """An unknown is simulated at both ends; the error is that of the middle, wherever the measurement lies."""
    ends = [step_seconds(run_of(prompts=n, response_tokens=tokens)) for n in (128, 256) for tokens in (16, 48)]
    over = {"workload.prompts": {"low": 128, "high": 256}, "workload.response_tokens.tokens": {"low": 16, "high": 48}}
    path = write(tmp_path, case(overrides=over, measured={"step_seconds": max(ends)}))
    ((result,), _) = run_file(path)
    assert (result.low, result.high) == (pytest.approx(min(ends)), pytest.approx(max(ends)))
    assert result.predicted == pytest.approx(sqrt(min(ends) * max(ends)))
    assert result.error == pytest.approx(sqrt(min(ends) / max(ends)) - 1)
    code, found = validate(str(path))
    assert (code, found["summary"]["coverage"]["share"]) == (1, 1.0)


def test_what_has_no_prediction_is_named(tmp_path: Path) -> None:
    """A run that there was fails where it is said not to fit, or is refused; what no scenario says does not."""
    cases = [
        case(id="fits not", overrides={"models.actor": {"spec": "llama-2-70b", "zero_stage": 0}}),
        case(id="refused", overrides={"models.actor.tensor_parallel": 3}),
        case(id="unsaid", inexpressible="linear attention", overrides={"models.actor.spec": "none such"}),
    ]
    path = write(tmp_path, *cases)
    code, found = validate(str(path))
    assert code == 1
    gaps = {gap["id"]: gap for gap in found["summary"]["gaps"]}
    assert {name: (gap["kind"], gap["ok"]) for name, gap in gaps.items()} == {
        "fits not": ("does not fit", False),
        "refused": ("refused", False),
        "unsaid": ("inexpressible", True),
    }
    assert "models.actor.tensor_parallel: is 3, but must divide the 4 heads" in gaps["refused"]["reason"]
    assert {"fits not: does not fit", "refused: refused"} <= set(found["summary"]["failed"])
    text = CliRunner().invoke(cli, ["validate", str(path)]).stdout
    assert "unsaid: inexpressible: linear attention" in text
    assert CliRunner().invoke(cli, ["validate", str(write(tmp_path, cases[2]))]).exit_code == 0


def test_unscored_and_calibration_cases_are_shown_and_not_counted(tmp_path: Path) -> None:
    cases = [case(unscored="sums to more than its step"), case(id="b", role="calibration")]
    code, found = validate(str(write(tmp_path, *cases)))
    assert code == 0
    assert [c["role"] for c in found["cases"]] == ["unscored", "calibration"]
    assert found["summary"]["mean_abs_error"] is None


def test_phases() -> None:
    assert phase_of("gen", ["update_weights", "gen"]) == "generation"
    assert phase_of("reshard", ["update_weights"]) == phase_of("update_weights", []) == "weight sync"
    assert phase_of("values", []) == "scoring"
    assert phase_of("training", ["update_critic", "update_actor"]) == "training"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": [case(role="guess")]}, r"cases\.0\.role: is 'guess', but must be one of prediction, calibration"),
        ({"cases": [case(quality="D")]}, r"cases\.0\.quality: is 'D', but must be one of A, B, C"),
        ({"cases": [case(group="h")]}, r"cases\.0\.group: is 'h', for which the file states no tolerance"),
        ({"cases": [case(), case()]}, r"cases\.1\.id: is 'a', as that of case 0"),
        ({"cases": []}, "cases"),
        ({"cases": [case(measured={})]}, r"cases\.0\.measured"),
        ({"cases": [case(measured={"step_seconds": -1})]}, r"measured\.step_seconds"),
        ({"cases": [case(measured={"step_seconds": {"value": 1, "stages": ["gen"]}})]}, "is a whole iteration"),
        ({"cases": [case(measured={"refs": 1})]}, r"measured\.refs: .*does not have \(did you mean 'ref'"),
        ({"cases": [case(measures={})]}, r"measures: unknown key \(did you mean 'measured'"),
        (
            {"cases": [case(overrides={"workload.promts": 3})]},
            r"workload\.promts: unknown key \(did you mean 'prompts'",
        ),
        ({"cases": [case(overrides={"workload.prompts": -3})]}, r"workload\.prompts: is -3, but must be at least 1"),
        (
            {"cases": [case(overrides={f"models.actor.{n}": {"low": 1, "high": 2} for n in "abcde"})]},
            r"has 5 unknowns .* at most 4",
        ),
        ({"tolerance": {"g": {"steps": 0.1}}}, r"tolerance\.g\.steps: unknown key"),
        ({"source": {"title": "t"}}, r"source\.url: is missing"),
    ],
)
def test_broken_files_are_clear_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as found:
        run_file(write(tmp_path, **changes))
    assert "source.cases.yaml:" in str(found.value)


def test_both_kinds_of_files_are_found(tmp_path: Path) -> None:
    one = tmp_path / "run.case.yaml"
    one.write_text(json.dumps({"id": "r", "role": "prediction", "scenario": SCENARIO, "measured": {"step_seconds": 1}}))
    many = write(tmp_path)
    assert set(find_cases([tmp_path])) == {one, many}
    assert [r.id for path in find_cases([tmp_path]) for r in run_file(path)[0]] == ["r", "a"]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((FOLDER / "results.json").read_text())


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(FOLDER)) for p in FILES])
def test_shipped_file(path: Path, committed: dict[str, Any], tmp_path: Path) -> None:
    """All cases are read; the fastest one is predicted as the committed table says, or says why not."""
    document = read_yaml(path)
    file = cases_of(document)
    predicted = {r["id"] for r in committed["cases"]} | {g["id"] for g in committed["summary"]["gaps"]}
    assert {c.id for c in file.cases} <= predicted
    quickest = min(file.cases, key=lambda c: (bool(c.inexpressible), str(c.overrides).count("'low'")))
    data = document.data | {"cases": [c for c in document.data["cases"] if c["id"] == quickest.id]}
    one = tmp_path / path.name
    one.write_text(json.dumps(data))
    results, gaps = run_file(one)
    assert results or gaps
    was = {r["quantity"]: r for r in committed["cases"] if r["id"] == quickest.id}
    assert {r.quantity for r in results} == set(was)
    for r in results:
        assert r.predicted == pytest.approx(was[r.quantity]["predicted"], rel=0.01), r.quantity
        assert r.measured == was[r.quantity]["measured"]


def test_every_shipped_case_has_a_place_and_a_name_of_its_own(committed: dict[str, Any]) -> None:
    ids = [c.id for path in FILES for c in cases_of(read_yaml(path)).cases]
    assert len(ids) == len(set(ids))
    assert set(ids) == {r["id"] for r in committed["cases"]} | {g["id"] for g in committed["summary"]["gaps"]}


def test_the_page_shows_the_committed_errors(committed: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("report", ROOT / "experiments" / "published" / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    text = report.PAGE.read_text()
    assert report.page(text, committed) == text, "python experiments/published/report.py makes it again"
