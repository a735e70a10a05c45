"""Who runs the program: a controller that gathers every stage, or each rank for itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import TAIL, scenario, timeline_of

from rlhfsim.errors import InputError
from rlhfsim.layout import graph_of
from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.packing import shares_by_tokens
from rlhfsim.simulate import lengths_of, prepare
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Timeline

WHOLE = {f"models.{model}.zero_stage": 0 for model in ("actor", "critic", "reference", "reward")}
ONCE = {"simulation.iterations": 1, "workload.padded": False, "overheads.reserved_bytes": 0.0}
SCORES = ("old_log_prob", "ref", "reward", "values")


def colocated(execution: str, **changes: Any) -> Scenario:
    """Every rank can generate and score by itself."""
    return scenario("colocated", "engine", **(WHOLE | ONCE | TAIL | {"execution": execution} | changes))


def ends(timeline: Timeline, stage: str) -> list[float]:
    return [s.end_seconds for s in timeline.of(stage=stage)]


def begins(timeline: Timeline, stage: str) -> list[float]:
    return [s.start_seconds for s in timeline.of(stage=stage)]


def test_a_controller_gathers_before_it_hands_out() -> None:
    timeline = timeline_of(colocated("controller"))
    stages = ["gen", *SCORES, "update_critic"]
    for before, after in pairwise(stages):
        assert min(begins(timeline, after)) >= max(ends(timeline, before)) - 1e-12, after


def test_without_one_ranks_go_on_with_their_own() -> None:
    timeline = timeline_of(colocated("spmd"))
    assert min(begins(timeline, "old_log_prob")) < max(ends(timeline, "gen"))
    for span in timeline.of(stage="old_log_prob"):
        (gen,) = [s for s in timeline.of(stage="gen") if s.ranks == span.ranks]
        assert span.start_seconds == pytest.approx(gen.end_seconds, abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 1.2), st.sampled_from((1, 2)), st.sampled_from(("colocated", "interleaved")))
def test_gathering_never_saves_time_by_itself(seed: int, sigma: float, calls: int, strategy: str) -> None:
    changes = {
        "simulation.seed": seed,
        "workload.response_tokens.sigma": sigma,
        "strategy.calls": calls,
        "strategy.name": strategy,
    }
    gathered, own = (step_seconds(timeline_of(colocated(e, **changes))) for e in ("controller", "spmd"))
    assert gathered >= own * (1 - 1e-9)


def test_with_equal_work_it_makes_no_difference() -> None:
    equal = {"workload.response_tokens": 60, "workload.prompt_tokens": 64}
    gathered, own = (timeline_of(colocated(e, **equal)) for e in ("controller", "spmd"))
    assert gathered.end_seconds == pytest.approx(own.end_seconds, rel=1e-9)
    sharded = {f"models.{model}.zero_stage": 3 for model in ("actor", "critic", "reference", "reward")}
    gathered, own = (timeline_of(colocated(e, **sharded)) for e in ("controller", "spmd"))
    assert gathered.end_seconds == own.end_seconds  # ranks that gather weights from each other meet anyway


def test_samples_are_dealt_again_where_they_are_gathered() -> None:
    """By tokens over all ranks, as the trainers' pass is; without a controller a rank keeps what it generated."""
    alone = {"models.reference.score_micro_batch_samples": 64, "workload.response_tokens.sigma": 1.2}
    deal = {"workload.balanced": True}

    def ref(execution: str, **changes: Any) -> float:
        return stage_seconds(timeline_of(colocated(execution, **alone, **changes)))["ref"]

    assert ref("controller", **deal) < ref("controller")
    assert ref("spmd", **deal) == ref("spmd")
    prompts, responses = lengths_of(colocated("controller", **alone), 0)[0]
    shares = shares_by_tokens(prompts + responses, 8)
    # What takes longest is what a rank alone would need for the heaviest share.
    heaviest = max(shares, key=lambda share: share.sum())
    assert ref("controller", **deal) == pytest.approx(_pass_seconds(heaviest), rel=0.02)


def _pass_seconds(tokens: np.ndarray) -> float:
    """Of the reference over sequences of these lengths on one rank."""
    one = {"cluster.nodes": 1, "cluster.gpus_per_node": 1, "workload.prompts": len(tokens), "algorithm.minibatches": 1}
    mean = round(float(tokens.mean()))
    equal = {"workload.prompt_tokens": mean // 2, "workload.response_tokens": mean - mean // 2}
    changes = one | equal | {"models.reference.score_micro_batch_samples": 64}
    return stage_seconds(timeline_of(colocated("spmd", **changes)))["ref"]


def test_a_rank_is_no_place_of_its_own() -> None:
    places = {e: graph_of(colocated(e))[0].at("ref").places for e in ("controller", "spmd")}
    assert places == {"controller": 1, "spmd": 8}
    assert prepare(colocated("controller")).fit().by_phase == prepare(colocated("spmd")).fit().by_phase


def test_no_controller_takes_no_time() -> None:
    for field in ("controller_bytes_per_second", "controller_call_seconds"):
        with pytest.raises(InputError, match="with execution spmd there is no controller") as error:
            colocated("spmd", **{f"overheads.{field}": 1.0})
        assert error.value.field == f"overheads.{field}"
