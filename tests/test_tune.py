"""Tuning: never worse than the given settings or a plain grid, and it leaves alone what the user set."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rlhfsim.cli import cli
from rlhfsim.compare import default_rows, rows_of
from rlhfsim.metrics import step_seconds
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import load_scenario
from rlhfsim.tune import tuned

SCENARIO = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 2},
    "models": {"actor": "llama-7b"},
    "workload": {"prompts": 512, "prompt_tokens": 512, "response_tokens": 1024},
    "simulation": {"iterations": 2},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(json.dumps(SCENARIO))
    return path


def seconds(scenario: Any) -> float | None:
    setup = prepare(scenario)
    return step_seconds(simulate(setup)) if setup.fit().fits else None


def test_as_good_as_a_grid_where_nothing_fits_at_tensor_parallel_1(file: Path) -> None:
    """At TP 1 only small static batches fit, or none: they must be chosen anew for each TP."""
    wide = ["models.actor.spec=llama-13b", "cluster.nodes=2", "cluster.gpu.memory_bytes=60e9"]
    given = default_rows(load_scenario(file, wide))["colocated, hybrid"]
    assert seconds(tuned(given.model_copy(update={"keep": ["generation.tensor_parallel"]}))) is not None
    grid = [
        seconds(load_scenario(file, [*wide, "generation.engine=hybrid", f"generation.tensor_parallel={t}",
                                     f"generation.batch_samples={b}", f"models.actor.micro_batch_samples={m}",
                                     f"models.critic.micro_batch_samples={m}"]))
        for t, b, m in product((1, 2, 4, 8), (4, 16, 64, 256), (1, 4, 16))
    ]  # fmt: skip
    best = min(s for s in grid if s is not None)
    assert (seconds(tuned(given)) or 1e9) <= best * 1.001


def test_small_micro_batches_where_a_pipeline_wants_them(file: Path) -> None:
    layout = [f"models.{role}.{key}" for role in ("actor", "critic")
              for key in ("tensor_parallel=2", "pipeline_parallel=4", "zero_stage=1")]  # fmt: skip
    given = load_scenario(file, [*layout, "models.actor.spec=llama-13b", "models.actor.micro_batch_samples=2",
                                 "models.critic.micro_batch_samples=2", "keep=[]"])  # fmt: skip
    free = given.model_copy(update={"keep": []})
    assert (seconds(tuned(free)) or 1e9) <= (seconds(given) or 0) * 1.001


def test_engines_get_pipeline_stages_where_nothing_fits_without(file: Path) -> None:
    """Llama-65B with ZeRO-3 over 32 ranks: 38 GB and 16 GB of an engine (TP 8) do not fit in 48."""
    sets = {
        "models.actor.spec": "llama-65b", "cluster.nodes": 4, "cluster.gpu.memory_bytes": 48e9,
        "algorithm": {"name": "grpo", "reward": "function"}, "workload.response_tokens": 256,
        "workload.prompts": 128, "workload.responses_per_prompt": 4, "generation.engine": "engine",
    }  # fmt: skip
    given = load_scenario(file, sets).model_copy(update={"keep": []})
    alone = tuned(given.model_copy(update={"keep": ["generation.pipeline_parallel"]}))
    assert alone.generation.pipeline_parallel == 1 and seconds(alone) is None
    found = tuned(given)
    assert found.generation.pipeline_parallel == 2 and seconds(found) is not None


def test_what_the_user_set_stays(file: Path) -> None:
    sets = {"generation.engine": "engine", "generation.tensor_parallel": 2, "models.actor.micro_batch_samples": 2}
    best = tuned(load_scenario(file, sets))
    assert best.generation.tensor_parallel == 2
    assert best.models.actor.micro_batch_samples == 2
    assert best.models.critic.micro_batch_samples > 2


def test_rows_of_a_comparison_keep_their_own_settings(tmp_path: Path) -> None:
    rows = {
        "two": {"generation": {"engine": "engine", "tensor_parallel": 2}},
        "four": {"generation.engine": "engine", "generation.tensor_parallel": 4},
        "apart": {"strategy": {"name": "disaggregated", "batches": 2}, "generation.engine": "engine"},
    }
    path = tmp_path / "rows.yaml"
    path.write_text(json.dumps(SCENARIO | {"compare": {"baseline": "two", "rows": rows}}))
    found = {label: tuned(s) for label, s in rows_of(str(path), [])[0].items()}
    assert [found[k].generation.tensor_parallel for k in ("two", "four")] == [2, 4]
    assert found["apart"].strategy.options["batches"] == 2
    assert "split" in found["apart"].strategy.options  # what was not named is free


def test_a_sweep_over_a_tuned_setting_is_no_flat_line(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    done = CliRunner().invoke(
        cli,
        [
            "sweep",
            str(file),
            "generation.engine=engine",
            "generation.tensor_parallel=1,2,4",
            "--out",
            str(out),
            "--jobs",
            "1",
        ],
    )
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len({row["step_seconds"] for row in rows}) == 3
    assert [json.loads(row["used"])["generation.tensor_parallel"] for row in rows] == [1, 2, 4]


def test_where_nothing_fits_the_least_too_large_is_reported(file: Path) -> None:
    huge = load_scenario(file, ["models.actor.spec=llama-65b", "cluster.nodes=1"])
    given = default_rows(huge.model_copy(update={"keep": []}))["colocated, engine"]
    best = prepare(tuned(given)).fit()
    assert not best.fits
    assert best.worst.bytes.total <= prepare(given).fit().worst.bytes.total
