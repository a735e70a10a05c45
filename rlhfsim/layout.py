"""Who holds what where: the model copies of a strategy graph, how each is split, and what a stage therefore does.

Between the graph (ranks and order) and the costs (bytes and seconds): nothing here knows a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from types import ModuleType
from typing import Any, Literal, get_type_hints

from .algorithms import IN_ROUNDS, Algorithm
from .errors import InputError, NeverValid, nearest
from .format import rank_text
from .graph import Stage, StageGraph
from .schedule import check
from .slots import place_slots
from .spec.problems import validate_value
from .spec.scenario import Generation, ModelUse, Scenario
from .strategies import Devices

# Kinds of stages that move or hand over what others hold: they run no model.
IDLE_KINDS = ("sync", "swap", "store")

# Options that say in how many pieces an iteration is processed.
PIECES = ("batches", "calls", "chunks")

Purpose = Literal["train", "frozen", "generate"]


@dataclass(frozen=True)
class Holding:
    """One copy of a model: what it is for, on which ranks, split how (`use`)."""

    name: str
    use: ModelUse
    purpose: Purpose
    ranks: tuple[int, ...]

    @property
    def replica(self) -> int:
        return self.use.ranks_per_replica

    @property
    def data_parallel(self) -> int:
        """Ranks with the same part of the weights: those of all replicas, and all that share a sequence."""
        return len(self.ranks) // self.use.ranks_per_copy


def shares_with_training(holdings: dict[str, Holding], engine: Holding) -> bool:
    """Whether an engine has ranks that train the actor, so that it must make room for that."""
    return bool(set(engine.ranks) & set(holdings["actor"].ranks))


def users(graph: StageGraph, model: str) -> list[Stage]:
    """The stages of every iteration that need the weights of a copy of a model, in the graph's order."""
    own = (s for s in graph.stages() if s.model == model and s.every == 1)
    return [stage for stage in own if stage.kind not in ("swap", "store")]


def strategy_names() -> list[str]:
    return _names("rlhfsim.strategies")


def algorithm_names() -> list[str]:
    return _names("rlhfsim.algorithms")


def _names(package: str) -> list[str]:
    files = resources.files(package).iterdir()
    return sorted(f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_"))


def _module(package: str, name: str, field: str) -> ModuleType:
    if name not in (names := _names(package)):
        raise InputError(f"there is no {name!r}{nearest(name, names)}", field=field)
    return import_module(f"{package}.{name}")


def algorithm_of(scenario: Scenario) -> Algorithm:
    """The stages of the scenario's algorithm. Raises InputError for an unknown one and for impossible settings."""
    _module("rlhfsim.algorithms", scenario.algorithm.name, "algorithm.name")
    return scenario.steps


def devices_of(scenario: Scenario) -> Devices:
    """The cluster's ranks, and how many must move together for each stage (`uses` decides by layout)."""
    cluster, models, generation = scenario.cluster, scenario.models, scenario.generation
    reference = models.actor if scenario.algorithm.reference == "adapter_off" else models.reference
    owners = {"old_log_prob": models.actor, "ref": reference, "reward": models.reward, "values": models.critic}
    together = {stage: use.ranks_together for stage, use in owners.items() if use.zero_stage < 3}
    if scenario.algorithm.reward == "function":  # every rank computes it for its own samples
        together["reward"] = 1
    elif scenario.algorithm.queued:  # one queue for all
        together.pop("reward", None)
    own_engine = generation.engine == "engine"
    if own_engine or (generation.engine == "hybrid" and models.actor.zero_stage < 3):
        together["gen"] = generation.ranks_per_engine
    replica = {
        "shadow_actor": generation.ranks_per_engine,
        "actor": models.actor.ranks_together,
        "critic": models.critic.ranks_together,
        "shadow_critic": models.critic.ranks_together,
        "reference": models.reference.ranks_together,
        "reward": together.get("reward", models.reward.tensor_parallel if scenario.algorithm.reward == "model" else 1),
    }
    guests = () if scenario.algorithm.reward == "model" else ("reward",)
    controller = scenario.execution == "controller"
    ranks = tuple(range(cluster.gpus))
    return Devices(ranks, cluster.node.gpus_per_node, together, replica, own_engine, controller, guests)


def graph_of(scenario: Scenario) -> tuple[StageGraph, list[str]]:
    """The checked graph of the scenario's strategy, and notes for the user.

    Raises InputError naming the option where the strategy's options are unknown or impossible.
    """
    name = scenario.strategy.name
    module = _module("rlhfsim.strategies", name, "strategy.name")
    options = scenario.strategy.options
    notes: list[str] = []
    devices = devices_of(scenario)
    if (slots := options.pop("slots", None)) is not None:
        judges = {"reference", "reward"} & set(algorithm_of(scenario).models) - (set(devices.guests) - set(slots))
        options, notes = _with_slots(name, slots, options, devices, sorted(judges))
    allowed = [p for p in inspect.signature(module.build).parameters if p not in ("algorithm", "devices")]
    for option in options:
        if option not in allowed:
            raise InputError(
                f"strategy {name!r} has no such option{nearest(option, [*allowed, 'slots'])}",
                field=f"strategy.{option}",
            )
    _check_options(module, options, scenario.workload.samples)
    try:
        graph = module.build(algorithm_of(scenario), devices, **options)
        _check_rounds(graph, algorithm_of(scenario), name)
        _add_periodic(graph, scenario)
        check(graph)
    except (ValueError, TypeError) as error:
        raise InputError(f"{error}", field=f"strategy ({name})") from error
    _check_engine(graph, scenario)
    _check_sleep(graph, scenario)
    _check_states(graph, scenario)
    return graph, notes


def _check_engine(graph: StageGraph, scenario: Scenario) -> None:
    """Whether the engine can do what the strategy asks of it."""
    name, generation = scenario.strategy.name, scenario.generation
    generating = [s for s in graph.stages() if s.kind == "generate"]
    if any(s.unfinished != "wait" for s in generating):
        _check_continuous(generation, f"strategy {name} stops engines while responses are unfinished")
    if generation.engine == "zero3_per_token" and any(s.model == "shadow_actor" for s in generating):
        raise InputError(
            f"zero3_per_token gathers the training weights; a {name} strategy generates from a full copy "
            "(allowed: hybrid for plain batches, engine)",
            field="generation.engine",
        )
    _check_turns(scenario)


def _check_continuous(generation: Generation, why: str) -> None:
    """Raises InputError that names what makes batches static: the engine, unless it was told to."""
    if generation.continuous:
        return
    field, allowed = "generation.engine", "engine"
    if generation.engine == "engine":
        field, allowed = "generation.batching", "continuous"
    elif generation.engine == "hybrid":
        allowed += "; or hybrid with generation.batching: continuous"
    given = generation.batching if field == "generation.batching" else generation.engine
    raise InputError(f"is {given}: {why}, which static batches cannot (allowed: {allowed})", field=field)


def _check_turns(scenario: Scenario) -> None:
    """Whether an engine can take responses in turns."""
    generation, turns = scenario.generation, scenario.workload.turns
    if turns is None:
        return
    _check_continuous(generation, "a response of several turns (workload.turns) leaves its batch and comes back")
    if generation.prefix_caching and not turns.keep_prefix:
        raise InputError(
            "is false, but with generation.prefix_caching an engine finds the context of a turn that has ended "
            "(allowed: true)",
            field="workload.turns.keep_prefix",
        )


def _check_sleep(graph: StageGraph, scenario: Scenario) -> None:
    """A level 2 engine has no weights left after its first firing."""
    training = {r for s in graph.stages() if s.kind == "train" and s.model == "actor" for r in s.ranks}
    for stage in graph.stages():
        sleeps = stage.kind == "generate" and stage.model == "shadow_actor" and training & set(stage.ranks)
        if sleeps and scenario.generation.sleep == "level_2" and stage.firings > 1:
            raise InputError(
                f"is level_2, which forgets the weights, but {scenario.strategy.name} generates {stage.firings} times "
                "for each sync (allowed: level_1)",
                field="generation.sleep",
            )


def _check_states(graph: StageGraph, scenario: Scenario) -> None:
    """Weights that generate cannot be away."""
    for role in scenario.roles:
        chosen = getattr(scenario.models, role).offload_states
        if chosen in ("all", "image", "calls") and any(stage.kind == "generate" for stage in users(graph, role)):
            raise InputError(
                f"is {chosen}, but {scenario.strategy.name} generates from these weights (allowed: optimizer; or "
                "generation.engine engine)",
                field=f"models.{role}.offload_states",
            )


def _check_rounds(graph: StageGraph, algorithm: Algorithm, strategy: str) -> None:
    """Raises ValueError where a strategy does not go through the rounds of an algorithm that drops prompts."""
    makers = [s for s in graph.stages() if s.name.partition(".")[0] in IN_ROUNDS]
    streamed = [(s.name, v) for s in makers for _, v, stream in graph.out_edges(s.name, data="stream") if stream]
    early = [v for u, v in streamed if not algorithm.streams(u.partition(".")[0], v.partition(".")[0])]
    if early or any(s.chunks % algorithm.rounds or (algorithm.rounds > 1 and s.unfinished != "wait") for s in makers):
        raise ValueError(
            f"{strategy} does not generate in rounds, by which algorithm {algorithm.name} replaces prompts that it "
            "drops (colocated, interleaved and disaggregated do; or filter_accept_probability 1)"
        )


def _check_options(module: ModuleType, options: dict[str, Any], samples: int) -> None:
    """Types by the annotations of `build`; an iteration is cut in at most as many pieces as it has samples."""
    kinds = get_type_hints(module.build)
    for option, value in options.items():
        validate_value(kinds[option], value, f"strategy.{option}")
        if option in PIECES and value < 1:
            raise NeverValid(f"is {value}, but must be at least 1", field=f"strategy.{option}")
        if option in PIECES and value > samples:
            raise InputError(
                f"is {value}, but there are only {samples} samples in an iteration", field=f"strategy.{option}"
            )


def _add_periodic(graph: StageGraph, scenario: Scenario) -> None:
    """Validation and checkpoints at the end of every so many iterations, in verl's names."""
    periodic = scenario.periodic
    updates = [s for s in graph.stages() if s.kind == "train"]
    if periodic.validation_every:
        gen = next(s for s in graph.stages() if s.kind == "generate")
        size = gen.size if gen.spread == "each" else len(gen.ranks)
        ready = [s.name for s in graph.stages() if s.kind == "sync" and s.target == gen.model] or [
            s.name for s in updates
        ]
        turns = all(graph.at(name).enters == "in_order" for name in ready)
        graph.stage(
            "testing",
            "generate",
            gen.model,
            gen.ranks,
            size=size,
            after=ready,
            every=periodic.validation_every,
            enters="in_order" if turns else "when_ready",  # engines that never stop do so between two firings
        )
    if periodic.checkpoint_every:
        ranks = tuple(dict.fromkeys(r for s in updates for r in s.ranks))
        graph.stage(
            "save_checkpoint",
            "store",
            updates[0].model,
            ranks,
            after=[s.name for s in updates],
            every=periodic.checkpoint_every,
        )


def _with_slots(
    name: str, slots: object, options: dict[str, Any], devices: Devices, judges: list[str]
) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(slots, dict):
        raise InputError(f"{slots!r} is no mapping of model to ratio", field="strategy.slots")
    placed, notes = place_slots(slots, devices.ranks)
    if name == "interleaved":
        if not set(judges) <= set(placed):
            needed = " and ".join("'initial' (the reference)" if m == "reference" else f"{m!r}" for m in judges)
            raise InputError(f"slots for {needed} are needed", field="strategy.slots")
        owners = {model: list(placed[model]) for model in judges}
        for model in ("actor", "critic"):
            if len(placed.get(model, devices.ranks)) < len(devices.ranks):
                owners[model] = list(placed[model])
        return {**options, "owners": owners}, notes
    if name == "disaggregated":  # build says which models are missing: the authors' slots have none for the shadows
        return {**options, "ranks": {model: list(own) for model, own in placed.items()}}, notes
    if any(own != devices.ranks for own in placed.values()):
        raise InputError(
            f"strategy {name!r} puts every model on every rank: all ratios must be 1", field="strategy.slots"
        )
    return options, notes


def holdings_of(scenario: Scenario, graph: StageGraph) -> dict[str, Holding]:
    """Every copy of a model that the graph uses, by name (`actor`, `shadow_actor`, ...); of a function there is none.

    Raises InputError where ranks that work together are no whole number of replicas.
    """
    models, found = scenario.models, {}
    training = {s.model for s in graph.stages() if s.kind == "train"}
    for stage in graph.stages():
        if stage.kind in IDLE_KINDS or stage.model in found:
            continue
        role = stage.model.removeprefix("shadow_")
        if role not in scenario.roles:
            continue
        use: ModelUse = getattr(models, role)
        purpose: Purpose = "train" if stage.model in training else "frozen"
        if stage.model == "shadow_actor":
            purpose = "generate"
            use = scenario.generation.engine_use(use).model_copy(
                update={
                    "zero_stage": 0,
                    "shard_ranks": None,
                    "pipeline_parallel": scenario.generation.pipeline_parallel,
                    "pipeline_chunks": 1,
                    "first_stage_layers": None,
                    "last_stage_layers": None,
                    "offload_parameters": False,
                    "tensor_parallel": scenario.generation.tensor_parallel,
                }
            )
        ranks = tuple(
            dict.fromkeys(
                r for s in graph.stages() if s.model == stage.model and s.kind not in IDLE_KINDS for r in s.ranks
            )
        )
        found[stage.model] = Holding(stage.model, use, purpose, ranks)
    for stage in graph.stages():
        if stage.kind not in IDLE_KINDS and stage.model in found:
            _check_places(stage, found[stage.model], scenario)
    if scenario.cluster.parts:
        _check_kinds(scenario, graph, found)
    return found


def placement_notes(scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding]) -> list[str]:
    """What a user should know about a layout that works and may surprise."""
    notes, nodes = _notes_on_kinds(scenario, graph), scenario.cluster.rank_nodes
    sizes = sorted({part.node.gpus_per_node for part in scenario.cluster.all_parts})
    per_node = " or ".join(map(str, sizes))
    for field, degree, ranks in dict.fromkeys(_tensor_groups(scenario, graph, holdings)):
        groups = (ranks[i : i + degree] for i in range(0, len(ranks), degree))
        apart = next((g for g in groups if len({nodes[r] for r in g}) > 1), None)
        if apart:
            notes.append(
                f"{field} {degree}: ranks {rank_text(apart)} are on several nodes of {per_node} GPUs; what they "
                "exchange in every layer goes through the NICs"
            )
    if scenario.generation.engine == "zero3_per_token" and scenario.models.actor.zero_stage < 3:
        notes.append(
            f"generation.engine zero3_per_token: with models.actor.zero_stage {scenario.models.actor.zero_stage} every "
            "rank has whole weights and nothing is gathered while generating"
        )
    if scenario.algorithm.name == "dapo" and scenario.rounds == 1:
        notes.append("algorithm dapo: with filter_accept_probability 1 no prompt is dropped and generated again")
    return notes + _reward_notes(scenario, graph)


def _reward_notes(scenario: Scenario, graph: StageGraph) -> list[str]:
    chosen = scenario.algorithm
    by_function = chosen.reward_function_seconds or chosen.reward_function_workers
    by_service = chosen.reward_latency or chosen.reward_concurrency or chosen.reward_streams
    notes = []
    if by_function and chosen.reward != "function":
        notes.append(f"algorithm.reward {chosen.reward}: the settings of a reward function are not used")
    if by_service and not chosen.queued:
        notes.append(f"algorithm.reward {chosen.reward}: the settings of a judge or sandbox are not used")
    if chosen.reward == "model":
        return notes
    takes = "its seconds are reward_latency's"
    if chosen.reward == "function":
        takes = f"the function takes algorithm.reward_function_seconds {chosen.reward_function_seconds:g} s a sample"
    notes.append(
        f"algorithm.reward {chosen.reward}: no reward model is held or run, whatever models.reward says; {takes}"
    )
    judges = {r for s in graph.stages() if s.model == "reward" for r in s.ranks}
    others = {r for s in graph.stages() if s.model != "reward" for r in s.ranks}
    if idle := judges - others:
        notes.append(
            f"strategy.ranks: rank {rank_text(sorted(idle))} only has the reward {chosen.reward}; its GPU idles"
        )
    return notes


def _tensor_groups(
    scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding]
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(field, degree, ranks) of all that is split in tensor-parallel groups of neighbours."""
    for stage in graph.stages():
        if stage.kind == "generate":
            yield "generation.tensor_parallel", scenario.generation.tensor_parallel, stage.ranks
        elif stage.kind not in IDLE_KINDS and stage.model in holdings:
            role = stage.model.removeprefix("shadow_")
            use = holdings[stage.model].use
            yield f"models.{role}.tensor_parallel", use.tensor_parallel, stage.ranks
            if use.context_parallel > 1:
                degree = use.tensor_parallel * use.context_parallel
                yield f"models.{role}.tensor_parallel x context_parallel", degree, stage.ranks


def _notes_on_kinds(scenario: Scenario, graph: StageGraph) -> list[str]:
    """Stages on machines of several kinds."""
    notes = []
    for stage in graph.stages() if scenario.cluster.parts else ():
        if stage.kind not in IDLE_KINDS and len(kinds := _kinds(scenario, stage.ranks)) > 1:
            notes.append(
                f"stage {stage.name} is on {' and '.join(kinds)}: where its ranks meet, the slowest is waited for"
            )
    return notes


def _engine_groups(scenario: Scenario, graph: StageGraph) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """The same of engines with pipeline stages: of a hybrid one's place, over which the stages of all engines lie."""
    generation = scenario.generation
    for stage in graph.stages() if generation.pipeline_parallel > 1 else ():
        if stage.kind == "generate":
            together = stage.size if generation.in_stages_of(scenario.models.actor) else generation.ranks_per_engine
            yield "generation.tensor_parallel x pipeline_parallel", together, stage.ranks


def _check_kinds(scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding]) -> None:
    """Raises InputError where ranks of different machines cannot work together."""
    groups = [*_tensor_groups(scenario, graph, holdings), *_engine_groups(scenario, graph)]
    for field, degree, ranks in groups:
        for group in (ranks[i : i + degree] for i in range(0, len(ranks), degree)):
            if len(kinds := _kinds(scenario, group)) > 1:
                raise InputError(
                    f"is {degree}, but ranks {rank_text(group)} of one group are of {' and '.join(kinds)}; a group "
                    "must be of one kind (strategy.split or ranks, or another order of cluster.parts)",
                    field=field,
                )
    overheads = [bool(scenario.overheads_of(part).deepspeed) for part in scenario.cluster.parts]
    rank_kinds = scenario.cluster.rank_kinds
    for stage in graph.stages():
        kinds = _kinds(scenario, stage.ranks)
        if len(kinds) > 1 and stage.unfinished != "wait":
            raise InputError(
                f"stage {stage.name} is on {' and '.join(kinds)}; engines that keep responses for a later firing must "
                "be of one kind",
                field=f"strategy ({scenario.strategy.name})",
            )
        if stage.kind not in IDLE_KINDS and len({overheads[rank_kinds[r]] for r in stage.ranks}) > 1:
            raise InputError(
                f"are measured for some of the machines of stage {stage.name} ({' and '.join(kinds)}) and not for all",
                field="overheads.deepspeed",
            )


def _kinds(scenario: Scenario, ranks: Iterable[int]) -> list[str]:
    """Names of the parts with the different machines among ranks."""
    kinds = scenario.cluster.rank_kinds
    return [scenario.cluster.all_parts[k].name for k in dict.fromkeys(kinds[r] for r in ranks)]


def _check_places(stage: Stage, held: Holding, scenario: Scenario) -> None:
    """Every place of a stage must hold whole replicas of its model."""
    generates = stage.kind == "generate"
    replica = scenario.generation.ranks_per_engine if generates else held.replica
    if stage.size % replica:
        split = "pipeline" if generates and scenario.generation.pipeline_parallel > 1 else "tensor"
        owner = "generation" if generates else f"models.{stage.model.removeprefix('shadow_')}"
        raise InputError(
            f"stage {stage.name} runs in groups of {stage.size} ranks, which do not divide into replicas of {replica}",
            field=f"{owner}.{split}_parallel",
        )
    copies = held.use.ranks_per_copy
    if (shard := held.use.shard_ranks) and (held.data_parallel % shard or stage.size // copies % shard):
        split = f" in {copies} tensor-parallel parts" if copies > 1 else ""
        raise InputError(
            f"is {shard}, which does not divide the {len(held.ranks)} ranks of {stage.model} (groups of {stage.size})"
            + split,
            field=f"models.{stage.model.removeprefix('shadow_')}.shard_ranks",
        )
    if not generates and stage.size % held.use.ranks_together:
        raise InputError(
            f"stage {stage.name} runs in groups of {stage.size} ranks, which do not divide into sets of experts on "
            f"{held.use.expert_ranks} ranks and replicas of {held.replica} (both together: {held.use.ranks_together})",
            field=f"models.{stage.model.removeprefix('shadow_')}.expert_parallel",
        )
