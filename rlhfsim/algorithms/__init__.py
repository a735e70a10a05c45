"""Which stages an RL algorithm has and what each needs. One file per algorithm; the file name is the name.

A file has one function `build(*, epochs, minibatches, ...) -> Algorithm`; its keyword arguments are what a scenario may
choose. Names are those of verl's `algorithm.adv_estimator`, where it has the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rlhfsim.graph import Kind

SEQUENCE = ("tokens", "mask")

# Generated and judged again in every round, where prompts are dropped (see `Algorithm.rounds`).
IN_ROUNDS = ("gen", "reward")

# Where the log-probabilities of the policy that generated come from.
# always: a pass of the actor over the batch (verl, OpenRLHF).
# if_needed: that, but none with one optimizer step per batch, when the ratio of new to old is 1 anyway (TRL's
#     GRPOTrainer without importance-sampling correction; NeMo RL's loss_fn.force_on_policy_ratio).
# engine: they come with the responses (verl's algorithm.rollout_correction.bypass_mode).
OldLogProb = Literal["always", "if_needed", "engine"]


@dataclass(frozen=True)
class Step:
    """One stage of an algorithm, before anybody says where it runs.

    name: as in verl's logs. kind: generate | score | train. model: whose weights. needs: steps whose results it uses.
    fields: what its result adds to a sample.
    """

    name: str
    kind: Kind
    model: str
    needs: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """Steps in program order. An optimizer step is one mini-batch: epochs x minibatches of them per iteration.

    batch: the fields of a sample that an update reads. least_responses: to a prompt, so that there is an advantage.
    rounds: where prompts may be dropped, `gen` and `reward` go through at most so many rounds until the batch is full;
        everything else then sees the batch alone.
    """

    name: str
    steps: tuple[Step, ...]
    epochs: int = 1
    minibatches: int = 1
    batch: tuple[str, ...] = ()
    least_responses: int = 1
    rounds: int = 1

    def of_kind(self, *kinds: str) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.kind in kinds)

    def step(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)

    def with_reference_by(self, model: str) -> Algorithm:
        """The reference's scores come from another model."""
        return replace(self, steps=tuple(replace(s, model=model) if s.model == "reference" else s for s in self.steps))

    @property
    def models(self) -> tuple[str, ...]:
        """Every model whose weights some step uses."""
        return tuple(dict.fromkeys(s.model for s in self.steps))

    def chunks(self, step: str, pieces: int) -> int:
        """The chunks of a step when every round, and every batch, is cut in so many pieces."""
        return pieces * self.rounds if step in IN_ROUNDS else pieces

    def streams(self, maker: str, user: str) -> bool:
        """Whether a step may start on a piece as soon as that is made: not where the batch must be full first."""
        return self.rounds == 1 or maker not in IN_ROUNDS or user in IN_ROUNDS


def recomputes(old_log_prob: OldLogProb, epochs: int, minibatches: int) -> bool:
    """Whether the actor makes a pass for old log-probabilities."""
    return old_log_prob == "always" or (old_log_prob == "if_needed" and epochs * minibatches > 1)


def without_critic(
    name: str,
    *,
    epochs: int,
    minibatches: int,
    reference: bool,
    old_log_prob: OldLogProb,
    least_responses: int,
    kl_in_loss: bool = True,
    rounds: int = 1,
) -> Algorithm:
    """The stages that GRPO and its kin share; they differ in how rewards become advantages, which takes no stage.

    kl_in_loss: the divergence from the reference is part of the loss, not of the reward. With rounds, everything but
    generation and rewards waits until the batch is full, as in verl's DAPO trainer (recipe/dapo/dapo_ray_trainer.py
    @53971be5: gen, reward, filter; then old_log_prob, ref, update_actor).
    """
    recomputed = recomputes(old_log_prob, epochs, minibatches)
    by_engine = ("log_probs",) if old_log_prob == "engine" else ()
    full = ("gen", "reward") if rounds > 1 else ("gen",)
    reward = Step("reward", "score", "reward", ("gen",), ("score",))
    scores = [Step("old_log_prob", "score", "actor", full, ("log_probs",))] if recomputed else []
    scores += [Step("ref", "score", "reference", full, ("ref_log_probs",))] if reference else []
    scores = [reward, *scores] if rounds > 1 else [*scores, reward]
    log_probs = ("log_probs",) if recomputed or by_engine else ()
    referred = ("ref_log_probs",) if reference and kl_in_loss else ()
    return Algorithm(
        name,
        (
            Step("gen", "generate", "actor", fields=(*SEQUENCE, *by_engine)),
            *scores,
            Step("update_actor", "train", "actor", tuple(s.name for s in scores)),
        ),
        epochs,
        minibatches,
        (*SEQUENCE, *log_probs, *referred, "rewards"),
        least_responses,
        rounds,
    )


@lru_cache
def named(name: str, **options: Any) -> Algorithm:
    """The algorithm of that file. Raises ValueError for impossible options, ModuleNotFoundError without such a file."""
    algorithm: Algorithm = import_module(f"{__name__}.{name}").build(**options)
    return algorithm


def options_of(name: str) -> list[str]:
    """What may be chosen about an algorithm."""
    return list(signature(import_module(f"{__name__}.{name}").build).parameters)
