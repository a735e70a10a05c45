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

from rlhfsim import memory
from rlhfsim import timeline as timelines
from rlhfsim.errors import InputError
from rlhfsim.graph import StageGraph
from rlhfsim.layout import Holding, graph_of, holdings_of
from rlhfsim.model import Head
from rlhfsim.spec.loader import load_scenario
from rlhfsim.spec.scenario import Scenario

if TYPE_CHECKING:
    import torch

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
        values = [int(os.environ.setdefault(name, default)) for name, default in
                  (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))]
        return cls(*values)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    launched = "RANK" in os.environ
    place = Place.from_launcher()
    try:
        scenario = load_scenario(options.scenario, options.overrides)
        graph, notes = graph_of(scenario)
        holdings = holdings_of(scenario, graph)
        _check_options(options)
        _check_ranks(graph, place)
        device = _device(place)
        _check_memory(holdings, place, device)
    except InputError as error:
        if place.rank:
            time.sleep(10.0)  # the launcher ends all ranks when one ends, and rank 0 has something to say
        else:
            print(f"real.run: {error}", file=sys.stderr)
        return BAD_INPUT
    if place.rank == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    _run(options, scenario, graph, holdings, place, device, launched)
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


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("iterations", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise InputError(f"is {getattr(options, name)}, but must be at least {least}", field=f"--{name}")
    for name in ("timeout", "silence"):
        if not getattr(options, name) > 0:
            raise InputError(f"is {getattr(options, name)}, but must be positive", field=f"--{name}")
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise InputError(f"{str(options.out)!r} is no file in a folder that exists", field="--out")


def _check_ranks(graph: StageGraph, place: Place) -> None:
    needed = 1 + max(r for s in graph.stages() for r in s.ranks)
    if needed > place.ranks:
        raise InputError(f"the scenario runs on {needed} ranks, but {place.ranks} were started "
                         f"(torchrun --nproc-per-node {needed} -m real.run ...)", field="cluster")


def _device(place: Place) -> torch.device:
    """The GPU of this rank, or the CPU where there is none."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
        return torch.device("cpu")
    if gpus < place.local_ranks:
        raise InputError(f"{place.local_ranks} ranks on a machine with {gpus} GPUs (CUDA_VISIBLE_DEVICES= runs them on "
                         "CPUs)", field="cluster")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _check_memory(holdings: dict[str, Holding], place: Place, device: torch.device) -> None:
    """Roughly: what cannot fit is found, by the model states alone."""
    import torch

    on_cpu = device.type == "cpu"
    needs = [rank_bytes(holdings, rank, on_cpu) for rank in range(place.ranks)]
    if on_cpu:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = max(sum(needs[k : k + place.local_ranks]) for k in range(0, place.ranks, place.local_ranks))
        what = f"the {place.local_ranks} ranks of a machine"
    else:
        there, needed, what = torch.cuda.get_device_properties(device).total_memory, max(needs), "a rank"
    if needed > there:
        raise InputError(f"{what} need at least {needed / 2**30:.1f} GiB, but there are {there / 2**30:.1f} GiB",
                         field="models")


def rank_bytes(holdings: dict[str, Holding], rank: int, on_cpu: bool) -> float:
    """Weights, gradients and optimizer states on a rank; on CPUs all are in fp32, and the host is the device."""
    total = 0.0
    for held in holdings.values():
        if rank in held.ranks:
            use = held.use.model_copy(update={"precision": "fp32"}) if on_cpu else held.use
            head: Head = "value" if held.name.removeprefix("shadow_") in ("critic", "reward") else "lm"
            purpose: memory.Held = "train" if held.purpose == "train" else "frozen"
            kept = memory.static_bytes(use, purpose, held.data_parallel, head=head)
            total += kept.total + (kept.host if on_cpu else 0.0)
    return total


# --- the run ---------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding], place: Place,
         device: torch.device, launched: bool) -> None:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from .clock import align
    from .executor import LaneStore, run
    from .groups import Groups, rank_sets
    from .meter import Meter
    from .spans import RecordFile, read, record_path, timeline
    from .watch import Watch

    folder = options.out.with_name(options.out.name + ".ranks")
    folder.mkdir(exist_ok=True)
    record_path(folder, place.rank).unlink(missing_ok=True)
    iterations = options.warmup + options.iterations

    def save(reason: str = "") -> timelines.Timeline:
        info = _info(scenario, device) | ({"failure": reason} if reason else {})
        found = timeline(graph, read(folder, place.ranks), place.ranks, options.iterations, warmup=options.warmup,
                         info=info)
        timelines.write(found, options.out)
        return found

    root = next(rendezvous("env://"))[0] if launched else dist.TCPStore("127.0.0.1", 0, 1, True)
    meter = Meter(device)
    watch = Watch(dist.PrefixStore("watch", root), place.rank, place.ranks, meter, timeout_seconds=options.timeout,
                  silence_seconds=options.silence, save=save)
    watch.heed_sigterm()
    watch.start()
    try:
        # CPU tensors (messages, barriers) always go by gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("groups", root), rank=place.rank,
                                world_size=place.ranks, timeout=timedelta(seconds=GROUP_SECONDS))
        from .stages import Stages, sync_rank_sets  # with transformers and DeepSpeed, which take seconds

        clock, results = align(place.rank, place.ranks), LaneStore()
        sets = rank_sets(graph, holdings) | sync_rank_sets(graph, holdings, scenario.weight_sync.method)
        groups = Groups(place.rank, sets, meter)
        work = Stages(scenario, graph, holdings, place.rank, groups, results)
    except BaseException as error:
        watch.fail(error)
        raise
    run(graph, place.rank, work, iterations, dist.PrefixStore("run", root), groups, clock, results=results, watch=watch,
        file=RecordFile(folder, place.rank, clock))
    watch.close()
    if place.rank == 0:
        found = save()
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{options.iterations} iterations in {found.end_seconds:.3f} s: {options.out}")
    dist.destroy_process_group()


def _info(scenario: Scenario, device: torch.device) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"scenario": scenario.name, "strategy": scenario.strategy.name, "seed": scenario.simulation.seed,
            "device": gpu or "cpu", "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "python": platform.python_version()}}


if __name__ == "__main__":
    sys.exit(main())
