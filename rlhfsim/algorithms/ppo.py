"""PPO with four models: the actor generates, reference, reward and critic judge, actor and critic learn.

With `share_actor_critic` the critic is a value head on the actor: one pass gives log-probabilities and values, one
update trains both. Without `reference` no KL divergence is paid (OpenRLHF: `--init_kl_coef 0` loads no reference; verl:
neither use_kl_in_reward nor use_kl_loss).
"""

from __future__ import annotations

from . import SEQUENCE, Algorithm, OldLogProb, Step, recomputes


def build(
    *,
    epochs: int = 1,
    minibatches: int = 1,
    share_actor_critic: bool = False,
    reference: bool = True,
    old_log_prob: OldLogProb = "always",
) -> Algorithm:
    recomputed = recomputes(old_log_prob, epochs, minibatches)
    if share_actor_critic and not recomputed:
        raise ValueError(
            f"old_log_prob is {old_log_prob!r}, but the pass that would be left out gives the values as well"
        )
    by_engine = ("log_probs",) if old_log_prob == "engine" else ()
    policy = Step("old_log_prob", "score", "actor", ("gen",), ("log_probs",))
    policy_and_values = Step("old_log_prob", "score", "actor", ("gen",), ("log_probs", "values"))
    refer = Step("ref", "score", "reference", ("gen",), ("ref_log_probs",))
    reward = Step("reward", "score", "reward", ("gen",), ("score",))
    values = Step("values", "score", "critic", ("gen",), ("values",))
    train: tuple[str, ...]
    if share_actor_critic:
        scores, train = [refer, reward, policy_and_values], ("update_actor",)
    else:
        scores, train = [policy, refer, reward, values], ("update_critic", "update_actor")
    scores = [s for s in scores if (s is not refer or reference) and (s is not policy or recomputed)]
    judged = tuple(step.name for step in scores)
    return Algorithm(
        "ppo",
        (
            Step("gen", "generate", "actor", fields=(*SEQUENCE, *by_engine)),
            *scores,
            *(Step(name, "train", name.removeprefix("update_"), judged) for name in train),
        ),
        epochs,
        minibatches,
        (*SEQUENCE, *(("log_probs",) if recomputed or by_engine else ()), "values", "rewards"),
    )
