"""Calls of workers by a controller, as verl makes them: bytes of padded batches, adapters off, factors as units.

Each against a closed form of the difference that it makes.
"""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import scenario, timeline_of
from test_passes import LLAMA, equal, layout, moved, operators, seconds, use

from rlhfsim.costs.passes import Layout, score_program, train_program
from rlhfsim.costs.sync import sync_program
from rlhfsim.errors import InputError
from rlhfsim.metrics import stage_seconds
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import prepare
from rlhfsim.spec.scenario import Overheads

approx = pytest.approx
PADDED = 64 * (64 + 128)  # tokens of the batch
LORA = {"models.actor.lora_rank": 8}


def stages(**changes: Any) -> dict[str, float]:
    return stage_seconds(timeline_of(scenario("colocated", "engine", **changes)))


def test_a_controller_sends_the_whole_batch_padded() -> None:
    """32 bytes of int64 a token; log-probabilities and entropies, or six more fields of a batch, in fp32."""
    rate = 1e6
    without, found = stages(), stages(**{"overheads.controller_bytes_per_second": rate})
    sizes = {"gen": 32, "old_log_prob": 40, "ref": 40, "values": 40, "update_actor": 56, "update_critic": 56}
    for stage, size in sizes.items():
        assert found[stage] - without[stage] == approx(PADDED * size / rate, rel=1e-6)


def test_all_mini_batches_are_one_call() -> None:
    without, found = stages(), stages(**{"overheads.controller_call_seconds": 1.0})
    for stage in ("gen", "old_log_prob", "ref", "update_actor", "update_critic"):
        assert found[stage] - without[stage] == approx(1.0, abs=1e-6)


@pytest.mark.parametrize("passes", [0, 1])
def test_factors_that_are_units_take_time_in_every_pass(passes: int) -> None:
    """7 modules of a Llama's layer with two factors each, 32 layers, 2 micro-batches; recomputed or not."""
    u = use(zero_stage=3, lora_rank=8, micro_batch_samples=2, score_micro_batch_samples=2,
            recompute=("none", "full")[passes])  # fmt: skip
    units, lengths = 2 * 32 * 14, equal(8, 4)

    def more(make: Any, **times: float) -> float:
        with_units, without = operators(overheads=Overheads(**times)), operators()
        return seconds(make(u, lengths, layout(u, 8), with_units)) - seconds(make(u, lengths, layout(u, 8), without))

    assert more(score_program, lora_unit_seconds=1e-3) == approx(units * 1e-3)
    assert more(train_program, lora_unit_seconds=1e-3) == approx((2 + passes) * units * 1e-3)
    both = {"lora_unit_seconds": 1e-3, "lora_unit_backward_seconds": 5e-3}
    assert more(train_program, **both) == approx((1 + passes + 5) * units * 1e-3)
    for other in (use(zero_stage=3), use(zero_stage=1, lora_rank=8)):  # nothing that is sharded so
        programs = [
            score_program(other, lengths, layout(other, 8), operators(overheads=Overheads(lora_unit_seconds=t)))
            for t in (0.0, 1.0)
        ]
        assert seconds(programs[0]) == seconds(programs[1])


def test_the_actor_without_its_adapters_is_the_reference() -> None:
    """No second model in memory; a pass of the actor's layers alone."""
    off = LORA | {"algorithm.reference": "adapter_off", "overheads.lora_unit_seconds": 1e-3}
    found = prepare(scenario("colocated", "engine", **off))
    assert found.graph.at("ref").model == "actor" and "reference" not in found.holdings
    apart, shared = stages(**LORA), stages(**off)
    assert shared["ref"] == approx(apart["ref"], rel=1e-6)
    assert shared["old_log_prob"] > apart["old_log_prob"] > apart["ref"]


def test_adapters_that_are_not_there_cannot_be_off() -> None:
    with pytest.raises(InputError, match="lora_rank is 0"):
        scenario(**{"algorithm.reference": "adapter_off"})
    with pytest.raises(InputError) as error:
        check_real(scenario(**LORA, **{"algorithm.reference": "adapter_off"}))
    assert error.value.field == "algorithm.reference"


def test_served_adapters_take_time_on_the_host_of_an_eager_engine() -> None:
    """A second more for each of 8 layers and 128 steps; steps are bound by the host then."""
    slow = LORA | {"generation.lora": "served", "generation.cuda_graphs": False, "overheads.decode_layer_seconds": 1.0}
    plain, adapted = (stages(**slow, **{"overheads.decode_lora_layer_seconds": t})["gen"] for t in (0.0, 1.0))
    assert adapted - plain == approx(8 * 128, rel=0.02)


def test_shards_in_fp32_are_gathered_as_they_are_for_an_engine() -> None:
    engine = Layout(tuple(range(8)), tensor_parallel=2)
    for precision, width in ((None, 2), ("fp32", 4)):
        u = use(zero_stage=3, gradient_precision=precision)
        program = sync_program(u, layout(u, 8), engine, operators(), method="reshard", bucket_bytes=1e8)
        assert moved(program)["all_gather"] == approx(width * parameters(LLAMA))
