"""Responses of real runs that outlive firings: which are begun, which fill a chunk, which are thrown away.

All ranks of a place keep the same books, of what each has told the others, and therefore decide the same. How many
responses may be begun is one rule for simulated and real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .graph import Stage, StageGraph

PROMPT_TOKENS, NOISE, VALIDATION = 10, 11, 12  # streams of random numbers, apart from those of the lengths
NOISE_TABLE = 1 << 20  # draws of noise, read from an offset per token: far cheaper than as many draws per token


@dataclass
class Request:
    """One response to be generated: its prompt, where it ends at the latest, its noise, and what there is of it yet.

    versions: of the weights that drew each token. ended_ns: when it had ended, by the clock of the rank that drew it.
    """

    sample: int
    prompt: np.ndarray
    limit: int
    noise: np.ndarray
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    ended_ns: int | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def text(self) -> np.ndarray:
        """The prompt and all tokens drawn so far."""
        return np.concatenate([self.prompt, np.array(self.tokens, dtype=self.prompt.dtype)])

    def outline(self) -> Request:
        """Which weights have drawn how much of it, and nothing else."""
        nothing = np.zeros(0, dtype=int)
        return replace(self, prompt=nothing, noise=nothing, tokens=[], log_probs=[])


def request(key: Sequence[int], sample: int, prompt: int, prompt_tokens: int, limit: int, vocabulary: int) -> Request:
    """The request of a sample; `key` is seed and iteration (and whatever tells one use of a sample from another)."""
    text = np.random.default_rng((*key, PROMPT_TOKENS, prompt)).integers(vocabulary, size=prompt_tokens)
    noise = np.random.default_rng((*key, NOISE, sample)).integers(NOISE_TABLE, size=limit)
    return Request(sample, text, limit, noise)


def to_begin(
    graph: StageGraph, stage: Stage, samples: int, chunk_samples: int, version: int, begun: int, handed_over: int
) -> int:
    """How many responses a stage may begin when a firing starts, or goes on (none, if below 1).

    samples: of an iteration; chunk_samples: of the firing. version: of the weights on the engines. begun: responses so
    far, without those that were thrown away. With `keep` it is AReaL's rule (areal/core/staleness_manager.py
    @08911ddf): at most (version + staleness + 1) batches.
    """
    if stage.unfinished == "keep":
        return (version + graph.staleness(stage.name) + 1) * samples - begun
    outstanding = begun - handed_over
    if stage.oversampling == 1:
        return chunk_samples - outstanding
    return round(stage.oversampling * len(stage.serves) / graph.lanes / stage.chunks * samples) - outstanding


class Held:
    """Responses that are begun and not handed over, by number (`Request.sample`), as far as all ranks know them.

    per_prompt: responses to a prompt, which all count when the last of them has ended. version: of the weights on the
    engines. begun (without those that were thrown away), handed_over: responses so far.
    """

    def __init__(self, per_prompt: int) -> None:
        self.per_prompt, self.known = per_prompt, dict[int, Request]()
        self.version = self.begun = self.handed_over = self._next = 0

    def numbers(self, count: int) -> range:
        """Of so many new responses, in whole prompts."""
        whole = max(0, -(-count // self.per_prompt)) * self.per_prompt
        self._next += whole
        return range(self._next - whole, self._next)

    def begin(self, new: Sequence[Request]) -> None:
        self.begun += len(new)
        self.known |= {r.sample: r for r in new}

    def unfinished(self) -> list[Request]:
        return [r for r in self.known.values() if r.ended_ns is None]

    def ready(self) -> list[Request]:
        """Responses whose whole prompts have ended, in the order in which these did."""
        waiting = {r.sample // self.per_prompt for r in self.unfinished()}
        done = [r for n, r in self.known.items() if n // self.per_prompt not in waiting]
        last: dict[int, int] = {}
        for r in done:
            prompt = r.sample // self.per_prompt
            last[prompt] = max(last.get(prompt, 0), r.ended_ns or 0)
        return sorted(done, key=lambda r: (last[r.sample // self.per_prompt], r.sample))

    def hand_over(self, count: int) -> list[Request]:
        """The first that are ready, in the order of their numbers (as slime sorts a batch)."""
        taken = sorted(r.sample for r in self.ready()[:count])
        self.handed_over += len(taken)
        return [self.known.pop(number) for number in taken]

    def throw_away(self, before: int | None = None) -> list[Request]:
        """All prompts, or those with a response that weights older than version `before` began."""
        old = {
            n // self.per_prompt
            for n, r in self.known.items()
            if before is None or (r.versions and r.versions[0] < before)
        }
        gone = [self.known.pop(n) for n in list(self.known) if n // self.per_prompt in old]
        self.begun -= len(gone)
        return gone


def ages(handed_over: Sequence[Request], version: int) -> dict[str, float]:
    """By how many versions the weights that train these responses are newer than those that drew them (`Span.counts`).

    Mean age of a response by its tokens, summed over responses; age of the oldest token.
    """
    return {
        "samples": float(len(handed_over)),
        "age_steps": float(sum(version - np.mean(r.versions) for r in handed_over)),
        "oldest_steps": float(max((version - min(r.versions) for r in handed_over), default=0)),
    }
