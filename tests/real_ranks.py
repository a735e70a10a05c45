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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import deepspeed  # noqa: E402, F401
from scenarios import scenario  # noqa: E402

from real import executor, stages  # noqa: E402
from real.groups import Groups  # noqa: E402
from real.meter import Meter  # noqa: E402
from rlhfsim.graph import StageGraph  # noqa: E402
from rlhfsim.layout import graph_of, holdings_of  # noqa: E402
from rlhfsim.real_limits import rank_sets, sync_rank_sets  # noqa: E402
from rlhfsim.records import Clock  # noqa: E402

RANKS = 6
JOB_SECONDS = 60.0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    children = []
    for rank in range(RANKS):
        if not (child := os.fork()):
            code = 1
            try:
                _rank(folder, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(bool(failed))


def _rank(folder: Path, rank: int) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("groups", store), rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    log = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), RANKS, rank == 0, timedelta(seconds=60))
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        begin = time.monotonic()
        faulthandler.dump_traceback_later(JOB_SECONDS, exit=True)  # a rank that hangs says where, and ends
        result = _job(rank, dist.PrefixStore(name, log), **job)
        if rank == 0:
            torch.save(result | {"seconds": time.monotonic() - begin}, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.pt")
        dist.barrier()
    faulthandler.cancel_dump_traceback_later()


def _job(rank: int, store: Any, changes: dict[str, Any], iterations: int, broken: str | None = None) -> dict[str, Any]:
    """All ranks run a job and get everybody's results."""
    found = scenario(**changes)
    graph, _ = graph_of(found)
    holdings = holdings_of(found, graph)
    with contextlib.ExitStack() as stack:
        if broken:
            graph = BREAKS[broken](graph, stack)
        sets = rank_sets(graph, holdings) | sync_rank_sets(graph, holdings, found.weight_sync.method)
        groups, results = Groups(rank, sets, Meter()), executor.LaneStore()
        work = stages.Stages(found, graph, holdings, rank, groups, results)
        records = executor.Executor(graph, rank, work, iterations, store, groups, Clock(), results).run()
        trained = [n for n, held in holdings.items() if held.purpose == "train" and rank in held.ranks]
        mine = {n: work.weights(n) for n in trained}
        parts: list[Any] = [None] * RANKS
        work.close()
        dist.all_gather_object(parts, (mine, [(r.firing, r.start, r.end) for r in records]))
    return {"weights": [part[0] for part in parts], "spans": [part[1] for part in parts]}


# --- what breaks a run -----------------------------------------------------------------------------------------------


def _stale_weights(graph: StageGraph, stack: contextlib.ExitStack) -> StageGraph:
    """The weight sync has work in every other iteration only."""
    graph.nodes["update_weights"]["stage"] = dataclasses.replace(graph.at("update_weights"), every=2)
    return graph


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


BREAKS = {"stale_weights": _stale_weights, "one_buffer": _one_buffer}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
