"""The configurations: what each changes of scenario.yaml, and the network that it runs on.

Two ranks are few: a disaggregated run trains on rank 0 and does everything else on rank 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Bytes per second from rank to rank, one direction; None: both ranks on one host.
NETWORKS: dict[str, float | None] = {"host": None, "1gbit": 125e6, "100mbit": 12.5e6}

ITERATIONS = 4  # as in scenario.yaml, where nothing else is said
S, M, L = "tiny-2x128", "tiny-4x256", "small-8x512"
TAIL = {"distribution": "lognormal", "mean_tokens": 32, "sigma": 0.8, "max_tokens": 128}
SPLIT = {"actor": [0], "critic": [0], **{m: [1] for m in ("shadow_actor", "shadow_critic", "reference", "reward")}}
CONTINUOUS = {"generation.max_sequences": 4}
MEDIUM = {"workload.prompts": 8}
LARGE = {"workload.prompts": 4, "algorithm.minibatches": 1}


@dataclass(frozen=True, eq=False)
class Config:
    """id: network/what runs. calibration: fitted on, therefore no prediction."""

    id: str
    overrides: dict[str, Any] = field(default_factory=dict)
    calibration: bool = False

    @property
    def iterations(self) -> int:
        """Of a run; the first is in no interval."""
        return int(self.overrides.get("simulation.iterations", ITERATIONS))

    @property
    def network(self) -> str:
        return self.id.partition("/")[0]


def config(
    network: str,
    strategy: str,
    engine: str,
    model: str,
    *,
    zero: int = 3,
    tail: bool = False,
    calibration: bool = False,
    name: str = "",
    **changes: Any,
) -> Config:
    """changes: dotted names with `__` for the dot."""
    overrides: dict[str, Any] = {"strategy.name": strategy, "generation.engine": engine}
    for role in ("actor", "critic"):
        overrides |= {f"models.{role}.spec": model, f"models.{role}.zero_stage": zero}
    if strategy == "disaggregated":
        overrides |= {"strategy.ranks": SPLIT, "strategy.batches": 2}
    if tail:
        overrides["workload.response_tokens"] = TAIL
    if engine == "engine":
        overrides |= CONTINUOUS
    overrides |= {S: {}, M: MEDIUM, L: LARGE}[model]
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    lengths = "tail" if tail else "fixed"
    parts = [strategy, engine, f"zero{zero}", model, lengths, *([name] if name else [])]
    return Config(f"{network}/{'-'.join(parts)}", overrides, calibration)


LONGER = {"workload__response_tokens": 96, "workload__prompts": 8, "algorithm__minibatches": 1}

CONFIGS = [
    # fitted on: what a stage's turn takes on the host
    config("host", "colocated", "hybrid", S, calibration=True),
    config("host", "colocated", "engine", S, zero=2, tail=True, calibration=True),
    config("host", "disaggregated", "engine", S, zero=2, calibration=True),
    config("100mbit", "colocated", "engine", S, zero=0, calibration=True),
    # one host
    config("host", "colocated", "zero3_per_token", S),
    config("host", "colocated", "zero3_per_token", M),
    config("host", "colocated", "zero3_per_token", M, tail=True),
    config("host", "colocated", "hybrid", M),
    config("host", "colocated", "hybrid", M, tail=True),
    config("host", "colocated", "hybrid", L),
    config("host", "colocated", "hybrid", M, name="epochs", algorithm__epochs=2),
    config("host", "colocated", "engine", M, zero=0),
    config("host", "colocated", "engine", M, zero=2, tail=True),
    config("host", "colocated", "engine", L, zero=2),
    config("host", "colocated", "engine", M, zero=1, name="padded", tail=True, workload__padded=True),
    config("host", "interleaved", "zero3_per_token", S, tail=True),
    config("host", "interleaved", "hybrid", M),
    config("host", "interleaved", "engine", M, zero=2, tail=True),
    config("host", "interleaved", "engine", L, zero=2),
    config("host", "disaggregated", "engine", M, zero=0),
    config("host", "disaggregated", "engine", M, zero=2, tail=True),
    config("host", "disaggregated", "engine", L, zero=2),
    config("host", "disaggregated", "engine", M, zero=2, name="batches4", strategy__batches=4),
    # two nodes
    config("1gbit", "colocated", "zero3_per_token", M, name="short", workload__response_tokens=16),
    config("1gbit", "colocated", "hybrid", M),
    config("1gbit", "colocated", "engine", M, zero=2, tail=True),
    config("1gbit", "interleaved", "hybrid", M, tail=True),
    config("1gbit", "disaggregated", "engine", M, zero=2),
    config("100mbit", "colocated", "zero3_per_token", S, name="long", simulation__iterations=2, **LONGER),
    config("100mbit", "colocated", "hybrid", S, name="long", **LONGER),
    config("100mbit", "colocated", "engine", S, zero=2, name="long", **LONGER),
    config("100mbit", "disaggregated", "engine", S, zero=2, name="long", **LONGER),
    config("100mbit", "interleaved", "hybrid", S, tail=True),
    config("100mbit", "colocated", "hybrid", S, tail=True),
]
