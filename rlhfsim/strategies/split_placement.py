"""Split placement: vLLM engines, actor, critic, reference and reward model on ranks of their own, one step at a time.

All responses are generated, then every model scores them on its own ranks at the same time, then actor and critic train
at the same time, then the new weights go to the engines. Nothing overlaps from one iteration to the next.

OpenRLHF (openrlhf/cli/train_ppo_ray.py @021d1b09) without --colocate_all_models; the options are its flags
(--colocate_all_models itself is strategy `colocated` with engine `engine`, --async_train is `one_step_off`).
vllm_tensor_parallel_size is `generation.tensor_parallel`.
"""

from __future__ import annotations

from math import lcm

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, divide, hosts

SHARES = {"vllm": 2.0, "actor": 2.0, "reference": 1.0, "critic": 2.0, "reward": 1.0}


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    colocate_actor_ref: bool = False,
    colocate_critic_reward: bool = False,
    vllm_num_engines: int | None = None,
    split: dict[str, float] | None = None,
) -> StageGraph:
    """colocate_actor_ref, colocate_critic_reward: two models share ranks, where they take turns.

    vllm_num_engines: engines; by default as many as their share of the ranks has room for.
    split: shares of the ranks by `vllm` and the first model of each group (vllm: not where vllm_num_engines is given).
    A reward that no model gives (--remote_rm_url) is on the reference's ranks, else the actor's.
    """
    host = hosts(algorithm, devices)
    if colocate_critic_reward and "reward" in devices.guests:
        raise ValueError("colocate_critic_reward is true, but no reward model needs a place")
    if colocate_critic_reward and {"critic", "reward"} <= set(host):
        host["reward"] = "critic"
    if colocate_actor_ref:
        host = {model: "actor" if group == "reference" else group for model, group in host.items()}
    where = _place(devices, list(dict.fromkeys(host.values())), host, vllm_num_engines, split)
    at = {model: where[group] for model, group in host.items()}
    scores, updates = algorithm.of_kind("score"), algorithm.of_kind("train")
    places = [len(at[s.model]) // (devices.size(s.name) or len(at[s.model])) for s in scores]
    graph = StageGraph(lanes=lcm(*places))
    graph.stage("gen", "generate", "shadow_actor", where["vllm"])
    for step in scores:
        graph.stage(step.name, "score", step.model, at[step.model], size=devices.size(step.name))
        graph.link("gen", step.name, carries=algorithm.step("gen").fields)
    for update in updates:
        graph.stage(
            update.name, "train", update.model, at[update.model], chunks=algorithm.minibatches, epochs=algorithm.epochs
        )
        for needed in update.needs:
            graph.link(needed, update.name, carries=algorithm.step(needed).fields)
        graph.link(update.name, "gen", lag=1)
    graph.stage(
        "update_weights", "sync", "actor", [*at["actor"], *where["vllm"]], target="shadow_actor", after=["update_actor"]
    )
    graph.link("update_weights", "gen", lag=1)
    return graph


def _place(
    devices: Devices, groups: list[str], host: dict[str, str], engines: int | None, split: dict[str, float] | None
) -> dict[str, tuple[int, ...]]:
    """The ranks of the engines and of each group of models."""
    named = groups if engines is not None else ["vllm", *groups]
    if split is not None and set(split) != set(named):
        raise ValueError(f"split must name exactly {', '.join(named)}")
    units = {g: lcm(*(devices.replica.get(m, 1) for m, group in host.items() if group == g)) for g in groups}
    unit = devices.replica.get("shadow_actor", 1)
    shares = {name: (split or SHARES)[name] for name in named}
    if engines is None:
        return divide(devices.ranks, shares, units | {"vllm": unit})
    count = engines * unit
    if not 0 < count < len(devices.ranks):
        raise ValueError(f"vllm_num_engines is {engines}: {count} of {len(devices.ranks)} ranks")
    return {"vllm": devices.ranks[:count]} | divide(devices.ranks[count:], shares, units)
