"""How samples are split over lanes and ranks, against a count of where each sample goes."""

from __future__ import annotations

import pytest

from rlhfsim.algorithms import ppo
from rlhfsim.batch import Split
from rlhfsim.strategies import Devices, colocated, disaggregated

FOUR, EIGHT = Devices(tuple(range(4)), 4), Devices(tuple(range(8)), 8)


@pytest.mark.parametrize(
    "graph", [colocated.build(ppo.build(), FOUR, calls=2), disaggregated.build(ppo.build(), EIGHT)]
)
@pytest.mark.parametrize("samples", [8, 12, 13])
def test_every_sample_has_one_rank_and_one_lane(graph, samples) -> None:  # type: ignore[no-untyped-def]
    split = Split(graph, samples)
    for stage in (s for s in graph.stages() if s.kind == "generate"):
        firings = [f for f in graph.program() if f.stage == stage.name]
        worked = [s for f in firings for own in split.shares(f).values() for s in own]
        lying = [s for f in firings for lane in stage.lanes_of(f.place) for s in split.of_lane(f, lane)]
        assert sorted(worked) == sorted(lying) == list(range(samples))
        for f in firings:
            assert split.shares(f).keys() == set(graph.ranks(f))
            assert all(split.share(f, rank) == own for rank, own in split.shares(f).items())


def test_data_are_at_home_where_each_rank_has_its_lane() -> None:
    together = colocated.build(ppo.build(), FOUR)
    assert all(Split(together, 8).at_home(f) for f in together.program())
    assert not all(Split(together, 9).at_home(f) for f in together.program())  # the odd sample makes shares uneven
    apart = disaggregated.build(ppo.build(), EIGHT)  # one lane, several ranks
    by_size = {len(apart.ranks(f)): Split(apart, 8).at_home(f) for f in apart.program()}
    assert by_size == {size: size == 1 for size in by_size} and len(by_size) > 1
