"""Clusters of several kinds of machines: each stage costs what the machines that it is on make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import TAIL, scenario, timeline_of

from rlhfsim.cli import main
from rlhfsim.cluster import ClusterTopology
from rlhfsim.costs.mixed import mixed_program
from rlhfsim.costs.pipeline import PipelineSegment
from rlhfsim.costs.segment import Segment
from rlhfsim.errors import InputError
from rlhfsim.layout import placement_notes
from rlhfsim.metrics import stage_seconds, step_seconds
from rlhfsim.simulate import folded_graph, lengths_of, model_flops_utilisation, prepare
from rlhfsim.spec.loader import load_cluster, load_scenario, scenario_sources
from rlhfsim.spec.scenario import Scenario
from rlhfsim.timeline import Timeline

A100, H20, H100 = "a100-80g-sxm", "h20-96g", "h100-80g-sxm"
LARGE = {"models.actor.spec": "llama-7b", "models.actor.zero_stage": 3}  # not bound by launches, which are alike
approx = pytest.approx


def part(spec: str, nodes: int = 1, gpus: int = 4, **changes: Any) -> dict[str, Any]:
    return {"spec": spec, "nodes": nodes, "gpus_per_node": gpus, **changes}


def on(*parts: dict[str, Any], strategy: str = "asynchronous", engine: str = "engine", **changes: Any) -> Scenario:
    """Of one part the cluster itself, else a cluster of parts."""
    cluster: dict[str, Any] = parts[0] if len(parts) == 1 else {"parts": list(parts)}
    return scenario(strategy, engine, cluster=cluster, **({"simulation.iterations": 2} | changes))


def stage_of(timeline: Timeline, *names: str) -> list[float]:
    """Seconds that the firings of these stages take beside transfers and waiting, in order."""
    return [s.compute_seconds[0] for s in timeline.spans if s.firing.stage in names and s.kind != "sync"]


# ---------------------------------------------------------------- two parts of one kind are one cluster


@pytest.mark.parametrize("spec", [A100, H20, "a100-40g-pcie"])
@pytest.mark.parametrize(
    ("strategy", "engine"), [("colocated", "hybrid"), ("asynchronous", "engine"), ("disaggregated", "engine")]
)
def test_parts_of_one_kind_are_one_cluster(spec: str, strategy: str, engine: str) -> None:
    one = timeline_of(on(part(spec, 3), strategy=strategy, engine=engine, **TAIL))
    two = timeline_of(on(part(spec, 1), part(spec, 2), strategy=strategy, engine=engine, **TAIL))
    assert step_seconds(two) == approx(step_seconds(one), rel=1e-9)
    assert [s.firing for s in two.spans] == [s.firing for s in one.spans]
    assert stage_seconds(two) == approx(stage_seconds(one), rel=1e-9)


def test_a_tensor_parallel_group_across_parts_of_one_kind_is_one_across_nodes() -> None:
    changes = {"generation.tensor_parallel": 4, "models.actor.tensor_parallel": 4, "models.actor.zero_stage": 1}
    one = timeline_of(on(part(A100, 2, 2), strategy="colocated", **changes))
    two = timeline_of(on(part(A100, 1, 2), part(A100, 1, 2), strategy="colocated", **changes))
    assert step_seconds(two) == approx(step_seconds(one), rel=1e-9)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send"])
@pytest.mark.parametrize("spec", [A100, "a100-40g-pcie", "h100-80g-sxm-oversubscribed", "v100-32g-sxm"])
def test_routes_in_parts_of_one_kind(spec: str, op: Any) -> None:
    """The same on every link; leaves are a part's own, so only clusters without an oversubscribed tree are compared."""
    own = load_cluster(spec)
    network = own.network.model_copy(update={"nodes_per_leaf": None})
    cluster = own.model_copy(update={"network": network, "nodes": 4})
    parts = [cluster.model_copy(update={"nodes": n}) for n in (1, 3)]
    whole, split = ClusterTopology(cluster), ClusterTopology(cluster.model_copy(update={"parts": parts}))
    assert split.capacities == whole.capacities
    per_node = cluster.node.gpus_per_node
    groups = [(0, per_node), (1, 2 * per_node + 1)] if op == "send" else [range(4 * per_node), range(per_node)]
    found, wanted = (t.route(op, tuple(map(tuple, groups))) for t in (split, whole))
    assert found[1:] == wanted[1:] and found.usage == approx(wanted.usage, rel=1e-12)
    assert set(split.graph.edges) == set(whole.graph.edges)


# ---------------------------------------------------------------- every stage on its part

TRAINER = {"strategy.split": {"training": 4, "generation": 4}}


def test_scoring_and_training_cost_what_they_do_on_their_own_machines() -> None:
    """While engines of the other kind go on and are interrupted: compute as on a cluster of one kind alone."""
    mixed = timeline_of(on(part(A100), part(H20), **TRAINER, **TAIL, **LARGE))
    on_h20 = timeline_of(on(part(H20, 2), **TRAINER, **TAIL, **LARGE))
    on_a100 = timeline_of(on(part(A100, 2), **TRAINER, **TAIL, **LARGE))
    other_way = timeline_of(on(part(H20), part(A100), **TRAINER, **TAIL, **LARGE))
    for names in (("ref", "values"), ("update_actor",), ("update_critic",), ("old_log_prob",)):
        assert sum(stage_of(mixed, *names)) == approx(sum(stage_of(on_a100, *names)), rel=1e-9)
        assert sum(stage_of(other_way, *names)) == approx(sum(stage_of(on_h20, *names)), rel=1e-9)
        assert sum(stage_of(mixed, *names)) != approx(sum(stage_of(other_way, *names)), rel=0.01)


@pytest.mark.parametrize("order", [(A100, H20), (H20, A100)])
def test_synchronous_stages_on_their_parts_take_as_long_as_there(order: tuple[str, str]) -> None:
    """Collectives included; only the samples that come and the weight sync use links of both parts."""
    changes = {
        "strategy.split": {"training": 4, "generation": 4},
        "strategy.staleness": 0,
        "strategy.chunks": 1,
        "strategy.interrupt": False,
        "generation.tensor_parallel": 2,
        **LARGE,
    }

    def without_waiting(*parts: dict[str, Any]) -> dict[str, float]:
        spans = timeline_of(on(*parts, **changes, **TAIL)).spans
        names = {s.firing.stage for s in spans}
        return {n: sum(s.seconds - s.data_seconds for s in spans if s.firing.stage == n) for n in names}

    mixed = without_waiting(part(order[0]), part(order[1]))
    first, second = (without_waiting(part(spec, 2)) for spec in order)
    assert mixed["gen"] == approx(second["gen"], rel=1e-9)
    for name in ("update_actor", "update_critic", "ref", "values", "old_log_prob"):
        assert mixed[name] == approx(first[name], rel=1e-9)
    assert mixed["gen"] != approx(first["gen"], rel=0.01)


def test_explicit_ranks_place_models_on_parts() -> None:
    ranks = {
        "shadow_actor": [4, 5, 6, 7],
        "reference": [0],
        "reward": [1],
        "shadow_critic": [1],
        "actor": [2],
        "critic": [3],
    }
    changes = {"strategy.ranks": ranks, "strategy.batches": 4, "strategy.replicas": 2}
    mixed = timeline_of(on(part(A100), part(H20), strategy="disaggregated", **changes))
    alone = timeline_of(on(part(H20, 2), strategy="disaggregated", **changes))
    assert stage_of(mixed, "gen") == approx(stage_of(alone, "gen"))


# ---------------------------------------------------------------- the slower sets the pace


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_data_parallel_group_of_two_kinds_waits_for_the_slower(zero_stage: int, pipeline: int) -> None:
    """Wherever its ranks meet, and only there."""
    if pipeline > 1 and zero_stage == 3:
        return
    changes = {
        f"models.{m}.{name}": value
        for m in ("actor", "critic")
        for name, value in {"zero_stage": zero_stage, "pipeline_parallel": pipeline, "micro_batch_samples": 2}.items()
    }
    changes |= {"effects.links": False, "models.actor.spec": "qwen2.5-1.5b"}

    def updates(*parts: dict[str, Any]) -> dict[str, Any]:
        spans = timeline_of(on(*parts, strategy="colocated", **changes)).spans
        return {n: next(s for s in spans if s.firing.stage == n) for n in ("update_actor", "update_critic")}

    alone, mixed = [updates(part(spec, 2)) for spec in (A100, H20)], updates(part(A100), part(H20))
    for name, span in mixed.items():
        on_a100, on_h20 = (a[name] for a in alone)
        assert on_a100.seconds < on_h20.seconds  # though its memory is slower, and so the optimizer
        if pipeline > 1:  # a stage on each kind, the faster one's is partly hidden
            assert on_a100.seconds < span.seconds < on_h20.seconds
            continue
        assert span.compute_seconds[0] == approx(on_a100.compute_seconds[0])
        assert span.compute_seconds[-1] == approx(on_h20.compute_seconds[0])
        slowest = {label: max(on_a100.detail[label], on_h20.detail[label]) for label in span.detail}
        if zero_stage < 3:  # replicas meet between forward and backward passes and the optimizer
            assert span.detail == approx(slowest, rel=1e-9) and span.seconds == approx(sum(slowest.values()), rel=1e-9)
        else:  # and at every layer
            assert sum(slowest.values()) * (1 - 1e-9) <= span.seconds < on_a100.seconds + on_h20.seconds


@pytest.mark.parametrize("turns", [None, {"number": 3, "observation_tokens": 40, "tool_latency": 0.2}])
def test_engines_of_two_kinds_each_at_their_own_pace(turns: dict[str, Any] | None) -> None:
    """Every engine generates its equal share; the call ends with the slower kind's."""
    changes = {"effects.links": False, "strategy.calls": 1, "workload.turns": turns, **TAIL}
    seconds = {
        spec: [
            s.end_seconds - s.start_seconds
            for s in timeline_of(on(part(spec, 2), strategy="colocated", **changes)).spans
            if s.firing.stage == "gen" and s.firing.iteration == 0
        ]
        for spec in (A100, H20)
    }
    mixed = timeline_of(on(part(A100), part(H20), strategy="colocated", **changes))
    own = {
        s.ranks: s.end_seconds - s.start_seconds
        for s in mixed.spans
        if s.firing.stage == "gen" and s.firing.iteration == 0
    }
    assert len(own) == 8
    for rank, (ranks, spent) in enumerate(sorted(own.items())):
        assert ranks == (rank,) and spent == approx(seconds[A100 if rank < 4 else H20][rank], rel=1e-9)


def test_static_engines_of_two_kinds_in_one_place_meet_at_the_end() -> None:
    changes = {"effects.links": False, **TAIL}
    spent = {
        spec: stage_seconds(timeline_of(on(part(spec, 2), strategy="colocated", engine="hybrid", **changes)))["gen"]
        for spec in (A100, H20)
    }
    mixed = stage_seconds(timeline_of(on(part(A100), part(H20), strategy="colocated", engine="hybrid", **changes)))[
        "gen"
    ]
    assert min(spent.values()) * 0.99 < mixed <= max(spent.values()) * (1 + 1e-9)
    proportional = {"effects.decode": False, **changes}
    spent = {
        spec: stage_seconds(timeline_of(on(part(spec, 2), strategy="colocated", engine="hybrid", **proportional)))[
            "gen"
        ]
        for spec in (A100, H20)
    }
    mixed = stage_seconds(
        timeline_of(on(part(A100), part(H20), strategy="colocated", engine="hybrid", **proportional))
    )["gen"]
    assert mixed == approx(max(spent.values()), rel=1e-9)


def test_equal_lengths_are_folded_and_parts_are_not_folded_together() -> None:
    found = on(part(A100), part(H20), strategy="colocated")
    setup = prepare(found)
    folded = folded_graph(setup, lengths_of(found, 0))
    blocks = {rank: block for block, ranks in enumerate(folded.ranks) for rank in ranks}
    assert len(folded.graph.at("gen").ranks) < 8 and not {blocks[r] for r in range(4)} & {
        blocks[r] for r in range(4, 8)
    }


def test_programs_are_put_together_replica_by_replica() -> None:
    def program(*seconds: float) -> list[Segment]:
        return [
            Segment("work", np.array(seconds)[:, None], bound={"flops": seconds[0]}),
            Segment("all", np.full((1, 1), seconds[0])),
        ]

    kinds = np.array([[[0], [1], [0]]])
    work, everyone = mixed_program({0: program(1.0, 2.0, 3.0), 1: program(10.0, 20.0, 30.0)}, kinds)
    assert work.compute_seconds.ravel().tolist() == [1.0, 20.0, 3.0] and everyone.compute_seconds.tolist() == [[10.0]]
    assert work.bound["flops"] == approx(2 / 3 * 1.0 + 1 / 3 * 10.0)


def test_a_pipeline_stage_takes_its_own_seconds() -> None:
    def program(seconds: float) -> list[Segment]:
        each = np.full((4, 3, 2), seconds)  # virtual stages, micro-batches, replicas
        return [
            PipelineSegment(
                "f", np.full((2, 3), 4 * seconds), np.ones(3), stages=2, forward_seconds=each, backward_seconds=2 * each
            )
        ]

    kinds = np.array([[[0], [0]], [[1], [0]]])  # the second stage of the first replica is of kind 1
    (found,) = mixed_program({0: program(1.0), 1: program(5.0)}, kinds)
    assert isinstance(found, PipelineSegment) and found.backward_seconds is not None
    assert found.forward_seconds[:, 0, 0].tolist() == [1.0, 5.0, 1.0, 5.0]
    assert found.forward_seconds[:, 0, 1].tolist() == [1.0] * 4
    assert found.backward_seconds[:, 1, 0].tolist() == [2.0, 10.0, 2.0, 10.0]
    assert found.compute_seconds[:, 0].tolist() == [18.0, 6.0]


# ---------------------------------------------------------------- links between parts


def seconds_between(cluster: dict[str, Any], op: Any = "send", groups: Any = ((0, 8),), payload: float = 1e12) -> float:
    topology = ClusterTopology(scenario(cluster=cluster).cluster)
    route = topology.route(op, groups)
    return payload * max(u / topology.capacities[link] for link, u in route.usage.items())


def test_the_slower_nic_of_both_parts_is_the_limit_and_a_given_link_below_it() -> None:
    fast, slow = part(A100, 1, 8), part(A100, 1, 8, network={"nic_bytes_per_second": 5e9})
    assert seconds_between({"parts": [fast, slow]}) == approx(1e12 / (0.94 * 5e9), rel=1e-6)
    assert seconds_between({"parts": [slow, fast]}) == approx(1e12 / (0.94 * 5e9), rel=1e-6)
    wan = {"parts": [fast, slow], "between": {"bytes_per_second": 1e9}}
    assert seconds_between(wan) == approx(1e12 / (0.94 * 1e9), rel=1e-6)
    both = seconds_between(wan, groups=((0, 8), (1, 9)))  # two pairs share it
    assert both == approx(2e12 / (0.94 * 1e9), rel=1e-6)
    inside = seconds_between(wan, groups=((0, 1),))
    assert inside == seconds_between({"parts": [fast, slow]}, groups=((0, 1),))


def test_latency_between_parts() -> None:
    plain = {"parts": [part(A100, 1, 8), part(A100, 1, 8)]}
    near, far = (
        ClusterTopology(scenario(cluster=plain | extra).cluster)
        for extra in ({}, {"between": {"latency_seconds": 1e-3}})
    )
    pair, inside = ((0, 8),), ((0, 1),)
    hop = load_cluster(A100).network.latency_seconds
    assert hop is not None
    added = far.route("send", pair).latency_seconds - near.route("send", pair).latency_seconds
    assert added == approx(1e-3 - hop.value)
    assert far.route("send", inside) == near.route("send", inside)
    every = (tuple(range(16)),)
    added = far.route("all_reduce", every).latency_seconds - near.route("all_reduce", every).latency_seconds
    assert added == approx(2 * (1e-3 - hop.value))


def test_every_link_of_a_route_is_in_the_graph() -> None:
    cluster = scenario(
        cluster={
            "parts": [part("a100-40g-pcie", 2, 8), part(H100, 33, 8), part("v100-32g-sxm", 1, 8)],
            "between": {"bytes_per_second": 1e10},
        }
    ).cluster
    topology = ClusterTopology(cluster)
    links = {data["link"] for *_, data in topology.graph.edges(data=True)} - {None}
    assert links == set(topology.capacities)
    everyone = (tuple(range(cluster.gpus)),)
    for op in ("all_gather", "all_to_all", "broadcast"):
        usage = topology.route(op, everyone).usage  # type: ignore[arg-type]
        assert set(usage) <= links and {"part0 up", "part1 up"} <= set(usage)
    copied = topology.route("to_host", tuple((r,) for r in everyone[0])).usage
    assert set(copied) <= links and "gpu0 pcie out" in copied


# ---------------------------------------------------------------- memory


def test_memory_is_that_of_each_rank() -> None:
    small = {"gpu": {"memory_bytes": 40e9}}
    setup = prepare(on(part(A100), part(A100, **small), **TRAINER))
    fit, memory = setup.fit(), setup.memory
    assert {memory.capacity_of(r) for r in range(4)} == {load_cluster(A100).gpu.memory_bytes.value}
    assert {memory.capacity_of(r) for r in range(4, 8)} == {40e9}
    assert {i.capacity_bytes for i in fit.by_phase.values()} == {memory.capacity_of(0), 40e9}
    alone = prepare(on(part(A100, 2, **small), **TRAINER)).memory
    assert (
        memory.kv_capacity_by_kind == alone.kv_capacity_by_kind or memory.kv_capacity_tokens == alone.kv_capacity_tokens
    )
    tight = {"gpu": {"memory_bytes": 3e9}}
    refused = prepare(on(part(A100), part(A100, **tight), **TRAINER, **{"models.actor.spec": "opt-1.3b"})).fit()
    assert not refused.fits and refused.worst.rank >= 4 and refused.capacity_bytes == 3e9


def test_engines_of_two_kinds_have_caches_of_their_own() -> None:
    setup = prepare(on(part(A100), part(H20), strategy="colocated"))
    found = setup.memory.kv_capacity_by_kind
    assert found is not None and set(found) == {0, 1} and found[1] > found[0]
    assert setup.fit().kv_capacity_tokens == found[0]
    for kind, spec in enumerate((A100, H20)):
        alone = prepare(on(part(spec, 2), strategy="colocated")).fit().kv_capacity_tokens
        assert alone == approx(found[kind], rel=1e-9)


def test_host_memory_is_that_of_each_node() -> None:
    offload = {"models.actor.offload_optimizer": True, "models.critic.offload_optimizer": True}
    little = {"node": {"host_memory_bytes": 1e8}}
    fit = prepare(on(part(A100), part(A100, **little), strategy="colocated", **offload)).fit()
    assert not fit.fits and "host memory" in fit.reason and fit.host_capacity_bytes == 1e8
    assert prepare(on(part(A100), part(A100, **little), **TRAINER, **offload)).fit().fits  # nobody trains there


def test_offloaded_optimizers_take_the_slower_host_and_nodes_of_any_size() -> None:
    offload = {"models.actor.offload_optimizer": True, "effects.links": False}
    slow = {"node": {"host_memory_bytes_per_second": 1e9}}
    alone = stage_seconds(timeline_of(on(part(A100, 4, 2, **slow), strategy="colocated", **offload)))
    mixed = stage_seconds(timeline_of(on(part(A100, 1, 4), part(A100, 2, 2, **slow), strategy="colocated", **offload)))
    assert mixed["update_actor"] == approx(alone["update_actor"], rel=1e-9)


# ---------------------------------------------------------------- overheads, notes, utilisation


def test_each_part_has_its_own_overheads_and_the_scenario_goes_first() -> None:
    slow = {"overheads": {"firing_seconds": 0.5, "eager_pass_seconds": 0.1}}
    found = on(part(A100), part(A100, **slow))
    assert [found.overheads_of(p).firing_seconds for p in found.cluster.parts] == [0.0, 0.5]
    given = on(part(A100), part(A100, **slow), **{"overheads.firing_seconds": 0.25})
    assert [given.overheads_of(p).firing_seconds for p in given.cluster.parts] == [0.25, 0.25]
    assert [given.overheads_of(p).eager_pass_seconds for p in given.cluster.parts] == [0.0, 0.1]
    assert found.cluster.part_kinds == [0, 1]  # other host times: not one kind
    timeline = timeline_of(on(part(A100), part(A100, **slow), **TRAINER))
    assert timeline.spans[0].firing.stage == "gen" and timeline.spans[0].compute_seconds[0] > 0.5


def test_stages_on_two_kinds_are_noted() -> None:
    setup = prepare(on(part(A100), part(H20), strategy="colocated"))
    assert any("gen is on a100-80g-sxm and h20-96g" in note for note in setup.notes)
    setup = prepare(on(part(A100), part(H20), **TRAINER))
    assert not any(" is on " in note for note in setup.notes)
    wide = on(
        part(A100, 2, 2),
        part(H20, 1, 4),
        **{"strategy.split": {"training": 4, "generation": 4}, "generation.tensor_parallel": 4},
    )
    assert not any("several nodes" in n for n in placement_notes(wide, prepare(wide).graph, prepare(wide).holdings))


def test_utilisation_is_of_all_peaks() -> None:
    peaks = [load_cluster(spec).gpu.flops_per_second["bf16"].value for spec in (A100, H20)]
    alone = model_flops_utilisation(prepare(on(part(A100, 2), **TRAINER)), 1.0)
    mixed = model_flops_utilisation(prepare(on(part(A100), part(H20), **TRAINER)), 1.0)
    assert mixed * np.mean(peaks) == approx(alone * peaks[0], rel=1e-9)


# ---------------------------------------------------------------- files, commands, bad input

FILE = """\
cluster:
  parts:
    - {spec: a100-80g-sxm, nodes: 1, gpus_per_node: 4}
    - {spec: h20-96g, nodes: 1, gpus_per_node: 4}
  between: {bytes_per_second: 25e9}
models: {actor: {spec: small-8x512}}
workload: {prompts: 32, prompt_tokens: 64, response_tokens: 64}
generation: {engine: engine}
strategy: {name: asynchronous, split: {training: 4, generation: 4}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "parts.yaml"
    path.write_text(FILE)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code: Any = 0
    try:
        main(list(argv))
    except SystemExit as end:
        code = end.code or 0
    return int(code), capsys.readouterr().out


def test_commands(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "fits", str(file), "--plot", str(tmp_path / "m.png"))
    assert (
        code == 0 and "4 x a100-80g-sxm (1 node) + 4 x h20-96g (1 node)" in out and (tmp_path / "m.png").stat().st_size
    )
    code, out = run(capsys, "simulate", str(file), "--json", "--timeline", str(tmp_path / "t.jsonl"), "--plot",
                       str(tmp_path / "t.png"), "--trace", str(tmp_path / "t.json"))  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["gpus"] == 8 and found["cluster"] == "a100-80g-sxm + h20-96g"
    assert any(name.startswith("cluster.parts.1.") for name in found["unverified"])
    trace = json.loads((tmp_path / "t.json").read_text())
    assert sum(e["name"] == "process_name" for e in trace["traceEvents"]) == 2
    code, out = run(capsys, "show", str(file), "--json")
    fields = {entry["field"] for entry in json.loads(out)}
    assert {
        "cluster.parts.0.gpu.memory_bytes",
        "cluster.parts.1.gpu.memory_bytes",
        "cluster.between.bytes_per_second",
    } <= fields
    out_file = tmp_path / "s.csv"
    code, _ = run(
        capsys, "sweep", str(file), "cluster.parts.1.nodes=1,2", "--as-given", "--out", str(out_file), "--jobs", "1"
    )
    assert code == 0 and [line.split(",")[0] for line in out_file.read_text().splitlines()[1:]] == ["1", "2"]


def test_overrides_name_a_part_by_its_number(file: Path) -> None:
    cluster = load_scenario(file, ["cluster.parts.1.nodes=2", "cluster.parts.0.gpu.memory_bytes=70e9"]).cluster
    assert (cluster.nodes, cluster.gpus, cluster.parts[1].nodes) == (3, 12, 2)
    assert cluster.parts[0].gpu.memory_bytes.value == cluster.gpu.memory_bytes.value == 70e9
    assert cluster.rank_nodes == [0] * 4 + [1] * 4 + [2] * 4 and cluster.rank_kinds == [0] * 4 + [1] * 8
    sources = {field: value for field, value, _ in scenario_sources(load_scenario(file))}
    assert sources["cluster.parts.1.gpu.memory_bytes"] == load_cluster(H20).gpu.memory_bytes.value


def test_a_cluster_file_of_parts(tmp_path: Path, file: Path) -> None:
    lab = tmp_path / "lab.yaml"
    lab.write_text("parts: [h20-96g, {spec: a100-80g-sxm, nodes: 2}]\n")
    assert load_cluster(lab).name == "lab" and [p.name for p in load_cluster(lab).parts] == [H20, A100]
    file.write_text(
        FILE.partition("models:")[0].partition("cluster:")[0]
        + f"cluster: {{spec: {lab}}}\nmodels:"
        + FILE.partition("models:")[2]
    )
    assert load_scenario(file).cluster.gpus == load_cluster(H20).gpus + 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.parts.1.spec=h20-97g"], r"parts.1.spec: there is no cluster 'h20-97g' \(did you mean 'h20-96g'"),
        (["cluster.parts.0.nodes=-1"], "cluster.parts.0.nodes: is -1, but must be at least 1"),
        (["cluster.parts.1.gpu.memory_gb=3"], "cluster.parts.1.gpu.memory_gb: unknown key .*memory_bytes"),
        (["cluster.parts.1.node_count=3"], "cluster.parts.1.node_count: unknown key"),
        (["cluster.parts.2.nodes=1"], "'2' is no entry of a list of 2"),
        (["cluster.nodes=2"], "cluster.nodes: is given beside parts"),
        (["cluster.parts=3"], "cluster.parts: is 3, but must be a list of clusters"),
        (["cluster.parts=[3]"], "cluster.parts.0: is 3, but must be a name or a mapping"),
        (["cluster.parts=[{parts: [h20-96g]}]"], "cluster.parts.0: has parts itself"),
        (["cluster.between.bytes_per_second=-1"], "cluster.between.bytes_per_second: is -1, but must be above 0"),
        (["generation.tensor_parallel=16"], "is 16, but"),
    ],
)  # fmt: skip
def test_bad_parts(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scenario(file, overrides)


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ((part(A100, 1, 2), part(H20, 1, 2)), {"strategy": "colocated", "generation.tensor_parallel": 4},
         "generation.tensor_parallel: is 4, but ranks 0-3 of one group are of a100-80g-sxm and h20-96g"),
        ((part(A100), part(H20)), {"strategy": "partial_rollout"}, "gen is on a100-80g-sxm and h20-96g; engines"),
        ((part(A100), part(H20)), {"strategy": "disaggregated", "strategy.ranks": {
            "shadow_actor": [0], "reference": [1], "reward": [1], "shadow_critic": [1], "critic": [2], "actor": [8]}},
         "ranks.actor names rank 8; there are ranks 0 to 7"),
        ((part(A100, overheads={"deepspeed": {"zero_3": {"step": {"call_seconds": 1.0}}}}), part(H20)),
         {"strategy": "colocated"}, "overheads.deepspeed: are measured for some"),
    ],
)  # fmt: skip
def test_what_cannot_work_together(parts: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(on(*parts, **changes))
