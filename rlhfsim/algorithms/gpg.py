"""GPG: the plain policy gradient with a group's mean reward as baseline; no ratio, no clipping, no reference.

Chu et al., "GPG", 2025. verl: adv_estimator gpg with loss_mode gpg. That loss reads no old log-probabilities, but its
trainer computes them for every algorithm, so they are here by default.
"""

from __future__ import annotations

from . import Algorithm, OldLogProb, without_critic


def build(
    *,
    epochs: int = 1,
    minibatches: int = 1,
    reference: bool = False,
    old_log_prob: OldLogProb = "always",
    rounds: int = 1,
) -> Algorithm:
    return without_critic(
        "gpg",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=2,
        rounds=rounds,
    )
