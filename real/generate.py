"""Responses, token by token, with a KV cache: static batches, or a continuous batch with sequences that come and go.

A sequence lies left-aligned in its row of the cache; the rows in use are always the first ones. A token is drawn by
Gumbel-max with noise keyed by (seed, iteration, sample, position), so the same weights give the same responses wherever
and in whatever batch a sample is generated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhfsim.rollouts import NOISE_TABLE, Request

from .models import Decoder


class Cache:
    """Keys and values of so many rows and columns (tokens), allocated once; layers call `update`."""

    def __init__(self, config: Any, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, rows, heads, columns, width)
        # zeros: what is masked is multiplied by zero, and what happens to lie in memory may be no number
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.use(slice(0))

    def use(self, rows: slice, at: Tensor | None = None, columns: int = 0) -> Cache:
        """The next pass writes the first columns of these rows, and attends to nothing else; or, with `at`, it adds one
        token to each row at its position, and attends to so many columns."""
        self.rows, self.at, self.columns = rows, at, columns
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        stored = self.layers[layer]
        if self.at is None:
            stored[0, self.rows, :, : keys.shape[2]] = keys
            stored[1, self.rows, :, : values.shape[2]] = values
            return keys, values
        rows = torch.arange(len(self.at), device=keys.device)
        stored[0, rows, :, self.at] = keys[:, :, 0]
        stored[1, rows, :, self.at] = values[:, :, 0]
        return stored[0, self.rows, :, : self.columns], stored[1, self.rows, :, : self.columns]

    def move(self, source: int, destination: int, columns: int) -> None:
        for stored in self.layers:
            stored[:, destination, :, :columns] = stored[:, source, :, :columns]


@cache
def _gumbel(device: torch.device, vocabulary: int) -> Tensor:
    """Windows into a table of Gumbel draws, one for each offset: (NOISE_TABLE, vocabulary), without copies."""
    draws = torch.empty(NOISE_TABLE + vocabulary).exponential_(generator=torch.Generator().manual_seed(0))
    return (-draws.log()).to(device).unfold(0, vocabulary, 1)


class Generation:
    """Responses to `requests` by a decoder, with hooks or without.

    rows: sequences at a time; columns: tokens that each has room for (None: what `requests` need).
    continuous: finished ones leave and waiting ones come in, at most `prefill_tokens` of prompts (or one prompt) per
        step; else a batch of `rows` runs until its longest has ended, and then the next.
    end: the token that ends a response early, None where lengths are forced. log_probs: keep those of drawn tokens.
    version: of the decoder's weights. recomputed: tokens whose keys and values were computed once more.
    """

    def __init__(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        *,
        rows: int,
        columns: int | None = None,
        continuous: bool,
        prefill_tokens: int = 1 << 30,
        end: int | None = None,
        log_probs: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.decoder, self.end, self.continuous, self.prefill_tokens = decoder, end, continuous, prefill_tokens
        self.log_probs, self.device = log_probs, torch.device(device)
        self.waiting, self.running = deque(requests), list[Request]()
        self.version = self.recomputed = 0
        if columns is None:
            rows = min(rows, len(requests))
            columns = max((len(r.prompt) for r in requests), default=1) + max((r.limit for r in requests), default=1)
        self.rows = max(1, rows)
        dtype = next(decoder.parameters()).dtype
        self.cache = Cache(decoder.body.config, self.rows, columns, dtype, self.device)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def forward_passes(self) -> int:
        """How many passes static batches of forced lengths take: one for each token of the longest of every batch."""
        left = list(self.waiting)
        return sum(max(r.limit for r in left[i : i + self.rows]) for i in range(0, len(left), self.rows))

    def submit(self, requests: Sequence[Request]) -> None:
        """More work for a continuous batch; where tokens are drawn already they are read like a prompt."""
        self.waiting += requests
        self.recomputed += sum(r.length for r in requests if r.tokens)

    def restart(self) -> None:
        """All that run leave their rows, and come in again before the others."""
        self.recomputed += sum(r.length - 1 for r in self.running)
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()

    def remove(self, samples: Collection[int]) -> None:
        """Take these out of a continuous batch, whatever they do."""
        self.waiting = deque(r for r in self.waiting if r.sample not in samples)
        self._leave(lambda r: r.sample in samples)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One pass: the prompts of whoever comes in, or else one more token for all that run. Gives what has ended.

        Without work a pass of no sample: where weights are gathered from all ranks, every rank must make every pass.
        """
        if not self.busy:
            nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.decoder(nothing, nothing, last=nothing[0])
        elif admitted := self._admitted():
            self.running += admitted
            self._prefill(admitted)
        else:
            self._decode()
        return self._retire()

    def _admitted(self) -> list[Request]:
        admitted, tokens = list[Request](), 0
        if self.running and not self.continuous:
            return admitted
        while self.waiting and len(self.running) + len(admitted) < self.rows:
            tokens += self.waiting[0].length
            if admitted and self.continuous and tokens > self.prefill_tokens:
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def _prefill(self, admitted: list[Request]) -> None:
        rows, lengths = slice(len(self.running) - len(admitted), len(self.running)), [r.length for r in admitted]
        tokens = pad_sequence([torch.from_numpy(r.text) for r in admitted], batch_first=True)
        positions = torch.arange(max(lengths), device=self.device).expand(len(admitted), -1)
        last = torch.tensor(lengths, device=self.device) - 1
        found = self.decoder(tokens.to(self.device), positions, last=last, cache=self.cache.use(rows))
        self._draw(found["logits"], admitted)

    def _decode(self) -> None:
        at = [r.length - 1 for r in self.running]  # the last token drawn has no keys yet
        positions, columns = torch.tensor(at, device=self.device), max(at) + 1
        mask = None
        if min(at) < max(at):
            mask = (torch.arange(columns, device=self.device) <= positions[:, None])[:, None, None]
        tokens = torch.tensor([[r.tokens[-1]] for r in self.running], device=self.device)
        last, cache = torch.zeros_like(positions), self.cache.use(slice(len(at)), positions, columns)
        found = self.decoder(tokens, positions[:, None], last=last, cache=cache, attention_mask=mask)
        self._draw(found["logits"], self.running)

    def _draw(self, logits: Tensor, requests: list[Request]) -> None:
        offsets = torch.tensor([r.noise[min(len(r.tokens), r.limit - 1)] for r in requests], device=self.device)
        drawn = (logits + _gumbel(self.device, logits.shape[-1])[offsets]).argmax(-1, keepdim=True)
        if self.log_probs:
            likely = logits.gather(-1, drawn).squeeze(-1) - logits.logsumexp(-1)
            for r, value in zip(requests, likely.tolist(), strict=True):
                r.log_probs.append(value)
        for r, token in zip(requests, drawn.squeeze(-1).tolist(), strict=True):
            r.tokens.append(token)
            r.versions.append(self.version)

    def _ended(self, r: Request) -> bool:
        return len(r.tokens) >= r.limit or (self.end is not None and self.end in r.tokens)

    def _retire(self) -> list[Request]:
        """A static batch leaves as a whole."""
        if self.continuous:
            return self._leave(self._ended)
        if not all(map(self._ended, self.running)):
            return []
        done, self.running = self.running, []
        for r in done:  # what was drawn beyond the end only kept the batch in step
            end = min(r.limit, r.tokens.index(self.end) + 1 if self.end in r.tokens else r.limit)
            del r.tokens[end:], r.log_probs[end:], r.versions[end:]
        return done

    def _leave(self, leaves: Callable[[Request], bool]) -> list[Request]:
        """Out of their rows one by one, the last row filling the gap."""
        gone = []
        for row in reversed(range(len(self.running))):
            if leaves(self.running[row]):
                gone.append(self.running[row])
                last = self.running.pop()
                if row < len(self.running):
                    self.running[row] = last
                    self.cache.move(len(self.running), row, last.length - 1)
        return gone


def run(generation: Generation, any_busy: Callable[[bool], bool] | None = None) -> None:
    """All steps. `any_busy` tells whether any rank that gathers weights with this one still has work."""
    while any_busy(generation.busy) if any_busy else generation.busy:
        generation.step()


def counted(passes: int) -> Callable[[bool], bool]:
    """For `run`, where all ranks know beforehand how many passes the slowest of them makes."""
    left = iter([True] * passes + [False])
    return lambda mine: next(left)
