"""REINFORCE++: advantages are rewards normalised over the whole batch, so one response to a prompt is enough.

No critic; the KL divergence from the reference is taken off each token's reward (Hu, "REINFORCE++", 2025). verl:
adv_estimator reinforce_plus_plus; OpenRLHF: reinforce; NeMo RL: adv_estimator reinforce_plus_plus.
"""

from __future__ import annotations

from . import Algorithm, OldLogProb, without_critic


def build(
    *, epochs: int = 1, minibatches: int = 1, reference: bool = True, old_log_prob: OldLogProb = "always"
) -> Algorithm:
    return without_critic(
        "reinforce_plus_plus",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=1,
        kl_in_loss=False,
    )
