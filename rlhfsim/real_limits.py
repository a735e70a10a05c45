"""What a real run needs and cannot do, known before anything starts: settings, strategies, memory, groups of ranks."""

from __future__ import annotations

from . import memory
from .errors import InputError
from .graph import Stage, StageGraph
from .layout import Holding
from .model import Head
from .spec.model_spec import hf_config
from .spec.scenario import ModelUse, Scenario


def check_real(scenario: Scenario) -> None:
    """Raises InputError for what a simulated scenario may have and a real run may not."""
    generation, vocabulary = scenario.generation, scenario.models.actor.shape.vocabulary
    longest = scenario.workload.longest_sample
    chosen, sync = scenario.algorithm, scenario.weight_sync
    allowed_values: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("algorithm.old_log_prob", chosen.old_log_prob, ("always",)),
        ("algorithm.reward", chosen.reward, ("model", "function")),
        ("weight_sync.through", sync.through, ("gpu",)),
        ("weight_sync.senders", sync.senders, ("replica", "stage_heads", "first_rank")),  # the same with whole replicas
    )
    for field, value, allowed in allowed_values:
        if value not in allowed:
            message = f"is {value!r}, which real runs do not have yet (allowed: {', '.join(allowed)})"
            raise InputError(message, field=field)
    if scenario.workload.turns is not None:
        raise InputError("are not part of real runs yet (allowed: none)", field="workload.turns")
    if chosen.reference == "adapter_off":
        message = "is adapter_off; the reference of a real run is a model of its own (allowed: true, false)"
        raise InputError(message, field="algorithm.reference")
    if scenario.rounds > 1:
        message = "makes rounds of generation, which real runs do not have (allowed: 1 and no gen_prompts)"
        raise InputError(message, field="algorithm.filter_accept_probability")
    prompts, updates = scenario.workload.prompts, scenario.algorithm.minibatches
    if scenario.algorithm.name != "ppo" and prompts % updates:
        message = (
            f"is {updates}; a real run keeps a prompt's responses in one mini-batch: it must divide {prompts} prompts"
        )
        raise InputError(message, field="algorithm.minibatches")
    if scenario.workload.balanced:
        raise InputError("is true; real runs share samples out in order (allowed: false)", field="workload.balanced")
    for role in scenario.roles:
        use: ModelUse = getattr(scenario.models, role)
        for field in ("micro_batch_tokens", "score_micro_batch_tokens", "shard_ranks"):
            if (limit := getattr(use, field)) is not None:
                shared = "shard over all ranks" if field == "shard_ranks" else "count samples of a micro-batch"
                message = f"is {limit}; real runs {shared} (allowed: none)"
                raise InputError(message, field=f"models.{role}.{field}")
        hf_config(use.shape)  # complains about what cannot be built
        if use.shape.window and longest > use.shape.window:
            message = (
                f"{use.spec} has a window of {use.shape.window} tokens; real runs attend to all of up to {longest}"
            )
            raise InputError(message, field=f"models.{role}.spec")
        sharded = use.backend == "deepspeed" and use.zero_stage == 3
        if use.offload_parameters and role in ("actor", "critic") and not sharded:
            message = "is true; real runs offload trained weights only with backend deepspeed and zero_stage 3"
            raise InputError(message, field=f"models.{role}.offload_parameters")
        for field in ("offload_gradients", "offload_activations"):
            if getattr(use, field):
                message = "is true; real runs offload optimizers and weights only (allowed: false)"
                raise InputError(message, field=f"models.{role}.{field}")
        for field, usual in (
            ("gradient_precision", None),
            ("offload_optimizer_fraction", 1.0),
            ("offload_states", None),
            ("logits_in_place", False),
            ("optimizer_passes", False),
            ("logits_upcast", True),
        ):
            if (value := getattr(use, field)) != usual:
                message = f"is {value}, which real runs do not have yet (allowed: {usual or 'none'})"
                raise InputError(message, field=f"models.{role}.{field}")
        for field in ("overlap_grad_reduce", "overlap_param_gather"):
            if getattr(use, field) is not None:
                raise InputError(
                    "is given; real runs overlap as DeepSpeed does (allowed: none)", field=f"models.{role}.{field}"
                )
        if (split := use.ranks_per_replica) > 1:
            message = f"makes {split} ranks per replica; real runs split no model over ranks (allowed: 1)"
            raise InputError(message, field=f"models.{role}.tensor_parallel")
        if (tokens := use.shape.vocabulary) != vocabulary:
            message = f"has {tokens} tokens, the actor {vocabulary}; in a real run all models read the same tokens"
            raise InputError(message, field=f"models.{role}.spec")
        if longest > (positions := use.shape.max_positions):
            message = f"{use.spec} has {positions} positions, prompt and response up to {longest} tokens"
            raise InputError(message, field=f"models.{role}.spec")
    for field in ("tensor_parallel", "pipeline_parallel"):
        if (split := getattr(generation, field)) > 1:
            message = f"is {split}; real runs have no {field.replace('_parallel', ' parallelism')} (allowed: 1)"
            raise InputError(message, field=f"generation.{field}")
    for name in ("speculative", "prefix_caching", "sleep"):
        if getattr(generation, name):
            message = "is set; real runs have nothing of the kind (leave it out)"
            raise InputError(message, field=f"generation.{name}")
    if (routing := generation.routing) != "static":
        message = f"is {routing!r}; real runs share samples out beforehand (allowed: static)"
        raise InputError(message, field="generation.routing")


def check_real_graph(scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding], started: int) -> None:
    """Raises InputError for what a real run cannot do of a strategy, or where it has fewer ranks than the graph."""
    for stage in graph.stages():
        if stage.unfinished != "wait":
            _check_rollout(stage, graph, scenario)
        if stage.kind == "sync":
            source, target = (set(holdings[str(name)].ranks) for name in (stage.model, stage.target))
            if source & target and source != target:
                message = (
                    f"{stage.name}: ranks of {stage.model} and {stage.target} overlap (allowed: the same, or others)"
                )
                raise InputError(message, field="strategy")
    needed = 1 + max(r for s in graph.stages() for r in s.ranks)
    if needed > started:
        raise InputError(
            f"the scenario runs on {needed} ranks, but {started} were started "
            f"(torchrun --nproc-per-node {needed} -m real.run ...)",
            field="cluster",
        )


def _check_rollout(stage: Stage, graph: StageGraph, scenario: Scenario) -> None:
    """Of a stage whose responses outlive its firings."""
    if partners := [s.name for s in graph.stages() if s is not stage and s.unfinished != "wait"]:
        message = (
            f"{partners[0]} goes on with what {stage.name} leaves; in real runs every stage ends its own responses"
        )
        raise InputError(message, field="strategy")
    if scenario.generation.engine == "zero3_per_token":
        message = (
            f"is zero3_per_token, which gathers weights for all ranks at once; engines of {stage.name} run freely "
            "(allowed: hybrid, engine)"
        )
        raise InputError(message, field="generation.engine")
    prompts = scenario.workload.prompts
    if scenario.algorithm.name != "ppo" and prompts % stage.chunks:
        message = (
            f"is {stage.chunks}; real runs keep a prompt's responses in one chunk: it must divide {prompts} prompts"
        )
        raise InputError(message, field="strategy.chunks")


def rank_bytes(holdings: dict[str, Holding], rank: int, on_cpu: bool) -> float:
    """Weights, gradients and optimizer states on a rank; on CPUs all are in fp32, and the host is the device."""
    total = 0.0
    for held in holdings.values():
        if rank in held.ranks:
            use = held.use.model_copy(update={"precision": "fp32"}) if on_cpu else held.use
            head: Head = "value" if held.name.removeprefix("shadow_") in ("critic", "reward") else "lm"
            purpose: memory.Held = "train" if held.purpose == "train" else "frozen"
            kept = memory.static_bytes(use, purpose, held.data_parallel, head=head)
            total += kept.total + (kept.host if on_cpu else 0.0)
    return total


def rank_sets(graph: StageGraph, holdings: dict[str, Holding]) -> set[tuple[int, ...]]:
    """Every set of ranks that any stage or model copy communicates in."""
    sets = {stage.ranks_of(place) for stage in graph.stages() for place in range(stage.places)}
    sets |= {stage.ranks for stage in graph.stages()} | {held.ranks for held in holdings.values()}
    for held in holdings.values():
        sets |= {held.ranks[k : k + held.replica] for k in range(0, len(held.ranks), held.replica)}
        sets |= {held.ranks[k :: held.replica] for k in range(held.replica)}
    return sets


def sync_rank_sets(graph: StageGraph, holdings: dict[str, Holding], method: str) -> set[tuple[int, ...]]:
    """Ranks between which weights move from copy to copy: from the first that trains to all of the other copy."""
    sets: set[tuple[int, ...]] = set()
    for stage in graph.stages():
        if stage.kind == "sync" and stage.target is not None:
            first, others = holdings[stage.model].ranks[0], holdings[stage.target].ranks
            if first not in others:
                sets |= {(first, *others)} if method == "broadcast" else {(first, other) for other in others}
    return sets
