"""Co-located (the paper's Flattening): all models on every rank, one after the other.

For each of `calls` generation calls: generate, then score with each model in turn; after the last, train on all of it.
Responses come from the actor itself, or from an engine's own copy that is refreshed after the update. With a controller
(`execution`) all ranks begin a score together, when all responses or the scores before are there; otherwise replicas
that hold whole models go on with what is their own.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices


def build(algorithm: Algorithm, devices: Devices, *, calls: int = 1) -> StageGraph:
    """calls: into how many generation calls the batch of one iteration, or of one round, is cut (the paper's rollout
    size)."""
    graph = StageGraph(lanes=len(devices.ranks))
    updates = algorithm.of_kind("train")
    for step in algorithm.steps:
        if step.kind == "train":
            graph.stage(
                step.name,
                "train",
                step.model,
                devices.ranks,
                after=step.needs,
                loop=updates[0].name,
                chunks=algorithm.minibatches,
                epochs=algorithm.epochs,
            )
        else:
            model = "shadow_actor" if step.kind == "generate" and devices.own_engine else step.model
            size = devices.size(step.name) if step.kind == "generate" else devices.meeting(step.name)
            chunks = algorithm.chunks(step.name, calls)
            graph.stage(step.name, step.kind, model, devices.ranks, size=size, chunks=chunks)
            for needed in step.needs:
                graph.link(needed, step.name, stream=algorithm.streams(needed, step.name))
    if devices.own_engine:
        graph.stage("update_weights", "sync", "actor", devices.ranks, target="shadow_actor", after=["update_actor"])
        graph.link("update_weights", "gen", lag=1)
    for update in updates:
        graph.link(update.name, "gen", lag=1)
    return graph
