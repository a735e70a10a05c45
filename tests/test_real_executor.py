"""The executor of real ranks: the same order as the simulator, the right data, and an end when a rank comes to harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SCORES, simulate
from scenarios import scenario

from rlhfsim import records
from rlhfsim.algorithms import ppo
from rlhfsim.firing import Firing
from rlhfsim.graph import StageGraph
from rlhfsim.layout import graph_of
from rlhfsim.order import violations
from rlhfsim.schedule import check
from rlhfsim.strategies import Devices, colocated, disaggregated, interleaved
from rlhfsim.timeline import Timeline, read
from rlhfsim.timeline import check as check_timeline

pytest.importorskip("torch", reason="real ranks need torch")

import rank_processes
import torch
from rank_processes import Job, Ranks, Sleeps, Trouble, made

from real.groups import pack, packed_bytes, shapes_of, unpack
from real.run import main

ROOT = Path(__file__).parent.parent
EIGHT, FOUR = Devices(tuple(range(8)), 8), Devices(tuple(range(4)), 4)
ALONE = Devices(tuple(range(4)), 4, dict.fromkeys(SCORES, 1))
ENGINES = Devices(tuple(range(4)), 4, dict.fromkeys((*SCORES, "gen"), 1), own_engine=True)
TWICE = ppo.build(epochs=2, minibatches=2)
SHARED = ppo.build(share_actor_critic=True)

STATIC: dict[str, StageGraph] = {
    "colocated": colocated.build(TWICE, FOUR, calls=2),
    "colocated alone": colocated.build(ppo.build(minibatches=2), ALONE),
    "colocated engine": colocated.build(ppo.build(), ENGINES, calls=2),
    "colocated shared": colocated.build(SHARED, FOUR),
    "interleaved async": interleaved.build(ppo.build(), FOUR, calls=2),
    "interleaved async alone": interleaved.build(TWICE, ALONE),
    "interleaved sync": interleaved.build(ppo.build(), ALONE, mode="sync"),
    "interleaved concat": interleaved.build(ppo.build(), ALONE, concat=True, mode="sync", calls=2),
    "interleaved 3:1": interleaved.build(ppo.build(), ALONE, owners={"reference": [0, 2, 3], "reward": [1]}),
    "interleaved critic": interleaved.build(
        ppo.build(), EIGHT, owners={"reference": [4, 5, 6, 7], "reward": [0, 1, 2, 3], "critic": [2, 3, 4, 5]}
    ),
    "interleaved engine": interleaved.build(SHARED, ENGINES, ratio=0.25),
    "disaggregated": disaggregated.build(ppo.build(minibatches=2), EIGHT, batches=4),
    "disaggregated replicas": disaggregated.build(ppo.build(minibatches=2), EIGHT, batches=4, replicas=2, capacity=2),
    "disaggregated one critic": disaggregated.build(ppo.build(epochs=2), EIGHT, shadow_critic=False, batches=2),
    "disaggregated log-probs": disaggregated.build(ppo.build(), EIGHT, recompute_log_probs=True, batches=2),
    "disaggregated shared": disaggregated.build(SHARED, EIGHT, batches=2),
    "periodic": graph_of(scenario("colocated", periodic__validation_every=2, periodic__checkpoint_every=3))[0],
}
FIRST = disaggregated.build(ppo.build(), EIGHT, batches=6, replicas=2, spread="first", capacity=2)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(8)
    yield found
    found.close()


def performed(
    ranks: Ranks,
    graph: StageGraph,
    folder: Path,
    sleeps: Sleeps = Sleeps(),  # noqa: B008
    iterations: int = 3,
) -> tuple[Timeline, list[rank_processes.Seen]]:
    """The merged timeline of all ranks, and what each saw."""
    seen = ranks.call(rank_processes.perform, Job(graph, iterations, folder, sleeps))
    return records.timeline(graph, records.read(folder, 8), 8, iterations), seen


def orders(timeline: Timeline) -> dict[int, list[Firing]]:
    """What each rank does, in order."""
    found = defaultdict(list)
    for span in sorted(timeline.spans, key=lambda s: (s.start_seconds, s.end_seconds)):
        for rank in span.ranks:
            found[rank].append(span.firing)
    return dict(found)


# ---------------------------------------------------------------- order and data


@pytest.mark.parametrize("name", STATIC)
def test_real_ranks_do_what_the_simulator_says(ranks: Ranks, tmp_path: Path, name: str) -> None:
    graph = check(STATIC[name])
    timeline, seen = performed(ranks, graph, tmp_path)
    simulated = simulate(graph, lambda f: 1.0, 3)
    check_timeline(timeline)
    assert violations(graph, simulated) == violations(graph, timeline) == []
    assert Counter(s.firing for s in timeline.spans) == Counter(s.firing for s in simulated.spans)
    assert orders(timeline) == orders(simulated)
    for rank, found in enumerate(seen):
        wanted = {
            (s.firing, g, lane): fields
            for s in timeline.spans
            for g, lane, fields in graph.receives(s.firing)
            if graph.at(s.firing.stage).home(lane, s.firing.place) == rank
        }
        assert {(f, g, lane) for f, g, lane, _ in found} == wanted.keys()
        for f, g, lane, fields in found:
            assert fields == {field: made(g, lane, field) for field in wanted[f, g, lane]}


def test_periodic_work_is_done_in_its_iterations_only(ranks: Ranks, tmp_path: Path) -> None:
    sleeps = Sleeps(0.0, {"testing": 0.05, "save_checkpoint": 0.05})
    timeline, _ = performed(ranks, STATIC["periodic"], tmp_path, sleeps, iterations=4)
    for stage, every in (("testing", 2), ("save_checkpoint", 3)):
        worked = [s.compute_seconds[0] > 0.04 for s in timeline.of(stage=stage)]
        assert worked == [(i + 1) % every == 0 for i in range(4)]


def test_the_first_free_replica_takes_the_next_batch(ranks: Ranks, tmp_path: Path) -> None:
    graph = check(FIRST)
    timeline, seen = performed(ranks, graph, tmp_path, Sleeps(0.001, gen_by_place={0: 0.08, 1: 0.01}))
    check_timeline(timeline)
    assert violations(graph, timeline) == []
    turns = Counter(s.firing.place for s in timeline.of(stage="gen"))
    assert turns.total() == 18 and turns[1] >= 2 * turns[0]
    offered = Counter((f.iteration, f.chunk) for f in (s.firing for s in timeline.of(stage="gen")))
    got = Counter(
        tuple(fields["tokens"][i] for i in (0, 2))
        for found in seen
        for f, g, _, fields in found
        if f.stage == "ref" and g.stage == "gen"
    )
    assert offered == got and set(got.values()) == {1}  # every batch arrives once, under whatever number


def test_a_full_channel_holds_the_producer_back(ranks: Ranks, tmp_path: Path) -> None:
    """Generation is fast, the reference slow: with room for one batch it stays near, for all it runs ahead."""
    ahead = {}
    for capacity in (1, 6):
        graph = check(disaggregated.build(ppo.build(), EIGHT, batches=6, capacity=capacity))
        (folder := tmp_path / str(capacity)).mkdir()
        timeline, _ = performed(ranks, graph, folder, Sleeps(0.001, {"ref": 0.06}), iterations=1)
        assert violations(graph, timeline) == []
        second = next(s for s in timeline.of(stage="ref") if s.firing.chunk == 1)
        ahead[capacity] = sum(s.end_seconds < second.start_seconds for s in timeline.of(stage="gen"))
    assert ahead[6] == 6 and ahead[1] <= 3  # one in work, one on the channel, one that could not be handed over


def test_a_missing_edge_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    """An update that does not wait for the rewards: the order then breaks what the whole graph needs."""
    whole = check(disaggregated.build(ppo.build(), EIGHT, batches=2))
    broken = disaggregated.build(ppo.build(), EIGHT, batches=2)
    broken.remove_edge("reward", "update_actor")
    timeline, _ = performed(ranks, broken, tmp_path, Sleeps(0.001, {"reward": 0.05}))
    assert violations(broken, timeline) == []
    assert any(
        text.startswith("update_actor") and "before the end of reward (iteration 0" in text
        for text in violations(whole, timeline)
    )


# ---------------------------------------------------------------- spans


def test_spans_tell_work_from_waiting(ranks: Ranks, tmp_path: Path) -> None:
    """One rank starts the training step's all-reduce 50 ms after the others: they wait for it, it waits for nobody."""
    graph = check(colocated.build(ppo.build(), FOUR))
    ranks.call(rank_processes.perform, Job(graph, 2, tmp_path, Sleeps(0.0, {"gen": 0.02})))
    found = records.read(tmp_path, 8)
    f = Firing(1, "update_actor", 0, 0)
    for rank, record in found.records[f, 0].items():  # as if rank 2 had come late
        ((key, [(called, entered, left)]),) = record.measured.calls.items()
        late = 50_000_000
        times = (called + late, entered + late, left + late) if rank == 2 else (called, entered, left + late)
        measured = replace(record.measured, calls={key: [times]})
        found.records[f, 0][rank] = replace(record, end=record.end + late, measured=measured)
    timeline = records.timeline(graph, found, 8, 2)
    span = next(s for s in timeline.spans if s.firing == f)
    assert all(0.049 < span.peer_seconds[rank] < 0.08 for rank in (0, 1, 3))
    assert span.peer_seconds[2] < 0.02 and span.compute_seconds[2] > 0.049
    assert all(seconds < 0.02 for seconds in span.communication_seconds)
    assert timeline.info["collective_bytes"]["update_actor"] == 2 * 4 * 400
    assert 0 <= timeline.info["clock_error_seconds"] < 0.01
    gen = next(s for s in timeline.spans if s.firing == Firing(1, "gen", 0, 0))
    assert all(0.02 <= seconds < 0.04 for seconds in gen.compute_seconds)


def test_warm_up_is_left_out(ranks: Ranks, tmp_path: Path) -> None:
    graph = check(STATIC["disaggregated"])
    ranks.call(rank_processes.perform, Job(graph, 3, tmp_path))
    timeline = check_timeline(records.timeline(graph, records.read(tmp_path, 8), 8, 2, warmup=1))
    assert {s.firing.iteration for s in timeline.spans} == {0, 1}
    assert min(s.start_seconds for s in timeline.spans) == 0.0


def clocks_apart(rank: int, count: int, store: object) -> tuple[int, int]:
    """This rank's clock runs `rank` seconds ahead, on a machine of its own."""
    from real.clock import align
    from rlhfsim.records import Clock

    read = Clock.read
    Clock.read = staticmethod(lambda: read() + rank * 10**9)
    try:
        found = align(rank, count, machine=rank)
    finally:
        Clock.read = staticmethod(read)
    return found.offset_ns, found.error_ns


def test_clocks_are_aligned_within_the_error(ranks: Ranks) -> None:
    """The offset is known here, since all processes read the same clock."""
    for rank, (offset, error) in enumerate(ranks.call(clocks_apart)):
        assert abs(offset + rank * 10**9) <= error < 50_000_000


def test_spans_of_shifted_clocks_are_put_in_order(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1's clock is 5 s behind: with its offset the records make the same timeline."""
    graph = check(STATIC["interleaved async alone"])
    before, _ = performed(ranks, graph, tmp_path)
    path = records.record_path(tmp_path, 1)
    header, *lines = path.read_text().splitlines()
    shifted = [json.loads(line) for line in lines]
    for line in shifted:
        line["times"] = [t - 5 * 10**9 for t in line["times"]]
        line["calls"] = [[group, [[t - 5 * 10**9 for t in call] for call in calls]] for group, calls in line["calls"]]
    header = json.dumps(json.loads(header) | {"offset_ns": 5 * 10**9, "error_ns": 1000})
    path.write_text("\n".join([header, *map(json.dumps, shifted)]) + "\n")
    after = records.timeline(graph, records.read(tmp_path, 8), 8, 3)
    assert after.info["clock_error_seconds"] == 2e-6
    assert [s.firing for s in after.spans] == [s.firing for s in before.spans]
    assert [s.end_seconds for s in after.spans] == pytest.approx([s.end_seconds for s in before.spans])


def test_fields_survive_packing() -> None:
    fields = {
        "tokens": torch.arange(7).reshape(1, 7),
        "mask": torch.ones(3, dtype=torch.bool),
        "none": torch.empty(0, 4),
        "values": torch.randn(2, 3, dtype=torch.bfloat16),
        "score": torch.tensor(2.5),
    }
    shapes = json.loads(json.dumps(shapes_of(fields)))
    packed = pack(fields)
    assert len(packed) == packed_bytes(shapes)
    for name, x in unpack(packed, shapes, torch.device("cpu")).items():
        assert x.dtype == fields[name].dtype and torch.equal(x, fields[name])


def samples_around(rank: int, count: int, store: object) -> dict[int, dict[str, list[float]]]:
    """Ragged samples of ranks that are named out of order."""
    from real.groups import Groups
    from real.meter import Meter

    members = (5, 1, 3)
    groups = Groups(rank, [members], Meter())
    if rank not in members:
        return {}
    batch = torch.full((2, rank), float(rank))  # of which a sample is a part
    found = groups.exchange({10 * rank: {"x": batch[0], "n": torch.tensor(rank)}} if rank != 1 else {}, members)
    assert groups.meter.end().collective_bytes == (4 * rank + 8 if rank != 1 else 0)
    return {s: {name: x.tolist() for name, x in fields.items()} for s, fields in found.items()}


def test_ragged_samples_in_a_group(ranks: Ranks) -> None:
    found = ranks.call(samples_around)
    everyone = {30: {"x": [3.0] * 3, "n": 3}, 50: {"x": [5.0] * 5, "n": 5}}
    assert found == [everyone if rank in (1, 3, 5) else {} for rank in range(8)]


# ---------------------------------------------------------------- harm

HARM = {
    "killed": Trouble("killed", 1, Firing(1, "ref", 0, 0)),
    "first killed": Trouble("killed", 0, Firing(1, "update_critic", 0, 0)),
    "raises": Trouble("raises", 2, Firing(1, "values", 0, 0)),
    "hangs": Trouble("hangs", 1, Firing(1, "update_actor", 0, 0)),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_to_one_rank_ends_all(tmp_path: Path, name: str) -> None:
    trouble, graph = HARM[name], check(colocated.build(ppo.build(), Devices((0, 1, 2), 3)))
    (tmp_path / "ranks").mkdir()
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    began = time.monotonic()
    processes = [
        rank_processes.CONTEXT.Process(
            target=rank_processes.suffer, daemon=True, args=(rank, 3, store.port, graph, trouble, tmp_path)
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20.0)
    took = time.monotonic() - began
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [-9 if trouble.kind == "killed" and r == trouble.rank else 1 for r in range(3)]
    assert took < 15.0
    lines = [line for rank in range(3) for line in (tmp_path / f"stderr{rank}").read_text().splitlines()]
    (said,) = (line for line in lines if line.startswith("real.run: "))
    assert f"rank {trouble.rank} " in said and f"{trouble.firing.stage}[0] of iteration 1" in said
    timeline = check_timeline(read(tmp_path / "timeline.jsonl"))
    assert timeline.info["failure"] in said
    ended = {s.firing for s in timeline.spans}
    before = {f._replace(iteration=i) for i in (0, 1) for f in graph.program()}
    assert {f for f in before if f.iteration == 0} <= ended < before and trouble.firing not in ended


# ---------------------------------------------------------------- DeepSpeed on some of the ranks

DOMAINS = ((0, 1), (1, 2, 3), (2,), (0, 1, 2, 3), (2, 3))


def deepspeed_engines(rank: int, count: int, store: object) -> dict[tuple[int, tuple[int, ...]], float]:
    """An engine of every ZeRO stage on every domain, stepped in turn: the sum of its weights after 3 steps."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    import deepspeed

    from real.groups import Groups
    from real.meter import Meter

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    linear = torch.nn.functional.linear
    groups, engines, sums = Groups(rank, DOMAINS, Meter()), {}, {}
    for stage in range(4):
        for domain in DOMAINS:
            if rank not in domain:
                continue
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 1.0,
                "zero_allow_untested_optimizer": True,
            }
            with groups.deepspeed(domain, sharded=stage == 3):
                partitioned = deepspeed.zero.Init(
                    data_parallel_group=groups.of(domain), config_dict_or_path=config, enabled=stage == 3
                )
                torch.manual_seed(0)
                with partitioned:
                    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
                engines[stage, domain] = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for step in range(3):
        for (stage, domain), engine in engines.items():
            with groups.deepspeed(domain, sharded=stage == 3):
                data = torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + domain.index(rank)))
                engine.backward(engine(data).pow(2).mean())
                engine.step()
                with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
                    sums[stage, domain] = sum(float(p.double().abs().sum()) for p in engine.module.parameters())
    assert (groups.meter.end().collective_bytes > 0) == any(len(d) > 1 for _, d in engines)
    assert torch.nn.functional.linear is linear, "what ZeRO-3 replaces stays in its engines' sessions"
    return sums


def plain_sum(replicas: int) -> float:
    """The same three steps by one process on all samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        data = [torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(replicas)]
        optimizer.zero_grad()
        model(torch.cat(data)).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def test_deepspeed_engines_on_some_of_the_ranks() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    ranks = Ranks(5)  # rank 4 has no engine and takes no part
    try:
        found = ranks.call(deepspeed_engines, seconds=80.0)
    finally:
        ranks.close()
    for rank, sums in enumerate(found):
        assert sums.keys() == {(stage, d) for stage in range(4) for d in DOMAINS if rank in d}
        for (stage, domain), total in sums.items():
            assert total == pytest.approx(plain_sum(len(domain)), rel=1e-5), (stage, domain)


# ---------------------------------------------------------------- the command

SCRIPT = """
import os, signal, sys, time, types
import torch
stages = types.ModuleType("real.stages")
class Stages:
    def __init__(self, scenario, graph, holdings, rank, groups, store):
        self.rank, self.groups = rank, groups
        if (rank, "setup") == (1, os.environ.get("RAISE_IN")):
            raise ValueError("there are no weights")
    def __call__(self, f, stage, inbox, turn):
        if (self.rank, f.iteration, f.stage) == (1, 1, os.environ.get("KILL_IN")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        if stage.kind == "train":
            self.groups.all_reduce(torch.ones(2), stage.ranks)
    def close(self):
        pass
stages.Stages = Stages
sys.modules["real.stages"] = stages
from real.run import main
sys.exit(main())
"""
SCENARIO = """
cluster: {spec: a100-80g-sxm, nodes: 1, gpus_per_node: 2}
models: {actor: {spec: tiny-2x128}}
workload: {prompts: 8, prompt_tokens: 16, response_tokens: 16}
"""


def command(folder: Path, *arguments: str, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "main.py").write_text(SCRIPT)
    (folder / "scenario.yaml").write_text(SCENARIO)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    files = [str(folder / "main.py"), str(folder / "scenario.yaml")]
    clean |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, *files, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean | environment,
    )


def test_the_command_writes_a_timeline(tmp_path: Path) -> None:
    out = tmp_path / "timeline.jsonl"
    done = command(tmp_path, "--iterations", "2", "--warmup", "1", "--out", str(out), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "2 iterations in" in done.stdout
    timeline = check_timeline(read(out))
    assert (timeline.source, timeline.ranks, timeline.iterations) == ("real", 2, 2)
    assert {s.firing.iteration for s in timeline.spans} == {0, 1}
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_the_command_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    """torchrun sends SIGTERM to the others at once; they still find out and say what happened."""
    out = tmp_path / "timeline.jsonl"
    done = command(tmp_path, "--out", str(out), "--silence", "2", ranks=2, KILL_IN="update_critic")
    assert done.returncode == 1
    assert "real.run: rank 1 has died or does not answer; it was in update_critic[0] of iteration 1" in done.stderr
    timeline = check_timeline(read(out))
    assert "update_critic" in timeline.info["failure"]


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "real.run: cluster: the scenario runs on 2 ranks, but 1 were started (torchrun "
        "--nproc-per-node 2 -m real.run ...)\n"
    )


def test_the_command_ends_when_a_rank_fails_in_its_setup(tmp_path: Path) -> None:
    out = tmp_path / "timeline.jsonl"
    done = command(tmp_path, "--out", str(out), "--silence", "3", ranks=2, RAISE_IN="setup")
    assert done.returncode == 1
    assert "real.run: rank 1 failed in its setup: ValueError: there are no weights" in done.stderr
    assert read(out).spans == []


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("cluster.gpus_per_nod=1",), "gpus_per_nod"),
        (("cluster.gpus_per_node=1", "--iterations", "0"), "--iterations: is 0"),
        (("cluster.gpus_per_node=1", "--silence", "0"), "--silence: is 0.0"),
        (("cluster.gpus_per_node=1", "--out", "/nowhere/at/all.jsonl"), "--out: "),
        (("cluster.gpus_per_node=1", "models.actor.spec=opt-175b"), "models: the 1 ranks of a machine need at least"),
        (("strategy=disaggregated",), "strategy"),
    ],
)
def test_bad_input_exits_with_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "scenario.yaml").write_text(SCENARIO)
    assert main([str(tmp_path / "scenario.yaml"), *arguments]) == 2
    assert said in capsys.readouterr().err
