"""Real runs train to the same weights wherever the models are placed, and to those of a plain reference in one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from reference_ppo import Reference  # noqa: E402
from scenarios import scenario  # noqa: E402

from real import models  # noqa: E402
from rlhfsim.batch import samples_of  # noqa: E402
from rlhfsim.firing import Firing  # noqa: E402
from rlhfsim.layout import graph_of  # noqa: E402
from rlhfsim.spec.scenario import Scenario  # noqa: E402

ITERATIONS = 3
# Largest difference of a weight between fp32 on ranks and the fp64 reference, as a share of the largest change of a weight.
# Measured over all jobs below: MEASURED.
TOLERANCE = 1e-4

TINY = {"spec": "tiny-2x128", "micro_batch_samples": 2, "score_micro_batch_samples": 3}
BASE: dict[str, Any] = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 4},
    "models.actor": TINY,
    "models.critic": {"micro_batch_samples": 1},
    "workload": {
        "prompts": 8,
        "prompt_tokens": {"distribution": "uniform", "min_tokens": 3, "max_tokens": 9},
        "response_tokens": {"distribution": "uniform", "min_tokens": 2, "max_tokens": 12},
        "padded": False,
    },
    "algorithm": {"name": "ppo", "epochs": 2, "minibatches": 1, "optimizer": "sgd", "learning_rate": 0.5},
}
ON_SIX = {"cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 6}, "strategy.batches": 4}
TWO_TRAIN = {"shadow_actor": [0, 1], "reference": [2], "reward": [3], "actor": [4, 5]}


def job(strategy: str, engine: str, **changes: Any) -> dict[str, Any]:
    return {"changes": BASE | {"strategy": strategy, "engine": engine} | changes, "iterations": ITERATIONS}


def on_policy() -> dict[str, dict[str, Any]]:
    """The same training, placed and held in every way."""
    return {
        "colocated_per_token": job("colocated", "zero3_per_token"),
        "colocated_hybrid_padded": job("colocated", "hybrid", **{"workload.padded": True, "strategy.calls": 2}),
        "colocated_zero2": job(
            "colocated",
            "hybrid",
            **{"models.actor.zero_stage": 2, "models.critic.zero_stage": 1, "models.actor.offload_optimizer": True},
        ),
        "colocated_engine": job("colocated", "engine", **{"generation.max_sequences": 1}),
        "interleaved_async": job("interleaved", "hybrid", **{"strategy.calls": 2}),
        "interleaved_sync": job(
            "interleaved",
            "hybrid",
            **{
                "strategy.mode": "sync",
                "models.actor.zero_stage": 0,
                "models.critic.zero_stage": 0,
                "models.actor.backend": "torch",
                "models.critic.backend": "torch",
            },
        ),
        "interleaved_concat": job("interleaved", "engine", **{"strategy.concat": True, "strategy.ratio": 0.25}),
        "disaggregated": job("disaggregated", "engine", **ON_SIX),
        "disaggregated_values_by_critic": job(
            "disaggregated",
            "engine",
            **ON_SIX
            | {
                "strategy.shadow_critic": False,
                "strategy.replicas": 2,
                "weight_sync": {"method": "broadcast"},
                "strategy.ranks": {
                    "shadow_actor": [0, 1],
                    "reference": [2],
                    "reward": [3],
                    "actor": [4],
                    "critic": [5],
                },
            },
        ),
    }


LORA = {"models.actor.lora_rank": 4, "models.critic.trainable_layers": 1, "models.actor.logits_chunk_tokens": 5}
OTHERS = {
    "two_minibatches": job("colocated", "hybrid", **{"algorithm.minibatches": 2}),
    "two_minibatches_apart": job("disaggregated", "engine", **ON_SIX | {"algorithm.minibatches": 2}),
    "adam_lora": job(
        "colocated",
        "engine",
        **LORA | {"algorithm.optimizer": "adam", "algorithm.learning_rate": 0.01, "algorithm.adam_epsilon": 0.1},
    ),
    "lora_apart": job("disaggregated", "engine", **ON_SIX | LORA),
    "shared_sampled": job(
        "disaggregated",
        "engine",
        **ON_SIX
        | {
            "models.share_actor_critic": True,
            "strategy.ranks": TWO_TRAIN,
            "workload.responses": "sampled",
            "algorithm.reward": "function",
            "workload.responses_per_prompt": 2,
            "workload.prompts": 4,
        },
    ),
}
BROKEN = {
    "broken_order": job("disaggregated", "engine", **ON_SIX) | {"broken": "sync_first"},
    "broken_buffer": job("interleaved", "hybrid", **{"strategy.calls": 2, "workload.padded": False})
    | {"broken": "one_buffer"},
    "broken_edge": job("interleaved", "hybrid") | {"broken": "no_ref"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All jobs, in processes that stay for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    (folder / "jobs.json").write_text(json.dumps(on_policy() | OTHERS | BROKEN))
    worker = Path(__file__).with_name("real_ranks.py")
    done = subprocess.run([sys.executable, str(worker), str(folder)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt")}


def scenario_of(changes: dict[str, Any]) -> Scenario:
    return scenario(**changes)


def mini_batches(found: Scenario) -> Any:
    """By the graph: the samples of each optimizer step."""
    graph, _ = graph_of(found)
    stage = graph.at("update_actor")
    return lambda iteration: [
        samples_of(graph, Firing(iteration, stage.name, chunk, 0), found.workload.samples)
        for chunk in range(stage.firings)
    ]


@cache
def _expected(text: str) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Weights that the reference trains, and how far the one that changed most did."""
    found = scenario_of(json.loads(text))
    reference, before = Reference(found), Reference(found)
    reference.run(ITERATIONS, mini_batches(found))
    weights = {name: dict(model.named_parameters()) for name, model in trained(reference).items()}
    start = {name: dict(model.named_parameters()) for name, model in trained(before).items()}
    moved = {
        name: max(float((w - start[name][n]).abs().max()) for n, w in own.items()) for name, own in weights.items()
    }
    return weights, moved


def trained(reference: Reference) -> dict[str, models.Decoder]:
    return {"actor": reference.actor} | (
        {"critic": reference.critic} if reference.critic is not reference.actor else {}
    )


def differences(result: dict[str, Any], changes: dict[str, Any]) -> dict[str, float]:
    """By model, the largest difference on any rank, as a share of how far weights moved."""
    weights, moved = _expected(json.dumps(changes))
    worst = dict.fromkeys(weights, 0.0)
    for own in result["weights"]:
        for name, found in own.items():
            assert found.keys() == weights[name].keys()
            worst[name] = max(
                [worst[name], *(float((w - weights[name][n]).abs().max()) / moved[name] for n, w in found.items())]
            )
    assert {name for own in result["weights"] for name in own} == set(weights)
    return worst


@pytest.mark.parametrize("name", on_policy())
def test_every_placement_trains_to_the_reference(results: dict[str, Any], name: str) -> None:
    worst = differences(results[name], BASE)
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("name", OTHERS)
def test_variants_train_to_their_reference(results: dict[str, Any], name: str) -> None:
    worst = differences(results[name], OTHERS[name]["changes"])
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("name", ["broken_order", "broken_buffer"])
def test_stale_weights_and_early_reuse_show(results: dict[str, Any], name: str) -> None:
    assert max(differences(results[name], BASE).values()) > 20 * TOLERANCE


def test_a_cut_edge_is_an_error_that_names_what_is_missing(results: dict[str, Any]) -> None:
    assert any("ref_log_probs" in error for error in results["broken_edge"]["errors"])
