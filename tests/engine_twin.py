"""A pool of engines, token by token: what `rlhfsim.costs.pool` skips over, with unlimited caches.

Every engine has its own clock and takes one step at a time; a step computes a token of every response that is being
decoded, then prompts in order within the budget. With drafts a response gains a fraction of tokens in each step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor

import numpy as np

from rlhfsim.costs.engine import Progress, Runs
from rlhfsim.costs.generation import StepSeconds
from rlhfsim.spec.scenario import Speculative

Step = tuple[int, float, int, int, int, list[float]]


@dataclass(eq=False)
class Response:
    number: int
    group: int
    prompt: int
    length: int
    cached: int | Fraction = 0
    drawn: int | Fraction = 0
    versions: Counter[int] = field(default_factory=Counter)

    decoding: bool = False  # everything but the token drawn last is in the cache

    @property
    def first_prompt(self) -> int:
        """Without what turns have added."""
        return self.prompt

    def lose_cache(self) -> None:
        self.cached, self.drawn, self.decoding = 0, floor(self.drawn), False


class TwinEngine:
    """shared: what a prompt of so many tokens leaves in the cache for other responses to it. known: prompts that it has
    computed; with an unlimited cache they are found until new weights enter."""

    def __init__(
        self, limit: int, budget: int, seconds: Callable[[Step], float], drafting: Speculative | None,
        shared: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.width = drafting.tokens + 1 if drafting else 1
        self.gain = Fraction(str(drafting.acceptance_length)) if drafting else 1
        self.limit, self.budget, self.seconds = min(limit, max(1, budget // self.width)), budget, seconds
        self.shared = shared
        self.known: set[int] = set()
        self.waiting: list[Response] = []
        self.running: list[Response] = []
        self.end: float | None = None  # of the step in flight
        self.drawing: list[Response] = []
        self.rows = 0  # of the step in flight: tokens drawn or drafts verified

    def begin(self, now: float) -> None:
        if not (self.waiting or self.running):
            self.end = None
            return
        decoding = [r for r in self.running if r.decoding]
        budget = self.budget - len(decoding) * self.width
        left, pieces = budget, []
        computing = [r for r in self.running if not r.decoding]
        context = float(sum(r.cached + self.width for r in decoding))
        while left > 0 and (computing or (self.waiting and len(self.running) < self.limit)):
            if computing:
                response = computing.pop(0)
            else:
                response = self.waiting.pop(0)
                if self.has_prompt(response):
                    response.cached = max(response.cached, self.shared(response.first_prompt))
                self.running.append(response)
            count = min(left, response.prompt + response.drawn - response.cached)
            pieces.append(((response.cached + count) ** 2 - response.cached**2) ** 0.5)
            response.cached += count
            left -= count
            if response.cached == response.prompt + response.drawn:
                self.drawing.append(response)
        for response in decoding:
            response.cached += self.gain
        self.rows = len(decoding) * self.width + len(self.drawing)
        self.drawing += decoding
        self.end = now + self.seconds((len(decoding), context, budget - left, self.rows, len(self.running), pieces))

    def has_prompt(self, response: Response) -> bool:
        """Whether the cache holds its prompt, where responses share it."""
        return response.group in self.known or any(other.group == response.group for other in self.running)

    def finish(self, version: int) -> list[Response]:
        """End the step in flight; the responses that are done with it."""
        for response in self.drawing:
            before = response.drawn
            response.drawn = min(before + (self.gain if response.decoding else 1), response.length)
            response.decoding = True
            response.versions[version] += floor(response.drawn) - floor(before)
        done = [r for r in self.drawing if r.drawn == r.length]
        self.running = [r for r in self.running if r not in done]
        self.known |= {r.group for r in done}
        self.drawing, self.end = [], None
        return done


class TwinPool:
    """sharing: whether a block of 16 tokens of a prompt is there for all responses to it that run."""

    def __init__(
        self, engines: int, limit: int, budget: int, steps: StepSeconds, group_size: int,
        drafting: Speculative | None = None, sharing: bool = False,
    ) -> None:  # fmt: skip
        self.shared = lambda prompt: (prompt - 1) // 16 * 16 if sharing else 0
        self.engines = [
            TwinEngine(limit, budget, lambda step: one_step(steps, step, drafting), drafting, self.shared)
            for _ in range(engines)
        ]
        self.group_size, self.now, self.version, self.drawn, self.recomputed = group_size, 0.0, 0, 0, 0
        self.groups: dict[int, list[Response]] = defaultdict(list)
        self.ready: list[Response] = []

    def submit(self, responses: list[Response]) -> None:
        """Contiguous equal shares."""
        for share, engine in zip(
            np.array_split(np.arange(len(responses)), len(self.engines)), self.engines, strict=True
        ):
            engine.waiting += [responses[k] for k in share]
            self.recomputed += sum(responses[k].prompt + responses[k].drawn for k in share if responses[k].drawn)

    def run(self, wanted: int, stop: float = float("inf")) -> bool:
        """Until so many responses are ready (True), or until every engine has ended the step of the instant `stop`."""
        if len(self.ready) >= wanted:  # no time passes, so no step begins
            return True
        for engine in self.engines:
            if engine.end is None:
                engine.begin(self.now)
        while len(self.ready) < wanted:
            instant = min(e.end for e in self.engines if e.end is not None)
            if instant >= stop - 1e-12:
                return self._stop_all(wanted)
            ending = [e for e in self.engines if e.end == instant]
            self._end(ending)
            for engine in ending if len(self.ready) < wanted else ():
                engine.begin(self.now)
        return True

    def _stop_all(self, wanted: int) -> bool:
        """Every engine to the end of its step; they wait for each other, unless enough is ready before the last."""
        while len(self.ready) < wanted and (ends := [e.end for e in self.engines if e.end is not None]):
            self._end([e for e in self.engines if e.end == min(ends)])
        return len(self.ready) >= wanted

    def finish_steps(self) -> None:
        while ends := [e.end for e in self.engines if e.end is not None]:
            self._end([e for e in self.engines if e.end == min(ends)])

    def _end(self, engines: list[TwinEngine]) -> None:
        """These engines end their steps, at the same instant."""
        self.now = engines[0].end or 0.0
        self.drawn += sum(engine.rows for engine in engines)
        done = [response for engine in engines for response in engine.finish(self.version)]
        for response in sorted(done, key=lambda r: r.number):
            self.groups[response.group].append(response)
            if len(self.groups[response.group]) == self.group_size:
                self.ready += self.groups.pop(response.group)

    def enter(self, version: int, recompute: bool) -> None:
        self.version = version
        for engine in self.engines if recompute else ():
            groups = {r.group: self.shared(r.first_prompt) for r in engine.running}
            twice = sum(self.shared(r.first_prompt) for r in engine.running) - sum(groups.values())
            self.recomputed += sum(floor(r.cached) for r in engine.running) - twice
            engine.known.clear()
            for response in engine.running:
                response.lose_cache()
            engine.waiting, engine.running = engine.running + engine.waiting, []

    def take_out(self) -> list[Response]:
        found = [r for engine in self.engines for r in (*engine.running, *engine.waiting)]
        for response in found:
            response.lose_cache()
        for engine in self.engines:
            engine.running, engine.waiting = [], []
            engine.known.clear()
        return sorted(found, key=lambda r: r.number)


def one_step(steps: StepSeconds, step: Step, drafting: Speculative | None) -> float:
    *counts, pieces = step
    one = [np.array([x]) for x in counts]
    none = np.zeros(0, dtype=int)
    runs = Runs(np.array([1]), *one, np.zeros(len(pieces), dtype=int), np.array(pieces), none)  # type: ignore[call-arg]
    return float(steps.of(replace(runs, progress=Progress.of(drafting))).sum())
