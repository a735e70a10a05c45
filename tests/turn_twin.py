"""Engines for several turns, token by token and block by block: what `rlhfsim.costs.turns` skips over."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import ceil, floor

from engine_twin import Response, TwinEngine, TwinPool, one_step

from rlhfsim.costs.generation import StepSeconds
from rlhfsim.spec.lengths import Turn
from rlhfsim.spec.scenario import Speculative

# A block: sample and number of the block in it, or with its prompt's negative key (`common`); None: nothing wanted.
Label = tuple[int, int] | None


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
    """A sample: its context so far, and what of it is drawn in this turn, computed and in blocks.

    shared: blocks that all responses to its prompt (group) have in common; claim: so many of them were its own before.
    """

    number: int
    context: int
    turns: list[Turn]
    group: int = 0
    shared: int = 0
    claim: int = 0
    drawn: int | Fraction = 0
    computed: int | Fraction = 0
    blocks: int = 0
    ready: bool = False

    @property
    def common(self) -> int:
        return -1 - self.group


@dataclass
class Found:
    """steps: as (decodes, context, prompt, drawn, running, pieces). idle: before each. ends: instants by sample."""

    steps: list[tuple] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    ends: dict[int, float] = field(default_factory=dict)
    preemptions: int = 0
    recomputed: int = 0
    reused: int = 0
    calls: int = 0
    tool_seconds: float = 0.0


class BlockTwin:
    """One engine with a small cache. sharing: so many responses in a row share the blocks of one prompt (0: none).

    A step verifies the drafts of every decoding sample, which gains a fraction of tokens.
    """

    def __init__(
        self, limit: int, budget: int, block: int, blocks: int, seconds: StepSeconds,
        *, whole: bool = False, padded: bool = False, keep: bool = True, places: int | None = None, sharing: int = 0,
        drafting: Speculative | None = None,
    ) -> None:  # fmt: skip
        self.limit, self.budget, self.block, self.seconds = limit, budget, block, seconds
        self.whole, self.padded, self.keep, self.sharing, self.drafting = whole, padded, keep, sharing, drafting
        self.width = drafting.tokens + 1 if drafting else 1
        self.gain = Fraction(str(drafting.acceptance_length)) if drafting else Fraction(1)
        self.free: deque[Label] = deque([None] * blocks)
        self.tools, self.now = Tools(places), 0.0
        self.waiting: list[Talk] = []
        self.running: list[Talk] = []
        self.away: list[tuple[float, int, Talk]] = []
        self.found = Found()

    def run(self, samples: list[tuple[int, list[Turn]]]) -> Found:
        for k, (prompt, turns) in enumerate(samples):
            shared = (prompt - 1) // self.block if self.sharing else 0
            self.waiting.append(Talk(k, prompt, list(turns), k // max(self.sharing, 1), shared))
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
            if label is not None and label[0] >= 0:
                self.found.recomputed += self.block

    def labelled(self, key: int) -> int:
        return sum(label is not None and label[0] == key for label in self.free)

    def in_common(self, talk: Talk) -> int:
        """Blocks of its prompt that running responses hold."""
        return talk.shared if any(other.group == talk.group for other in self.running) else 0

    def cached_blocks(self, talk: Talk) -> int:
        """That it would find, held by others or still there."""
        return (self.in_common(talk) or self.labelled(talk.common)) + self.labelled(talk.number)

    def fits(self, talk: Talk) -> bool:
        return self.needed(talk) - self.in_common(talk) <= len(self.free)

    def admit(self, talk: Talk) -> int:
        """Blocks for its context, those included that are still there -> tokens that are cached."""
        cached, mine = self.cached_blocks(talk), {talk.number, talk.common}
        shared = cached - self.labelled(talk.number)
        if shared > talk.claim:
            self.found.reused += (shared - talk.claim) * self.block
        else:
            self.found.recomputed += (talk.claim - shared) * self.block
        self.free = deque(label for label in self.free if label is None or label[0] not in mine)
        talk.blocks, talk.claim = self.needed(talk), 0
        self.take(talk.blocks - cached)
        self.running.append(self.waiting.pop(0))
        return cached * self.block

    def needed(self, talk: Talk) -> int:
        return -(-(talk.context + talk.drawn + self.width - 1) // self.block)

    def common_labels(self, talk: Talk) -> list[Label]:
        """What it leaves of its prompt: its last running response gives that back."""
        return [] if self.in_common(talk) else [(talk.common, k) for k in reversed(range(talk.shared))]

    # -- one step -----------------------------------------------------------------------------------------------

    def step(self) -> None:
        left, preempted, decoding, pieces, drawing = self.budget, [], [], [], []

        def compute(talk: Talk, most: int) -> int:
            count = max(0, min(most, talk.context + talk.drawn - talk.computed))
            if count:
                pieces.append((talk, talk.computed, count))
            return count

        while self.whole and self.waiting and len(self.running) < self.limit:
            talk = self.waiting[0]
            rest = talk.context + talk.drawn - self.cached_blocks(talk) * self.block
            if not self.fits(talk) or (pieces and rest > left):
                break
            talk.computed = self.admit(talk)
            left -= compute(talk, rest)
        for talk in list(self.running):
            if talk not in self.running or (self.whole and pieces):
                continue
            if not talk.ready:
                left -= compute(talk, left)
                continue
            while (more := self.more_blocks(talk)) > len(self.free):
                victim = self.preempt()
                preempted.append(victim)
                if victim is talk:
                    break
            if talk in preempted:
                continue
            self.take(more)
            talk.blocks += more
            decoding.append(talk)
            left -= self.width
        while self.waiting and left > 0 and not preempted and not self.whole and len(self.running) < self.limit:
            if not self.fits(self.waiting[0]):
                break
            talk = self.waiting[0]
            talk.computed = self.admit(talk)
            left -= compute(talk, left)
        self.found.preemptions += len(preempted)
        contexts = [talk.computed + self.width for talk in decoding]
        context = hundredths(len(decoding) * max(contexts, default=0) if self.padded else sum(contexts))
        for talk in decoding:
            talk.computed += self.gain
            talk.drawn += self.gain
        for talk, start, count in pieces:
            talk.computed = start + count
            if talk.computed == talk.context + talk.drawn:
                talk.ready = True
                talk.drawn += 1
                drawing.append(talk)
        lengths = [((start + count) ** 2 - start**2) ** 0.5 for _, start, count in pieces]
        rows, prompt = len(decoding) * self.width + len(drawing), sum(count for *_, count in pieces)
        self.found.steps.append((len(decoding), context, prompt, rows, len(self.running), lengths))
        self.now += one_step(self.seconds, self.found.steps[-1], self.drafting)
        self.end([talk for talk in (*decoding, *drawing) if talk.drawn >= talk.turns[0].tokens])

    def more_blocks(self, talk: Talk) -> int:
        """That it needs beyond those it has, in this step."""
        return ceil((talk.computed + self.width - 1 + self.gain) / self.block) - talk.blocks

    def preempt(self) -> Talk:
        victim = self.running.pop()
        filled = floor(victim.computed) // self.block if self.keep else 0
        labels: list[Label] = [None] * victim.blocks
        for k in range(filled):
            labels[k] = (victim.number, k)
        for k in range(min(victim.shared, victim.blocks)):
            labels[k] = (victim.common, k) if k < filled else None
        if self.in_common(victim):
            labels = labels[victim.shared :]
        self.free += reversed(labels)
        self.found.recomputed += floor(victim.computed) - filled * self.block
        victim.claim = min(victim.shared, filled)
        victim.computed, victim.drawn, victim.blocks, victim.ready = 0, floor(victim.drawn), 0, False
        self.waiting.insert(0, victim)
        return victim

    def end(self, ended: list[Talk]) -> None:
        """Of turns, in the order of the samples' numbers."""
        unwanted, common = 0, dict[int, list[Label]]()
        self.running = [talk for talk in self.running if talk not in ended]
        for talk in sorted(ended, key=lambda talk: talk.number):
            turn = talk.turns.pop(0)
            common.pop(talk.group, None)  # the last one counts
            common[talk.group] = self.common_labels(talk)
            if not talk.turns:
                self.found.ends[talk.number] = self.now
                unwanted += talk.blocks - talk.shared
                continue
            cached = talk.context + turn.tokens - 1
            kept = cached // self.block if self.keep else 0
            self.free += [(talk.number, k) for k in reversed(range(kept - talk.shared))]
            unwanted += talk.blocks - max(kept, talk.shared)
            self.found.recomputed += cached - kept * self.block
            done = self.tools.done(self.now, turn.tool_seconds)
            self.found.calls += 1
            self.found.tool_seconds += done - self.now
            heapq.heappush(self.away, (done, talk.number, talk))
            talk.context += turn.tokens + turn.observation_tokens
            talk.drawn, talk.computed, talk.blocks, talk.ready = 0, 0, 0, False
            talk.claim = talk.shared if kept else 0
        for labels in common.values():
            self.free += labels
        self.free += [None] * unwanted


def hundredths(tokens: float | Fraction) -> float:
    """Rounded to less than what fractions of tokens are counted in."""
    return round(float(tokens), 6)


# ---------------------------------------------------------------- pools, with unlimited caches


@dataclass(eq=False)
class Conversation(Response):
    """prompt, length and drawn are those of the present turn."""

    turns: list[Turn] = field(default_factory=list)
    before: int = 0  # drawn in earlier turns

    added: int = 0  # to its prompt, by turns

    @property
    def first_prompt(self) -> int:
        return self.prompt - self.added

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
        self.cached = (self.prompt + self.length - 1) // 16 * 16 if keep else 0
        self.prompt += self.length + turn.observation_tokens
        self.added += self.length + turn.observation_tokens
        self.before += self.length
        self.answer, self.drawn, self.length, self.decoding = turn.observation_tokens, 0, self.turns[0].tokens, False
        return turn


class TurnTwinEngine(TwinEngine):
    def __init__(
        self, limit: int, budget: int, steps: StepSeconds, keep: bool, places: int | None,
        drafting: Speculative | None, shared: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(limit, budget, lambda step: one_step(steps, step, drafting), drafting, shared)
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
            cached = response.prompt + response.length - 1
            turn = response.call(self.keep)
            self.recomputed += cached - response.cached
            heapq.heappush(self.away, (self.tools.done(now, turn.tool_seconds), response.number, response))
        return done


class TurnTwinPool(TwinPool):
    def __init__(
        self, engines: int, limit: int, budget: int, steps: StepSeconds, group_size: int, keep: bool,
        places: int | None, drafting: Speculative | None = None, sharing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(engines, limit, budget, steps, group_size, drafting, sharing)
        engine = partial(TurnTwinEngine, limit, budget, steps, keep, places, drafting, self.shared)
        self.engines = [engine() for _ in range(engines)]

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
