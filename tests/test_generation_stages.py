"""Generation through pipeline stages: against a pipe run job by job, a per-step twin and closed forms; bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scenarios import scenario, timeline_of
from test_generation import PREEMPTING, SHARING, both, decoding, operators, seconds, use, workloads

from rlhfsim.costs.engine import Progress, Runs, static_runs
from rlhfsim.costs.generation import StepSeconds, generation_program
from rlhfsim.costs.operators import Operators, OperatorTime
from rlhfsim.costs.passes import Layout
from rlhfsim.costs.run_seconds import RunSeconds
from rlhfsim.costs.stages import StageSteps, rounds, sum_of_steps
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.memory import cache_bytes_per_token, engine_weight_bytes
from rlhfsim.metrics import stage_seconds
from rlhfsim.model import kv_bytes_per_token, parameters
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import prepare
from rlhfsim.spec.scenario import Generation, WeightSync

approx = pytest.approx


def engine(stages: int, **more: object) -> Generation:
    return Generation(engine="engine", pipeline_parallel=stages, **more)


# --- the pipe --------------------------------------------------------------------------------------------------------


def pipe(stages: list[float], micro_batches: int, tokens: int) -> float:
    """Every micro-batch from stage to stage, token by token: it waits for its last token and for the stage."""
    ready, free = [0.0] * micro_batches, [0.0] * len(stages)
    for _ in range(tokens):
        for k in range(micro_batches):
            for stage, took in enumerate(stages):
                ready[k] = free[stage] = max(ready[k], free[stage]) + took
    return max(ready)


eighths = st.integers(0, 80).map(lambda n: n / 8)


@settings(max_examples=200, deadline=None)
@given(st.lists(eighths, min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 30), eighths)
def test_rounds_are_those_of_a_pipe_run_job_by_job(
    stages: list[float], micro_batches: int, tokens: int, host: float
) -> None:
    """The host is one more stage. The first round fills the pipe."""
    steps = np.array([1, tokens - 1])
    none = np.zeros(2)
    given = [StageSteps(1, np.outer([1, 0, 0], steps) * s, none + s, none, 0.0) for s in stages]
    found = rounds(given, none + host, np.full(2, micro_batches), steps, np.array([True, False]))
    assert found.sum() == approx(pipe([host, *stages], micro_batches, tokens), abs=1e-9)
    assert (found >= 0).all()
    assert found[0].sum() == approx(sum(stages) * tokens, abs=1e-9)  # a stage's own work, of one micro-batch


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(eighths, st.integers(0, 8).map(lambda n: n / 16), eighths), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 90),
)
def test_growing_steps_are_summed_exactly(lines: list[tuple[float, float, float]], parts: int, steps: int) -> None:
    """The larger of the sum and of `parts` times the largest of lines with floors, step by step."""

    def one(_: np.ndarray, step: np.ndarray) -> np.ndarray:
        stages = np.array([np.maximum(first + growth * step, floor) for first, growth, floor in lines])
        return np.maximum(stages.sum(axis=0), parts * stages.max(axis=0))

    expected = sum(float(one(np.zeros(1), np.array([float(i)]))[0]) for i in range(steps))
    assert sum_of_steps(one, np.array([steps]))[0] == approx(expected, rel=1e-9)


# --- seconds of steps, against a per-step twin -----------------------------------------------------------------------


def twin_rounds(runs: Runs, k: int, generation: Generation, ops: Operators, floor: float, host: float) -> np.ndarray:
    """Seconds of each round of a run, of the mean micro-batch on each stage; floor: of a layer."""
    model, stages = use("opt-125m"), generation.pipeline_parallel
    decodes, prompt, rows = int(runs.decodes[k]), int(runs.prompt_tokens[k]), int(runs.sampled[k])
    chunks = runs.chunk_tokens[runs.chunk_run == k]
    parts = min(stages, max(decodes + len(chunks), ceil(prompt / generation.prefill_tokens), 1))
    layers = model.shape.layers // stages

    def mean(operator: Callable[[int], OperatorTime], total: int) -> float:
        """Micro-batches have a whole number of tokens."""
        sizes = Counter((total + part) // parts for part in range(parts))
        return sum(count * float(operator(size).seconds) for size, count in sizes.items()) / parts

    layer = np.zeros(runs.steps[k])
    layer += mean(lambda m: ops.layer_forward(model, m, 1, serving=generation.continuous), decodes + prompt)
    if decodes:
        context = runs.context_tokens[k] + decodes * np.arange(runs.steps[k])
        layer += ops.attention_decode(model, decodes / parts, context / parts, 1).seconds
    if len(chunks):
        layer += float(ops.attention_prefill(model, chunks, 1).seconds) / parts
    busy = np.tile(layers * layer, (stages, 1))
    busy[0] += mean(lambda m: ops.embedding(model, m), decodes + prompt)
    busy[-1] += mean(lambda m: ops.head_forward(model, m, 1), rows)
    busy = np.maximum(busy, layers * floor)
    alone, slowest = host + busy.sum(axis=0), np.maximum(busy.max(axis=0), host)
    if prompt and not generation.continuous:
        return alone + (parts - 1) * slowest
    return np.maximum(alone, parts * slowest)


def check_against_twin(runs: Runs, generation: Generation, floor_share: float, host: float) -> None:
    """Launch floors below, above and among the seconds of the device's steps (they grow with the context)."""
    ops, model = operators(), use("opt-125m")
    middle = twin_rounds(runs, len(runs.steps) // 2, generation, ops, 0.0, 0.0)
    floor = floor_share * float(middle[0]) / model.shape.layers
    eager = operators(eager_layer_seconds=floor, decode_step_seconds=host, decode_sequence_seconds=0.0)
    found = StepSeconds(eager, model, generation).of(runs).sum(axis=0)
    expected = [twin_rounds(runs, k, generation, ops, floor, host).sum() for k in range(len(runs.steps))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


floors = st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.0005, 3.0])


@settings(max_examples=12, deadline=None)
@example(PREEMPTING, 4, 0.9)
@example(SHARING, 2, 0.0)
@given(workloads, st.sampled_from([2, 3, 4, 12]), floors)
def test_continuous_rounds_are_those_of_the_twin(workload: dict, stages: int, floor_share: float) -> None:
    runs, _ = both(workload | {"drafting": None})
    generation = engine(stages, cuda_graphs=False, prefill_tokens=workload["budget"])
    check_against_twin(runs, generation, floor_share, 1e-4)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 900)), min_size=1, max_size=9),
    st.sampled_from([2, 4]),
    floors,
)
def test_static_batches_are_those_of_the_twin(samples: list[tuple[int, int]], stages: int, floor_share: float) -> None:
    prompts, responses = (np.array(x) for x in zip(*samples, strict=True))
    generation = Generation(engine="hybrid", pipeline_parallel=stages, cuda_graphs=False)
    check_against_twin(static_runs(prompts, responses), generation, floor_share, 0.0)


@pytest.mark.parametrize("name", ["a100-80g-sxm", "h100-80g-sxm"])
def test_one_run_at_a_time_takes_as_long(name: str) -> None:
    steps = StepSeconds(operators(name, eager_layer_seconds=1e-4), use(), engine(4, cuda_graphs=False))
    runs = decoding(700, 9, 9 * 900)
    one = RunSeconds(steps, Progress()).of((700, 9, 9 * 900, 0, 9, 9))
    assert one == approx(steps.of(runs).sum(), rel=1e-9)


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_token_of_one_sequence_passes_all_stages_and_hops(stages: int) -> None:
    """No sooner than without stages, and a message to each next stage and back later; 99 tokens after the prompt's."""
    lengths = [np.array([64])], [np.array([100])]
    whole = generation_program(use(), engine(1), *lengths, [0], operators())
    found = generation_program(use(), engine(stages), *lengths, list(range(stages)), operators())
    assert seconds(found.segments) == approx(seconds(whole.segments), rel=1e-9)
    latency = 1e-3
    assert seconds(found.segments, latency=latency) - seconds(whole.segments) == approx(
        100 * stages * latency, rel=1e-9
    )
    assert [t.op for s in found.segments for t in s.transfers] == ["send", "send"]
    hidden = 2 * 4096 * 2 * (stages - 1)  # hidden states and residual
    assert [float(np.mean(t.payload_bytes)) for s in found.segments for t in s.transfers] == [64 * hidden, hidden]


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("each", [1, 32])
def test_equal_micro_batches_are_as_fast_as_the_slowest_stage(stages: int, each: int) -> None:
    """The last one, with the head: its seconds for one micro-batch a token of that one."""
    model, ops = use(), operators(decode_step_seconds=0.0)
    layers, context = model.shape.layers // stages, 500.0 * each
    layer = ops.layer_forward(model, each, 1).seconds + ops.attention_decode(model, each, context, 1).seconds
    slowest = float(layers * layer + ops.head_forward(model, each, 1).seconds)
    runs = decoding(1, stages * each, stages * each * 500)
    assert StepSeconds(ops, model, engine(stages)).of(runs).sum() == approx(stages * slowest, rel=1e-9)
    fewer = decoding(1, each, each * 500)  # cannot fill it: it is faster than a full round, but not by so much
    alone = StepSeconds(ops, model, engine(stages)).of(fewer).sum()
    assert slowest < alone <= stages * slowest


@pytest.mark.parametrize("samples", [1, 8, 64])
def test_stages_do_not_divide_what_launches_take(samples: int) -> None:
    """Static batches without CUDA graphs, bound by launches: as many seconds per layer and token on 1 stage as on 8."""
    lengths = [np.full(samples, 16)], [np.full(samples, 65)]
    slow = operators("h100-80g-sxm", eager_layer_seconds=0.02)
    by_stages = [
        generation_program(use(), Generation(pipeline_parallel=p, cuda_graphs=False), *lengths, list(range(p)), slow)
        for p in (1, 8)
    ]
    decode = [found.stats[0].decode_seconds for found in by_stages]
    assert decode == [approx(64 * 32 * 0.02), approx(64 * 32 * 0.02)]


def test_many_sequences_get_more_done_on_more_stages() -> None:
    """Eight times the ranks, but never eight times the tokens."""
    lengths = [np.full(512, 64)], [np.full(512, 200)]
    one, eight = (
        generation_program(use(), engine(p, max_sequences=512), *lengths, list(range(p)), operators()).stats[0].seconds
        for p in (1, 8)
    )
    assert one / 8 < eight < one / 2


def test_without_efficiency_every_stage_is_always_busy() -> None:
    ideal = operators(effects=operators().effects.model_copy(update={"efficiency": False}))
    runs = decoding(50, 64, 64 * 100)
    one, four = (StepSeconds(ideal, use(), engine(p)).of(runs).sum() for p in (1, 4))
    # Each micro-batch reads all weights.
    assert one / 4 < four <= one * (1 + 1e-9)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"weights_precision": "fp8"}, {"lora": "served"}])
@pytest.mark.parametrize("tensor", [1, 8])
def test_stages_hold_the_weights_once(tensor: int, more: dict) -> None:
    model = use("llama-2-70b", lora_rank=16 if "lora" in more else 0)
    whole = engine_weight_bytes(model, engine(1, tensor_parallel=tensor, **more))
    parts = [engine_weight_bytes(model, engine(4, tensor_parallel=tensor, **more), stage) for stage in range(4)]
    assert sum(parts) == approx(whole, rel=1e-9)
    assert parts[1] == parts[2] < min(parts[0], parts[3])  # embedding, head
    assert cache_bytes_per_token(model, engine(4, tensor_parallel=tensor, **more)) == approx(
        cache_bytes_per_token(model, engine(1, tensor_parallel=tensor, **more)) / 4
    )


BIG = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 4},
    "models": {"actor": {"spec": "llama-2-70b", "zero_stage": 3}, "reward": {"spec": "llama-2-7b"}},
    "algorithm__name": "grpo",
    "workload__responses_per_prompt": 4,
    "generation__tensor_parallel": 8,
    "generation__pipeline_parallel": 2,
}


def big(**changes: object):
    return scenario("colocated", "engine", **(BIG | changes))


def test_70b_in_engines_of_two_nodes() -> None:
    """Closed form: a sixteenth of the weights and of the cache on a rank, and logits on the last stage's only."""
    found = big()
    shape, memory = found.models.actor.shape, prepare(found).memory
    layers = (parameters(shape) - 2 * shape.vocabulary * shape.hidden - shape.hidden) / 2 / 8
    embedding = shape.vocabulary * shape.hidden / 8
    stage = next(s for s in memory.graph.stages() if s.kind == "generate")
    held = {instant.rank: instant.bytes for instant in memory.of_stage(stage)}
    first, last = 2 * (layers + embedding), 2 * (layers + embedding + shape.hidden)
    assert 8.6e9 < first < 8.7e9  # 138 GB over 16 ranks
    # What every rank has whole, the norms of 40 layers, is 0.01 % more.
    assert [held[rank].engine for rank in (0, 8, 16, 24)] == approx([first, last, first, last], rel=2e-4)
    assert held[8].engine - held[0].engine == 2 * shape.hidden  # the last norm
    each = 64 * 4 / 2  # samples of an engine
    assert {h.kv_cache for h in held.values()} == {each * (64 + 128) * kv_bytes_per_token(shape, 2) / 16}
    assert held[0].logits == 0 < held[8].logits == each / 2 * shape.vocabulary * 4  # of a micro-batch
    assert memory.fit().fits
    timeline_of(found)


def test_the_fullest_stage_bounds_the_cache_of_an_engine() -> None:
    """With a fraction of memory that leaves little: what is left beside the weights of the stage with more of them."""
    room = {
        p: min((prepare(big(generation__pipeline_parallel=p, generation__memory_fraction=0.5)).memory)
               .kv_capacity_by_kind.values())
        for p in (1, 2)
    }  # fmt: skip
    assert room[2] > 2 * room[1]  # half of the cache's bytes a token, and less weights


# --- placement, syncs ------------------------------------------------------------------------------------------------

IN_STAGES = {
    f"models__{role}__{key}": value
    for role in ("actor", "critic")
    for key, value in (("zero_stage", 1), ("pipeline_parallel", 2))
}
SMALL = {"generation__pipeline_parallel": 2, "generation__tensor_parallel": 2}


@pytest.mark.parametrize("strategy", ["colocated", "interleaved", "disaggregated"])
@pytest.mark.parametrize("engine", ["engine", "hybrid"])
def test_every_strategy_simulates_it(strategy: str, engine: str) -> None:
    found = timeline_of(scenario(strategy, engine, cluster__nodes=4, **SMALL))
    assert stage_seconds(found)["gen"] > 0


def test_a_hybrid_engine_decodes_in_the_stages_of_training() -> None:
    training = IN_STAGES
    found = scenario("colocated", "hybrid", generation__pipeline_parallel=2, **training)
    ranks = tuple(range(8))
    layout = Layout.of_engines(ranks, found.models.actor, found.generation)
    assert np.array_equal(layout.grid, Layout.of(ranks, found.models.actor).grid)
    timeline_of(found)
    own = Layout.of_engines(ranks, found.models.actor, engine(2, tensor_parallel=2))
    assert own.grid.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]  # [stage][engine][shard]


def test_hops_cross_the_links_between_the_stages() -> None:
    """Stages on two nodes feel their NICs; stages of one node do not."""

    def took(gbytes: float, tensor: int) -> float:
        found = scenario(
            "colocated", "engine", generation__pipeline_parallel=2, generation__tensor_parallel=tensor,
            cluster__network__nic_bytes_per_second=gbytes * 1e9,
        )  # fmt: skip
        return stage_seconds(timeline_of(found))["gen"]

    assert took(0.001, 4) > 1.2 * took(25.0, 4)
    assert took(0.001, 2) == approx(took(25.0, 2), rel=1e-6)


@pytest.mark.parametrize("senders", ["stage_heads", "first_rank", "all_ranks"])
def test_every_rank_of_every_stage_gets_its_part(senders: str) -> None:
    """p2p from 8 ranks to an engine of 2 x 4: every rank of it is sent to; an eighth of the weights lands on each."""
    model = use(zero_stage=1, tensor_parallel=4, pipeline_parallel=2)
    source = Layout.of(tuple(range(8)), model)
    target = Layout.of_engines(tuple(range(8, 16)), model, engine(2, tensor_parallel=4))
    path = WeightSync(method="p2p", senders=senders)
    program = sync_program(
        model, source, target, operators(), method="p2p", bucket_bytes=1e9, path=path, rank_nodes=[0] * 8 + [1] * 8
    )
    pairs = {pair for segment in program for t in segment.transfers if t.op in ("send", "p2p") for pair in t.groups}
    assert {receiver for _, receiver in pairs} == set(range(8, 16))
    if senders == "all_ranks":
        assert pairs == {(k, k + 8) for k in range(8)}


@pytest.mark.parametrize("senders", ["stage_heads", "first_rank", "all_ranks"])
@pytest.mark.parametrize("method", ["p2p", "broadcast"])
def test_syncs_to_stages_simulate(method: str, senders: str) -> None:
    training = IN_STAGES
    found = scenario(
        "disaggregated", "engine", **training, cluster__nodes=4,
        weight_sync={"method": method, "senders": senders}, **SMALL,
    )  # fmt: skip
    assert stage_seconds(timeline_of(found))["update_weights"] > 0


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation__pipeline_parallel": 3}, r"must divide the 8 layers of small-8x512 \(allowed: 1, 2, 4, 8\)"),
        ({"generation__pipeline_parallel": 16}, "must divide the 8 layers"),
        ({"generation__pipeline_parallel": 8, "generation__tensor_parallel": 2}, "but the cluster has 8 GPUs"),
        ({"generation__engine": "zero3_per_token", "generation__pipeline_parallel": 2}, "pipeline_parallel must be 1"),
        (
            {"generation__engine": "hybrid", "generation__pipeline_parallel": 2, "models__actor__zero_stage": 1},
            "a hybrid engine decodes in the stages in which the actor trains, of which there are 1",
        ),
        (
            {"generation__speculative": {"tokens": 2, "acceptance_length": 2}, "generation__pipeline_parallel": 2},
            "speculative must be absent, or pipeline_parallel 1",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario("colocated", "engine", **changes)


def test_engines_that_do_not_fill_their_ranks() -> None:
    changes = {"cluster__nodes": 3, "generation__pipeline_parallel": 8}
    with pytest.raises(InputError, match="12 ranks do not divide into places of 8"):
        prepare(scenario("colocated", "engine", **changes))


def test_real_runs_refuse_it() -> None:
    with pytest.raises(InputError, match="real runs have no pipeline parallelism") as error:
        check_real(scenario("colocated", "engine", generation__pipeline_parallel=2))
    assert error.value.field == "generation.pipeline_parallel"
