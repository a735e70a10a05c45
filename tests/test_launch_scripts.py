"""The frameworks' own example scripts, written as scenarios: each is asked what fits and is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import load_scenario

FILES = sorted((Path(__file__).parents[1] / "experiments" / "launch_scripts").glob("*.yaml"))


def test_there_are_scripts_of_every_framework() -> None:
    assert len(FILES) >= 10
    assert {path.name.split("_")[0] for path in FILES} >= {"verl", "openrlhf", "slime", "nemo", "areal", "trl"}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_script_runs(path: Path) -> None:
    """It says where it comes from, and every model that it trains takes its time."""
    head = path.read_text(encoding="utf-8").partition("name:")[0]
    assert head.startswith("# ") and "github.com/" in head and " @" in head.replace("\n#", "")
    run = prepare(load_scenario(path))
    timeline = simulate(run)
    seconds = stage_seconds(timeline)
    trained = {stage.name for stage in run.graph.stages() if stage.kind == "train"}
    assert step_seconds(timeline) > 0 and "update_actor" in trained
    assert all(seconds[stage] > 0 for stage in {"gen", *trained})


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_script_fits(path: Path) -> None:
    """On the GPUs that it was written for, or that are assumed."""
    fit = prepare(load_scenario(path)).fit()
    assert fit.fits, fit.reason
