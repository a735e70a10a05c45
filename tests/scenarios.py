"""Scenarios for tests of the whole simulator: small enough for milliseconds, changed by dotted overrides."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from rlhfsim.simulate import prepare, simulate
from rlhfsim.spec.loader import scenario_from_dict
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Timeline, check

OFF = {f"effects.{name}": False for name in ("decode", "links", "memory", "sync", "efficiency")}
TAIL = {"workload.response_tokens": {"distribution": "lognormal", "mean_tokens": 60, "sigma": 0.8, "max_tokens": 256}}

# Every strategy with every engine that it can use.
PLACEMENTS = [
    ("colocated", "zero3_per_token"),
    ("colocated", "hybrid"),
    ("colocated", "engine"),
    ("interleaved", "zero3_per_token"),
    ("interleaved", "hybrid"),
    ("interleaved", "engine"),
    ("disaggregated", "hybrid"),
    ("disaggregated", "engine"),
]


def scenario(strategy: str = "colocated", engine: str = "hybrid", **changes: Any) -> Scenario:
    """PPO on 2 x 4 A100s with Llamas of 8 layers and fixed lengths, 64 samples in 2 minibatches.

    changes: by dotted name, with `__` for the dot or as `**{"a.b": value}`.
    """
    data: dict[str, Any] = {
        "cluster": {"spec": "a100-80g-sxm", "nodes": 2, "gpus_per_node": 4},
        "models": {"actor": {"spec": "small-8x512"}},
        "workload": {"prompts": 64, "prompt_tokens": 64, "response_tokens": 128},
        "algorithm": {"name": "ppo", "minibatches": 2},
        "generation": {"engine": engine},
        "strategy": {"name": strategy},
    }
    for key, value in changes.items():
        *path, last = key.replace("__", ".").split(".")
        at = data
        for name in path:
            at = at.setdefault(name, {})
        at[last] = deepcopy(value)  # a later change may be inside it
    return scenario_from_dict(data)


def timeline_of(found: Scenario, seed: int | None = None) -> Timeline:
    """Simulated and checked."""
    return check(simulate(prepare(found), seed=seed))
