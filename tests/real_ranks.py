"""Run scenarios on real ranks: one process that imports torch once, forks the ranks, and keeps them for all its jobs.

`python tests/real_ranks.py FOLDER` reads FOLDER/jobs.json (name -> changes of `scenarios.scenario`, iterations, what to
break) and writes, per job, FOLDER/NAME.pt: by rank the trained weights and who ran when, and seconds.
"""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import dataclasses
import faulthandler
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import deepspeed  # noqa: E402, F401
from scenarios import scenario  # noqa: E402

from real import executor, generate, rollout, stages  # noqa: E402
from real.groups import Groups  # noqa: E402
from real.meter import Meter  # noqa: E402
from rlhfsim.graph import StageGraph  # noqa: E402
from rlhfsim.layout import graph_of, holdings_of  # noqa: E402
from rlhfsim.real_limits import rank_sets, sync_rank_sets  # noqa: E402
from rlhfsim.records import Clock  # noqa: E402
from rlhfsim.rollouts import Request  # noqa: E402

JOB_SECONDS = 150.0  # the first that uses DeepSpeed may have to build its extension


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    children = []
    ranks = json.loads((folder / "ranks").read_text())
    for rank in range(ranks):
        if not (child := os.fork()):
            code = 1
            try:
                _rank(folder, rank, ranks)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(bool(failed))


def _rank(folder: Path, rank: int, ranks: int) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    log = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), ranks, rank == 0, timedelta(seconds=60))
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        begin = time.monotonic()
        faulthandler.dump_traceback_later(JOB_SECONDS, exit=True)  # a rank that hangs says where, and ends
        result = _job(rank, dist.PrefixStore(name, log), **job)
        if rank == 0:
            torch.save(result | {"seconds": time.monotonic() - begin}, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.pt")
        dist.barrier()
    faulthandler.cancel_dump_traceback_later()


def _job(rank: int, store: Any, changes: dict[str, Any], iterations: int, broken: Sequence[str] = ()) -> dict[str, Any]:
    """All ranks run a job and get everybody's results."""
    found = scenario(**changes)
    graph, _ = graph_of(found)
    holdings = holdings_of(found, graph)
    with contextlib.ExitStack() as stack:
        for name in broken:
            graph = BREAKS[name](graph, stack)
        sets = rank_sets(graph, holdings) | sync_rank_sets(graph, holdings, found.weight_sync.method)
        groups, results = Groups(rank, sets, Meter()), executor.LaneStore()
        work = stages.Stages(found, graph, holdings, rank, groups, results)
        records = executor.Executor(graph, rank, work, iterations, store, groups, Clock(), results).run()
        trained = [n for n, held in holdings.items() if held.purpose == "train" and rank in held.ranks]
        mine = {n: work.weights(n) for n in trained}
        parts: list[Any] = [None] * dist.get_world_size()
        work.close()
        books = [found.books() for found in work.rollouts.values()]
        dist.all_gather_object(parts, (mine, [(r.firing, r.start, r.end) for r in records], records, books))
    return dict(zip(("weights", "spans", "records", "books"), zip(*parts, strict=True), strict=True))


class Booked(rollout.Rollout):
    """Writes down what it hands over and throws away."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.handed_over: list[list[Any]] = []
        self.lost = 0.0

    def run(self, wanted: int, turn: Any) -> Any:
        done = super().run(wanted, turn)
        self.handed_over += [done] if done is not None else []
        return done

    def throw_away(self, before: int | None = None) -> float:
        lost = super().throw_away(before)
        self.lost += lost
        return lost

    def books(self) -> dict[str, Any]:
        left = sum(len(r.versions) for r in self.held.known.values())
        drawn = getattr(self.engine, "drawn", 0)
        return {"handed_over": self.handed_over, "lost": self.lost, "left": left, "drawn": drawn}


stages.Rollout = Booked  # type: ignore[misc]


def _counted(self: Any, logits: Any, requests: Any, draw: Any = generate.Generation._draw) -> None:
    self.drawn = getattr(self, "drawn", 0) + len(requests)
    draw(self, logits, requests)


generate.Generation._draw = _counted  # type: ignore[method-assign]


# --- what breaks a run -----------------------------------------------------------------------------------------------


def _stale_weights(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
    """The weight sync has work in every other iteration only."""
    graph.nodes["update_weights"]["stage"] = dataclasses.replace(graph.at("update_weights"), every=2)
    return graph


def _lost_update(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
    """The first weight sync says that it has brought new weights, and has not."""
    sync = stages.Stages._sync
    stack.callback(setattr, stages.Stages, "_sync", sync)
    stages.Stages._sync = lambda self, f, stage: None if f.iteration == 0 else sync(self, f, stage)  # type: ignore
    return graph


def _wrong_prefix(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
    """What is resumed is read from its last token on."""
    text = Request.text
    stack.callback(setattr, Request, "text", text)

    def wrong(r: Request) -> np.ndarray:
        right = text.fget(r)  # type: ignore[attr-defined]
        return np.roll(right, 1) if r.tokens else right

    Request.text = property(wrong)  # type: ignore[method-assign, assignment]
    return graph


def _slow(stage: str) -> Callable[[StageGraph, contextlib.ExitStack], StageGraph]:
    """Generation, or training, takes longer than all the rest."""

    def slowed(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
        owner, name, seconds = {
            "generation": (generate.Generation, "step", 0.01),
            "training": (stages.Stages, "_train", 0.3),
        }[stage]
        quick = getattr(owner, name)
        stack.callback(setattr, owner, name, quick)

        def slow(*arguments: Any) -> Any:
            time.sleep(seconds)
            return quick(*arguments)

        setattr(owner, name, slow)
        return graph

    return slowed


def _one_buffer(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
    """What a rank receives from another lands in the same buffer again, while the last message is still needed."""
    buffers: dict[int, torch.Tensor] = {}

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
            return buffers.setdefault(size, torch.empty(size, dtype=dtype))

    stack.callback(setattr, executor, "torch", executor.torch)
    executor.torch = Torch()  # type: ignore[assignment]
    return graph


BREAKS = {
    "stale_weights": _stale_weights,
    "one_buffer": _one_buffer,
    "lost_update": _lost_update,
    "wrong_prefix": _wrong_prefix,
    "slow_generation": _slow("generation"),
    "slow_training": _slow("training"),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
