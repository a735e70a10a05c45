"""PPO, GRPO and its kin in one process, as plainly as can be: fp64, one sample at a time, no cache, no DeepSpeed.

It shares with real runs the initial weights, the module, the prompts and the noise, and nothing of how work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from real import generate, models
from rlhfsim.rollouts import request
from rlhfsim.spec.lengths import draw_lengths
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import Scenario

MiniBatches = Callable[[int], Sequence[Sequence[int]]]  # of an iteration: the samples of every update, in order
# Of every sample of every iteration: its number among all responses, its tokens, and the versions that drew them.
Drawn = Sequence[Sequence[tuple[int, Sequence[int], Sequence[int]]]]
TIE = 1e-4  # of noisy logits: closer than this fp32 may draw the one token and fp64 the other


class Reference:
    """drawn: a schedule to repeat, where responses are not drawn by the weights of their own iteration. (Its tokens
        are looked at to break ties: a schedule depends on time, so that one with a tie comes up some day.)

    recompute: keys and values of earlier tokens are those of the version that draws the next one. (A schedule that is
        repeated is read with a cache, which new weights empty.)
    """

    def __init__(self, scenario: Scenario, drawn: Drawn | None = None, *, recompute: bool = True) -> None:
        self.drawn, self.recompute = drawn, recompute
        self.behaviour: dict[tuple[int, ...], Tensor] = {}  # log-probs of responses by what drew them
        self.scenario, self.algorithm, self.seed = scenario, scenario.algorithm, scenario.simulation.seed
        chosen, shared = scenario.models, scenario.models.share_actor_critic
        self.actor = self._model("actor", chosen.actor, lm=True, value=shared, train=True)
        self.critic = self.actor if shared else self._model("critic", chosen.critic, lm=False, value=True, train=True)
        self.reference = self._model("reference", chosen.reference, lm=True, value=False, train=False)
        self.reward = self._model("reward", chosen.reward, lm=False, value=True, train=False)
        self.trained = [self.actor] if shared else [self.actor, self.critic]
        self.staleness = (
            scenario.strategy.options.get("staleness", 1) if scenario.strategy.name == "one_step_off" else 0
        )
        self.versions = [deepcopy(self.actor)]  # those that generate
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
            self.versions.append(deepcopy(self.actor))
        return responses

    # -- what a model says of a sequence ------------------------------------------------------------------

    @staticmethod
    def _hidden(model: models.Decoder, tokens: list[int], cache: DynamicCache | None = None) -> Tensor:
        """Of all tokens, or of those that the cache has not."""
        first = cache.get_seq_length() if cache is not None else 0
        ids, positions = torch.tensor([tokens[first:]]), torch.arange(first, len(tokens))[None]
        kept = {"past_key_values": cache} if cache is not None else {}
        return model.body(input_ids=ids, position_ids=positions, use_cache=cache is not None, **kept).last_hidden_state[
            0
        ]

    def _log_probs(self, model: models.Decoder, tokens: list[int], start: int) -> Tensor:
        logits = model.lm_head(self._hidden(model, tokens))  # type: ignore[misc]
        return torch.stack([logits[t - 1].log_softmax(-1)[tokens[t]] for t in range(start, len(tokens))])

    def _values(self, model: models.Decoder, tokens: list[int], start: int) -> Tensor:
        return model.value_head(self._hidden(model, tokens))[start - 1 : len(tokens) - 1, 0]  # type: ignore[misc]

    # -- an iteration -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _response(self, iteration: int, sample: int) -> tuple[list[int], int]:
        version = max(0, iteration - self.staleness)
        said: Sequence[int] = []
        versions: Sequence[int] = [version] * self.scenario.workload.longest_sample
        if self.drawn is not None:
            number, said, versions = self.drawn[iteration][sample]
            iteration, sample = divmod(number, self.scenario.workload.samples)
        workload, vocabulary = self.scenario.workload, self.scenario.models.actor.shape.vocabulary
        prompts, lengths = draw_lengths(workload, self.seed, iteration, length_dir())
        sampled = workload.responses == "sampled"
        limit = workload.response_tokens.longest if sampled else int(lengths[sample])
        r = request(
            (self.seed, iteration),
            sample,
            sample // workload.responses_per_prompt,
            int(prompts[sample]),
            limit,
            vocabulary,
        )
        noise = generate._gumbel(torch.device("cpu"), vocabulary)
        said_of: list[Tensor] = []
        tokens, cache, last = r.prompt.tolist(), DynamicCache() if said else None, -1
        for offset, version in zip(r.noise, versions, strict=False):
            if said and self.recompute and version != last:
                cache, last = DynamicCache(), version
            actor = self.versions[version]
            logits = actor.lm_head(self._hidden(actor, tokens, cache)[-1])  # type: ignore[misc]
            noisy = logits + noise[int(offset)]
            said_of.append(logits.log_softmax(-1))
            recorded = said[len(tokens) - len(r.prompt)] if said else int(noisy.argmax())
            tokens.append(recorded if noisy[recorded] > noisy.max() - TIE else int(noisy.argmax()))
            if sampled and tokens[-1] == 0:
                break
        drawn = zip(said_of, tokens[len(r.prompt) :], strict=True)
        self.behaviour[tuple(tokens)] = torch.stack([log_probs[token] for log_probs, token in drawn])
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
        self._step()

    def _step(self) -> None:
        for model, optimizer in zip(self.trained, self.optimizers, strict=True):
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(torch.sqrt(sum((g**2).sum() for g in gradients)))  # type: ignore[arg-type]
            if norm > self.algorithm.gradient_clip:
                for g in gradients:
                    g *= self.algorithm.gradient_clip / norm
            optimizer.step()
            optimizer.zero_grad()


class WithoutCritic(Reference):
    """GRPO and its kin: what a response earned, compared with the others to its prompt or in its mini-batch."""

    def __init__(self, scenario: Scenario, drawn: Drawn | None = None, *, recompute: bool = True) -> None:
        super().__init__(scenario, drawn, recompute=recompute)
        self.critic, self.trained, self.optimizers = self.actor, [self.actor], self.optimizers[:1]

    def run(self, iterations: int, mini_batches: MiniBatches) -> list[list[list[int]]]:
        responses = []
        for iteration in range(iterations):
            made = [self._response(iteration, s) for s in range(self.scenario.workload.samples)]
            judged = [self._judged(*response) for response in made]
            responses.append([tokens[start:] for tokens, start in made])
            for chosen in mini_batches(iteration):
                self._learn(made, judged, chosen)
            self.versions.append(deepcopy(self.actor))
        return responses

    @torch.no_grad()
    def _judged(self, tokens: list[int], start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of actor and reference, and every token's reward."""
        old, ref = self._log_probs(self.actor, tokens, start), self._log_probs(self.reference, tokens, start)
        if not self.scenario.strategy.options.get("recompute_log_probs", True):
            old = self.behaviour[tuple(tokens)]
        rewards = torch.zeros(len(old), dtype=torch.float64)
        if self.algorithm.name in ("rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"):
            rewards = self.algorithm.kl_coefficient * (ref - old)
        if self.algorithm.reward == "model":
            rewards[-1] += self.reward.value_head(self._hidden(self.reward, tokens)[-1])[0]  # type: ignore[misc]
        else:
            rewards[-1] += np.mean([t % 2 == 0 for t in tokens[start:]])
        return old, ref, rewards

    def _advantages(self, rewards: dict[int, list[float]]) -> dict[int, np.ndarray]:
        """Of the tokens of each sample of a mini-batch."""
        name, per_prompt = self.algorithm.name, self.scenario.workload.responses_per_prompt
        found = {}
        for s, own in rewards.items():
            others = [sum(rewards[o]) for o in rewards if o // per_prompt == s // per_prompt]
            rest, total = [sum(rewards[o]) for o in rewards if o // per_prompt == s // per_prompt and o != s], sum(own)
            if name == "reinforce_plus_plus":
                fade = self.algorithm.discount
                found[s] = np.array(
                    [sum(fade ** (k - t) * own[k] for k in range(t, len(own))) for t in range(len(own))]
                )
            elif name == "rloo":
                found[s] = np.full(len(own), total - np.mean(rest))
            else:
                spread = np.std(others, ddof=1) + 1e-6 if name in ("grpo", "dapo") else 1.0
                found[s] = np.full(len(own), (total - np.mean(others)) / spread)
        if name.startswith("reinforce"):
            everything = np.concatenate(list(found.values()))
            found = {s: (a - everything.mean()) / np.sqrt(everything.var(ddof=1) + 1e-8) for s, a in found.items()}
        return found

    def _learn(self, made: list, judged: list, chosen: Sequence[int]) -> None:  # type: ignore[type-arg]
        a, loss, count = self.algorithm, torch.tensor(0.0, dtype=torch.float64), 0
        advantages = self._advantages({s: judged[s][2].tolist() for s in chosen})
        for s in chosen:
            (tokens, start), (old, ref, _) = made[s], judged[s]
            now, advantage = self._log_probs(self.actor, tokens, start), torch.from_numpy(advantages[s])
            ratio = torch.exp(now - old)
            if a.name == "gpg":
                loss = loss - (now * advantage).sum()
            else:
                clipped = ratio.clamp(1 - a.clip_ratio, 1 + a.clip_ratio)
                loss = loss - torch.min(ratio * advantage, clipped * advantage).sum()
            if a.name == "grpo":
                loss = loss + a.kl_coefficient * (torch.exp(ref - now) - (ref - now) - 1).sum()
            count += len(old)
        (loss / count).backward()
        self._step()
