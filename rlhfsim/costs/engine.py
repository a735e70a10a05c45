"""Which sequences an inference engine processes in which step: integers only, no seconds, no hardware.

What a step does depends on tokens, not on time: all samples of a rollout are there at its start. So the schedule comes
first, as a few `Runs` of steps that are alike, and `generation.py` gives seconds to all of them at once. Between two
changes of the batch (a completion, an admission, a preemption) nothing is simulated: only the context grows, by one
token per sequence and step.

The continuous scheduler follows vLLM's (docs.vllm.ai, "Optimization and Tuning": chunked prefill, preemption by
recomputation; vllm/v1/core/sched/scheduler.py): decodes come first, then prompts in order, cut to what is left of the
step's token budget; when the KV blocks run out, the most recently admitted sequence is preempted, put back to the head
of the queue and computed again; no prompt is admitted in a step that preempted. A prompt is admitted when blocks for
all of it are free (V1's scheduler_reserve_full_isl; it then takes them piece by piece, here they are taken at once).

With prefix caching the whole blocks of a prompt, but for the one with its last token (which is computed again to draw
from it; vllm/v1/core/kv_cache_manager.py, get_computed_blocks), are there once for all of its responses that run. A
response that is admitted while another one runs computes the rest only, also in the step that computes the other one
(V1 enters blocks into its table as they are scheduled). Blocks that are given back can be found again until somebody
needs the room (`block_queue.py`): a prompt's when its last response has left, and all of a preempted response.

With speculative decoding a step verifies `width` tokens of every decoding sequence, which gains the mean number each
time: fractions of tokens are kept as ticks of a clock. Room is kept for all drafts.

Without chunked prefill prompts go first and whole, in steps of their own in which nobody decodes, as in vLLM before V1
(docs.vllm.ai, v0.6, "Performance and Tuning": the scheduler prioritises prefills by default, and does not batch them
with decodes).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlhfsim.errors import DoesNotFit
from rlhfsim.spec.scenario import Speculative

from .block_queue import BlockQueue


@dataclass(frozen=True)
class Progress:
    """What a decode step does for a sequence: `width` tokens computed, `ticks` gained, of which `unit` are a token."""

    width: int = 1
    ticks: int = 1
    unit: int = 1

    @classmethod
    def of(cls, drafting: Speculative | None) -> Progress:
        if drafting is None:
            return cls()
        return cls(drafting.tokens + 1, drafting.advance.numerator, drafting.advance.denominator)

    @property
    def advance(self) -> float:
        """Tokens."""
        return self.ticks / self.unit


ONE_TOKEN = Progress()


@dataclass(frozen=True)
class Runs:
    """Steps of one engine in order, alike ones together. Arrays, one entry per run; counts are those of one step.

    steps: how many. decodes: sequences that are given one token more. context_tokens: KV tokens that they attend to in
    the first step of the run, themselves included; `decodes` more in each later step (with drafts: as many times
    `progress.advance`). prompt_tokens: tokens of prompts (and of preempted sequences) computed; only runs of one step
    have any. sampled: tokens drawn (or drafts verified), padding rows included. running: sequences that are admitted
    and not yet at their end.
    chunk_run, chunk_tokens: one entry per piece of a prompt: its run, and the length of a whole prompt that costs as
    much attention (a piece from a to b of a prompt: sqrt(b^2 - a^2)).
    completion_run: one entry per sample: the run at whose end its response is there.
    recomputed_tokens: of preempted sequences, lost from the cache. reused_tokens: of prompts, found in it (what a
    preempted sequence finds of its own counts as neither).
    idle_seconds: before each run, with nothing to do but to wait for tools (see `turns.py`).
    tool_calls, tool_seconds: calls of tools, and what they took together, waiting for their turn included.
    """

    steps: np.ndarray
    decodes: np.ndarray
    context_tokens: np.ndarray
    prompt_tokens: np.ndarray
    sampled: np.ndarray
    running: np.ndarray
    chunk_run: np.ndarray
    chunk_tokens: np.ndarray
    completion_run: np.ndarray
    preemptions: int = 0
    recomputed_tokens: int = 0
    reused_tokens: int = 0
    progress: Progress = ONE_TOKEN
    idle_seconds: np.ndarray = field(default_factory=lambda: np.zeros(1))
    tool_calls: int = 0
    tool_seconds: float = 0.0

    def cut(self, breaks: np.ndarray) -> tuple[Runs, np.ndarray]:
        """Cut where the context of the mean sequence passes one of `breaks` (rising, in tokens); and where in the
        result each run begins."""
        whole = np.arange(len(self.steps))
        gain = self.progress.advance
        context = self.context_tokens / np.maximum(self.decodes, 1)
        if not (
            (self.decodes > 0) & (_above(breaks, context) < _above(breaks, context + gain * (self.steps - 1)))
        ).any():
            return self, whole
        before = np.clip(np.ceil((breaks[:, None] - context) / gain), 0, np.where(self.decodes > 0, self.steps, 0))
        bounds = np.vstack([np.zeros(len(whole)), before, self.steps]).astype(int).T
        lengths = np.diff(bounds)
        owner, piece = np.nonzero((lengths > 0) | ((self.steps == 0)[:, None] & (np.arange(lengths.shape[1]) == 0)))
        first = np.searchsorted(owner, whole)
        passed = self.decodes[owner] * gain * bounds[owner, piece]
        cut = replace(
            self,
            steps=lengths[owner, piece],
            decodes=self.decodes[owner],
            context_tokens=self.context_tokens[owner] + passed,
            prompt_tokens=self.prompt_tokens[owner],
            sampled=self.sampled[owner],
            running=self.running[owner],
            chunk_run=first[self.chunk_run],
        )
        return cut, first

    @property
    def mean_context_tokens(self) -> np.ndarray:
        """Attended KV tokens in the mean step of a run."""
        return np.asarray(self.context_tokens + self.decodes * self.progress.advance * (self.steps - 1) / 2)

    @property
    def computed(self) -> np.ndarray:
        """Tokens that go through the layers in a step."""
        return np.asarray(self.decodes * self.progress.width + self.prompt_tokens)


def _above(breaks: np.ndarray, context: np.ndarray) -> np.ndarray:
    return np.searchsorted(breaks, context, side="right")


def static_runs(
    prompt_tokens: np.ndarray,
    response_tokens: np.ndarray,
    batch_samples: int | None = None,
    *,
    until: Sequence[int] | None = None,
    pieces: int = 16,
) -> Runs:
    """Padded batches one after another, each until its longest response has ended (`generate` of Hugging Face).

    Prompts are padded to the longest of the batch, finished rows are computed on. until: responses go on to so many
    tokens, one entry per batch (other ranks of a ZeRO-3 domain may need longer). A batch is cut into at least `pieces`
    runs (a transfer beside it may be longer than the first steps and shorter than the last).
    """
    builder = _Builder(len(prompt_tokens))
    starts = range(0, len(prompt_tokens), batch_samples or max(len(prompt_tokens), 1))
    for number, start in enumerate(starts):
        batch = np.arange(start, min(start + (batch_samples or len(prompt_tokens)), len(prompt_tokens)))
        rows, prompt, responses = len(batch), int(prompt_tokens[batch].max()), response_tokens[batch]
        longest = int(until[number]) if until is not None else int(responses.max())
        builder.add(1, 0, 0, rows * prompt, rows, rows, chunks=[prompt] * rows)
        # A row ends after `response` tokens; the first of them comes from the prefill.
        ends = np.unique(np.concatenate([responses, np.linspace(1, longest, pieces + 1).astype(int)]))
        ends = ends[(ends > 1) & (ends <= longest)]
        begins = np.concatenate([[1], ends])[: len(ends)]
        running = rows - np.searchsorted(np.sort(responses), begins, side="right")
        for begin, end, active in zip(begins.tolist(), ends.tolist(), running.tolist(), strict=True):
            builder.add(end - begin, rows, rows * (prompt + begin), 0, rows, active)
        builder.completion_run[batch] = len(builder.rows) - 1
    return builder.runs()


def continuous_runs(
    prompt_tokens: np.ndarray,
    response_tokens: np.ndarray,
    *,
    max_sequences: int,
    step_tokens: int,
    block_tokens: int = 16,
    kv_blocks: int | None = None,
    chunked_prefill: bool = True,
    padded: bool = False,
    groups: np.ndarray | None = None,
    progress: Progress = ONE_TOKEN,
    state_blocks: int = 0,
) -> Runs:
    """Continuous batching with a paged KV cache of `kv_blocks` (None: unlimited), samples admitted in order.

    step_tokens: at most so many tokens in a step (without chunked prefill: of prompts, and one prompt always).
    padded: every decoding sequence attends to as many tokens as the longest (a cache of rows and columns).
    groups: with prefix caching, the prompt of each sample; samples of one group have the same. None: without.
    progress: of a sequence
    in a decode step. state_blocks: that a sequence needs besides those of its tokens.
    Raises DoesNotFit when a sequence alone exceeds the cache.
    """
    return _Scheduler(
        prompt_tokens,
        response_tokens,
        max_sequences,
        step_tokens,
        block_tokens,
        kv_blocks,
        chunked_prefill,
        padded,
        groups,
        progress,
        state_blocks,
    ).run()


# A run: steps, and of one step decodes, context, prompt tokens, sampled, running (see `Runs`); contexts are in ticks.
Row = tuple[int, int, int, int, int, int]


class _Builder:
    """Collects runs row by row; contexts are in ticks."""

    def __init__(self, samples: int, progress: Progress = ONE_TOKEN) -> None:
        self.progress = progress
        self.rows: list[Row] = []
        self.chunk_run: list[int] = []
        self.chunk_tokens: list[float] = []
        self.completion_run = np.zeros(samples, dtype=int)
        self.idle_seconds: dict[int, float] = {}  # before a run

    def add(
        self, steps: int, decodes: int, context: int, prompt: int, sampled: int, running: int,
        chunks: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.chunk_run += [len(self.rows)] * len(chunks)
        self.chunk_tokens += chunks
        self.rows.append((steps, decodes, context, prompt, sampled, running))

    def runs(self, preemptions: int = 0, recomputed_tokens: int = 0, reused_tokens: int = 0) -> Runs:
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, 6).T
        return replace(
            self.decoding(rows[0], rows),
            chunk_run=np.array(self.chunk_run, dtype=int),
            chunk_tokens=np.array(self.chunk_tokens, dtype=float),
            completion_run=self.completion_run,
            preemptions=preemptions,
            recomputed_tokens=recomputed_tokens,
            reused_tokens=reused_tokens,
            idle_seconds=np.array([self.idle_seconds.get(run, 0.0) for run in range(len(self.rows))]),
        )

    def decoding(self, steps: np.ndarray, rows: np.ndarray) -> Runs:
        """So many steps of runs without prompts; rows: as they are kept here, one column per run."""
        _, decodes, context, prompt, sampled, running = rows
        if self.progress.unit > 1:
            context = context / self.progress.unit
        none = np.zeros(0, dtype=int)
        return Runs(
            steps, decodes, context, prompt, sampled, running, none, none.astype(float), none, progress=self.progress
        )

    def last_run(self) -> tuple[Row, list[float]]:
        """With the pieces of prompts in it."""
        return self.rows[-1], self.chunk_tokens[bisect_left(self.chunk_run, len(self.rows) - 1) :]


class _Scheduler:
    """State of one continuous engine.

    A decoding sequence i has `base[i] + clock` ticks of tokens in the cache, with the clock at what all have gained so
    far. It needs a new block when, drafts included, that is a multiple of the block size: `crossing[r]` counts the
    sequences that do when the clock is -r modulo the ticks of a block.
    `shared[i]` blocks of sample i are those of every running sequence with the same `group`, of which there are
    `members`.
    queue: the free blocks, where what is in them can be found again; None: nothing is. claims: of samples, how many of
    their shared blocks have been theirs before: to find them again saves nothing, to miss them costs. left: (prompt,
    blocks) of those whose last running response has left in this run.
    """

    def __init__(
        self, prompt: np.ndarray, response: np.ndarray, max_sequences: int, step_tokens: int, block: int,
        blocks: int | None, chunked_prefill: bool, padded: bool, groups: np.ndarray | None = None,
        progress: Progress = ONE_TOKEN, state_blocks: int = 0,
    ) -> None:  # fmt: skip
        self.prompt: list[int] = prompt.tolist()
        self.response: list[int] = response.tolist()
        self.block, self.chunked, self.padded = block, chunked_prefill, padded
        self.progress, self.drafts, self.state_blocks = progress, progress.width - 1, state_blocks
        self.block_ticks = block * progress.unit
        self.caching = groups is not None
        self.group: list[int] = [0] * len(prompt) if groups is None else groups.tolist()
        self.shared = self._shareable(self.prompt)
        self.members: Counter[int] = Counter()
        # The last token is drawn and never computed, so it needs no room.
        need = self._needed_blocks(self.prompt, self.response, blocks)
        self.final_blocks = need
        self.free = blocks if blocks is not None else sum(need)
        self.total = self.free
        self.queue = BlockQueue(self.free) if self.caching else None
        self.claims: dict[int, int] = {}
        self.left: list[tuple[int, int]] = []
        # vLLM refuses a step budget below the number of sequences: every one must be able to decode.
        self.max_sequences, self.step_tokens = min(max_sequences, max(1, step_tokens // progress.width)), step_tokens
        self.clock = 0  # ticks in steps in which sequences decode: all but those of whole prompts
        self.waiting = list(range(len(need)))[::-1]  # the next one last
        self.running: dict[int, None] = {}  # in order of admission, the newest last
        self.partial: list[int] | None = None  # [sample, computed, to compute]: at most one, and always the newest
        self.base: dict[int, int] = {}  # the decoding ones
        self.finish: dict[int, int] = {}  # the clock after their last step
        self.ending: list[tuple[int, int]] = []  # heap of (finish, sample); entries of preempted ones are stale
        self.generated = [0] * len(need)
        self.crossing = [0] * self.block_ticks
        self.base_sum = 0
        self.builder = _Builder(len(need), progress)
        self.preemptions = self.recomputed = self.reused = 0

    def run(self) -> Runs:
        while self.waiting or self.running:
            if not self.waiting and self.partial is None and self._all_will_fit():
                self._drain()
                break
            self.advance()
        return self.builder.runs(self.preemptions, self.recomputed, self.reused)

    def advance(self, limit: int | None = None) -> None:
        """One run: until the batch changes, at most `limit` steps."""
        if self.chunked or not self._prefill_whole():
            self._decode(limit)
        self._after_run()

    def _decode(self, limit: int | None) -> None:
        """Steps of all that decode, with pieces of prompts."""
        preempted = self._make_room()
        decoding = len(self.base)
        context = self._context()
        fresh, width = self._fresh(1), self.progress.width
        self.free -= fresh
        chunks, prompt, completed = self._prefill(
            self.step_tokens - decoding * width, admit=self.chunked and not preempted
        )
        if chunks or preempted:
            steps = 1
        else:
            self.free += fresh
            steps = self._steps_until_change(limit)
        sampled = decoding * width + len(completed)
        self.builder.add(steps, decoding, context, prompt, sampled, len(self.running), chunks=chunks)
        self.clock += steps * self.progress.ticks
        for sample in completed:
            self._start_decoding(sample)
        self._retire()

    def _blocks(self, tokens: int) -> int:
        return -(-(tokens + self.drafts) // self.block) + self.state_blocks

    def _held(self, sample: int) -> int:
        """Blocks of a decoding sequence."""
        ticks = self.base[sample] + self.clock + self.drafts * self.progress.unit
        return -(-ticks // self.block_ticks) + self.state_blocks

    def _cached(self, sample: int) -> int:
        """Whole tokens in the cache of a decoding sequence."""
        return (self.base[sample] + self.clock) // self.progress.unit

    def _fresh(self, steps: int) -> int:
        """Blocks that the decoding sequences need in so many steps."""
        periods, rest = divmod(steps * self.progress.ticks, self.block_ticks)
        beyond = sum(self.crossing[-(self.clock + tick) % self.block_ticks] for tick in range(rest))
        return periods * len(self.base) + beyond

    def _shareable(self, prompts: list[int]) -> list[int]:
        """Blocks that every response to a prompt of so many tokens can use."""
        return [(tokens - 1) // self.block if self.caching else 0 for tokens in prompts]

    def _found(self, sample: int) -> int:
        """Blocks of a sample that are in the cache before it is admitted."""
        return self.shared[sample] if self.shared[sample] and self.members[self.group[sample]] else 0

    def _known(self, sample: int) -> int:
        """Tokens of a waiting sample that need not be computed when it is admitted."""
        self._settle()
        return self.block * (self._shared_now(sample) + (self.queue.own(sample) if self.queue else 0))

    def _shared_now(self, sample: int) -> int:
        """Blocks that it shares and would find, in use or not."""
        if found := self._found(sample):
            return found
        return self.queue.common(self.group[sample]) if self.queue and self.shared[sample] else 0

    def _enter(self, sample: int, tokens: int) -> int:
        """Admit a sample, for which there is room, with blocks for so many tokens -> how many of those are known."""
        known, shared, found = self._known(sample), self._shared_now(sample), self._found(sample)
        if self.queue:
            self.queue.take_own(sample)
            if not found:
                self.queue.take_common(self.group[sample])
        self.free -= self._blocks(tokens) - found
        self.members[self.group[sample]] += 1
        self.running[sample] = None
        claimed = self.claims.pop(sample, 0)
        self.recomputed += self.block * max(0, claimed - shared)
        self.reused += self.block * max(0, shared - claimed)
        self._settle()
        return known

    def _leave(self, sample: int, blocks: int, computed: int) -> int:
        """Free so many blocks of a sample that is no longer running, with so many tokens in them -> the blocks that
        others use."""
        self.members[self.group[sample]] -= 1
        kept = self._found(sample)
        self.free += blocks - kept
        common = min(self.shared[sample], computed // self.block)
        if common and not kept:
            self.left.append((self.group[sample], common))
        return kept

    def _after_run(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """What nobody who runs has in common any more comes to the end of the queue, and then the rest."""
        self._give_back_shared()
        self._settle()

    def _give_back_shared(self) -> None:
        if self.queue:
            for prompt, blocks in sorted(self.left):
                self.queue.give_common(prompt, blocks)
        self.left = []

    def _settle(self) -> None:
        if self.queue:
            self.recomputed += self.block * self.queue.settle(self.free)

    def _needed_blocks(self, prompts: list[int], responses: list[int], blocks: int | None) -> list[int]:
        """Of sequences at their full length; DoesNotFit where one has no room."""
        beyond = -(-(self.progress.ticks - 1) // self.progress.unit)  # what the last step may draw too many
        need = [self._blocks(p + r - 1 + beyond) for p, r in zip(prompts, responses, strict=True)]
        if blocks is not None and need and max(need) > blocks:
            longest = int(np.argmax(need))
            raise DoesNotFit(
                f"the KV cache of an engine has {blocks} blocks of {self.block} tokens, but a sequence of "
                f"{prompts[longest]} + {responses[longest]} tokens needs {need[longest]}"
            )
        return need

    def _context(self) -> int:
        """Ticks of KV tokens that the decoding sequences attend to in this step."""
        bases = max(self.base.values(), default=0) * len(self.base) if self.padded else self.base_sum
        return bases + len(self.base) * (self.clock + self.progress.width * self.progress.unit)

    def _prefill_whole(self) -> bool:
        """A step of whole prompts, if any can be admitted."""
        budget, chunks, admitted = self.step_tokens, list[float](), list[int]()
        while self.waiting and len(self.running) < self.max_sequences:
            sample = self.waiting[-1]
            length = self._length(sample)
            count = length - self._known(sample)
            if self._blocks(length) - self._found(sample) > self.free or (chunks and count > budget):
                break
            budget -= count
            chunks.append(_piece(self._enter(sample, length), length))
            admitted.append(self.waiting.pop())
        if chunks:
            computed = self.step_tokens - budget
            self.builder.add(1, 0, 0, computed, len(chunks), len(self.running), chunks=chunks)
            for sample in admitted:
                self._start_decoding(sample)
            self._retire()
        return bool(chunks)

    def _length(self, sample: int) -> int:
        """Tokens that must be in the cache before it decodes."""
        return self.prompt[sample] + self.generated[sample]

    def _make_room(self) -> bool:
        """Preempt the newest until every other decoding sequence can be given the block that it needs in this step."""
        preempted = False
        while self._fresh(1) > self.free:
            self._put_back()
            self.preemptions += 1
            preempted = True
        return preempted

    def _put_back(self, keeps: bool = True) -> None:
        """The newest sequence to the head of the queue; its cache is lost, or may be found again."""
        self._settle()
        sample, _ = self.running.popitem()
        if self.partial is not None and self.partial[0] == sample:
            computed, held = self.partial[1], self._blocks(self.partial[2])
            self.partial = None
        else:
            computed, held = self._cached(sample), self._held(sample)
            self.generated[sample] = computed - self.prompt[sample] + 1
            self._stop_decoding(sample)
        kept = self._leave(sample, held, computed)
        if self.queue and keeps:
            kept = self._keep(sample, kept, computed)
        self.recomputed += computed - kept * self.block
        self.waiting.append(sample)

    def _keep(self, sample: int, in_use: int, computed: int) -> int:
        """Queue the blocks of a preempted sample, the last one first -> those that it may find again."""
        assert self.queue is not None
        whole, shared = computed // self.block, self.shared[sample]
        own, common = max(0, whole - shared), in_use or min(shared, whole)
        self.queue.give_unwanted(self.free - self.queue.total - own - (0 if in_use else common))
        self.queue.give_own(sample, own)
        self._give_back_shared()
        self.claims[sample] = common = min(common, whole)
        return common + own

    def _prefill(self, budget: int, admit: bool) -> tuple[list[float], int, list[int]]:
        """Compute prompts within the budget -> (equivalent lengths of the pieces, tokens, samples now complete)."""
        chunks: list[float] = []
        tokens, completed = 0, []
        while budget > 0:
            if self.partial is None:
                if not (admit and self.waiting and len(self.running) < self.max_sequences):
                    break
                sample = self.waiting[-1]
                length = self._length(sample)
                if self._blocks(length) - self._found(sample) > self.free:
                    break
                self.waiting.pop()
                self.partial = [sample, self._enter(sample, length), length]
            sample, computed, length = self.partial
            take = min(budget, length - computed)
            chunks.append(_piece(computed, computed + take))
            budget, tokens = budget - take, tokens + take
            self.partial[1] += take
            if computed + take == length:
                completed.append(sample)
                self.partial = None
        return chunks, tokens, completed

    def _steps_until_change(self, limit: int | None) -> int:
        """Steps that only decode: until a sequence ends or the blocks run out; takes the blocks they need."""
        self._drop_stale()
        steps, decoding = (self.ending[0][0] - self.clock) // self.progress.ticks, len(self.base)
        steps = steps if limit is None else min(steps, limit)
        needed = self._fresh(steps)
        if needed > self.free:
            # In each period of `block_ticks` every sequence needs one block; then walk through the last one.
            periods = self.free // decoding
            ticks, needed = periods * self.block_ticks, periods * decoding
            while (more := self.crossing[-(self.clock + ticks) % self.block_ticks]) <= self.free - needed:
                ticks, needed = ticks + 1, needed + more
            steps = ticks // self.progress.ticks
            needed = self._fresh(steps)
        self.free -= needed
        return steps

    def _start_decoding(self, sample: int) -> None:
        """Its prompt is in the cache and one more token is drawn."""
        cached = self._length(sample)
        self.generated[sample] += 1
        base = cached * self.progress.unit - self.clock
        self.base[sample] = base
        self.base_sum += base
        self.crossing[self._phase(base)] += 1
        left = (self.response[sample] - self.generated[sample]) * self.progress.unit
        self.finish[sample] = self.clock + -(-left // self.progress.ticks) * self.progress.ticks
        heapq.heappush(self.ending, (self.finish[sample], sample))

    def _stop_decoding(self, sample: int) -> None:
        base = self.base.pop(sample)
        self.base_sum -= base
        self.crossing[self._phase(base)] -= 1
        del self.finish[sample]

    def _phase(self, base: int) -> int:
        return (base + self.drafts * self.progress.unit) % self.block_ticks

    def _retire(self) -> None:
        """Sequences whose last token was drawn give their blocks back."""
        self._settle()
        self._drop_stale()
        while self.ending and self.ending[0][0] <= self.clock:
            _, sample = heapq.heappop(self.ending)
            del self.running[sample]
            self._leave(sample, self._held(sample), self._cached(sample))
            self._stop_decoding(sample)
            self._complete(sample)
            self._drop_stale()

    def _complete(self, sample: int) -> None:
        self.builder.completion_run[sample] = len(self.builder.rows) - 1

    def _drop_stale(self) -> None:
        while self.ending and self.finish.get(self.ending[0][1]) != self.ending[0][0]:
            heapq.heappop(self.ending)

    def _all_will_fit(self) -> bool:
        """Nothing can be preempted any more, even if every running sequence had reached its full length at once."""
        needed = sum(self.final_blocks[sample] for sample in self.running)
        if self.caching:
            by_group = {self.group[sample]: self.shared[sample] for sample in self.running}
            needed += sum(by_group.values()) - sum(self.shared[sample] for sample in self.running)
        return needed <= self.total

    def _drain(self) -> None:
        """The rest, when nothing waits and everything fits: one run between two completions."""
        samples = np.fromiter(self.running, dtype=int, count=len(self.running))
        finish = np.array([self.finish[sample] for sample in samples.tolist()], dtype=int)
        bases = np.array([self.base[sample] for sample in samples.tolist()], dtype=int)
        order = np.argsort(finish, kind="stable")
        ends, first = np.unique(finish[order], return_index=True)
        begins = np.concatenate([[self.clock], ends[:-1]])
        # Sequences with a later end, and the sum of their bases, at each begin.
        decoding = len(samples) - first
        if self.padded:
            remaining = np.maximum.accumulate(bases[order][::-1])[::-1][first] * decoding
        else:
            remaining = np.cumsum(bases[order][::-1])[::-1][first]
        width, ticks = self.progress.width, self.progress.ticks
        context = remaining + decoding * (begins + width * self.progress.unit)
        before = len(self.builder.rows)
        zeros = [0] * len(ends)
        steps = (ends - begins) // ticks
        columns = steps.tolist(), decoding.tolist(), context.tolist(), zeros, (decoding * width).tolist()
        self.builder.rows += zip(*columns, decoding.tolist(), strict=True)
        self.builder.completion_run[samples] = before + np.searchsorted(ends, finish)


def _piece(begin: int, end: int) -> float:
    """The length of a whole prompt that costs as much attention as tokens from `begin` to `end` of one."""
    return float((end**2 - begin**2) ** 0.5)
