"""What the ranks of a real run are to do, checked before they set anything up."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import real_limits
from . import timeline as timelines
from .errors import InputError
from .graph import StageGraph
from .layout import Holding, graph_of, holdings_of
from .records import read, timeline
from .spec.loader import load_scenario
from .spec.scenario import Scenario


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
class Device:
    """What a rank computes on. memory_bytes: its own if it is a GPU; else those of the machine."""

    kind: str  # cpu, cuda
    name: str
    memory_bytes: float


@dataclass(frozen=True)
class Job:
    """A scenario to run, and how; `save` writes the timeline of what has been recorded so far."""

    scenario: Scenario
    graph: StageGraph
    holdings: dict[str, Holding]
    notes: list[str]
    options: argparse.Namespace
    place: Place
    device: Device

    @property
    def records(self) -> Path:
        folder: Path = self.options.out.with_name(self.options.out.name + ".ranks")
        return folder

    def save(self, reason: str = "") -> timelines.Timeline:
        info = self._info() | ({"failure": reason} if reason else {})
        kept, records = self.options, read(self.records, self.place.ranks)
        found = timeline(self.graph, records, self.place.ranks, kept.iterations, warmup=kept.warmup, info=info)
        timelines.write(found, kept.out)
        return found

    def _info(self) -> dict[str, Any]:
        found = {
            "scenario": self.scenario.name,
            "strategy": self.scenario.strategy.name,
            "seed": self.scenario.simulation.seed,
            "device": self.device.name,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"torch": version("torch"), "python": platform.python_version()},
        }
        return found | ({"off_policy": True} if self.graph.off_policy else {})


def prepare(arguments: list[str] | None, place: Place, device_of: Callable[[Place], Device]) -> Job:
    """Raises InputError for what cannot run here."""
    options = _parser().parse_args(arguments)
    scenario = load_scenario(options.scenario, options.overrides)
    real_limits.check_real(scenario)
    graph, notes = graph_of(scenario)
    holdings = holdings_of(scenario, graph)
    _check_options(options)
    real_limits.check_real_graph(scenario, graph, holdings, place.ranks)
    job = Job(scenario, graph, holdings, notes, options, place, device_of(place))
    _check_memory(job)
    return job


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


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("iterations", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise InputError(f"is {getattr(options, name)}, but must be at least {least}", field=f"--{name}")
    for name in ("timeout", "silence"):
        if not getattr(options, name) > 0:
            raise InputError(f"is {getattr(options, name)}, but must be positive", field=f"--{name}")
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise InputError(f"{str(options.out)!r} is no file in a folder that exists", field="--out")


def _check_memory(job: Job) -> None:
    """Roughly: what cannot fit is found, by the model states alone."""
    on_cpu, ranks = job.device.kind == "cpu", job.place.ranks
    together = job.place.local_ranks if on_cpu else 1  # that share the memory
    needs = [real_limits.rank_bytes(job.holdings, rank, on_cpu) for rank in range(ranks)]
    needed = max(sum(needs[k : k + together]) for k in range(0, ranks, together)) / 2**30
    there = job.device.memory_bytes / 2**30
    if needed > there:
        what = f"the {together} ranks of a machine need" if on_cpu else "a rank needs"
        raise InputError(f"{what} at least {needed:.1f} GiB, but there are {there:.1f} GiB", field="models")
