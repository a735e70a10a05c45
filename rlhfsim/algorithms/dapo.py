"""DAPO: GRPO without reference that drops prompts whose responses all have the same reward, and generates others.

Yu et al., "DAPO", 2025: dynamic sampling. Rounds of `gen_prompts` prompts are generated and judged until the batch is
full; what is over is thrown away (verl: recipe/dapo/dapo_ray_trainer.py @53971be5, data.gen_batch_size and
algorithm.filter_groups.max_num_gen_batches; NeMo RL: grpo.use_dynamic_sampling, batch_multiplier times the prompts).
Its clipping, its loss by token and its penalty for long responses change no time.
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
        "dapo",
        epochs=epochs,
        minibatches=minibatches,
        reference=reference,
        old_log_prob=old_log_prob,
        least_responses=2,
        rounds=rounds,
    )
