"""The `algorithm` section of a scenario: which algorithm, which of its stages, and where rewards come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..algorithms import OldLogProb
from .base import Count, Fraction, Record, Seconds

# Each is simulated: so many take 5 s (`rlhfsim simulate` of the quickstart, three iterations, one core).
MAX_STEPS = 2000


class Latency(Record):
    """How long one sample's reward takes, once it is at work.

    fixed: seconds. lognormal: mean_seconds of the unclipped distribution and sigma of its logarithm. empirical: a
    column of a CSV file of `traces/lengths` or a path, in seconds. max_seconds: a time limit that cuts all of them off.
    """

    distribution: Literal["fixed", "lognormal", "empirical"] = "fixed"
    seconds: Seconds | None = None
    mean_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    sigma: Annotated[float, Field(gt=0, le=5)] | None = None
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    file: str | None = None
    column: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Latency:
        needed = {"fixed": ("seconds",), "lognormal": ("mean_seconds", "sigma"), "empirical": ("file", "column")}
        if missing := [name for name in needed[self.distribution] if getattr(self, name) is None]:
            raise ValueError(f"distribution {self.distribution!r} needs {', '.join(missing)}")
        return self


class Algorithm(Record):
    """name: a file of `rlhfsim/algorithms`. Optimizer steps per iteration = epochs x minibatches, at most 2000.

    reference: whether there is a reference model. Absent: as the algorithm has it (GPG and DAPO: none); none in any
        case where kl_coefficient is 0. `adapter_off`: it is the actor without its LoRA factors, and no model of its own
        (verl and TRL with LoRA).
    old_log_prob: the log-probabilities of the policy that generated: by a pass of the actor `always` (verl, OpenRLHF),
        `if_needed` (not with one optimizer step per iteration: TRL, NeMo RL), or from the `engine` with the responses.
    filter_accept_probability: share of the prompts that are kept, where those with equal rewards are dropped (dynamic
        sampling; each by its own draw). Default 1: all. Rounds of gen_prompts prompts (default: workload.prompts) are
        generated and judged until there are workload.prompts; what is over is thrown away. More than max_rounds
        rounds are an error, as in the frameworks.
    reward: from the reward `model`; or without such a model from a `function` on the host, a `judge` that is served
        elsewhere, or a `sandbox` on the nodes. (In a real run the function is the share of response tokens with an even
        id.)
    reward_function_seconds: what the function takes for one sample on one core. Default 0.
    reward_function_workers: processes per node that compute it for all ranks there; absent: each rank, for its samples.
    reward_latency: of one sample in the judge or sandbox, a number of seconds or a distribution.
    reward_concurrency: samples at once, of all ranks (judge) or on each node (sandbox); absent: any number.
    reward_streams: judge and sandbox get each sample when its own response is there (slime, verl's reward loop), and
        only what is left when the last one is there takes time; otherwise all at once then.
    The rest is for real runs only; the simulator assumes Adam, and no number below changes a time, but that without
    kl_coefficient there is no reference.
    optimizer, learning_rate, adam_epsilon, gradient_clip: of actor and critic (clip: of the gradient's norm).
    kl_coefficient: reward lost per nat by which the actor leaves the reference. discount, gae_lambda: of GAE.
    clip_ratio, clip_values: limits of PPO's policy and value losses; value_coefficient: weight of the value loss where
        actor and critic share one model.
    """

    name: str = "ppo"
    epochs: Annotated[int, Field(ge=1, le=100)] = 1
    minibatches: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 1
    reference: bool | Literal["adapter_off"] | None = None
    old_log_prob: OldLogProb = "always"
    filter_accept_probability: Fraction = 1.0
    gen_prompts: Count | None = None
    max_rounds: Annotated[int, Field(ge=2, le=1000)] = 10
    reward: Literal["model", "function", "judge", "sandbox"] = "model"
    reward_function_seconds: Seconds = 0.0
    reward_function_workers: Count | None = None
    reward_latency: Latency | None = None
    reward_concurrency: Count | None = None
    reward_streams: bool = False
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 1e-5
    adam_epsilon: Annotated[float, Field(gt=0, le=1e3)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    kl_coefficient: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    discount: Fraction = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip_ratio: Annotated[float, Field(gt=0, le=1e3)] = 0.2
    clip_values: Annotated[float, Field(gt=0, le=1e3)] = 0.2
    value_coefficient: Annotated[float, Field(ge=0, le=1e3)] = 0.5

    @property
    def queued(self) -> bool:
        """Whether rewards come from a service with a queue of its own."""
        return self.reward in ("judge", "sandbox")

    @model_validator(mode="after")
    def _ends(self) -> Algorithm:
        if self.epochs * self.minibatches > MAX_STEPS:
            raise ValueError(
                f"epochs {self.epochs} x minibatches {self.minibatches} are {self.epochs * self.minibatches} optimizer "
                f"steps an iteration; at most {MAX_STEPS} are allowed"
            )
        if self.queued and self.reward_latency is None:
            raise ValueError(f"reward {self.reward!r} needs reward_latency, the seconds that one sample takes")
        if self.reference and self.kl_coefficient == 0:
            raise ValueError(f"reference is {str(self.reference).lower()}, but with kl_coefficient 0 nothing reads it")
        return self
