"""FSDP2 with tensor parallelism: ZeRO-3 shards of each tensor-parallel rank's part, against bytes in closed form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scenarios import scenario, timeline_of

from rlhfsim.costs.kernels import load_kernels
from rlhfsim.costs.operators import Operators
from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.segment import Segment
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.memory import gathered_bytes, static_bytes
from rlhfsim.metrics import stage_seconds
from rlhfsim.model import parameters, rank_parameters
from rlhfsim.simulate import prepare
from rlhfsim.spec.data import data_dir
from rlhfsim.spec.loader import load_cluster
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import Effects, ModelUse, Overheads

LLAMA = load_model("llama-3.1-8b")  # 8 KV heads, so that 4 ranks hold every matrix once
T = 4
PART = 2 * rank_parameters(LLAMA, tensor_parallel=T)  # bytes of one tensor-parallel rank's part, its norms whole
ACTIVATIONS = 2 * 512 * 4096 * 2  # of two samples


def use(**settings: Any) -> ModelUse:
    options = {"zero_stage": 3, "tensor_parallel": T, "micro_batch_samples": 2, "score_micro_batch_samples": 2}
    return ModelUse(spec=LLAMA.name, shape=LLAMA, **(options | settings))


def layout(u: ModelUse, ranks: int = 16) -> Layout:
    return Layout.of(range(ranks), u)


@pytest.fixture(scope="module")
def ops() -> Operators:
    gpu = load_cluster("a100-80g-sxm").gpu
    kernels = load_kernels(data_dir("hw_specs") / "kernels" / f"{gpu.kernels}.yaml")
    return Operators(gpu, kernels, Effects(), Overheads())


def moved(program: Sequence[Segment], tensor: bool) -> Counter[str]:
    """Payload bytes of one group by operation, between tensor-parallel ranks (neighbours) or between the others."""
    found: Counter[str] = Counter()
    for segment in program:
        for t in segment.transfers:
            if (t.groups[0][1] - t.groups[0][0] == 1) == tensor:
                found[t.op] += float(np.broadcast_to(t.payload_bytes, len(segment.repeats)) @ segment.repeats)
    return found


def equal(replicas: int, samples: int) -> list[np.ndarray]:
    return [np.full(samples, 512)] * replicas


def test_ranks_with_the_same_part_shard_it() -> None:
    assert use().shard_groups(tuple(range(8))) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert use().shard_groups(tuple(range(16))) == layout(use()).data_groups
    pairs = use(shard_ranks=2).shard_groups(tuple(range(16)))
    assert pairs[:4] == ((0, 4), (8, 12), (1, 5), (9, 13))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_training_gathers_a_quarter_of_the_weights_twice_and_scatters_its_gradients(
    ops: Operators, accumulated: int
) -> None:
    program = train_program(use(recompute="none"), equal(4, 2 * accumulated), layout(use()), ops)
    assert moved(program, tensor=False) == {
        "all_gather": pytest.approx(accumulated * 2 * PART),
        "reduce_scatter": pytest.approx(accumulated * PART),
    }
    between = accumulated * (32 * 4 + 2) * ACTIVATIONS  # Korthikanti et al.: 4 a layer, and 2 at the ends
    inside = moved(program, tensor=True)
    assert inside == {"all_gather": pytest.approx(between), "reduce_scatter": pytest.approx(between)}


def test_scoring_gathers_it_once(ops: Operators) -> None:
    program = score_program(use(), equal(4, 2), layout(use()), ops)
    assert moved(program, tensor=False) == {"all_gather": pytest.approx(PART)}


def test_groups_of_shards_reduce_inside_and_sum_across(ops: Operators) -> None:
    u = use(shard_ranks=2)
    program = train_program(u, equal(4, 2), layout(u), ops)
    across = [t for s in program for t in s.transfers if t.op == "all_reduce"]
    assert across and all(set(t.groups) == {(r, r + 8) for r in range(8)} for t in across)
    assert moved(program, tensor=False)["all_reduce"] == pytest.approx(PART / 2)


def test_a_rank_holds_its_shard_of_its_part() -> None:
    held = static_bytes(use(), "train", 4)
    assert held.weights == held.gradients == PART / 4 and held.optimizer == 6 * PART / 4
    assert gathered_bytes(use(), 4) == min(2 * (1e9 + 5e7), PART)
    assert gathered_bytes(use(), 1) == 0


def test_new_weights_are_gathered_from_the_shards_and_cut_for_the_engine(ops: Operators) -> None:
    u, engines = use(), Layout(tuple(range(16)), 2)
    whole = 2.0 * parameters(LLAMA)
    program = sync_program(u, layout(u), engines, ops, method="reshard", bucket_bytes=1e9)
    gathers = [t for s in program for t in s.transfers if t.op == "all_gather"]
    assert [t.payload_bytes for t in gathers] == [whole / 4, whole / 2]
    assert gathers[0].groups == layout(u).data_groups and gathers[1].groups[0] == (0, 1)


def test_stages_run_and_what_cannot_be_is_refused() -> None:
    changes = {"models.actor.zero_stage": 3, "models.actor.tensor_parallel": 2}
    made = scenario(engine="engine", **changes)
    assert made.models.reference.zero_stage == 3 and made.models.reference.tensor_parallel == 2
    seconds = stage_seconds(timeline_of(made))
    assert all(seconds[stage] > 0 for stage in ("gen", "old_log_prob", "ref", "update_actor"))
    with pytest.raises(InputError, match="tensor-parallel parts"):
        scenario(engine="hybrid", **changes)
    with pytest.raises(InputError, match="tensor-parallel parts"):
        prepare(scenario(engine="engine", **changes, **{"models.actor.shard_ranks": 3}))
