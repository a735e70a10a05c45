"""The recorded real runs of `traces/real`, predicted again: as exactly as the committed report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from rlhfsim import timeline
from rlhfsim.calibrate import calibrate
from rlhfsim.cli import cli
from rlhfsim.layout import graph_of
from rlhfsim.order import violations
from rlhfsim.spec.loader import load_scenario, scenario_from_dict
from rlhfsim.validate import Result, find_cases, run_case, summary

FOLDER = Path(__file__).parents[1] / "traces" / "real" / "cpu-2-cores"
STEP, SLOW = "step_seconds", "100mbit/"


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [result for case in find_cases([FOLDER]) for result in run_case(case)]


@pytest.fixture(scope="module")
def committed() -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["id"], r["quantity"]): r for r in json.loads((FOLDER / "results.json").read_text())}


def steps(results: list[Result]) -> list[Result]:
    return [r for r in results if r.quantity == STEP and r.role == "prediction"]


def test_errors_are_those_of_the_report(
    results: list[Result], committed: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """A change of the model that moves a prediction by 1 % is seen, and the report made again with it."""
    assert {(r.id, r.quantity) for r in results} == set(committed)
    for r in results:
        assert r.predicted == pytest.approx(committed[r.id, r.quantity]["predicted"], rel=0.01), (r.id, r.quantity)
        assert r.measured == committed[r.id, r.quantity]["measured"]


def test_iterations_are_predicted(results: list[Result]) -> None:
    found = summary(results)
    assert found["predictions"] >= 24 and sum(r.role == "calibration" for r in results if r.quantity == STEP) <= 4
    assert found["mean_abs_error"] < 0.07
    assert abs(found["worst"]["error"]) < 0.18
    assert found["ranking"]["share"] >= 0.99


def test_every_kind_is_there(results: list[Result]) -> None:
    ids = [r.id for r in steps(results)]
    strategies, engines = ("/colocated", "/interleaved", "/disaggregated"), ("-zero3_per_token", "-hybrid", "-engine")
    others = ("-zero0", "-zero2", "-zero3", "-tiny-2x128", "-tiny-4x256", "-small-8x512", "-fixed", "-tail")
    for kind in (*strategies, *engines, *others, "host/", "1gbit/", SLOW):
        assert any(kind in name for name in ids), kind


def test_gathering_for_every_token_is_slow_on_a_slow_network(results: list[Result]) -> None:
    """At least 5x, and predicted within 10 %."""
    own = {r.id: r for r in steps(results) if r.id.startswith(SLOW) and r.id.endswith("long")}
    base = next(r for name, r in own.items() if "zero3_per_token" in name)
    others = [r for r in own.values() if r is not base]
    assert {"hybrid", "engine"} <= {part for r in others for part in r.id.split("-")}
    for r in others:
        measured, predicted = base.measured / r.measured, base.predicted / r.predicted
        assert measured > 5
        assert predicted == pytest.approx(measured, rel=0.1), r.id


def test_recorded_runs_obey_their_graphs() -> None:
    for case in find_cases([FOLDER]):
        data = YAML(typ="safe").load(case)
        given = data["scenario"]
        scenario = load_scenario(FOLDER / given) if isinstance(given, str) else scenario_from_dict(given, FOLDER)
        assert violations(graph_of(scenario)[0], timeline.read(FOLDER / data["timeline"])) == [], data["id"]


def test_calibration_is_repeated_from_the_recorded_files() -> None:
    """The machine's spec holds what `calibrate` makes of the benches and the calibration runs, and their hashes."""
    pytest.importorskip("scipy")
    runs = [(str(s.with_name(s.name.replace(".scenario.yaml", ".jsonl"))), str(s)) for s in
            sorted(FOLDER.glob("*.scenario.yaml"))]  # fmt: skip
    found = calibrate(sorted(FOLDER.glob("bench-*.json")), runs, name="machine")
    written = YAML(typ="safe").load(FOLDER / "machine.yaml")
    assert set(found.fitted_on.values()) == set(written["gpu"]["fitted_on"])
    for name in ("eager_layer_seconds", "decode_layer_seconds", "firing_seconds"):
        assert found.cluster["overheads"][name] == pytest.approx(written["overheads"][name], rel=0.02), name


def test_a_wrong_coefficient_fails(tmp_path: Path, committed: dict[tuple[str, str], dict[str, Any]]) -> None:
    """A case that is within its tolerance is not with products at half the speed: exit code 1, and it says so."""
    for file in FOLDER.iterdir():
        if file.suffix in (".yaml", ".jsonl"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "machine.kernels.yaml"
    kernels = YAML(typ="safe").load(path)
    kernels["gemm"]["bf16"]["compute_efficiency"] *= 0.5
    kernels["gemm"]["bf16"]["memory_efficiency"] *= 0.5
    YAML().dump(kernels, path)
    large = {i: r for (i, quantity), r in committed.items() if quantity == STEP and "host/" in i and "small-8x512" in i}
    good = next(i for i, r in large.items() if r["role"] == "prediction" and r["ok"])  # products take most of its time
    case = f"{good.replace('/', '-')}.case.yaml"
    for folder, ok in ((FOLDER, True), (tmp_path, False)):
        found = CliRunner().invoke(cli, ["validate", str(folder / case), "--json"])
        (step,) = [c for c in json.loads(found.stdout)["cases"] if c["quantity"] == STEP]
        assert step["ok"] is ok
    assert found.exit_code == 1
