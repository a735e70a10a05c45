"""Processes that run graphs by `real.executor`, with work that sleeps, notes what it saw, and makes fields that tell
where they come from."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from real.clock import align
from real.executor import Executor, LaneStore
from real.groups import Groups
from real.meter import Meter
from rlhfsim.firing import Firing
from rlhfsim.graph import StageGraph
from rlhfsim.real_limits import rank_sets
from rlhfsim.records import Clock, RecordFile, read, timeline
from rlhfsim.timeline import write
from rlhfsim.watch import Watch

Seen = list[tuple[Firing, Firing, int, dict[str, list[int]]]]  # consumer, producer, lane, fields
os.environ.setdefault("DS_ACCELERATOR", "cpu")
CONTEXT = mp.get_context("forkserver")  # a server imports what takes seconds once (if it is there), and forks the ranks
CONTEXT.set_forkserver_preload(["rank_processes", "torch._dynamo", "deepspeed"])


def made(f: Firing, lane: int, name: str) -> list[int]:
    """What a stage makes of a lane: ragged, and naming its maker. The same for every place (a replica is no maker)."""
    length = 1 + (3 * lane + f.chunk + f.iteration) % 5
    return [f.iteration, sum(f.stage.encode()), f.chunk, lane, sum(name.encode()), *range(length)]


@dataclass(frozen=True)
class Sleeps:
    """Seconds by stage (`ref` for `ref.0` too), of `gen` by place, or anything up to `jitter`, alike on all ranks."""

    jitter: float = 0.003
    by_stage: dict[str, float] = field(default_factory=dict)
    gen_by_place: dict[int, float] = field(default_factory=dict)

    def __call__(self, f: Firing) -> float:
        if f.stage == "gen" and f.place in self.gen_by_place:
            return self.gen_by_place[f.place]
        return self.by_stage.get(f.stage.partition(".")[0], random.Random(repr(f)).uniform(0, self.jitter))


@dataclass(frozen=True)
class Trouble:
    """What happens to a rank in a firing (on any place): it is killed, hangs or raises."""

    kind: str
    rank: int
    firing: Firing

    def __call__(self, rank: int, f: Firing) -> None:
        if rank != self.rank or f[:3] != self.firing[:3]:
            return
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hangs":
            time.sleep(3600)
        raise ValueError("there are no weights")


@dataclass
class Tell:
    """Work that sleeps and writes down its inbox; updates and syncs call an all-reduce."""

    graph: StageGraph
    rank: int
    groups: Groups
    sleeps: Sleeps
    trouble: Trouble | None = None
    seen: Seen = field(default_factory=list)

    def __call__(self, f: Firing, stage: Any, inbox: Any, turn: Any) -> dict[int, dict[str, torch.Tensor]]:
        for (g, lane), fields in inbox.items():
            self.seen.append((f, g, lane, {name: x.tolist() for name, x in fields.items()}))
        if self.trouble:
            self.trouble(self.rank, f)
        time.sleep(self.sleeps(f))
        if stage.kind in ("train", "sync") and stage.size > 1:
            self.groups.all_reduce(torch.ones(100), stage.ranks_of(f.place))
        names = {name for *_, carries in self.graph.out_edges(f.stage, data="carries") for name in carries}
        return {
            lane: {
                name: torch.tensor(made(f, lane, name), dtype=torch.int32 if name == "mask" else torch.int64)
                for name in names
            }
            for lane in stage.lanes_of(f.place)
            if stage.home(lane, f.place) == self.rank
        }


@dataclass(frozen=True)
class Job:
    """A graph to run; the records of all ranks go into `folder`."""

    graph: StageGraph
    iterations: int
    folder: Path
    sleeps: Sleeps = Sleeps()


def perform(rank: int, ranks: int, store: dist.Store, job: Job) -> Seen:
    """Run a job on one rank."""
    meter = Meter()
    groups, clock = Groups(rank, rank_sets(job.graph, {}), meter), align(rank, ranks, 5)
    work = Tell(job.graph, rank, groups, job.sleeps)
    file = RecordFile(job.folder, rank, clock)
    Executor(job.graph, rank, work, job.iterations, store, groups, clock, file=file).run()
    return work.seen


class Ranks:
    """So many processes in one group, kept for many calls; ranks that a graph does not use follow the log and idle."""

    def __init__(self, count: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self._processes = [], []
        for rank in range(count):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, count, self.store.port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[Any]:
        """function(rank, ranks, store, *arguments) on every rank; what each gave back."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        until, results = time.monotonic() + seconds, []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise TimeoutError(f"rank {rank} does not answer")
            fine, result = pipe.recv()
            if not fine:
                raise RuntimeError(f"rank {rank}: {result}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    store, number = _join(rank, ranks, port), 0
    while True:
        function, arguments = pipe.recv()
        number += 1
        try:
            pipe.send((True, function(rank, ranks, dist.PrefixStore(f"call{number}", store), *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _join(rank: int, ranks: int, port: int) -> dist.TCPStore:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    return store


def suffer(rank: int, ranks: int, port: int, graph: StageGraph, trouble: Trouble, folder: Path) -> None:
    """One rank of a watched run in which a rank comes to harm; it says what happened in `folder`."""
    sys.stderr = (folder / f"stderr{rank}").open("w")
    store, meter, records = _join(rank, ranks, port), Meter(), folder / "ranks"

    def save(reason: str) -> None:
        found = timeline(graph, read(records, ranks), ranks, 3, info={"failure": reason})
        write(found, folder / "timeline.jsonl")

    watch = Watch(
        dist.PrefixStore("watch", store), rank, ranks, meter, timeout_seconds=2.0, silence_seconds=2.5, save=save
    )
    watch.start()
    groups = Groups(rank, rank_sets(graph, {}), meter)
    work, file = Tell(graph, rank, groups, Sleeps(), trouble), RecordFile(records, rank, Clock())
    log, results = dist.PrefixStore("run", store), LaneStore()
    Executor(graph, rank, work, 3, log, groups, Clock(), results, watch, file).run()
    watch.close()
