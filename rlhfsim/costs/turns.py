"""Engines for responses in several turns: while a tool is at work, its sample is in no batch.

A sample whose turn has ended leaves the running batch like one that is done. Its tool is at work (or waits for a free
place) until an instant that no step knows, so here seconds come into the schedule: a run of steps ends with the first
step after the next tool is done, and an engine without anything else to do waits. Then the sample is a new request at
the end of the queue: its prompt is its whole context with the tool's answer.

A prefix that is kept is kept as vLLM does (docs.vllm.ai, "Automatic Prefix Caching"): blocks that are given back stay
readable until they are needed (`block_queue.py`); only whole blocks are found again. Of other samples' blocks only
those of a common prompt are found, with `prefix_caching`.

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

from .block_queue import BlockQueue
from .engine import _piece
from .generation import StepSeconds, _Steps
from .pool import Engine, Sample

SAME_INSTANT_SECONDS = 1e-9  # rounding, and far less than a step


class TurnEngine(Engine):
    """A continuous engine with a clock. Prompt, response and tokens generated are those of a sample's present turn.

    elapsed_seconds: since it was made or copied. away: heap of (instant, number, sample): when tools will be done.
    servers: heap of when each place for a tool is free; None: any number of them.
    """

    def __init__(self, generation: Generation, kv_blocks: int | None, turns: Turns, seconds: StepSeconds) -> None:
        super().__init__(generation, kv_blocks, seconds.state_blocks)
        self.turns, self.seconds = turns, seconds
        self.turn: list[int] = []  # of each sample
        self.calls = {"tool_calls": 0, "tool_seconds": 0.0}
        self.elapsed_seconds = 0.0
        self.away: list[tuple[float, int, int]] = []
        self.servers = None if turns.tool_concurrency is None else [0.0] * turns.tool_concurrency
        if turns.keep_prefix:
            self.queue = BlockQueue(self.free)
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
        return other

    def let_pass(self, seconds: float) -> None:
        self.away = [(instant - seconds, number, k) for instant, number, k in self.away]
        self.servers = self.servers and [instant - seconds for instant in self.servers]

    def remove(self, gone: set[int]) -> None:
        super().remove(gone)
        self.away = [entry for entry in self.away if entry[1] not in gone]
        heapq.heapify(self.away)

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

    def _after_run(self) -> None:
        self.elapsed_seconds += self.seconds.single.of(*self.builder.last_run())
        for k in sorted(self.ended, key=lambda k: self.samples[k].number):
            self._call_tool(k)
        self.ended = []
        super()._after_run()

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
        if self.queue and kept:
            self.claims[k] = self.shared[k]
            self.queue.give_own(k, kept - self.shared[k])
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

    def _complete(self, sample: int) -> None:
        if self.turn[sample] + 1 < len(self.samples[sample].turns):
            self.ended.append(sample)
        else:
            super()._complete(sample)


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
