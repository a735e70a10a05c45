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
def test_script_fits_and_runs(path: Path) -> None:
    """On the GPUs that it was written for, or that are assumed. Every stage of the algorithm takes its time."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and "@" in text.partition("name:")[0], "which script it is, and of which commit"
    run = prepare(load_scenario(path))
    assert run.fit().fits, run.fit().reason
    timeline = simulate(run)
    seconds = stage_seconds(timeline)
    assert step_seconds(timeline) > 0
    assert seconds["gen"] > 0 and seconds["update_actor"] > 0
    assert {stage.name for stage in run.graph.stages() if stage.kind == "train"} <= set(seconds)
