"""Interleaving: actor and critic on all ranks, reference and reward model on disjoint parts that run at the same time.

An owner scores its own lane first, then one lane of another rank per turn (or all in one pass with `concat`). Tokens go
to the owners and scores come back as messages between ranks. An algorithm without reference leaves the reward model on
all ranks, as a reward that no model gives leaves the reference there.
"""

from __future__ import annotations

from itertools import product
from math import lcm

from rlhfsim.algorithms import Algorithm, Step
from rlhfsim.graph import StageGraph, overlap

from . import Devices, divide


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    calls: int = 1,
    mode: str = "async",
    ratio: float = 0.5,
    owners: dict[str, list[int]] | None = None,
    concat: bool = False,
) -> StageGraph:
    """calls: generation calls per iteration.

    mode: `async`: all tokens are exchanged first and each owner runs only its model. `sync`: every rank steps through
        the reference, then the reward calls, so a reward owner gets another rank's tokens only after that rank's
        reference calls.
    ratio: share of the ranks that own the reference; the others own the reward model.
    owners: exact ranks instead, by model: reference and reward (those that there are), and critic or actor where one
        sits on a part as well.
    concat: an owner scores all its lanes in one pass instead of turn by turn.
    """
    if mode not in ("sync", "async"):
        raise ValueError(f"mode is {mode!r} (allowed: sync, async)")
    if owners is None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}: it must lie between 0 and 1")
        units = {model: _unit(algorithm, devices, model) for model in _judges(algorithm, devices)}
        parts = divide(devices.ranks, {m: ratio if m == "reference" else 1 - ratio for m in units}, units)
        owners = {model: list(own) for model, own in parts.items()}
    _check(owners, devices, algorithm)
    ranks = _ordered(owners, devices)
    # One lane a rank; more where all lanes must spread evenly over any number of owners.
    per_rank = lcm(len(ranks), *map(len, owners.values())) // len(ranks) if concat else 1
    graph = StageGraph(lanes=len(ranks) * per_rank)
    scored: dict[str, list[str]] = {}
    for step in algorithm.of_kind("generate", "score"):
        model = "shadow_actor" if step.kind == "generate" and devices.own_engine else step.model
        chunks = algorithm.chunks(step.name, calls)
        if model in owners:
            scored[step.name] = _turns(graph, step, owners[model], ranks, concat, devices, chunks)
            if mode == "sync" and model == "reward":
                _ask_late(graph, scored[step.name], owners["reward"], ranks, per_rank, chunks)
        else:
            size = devices.size(step.name) if step.kind == "generate" else devices.meeting(step.name)
            scored[step.name] = [graph.stage(step.name, step.kind, model, ranks, size=size, chunks=chunks)]
        for needed in step.needs:
            stream = algorithm.streams(needed, step.name)
            for maker, user in product(scored[needed], scored[step.name]):
                graph.link(maker, user, stream=stream, carries=algorithm.step(needed).fields)
    updates = algorithm.of_kind("train")
    for update in updates:
        graph.stage(
            update.name,
            "train",
            update.model,
            owners.get(update.model, ranks),
            loop=updates[0].name,
            chunks=algorithm.minibatches,
            epochs=algorithm.epochs,
        )
        for needed in update.needs:
            for turn in scored[needed]:
                graph.link(turn, update.name, carries=algorithm.step(needed).fields)
    if devices.own_engine:
        graph.stage("update_weights", "sync", "actor", ranks, target="shadow_actor", after=["update_actor"])
        graph.link("update_weights", "gen", lag=1)
    for update, generate in product(updates, scored["gen"]):
        graph.link(update.name, generate, lag=1)
    return graph


def _judges(algorithm: Algorithm, devices: Devices) -> list[str]:
    """What interleaving puts on disjoint parts."""
    return [m for m in ("reference", "reward") if m in algorithm.models and m not in devices.guests]


def _unit(algorithm: Algorithm, devices: Devices, model: str) -> int:
    """Ranks of a part that hosts a model come in multiples of this."""
    steps = [s for s in algorithm.of_kind("generate", "score") if s.model == model]
    return lcm(*(devices.unit(s.name, model) for s in steps))


def _check(owners: dict[str, list[int]], devices: Devices, algorithm: Algorithm) -> None:
    allowed = dict.fromkeys(s.model for s in algorithm.of_kind("score"))
    for model, own in owners.items():
        if model not in allowed:
            raise ValueError(f"owners names {model!r} (allowed: {', '.join(allowed)})")
        if not own or not set(own) <= set(devices.ranks) or len(set(own)) != len(own):
            raise ValueError(f"owners.{model} is {own}: distinct ranks of 0 to {devices.ranks[-1]} are needed")
        if len(own) % (unit := _unit(algorithm, devices, model)):
            raise ValueError(f"owners.{model} has {len(own)} ranks, which do not divide into replicas of {unit}")
    if missing := set(_judges(algorithm, devices)) - set(owners):
        raise ValueError(f"owners lacks {', '.join(sorted(missing))}")
    if both := set(owners.get("reference", ())) & set(owners.get("reward", ())):
        raise ValueError(
            f"owners.reference and owners.reward share the ranks {sorted(both)}; interleaving needs disjoint ones"
        )


def _ordered(owners: dict[str, list[int]], devices: Devices) -> tuple[int, ...]:
    """Reference owners, reward owners, others: lane k belongs to the k-th of these, so an owner's lanes are a range."""
    first = [*owners.get("reference", ()), *owners.get("reward", ())]
    return (*first, *(r for r in devices.ranks if r not in set(first)))


def _turns(
    graph: StageGraph, step: Step, own: list[int], ranks: tuple[int, ...], concat: bool, devices: Devices, chunks: int
) -> list[str]:
    """The stages in which `own` handle every lane; their names, in order."""
    size = devices.meeting(step.name) or len(own)
    if concat:
        return [graph.stage(step.name, step.kind, step.model, own, size=size, chunks=chunks)]
    mine = sorted(ranks.index(r) for r in own)
    own, places = [ranks[k] for k in mine], len(own) // size
    start, stop = mine[0], mine[-1] + 1
    if stop - start != len(own):  # a subset that is no range of lanes serves from the first lane on
        start, stop = 0, len(own)
    runs = [range(start, stop)]
    for lo, hi in ((0, start), (stop, len(ranks))):
        while lo < hi:  # a last, smaller turn occupies only some of the owners
            count = min(len(own), hi - lo)
            count -= count % places if count > places else 0
            runs.append(range(lo, lo := lo + count))
    return [
        graph.stage(
            f"{step.name}.{turn}",
            step.kind,
            step.model,
            own[: min(places, len(lanes)) * size],
            size=size,
            serves=lanes,
            chunks=chunks,
        )
        for turn, lanes in enumerate(runs)
    ]


def _ask_late(
    graph: StageGraph, turns: list[str], own: list[int], ranks: tuple[int, ...], per_rank: int, chunks: int
) -> None:
    """Sync mode: the tokens of a lane reach the reward owner only when the lane's rank comes to this line."""
    mine = sorted(ranks.index(r) for r in own)
    for turn in turns:
        for side, (lo, hi) in enumerate(((0, mine[0]), (mine[-1] + 1, len(ranks)))):
            if lanes := overlap(graph.at(turn).serves, range(lo * per_rank, hi * per_rank)):
                askers = ranks[lanes.start // per_rank : lanes.stop // per_rank]
                asked = graph.stage(f"ids.{turn}.{side}", "swap", "none", askers, size=1, chunks=chunks, serves=lanes)
                graph.link(asked, turn, stream=True)
