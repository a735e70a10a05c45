"""Engines for responses in several turns: while a tool is at work, its sample is in no batch.

A sample whose turn has ended leaves the running batch like one that is done. Its tool is at work (or waits for a free
place) until an instant that no step knows, so here seconds come into the schedule: a run of steps ends with the first
step after the next tool is done, and an engine without anything else to do waits. Then the sample is a new request at
the end of the queue: its prompt is its whole context with the tool's answer.

A prefix that is kept is kept as vLLM does (docs.vllm.ai, "Automatic Prefix Caching"): blocks that are given back stay
readable until they are needed, in the order in which they were given back and a sample's last block first; only whole
blocks are found again. Of other samples' blocks only those of a common prompt are found, with `prefix_caching`: while
another response to it runs, and after the last one has left as long as nobody needs the room (they are given back last,
so that nobody's own blocks outlast them). What a preempted sample has of its own is not found.

While engines are stopped (new weights, no work to begin) their tools stand still too, but a sample that is taken out
of its engine comes back with its answer.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rlhfsim.spec.lengths import Turn
from rlhfsim.spec.scenario import Generation, Turns

from .engine import _piece
from .generation import StepSeconds, _Steps
from .pool import Engine, Sample

SAME_INSTANT_SECONDS = 1e-9  # rounding, and far less than a step


class TurnEngine(Engine):
    """A continuous engine with a clock. Prompt, response and tokens generated are those of a sample's present turn.

    elapsed_seconds: since it was made or copied. away: heap of (instant, number, sample): when tools will be done.
    servers: heap of when each place for a tool is free; None: any number of them. queue: free blocks in the order in
    which they are taken, as counts by what is in them: with key 2 k the context of sample k, which is absent or waits,
    behind what it shares; with 2 g + 1 what responses to prompt g share; with a negative one nothing that is wanted.
    claims: samples whose shared blocks have been theirs before: to find them again saves nothing, to miss them costs.
    """

    def __init__(self, generation: Generation, kv_blocks: int | None, turns: Turns, seconds: StepSeconds) -> None:
        super().__init__(generation, kv_blocks, seconds.state_blocks)
        self.turns, self.seconds = turns, seconds
        self.turn: list[int] = []  # of each sample
        self.calls = {"tool_calls": 0, "tool_seconds": 0.0}
        self.elapsed_seconds = 0.0
        self.away: list[tuple[float, int, int]] = []
        self.servers = None if turns.tool_concurrency is None else [0.0] * turns.tool_concurrency
        self.queue, self.queued = {-1: self.free}, self.free
        self.unwanted = -1  # the last negative key
        self.claims: set[int] = set()
        self.left: list[int] = []  # prompts whose last running response has just left
        self.ended: list[int] = []  # samples whose turn has ended in this run, but not their last one

    @property
    def now(self) -> float:
        return self.late_seconds + self.elapsed_seconds

    @property
    def busy(self) -> bool:
        return super().busy or bool(self.away)

    # -- samples in and out ---------------------------------------------------------------------------------

    def empty(self) -> TurnEngine:
        return TurnEngine(self.generation, self.kv_blocks, self.turns, self.seconds)

    def submit(self, samples: Sequence[Sample], drawn: Sequence[int]) -> None:
        super().submit(samples, drawn)
        self.seconds.single.expect([piece for sample in samples for piece in self._pieces(sample)])
        for k in range(len(self.turn), len(self.samples)):
            turns = self.samples[k].turns
            self.response[k] = turns[0].tokens
            self.turn.append(0)
            for turn in turns[: self.samples[k].turn_at(self.generated[k])]:
                self.generated[k] -= turn.tokens
                self._next_turn(k)

    def _pieces(self, sample: Sample) -> Iterator[float]:
        """What its second turn and those after it compute of its context, where the cache keeps all that it can."""
        context = sample.prompt
        for turn in sample.turns[:-1]:
            kept = (context + turn.tokens - 1) // self.block * self.block if self.turns.keep_prefix else 0
            context += turn.tokens + turn.observation_tokens
            yield _piece(kept, context)

    def kept(self) -> list[int]:
        return [*super().kept(), *(k for *_, k in sorted(self.away))]

    def copy(self) -> TurnEngine:
        other = super().copy()
        assert isinstance(other, TurnEngine)
        new = {old: k for k, old in enumerate(self.kept())}
        other.turn = [self.turn[old] for old in new]
        other.away = [(instant, number, new[k]) for instant, number, k in self.away]
        other.servers = self.servers and [*self.servers]
        other.queue, other.queued, other.unwanted = {}, self.queued, self.unwanted
        for key, blocks in self.queue.items():
            other.queue[key if key < 0 or key % 2 else 2 * new[key // 2]] = blocks
        other.claims = {new[k] for k in self.claims}
        return other

    def let_pass(self, seconds: float) -> None:
        self.away = [(instant - seconds, number, k) for instant, number, k in self.away]
        self.servers = self.servers and [instant - seconds for instant in self.servers]

    def empty_cache(self) -> int:
        lost = super().empty_cache() + self._forget({key for key in self.queue if key >= 0})
        lost += self.block * sum(self.shared[k] for k in self.claims)
        self.claims = set()
        return lost

    def remove(self, gone: set[int]) -> None:
        super().remove(gone)
        self._give_back_shared()
        self.away = [entry for entry in self.away if entry[1] not in gone]
        heapq.heapify(self.away)
        numbers = {k for k, sample in enumerate(self.samples) if sample.number in gone}
        self._forget({2 * k for k in numbers})
        self.claims -= numbers
        self._update_queue()

    def _drawn(self, k: int) -> int:
        return super()._drawn(k) + sum(turn.tokens for turn in self.samples[k].turns[: self.turn[k]])

    # -- time -----------------------------------------------------------------------------------------------

    def advance(self, limit: int | None = None) -> None:
        """One run, after waiting for a tool where there is nothing else to do."""
        self._take_back(self.now)
        if not super().busy:
            instant = self.away[0][0]
            self.builder.idle_seconds[len(self.builder.rows)] = instant - self.now
            self.elapsed_seconds += instant - self.now
            self._take_back(instant)
        super().advance(self._steps_until_return(limit))
        self.elapsed_seconds += self.seconds.single.of(*self.builder.last_run())
        for k in sorted(self.ended, key=lambda k: self.samples[k].number):
            self._call_tool(k)
        self.ended = []
        self._give_back_shared()
        self._update_queue()

    def _take_back(self, instant: float) -> None:
        """Samples whose tools are done by then go to the end of the queue."""
        while self.away and self.away[0][0] <= instant + SAME_INSTANT_SECONDS:
            self.waiting.insert(0, heapq.heappop(self.away)[-1])

    def _steps_until_return(self, limit: int | None) -> int | None:
        """The fewest steps of the present batch until the next tool is done, if the batch does not end before."""
        self._drop_stale()
        if not self.away or not self.base:
            return limit
        most = (self.ending[0][0] - self.clock) // self.progress.ticks
        most = most if limit is None else min(most, limit)
        left = self.away[0][0] - self.now - SAME_INSTANT_SECONDS
        return 1 + bisect_left(range(1, most), left, key=self._decode_seconds)

    def _decode_seconds(self, steps: int) -> float:
        """Of so many steps of those that decode now."""
        decoding = len(self.base)
        row = steps, decoding, self._context(), 0, decoding * self.progress.width, len(self.running)
        return self.seconds.single.of(row)

    def _call_tool(self, k: int) -> None:
        """At the end of a turn: what stays in the cache, and when the tool will be done."""
        turn, cached = self.samples[k].turns[self.turn[k]], self.prompt[k] + self.response[k] - 1
        kept = cached // self.block if self.turns.keep_prefix else 0
        if kept and self.shared[k]:
            self.claims.add(k)
        if own := max(0, kept - self.shared[k]):
            self.queue[2 * k] = own
            self.queued += own
        self.recomputed += cached - self.block * kept
        begin = self.now if self.servers is None else max(self.now, self.servers[0])
        done = begin + turn.tool_seconds
        if self.servers is not None:
            heapq.heapreplace(self.servers, done)
        heapq.heappush(self.away, (done, self.samples[k].number, k))
        self.calls["tool_calls"] += 1
        self.calls["tool_seconds"] += done - self.now
        self.generated[k] = 0
        self._next_turn(k)

    def _next_turn(self, k: int) -> None:
        """The context as it is when the present turn has ended and the tool has answered."""
        turn = self.samples[k].turns[self.turn[k]]
        self.prompt[k] += turn.tokens + turn.observation_tokens
        self.turn[k] += 1
        self.response[k] = self.samples[k].turns[self.turn[k]].tokens

    # -- cache ----------------------------------------------------------------------------------------------

    def _known(self, sample: int) -> int:
        self._update_queue()
        return self.block * (self._shared_now(sample) + self.queue.get(2 * sample, 0))

    def _shared_now(self, sample: int) -> int:
        """Blocks that it shares and would find."""
        return self._found(sample) or (self.queue.get(2 * self.group[sample] + 1, 0) if self.shared[sample] else 0)

    def _enter(self, sample: int, tokens: int) -> int:
        known, shared, reused = self._known(sample), self._shared_now(sample), self.reused
        self.queued -= self.queue.pop(2 * sample, 0)
        if not self._found(sample):
            self.queued -= self.queue.pop(2 * self.group[sample] + 1, 0)
        super()._enter(sample, tokens)
        if sample in self.claims:
            self.claims.remove(sample)
            self.reused = reused
            self.recomputed += self.block * (self.shared[sample] - shared)
        else:
            self.reused = reused + self.block * shared
        self._update_queue()
        return known

    def _leave(self, sample: int, blocks: int) -> int:
        kept = super()._leave(sample, blocks)
        if self.shared[sample] and not self.members[self.group[sample]]:
            self.left.append(sample)
        return kept

    def _give_back_shared(self) -> None:
        """What nobody who runs has in common any more comes to the end of the queue."""
        for sample in sorted(self.left, key=lambda k: self.samples[k].number):
            self.queue[2 * self.group[sample] + 1] = self.shared[sample]
            self.queued += self.shared[sample]
        self.left = []

    def _put_back(self) -> None:
        self._update_queue()
        super()._put_back()
        self._give_back_shared()
        self._update_queue()

    def _retire(self) -> None:
        self._update_queue()
        super()._retire()

    def _complete(self, sample: int) -> None:
        if self.turn[sample] + 1 < len(self.samples[sample].turns):
            self.ended.append(sample)
        else:
            super()._complete(sample)

    def _update_queue(self) -> None:
        """Blocks that are no longer free leave the queue at its head; those that are given back come to its end."""
        while self.queued > self.free:
            oldest, blocks = next(iter(self.queue.items()))
            taken = min(blocks, self.queued - self.free)
            self.queued -= taken
            self.recomputed += self.block * taken * (oldest >= 0 and not oldest % 2)
            if taken == blocks:
                del self.queue[oldest]
            else:
                self.queue[oldest] -= taken
        if self.queued < self.free:
            self.unwanted -= 1
            self.queue[self.unwanted] = self.free - self.queued
            self.queued = self.free

    def _forget(self, keys: set[int]) -> int:
        """What is in these blocks is not wanted any more: so many tokens of single samples."""
        lost, queue = 0, {}
        for key, blocks in self.queue.items():
            if key in keys:
                lost += self.block * blocks * (not key % 2)
                self.unwanted -= 1
                queue[self.unwanted] = blocks
            else:
                queue[key] = blocks
        self.queue = queue
        return lost


def turn_steps(
    engine: TurnEngine,
    prompt_tokens: np.ndarray,
    turns: Sequence[tuple[Turn, ...]],
    seconds: StepSeconds,
    groups: np.ndarray | None = None,
) -> _Steps:
    """What an engine without work does when it is given these samples at once, until all are done.

    groups: with prefix caching, the prompt of each.
    """
    prompts = range(len(turns)) if groups is None else groups.tolist()
    samples = [
        Sample(k, group, int(prompt), sum(t.tokens + t.observation_tokens for t in own), own)
        for k, (group, prompt, own) in enumerate(zip(prompts, prompt_tokens, turns, strict=True))
    ]
    engine = engine.empty()
    engine.submit(samples, [0] * len(samples))
    engine.run_until(len(samples))
    completion_run = np.zeros(len(samples), dtype=int)
    for run, k in engine.completions:
        completion_run[k] = run
    runs = replace(
        engine.builder.runs(engine.preemptions, engine.recomputed, engine.reused),
        completion_run=completion_run,
        tool_calls=int(engine.calls["tool_calls"]),
        tool_seconds=engine.calls["tool_seconds"],
    )
    return seconds.table(runs)
