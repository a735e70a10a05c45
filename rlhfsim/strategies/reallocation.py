"""Parameter reallocation: each call of an iteration has ranks of its own choice; weights move to where they are used.

Calls that need each other run one after the other, others at the same time where their ranks are apart. After its
update a model's weights are sent to the ranks (and into the layout) of its other calls.

ReaL (Mei et al. 2024, arXiv 2406.14088; openpsi-project/ReaLHF, realhf/experiments/common/ppo_exp.py @309563d4), whose
calls actor_gen, ref_inf, rew_inf, critic_inf, actor_train, critic_train are gen, ref, reward, values, update_actor and
update_critic here; log-probs come from generation, as there. A copy stays where it was sent (ReaL drops it after use).
"""

from __future__ import annotations

from math import lcm

from rlhfsim.algorithms import Algorithm, Step
from rlhfsim.graph import StageGraph

from . import Devices, divide


def build(algorithm: Algorithm, devices: Devices, *, ranks: dict[str, list[int]] | None = None) -> StageGraph:
    """ranks: of each call by name. By default generation has all, and calls of one kind share them equally (where no
    model gives the reward, it is on the ranks of `ref`, else on all)."""
    scores = [s for s in algorithm.of_kind("score") if s.name != "old_log_prob" or "values" in s.fields]
    updates = algorithm.of_kind("train")
    models = [s for s in scores if s.model not in devices.guests]
    where = {"gen": devices.ranks, **_shared(models, devices), **_shared(updates, devices)}
    where |= {s.name: where.get("ref", devices.ranks) for s in scores if s.model in devices.guests}
    for call, own in (ranks or {}).items():
        if call not in where or not own or not set(own) <= set(devices.ranks):
            raise ValueError(f"ranks.{call} is {own}: ranks of 0 to {devices.ranks[-1]} for {', '.join(where)}")
        where[call] = tuple(own)
    home = {update.model: where[update.name] for update in updates}
    copies = {"gen": "shadow_actor"}
    for step in scores:
        moved = step.model in home and where[step.name] != home[step.model]
        copies[step.name] = f"shadow_{step.model}" if moved else step.model
    places = [len(where[s.name]) // (devices.size(s.name) or len(where[s.name])) for s in scores]
    graph = StageGraph(lanes=lcm(*places))
    graph.stage("gen", "generate", "shadow_actor", where["gen"])
    for step in scores:
        graph.stage(step.name, "score", copies[step.name], where[step.name], size=devices.size(step.name))
        graph.link("gen", step.name, carries=algorithm.step("gen").fields)
    for update in updates:
        graph.stage(
            update.name, "train", update.model, where[update.name],
            chunks=algorithm.minibatches, epochs=algorithm.epochs,
        )  # fmt: skip
        for step in scores:
            graph.link(step.name, update.name, carries=step.fields)
    users = {"shadow_actor": "gen"} | {copy: call for call, copy in copies.items() if copy.startswith("shadow_")}
    for copy, call in users.items():
        model = copy.removeprefix("shadow_")
        name = "update_weights" if model == "actor" else f"update_weights.{model}"
        both = dict.fromkeys((*home[model], *where[call]))
        graph.stage(name, "sync", model, both, target=copy, after=[f"update_{model}"])
        for waiting in dict.fromkeys(("gen", call)):
            graph.link(name, waiting, lag=1)
    for update in updates:
        graph.link(update.name, "gen", lag=1)
    return graph


def _shared(calls: list[Step] | tuple[Step, ...], devices: Devices) -> dict[str, tuple[int, ...]]:
    units = {c.name: devices.unit(c.name, c.model) for c in calls}
    return divide(devices.ranks, dict.fromkeys(units, 1.0), units)
