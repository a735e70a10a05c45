"""RLOO: the baseline of a response is the mean reward of the other responses to its prompt (leave one out).

No critic; the KL divergence from the reference is taken off the reward (Ahmadian et al., "Back to Basics", 2024). verl:
adv_estimator rloo; OpenRLHF: rloo, which divides by n - 1 (trainer/ppo_utils/experience_maker.py @01359b46).
"""

from __future__ import annotations

from . import Algorithm, OldLogProb, without_critic


def build(
    *,
    epochs: int = 1,
    minibatches: int = 1,
    reference: bool = True,
    old_log_prob: OldLogProb = "always",
    rounds: int = 1,
) -> Algorithm:
    return without_critic(
        "rloo",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=2,
        kl_in_loss=False,
        rounds=rounds,
    )
