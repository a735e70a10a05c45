"""Elastic: trainer GPUs help to generate until a batch is there, then train it while the engines begin the next one.

Engines on ranks of their own generate all the time. While the others train, they finish the share `alone` of the next
batch; then new weights enter, what has not ended is spread over all ranks (its cache is computed again there), and when
the rest of the batch has ended the trainers score and train it. So what is generated alone is one step old, and part of
what all of them finish is too.

In the frameworks: verl's hybrid rollout switching (verl-project/verl, pull requests #6556 for fully_async and #7373 for
separate_async: trainer replicas are lent to generation and reclaimed when enough prompts have ended); asked for in
miles (radixark/miles, issue #1295). verl adapts the share while it runs; here it is an option.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, apart

TWENTIETHS = 20


def build(
    algorithm: Algorithm, devices: Devices, *, alone: float = 0.5, split: dict[str, float] | None = None
) -> StageGraph:
    """alone: share of a batch that the engines finish while the trainers are busy, in steps of 5 %.

    split: shares of the ranks, by `generation` (all the time) and `training` (which helps).
    """
    share = round(alone * TWENTIETHS)
    if not 0 < share < TWENTIETHS:
        raise ValueError(f"alone is {alone} (0.05 to 0.95)")
    if not devices.own_engine:
        raise ValueError("elastic needs inference engines that ranks can leave (generation.engine: engine)")
    where = apart(algorithm, devices, split)
    generating, training = where["generation"], where["training"]
    everyone = (*generating, *training)
    graph = StageGraph(lanes=TWENTIETHS)
    parts = {"gen": (generating, range(share)), "gen.tail": (everyone, range(share, TWENTIETHS))}
    for name, (ranks, serves) in parts.items():
        begun = TWENTIETHS / share if name == "gen" else 1.0  # the whole batch, for the share that is awaited
        graph.stage(name, "generate", "shadow_actor", ranks, serves=serves, unfinished="carry", oversampling=begun)
    graph.link("gen", "gen.tail")
    scores, updates = algorithm.of_kind("score"), algorithm.of_kind("train")
    for step in scores:
        graph.stage(step.name, "score", step.model, training)
        for maker in parts:
            graph.link(maker, step.name, carries=algorithm.step("gen").fields)
    for update in updates:
        graph.stage(
            update.name, "train", update.model, training, after=[s.name for s in scores], loop=updates[0].name,
            chunks=algorithm.minibatches, epochs=algorithm.epochs,
        )  # fmt: skip
    graph.stage(
        "update_weights", "sync", "actor", everyone, target="shadow_actor", enters="when_ready",
        after=[update.name for update in updates],
    )  # fmt: skip
    graph.link("update_weights", "gen.tail", lag=1)
    graph.link("update_weights", "gen", lag=2)
    return graph
