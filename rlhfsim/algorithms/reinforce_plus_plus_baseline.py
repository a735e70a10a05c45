"""REINFORCE++ with a baseline: rewards less the mean of their prompt's responses, normalised over the whole batch.

No critic. verl: adv_estimator reinforce_plus_plus_baseline; OpenRLHF: reinforce_baseline, with the KL divergence in the
reward (trainer/ppo_utils/experience_maker.py @01359b46).
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
        "reinforce_plus_plus_baseline",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=2,
        kl_in_loss=False,
        rounds=rounds,
    )
