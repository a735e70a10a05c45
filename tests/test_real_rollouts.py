"""Real runs whose responses outlive firings: bounded staleness with interrupts, and partial rollout.

What was trained is repeated by a plain reference in one process, from the versions of weights that were recorded.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import chain, pairwise
from typing import Any

import pytest

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "deepspeed")):
    pytest.skip("real runs need torch, transformers and deepspeed", allow_module_level=True)

import real_runs
import torch
from reference_ppo import Reference, WithoutCritic
from scenarios import scenario, timeline_of

from rlhfsim import records
from rlhfsim.errors import InputError
from rlhfsim.layout import graph_of, holdings_of
from rlhfsim.metrics import off_policy_summary
from rlhfsim.order import violations
from rlhfsim.real_limits import check_real_graph
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Timeline
from rlhfsim.timeline import check as check_timeline

ITERATIONS = 3
TOLERANCE = 1e-4  # as in test_real_stages.py: of the largest change of a weight

BASE: dict[str, Any] = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 4},
    "models.actor": {"spec": "tiny-2x128", "zero_stage": 0, "backend": "torch"},
    "models.critic": {"zero_stage": 0, "backend": "torch"},
    "workload": {
        "prompts": 6,
        "prompt_tokens": {"distribution": "uniform", "min_tokens": 3, "max_tokens": 9},
        "response_tokens": {"distribution": "uniform", "min_tokens": 2, "max_tokens": 16},
        "padded": False,
    },
    "algorithm": {"name": "ppo", "epochs": 1, "minibatches": 1, "optimizer": "sgd", "learning_rate": 0.5},
    "engine": "engine",
    "generation.chunked_prefill": False,
}
GRPO = {"algorithm.name": "grpo", "workload.responses_per_prompt": 4, "workload.prompts": 4}
FEW_ROWS = {"generation.max_sequences": 3}
ONE_RANK = {"cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 1}}
LONG = {"workload.response_tokens": {"distribution": "uniform", "min_tokens": 2, "max_tokens": 30}}
LONGER = {"workload.response_tokens": {"distribution": "uniform", "min_tokens": 2, "max_tokens": 80}}
ZERO_3 = {"models.actor.zero_stage": 3, "models.actor.backend": "deepspeed"}
HYBRID = {"engine": "hybrid", "generation.batching": "continuous"}


def job(strategy: str, *changes: dict[str, Any], broken: tuple[str, ...] = ()) -> dict[str, Any]:
    found = BASE | {"strategy": strategy}
    for some in changes:
        found |= some
    return {"changes": found, "iterations": ITERATIONS, "broken": broken}


COUNTS = ("samples", "age_steps", "oldest_steps", "thrown_away_tokens", "recomputed_tokens")
SLOW_GENERATION, SLOW_TRAINING = ("slow_generation",), ("slow_training",)
ASYNCHRONOUS = {
    "interrupted": job("asynchronous", FEW_ROWS, {"strategy.chunks": 2}, broken=SLOW_GENERATION),
    "when_ready": job(
        "asynchronous",
        GRPO,
        FEW_ROWS,
        {"strategy.chunks": 4, "strategy.interrupt": False, "strategy.recompute": False},
        {"strategy.recompute_log_probs": False},
        broken=SLOW_GENERATION,
    ),
    "two_steps": job(
        "asynchronous", {"strategy.staleness": 2, "strategy.chunks": 1, "strategy.stream": True}, broken=SLOW_TRAINING
    ),
    "strict": job(
        "asynchronous", LONG, FEW_ROWS, {"strategy.strict": True, "strategy.staleness": 0}, broken=SLOW_GENERATION
    ),
}
CO_LOCATED = {
    "partial_zero3": job("partial_rollout", GRPO, HYBRID, ZERO_3),
    "partial_engine": job("partial_rollout", GRPO, {"strategy.oversampling": 2.0, "strategy.max_age": 1}),
    "bounded_alone": job("partial_rollout", ONE_RANK, LONG, {"strategy.max_age": 1, "strategy.oversampling": 2.0}),
    "dropped_alone": job("partial_rollout", ONE_RANK, FEW_ROWS, LONG, {"strategy.resume": False}),
}
BROKEN = {
    "lost_update": job("asynchronous", FEW_ROWS, broken=("lost_update", "slow_generation")),
    "wrong_prefix": job("partial_rollout", ONE_RANK, LONGER, broken=("wrong_prefix",)),
}
RIGHT = ASYNCHRONOUS | CO_LOCATED
JOBS = RIGHT | BROKEN


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return real_runs.run(tmp_path_factory.mktemp("ranks"), 4, JOBS, 280)


@cache
def found(name: str) -> Scenario:
    return scenario(**deepcopy(JOBS[name]["changes"]))


def batches(results: dict[str, Any], name: str) -> list[list[Any]]:
    """The responses of every iteration, in the order of its samples, by the books of the first rank that generates."""
    chunks = results[name]["books"][first(name)][0]["handed_over"]
    per_iteration = len(chunks) // ITERATIONS
    return [list(chain(*chunks[i : i + per_iteration])) for i in range(0, len(chunks), per_iteration)]


def first(name: str) -> int:
    return next(s for s in graph_of(found(name))[0].stages() if s.kind == "generate").ranks[0]


def timeline(results: dict[str, Any], name: str) -> Timeline:
    graph, recorded = graph_of(found(name))[0], records.Recorded()
    for rank, own in enumerate(results[name]["records"]):
        for record in own:
            recorded.records[record.firing, record.part][rank] = record
    return records.timeline(graph, recorded, 4, ITERATIONS)


def difference(results: dict[str, Any], name: str) -> float:
    """Of trained weights on any rank from the reference's, as a share of how far that model's weights moved."""
    chosen = found(name)
    kind = Reference if chosen.algorithm.name == "ppo" else WithoutCritic
    drawn = [[(r.sample, r.tokens, r.versions) for r in batch] for batch in batches(results, name)]
    repeated = kind(chosen, drawn, recompute=chosen.strategy.options.get("recompute", True))
    before = {n: {k: w.detach().clone() for k, w in m.named_parameters()} for n, m in models_of(repeated).items()}
    responses = repeated.run(ITERATIONS, lambda iteration: [list(range(chosen.workload.samples))])
    if name in RIGHT:
        assert responses == [[r.tokens for r in batch] for batch in batches(results, name)]
    worst = 0.0
    for model, module in models_of(repeated).items():
        right = dict(module.named_parameters())
        moved = max(float((w.detach() - before[model][n]).abs().max()) for n, w in right.items())
        held = [own[model] for own in results[name]["weights"] if model in own]
        assert held and moved > 0
        worst = max(
            worst, *(float((w - right[n].detach()).abs().max()) / moved for own in held for n, w in own.items())
        )
    return worst


def models_of(reference: Reference) -> dict[str, Any]:
    return {"actor": reference.actor} | (
        {"critic": reference.critic} if reference.critic is not reference.actor else {}
    )


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_the_schedule_repeated_gives_the_same_weights(results: dict[str, Any], name: str) -> None:
    assert difference(results, name) < TOLERANCE


@pytest.mark.parametrize("name", BROKEN)
def test_a_lost_update_and_a_wrong_prefix_show(results: dict[str, Any], name: str) -> None:
    assert difference(results, name) > 100 * TOLERANCE


@pytest.mark.parametrize("name", JOBS)
def test_tokens_are_conserved(results: dict[str, Any], name: str) -> None:
    """All that was drawn was trained, thrown away, or is there; every response ends once, as long as it should be."""
    handed = list(chain(*batches(results, name)))
    assert max(Counter(r.sample for r in handed).values()) == 1
    assert all(len(r.tokens) == len(r.versions) == r.limit and r.ended_ns for r in handed)
    assert all(a <= b for r in handed for a, b in pairwise(r.versions))
    books = [own[0] for own in results[name]["books"] if own]
    trained = sum(len(r.tokens) for r in handed)
    assert {own["lost"] for own in books} == {books[0]["lost"]}
    assert sum(own["drawn"] for own in books) == trained + books[0]["lost"] + books[0]["left"]


# --- how old it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_staleness_is_bounded_by_what_was_asked(results: dict[str, Any], name: str) -> None:
    """When a response is begun, and of its prompt's newest token when it is trained; strictly, of every token."""
    options, samples = found(name).strategy.options, found(name).workload.samples
    prompt = found(name).workload.responses_per_prompt
    for iteration, batch in enumerate(batches(results, name)):
        for r in batch:
            if not options.get("strict"):
                assert r.sample // samples - r.versions[0] <= options.get("staleness", 1)
            newest = max(o.versions[-1] for o in batch if o.sample // prompt == r.sample // prompt)
            bounded = r.versions[0] if options.get("strict") else newest
            assert 0 <= iteration - bounded <= options.get("staleness", 1)


def test_staleness_is_reached_where_training_is_slow(results: dict[str, Any]) -> None:
    for iteration, batch in enumerate(batches(results, "two_steps")):
        assert {iteration - v for r in batch for v in r.versions} == {min(iteration, 2)}


def test_weights_arrive_while_responses_are_generated(results: dict[str, Any]) -> None:
    for name in ("interrupted", "when_ready"):
        assert any(len(set(r.versions)) > 1 for r in chain(*batches(results, name))), name
    parts = {name: max(s.counts.get("interrupts", 0) for s in timeline(results, name).spans) for name in ASYNCHRONOUS}
    assert parts["interrupted"] == 1 and parts["when_ready"] == 0


@pytest.mark.parametrize("name", RIGHT)
def test_the_timeline_has_the_order_and_the_ages(results: dict[str, Any], name: str) -> None:
    run = check_timeline(timeline(results, name))
    assert violations(graph_of(found(name))[0], run) == []
    for iteration, batch in enumerate(batches(results, name)):
        spans = run.of(stage="gen", iteration=iteration)
        age = sum((iteration - v) / len(r.versions) for r in batch for v in r.versions)
        assert sum(s.counts.get("age_steps", 0.0) for s in spans) == pytest.approx(age)
        assert sum(s.counts.get("samples", 0.0) for s in spans) == len(batch)
        oldest = max(iteration - v for r in batch for v in r.versions)
        assert max(s.counts.get("oldest_steps", 0.0) for s in spans) == oldest
        parts = [s for s in spans if "interrupts" in s.counts]
        assert len(spans) == len(parts) + graph_of(found(name))[0].at("gen").chunks


@pytest.mark.parametrize("name", [name for name in CO_LOCATED if name.endswith("alone")])
def test_ages_and_lost_tokens_are_those_of_the_simulator(results: dict[str, Any], name: str) -> None:
    """Of one engine steps decide and seconds do not: the same responses end first."""
    longer = {"simulation.iterations": 2 * ITERATIONS}  # whose lengths are drawn for all responses that are begun
    simulated = timeline_of(scenario(**deepcopy(JOBS[name]["changes"]) | longer))
    counts = [
        [{name: s.counts.get(name, 0.0) for name in COUNTS} for s in run.of(stage="gen")[:ITERATIONS]]
        for run in (simulated, timeline(results, name))
    ]
    for predicted, measured in zip(*counts, strict=True):
        assert measured == pytest.approx(predicted)
    assert sum(c["thrown_away_tokens"] for c in counts[0]) > 0
    assert (sum(c["age_steps"] for c in counts[0]) > 0) == (name == "bounded_alone")


def test_ages_are_those_of_the_simulator_where_training_is_slow(results: dict[str, Any]) -> None:
    slow = {"algorithm.epochs": 60, "simulation.iterations": ITERATIONS}
    simulated = off_policy_summary(timeline_of(scenario(**deepcopy(JOBS["two_steps"]["changes"]) | slow)))
    measured = off_policy_summary(timeline(results, "two_steps"))
    assert simulated and measured
    assert measured.mean_age_steps == pytest.approx(simulated.mean_age_steps)
    assert measured.max_age_steps == simulated.max_age_steps == 2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"models.actor.zero_stage": 0, "strategy.chunks": 3}, "strategy.chunks"),
        ({"strategy": "partial_rollout", "engine": "zero3_per_token"}, "generation.engine"),
    ],
)
def test_what_engines_that_keep_responses_cannot_do_is_refused(changes: dict[str, Any], field: str) -> None:
    wanted = {"strategy": "asynchronous", "generation.batching": "continuous", **ZERO_3} | changes
    chosen = scenario(**deepcopy(BASE | GRPO | wanted))
    graph, _ = graph_of(chosen)
    with pytest.raises(InputError) as error:
        check_real_graph(chosen, graph, holdings_of(chosen, graph), 4)
    assert error.value.field == field
