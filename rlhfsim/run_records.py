"""Published runs, predicted: a training iteration, generation, or a collective, as a record of one says it.

A run is one stage of a scenario, simulated alone: `update_actor` on sequences of one length, `gen` of a batch of equal
prompts. Everything is compared in seconds; what was published as a rate is divided out. What a record leaves open is an
interval, predicted at its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import sqrt
from typing import Any

import numpy as np

from .costs.kernels import bus_factor
from .errors import DoesNotFit, InputError
from .kernel_errors import MOST_OF_LINK, MOST_OF_PEAK, collective_seconds_on
from .measurements import Record, Records, cluster_of, gpu_named, model_named
from .model import parameters, training_flops
from .simulate import Setup, alone_seconds, prepare
from .spec.hardware import Cluster
from .spec.loader import scenario_from_dict
from .spec.model_spec import load_model
from .spec.scenario import ROLES
from .validate import STEP, Gap, Result

TOLERANCE = 0.3  # as of published cases: a document rarely says all of a run's configuration
GPT_VOCABULARY = 51200  # of GPT-2's 50257, padded for tensor parallelism (Megatron-LM, --make-vocab-size-divisible-by)
GPT_TOKENS = 2048  # of a sequence, where neither record nor shape says it
LARGE_BYTES = 1 << 30  # of a collective that a record calls large

# Of models that papers name and do not ship: V. Korthikanti et al., "Reducing Activation Recomputation in Large
# Transformer Models", 2022, table 3.
SHAPES = {
    "gpt 22b": {"layers": 48, "hidden": 6144, "heads": 64},
    "gpt 175b": {"layers": 96, "hidden": 12288, "heads": 96},
    "gpt 530b": {"layers": 105, "hidden": 20480, "heads": 128},
    "gpt 1t": {"layers": 128, "hidden": 25600, "heads": 160},
}


class Inexpressible(Exception):
    """What no scenario says."""


def results_of(found: Records, gpu: str | None, tolerance: float | None = None) -> tuple[list[Result], list[Gap]]:
    """Predicted and measured seconds of every record; what cannot be predicted is a gap.

    tolerance: of all; None: what the file states.
    gpu: the cluster to predict on, where not the shipped one of each record's GPU. Raises InputError for a measured
    value that the hardware cannot reach.
    """
    results, gaps = list[Result](), list[Gap]()
    for record in found.records:
        name = gpu_named(record.device, "gpu", record.where)
        group = f"{record.kind}/{name}"
        try:
            cluster = cluster_of(gpu or name)
            corners = [PREDICT[record.kind](corner, cluster) for corner in _corners(record)]
            for found_at in zip(*corners, strict=True):
                quantity, measured, _ = found_at[0]
                low, high = min(seconds for *_, seconds in found_at), max(seconds for *_, seconds in found_at)
                between = len(corners) > 1
                results.append(
                    Result(
                        record.id, quantity, sqrt(low * high), measured, "prediction", group, 0.0,
                        tolerance or record.tolerance or TOLERANCE, low if between else None, high if between else None,
                        framework=record.source, phase=record.kind,
                    )
                )  # fmt: skip
        except Inexpressible as reason:
            gaps.append(Gap(record.id, "prediction", group, "inexpressible", str(reason), record.source))
        except DoesNotFit as reason:
            gaps.append(Gap(record.id, "prediction", group, "does not fit", str(reason), record.source))
    return results, gaps


Found = list[tuple[str, float, float]]


def _corners(record: Record) -> Iterator[Record]:
    """The record at every combination of the ends of its intervals, `{low: ..., high: ...}` at any depth."""

    def ends(value: Any) -> list[Any]:
        if not isinstance(value, dict):
            return [value]
        if set(value) == {"low", "high"}:
            return [value["low"], value["high"]]
        return [dict(zip(value, chosen, strict=True)) for chosen in product(*map(ends, value.values()))]

    for fields in ends(record.fields):
        yield replace(record, fields=fields)


# --- training --------------------------------------------------------------------------------------------------------


def _training(record: Record, cluster: Cluster) -> Found:
    fields, gpus = record.fields, int(record.fields["gpus"])
    layout = _layout(record)
    batch, tokens = _whole(record, "global_batch"), _sequence(record)
    recompute = str(fields.get("recompute", "none"))
    precision, products = _precision(record)
    actor: dict[str, Any] = {
        **_model(record),
        "precision": precision,
        "zero_stage": 3 if layout.get("fsdp") else 1,
        "tensor_parallel": layout.get("tp", 1),
        "pipeline_parallel": layout.get("pp", 1),
        "context_parallel": layout.get("cp", 1),
        "expert_parallel": layout.get("ep", 1),
        "pipeline_chunks": layout.get("interleave", 1),
        "sequence_parallel": recompute == "none" or "sp" in recompute.split("+"),
        "recompute": recompute.split("+")[0],
        "micro_batch_samples": _whole(record, "micro_batch", 1),
    }
    if products:
        actor["gemm_precision"] = products
    actor |= _uneven(actor, record) | _options(record)

    def seconds_of(updates: int) -> float:
        setup = _setup(record, cluster, gpus, actor, updates * batch, 1, tokens - 1, {"engine": "engine"}, updates)
        return alone_seconds(setup, "update_actor")

    shape = _setup(record, cluster, gpus, actor, batch, 1, tokens - 1, {"engine": "engine"}).scenario.models.actor.shape
    flops = float(training_flops(shape, batch, float(tokens), causal=_counts_causal(record)))
    work = float(training_flops(shape, batch, float(tokens)))
    seconds = {
        "iteration_s": lambda v: v,
        "tokens_per_s_per_gpu": lambda v: batch * tokens / (v * gpus),
        "tflops_per_gpu": lambda v: flops / (v * 1e12 * gpus),
    }
    peak = max(p.value for p in cluster.gpu.flops_per_second.values())
    found: Found = []
    # Of one update among many: only there can updated weights be gathered beside the next forward pass.
    predicted = seconds_of(3) - seconds_of(2) if actor.get("overlap_param_gather") else seconds_of(1)
    for name in [name for name in seconds if name in record.measured][:1]:  # they say the same; the most direct one
        measured = seconds[name](record.measured[name])
        _possible(record, name, work / gpus / measured / peak, MOST_OF_PEAK, f"the peak of {cluster.gpu.name}")
        found.append((f"{STEP} ({name})", measured, predicted))
    return found


def _options(record: Record) -> dict[str, Any]:
    """Fields of a scenario's model that the record states beside its own words. Raises InputError for no mapping."""
    options = record.fields.get("options", {})
    if not isinstance(options, dict):
        raise InputError("must be a mapping of fields of a model", field="options", where=record.where)
    return options


def _counts_causal(record: Record) -> bool:
    """Whether the FLOPs behind a rate leave out what a causal mask hides. Raises InputError for an unknown word."""
    counted = record.fields.get("attention_flops", "causal")
    if counted not in ("causal", "full"):
        raise InputError(f"is {counted!r}, but must be causal or full", field="attention_flops", where=record.where)
    return bool(counted == "causal")


# --- generation ------------------------------------------------------------------------------------------------------


def _generation(record: Record, cluster: Cluster) -> Found:
    batch, prompt, response = (_whole(record, name) for name in ("batch", "input", "output"))
    seconds = _gen_seconds(record, cluster, batch, prompt, response)
    rate = record.measured["output_tok_s_per_gpu"]
    measured = batch * response / (rate * int(record.fields["gpus"]))
    return [("gen (output_tok_s_per_gpu)", measured, seconds)]


def _prefill(record: Record, cluster: Cluster) -> Found:
    seconds = _gen_seconds(record, cluster, _whole(record, "batch"), _whole(record, "input"), 1)
    return [("gen (first_token_ms)", record.measured["first_token_ms"] / 1e3, seconds)]


def _both(record: Record, cluster: Cluster) -> Found:
    batch, prompt, response = (_whole(record, name) for name in ("batch", "input", "output"))
    first = _gen_seconds(record, cluster, batch, prompt, 1)
    whole = _gen_seconds(record, cluster, batch, prompt, response)
    token = (whole - first) / max(response - 1, 1)
    predicted = {
        "ttft_ms": first, "prefill_ms": first, "tpot_ms": token, "decode_ms_per_token": token, "e2e_ms": whole,
        "total_ms": whole,
    }  # fmt: skip
    return [(f"gen ({name})", value / 1e3, predicted[name]) for name, value in record.measured.items()]


def _gen_seconds(record: Record, cluster: Cluster, batch: int, prompt: int, response: int) -> float:
    """Of generating a batch on an engine whose cache holds all of it."""
    layout, gpus = _layout(record), int(record.fields["gpus"])
    precision, products = _precision(record)
    if products == "fp8" and "fp8" not in cluster.gpu.flops_per_second:
        raise Inexpressible(f"{cluster.gpu.name} does not compute in fp8")
    tensor = layout.get("tp", 1)
    engine: dict[str, Any] = {
        "engine": "engine",
        "tensor_parallel": tensor,
        "max_sequences": -(-batch * tensor // gpus),
        "kv_cache_tokens": -(-batch * tensor // gpus) * (-(-(prompt + response) // 16) * 16 + 16),
    }
    if products:
        engine |= {"weights_precision": products, "kv_precision": products}
    actor = {**_model(record), "precision": precision, "tensor_parallel": 1}
    setup = _setup(record, cluster, gpus, actor, batch, prompt, response, engine)
    seconds = alone_seconds(setup, "gen")
    if response > 1:
        bytes_read = parameters(setup.scenario.models.actor.shape) * (1 if products else 2) / tensor
        least = (response - 1) * bytes_read / cluster.gpu.memory_bytes_per_second.value
        if not setup.scenario.models.actor.shape.experts:
            for name in ("e2e_ms", "total_ms"):
                if name in record.measured:
                    _possible(record, name, least / (record.measured[name] / 1e3), 1.1, "the memory's bandwidth")
    return seconds


# --- collectives -----------------------------------------------------------------------------------------------------


def _collective(record: Record, cluster: Cluster) -> Found:
    words = str(record.fields.get("op", "")).lower()
    op = next((o for o in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all") if o in words), "all_gather")
    if "bridge" in str(record.fields.get("fabric", "")).lower() and cluster.node.gpu_link == "pcie":
        raise Inexpressible("NVLink bridges between PCIe cards")
    ranks, nodes = int(record.fields["gpus"]), int(record.fields.get("nodes", 1))
    size = float(record.measured.get("bytes", LARGE_BYTES))
    predicted = float(collective_seconds_on(cluster, op, ranks, nodes, np.array([size]))[0])
    moved, found = size * bus_factor(op, ranks), list[tuple[str, float, float]]()  # type: ignore[arg-type]
    link = (cluster.gpu.nvlink_bytes_per_second or cluster.gpu.pcie_bytes_per_second).value
    for name, measured in (
        ("time_us", record.measured.get("time_us", 0) / 1e6),
        ("busbw_gb_s", moved / (record.measured.get("busbw_gb_s", 0) * 1e9 or np.inf)),
    ):
        if name in record.measured and not found:
            _possible(record, name, moved / measured / link, MOST_OF_LINK, f"the links of {cluster.gpu.name}")
            found.append((f"{op} ({name})", measured, predicted))
    return found


PREDICT: dict[str, Callable[[Record, Cluster], Found]] = {
    "training": _training,
    "generation": _generation,
    "prefill": _prefill,
    "prefill+decode": _both,
    "collective": _collective,
}


# --- what a record says ----------------------------------------------------------------------------------------------


def _setup(
    record: Record,
    cluster: Cluster,
    gpus: int,
    actor: dict[str, Any],
    batch: int,
    prompt: int,
    response: int,
    generation: dict[str, Any],
    updates: int = 1,
) -> Setup:
    per_node = max(n for n in range(1, min(gpus, cluster.node.gpus_per_node) + 1) if gpus % n == 0)
    shape = {key: actor[key] for key in ("spec", "shape") if key in actor}  # of roles that the run does not have
    data = {
        "name": record.id,
        "cluster": {"spec": cluster.name, "nodes": gpus // per_node, "gpus_per_node": per_node},
        "models": {"actor": actor} | dict.fromkeys(ROLES[1:], shape),
        "workload": {"prompts": batch, "prompt_tokens": prompt, "response_tokens": response},
        "algorithm": {"name": "reinforce_plus_plus", "reward": "function", "kl_coefficient": 0, "minibatches": updates},
        "generation": generation,
        "strategy": {"name": "colocated"},
        "simulation": {"iterations": 1},
    }
    try:
        return prepare(scenario_from_dict(data))
    except InputError as error:
        raise Inexpressible(str(error)) from None


def _model(record: Record) -> dict[str, Any]:
    """`spec`, and the shape where the record gives one."""
    given = record.fields.get("model")
    model = given if isinstance(given, dict) else {"name": str(given)}
    shape = SHAPES.get(str(model.get("name", "")).lower(), {}) | model
    if not all(name in shape for name in ("layers", "hidden", "heads")):
        try:
            return {"spec": model_named(str(model.get("name")), "model", record.where)}
        except InputError as error:
            raise Inexpressible(str(error)) from None
    hidden, heads = int(shape["hidden"]), int(shape["heads"])
    own = {
        "name": str(model["name"]),
        "family": "gpt2",
        "source": "unverified",
        "layers": int(shape["layers"]),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(shape.get("kv_heads", heads)),
        "head_dim": hidden // heads,
        "ffn": int(shape.get("ffn", 4 * hidden)),
        "gated_mlp": False,
        "vocabulary": int(shape.get("vocabulary", GPT_VOCABULARY)),
        "tied_embeddings": bool(shape.get("tied_embeddings", True)),
        "learned_positions": _sequence(record),
        "norm": "layer",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "max_positions": _sequence(record),
    }
    return {"spec": str(model["name"]), "shape": own}


def _uneven(actor: dict[str, Any], record: Record) -> dict[str, int]:
    """Layers of the first and the last pipeline stage where the stages cannot have equally many.

    Both have fewer, the last one the fewest, as it has the head.
    """
    stages, chunks = actor["pipeline_parallel"], actor["pipeline_chunks"]
    layers = actor["shape"]["layers"] if "shape" in actor else load_model(actor["spec"]).layers
    if layers % (stages * chunks) == 0:
        return {}
    each = -(-layers // (stages * chunks))
    missing = each * stages * chunks - layers
    first, last = each - missing // 2, each - (missing - missing // 2)
    if last < 1:
        raise Inexpressible(
            f"{layers} layers on {stages} pipeline stages, and the record does not say how many on each"
        )
    return {"first_stage_layers": (chunks - 1) * each + first, "last_stage_layers": (chunks - 1) * each + last}


def _sequence(record: Record) -> int:
    """Tokens: of the record, of its model, or of what it assumes in words (`sequence length 4096`)."""
    model = record.fields.get("model")
    for place in (record.fields, model if isinstance(model, dict) else {}):
        for name in ("sequence", "seq", "sequence_length"):
            if name in place:
                return int(place[name])
    for text in record.fields.get("assumed", []):
        words = str(text).split()
        if words[:2] == ["sequence", "length"] and words[2].isdigit():
            return int(words[2])
    return GPT_TOKENS


def _layout(record: Record) -> dict[str, int]:
    given = record.fields.get("parallel", {})
    if isinstance(given, str) and given.upper().startswith("TP") and given[2:].isdigit():
        return {"tp": int(given[2:])}
    if not isinstance(given, dict):
        raise Inexpressible(f"parallel is {given!r}")
    return {name: int(value) for name, value in given.items()}


def _precision(record: Record) -> tuple[str, str | None]:
    """Of the weights, and of products where that is another."""
    text = str(record.fields.get("precision", "bf16")).lower()
    if text in ("bf16", "fp16", "fp32"):
        return text, None
    if text.startswith("fp8"):
        return "bf16", "fp8"
    raise Inexpressible(f"precision {text}")


def _whole(record: Record, name: str, default: int | None = None) -> int:
    value = record.fields.get(name, default)
    if value is None or isinstance(value, bool) or not str(value).isdigit():
        raise Inexpressible(f"{name} is {value!r}" if value is not None else f"{name} is not stated")
    return int(value)


def _possible(record: Record, name: str, share: float, most: float, what: str) -> None:
    """Raises InputError where a measurement is faster than the hardware."""
    if share > most:
        raise InputError(
            f"is {record.measured[name]:g}, {share:.3g} times what {what} allows: another unit, or another GPU",
            field=f"measured.{name}",
            where=record.where,
        )
