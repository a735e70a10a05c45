"""Measure, calibrate, predict, report: python experiments/real_cpu/run.py [--out DIR]

Runs the configurations of grid.py on two ranks of this machine (see README.md), several rounds of all of them in an
order that changes, calibrates a spec from microbenchmarks and the configurations marked so, and sets the prediction of
every other one beside its measurement. What was measured stays in DIR, so that a run that was cut off goes on.
Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from grid import CONFIGS, NETWORKS, Config
from pairs import Pair, limit, nodes, why_no_nodes
from report import record, report

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/real_cpu"), help="folder for all of it")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of every configuration")
    parser.add_argument("--minutes", type=float, default=19.0, help="no further repetition begins after so long")
    parser.add_argument("--quick", action="store_true", help="few rows and configurations, to see that it works")
    parser.add_argument("--report-only", action="store_true", help="from what lies in DIR; nothing runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [] if options.report_only else measure(options.out, options.rounds, options.quick, 60 * options.minutes)
    predict(options.out)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return bool(failed)


def measure(out: Path, rounds: int, quick: bool, seconds: float) -> list[str]:
    """Everything that is not yet there: once in any case, again while there is time. Returns what failed."""
    started, why = time.monotonic(), why_no_nodes()
    if why:
        print(f"two nodes are left out: {why}", file=sys.stderr)
    host = Pair(out / "host.log", 29611)
    pairs = (
        {"host": host}
        if why
        else {"host": host, **dict.fromkeys(("1gbit", "100mbit"), Pair(out / "nodes.log", 29612, apart=True))}
    )
    configs = [c for c in CONFIGS if c.network in pairs][:: 6 if quick else 1]
    failed = []
    with nullcontext() if why else nodes():
        for network, pair in pairs.items():
            _microbench(network, pair, out, quick)
        for number in range(1 if quick else rounds):
            order = random.Random(number).sample(configs, len(configs))
            for config in order:
                path = run_path(out, config, number)
                if not path.exists() and (number == 0 or time.monotonic() - started < seconds):
                    failed += _run(config, pairs[config.network], path)
            print(f"round {number + 1}: {time.monotonic() - started:.0f} s")
        for pair in set(pairs.values()):
            pair.close()
    return failed


def run_path(out: Path, config: Config, number: int) -> Path:
    return out / "runs" / config.network / f"{config.id.partition('/')[2]}.{number}.jsonl"


def _limit(network: str) -> None:
    if (rate := NETWORKS[network]) is not None:
        limit(rate)


def _microbench(network: str, pair: Pair, out: Path, quick: bool) -> None:
    """Everything on the host; between nodes only what crosses the link."""
    path = out / f"bench-{network}.json"
    if path.exists():
        return
    _limit(network)
    arguments = ["-m", "real.microbench", "--out", str(path.resolve()), *(["--quick"] if quick else [])]
    if (rate := NETWORKS[network]) is not None:
        arguments += ["--links-only", "--nic-bytes-per-second", str(rate)]
    pair.launch(arguments)


def _run(config: Config, pair: Pair, path: Path) -> list[str]:
    _limit(config.network)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    job = [
        str(HERE / "scenario.yaml"),
        *overrides(config),
        "--iterations",
        str(config.iterations),
        "--warmup",
        "0",
        "--out",
        str(part.resolve()),
    ]
    try:
        pair.run(json.dumps(job))
    except RuntimeError as error:
        return [f"{config.id}: {error}"]
    part.rename(path)
    return []


def overrides(config: Config) -> list[str]:
    """As the command line takes them. What runs depends on the number of ranks, not on their speed."""
    apart = NETWORKS[config.network] is not None
    where = {"cluster": {"spec": "a100-80g-sxm", "nodes": 1 + apart, "gpus_per_node": 2 - apart}}
    return [f"{name}={json.dumps(value)}" for name, value in (where | config.overrides).items()]


def predict(out: Path) -> None:
    """Calibrate, write cases, report."""
    runs = {config: found for config in CONFIGS if (found := _runs(out, config))}
    benches = sorted(out.glob("bench-*.json"))
    print(report(record(runs, benches, out / "recorded"), out / "recorded"))


def _runs(out: Path, config: Config) -> list[Path]:
    return sorted(run_path(out, config, 0).parent.glob(f"{config.id.partition('/')[2]}.*.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
