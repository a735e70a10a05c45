"""Stage fusion: when few responses are left, they move to a few engines, and the other ranks begin to score.

Co-located otherwise. Frozen models live on the ranks that the tail leaves; models that train are sharded over all ranks
and score when the tail has ended, unless every rank has a whole replica.

RLHFuse (Zhong et al. 2024, arXiv 2409.13221, inter-stage fusion); the responses that move have their cache computed
again there (RLHFuse migrates it where that is cheaper). Its fusion of the two models' training pipelines is not
modelled.
"""

from __future__ import annotations

from math import lcm

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices

TWENTIETHS = 20


def build(algorithm: Algorithm, devices: Devices, *, tail: float = 0.2, tail_ranks: float = 0.25) -> StageGraph:
    """tail: share of the responses that are left when the others' ranks begin to score, in steps of 5 %.

    tail_ranks: share of the ranks that finish them.
    """
    left = round(tail * TWENTIETHS)
    if not 0 < left < TWENTIETHS or not 0 < tail_ranks < 1:
        raise ValueError(f"tail is {tail} (0.05 to 0.95), tail_ranks {tail_ranks} (between 0 and 1)")
    if not devices.own_engine:
        raise ValueError("stage_fusion needs inference engines that ranks can leave (generation.engine: engine)")
    everyone = devices.ranks
    trained = {s.model for s in algorithm.of_kind("train")}
    early = [s for s in algorithm.of_kind("score") if s.model not in trained or devices.size(s.name)]
    unit = lcm(devices.size("gen") or 1, *(devices.size(s.name) or 1 for s in early))
    few = max(1, round(tail_ranks * len(everyone) / unit)) * unit
    lasting, leaving = everyone[:few], everyone[few:]
    if not leaving:
        raise ValueError(f"{len(everyone)} ranks are too few: {few} go on with the tail, and none is left to score")
    part = lcm(*(len(leaving) // (devices.size(s.name) or len(leaving)) for s in early), len(everyone))
    graph = StageGraph(lanes=TWENTIETHS * part)
    cut = (TWENTIETHS - left) * part
    makers = {"gen": range(cut), "gen.tail": range(cut, graph.lanes)}
    begun = TWENTIETHS / (TWENTIETHS - left)  # for each response that `gen` itself needs
    graph.stage(
        "gen", "generate", "shadow_actor", everyone, serves=makers["gen"], unfinished="carry", oversampling=begun
    )
    graph.stage(
        "gen.tail", "generate", "shadow_actor", lasting, serves=makers["gen.tail"], unfinished="carry", after=["gen"]
    )
    fields, scored = algorithm.step("gen").fields, []
    for turn, (maker, serves) in enumerate(makers.items()):
        for step in early:
            size = devices.size(step.name)
            scored.append(graph.stage(f"{step.name}.{turn}", "score", step.model, leaving, size=size, serves=serves))
            graph.link(maker, scored[-1], carries=fields)
    for step in algorithm.of_kind("score"):
        if step not in early:
            scored.append(graph.stage(step.name, "score", step.model, everyone))
            for maker in makers:
                graph.link(maker, step.name, carries=fields)
    updates = algorithm.of_kind("train")
    for update in updates:
        graph.stage(
            update.name,
            "train",
            update.model,
            everyone,
            after=scored,
            loop=updates[0].name,
            chunks=algorithm.minibatches,
            epochs=algorithm.epochs,
        )
        graph.link(update.name, "gen", lag=1)
    graph.stage("update_weights", "sync", "actor", everyone, target="shadow_actor", after=["update_actor"])
    graph.link("update_weights", "gen", lag=1)
    return graph
