"""GRPO: the advantage of a response is its reward against the mean (and deviation) of its prompt's other responses.

No critic; the KL divergence from the reference is part of the loss (Shao et al., "DeepSeekMath", 2024, section 4.1).
verl: adv_estimator grpo; TRL: GRPOTrainer, without reference where beta is 0; OpenRLHF: group_norm; NeMo RL: grpo.
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
        "grpo",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=2,
        rounds=rounds,
    )
