"""One step off: the next batch is generated while this one trains, on separate ranks, with weights one step older.

A batch begins when the one before has ended and the weights of the step before have arrived; they enter between two
batches, so every response is of one version, and exactly one step old.

In the frameworks: verl's recipe one_step_off_policy (volcengine/verl, recipe/one_step_off_policy/ray_trainer.py
@0d75188e), NeMo-RL with max_trajectory_age_steps 1, OpenRLHF --async_train with its queue of one batch
(openrlhf/cli/train_ppo_ray.py @021d1b09).
"""

from __future__ import annotations

from rlhfsim.algorithms import Algorithm
from rlhfsim.graph import StageGraph

from . import Devices, asynchronous


def build(
    algorithm: Algorithm,
    devices: Devices,
    *,
    staleness: int = 1,
    recompute_log_probs: bool = True,
    split: dict[str, float] | None = None,
) -> StageGraph:
    """staleness: how many steps the weights lag: 1, or more where batches may queue; 0: one after the other.

    recompute_log_probs: behaviour log-probs by a pass of the actor, not by the engine.
    split: shares of the ranks, by `generation` and `training`.
    """
    return asynchronous.build(
        algorithm,
        devices,
        staleness=staleness,
        interrupt=False,
        whole_batches=True,
        chunks=1,
        recompute_log_probs=recompute_log_probs,
        split=split,
    )
