"""The scheduler: which firings start now, as a pure function of the firings that are done. Nothing else decides.

It has no clock. Executors (the simulator, and every rank of a real run with its own copy) feed it the same log of
finished firings and therefore do the same. It hands out all ranks of a place at once (nothing holds and waits), and
each rank in program order, but for stages that enter when they are ready: those go first.

An interrupting stage makes the scheduler ask running firings to stop (`pauses`). Where they stop is the executor's to
find; it reports `paused(f)`, in the same log, and f starts again when the other stage is done with its ranks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from .firing import Firing
from .graph import ANY_PLACE, StageGraph, earlier


class Scheduler:
    """Runs `iterations` iterations of a graph. Call `step()`, run what it starts, call `done(f)` as they end.

    pauses: running firings that should stop at their next decode step, as of the last `step()`; report `paused(f)`, or
    `done(f)` where the end comes first.
    """

    def __init__(self, graph: StageGraph, iterations: int) -> None:
        self.graph, self.iterations = graph, iterations
        self._program: dict[int, list[Firing]] = defaultdict(list)  # rank -> its firings of one iteration
        for f in graph.program():
            for rank in graph.ranks(f):
                self._program[rank].append(f)
        self._position = dict.fromkeys(self._program, 0)  # rank -> firings it has finished
        self.log: set[Firing] = set()
        self._busy: dict[int, Firing] = {}
        self._met: dict[Firing, int] = defaultdict(int)  # firing -> ranks that have come to it
        self._ready: list[Firing] = []
        self._waiting: dict[Firing, list[Firing]] = defaultdict(list)  # unmet need -> who waits for it
        self._completed = {}  # stage of spread "first" -> how many have ended
        self.pauses: list[Firing] = []
        self._stopped: set[Firing] = set()  # paused, and not yet going on
        per_iteration = len(graph.program())
        for stage in graph.stages():
            if stage.spread == "first":
                self._completed[stage.name] = 0
                per_iteration += stage.firings
                self._offer(Firing(0, stage.name, 0, ANY_PLACE))
            elif stage.enters != "in_order":
                per_iteration += stage.firings * stage.places
                for place in range(stage.places):
                    self._offer(Firing(0, stage.name, 0, place))
        self.left = per_iteration * iterations
        self._arrive(self._program)

    def step(self) -> list[Firing]:
        """Firings that start now. Call it when everything that happens at this instant has been reported."""
        starts: list[Firing] = []
        pauses: set[Firing] = set()
        kept: set[int] = set()  # ranks that a stage out of turn, or a firing that was stopped, waits for
        for f in sorted(self._ready, key=self._priority):
            stage = self.graph.at(f.stage)
            if f.place == ANY_PLACE:  # every free place takes the next number
                for place in range(stage.places):
                    if f in self._ready and self._free(stage.ranks_of(place), kept):
                        self._take(f, f._replace(place=place), starts)
                        f = earlier(f, -1, stage)
                        self._offer(f)
            elif self._free(self.graph.ranks(f), kept):
                self._take(f, f, starts)
            elif stage.enters != "in_order" or f in self._stopped:
                kept.update(self.graph.ranks(f))
                if stage.enters == "interrupts":
                    running = {self._busy[rank] for rank in self.graph.ranks(f) if rank in self._busy}
                    pauses |= {g for g in running if self._stops(g)}
        self.pauses = sorted(pauses)
        return starts

    def _stops(self, f: Firing) -> bool:
        """(What entered out of turn itself does not stop: two such stages would interrupt each other for ever.)"""
        stage = self.graph.at(f.stage)
        return stage.kind == "generate" and stage.enters == "in_order"

    def _free(self, ranks: Iterable[int], kept: set[int]) -> bool:
        return not any(rank in self._busy or rank in kept for rank in ranks)

    def done(self, f: Firing) -> Firing:
        """Report that f has ended. Returns the name by which its consumers know it.

        (With spread "first" a result is numbered when it completes: a chunk is a quantity, not a list of samples.)
        """
        stage, ranks = self.graph.at(f.stage), self.graph.ranks(f)
        for rank in ranks:
            del self._busy[rank]
        self.left -= 1
        if stage.spread == "first":
            number = self._completed[f.stage]
            self._completed[f.stage] += 1
            f = Firing(number // stage.firings, f.stage, number % stage.firings, ANY_PLACE)
        self.log.add(f)
        if stage.enters != "in_order":
            self._offer(earlier(f, -1, stage))
        elif stage.spread != "first":
            for rank in ranks:
                self._position[rank] += 1
        for waiting in self._waiting.pop(f, ()):
            self._offer(waiting)
        if stage.enters == "in_order" and stage.spread != "first":
            self._arrive(ranks)
        return f

    def paused(self, f: Firing) -> None:
        """Report that f has stopped before its end. It starts again as soon as what interrupts it is done."""
        for rank in self.graph.ranks(f):
            del self._busy[rank]
        self._stopped.add(f)
        self._ready.append(f)

    def stuck(self) -> str:
        """Who waits for what, in words; for error messages."""
        pairs = [f"{f.stage}[{f.chunk}] waits for {n.stage}[{n.chunk}]" for n, fs in self._waiting.items() for f in fs]
        return "; ".join(pairs[:4]) or "ranks of one place never meet"

    def _next_of(self, rank: int) -> Firing | None:
        position, program = self._position[rank], self._program[rank]
        if position >= len(program) * self.iterations:
            return None
        return program[position % len(program)]._replace(iteration=position // len(program))

    def _arrive(self, ranks: Iterable[int]) -> None:
        """Ranks that have come to their next firing; the last one of its place makes it an offer."""
        for f, count in Counter(map(self._next_of, ranks)).items():
            if f is not None:
                self._met[f] += count
                if self._met[f] == len(self.graph.ranks(f)):
                    del self._met[f]
                    self._offer(f)

    def _offer(self, f: Firing) -> None:
        """Make f ready, or let it wait for one unmet need at a time: until that is met it costs nothing."""
        if f.iteration >= self.iterations or f in self._ready:
            return
        for need in self.graph.needs(f):
            if need not in self.log:
                self._waiting[need].append(f)
                return
        self._ready.append(f)

    def _priority(self, f: Firing) -> tuple[bool, bool, bool, Firing]:
        return self.graph.at(f.stage).enters == "in_order", f not in self._stopped, f.place == ANY_PLACE, f

    def _take(self, offered: Firing, started: Firing, starts: list[Firing]) -> None:
        self._ready.remove(offered)
        self._stopped.discard(started)
        for rank in self.graph.ranks(started):
            self._busy[rank] = started
        starts.append(started)


def check(graph: StageGraph) -> StageGraph:
    """Run the graph without a clock; a graph that finishes so finishes with any durations.

    Raises ValueError naming who waits for whom where it cannot finish.
    """
    longest_lag = max((lag for *_, lag in graph.edges(data="lag")), default=0)
    scheduler = Scheduler(graph, longest_lag + 2)
    while starts := scheduler.step():
        for f in starts:
            scheduler.done(f)
    if scheduler.left:
        raise ValueError(f"the strategy cannot finish: {scheduler.stuck()}")
    return graph
