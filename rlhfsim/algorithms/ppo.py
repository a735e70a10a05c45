"""PPO with four models: the actor generates, reference, reward and critic judge, actor and critic learn.

With `share_actor_critic` the critic is a value head on the actor: one pass gives log-probabilities and values, one
update trains both.
"""

from __future__ import annotations

from . import Algorithm, Step

SEQUENCE = ("tokens", "mask")


def build(*, epochs: int = 1, minibatches: int = 1, share_actor_critic: bool = False) -> Algorithm:
    generate = Step("gen", "generate", "actor", fields=SEQUENCE)
    reference = Step("ref", "score", "reference", ("gen",), ("ref_log_probs",))
    reward = Step("reward", "score", "reward", ("gen",), ("score",))
    score: tuple[Step, ...]
    train: tuple[str, ...]
    if share_actor_critic:
        score = (reference, reward, Step("old_log_prob", "score", "actor", ("gen",), ("log_probs", "values")))
        train = ("update_actor",)
    else:
        score = (
            Step("old_log_prob", "score", "actor", ("gen",), ("log_probs",)),
            reference,
            reward,
            Step("values", "score", "critic", ("gen",), ("values",)),
        )
        train = ("update_critic", "update_actor")
    judged = tuple(step.name for step in score)
    updates = tuple(Step(name, "train", name.removeprefix("update_"), judged) for name in train)
    return Algorithm("ppo", (generate, *score, *updates), epochs, minibatches)
