"""Which sequences an inference engine processes in which step: integers only, no seconds, no hardware.

What a step does depends on tokens, not on time: all samples of a rollout are there at its start. So the schedule comes
first, as a few `Runs` of steps that are alike, and `generation.py` gives seconds to all of them at once. Between two
changes of the batch (a completion, an admission, a preemption) nothing is simulated: only the context grows, by one
token per sequence and step.

The continuous scheduler follows vLLM's (docs.vllm.ai, "Optimization and Tuning": chunked prefill, preemption by
recomputation; vllm/v1/core/sched/scheduler.py): decodes come first, then prompts in order, cut to what is left of the
step's token budget; when the KV blocks run out, the most recently admitted sequence is preempted, put back to the head
of the queue and computed again; no prompt is admitted in a step that preempted. A prompt is admitted when blocks for
all of it are free (vLLM's V1 engine asks only for those of its first chunk).

With prefix caching the whole blocks of a prompt, but for the one with its last token (which is computed again to draw
from it; vllm/v1/core/kv_cache_manager.py, get_computed_blocks), are there once for all of its responses that run. A
response that is admitted while another one runs computes the rest only, also in the step that computes the other one
(V1 enters blocks into its table as they are scheduled). Blocks that nobody uses count as free and gone; vLLM finds them
again until it needs the room, and the tokens of a preempted response as well.

Without chunked prefill prompts go first and whole, in steps of their own in which nobody decodes, as in vLLM before V1
(docs.vllm.ai, v0.6, "Performance and Tuning": the scheduler prioritises prefills by default, and does not batch them
with decodes).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhfsim.errors import DoesNotFit


@dataclass(frozen=True)
class Runs:
    """Steps of one engine in order, alike ones together. Arrays, one entry per run; counts are those of one step.

    steps: how many. decodes: sequences that are given one token more. context_tokens: KV tokens that they attend to in
    the first step of the run, themselves included; `decodes` more in each later step. prompt_tokens: tokens of prompts
    (and of preempted sequences) computed; only runs of one step have any. sampled: tokens drawn, padding rows included.
    running: sequences that are admitted and not yet at their end.
    chunk_run, chunk_tokens: one entry per piece of a prompt: its run, and the length of a whole prompt that costs as
    much attention (a piece from a to b of a prompt: sqrt(b^2 - a^2)).
    completion_run: one entry per sample: the run at whose end its response is there.
    recomputed_tokens: of preempted sequences, lost from the cache. reused_tokens: of prompts, found in it.
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

    @property
    def mean_context_tokens(self) -> np.ndarray:
        """Attended KV tokens in the mean step of a run."""
        return np.asarray(self.context_tokens + self.decodes * (self.steps - 1) / 2)


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
) -> Runs:
    """Continuous batching with a paged KV cache of `kv_blocks` (None: unlimited), samples admitted in order.

    step_tokens: at most so many tokens in a step (without chunked prefill: of prompts, and one prompt always).
    padded: every decoding sequence attends to as many tokens as the longest (a cache of rows and columns).
    groups: with prefix caching, the prompt of each sample; samples of one group have the same.
    Raises DoesNotFit when a sequence alone exceeds the cache.
    """
    return _Scheduler(  # fmt: skip
        prompt_tokens, response_tokens, max_sequences, step_tokens, block_tokens, kv_blocks, chunked_prefill, padded,
        groups,
    ).run()


class _Builder:
    """Collects runs row by row."""

    def __init__(self, samples: int) -> None:
        self.rows: list[tuple[int, int, int, int, int, int]] = []
        self.chunk_run: list[int] = []
        self.chunk_tokens: list[float] = []
        self.completion_run = np.zeros(samples, dtype=int)

    def add(
        self, steps: int, decodes: int, context: int, prompt: int, sampled: int, running: int,
        chunks: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.chunk_run += [len(self.rows)] * len(chunks)
        self.chunk_tokens += chunks
        self.rows.append((steps, decodes, context, prompt, sampled, running))

    def runs(self, preemptions: int = 0, recomputed_tokens: int = 0, reused_tokens: int = 0) -> Runs:
        steps, decodes, context, prompt, sampled, running = np.array(self.rows, dtype=np.int64).reshape(-1, 6).T
        return Runs(
            steps, decodes, context, prompt, sampled, running,
            np.array(self.chunk_run, dtype=int), np.array(self.chunk_tokens, dtype=float),
            self.completion_run, preemptions, recomputed_tokens, reused_tokens,
        )  # fmt: skip


class _Scheduler:
    """State of one continuous engine.

    A decoding sequence i has `base[i] + step` tokens in the cache before the step with that number, and needs a new
    block when that is a multiple of the block size: `crossing[r]` counts the sequences whose base is r modulo it.
    `shared[i]` blocks of sample i are those of every running sequence with the same `group`, of which there are
    `members`.
    """

    def __init__(
        self, prompt: np.ndarray, response: np.ndarray, max_sequences: int, step_tokens: int, block: int,
        blocks: int | None, chunked_prefill: bool, padded: bool, groups: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.prompt, self.response = prompt.tolist(), response.tolist()
        self.block, self.chunked, self.padded = block, chunked_prefill, padded
        self.caching = groups is not None
        self.group: list[int] = [0] * len(prompt) if groups is None else groups.tolist()
        self.shared = self._shareable(self.prompt)
        self.members: Counter[int] = Counter()
        # The last token is drawn and never computed, so it needs no room.
        need = self._needed_blocks(self.prompt, self.response, blocks)
        self.final_blocks = need
        self.free = blocks if blocks is not None else sum(need)
        self.total = self.free
        # vLLM refuses a step budget below the number of sequences: every one must be able to decode.
        self.max_sequences, self.step_tokens = min(max_sequences, step_tokens), step_tokens
        self.step = 0  # steps in which sequences decode: all but those of whole prompts
        self.waiting = list(range(len(need)))[::-1]  # the next one last
        self.running: dict[int, None] = {}  # in order of admission, the newest last
        self.partial: list[int] | None = None  # [sample, computed, to compute]: at most one, and always the newest
        self.base: dict[int, int] = {}  # the decoding ones
        self.finish: dict[int, int] = {}  # the step after their last
        self.ending: list[tuple[int, int]] = []  # heap of (finish, sample); entries of preempted ones are stale
        self.generated = [0] * len(need)
        self.crossing = [0] * block
        self.base_sum = 0
        self.builder = _Builder(len(need))
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
        if not self.chunked and self._prefill_whole():
            return
        preempted = self._make_room()
        decoding = len(self.base)
        context = self._context()
        fresh = self.crossing[-self.step % self.block]
        self.free -= fresh
        chunks, prompt, completed = self._prefill(self.step_tokens - decoding, admit=self.chunked and not preempted)
        if chunks or preempted:
            steps = 1
        else:
            self.free += fresh
            steps = self._steps_until_change(limit)
        self.builder.add(steps, decoding, context, prompt, decoding + len(completed), len(self.running), chunks=chunks)
        self.step += steps
        for sample in completed:
            self._start_decoding(sample)
        self._retire()

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _shareable(self, prompts: list[int]) -> list[int]:
        """Blocks that every response to a prompt of so many tokens can use."""
        return [(tokens - 1) // self.block if self.caching else 0 for tokens in prompts]

    def _found(self, sample: int) -> int:
        """Blocks of a sample that are in the cache before it is admitted."""
        return self.shared[sample] if self.shared[sample] and self.members[self.group[sample]] else 0

    def _enter(self, sample: int, tokens: int) -> int:
        """Admit a sample, for which there is room, with blocks for so many tokens -> how many of those are computed."""
        found = self._found(sample)
        self.free -= self._blocks(tokens) - found
        self.members[self.group[sample]] += 1
        self.running[sample] = None
        self.reused += found * self.block
        return found * self.block

    def _leave(self, sample: int, tokens: int) -> int:
        """Free the blocks of a sample, no longer running, with so many tokens -> how many of those stay in the cache."""
        self.members[self.group[sample]] -= 1
        kept = self._found(sample)
        self.free += self._blocks(tokens) - kept
        return kept * self.block

    def _needed_blocks(self, prompts: list[int], responses: list[int], blocks: int | None) -> list[int]:
        """Of sequences at their full length; DoesNotFit where one has no room."""
        need = [self._blocks(p + r - 1) for p, r in zip(prompts, responses, strict=True)]
        if blocks is not None and need and max(need) > blocks:
            longest = int(np.argmax(need))
            raise DoesNotFit(
                f"the KV cache of an engine has {blocks} blocks of {self.block} tokens, but a sequence of "
                f"{prompts[longest]} + {responses[longest]} tokens needs {need[longest]}"
            )
        return need

    def _context(self) -> int:
        """KV tokens that the decoding sequences attend to in this step."""
        bases = max(self.base.values(), default=0) * len(self.base) if self.padded else self.base_sum
        return bases + len(self.base) * (self.step + 1)

    def _prefill_whole(self) -> bool:
        """A step of whole prompts, if any can be admitted."""
        budget, chunks, admitted = self.step_tokens, list[float](), list[int]()
        while self.waiting and len(self.running) < self.max_sequences:
            sample = self.waiting[-1]
            length, found = self.prompt[sample] + self.generated[sample], self._found(sample)
            count = length - found * self.block
            if self._blocks(length) - found > self.free or (chunks and count > budget):
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

    def _make_room(self) -> bool:
        """Preempt the newest until every other decoding sequence can be given the block that it needs in this step."""
        preempted = False
        while self.crossing[-self.step % self.block] > self.free:
            self._put_back()
            self.preemptions += 1
            preempted = True
        return preempted

    def _put_back(self) -> None:
        """The newest sequence to the head of the queue; its cache is lost."""
        sample, _ = self.running.popitem()
        if self.partial is not None and self.partial[0] == sample:
            self.recomputed += self.partial[1] - self._leave(sample, self.partial[2])
            self.partial = None
        else:
            cached = self.base[sample] + self.step
            self.generated[sample] = cached - self.prompt[sample] + 1
            self.recomputed += cached - self._leave(sample, cached)
            self._stop_decoding(sample)
        self.waiting.append(sample)

    def _prefill(self, budget: int, admit: bool) -> tuple[list[float], int, list[int]]:
        """Compute prompts within the budget -> (equivalent lengths of the pieces, tokens, samples now complete)."""
        chunks: list[float] = []
        tokens, completed = 0, []
        while budget > 0:
            if self.partial is None:
                if not (admit and self.waiting and len(self.running) < self.max_sequences):
                    break
                sample = self.waiting[-1]
                length = self.prompt[sample] + self.generated[sample]
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
        steps, decoding = self.ending[0][0] - self.step, len(self.base)
        steps = steps if limit is None else min(steps, limit)
        periods, rest = divmod(steps, self.block)
        needed = periods * decoding + sum(self.crossing[-(self.step + i) % self.block] for i in range(rest))
        if needed > self.free:
            # In each period of `block` steps every sequence needs one block; then walk through the last one.
            periods = self.free // decoding
            steps, needed = periods * self.block, periods * decoding
            while (more := self.crossing[-(self.step + steps) % self.block]) <= self.free - needed:
                steps, needed = steps + 1, needed + more
        self.free -= needed
        return steps

    def _start_decoding(self, sample: int) -> None:
        """Its prompt is in the cache and one more token is drawn."""
        cached = self.prompt[sample] + self.generated[sample]
        self.generated[sample] += 1
        base = cached - self.step
        self.base[sample] = base
        self.base_sum += base
        self.crossing[base % self.block] += 1
        self.finish[sample] = self.step + self.response[sample] - self.generated[sample]
        heapq.heappush(self.ending, (self.finish[sample], sample))

    def _stop_decoding(self, sample: int) -> None:
        base = self.base.pop(sample)
        self.base_sum -= base
        self.crossing[base % self.block] -= 1
        del self.finish[sample]

    def _retire(self) -> None:
        """Sequences whose last token was drawn give their blocks back."""
        self._drop_stale()
        while self.ending and self.ending[0][0] <= self.step:
            _, sample = heapq.heappop(self.ending)
            del self.running[sample]
            self._leave(sample, self.base[sample] + self.step)
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
        begins = np.concatenate([[self.step], ends[:-1]])
        # Sequences with a later end, and the sum of their bases, at each begin.
        decoding = len(samples) - first
        if self.padded:
            remaining = np.maximum.accumulate(bases[order][::-1])[::-1][first] * decoding
        else:
            remaining = np.cumsum(bases[order][::-1])[::-1][first]
        context = remaining + decoding * (begins + 1)
        before = len(self.builder.rows)
        zeros = [0] * len(ends)
        columns = (ends - begins).tolist(), decoding.tolist(), context.tolist(), zeros, decoding.tolist()
        self.builder.rows += zip(*columns, decoding.tolist(), strict=True)
        self.builder.completion_run[samples] = before + np.searchsorted(ends, finish)


def _piece(begin: int, end: int) -> float:
    """The length of a whole prompt that costs as much attention as tokens from `begin` to `end` of one."""
    return float((end**2 - begin**2) ** 0.5)
