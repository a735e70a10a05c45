"""Slot ratios: ours are disjoint and complete, and notes say what the paper's published arithmetic gives instead.

The expected results of their code were read off by running it (openspg branch `alignment_app_rlhf`,
python/nn4k/nn4k/alignment, model_placement.py) for these ratios and world sizes.
"""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfsim.errors import InputError
from rlhfsim.slots import place_slots

MODELS = ("actor", "critic", "initial", "reward")


Ranks = tuple[int, ...]


def place(ratios: tuple[float | str, ...], world: int) -> tuple[dict[str, Ranks], dict[str, Ranks]]:
    """Ours, and of each model that a note names what they give."""
    placed, notes = place_slots(dict(zip(MODELS, ratios, strict=True)), tuple(range(world)))  # type: ignore[arg-type]
    theirs = {}
    for note in notes:
        ours, _, other = note.partition("; the authors' arithmetic gives ")
        numbers = list(map(int, re.findall(r"\d+", other)))
        assert numbers or other == "no ranks"
        theirs[ours.removeprefix("slots: ").partition(" ")[0]] = tuple(
            range(numbers[0], numbers[1] + 1) if " to " in other else numbers
        )
    return placed, theirs


def block(first: int, last: int) -> Ranks:
    return tuple(range(first, last + 1))


# Models with the expected result of their code; () for models that get no ranks.
@pytest.mark.parametrize(
    "ratios, world, theirs",
    [
        ((1, 1, 0.5, 0.5), 8, {"reference": block(0, 3), "reward": block(4, 7)}),
        ((0.25,) * 4, 8, {"actor": (0, 1), "critic": (2, 3), "reference": (4, 5), "reward": (6, 7)}),
        ((1, 1, 0.75, 0.25), 8, {"reference": block(0, 5), "reward": (2, 3)}),  # overlap; 6 and 7 idle
        ((1, 1, 0.25, 0.75), 8, {"reward": block(6, 11)}),  # out of range
        ((0.4, 0.4, 0.1, 0.1), 8, {"reference": (), "reward": ()}),
        ((0.4, 0.4, 0.1, 0.1), 32, {"reference": block(6, 8), "reward": block(9, 11)}),  # on the actor's ranks
        ((0.5,) * 4, 8, dict.fromkeys(("actor", "critic", "reference"), block(0, 3))),  # the last of six pairs wins
        ((1, 1, 1 / 3, 2 / 3), 9, {"reference": (), "reward": ()}),  # the sum of percentages misses 100
        ((0.1, 0.5, 0.3, 0.1), 10, dict.fromkeys(("actor", "critic", "reference", "reward"), ())),
        ((1, 1, 0.5, 0.5), 7, {"reference": block(0, 2), "reward": block(3, 5)}),  # rank 6 owns neither
    ],
)
def test_published_arithmetic(ratios: tuple[float, ...], world: int, theirs: dict[str, Ranks]) -> None:
    """What differs from ours is in a note, and nothing else is; ours is in range, disjoint and complete."""
    placed, noted = place(ratios, world)
    for model, expected in theirs.items():
        assert noted.get(model, placed[model]) == expected, model
    assert all(noted[model] != placed[model] for model in noted)
    assert all(set(own) <= set(range(world)) for own in placed.values())
    if sum(ratio for ratio in ratios if ratio != 1) == pytest.approx(1):
        partial = [own for own, ratio in zip(placed.values(), ratios, strict=True) if ratio != 1]
        assert sorted(rank for own in partial for rank in own) == list(range(world))


def test_ours() -> None:
    assert place((1, 1, 0.75, 0.25), 8)[0] == {
        "actor": tuple(range(8)),
        "critic": tuple(range(8)),
        "reference": (0, 1, 2, 3, 4, 5),
        "reward": (6, 7),
    }
    assert {m: len(own) for m, own in place((0.4, 0.4, 0.1, 0.1), 32)[0].items()} == {
        "actor": 13,
        "critic": 13,
        "reference": 3,
        "reward": 3,
    }
    pairs = place((0.5,) * 4, 8)[0]  # two groups, one after the other
    assert pairs["actor"] == pairs["reference"] == (0, 1, 2, 3)
    assert pairs["critic"] == pairs["reward"] == (4, 5, 6, 7)
    assert place((1, 1, "1/3", "2/3"), 9)[0]["reward"] == (3, 4, 5, 6, 7, 8)
    assert place_slots({"actor": 1, "reference": 0.5, "reward": 0.5}, (4, 5, 6, 7))[0]["reward"] == (6, 7)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(1, 8))
def test_ratios_that_sum_to_one_are_disjoint_and_complete(parts: list[int], times: int) -> None:
    world = sum(parts) * times
    slots = {m: str(Fraction(p, sum(parts))) for m, p in zip(MODELS, parts, strict=False)}
    placed, _ = place_slots(slots, tuple(range(world)))  # type: ignore[arg-type]
    assert [rank for own in placed.values() for rank in own] == list(range(world))
    assert [len(own) for own in placed.values()] == [p * times for p in parts]


@pytest.mark.parametrize(
    "slots, said",
    [
        ({"crtic": 1}, "no model 'crtic'.*critic"),
        ({"actor": 0}, "outside 0"),
        ({"actor": 1.5}, "outside 0"),
        ({"actor": -0.5}, "outside 0"),
        ({"actor": float("nan")}, "is no ratio"),
        ({"actor": True}, "is no ratio"),
        ({"actor": None}, "is no ratio"),
        ({"actor": "half"}, "is no ratio"),
        ({"actor": "1/0"}, "is no ratio"),
        ({"actor": 0.05}, "less than one rank"),
        ({"initial": 0.5, "reference": 0.5}, "reference is named twice"),
    ],
)
def test_bad_ratios_name_their_field(slots: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        place_slots(slots, tuple(range(8)))  # type: ignore[arg-type]
    assert caught.value.field == f"strategy.slots.{list(slots)[-1]}"
