"""Real runs train to the same weights wherever models are placed, and to those of a plain reference in one process."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import weakref
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "deepspeed")):
    pytest.skip("real runs need torch, transformers and deepspeed", allow_module_level=True)

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import real_runs
import torch
import torch.distributed as dist
import transformers
from reference_ppo import Reference, WithoutCritic
from scenarios import scenario

from real import executor, generate, groups, meter, models, ppo, stages
from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.layout import graph_of, holdings_of
from rlhfsim.model import parameters
from rlhfsim.real_limits import check_real, check_real_graph, rank_sets
from rlhfsim.rollouts import request
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import ModelUse, Scenario

ITERATIONS = 3
# Largest difference of a weight between fp32 on ranks and the fp64 reference, as a share of the largest change of a
# weight. Measured over all jobs below: at most 1.3e-5.
TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    "cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 4},
    "models.actor": {"spec": "tiny-2x128", "micro_batch_samples": 2, "score_micro_batch_samples": 3},
    "models.critic": {"micro_batch_samples": 1},
    "workload": {
        "prompts": 8,
        "prompt_tokens": {"distribution": "uniform", "min_tokens": 3, "max_tokens": 9},
        "response_tokens": {"distribution": "uniform", "min_tokens": 2, "max_tokens": 12},
        "padded": False,
    },
    "algorithm": {"name": "ppo", "epochs": 2, "minibatches": 1, "optimizer": "sgd", "learning_rate": 0.5},
}
ON_SIX_ALONE = {"cluster": {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 6}}
ON_SIX = ON_SIX_ALONE | {"strategy.batches": 4}
ZERO_0 = {"models.actor.zero_stage": 0, "models.critic.zero_stage": 0}
PLAIN = ZERO_0 | {"models.actor.backend": "torch", "models.critic.backend": "torch"}
LORA = {"models.actor.lora_rank": 4, "models.actor.logits_chunk_tokens": 5, "models.critic.trainable_layers": 1}


def job(strategy: str, engine: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"changes": BASE | {"strategy": strategy, "engine": engine} | (changes or {}), "iterations": ITERATIONS}


# The same training, placed and held in every way.
SAME = {
    "colocated_per_token": job("colocated", "zero3_per_token"),
    "colocated_hybrid_padded": job("colocated", "hybrid", {"workload.padded": True, "strategy.calls": 2}),
    "colocated_zero2": job(
        "colocated",
        "hybrid",
        {
            "models.actor.zero_stage": 2,
            "models.critic.zero_stage": 1,
            "models.actor.offload_optimizer": True,
            "periodic": {"validation_every": 2, "validation_prompts": 4, "checkpoint_every": 3},
        },
    ),
    "colocated_engine": job("colocated", "engine", ZERO_0 | {"generation.max_sequences": 1}),
    "interleaved_async": job("interleaved", "hybrid", {"strategy.calls": 2}),
    "interleaved_sync": job("interleaved", "hybrid", PLAIN | {"strategy.mode": "sync"}),
    "interleaved_concat": job("interleaved", "engine", {"strategy.concat": True, "strategy.ratio": 0.25}),
    "disaggregated": job("disaggregated", "engine", ON_SIX),
    "disaggregated_values_by_critic": job(
        "disaggregated",
        "engine",
        ON_SIX
        | {
            "strategy.shadow_critic": False,
            "strategy.replicas": 2,
            "weight_sync": {"method": "broadcast"},
            "strategy.ranks": {"shadow_actor": [0, 1], "reference": [2], "reward": [3], "actor": [4], "critic": [5]},
        },
    ),
    "split_placement": job("split_placement", "engine", ON_SIX_ALONE),
}
OTHERS = {
    "two_minibatches": job("colocated", "hybrid", {"algorithm.minibatches": 2, "models.actor.zero_stage": 2}),
    "two_minibatches_apart": job("disaggregated", "engine", ON_SIX | {"algorithm.minibatches": 2}),
    "adam_lora": job(
        "colocated",
        "hybrid",
        LORA | {"algorithm.optimizer": "adam", "algorithm.learning_rate": 0.01, "algorithm.adam_epsilon": 0.1},
    ),
    "lora_apart": job("disaggregated", "engine", ON_SIX | LORA),
    "shared_sampled": job(
        "disaggregated",
        "engine",
        ON_SIX
        | {
            "models.share_actor_critic": True,
            "workload.responses": "sampled",
            "algorithm.reward": "function",
            "workload.responses_per_prompt": 2,
            "workload.prompts": 4,
            "strategy.ranks": {"shadow_actor": [0, 1], "reference": [2], "reward": [3], "actor": [4, 5]},
        },
    ),
}
GROUPS = {"workload.responses_per_prompt": 4, "workload.prompts": 4, "algorithm.epochs": 2}
REWARD_FUNCTION = {"algorithm.reward": "function"}


def without_critic(name: str, *more: dict[str, Any]) -> dict[str, Any]:
    changes = GROUPS | {"algorithm.name": name}
    for some in more:
        changes |= some
    return changes


OTHERS |= {
    "grpo": job("colocated", "hybrid", without_critic("grpo", {"algorithm.minibatches": 2})),
    "grpo_apart": job("disaggregated", "engine", without_critic("grpo", ON_SIX, {"strategy.batches": 2})),
    "rloo": job("interleaved", "hybrid", without_critic("rloo", PLAIN)),
    "reinforce": job("colocated", "engine", without_critic("reinforce_plus_plus", ZERO_0, {"algorithm.discount": 0.9})),
    "reinforce_baseline": job("colocated", "engine", without_critic("reinforce_plus_plus_baseline", ZERO_0)),
    "gpg": job("colocated", "engine", without_critic("gpg", ZERO_0, REWARD_FUNCTION)),
    "one_step_off": job("one_step_off", "engine", {"algorithm.epochs": 1}),
    "two_steps_off": job("one_step_off", "engine", without_critic("grpo", {"strategy.staleness": 2})),
    "dapo": job("colocated", "engine", without_critic("dapo", ZERO_0, REWARD_FUNCTION)),
}
BROKEN = {
    "stale_weights": job("disaggregated", "engine", ON_SIX) | {"broken": ["stale_weights"]},
    "one_buffer": job("interleaved", "hybrid", PLAIN | {"strategy.calls": 2}) | {"broken": ["one_buffer"]},
}


def made(changes: dict[str, Any]) -> Scenario:
    return scenario(**deepcopy(changes))  # which it writes into


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small operators are slower with more, and cores are shared with the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- many ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all jobs, by processes that stay for all of them."""
    return real_runs.run(tmp_path_factory.mktemp("ranks"), 6, SAME | OTHERS | BROKEN, 280)


@cache
def expected(text: str) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Weights that the reference trains, by model, and how far the weight that changed most did."""
    found = made(json.loads(text))
    kind = Reference if found.algorithm.name == "ppo" else WithoutCritic
    reference, before = kind(found), kind(found)
    reference.run(ITERATIONS, lambda iteration: mini_batches(found))
    weights, start = weights_of(reference), weights_of(before)
    moved = {m: max(float((w - start[m][n]).abs().max()) for n, w in own.items()) for m, own in weights.items()}
    return weights, moved


def mini_batches(found: Scenario) -> list[list[int]]:
    """The samples of each optimizer step, by their numbers and nothing else."""
    samples, chosen = found.workload.samples, found.algorithm
    cuts = [k * samples // chosen.minibatches for k in range(chosen.minibatches + 1)]
    return [list(range(a, b)) for a, b in pairwise(cuts)] * chosen.epochs


def weights_of(reference: Reference) -> dict[str, dict[str, Any]]:
    own = {"actor": reference.actor} | ({"critic": reference.critic} if reference.critic is not reference.actor else {})
    return {name: {n: w.detach() for n, w in model.named_parameters()} for name, model in own.items()}


def difference(weights: list[dict[str, Any]], changes: dict[str, Any]) -> float:
    """The largest on any rank, as a share of how far weights of that model moved; all trained models must be there."""
    right, moved = expected(json.dumps(changes))
    assert {name for own in weights for name in own} == set(right)
    found = [(name, own[name]) for own in weights for name in own]
    assert all(w.keys() == right[name].keys() for name, w in found)
    return max(float((x - right[name][n]).abs().max()) / moved[name] for name, w in found for n, x in w.items())


@pytest.mark.parametrize("name", SAME)
def test_every_placement_trains_to_the_reference(results: dict[str, Any], name: str) -> None:
    assert difference(results[name]["weights"], BASE) < TOLERANCE


@pytest.mark.parametrize("name", SAME)
def test_what_is_needed_has_ended(results: dict[str, Any], name: str) -> None:
    """Every rank reads the same machine's clock."""
    graph, _ = graph_of(made(SAME[name]["changes"]))
    start, end = dict[Firing, int](), dict[Firing, int]()
    for spans in results[name]["spans"]:
        assert all(a[2] <= b[1] for a, b in pairwise(spans))
        for f, begin, stop in spans:
            start[f], end[f] = min(begin, start.get(f, begin)), max(stop, end.get(f, stop))
    assert len(start) == ITERATIONS * len(graph.program())
    assert all(end[need] <= start[f] for f in start for need in graph.needs(f))


@pytest.mark.parametrize("name", OTHERS)
def test_variants_train_to_their_reference(results: dict[str, Any], name: str) -> None:
    assert difference(results[name]["weights"], OTHERS[name]["changes"]) < TOLERANCE


def test_mini_batches_train_to_the_same_weights_with_any_number_of_lanes(results: dict[str, Any]) -> None:
    """Four lanes, or one lane whose batches are smaller than a mini-batch: each optimizer step has its samples."""
    names = [name for name in OTHERS if name.startswith("two_minibatches")]
    assert {graph_of(made(OTHERS[name]["changes"]))[0].lanes for name in names} == {1, 4}
    for name in names:
        assert difference(results[name]["weights"], BASE | {"algorithm.minibatches": 2}) < TOLERANCE


@pytest.mark.parametrize("name", BROKEN)
def test_stale_weights_and_early_reuse_show(results: dict[str, Any], name: str) -> None:
    assert difference(results[name]["weights"], BASE) > 100 * TOLERANCE


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("one") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


never: Any = None  # no stage here asks whether it should stop


def in_program_order(changes: dict[str, Any], lost: str = "") -> stages.Stages:
    """Three iterations on one rank, one firing after the other; the results of stage `lost` are not kept."""
    found = made(changes)
    graph, _ = graph_of(found)
    holdings, store = holdings_of(found, graph), executor.LaneStore()
    alone = groups.Groups(0, rank_sets(graph, holdings), meter.Meter())
    work = stages.Stages(found, graph, holdings, 0, alone, store)
    for iteration in range(ITERATIONS):
        for f in (f._replace(iteration=iteration) for f in graph.program()):
            for lane, fields in (work(f, graph.at(f.stage), {}, never) or {}).items():
                if f.stage != lost:
                    store.put(f, lane, fields)
    return work


ALONE = BASE | PLAIN | {"strategy": "colocated", "engine": "engine", "cluster": BASE["cluster"] | {"gpus_per_node": 1}}


def test_one_rank_without_executor_and_deepspeed(one_rank: None) -> None:
    work = in_program_order(ALONE | {"workload.padded": True})
    assert difference([{name: work.weights(name) for name in ("actor", "critic")}], BASE) < TOLERANCE
    copied, own = work.weights("shadow_actor"), work.weights("actor")
    assert all(torch.equal(copied[n], own[n]) for n in copied)


@pytest.mark.parametrize("zero_stage", range(4))
def test_models_are_freed_after_a_run(one_rank: None, zero_stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(variable, value)
    stages_of = {"models.actor.zero_stage": zero_stage, "models.critic.zero_stage": zero_stage}
    work = in_program_order(ALONE | stages_of | {f"models.{m}.backend": "deepspeed" for m in ("actor", "critic")})
    modules = [weakref.ref(engine.module) for engine in work.engines.values()]
    assert all(module() for module in modules)
    work.close()
    del work
    gc.collect()
    assert not any(module() for module in modules)


def test_a_lost_result_is_an_error_that_names_it(one_rank: None) -> None:
    with pytest.raises(KeyError, match="ref_log_probs"):
        in_program_order(ALONE, lost="ref")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models.actor.tensor_parallel", 2),
        ("generation.routing", "least_loaded"),
        ("models.reward.spec", "small-8x512"),
        ("algorithm.old_log_prob", "engine"),
        ("algorithm.reward", "judge"),
        ("models.actor.offload_parameters", True),
        ("algorithm.filter_accept_probability", 0.5),
        ("algorithm.minibatches", 3),
    ],
)
def test_what_real_runs_cannot_do_is_refused(field: str, value: Any) -> None:
    needs = {"algorithm.reward_latency": 1.0, "workload.prompts": 4, "workload.responses_per_prompt": 2}
    needs |= {"algorithm.name": "dapo"} if "filter" in field or "minibatches" in field else {}
    with pytest.raises(InputError) as error:
        check_real(made(BASE | ZERO_0 | needs | {"strategy": "colocated", "engine": "hybrid", field: value}))
    assert error.value.field == field


@pytest.mark.parametrize(("strategy", "said"), [("stage_fusion", "goes on with what"), ("reallocation", "overlap")])
def test_strategies_that_real_runs_cannot_do_are_refused(strategy: str, said: str) -> None:
    found = made(BASE | ZERO_0 | {"strategy": strategy, "engine": "engine"})
    graph, _ = graph_of(found)
    with pytest.raises(InputError, match=said):
        check_real_graph(found, graph, holdings_of(found, graph), 4)


def test_without_reference_there_is_no_price_of_leaving_it(one_rank: None) -> None:
    free, priced = ({"algorithm.reference": False}, {"algorithm.kl_coefficient": 1e-12})
    weights = [in_program_order(ALONE | changes).weights("actor") for changes in (free, priced)]
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-7) for n in weights[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("speculative", {"tokens": 2, "acceptance_length": 2}), ("prefix_caching", True), ("sleep", "level_1")],
)
def test_what_real_engines_do_not_have_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        check_real(made(BASE | ZERO_0 | {"strategy": "colocated", "engine": "engine", f"generation.{name}": value}))
    assert error.value.field == f"generation.{name}"


# --- models and generation -------------------------------------------------------------------------------------------


SMALL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocabulary": 256}
OPT = {"kv_heads": 4, "learned_positions": 66}
PLAIN_MLP = {
    "kv_heads": 4,
    "gated_mlp": False,
    "norm": "layer",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("tiny-2x128", {}),
        ("qwen2.5-0.5b", {}),
        ("gemma-2-2b", {}),
        ("mistral-7b", {}),
        ("opt-125m", OPT),
        ("opt-350m", OPT | {"embedding_size": 32}),
        ("tiny-2x128", {"family": "gemma"}),
        ("tiny-2x128", {"family": "qwen3", "qk_norm": True}),
        ("tiny-2x128", PLAIN_MLP | {"family": "gpt_neox"}),
        ("tiny-2x128", PLAIN_MLP | {"family": "gpt2", "tied_embeddings": True, "learned_positions": 64}),
    ],
)
def test_a_decoder_says_what_transformers_says(name: str, own: dict[str, Any]) -> None:
    """Parameters as counted, and log-probabilities with and without padding as of eager attention sample by sample."""
    shape = load_model(name)
    shape = type(shape)(**shape.model_dump() | SMALL | {"max_positions": 64} | own)
    use = ModelUse(spec=name, shape=shape, precision="fp32")
    decoder = models.build("actor", use, 0, lm=True, value=False, train=False)
    assert sum(p.numel() for p in decoder.parameters()) == parameters(shape)
    plain = transformers.AutoModelForCausalLM.from_config(models.config_of(shape), attn_implementation="eager").eval()
    weights = {n.replace("body.", f"{plain.base_model_prefix}.", 1): w for n, w in decoder.state_dict().items()}
    assert not any(plain.load_state_dict(weights, strict=False))
    texts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
    samples = [{"tokens": t, "mask": torch.tensor([1, 1] + [2] * (len(t) - 2))} for t in texts]
    with torch.no_grad():
        said = [plain(t[None]).logits[0].log_softmax(-1)[1:-1].gather(-1, t[2:, None])[:, 0] for t in texts]
        for padded_to in (None, 12):
            batch = ppo.batch(samples, padded_to)
            found = decoder(**batch.inputs)["log_probs"][batch.responses]
            torch.testing.assert_close(found, torch.cat(said), rtol=0, atol=1e-5)


def test_responses_do_not_depend_on_the_batch() -> None:
    """Static and continuous batches, of any size; log-probabilities as of one pass over the whole sequence."""
    use = ModelUse(spec="tiny-2x128", shape=load_model("tiny-2x128"), precision="fp32")
    decoder = models.build("actor", use, 0, lm=True, value=False, train=False)
    lengths = np.random.default_rng(0).integers(1, 30, size=(12, 2))
    found = []
    for rows, continuous in ((12, False), (5, False), (4, True)):
        requests = [request((0, 0), i, i, int(p), int(n), 1024) for i, (p, n) in enumerate(lengths)]
        work = generate.Generation(
            decoder, requests, rows=rows, continuous=continuous, prefill_tokens=40, log_probs=True
        )
        passes, foretold = 0, work.forward_passes
        while work.busy:
            work.step()
            passes += 1
        assert continuous or passes == foretold
        assert [len(r.tokens) for r in requests] == [n for _, n in lengths]
        found.append(requests)
    assert all([r.tokens for r in requests] == [r.tokens for r in found[0]] for requests in found)
    for r in found[2]:
        whole = torch.tensor([[*r.prompt, *r.tokens]])
        with torch.no_grad():
            said = decoder(whole, torch.arange(whole.shape[1])[None])["log_probs"][len(r.prompt) :]
        np.testing.assert_allclose(r.log_probs, said, atol=1e-5)


def test_what_lies_in_unused_memory_does_not_matter() -> None:
    """Masked columns of the cache are multiplied by zero, which does not help against what is no number."""
    use = ModelUse(spec="tiny-2x128", shape=load_model("tiny-2x128"), precision="fp32")
    decoder = models.build("actor", use, 0, lm=True, value=False, train=False)
    before = generate.Cache(decoder.body.config, 2, 40, torch.float32, torch.device("cpu"))
    assert all(bool(layer.isfinite().all()) and not bool(layer.any()) for layer in before.layers)


def test_noise_is_gumbel_and_keyed() -> None:
    """Of two equal tokens each is drawn half of the time; another sample or iteration has other noise."""
    drawn = generate._gumbel(torch.device("cpu"), 2)[torch.from_numpy(noise(0, 0))].argmax(-1).float().mean()
    assert abs(float(drawn) - 0.5) < 0.03  # 4 standard deviations of 4000 draws
    assert (noise(0, 0) == noise(0, 0)).all()
    assert (noise(0, 0) != noise(0, 1)).any() and (noise(0, 0) != noise(1, 0)).any()


def noise(iteration: int, sample: int) -> np.ndarray:
    return request((0, iteration), sample, 0, 1, 4000, 2).noise
