"""From files to records: a scenario, a cluster, and what they name.

Shipped things are found by name (`hw_specs/<kind>/<name>.yaml`); what contains a slash or ends in `.yaml` is a path,
relative to the file that names it. A mapping beside a name changes single values of what is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from ..errors import InputError, nearest
from ..model import pipeline_parallel_choices
from . import lengths
from .base import Sourced
from .data import PACKAGE, data_dir
from .framework import Framework
from .hardware import Cluster, Gpu, Interconnect, Network, Node, Sources
from .model_spec import ModelSpec, load_model
from .overrides import apply_override, expand_sweep, single_overrides
from .problems import only_a_near_name, place_of, validate
from .scenario import ROLES, Latency, Lengths, ModelUse, Scenario
from .yaml_file import Document, Where, join, kind_of, read_yaml

__all__ = ["expand_sweep", "load_cluster", "load_rows", "load_scenario", "scenario_from_dict", "scenario_sources"]

MAX_SAMPLES = 10_000_000  # per iteration: what the arrays of a length draw can sensibly hold
MAX_TOKENS = 10_000_000  # of one sequence
MAX_TURNS = 1000  # of one response
MAX_GPUS = 1_000_000

# A frozen model sits beside the trained one that it judges or is judged with, and is laid out like it.
_PARTNERS = {"reference": "actor", "reward": "critic"}
_SPEC_OF = {"critic": "actor", "reference": "actor", "reward": "critic"}
_LAYOUT = (
    "precision",
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "context_exchange",
    "sequence_parallel",
    "score_micro_batch_samples",
    "score_micro_batch_tokens",
    "flash_attention",
    "logits_chunk_tokens",
    "gemm_precision",
)
# Taken over too where both are the same model, split in as many pipeline stages.
_LAYOUT_OF_LAYERS = (
    "first_stage_layers",
    "last_stage_layers",
    "expert_parallel",
    "expert_tensor_parallel",
    "routing_imbalance",
)
_RECORDS: dict[str, type[Sources]] = {"node": Node, "gpu": Gpu, "network": Network}
_BESIDE_PARTS = ("name", "description", "between")  # what a cluster says for all its parts


def load_scenario(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Scenario:
    """The scenario in a YAML file, after `a.b=c` overrides (texts, or values by dotted key).

    Raises InputError that names file, line, field, value and what is allowed.
    """
    document = read_yaml(path)
    data = {"name": Path(path).stem} | document.data
    return _scenario(data, document.folder, document.where, _with_places(overrides))


def load_rows(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Scenario]:
    """The rows of the file's `compare` by label, each the scenario with the row's overrides after the given ones."""
    compare = load_scenario(path, overrides).compare
    if compare is None:
        raise InputError("is missing; it names the rows and the baseline", field="compare", where=str(path))
    document, given = read_yaml(path), _with_places(overrides)
    data = {"name": Path(path).stem} | document.data | {"compare": None}
    given = [override for override in given if not override[0].startswith("compare.")]
    rows = {}
    for label, row in compare.rows.items():
        place = f"compare.rows.{label}"
        own = [(key, value, place_of(document.where, f"{place}.{key}")) for key, value in row.items()]
        rows[label] = _scenario(data, document.folder, document.where, given + own)
    return rows


def scenario_from_dict(data: Mapping[str, Any], base_dir: str | Path = ".", where: Where | None = None) -> Scenario:
    """The scenario in plain data, with names relative to `base_dir`; `where` has a place for each dotted path."""
    return _scenario(dict(data), Path(base_dir), where or {}, [])


def load_cluster(name_or_path: str | Path, base_dir: str | Path = ".") -> Cluster:
    """A shipped cluster by name, or the one in a YAML file relative to `base_dir`."""
    where: Where = {}
    data = _cluster({"spec": str(name_or_path)}, "", Path(base_dir), where)
    return validate(Cluster, data, where)


def scenario_sources(scenario: Scenario) -> list[tuple[str, float, str]]:
    """(field, value, source) of every number of cluster and models that has a source; else it says `unverified`."""
    found, cluster = [], scenario.cluster
    records: list[tuple[str, Sources]] = []
    for k, part in enumerate(cluster.all_parts):
        prefix = f"cluster.parts.{k}" if cluster.parts else "cluster"
        records += [(f"{prefix}.{name}", getattr(part, name)) for name in _RECORDS]
    if cluster.between:
        records.append(("cluster.between", cluster.between))
    if scenario.framework:
        records.append(("framework", scenario.framework))
    for field, record in records:
        found += [
            (f"{field}.{name}", number.value, _source_text(record, number.source))
            for name, number in record.quantities().items()
        ]
    for role in scenario.roles:
        shape: ModelSpec = getattr(scenario.models, role).shape
        numbers = [(name, value) for name, value in shape if isinstance(value, int) and not isinstance(value, bool)]
        found += [(f"models.{role}.shape.{name}", value, _source_text(shape, shape.source)) for name, value in numbers]
    return found


# --- scenario --------------------------------------------------------------------------------------------------------


def _scenario(data: dict[str, Any], folder: Path, where: Where, overrides: list[tuple[str, Any, str]]) -> Scenario:
    data, where = _without_shorthand(deepcopy(data)), dict(where)  # both are changed in place
    for key, value, place in overrides:
        apply_override(data, where, key, value, place)
        data = _without_shorthand(data)
    if overrides and isinstance(data.get("keep", []), list):
        set_by_user = {leaf for key, value, _ in overrides for leaf in _leaves(key, value)}
        data["keep"] = sorted({*map(str, data.get("keep", [])), *set_by_user})
    if data.get("framework") is not None:
        data["framework"] = _framework(data["framework"], folder, where)
    if "cluster" in data:
        data["cluster"] = _cluster(data["cluster"], "cluster", folder, where)
    data = _with_overheads(data)
    if "models" in data:
        data["models"] = _models(data["models"], data.get("framework"), folder, where)
    if isinstance(data.get("generation"), dict):
        data["generation"] = _generation(data["generation"], folder, where)
    for section in ("workload", "algorithm"):
        if isinstance(data.get(section), dict):
            data[section] = _with_files(section, data[section], folder, where)
    if isinstance(data.get("workload"), dict) and isinstance(turns := data["workload"].get("turns"), dict):
        data["workload"]["turns"] = _with_files("workload.turns", turns, folder, where)
    named = ("spec", "gpus_per_node")  # what a cluster may say beside its record's fields
    parts = {f"cluster.parts.{k}": named for k in range(len(_parts_of(data.get("cluster"))))}
    scenario = validate(Scenario, data, where, also={"cluster": named} | parts)
    _check(scenario, where)
    return scenario


def _leaves(key: str, value: Any) -> list[str]:
    """The dotted fields that an override sets."""
    if not isinstance(value, dict) or not value:
        return [key]
    return [leaf for name, part in value.items() for leaf in _leaves(f"{key}.{name}", part)]


def _framework(given: Any, folder: Path, where: Where) -> Framework:
    """The profile of that name or path."""
    named = _named("frameworks", given, "framework", "framework", folder, where)
    return validate(Framework, named.data, named.where)


def _with_overheads(data: dict[str, Any]) -> dict[str, Any]:
    """What the cluster's machines were measured to need, then what the framework does, where the scenario is silent."""
    cluster, framework = data.get("cluster"), data.get("framework")
    usual: dict[str, Any] = framework.usual_overheads() if framework else {}
    if isinstance(cluster, dict) and (parts := _parts_of(cluster)):  # each part has its own: `Scenario.overheads_of`
        if not usual:
            return data
        wide = [part | {"overheads": _merge(usual, part.get("overheads") or {})} for part in parts]
        return data | {"cluster": cluster | {"parts": wide}}
    measured = cluster.get("overheads") if isinstance(cluster, dict) else None
    lowest = _merge(usual, measured or {})
    return data | {"overheads": _merge(lowest, data.get("overheads") or {})} if lowest else data


def _with_places(overrides: Iterable[str] | Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    return [(key, value, "override") for key, value in single_overrides(overrides).items()]


def _without_shorthand(data: dict[str, Any]) -> dict[str, Any]:
    """A name where a section stands is its `spec` or `name`; a number where a distribution stands is a fixed one."""
    result = dict(data)
    for section, key in (("cluster", "spec"), ("strategy", "name"), ("algorithm", "name")):
        _widen(result, section, key)
    for section, parts, key in (
        ("models", ROLES, "spec"),
        ("workload", ("prompt_tokens", "response_tokens"), "tokens"),
        ("algorithm", ("reward_latency",), "seconds"),
    ):
        if isinstance(result.get(section), dict):
            result[section] = dict(result[section])
            for part in parts:
                _widen(result[section], part, key)
    if isinstance(result.get("workload"), dict):
        _widen_turns(result["workload"])
    if parts_of_cluster := _parts_of(result.get("cluster")):
        wide = [{"spec": part} if isinstance(part, str) else part for part in parts_of_cluster]
        result["cluster"] = result["cluster"] | {"parts": wide}
    return result


def _parts_of(cluster: Any) -> list[Any]:
    parts = cluster.get("parts") if isinstance(cluster, dict) else None
    return parts if isinstance(parts, list) else []


def _widen_turns(workload: dict[str, Any]) -> None:
    _widen(workload, "turns", "number")
    if isinstance(turns := workload.get("turns"), dict):
        for part, key in (("number", "tokens"), ("observation_tokens", "tokens"), ("tool_latency", "seconds")):
            _widen(turns, part, key)


def _widen(data: dict[str, Any], name: str, key: str) -> None:
    if isinstance(data.get(name), str | int | float):
        data[name] = {key: data[name]}
    elif isinstance(data.get(name), dict):
        data[name] = dict(data[name])


def _check(scenario: Scenario, where: Where) -> None:
    """What no single record can see."""
    for field, folder, name in (
        ("strategy.name", "strategies", scenario.strategy.name),
        ("algorithm.name", "algorithms", scenario.algorithm.name),
    ):
        names = _module_names(folder)
        if name not in names:
            kind = field.partition(".")[0]
            near = only_a_near_name(name, names)
            raise (
                _error(f"is {name!r}, but must be one of {', '.join(names)}{near}", field, where)
                if names
                else (_error(f"is {name!r}, but there is no {kind} at all", field, where))
            )
    try:
        roles = scenario.roles
    except InputError as error:
        raise _error(error.message, error.field, where) from None
    _check_size(scenario, where)
    _check_controller(scenario, where)
    _check_reference(scenario, where)
    for role in roles:
        _check_layout(f"models.{role}", getattr(scenario.models, role), scenario.cluster.gpus, where)
        _check_precision(f"models.{role}", getattr(scenario.models, role), scenario.cluster, where)
        _check_packing(f"models.{role}", getattr(scenario.models, role), scenario, where)
    _check_generation(scenario, where)
    _check_lengths(scenario, where)


def _check_size(scenario: Scenario, where: Where) -> None:
    workload, cluster = scenario.workload, scenario.cluster
    if cluster.gpus > MAX_GPUS:
        raise _error(f"makes {cluster.gpus} GPUs; at most {MAX_GPUS} are allowed", "cluster.nodes", where)
    if workload.samples > MAX_SAMPLES:
        raise _error(
            f"times responses_per_prompt makes {workload.samples} samples; at most {MAX_SAMPLES} are allowed",
            "workload.prompts",
            where,
        )
    if (most := scenario.samples_through("gen")) > MAX_SAMPLES:
        raise _error(
            f"rounds of {scenario.gen_prompts} prompts make {most} samples; at most {MAX_SAMPLES} are allowed",
            "algorithm.max_rounds",
            where,
        )
    if scenario.rounds * scenario.gen_prompts < workload.prompts:
        raise _error(
            f"is {scenario.gen_prompts}; {scenario.rounds} rounds of it never fill a batch of {workload.prompts}",
            "algorithm.gen_prompts",
            where,
        )
    if scenario.algorithm.minibatches > workload.samples:
        raise _error(
            f"is {scenario.algorithm.minibatches}, but there are only {workload.samples} samples in an iteration",
            "algorithm.minibatches",
            where,
        )


def _check_controller(scenario: Scenario, where: Where) -> None:
    for field in ("controller_bytes_per_second", "controller_call_seconds"):
        if scenario.execution == "spmd" and (value := getattr(scenario.overheads, field)):
            message = f"is {value:g}, but with execution spmd there is no controller (leave it out)"
            raise _error(message, f"overheads.{field}", where)


def _check_reference(scenario: Scenario, where: Where) -> None:
    if scenario.algorithm.reference == "adapter_off" and not scenario.models.actor.lora_rank:
        raise _error("is adapter_off, but models.actor.lora_rank is 0", "algorithm.reference", where)


def _check_layout(field: str, use: ModelUse, gpus: int, where: Where) -> None:
    """Tensor parallelism splits heads and MLP columns, pipeline stages have the same number of layers."""
    shape, tensor, stages = use.shape, use.tensor_parallel, use.pipeline_parallel * use.pipeline_chunks
    if shape.heads % tensor or shape.ffn % tensor:
        raise _error(
            f"is {tensor}, but must divide the {shape.heads} heads and the MLP width {shape.ffn} of {use.spec}",
            f"{field}.tensor_parallel",
            where,
        )
    if shape.linear_key_heads % tensor or shape.linear_value_heads % tensor:
        raise _error(
            f"is {tensor}, but must divide the {shape.linear_key_heads} key heads and {shape.linear_value_heads} value "
            f"heads of linear attention of {use.spec}",
            f"{field}.tensor_parallel",
            where,
        )
    if shape.layers % stages and not use.given_stages:
        raise _error(
            f"x pipeline_chunks is {stages}, but must divide the {shape.layers} layers of {use.spec}",
            f"{field}.pipeline_parallel",
            where,
        )
    if use.ranks_per_replica > gpus:
        raise _error(
            f"x {'context_parallel x ' if use.context_parallel > 1 else ''}pipeline_parallel is "
            f"{use.ranks_per_replica}, but the cluster has {gpus} GPUs",
            f"{field}.tensor_parallel",
            where,
        )


def _check_precision(field: str, use: ModelUse, cluster: Cluster, where: Where) -> None:
    precision, gpus = use.gemm_precision, [part.gpu for part in cluster.all_parts]
    peaks = {name for gpu in gpus for name in gpu.flops_per_second}  # of its own ranks' GPU: `Operators` asks for it
    if precision == "int8":
        message = "only inference engines compute in int8 (generation.weights_precision); allowed: fp8"
    elif precision and precision not in peaks:
        names = " or ".join(dict.fromkeys(gpu.name for gpu in gpus))
        message = f"{names} has no peak for {precision} (it has: {', '.join(sorted(peaks))})"
    else:
        return
    raise _error(message, f"{field}.gemm_precision", where)


def _check_packing(field: str, use: ModelUse, scenario: Scenario, where: Where) -> None:
    longest = scenario.workload.longest_sample
    for name in ("micro_batch_tokens", "score_micro_batch_tokens"):
        limit = getattr(use, name)
        if limit is None:
            continue
        if scenario.workload.padded:
            message = f"is {limit}, but samples are only packed without padding: workload.padded must be false"
            raise _error(message, f"{field}.{name}", where)
        if limit < longest:
            message = f"is {limit}, but prompt and response may have {longest} tokens: at least as many are needed"
            raise _error(message, f"{field}.{name}", where)


def _check_generation(scenario: Scenario, where: Where) -> None:
    tensor, actor = scenario.generation.tensor_parallel, scenario.models.actor
    experts, field = scenario.generation.expert_parallel, "generation.tensor_parallel"
    if experts > 1 and (not actor.shape.experts or actor.shape.experts % experts):
        raise _error(
            f"is {experts}, but must divide the {actor.shape.experts} experts of {actor.spec}",
            "generation.expert_parallel",
            where,
        )
    if actor.expert_parallel > 1 and scenario.generation.engine != "engine":
        raise _error(
            f"is {scenario.generation.engine!r}, which generates with the training weights, but experts of the actor "
            f"lie on {actor.expert_parallel} ranks (models.actor.expert_parallel); allowed: 'engine'",
            "generation.engine",
            where,
        )
    if actor.zero_stage == 3 and actor.tensor_parallel > 1 and scenario.generation.engine != "engine":
        raise _error(
            f"is {scenario.generation.engine!r}, which gathers sharded weights, but the actor is split in "
            f"{actor.tensor_parallel} tensor-parallel parts too (models.actor.tensor_parallel); allowed: 'engine'",
            "generation.engine",
            where,
        )
    if actor.shape.expert_ffn % (tensor // experts):
        raise _error(
            f"is {tensor}, so that {tensor // experts} ranks share an expert, but that must divide its width "
            f"{actor.shape.expert_ffn}",
            field,
            where,
        )
    if actor.shape.heads % tensor or actor.shape.ffn % tensor:
        raise _error(
            f"is {tensor}, but must divide the {actor.shape.heads} heads and the MLP width "
            f"{actor.shape.ffn} of {actor.spec}",
            field,
            where,
        )
    if actor.shape.linear_key_heads % tensor or actor.shape.linear_value_heads % tensor:
        raise _error(
            f"is {tensor}, but must divide the {actor.shape.linear_key_heads} key heads and "
            f"{actor.shape.linear_value_heads} value heads of linear attention of {actor.spec}",
            field,
            where,
        )
    if actor.shape.linear and scenario.generation.prefix_caching:
        message = f"is true, but states of linear attention ({actor.spec}) are not shared by responses: not modelled"
        raise _error(message, "generation.prefix_caching", where)
    if tensor > scenario.cluster.gpus:
        raise _error(f"is {tensor}, but the cluster has {scenario.cluster.gpus} GPUs", field, where)
    _check_stages(scenario, where)


def _check_stages(scenario: Scenario, where: Where) -> None:
    """Pipeline stages of an engine."""
    generation, actor, gpus = scenario.generation, scenario.models.actor, scenario.cluster.gpus
    stages, field = generation.pipeline_parallel, "generation.pipeline_parallel"
    if actor.shape.layers % stages:
        allowed = ", ".join(map(str, pipeline_parallel_choices(actor.shape)))
        message = f"is {stages}, but must divide the {actor.shape.layers} layers of {actor.spec} (allowed: {allowed})"
        raise _error(message, field, where)
    if generation.ranks_per_engine > gpus:
        message = f"is {stages} and tensor_parallel {generation.tensor_parallel}, but the cluster has {gpus} GPUs"
        raise _error(message, field, where)
    if stages > 1 and generation.in_stages_of(actor) and actor.pipeline_parallel != stages:
        message = (
            f"is {stages}, but a hybrid engine decodes in the stages in which the actor trains, of which there are "
            f"{actor.pipeline_parallel} (allowed: as many, 1, or generation.engine engine)"
        )
        raise _error(message, field, where)


def _check_lengths(scenario: Scenario, where: Where) -> None:
    workload = scenario.workload
    if workload.prompt_tokens.within_prompt_correlation not in (0, 1):
        raise _error(
            "is for responses; all responses to a prompt share the prompt and its length",
            "workload.prompt_tokens.within_prompt_correlation",
            where,
        )
    found: list[tuple[str, Lengths | Latency | None]] = [
        ("workload.prompt_tokens", workload.prompt_tokens),
        ("workload.response_tokens", workload.response_tokens),
        ("algorithm.reward_latency", scenario.algorithm.reward_latency),
    ]
    if (turns := workload.turns) is not None:
        found += [(f"workload.turns.{n}", getattr(turns, n)) for n in ("number", "observation_tokens", "tool_latency")]
        if (most := turns.number.longest) > MAX_TURNS:
            raise _error(f"allows {most} turns; at most {MAX_TURNS} are allowed", "workload.turns.number", where)
    for field, drawn in found:
        if isinstance(drawn, Lengths) and drawn.longest > MAX_TOKENS:
            raise _error(f"allows {drawn.longest} tokens; at most {MAX_TOKENS} are allowed", field, where)
        if drawn is not None and drawn.distribution == "empirical":
            try:
                lengths.check_file(drawn, length_dir())
            except InputError as error:
                raise InputError(str(error), field=field, where=place_of(where, f"{field}.file")) from None
    longest = workload.longest_sample
    for role in scenario.roles:
        use: ModelUse = getattr(scenario.models, role)
        if use.shape.learned_positions and longest > use.shape.max_positions:
            raise _error(
                f"prompt and response have up to {longest} tokens, but {use.spec} ({role}) has positions for "
                f"{use.shape.max_positions}",
                "workload",
                where,
            )


def length_dir() -> Path:
    """The shipped length distributions."""
    return data_dir("traces") / "lengths"


def _module_names(folder: str) -> list[str]:
    """The strategies or algorithms: the file is the registration."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))


# --- cluster ---------------------------------------------------------------------------------------------------------


def _cluster(given: Any, prefix: str, folder: Path, where: Where) -> Any:
    """Plain data of a cluster: `spec`, `node` and `gpu` replaced by what they name, then changed by what is beside."""
    if not isinstance(given, dict):
        return given  # validation says what is wrong with it
    data, base = dict(given), {}
    if "spec" in data:
        named = _named("clusters", data.pop("spec"), prefix, join(prefix, "spec"), folder, where)
        if "parts" in named.data:
            _add_places(where, named.where, prefix)
            return _cluster_of_parts(named.data | data, prefix, named.folder, where)
        base = _resolved({}, named.data, prefix, named.folder, named.where)
        _add_places(where, named.where, prefix)
    if data.get("parts"):
        return _cluster_of_parts(base | data, prefix, folder, where)
    return _with_sources(_resolved(base, data, prefix, folder, where))


def _cluster_of_parts(data: dict[str, Any], prefix: str, folder: Path, where: Where) -> dict[str, Any]:
    """Each part as a cluster of its own; what a cluster must have itself is the first part's."""
    field = join(prefix, "parts")
    if not isinstance(data["parts"], list):
        raise _error(f"is {kind_of(data['parts'])}, but must be a list of clusters", field, where)
    for key in sorted(data.keys() - {"parts", *_BESIDE_PARTS}):
        raise _error(
            f"is given beside parts; each part has its own (beside parts: {', '.join(_BESIDE_PARTS)})",
            join(prefix, key),
            where,
        )
    parts = []
    for k, part in enumerate(data["parts"]):
        given = {"spec": part} if isinstance(part, str) else part
        if not isinstance(given, dict):
            raise _error(f"is {kind_of(given)}, but must be a name or a mapping", f"{field}.{k}", where)
        resolved = {} if given.get("parts") else _cluster(given, f"{field}.{k}", folder, where)
        if not resolved or resolved.get("parts"):
            raise _error("has parts itself; name those here", f"{field}.{k}", where)
        parts.append(resolved)
    first = {key: parts[0][key] for key in ("node", "gpu", "network") if key in parts[0]}
    nodes = sum(count for part in parts if isinstance(count := part.get("nodes"), int) and count > 0)
    name = " + ".join(str(part.get("name", "custom")) for part in parts)
    return _with_sources({"name": name} | data | {"parts": parts} | first | {"nodes": max(nodes, 1)})


def _resolved(base: dict[str, Any], given: dict[str, Any], prefix: str, folder: Path, where: Where) -> dict[str, Any]:
    """`base`, a cluster that names nothing any more, changed by `given`."""
    data = dict(given)
    node, gpu, gpus_per_node = (data.pop(key, None) for key in ("node", "gpu", "gpus_per_node"))
    gpu = _with_kernels(gpu, join(prefix, "gpu"), folder, where)
    result: dict[str, Any] = _merge(base, data)
    node_folder = folder
    if isinstance(node, str):
        named = _named("nodes", node, join(prefix, "node"), join(prefix, "node"), folder, where)
        _add_places(where, named.where, join(prefix, "node"))
        node, node_folder = named.data, named.folder
        result.pop("node", None)
    if isinstance(node, dict) and "gpu" in node:
        if not (isinstance(gpu, dict) and "name" in gpu):  # a complete one needs nothing of that name
            result["gpu"] = _gpu(node["gpu"], join(prefix, "gpu"), join(prefix, "node.gpu"), node_folder, where)
        node = {key: value for key, value in node.items() if key != "gpu"}
    if node is not None:
        result["node"] = _merge(result.get("node"), node)
    if gpu is not None:
        found = _gpu(gpu, join(prefix, "gpu"), join(prefix, "gpu"), folder, where)
        result["gpu"] = found if isinstance(gpu, str) else _merge(result.get("gpu"), found)
    if isinstance(result.get("node"), dict):
        if gpus_per_node is not None:
            result["node"] = result["node"] | {"gpus_per_node": gpus_per_node}
            where[join(prefix, "node.gpus_per_node")] = place_of(where, join(prefix, "gpus_per_node"))
        if isinstance(result.get("gpu"), dict) and "name" in result["gpu"]:
            result["node"] = result["node"] | {"gpu": result["gpu"]["name"]}
    return result


def _gpu(given: Any, prefix: str, field: str, folder: Path, where: Where) -> Any:
    if not isinstance(given, str):
        return given
    named = _named("gpus", given, prefix, field, folder, where)
    _add_places(where, named.where, prefix)
    return _with_kernels(named.data, prefix, named.folder, where)


def _with_kernels(gpu: Any, prefix: str, folder: Path, where: Where) -> Any:
    """The path of a file of curves starts from the folder of the file that names it."""
    if not (isinstance(gpu, dict) and isinstance(gpu.get("kernels"), str) and _is_path(gpu["kernels"])):
        return gpu
    path = folder / Path(gpu["kernels"]).expanduser()
    if not path.is_file():
        raise _error(f"there is no file {str(path)!r}", join(prefix, "kernels"), where)
    return gpu | {"kernels": str(path.resolve())}


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _named(kind: str, name: Any, prefix: str, field: str, folder: Path, where: Where) -> Document:
    """The file of that name or path, with dotted paths below `prefix`; `field` and `where` tell who asks for it."""
    if not isinstance(name, str):
        raise _error(f"is {kind_of(name)}, but must be a name or the path of a YAML file", field, where)
    shipped = {path.stem: path for path in (data_dir("hw_specs") / kind).glob("*.yaml")}
    if _is_path(name):
        path = folder / Path(name).expanduser()
    elif name in shipped:
        path = shipped[name]
    else:
        raise _error(f"there is no {kind[:-1]} {name!r}{nearest(name, shipped)}", field, where)
    try:
        document = read_yaml(path, prefix)
    except InputError as error:
        if error.where == str(path) and place_of(where, field):  # about the file as a whole: say who asked for it
            raise _error(str(error), field, where) from None
        raise
    return replace(document, data={"name": path.stem} | document.data)


def _add_places(where: Where, more: Where, prefix: str) -> None:
    """Places of a file that was named at `prefix`; what the naming file itself says below that keeps its place."""
    where |= {path: place for path, place in more.items() if path == prefix or path not in where}


def _merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`, key by key; a number with its source is one thing and is replaced as a whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or "value" in over:
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _with_sources(cluster: dict[str, Any]) -> dict[str, Any]:
    """Plain numbers of node, GPU and networks become {value, source: unverified}."""
    result = dict(cluster)
    for part, record in (_RECORDS | {"between": Interconnect}).items():
        if isinstance(result.get(part), dict):
            result[part] = {key: _sourced(key, value, record) for key, value in result[part].items()}
    return result


def _sourced(key: str, value: Any, record: type[Sources]) -> Any:
    if key in _sourced_fields(record) and value is not None and not isinstance(value, dict | list):
        return {"value": value, "source": "unverified"}
    if key in _sourced_tables(record) and isinstance(value, dict):
        return {
            name: number if isinstance(number, dict | list) else {"value": number, "source": "unverified"}
            for name, number in value.items()
        }
    return value


@cache
def _sourced_fields(record: type[Sources]) -> frozenset[str]:
    fields = record.model_fields.items()
    return frozenset(name for name, field in fields if Sourced in (field.annotation, *get_args(field.annotation)[:1]))


@cache
def _sourced_tables(record: type[Sources]) -> frozenset[str]:
    fields = record.model_fields.items()
    return frozenset(name for name, field in fields if get_args(field.annotation)[1:] == (Sourced,))


# --- models and workload ---------------------------------------------------------------------------------------------


def _models(given: Any, framework: Framework | None, folder: Path, where: Where) -> Any:
    """The four models with defaults taken from each other and from the framework, and with their shapes."""
    if not isinstance(given, dict):
        return given
    actor = given.get("actor")
    if actor is None or (isinstance(actor, dict) and "spec" not in actor):
        raise _error(
            "is missing: a shipped model's name or the path of a config.json",
            "models.actor" if actor is None else "models.actor.spec",
            where,
        )
    models = dict(given)
    for role, origin in _SPEC_OF.items():
        use = {} if models.get(role) is None else models[role]
        other = models.get(origin)
        if isinstance(use, dict) and isinstance(other, dict):
            models[role] = {"spec": other["spec"]} | _frozen_layout(role, use, models) | use
    known: dict[str, ModelSpec] = {}
    usual = {"fused_kernels": framework.fused_kernels} if framework else {}
    for role in ROLES:
        if isinstance(models.get(role), dict):
            models[role] = usual | models[role]
        if isinstance(models.get(role), dict) and "spec" in models[role]:
            models[role] = models[role] | {"shape": _shape(models[role], f"models.{role}", folder, where, known)}
    return models


def _generation(given: dict[str, Any], folder: Path, where: Where) -> dict[str, Any]:
    """With the shape of the model that drafts."""
    drafting = given.get("speculative")
    if not isinstance(drafting, dict) or drafting.get("draft") is None:
        return given
    shape = _shape(drafting, "generation.speculative", folder, where, {}, key="draft")
    return given | {"speculative": drafting | {"shape": shape}}


def _frozen_layout(role: str, use: dict[str, Any], models: dict[str, Any]) -> dict[str, Any]:
    """What a frozen model takes over from its trained partner; it is sharded like it where that is possible."""
    if role not in _PARTNERS:
        return {}
    partner = models[_PARTNERS[role]]
    own = {"spec", "pipeline_parallel"} & use.keys()
    keys = _LAYOUT if any(use[key] != partner.get(key) for key in own) else _LAYOUT + _LAYOUT_OF_LAYERS
    layout = {key: partner[key] for key in keys if key in partner}
    if "score_micro_batch_samples" in use:
        layout.pop("score_micro_batch_tokens", None)
    tensor = use.get("tensor_parallel", 1)
    alone = (layout | use).get("pipeline_parallel", 1) == 1 and tensor in (1, partner.get("tensor_parallel", 1))
    stage = partner.get("zero_stage", ModelUse.model_fields["zero_stage"].default)
    return layout | {"zero_stage": 3 if stage == 3 and alone else 0}


def _shape(
    use: dict[str, Any], field: str, folder: Path, where: Where, known: dict[str, ModelSpec], key: str = "spec"
) -> Any:
    """The shape that `spec` (or `key`) names; a mapping `shape` beside it changes single values, one with a name is
    complete.

    `known` keeps the shapes by spec: the four models are often the same.
    """
    spec, own = use[key], use.get("shape")
    if isinstance(own, dict) and "name" in own:
        return own
    if not isinstance(spec, str):
        raise _error(
            f"is {kind_of(spec)}, but must be a shipped model's name or the path of a config.json",
            f"{field}.{key}",
            where,
        )
    try:
        shape = known[spec] = known.get(spec) or load_model(spec, folder)
    except InputError as error:
        if error.where:
            raise
        raise _error(error.message, f"{field}.{key}", where) from None
    return shape if own is None else _merge(shape.model_dump(), own)


def _with_files(section: str, given: dict[str, Any], folder: Path, where: Where) -> dict[str, Any]:
    """Files of distributions become shipped names or absolute paths."""
    result = dict(given)
    for name in ("prompt_tokens", "response_tokens", "reward_latency", "number", "observation_tokens", "tool_latency"):
        drawn = result.get(name)
        if isinstance(drawn, dict) and isinstance(drawn.get("file"), str):
            file = _length_file(drawn["file"], f"{section}.{name}.file", folder, where)
            result[name] = drawn | {"file": file}
    return result


def _length_file(name: str, field: str, folder: Path, where: Where) -> str:
    shipped = [path.name for path in length_dir().glob("*.csv")]
    if name in shipped:
        return name
    path = folder / Path(name).expanduser()
    try:
        if path.is_file():
            return str(path.resolve())
    except (OSError, ValueError):  # too long, or a null byte
        pass
    raise _error(
        f"is {name!r}, which is neither a shipped file nor one below {str(folder)!r}{nearest(name, shipped)}",
        field,
        where,
    )


# --- sources and errors ----------------------------------------------------------------------------------------------


def _source_text(record: Sources, key: str) -> str:
    return record.sources.get(key, key)  # `unverified` is no key


def _error(message: str, field: str, where: Where) -> InputError:
    return InputError(message, field=field, where=place_of(where, field))
