"""Profiles of frameworks: what they change, what they were fitted on, and the intervals that they give."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from math import ceil, exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhfsim.errors import InputError
from rlhfsim.metrics import STEP, stage_seconds
from rlhfsim.published import cases_of, run_file
from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.framework import Framework, Residual
from rlhfsim.spec.loader import load_cluster, scenario_from_dict
from rlhfsim.spec.scenario import Scenario
from rlhfsim.spec.yaml_file import read_yaml
from rlhfsim.uncertainty import intervals, share_limits, t_quantile, widened

ROOT = Path(__file__).parents[1]
PROFILES = sorted((ROOT / "hw_specs" / "frameworks").glob("*.yaml"))
FILES = sorted((ROOT / "traces" / "published").rglob("*.cases.yaml"))
SCENARIO: dict[str, Any] = {
    "cluster": {"spec": "h100-80g-sxm", "nodes": 1},
    "models": {"actor": {"spec": "qwen2-7b"}},
    "workload": {"prompts": 64, "responses_per_prompt": 4, "prompt_tokens": 128, "response_tokens": 256},
    "algorithm": {"name": "grpo", "reward": "function"},
    "generation": {"engine": "engine", "tensor_parallel": 2, "cuda_graphs": False},
    "simulation": {"iterations": 2},
}


def scenario(**sections: Any) -> Scenario:
    return scenario_from_dict(SCENARIO | sections)


def profile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsources: {log: a log}\n" + text)
    return str(path)


# ---------------------------------------------------------------- what a profile changes


def test_who_speaks_first(tmp_path: Path) -> None:
    """The scenario, then the machines' own measurements, then the framework."""
    text = "overheads: {firing_seconds: {value: 1, source: log}, decode_step_seconds: {value: 2, source: log}}\n"
    name = profile(tmp_path, text)
    assert scenario(framework=name).overheads.firing_seconds == 1
    cluster = SCENARIO["cluster"] | {"overheads": {"firing_seconds": 3, "decode_step_seconds": 4}}
    both = scenario(framework=name, cluster=cluster, overheads={"firing_seconds": 5}).overheads
    assert (both.firing_seconds, both.decode_step_seconds) == (5, 4)


def test_parts_of_a_cluster_have_it_too(tmp_path: Path) -> None:
    name = profile(tmp_path, "overheads: {firing_seconds: {value: 1, source: log}}\n")
    parts = [{"spec": "h100-80g-sxm", "nodes": 1}, {"spec": "h20-96g", "nodes": 1, "overheads": {"firing_seconds": 3}}]
    found = scenario(framework=name, cluster={"parts": parts})
    assert [found.overheads_of(part).firing_seconds for part in found.cluster.all_parts] == [1, 3]


def test_kernels_are_the_frameworks_unless_a_model_says_so(tmp_path: Path) -> None:
    name = profile(tmp_path, "fused_kernels: false\nfused_kernels_source: log\n")
    models = {"actor": {"spec": "qwen2-7b"}, "reference": {"fused_kernels": True}}
    found = scenario(framework=name, models=models).models
    assert (found.actor.fused_kernels, found.reference.fused_kernels) == (False, True)
    assert scenario().models.actor.fused_kernels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("overheads: {firing_second: {value: 1, source: log}}\n", "firing_second"),
        ("overheads: {firing_seconds: {value: 1, source: logs}}\n", "logs"),
        ("unexplained: {train: {value: 1, source: log}}\n", "train"),
        ("residuals: {gen: {log_sd: 0.1, count: 3}}\n", "gen"),
    ],
)
def test_broken_profile(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        scenario(framework=profile(tmp_path, text))


def test_unknown_profile() -> None:
    with pytest.raises(InputError, match="did you mean 'verl_fsdp'"):
        scenario(framework="verl_fsdb")


@pytest.mark.parametrize("kind", ["generation", "scoring", "training"])
def test_unexplained_stretches_its_stages_only(kind: str) -> None:
    """Of compute: on one GPU nothing is communicated."""
    one = {"cluster": SCENARIO["cluster"] | {"gpus_per_node": 1}, "models": {"actor": {"spec": "qwen2.5-0.5b"}}}
    one["generation"] = {"engine": "engine"}
    plain = stage_seconds(simulate(prepare(scenario(**one))))
    more = stage_seconds(simulate(prepare(scenario(**one, overheads={"unexplained": {kind: 1.5}}))))
    stages = {"generation": {"gen"}, "scoring": {"old_log_prob", "ref"}, "training": {"update_actor"}}
    for stage, seconds in plain.items():
        assert more[stage] == pytest.approx(seconds * (1.5 if stage in stages[kind] else 1)), stage


def test_nothing_is_unexplained_without_the_effect() -> None:
    off = {"effects": {"efficiency": False}}
    more = scenario(**off, overheads={"unexplained": {"training": 9, "scoring": 9, "generation": 9}})
    assert stage_seconds(simulate(prepare(more))) == stage_seconds(simulate(prepare(scenario(**off))))


def test_a_pipeline_stretches_as_a_whole() -> None:
    models = {"actor": {"spec": "qwen2-7b", "zero_stage": 1, "pipeline_parallel": 4, "micro_batch_samples": 4}}
    free = {"models": models, "effects": {"links": False}}
    plain = stage_seconds(simulate(prepare(scenario(**free))))["update_actor"]
    more = scenario(**free, overheads={"unexplained": {"training": 2}})
    assert stage_seconds(simulate(prepare(more)))["update_actor"] == pytest.approx(2 * plain, rel=1e-6)


# ---------------------------------------------------------------- eager kernels


def test_bytes_of_eager_kernels() -> None:
    """The totals of `experiments/eager_traffic/measure.py` per token: 84 bytes a hidden element forward, 214 backward,
    20 and 32 a query or key, 10 and 18 an element of the MLP."""
    from rlhfsim.costs.kernels import load_kernels
    from rlhfsim.costs.operators import Operators
    from rlhfsim.spec.data import data_dir
    from rlhfsim.spec.model_spec import DENSE

    found = scenario(models={"actor": {"spec": "qwen2-7b", "fused_kernels": False}})
    kernels = load_kernels(data_dir("hw_specs") / "kernels" / "hopper.yaml")
    gpu = load_cluster("h100-80g-sxm").gpu
    ops = Operators(gpu, kernels, found.effects, found.overheads)
    use, tokens = found.models.actor, 1e6
    shape, rate = use.shape, gpu.memory_bytes_per_second.value * kernels.memory["residual_add"].memory_efficiency
    for backward, hidden, heads, mlp in ((False, 84, 20, 10), (True, 214, 32, 18)):
        moved = hidden * shape.hidden + heads * (shape.query_width + shape.kv_width) + mlp * shape.ffn
        time = ops._eager_elementwise(use, tokens, 1, DENSE, backward=backward)
        assert float(time.seconds) == pytest.approx(tokens * moved / rate, rel=0.01)


# ---------------------------------------------------------------- calibration and prediction


def test_split_by_the_hash_of_the_group() -> None:
    """Of a framework with several groups a third calibrates: the first in the order of their SHA-256. No group is in
    both, and nobody chose."""
    groups: dict[str, set[str]] = defaultdict(set)
    roles: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        file = cases_of(read_yaml(path))
        for case in file.cases:
            groups[file.framework].add(case.group)
            roles[case.group].add(case.role)
    for found in groups.values():
        ordered = sorted(found, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
        first = ordered[: ceil(len(ordered) / 3)] if len(ordered) > 1 else []
        assert {group: roles[group] for group in ordered} == {
            group: {"calibration" if group in first else "prediction"} for group in ordered
        }


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_are_fitted_on_their_own_calibration(path: Path) -> None:
    found = Framework.model_validate(read_yaml(path).data)
    assert found.name == path.stem
    own = set()
    for file in FILES:
        document = read_yaml(file)
        if document.data["scenario"].get("framework") == found.name:
            own |= {case.group for case in cases_of(document).cases if case.role == "calibration"}
    assert set(found.fitted_on) <= own


def test_what_a_profile_was_fitted_on_is_no_prediction(tmp_path: Path) -> None:
    fitted = profile(tmp_path, "fitted_on: [a/b/c]\n")
    case = {"id": "x", "quality": "A", "group": "a/b/c", "measured": {"step_seconds": 10}}
    data = {"framework": "mine", "source": {"title": "t", "url": "u"}, "tolerance": {"a/b/c": {}}}
    data |= {"scenario": SCENARIO | {"framework": fitted}}
    import json

    path = tmp_path / "x.cases.yaml"
    path.write_text(json.dumps(data | {"cases": [case | {"role": "calibration"}]}))
    assert run_file(path)[0]
    path.write_text(json.dumps(data | {"cases": [case | {"role": "prediction"}]}))
    with pytest.raises(InputError, match="was fitted on the group a/b/c"):
        run_file(path)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20, 100])
def test_t_quantile(count: int) -> None:
    assert t_quantile(count) == pytest.approx(stats.t.ppf(0.95, count), rel=0.01)


@given(st.integers(1, 300), st.floats(0, 1))
def test_share_limits(count: int, share: float) -> None:
    successes = round(count * share)
    known = stats.binomtest(successes, count).proportion_ci(0.9, method="wilson")
    assert share_limits(successes, count) == pytest.approx((known.low, known.high), abs=1e-9)


def test_intervals_hold_what_they_promise() -> None:
    """Errors of that standard deviation, estimated from as many cases: nine of ten within."""
    rng, count = np.random.default_rng(0), 8
    inside = []
    for _ in range(4000):
        errors = rng.normal(0, 0.3, count)
        residual = Residual(log_sd=float(np.sqrt(np.mean(errors**2))), count=count)
        low, high = widened(1.0, 1.0, residual)
        inside.append(low <= exp(rng.normal(0, 0.3)) <= high)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.015)


@given(st.floats(1, 10), st.floats(0, 1))
def test_unknown_inputs_and_residuals_add_as_squares(ratio: float, log_sd: float) -> None:
    low, high = widened(2.0, 2.0 * ratio, Residual(log_sd=log_sd, count=10**6))
    assert low * high == pytest.approx(4 * ratio)
    assert (log(high / low) / 2) ** 2 == pytest.approx(
        (log(ratio) / 2) ** 2 + (1.645 * log_sd) ** 2, rel=1e-3, abs=1e-9
    )


def test_a_stage_has_the_interval_of_its_phase(tmp_path: Path) -> None:
    residuals = "residuals: {step: {log_sd: 0.2, count: 50}, scoring: {log_sd: 0.4, count: 50}}\n"
    found = scenario(framework=profile(tmp_path, residuals))
    ranges = intervals(found.framework, {STEP: 100.0, "ref": 10.0, "gen": 50.0})
    assert set(ranges) == {STEP, "ref"}
    wide = {name: log(high / low) for name, (low, high) in ranges.items()}
    assert wide["ref"] == pytest.approx(2 * wide[STEP])
    assert intervals(None, {STEP: 100.0}) == {}
