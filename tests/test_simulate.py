"""What is told about a simulated scenario besides its seconds: utilisation, generation, groups of ranks, notes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import TAIL, scenario, timeline_of

from rlhfsim.metrics import generation_summary, memory_peak, step_seconds
from rlhfsim.render import draw_fit, print_simulation, simulation_json
from rlhfsim.simulate import Setup, lengths_of, model_flops_utilisation, prepare, simulate

approx = pytest.approx


def setup_of(strategy: str = "colocated", engine: str = "hybrid", **changes: Any) -> Setup:
    return prepare(scenario(strategy, engine, **changes))


# ---------------------------------------------------------------- model FLOPs utilisation


@pytest.mark.parametrize("strategy", ["colocated", "interleaved", "disaggregated"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_model_flops_are_six_per_weight_and_token(strategy: str, recompute: str) -> None:
    """LLaMA 7B by hand: 2 a weight and token forward, 6 training, causal attention beside; not what is recomputed."""
    setup = setup_of(strategy, "hybrid", **{"models.actor.spec": "llama-7b", "models.actor.recompute": recompute})
    samples, prompt, response, hidden = 64, 64, 128, 4096
    layers, head = 32 * (4 * hidden**2 + 3 * hidden * 11008), 32000 * hidden

    def forward(tokens: int, at_head: float) -> float:
        attention = 32 * 4 * hidden * tokens * (tokens + 1) / 2
        return 2 * layers * tokens + attention + at_head

    whole = prompt + response
    lm, value = forward(whole, 2 * head * whole), forward(whole, 2 * hidden * whole)
    generation = forward(whole - 1, 2 * head * response)
    actor_scores = strategy != "disaggregated"  # there the shadow actor's log-probabilities come with its responses
    flops = samples * (generation + (1 + actor_scores) * lm + 2 * value + 3 * lm + 3 * value)
    assert model_flops_utilisation(setup, 10.0) == approx(flops / (8 * 312e12 * 10.0), rel=1e-9)


def test_utilisation_counts_padding_epochs_and_what_is_frozen() -> None:
    def at(**changes: Any) -> float:
        return model_flops_utilisation(setup_of(**TAIL, **changes), 1.0)

    padded, real = at(), at(**{"workload.padded": False})
    drawn = lengths_of(scenario(**TAIL), 0)
    share = np.mean([np.mean(p + r) for p, r in drawn]) / (64 + 256)
    assert share < real / padded < 1  # generation is the same, attention is quadratic
    two, three = at(**{"algorithm.epochs": 2}), at(**{"algorithm.epochs": 3})
    assert two - padded == approx(three - two) and two > padded
    upper = [at(**{"models.actor.trainable_layers": n, "models.critic.trainable_layers": n}) for n in (2, 4, 8)]
    assert upper[0] < upper[1] < upper[2] == padded
    assert upper[2] - upper[1] == approx(2 * (upper[1] - upper[0]))
    assert at(**{"models.actor.lora_rank": 8}) < padded


@pytest.mark.parametrize("strategy", ["colocated", "disaggregated"])
def test_utilisation_is_below_one(strategy: str) -> None:
    setup = setup_of(strategy, **{"models.actor.spec": "llama-7b", "effects.memory": False})
    assert 0.01 < model_flops_utilisation(setup, step_seconds(simulate(setup))) < 1


# ---------------------------------------------------------------- what generation did


def test_generation_is_summed_up_over_engines_and_places() -> None:
    """Fixed lengths, static batches of all 8 samples of a rank: always 8 of them run, folded or not."""
    for strategy in ("colocated", "interleaved"):
        timeline = timeline_of(scenario(strategy, "hybrid"))
        found = generation_summary(timeline)
        assert found is not None
        assert (found.preemptions, found.recomputed_tokens, found.low_occupancy_share) == (0, 0, 0)
        assert (found.mean_running, found.most_running) == (approx(8), 8)
        spans = timeline.of(stage="gen", iteration=1)
        assert sum(s.counts["replica_seconds"] for s in spans) == approx(
            sum(len(s.ranks) * np.mean(s.compute_seconds) for s in spans)
        )


def test_a_small_cache_preempts_and_a_tail_leaves_the_engine_empty(capsys: pytest.CaptureFixture[str]) -> None:
    tail = setup_of("colocated", "engine", **TAIL, **{"workload.prompts": 512})
    timeline = simulate(tail)
    found = generation_summary(timeline)
    assert found is not None and found.low_occupancy_share > 0 and found.preemptions == 0
    assert found.mean_running < found.most_running == 64
    print_simulation(tail, tail.fit(), timeline)
    assert f"{found.low_occupancy_share:.0%} of its time below 10 %" in capsys.readouterr().out

    engine = tail.holdings["shadow_actor"].use
    per_token = 2 * engine.shape.layers * engine.shape.hidden * engine.bytes_per_parameter  # as many KV heads as heads
    full = tail.fit().by_phase["gen"].bytes
    memory = full.total - full.kv_cache + per_token * 8 * (64 + 256)  # room for 8 of 64 sequences
    small = setup_of(
        "colocated", "engine", **TAIL, **{
            "workload.prompts": 512,
            "cluster.gpu.memory_bytes": {"value": memory, "source": "unverified"},
        }
    )  # fmt: skip
    crowded = generation_summary(simulate(small))
    assert crowded is not None and crowded.preemptions > 0 and crowded.recomputed_tokens >= 64 * crowded.preemptions


def test_plain_lengths_need_no_line_about_generation(capsys: pytest.CaptureFixture[str]) -> None:
    setup = setup_of()
    print_simulation(setup, setup.fit(), simulate(setup))
    out = capsys.readouterr().out
    assert "Generation:" not in out and "wait" not in out  # one group of ranks: no table of groups
    assert "model FLOPs utilisation" in out


# ---------------------------------------------------------------- groups, slack, memory


def test_json_says_where_each_group_waits_and_what_has_slack(capsys: pytest.CaptureFixture[str]) -> None:
    setup = setup_of("disaggregated", "engine", **TAIL)
    fit, timeline = setup.fit(), simulate(setup)
    found = simulation_json(setup, fit, timeline)
    groups = found["rank_groups"]
    for group in groups:
        shares = [share for name, share in group.items() if name not in ("ranks", "stages")]
        assert sum(shares) == approx(1)
    assert found["idle_share"] == approx(
        sum(g["idle"] * len(_ranks(g["ranks"])) for g in groups) / sum(len(_ranks(g["ranks"])) for g in groups)
    )
    by_stage = {stage: g["ranks"] for g in groups for stage in g["stages"]}
    assert by_stage["gen"] != by_stage["update_actor"] != by_stage["update_critic"]
    assert found["slack_seconds"].keys() == found["overlap_share"].keys() == found["stage_seconds"].keys()
    faster = min(("update_actor", "update_critic"), key=lambda s: found["stage_seconds"][s])
    assert found["slack_seconds"][faster] > 0
    peak = memory_peak(timeline)
    assert peak is not None
    assert found["memory_peaks"][peak.phase]["bytes"] == peak.bytes == approx(found["peak_memory_bytes"])
    print_simulation(setup, fit, timeline)
    out = capsys.readouterr().out
    assert f"in {peak.phase} on rank {peak.rank} from " in out
    for group in groups:
        assert any(
            line.startswith(f"{group['ranks']} ") and f"{group['idle']:.0%}" in line and group["stages"][0] in line
            for line in out.splitlines()
        )


def _ranks(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_the_memory_of_a_fit_is_drawn(tmp_path: Path) -> None:
    setup = setup_of()
    fit = setup.fit()
    draw_fit(setup, fit, str(tmp_path / "memory.png"))
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == list(fit.by_phase)
    for row in rows:
        total = sum(float(row[c]) for c in row if c != "phase")
        assert total == approx(fit.by_phase[row["phase"]].bytes.total)


# ---------------------------------------------------------------- notes


def test_a_tensor_parallel_group_that_leaves_its_node_is_noted() -> None:
    """Nodes of 4 GPUs."""
    inside = {"generation.tensor_parallel": 4, "models.actor.tensor_parallel": 4, "models.actor.zero_stage": 0}
    assert setup_of("colocated", "engine", **inside).notes == ()
    notes = setup_of("colocated", "engine", **inside | {"generation.tensor_parallel": 8}).notes
    assert len(notes) == 1 and notes[0].startswith("generation.tensor_parallel 8: ranks 0-7 are on several nodes")
    notes = setup_of("colocated", "engine", **inside | {"models.actor.tensor_parallel": 8}).notes
    assert [note.partition(":")[0] for note in notes] == [  # once for all stages of a model
        "models.actor.tensor_parallel 8", "models.reference.tensor_parallel 8"
    ]  # fmt: skip  # the reference is as the actor unless it is given
    assert "ranks 0-7 are on several nodes of 4 GPUs" in notes[0]


def test_per_token_gathering_of_whole_weights_is_noted() -> None:
    """It is `hybrid` under another name: nothing is sharded."""
    whole = {"models.actor.zero_stage": 2}
    (note,) = setup_of("colocated", "zero3_per_token", **whole).notes
    assert "zero_stage 2" in note and "nothing is gathered" in note
    seconds = {e: step_seconds(timeline_of(scenario("colocated", e, **whole))) for e in ("zero3_per_token", "hybrid")}
    assert seconds["zero3_per_token"] == approx(seconds["hybrid"], rel=1e-12)
    assert setup_of("colocated", "zero3_per_token", **{"models.actor.zero_stage": 3}).notes == ()
