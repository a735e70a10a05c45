"""Engines whose responses outlive a firing: each rank has its own, and all know what the others have.

They run freely, until those that see enough responses ended (ranks count them together) or are asked to stop do so.
Then all meet and tell each other what they have, so that what follows is decided by all alike.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlhfsim.batch import per_replica
from rlhfsim.records import Clock
from rlhfsim.rollouts import Held, Request

from .executor import Turn
from .generate import Generation
from .groups import Groups

POLL_SECONDS = 0.5e-3  # between two looks of an engine that has nothing to do


class Rollout:
    """This rank's engine, and the books that all ranks of the place keep alike.

    keeps: unfinished responses stay in the engines, and so do their caches; else each firing shares them out again.
    """

    def __init__(self, engine: Generation, held: Held, ranks: Sequence[int], groups: Groups, keeps: bool) -> None:
        self.engine, self.held, self.ranks, self.groups, self.keeps = engine, held, ranks, groups, keeps

    def begin(self, new: Sequence[Request]) -> None:
        """Each lot is shared out evenly: first those that were stopped, then new ones."""
        stopped = [] if self.keeps else sorted(self.held.unfinished(), key=lambda r: r.sample)
        self.held.begin(new)
        for lot in (stopped, new):
            mine = per_replica(np.arange(len(lot)), len(self.ranks))[self.ranks.index(self.groups.rank)]
            self.engine.submit([lot[k] for k in mine])

    def run(self, wanted: int, turn: Turn) -> list[Request] | None:
        """Go on until so many responses are ready, and hand them over; None where the engines had to stop before."""
        missing, ended = wanted - len(self.held.ready()), list[Request]()
        left = Counter(r.sample // self.held.per_prompt for r in self.held.unfinished())
        while turn.count("ready", 0) < missing and not turn.asked_to_stop():
            if not self.engine.busy:
                time.sleep(POLL_SECONDS)
                continue
            done, now = self.engine.step(), Clock.read()
            for r in done:
                r.ended_ns, prompt = now, r.sample // self.held.per_prompt
                if turn.count(f"prompt {prompt}", 1) == left[prompt]:
                    turn.count("ready", self.held.per_prompt)
            ended += done
        going = [*self.engine.running, *self.engine.waiting]
        told = self.groups.gather([*ended, *(r.outline() if self.keeps else r for r in going)], self.ranks)
        self.held.known |= {r.sample: r for part in told for r in part}
        if not self.keeps:
            self.engine.remove(self.held.known)
        return self.held.hand_over(wanted) if len(self.held.ready()) >= wanted else None

    def throw_away(self, before: int | None = None) -> float:
        """See `Held.throw_away`; the tokens that are lost."""
        gone = self.held.throw_away(before)
        self.engine.remove({r.sample for r in gone})
        return float(sum(len(r.versions) for r in gone))

    def enter(self, version: int, recompute: bool) -> None:
        """The decoder has new weights. recompute: the caches of what runs are computed again."""
        self.engine.version = self.held.version = version
        if recompute:
            self.engine.restart()
