"""Field reports: what users and maintainers measured, from public threads, against what we say of the same run.

Each test names its thread and, as far as it was given there, its configuration; the facts are the posters' claims. What
is not known of a run is named as assumed. A verdict that is wrong here is marked as such, with what the model lacks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from typing import Any

import pytest

from rlhfsim.errors import InputError
from rlhfsim.fits import Fit
from rlhfsim.memory import LOGITS_COPIES, RESERVED_BYTES, static_bytes
from rlhfsim.metrics import base_stage, stage_seconds, step_seconds
from rlhfsim.simulate import Setup, prepare, simulate
from rlhfsim.spec.loader import scenario_from_dict

GIB, MIB = 2**30, 2**20
approx = pytest.approx


def setup(cluster: dict[str, Any], actor: dict[str, Any], workload: dict[str, Any], **sections: Any) -> Setup:
    """GRPO with rewards from a function and no reference, but for what `sections` say; no padding is computed."""
    data: dict[str, Any] = {
        "cluster": cluster,
        "models": {"actor": actor},
        "workload": {"padded": False} | workload,
        "algorithm": {"name": "grpo", "reward": "function", "reference": False},
        "simulation": {"iterations": 2},
    }
    return prepare(scenario_from_dict(data | sections))


def used(fit: Fit, phase: str) -> float:
    """GiB on the fullest rank in a phase."""
    return fit.by_phase[phase].bytes.total / GIB


# ---------------------------------------------------------------- does it fit


def sft_llama_8b(gpus: int = 1, **actor: Any) -> Setup:
    """Training of few tokens: as many samples as GPUs, of 128 tokens each."""
    return setup(
        {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": gpus},
        {"spec": "llama-3-8b", "zero_stage": 2, "micro_batch_samples": 1, "recompute": "full"} | actor,
        {"prompts": gpus, "prompt_tokens": 64, "response_tokens": 64},
        algorithm={"name": "reinforce_plus_plus", "reward": "function", "reference": False},
    )


def test_llama_8b_on_one_a100_runs_out_in_its_first_optimizer_step() -> None:
    """github.com/OpenRLHF/OpenRLHF/issues/698 (2025-01): full SFT of Llama-3-8B on one A100 80 GB, ZeRO-2, bf16,
    micro-batch 1, length 128, checkpointing: 46 GB once prepared, 61 GB after the backward pass, then out of memory in
    the optimizer's step; offloading Adam cures it."""
    run = sft_llama_8b()
    fit, actor = run.fit(), run.scenario.models.actor
    assert (fit.fits, fit.limiting) == (False, ("update_actor", "optimizer"))
    assert "offload_optimizer" in fit.reason
    before = static_bytes(actor, "train", 1, stepped=False)
    assert (before.weights + before.optimizer) / GIB == approx(46, rel=0.05)  # weights and their fp32 masters
    assert before.total / GIB == approx(61, rel=0.05)  # and gradients, but no moments yet
    assert before.total < fit.capacity_bytes < static_bytes(actor, "train", 1).total
    assert sft_llama_8b(offload_optimizer=True).fit().fits
    assert sft_llama_8b(gpus=2).fit().fits


def grpo_on_one_a100(model: str, **actor: Any) -> Fit:
    """Assumed: fp32 masters with bf16 computation, no checkpointing (TRL's default then), batch = one micro-batch,
    whole sequences through the head."""
    use = {
        "spec": model,
        "zero_stage": 0,
        "recompute": "none",
        "micro_batch_samples": 4,
        "score_micro_batch_samples": 4,
    }
    return setup(
        {"spec": "a100-80g-sxm", "nodes": 1, "gpus_per_node": 1},
        use | actor,
        {"prompts": 1, "responses_per_prompt": 4, "prompt_tokens": 2048, "response_tokens": 1024, "padded": True},
        algorithm={"name": "grpo", "reward": "function", "reference": False, "old_log_prob": "if_needed"},
    ).fit()


@pytest.mark.parametrize(("model", "peak_mib"), [("qwen3-0.6b", 49_273), ("qwen3-1.7b", 78_147), ("qwen3-4b", None)])
def test_grpo_of_qwen3_on_one_a100(model: str, peak_mib: float | None) -> None:
    """github.com/huggingface/trl/issues/3456 (2025-05): one A100 80 GB, batch 4, prompts of 2048 and completions of
    1024 tokens: peaks of 49,273 and 78,147 MiB, and out of memory with 4B."""
    fit = grpo_on_one_a100(model)
    assert fit.worst.phase == "update_actor"
    assert fit.fits == (peak_mib is not None)
    if peak_mib:
        assert fit.worst.bytes.total / MIB == approx(peak_mib, rel=0.15)
    else:
        assert grpo_on_one_a100(model, offload_optimizer=True, recompute="full").fits


def test_copies_of_the_logits() -> None:
    """github.com/huggingface/trl/issues/3678 (2025): H100, a tiny model, 2 x 256 tokens, vocabulary 151,665: logits of
    310 MB, and a peak of 902 MB from 44 MB. (The number of copies is taken from here: no prediction.)"""
    logits = 2 * 256 * 151_665 * 4
    assert logits / 1e6 == approx(310, rel=0.01)
    assert LOGITS_COPIES * logits / 1e6 == approx(902 - 44, rel=0.01)


def qwen3_30b_apart(training: int, tokens: int, **actor: Any) -> Fit:
    """Two H100s generate, so many train: prime-rl keeps fp32 weights in FSDP and computes in bf16."""
    use = {"spec": "qwen3-30b-a3b", "zero_stage": 3, "recompute": "full", "micro_batch_samples": 1}
    return setup(
        {"spec": "h100-80g-sxm", "nodes": 1, "gpus_per_node": training + 2},
        use | actor,
        {"prompts": 16, "responses_per_prompt": 8, "prompt_tokens": tokens // 16, "response_tokens": tokens * 15 // 16},
        generation={"engine": "engine", "tensor_parallel": 2},
        strategy={
            "name": "one_step_off",
            "recompute_log_probs": False,
            "split": {"generation": 2, "training": training},
        },
    ).fit()


@pytest.mark.parametrize("tokens", [32_000, 16_000, 1_024])
def test_30b_of_experts_trains_on_four_h100s_at_no_length(tokens: int) -> None:
    """github.com/PrimeIntellect-ai/prime-rl/issues/1016 (2025-09): Qwen3-Coder-30B-A3B (the shape of Qwen3-30B-A3B),
    4 H100s train and 2 generate, micro-batch 1, checkpointing, AdamW: out of memory in the first step with 32,000 and
    with 16,000 tokens. A shorter context is no cure; offload or twice the GPUs are."""
    fit = qwen3_30b_apart(4, tokens)
    assert (fit.fits, fit.limiting) == (False, ("update_actor", "optimizer"))
    assert used(fit, "resting") > fit.capacity_bytes / GIB
    assert "offload_optimizer" in fit.reason and "more GPUs for the trained models" in fit.reason
    assert set(fit.micro_batches.values()) == {0}


def test_what_lets_30b_of_experts_train() -> None:
    """The same thread's way out, with logits in pieces."""
    assert qwen3_30b_apart(8, 16_000, logits_chunk_tokens=1024).fits
    assert qwen3_30b_apart(4, 16_000, logits_chunk_tokens=1024, offload_optimizer=True).fits


def qwen3_30b_on_h200(tokens: int) -> Setup:
    """One sequence on each of 8 GPUs. Assumed: fused head, 1024 tokens of logits at a time."""
    return setup(
        {"spec": "h200-141g-sxm", "nodes": 1},
        {
            "spec": "qwen3-30b-a3b",
            "zero_stage": 3,
            "recompute": "full",
            "micro_batch_samples": 1,
            "logits_chunk_tokens": 1024,
        },
        {"prompts": 8, "prompt_tokens": tokens - 1, "response_tokens": 1},
        algorithm={"name": "reinforce_plus_plus", "reward": "function", "reference": False},
    )


LONG_SEQUENCES = [(8_192, 63.1, 1.75), (16_384, 67.0, 5.17), (32_768, 73.7, 18.5), (65_536, 90.3, 38.7)]


@pytest.mark.parametrize(("tokens", "peak_gib"), [row[:2] for row in LONG_SEQUENCES])
def test_peak_of_30b_of_experts_by_sequence_length(tokens: int, peak_gib: float) -> None:
    """github.com/PrimeIntellect-ai/prime-rl/pull/3234 (2026-08), rows without offload: Qwen3-30B-A3B, random weights
    and data, 8 H200s, checkpointing: 63.1, 67.0, 73.7, 90.3 GiB with 8 to 64 K tokens."""
    assert used(qwen3_30b_on_h200(tokens).fit(), "update_actor") == approx(peak_gib, rel=0.06)


@pytest.mark.xfail(
    strict=True,
    reason="2.5 to 4 times too fast: routing and permuting tokens for experts takes no time of the host here, and "
    "what else a step contains is not known",
)
@pytest.mark.parametrize(("tokens", "seconds"), [(row[0], row[2]) for row in LONG_SEQUENCES])
def test_step_of_30b_of_experts_by_sequence_length(tokens: int, seconds: float) -> None:
    """The same rows: 1.75, 5.17, 16 to 21, 38.7 s a step."""
    assert stage_seconds(simulate(qwen3_30b_on_h200(tokens)))["update_actor"] == approx(seconds, rel=0.3)


def slime_30b(host_bytes: float, *, share: float = 1.0, **changes: Any) -> Fit:
    """As in scripts/run-qwen3-30B-A3B.sh; a reference whose weights wait on the host. The engine's copy on the host
    stands for the actor's, from which slime updates engines (TensorBackuper)."""
    actor = {
        "spec": "qwen3-30b-a3b",
        "zero_stage": 1,
        "tensor_parallel": 4,
        "expert_parallel": 8,
        "expert_tensor_parallel": 1,
        "micro_batch_tokens": 20_480,
        "score_micro_batch_tokens": 20_480,
        "offload_optimizer": True,
        "gradient_precision": "fp32",
    } | changes
    host = {"value": host_bytes, "source": "unverified"}
    return setup(
        {"spec": "h100-80g-sxm", "nodes": 1, "node": {"host_memory_bytes": host}},
        actor,
        {"prompts": 8, "responses_per_prompt": 4, "prompt_tokens": 1024, "response_tokens": 8192},
        models={"actor": actor, "reference": {"zero_stage": 0, "offload_parameters": True}},
        algorithm={"name": "grpo", "reward": "function"},
        generation={
            "engine": "engine",
            "tensor_parallel": 8,
            "sleep": "level_1",
            "memory_fraction": 0.7,
            "memory_fraction_covers": "static",
        },
        overheads={"host_memory_share": share},
    ).fit()


def test_optimizer_on_the_host_has_an_account_of_its_own() -> None:
    """github.com/THUDM/slime/issues/1851 (2026-04): Qwen3-30B-A3B on 8 H100s, optimizer on the CPU. Masters, moments
    and fp32 gradients of 30.5e9 parameters (488 GB) and two copies in bf16 (122 GB) are 611 GB of host memory."""
    fit = slime_30b(1007e9)
    assert fit.host["states"] / 1e9 == approx(611, rel=0.02)
    assert used(fit, "update_actor") < 40  # the GPUs are half empty
    less = slime_30b(512e9)
    assert not less.fits and "host memory" in less.reason and "less offload" in less.reason


def test_every_training_process_takes_a_hundred_gigabytes_of_host_memory() -> None:
    """The same thread: 8 actors of 102 GB each. Until May 2026 slime's offload-train copied all of a process's GPU
    memory, gradients too (TMS_INIT_ENABLE_CPU_BACKUP in slime/ray/actor_group.py; commit 1c8107312 ended it), and what
    is pinned takes powers of two."""
    fit = slime_30b(1007e9, offload_states="image")
    assert fit.host_bytes / 8 / 1e9 == approx(102, rel=0.15)
    assert fit.host["rounding"] > 0.1 * fit.host["states"]


@pytest.mark.xfail(
    strict=True,
    reason="915 GB of the 957 that Ray allows: what engines, Ray's object store and the processes themselves take "
    "beside the 8 actors (184 GB there) was not measured (overheads.process_host_bytes)",
)
def test_a_terabyte_of_host_memory_is_not_enough() -> None:
    """The same thread: killed at 999.9 of 1,007 GB in the second step."""
    assert not slime_30b(1007e9, share=0.95, offload_states="image").fits


def skypilot_14b(**actor: Any) -> Fit:
    """See `skypilot_run`."""
    return skypilot_run(actor).fit()


def skypilot_run(actor: dict[str, Any], graphs: float = 0.0, **overheads: float) -> Setup:
    """Assumed: Qwen3-14B with slime's options elsewhere (full recomputation, SGLang asleep), one packed row of 27,100
    tokens."""
    use = {
        "spec": "qwen3-14b",
        "zero_stage": 1,
        "tensor_parallel": 4,
        "recompute": "full",
        "micro_batch_tokens": 27_100,
        "score_micro_batch_tokens": 27_100,
    }
    return setup(
        {"spec": "h100-80g-sxm", "nodes": 1, "gpus_per_node": 4},
        use | actor,
        {"prompts": 32, "responses_per_prompt": 8, "prompt_tokens": 1024, "response_tokens": 8192},
        generation={"engine": "engine", "tensor_parallel": 4, "sleep": "level_1", "cuda_graph_bytes": graphs},
        overheads=overheads,
    )


def test_softmax_over_the_vocabulary_of_one_long_packed_row() -> None:
    """github.com/skypilot-org/skypilot/pull/10269 (slime example): 14B with tensor parallelism 4 on 4 H100s failed to
    get 3.84 GiB in the fp32 softmax: one fp32 copy of the row's logits. States are 55 GiB a GPU, 14 with the optimizer
    on the host, which is the cure."""
    fit, cured = skypilot_14b(), skypilot_14b(offload_optimizer=True)
    assert fit.by_phase["update_actor"].bytes.logits / LOGITS_COPIES / GIB == approx(3.84, rel=0.01)
    states, left = (used(f, "resting") - f.by_phase["resting"].bytes.reserved / GIB for f in (fit, cured))
    assert (states, left) == (approx(55, rel=0.01), approx(14, rel=0.02))
    assert cured.fits


def test_that_row_does_not_fit() -> None:
    """The same thread: out of memory with 3.79 GiB free. Gradients are in fp32 (Megatron-LM's default). Assumed: the
    sleeping engine's process keeps as much as the one that trains, and 1 GiB of graphs."""
    precision = {"gradient_precision": "fp32"}
    beside = {"graphs": float(GIB), "engine_process_bytes": RESERVED_BYTES}
    fit = skypilot_run(precision, **beside).fit()
    assert (fit.fits, fit.worst.phase) == (False, "update_actor") and "offload_optimizer" in fit.reason
    assert fit.worst.bytes.total == approx(fit.capacity_bytes, rel=0.02)  # it missed 0.05 GiB
    assert skypilot_run(precision | {"offload_optimizer": True}, **beside).fit().fits


# ---------------------------------------------------------------- the engine's cache


def cache_of_235b(share: float) -> Setup:
    """Half of 32 x 8 H100s generate; layout of NeMo-RL's recipe; 16 prompts x 32 responses of up to 8,192 tokens."""
    return setup(
        {"spec": "h100-80g-sxm", "nodes": 32},
        {
            "spec": "qwen3-235b-a22b",
            "zero_stage": 1,
            "tensor_parallel": 4,
            "pipeline_parallel": 8,
            "expert_parallel": 16,
            "expert_tensor_parallel": 1,
            "first_stage_layers": 11,
            "last_stage_layers": 11,
            "micro_batch_samples": 1,
            "score_micro_batch_samples": 1,
        },
        {"prompts": 16, "responses_per_prompt": 32, "prompt_tokens": 512, "response_tokens": 7680},
        generation={"engine": "engine", "tensor_parallel": 8, "memory_fraction": share},
        strategy={"name": "one_step_off"},
    )


def test_a_larger_share_of_memory_ends_preemption() -> None:
    """github.com/NVIDIA-NeMo/RL/pull/3278 (2026-07): Qwen3-235B, one step off, 32 x 8 H100s: gpu_memory_utilization
    0.88 instead of 0.80 shortened exposed generation from 174 to 137 s. Each of the 16 engines (assumed: tensor
    parallelism 8) may need 32 sequences of 8,192 tokens: more than 0.80 has room for, less than 0.88 has."""
    small, large = (cache_of_235b(share).fit().kv_capacity_tokens for share in (0.80, 0.88))
    assert small is not None and large is not None
    assert small < 16 * 32 // 16 * 8192 < large


# ---------------------------------------------------------------- weights on their way

ABNORMAL = 10  # times what the links take: then it is software that takes the time


def sync_seconds(model: str, tensor_parallel: int, through: str) -> float:
    """From one trainer to one engine on another H100 node."""
    run = setup(
        {"spec": "h100-80g-sxm", "nodes": 2, "gpus_per_node": tensor_parallel},
        {"spec": model},
        {"prompts": 4, "responses_per_prompt": 2, "prompt_tokens": 16, "response_tokens": 16},
        generation={"engine": "engine", "tensor_parallel": tensor_parallel},
        strategy={"name": "one_step_off", "split": {"generation": 1, "training": 1}},
        weight_sync={"through": through, "method": "broadcast", "senders": "first_rank"},
    )
    return stage_seconds(simulate(run))["update_weights"]


def test_weights_through_a_store_are_bound_by_software() -> None:
    """github.com/meta-pytorch/torchforge/pull/728 and /issues/430: through a store of tensors, weights of Qwen3-8B
    (15.26 GiB) take 5.1 s to push and 43.7 s to update, those of 32B 80 s, later 50 s. Through the hosts' memory the
    links need 1 and 4 s."""
    assert sync_seconds("qwen3-8b", 1, "host") * ABNORMAL < 43.7
    assert sync_seconds("qwen3-32b", 4, "host") * ABNORMAL < 50


def test_three_paths_for_the_same_weights() -> None:
    """github.com/pytorch/torchtitan/pull/2525: Qwen3-0.6B in 21.25, 4.89 and 0.067 s by three paths. The last one is
    what links take, the others are not."""
    slow, slower, fast = 4.89, 21.25, 0.067
    links = sync_seconds("qwen3-0.6b", 1, "host")
    assert slower > slow > ABNORMAL * links
    assert sync_seconds("qwen3-0.6b", 1, "gpu") < fast < 2 * links


# ---------------------------------------------------------------- layouts


def areal_8b(nodes: int) -> Setup:
    """sglang.d80m2p1+d4m2p4: 80 engines of 2 GPUs, and 4 x (2 x 4) that train."""
    return setup(
        {"spec": "h20-96g", "nodes": nodes},
        {
            "spec": "qwen3-8b",
            "zero_stage": 1,
            "tensor_parallel": 2,
            "pipeline_parallel": 4,
            "micro_batch_tokens": 32_768,
            "score_micro_batch_tokens": 32_768,
        },
        {"prompts": 160, "responses_per_prompt": 16, "prompt_tokens": 1024, "response_tokens": 16_384},
        generation={"engine": "engine", "tensor_parallel": 2},
        strategy={"name": "asynchronous", "staleness": 16, "split": {"generation": 160, "training": 32}},
    )


def test_a_layout_for_192_gpus_is_refused_on_8() -> None:
    """github.com/areal-project/AReaL/issues/133 (2025-06): Qwen3-8B with that allocation on "8x H20"; it needs 24
    nodes of 8. (3 hours a step are not judged: the batch is not known.)"""
    with pytest.raises(InputError, match="8 ranks are too few to divide: at least 10 are needed"):
        areal_8b(1)
    run = areal_8b(24)
    assert len(run.graph.at("gen").ranks) == 160
    assert len(run.graph.at("update_actor").ranks) == 32
    assert run.fit().fits


# ---------------------------------------------------------------- times


def nemo_math(
    cluster: dict[str, Any], actor: dict[str, Any], tensor_parallel: int, mean: float, **changes: Any
) -> Setup:
    """NeMo-RL's examples/configs/grpo_math_*_megatron.yaml at 06f6343: 64 prompts x 32 responses, batches of 512,
    packed to 4,096 tokens (16,384 in scoring), distributed optimizer with overlap, no recomputation, no sequence
    parallelism, gradients in bf16, vLLM with 0.6; states leave the GPUs while it generates.
    Assumed: prompts of 110 tokens, lengths lognormal with sigma 0.7, the reference's weights on the host."""
    use = {"zero_stage": 1, "recompute": "none", "micro_batch_tokens": 4096, "score_micro_batch_tokens": 16_384}
    use |= {"overlap_grad_reduce": True, "overlap_param_gather": True, "logits_chunk_tokens": 1024}
    use |= {"sequence_parallel": False, "offload_states": "all"}
    lengths = {"distribution": "lognormal", "mean_tokens": mean, "sigma": 0.7, "max_tokens": 3986}
    algorithm = {"name": "grpo", "reward": "function", "minibatches": 4} | changes
    return setup(
        cluster,
        use | actor,
        {"prompts": 64, "responses_per_prompt": 32, "balanced": True, "prompt_tokens": 110, "response_tokens": lengths},
        models={"actor": use | actor, "reference": {"zero_stage": 0, "offload_parameters": True}},
        algorithm=algorithm,
        generation={"engine": "engine", "tensor_parallel": tensor_parallel, "memory_fraction": 0.6},
        simulation={"iterations": 1},
    )


NEMO_PARTS = {
    "gen": ["gen"],
    "log_prob": ["old_log_prob", "ref"],
    "train": ["update_actor"],
    "refit": ["update_weights"],
}


@cache
def nemo_seconds(model: str) -> dict[str, float]:
    """Of every part, what the busiest rank spends: in NeMo-RL all replicas begin a part together."""
    if model == "8B":
        run = nemo_math({"spec": "h100-80g-sxm", "nodes": 1}, {"spec": "llama-3.1-8b", "pipeline_parallel": 2}, 1, 803)
    else:
        layout = {"pipeline_parallel": 4, "tensor_parallel": 4}
        run = nemo_math({"spec": "h100-80g-sxm", "nodes": 8}, {"spec": "llama-3.1-70b"} | layout, 4, 397)
    spent: dict[str, Counter[int]] = defaultdict(Counter)
    for span in simulate(run).spans:
        for rank in span.ranks:
            spent[base_stage(span.firing.stage)][rank] += span.end_seconds - span.start_seconds
    ranks = range(run.scenario.cluster.gpus)
    return {part: max(sum(spent[s][r] for s in stages) for r in ranks) for part, stages in NEMO_PARTS.items()}


def wrong(*case: Any, reason: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.xfail(strict=True, reason=reason))


PACKED = (
    "a quarter to 40 % too fast, states that come back included: rows that are padded for the pipeline, eager kernels, "
    "the loss in Python and the controller's hand-over are not modelled or were not measured"
)
REFIT = (
    "links and copies at PCIe's rate only: moments go through memory that is not pinned (`.to('cpu')` of "
    "move_optimizer in megatron_policy_worker.py), and naming tensors and calling engines (sync_tensor_seconds) takes "
    "time: neither was measured"
)


@pytest.mark.parametrize(
    ("model", "part", "published", "rerun"),
    [
        wrong("8B", "log_prob", 18, 18, reason=PACKED),
        wrong("8B", "train", 28, 27, reason=PACKED),
        wrong("8B", "refit", 5, 8, reason=REFIT),
        wrong("70B", "log_prob", 18, 20, reason=PACKED),
        wrong("70B", "train", 28, 31, reason=PACKED),
        wrong("70B", "refit", 14, 26, reason=REFIT),
    ],
)
def test_parts_of_a_grpo_step(model: str, part: str, published: float, rerun: float) -> None:
    """github.com/NVIDIA-NeMo/RL/issues/959 (2025-08): Megatron-Core, Llama-3.1-8B on 8 H100s (responses of about 803
    tokens on average) and 70B on 64 (about 397), as published and run again. The rerun's generation differs by 2 to
    7 %, its refit by up to 2 times; 15 % beyond either run are right here."""
    seconds = nemo_seconds(model)[part]
    assert 0.85 * min(published, rerun) <= seconds <= 1.15 * max(published, rerun)


def test_generation_is_the_longest_part_of_a_grpo_step() -> None:
    """The same runs: 56 to 58 s of 112, and 84 to 87 of 147 to 178. How long it takes hangs on the longest responses,
    which are not known: from half of it to 15 % more counts as right."""
    for model, least, most in (("8B", 56, 58), ("70B", 84, 87)):
        seconds = nemo_seconds(model)
        assert 0.5 * least < seconds["gen"] < 1.15 * most
        assert seconds["gen"] > seconds["train"] > seconds["log_prob"] > seconds["refit"]


def test_a_log_prob_pass_that_is_not_needed() -> None:
    """github.com/NVIDIA-NeMo/RL/pull/3135: with one optimizer step an iteration the ratio is 1 and the policy's own
    log-prob pass is left out: on GB200 log-probs take 42 to 50 % less, and whole steps gain 7 to 21 %. Assumed:
    Qwen3-32B on 16 GPUs, 2,000 tokens on average."""
    gpus = {"spec": "gb200-186g", "nodes": 1, "gpus_per_node": 16}
    actor = {"spec": "qwen3-32b", "tensor_parallel": 2}
    found = []
    for old_log_prob in ("always", "if_needed"):
        run = simulate(nemo_math(gpus, actor, 1, 2000, minibatches=1, old_log_prob=old_log_prob))
        seconds = stage_seconds(run)
        found.append((seconds.get("old_log_prob", 0.0) + seconds["ref"], step_seconds(run)))
    (twice, step), (once, shorter) = found
    assert 0.40 < 1 - once / twice < 0.52
    assert 0.07 < step / shorter - 1 < 0.21


def small_optimizer(part: float) -> Setup:
    """Qwen3-0.6B on one H100 (assumed). Ray gives a worker of NeMo-RL one thread (num_cpus below 1 in nemo_rl/
    distributed/virtual_cluster.py), in which Megatron-LM runs PyTorch's fused AdamW; its rate is another CPU's."""
    offload = {"offload_optimizer": True, "offload_optimizer_fraction": part} if part else {}
    return setup(
        {"spec": "h100-80g-sxm", "nodes": 1, "gpus_per_node": 1},
        {"spec": "qwen3-0.6b", "zero_stage": 1, "micro_batch_samples": 1} | offload,
        {"prompts": 4, "responses_per_prompt": 2, "prompt_tokens": 512, "response_tokens": 512},
        overheads={"host_adam_bytes_per_second": 32e9},
    )


def saved_and_paid(part: float = 1.0) -> tuple[float, float]:
    """(GiB saved in the update, seconds that it takes more)."""
    runs = [small_optimizer(offload) for offload in (0.0, part)]
    kept, offloaded = (used(run.fit(), "update_actor") for run in runs)
    fast, slow = (stage_seconds(simulate(run))["update_actor"] for run in runs)
    return kept - offloaded, slow - fast


def test_an_optimizer_on_the_host_trades_time_for_memory() -> None:
    """github.com/NVIDIA-NeMo/RL/pull/3628: 0.6B with 0, 50, 100 % of the optimizer on the host: 0.752, 1.187, 1.678 s
    a step and 15.2, 14.1, 10.5 GiB. The CPU is not named, and threads differ by a factor of two."""
    (saved, paid), (half_saved, half_paid) = saved_and_paid(), saved_and_paid(0.5)
    assert saved > 15.2 - 10.5 and 0 < half_saved < saved
    assert half_paid / paid == approx((1.187 - 0.752) / (1.678 - 0.752), rel=0.1)
    assert 0.5 < paid / (1.678 - 0.752) < 2


@pytest.mark.xfail(
    strict=True,
    reason="6.7 GiB: HybridDeviceOptimizer keeps master weights (4 bytes a parameter) and moments (8) on the host, the "
    "report's peaks differ by 8.5 bytes (and by 2 with half of it): in which phase they were is not said",
)
def test_what_an_optimizer_on_the_host_saves() -> None:
    """The same rows: 4.7 GiB."""
    assert saved_and_paid()[0] == approx(15.2 - 10.5, rel=0.15)


def test_engines_shorten_all_but_the_tail() -> None:
    """github.com/allenai/open-instruct/pull/575: 1.5B, one to four engines: 101.8 to 48.9 s, which is 31 s that stay
    (30 %) and 71 s divided by the engines. Assumed: 64 prompts x 16 responses, lognormal with a mean of 1,000 and sigma
    0.8, up to 8,192 tokens."""
    seconds = {}
    for engines in (1, 4):
        run = setup(
            {"spec": "h100-80g-sxm", "nodes": 1, "gpus_per_node": 4 + engines},
            {"spec": "qwen2.5-1.5b"},
            {
                "prompts": 64,
                "responses_per_prompt": 16,
                "prompt_tokens": 200,
                "response_tokens": {"distribution": "lognormal", "mean_tokens": 1000, "sigma": 0.8, "max_tokens": 8192},
            },
            generation={"engine": "engine"},
            strategy={"name": "one_step_off", "staleness": 0, "split": {"generation": engines, "training": 4}},
        )
        seconds[engines] = stage_seconds(simulate(run))["gen"]
    divided = (seconds[1] - seconds[4]) / (1 - 1 / 4)
    assert 1.4 < seconds[1] / seconds[4] < 2.8  # 2.08
    assert 0.2 < 1 - divided / seconds[1] < 0.6
