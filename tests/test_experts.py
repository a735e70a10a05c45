"""Experts, windows, latent attention and one-byte weights in costs and memory, against counts made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import scenario, timeline_of

from rlhfsim.costs.engine import static_runs
from rlhfsim.costs.generation import StepSeconds
from rlhfsim.costs.kernels import load_kernels
from rlhfsim.costs.operators import Operators
from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.pipeline import PipelineSegment
from rlhfsim.costs.segment import Segment, Transfer
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.memory import engine_bytes, static_bytes, training_bytes
from rlhfsim.model import expert_exchange_bytes, kv_bytes_per_token, layers_routed_parameters, parameters
from rlhfsim.simulate import prepare
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import load_cluster, scenario_from_dict
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Effects, Generation, ModelUse, Overheads

QWEN = load_model("qwen3-30b-a3b")
DEEPSEEK = load_model("deepseek-v3")
GPT_OSS = load_model("gpt-oss-20b")


def operators(cluster: str = "h100-80g-sxm", *, efficiency: bool = True) -> Operators:
    gpu = load_cluster(cluster).gpu
    kernels = load_kernels(data_dir("hw_specs") / "kernels" / f"{gpu.kernels}.yaml")
    return Operators(gpu, kernels, Effects(efficiency=efficiency), Overheads())


def use(shape: ModelSpec = QWEN, **settings: Any) -> ModelUse:
    return ModelUse(spec=shape.name, shape=shape, **({"zero_stage": 1} | settings))


def transfers(program: list[Segment], op: str) -> list[Transfer]:
    return [t for segment in program for t in segment.transfers if t.op == op]


def moved(program: list[Segment], op: str) -> float:
    """Payload of one group over a whole program."""
    total = 0.0
    for segment in program:
        for t in segment.transfers:
            if t.op == op:
                total += float(np.sum(np.broadcast_to(t.payload_bytes, segment.repeats.shape) * segment.repeats))
    return total


# --- expert parallelism ----------------------------------------------------------------------------------------------


@given(st.sampled_from([(1, 8, 1), (2, 8, 1), (2, 4, 2), (4, 2, 4), (4, 16, 1), (1, 4, 2)]), st.sampled_from([1, 2]))
def test_groups_of_experts_cover_every_rank_once(split: tuple[int, int, int], pipeline: int) -> None:
    tensor, parallel, expert_tensor = split
    u = use(tensor_parallel=tensor, pipeline_parallel=pipeline, expert_parallel=parallel,
            expert_tensor_parallel=expert_tensor)  # fmt: skip
    layout = Layout.of(range(32), u)
    stages = [set(map(int, stage.ravel())) for stage in layout.grid]
    for groups, size in (
        (layout.expert_groups, parallel),
        (layout.expert_tensor_groups, expert_tensor),
        (layout.expert_data_groups, 32 // pipeline // parallel // expert_tensor),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(32))
        assert {len(group) for group in groups} == {size}
        assert all(any(set(group) <= stage for stage in stages) for group in groups)
    # Ranks that exchange tokens hold different experts, so none of them are copies of each other.
    for group in layout.expert_groups:
        assert all(len(set(group) & set(copies)) <= 1 for copies in layout.expert_data_groups)


@pytest.mark.parametrize("recompute, passes", [("none", 2), ("full", 3)])
@pytest.mark.parametrize("imbalance", [1.0, 1.5])
def test_all_to_all_of_training(recompute: Any, passes: int, imbalance: float) -> None:
    """Dispatch and combination in every layer's forward, backward and recomputation, in every micro-batch."""
    u = use(expert_parallel=8, recompute=recompute, micro_batch_samples=1, routing_imbalance=imbalance)
    lengths = [np.full(2, 512.0)] * 8
    program = train_program(u, lengths, Layout.of(range(8), u), operators())
    elsewhere = expert_exchange_bytes(QWEN, 2 * 512, u.expert_split()) * imbalance
    assert moved(program, "all_to_all") * 7 / 8 == pytest.approx(passes * 2 * QWEN.layers * elsewhere)
    assert all(t.groups == (tuple(range(8)),) for t in transfers(program, "all_to_all"))
    assert not any(s.prefetch for s in program if transfers([s], "all_to_all")), "nothing hides an all-to-all"


@pytest.mark.parametrize("tensor, experts", [(1, 8), (2, 8), (4, 2)])
def test_all_to_all_of_scoring_and_who_holds_tokens(tensor: int, experts: int) -> None:
    """Ranks of a tensor-parallel group dispatch a share of its tokens each; attention keeps its collectives."""
    u = use(tensor_parallel=tensor, expert_parallel=experts, expert_tensor_parallel=1)
    lengths = [np.full(4, 256.0)] * (8 // tensor)
    program = score_program(u, lengths, Layout.of(range(8), u), operators())
    payload = 2 * QWEN.layers * (4 * 256 / tensor) * 8 * 2048 * 2
    assert moved(program, "all_to_all") == pytest.approx(payload)
    gathers = 0.0 if tensor == 1 else (QWEN.layers + 1) * 4 * 256 * 2048 * 2  # one a layer, one for the embedding
    assert moved(program, "all_gather") == pytest.approx(gathers)


def test_tensor_parallel_experts_gather_what_each_rank_received() -> None:
    u = use(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2)
    lengths = [np.full(4, 256.0)] * 4
    program = score_program(u, lengths, Layout.of(range(8), u), operators())
    received = QWEN.layers * (4 * 256 / 2) * 8 * 2048 * 2
    assert moved(program, "all_to_all") == pytest.approx(2 * received)
    attention = (QWEN.layers + 1) * 4 * 256 * 2048 * 2
    assert moved(program, "all_gather") == pytest.approx(2 * received + attention)


def test_without_expert_parallelism_experts_are_split_like_an_mlp() -> None:
    """Then nothing is dispatched, and both collectives of a tensor-parallel layer remain."""
    u = use(tensor_parallel=4)
    program = score_program(u, [np.full(4, 256.0)] * 2, Layout.of(range(8), u), operators())
    assert not transfers(program, "all_to_all")
    assert moved(program, "all_gather") == pytest.approx((2 * QWEN.layers + 1) * 4 * 256 * 2048 * 2)


def test_gradients_of_experts_are_reduced_over_their_copies_only() -> None:
    u = use(expert_parallel=4, zero_stage=0)
    program = train_program(u, [np.full(1, 64.0)] * 16, Layout.of(range(16), u), operators())
    routed = layers_routed_parameters(QWEN)
    by_size = {len(t.groups[0]): float(t.payload_bytes) for t in transfers(program, "all_reduce")}
    assert by_size == {16: 2.0 * (parameters(QWEN) - routed), 4: 2.0 * routed / 4}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_static_memory_of_experts(zero_stage: int) -> None:
    """32 ranks, 8-way experts: each rank an eighth of them, with 4 copies to shard over; the rest has 32 copies."""
    u = use(expert_parallel=8, zero_stage=zero_stage)
    routed = layers_routed_parameters(QWEN)
    dense, own = parameters(QWEN) - routed, routed / 8
    found = static_bytes(u, "train", 32)
    assert found.weights == pytest.approx(2 * (dense + own))
    assert found.gradients == pytest.approx(2 * (dense / 32 + own / 4 if zero_stage == 2 else dense + own))
    assert found.optimizer == pytest.approx(12 * (dense / 32 + own / 4 if zero_stage else dense + own))


def test_a_busy_rank_computes_and_keeps_more() -> None:
    ops = operators()
    even, uneven = (use(expert_parallel=8, routing_imbalance=x, recompute="none") for x in (1.0, 2.0))
    assert ops.layer_forward(uneven, 8192, 1).seconds > 1.2 * ops.layer_forward(even, 8192, 1).seconds
    assert training_bytes(uneven, 8, 4096, 4096).activations > 1.2 * training_bytes(even, 8, 4096, 4096).activations
    alone = [use(routing_imbalance=x) for x in (1.0, 2.0)]
    assert ops.layer_forward(alone[0], 8192, 1).seconds == ops.layer_forward(alone[1], 8192, 1).seconds
    ideal = operators(efficiency=False)
    assert ideal.layer_forward(even, 8192, 1).seconds == ideal.layer_forward(uneven, 8192, 1).seconds


def test_weights_are_sent_after_the_experts_were_gathered() -> None:
    u = use(expert_parallel=8, zero_stage=1)
    source, target = Layout.of(range(8), u), Layout(tuple(range(8, 16)), 8)
    program = sync_program(u, source, target, operators(), method="broadcast", bucket_bytes=1e9)
    assert moved(program, "all_gather") == pytest.approx(2 * layers_routed_parameters(QWEN))
    assert moved(program, "broadcast") == pytest.approx(2 * parameters(QWEN))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4096), st.sampled_from([1, 4]))
def test_experts_take_at_least_what_their_flops_and_bytes_take(tokens: int, t: int) -> None:
    """Active FLOPs at the peak; a decode step reads the experts that its tokens touch, and all of them when many."""
    ops, u = operators(), use(tensor_parallel=t)
    gpu = ops.gpu
    time = ops.layer_forward(u, tokens, t)
    expert = 3 * 2048 * 768 / t
    attention = 2048 * 128 * (32 + 32 + 2 * 4) / t
    flops = 2 * tokens * (8 * expert + attention)
    touched = 128 * (1 - (1 - 8 / 128) ** tokens)
    read = 2 * (touched * expert + attention)
    assert time.seconds >= flops / gpu.flops_per_second["bf16"].value
    assert time.seconds >= read / gpu.memory_bytes_per_second.value


def test_many_experts_cost_little_more_than_one_mlp_of_their_active_width() -> None:
    """With enough rows for each expert, grouped products approach a dense MLP of 8 x 768."""
    dense = QWEN.model_copy(update={"experts": 0, "experts_per_token": 0, "ffn": 8 * 768})
    ops = operators()
    many, one = (ops.layer_forward(use(shape), 65536, 1).flops for shape in (QWEN, dense))
    assert 0.9 < many / one < 1.25  # the long dense products run at lower clocks


# --- unequal pipeline stages -----------------------------------------------------------------------------------------


def test_deepseek_v3_on_sixteen_stages() -> None:
    """61 layers as 3 + 14 x 4 + 2: every layer once, and the states of the stages add up to the model's."""
    u = use(DEEPSEEK, pipeline_parallel=16, first_stage_layers=3, last_stage_layers=2, expert_parallel=16)
    stages = [u.stage_layers(stage) for stage in range(16)]
    assert [layer for stage in stages for layer in stage] == list(range(61))
    assert [len(stage) for stage in stages] == [3, *[4] * 14, 2]
    held = [static_bytes(u.model_copy(update={"zero_stage": 0}), "frozen", 16, stage=s).weights for s in range(16)]
    routed = layers_routed_parameters(DEEPSEEK)
    assert sum(held) == pytest.approx(2 * (parameters(DEEPSEEK) - routed * 15 / 16))


def test_unequal_stages_take_as_long_as_the_fullest() -> None:
    """Compute per stage follows its layers; equal stages that are named are the unnamed ones."""
    shape = load_model("llama-2-7b")
    even, named, uneven = (
        use(shape, pipeline_parallel=4, micro_batch_samples=1, **ends)
        for ends in ({}, {"first_stage_layers": 8}, {"first_stage_layers": 7, "last_stage_layers": 7})
    )
    lengths = [np.full(8, 512.0)]

    def stage_seconds(u: ModelUse) -> np.ndarray:
        program = train_program(u, lengths, Layout.of(range(4), u), operators())
        found = next(s for s in program if isinstance(s, PipelineSegment))
        return np.asarray(found.forward_seconds[:, 0, 0])

    assert np.array_equal(stage_seconds(even), stage_seconds(named))
    seconds = stage_seconds(uneven)
    assert seconds[1] == pytest.approx(9 / 8 * stage_seconds(even)[1])
    assert seconds.sum() == pytest.approx(stage_seconds(even).sum())


@pytest.mark.parametrize(
    "ends, message",
    [
        ({"first_stage_layers": 3, "last_stage_layers": 3}, "leave 55 of the 61 layers"),
        ({"first_stage_layers": 61}, "leave 0 of the 61 layers"),
        (
            {"first_stage_layers": 3, "last_stage_layers": 2, "pipeline_chunks": 2},
            "pipeline_chunks is 2, but must divide|which leaves none",
        ),
        ({"first_stage_layers": 3, "pipeline_parallel": 1}, "need pipeline_parallel above 1"),
    ],
)
def test_stages_that_do_not_hold_all_layers_are_refused(ends: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(DEEPSEEK, **({"pipeline_parallel": 16} | ends))


# --- engines ---------------------------------------------------------------------------------------------------------


def decode_seconds(u: ModelUse, context: int, sequences: int = 32, cluster: str = "h100-80g-sxm", **more: Any) -> float:
    """Mean device seconds of a decode step at this context, without the host."""
    steps = StepSeconds(operators(cluster), u, Generation(**({"engine": "engine"} | more)))
    runs = static_runs(np.full(sequences, context), np.full(sequences, 9), pieces=1)
    assert runs.steps.tolist() == [1, 8]
    return float(steps.of(runs)[:3, 1].sum()) / 8


def test_windowed_layers_stop_growing() -> None:
    """gpt-oss: half of the layers read 128 tokens of every sequence, however long it is."""
    u = use(GPT_OSS)
    ops = operators()
    grown = decode_seconds(u, 32768) - decode_seconds(u, 16384)
    one = ops.attention_decode(u, 32, 32 * 16384, 1).seconds - ops.attention_decode(u, 32, 0, 1).seconds
    assert grown == pytest.approx(12 * one, rel=0.02)  # not 24
    full = use(GPT_OSS.model_copy(update={"window": 0, "attention_pattern": ("full",)}))
    assert decode_seconds(full, 32768) > 1.3 * decode_seconds(u, 32768)
    assert decode_seconds(full, 64) == pytest.approx(decode_seconds(u, 64), rel=1e-9)  # nobody has 128 yet


def test_windowed_prefill_is_cheaper_only_beyond_the_window() -> None:
    ops, gemma = operators(), load_model("gemma-2-9b")
    full = use(gemma.model_copy(update={"window": 0, "attention_pattern": ("full",)}))
    short, long = np.array([4096.0]), np.array([16384.0])
    windowed = use(gemma)
    assert ops.attention_prefill(windowed, short, 1).seconds == ops.attention_prefill(full, short, 1).seconds
    saved = ops.attention_prefill(windowed, long, 1).flops / ops.attention_prefill(full, long, 1).flops
    # Pairs of one windowed layer over those of a full one, averaged with the full layers.
    window, n = 4096, 16384
    share = (window * n - window * (window - 1) / 2) / (n * (n + 1) / 2)
    assert saved == pytest.approx((1 + share) / 2, rel=0.02)  # beside the last tile, which sees all keys


def test_latent_attention_is_bound_by_whichever_is_slower() -> None:
    """128 heads share one latent vector: 278,528 FLOPs per 1152 bytes, above what H20 can compute per byte."""
    u = use(DEEPSEEK)
    for cluster, tensor, limit in (("h20-96g", 1, "flops"), ("h200-141g-sxm", 8, "hbm")):
        time = operators(cluster).attention_decode(u, 64, 64 * 8192, tensor)
        assert getattr(time, limit) > 0 and time.seconds > 0
        assert getattr(time, {"flops": "hbm", "hbm": "flops"}[limit]) == 0
    ops = operators("h20-96g")
    per_token = 2 * 128 * (576 + 512)
    least = 64 * 8192 * per_token / ops.gpu.flops_per_second["bf16"].value
    assert ops.attention_decode(u, 64, 64 * 8192, 1).seconds >= least
    # On more ranks there are fewer heads, but no less cache to read.
    split = ops.attention_decode(u, 64, 64 * 8192, 8).seconds
    assert split >= 64 * 8192 * 1152 / ops.gpu.memory_bytes_per_second.value


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_one_byte_weights_are_read_in_half_the_time(precision: Any) -> None:
    u = use(load_model("llama-3.1-70b"))
    plain, quantised = (decode_seconds(u, 128, 4, tensor_parallel=8, weights_precision=w) for w in (None, precision))
    # The head and what is not weights stay; on 8 ranks fp8 products are short, and their fixed time is longer.
    assert 0.5 < quantised / plain < 0.85
    generation = Generation(engine="engine", tensor_parallel=8, weights_precision=precision)
    bf16, one_byte = (
        engine_bytes(u, g, 0).engine for g in (Generation(engine="engine", tensor_parallel=8), generation)
    )
    head_and_embedding = 2 * 2 * 128256 * 8192 / 8
    assert one_byte - head_and_embedding == pytest.approx((bf16 - head_and_embedding) / 2, rel=0.001)


def test_a_gpu_without_the_rate_unpacks_the_weights() -> None:
    """A100 has no fp8: a long prefill takes as long, a decode step reads half."""
    u = use(load_model("llama-3.1-8b"))
    a100 = operators("a100-80g-sxm")
    fp8 = Generation(engine="engine", weights_precision="fp8").engine_use(u)
    assert a100.layer_forward(fp8, 16384, 1).seconds == pytest.approx(a100.layer_forward(u, 16384, 1).seconds, rel=0.03)
    assert a100.layer_forward(fp8, 4, 1).seconds < 0.75 * a100.layer_forward(u, 4, 1).seconds
    h100 = operators()
    assert h100.layer_forward(fp8, 16384, 1).seconds < 0.75 * h100.layer_forward(u, 16384, 1).seconds


def test_a_cache_of_one_byte_elements_holds_twice_the_tokens() -> None:
    u = use(load_model("llama-3.1-8b"))
    half, whole = (engine_bytes(u, Generation(engine="engine", kv_precision=p), 1000).kv_cache for p in ("fp8", None))
    assert whole == 1000 * kv_bytes_per_token(u.shape) == 2 * half
    saved = decode_seconds(u, 16384) - decode_seconds(u, 16384, kv_precision="fp8")
    reads = 32 * 16384 * kv_bytes_per_token(u.shape, 1)
    assert saved > reads / operators().gpu.memory_bytes_per_second.value


def test_served_lora_adds_its_factors_and_launches() -> None:
    u = use(load_model("llama-3.1-8b"), lora_rank=64)
    merged, served = (decode_seconds(u, 128, 8, lora=mode) for mode in ("merged", "served"))
    assert 1.02 < served / merged < 1.6
    eager = [
        StepSeconds(operators(), u, Generation(engine="engine", cuda_graphs=False, lora=mode)).floor_seconds
        for mode in ("merged", "served")
    ]
    assert eager[1] == pytest.approx(eager[0] * (1 + 8 / 38))


def test_fp8_training_needs_the_rate_and_keeps_the_states() -> None:
    shape = load_model("llama-3.1-8b")
    plain, fp8 = use(shape), use(shape, gemm_precision="fp8")
    ops = operators()
    assert ops.layer_backward(fp8, 16384, 1).seconds < 0.75 * ops.layer_backward(plain, 16384, 1).seconds
    assert ops.head_forward(fp8, 16384, 1).seconds == ops.head_forward(plain, 16384, 1).seconds
    assert static_bytes(fp8, "train", 8) == static_bytes(plain, "train", 8)
    wanted = {"models.actor": {"spec": "small-8x512", "gemm_precision": "fp8"}}
    with pytest.raises(InputError, match="a100-80g-sxm has no peak for fp8"):
        scenario(**wanted)
    with pytest.raises(InputError, match="only inference engines compute in int8"):
        scenario(**{"models.actor": {"spec": "small-8x512", "gemm_precision": "int8"}})


# --- whole scenarios -------------------------------------------------------------------------------------------------


def moe_scenario(**changes: Any) -> Any:
    data: dict[str, Any] = {
        "cluster": {"spec": "h100-80g-sxm", "nodes": 2},
        "models": {"actor": {"spec": "qwen3-30b-a3b", "zero_stage": 1, "expert_parallel": 8, "tensor_parallel": 2,
                             "expert_tensor_parallel": 1, "micro_batch_samples": 1}},
        "workload": {"prompts": 64, "prompt_tokens": 256, "response_tokens": 512},
        "generation": {"engine": "engine", "tensor_parallel": 4},
        "effects": {"memory": False},
    }  # fmt: skip
    for key, value in changes.items():
        part, name = key.split("__")
        data[part][name] = value
    return scenario_from_dict(data)


@pytest.mark.parametrize("changes", [{}, {"generation__expert_parallel": 4}, {"generation__weights_precision": "fp8"}])
def test_experts_run_in_a_whole_iteration(changes: dict[str, Any]) -> None:
    timeline = timeline_of(moe_scenario(**changes))
    assert {span.firing.stage.split(".")[0] for span in timeline.spans} >= {"gen", "ref", "update_actor"}


def test_the_engine_splits_experts_in_its_own_way() -> None:
    setup = prepare(moe_scenario(generation__expert_parallel=2))
    engine = setup.holdings["shadow_actor"].use
    assert (engine.expert_parallel, engine.expert_split().tensor) == (2, 2)
    assert setup.fit().kv_capacity_tokens is None or setup.fit().kv_capacity_tokens > 0


@pytest.mark.parametrize(
    "actor, message",
    [
        ({"expert_parallel": 3}, "must divide the 128 experts"),
        ({"expert_tensor_parallel": 5, "tensor_parallel": 2}, "must divide the width 768 of an expert"),
        ({"expert_parallel": 8, "zero_stage": 3}, "zero_stage 3 shards all experts over all ranks"),
        ({"expert_parallel": 64, "zero_stage": 1}, "16 ranks, which do not divide into sets of experts on 64 ranks"),
        ({"spec": "llama-7b", "expert_parallel": 2}, "llama-7b has no experts"),
    ],
)
def test_splits_that_cannot_be_are_refused(actor: dict[str, Any], message: str) -> None:
    data = {
        "cluster": {"spec": "h100-80g-sxm", "nodes": 2},
        "models": {"actor": {"spec": "qwen3-30b-a3b", "zero_stage": 1} | actor},
        "workload": {"prompts": 64, "prompt_tokens": 256, "response_tokens": 512},
        "generation": {"engine": "engine"},
    }
    with pytest.raises(InputError, match=message):
        prepare(scenario_from_dict(data))


def test_a_frozen_model_is_split_like_its_partner_if_it_is_the_same() -> None:
    models = {
        "actor": {"spec": "deepseek-v3", "zero_stage": 1, "pipeline_parallel": 16, "first_stage_layers": 3,
                  "last_stage_layers": 2, "expert_parallel": 16},
        "critic": {"spec": "llama-7b", "zero_stage": 1},
    }  # fmt: skip
    found = scenario_from_dict(
        {
            "cluster": {"spec": "h100-80g-sxm", "nodes": 32},
            "models": models,
            "workload": {"prompts": 64, "prompt_tokens": 256, "response_tokens": 512},
            "generation": {"engine": "engine", "tensor_parallel": 32},
        }
    ).models
    assert (found.reference.given_stages, found.reference.expert_parallel) == ([3, 2], 16)
    assert (found.reward.given_stages, found.reward.expert_parallel) == ([], 1)


def test_experts_over_ranks_need_an_engine_of_their_own() -> None:
    with pytest.raises(InputError, match="generates with the training weights") as error:
        moe_scenario(generation__engine="hybrid")
    assert error.value.field == "generation.engine"


@pytest.mark.parametrize(
    "generation, message",
    [
        ({"tensor_parallel": 4, "expert_parallel": 3}, "must divide tensor_parallel 4"),
        ({"engine": "zero3_per_token", "weights_precision": "fp8"}, "computes with the training weights"),
    ],
)
def test_engines_that_cannot_be_are_refused(generation: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(**{"generation": {"engine": "engine"} | generation})
