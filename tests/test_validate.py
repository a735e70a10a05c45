"""`validate`: errors, roles, ranking and tolerances, on cases whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlhfsim import timeline
from rlhfsim.cli import cli
from rlhfsim.errors import InputError
from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import scenario_from_dict
from rlhfsim.validate import Result, digest, find_cases, run_case, summary

SCENARIO: dict[str, Any] = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 1},
    "models": {"actor": "tiny-4x256"},
    "workload": {"prompts": 64, "prompt_tokens": 32, "response_tokens": 32},
}

CASE_KEYS = {"id", "quantity", "predicted", "measured", "error", "role", "group", "low", "high", "tolerance", "ok"}


def write_case(folder: Path, **changes: Any) -> Path:
    case = {"id": "a", "role": "prediction", "group": "g", "scenario": SCENARIO} | changes
    path = folder / f"{case['id']}.case.yaml"
    path.write_text(json.dumps(case))  # JSON is YAML
    return path


def predicted() -> dict[str, float]:
    run = simulate(prepare(scenario_from_dict(SCENARIO)))
    return {"step_seconds": step_seconds(run), **stage_seconds(run)}


def test_a_simulated_timeline_is_predicted_exactly(tmp_path: Path) -> None:
    timeline.write(simulate(prepare(scenario_from_dict(SCENARIO))), tmp_path / "run.jsonl")
    results = run_case(write_case(tmp_path, timeline="run.jsonl"))
    assert {r.quantity for r in results} == set(predicted())
    assert all(abs(r.error) < 1e-9 and r.ok for r in results)


def test_a_timeline_that_breaks_its_graph_is_an_error(tmp_path: Path) -> None:
    """Spans of another order measured another program, however well their lengths agree."""
    run = simulate(prepare(scenario_from_dict(SCENARIO)))
    (gen, *_), (ref, *_) = run.of(stage="gen", iteration=1), run.of(stage="ref", iteration=1)
    early = replace(ref, start_seconds=gen.end_seconds - ref.seconds, end_seconds=gen.end_seconds)
    spans = [early if s is ref else s for s in run.spans]
    timeline.write(replace(run, spans=spans), tmp_path / "run.jsonl")
    path = write_case(tmp_path, timeline="run.jsonl")
    with pytest.raises(InputError, match=r"run\.jsonl breaks the order of the scenario's graph: .* \(iteration 1"):
        run_case(path)
    done = CliRunner().invoke(cli, ["validate", str(path)])
    assert isinstance(done.exception, InputError)
    elsewhere = SCENARIO | {"strategy": "disaggregated"}
    timeline.write(run, tmp_path / "run.jsonl")
    with pytest.raises(InputError, match="breaks the order"):
        run_case(write_case(tmp_path, timeline="run.jsonl", scenario=elsewhere))


def test_errors_and_excess(tmp_path: Path) -> None:
    truth = predicted()["step_seconds"]
    (result,) = run_case(
        write_case(tmp_path, measured={"step_seconds": 1.25 * truth}, tolerance={"step_seconds": 0.15})
    )
    assert result.error == pytest.approx(-0.2)
    assert result.excess_seconds == pytest.approx(0.25 * truth)
    assert not result.ok
    spread = {"step_seconds": {"value": 1.25 * truth, "low": 1.15 * truth, "high": 1.35 * truth}}
    (result,) = run_case(write_case(tmp_path, measured=spread, tolerance={"step_seconds": 0.15}))
    assert result.spread == pytest.approx(0.08)
    assert result.ok  # 20 % off, of which 8 % is the measurement's own spread


def test_command_fails_beyond_the_tolerance_and_says_which(tmp_path: Path) -> None:
    truth = predicted()
    write_case(tmp_path, measured={"step_seconds": truth["step_seconds"], "gen": 2 * truth["gen"]})
    done = CliRunner().invoke(cli, ["validate", str(tmp_path), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["summary"]["failed"] == ["a: gen"]
    assert set(found["cases"][0]) >= CASE_KEYS
    write_case(tmp_path, measured={"step_seconds": truth["step_seconds"]})
    assert CliRunner().invoke(cli, ["validate", str(tmp_path)]).exit_code == 0


def test_what_a_spec_was_fitted_on_is_no_prediction(tmp_path: Path) -> None:
    timeline.write(simulate(prepare(scenario_from_dict(SCENARIO))), tmp_path / "run.jsonl")
    fitted = {"spec": "a100-80g-sxm", "nodes": 1, "gpu": {"fitted_on": [digest(tmp_path / "run.jsonl")]}}
    path = write_case(tmp_path, timeline="run.jsonl", scenario=SCENARIO | {"cluster": fitted})
    with pytest.raises(InputError, match=r"was fitted on run\.jsonl"):
        run_case(path)
    path = write_case(tmp_path, timeline="run.jsonl", scenario=SCENARIO | {"cluster": fitted}, role="calibration")
    results = run_case(path)
    assert results
    assert summary(results)["mean_abs_error"] is None  # calibration is never counted


def result(name: str, predicted: float, measured: float, spread: float = 0.0, **more: Any) -> Result:
    return Result(
        name,
        "step_seconds",
        predicted,
        measured,
        more.pop("role", "prediction"),
        more.pop("group", "g"),
        spread,
        0.1,
        **more,
    )


def test_ranking_counts_pairs_of_a_group_that_differ_by_more_than_their_spread() -> None:
    results = [
        result("a", 1.0, 1.0),
        result("b", 0.9, 2.0),
        result("c", 3.0, 3.0),
        result("d", 0.1, 1.01, spread=0.05),
        result("other", 0.1, 100.0, group="h"),
        result("fitted", 9.0, 0.1, role="calibration"),
    ]
    # pairs: ab wrong, ac right, bc right, ad undecided, bd right (0.1 < 0.9), cd right
    assert summary(results)["ranking"]["share"] == pytest.approx(4 / 5)
    assert summary(results)["groups"] == 2


def test_coverage_and_bias() -> None:
    results = [result("a", 1.1, 1.0, low=0.9, high=1.2), result("b", 0.9, 1.0, low=0.8, high=0.95)]
    found = summary(results)
    assert found["coverage"]["share"] == 0.5
    assert found["bias"] == pytest.approx(0.0)
    assert found["mean_abs_error"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "predicted"}, "role"),
        ({"measured": {}}, "needs a timeline or measured"),
        ({"measured": {"step_seconds": -1}}, "measured.step_seconds"),
        ({"measured": {"generate": 1.0}}, "no 'generate'"),
        ({"measured": {"step_seconds": {"value": 1, "low": 2}}}, "not in order"),
        ({"measured": {"step_seconds": 1}, "scenario": "missing.yaml"}, "missing.yaml"),
        ({"timeline": "missing.jsonl"}, "missing.jsonl"),
        ({"measured": {"step_seconds": 1}, "tolerence": 1}, "tolerance"),
    ],
)
def test_broken_cases_are_clear_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_case(write_case(tmp_path, **changes))


def test_folders_are_searched(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    inner = write_case(tmp_path / "deep", measured={"step_seconds": 1})
    assert find_cases([tmp_path]) == [inner]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no case files"):
        find_cases([tmp_path / "empty"])
    with pytest.raises(InputError, match="does not exist"):
        find_cases([tmp_path / "nowhere"])
