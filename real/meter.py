"""What a firing spends on one rank: time inside collectives, named sections, peak memory.

On CUDA, collectives and sections are stamped with events on the stream and resolved when the firing ends, so that
measuring adds no synchronisation inside a firing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from rlhfsim.records import Measured


class Meter:
    """One per rank; `begin` and `end` enclose a firing. `inside` names the collective that is running, if any."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.inside = torch.device(device), ""
        self._cuda = self.device.type == "cuda"
        self.begin()

    def begin(self) -> None:
        self._calls: dict[tuple[int, ...], list[tuple[Any, Any, Any]]] = defaultdict(list)
        self._sections: list[tuple[str, Any, Any]] = []
        self.sent_bytes: dict[str, list[int]] = defaultdict(list)  # of each collective, by name
        self.counts: dict[str, float] = {}  # what a firing says of itself: see `Measured`
        self.synchronize()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # the peak is then the one of the whole run
                Path("/proc/self/clear_refs").write_text("5")
        self._base_event, self._base = self.stamp(), time.monotonic_ns()

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def end(self) -> Measured:
        self.synchronize()
        calls = {
            ranks: [(self._at(a), self._at(b), self._at(c)) for a, b, c in found]
            for ranks, found in self._calls.items()
        }
        detail: dict[str, float] = defaultdict(float)
        for name, start, stop in self._sections:
            detail[name] += (self._at(stop) - self._at(start)) / 1e9
        peak = torch.cuda.max_memory_allocated(self.device) if self._cuda else _peak()
        return Measured(calls, sum(map(sum, self.sent_bytes.values())), dict(detail), peak, self.counts)

    def stamp(self) -> Any:
        """This instant: of the host, or of the stream."""
        if not self._cuda:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _at(self, stamp: Any) -> int:
        return self._base + round(self._base_event.elapsed_time(stamp) * 1e6) if self._cuda else stamp

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Seconds of this block go to `Span.detail[name]`."""
        start = self.stamp()
        try:
            yield
        finally:
            self._sections.append((name, start, self.stamp()))

    @contextmanager
    def collective(self, name: str, ranks: tuple[int, ...], sent_bytes: int = 0, called: Any = None) -> Iterator[Any]:
        """The block is a collective of `ranks`; `called` is the stamp of its start where the block only awaits it.

        Gives the stamp of entry. All ranks of the group must count the same calls in the same order.
        """
        self.inside, entered = name, self.stamp()
        try:
            yield entered
        finally:
            self.inside = ""
            self._calls[ranks].append((entered if called is None else called, entered, self.stamp()))
            if called is None:
                self.sent_bytes[name].append(sent_bytes)


# Peak resident memory of this process: proc(5), /proc/pid/status (VmHWM) and clear_refs (5 resets it).


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
