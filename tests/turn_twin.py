"""Engines for several turns, token by token and block by block: what `rlhfsim.costs.turns` skips over."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from engine_twin import Response, TwinEngine, TwinPool, one_step

from rlhfsim.costs.generation import StepSeconds
from rlhfsim.spec.lengths import Turn

Label = tuple[int, int] | None  # sample and number of the block in it; None: nothing that is wanted


class Tools:
    """Calls at work on so many places (None: any number), first come, first served."""

    def __init__(self, places: int | None) -> None:
        self.places, self.ends = places, list[float]()

    def done(self, now: float, seconds: float) -> float:
        """When a call that comes now will be done; calls come in order."""
        begin = now
        if self.places is not None and len(self.ends) >= self.places:
            begin = max(now, sorted(self.ends)[-self.places])
        self.ends.append(begin + seconds)
        return begin + seconds


@dataclass(eq=False)
class Talk:
    """A sample: its context so far, and what of it is drawn in this turn, computed and in blocks."""

    number: int
    context: int
    turns: list[Turn]
    drawn: int = 0
    computed: int = 0
    blocks: int = 0
    ready: bool = False


@dataclass
class Found:
    """steps: as (decodes, context, prompt, drawn, running, pieces). idle: before each. ends: instants by sample."""

    steps: list[tuple] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    ends: dict[int, float] = field(default_factory=dict)
    preemptions: int = 0
    recomputed: int = 0
    calls: int = 0
    tool_seconds: float = 0.0


class BlockTwin:
    """One engine with a small cache."""

    def __init__(
        self, limit: int, budget: int, block: int, blocks: int, seconds: StepSeconds,
        *, whole: bool = False, padded: bool = False, keep: bool = True, places: int | None = None,
    ) -> None:  # fmt: skip
        self.limit, self.budget, self.block, self.seconds = limit, budget, block, seconds
        self.whole, self.padded, self.keep = whole, padded, keep
        self.free: deque[Label] = deque([None] * blocks)
        self.tools, self.now = Tools(places), 0.0
        self.waiting: list[Talk] = []
        self.running: list[Talk] = []
        self.away: list[tuple[float, int, Talk]] = []
        self.found = Found()

    def run(self, samples: list[tuple[int, list[Turn]]]) -> Found:
        self.waiting = [Talk(k, prompt, list(turns)) for k, (prompt, turns) in enumerate(samples)]
        while self.waiting or self.running or self.away:
            before = self.now
            self.take_back()
            if not (self.waiting or self.running):
                self.now = self.away[0][0]
                self.take_back()
            self.found.idle.append(self.now - before)
            self.step()
        return self.found

    def take_back(self) -> None:
        while self.away and self.away[0][0] <= self.now:
            self.waiting.append(heapq.heappop(self.away)[-1])

    # -- blocks -----------------------------------------------------------------------------------------------

    def take(self, count: int) -> None:
        for _ in range(count):
            label = self.free.popleft()
            if label is not None:
                self.found.recomputed += self.block

    def cached_blocks(self, talk: Talk) -> int:
        return sum(label is not None and label[0] == talk.number for label in self.free)

    def admit(self, talk: Talk) -> int:
        """Blocks for its context, those included that are still there -> tokens that are cached."""
        cached = self.cached_blocks(talk)
        self.free = deque(label for label in self.free if label is None or label[0] != talk.number)
        talk.blocks = self.needed(talk)
        self.take(talk.blocks - cached)
        self.running.append(self.waiting.pop(0))
        return cached * self.block

    def needed(self, talk: Talk) -> int:
        return -(-(talk.context + talk.drawn) // self.block)

    # -- one step -----------------------------------------------------------------------------------------------

    def step(self) -> None:
        left, preempted, decoding, pieces, drawing = self.budget, [], [], [], []

        def compute(talk: Talk, most: int) -> int:
            count = min(most, talk.context + talk.drawn - talk.computed)
            if count:
                pieces.append((talk, talk.computed, count))
            return count

        while self.whole and self.waiting and len(self.running) < self.limit:
            talk = self.waiting[0]
            rest = talk.context + talk.drawn - self.cached_blocks(talk) * self.block
            if self.needed(talk) > len(self.free) or (pieces and rest > left):
                break
            talk.computed = self.admit(talk)
            left -= compute(talk, rest)
        for talk in list(self.running):
            if talk not in self.running or (self.whole and pieces):
                continue
            if not talk.ready:
                left -= compute(talk, left)
                continue
            while talk.computed == talk.blocks * self.block and not self.free:
                victim = self.running.pop()
                self.free += [None] * victim.blocks
                self.found.recomputed += victim.computed
                victim.computed, victim.blocks, victim.ready = 0, 0, False
                self.waiting.insert(0, victim)
                preempted.append(victim)
                if victim is talk:
                    break
            if talk in preempted:
                continue
            if talk.computed == talk.blocks * self.block:
                self.take(1)
                talk.blocks += 1
            decoding.append(talk)
            left -= 1
        while self.waiting and left and not preempted and not self.whole and len(self.running) < self.limit:
            if self.needed(self.waiting[0]) > len(self.free):
                break
            talk = self.waiting[0]
            talk.computed = self.admit(talk)
            left -= compute(talk, left)
        self.found.preemptions += len(preempted)
        contexts = [talk.computed + 1 for talk in decoding]
        context = len(decoding) * max(contexts, default=0) if self.padded else sum(contexts)
        for talk in decoding:
            talk.computed += 1
            drawing.append(talk)
        for talk, start, count in pieces:
            talk.computed = start + count
            if talk.computed == talk.context + talk.drawn:
                talk.ready = True
                drawing.append(talk)
        lengths = [((start + count) ** 2 - start**2) ** 0.5 for _, start, count in pieces]
        prompt = sum(count for *_, count in pieces)
        self.found.steps.append((len(decoding), context, prompt, len(drawing), len(self.running), lengths))
        self.now += one_step(self.seconds, self.found.steps[-1], None)
        self.end([talk for talk in drawing if self.draw(talk)])

    @staticmethod
    def draw(talk: Talk) -> bool:
        talk.drawn += 1
        return talk.drawn == talk.turns[0].tokens

    def end(self, ended: list[Talk]) -> None:
        """Of turns, in the order of the samples' numbers."""
        unwanted = 0
        for talk in sorted(ended, key=lambda talk: talk.number):
            self.running.remove(talk)
            turn = talk.turns.pop(0)
            if not talk.turns:
                self.found.ends[talk.number] = self.now
                unwanted += talk.blocks
                continue
            kept = talk.computed // self.block if self.keep else 0
            self.free += [(talk.number, k) for k in reversed(range(kept))]
            unwanted += talk.blocks - kept
            self.found.recomputed += talk.computed - kept * self.block
            done = self.tools.done(self.now, turn.tool_seconds)
            self.found.calls += 1
            self.found.tool_seconds += done - self.now
            heapq.heappush(self.away, (done, talk.number, talk))
            talk.context += turn.tokens + turn.observation_tokens
            talk.drawn, talk.computed, talk.blocks, talk.ready = 0, 0, 0, False
        self.free += [None] * unwanted


# ---------------------------------------------------------------- pools, with unlimited caches


@dataclass(eq=False)
class Conversation(Response):
    """prompt, length and drawn are those of the present turn."""

    turns: list[Turn] = field(default_factory=list)
    before: int = 0  # drawn in earlier turns

    @property
    def all_drawn(self) -> int:
        return self.before + self.drawn

    @property
    def seen(self) -> int:
        """Context of what it has drawn: an answer that follows the last token is still new."""
        return self.prompt + self.drawn - (0 if self.drawn else self.answer)

    answer: int = 0  # tokens of the tool's last answer

    def call(self, keep: bool) -> Turn:
        """Its turn has ended."""
        turn = self.turns.pop(0)
        self.cached = self.cached // 16 * 16 if keep else 0
        self.prompt += self.drawn + turn.observation_tokens
        self.before += self.drawn
        self.answer, self.drawn, self.length, self.decoding = turn.observation_tokens, 0, self.turns[0].tokens, False
        return turn


class TurnTwinEngine(TwinEngine):
    def __init__(self, limit: int, budget: int, steps: StepSeconds, keep: bool, places: int | None) -> None:
        super().__init__(limit, budget, lambda step: one_step(steps, step, None), None, lambda prompt: 0)
        self.away: list[tuple[float, int, Conversation]] = []
        self.tools, self.keep, self.idle, self.recomputed = Tools(places), keep, False, 0

    def begin(self, now: float) -> None:
        while self.away and self.away[0][0] <= now:
            self.waiting.append(heapq.heappop(self.away)[-1])
        self.idle = bool(self.away) and not (self.waiting or self.running)
        if self.idle:
            self.end, self.rows = self.away[0][0], 0
        else:
            super().begin(now)

    def finish(self, version: int) -> list[Response]:
        now, ended = self.end or 0.0, super().finish(version)
        done = [r for r in ended if len(r.turns) == 1]
        for response in sorted((r for r in ended if r not in done), key=lambda r: r.number):
            cached = response.cached
            turn = response.call(self.keep)
            self.recomputed += cached - response.cached
            heapq.heappush(self.away, (self.tools.done(now, turn.tool_seconds), response.number, response))
        return done


class TurnTwinPool(TwinPool):
    def __init__(
        self, engines: int, limit: int, budget: int, steps: StepSeconds, group_size: int, keep: bool, places: int | None
    ) -> None:
        super().__init__(engines, limit, budget, steps, group_size)
        self.engines = [TurnTwinEngine(limit, budget, steps, keep, places) for _ in range(engines)]

    def submit(self, responses: list[Conversation]) -> None:
        self._stop_waiting()  # an engine that is given work begins at once
        before = self.recomputed
        super().submit(responses)
        self.recomputed = before + sum(r.seen for r in responses if r.all_drawn)

    def run(self, wanted: int, stop: float = float("inf")) -> bool:
        ended = super().run(wanted, stop)
        self.now = self.now if ended else max(self.now, stop)
        return ended

    def _stop_all(self, wanted: int) -> bool:
        self._stop_waiting()
        return super()._stop_all(wanted)

    def finish_steps(self) -> None:
        self._stop_waiting()
        super().finish_steps()

    def _stop_waiting(self) -> None:
        for engine in self.engines:
            if engine.idle:
                engine.end, engine.idle = None, False

    def enter(self, version: int, recompute: bool) -> None:
        for engine in self.engines if recompute else ():
            absent = [*engine.waiting, *(r for *_, r in engine.away)]
            self.recomputed += sum(r.cached for r in absent)
            for response in absent:
                response.lose_cache()
        super().enter(version, recompute)

    def take_out(self) -> list[Conversation]:
        found = super().take_out() + [r for engine in self.engines for *_, r in engine.away]
        for engine in self.engines:
            engine.away, engine.tools = [], Tools(engine.tools.places)
        for response in found:
            response.lose_cache()
        return sorted(found, key=lambda r: r.number)
