"""torchrun --nproc-per-node N -m real.run scenario.yaml [a.b=c ...] --iterations 3 --warmup 1 --out timeline.jsonl

Runs a scenario's graph on the ranks that torchrun started (gloo on CPUs, NCCL on GPUs) and writes what it took.
Exit codes: 0 fine, 2 bad input (one message, from rank 0), 1 a rank died, hung or raised: the message names the stage,
and the spans up to there are written all the same. (torchrun itself ends with 1 in both cases.)
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhfsim import real_job, real_limits
from rlhfsim import timeline as timelines
from rlhfsim.errors import InputError
from rlhfsim.real_job import Device, Job, Place
from rlhfsim.records import RecordFile, record_path
from rlhfsim.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import Store

BAD_INPUT = 2
GROUP_SECONDS = 24 * 3600.0  # of a collective: whether a rank hangs is for the watch to say


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


def prepare(arguments: list[str] | None, place: Place) -> Job:
    """Raises InputError for what cannot run here."""
    return real_job.prepare(arguments, place, _device)


def _device(place: Place) -> Device:
    """The GPU of this rank, or the CPU where there is none."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
        return Device("cpu", "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if gpus < place.local_ranks:
        raise InputError(
            f"{place.local_ranks} ranks on a machine with {gpus} GPUs (CUDA_VISIBLE_DEVICES= runs them on CPUs)",
            field="cluster",
        )
    torch.cuda.set_device(place.local_rank)
    found = torch.cuda.get_device_properties(place.local_rank)
    return Device("cuda", found.name, found.total_memory)


def run(job: Job, store: Store, *, heed_sigterm: bool = False) -> timelines.Timeline | None:
    """All ranks call it together; rank 0 gets the timeline that it has written.

    store: nothing in it may be left of another job (give each its PrefixStore). torch.distributed is set up unless an
    earlier job of these processes has done so. A failure ends the process.
    """
    import torch
    import torch.distributed as dist

    from .clock import align
    from .executor import Executor, LaneStore
    from .groups import Groups
    from .meter import Meter

    options, place = job.options, job.place
    job.records.mkdir(exist_ok=True)
    record_path(job.records, place.rank).unlink(missing_ok=True)
    device = torch.device(job.device.kind, place.local_rank if job.device.kind == "cuda" else None)
    meter, limits = Meter(device), {"timeout_seconds": options.timeout, "silence_seconds": options.silence}
    watch = Watch(dist.PrefixStore("watch", store), place.rank, place.ranks, meter, save=job.save, **limits)
    if heed_sigterm:
        watch.heed_sigterm()
    watch.start()
    try:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # CPU tensors always go by gloo
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


if __name__ == "__main__":
    sys.exit(main())
