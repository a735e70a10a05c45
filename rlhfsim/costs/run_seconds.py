"""Seconds of one run of steps at a time, for those who need them before they know the next run.

`StepSeconds.of` gives seconds to many runs at once, by arrays; one run would cost it as much as a hundred. Here are its
formulas in plain numbers, without the split by what limits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from .engine import Progress, Row, _Builder

if TYPE_CHECKING:
    from .generation import StepSeconds

BLOCK = 512  # counts whose operators are evaluated together


class RunSeconds:
    """What `steps.of` gives, for one run; `progress` is the engine's."""

    def __init__(self, steps: StepSeconds, progress: Progress) -> None:
        self.steps, self.progress, self.advance = steps, progress, progress.advance
        self._body, self._head = map(_Totals, steps.tables)
        self._breaks: list[float] = steps.breaks.tolist()
        self._prefill: dict[float, float] = {}  # seconds of attention to one piece of a prompt
        self._draft: RunSeconds | None = None
        if steps.draft is not None:
            self._draft = RunSeconds(steps.draft, replace(progress, width=1))

    def expect(self, pieces: Sequence[float]) -> None:
        """Steps with one of these pieces of a prompt will be asked for: evaluates all at once."""
        if new := list(set(pieces) - self._prefill.keys()):
            self._prefill.update(zip(new, self._prefill_seconds(np.array([new]).T).tolist(), strict=True))
        if self._draft is not None:
            self._draft.expect(pieces)

    def of(self, row: Row, pieces: Sequence[float] = ()) -> float:
        if self.steps.stages:
            return self._through_stages(row, pieces)
        seconds = self._of(row, pieces)
        if self._draft is None:
            return seconds
        steps, decodes, context, prompt, sampled, running = row
        drafts = self.progress.width - 1
        seconds += self._draft.of((steps, decodes, context, prompt, sampled - drafts * decodes, running), pieces)
        if decodes:
            seconds += (drafts - 1) * self._draft.of((steps, decodes, context, 0, decodes, running))
        return seconds

    def _through_stages(self, row: Row, pieces: Sequence[float]) -> float:
        """Pipeline stages are rare enough to go by arrays."""
        builder = _Builder(0, self.progress)
        builder.add(*row, chunks=pieces)
        return float(self.steps.of(builder.runs()).sum())

    def _of(self, row: Row, pieces: Sequence[float]) -> float:
        """Without what drafts."""
        steps, decodes, ticks, prompt, sampled, _ = row
        given, context = self.steps, ticks / self.progress.unit
        device = self._body[decodes * self.progress.width + prompt] + self._head[sampled]
        if len(pieces) == 1 and pieces[0] in self._prefill:
            device += self._prefill[pieces[0]]
        elif pieces:
            device += float(self._prefill_seconds(np.array([pieces]))[0])
        total = sum(
            self._decoding(count, decodes, start, device) for count, start in self._cut(steps, decodes, context)
        )
        return given.unexplained * (total + steps * (given.step_seconds + given.sequence_seconds * sampled))

    def _cut(self, steps: int, decodes: int, context: float) -> Iterator[tuple[int, float]]:
        """As `Runs.cut`: steps, and the context of the first of them."""
        breaks, done = self._breaks, 0
        if decodes and steps > 1:
            mean = context / decodes
            for k in range(bisect_right(breaks, mean), bisect_right(breaks, mean + self.advance * (steps - 1))):
                until = min(steps, ceil((breaks[k] - mean) / self.advance))
                if until > done:
                    yield until - done, context + decodes * self.advance * done
                    done = until
        yield steps - done, context + decodes * self.advance * done

    def _decoding(self, steps: int, decodes: int, context: float, device: float) -> float:
        """Of steps between two breaks; device: what they take beside attention."""
        given, last = self.steps, decodes * self.advance * (steps - 1)
        if not decodes:
            return steps * max(device, given.floor_seconds)
        middle = device + self._attention(decodes, context + last / 2)
        if not given.floor_seconds:
            return steps * middle
        first = device + self._attention(decodes, context)
        growth = 2 * (middle - first) / max(steps - 1, 1)
        return steps * middle + _below(given.floor_seconds, first, growth, steps)

    def _attention(self, decodes: int, context: float) -> float:
        attended = context
        for window, share in self.steps.windows:
            attended -= share * max(context - window * decodes, 0.0)
        return float(self.steps.attention(decodes, attended).seconds)

    def _prefill_seconds(self, pieces: np.ndarray) -> np.ndarray:
        """Of attention in all layers, for each row of pieces that are computed together."""
        given = self.steps
        return np.asarray(given.layers * given.operators.attention_prefill(given.use, pieces, given.degree).seconds)


class _Totals(dict[int, float]):
    """Seconds of an operator by a count, evaluated for many counts at once."""

    def __init__(self, evaluate: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self._evaluate = evaluate

    def __missing__(self, count: int) -> float:
        counts = np.arange(count - count % BLOCK, count - count % BLOCK + BLOCK)
        self.update(zip(counts.tolist(), self._evaluate(counts).tolist(), strict=True))
        return self[count]


def _below(floor: float, first: float, growth: float, steps: int) -> float:
    """Sum over i < steps of max(floor - (first + growth i), 0)."""
    gap = floor - first
    if gap <= 0:
        return 0.0
    count = min(steps, ceil(gap / growth)) if growth > 0 else steps
    return count * gap - growth * count * (count - 1) / 2
