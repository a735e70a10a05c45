"""Does it fit: whole scenarios against closed forms, against monotony, and against what the simulator then does."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim import fits
from rlhfsim.errors import DoesNotFit, InputError
from rlhfsim.fits import Fit, Memory
from rlhfsim.graph import StageGraph
from rlhfsim.layout import Holding
from rlhfsim.memory import PROFILE_REST_BYTES, Bytes
from rlhfsim.metrics import memory_peak
from rlhfsim.model import kv_bytes_per_token
from rlhfsim.simulate import Setup, prepare, simulate
from rlhfsim.spec.base import Record
from rlhfsim.spec.scenario import Scenario

GIB = 2**30
approx = pytest.approx
some = settings(max_examples=60, deadline=None)
everywhere = pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)
HOLDERS = ("actor", "critic", "reference", "reward")


def setup_of(strategy: str, engine: str, **changes: Any) -> Setup:
    return prepare(scenario(strategy, engine, **changes))


def fit_of(strategy: str, engine: str, **changes: Any) -> Fit:
    return setup_of(strategy, engine, **changes).fit()


def gpu_memory(byte_count: float) -> dict[str, Any]:
    return {"cluster.gpu.memory_bytes": {"value": byte_count, "source": "unverified"}}


# ---------------------------------------------------------------- monotony


def bytes_by_phase(strategy: str, engine: str, **changes: Any) -> dict[str, float]:
    return {phase: instant.bytes.total for phase, instant in fit_of(strategy, engine, **changes).by_phase.items()}


GROWING = (
    "models.actor.micro_batch_samples",
    "models.critic.micro_batch_samples",
    "models.reference.score_micro_batch_samples",
    "workload.prompts",
    "workload.prompt_tokens",
    "workload.response_tokens",
    "generation.batch_samples",
    "generation.max_sequences",
    "models.actor.lora_rank",
)


@some
@given(st.sampled_from(PLACEMENTS), st.sampled_from(GROWING), st.integers(8, 200), st.integers(1, 200), st.booleans())
def test_more_work_needs_no_less_memory(
    placement: tuple[str, str], name: str, size: int, more: int, tensor: bool
) -> None:
    """In every phase."""
    changes: dict[str, Any] = {"algorithm.minibatches": 1}
    if tensor and placement[0] == "colocated":
        changes |= {"models.actor.zero_stage": 1, "models.actor.tensor_parallel": 2}
    before = bytes_by_phase(*placement, **changes, **{name: size})
    after = bytes_by_phase(*placement, **changes, **{name: size + more})
    assert all(after[phase] >= before[phase] * (1 - 1e-12) for phase in before)


@everywhere
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_more_gpus_need_no_more_each(strategy: str, engine: str, zero_stage: int) -> None:
    """From where every model has at least two ranks: one alone gathers and reduces nothing."""
    found = [
        fit_of(
            strategy,
            engine,
            cluster__nodes=nodes,
            workload__prompts=256,
            models__actor={"spec": "llama-7b", "zero_stage": zero_stage},
            models__critic={"zero_stage": zero_stage},
        )
        for nodes in (4, 8, 16)
    ]
    totals = [fit.worst.bytes.total for fit in found]
    if engine == "engine":  # its cache takes what it can use: compare what is asked of the other phases
        totals = [max(i.bytes.total for phase, i in fit.by_phase.items() if phase != "gen") for fit in found]
    assert totals == sorted(totals, reverse=True)


# ---------------------------------------------------------------- micro-batches


def with_micro_batch(scene: dict[str, Any], key: str, size: int) -> Fit:
    return fit_of(**scene, **{key: size})


@pytest.mark.parametrize(
    ("strategy", "engine"), [("colocated", "hybrid"), ("interleaved", "hybrid"), ("disaggregated", "engine")]
)
@pytest.mark.parametrize("recompute", ["full", "none"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(strategy: str, engine: str, recompute: str) -> None:
    """By asking again with that size. Ten samples of 7B fill what the GPU has beside the model states."""
    stages = {
        "models.actor.micro_batch_samples": ("update_actor",),
        "models.critic.micro_batch_samples": ("update_critic",),
        "models.reference.score_micro_batch_samples": ("ref",),
        "models.reward.score_micro_batch_samples": ("reward",),
        "models.critic.score_micro_batch_samples": ("values",),
        "models.actor.score_micro_batch_samples": ("old_log_prob",),
    }
    scene: dict[str, Any] = {
        "strategy": strategy,
        "engine": engine,
        "cluster__nodes": 4,
        "workload__prompts": 4096,
        "workload__prompt_tokens": 512,
        "workload__response_tokens": 512,
        "algorithm__minibatches": 1,
        "generation__batch_samples": None if engine == "engine" else 1,
    }
    scene |= {f"models.{role}": {"spec": "llama-7b", "zero_stage": 3, "recompute": recompute} for role in HOLDERS}
    limited = 0
    setup = setup_of(**scene)
    for key, largest in setup.memory.largest_micro_batches().items():
        mine = [s for s in setup.graph.stages() if s.name.split(".")[0] in stages[key]]
        most = min(setup.memory.samples_per_replica(s) for s in mine)
        name = mine[0].name.split(".")[0]
        if largest:
            assert with_micro_batch(scene, key, largest).by_phase[name].bytes.total <= setup.fit().capacity_bytes
        if largest < most:
            limited += 1
            assert with_micro_batch(scene, key, largest + 1).by_phase[name].bytes.total > setup.fit().capacity_bytes
    assert limited >= 2


def test_no_micro_batch_fits_where_the_states_do_not() -> None:
    fit = fit_of("colocated", "hybrid", cluster__nodes=1, models__actor={"spec": "llama-13b"})
    assert not fit.fits and fit.limiting[1] == "optimizer"
    assert set(fit.micro_batches.values()) == {0}


# ---------------------------------------------------------------- the verdict


@everywhere
def test_the_verdict_turns_at_the_last_byte(strategy: str, engine: str) -> None:
    changes: dict[str, Any] = {"generation.batching": "static"}
    need = fit_of(strategy, engine, **changes).worst.bytes.total
    assert fit_of(strategy, engine, **changes, **gpu_memory(need)).fits
    tight = fit_of(strategy, engine, **changes, **gpu_memory(need - 1))
    assert not tight.fits and tight.reason.startswith(f"{tight.worst.phase} on rank {tight.worst.rank} needs")
    assert fit_of(strategy, engine, **changes, **gpu_memory(need - 1), effects__memory=False).fits


@everywhere
@pytest.mark.parametrize("lengths", [{}, TAIL])
def test_the_timeline_peaks_where_fits_says(strategy: str, engine: str, lengths: dict[str, Any]) -> None:
    """At maximum lengths, whatever was drawn."""
    found = scenario(strategy, engine, **lengths)
    worst, peak = prepare(found).fit().worst, memory_peak(timeline_of(found))
    assert peak is not None
    assert (peak.bytes, peak.bytes_by_component) == (approx(worst.bytes.total, rel=1e-12), worst.bytes.components)


@everywhere
def test_phases_and_the_99th_percentile(strategy: str, engine: str) -> None:
    setup = setup_of(strategy, engine, **TAIL, **{"workload.prompts": 512})
    fit = setup.fit()
    ran = {s.name.split(".")[0] for s in setup.graph.stages() if s.kind != "swap"}
    assert fit.by_phase.keys() == {"resting"} | ran
    assert fit.worst.bytes.total == max(i.bytes.total for i in fit.by_phase.values())
    assert fit.by_phase["resting"].bytes.total <= fit.p99_bytes <= fit.worst.bytes.total
    assert fit_of(strategy, engine).p99_bytes == fit_of(strategy, engine).worst.bytes.total  # fixed lengths


def records(record: type[Record]) -> set[type[Record]]:
    """A record and all that it is made of."""
    found = {record}
    for field in record.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Record):
            found |= records(field.annotation)
    return found


def test_every_component_has_a_knob_and_every_knob_exists() -> None:
    assert fits.KNOBS.keys() == {f.name for f in fields(Bytes)} - {"host"}
    known = {name for record in records(Scenario) for name in record.model_fields}
    for text in fits.KNOBS.values():
        named = re.findall(r"[a-z]+(?:_[a-z]+)+|(?<=\.)[a-z_]+|[a-z_]+(?=[.:])", text)
        assert named
        assert set(named) <= known, text
        sections = re.findall(r"([a-z_]+)\.([a-z_]+)", text)
        assert all(option in Scenario.model_fields[section].annotation.model_fields for section, option in sections)


@pytest.mark.parametrize(
    ("changes", "component"),
    [
        ({"models.actor.zero_stage": 0, "models.critic.zero_stage": 0}, "optimizer"),
        ({"workload.response_tokens": 8000, "workload.prompts": 2048}, "kv_cache"),
        (
            {"models.actor.micro_batch_samples": 64, "models.actor.recompute": "none", "workload.prompts": 2048},
            "activations",
        ),
    ],
)
def test_the_knob_of_the_largest_part_is_named(changes: dict[str, Any], component: str) -> None:
    fit = fit_of("colocated", "hybrid", algorithm__minibatches=1, models__actor={"spec": "llama-7b"}, **changes)
    assert not fit.fits and fit.limiting[1] == component
    assert fits.KNOBS[component] in fit.reason


# ---------------------------------------------------------------- host memory


def test_offloaded_states_need_host_memory() -> None:
    """Per node of 4: fp32 master weights, moments and gradients of its shards of two models, 16 bytes a parameter."""
    offloaded = {"models.actor.offload_optimizer": True, "models.critic.offload_optimizer": True}
    states = 16 * (6_738_415_616 + 6_738_415_616 - 4096 * 32000 + 4096)  # LLaMA 7B; a critic has a value head
    for nodes in (2, 4):
        fit = fit_of("colocated", "hybrid", models__actor={"spec": "llama-7b"}, cluster__nodes=nodes, **offloaded)
        assert fit.host["states"] == approx(states / nodes, rel=1e-9)
    exact = {"value": fit.host_bytes, "source": "unverified"}
    less = {"value": fit.host_bytes - 1, "source": "unverified"}
    scene = {"models.actor.spec": "llama-7b", "cluster.nodes": 4, **offloaded}
    assert fit_of("colocated", "hybrid", **scene, **{"cluster.node.host_memory_bytes": exact}).fits
    tight = fit_of("colocated", "hybrid", **scene, **{"cluster.node.host_memory_bytes": less})
    assert not tight.fits and "host memory" in tight.reason
    assert fit_of("colocated", "hybrid", **{"models.actor.spec": "llama-7b"}).host_bytes == 0


# ---------------------------------------------------------------- the engine's cache


def kv_bytes(tensor_parallel: int = 1) -> float:
    """Per token of small-8x512: keys and values of 8 layers in 16 bit."""
    return 2 * 8 * 512 * 2 / tensor_parallel


def test_kv_cache_of_an_engine_by_its_fraction() -> None:
    """What the fraction leaves after weights, prefill activations and logits; twice the share is that much more."""
    assert kv_bytes() == kv_bytes_per_token(scenario().models.actor.shape, 2)
    for strategy in ("colocated", "interleaved", "disaggregated"):
        small, large = (fit_of(strategy, "engine", generation__memory_fraction=share) for share in (0.1, 0.2))
        assert small.memory_fraction == 0.1 and small.kv_capacity_tokens and large.kv_capacity_tokens
        gained = (large.kv_capacity_tokens - small.kv_capacity_tokens) * kv_bytes()
        assert gained == approx(0.1 * small.capacity_bytes, rel=1e-9)
        rest = 0.1 * small.capacity_bytes - small.kv_capacity_tokens * kv_bytes()
        weights = 2 * (8 * (4 * 512**2 + 3 * 512 * 1408 + 2 * 512) + 512 + 2 * 4096 * 512)
        assert weights < rest < weights + 1e9 + PROFILE_REST_BYTES


# vLLM 0.19.0, Llama-3.1-8B in bf16 on one RTX 4090 (casys-kaist/LLMServingSim, MIT, bench of 2026-08-20, meta.json):
# device_total_memory_bytes, gpu_memory_utilization, max_num_batched_tokens, max_num_seqs, num_gpu_blocks of 16 tokens.
RTX_4090 = {
    "models.actor.spec": "llama-3.1-8b",
    **gpu_memory(25_250_627_584),
    "generation.memory_fraction": 0.9,
    "generation.prefill_tokens": 2048,
    "generation.max_sequences": 256,
}
RTX_4090_BLOCKS = 2588


def test_blocks_that_vllm_found_on_a_4090() -> None:
    """2588: of the 1180 MiB that vLLM did not give to weights or cache drawing 256 tokens explains 454. The rest is
    taken from this run (`PROFILE_REST_BYTES`), for all models alike."""
    tokens = fit_of("disaggregated", "engine", **RTX_4090).kv_capacity_tokens
    assert tokens is not None
    weights, hidden = 2 * 8_030_261_248, 2 * 2048 * 4096
    drawing = 256 * 128_256 * (2 + 3 * 4)
    assert tokens * 131_072 == approx(0.9 * 25_250_627_584 - weights - hidden - drawing - PROFILE_REST_BYTES, rel=1e-9)
    assert tokens // 16 == approx(RTX_4090_BLOCKS, abs=1)


def test_blocks_as_the_log_gives_them() -> None:
    logged = {k: v for k, v in RTX_4090.items() if k != "generation.memory_fraction"}
    fit = fit_of("disaggregated", "engine", **logged, **{"generation.kv_cache_tokens": 41_408})
    assert fit.kv_capacity_tokens == 16 * RTX_4090_BLOCKS
    assert fit.memory_fraction is not None and 0.8 < fit.memory_fraction < 0.9
    with pytest.raises(InputError, match="leave out one"):
        scenario("disaggregated", "engine", **RTX_4090, **{"generation.kv_cache_tokens": 41_408})


def test_graphs_take_memory_and_count_where_they_are_counted() -> None:
    graphs = {"generation.cuda_graph_bytes": 1e9}
    plain, beside, counted = (
        fit_of("disaggregated", "engine", **RTX_4090, **changes)
        for changes in ({}, graphs, graphs | {"generation.memory_fraction_covers": "profile_and_graphs"})
    )
    assert beside.kv_capacity_tokens == plain.kv_capacity_tokens
    assert counted.kv_capacity_tokens == approx(plain.kv_capacity_tokens - 1e9 / 131_072)
    assert beside.by_phase["gen"].bytes.total == approx(plain.by_phase["gen"].bytes.total + 1e9)


def test_static_memory_of_sglang() -> None:
    """max_total_num_tokens = (free after loading - free before x (1 - mem_fraction_static)) / bytes of a token
    (sglang/srt/model_executor/model_runner.py, profile_max_num_token)."""
    static = {"generation.memory_fraction_covers": "static", "overheads.reserved_bytes": 2e9}
    before = 25_250_627_584 - 2e9
    after = before - 2 * 8_030_261_248
    for fraction in (0.75, 0.85):
        fit = fit_of("disaggregated", "engine", **RTX_4090 | static | {"generation.memory_fraction": fraction})
        assert fit.kv_capacity_tokens == approx((after - before * (1 - fraction)) / 131_072, rel=1e-9)


def test_a_small_batch_does_not_shrink_what_the_engine_profiles() -> None:
    """The step at the limits counts, not the one that this workload needs; at 8192 tokens the layers are the peak."""
    few, many = (
        fit_of("disaggregated", "engine", **RTX_4090 | {"workload.prompts": n, "generation.prefill_tokens": 16_384})
        for n in (64, 1024)
    )
    assert few.kv_capacity_tokens == many.kv_capacity_tokens
    layers = 16_384 * 2 * (4096 + 3 * 14_336)
    taken = 2 * 8_030_261_248 + layers + PROFILE_REST_BYTES
    assert few.kv_capacity_tokens * 131_072 == approx(0.9 * 25_250_627_584 - taken, rel=1e-9)


@pytest.mark.parametrize("strategy", ["colocated", "interleaved", "disaggregated"])
def test_the_fraction_that_fits_gives_writes_the_same_cache(strategy: str) -> None:
    """Absent: the engine has what is left. The share that this is, put in, changes nothing."""
    free = fit_of(strategy, "engine")
    assert free.memory_fraction is not None and 0.5 < free.memory_fraction < 1
    given_back = fit_of(strategy, "engine", generation__memory_fraction=free.memory_fraction)
    assert given_back.kv_capacity_tokens == approx(free.kv_capacity_tokens, rel=1e-9)
    assert given_back.worst.bytes.total == approx(free.worst.bytes.total, rel=1e-9)


def test_an_engine_without_room_for_one_sequence_cannot_start() -> None:
    """`fits` says so where simulating would fail: around the fraction at which one sequence of 192 tokens fits."""
    found = scenario("disaggregated", "engine")
    base = fit_of("disaggregated", "engine", generation__memory_fraction=0.1)
    assert base.kv_capacity_tokens is not None
    one_token = kv_bytes() / base.capacity_bytes
    verdicts = []
    for tokens in (100, 180, 191.5, 192.5, 200, 300):
        fraction = 0.1 + (tokens - base.kv_capacity_tokens) * one_token
        found = scenario("disaggregated", "engine", generation__memory_fraction=fraction)
        setup = prepare(found)
        fit = setup.fit()
        assert fit.kv_capacity_tokens == approx(tokens, abs=0.01)
        verdicts.append(fit.fits)
        if fit.fits:
            simulate(setup)
        else:
            assert "cannot start" in fit.reason
            with pytest.raises(DoesNotFit):
                simulate(setup)
    assert verdicts == [False, False, False, True, True, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.floats(-20, 60))
def test_what_fits_can_be_simulated(response: int, block: int, spare: float) -> None:
    """Whatever the blocks of the paged cache are: a cache for one sequence and some spare tokens."""
    tokens = 64 + response + spare
    changes = {"workload.response_tokens": response, "generation.block_tokens": block, "simulation.iterations": 1}
    base = fit_of("colocated", "engine", generation__memory_fraction=0.1, **changes)
    assert base.kv_capacity_tokens is not None
    fraction = 0.1 + (tokens - base.kv_capacity_tokens) * kv_bytes() / base.capacity_bytes
    setup = setup_of("colocated", "engine", generation__memory_fraction=fraction, **changes)
    if setup.fit().fits:
        simulate(setup)
    else:
        with pytest.raises(DoesNotFit):
            simulate(setup)


def test_a_waking_engine_stands_beside_the_training_states() -> None:
    """On ranks that it shares with training it sleeps until the weights come; on its own it never does."""
    colocated = fit_of("colocated", "engine", generation__tensor_parallel=2).by_phase
    weights = 2 * (8 * (4 * 512**2 + 3 * 512 * 1408) + 2 * 4096 * 512) / 2
    assert colocated["resting"].bytes.engine == colocated["update_actor"].bytes.engine == 0
    for phase in ("gen", "update_weights"):
        assert colocated[phase].bytes.engine == approx(weights, rel=1e-3)  # norms are whole on every rank
        assert colocated[phase].bytes.optimizer == colocated["resting"].bytes.optimizer > 0
    setup = setup_of("disaggregated", "engine", generation__tensor_parallel=2)
    assert setup.memory.resting(0).engine == approx(weights, rel=1e-3)


# ---------------------------------------------------------------- field reports


def training_alone(spec: str, *, gpus: int, tokens: int, cluster: str = "a100-80g-sxm", **use: Any) -> Fit:
    """One model that is trained and nothing else, in micro-batches of one."""
    found = scenario(
        cluster={"spec": cluster, "nodes": 1, "gpus_per_node": gpus},
        workload__prompt_tokens=tokens - 1,
        workload__response_tokens=1,
        models__actor={"spec": spec, "micro_batch_samples": 1, **use},
    )
    ranks, graph = tuple(range(gpus)), StageGraph()
    graph.stage("update_actor", "train", "actor", ranks)
    return Memory(found, graph, {"actor": Holding("actor", found.models.actor, "train", ranks)}).fit()


def test_llama_3_8b_needs_offload_on_one_a100() -> None:
    """github.com/OpenRLHF/OpenRLHF issue 698 (2025-01): ZeRO-2, micro-batch 1, 128 tokens, checkpointing, one A100-80G:
    out of memory in the optimizer step; adam_offload cures it."""
    plain = training_alone("llama-3-8b", gpus=1, tokens=128, zero_stage=2)
    assert not plain.fits
    assert plain.limiting == ("update_actor", "optimizer") and "offload_optimizer" in plain.reason
    assert 119.7 < plain.worst.bytes.total / GIB < 125
    offloaded = training_alone("llama-3-8b", gpus=1, tokens=128, zero_stage=2, offload_optimizer=True)
    assert offloaded.fits
    assert offloaded.host["states"] == approx(16 * 8.03e9, rel=1e-3)


def test_14b_on_four_gpus_asks_for_gigabytes_of_logits() -> None:
    """github.com/skypilot-org/skypilot pull request 10269: 14B with tensor parallelism 4 on 4 H100, one packed row of
    about 27,100 tokens, asks 3.84 GiB for one fp32 copy of the logits. States: 55 GiB, 14 with Adam offloaded."""
    for offload, states in ((False, 55), (True, 14)):
        found = training_alone(
            "qwen2.5-14b",
            gpus=4,
            tokens=27_100,
            cluster="h100-80g-sxm",
            zero_stage=1,
            tensor_parallel=4,
            offload_optimizer=offload,
        ).worst.bytes
        assert (found.weights + found.gradients + found.optimizer) / GIB == approx(states, abs=0.5)
        assert 3.84 < found.logits / GIB < 3 * 3.84
