"""Programs of scoring, training and weight transfer: bytes and seconds against closed forms and published runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.cluster import ClusterTopology
from rlhfsim.costs.kernels import load_kernels
from rlhfsim.costs.operators import Operators
from rlhfsim.costs.passes import Host, Layout, controller_program, micro_batches, score_program, train_program
from rlhfsim.costs.pipeline import PipelineSegment
from rlhfsim.costs.segment import Elapsed, Route, Segment
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.lora import lora_parameters
from rlhfsim.model import parameters
from rlhfsim.sim.links import LinkPool, lone_rate
from rlhfsim.spec.base import Sourced
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import load_cluster
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Effects, ModelUse, Overheads

CLUSTER = load_cluster("a100-80g-sxm")
LLAMA = load_model("llama-7b")
HOST = Host(400e9, [rank // 8 for rank in range(64)])
FREE = math.inf


def operators(cluster: str = "a100-80g-sxm", *, overheads: Overheads | None = None, **effects: bool) -> Operators:
    gpu = load_cluster(cluster).gpu
    kernels = load_kernels(data_dir("hw_specs") / "kernels" / f"{gpu.kernels}.yaml")
    return Operators(gpu, kernels, Effects(**effects), overheads or Overheads())


OPS, IDEAL = operators(), operators(efficiency=False)


def use(shape: ModelSpec = LLAMA, **settings: object) -> ModelUse:
    return ModelUse(spec=shape.name, shape=shape, **settings)


def layout(u: ModelUse, ranks: int) -> Layout:
    return Layout.of(range(ranks), u)


def seconds(program: Sequence[Segment], rate: float = FREE) -> float:
    """With every transfer at `rate` payload bytes per second and no latency."""
    route = Route({}, 0.0, 1.0)
    return sum(s.elapsed([route] * len(s.transfers), [rate] * len(s.transfers)).seconds for s in program)


def moved(program: Sequence[Segment]) -> Counter[str]:
    """Payload bytes by operation, all repeats, all groups."""
    found: Counter[str] = Counter()
    for segment in program:
        for t in segment.transfers:
            payload = np.broadcast_to(t.payload_bytes, len(segment.repeats))
            found[t.op] += float(payload @ segment.repeats) * len(t.groups)
    return found


def equal(replicas: int, samples: int, tokens: int = 512) -> list[np.ndarray]:
    return [np.full(samples, tokens)] * replicas


# --- layouts and micro-batches ---------------------------------------------------------------------------------------


def test_ranks_are_tensor_then_data_then_pipeline() -> None:
    """Megatron-LM, megatron/core/parallel_state.py, its example of 16 ranks with tp 2, pp 4 (and so dp 2)."""
    grid = Layout(tuple(range(16)), tensor_parallel=2, pipeline_parallel=4)
    assert grid.tensor_groups == tuple((r, r + 1) for r in range(0, 16, 2))
    assert sorted(grid.data_groups) == sorted([(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)])
    pipelines = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    assert sorted(grid.hops) == sorted(pair for p in pipelines for pair in pairwise(p))
    with pytest.raises(InputError, match="6 ranks cannot be split"):
        Layout(tuple(range(6)), tensor_parallel=4)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), samples=st.integers(1, 5))
def test_micro_batches_hold_every_sample_once(counts: list[int], samples: int) -> None:
    lengths = [np.arange(1, n + 1) for n in counts]
    batches = micro_batches(lengths, samples)
    assert batches.shape == (len(counts), max(1, math.ceil(max(counts) / samples)), samples)
    for batch, own in zip(batches, lengths, strict=True):
        assert batch[batch > 0].tolist() == own.tolist()


# --- training: bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_bytes_by_zero_stage(stage: int, accumulated: int) -> None:
    """Rajbhandari et al. 2020, section 7, with k micro-batches: gradients at each backward from stage 2 on, at the
    boundary below; weights once a step at 1 and 2; at 3 in every forward and backward. DeepSpeed's ZeRO-1 and 2
    all-reduce."""
    u = use(zero_stage=stage, micro_batch_samples=2)
    found = moved(train_program(u, equal(8, 2 * accumulated), layout(u, 8), OPS))
    whole = 2 * parameters(LLAMA)
    gathered = {0: 0, 1: whole, 2: whole, 3: accumulated * 2 * whole}[stage]
    reduced = whole if stage < 2 else accumulated * whole
    assert found["all_gather"] == pytest.approx(gathered)
    assert found["reduce_scatter" if stage == 3 else "all_reduce"] == pytest.approx(reduced)
    assert set(found) <= {"all_gather", "all_reduce", "reduce_scatter"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_lora_reduces_only_its_factors(stage: int) -> None:
    u = use(zero_stage=stage, lora_rank=128)
    found = moved(train_program(u, equal(8, 4), layout(u, 8), OPS))
    factors = 2 * lora_parameters(LLAMA, 128)
    assert found["reduce_scatter"] + found["all_reduce"] == pytest.approx(factors)


def test_tensor_parallel_traffic() -> None:
    """Korthikanti et al. 2022, section 4.2: 4 all-reduces of the activations a layer (6 with full recomputation), or as
    many pairs of all-gather and reduce-scatter; here 2 more, for the embedding and the head's gradient."""
    activations = 4 * 512 * 4096 * 2
    for recompute, count in (("none", 4), ("full", 6)):
        u = use(zero_stage=0, tensor_parallel=4, sequence_parallel=False, recompute=recompute)
        found = moved(train_program(u, equal(1, 4), layout(u, 4), OPS))
        assert found == {"all_reduce": pytest.approx((32 * count + 2) * activations)}
    u = use(zero_stage=0, tensor_parallel=4, recompute="none")
    found = moved(train_program(u, equal(1, 4), layout(u, 4), OPS))
    assert found["all_gather"] == found["reduce_scatter"] == pytest.approx((32 * 4 + 2) * activations)


def test_offloaded_optimizer_moves_its_share_and_streams_host_memory() -> None:
    u = use(zero_stage=2, offload_optimizer=True)
    program = train_program(u, equal(8, 4), layout(u, 8), OPS, host=HOST)
    found, share = moved(program), parameters(LLAMA) / 8
    assert found["to_host"] == found["from_host"] == pytest.approx(8 * 2 * share)
    adam = next(s for s in program if s.label == "optimizer")
    assert adam.compute_seconds[0, 0] == pytest.approx(28 * share * 8 / 400e9)
    assert set(adam.bound) == {"host"}
    with pytest.raises(InputError, match="host"):
        train_program(u, equal(8, 4), layout(u, 8), OPS)
    on_gpu = moved(train_program(u, equal(8, 4), layout(u, 8), operators(sync=False)))
    assert on_gpu["to_host"] == on_gpu["from_host"] == on_gpu["host_memory"] == 0


def host_adam(ranks: Sequence[int]) -> Segment:
    u = use(zero_stage=2, offload_optimizer=True)
    program = train_program(u, equal(len(ranks), 4), Layout.of(ranks, u), OPS, host=HOST)
    return next(s for s in program if s.label == "optimizer")


def run_together(*segments: Segment, **effects: bool) -> list[tuple[Elapsed, float]]:
    """On two nodes of eight GPUs whose memory gives 400 GB/s each: what each took, and alone."""
    node = CLUSTER.node.model_copy(update={"host_memory_bytes_per_second": Sourced(value=400e9, source="test")})
    topology = ClusterTopology(CLUSTER.model_copy(update={"nodes": 2, "node": node}), None, Effects(**effects))
    env = simpy.Environment()
    pool = LinkPool(env, topology)
    processes = [env.process(pool.run(segment)) for segment in segments]
    env.run()
    return [process.value for process in processes]


def test_offloaded_adam_shares_the_memory_of_its_node() -> None:
    """A quarter of the model a rank, 28 bytes a parameter: the node with most ranks at 400 GB/s."""
    one_rank = 28 * parameters(LLAMA) / 4 / 400e9
    for ranks, on_node in (((0, 1, 2, 3), 4), ((0, 1, 8, 9), 2), ((0, 1, 2, 8), 3), ((0, 8, 16, 24), 1)):
        assert host_adam(ranks).compute_seconds.max() == pytest.approx(on_node * one_rank)
    assert host_adam((0, 1, 2, 8)).compute_seconds[:, 0] == pytest.approx([3 * one_rank] * 3 + [one_rank])
    [(elapsed, alone)] = run_together(host_adam((0, 1, 2, 8)))
    assert elapsed.seconds == pytest.approx(alone) == pytest.approx(3 * one_rank)
    assert elapsed.peers == pytest.approx([0, 0, 0, 2 * one_rank])


def test_offloaded_optimizers_of_two_models_contend_on_a_node() -> None:
    """Each alone: 4 ranks' bytes at 400 GB/s. Together on a node twice as long, the extra through the shared link."""
    alone = 28 * parameters(LLAMA) / 400e9
    for elapsed, lone in run_together(host_adam(range(4)), host_adam(range(4, 8))):
        assert (elapsed.seconds, lone) == (pytest.approx(2 * alone), pytest.approx(alone))
        assert elapsed.compute == pytest.approx(np.full(4, alone))
        assert elapsed.communication == pytest.approx(np.full(4, alone))
    for elapsed, _ in run_together(host_adam(range(4)), host_adam(range(8, 12))):
        assert elapsed.seconds == pytest.approx(alone)  # nodes of their own
    for elapsed, _ in run_together(host_adam(range(4)), host_adam(range(4, 8)), links=False):
        assert elapsed.seconds == pytest.approx(alone)  # no link is shared, the CPU's work remains


def test_offloaded_parameters_come_once_a_pass_or_with_every_gather() -> None:
    whole = 2 * parameters(LLAMA)
    u = use(zero_stage=0, offload_parameters=True, score_micro_batch_samples=2)
    assert moved(score_program(u, equal(2, 8), layout(u, 2), OPS))["from_host"] == pytest.approx(2 * whole)
    u = use(zero_stage=3, offload_parameters=True, score_micro_batch_samples=2)
    found = moved(score_program(u, equal(2, 8), layout(u, 2), OPS))
    assert found["from_host"] == pytest.approx(4 * whole)  # 2 ranks, half each, in 4 micro-batches
    assert found["all_gather"] == pytest.approx(4 * whole)
    off = moved(score_program(u, equal(2, 8), layout(u, 2), operators(sync=False)))
    assert off["from_host"] == 0


# --- training: where ranks wait --------------------------------------------------------------------------------------


def forward_backward(u: ModelUse, lengths: list[np.ndarray], ops: Operators = OPS) -> float:
    program = train_program(u, lengths, layout(u, len(lengths) * u.ranks_per_replica), ops)
    return seconds([s for s in program if s.label == "forward_backward"])


def test_ranks_wait_at_each_micro_batch_or_at_the_boundary() -> None:
    """Two ranks with a long and a short micro-batch in opposite order: sum of maxima against maximum of sums."""
    long, short = 2000, 200
    crossed = [np.array([long, short]), np.array([short, long])]
    one = {n: forward_backward(use(zero_stage=0, micro_batch_samples=1), [np.array([n])]) for n in (long, short)}
    for stage, expected in ((0, one[long] + one[short]), (1, one[long] + one[short]), (2, 2 * one[long])):
        u = use(zero_stage=stage, micro_batch_samples=1)
        assert forward_backward(u, crossed) == pytest.approx(expected), stage
    zero3 = forward_backward(use(zero_stage=3, micro_batch_samples=1), crossed)
    assert zero3 == pytest.approx(2 * one[long])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_zero3_is_never_faster_than_zero1_with_free_links(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(20, 2000, rng.integers(1, 9)) for _ in range(4)]
    times = [forward_backward(use(zero_stage=s, micro_batch_samples=2), lengths) for s in (1, 2, 3)]
    assert times[0] <= times[1] * (1 + 1e-9) and times[1] <= times[2] * (1 + 1e-9)


def test_empty_micro_batches_still_gather() -> None:
    """One rank with 3 micro-batches, one with 1: under ZeRO-3 both gather for all 3."""
    u = use(zero_stage=3, micro_batch_samples=1)
    uneven = train_program(u, [np.full(3, 512), np.full(1, 512)], layout(u, 2), OPS)
    even = train_program(u, equal(2, 3), layout(u, 2), OPS)
    assert moved(uneven) == moved(even)
    assert seconds(uneven) == pytest.approx(seconds(even))


def test_no_efficiency_effect_means_no_imbalance() -> None:
    lengths = [np.array([2000, 200]), np.array([300, 100])]
    u = use(zero_stage=3, micro_batch_samples=1)
    (segment, _) = train_program(u, lengths, layout(u, 2), IDEAL)
    elapsed = segment.elapsed([Route({}, 0.0, 1.0)] * 2, [FREE] * 2)
    assert elapsed.peers == pytest.approx(np.zeros(2), abs=1e-12)
    assert elapsed.compute[0] == elapsed.compute[1]


# --- training: seconds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_twice_the_micro_batches_take_twice_as_long(stage: int) -> None:
    u = use(zero_stage=stage)
    once, twice = (forward_backward(u, equal(4, n)) for n in (8, 16))
    assert twice == pytest.approx(2 * once)


def test_twice_the_length_takes_more_than_twice_and_less_than_four_times() -> None:
    once, twice = (forward_backward(use(), equal(2, 4, n), IDEAL) for n in (1024, 2048))
    assert 2 * once < twice < 4 * once


def test_size_of_micro_batches_does_not_matter_at_constant_efficiency() -> None:
    small, large = (forward_backward(use(micro_batch_samples=n), equal(2, 8, 2048), IDEAL) for n in (1, 8))
    assert small == pytest.approx(large, rel=0.01)  # weights are read once for each
    small, large = (forward_backward(use(micro_batch_samples=n), equal(2, 8, 64)) for n in (1, 8))
    assert small > 1.5 * large


def test_recomputation_costs_what_is_computed_again() -> None:
    lengths, tokens = equal(1, 4), 4 * 512
    times = {r: forward_backward(use(zero_stage=0, recompute=r), lengths) for r in ("none", "selective", "full")}
    attention = OPS.attention_prefill(use(), np.full(4, 512), 1)
    layer = OPS.with_launches(OPS.layer_forward(use(), tokens, 1) + attention)
    assert times["full"] - times["none"] == pytest.approx(32 * float(layer.seconds))
    assert times["selective"] - times["none"] == pytest.approx(32 * float(attention.seconds))


def test_fewer_trained_layers_and_lora_are_cheaper() -> None:
    full, half, lora = (
        forward_backward(use(zero_stage=0, recompute="none", **s), equal(1, 4))
        for s in ({}, {"trainable_layers": 16}, {"lora_rank": 8})
    )
    forward = seconds(score_program(use(zero_stage=0, score_micro_batch_samples=4), equal(1, 4), layout(use(), 1), OPS))
    assert forward < half < full and forward < lora < full
    layers = 16 * OPS.with_launches(
        OPS.layer_backward(use(), 2048, 1) + OPS.attention_prefill(use(), np.full(4, 512), 1, backward=True), 2.0
    )
    assert full - half == pytest.approx(float(layers.seconds + OPS.embedding(use(), 2048).seconds))


def test_gathers_hide_behind_compute_or_bound_it() -> None:
    u = use(zero_stage=3, score_micro_batch_samples=4)
    program = score_program(u, equal(4, 4), layout(u, 4), OPS)
    compute, payload = seconds(program), moved(program)["all_gather"]
    layer_seconds, layer_payload = program[0].compute_seconds[0, 0], program[0].transfers[0].payload_bytes[0]
    fast = 10 * layer_payload / layer_seconds
    assert compute < seconds(program, fast) < compute + 0.2 * layer_seconds
    slow = layer_payload / layer_seconds / 10
    head_seconds = program[0].compute_seconds[0, 1]
    assert payload / slow < seconds(program, slow) < payload / slow + layer_seconds + head_seconds


@pytest.mark.parametrize(
    "settings_",
    [
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 1},
        {"zero_stage": 0, "tensor_parallel": 2},
        {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2, "pipeline_chunks": 2},
    ],
)
def test_faster_links_are_never_slower(settings_: dict[str, object]) -> None:
    u = use(**settings_)
    place = layout(u, 8)
    lengths = [np.random.default_rng(r).integers(10, 900, 9) for r in range(place.replicas)]
    for program in (train_program(u, lengths, place, OPS, host=HOST), score_program(u, lengths, place, OPS)):
        times = [seconds(program, rate) for rate in (1e9, 2e9, 4e9, 64e9, FREE)]
        assert times == sorted(times, reverse=True)
        assert (times[0] > times[-1]) == bool(moved(program))


@pytest.mark.parametrize(
    "settings_", [{"zero_stage": 3}, {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2}]
)
def test_bounds_add_up_to_the_mean_compute(settings_: dict[str, object]) -> None:
    u = use(**settings_)
    place = layout(u, 8)
    lengths = [np.random.default_rng(r).integers(10, 900, 9) for r in range(place.replicas)]
    for ops in (OPS, IDEAL):
        for segment in (*train_program(u, lengths, place, ops), *score_program(u, lengths, place, ops)):
            mean = float((segment.compute_seconds @ segment.repeats).mean())
            assert sum(segment.bound.values()) == pytest.approx(mean)


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_pipeline_of_equal_micro_batches() -> None:
    """Stages differ only by embedding and head: between (m + p - 1) steps of the mean stage and of the slowest."""
    u, single = use(zero_stage=1, pipeline_parallel=4, micro_batch_samples=1), use(zero_stage=1, micro_batch_samples=1)
    work = forward_backward(single, equal(1, 16, 2048))
    piped = forward_backward(u, equal(1, 16, 2048))
    head = float(OPS.head_forward(u, 2048, 1).seconds + OPS.head_backward(u, 2048, 1).seconds)
    mean_stage = work / 16 / 4
    assert 19 * mean_stage < piped < 19 * (mean_stage + 0.75 * head)
    assert forward_backward(u, equal(1, 16, 2048), IDEAL) == pytest.approx(
        forward_backward(single, equal(1, 16, 2048), IDEAL) / 4, rel=0.01
    )


def test_interleaving_shrinks_the_bubble() -> None:
    plain, chunked = (
        forward_backward(use(zero_stage=1, pipeline_parallel=4, pipeline_chunks=v, micro_batch_samples=1), equal(1, 8))
        for v in (1, 2)
    )
    assert chunked < plain
    with pytest.raises(InputError, match="32 layers cannot be split evenly in 4 stages x 3"):
        forward_backward(use(zero_stage=1, pipeline_parallel=4, pipeline_chunks=3), equal(1, 8))


def test_pipeline_traffic() -> None:
    """One message of the activations over each border forwards, one backwards (the same segment's hop)."""
    u = use(zero_stage=1, pipeline_parallel=4, micro_batch_samples=1)
    segment = train_program(u, equal(1, 8), layout(u, 4), OPS)[0]
    assert isinstance(segment, PipelineSegment)
    (hop,) = segment.transfers
    assert hop.groups == ((0, 1), (1, 2), (2, 3))
    assert hop.payload_bytes == pytest.approx(np.full(8, 512 * 4096 * 2))


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_scoring_gathers_for_every_micro_batch() -> None:
    u = use(zero_stage=3, score_micro_batch_samples=2)
    found = moved(score_program(u, equal(4, 8), layout(u, 4), OPS))
    assert found == {"all_gather": pytest.approx(4 * 2 * parameters(LLAMA))}


def test_values_are_cheaper_than_log_probabilities() -> None:
    u = use(zero_stage=0)
    log_probs, values = (seconds(score_program(u, equal(1, 4), layout(u, 1), OPS, head=h)) for h in ("lm", "value"))
    vocabulary = 2 * 32000 * 4096 * 2048 / OPS.gpu.flops_per_second["bf16"].value
    assert log_probs - values > vocabulary


# --- weights between copies ------------------------------------------------------------------------------------------

# Billion bytes of 16-bit weights, and of LoRA factors of rank 128 on all linear layers, from the public LLaMA shapes.
SYNC_GB = {"llama-7b": (13.5, 0.64), "llama-13b": (26.0, 1.00), "llama-33b": (65.1, 1.95), "llama-65b": (130.6, 3.20)}


@pytest.mark.parametrize("name", SYNC_GB)
@pytest.mark.parametrize("lora_rank", [0, 128])
@pytest.mark.parametrize(("source_tp", "engine_tp"), [(8, 8), (8, 2), (2, 8), (1, 4)])
def test_p2p_moves_one_copy_per_replica(name: str, lora_rank: int, source_tp: int, engine_tp: int) -> None:
    u = use(load_model(name), zero_stage=1, tensor_parallel=source_tp, lora_rank=lora_rank)
    engines = Layout(tuple(range(16, 40)), tensor_parallel=engine_tp)
    program = sync_program(u, layout(u, 16), engines, OPS, method="p2p", bucket_bytes=100e6)
    assert len(program) == engines.replicas  # one after the other
    found = moved(program)
    assert found["send"] / 1e9 == pytest.approx(engines.replicas * SYNC_GB[name][lora_rank > 0], rel=0.01)
    for segment in program:  # every rank of the engine receives its share
        received: Counter[int] = Counter()
        for _, rank in segment.transfers[0].groups:
            received[rank] += 1
        assert len(received) == engine_tp and len(set(received.values())) == 1


@pytest.mark.parametrize(("source_tp", "engine_tp"), [(8, 8), (8, 2), (2, 8), (1, 4)])
def test_broadcast_moves_every_shard_once(source_tp: int, engine_tp: int) -> None:
    u = use(zero_stage=1, tensor_parallel=source_tp)
    engines = Layout(tuple(range(16, 32)), tensor_parallel=engine_tp)
    (segment,) = sync_program(u, layout(u, 16), engines, OPS, method="broadcast", bucket_bytes=100e6)
    assert moved([segment]) == {"broadcast": pytest.approx(2 * parameters(LLAMA))}
    reached = {rank for group in segment.transfers[0].groups for rank in group[1:]}
    assert reached == set(engines.ranks)
    (transfer,) = segment.transfers
    assert transfer.messages == math.ceil(2 * parameters(LLAMA) / source_tp / 100e6)


def test_pipeline_stages_send_their_own_layers() -> None:
    u = use(zero_stage=1, tensor_parallel=2, pipeline_parallel=2)
    (segment,) = sync_program(u, layout(u, 4), Layout((4, 5), tensor_parallel=2), OPS, method="p2p", bucket_bytes=100e6)
    assert segment.transfers[0].groups == ((0, 4), (1, 5), (2, 4), (3, 5))
    assert segment.transfers[0].payload_bytes == pytest.approx(2 * parameters(LLAMA) / 4)


def test_zero3_gathers_before_it_sends() -> None:
    u, whole = use(zero_stage=3), 2 * parameters(LLAMA)
    engines = Layout(tuple(range(8, 16)), tensor_parallel=4)
    found = moved(sync_program(u, layout(u, 8), engines, OPS, method="p2p", bucket_bytes=100e6))
    assert found == {"all_gather": pytest.approx(whole), "send": pytest.approx(2 * whole)}


def test_reshard_on_the_same_ranks() -> None:
    """ZeRO-3: everything to everyone; Megatron tp 8 to tp 2: groups of 4 assemble halves; tp 2 to 2 or 4: nothing.
    Then each rank copies its part."""
    whole, engines = 2 * parameters(LLAMA), {t: Layout(tuple(range(8)), tensor_parallel=t) for t in (2, 4)}

    def reshard(u: ModelUse, t: int) -> list[Segment]:
        return sync_program(u, layout(u, 8), engines[t], OPS, method="reshard", bucket_bytes=100e6)

    assert moved(reshard(use(zero_stage=3), 2)) == {"all_gather": pytest.approx(whole)}
    megatron = use(zero_stage=1, tensor_parallel=8)
    segment, copied = reshard(megatron, 2)
    assert segment.transfers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert segment.transfers[0].payload_bytes == pytest.approx(whole / 2)
    assert seconds([copied]) == pytest.approx(
        2 * whole / 2 / 2.039e12, rel=0.3
    )  # read and written at the datasheet's rate
    for t in (2, 4):
        (only,) = reshard(use(zero_stage=1, tensor_parallel=2), t)
        assert not only.transfers and seconds([only]) == pytest.approx(2 * whole / t / 2.039e12, rel=0.3)


def test_sync_off() -> None:
    u, engine = use(), Layout((8, 9))
    assert sync_program(u, layout(u, 8), engine, operators(sync=False), method="p2p", bucket_bytes=1e8) == []


def test_controller_is_serial() -> None:
    ops = operators(overheads=Overheads(controller_bytes_per_second=1e8, controller_call_seconds=0.5))
    (segment,) = controller_program(2e8, ops, 4)
    assert seconds([segment]) == pytest.approx(2.5)
    assert segment.bound == {"host": 2.5}
    assert controller_program(2e8, OPS) == []


# --- published runs --------------------------------------------------------------------------------------------------


def gpt(heads: int, hidden: int, layers: int) -> ModelSpec:
    return ModelSpec(
        name="gpt", family="gpt2", source="unverified", layers=layers, hidden=hidden, heads=heads, kv_heads=heads,
        head_dim=hidden // heads, ffn=4 * hidden, gated_mlp=False, vocabulary=51200, tied_embeddings=True,
        learned_positions=2048, norm="layer", qkv_bias=True, attention_output_bias=True, mlp_bias=True,
        max_positions=2048,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "given_", "counts"),
    [
        (126, 8, 4, {"first_stage_layers": 15, "last_stage_layers": 15}, [3, *[4] * 30, 3]),  # Llama 3.1 405B
        (61, 2, 4, {"first_stage_layers": 31, "last_stage_layers": 30}, [7, *[8] * 6, 6]),  # DeepSeek-V3
        (60, 4, 1, {"last_stage_layers": 12}, [16, 16, 16, 12]),
        (64, 4, 2, {}, [8] * 8),
    ],
)
def test_the_first_and_the_last_chunk_may_be_unlike_the_others(
    layers: int, stages: int, chunks: int, given_: dict, counts: list[int]
) -> None:
    shape = gpt(16, 1024, layers)
    u = use(shape, zero_stage=0, pipeline_parallel=stages, pipeline_chunks=chunks, **given_)
    assert u.chunk_layers == counts
    assert sum(len(u.stage_layers(stage)) for stage in range(stages)) == layers
    segment = train_program(u, [np.full(stages, 512)], layout(u, stages), OPS)[0]
    assert isinstance(segment, PipelineSegment)
    middle = np.median(segment.forward_seconds[:, 0, 0]) / float(np.median(counts))
    assert segment.forward_seconds[:-1, 0, 0] == pytest.approx(middle * np.array(counts[:-1]), rel=0.05)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"first_stage_layers": 15, "pipeline_chunks": 5}, "pipeline_chunks is 5, but must divide the 15 layers"),
        ({"first_stage_layers": 3, "pipeline_chunks": 3}, "first_stage_layers or last_stage_layers is 3, which leaves"),
    ],
)
def test_chunks_that_cannot_be_are_refused(given_: dict, message: str) -> None:
    layers = 3 * 17 + given_["first_stage_layers"] if given_["pipeline_chunks"] == 5 else 3 * 18 + 3
    with pytest.raises(ValueError, match=message.replace("15 layers", "17 layers")):
        use(gpt(16, 1024, layers), zero_stage=0, pipeline_parallel=4, **given_)


# Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, tables 3 and 5: A100, tp 8,
# sequence 2048, seconds of an iteration with full recomputation, and with selective and sequence parallelism. Attention
# was not fused then. model, stages, chunks, samples, micro-batch, seconds.
MEGATRON_A100 = [
    (gpt(64, 6144, 48), 1, 1, 4, 4, 1.42, 1.10),
    (gpt(128, 20480, 105), 35, 3, 280, 1, 49.05, 37.83),
    (gpt(160, 25600, 128), 64, 1, 512, 1, 94.42, 71.49),
]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("row", MEGATRON_A100, ids=["22B", "530B", "1T"])
def test_megatron_iteration_times(row: tuple, full: bool) -> None:
    """Loose: nothing is fitted on these runs. When written, the six errors were +0.5 to +9.4 %."""
    shape, stages, chunks, samples, micro, with_full, with_selective = row
    u = use(shape, zero_stage=0, tensor_parallel=8, pipeline_parallel=stages, pipeline_chunks=chunks,
            flash_attention=False, micro_batch_samples=micro, recompute="full" if full else "selective",
            sequence_parallel=not full)  # fmt: skip
    cluster = CLUSTER.model_copy(update={"nodes": stages})
    topology = ClusterTopology(cluster)
    total = 0.0
    for segment in train_program(u, [np.full(samples, 2048)], layout(u, 8 * stages), OPS):
        routes = [topology.route(t.op, t.groups) for t in segment.transfers]
        rates = [lone_rate(r.usage, topology.capacities) for r in routes]
        total += segment.elapsed(routes, rates).seconds
    assert total == pytest.approx(with_full if full else with_selective, rel=0.15)
