"""Asynchronous: engines that never stop on ranks of their own, a trainer that takes what has ended, bounded staleness.

Everything but generation runs on the training ranks. Responses count in the order in which they end; whatever has not
ended stays in the engines while new weights enter. Of n samples an iteration, at most (version + staleness + 1) n are
begun, so a trainer that is `staleness` steps behind stops generation.

Age is bounded only for a response's newest tokens: one that others overtake may be older than `staleness` when it is
trained. `strict` throws such prompts away, and begins others.

In the frameworks: AReaL (docs "Asynchronous RL"; max_head_offpolicyness, areal/core/staleness_manager.py @08911ddf):
staleness, interrupt. verl's fully async recipe (docs, advance/fully_async): staleness_threshold, partial_rollout.
NeMo-RL (guide "Async GRPO"): max_trajectory_age_steps, in_flight_weight_updates (interrupt),
recompute_kv_cache_after_weight_updates (recompute). ROLL's async_generation_ratio.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, apart


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    staleness: int = 1,
    interrupt: bool = True,
    recompute: bool = True,
    strict: bool = False,
    chunks: int = 4,
    stream: bool = False,
    whole_batches: bool = False,
    recompute_log_probs: bool = True,
    split: dict[str, float] | None = None,
) -> StageGraph:
    """staleness: by how many versions the weights may lag when a response is begun; 0: on-policy.

    interrupt: new weights stop the engines at their next step; otherwise they enter when a chunk has ended.
    recompute: the caches of running responses are computed again with the new weights.
    strict: no token that is trained is older than `staleness`; prompts that would be are thrown away.
    chunks: pieces in which responses that have ended go to scoring.
    stream: a mini-batch trains as soon as it is scored; otherwise when the whole batch is.
    whole_batches: the next batch begins when all responses of the one before have ended.
    recompute_log_probs: behaviour log-probs by a pass of the actor, not by the engine.
    split: shares of the ranks, by `generation` and `training`.
    """
    if staleness < 0:
        raise ValueError(f"staleness is {staleness} (at least 0)")
    where = apart(algorithm, devices, split)
    generating, training = where["generation"], where["training"]
    graph = StageGraph(lanes=len(training))
    graph.stage(
        "gen",
        "generate",
        "shadow_actor",
        generating,
        chunks=chunks,
        unfinished="wait" if whole_batches else "keep",
        recompute=recompute,
        max_age=staleness if strict else None,
    )
    scores = [
        s for s in algorithm.of_kind("score") if s.name != "old_log_prob" or recompute_log_probs or "values" in s.fields
    ]
    for step in scores:
        graph.stage(step.name, "score", step.model, training, size=devices.size(step.name), chunks=chunks)
        graph.link("gen", step.name, stream=True, carries=(*algorithm.step("gen").fields, "log_probs"))
    updates = algorithm.of_kind("train")
    for update in updates:
        graph.stage(
            update.name,
            "train",
            update.model,
            training,
            loop=updates[0].name,
            chunks=algorithm.minibatches,
            epochs=algorithm.epochs,
        )
        for step in scores:
            graph.link(step.name, update.name, stream=stream)
    graph.stage(
        "update_weights",
        "sync",
        "actor",
        [*training, *generating],
        target="shadow_actor",
        enters="interrupts" if interrupt else "when_ready",
        after=[update.name for update in updates],
    )
    graph.link("update_weights", "gen", lag=1 + staleness)
    return graph
