"""Ends a real run on every rank when one dies, hangs or raises, with the reason and the stage named.

A thread on each rank tells the store that the rank lives and what it does, and watches the next rank, so that each is
watched by one. Blocked collectives cannot be interrupted: the thread ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from .firing import Firing

FAILED = 1  # exit code
CLOSE = b"\0"  # no signal has this number
# What gloo says on the survivors when a peer has died; who that was, its watcher knows better.
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Inside(Protocol):
    """Of a rank's meter: the collective that it is in, if any."""

    inside: str


def describe(f: Firing) -> str:
    return f"{f.stage}[{f.chunk}] of iteration {f.iteration}"


class Watch(threading.Thread):
    """Start it before the work; `close` after all ranks have met at the end.

    store: of torch.distributed (rlhfsim does not import torch).
    timeout_seconds: how long one firing may take on a rank. silence_seconds: how long a rank may give no sign of life
    (its process is gone, stopped, or holds the interpreter). save: called on one rank before all end, with the reason.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        ranks: int,
        meter: Inside,
        *,
        timeout_seconds: float = 600.0,
        silence_seconds: float = 20.0,
        save: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.ranks, self.meter, self.save = store.clone(), rank, ranks, meter, save
        self._own = store  # of the main thread: a store's client does one thing at a time
        self.timeout_seconds, self.silence_seconds = timeout_seconds, silence_seconds
        self._beat_seconds = min(0.5, silence_seconds / 8)
        self._doing, self._since = "its setup", None  # type: str, float | None
        self._wake, self._woken = socket.socketpair()  # the thread waits for its next beat here
        self._wake.setblocking(False)

    def heed_sigterm(self) -> None:
        """Wait for the reason when the launcher ends the ranks because one of them failed (main thread only)."""
        signal.signal(signal.SIGTERM, lambda *_: None)  # runs when the main thread is not blocked; this comes at once:
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def enter(self, f: Firing) -> None:
        """From now on this rank is at work on f."""
        self._doing, self._since = describe(f), time.monotonic()
        self._own.set(f"doing/{self.rank}", self._doing)

    def leave(self) -> None:
        self._since = None

    def fail(self, error: BaseException) -> None:
        """Report an exception of this rank and end; does not return."""
        reason = f"rank {self.rank} failed in {self._doing}: {type(error).__name__}: {error}"
        self._since = None
        if any(text in str(error) for text in _PEER_LOST):  # its watcher names the rank that was lost
            self.join(2 * self.silence_seconds)
        self._post(self._own, reason)
        self.join()

    def close(self) -> None:
        self._wake.send(CLOSE)
        self.join()

    def run(self) -> None:
        try:
            self._watch()
        except Exception as error:
            # The process that keeps the store has ended; nothing can be asked any more.
            lost = f"rank {self.rank} lost the store while in {self._doing} ({type(error).__name__})"
            self._end_process(f"{lost}: the launcher, or the rank that keeps it, has ended", alone=True)

    def _watch(self) -> None:
        beat, last, changed, told_to_end = 0, "", time.monotonic(), None
        other = (self.rank + 1) % self.ranks
        while True:
            self.store.set(f"alive/{self.rank}", str(beat := beat + 1))
            if failure := self._said("failure"):
                self._end_process(failure)
            now, since = time.monotonic(), self._since
            if (seen := self._said(f"alive/{other}")) != last:
                last, changed = seen, now
            elif now - changed > self.silence_seconds and seen != "closed":
                doing = self._said(f"doing/{other}", "its setup")
                self._post(self.store, f"rank {other} has died or does not answer; it was in {doing}")
            # One that waits inside a collective leaves it to the rank that keeps the others waiting to speak first.
            grace = 4 * self._beat_seconds if self.meter.inside else 0.0
            if since is not None and now - since > self.timeout_seconds + grace:
                where = self._doing + (f", inside {self.meter.inside}," if self.meter.inside else "")
                allowed = f"at most {self.timeout_seconds:g} s are allowed"
                self._post(self.store, f"rank {self.rank} has been in {where} for {now - since:.1f} s ({allowed})")
            woken = self._woken.recv(64) if select.select([self._woken], [], [], self._beat_seconds)[0] else b""
            if CLOSE in woken:
                break
            told_to_end = now if signal.SIGTERM in woken else told_to_end
            if told_to_end is not None and now - told_to_end > 2 * self.silence_seconds:
                self._post(self.store, f"rank {self.rank} was told to end (SIGTERM) in {self._doing}")
        self.store.set(f"alive/{self.rank}", "closed")

    def _said(self, key: str, otherwise: str = "") -> str:
        return self.store.get(key).decode() if self.store.check([key]) else otherwise

    @staticmethod
    def _post(store: Any, reason: str) -> None:
        """The first reason counts."""
        store.compare_set("failure", "", reason)

    def _end_process(self, reason: str, alone: bool = False) -> None:
        """The first rank to come here saves what there is and speaks; then all end."""
        speaker = alone or self.store.add("speaker", 1) == 1
        if speaker:
            try:
                self.save(reason)
            except Exception as error:
                reason += f" (and the timeline could not be written: {error})"
            print(f"real.run: {reason}", file=sys.stderr)
        try:
            self.store.add("ended", 1)
            if speaker:
                self._wait_for(lambda: self.store.add("ended", 0) >= self.ranks - 1, self.silence_seconds)
                self.store.set("saved", "")
            else:
                self._wait_for(lambda: self.store.check(["saved"]), 3 * self.silence_seconds)
        except Exception:
            pass  # the store is gone; so is the run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)

    def _wait_for(self, done: Callable[[], Any], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not done() and time.monotonic() < until:
            time.sleep(0.05)
