"""Rewards from a judge or a sandbox: the queue against closed forms and a walk through time, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import PLACEMENTS, TAIL, scenario, timeline_of

from rlhfsim.costs.rewards import completions, queue_seconds
from rlhfsim.errors import InputError
from rlhfsim.layout import graph_of
from rlhfsim.metrics import stage_seconds
from rlhfsim.order import violations
from rlhfsim.simulate import prepare, reward_seconds_of
from rlhfsim.spec.algorithm import Algorithm, Latency
from rlhfsim.spec.lengths import draw_seconds
from rlhfsim.spec.loader import load_scenario
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Span

approx = pytest.approx
LONG = {"distribution": "lognormal", "mean_seconds": 3.0, "sigma": 1.0}


def judged(strategy: str = "colocated", engine: str = "hybrid", reward: str = "judge", **changes: Any) -> Scenario:
    """64 samples on 2 nodes of 4 ranks, half a second each."""
    return scenario(strategy, engine, **{"algorithm.reward": reward, "algorithm.reward_latency": 0.5} | changes)


def rewards(found: Scenario, iteration: int = 0) -> list[Span]:
    return [s for s in timeline_of(found).of(iteration=iteration) if s.firing.stage.startswith("reward")]


# ---------------------------------------------------------------- the queue

whole = st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 9)), min_size=1, max_size=25)


@settings(deadline=None)
@given(whole, st.one_of(st.none(), st.integers(1, 6)))
def test_a_queue_is_served_in_order(requests: list[tuple[int, int]], servers: int | None) -> None:
    """Against a walk through whole seconds: who has come and waits longest goes to a server that is free."""
    arrival, latency = (np.array(column, dtype=float) for column in zip(*requests, strict=True))
    waiting = sorted(range(len(requests)), key=lambda k: (requests[k][0], k))
    busy_until: list[int] = []
    done, now = np.zeros(len(requests)), -20
    while waiting:
        busy_until = [end for end in busy_until if end > now]
        while waiting and requests[waiting[0]][0] <= now and (servers is None or len(busy_until) < servers):
            k = waiting.pop(0)
            done[k] = now + requests[k][1]
            if requests[k][1]:  # what takes no time leaves its server free
                busy_until.append(int(done[k]))
        now += 1
    assert completions(arrival, latency, servers).tolist() == done.tolist()


@given(st.integers(1, 40), st.integers(1, 10), st.floats(0.1, 5))
def test_equal_latencies_come_in_rounds(samples: int, servers: int, seconds: float) -> None:
    done = completions(np.zeros(samples), np.full(samples, seconds), servers)
    assert done.max() == approx(-(-samples // servers) * seconds)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=40), st.integers(1, 10))
def test_a_busy_queue_lies_between_its_bounds(latencies: list[float], servers: int) -> None:
    """Graham 1966: list scheduling ends within (2 - 1/m) of the best, and the best is no less than either bound."""
    end = completions(np.zeros(len(latencies)), np.array(latencies), servers).max()
    least = max(max(latencies), sum(latencies) / servers)
    assert least - 1e-9 <= end <= (2 - 1 / servers) * least + 1e-9


def test_a_sandbox_has_a_queue_on_every_node() -> None:
    """8 samples on 4 ranks, 2 a node: the first node's four take 1 s each, the second's 3 s; two at once."""
    latencies = np.array([1.0] * 4 + [3.0] * 4)
    seconds = {
        reward: queue_seconds((0, 1, 2, 3), np.zeros(8), latencies, _choice(reward, 2), rank_nodes=[0, 0, 1, 1])
        for reward in ("sandbox", "judge")
    }
    assert seconds == {"sandbox": 2 * 3.0, "judge": 2 * 1.0 + 2 * 3.0}
    early = queue_seconds((0, 1, 2, 3), np.full(8, -9.0), latencies, _choice("judge", 2), rank_nodes=[0, 0, 1, 1])
    assert early == 0.0  # all were there before the stage began
    late = np.array([-9.0] * 7 + [-1.0])
    assert queue_seconds((0, 1, 2, 3), late, latencies, _choice("judge", 8), rank_nodes=[0, 0, 1, 1]) == 3.0 - 1.0


def _choice(reward: Any, concurrency: int | None) -> Algorithm:
    return Algorithm(reward=reward, reward_latency=Latency(seconds=1.0), reward_concurrency=concurrency)


# ---------------------------------------------------------------- latencies


def test_latencies_are_drawn(tmp_path: Path) -> None:
    drawn = draw_seconds(Latency(**LONG), 200_000, 0, 0, tmp_path)
    assert drawn.mean() == approx(3.0, rel=0.01) and np.log(drawn).std() == approx(1.0, rel=0.01)
    assert np.array_equal(draw_seconds(Latency(**LONG), 10, 0, 0, tmp_path), drawn[:10])
    assert not np.array_equal(draw_seconds(Latency(**LONG), 10, 0, 1, tmp_path), drawn[:10])
    assert draw_seconds(Latency(**LONG, max_seconds=4), 1000, 0, 0, tmp_path).max() == 4
    (tmp_path / "took.csv").write_text("seconds\n0.5\n0.5\n2.0\n30\n")
    table = Latency(distribution="empirical", file="took.csv", column="seconds")
    values, counts = np.unique(draw_seconds(table, 40_000, 0, 0, tmp_path).round(6), return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
        0.5: approx(20_000, rel=0.03), 2.0: approx(10_000, rel=0.05), 30.0: approx(10_000, rel=0.05)
    }  # fmt: skip


def test_a_file_of_latencies_lies_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "took.csv").write_text("seconds\n0.25\n0.25\n")
    text = """
        cluster: {spec: a100-80g-sxm, nodes: 1}
        models: {actor: small-8x512}
        workload: {prompts: 16, prompt_tokens: 64, response_tokens: 64}
        algorithm:
          reward: sandbox
          reward_latency: {distribution: empirical, file: took.csv, column: seconds}
    """
    (tmp_path / "case.yaml").write_text(text)
    assert {s.detail["reward sandbox"] for s in rewards(load_scenario(tmp_path / "case.yaml"))} == {0.25}
    (tmp_path / "case.yaml").write_text(text.replace("column: seconds", "column: second"))
    with pytest.raises(InputError, match="did you mean 'seconds'"):
        load_scenario(tmp_path / "case.yaml")


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("reward", "concurrency", "seconds"),
    [
        ("judge", None, 0.5),
        ("judge", 16, 64 / 16 * 0.5),
        ("judge", 24, 3 * 0.5),
        ("sandbox", 16, 32 / 16 * 0.5),  # on each of two nodes
        ("sandbox", None, 0.5),
    ],
)
def test_all_ranks_wait_for_one_queue(reward: str, concurrency: int | None, seconds: float) -> None:
    (span,) = rewards(judged(reward=reward, **{"algorithm.reward_concurrency": concurrency}))
    assert len(span.ranks) == 8
    assert span.detail[f"reward {reward}"] == approx(seconds)
    assert span.bound == {reward: approx(seconds)}


@pytest.mark.parametrize(("strategy", "engine"), PLACEMENTS)
@pytest.mark.parametrize("streams", [False, True])
def test_every_placement_waits_for_it(strategy: str, engine: str, streams: bool) -> None:
    service = {"algorithm.reward_latency": LONG, "algorithm.reward_concurrency": 8, "algorithm.reward_streams": streams}
    found = judged(strategy, engine, **service, **TAIL, **{"simulation.iterations": 1})
    setup, timeline = prepare(found), timeline_of(found)
    assert violations(setup.graph, timeline) == []
    assert "reward" not in setup.holdings and "reward" not in setup.fit().by_phase
    total = sum(s.bound.get("judge", 0.0) for s in timeline.spans)
    drawn = reward_seconds_of(found, 0)[0]
    assert total <= drawn.sum() + 1e-9
    if not streams:
        assert total >= drawn.sum() / 8 - 1e-9


def test_what_is_judged_while_others_generate_takes_no_time() -> None:
    """One engine, one batch: the stage waits for what is left when the last response is there."""
    one = {"cluster.nodes": 1, "cluster.gpus_per_node": 1, "workload.prompts": 16, "generation.batching": "continuous"}

    def seconds(**changes: Any) -> float:
        return stage_seconds(timeline_of(judged("colocated", "engine", **one, **TAIL, **changes)))["reward"]

    quick = {"algorithm.reward_latency": 1e-3}
    assert seconds(**quick, **{"algorithm.reward_streams": True}) == approx(1e-3)  # the last one's own
    slow = {"algorithm.reward_latency": 50.0, "algorithm.reward_concurrency": 1}
    at_once = seconds(**slow)
    assert at_once == approx(16 * 50.0)
    # The queue begins with the first response instead of the last, so generation hides what it takes from then on.
    gens = timeline_of(judged("colocated", "engine", **one, **TAIL)).of(stage="gen")
    saved = at_once - seconds(**slow, **{"algorithm.reward_streams": True})
    assert 0 < saved < max(gen.end_seconds - gen.start_seconds for gen in gens)
    equal = judged("colocated", "hybrid", **slow, **{"algorithm.reward_streams": True})
    assert stage_seconds(timeline_of(equal))["reward"] == approx(64 * 50.0)  # all responses are there at once


def test_notes_and_ranks() -> None:
    notes = prepare(judged("disaggregated", "engine")).notes
    assert any(note.startswith("algorithm.reward judge: no reward model is held or run") for note in notes)
    apart = graph_of(judged("disaggregated", "engine"))[0]
    assert apart.at("reward").ranks == apart.at("ref").ranks
    unused = prepare(scenario(**{"algorithm.reward_concurrency": 4})).notes
    assert any("settings of a judge or sandbox are not used" in note for note in unused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm.reward_latency": None}, "reward 'judge' needs reward_latency"),
        ({"algorithm.reward_latency": {"distribution": "lognormal", "sigma": 1}}, "needs mean_seconds"),
        ({"algorithm.reward_latency": -1}, "at least 0"),
        ({"algorithm.reward_concurrency": 0}, "at least 1"),
        ({"algorithm.reward": "jury"}, "model, function, judge, sandbox"),
    ],
)
def test_impossible_services(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        judged(**changes)
