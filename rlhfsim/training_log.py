"""What a log of a training run says of its stages: medians, first steps, noise, lengths; and its error against a run
of the simulator.

Noise: steps with nearly the same number of tokens should take the same time. The standard deviation of one step is
1.4826 x median |difference| / sqrt(2) over neighbouring pairs in the order of their tokens (1.4826: of a normal
distribution, over its median absolute deviation). Errors below it say nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .measurements import Log
from .published import seconds_of
from .simulate import prepare, simulate
from .spec.loader import load_scenario
from .spec.scenario import Scenario
from .uncertainty import phase_of
from .validate import STEP, Gap, Result

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.3  # of a stage, beyond its noise: as of published cases
SAME_TOKENS = 0.005  # relative: pairs of steps whose work is taken as equal
LEAST_PAIRS = 5  # below, no noise is stated
OUTLIER = 0.1  # beyond the noise: the first step loads, compiles and captures

# What runs in verl's timers, in our stages (verl/trainer/ppo/ray_trainer.py). `gen` holds `reshard`, the change of
# weights between training and generation, until `update_weights` became a timer of its own (checkpoint_manager). With
# timers called `timing/` the actor's generate_sequences ended with a pass for old log-probabilities
# (verl/trainer/ppo/workers/fsdp_workers.py @369e2ea).
STAGES = {
    "gen": ("update_weights", "gen"),
    "generate_sequences": ("gen",),
    "reshard": ("update_weights",),
    "update_weights": ("update_weights",),
    "old_log_prob": ("old_log_prob",),
    "ref": ("ref",),
    "values": ("values",),
    "update_critic": ("update_critic",),
    "update_actor": ("update_actor",),
    "step": (STEP,),
}
ONCE_IN_A_WHILE = ("testing", "save_checkpoint")  # a step with these is no measure of the others


@dataclass(frozen=True)
class Timer:
    """Seconds of one timer over the steps after the first. noise: relative, of one step; None: too few equal steps.

    stages: what runs in it; empty: nothing that is simulated.
    """

    name: str
    stages: tuple[str, ...]
    steps: int
    first: float
    median: float
    noise: float | None

    @property
    def first_is_outlier(self) -> bool:
        return abs(self.first / self.median - 1) > OUTLIER + (self.noise or 0.0)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"first_is_outlier": self.first_is_outlier}


@dataclass(frozen=True)
class LogReport:
    """workload: prompts, responses and their lengths as a scenario says them. notes: what was left out or guessed."""

    file: str
    steps: int
    timers: list[Timer]
    workload: dict[str, Any]
    options: dict[str, str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"timers": [t.as_json() for t in self.timers]}


def report(log: Log) -> LogReport:
    """Raises InputError for a log without response lengths."""
    prefix = "timing_s/" if any(c.startswith("timing_s/") for c in log.steps) else "timing/"
    names = [c.removeprefix(prefix) for c in log.steps if c.startswith(prefix)]
    once = [prefix + name for name in ONCE_IN_A_WHILE if prefix + name in log.steps]
    plain = log.steps[log.steps[once].isna().all(axis=1)] if once else log.steps
    plain = plain if len(plain) > 1 else log.steps
    rest = plain[plain.line != log.steps.line.iloc[0]] if len(plain) > 1 else plain
    timers = [
        Timer(
            name,
            stages_of(name, prefix, names),
            int(rest[prefix + name].count()),
            float(log.steps[prefix + name].iloc[0]),
            float(rest[prefix + name].median()),
            noise(rest, prefix + name),
        )
        for name in names
        if name not in ONCE_IN_A_WHILE and rest[prefix + name].median() > 0
    ]
    notes = []
    if log.truncated:
        notes.append(f"line {log.truncated} is cut off and left out")
    if len(plain) < len(log.steps):
        notes.append(f"{len(log.steps) - len(plain)} steps with validation or a checkpoint are left out")
    if outliers := [t.name for t in timers if t.first_is_outlier]:
        notes.append(f"the first step is an outlier in {', '.join(outliers)} (it is in no median)")
    return LogReport(log.path.name, len(log.steps), timers, workload_of(log, rest, notes), log.options, notes)


def stages_of(timer: str, prefix: str, timers: list[str]) -> tuple[str, ...]:
    """The stages that run in a timer of a log with these timers (see STAGES)."""
    if timer == "gen" and "update_weights" in timers:
        return ("gen",)
    if timer == "gen" and prefix == "timing/" and "old_log_prob" not in timers:
        return ("update_weights", "gen", "old_log_prob")
    return STAGES.get(timer, ())


def noise(steps: pd.DataFrame, column: str) -> float | None:
    tokens = _tokens(steps)
    if tokens is None:
        return None
    order = np.argsort(tokens, kind="stable")
    tokens, seconds = tokens[order], steps[column].to_numpy(dtype=float)[order]
    same = (np.abs(np.diff(tokens)) <= SAME_TOKENS * tokens[1:]) & np.isfinite(np.diff(seconds))
    if same.sum() < LEAST_PAIRS:
        return None
    relative = np.abs(np.diff(np.log(np.maximum(seconds, 1e-9))))[same]
    return float(1.4826 * np.median(relative) / math.sqrt(2))


def _tokens(steps: pd.DataFrame) -> np.ndarray | None:
    """Of a step: what the log counts, or mean lengths (of equally many samples)."""
    if "perf/total_num_tokens" in steps:
        return steps["perf/total_num_tokens"].to_numpy(dtype=float)  # type: ignore[no-any-return]
    if {"response_length/mean", "prompt_length/mean"} <= set(steps):
        return (steps["response_length/mean"] + steps["prompt_length/mean"]).to_numpy(dtype=float)  # type: ignore[no-any-return]
    return None


# --- lengths ---------------------------------------------------------------------------------------------------------


def workload_of(log: Log, steps: pd.DataFrame, notes: list[str]) -> dict[str, Any]:
    """The `workload` of the log's median step. Raises InputError where it says no response lengths."""
    if "response_length/mean" not in steps:
        raise InputError("no step says how long its responses are", field="response_length/mean", where=str(log.path))
    found: dict[str, Any] = {}
    for key, option in (("prompts", "data.train_batch_size"), ("responses_per_prompt", "actor_rollout_ref.rollout.n")):
        if option in log.options:
            found[key] = int(float(log.options[option]))
    for name, side in (("prompt", "prompt_tokens"), ("response", "response_tokens")):
        if f"{name}_length/mean" not in steps:
            continue
        mean = float(steps[f"{name}_length/mean"].median())
        limit = int(float(log.options.get(f"data.max_{name}_length", steps[f"{name}_length/max"].max())))
        clipped = float(steps[f"{name}_length/clip_ratio"].median()) if f"{name}_length/clip_ratio" in steps else 0.0
        if clipped > 0 and mean < limit:
            unclipped, sigma = lognormal_with(mean, clipped, limit)
        else:
            sigma = spread_of(steps, name)
            unclipped = mean
            notes.append(f"{side}: sigma {sigma:.2f} from the mean smallest and largest length; the log has no shares")
        found[side] = {
            "distribution": "lognormal",
            "mean_tokens": float(f"{unclipped:.4g}"),
            "sigma": float(f"{sigma:.3g}"),
            "max_tokens": limit,
        }
    return found


def lognormal_with(mean: float, clipped: float, limit: float) -> tuple[float, float]:
    """(unclipped mean, sigma) of the lognormal whose values above `limit`, a share `clipped`, are set to it, and whose
    mean is then `mean`.

    With z the normal quantile of 1 - clipped, mu = ln(limit) - z sigma, and the clipped mean is
    exp(mu + sigma^2 / 2) Phi(z - sigma) + clipped limit, which falls as sigma rises: bisection.
    """
    from statistics import NormalDist

    normal = NormalDist()
    z = normal.inv_cdf(1 - clipped)

    def unclipped(sigma: float) -> float:
        return math.exp(math.log(limit) - z * sigma + sigma**2 / 2)

    def clipped_mean(sigma: float) -> float:
        return unclipped(sigma) * normal.cdf(z - sigma) + clipped * limit

    low, high = 0.01, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if clipped_mean(middle) > mean else (low, middle)
    return unclipped(low), low


def spread_of(steps: pd.DataFrame, name: str) -> float:
    """Sigma of a lognormal whose smallest and largest of about a thousand values are the logged ones: 6.5 sigma apart
    (expected range of 1000 standard normal values)."""
    low, high = (float(steps[f"{name}_length/{end}"].median()) for end in ("min", "max"))
    return min(5.0, max(0.05, math.log(max(high, 1.0) / max(low, 1.0)) / 6.5))


# --- against the simulator -------------------------------------------------------------------------------------------


def results_of(log: Log, found: LogReport, scenario: Scenario, tolerance: float) -> tuple[list[Result], list[Gap]]:
    """Median seconds of every timer against the simulated stages that run in it."""
    setup = prepare(scenario)
    fit = setup.fit()
    run = simulate(setup)
    there = {span.firing.stage for span in run.spans}
    group, results = f"log/{log.path.stem}", list[Result]()
    for timer in found.timers:
        stages = [s for s in timer.stages if s == STEP or s in there]
        if not stages:
            continue
        whole = stages == [STEP]
        value = timer.median
        spread = timer.noise or 0.0
        results.append(
            Result(
                id=log.path.stem,
                quantity=STEP if whole else timer.name,
                predicted=seconds_of(run, STEP if whole else timer.name, [] if whole else stages),
                measured=value,
                role="prediction",
                group=group,
                spread=spread,
                tolerance=tolerance,
                framework=log.framework,
                phase=phase_of(STEP if whole else timer.name, [] if whole else stages),
            )
        )
    gaps = [] if fit.fits else [Gap(log.path.stem, "prediction", group, "does not fit", fit.reason, log.framework)]
    return results, gaps


def scenario_of(log: Log, found: LogReport, gpu: str | None, given: str | None) -> Scenario:
    """What ran: the given scenario with the log's lengths, or what the log's options say on this GPU.

    Raises InputError where the log says too little.
    """
    if given is not None:
        lengths = {f"workload.{key}": value for key, value in found.workload.items()}
        return load_scenario(given, lengths | ({"cluster.gpu": gpu} if gpu else {}))
    from .verl_options import scenario_from_options

    return scenario_from_options(log, found.workload, gpu)
