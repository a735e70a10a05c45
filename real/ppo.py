"""Arithmetic of RL on samples: rewards, advantages, clipped losses; and how samples become batches and messages.

A sample is a dict of tensors: `tokens` and `mask` (1 prompt, 2 response) for every token; `log_probs`, `ref_log_probs`,
`values` and `rewards` for the response's tokens; `score`, one number. The value of a token is the critic's judgement of
what is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Sample = dict[str, Tensor]
Samples = dict[int, Tensor]  # of one field, by the sample's number

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
    rewards = torch.zeros(int((sample["mask"] == RESPONSE).sum()))
    if kl_coefficient:
        rewards -= kl_coefficient * (sample["log_probs"] - sample["ref_log_probs"])
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


def with_advantages(samples: dict[int, Sample], discount: float, gae_lambda: float) -> dict[int, Sample]:
    """The samples with `advantages` and `returns`, from their rewards and values."""
    if not samples:
        return {}
    columns = packed(list(samples.values()), ("rewards", "values"))
    both = zip(*advantages(columns["rewards"], columns["values"], discount, gae_lambda), strict=True)
    lengths = {s: len(x["values"]) for s, x in samples.items()}
    return {
        s: x | {"advantages": a[: lengths[s]], "returns": r[: lengths[s]]}
        for (s, x), (a, r) in zip(samples.items(), both, strict=True)
    }


def relative_advantages(name: str, rewards: Samples, responses_per_prompt: int, discount: float) -> Samples:
    """Advantages of response tokens without a critic, from the `rewards` of all samples of an update.

    name: a file of `rlhfsim/algorithms`. Formulas and epsilons are those of verl's trainer/ppo/core_algos.py; where it
    normalises over the batch, here it is the update's mini-batch.
    """
    if name == "reinforce_plus_plus":
        return _normalised({s: advantages(r, torch.zeros_like(r), discount, 1.0)[0] for s, r in rewards.items()})
    found: Samples = {}
    for _, numbers in groupby(sorted(rewards), key=lambda sample: sample // responses_per_prompt):
        prompt = list(numbers)
        totals = torch.stack([rewards[s].sum() for s in prompt])
        relative = totals - totals.mean()
        if name == "rloo":  # against the mean of the others
            relative *= len(prompt) / (len(prompt) - 1)
        if name in ("grpo", "dapo"):
            relative /= totals.std() + 1e-6
        found |= {s: x.expand_as(rewards[s]) for s, x in zip(prompt, relative, strict=True)}
    return _normalised(found) if name == "reinforce_plus_plus_baseline" else found


def _normalised(found: Samples) -> Samples:
    everything = torch.cat(list(found.values()))
    return {s: (x - everything.mean()) * (everything.var() + 1e-8).rsqrt() for s, x in found.items()}


def divergence(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """From the reference, estimated without bias and never negative (Schulman, "Approximating KL Divergence", k3)."""
    return ((ref_log_probs - log_probs).exp() - (ref_log_probs - log_probs) - 1).sum()


def policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, clip: float) -> Tensor:
    ratio = (log_probs - old_log_probs).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
