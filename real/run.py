"""torchrun --nproc-per-node N -m real.run scenario.yaml [a.b=c ...] --iterations 3 --warmup 1 --out timeline.jsonl

Runs a scenario's graph on the ranks that torchrun started (gloo on CPUs, NCCL on GPUs) and writes what it took.
Exit codes: 0 fine, 2 bad input (one message, from rank 0), 1 a rank died, hung or raised: the message names the stage,
and the spans up to there are written all the same. (torchrun itself ends with 1 in both cases.)
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfsim import real_limits
from rlhfsim import timeline as timelines
from rlhfsim.errors import InputError
from rlhfsim.graph import StageGraph
from rlhfsim.layout import Holding, graph_of, holdings_of
from rlhfsim.records import RecordFile, read, record_path, timeline
from rlhfsim.spec.loader import load_scenario
from rlhfsim.spec.scenario import Scenario

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

BAD_INPUT = 2
GROUP_SECONDS = 24 * 3600.0  # of a collective: whether a rank hangs is for the watch to say


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @classmethod
    def from_launcher(cls) -> Place:
        """As torchrun's environment says; alone without it."""
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return cls(*(int(os.environ.setdefault(name, value)) for name, value in alone.items()))


@dataclass(frozen=True)
class Job:
    """A scenario to run, and how; `save` writes the timeline of what has been recorded so far."""

    scenario: Scenario
    graph: StageGraph
    holdings: dict[str, Holding]
    notes: list[str]
    options: argparse.Namespace
    place: Place
    device: torch.device

    @property
    def records(self) -> Path:
        return self.options.out.with_name(self.options.out.name + ".ranks")

    def save(self, reason: str = "") -> timelines.Timeline:
        info = _info(self.scenario, self.device) | ({"failure": reason} if reason else {})
        info |= {"off_policy": True} if self.graph.off_policy else {}
        kept, records = self.options, read(self.records, self.place.ranks)
        found = timeline(self.graph, records, self.place.ranks, kept.iterations, warmup=kept.warmup, info=info)
        timelines.write(found, kept.out)
        return found


def main(arguments: list[str] | None = None) -> int:
    launched, place = "RANK" in os.environ, Place.from_launcher()
    try:
        job = prepare(arguments, place)
    except InputError as error:
        if place.rank:
            time.sleep(10.0)  # the launcher ends all ranks when one ends, and rank 0 has something to say
        else:
            print(f"real.run: {error}", file=sys.stderr)
        return BAD_INPUT
    if place.rank == 0:
        for note in job.notes:
            print(f"note: {note}", file=sys.stderr)
    from torch.distributed import TCPStore, destroy_process_group
    from torch.distributed.rendezvous import rendezvous

    store = next(rendezvous("env://"))[0] if launched else TCPStore("127.0.0.1", 0, 1, True)
    found = run(job, store, heed_sigterm=True)
    if found:
        print(f"{job.options.iterations} iterations in {found.end_seconds:.3f} s: {job.options.out}")
    destroy_process_group()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="real.run", description="Run a scenario on real ranks and write a timeline.")
    parser.add_argument("scenario")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    parser.add_argument("--iterations", type=int, default=3, help="iterations that are kept")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before them that are left out")
    parser.add_argument("--out", type=Path, default=Path("timeline.jsonl"), help="on a folder that all ranks share")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one firing may take")
    parser.add_argument("--silence", type=float, default=20.0, help="seconds without a sign of life from a dead rank")
    return parser


# --- before it starts ------------------------------------------------------------------------------------------------


def prepare(arguments: list[str] | None, place: Place) -> Job:
    """Raises InputError for what cannot run here."""
    options = _parser().parse_args(arguments)
    scenario = load_scenario(options.scenario, options.overrides)
    real_limits.check_real(scenario)
    graph, notes = graph_of(scenario)
    holdings = holdings_of(scenario, graph)
    _check_options(options)
    real_limits.check_real_graph(scenario, graph, holdings, place.ranks)
    device = _device(place)
    _check_memory(holdings, place, device)
    return Job(scenario, graph, holdings, notes, options, place, device)


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("iterations", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise InputError(f"is {getattr(options, name)}, but must be at least {least}", field=f"--{name}")
    for name in ("timeout", "silence"):
        if not getattr(options, name) > 0:
            raise InputError(f"is {getattr(options, name)}, but must be positive", field=f"--{name}")
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise InputError(f"{str(options.out)!r} is no file in a folder that exists", field="--out")


def _device(place: Place) -> torch.device:
    """The GPU of this rank, or the CPU where there is none."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
        return torch.device("cpu")
    if gpus < place.local_ranks:
        raise InputError(
            f"{place.local_ranks} ranks on a machine with {gpus} GPUs (CUDA_VISIBLE_DEVICES= runs them on CPUs)",
            field="cluster",
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _check_memory(holdings: dict[str, Holding], place: Place, device: torch.device) -> None:
    """Roughly: what cannot fit is found, by the model states alone."""
    import torch

    on_cpu = device.type == "cpu"
    together = place.local_ranks if on_cpu else 1  # that share the memory
    needs = [real_limits.rank_bytes(holdings, rank, on_cpu) for rank in range(place.ranks)]
    needed = max(sum(needs[k : k + together]) for k in range(0, place.ranks, together)) / 2**30
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if not on_cpu:
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
    if needed > there:
        what = f"the {together} ranks of a machine need" if on_cpu else "a rank needs"
        raise InputError(f"{what} at least {needed:.1f} GiB, but there are {there:.1f} GiB", field="models")


# --- the run ---------------------------------------------------------------------------------------------------------


def run(job: Job, store: Store, *, heed_sigterm: bool = False) -> timelines.Timeline | None:
    """All ranks call it together; rank 0 gets the timeline that it has written.

    store: nothing in it may be left of another job (give each its PrefixStore). torch.distributed is set up unless an
    earlier job of these processes has done so. A failure ends the process.
    """
    import torch.distributed as dist

    from .clock import align
    from .executor import Executor, LaneStore
    from .groups import Groups
    from .meter import Meter
    from .watch import Watch

    options, place = job.options, job.place
    job.records.mkdir(exist_ok=True)
    record_path(job.records, place.rank).unlink(missing_ok=True)
    meter, limits = Meter(job.device), {"timeout_seconds": options.timeout, "silence_seconds": options.silence}
    watch = Watch(dist.PrefixStore("watch", store), place.rank, place.ranks, meter, save=job.save, **limits)
    if heed_sigterm:
        watch.heed_sigterm()
    watch.start()
    try:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if job.device.type == "cuda" else "gloo"  # CPU tensors always go by gloo
            own, limit = dist.PrefixStore("groups", store), timedelta(seconds=GROUP_SECONDS)
            dist.init_process_group(backend, store=own, rank=place.rank, world_size=place.ranks, timeout=limit)
        from .stages import Stages  # with transformers and DeepSpeed, which take seconds

        clock, results = align(place.rank, place.ranks), LaneStore()
        sets = real_limits.rank_sets(job.graph, job.holdings)
        sets |= real_limits.sync_rank_sets(job.graph, job.holdings, job.scenario.weight_sync.method)
        groups = Groups(place.rank, sets, meter)
        work = Stages(job.scenario, job.graph, job.holdings, place.rank, groups, results)
    except BaseException as error:
        watch.fail(error)
        raise
    iterations, log = options.warmup + options.iterations, dist.PrefixStore("run", store)
    kept = {"results": results, "watch": watch, "file": RecordFile(job.records, place.rank, clock)}
    Executor(job.graph, place.rank, work, iterations, log, groups, clock, **kept).run()
    watch.close()
    work.close()
    if place.rank:
        return None
    found = job.save()
    shutil.rmtree(job.records, ignore_errors=True)
    return found


def _info(scenario: Scenario, device: torch.device) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "scenario": scenario.name,
        "strategy": scenario.strategy.name,
        "seed": scenario.simulation.seed,
        "device": gpu or "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


if __name__ == "__main__":
    sys.exit(main())
