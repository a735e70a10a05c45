"""Engines whose work outlives a firing: a firing goes on until so many responses have ended, others stay unfinished.

A firing is planned on copies of the engines, run by run as in `engine.py`; then the engines themselves go to where the
firing ended or was stopped, to the step. So the plan may be cut anywhere, and what changes in between (new weights, new
prompts) meets the engines in the state that they are in. Which response ends first is decided by compute time; what
transfers add is the same for engines of one size.

All responses to a prompt count when the last of them has ended (slime, `generate_rollout_async` waits for groups; so do
AReaL's workflows).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhfsim.spec.lengths import Turn
from rlhfsim.spec.scenario import Generation

from .block_queue import BlockQueue
from .engine import Progress, Runs, _Scheduler
from .generation import StepSeconds, _Steps, route_samples

UNLIMITED_BLOCKS = 1 << 60
ROUNDING = 1e-9  # relative to a time: the same instant


@dataclass(eq=False)
class Sample:
    """One response. number: among all that are drawn; group: its prompt; response: all tokens after the prompt.

    turns: in which it is generated; none: at once.
    tokens_by_version: drawn so far with each version of the weights, but for those since the present one entered.
    """

    number: int
    group: int
    prompt: int
    response: int
    turns: tuple[Turn, ...] = ()
    tokens_by_version: Counter[int] = field(default_factory=Counter)

    @property
    def generated(self) -> int:
        """Tokens of the response that are drawn and not observed."""
        return sum(turn.tokens for turn in self.turns) if self.turns else self.response

    def turn_at(self, drawn: int) -> int:
        """The turn that goes on when so many tokens are drawn."""
        index = 0
        while index < len(self.turns) - 1 and drawn >= self.turns[index].tokens:
            drawn -= self.turns[index].tokens
            index += 1
        return index

    def context(self, drawn: int) -> int:
        """Tokens up to the last one that is drawn, when so many are."""
        seen = self.turns[: self.turn_at(drawn - 1)]
        return self.prompt + drawn + sum(turn.observation_tokens for turn in seen)

    @property
    def begun_with(self) -> int | None:
        """The version that drew its first token, if older than the present one."""
        return min(self.tokens_by_version, default=None)

    def drawn_with(self, version: int, drawn: int) -> None:
        """So many tokens in all, those since the last call with this version."""
        if more := drawn - self.tokens_by_version.total():
            self.tokens_by_version[version] += more

    def age(self, version: int) -> float:
        """By how many versions a finished response is older than this one, by its tokens."""
        return sum((version - v) * tokens for v, tokens in self.tokens_by_version.items()) / self.generated


class Engine(_Scheduler):
    """A continuous engine that is given work at any time and can stop after any step.

    late_seconds: the step in flight ends so long after the present; late: responses that end with it.
    """

    def __init__(self, generation: Generation, kv_blocks: int | None, state_blocks: int = 0) -> None:
        none = np.zeros(0, dtype=int)
        super().__init__(
            none,
            none,
            generation.max_sequences,
            generation.round_tokens,
            generation.block_tokens,
            kv_blocks,
            generation.chunked_prefill,
            padded=generation.kv_cache == "preallocated",
            groups=none if generation.prefix_caching else None,
            progress=Progress.of(generation.speculative),
            state_blocks=state_blocks,
        )
        self.generation, self.kv_blocks = generation, kv_blocks
        self.free = self.total = UNLIMITED_BLOCKS if kv_blocks is None else kv_blocks
        self.queue = BlockQueue(self.free) if self.caching else None
        self.samples: list[Sample] = []
        self.completions: list[tuple[int, int]] = []  # (run, sample)
        self.late_seconds = 0.0
        self.late: list[Sample] = []
        self.calls: dict[str, float] = {}  # of tools, and their seconds

    @property
    def busy(self) -> bool:
        """Whether it has unfinished samples."""
        return bool(self.waiting or self.running)

    def submit(self, samples: Sequence[Sample], drawn: Sequence[int]) -> None:
        """Put samples at the end of the queue, so much of each drawn already."""
        first = len(self.samples)
        prompts, responses = [s.prompt for s in samples], [s.response for s in samples]
        self.final_blocks += self._needed_blocks(prompts, responses, self.kv_blocks)
        self.samples += samples
        self.prompt += prompts
        self.response += responses
        self.group += [s.group for s in samples]
        self.shared += self._shareable(prompts)
        self.generated += drawn
        self.waiting[:0] = range(len(self.samples) - 1, first - 1, -1)

    def copy(self) -> Engine:
        """With the unfinished sequences only, and no runs."""
        other = self.empty()
        kept = self.kept()
        new = {old: k for k, old in enumerate(kept)}
        other.samples = [self.samples[k] for k in kept]
        other.prompt, other.response = [self.prompt[k] for k in kept], [self.response[k] for k in kept]
        other.generated, other.final_blocks = [self.generated[k] for k in kept], [self.final_blocks[k] for k in kept]
        other.group, other.shared = [self.group[k] for k in kept], [self.shared[k] for k in kept]
        other.members = Counter(other.group[: len(self.running)])
        other.running = dict.fromkeys(range(len(self.running)))
        other.waiting = list(range(len(self.running) + len(self.waiting) - 1, len(self.running) - 1, -1))
        other.partial = self.partial and [new[self.partial[0]], *self.partial[1:]]
        other.base = {new[k]: base for k, base in self.base.items()}
        other.finish = {new[k]: finish for k, finish in self.finish.items()}
        other.ending = [(finish, k) for k, finish in other.finish.items()]
        heapq.heapify(other.ending)
        other.clock, other.free, other.base_sum, other.crossing = self.clock, self.free, self.base_sum, [*self.crossing]
        other.late_seconds, other.late = self.late_seconds, [*self.late]
        other.queue = self.queue and self.queue.renumbered(new)
        other.claims = {new[k]: blocks for k, blocks in self.claims.items()}
        return other

    def empty(self) -> Engine:
        """Another one like it, without work."""
        return Engine(self.generation, self.kv_blocks, self.state_blocks)

    def kept(self) -> list[int]:
        """The unfinished ones: those that run in order, then the queue."""
        return [*self.running, *reversed(self.waiting)]

    def let_pass(self, seconds: float) -> None:
        """The present moves on: every instant is from then on."""

    def run_until(self, completions: int) -> None:
        while len(self.completions) < completions and self.busy:
            self.advance()

    def run_steps(self, steps: int) -> None:
        while steps > 0:
            before = len(self.builder.rows)
            self.advance(steps)
            steps -= sum(row[0] for row in self.builder.rows[before:])

    def empty_cache(self) -> int:
        """Everything that runs is put back to the head of the queue; the cached tokens that are lost."""
        before = self.recomputed
        while self.running:
            self._put_back(keeps=False)
        self._give_back()
        lost = self.recomputed - before
        if self.queue:
            lost += self.block * (self.queue.forget() + sum(self.claims.values()))
            self.claims = {}
        return lost

    def remove(self, gone: set[int]) -> None:
        """Take these samples (their numbers) out, whatever they do."""
        for k in [k for k in self.running if self.samples[k].number in gone]:
            del self.running[k]
            if self.partial is not None and self.partial[0] == k:
                self._leave(k, self._blocks(self.partial[2]), self.partial[1])
                self.partial = None
            else:
                self._leave(k, self._held(k), self._cached(k))
                self._stop_decoding(k)
        self.waiting = [k for k in self.waiting if self.samples[k].number not in gone]
        self._give_back()
        numbers = {k for k, sample in enumerate(self.samples) if sample.number in gone}
        if self.queue:
            self.queue.forget(numbers)
        self.claims = {k: blocks for k, blocks in self.claims.items() if k not in numbers}

    def unfinished(self) -> list[tuple[Sample, int]]:
        """Samples and how many of their tokens are drawn."""
        return [(self.samples[k], self._drawn(k)) for k in self.kept()]

    def _drawn(self, k: int) -> int:
        return self._cached(k) - self.prompt[k] + 1 if k in self.base else self.generated[k]

    def _complete(self, sample: int) -> None:
        self.completions.append((len(self.builder.rows) - 1, sample))


@dataclass(frozen=True)
class Cut:
    """Engines stopped at the first end of a step not before some instant; all seconds are from the plan's begin.

    steps: of each engine, from its plan's begin. ends: when each engine's last step ends. tables: the runs until then.
    """

    steps: list[int]
    ends: list[float]
    tables: list[_Steps]

    @property
    def seconds(self) -> float:
        return max(self.ends, default=0.0)


class Plan:
    """What the engines will do if nothing comes in between. seconds: until enough responses have ended."""

    def __init__(self, pool: Pool, wanted: int) -> None:
        self.pool, self.engines = pool, [engine.copy() for engine in pool.engines]
        goal = 1 + 2 * wanted // max(1, len(self.engines))
        while True:
            for engine in self.engines:
                engine.run_until(goal)
            self.runs = [engine.builder.runs() for engine in self.engines]
            self.by_bound = [pool.steps.of(runs) for runs in self.runs]
            self.ends = [
                engine.late_seconds + np.cumsum(by_bound.sum(axis=0) + runs.idle_seconds)
                for engine, runs, by_bound in zip(self.engines, self.runs, self.by_bound, strict=True)
            ]
            self.completions = self._completions()
            busy = [k for k, engine in enumerate(self.engines) if engine.busy]
            horizon = min((float(self.ends[k][-1]) for k in busy), default=float("inf"))
            seconds = pool.enough_at(self.completions, wanted)
            if seconds is not None and seconds <= horizon:
                self.seconds = seconds
                return
            assert busy, "fewer responses were begun than are needed"
            goal *= 2

    def _completions(self) -> list[tuple[float, Sample, int]]:
        """(instant, sample, engine), in order."""
        found = [(e.late_seconds, sample, k) for k, e in enumerate(self.engines) for sample in e.late]
        for k, (engine, ends) in enumerate(zip(self.engines, self.ends, strict=True)):
            found += [(float(ends[run]), engine.samples[sample], k) for run, sample in engine.completions]
        return sorted(found, key=lambda entry: (entry[0], entry[1].number))

    def ends_within(self, cut: Cut, wanted: int) -> bool:
        """Whether enough responses have ended when every engine has come to the cut."""
        within = (entry for entry in self.completions if entry[0] <= cut.ends[entry[2]] * (1 + ROUNDING))
        return self.pool.enough_at(within, wanted) is not None

    def cut(self, seconds: float) -> Cut:
        """Where every engine ends the step that it is in at this instant."""
        instant = seconds * (1 - ROUNDING)
        last = [bisect_left(ends.tolist(), instant) for ends in self.ends]  # the run that the instant is in
        within = [k for k, run in enumerate(last) if run < len(self.ends[k]) and self._begin(k, run) < instant]
        steps = dict(zip(within, self._steps_within(within, last, instant), strict=True))
        tables = [self._table(k, last[k], steps.get(k, 0)) for k in range(len(self.engines))]
        own = [float(table.seconds.sum() + table.runs.idle_seconds.sum()) for table in tables]
        ends = [engine.late_seconds + s for engine, s in zip(self.engines, own, strict=True)]
        for k, run in enumerate(last):
            waits = run < len(self.ends[k]) and self.runs[k].idle_seconds[run] > 0
            if waits and k not in steps and instant > ends[k]:
                ends[k] = seconds  # for a tool
        return Cut([int(table.runs.steps.sum()) for table in tables], ends, tables)

    def _begin(self, k: int, run: int) -> float:
        """When the first step of a run begins."""
        idle = float(self.runs[k].idle_seconds[run])
        return idle + (float(self.ends[k][run - 1]) if run else self.engines[k].late_seconds)

    def _steps_within(self, engines: list[int], last: list[int], instant: float) -> list[int]:
        """The fewest steps of each engine's run after which the instant has come, by bisection for all at once."""
        if not engines:
            return []
        rows = np.array([self.engines[k].builder.rows[last[k]] for k in engines]).T
        builder = self.engines[engines[0]].builder
        left = instant - np.array([self._begin(k, last[k]) for k in engines])
        low, high = np.ones_like(rows[0]), rows[0].copy()
        while (low < high).any():
            middle = (low + high) // 2
            enough = self.pool.steps.of(builder.decoding(middle, rows)).sum(axis=0) >= left
            high, low = np.where(enough, middle, high), np.where(enough, low, np.minimum(middle + 1, high))
        return [int(steps) for steps in high]

    def _table(self, k: int, last: int, steps: int) -> _Steps:
        """The first `last` runs of an engine, and so many steps of the next one."""
        count = last + (steps > 0)
        runs, by_bound = self.runs[k], self.by_bound[k][:, :count].copy()
        cut = runs.steps[:count].copy()
        chunks = runs.chunk_run < count
        if steps and steps < cut[-1]:
            cut[-1] = steps
            rows = np.array([self.engines[k].builder.rows[last]]).T
            by_bound[:, -1:] = self.pool.steps.of(self.engines[k].builder.decoding(cut[-1:], rows))
        until = Runs(
            cut,
            runs.decodes[:count],
            runs.context_tokens[:count],
            runs.prompt_tokens[:count],
            runs.sampled[:count],
            runs.running[:count],
            runs.chunk_run[chunks],
            runs.chunk_tokens[chunks],
            np.zeros(0, dtype=int),
            progress=runs.progress,
            idle_seconds=runs.idle_seconds[:count],
        )
        return _Steps(until, by_bound, self.pool.steps.micro_batches(until))


class Pool:
    """The engines of one place, and all responses that are begun and not handed over.

    engine: one without work, like which they all are. group_size: responses to a prompt. version: of the weights on the
        engines.
    """

    def __init__(self, engine: Engine, steps: StepSeconds, group_size: int) -> None:
        self.engine, self.steps, self.group_size = engine, steps, group_size
        self.engines: list[Engine] = []
        self.outside: list[tuple[Sample, int]] = []  # unfinished and in no engine, with the tokens drawn
        self.ended: dict[int, list[Sample]] = {}  # group -> its responses that have ended, while others have not
        self.ready: list[Sample] = []  # whole groups, in order of their ends
        self.version = 0
        self.begun = self.thrown_away = self.handed_over = 0  # responses
        self.counts: defaultdict[str, float] = defaultdict(float)  # since they were last asked for

    # -- work in ------------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Responses begun and not handed over."""
        return self.begun - self.thrown_away - self.handed_over

    def set_engines(self, count: int) -> None:
        """So many engines, empty where the number changes."""
        if len(self.engines) != count:
            self.take_out()
            self.engines = [self.engine.empty() for _ in range(count)]

    def submit(self, samples: Sequence[Sample]) -> None:
        """New samples, and before them those outside, spread over the engines: each lot evenly."""
        self.begun += len(samples)
        for lot in (self.outside, [(s, 0) for s in samples]):
            tokens = np.array([s.prompt + s.response for s, _ in lot])
            shares = route_samples(tokens, len(self.engines), self.engine.generation.routing)
            for engine, share in zip(self.engines, shares, strict=True):
                mine = [lot[k] for k in share]
                engine.submit([s for s, _ in mine], [drawn for _, drawn in mine])
                self.counts["recomputed_tokens"] += sum(s.context(drawn) for s, drawn in mine if drawn)
        self.outside = []

    # -- time -------------------------------------------------------------------------------------------------

    def enough_at(self, completions: Iterable[tuple[float, Sample, int]], wanted: int) -> float | None:
        """When `wanted` responses are ready, all responses of their prompts being done."""
        left = wanted - len(self.ready)
        if left <= 0:
            return 0.0
        done = Counter({group: len(samples) for group, samples in self.ended.items()})
        for seconds, sample, _ in completions:
            done[sample.group] += 1
            if done[sample.group] == self.group_size:
                left -= self.group_size
                if left <= 0:
                    return seconds
        return None

    def go_to(self, plan: Plan, cut: Cut, seconds: float) -> None:
        """Let the engines work until the cut; what ends after `seconds` is late."""
        instant = seconds * (1 + ROUNDING)
        done = [entry for entry in plan.completions if entry[0] <= cut.ends[entry[2]] * (1 + ROUNDING)]
        for k, steps in enumerate(cut.steps):
            end = cut.ends[k]
            late = [s for t, s, engine in done if engine == k and t > instant]
            self.engines[k].run_steps(steps)
            self.counts["preemptions"] += self.engines[k].preemptions
            self.counts["recomputed_tokens"] += self.engines[k].recomputed
            if self.engines[k].reused:
                self.counts["reused_tokens"] += self.engines[k].reused
            for name, count in self.engines[k].calls.items():
                self.counts[name] += count
            self.engines[k] = self.engines[k].copy()
            self.engines[k].let_pass(seconds)
            self.engines[k].late, self.engines[k].late_seconds = late, max(0.0, end - seconds)
        self._end(s for t, s, _ in done if t <= instant)

    def _end(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            sample.drawn_with(self.version, sample.generated)
            group = self.ended.setdefault(sample.group, [])
            group.append(sample)
            if len(group) == self.group_size:
                self.ready += self.ended.pop(sample.group)

    def finish_steps(self) -> None:
        """Time passes without new steps: those in flight end."""
        passed = max((engine.late_seconds for engine in self.engines), default=0.0)
        for engine in self.engines:
            engine.let_pass(passed)
            self._end(engine.late)
            engine.late, engine.late_seconds = [], 0.0

    # -- weights and unfinished work ----------------------------------------------------------------------

    def enter(self, version: int, recompute: bool) -> None:
        """New weights: what is drawn from now on is of this version; the cache of the old one is lost or kept."""
        self.finish_steps()
        for sample, drawn in (*self.outside, *(entry for e in self.engines for entry in e.unfinished())):
            sample.drawn_with(self.version, drawn)
        self.version = version
        if recompute:
            for engine in self.engines:
                self.counts["recomputed_tokens"] += engine.empty_cache()
                engine.recomputed = 0

    def take_out(self) -> None:
        """All unfinished sequences leave the engines, with their tokens and without their cache."""
        self.finish_steps()
        self.outside += [entry for engine in self.engines for entry in engine.unfinished()]
        self.outside.sort(key=lambda entry: entry[0].number)
        self.engines = [engine.empty() for engine in self.engines]

    def throw_away(self, version: int | None = None) -> None:
        """Every prompt that is not handed over, or those with a response begun by weights older than this version."""
        unfinished = [*self.outside, *(entry for e in self.engines for entry in (*e.unfinished(), *_whole(e.late)))]
        held = [*unfinished, *_whole(self.ready), *_whole(s for group in self.ended.values() for s in group)]
        old = {s.group for s, _ in held if version is None or (s.begun_with is not None and s.begun_with < version)}
        gone = {s.number: drawn for s, drawn in held if s.group in old}
        for k, engine in enumerate(self.engines):
            engine.remove(set(gone))
            engine.late = [s for s in engine.late if s.number not in gone]
            self.engines[k] = engine.copy()
        self.outside = [entry for entry in self.outside if entry[0].number not in gone]
        self.ready = [s for s in self.ready if s.number not in gone]
        self.ended = {group: samples for group, samples in self.ended.items() if group not in old}
        self.thrown_away += len(gone)
        self.counts["thrown_away_tokens"] += sum(gone.values())

    def hand_over(self, count: int) -> list[Sample]:
        """The first responses that are ready."""
        self.handed_over += count
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken


def _whole(samples: Iterable[Sample]) -> list[tuple[Sample, int]]:
    return [(s, s.generated) for s in samples]
