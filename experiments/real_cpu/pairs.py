"""Two ranks, each pinned to a core of its own: on this host, or as two nodes that a rate-limited link joins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from worker import DONE

ROOT = Path(__file__).parents[2]
NODES = ("rlhfsim0", "rlhfsim1")  # network namespaces
LINKS = ("rlhfsim-l0", "rlhfsim-l1")  # the two ends of the cable
ADDRESS = "10.77.7.{}"
# A token bucket lets a burst pass at full speed: little, but more than a packet and than what a timer tick adds.
BURST_SECONDS, LEAST_BURST_BYTES = 1e-3, 32 << 10
# glibc would give freed memory back and fault it in again for the next tensor: up to 15 % of a forward pass, and not
# the same every time (tiny-4x256, 4 x 128 tokens: 55 ms with, 46 ms without 5,900 page faults).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Pair:
    """`start` launches any module on both ranks; `work` a worker that takes jobs until `close`."""

    def __init__(self, log: Path, port: int, *, apart: bool = False) -> None:
        self.log, self.port, self.apart = log, port, apart
        self._workers: list[subprocess.Popen[str]] = []

    def start(self, arguments: Sequence[str], **pipes: Any) -> list[subprocess.Popen[str]]:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return [self._rank(rank, arguments, cores, pipes) for rank in (0, 1)]

    def _rank(
        self, rank: int, arguments: Sequence[str], cores: Sequence[int], pipes: dict[str, Any]
    ) -> subprocess.Popen[str]:
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0" if self.apart else str(rank),
            "LOCAL_WORLD_SIZE": "1" if self.apart else "2",
            "MASTER_ADDR": ADDRESS.format(1) if self.apart else "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "GLOO_SOCKET_IFNAME": LINKS[rank] if self.apart else "lo",
            "OMP_NUM_THREADS": "1",
            **KEEP_MEMORY,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }
        there = ["ip", "netns", "exec", NODES[rank]] if self.apart else []
        if shutil.which("taskset") and len(cores) > 1:
            there += ["taskset", "-c", str(cores[rank])]
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*there, sys.executable, *arguments], env=environment, stderr=log, text=True, cwd=ROOT, **pipes
            )

    def launch(self, arguments: Sequence[str]) -> None:
        """Run a module to its end on both ranks. Raises RuntimeError if it fails."""
        with self.log.open("a") as log:
            processes = self.start(arguments, stdout=log)
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{' '.join(arguments)} failed; see {self.log}")

    def run(self, job: str) -> None:
        """A job of `worker.py`. Raises RuntimeError if it fails; the next job then gets new processes."""
        if not self._workers:
            worker = str(Path(__file__).with_name("worker.py"))
            self._workers = self.start([worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with suppress(BrokenPipeError):
            for process in self._workers:
                assert process.stdin is not None
                process.stdin.write(job + "\n")
                process.stdin.flush()
        done = [_is_done(process.stdout) for process in self._workers]
        if not all(done):
            self.close()
            raise RuntimeError(f"a rank has died; see {self.log}")

    def close(self) -> None:
        for process in self._workers:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._workers:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self._workers = []


def _is_done(output: IO[str] | None) -> bool:
    """Read what a worker prints until it is done, or gone."""
    assert output is not None
    return any(line.strip() == DONE for line in iter(output.readline, ""))


# --- two nodes -------------------------------------------------------------------------------------------------------


def why_no_nodes() -> str:
    """Why this machine cannot join two namespaces by a link with a rate; empty if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} (iproute2) not found"
    try:
        with nodes():
            limit(12.5e6)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {(error.stderr or '').strip()}"
    return ""


@contextmanager
def nodes() -> Any:
    """Two network namespaces joined by a veth pair, removed afterwards (also those that a killed run left)."""
    _remove()
    try:
        for node in NODES:
            _ip("netns", "add", node)
        _ip("link", "add", LINKS[0], "netns", NODES[0], "type", "veth", "peer", "name", LINKS[1], "netns", NODES[1])
        for k, (node, link) in enumerate(zip(NODES, LINKS, strict=True), start=1):
            _ip("-n", node, "addr", "add", f"{ADDRESS.format(k)}/24", "dev", link)
            for device in (link, "lo"):
                _ip("-n", node, "link", "set", device, "up")
        yield
    finally:
        _remove()


def limit(bytes_per_second: float) -> None:
    """Set the rate of the link, each way, by tc's token bucket filter."""
    burst = max(LEAST_BURST_BYTES, int(bytes_per_second * BURST_SECONDS))
    for node, link in zip(NODES, LINKS, strict=True):
        rate = ("tbf", "rate", f"{bytes_per_second * 8:.0f}bit", "burst", str(burst), "latency", "50ms")
        _do("tc", "-n", node, "qdisc", "replace", "dev", link, "root", *rate)


def _remove() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _do("ip", *arguments)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
