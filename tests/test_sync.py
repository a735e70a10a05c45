"""Weight syncs by their real paths: who sends, through what, and what the host adds, against closed forms."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from scenarios import scenario, timeline_of
from test_cluster import IDEAL, make_cluster
from test_passes import OPS, layout, operators, use

from rlhfsim.cli import main
from rlhfsim.cluster import ClusterTopology
from rlhfsim.costs.passes import Layout
from rlhfsim.costs.segment import Segment
from rlhfsim.costs.sync import Senders, sync_program, sync_tensors
from rlhfsim.errors import InputError
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real
from rlhfsim.sim.links import lone_rate
from rlhfsim.simulate import prepare
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import ModelUse, Overheads, WeightSync
from rlhfsim.sync_cost import weight_syncs

approx = pytest.approx

LLAMA = load_model("llama-7b")
WEIGHTS = 2.0 * parameters(LLAMA)
NIC, NVLINK, PCIE, MEMORY = 25e9, 300e9, 32e9, 400e9
MODES = list(product(("p2p", "broadcast"), get_args(Senders), ("gpu", "host", "disk")))
NODES = [rank // 8 for rank in range(32)]
MEGATRON = {"zero_stage": 1, "tensor_parallel": 8}


def topology() -> ClusterTopology:
    """Four nodes of 8 GPUs and 8 NICs, everything at its nominal rate and without latency."""
    return ClusterTopology(make_cluster(nodes=4, per_switch=1), IDEAL)


def program(
    u: ModelUse, engines: Layout, method: Any = "broadcast", *, source: int = 8, ops: Any = OPS, **path: Any
) -> list[Segment]:
    if path.get("through") == "disk":
        path = {"storage_bytes_per_second": 1e9} | path
    chosen = WeightSync(method=method, bucket_bytes=1e12, **path)
    return sync_program(
        u,
        layout(u, source),
        engines,
        ops,
        method=method,
        bucket_bytes=chosen.bucket_bytes,
        path=chosen,
        rank_nodes=NODES,
    )


def seconds(found: list[Segment]) -> dict[str, float]:
    """Of each segment, alone on the links."""
    links, spent = topology(), dict[str, float]()
    for segment in found:
        routes = [links.route(t.op, t.groups) for t in segment.transfers]
        rates = [lone_rate(route.usage, links.capacities) for route in routes]
        spent[segment.label] = spent.get(segment.label, 0.0) + segment.elapsed(routes, rates).seconds
    return spent


# ---------------------------------------------------------------- who sends

ENGINES = Layout(tuple(range(8, 24)), tensor_parallel=8)  # two engines, a node each


@pytest.mark.parametrize(
    ("senders", "settings", "gathered", "through_a_nic"),
    [
        ("replica", MEGATRON, 0, 1 / 8),  # every shard by its own rank's NIC
        ("first_rank", MEGATRON, 7 / 8, 1),
        ("stage_heads", MEGATRON, 7 / 8, 1),
        ("all_ranks", MEGATRON, 0, 1 / 8),
        ("stage_heads", {"zero_stage": 1, "tensor_parallel": 4, "pipeline_parallel": 2}, 3 / 4 / 2, 1 / 2),
        ("first_rank", {"zero_stage": 1, "tensor_parallel": 4, "pipeline_parallel": 2}, 3 / 4 / 2 + 1 / 2, 1),
        ("replica", {"zero_stage": 1, "tensor_parallel": 2}, 0, 1 / 2),  # of four replicas, the first
        ("all_ranks", {"zero_stage": 1, "tensor_parallel": 2}, 0, 1 / 8),  # a quarter of their shard each
        ("replica", {"zero_stage": 3}, 7 / 8, 1),  # OpenRLHF, AReaL, verl: gathered to all, sent by rank 0
        ("first_rank", {"zero_stage": 3}, 7 / 8, 1),
        ("all_ranks", {"zero_stage": 3}, 0, 1 / 8),
    ],
)  # fmt: skip
def test_broadcast_by_the_senders_nics(
    senders: Any, settings: dict[str, Any], gathered: float, through_a_nic: float
) -> None:
    """Gathers over NVLink inside the node, then what each sender has by the one NIC that is nearest to it."""
    spent = seconds(program(use(**settings), ENGINES, "broadcast", senders=senders))
    assert spent.get("sync_all_gather", 0.0) == approx(gathered * WEIGHTS / NVLINK, rel=1e-9)
    assert spent["sync_broadcast"] == approx(through_a_nic * WEIGHTS / NIC, rel=1e-9)


@pytest.mark.parametrize("senders", get_args(Senders))
@pytest.mark.parametrize("engine_ranks", [1, 2, 4, 8])
def test_p2p_sends_replica_after_replica(senders: Any, engine_ranks: int) -> None:
    engines = Layout(tuple(range(8, 24)), tensor_parallel=engine_ranks)
    found = program(use(**MEGATRON), engines, "p2p", senders=senders)
    sends = [s for s in found if s.label == "sync_send"]
    assert len(sends) == engines.replicas
    # By all NICs of the sender at once, but an engine has no more than its own ranks'.
    nics = min(8 if senders in ("replica", "all_ranks") else 1, engine_ranks)
    assert seconds(found)["sync_send"] == approx(engines.replicas * WEIGHTS / (nics * NIC), rel=1e-9)


@pytest.mark.parametrize(("method", "senders", "through"), MODES)
@pytest.mark.parametrize(
    "settings", [MEGATRON, {"zero_stage": 3}, {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2}]
)
@pytest.mark.parametrize("engine_ranks", [1, 4, 16])
def test_every_rank_gets_its_shard_once(
    method: Any, senders: Any, through: Any, settings: dict[str, Any], engine_ranks: int
) -> None:
    """Bytes that each engine rank (or its node) receives, and bytes that the senders send, whatever the path."""
    engines = Layout(tuple(range(8, 24)), tensor_parallel=engine_ranks)
    received = dict.fromkeys(engines.ranks, 0.0)
    sent = fetched = 0.0
    for segment in program(use(**settings), engines, method, senders=senders, through=through):
        for t in segment.transfers:
            if t.op in ("send", "broadcast", "from_host"):
                for group in t.groups:
                    for rank in group[-1:] if t.op != "broadcast" else group[1:]:
                        received[rank] += float(t.payload_bytes)
            if t.op in ("send", "broadcast", "to_host"):
                sent += float(t.payload_bytes) * len(t.groups)
            fetched += float(t.payload_bytes) * len(t.groups) * (t.op == "host_send")
    shard, copies = WEIGHTS / engine_ranks, engines.replicas if method == "p2p" else 1
    if through == "gpu":
        assert sent == approx(copies * WEIGHTS)
        if method == "p2p":
            assert all(count == approx(shard) for count in received.values())
        assert all(count >= shard * (1 - 1e-9) for count in received.values())  # of a broadcast a rank keeps its part
        return
    assert all(count == approx(shard) for count in received.values()) and sent == approx(WEIGHTS)
    if through == "host":  # an engine on two nodes: what it needs arrives once, on one of them or on both
        assert WEIGHTS * (1 - 1e-9) <= fetched <= (copies if method == "p2p" else 2) * WEIGHTS * (1 + 1e-9)


# ---------------------------------------------------------------- through host and disk


def test_through_the_host_down_over_and_up() -> None:
    """Eight shards to the host at once, by eight NICs to each engine's host, up again at once."""
    spent = seconds(program(use(**MEGATRON), ENGINES, "p2p", through="host"))
    share = WEIGHTS / 8
    assert spent == approx(
        {"sync_to_host": share / PCIE, "sync_host_send": 2 * share / NIC, "sync_from_host": share / PCIE}
    )


def test_one_sender_has_one_slot_and_one_nic() -> None:
    spent = seconds(program(use(zero_stage=3), ENGINES, "p2p", through="host", senders="first_rank"))
    assert spent["sync_to_host"] == approx(WEIGHTS / PCIE)
    assert spent["sync_host_send"] == approx(2 * WEIGHTS / NIC)


def test_engines_of_a_node_fetch_their_own_copies_or_one_together() -> None:
    engines = Layout(tuple(range(8, 16)), tensor_parallel=2)  # four engines on one node
    own, together = (seconds(program(use(**MEGATRON), engines, m, through="host")) for m in ("p2p", "broadcast"))
    assert own["sync_host_send"] == approx(4 * together["sync_host_send"])
    assert together["sync_host_send"] == approx(WEIGHTS / 8 / NIC)
    assert own["sync_from_host"] == together["sync_from_host"] == approx(WEIGHTS / 2 / PCIE)


def test_in_one_node_bytes_are_copied_in_its_memory() -> None:
    engines = Layout((4, 5, 6, 7), tensor_parallel=4)
    found = program(use(zero_stage=1, tensor_parallel=4), engines, "p2p", source=4, through="host")
    spent = seconds(found)
    assert spent["sync_host_send"] == approx(2 * WEIGHTS / MEMORY)  # read and written
    assert spent["sync_to_host"] == approx(WEIGHTS / 4 / PCIE)  # four slots; memory would allow for more
    assert not [
        link
        for s in found
        for t in s.transfers
        if t.op == "host_send"
        for link in topology().route(t.op, t.groups).usage
        if "memory" not in link
    ]


@pytest.mark.parametrize(("method", "copies"), [("p2p", 4), ("broadcast", 2)])
def test_through_the_disk_written_once_and_read_by_replica_or_node(method: str, copies: int) -> None:
    engines = Layout(tuple(range(8, 24)), tensor_parallel=4)
    found = program(use(**MEGATRON), engines, method, through="disk", storage_bytes_per_second=2e9)
    spent = seconds(found)
    assert spent["sync_write"] == approx(WEIGHTS / 2e9) and spent["sync_read"] == approx(copies * WEIGHTS / 2e9)
    assert spent["sync_to_host"] == approx(WEIGHTS / 8 / PCIE) and spent["sync_from_host"] == approx(WEIGHTS / 4 / PCIE)
    assert {s.label: s.bound for s in found if s.bound} == {
        n: {"storage": spent[n]} for n in ("sync_write", "sync_read")
    }


def test_lora_moves_factors_by_every_path() -> None:
    u, factors = use(zero_stage=3, lora_rank=16), 2 * 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    for through, label in (("gpu", "sync_broadcast"), ("host", "sync_host_send"), ("disk", "sync_write")):
        rate = {"gpu": NIC, "host": NIC, "disk": 1e9}[through]
        assert seconds(program(u, ENGINES, "broadcast", through=through))[label] == approx(
            (2 if through == "host" else 1) * factors / rate
        )


# ---------------------------------------------------------------- the host's overhead


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("llama-7b", 291),  # number of entries of weight_map in model.safetensors.index.json on Hugging Face
        ("qwen2.5-7b", 339),
        ("qwen3-30b-a3b", 18867),
        ("opt-125m", 196),  # of the state_dict, the tied head once
    ],
)
def test_tensors_of_published_checkpoints(name: str, tensors: int) -> None:
    assert sync_tensors(use(load_model(name), zero_stage=0)) == tensors


def test_tensors_of_lora() -> None:
    assert sync_tensors(use(lora_rank=8)) == 32 * 7 * 2


@pytest.mark.parametrize("method", ["p2p", "broadcast"])
def test_layers_are_gathered_once_for_all_copies(method: str) -> None:
    """32 layers of LLaMA 7B at 10 ms, to four engines one after the other or to all at once."""
    ops = operators(overheads=Overheads(sync_layer_seconds=0.01))
    segments = program(use(**MEGATRON), Layout(range(8, 16), 2), method, ops=ops)
    (overhead,) = [s for s in segments if s.label == "sync_overhead"]
    assert float(overhead.compute_seconds[0, 0]) == approx(0.32)


@pytest.mark.parametrize(
    ("senders", "settings", "parts", "senders_at_once"),
    [
        ("replica", MEGATRON, 1, 8),
        ("first_rank", MEGATRON, 1, 1),
        ("all_ranks", {"zero_stage": 3}, 1, 8),
        ("all_ranks", {"zero_stage": 1, "tensor_parallel": 2}, 1, 8),
        ("stage_heads", {"zero_stage": 1, "tensor_parallel": 2, "pipeline_parallel": 2}, 2, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("method", "rounds"), [("p2p", 2), ("broadcast", 1)])
def test_overhead_is_tensors_and_buckets_of_one_sender(
    senders: Any, settings: dict[str, Any], parts: int, senders_at_once: int, method: Any, rounds: int
) -> None:
    ops = operators(overheads=Overheads(sync_tensor_seconds=1e-3, sync_bucket_seconds=0.1))
    u = use(**settings)
    found = sync_program(
        u,
        layout(u, 8),
        ENGINES,
        ops,
        method=method,
        bucket_bytes=1e9,
        path=WeightSync(senders=senders),
        rank_nodes=NODES,
    )
    buckets = -(-WEIGHTS / senders_at_once // 1e9)
    (overhead,) = [s for s in found if s.label == "sync_overhead"]
    assert overhead.bound["host"] == approx(rounds * (291 / parts * 1e-3 + buckets * 0.1), rel=1e-9)
    assert [s.label for s in found[:-1]] == [
        s.label for s in program(u, ENGINES, method, senders=senders)
    ]  # and nothing else


def test_overhead_in_place_and_none_where_nothing_is_inefficient() -> None:
    overheads = Overheads(sync_tensor_seconds=1e-3)
    u, engines = use(zero_stage=3), Layout(tuple(range(8)), tensor_parallel=2)

    def labels(**effects: bool) -> list[str]:
        ops = operators(overheads=overheads, **effects)
        return [s.label for s in sync_program(u, layout(u, 8), engines, ops, method="reshard", bucket_bytes=1e9)]

    assert "sync_overhead" in labels() and "sync_overhead" not in labels(efficiency=False) and not labels(sync=False)


# ---------------------------------------------------------------- in place, tensor by tensor


def in_place(settings: dict[str, Any], spec: str = "qwen3-30b-a3b", **overheads: float) -> list[Segment]:
    """16 ranks of two nodes refresh engines of 8 ranks."""
    u, engines = ModelUse(spec=spec, shape=load_model(spec), **settings), Layout(tuple(range(16)), tensor_parallel=8)
    ops, path = operators(overheads=Overheads(**overheads)), WeightSync(in_place="tensors")
    return sync_program(u, layout(u, 16), engines, ops, method="reshard", bucket_bytes=1e9, path=path)


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel": 2, "pipeline_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1},
        {"tensor_parallel": 4, "expert_parallel": 2, "expert_tensor_parallel": 2},
        {"pipeline_parallel": 4, "expert_parallel": 4, "expert_tensor_parallel": 1},
        {"expert_parallel": 16, "expert_tensor_parallel": 1},
        {"tensor_parallel": 8},
    ],
)
def test_a_rank_receives_all_that_it_does_not_hold(settings: dict[str, Any]) -> None:
    """Ring all-gathers receive (ranks - 1) / ranks of the result: summed over the collectives that is all weights but
    the rank's own share of the dense ones and of the experts."""
    spec = load_model("qwen3-30b-a3b")
    routed = 2.0 * 48 * 128 * 3 * 2048 * 768
    dense = 2.0 * parameters(spec) - routed
    tensor, stages = settings.get("tensor_parallel", 1), settings.get("pipeline_parallel", 1)
    experts = settings.get("expert_parallel", 1) * settings.get("expert_tensor_parallel", tensor)
    found = in_place({"zero_stage": 1, **settings})
    transfers = [t for segment in found for t in segment.transfers]
    received = sum(float(t.payload_bytes) * (1 - 1 / len(t.groups[0])) for t in transfers)
    own = dense / tensor / stages + routed / experts / stages
    assert received == approx(dense + routed - own, rel=1e-9)
    assert {len(group) for t in transfers for group in t.groups} <= {tensor, stages, 2, 4, 16}


def test_in_place_counts_every_expert() -> None:
    """48 layers of 128 experts with three matrices each, and what is not an expert: 18,867 names in the checkpoint of
    Qwen3-30B-A3B (q, k, v, o, two norms of heads, two of the layer, a router; embedding, head, last norm)."""
    (overhead,) = [s for s in in_place({"zero_stage": 1}, sync_tensor_seconds=1e-3) if s.label == "sync_overhead"]
    assert overhead.bound["host"] == approx((48 * (128 * 3 + 9) + 3) * 1e-3, rel=1e-9)


# ---------------------------------------------------------------- whole scenarios


@pytest.mark.parametrize(("method", "senders", "through"), MODES)
@pytest.mark.parametrize("strategy", ["disaggregated", "asynchronous"])
def test_the_simulator_takes_the_time_of_the_sync_alone(strategy: str, method: str, senders: str, through: str) -> None:
    """Nothing else runs on the links meanwhile in a first iteration's sync; its parts are in the span's detail."""
    changes = {
        "weight_sync.method": method,
        "weight_sync.senders": senders,
        "weight_sync.through": through,
        "weight_sync.storage_bytes_per_second": 1e9,
        "overheads.sync_bucket_seconds": 0.01,
        "simulation.iterations": 1,
    }
    found = scenario(strategy, "engine", **changes)
    costs = {sync.stage: sync for sync in weight_syncs(prepare(found))}
    spans = {s.firing.stage: s for s in timeline_of(found).spans if s.kind == "sync"}
    assert costs.keys() == spans.keys()
    for name, cost in costs.items():
        assert 0 < cost.floor_seconds + cost.overhead_seconds < cost.seconds == approx(sum(cost.parts.values()))
        assert cost.overhead_seconds >= 0.01 and bool(cost.sent_bytes) == (through != "disk")
        span = spans[name]
        assert span.seconds - span.link_seconds - span.data_seconds == approx(cost.seconds, rel=1e-6)
        if not span.link_seconds:  # actor's and critic's syncs share links
            assert {label: span.detail[label] for label in cost.parts} == approx(cost.parts, rel=1e-6)


def test_a_sync_between_parts_is_as_slow_as_what_joins_them() -> None:
    parts = [
        {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 4},
        {"spec": "h20-96g", "nodes": 1, "gpus_per_node": 4},
    ]
    cluster = {"parts": parts, "between": {"bytes_per_second": 1e8}}
    changes = {"strategy.split": {"training": 4, "generation": 4}, "weight_sync.method": "broadcast"}
    (far,) = weight_syncs(prepare(scenario("asynchronous", "engine", cluster=cluster, **changes)))
    (near,) = weight_syncs(prepare(scenario("asynchronous", "engine", cluster={"parts": parts}, **changes)))
    assert far.busiest_link in ("part0 up", "part1 down") and not near.busiest_link.startswith("part")
    assert far.parts["sync_broadcast"] == approx(far.sent_bytes / (0.94 * 1e8), rel=0.01)  # and a latency


def test_what_users_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "cluster: {spec: a100-80g-sxm, nodes: 2, gpus_per_node: 4}\nmodels: {actor: {spec: small-8x512}}\n"
        "workload: {prompts: 32, prompt_tokens: 64, response_tokens: 64}\ngeneration: {engine: engine}\n"
        "strategy: asynchronous\nweight_sync: {method: broadcast, senders: first_rank, through: host}\n"
        "overheads: {sync_tensor_seconds: 1e-3}\n"
    )
    with pytest.raises(SystemExit):
        main(["simulate", str(path)])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "update_weights takes" in out and "GB sent; " in out and " is busiest" in out and "per tensor and bucket" in out
    )
    with pytest.raises(SystemExit):
        main(["simulate", str(path), "--json"])
    (sync,) = json.loads(capsys.readouterr().out)["weight_syncs"]
    assert sync["overhead_seconds"] == approx(0.075) and set(sync["parts"]) == {
        "sync_all_gather", "sync_to_host", "sync_host_send", "sync_from_host", "sync_overhead"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_sync.through": "disk"}, "through disk needs storage_bytes_per_second"),
        ({"weight_sync.through": "tape"}, "weight_sync.through: is 'tape', but must be one of gpu, host, disk"),
        ({"weight_sync.senders": "rank0"}, "must be one of replica, stage_heads, first_rank, all_ranks"),
        ({"overheads.sync_tensor_seconds": -1}, "overheads.sync_tensor_seconds: is -1, but must be at least 0"),
    ],
)
def test_bad_paths(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario("disaggregated", "engine", **changes)


@pytest.mark.parametrize(("field", "value"), [("through", "host"), ("senders", "all_ranks")])
def test_real_runs_refuse_what_they_do_not_have(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"weight_sync.{field}: is '{value}', which real runs"):
        check_real(scenario("disaggregated", "hybrid", **{f"weight_sync.{field}": value}))


# Qwen3-0.6B by three paths of one tensor store: 21.25, 4.89 and 0.067 s (meta-pytorch/torchforge pull request 728,
# meta-pytorch/torchtitan pull request 2525). The machines are not told; nothing is fitted.
@pytest.mark.parametrize(("through", "measured"), [("host", 21.25), ("host", 4.89), ("gpu", 0.067)])
def test_published_syncs_are_above_the_floor(through: str, measured: float) -> None:
    found = scenario("asynchronous", "engine", cluster={"spec": "h100-80g-sxm", "nodes": 2}, **{
        "models.actor.spec": "qwen3-0.6b", "weight_sync.through": through, "weight_sync.senders": "all_ranks",
        "weight_sync.method": "broadcast"})  # fmt: skip
    (cost,) = weight_syncs(prepare(found))
    assert cost.sent_bytes == approx(1.19e9, rel=0.01) and cost.floor_seconds < measured
