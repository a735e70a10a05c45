"""What a firing costs: segments, each some repeats of compute and transfers. Never plain seconds.

A cost says how much work there is; how long its transfers take depends on who else uses the links at that time, and
only the simulator knows that. A segment ends where the ranks of a place meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from .kernels import interpolated_seconds

Op = Literal[
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "custom_all_reduce",
    "all_to_all",
    "broadcast",
    "send",
    "to_host",
    "from_host",
    "host_send",
    "host_memory",
]


@dataclass(frozen=True)
class Transfer:
    """A collective or copy, run by every group of `groups` at the same time.

    op: `send` groups are (source, destination) pairs, as are those of `host_send`, from the host memory of the source
        rank's node to that of the destination's; `to_host` and `from_host` groups are single ranks, as are
        those of `host_memory`: what a rank's work on the CPU reads and writes there.
    op `custom_all_reduce`: the one-shot kernel of an inference engine (it reads its peers' buffers over NVLink);
        where a group has no NVLink between all its ranks it is an ordinary all_reduce.
    payload_bytes: of one group and one repeat: what every rank holds after an all_gather or all_reduce or broadcast,
        the input of a reduce_scatter, a rank's send buffer in an all_to_all (its own share included), the message of
        a send or copy.
        A number, or an array over the kinds of repeats of its segment.
    hidden_seconds: so much of it passes beside the compute that it belongs to; the rest blocks or not, as it may be.
        Likewise a number or an array.
    blocking: it stops the compute also where the other transfers of its segment run beside it.
    messages: how many separate calls that payload is cut into (each pays the latency); likewise.
    slows: share of the multiprocessors that it takes from the compute beside it, while it lasts.
    """

    op: Op
    groups: tuple[tuple[int, ...], ...]
    payload_bytes: float | np.ndarray
    messages: float | np.ndarray = 1.0
    blocking: bool = False
    hidden_seconds: float | np.ndarray = 0.0
    slows: float = 0.0


class Route(NamedTuple):
    """How a transfer loads the cluster: made by `rlhfsim.cluster`.

    usage: link name -> link time per payload byte, all groups together: bytes on the link over the share of its nominal
        rate that the operation reaches there (so that operations of different efficiency share a link correctly).
    latency_seconds: of one call. exponent: seconds = (latency^p + (bytes/rate)^p)^(1/p).
    measured: points (bytes/rate, seconds) instead of that formula; see `CollectiveCurve`.
    """

    usage: dict[str, float]
    latency_seconds: float
    exponent: float
    measured: tuple[tuple[float, float], ...] = ()


class Elapsed(NamedTuple):
    """Seconds of a segment, and where they go for each replica (arrays of equal length, one entry a replica)."""

    seconds: float
    compute: np.ndarray
    communication: np.ndarray  # exposed only
    peers: np.ndarray  # waiting for the slowest


@dataclass(frozen=True)
class Segment:
    """`repeats` rounds of compute and transfers between two meetings of a place's replicas.

    compute_seconds: shape (replicas, kinds): seconds of one repeat on each replica; repeats: shape (kinds,).
    prefetch: 0: transfers block; otherwise those that are not `blocking` run ahead of (or behind) the compute by that
        many repeats, on the communication stream, so that a repeat takes max(compute, transfer) after the first.
    lockstep: replicas meet at every repeat (a collective over all of them), not only at the end.
    bound: seconds of `compute_seconds` by what limits them {"flops", "hbm", "launch", "host", "pcie"}, summed over
        repeats, mean over replicas.
    counts: what the work did besides taking time, for `Span.counts`.
    stops: it may be cut where the cost model says, and its firing goes on later.
    """

    label: str
    compute_seconds: np.ndarray
    repeats: np.ndarray = field(default_factory=lambda: np.ones(1))
    transfers: tuple[Transfer, ...] = ()
    prefetch: int = 0
    lockstep: bool = False
    bound: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    stops: bool = False

    def part(self, share: float) -> Segment:
        """So much of all its rounds (without prefetch)."""
        bound = {cause: share * seconds for cause, seconds in self.bound.items()}
        return replace(self, repeats=self.repeats * share, bound=bound)

    def slowed(self, factor: float) -> Segment:
        """With compute so many times as long; what is added is limited by nothing known."""
        added = (factor - 1) * sum(self.bound.values())
        return replace(self, compute_seconds=self.compute_seconds * factor, bound=self.bound | {"unexplained": added})

    def elapsed(self, routes: Sequence[Route], rates: Sequence[float]) -> Elapsed:
        """Seconds when transfer j moves `rates[j]` payload bytes per second (inf: free)."""
        compute, blocked = self.compute_seconds, self.compute_seconds
        beside = np.zeros(len(self.repeats))
        for t, route, rate in zip(self.transfers, routes, rates, strict=True):
            if self.prefetch and t.blocking:
                blocked = blocked + exposed_seconds(t, route, rate)
            else:
                seconds = exposed_seconds(t, route, rate)
                beside = beside + seconds
                blocked = blocked + (t.slows * seconds if self.prefetch else 0.0)
        round_seconds = np.maximum(blocked, beside) if self.prefetch else compute + beside
        own = round_seconds @ self.repeats
        # With prefetch the first transfer has nothing to hide behind, and the last compute hides none.
        fill = np.minimum(blocked[:, 0], beside[0]) if self.prefetch else np.zeros(len(compute))
        own = own + fill
        together = round_seconds.max(axis=0) @ self.repeats + fill.max()
        total = float(together if self.lockstep else own.max())
        busy = compute @ self.repeats
        return Elapsed(total, busy, own - busy, total - own)


@dataclass(frozen=True)
class HostSegment(Segment):
    """Work on the CPU that streams host memory: `compute_seconds` alone, longer where others use that memory too."""

    def elapsed(self, routes: Sequence[Route], rates: Sequence[float]) -> Elapsed:
        alone = self.compute_seconds @ self.repeats
        streamed = sum(
            float(transfer_seconds(t, route, rate) @ self.repeats)
            for t, route, rate in zip(self.transfers, routes, rates, strict=True)
        )
        longer = max(0.0, streamed - float(alone.max()))
        return Elapsed(float(alone.max()) + longer, alone, np.full(len(alone), longer), alone.max() - alone)


def exposed_seconds(transfer: Transfer, route: Route, rate: float) -> np.ndarray:
    """Of `transfer_seconds`, what does not pass beside its own compute, and by how much that takes longer."""
    seconds = transfer_seconds(transfer, route, rate)
    hidden = np.minimum(seconds, transfer.hidden_seconds)
    return np.asarray(seconds - hidden + transfer.slows * hidden)


def transfer_seconds(transfer: Transfer, route: Route, rate: float) -> np.ndarray:
    """Seconds of one repeat of a transfer at `rate` payload bytes per second, one entry per kind of repeat."""
    wire = np.atleast_1d(np.asarray(transfer.payload_bytes, dtype=float)) / rate
    if route.measured:
        messages = np.asarray(transfer.messages, dtype=float)
        each: np.ndarray = interpolated_seconds(route.measured, wire / np.where(messages > 0, messages, 1.0))
        return np.asarray(messages * each)
    latency = route.latency_seconds * transfer.messages
    p = route.exponent
    seconds: np.ndarray = (latency**p + wire**p) ** (1 / p)
    return seconds
