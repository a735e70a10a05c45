"""Placement strategies: one file each, with a function `build(algorithm, devices, **options) -> StageGraph`.

The file is the registration: `strategy.name: colocated` finds `colocated.py`. A strategy knows ranks and order; it
knows no bandwidth, no byte and no second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm

from rlhfsim.algorithms import Algorithm


@dataclass(frozen=True)
class Devices:
    """The ranks that a strategy may use, and how many of them each stage needs at once.

    together: stage name -> ranks that start and end together (a tensor-parallel engine, a pipeline); a stage that is
        not named moves all its ranks together (a ZeRO-3 domain, a training step).
    replica: model -> ranks of one replica; a model's device set is a multiple of it (default 1).
    own_engine: responses are generated from a separate copy of the actor (`shadow_actor`), not from the actor itself.
    controller: scores of all ranks are gathered stage by stage (`execution` of the scenario).
    guests: models that are none, as a function, judge or sandbox gives what they would: their stages need no GPU, and
        take turns on the ranks of another model.
    """

    ranks: tuple[int, ...]
    per_node: int
    together: dict[str, int] = field(default_factory=dict)
    replica: dict[str, int] = field(default_factory=dict)
    own_engine: bool = False
    controller: bool = False
    guests: tuple[str, ...] = ()

    def size(self, stage: str) -> int | None:
        return self.together.get(stage)

    def meeting(self, stage: str) -> int | None:
        """`size` of a scoring stage: with a controller all its ranks begin when the stage before has been gathered, and
        end together."""
        return None if self.controller else self.size(stage)

    def unit(self, stage: str, model: str) -> int:
        """What the number of a stage's ranks must be a multiple of."""
        return self.together.get(stage) or self.replica.get(model, 1)


def divide(
    ranks: tuple[int, ...], shares: dict[str, float], units: dict[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Cut ranks into disjoint contiguous parts, in proportion to `shares`, each a multiple of its unit (default 1).

    Every part gets at least one unit; what rounding leaves over goes where it is missed most. Raises ValueError where
    a share is not positive or the units alone need more ranks than there are.
    """
    for name, share in shares.items():
        if not 0 < share < float("inf"):
            raise ValueError(f"the share of {name} is {share}: it must be positive")
    units = {name: (units or {}).get(name, 1) for name in shares}
    sizes = dict(units)
    if (least := sum(sizes.values())) > len(ranks):
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"{len(ranks)} ranks are too few to divide: at least {least} are needed ({parts})")
    total = sum(shares.values())
    while True:
        left = len(ranks) - sum(sizes.values())
        missed = {n: len(ranks) * shares[n] / total - sizes[n] for n in shares if units[n] <= left}
        if not missed:
            break
        name = max(missed, key=lambda n: missed[n])
        sizes[name] += units[name]
    divided: dict[str, tuple[int, ...]] = {}
    start = 0
    for name, size in sizes.items():
        divided[name], start = ranks[start : start + size], start + size
    return divided


def hosts(algorithm: Algorithm, devices: Devices) -> dict[str, str]:
    """Each model that scores or trains -> the one on whose ranks it does: itself, or of a guest the reference, which
    has the least work, else the actor."""
    models = dict.fromkeys(s.model for s in algorithm.of_kind("score", "train"))
    host = "reference" if "reference" in models else "actor"
    return {model: host if model in devices.guests else model for model in models}


def apart(algorithm: Algorithm, devices: Devices, split: dict[str, float] | None = None) -> dict[str, tuple[int, ...]]:
    """Ranks for `generation`, and for `training` with everything else; in halves, or in the shares of `split`."""
    if split is not None and set(split) != {"generation", "training"}:
        raise ValueError(f"split names {', '.join(split) or 'nothing'}: generation and training are needed")
    models = {s.model for s in algorithm.of_kind("score", "train")}
    units = {
        "generation": devices.replica.get("shadow_actor", 1),
        "training": lcm(*(devices.replica.get(model, 1) for model in models)),
    }
    return divide(devices.ranks, split or {"generation": 1.0, "training": 1.0}, units)
