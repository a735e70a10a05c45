"""A run of an inference engine again, request by request: arrivals as they were, the engine's own scheduler and cache,
seconds of steps from the curves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from .costs.engine import Runs, _Scheduler
from .costs.generation import StepSeconds
from .costs.kernels import Kernels
from .costs.operators import Operators
from .errors import InputError
from .fitting import errors
from .kernel_errors import collective_seconds_on
from .measurements import Served, model_named
from .model import parameters
from .simulate import kernels_of
from .spec.hardware import Cluster
from .spec.model_spec import load_model
from .spec.scenario import Effects, Generation, ModelUse
from .validate import Result

TOLERANCE = 0.1
LEAST_SHARE = 1.1  # of the memory's bandwidth, which a token cannot be faster than


class Replay(_Scheduler):
    """The engine with a clock: requests wait from their arrival on."""

    def __init__(self, served: Served, cluster: Cluster, kernels: Kernels | None = None) -> None:
        rows = served.requests
        super().__init__(
            rows.input_tokens.to_numpy(dtype=int), rows.output_tokens.to_numpy(dtype=int), served.max_sequences,
            served.step_tokens, served.block_tokens, served.kv_blocks, chunked_prefill=True, padded=False,
            groups=np.arange(len(rows)) if served.prefix_caching else None,
        )  # fmt: skip
        self.served = served
        self.steps = step_seconds(served, cluster, kernels)
        self.reduce = _all_reduce_seconds(served, cluster)
        self.arrivals = rows.arrival_seconds.to_numpy(dtype=float)
        self.waiting = []
        self.seconds = 0.0
        self.first = np.zeros(len(rows))
        self.last = np.zeros(len(rows))
        self._started: list[int] = []
        self._ended: list[int] = []

    def replay(self) -> None:
        arrived = 0
        while arrived < len(self.arrivals) or self.waiting or self.running:
            if not self.waiting and not self.running:
                self.seconds = max(self.seconds, self.arrivals[arrived])
            while arrived < len(self.arrivals) and self.arrivals[arrived] <= self.seconds:
                self.waiting.insert(0, arrived)
                arrived += 1
            self.advance(1 if arrived < len(self.arrivals) or self.waiting else None)
            row, pieces = self.builder.last_run()
            steps, decodes, _, prompt, _, _ = row
            self.seconds += self.steps.single.of(row, pieces) + steps * self.reduce(decodes + prompt)
            self.first[self._started], self.last[self._ended] = self.seconds, self.seconds
            self._started, self._ended = [], []

    def _start_decoding(self, sample: int) -> None:
        if not self.generated[sample]:
            self._started.append(sample)
        super()._start_decoding(sample)

    def _complete(self, sample: int) -> None:
        super()._complete(sample)
        self._ended.append(sample)


def step_seconds(served: Served, cluster: Cluster, kernels: Kernels | None = None) -> StepSeconds:
    """Of the engine's steps on this GPU, with its own curves or others; the host's time is hidden where the engine
    schedules the next step while the device is at work.

    Raises InputError for a model that is not shipped.
    """
    name = model_named(served.model, "model", str(served.path))
    use = ModelUse(spec=name, shape=load_model(name))
    generation = Generation(
        engine="engine",
        tensor_parallel=served.tensor_parallel,
        max_sequences=served.max_sequences,
        prefill_tokens=served.step_tokens,
    )
    overheads = cluster.overheads
    if served.async_scheduling:
        overheads = overheads.model_copy(update={"decode_step_seconds": 0.0, "decode_sequence_seconds": 0.0})
    operators = Operators(cluster.gpu, kernels or kernels_of(cluster.gpu.kernels), Effects(), overheads)
    return StepSeconds(operators, use, generation)


def _all_reduce_seconds(served: Served, cluster: Cluster) -> Any:
    """Of all layers' all-reduces in a step of so many tokens."""
    shape = load_model(model_named(served.model, "model", str(served.path)))

    @cache
    def seconds(tokens: int) -> float:
        if served.tensor_parallel == 1:
            return 0.0
        payload = np.array([2.0 * tokens * shape.hidden])
        each = collective_seconds_on(cluster, "custom_all_reduce", served.tensor_parallel, 1, payload)
        return 2 * shape.layers * float(each[0])

    return seconds


def results_of(served: Served, cluster: Cluster, tolerance: float = TOLERANCE) -> list[Result]:
    """Means over the requests: seconds to the first token, per output token after it, and of a whole request; and until
    the last request is done. Raises InputError for tokens that come faster than memory can deliver the weights."""
    replay = Replay(served, cluster)
    _check_plausible(served, cluster, replay.steps)
    replay.replay()
    makespan = np.array([replay.last.max()]), served.requests.last_seconds.to_numpy().max(keepdims=True)
    pairs = request_seconds(replay) | {"makespan": makespan}
    fitted_on = kernels_of(cluster.gpu.kernels).sources.values()
    return [
        Result(
            id=served.path.name,
            quantity=name,
            predicted=float(predicted.mean()),
            measured=float(measured.mean()),
            role="calibration" if any(served.path.name in source for source in fitted_on) else "prediction",
            group=f"serving/{served.engine}/{cluster.gpu.name}",
            spread=0.0,
            tolerance=tolerance,
            framework=served.engine,
            phase="generation",
        )
        for name, (predicted, measured) in pairs.items()
    ]


def request_seconds(replay: Replay) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(predicted, measured) of every request: to the first token, per output token after it, and to the last one."""
    rows, arrivals = replay.served.requests, replay.arrivals
    first, last = rows.first_seconds.to_numpy(), rows.last_seconds.to_numpy()
    many = np.maximum(rows.output_tokens.to_numpy() - 1, 1)
    return {
        "time_to_first_token": (replay.first - arrivals, first - arrivals),
        "time_per_output_token": ((replay.last - replay.first) / many, (last - first) / many),
        "request_latency": (replay.last - arrivals, last - arrivals),
    }


def request_errors(replay: Replay) -> dict[str, np.ndarray]:
    """|predicted / measured - 1| of every request; of those with one token no time per output token (0)."""
    return {
        name: np.abs(np.divide(predicted, measured, out=np.ones_like(measured), where=measured > 0) - 1)
        for name, (predicted, measured) in request_seconds(replay).items()
    }


def _check_plausible(served: Served, cluster: Cluster, steps: StepSeconds) -> None:
    rows = served.requests[served.requests.output_tokens > 1]
    per_token = (rows.last_seconds - rows.first_seconds) / (rows.output_tokens - 1)
    bytes_read = 2 * parameters(steps.use.shape) / served.tensor_parallel
    least = bytes_read / cluster.gpu.memory_bytes_per_second.value / LEAST_SHARE
    if len(rows) and float(per_token.median()) < least:
        raise InputError(
            f"a token takes {per_token.median():.3g} s, but reading the weights takes {cluster.gpu.name} "
            f"{least:.3g} s: another unit of time, or another GPU",
            field="last_token_ts",
            where=str(served.path),
        )


# --- what the host needs ---------------------------------------------------------------------------------------------


def host_times(
    served: Served, cluster: Cluster, kernels: Kernels | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """(`decode_step_seconds` and `decode_sequence_seconds` of `Overheads`, errors of the time per output token).

    A request's time per output token is that of the steps which it was in: of the sequences that decoded beside it,
    by the measured times, at the mean of their contexts, with the prompts that came in while it decoded. What this
    leaves over the curves is the host's: a step's, and one for each of its sequences; non-negative least squares of
    relative errors.
    """
    from scipy.optimize import nnls

    rows = served.requests[served.requests.output_tokens > 1]
    first, last = rows.first_seconds.to_numpy(), rows.last_seconds.to_numpy()
    tokens, prompts = rows.output_tokens.to_numpy(), rows.input_tokens.to_numpy()
    measured = (last - first) / (tokens - 1)
    edges = np.unique(np.concatenate([first, last]))
    middle, length = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    inside = (first[:, None] < middle) & (last[:, None] > middle)
    running = inside.sum(axis=0)
    generated = (middle - first[:, None]) / (last - first)[:, None] * tokens[:, None]
    context = (inside * (prompts[:, None] + generated)).sum(axis=0)
    steps = step_seconds(served, cluster, kernels)
    steps.step_seconds = steps.sequence_seconds = 0.0
    reduce = _all_reduce_seconds(served, cluster)
    busy = running > 0
    empty = np.zeros(0, dtype=int)
    runs = Runs(
        np.ones(busy.sum(), dtype=int), running[busy], context[busy].astype(int), 0 * running[busy], running[busy],
        running[busy], empty, empty.astype(float), empty,
    )  # fmt: skip
    device = np.zeros(len(middle))
    device[busy] = steps.of(runs).sum(axis=0) + [reduce(int(n)) for n in running[busy]]
    share = inside * length / (inside * length).sum(axis=1)[:, None]
    prefill = _prefill_seconds(steps, prompts, first, last) / (tokens - 1)
    known = share @ device + prefill
    terms = np.stack([np.ones(len(rows)), share @ running], axis=1)
    found, _ = nnls(terms / measured[:, None], (measured - known) / measured)
    names = ("decode_step_seconds", "decode_sequence_seconds")
    return dict(zip(names, map(float, found), strict=True)), errors(known + terms @ found, measured)


def _prefill_seconds(steps: StepSeconds, prompts: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Of each request: what the prompts of others take that had their first token while it decoded."""
    body = steps._body(prompts.astype(int))[:3].sum(axis=0) if len(prompts) else np.zeros(0)
    others = (first[:, None] < first) & (last[:, None] >= first)
    return np.asarray(others @ body)
