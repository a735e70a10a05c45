"""The paper's comparison: a quick run keeps its promises, and the README quotes what the committed tables say."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import load_scenario

PAPER = Path(__file__).parents[1] / "experiments" / "paper"
GRID = YAML(typ="safe").load((PAPER / "grid.yaml").read_text(encoding="utf-8"))
BASELINES = ("colocated, zero3_per_token", "colocated, hybrid", "colocated, engine")
STRATEGIES = {*GRID["candidates"], "colocated, megatron", "disaggregated, engine"}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cell(line: dict[str, str]) -> tuple[str, str, float, float, float]:
    return (
        line["study"],
        line["model"],
        float(line["gpus"]),
        float(line["network_gb_per_second"]),
        float(line["samples_per_gpu"]),
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    subprocess.run(
        [sys.executable, str(PAPER / "run.py"), "--quick", "--jobs", "1", "--out", str(out)], check=True, timeout=120
    )
    return out


@pytest.fixture(scope="module", params=["quick", "committed"])
def cells(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    folder = PAPER / "results" if request.param == "committed" else request.getfixturevalue("quick")
    return table(folder / "cells.csv")


def test_every_cell_has_every_strategy_with_a_time_or_a_reason(cells: list[dict[str, str]]) -> None:
    by_cell: dict[tuple, list[str]] = {}
    for line in cells:
        assert bool(line["step_seconds"]) != bool(line["reason"]), line
        by_cell.setdefault(cell(line), []).append(line["strategy"])
    assert all(sorted(found) == sorted(STRATEGIES) for found in by_cell.values())


def test_a_speedup_names_its_baseline_and_is_the_ratio_of_the_times(cells: list[dict[str, str]]) -> None:
    assert [c for c in cells[0] if "speedup" in c] == [f"speedup_over {b}" for b in BASELINES]
    seconds = {(*cell(line), line["strategy"]): line["step_seconds"] for line in cells}
    for line in cells:
        for baseline in BASELINES:
            base, own, quoted = seconds[*cell(line), baseline], line["step_seconds"], line[f"speedup_over {baseline}"]
            assert bool(quoted) == bool(base and own)
            if quoted:  # all three numbers are rounded to four digits
                assert float(quoted) == pytest.approx(float(base) / float(own), rel=2e-3)


def test_committed_cells_are_the_whole_grid() -> None:
    committed = {cell(line) for line in table(PAPER / "results" / "cells.csv")}
    strong = {
        ("strong", model, gpus, network, round(GRID["strong"]["samples"] / gpus, 6))
        for model, gpus, network in product(GRID["models"], GRID["gpus"], GRID["networks_gb_per_second"])
    }
    weak = {
        ("weak", model, gpus, network, samples)
        for model, gpus, network, samples in product(
            GRID["weak"]["models"], GRID["gpus"], GRID["networks_gb_per_second"], GRID["weak"]["samples_per_gpu"]
        )
    }
    assert committed == strong | weak


def test_a_quick_run_repeats_the_committed_numbers(quick: Path) -> None:
    committed = {
        (*cell(line), line["strategy"]): line["step_seconds"] for line in table(PAPER / "results" / "cells.csv")
    }
    for line in table(quick / "cells.csv"):
        expected = committed[*cell(line), line["strategy"]]
        assert bool(line["step_seconds"]) == bool(expected)
        if expected:
            assert float(line["step_seconds"]) == pytest.approx(float(expected), rel=0.01), line["strategy"]


def test_a_quick_run_draws_its_figures(quick: Path) -> None:
    for name in ("speedup_strong_100gbs.png", "speedup_weak_13b.png", "winners.png", "eleven.png"):
        assert (quick / name).read_bytes().startswith(b"\x89PNG")


def test_the_factor_of_eleven_needs_gathers_per_token_over_a_network() -> None:
    """With either effect off the speedup over zero3_per_token all but vanishes; the other three do not make it."""
    column = f"speedup_over {BASELINES[0]}"
    found = {
        line["effect_off"]: float(line[column])
        for line in table(PAPER / "results" / "effects.csv")
        if line["strategy"] == "disaggregated, engine"
    }
    assert found["none"] > 5
    assert found["decode"] < 0.2 * found["none"]
    assert found["links"] < 0.5 * found["none"]
    assert all(found[effect] > 0.8 * found["none"] for effect in ("memory", "sync"))


def test_the_readme_quotes_the_committed_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number with a source behind it is what that line of the table says, rounded to the decimals shown."""
    monkeypatch.syspath_prepend(PAPER)
    spec = importlib.util.spec_from_file_location("paper_run", PAPER / "run.py")
    assert spec and spec.loader
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    tables, found = run.read_tables(PAPER / "results"), run.QUOTE.findall((PAPER / "README.md").read_text("utf-8"))
    assert len(found) >= 30
    for number, _, source in found:
        decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(run.quoted(tables, source), abs=0.5000001 * 10**-decimals), source


def test_a_sharded_shadow_critic_receives_one_copy() -> None:
    """Blocking sends to ZeRO-3 ranks take as long for 32 nodes as for 8: each rank gets its shard, not a whole copy."""
    overrides = {
        "strategy.name": "disaggregated",
        "generation.engine": "engine",
        "generation.tensor_parallel": 4,
        "weight_sync.method": "p2p",
    }
    seconds = {}
    for nodes in (8, 32):
        scenario = load_scenario(
            PAPER / "scenario.yaml", overrides | {"cluster.nodes": nodes, "workload.prompts": 32 * nodes}
        )
        spans = simulate(prepare(scenario)).spans
        seconds[nodes] = max(s.seconds for s in spans if s.firing.stage == "update_weights.critic")
    assert seconds[32] == pytest.approx(seconds[8], rel=0.5)
