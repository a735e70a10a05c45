"""Which modules LoRA adapts, against the modules of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import scenario, timeline_of

from rlhfsim.costs.operators import lora_gemms
from rlhfsim.costs.sync import sync_tensors
from rlhfsim.errors import InputError
from rlhfsim.lora import LoraTargets, lora_modules, lora_parameters
from rlhfsim.memory import static_bytes
from rlhfsim.metrics import stage_seconds
from rlhfsim.spec.model_spec import load_model
from rlhfsim.spec.scenario import ModelUse

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 64}),
    "opt-1.3b": (
        "opt",
        {
            "hidden_size": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "word_embed_proj_dim": 2048,
            "num_attention_heads": 32,
        },
    ),
    "qwen3.5-9b": ("qwen3_5_text", {"vocab_size": 64}),
}
MEGATRON = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def linear_in_transformers(name: str) -> list[tuple[str, int, int]]:
    """(path, inputs, outputs) of the linear modules in all layers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model_type, values = CONFIGS[name]
    with torch.device("meta"):
        built = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **values))
    modules = ((path, m) for path, m in built.named_modules() if ".layers." in f".{path}")
    return [(path, m.in_features, m.out_features) for path, m in modules if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "targets", ["all-linear", "attention", ["q_proj", "v_proj"], ["o_proj"], ["out_proj"], ["in_proj_a", "up_proj"]]
)
def test_factors_are_those_of_the_modules_in_transformers(name: str, targets: LoraTargets) -> None:
    """Every name is either in both or refused."""

    def adapted(path: str) -> bool:
        if targets == "attention":
            return "attn" in path
        return targets == "all-linear" or path.rpartition(".")[2] in targets

    modules = linear_in_transformers(name)
    spec = load_model(name)
    if not isinstance(targets, str) and not set(targets) <= {path.rpartition(".")[2] for path, _, _ in modules}:
        with pytest.raises(ValueError, match="no such module"):
            ModelUse(spec=name, shape=spec, lora_rank=8, lora_target_modules=targets)
        return
    use = ModelUse(spec=name, shape=spec, lora_rank=8, lora_target_modules=targets)
    widths = [inputs + outputs for path, inputs, outputs in modules if adapted(path)]
    assert use.lora_parameters() == 8 * sum(widths)
    assert sync_tensors(use) == 2 * len(widths)


def test_megatrons_modules_have_one_pair_of_factors() -> None:
    """Of q, k and v, and of gate and up, which read the same: ``r (inputs + outputs)`` each."""
    spec = load_model("llama-3-8b")
    qkv, proj, fc1, fc2 = 4096 + 4096 + 2 * 1024, 4096 + 4096, 4096 + 2 * 14336, 14336 + 4096
    assert lora_parameters(spec, 16, targets=MEGATRON) == 16 * 32 * (qkv + proj + fc1 + fc2)
    use = ModelUse(spec=spec.name, shape=spec, lora_rank=16, lora_target_modules=MEGATRON)
    assert sync_tensors(use) == 32 * 4 * 2
    on_rank = {module.name: module for module in lora_modules(spec, targets=MEGATRON, tensor_parallel=4)}
    assert on_rank["linear_qkv"][1:] == (4096, (4096 + 2 * 1024) // 4)
    assert on_rank["linear_proj"][1:] == (4096 // 4, 4096)


def test_fewer_modules_are_fewer_products_bytes_and_seconds() -> None:
    spec = load_model("llama-3-8b")

    def use(targets: LoraTargets) -> ModelUse:
        return ModelUse(spec=spec.name, shape=spec, lora_rank=16, lora_target_modules=targets)

    assert [gemm.name for gemm in lora_gemms(use(["q_proj"]), 1)] == ["q_lora_a", "q_lora_b"]
    some, every = (static_bytes(use(targets), "train", 1) for targets in (["q_proj", "v_proj"], "all-linear"))
    factors = [lora_parameters(spec, 16, targets=targets) for targets in (["q_proj", "v_proj"], "all-linear")]
    assert some.optimizer / every.optimizer == factors[0] / factors[1] < 0.2
    seconds = [
        stage_seconds(
            timeline_of(scenario(**{"models.actor.lora_rank": 16, "models.actor.lora_target_modules": targets}))
        )["update_actor"]
        for targets in ("attention", "all-linear")
    ]
    assert seconds[0] < seconds[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_target_modules": "attention"}, "lora_rank is 0"),
        ({"lora_rank": 8, "lora_target_modules": "mlp"}, "all-linear or attention, or a list"),
        ({"lora_rank": 8, "lora_target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"lora_rank": 8, "lora_target_modules": ["q_proj", "linear_fc1"]}, "either as PEFT or as Megatron"),
        ({"lora_rank": 8, "lora_target_modules": ["q_proj", "q_proj"]}, "once each"),
        ({"lora_rank": 8, "lora_target_modules": []}, "must name"),
        ({"spec": "qwen3-30b-a3b", "lora_rank": 8, "lora_target_modules": ["linear_fc1"]}, "no such module"),
    ],
)
def test_modules_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(**{f"models.actor.{name}": value for name, value in options.items()})
