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
    everyone, unit = devices.ranks, devices.size("gen") or 1
    few = max(1, round(tail_ranks * len(everyone) / unit)) * unit
    lasting, leaving = everyone[:few], everyone[few:]
    trained = {s.model for s in algorithm.of_kind("train")}
    early = [s for s in algorithm.of_kind("score") if s.model not in trained or devices.size(s.name)]
    part = lcm(*(len(leaving) // (devices.size(s.name) or len(leaving)) for s in early), len(everyone))
    graph = StageGraph(lanes=TWENTIETHS * part)
    pieces = range((TWENTIETHS - left) * part), range((TWENTIETHS - left) * part, TWENTIETHS * part)
    share = TWENTIETHS / (TWENTIETHS - left)
    graph.stage("gen", "generate", "shadow_actor", everyone, serves=pieces[0], unfinished="carry", oversampling=share)
    graph.stage("gen.tail", "generate", "shadow_actor", lasting, serves=pieces[1], unfinished="carry", after=["gen"])
    scored = []
    for step in algorithm.of_kind("score"):
        size = devices.size(step.name)
        turns = (
            [
                graph.stage(f"{step.name}.{k}", "score", step.model, leaving, size=size, serves=s)
                for k, s in enumerate(pieces)
            ]
            if step in early
            else [graph.stage(step.name, "score", step.model, everyone, size=size)]
        )
        for turn in turns:
            for maker, serves in zip(("gen", "gen.tail"), pieces, strict=True):
                if len(turns) == 1 or graph.at(turn).serves == serves:
                    graph.link(maker, turn, carries=algorithm.step("gen").fields)
        scored += turns
    updates = algorithm.of_kind("train")
    for update in updates:
        graph.stage(
            update.name, "train", update.model, everyone, after=scored, loop=updates[0].name,
            chunks=algorithm.minibatches, epochs=algorithm.epochs,
        )  # fmt: skip
        graph.link(update.name, "gen", lag=1)
    graph.stage("update_weights", "sync", "actor", everyone, target="shadow_actor", after=["update_actor"])
    graph.link("update_weights", "gen", lag=1)
    return graph
