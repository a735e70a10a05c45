"""Disaggregated (the paper's Separation): generation, scoring, training on separate ranks, joined by bounded channels.

Copies of actor and critic (`shadow_actor`, `shadow_critic`) serve generation and values while the originals train on
batches that arrive. At the end of an iteration the new weights move to the copies; only then generation goes on. Where
prompts may be dropped, generation does not wait for the rewards of a round before it begins the next.
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, divide, hosts

# Shares of the ranks where nothing is said; two of eight for what holds optimizer states or generates.
SHARES = {"shadow_actor": 2, "reference": 1, "shadow_critic": 1, "reward": 1, "actor": 2, "critic": 1}


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    batches: int = 4,
    replicas: int = 1,
    spread: str = "robin",
    capacity: int = 1,
    shadow_critic: bool = True,
    recompute_log_probs: bool = False,
    barrier: bool = True,
    split: dict[str, float] | None = None,
    ranks: dict[str, list[int]] | None = None,
) -> StageGraph:
    """batches: pieces in which an iteration's samples stream through the stages.

    replicas: groups of generation ranks that take whole batches in turn; spread: `robin` in strict turn, `first`
        whichever is free. capacity: batches that may lie on a channel.
    shadow_critic: values from an own copy; otherwise from the critic's training ranks.
    recompute_log_probs: behaviour log-probs by a pass of the actor (on its training ranks) instead of by the engine.
    barrier: the next iteration begins when all weights have arrived; otherwise each copy waits only for its own, and
        generation may overlap a slower critic's last updates (as in the authors' code).
    split: shares of the ranks by model; ranks: exact ranks by model instead (models on the same rank take turns).
        A reward that no model gives is on the reference's ranks, else the actor's, but where `ranks` names its own.
    """
    if spread not in ("robin", "first"):
        raise ValueError(f"spread is {spread!r} (allowed: robin, first)")
    where = _place(algorithm, devices, shadow_critic, split, ranks)
    if replicas < 1 or len(where["shadow_actor"]) % replicas:
        raise ValueError(
            f"replicas is {replicas}: the {len(where['shadow_actor'])} ranks that generate do not divide by it"
        )
    graph = StageGraph()
    scores = [
        s for s in algorithm.of_kind("score") if s.name != "old_log_prob" or recompute_log_probs or "values" in s.fields
    ]
    if recompute_log_probs and "old_log_prob" not in (s.name for s in scores):
        raise ValueError("recompute_log_probs is true, but algorithm.old_log_prob leaves that pass out")
    # It shapes rewards from all the others; where the batch must be full before they begin, one of them comes last.
    hub = "reward" if algorithm.rounds == 1 or len(scores) == 1 else scores[-1].name

    def send(maker: str, user: str, carries: tuple[str, ...]) -> None:
        stream = algorithm.streams(maker, user)
        graph.link(maker, user, stream=stream, capacity=capacity if stream else None, carries=carries)

    graph.stage(
        "gen",
        "generate",
        "shadow_actor",
        where["shadow_actor"],
        size=len(where["shadow_actor"]) // replicas,
        chunks=algorithm.chunks("gen", batches),
        spread=spread,
    )
    for step in sorted(scores, key=lambda s: s.name == hub):
        model = "shadow_critic" if step.model == "critic" and shadow_critic else step.model
        graph.stage(step.name, "score", model, where[model], chunks=algorithm.chunks(step.name, batches))
        send("gen", step.name, tuple(dict.fromkeys((*algorithm.step("gen").fields, "log_probs"))))
    for step in scores:
        if "reward" in step.needs:
            send("reward", step.name, ())
        if step.name != hub:
            send(step.name, hub, step.fields)
    for update in algorithm.of_kind("train"):
        graph.stage(
            update.name,
            "train",
            update.model,
            where[update.model],
            chunks=algorithm.minibatches,
            epochs=algorithm.epochs,
        )
        send(hub, update.name, algorithm.batch)
        copy, reader = ("shadow_actor", "gen") if update.model == "actor" else ("shadow_critic", "values")
        ready = update.name
        if copy in where:
            ready = "update_weights" if update.model == "actor" else "update_weights.critic"
            graph.stage(
                ready, "sync", update.model, [*where[update.model], *where[copy]], target=copy, after=[update.name]
            )
        for waiting in dict.fromkeys(("gen", reader) if barrier else (reader,)):
            graph.link(ready, waiting, lag=1)
    return graph


def _place(
    algorithm: Algorithm,
    devices: Devices,
    shadow_critic: bool,
    split: dict[str, float] | None,
    ranks: dict[str, list[int]] | None,
) -> dict[str, tuple[int, ...]]:
    host = hosts(algorithm, devices)
    models = ["shadow_actor", *dict.fromkeys(host.values())]
    if shadow_critic and "critic" in models:
        models.insert(models.index("critic"), "shadow_critic")
    for option, given in (("split", split), ("ranks", ranks)):
        named = set(given or ()) - (set(devices.guests) if option == "ranks" else set())
        if given is not None and named != set(models):
            odd = sorted(named ^ set(models))
            raise ValueError(f"{option} must name exactly {', '.join(models)} (check {', '.join(odd)})")
    if ranks is not None:
        for model, own in ranks.items():
            if unknown := [rank for rank in own if rank not in devices.ranks]:
                raise ValueError(f"ranks.{model} names rank {unknown[0]}; there are ranks 0 to {devices.ranks[-1]}")
            if shared := set(own) & set(ranks.get(f"shadow_{model}", ())):
                both = f"ranks.{model} and ranks.shadow_{model}"
                raise ValueError(f"{both} share rank {min(shared)}: a model and its copy must be apart")
        where = {model: tuple(own) for model, own in ranks.items()}
    else:
        where = divide(devices.ranks, split or {m: SHARES.get(m, 1) for m in models}, devices.replica)
    return {guest: where[host[guest]] for guest in devices.guests if guest in host} | where
