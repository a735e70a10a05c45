"""PPO's arithmetic on samples: shaped rewards, advantages, clipped losses; and how samples become batches and messages.

A sample is a dict of tensors: `tokens` and `mask` (1 prompt, 2 response) for every token; `log_probs`, `ref_log_probs`,
`values` and `rewards` for the response's tokens; `score`, one number. The value of a token is the critic's judgement of
what is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Sample = dict[str, Tensor]

PROMPT, RESPONSE = 1, 2  # in a mask; 0 is padding
OF_RESPONSE = ("log_probs", "ref_log_probs", "values", "rewards")


def packed(samples: Sequence[Sample], fields: Sequence[str]) -> dict[str, Tensor]:
    """A message of some fields of samples: one row each, filled up with zeros."""
    if not samples:
        return {name: torch.zeros(0) for name in fields}
    rows = {name: [s[name] for s in samples] for name in fields}
    return {name: pad_sequence(x, batch_first=True) if x[0].ndim else torch.stack(x) for name, x in rows.items()}


def trimmed(sample: Sample) -> Sample:
    """Without what a message filled up; the mask tells."""
    tokens, response = int((sample["mask"] > 0).sum()), int((sample["mask"] == RESPONSE).sum())
    return {name: x if x.ndim == 0 else x[: response if name in OF_RESPONSE else tokens] for name, x in sample.items()}


class Batch(NamedTuple):
    """Samples as a decoder takes them (`inputs`). As flat indices, sample after sample: response tokens, the token
    before each (where its value is judged), and ends."""

    inputs: dict[str, Tensor | list[int]]
    responses: Tensor
    before: Tensor
    ends: Tensor


def batch(samples: Sequence[Sample], padded_to: int | None, device: torch.device | str = "cpu") -> Batch:
    """Rows of `padded_to` tokens, or with None one row of all samples without any padding."""
    lengths = [len(s["tokens"]) for s in samples]
    if padded_to:
        shape, starts = (len(samples), padded_to), range(0, len(samples) * padded_to, padded_to)
        positions = torch.arange(padded_to).expand(len(samples), -1)
    else:
        shape, starts = (1, sum(lengths)), [sum(lengths[:i]) for i in range(len(samples))]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens, responses = torch.zeros(shape, dtype=torch.long), []
    for start, s in zip(starts, samples, strict=True):
        tokens.view(-1)[start : start + len(s["tokens"])] = s["tokens"]
        responses.append(start + (s["mask"] == RESPONSE).nonzero()[:, 0])
    inputs: dict[str, Tensor | list[int]] = {"tokens": tokens.to(device), "positions": positions.to(device)}
    if not padded_to:
        inputs["segments"] = lengths
    ends = torch.tensor([start + n - 1 for start, n in zip(starts, lengths, strict=True)])
    at = torch.cat(responses).to(device)
    return Batch(inputs, at, at - 1, ends.to(device))


def share_of_even_tokens(sample: Sample) -> Tensor:
    """A reward that needs no model."""
    return (sample["tokens"][sample["mask"] == RESPONSE] % 2 == 0).float().mean()


def shaped_rewards(sample: Sample, kl_coefficient: float) -> Tensor:
    """Per response token the price of leaving the reference, and at the last the score."""
    rewards = -kl_coefficient * (sample["log_probs"] - sample["ref_log_probs"])
    rewards[-1] += sample["score"]
    return rewards


def advantages(rewards: Tensor, values: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """GAE's advantages and the returns that values should have met, along the last dimension (Schulman et al., 2016).

    Nothing comes after the last token; zeros that fill up change nothing.
    """
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    found, running = rewards + discount * after - values, torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        running = found[..., t] = found[..., t] + discount * gae_lambda * running
    return found, found + values


def with_advantages(samples: Sequence[Sample], discount: float, gae_lambda: float) -> list[Sample]:
    """The samples with `advantages` and `returns`, from their rewards and values."""
    if not samples:
        return []
    columns = packed(samples, ("rewards", "values"))
    found, returns = advantages(columns["rewards"], columns["values"], discount, gae_lambda)
    return [
        s | {"advantages": a[: len(s["values"])], "returns": r[: len(s["values"])]}
        for s, a, r in zip(samples, found, returns, strict=True)
    ]


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, clip: float) -> Tensor:
    ratio = (log_probs - old_log_probs).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
