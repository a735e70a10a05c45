"""From the options of a verl run (Hydra's dotted names) to a scenario. Defaults are those of verl's ppo_trainer.yaml.

Only what changes times or memory is read. https://github.com/volcengine/verl, verl/trainer/config/ppo_trainer.yaml and
docs/examples/config.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import InputError, nearest
from .measurements import Log, cluster_of, model_named
from .spec.loader import scenario_from_dict
from .spec.scenario import Scenario

# verl's algorithm.adv_estimator: ours.
ALGORITHMS = {"gae": "ppo", "grpo": "grpo", "gpg": "gpg", "rloo": "rloo", "reinforce_plus_plus": "reinforce_plus_plus"}
ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.ref."


def scenario_from_options(log: Log, workload: Mapping[str, Any], gpu: str | None) -> Scenario:
    """Raises InputError for an option without which there is no scenario, or whose value has no counterpart here."""
    return scenario_from_dict(_scenario(_Options(log), workload, gpu))


class _Options:
    def __init__(self, log: Log) -> None:
        self.log = log

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of these that the log says."""
        for name in names:
            if (value := self.log.options.get(name)) not in (None, "None", "null", ""):
                return str(value)
        if default is None:
            raise InputError(
                "the log does not say it; describe the run in a scenario: --scenario FILE",
                field=names[0],
                where=str(self.log.path),
            )
        return default

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.text(*names, default=None if default is None else str(default))
        try:
            return int(float(value))
        except ValueError:
            raise InputError(f"is {value!r}, but must be a number", field=names[0], where=str(self.log.path)) from None

    def flag(self, name: str, default: bool = False) -> bool:
        return self.text(name, default=str(default)).lower() == "true"


def _scenario(options: _Options, workload: Mapping[str, Any], gpu: str | None) -> dict[str, Any]:
    if gpu is None:
        raise InputError(
            "a verl log does not name its GPU: --gpu NAME (`rlhfsim show gpus`)", where=str(options.log.path)
        )
    per_node, nodes = options.number("trainer.n_gpus_per_node"), options.number("trainer.nnodes", default=1)
    estimator = options.text("algorithm.adv_estimator", default="gae")
    if estimator not in ALGORITHMS:
        raise InputError(
            f"is {estimator!r}, which has no counterpart here{nearest(estimator, ALGORITHMS)}",
            field="algorithm.adv_estimator",
            where=str(options.log.path),
        )
    prompts = options.number("data.train_batch_size")
    models = {"actor": _model(options, "actor_rollout_ref.model.", ACTOR, per_node * nodes)}
    kl = options.flag(f"{ACTOR}use_kl_loss") or options.flag("algorithm.use_kl_in_reward", estimator == "gae")
    if estimator == "gae":
        models["critic"] = _model(options, "critic.model.", "critic.", per_node * nodes)
    if kl:
        models["reference"] = {
            "zero_stage": 3,
            "score_micro_batch_samples": _score_samples(options, REF, per_node * nodes),
            "offload_parameters": options.flag(f"{REF}fsdp_config.param_offload"),
        }
    found: dict[str, Any] = {
        "name": options.log.path.stem,
        "cluster": {"spec": cluster_of(gpu).name, "nodes": nodes, "gpus_per_node": per_node},
        "models": models,
        "workload": {
            "prompts": prompts,
            "responses_per_prompt": options.number(f"{ROLLOUT}n", default=1),
            "padded": not options.flag("actor_rollout_ref.model.use_remove_padding"),
            "balanced": options.flag("trainer.balance_batch", True),
            "prompt_tokens": workload["prompt_tokens"],
            "response_tokens": workload["response_tokens"],
        },
        "algorithm": {
            "name": ALGORITHMS[estimator],
            "epochs": options.number(f"{ACTOR}ppo_epochs", default=1),
            "minibatches": max(1, prompts // options.number(f"{ACTOR}ppo_mini_batch_size", default=prompts)),
            "reward": "function",
        },
        "generation": _generation(options),
        "strategy": {"name": "colocated"},
        "simulation": {"iterations": 2},
    }
    if not kl:
        found["algorithm"]["kl_coefficient"] = 0
    if "/" in gpu or gpu.endswith((".yaml", ".yml")):
        found["cluster"]["spec"] = gpu
    return found


def _model(options: _Options, model: str, use: str, gpus: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "spec": model_named(
            options.text(f"{model}path", "actor_rollout_ref.model.path"), f"{model}path", str(options.log.path)
        ),
        "zero_stage": 3,
        "recompute": "full" if options.flag(f"{model}enable_gradient_checkpointing") else "none",
        "offload_parameters": options.flag(f"{use}fsdp_config.param_offload"),
        "offload_optimizer": options.flag(f"{use}fsdp_config.optimizer_offload"),
        "logits_upcast": not (options.flag(f"{model}use_remove_padding") and use == ACTOR and _no_entropy(options)),
        "context_parallel": options.number(f"{use}ulysses_sequence_parallel_size", default=1),
    }
    if found["context_parallel"] > 1:
        found["context_exchange"] = "all_to_all"
    if options.flag(f"{use}use_dynamic_bsz"):
        found["micro_batch_tokens"] = options.number(f"{use}ppo_max_token_len_per_gpu", default=16384)
    else:
        found["micro_batch_samples"] = _samples(options, use, "ppo_micro_batch_size", gpus)
        place = ROLLOUT if use == ACTOR else use
        found["score_micro_batch_samples"] = _score_samples(options, place, gpus) or found["micro_batch_samples"]
    if found["logits_upcast"]:
        del found["logits_upcast"]
    return {key: value for key, value in found.items() if key == "logits_upcast" or value not in (False, 0)}


def _no_entropy(options: _Options) -> bool:
    """Whether the actor's loss has no entropy term, said so (the default was 0.001 until 2025-05)."""
    return float(options.text(f"{ACTOR}entropy_coeff", default="0.001")) == 0


def _samples(options: _Options, use: str, name: str, gpus: int) -> int:
    """Of one rank: `<name>_per_gpu`, or the older one of all ranks together."""
    if (own := options.number(f"{use}{name}_per_gpu", default=0)) > 0:
        return own
    return max(1, options.number(f"{use}{name}") // gpus)


def _score_samples(options: _Options, use: str, gpus: int) -> int:
    name = "log_prob_micro_batch_size" if use != "critic." else "forward_micro_batch_size"
    if (own := options.number(f"{use}{name}_per_gpu", default=0)) > 0:
        return own
    return max(1, options.number(f"{use}{name}", default=gpus) // gpus)


def _generation(options: _Options) -> dict[str, Any]:
    return {
        "engine": "engine",
        "tensor_parallel": options.number(f"{ROLLOUT}tensor_model_parallel_size", default=2),
        "pipeline_parallel": options.number(f"{ROLLOUT}pipeline_model_parallel_size", default=1),
        "memory_fraction": float(options.text(f"{ROLLOUT}gpu_memory_utilization", default="0.5")),
        "max_sequences": options.number(f"{ROLLOUT}max_num_seqs", default=1024),
        "prefill_tokens": options.number(f"{ROLLOUT}max_num_batched_tokens", default=8192),
        "cuda_graphs": not options.flag(f"{ROLLOUT}enforce_eager", True),
        "sleep": "level_1",
    }
