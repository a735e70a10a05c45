"""Sharding inside groups of ranks: who gathers and reduces what, and what a rank holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scenarios import scenario, timeline_of
from test_passes import LLAMA, OPS, equal, layout, moved, seconds, use

from rlhfsim.costs.generation import generation_program
from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.layout import check_real
from rlhfsim.memory import gathered_bytes, static_bytes
from rlhfsim.metrics import step_seconds
from rlhfsim.model import parameters
from rlhfsim.simulate import prepare

approx = pytest.approx
LENGTHS = np.full(2, 64)
WHOLE = 2 * parameters(LLAMA)


# --- shards inside groups --------------------------------------------------------------------------------------------


def test_groups_gather_reduce_and_then_sum_their_shards() -> None:
    """8 ranks in groups of 4: two gathers and a reduce-scatter of the whole in both, an all-reduce of a quarter by the
    two copies of each shard."""
    u = use(shard_ranks=4)
    program = train_program(u, equal(8, 4), layout(u, 8), OPS)
    assert moved(program) == {
        "all_gather": approx(2 * 2 * WHOLE),
        "reduce_scatter": approx(2 * WHOLE),
        "all_reduce": approx(4 * WHOLE / 4),
    }
    groups = {t.op: t.groups for s in program for t in s.transfers}
    assert groups["all_gather"] == groups["reduce_scatter"] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert groups["all_reduce"] == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_one_group_is_no_group_and_groups_of_one_are_data_parallel() -> None:
    whole, all_ranks, single = use(), use(shard_ranks=4), use(shard_ranks=1)
    lengths = equal(4, 8)
    programs = [train_program(u, lengths, layout(u, 4), OPS) for u in (whole, all_ranks, single)]
    assert moved(programs[0]) == moved(programs[1])
    assert seconds(programs[0], 1e11) == approx(seconds(programs[1], 1e11))
    assert moved(programs[2]) == {"all_reduce": approx(2 * WHOLE)}  # in both micro-batches


def test_a_rank_holds_what_its_group_does_not() -> None:
    u = use(shard_ranks=4)
    for held in ("train", "frozen"):
        assert static_bytes(u, held, 32) == static_bytes(use(), held, 4)
    assert gathered_bytes(use(shard_ranks=1), 8) == 0


def test_weights_come_from_every_group_that_holds_them() -> None:
    u, engines = use(shard_ranks=4), Layout(tuple(range(8, 16)), tensor_parallel=4)
    found = sync_program(u, layout(u, 8), engines, OPS, method="broadcast", bucket_bytes=1e8)
    assert found[0].transfers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert moved(found)["broadcast"] == approx(WHOLE)


def test_groups_inside_a_node_help_on_slow_networks() -> None:
    slow = {"cluster.network.nic_bytes_per_second": {"value": 5e9, "source": "unverified"}}

    def step(**settings: Any) -> float:
        return step_seconds(timeline_of(scenario("colocated", "engine", **slow, **settings)))

    inside = {f"models.{role}.shard_ranks": 4 for role in ("actor", "critic", "reference", "reward")}
    assert step(**inside) < step()


@pytest.mark.parametrize("engine", ["zero3_per_token", "hybrid"])
def test_generation_gathers_inside_groups_too(engine: str) -> None:
    found = prepare(scenario("colocated", engine, **{"models.actor.shard_ranks": 4}))
    stage = found.graph.at("gen")
    held = found.holdings["actor"]
    program = generation_program(
        held.use, found.scenario.generation, [LENGTHS] * 8, [LENGTHS] * 8, stage.ranks, OPS,
        kv_capacity_tokens=None, domain=held.ranks,
    )  # fmt: skip
    gathers = {t.groups for s in program.segments for t in s.transfers if t.op == "all_gather"}
    assert gathers == {((0, 1, 2, 3), (4, 5, 6, 7))}


def test_bad_groups_are_refused() -> None:
    with pytest.raises(InputError, match="weights are sharded at zero_stage 3 only"):
        scenario(**{"models.actor.shard_ranks": 4, "models.actor.zero_stage": 1})
    with pytest.raises(InputError, match=r"is 3, which does not divide the 8 ranks of actor") as error:
        prepare(scenario(**{"models.actor.shard_ranks": 3}))
    assert error.value.field == "models.actor.shard_ranks"
    with pytest.raises(InputError, match="real runs shard over all ranks"):
        check_real(scenario(**{"models.actor.shard_ranks": 4}))


def test_scoring_gathers_inside_groups() -> None:
    u = use(shard_ranks=2, score_micro_batch_samples=4)
    found = moved(score_program(u, equal(8, 4), layout(u, 8), OPS))
    assert found == {"all_gather": approx(4 * WHOLE)}
