"""PPO in one process, as plainly as it can be written: fp64, one sample at a time, no cache, no batches, no DeepSpeed.

It shares with real runs the initial weights, the module, the prompts and the noise, and nothing of how work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from real import generate, models
from rlhfsim.spec.lengths import draw_lengths
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import Scenario

MiniBatches = Callable[[int], Sequence[Sequence[int]]]  # of an iteration: the samples of every update, in order


class Reference:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.algorithm, self.seed = scenario, scenario.algorithm, scenario.simulation.seed
        chosen, shared = scenario.models, scenario.models.share_actor_critic
        self.actor = self._model("actor", chosen.actor, lm=True, value=shared, train=True)
        self.critic = self.actor if shared else self._model("critic", chosen.critic, lm=False, value=True, train=True)
        self.reference = self._model("reference", chosen.reference, lm=True, value=False, train=False)
        self.reward = self._model("reward", chosen.reward, lm=False, value=True, train=False)
        self.trained = [self.actor] if shared else [self.actor, self.critic]
        self.optimizers = [self._optimizer(m) for m in self.trained]

    def _model(self, role, use, **options) -> models.Decoder:  # type: ignore[no-untyped-def]
        fp32 = use.model_copy(update={"precision": "fp32", "recompute": "none"})
        return models.build(role, fp32, self.seed, **options).double()

    def _optimizer(self, model: models.Decoder) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.algorithm.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.algorithm.learning_rate)
        return torch.optim.Adam(parameters, lr=self.algorithm.learning_rate, eps=self.algorithm.adam_epsilon)

    def run(self, iterations: int, mini_batches: MiniBatches) -> list[list[list[int]]]:
        """Train; returns the responses of every iteration."""
        responses = []
        for iteration in range(iterations):
            samples = [self._experience(*self._response(iteration, s)) for s in range(self.scenario.workload.samples)]
            responses.append([tokens[start:] for tokens, start, *_ in samples])
            for chosen in mini_batches(iteration):
                self._update([samples[s] for s in chosen])
        return responses

    # -- what a model says of a sequence ------------------------------------------------------------------

    @staticmethod
    def _hidden(model: models.Decoder, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens])
        return model.body(
            input_ids=ids, position_ids=torch.arange(len(tokens))[None], use_cache=False
        ).last_hidden_state[0]

    def _log_probs(self, model: models.Decoder, tokens: list[int], start: int) -> Tensor:
        logits = model.lm_head(self._hidden(model, tokens))  # type: ignore[misc]
        return torch.stack([logits[t - 1].log_softmax(-1)[tokens[t]] for t in range(start, len(tokens))])

    def _values(self, model: models.Decoder, tokens: list[int], start: int) -> Tensor:
        return model.value_head(self._hidden(model, tokens))[start - 1 : len(tokens) - 1, 0]  # type: ignore[misc]

    # -- an iteration -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _response(self, iteration: int, sample: int) -> tuple[list[int], int]:
        workload, vocabulary = self.scenario.workload, self.scenario.models.actor.shape.vocabulary
        prompts, lengths = draw_lengths(workload, self.seed, iteration, length_dir())
        sampled = workload.responses == "sampled"
        limit = workload.response_tokens.longest if sampled else int(lengths[sample])
        r = generate.request(
            (self.seed, iteration),
            sample,
            sample // workload.responses_per_prompt,
            int(prompts[sample]),
            limit,
            vocabulary,
        )
        noise = generate._gumbel(torch.device("cpu"), vocabulary)
        tokens = r.prompt.tolist()
        for offset in r.noise:
            logits = self.actor.lm_head(self._hidden(self.actor, tokens)[-1])  # type: ignore[misc]
            tokens.append(int((logits + noise[int(offset)]).argmax()))
            if sampled and tokens[-1] == 0:
                break
        return tokens, len(r.prompt)

    @torch.no_grad()
    def _experience(self, tokens: list[int], start: int) -> tuple[list[int], int, Tensor, Tensor, Tensor, Tensor]:
        old, values = self._log_probs(self.actor, tokens, start), self._values(self.critic, tokens, start)
        if self.algorithm.reward == "model":
            score = self.reward.value_head(self._hidden(self.reward, tokens)[-1])[0]  # type: ignore[misc]
        else:
            score = torch.tensor(np.mean([t % 2 == 0 for t in tokens[start:]]))
        rewards = self.algorithm.kl_coefficient * (self._log_probs(self.reference, tokens, start) - old)
        rewards[-1] += score
        # The advantage is a discounted sum of all later surprises, written out.
        n, discount = len(rewards), self.algorithm.discount
        surprise = [rewards[t] + (discount * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
        fade = discount * self.algorithm.gae_lambda
        advantage = torch.stack(
            [sum((fade ** (k - t) * surprise[k] for k in range(t, n)), torch.tensor(0.0)) for t in range(n)]
        )
        return tokens, start, old, values, advantage, advantage + values

    def _update(self, samples: list[tuple[list[int], int, Tensor, Tensor, Tensor, Tensor]]) -> None:
        a, policy, value, count = self.algorithm, torch.tensor(0.0), torch.tensor(0.0), 0
        for tokens, start, old, old_values, advantage, returns in samples:
            ratio = torch.exp(self._log_probs(self.actor, tokens, start) - old)
            policy = (
                policy - torch.min(ratio * advantage, ratio.clamp(1 - a.clip_ratio, 1 + a.clip_ratio) * advantage).sum()
            )
            now = self._values(self.critic, tokens, start)
            near = torch.minimum(torch.maximum(now, old_values - a.clip_values), old_values + a.clip_values)
            value = value + torch.max((now - returns) ** 2, (near - returns) ** 2).sum() / 2
            count += len(old)
        weight = a.value_coefficient if self.actor is self.critic else 1.0
        ((policy + weight * value) / count).backward()
        for model, optimizer in zip(self.trained, self.optimizers, strict=True):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(torch.sqrt(sum((g**2).sum() for g in gradients)))  # type: ignore[arg-type]
            if norm > a.gradient_clip:
                for g in gradients:
                    g *= a.gradient_clip / norm
            optimizer.step()
            optimizer.zero_grad()
