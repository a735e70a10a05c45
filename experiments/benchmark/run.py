"""How fast rlhfsim answers, in CPU seconds of the machine that runs this. Compare ratios within one run.

`python experiments/benchmark/run.py` prints a Markdown table, `--json` one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests hold the per-token twin

from rlhfsim.compare import compare, rows_of  # noqa: E402
from rlhfsim.costs.engine import continuous_runs  # noqa: E402
from rlhfsim.costs.generation import StepSeconds  # noqa: E402
from rlhfsim.simulate import prepare, simulate  # noqa: E402
from rlhfsim.spec.loader import load_scenario  # noqa: E402
from rlhfsim.spec.scenario import Scenario  # noqa: E402

QUICKSTART = ROOT / "experiments" / "quickstart" / "scenario.yaml"
LARGE = HERE / "scenario.yaml"
PLACEMENTS = ("colocated", "interleaved", "disaggregated")
LENGTHS = {"fixed": ["workload.response_tokens=600"], "long-tailed": []}


def cpu_seconds() -> float:
    """Of this process and those that it has waited for; other programs on the machine do not count."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median CPU seconds of `repeats` runs, after one that fills caches (hardware files are read once a process)."""
    work()
    found = []
    for _ in range(repeats):
        gc.collect()
        start = cpu_seconds()
        work()
        found.append(cpu_seconds() - start)
    return statistics.median(found)


def process(*arguments: str) -> Callable[[], object]:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def answer(scenario: Scenario) -> None:
    """One iteration, from the scenario's record to its timeline."""
    simulate(prepare(scenario))


def starting() -> dict[str, float]:
    bare = seconds(process("-c", "import json, argparse"), 9)
    help_text = seconds(process("-m", "rlhfsim.cli", "--help"), 9)
    return {
        "bare_python_seconds": bare,
        "help_seconds": help_text,
        "help_ratio": help_text / bare,
        "fits_verb_seconds": seconds(process("-m", "rlhfsim.cli", "fits", str(QUICKSTART)), 3),
    }


def quickstart() -> dict[str, float]:
    scenario = load_scenario(QUICKSTART, ["simulation.iterations=1"])
    rows, baseline = rows_of(str(QUICKSTART), [])
    fits, iteration = seconds(lambda: prepare(scenario).fit()), seconds(lambda: answer(scenario))
    return {
        "fits_seconds": fits,
        "quickstart_iteration_seconds": iteration,
        "fits_to_simulate_ratio": fits / iteration,
        "compare_seconds": seconds(lambda: compare(rows, baseline), 1),
        "compare_as_given_seconds": seconds(lambda: compare(rows, baseline, tune=False), 3),
    }


def large() -> dict[str, object]:
    """1,024 GPUs, and what twice the GPUs or twice the samples cost (long-tailed lengths, where nothing folds)."""
    by_placement, gpus, samples = {}, {}, {}
    for placement in PLACEMENTS:
        own = [f"strategy.name={placement}"]
        for lengths, overrides in LENGTHS.items():
            scenario = load_scenario(LARGE, [*own, *overrides])
            by_placement[f"{placement}, {lengths}"] = seconds(lambda s=scenario: answer(s), 3)  # type: ignore[misc]
        time_now = by_placement[f"{placement}, long-tailed"]
        half = load_scenario(LARGE, [*own, "cluster.nodes=64"])
        twice = load_scenario(LARGE, [*own, "workload.prompts=8192"])
        gpus[placement] = time_now / seconds(lambda s=half: answer(s), 3)  # type: ignore[misc]
        samples[placement] = seconds(lambda s=twice: answer(s), 3) / time_now  # type: ignore[misc]
    return {
        "simulate_1024_gpus_seconds": max(by_placement.values()),
        "simulate_1024_gpus_by_placement": by_placement,
        "doubling_gpus_ratio": max(gpus.values()),
        "doubling_gpus_by_placement": gpus,
        "doubling_samples_ratio": max(samples.values()),
        "doubling_samples_by_placement": samples,
    }


def event_skipping() -> dict[str, float]:
    """Continuous batching of 64 long-tailed responses, by runs of equal steps and step by step (the tests' twin)."""
    from test_generation import ENGINE, long_tailed, operators, twin, twin_seconds, use

    prompts, responses = np.full(64, 256), long_tailed(64)
    block, blocks, budget = 16, 10_000, 8192
    costs, model = operators(), use()

    def by_runs() -> float:
        runs = continuous_runs(
            prompts, responses, max_sequences=64, step_tokens=budget, block_tokens=block, kv_blocks=blocks
        )
        return float(StepSeconds(costs, model, ENGINE).of(runs).sum())

    def by_steps() -> float:
        steps, *_ = twin(prompts.tolist(), responses.tolist(), 64, budget, block, blocks, whole=False, padded=False)
        host = StepSeconds(costs, model, ENGINE)
        overheads = host.floor_seconds, host.step_seconds, host.sequence_seconds
        return sum(twin_seconds(step, costs, model, *overheads) for step in steps)

    exact = by_steps()
    return {
        "event_skipping_speedup": seconds(by_steps, 1) / seconds(by_runs),
        "event_skipping_error": abs(by_runs() / exact - 1),
    }


def markdown(found: dict[str, object]) -> str:
    rows = ["| what | value |", "|---|---|"]
    for name, value in found.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        rows += [f"| {name}{': ' + part if part else ''} | {number:.3g} |" for part, number in entries]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    found: dict[str, object] = {}
    wanted = parser.parse_args()
    for part in (starting, quickstart, large, event_skipping):
        print(f"{part.__name__} ...", file=sys.stderr)
        found |= part()
    print(json.dumps(found, indent=2) if wanted.json else markdown(found))


if __name__ == "__main__":
    main()
