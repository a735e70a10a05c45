"""Run a StageGraph on real ranks: each replays the same scheduler on a shared log, and does its part of what starts.

The log lies in the store: `add` gives every entry its number, so that all ranks read the same entries in the same order
and ask their scheduler at the same points. Nothing here decides an order.

Results move as one message per lane and consumer. When a rank reads that a firing has ended, it sends what is its to
send and opens a buffer for what it will receive (the log tells the shapes), in the order of the log: so both ends
number a pair's messages alike, and no send waits for a consumer to come to its stage. Messages go through host memory.
"""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from rlhfsim.firing import Firing
from rlhfsim.graph import Message, Stage, StageGraph
from rlhfsim.records import Clock, Record, RecordFile
from rlhfsim.schedule import Scheduler
from rlhfsim.watch import Watch, describe

from .groups import Fields, Groups, Shapes, pack, packed_bytes, shapes_of, unpack

FOREVER = timedelta(days=365)  # reading the log waits for other ranks' work; whether they live is for the watch to say

Inbox = dict[tuple[Firing, int], Fields]


class Paused(Exception):
    """Raised by work that has stopped before its end, on all ranks of the place; it is called again to go on."""


@dataclass(frozen=True)
class Turn:
    """A firing that starts or goes on: what its work can learn while it runs.

    asked_to_stop: whether another firing waits for this one to stop. count: add to a counter, which is 0 at first, by
    name; gives the sum over the firing's ranks.
    """

    asked_to_stop: Callable[[], bool]
    count: Callable[[str, int], int]


class Work(Protocol):
    """What a stage does. Called on every rank of the firing's place.

    inbox: by (producer's firing, lane) what came along edges that carry something, for the lanes at home on this rank.
    Returns, by lane at home on this rank, the fields that the stage produced (None: nothing).
    """

    def __call__(self, f: Firing, stage: Stage, inbox: Inbox, turn: Turn) -> dict[int, Fields] | None: ...


def base_name(stage: str) -> str:
    """`ref` of `ref.0`: turns of one step have distinct lanes, so their results lie together."""
    return stage.partition(".")[0]


class LaneStore:
    """What lies on this rank: results of its own firings and what it received, until a later iteration begins here."""

    def __init__(self) -> None:
        self._fields: dict[tuple[int, str, int, int], Fields] = defaultdict(dict)

    def put(self, f: Firing, lane: int, fields: Fields) -> None:
        self._fields[f.iteration, base_name(f.stage), f.chunk, lane] |= fields

    def chunks(self, iteration: int, stage: str, lane: int) -> dict[int, Fields]:
        """All chunks of a lane that lie here, in order."""
        of = iteration, base_name(stage), lane
        return {key[2]: fields for key, fields in sorted(self._fields.items()) if (key[0], key[1], key[3]) == of}

    def forget_before(self, iteration: int) -> None:
        for key in [key for key in self._fields if key[0] < iteration]:
            del self._fields[key]


@dataclass
class Executor:
    """Runs so many iterations; every rank makes one and calls `run`, with the same graph.

    store: holds the log, under names that no other run uses (a PrefixStore). results: where stages find what they do
    not get as messages. file: takes each record as it is made. An exception of `work` is reported to `watch`, which
    ends all ranks; without one it is raised.
    """

    graph: StageGraph
    rank: int
    work: Work
    iterations: int
    store: Store
    groups: Groups
    clock: Clock
    results: LaneStore = field(default_factory=LaneStore)
    watch: Watch | None = None
    file: RecordFile | None = None

    def __post_init__(self) -> None:
        self.store.set_timeout(FOREVER)
        self.scheduler = Scheduler(self.graph, self.iterations)
        self.records: list[Record] = []
        self._read = 0  # entries of the log
        self._arriving: dict[tuple[Firing, str, int], Callable[[], Fields]] = {}  # each waits for its message
        self._leaving: list[tuple[Any, Tensor]] = []  # sends and their buffers, which must live until they are done
        self._numbers: dict[tuple[int, int], int] = defaultdict(int)  # messages so far from rank to rank
        self._mine: dict[int, Fields] = {}  # results of the firing that has just ended here
        self._parts: Counter[Firing] = Counter()  # how often a firing was stopped
        edges = list(self.graph.edges(data=True))
        self._longest_lag = max((edge["lag"] for *_, edge in edges), default=0)
        self._sending = {u for u, _, edge in edges if edge["carries"]}
        self._receiving = {v for _, v, edge in edges if edge["carries"]}

    def run(self) -> list[Record]:
        """What this rank's firings took."""
        try:
            self._run()
        except BaseException as error:
            if self.watch is None:
                raise
            traceback.print_exc()
            self.watch.fail(error)
        return self.records

    def _run(self) -> None:
        while self.scheduler.left:
            for f in self.scheduler.step():
                if self.rank in self.graph.ranks(f):
                    self._fire(f)
            self._replay()
        for handle, _ in self._leaving:
            handle.wait()
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < self.groups.world_size:  # nobody leaves while others still need it
            time.sleep(0.005)

    def _fire(self, f: Firing) -> None:
        stage, ranks, meter = self.graph.at(f.stage), self.graph.ranks(f), self.groups.meter
        if self.watch:
            self.watch.enter(f)
        self._forget_before(f.iteration - self._longest_lag)
        meter.begin()
        begin = self.clock.read()
        inbox, data = {}, begin
        if f.stage in self._receiving:
            inbox = self._received(f, stage)
            data = self.clock.read()
            if len(ranks) > 1:
                self.groups.meet(ranks)  # all start together, so that waiting for data is no communication
        start = self.clock.read()
        part, stopped, counter = self._parts[f], False, self._key("count", f)
        turn = Turn(partial(self._asked_to_stop, f), lambda name, more: self.store.add(f"{counter}/{name}", more))
        try:
            made = self.work(f, stage, inbox, turn) if stage.works_in(f.iteration) else None
            self._mine = made or {}
        except Paused:
            stopped = True
            if self.rank == ranks[0]:
                meter.counts["interrupts"] = 1.0
        meter.synchronize()
        end = self.clock.read()
        measured = meter.end()
        self._report(f, stage, ranks, stopped)
        if self.watch:
            self.watch.leave()
        self.records.append(Record(f, self.rank, begin, data, start, end, measured, part))
        if self.file:
            self.file.add(self.records[-1])

    def _received(self, f: Firing, stage: Stage) -> Inbox:
        found = {}
        for g, lane, _ in self.graph.receives(f):
            if stage.home(lane, f.place) == self.rank:
                if (g, f.stage, lane) not in self._arriving:
                    raise RuntimeError(f"{describe(f)}: lane {lane} of {describe(g)} was not sent to rank {self.rank}")
                found[g, lane] = self._arriving[g, f.stage, lane]()
                self.results.put(g, lane, found[g, lane])
        return found

    def _report(self, f: Firing, stage: Stage, ranks: tuple[int, ...], stopped: bool) -> None:
        """Say that f has ended here, or stopped; the last rank of its place logs it, with its results' shapes."""
        shapes: dict[int, Shapes] = {}
        sends = f.stage in self._sending and not stopped
        if sends:
            lanes = [lane for lane in stage.lanes_of(f.place) if stage.home(lane, f.place) == self.rank]
            if missing := [lane for lane in lanes if lane not in self._mine]:
                raise RuntimeError(f"{describe(f)} gave nothing for its lanes {missing} on rank {self.rank}")
            shapes = {lane: shapes_of(self._mine[lane]) for lane in lanes}
        name = self._key("ended", f)
        self._parts[f] += stopped
        if len(ranks) > 1:
            if shapes:
                self.store.set(f"{name}/{self.rank}", json.dumps(shapes))
            if self.store.add(name, 1) < len(ranks):
                return
            if sends:
                homes = {stage.home(lane, f.place) for lane in stage.lanes_of(f.place)}
                for text in self.store.multi_get([f"{name}/{home}" for home in homes]):
                    shapes |= json.loads(text)
        number = self.store.add("log", 1) - 1
        self.store.set(f"log/{number}", json.dumps([f, shapes, stopped]))

    def _key(self, what: str, f: Firing) -> str:
        """In the store, of a firing or of one part of it."""
        return f"{what}/{f.iteration}/{f.stage}/{f.chunk}/{f.place}/{self._parts[f]}"

    def _asked_to_stop(self, f: Firing) -> bool:
        """Read what the log has got while f runs here. (What it lets start is not on this rank, which is busy.)"""
        while self.store.check([f"log/{self._read}"]):
            self._replay()
            self.scheduler.step()
        return f in self.scheduler.pauses

    def _replay(self) -> None:
        """Read the next entry: f has stopped, or ended and its results move under the name that the scheduler gives."""
        entry, shapes, stopped = json.loads(self.store.get(f"log/{self._read}"))
        self._read += 1
        f = Firing(*entry)
        if stopped:
            self.scheduler.paused(f)
            return
        name, here = self.scheduler.done(f), self.rank in self.graph.ranks(f)
        if here:
            for lane, made in self._mine.items():
                self.results.put(name, lane, made)
        if f.stage in self._sending:
            for message in self.graph.sends(name, f.place):
                if self.rank in (message.source, message.destination):
                    self._move(message, shapes[str(message.lane)])
        if here:
            self._mine = {}
            if name != f and self.file:
                self.file.named(f, name)

    def _move(self, message: Message, shapes: Shapes) -> None:
        source, destination = message.source, message.destination
        key = message.producer, message.consumer, message.lane
        if missing := [name for name in message.fields if name not in shapes]:
            what = ", ".join(missing)
            raise RuntimeError(f"{describe(message.producer)} gave no {what}, which {message.consumer} needs")
        shapes = {name: shapes[name] for name in message.fields}
        own = {name: self._mine[message.lane][name] for name in shapes} if self.rank == source else {}
        if source == destination:
            self._arriving[key] = lambda: own
            return
        number = self._numbers[source, destination]
        self._numbers[source, destination] += 1
        if not (size := packed_bytes(shapes)):
            self._arriving[key] = partial(unpack, torch.empty(0, dtype=torch.uint8), shapes, self.groups.device)
        elif self.rank == source:
            self._leaving = [(h, b) for h, b in self._leaving if not h.is_completed()]
            self._leaving.append((dist.isend(packed := pack(own), destination, tag=number), packed))
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
            handle = dist.irecv(buffer, source, tag=number)
            self._arriving[key] = cache(partial(_received, handle, buffer, shapes, self.groups.device))

    def _forget_before(self, iteration: int) -> None:
        """Everything on a rank happens iteration by iteration: what lies here of earlier ones is not used any more."""
        self.results.forget_before(iteration)
        for key in [key for key in self._arriving if key[0].iteration < iteration]:
            self._arriving.pop(key)()


def _received(handle: Any, buffer: Tensor, shapes: Shapes, device: torch.device) -> Fields:
    handle.wait()
    return unpack(buffer, shapes, device)
