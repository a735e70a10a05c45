"""Sweeps: what is written survives, the table depends on nothing but the question, and speedups are what they say."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfsim import speedups, sweep
from rlhfsim.errors import InputError
from rlhfsim.metrics import step_seconds
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import load_scenario

SCENARIO = """
cluster: {spec: a100-80g-sxm, nodes: 1, gpus_per_node: 2}
models: {actor: {spec: tiny-2x128, zero_stage: 2}, critic: {spec: tiny-2x128, zero_stage: 2}}
workload:
  prompts: 16
  prompt_tokens: 16
  response_tokens: {distribution: lognormal, mean_tokens: 16, sigma: 0.5, max_tokens: 32}
generation: {engine: engine}
simulation: {iterations: 2, draws: 3}
"""
COMPARE = """
compare:
  baseline: "small"
  rows: {"small": {generation.tensor_parallel: 1}, "split": {generation.tensor_parallel: 2}}
"""
NODES = ["cluster.nodes=1,2,4"]


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(SCENARIO)
    return str(path)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The labels that were simulated in this process."""
    labels: list[str] = []
    original = sweep.compare

    def counting(scenarios: Any, baseline: str, **options: Any) -> Any:
        labels.append(baseline)
        return original(scenarios, baseline, **options)

    monkeypatch.setattr(sweep, "compare", counting)
    yield labels


def run(scenario: str, out: Path, overrides: list[str], jobs: int = 1, **options: Any) -> Any:
    return sweep.run(sweep.plan(scenario, overrides, tune=False, **options), out, jobs)


# -- the table ----------------------------------------------------------------------------------------------------


def test_a_row_says_what_the_simulator_says(scenario: str, tmp_path: Path) -> None:
    table = run(scenario, tmp_path / "t.csv", [*NODES, "workload.prompts=32"])
    assert [(r["cluster.nodes"], r["gpus"], r["samples"]) for r in table] == [(1, 2, 32), (2, 4, 32), (4, 8, 32)]
    loaded = load_scenario(scenario, ["cluster.nodes=2", "workload.prompts=32"])
    draws = [step_seconds(simulate(prepare(loaded), seed=seed)) for seed in range(3)]
    row = table[1]
    assert json.loads(row["draw_seconds"]) == draws
    assert row["step_seconds"] == pytest.approx(sum(draws) / 3, rel=1e-12)
    assert row["samples_per_second"] == pytest.approx(32 / row["step_seconds"], rel=1e-12)
    assert 32 * 17 <= row["tokens_per_second"] * row["step_seconds"] <= 32 * 48  # 16 + 1 to 32 tokens
    assert row["timing_s/gen"] == pytest.approx(max(v for k, v in row.items() if k.startswith("timing_s/") and v))
    assert json.loads(row["used"])["generation.tensor_parallel"] == 1
    assert (row["strategy"], row["fits"], row["reason"]) == ("colocated, engine", True, None)
    for row in table:
        assert min(draws := json.loads(row["draw_seconds"])) <= row["step_seconds_low"] <= row["step_seconds"]
        assert row["step_seconds"] <= row["step_seconds_high"] <= max(*draws, row["step_seconds"])
        assert len(set(draws)) == 3


def test_a_list_is_one_value_and_zip_pairs(scenario: str) -> None:
    points, swept = sweep.points_of(["a=[0,1]", "b=1,2", "c=x,y"])
    assert swept == ["b", "c"] and [p["a"] for p in points] == [[0, 1]] * 4
    assert [(p["b"], p["c"]) for p in points] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    paired, _ = sweep.points_of(["a=[0,1]", "b=1,2", "c=x,y"], zipped=True)
    assert [(p["a"], p["b"], p["c"]) for p in paired] == [([0, 1], 1, "x"), ([0, 1], 2, "y")]
    with pytest.raises(InputError, match="b has 2, c has 3"):
        sweep.points_of(["b=1,2", "c=1,2,3"], zipped=True)
    with pytest.raises(InputError, match="twice"):
        sweep.points_of(["b=1,2", "b=1,2"], zipped=True)
    assert len(sweep.plan(scenario, ["cluster.nodes=1,1,2"]).tasks) == 2


def test_what_does_not_fit_and_what_is_invalid_stay_rows(scenario: str, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    table = run(scenario, out, ["cluster.gpu.memory_bytes=80e9,1e9", "generation.tensor_parallel=1,3"])
    assert [row["fits"] for row in table] == [True, None, False, None]
    assert "GiB" in table[2]["reason"] and table[2]["step_seconds"] is None and table[2]["peak_memory_bytes"] > 1e9
    assert "must divide the 4 heads" in table[1]["reason"] and table[1]["gpus"] is None
    assert {row["strategy"] for row in table} == {"colocated, engine"}


def test_every_row_of_compare_at_every_point(scenario: str, tmp_path: Path) -> None:
    Path(scenario).write_text(SCENARIO + COMPARE)
    planned = sweep.plan(scenario, ["cluster.nodes=1,2", "cluster.gpus_per_node=1,2"], strategies=True, tune=False)
    assert planned.baseline == "small"
    table = sweep.run(planned, tmp_path / "t.csv", 1)
    assert [row["strategy"] for row in table] == ["small", "split"] * 4
    # Only the row that splits an engine over two GPUs cannot do with one.
    assert [row["fits"] for row in table] == [True, None, *[True] * 6]
    with pytest.raises(InputError, match=r"no row 'smal'.*did you mean 'small'"):
        sweep.main(scenario, NODES, out=str(tmp_path / "new.csv"), strategies=True, baseline="smal")
    assert not (tmp_path / "new.csv").exists()


def test_strategies_without_compare_are_the_papers_placements(scenario: str) -> None:
    planned = sweep.plan(scenario, ["cluster.gpus_per_node=2,8"], strategies=True)
    assert len(planned.tasks) == 12 and planned.baseline == "colocated, hybrid"
    reasons = [task.reason for task in planned.tasks if task.label == "disaggregated, engine"]
    assert "at least 6" in reasons[0] and not reasons[1]


def test_keys_tell_questions_apart(scenario: str) -> None:
    def keys(overrides: list[str], tune: bool = False) -> set[str]:
        return {task.key for task in sweep.plan(scenario, overrides, tune=tune).tasks}

    one = keys(NODES)
    assert one == keys(NODES)  # of another process too: see the kill test
    assert not one & keys(NODES, tune=True)
    assert not one & keys([*NODES, "simulation.seed=1"])
    assert one < keys(["cluster.nodes=1,2,4,8"])
    Path(scenario).write_text(SCENARIO.replace("zero_stage: 2", "zero_stage: 1"))
    assert not one & keys(NODES)


# -- kept, continued, refused -------------------------------------------------------------------------------------


def test_same_bytes_for_any_number_of_workers(scenario: str, tmp_path: Path) -> None:
    overrides = [*NODES, "generation.tensor_parallel=1,2,3"]
    for jobs in (1, 2):
        run(scenario, tmp_path / f"{jobs}.csv", overrides, jobs)
    one, two = ((tmp_path / f"{jobs}.csv").read_bytes() for jobs in (1, 2))
    assert one == two and len(one.splitlines()) == 10


def test_continues_wherever_it_was_cut(scenario: str, tmp_path: Path, simulated: list[str]) -> None:
    out, overrides = tmp_path / "t.csv", [*NODES, "simulation.draws=1"]
    run(scenario, out, overrides)
    whole = out.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (7, ends[0], ends[0] + 1, ends[1] - 3, ends[2] + 40, ends[3], len(whole)):
        out.write_bytes(whole[:cut])
        simulated.clear()
        run(scenario, out, overrides)
        assert out.read_bytes() == whole
        assert len(simulated) == 3 - max(0, whole[:cut].count(b"\n") - 1)
    assert not list(tmp_path.glob(".*"))


def test_more_values_keep_the_rows_that_are_there(scenario: str, tmp_path: Path, simulated: list[str]) -> None:
    out = tmp_path / "t.csv"
    run(scenario, out, ["cluster.nodes=2,4"])
    lines = out.read_text().splitlines()
    run(scenario, out, ["cluster.nodes=1,2,4"])
    assert len(simulated) == 3
    assert out.read_text().splitlines()[2:] == lines[1:]


def test_kill_in_the_middle_and_continue(scenario: str, tmp_path: Path) -> None:
    overrides = ["workload.prompts=" + ",".join(map(str, range(8, 20)))]
    out, reference = tmp_path / "t.csv", tmp_path / "reference.csv"
    command = [sys.executable, "-m", "rlhfsim.cli", "sweep", scenario, *overrides, "--as-given", "--jobs", "1"]
    folder = Path(sweep.__file__).parents[1]
    process = subprocess.Popen([*command, "--out", str(out)], cwd=folder, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = out.read_bytes()
    complete = written[: written.rfind(b"\n")].split(b"\n")
    assert 4 <= len(complete) < 13
    with out.open("ab") as file:
        file.write(b'19,"colo')  # what a kill amid a write leaves
    assert sweep.main(scenario, overrides, out=str(out), as_given=True, jobs=1) == 0
    run(scenario, reference, overrides)
    assert out.read_bytes() == reference.read_bytes()
    assert set(complete) <= set(out.read_bytes().split(b"\n"))


def test_interrupt_keeps_what_is_done(
    scenario: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    simulated: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    counting, out = sweep.compare, tmp_path / "t.csv"

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(simulated) == 2:
            raise KeyboardInterrupt
        return counting(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "compare", interrupted)
        assert sweep.main(scenario, NODES, out=str(out), as_given=True, jobs=1) == 130
    assert "2 of 3 rows are in" in capsys.readouterr().err
    assert len(out.read_bytes().splitlines()) == 3
    simulated.clear()
    assert sweep.main(scenario, NODES, out=str(out), as_given=True, jobs=1) == 0
    assert len(simulated) == 1


def test_another_sweeps_file_is_refused_and_untouched(scenario: str, tmp_path: Path, simulated: list[str]) -> None:
    out = tmp_path / "t.csv"
    planned = sweep.plan(scenario, NODES, tune=False)
    sweep.run(planned, out, 1)
    mine = out.read_bytes()
    header, *lines = mine.splitlines(keepends=True)
    simulated.clear()
    foreign = {
        "other columns": b"a,b\n1,2\n",
        "no newline": b"my notes",
        "binary": b"\x89PNG\r\n\x1a\n\x00\xff\xfe",
        "not UTF-8": header + b"\xff\xfe\n",
        "a cell too few": header + lines[0].rpartition(b",")[0] + b"\n" + lines[1],
        "another key": header + lines[0][:-5] + b"0000\n",
    }
    for name, content in foreign.items():
        out.write_bytes(content)
        with pytest.raises(InputError, match=r"not this sweep's table.*stays as it is"):
            sweep.run(planned, out, 1)
        assert out.read_bytes() == content, name
    out.write_bytes(mine)
    for other in (["cluster.nodes=1,2"], [*NODES, "simulation.seed=5"], ["workload.prompts=8,16"]):
        with pytest.raises(InputError, match=r"t\.csv:[0-9]: is not this sweep's table"):
            sweep.main(scenario, other, out=str(out), as_given=True)
        assert out.read_bytes() == mine
    assert not simulated


def test_two_sweeps_do_not_write_one_file(scenario: str, tmp_path: Path) -> None:
    planned, out = sweep.plan(scenario, NODES, tune=False), tmp_path / "t.csv"
    with sweep._opened(out), pytest.raises(InputError, match="another sweep is writing"):
        sweep.run(planned, out, 1)
    assert len(sweep.run(planned, out, 1)) == 3


def test_bad_input_before_anything_is_simulated(scenario: str, tmp_path: Path, simulated: list[str]) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "m.csv").write_text("strategy,gpus,speedup\nnobody,2,1\n")
    ok, figure = str(tmp_path / "t.csv"), str(tmp_path / "f.png")
    cases: list[tuple[str, list[str], dict[str, Any]]] = [
        ("folder.csv", NODES, {"out": str(tmp_path / "folder.csv")}),
        ("No such file", NODES, {"out": str(tmp_path / "missing" / "t.csv")}),
        ("Not a directory", NODES, {"out": str(Path(scenario) / "t.csv")}),
        (r"\.csv or \.parquet", NODES, {"out": str(tmp_path / "t.xlsx")}),
        ("nodes", ["cluster.nods=1,2"], {}),
        ("must divide", ["generation.tensor_parallel=3,5"], {}),
        ("no such option", ["strategy.splitt=1,2"], {}),
        ("empty value", ["cluster.nodes=1,,2"], {}),
        (r"\.png or \.svg", NODES, {"plot_path": str(tmp_path / "f.gif")}),
        ("there is no folder", NODES, {"plot_path": str(tmp_path / "missing" / "f.png")}),
        ("is the table", NODES, {"plot_path": str(tmp_path / "t.png")}),
        ("sweep something", [], {"plot_path": figure}),
        ("no such column.*did you mean 'gpus'", NODES, {"plot_path": figure, "x": "gpu"}),
        ("no row 'x'", NODES, {"plot_path": figure, "baseline": "x"}),
        ("no row 'x'", NODES, {"baseline": "x"}),
        ("name it with --plot", NODES, {"measured": "m.csv"}),
        (r"m\.csv:2: strategy: is 'nobody'", NODES, {"plot_path": figure, "measured": str(tmp_path / "m.csv")}),
    ]
    for message, overrides, options in cases:
        with pytest.raises(InputError, match=message):
            sweep.main(scenario, overrides, **{"out": ok, "jobs": 1, "as_given": True} | options)
    for broken in ("a: [", SCENARIO.replace("prompts: 16", "prompts: many"), ""):
        Path(scenario).write_text(broken)
        with pytest.raises(InputError, match=r"small\.yaml"):
            sweep.main(scenario, NODES, out=ok)
    assert not simulated and not (tmp_path / "t.csv").exists()


def test_exit_codes(scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some, none = ["cluster.gpu.memory_bytes=80e9,1e9"], ["cluster.gpu.memory_bytes=1e9,1.1e9"]
    assert sweep.main(scenario, some, out=str(tmp_path / "a.csv"), as_given=True, jobs=1) == 0
    assert "2 rows, 1 of them do not fit, 0 are invalid" in capsys.readouterr().err
    assert sweep.main(scenario, none, out=str(tmp_path / "b.csv"), as_given=True, jobs=1) == 3


def test_parquet_holds_the_same_rows(scenario: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = run(scenario, tmp_path / "t.parquet", ["cluster.nodes=1,2", "generation.tensor_parallel=1,3"])
    read = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    known = [[{k: v for k, v in row.items() if v not in (None, "")} for row in rows] for rows in (read, table)]
    assert known[0] == known[1]
    assert isinstance(read[0]["step_seconds"], float) and read[1]["step_seconds"] is None
    assert (tmp_path / "t.csv").exists()


@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        min_size=1,
    )
)
def test_any_value_is_one_line_and_numbers_come_back(values: list[Any]) -> None:
    line = sweep._line([sweep._cell(value) for value in values]).decode()
    assert line.count("\n") == 1 and line.endswith("\n")
    (cells,) = csv.reader([line])
    assert len(cells) == len(values)
    for cell, value in zip(cells, values, strict=True):
        if type(value) in (int, float):
            assert type(value)(cell) == value


# -- speedups -----------------------------------------------------------------------------------------------------


def row(
    nodes: int, label: str, draws: list[float] | None, *, prompts: int = 64, gpus: int | None = None, **swept: Any
) -> dict[str, Any]:
    seconds = sum(draws) / len(draws) if draws else None
    return {
        "cluster.nodes": nodes,
        "workload.prompts": prompts,
        **swept,
        "strategy": label,
        "gpus": gpus or 8 * nodes,
        "samples": prompts,
        "step_seconds": seconds,
        "draw_seconds": json.dumps(draws),
        "samples_per_second": prompts / seconds if seconds else None,
    }


TABLE = [row(n, label, [k * 8 / n, k * 10 / n, k * 12 / n]) for n in (4, 1, 2) for label, k in (("a", 1.0), ("b", 0.5))]


def test_speedup_over_the_baseline_at_its_smallest_point() -> None:
    found = speedups.speedups(TABLE, "a", "gpus", same_point=False)
    assert [(r["strategy"], r["gpus"], r["speedup"]) for r in found] == [
        ("a", 8, 1),
        ("a", 16, 2),
        ("a", 32, 4),
        ("b", 8, 2),
        ("b", 16, 4),
        ("b", 32, 8),
    ]
    assert all(r["low"] == pytest.approx(r["speedup"]) == r["high"] for r in found)  # draw by draw the ratio is one


def test_speedup_at_the_same_point_and_its_interval() -> None:
    table = [row(1, "a", [10.0, 20.0]), row(1, "b", [5.0, 5.0]), row(2, "a", [8.0, 8.0]), row(2, "b", None)]
    found = speedups.speedups(table, "a", "cluster.nodes", same_point=True)
    assert [r["speedup"] for r in found[:3]] == [1, 1, 3] and math.isnan(found[3]["speedup"])
    assert (found[2]["low"], found[2]["high"]) == pytest.approx((2.1, 3.9))  # of the ratios 2 and 4
    without = speedups.speedups(table, "b", "cluster.nodes", same_point=True)
    assert math.isnan(without[1]["speedup"])  # the baseline does not fit at two nodes


def test_speedup_counts_samples_where_the_work_grows() -> None:
    table = [row(n, "a", [10.0], prompts=64 * n) for n in (1, 2, 4)]
    assert [r["speedup"] for r in speedups.speedups(table, "a", "gpus", same_point=False)] == [1, 2, 4]


def test_the_baseline_starts_where_it_fits() -> None:
    table = [row(1, "a", None), row(2, "a", [6.0]), row(4, "a", [3.0])]
    found = speedups.speedups(table, "a", "gpus", same_point=False)
    assert math.isnan(found[0]["speedup"]) and [r["speedup"] for r in found[1:]] == [1, 2]


def test_other_swept_columns_make_curves() -> None:
    table = [row(n, label, [k / n], micro=m) for n in (1, 2) for m, k in ((1, 8.0), (2, 4.0)) for label in "ab"]
    names = ["a, micro=1", "b, micro=1", "a, micro=2", "b, micro=2"]
    assert [curve.name for curve in speedups.curves(table, "gpus")] == names
    alike = speedups.speedups(table, "a", "gpus", same_point=False)  # each against the baseline of its own kind
    assert {r["speedup"] for r in alike if r["gpus"] == 8} == {1}
    one = speedups.speedups(table, "a, micro=1", "gpus", same_point=False)
    assert {r["strategy"]: r["speedup"] for r in one if r["gpus"] == 16} == dict(zip(names, (2, 2, 4, 4), strict=True))
    with pytest.raises(InputError, match="no row 'a, micro=3'"):
        speedups.speedups(table, "a, micro=3", "gpus", same_point=True)


def test_scaling_detection() -> None:
    strong = [row(n, s, [1.0]) for n in (1, 2, 4) for s in "ab"]
    weak = [row(n, s, [1.0], prompts=32 * n) for n in (1, 2, 4) for s in "ab"]
    mixed = [row(n, "a", [1.0], prompts=32 + n) for n in (1, 2, 4)]
    assert [speedups.scaling(t, "gpus") for t in (strong, weak, mixed)] == ["strong", "weak", "mixed"]
    # Every curve has one number of prompts, whatever the others have.
    product = [row(n, "a", [1.0], prompts=p) for n in (1, 2) for p in (32, 64)]
    assert speedups.scaling(product, "gpus") == "strong"
    # The same samples, but not the same work.
    larger = [row(n, "a", [1.0], **{"models.actor.spec": f"{n}b"}) for n in (1, 2)]
    assert speedups.scaling(larger, "gpus") == "mixed"
    same = [row(1, "a", [1.0], prompts=p) for p in (32, 64)]
    assert speedups.scaling(same, "workload.prompts") is None and speedups.default_x(same) == "cluster.nodes"
    assert speedups.default_x(strong) == "gpus"
    assert speedups.scales(strong, "cluster.nodes") and not speedups.scales(same, "workload.prompts")


def test_figure_states_baseline_scaling_and_ideal(scenario: str, tmp_path: Path) -> None:
    Path(scenario).write_text(SCENARIO + COMPARE)
    (tmp_path / "m.csv").write_text("strategy,gpus,step_seconds\nsmall,2,2.0\nsmall,8,1.0\nsplit,4,0.5\n")
    figure = tmp_path / "f.svg"
    zipped = ["cluster.nodes=1,2,4", "workload.prompts=16,32,64"]
    assert (
        sweep.main(
            scenario,
            zipped,
            out=str(tmp_path / "t.csv"),
            strategies=True,
            as_given=True,
            zipped=True,
            jobs=1,
            plot_path=str(figure),
            measured=str(tmp_path / "m.csv"),
        )
        == 0
    )
    svg = figure.read_text()
    for text in ("speedup over small on 2 GPUs", "weak scaling", "ideal (linear)", "split, measured", "GPUs"):
        assert text in svg, text
    with figure.with_suffix(".csv").open() as file:
        rows = {(r["strategy"], r["gpus"]): r for r in csv.DictReader(file)}
    measured = {place: float(r["measured"]) for place, r in rows.items() if r["measured"]}
    assert measured == {("small", "2"): 1, ("small", "8"): 8, ("split", "4"): 8}  # (64 / 1) and (32 / 0.5) over 16 / 2
    assert float(rows["split", "8"]["low"]) <= float(rows["split", "8"]["speedup"]) <= float(rows["split", "8"]["high"])


def test_the_ideal_line_starts_where_the_baseline_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline fits on 16 GPUs and more, another strategy on 8 already: ideal is 1x on 16."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(speedups, "speedup_figure", lambda *_, **options: drawn.update(options))
    table = [row(n, s, None if (n, s) == (1, "a") else [8 / n]) for n in (1, 2, 4) for s in ("a", "b")]
    speedups.draw(table, "a", "gpus", tmp_path / "f.png", same_point=False)
    assert (drawn["ideal"], drawn["ideal_from"]) == ("linear", 16)
    speedups.draw(table, "a", "cluster.nodes", tmp_path / "f.png", same_point=False)
    assert (drawn["ideal"], drawn["ideal_from"]) == ("linear", 2)


def test_figure_over_a_value_that_is_no_size_has_no_ideal(scenario: str, tmp_path: Path) -> None:
    figure = tmp_path / "f.svg"
    overrides = ["workload.prompts=8,16", "generation.engine=hybrid,engine"]
    assert (
        sweep.main(scenario, overrides, out=str(tmp_path / "t.csv"), as_given=True, jobs=1, plot_path=str(figure)) == 0
    )
    svg = figure.read_text()
    assert "speedup over colocated, hybrid<" in svg and "ideal" not in svg and "scaling" not in svg
    with figure.with_suffix(".csv").open() as file:
        assert [float(r["speedup"]) for r in csv.DictReader(file) if r["strategy"] == "colocated, hybrid"] == [1, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("strategy,gpus\na,8\n", r"m\.csv:1: must have the columns strategy, gpus, and speedup or step_seconds"),
        ("", r"m\.csv:1: must have"),
        ("strategy,gpus,speedup\n", "no points"),
        ("strategy,gpus,speedup\na,8,1\na,16,fast\n", r"m\.csv:3: speedup: is 'fast'"),
        ("strategy,gpus,speedup\na,8,-1\n", r"m\.csv:2: speedup: is '-1', but must be a positive"),
        ("strategy,gpus,speedup\na,8,inf\n", r"m\.csv:2: speedup"),
        ("strategy,gpus,speedup\na,8,\n", r"m\.csv:2: needs either"),
        ("strategy,gpus,speedup,step_seconds\na,8,1,2\n", r"m\.csv:2: needs either"),
        ("strategy,gpus,speedup\na,b,8,1\n", r"m\.csv:2: has another number of cells"),
        ("strategy,gpus,speedup\na\n", r"m\.csv:2: has another number of cells"),
        ("strategy,gpus,speedup\nc,8,1\n", r"m\.csv:2: strategy: is 'c', which is no curve"),
        ("strategy,gpus,speedup\na,9,1\n", r"m\.csv:2: gpus: is '9', which is no point"),
        ("strategy,gpus,speedup\na,8,1\na,8.0,1\n", r"m\.csv:3: .*is there twice"),
        (
            "strategy,gpus,step_seconds\na,16,1\n",
            r"m\.csv:2: step_seconds: needs measured step_seconds of the baseline 'a' at gpus 8",
        ),
    ],
)
def test_bad_measured_points_name_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        speedups.speedups(TABLE, "a", "gpus", same_point=False, measured=speedups.read_measured(str(path), "gpus"))


def test_measured_points_beside_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("strategy,gpus,speedup,step_seconds\nb,16,3.5,\na,8,,12\na,32,,4\n")
    found = speedups.speedups(TABLE, "a", "gpus", same_point=False, measured=speedups.read_measured(str(path), "gpus"))
    assert {(r["strategy"], r["gpus"]): r["measured"] for r in found if "measured" in r} == {
        ("b", 16): 3.5,
        ("a", 8): 1,
        ("a", 32): 3,
    }
    with pytest.raises(InputError, match="cannot be read: No such file"):
        speedups.read_measured(str(tmp_path / "none.csv"), "gpus")
