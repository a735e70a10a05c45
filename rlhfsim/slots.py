"""The `Slot` ratios of the paper's authors: a fraction of the ranks per model, placed correctly.

Their published arithmetic (openspg, branch `alignment_app_rlhf`, python/nn4k/nn4k/alignment/, model_placement.py)
starts the i-th model of a group at i times *its own* size and finds groups by ratios that sum to exactly 100 %, so most
ratios overlap, run out of range or leave models without ranks. Here models with ratio 1 get every rank and the others
are packed one after the other; where the authors' code would have placed differently, a note says so.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

from rlhfsim.errors import InputError, nearest

NAMES = {
    "actor": "actor",
    "critic": "critic",
    "initial": "reference",
    "reference": "reference",
    "reward": "reward",
    "pred_actor": "shadow_actor",
    "shadow_actor": "shadow_actor",
    "pred_critic": "shadow_critic",
    "shadow_critic": "shadow_critic",
}


def place_slots(slots: dict[str, float], ranks: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Ranks per model, and notes on what the authors' arithmetic would have done instead.

    Raises InputError for unknown models, models named twice, ratios outside (0, 1], and ratios below one rank.
    """
    ratios: dict[str, Fraction] = {}
    for name, ratio in slots.items():
        field = f"strategy.slots.{name}"
        if name not in NAMES:
            raise InputError(f"there is no model {name!r}{nearest(name, NAMES)}", field=field)
        if NAMES[name] in ratios:
            raise InputError(f"{NAMES[name]} is named twice (initial and reference are the same model)", field=field)
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float, str)):
            raise InputError(f"{ratio!r} is no ratio; a number above 0 and up to 1 is needed", field=field)
        try:
            ratios[NAMES[name]] = Fraction(str(ratio)).limit_denominator(1024)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"{ratio!r} is no ratio; a number above 0 and up to 1 is needed", field=field) from None
        if not 0 < ratios[NAMES[name]] <= 1:
            raise InputError(f"{ratio} is outside 0 (excluded) to 1", field=field)
    placed = _pack(ratios, ranks)
    notes = []
    theirs = _authors_arithmetic(ratios, len(ranks))
    for model, own in placed.items():
        positions = tuple(ranks.index(r) for r in own)
        if theirs[model] != positions:
            notes.append(f"slots: {model} gets {_short(own)}; the authors' arithmetic gives {_short(theirs[model])}")
    return placed, notes


def _pack(ratios: dict[str, Fraction], ranks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Cumulative packing: a group of models fills the ranks up to ratio 1, then the next group begins at rank 0."""
    placed, used = {}, Fraction(0)
    for model, ratio in ratios.items():
        if ratio == 1:
            placed[model] = ranks
            continue
        if used + ratio > 1:
            used = Fraction(0)
        start, stop = round(used * len(ranks)), round((used + ratio) * len(ranks))
        if start == stop:
            raise InputError(
                f"ratio {float(ratio):g} of {len(ranks)} ranks is less than one rank", field=f"strategy.slots.{model}"
            )
        placed[model], used = ranks[start:stop], used + ratio
    return placed


def _authors_arithmetic(ratios: dict[str, Fraction], world: int) -> dict[str, tuple[int, ...] | None]:
    """What their code gives: any group of models that sums to exactly 1.0 is placed, and the i-th model of a group
    starts at i times its own size, whatever the sizes before it."""
    result: dict[str, tuple[int, ...] | None] = {m: tuple(range(world)) if r == 1 else None for m, r in ratios.items()}
    partial = [m for m, r in ratios.items() if r != 1]
    for members in (group for n in range(1, len(partial) + 1) for group in combinations(partial, n)):
        parts = [float(ratios[m]) for m in members]
        if sum(parts) == 1.0 and sum(100 * part for part in parts) == 100.0:  # both in floating point, as theirs
            for i, member in enumerate(members):  # a later group overwrites an earlier one
                size = int(world * float(ratios[member]))
                result[member] = tuple(range(size * i, size * i + size))
    return result


def _short(ranks: tuple[int, ...] | None) -> str:
    if not ranks:
        return "no ranks"
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join(map(str, ranks))
