"""LoRA: which linear modules are adapted, and the size of their two factors.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, 2021. Routed experts, whose matrices
are one tensor for all, and routers have none.
"""

from __future__ import annotations

from typing import NamedTuple

from . import linear_attention
from .errors import nearest
from .model import kv_heads_per_rank
from .spec.model_spec import DENSE, LayerKind, ModelSpec

LoraTargets = str | list[str]  # `all-linear`, `attention`, or names
ALL_LINEAR, ATTENTION = "all-linear", "attention"

# As PEFT names them: the last part of a module's path in transformers, in the families with one module for each matrix.
_PEFT_NAMES = {
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj", "gate": "gate_proj", "up": "up_proj",
    "down": "down_proj",
}  # fmt: skip
_LATENT_NAMES = {"q_down": "q_a_proj", "kv_down": "kv_a_proj_with_mqa", "kv": "kv_b_proj"}
_OPT_NAMES = _PEFT_NAMES | {"output": "out_proj", "up": "fc1", "down": "fc2"}
_ONE_MODULE_EACH = (
    "llama", "mistral", "mixtral", "qwen", "gemma", "deepseek", "kimi", "glm4_moe", "gpt_oss", "opt",
)  # fmt: skip

# As Megatron Bridge names them: matrices with the same input are one module with one pair of factors.
_MEGATRON_NAMES = {
    "linear_qkv": ("q", "k", "v"), "linear_proj": ("output",), "linear_fc1": ("gate", "up"), "linear_fc2": ("down",),
}  # fmt: skip


class LoraModule(NamedTuple):
    """An adapted module of one layer with its inputs and outputs on one rank."""

    name: str
    inputs: int
    outputs: int


def lora_modules(
    spec: ModelSpec, kind: LayerKind = DENSE, targets: LoraTargets = ALL_LINEAR, tensor_parallel: int = 1
) -> list[LoraModule]:
    """The modules that LoRA adapts in one layer.

    A factor is split as Megatron and PEFT do: with the outputs of qkv and up, with the inputs of the output and down
    projection; those of latent vectors are whole.
    """
    attention = _attention_modules(spec, kind, tensor_parallel)
    modules = attention + _mlp_modules(spec, kind, tensor_parallel)
    if targets == ATTENTION:
        return attention
    if targets == ALL_LINEAR:
        return modules
    found = [module for module in modules if _peft_name(spec, module.name) in targets]
    for name, parts in _MEGATRON_NAMES.items():
        fused = [module for module in modules if module.name in parts]
        if name in targets and fused:
            found.append(LoraModule(name, fused[0].inputs, sum(module.outputs for module in fused)))
    return found


def lora_factors(spec: ModelSpec, targets: LoraTargets = ALL_LINEAR) -> int:
    """Tensors of factors in all layers, two for every adapted module."""
    kinds = spec.layer_kinds()
    return sum(2 * len(lora_modules(spec, kind, targets)) * count for kind, count in kinds.items())


def lora_parameters(spec: ModelSpec, rank: int, layers: int | None = None, targets: LoraTargets = ALL_LINEAR) -> int:
    """Two factors, rank x inputs and outputs x rank, at each adapted module of every layer.

    `layers`: only so many layers have them (the mean, where layers differ).
    """
    widths = sum(
        count * (module.inputs + module.outputs)
        for kind, count in spec.layer_kinds().items()
        for module in lora_modules(spec, kind, targets)
    )
    return rank * widths if layers is None else rank * widths * layers // spec.layers


def targets_problem(spec: ModelSpec, targets: LoraTargets) -> str:
    """What is wrong with them, such as a name that no layer of the model has; empty where all is well."""
    if isinstance(targets, str):
        words = ALL_LINEAR, ATTENTION
        return "" if targets in words else f"is {targets!r}, but must be {' or '.join(words)}, or a list of modules"
    own = [m.name for kind in spec.layer_kinds() for m in lora_modules(spec, kind)]
    peft = {name for module in own if (name := _peft_name(spec, module))}
    megatron = {name for name, parts in _MEGATRON_NAMES.items() if set(parts) & set(own)}
    if spec.experts:  # there these would adapt the routed experts too
        megatron -= {"linear_fc1", "linear_fc2"}
    for name in targets:
        if name not in peft | megatron:
            allowed = sorted(peft) + sorted(megatron)
            near = nearest(name, allowed)
            return f"has {name!r}, but {spec.name} has no such module{near} (it has: {', '.join(allowed)})"
    if not targets or len(set(targets)) < len(targets) or (set(targets) & peft and set(targets) & megatron):
        return "must name modules once each, either as PEFT or as Megatron does"
    return ""


def _attention_modules(spec: ModelSpec, kind: LayerKind, t: int) -> list[LoraModule]:
    h, heads = spec.hidden, spec.heads // t
    if kind.linear:
        inputs = [LoraModule(f"in_proj_{name}", h, n) for name, n in linear_attention.projections(spec, t)]
        return [*inputs, LoraModule("out_proj", spec.linear_value_heads // t * spec.linear_value_head_dim, h)]
    output = LoraModule("output", heads * spec.value_head_dim, h)
    if spec.latent_attention:
        down = [LoraModule("q_down", h, spec.q_lora_rank)] if spec.q_lora_rank else []
        return [
            *down,
            LoraModule("q", spec.q_lora_rank or h, heads * spec.head_dim),
            LoraModule("kv_down", h, spec.kv_lora_rank + spec.qk_rope_head_dim),
            LoraModule("kv", spec.kv_lora_rank, heads * (spec.qk_nope_head_dim + spec.value_head_dim)),
            output,
        ]
    q, kv = heads * spec.head_dim * (1 + spec.attention_gate), kv_heads_per_rank(spec, t) * spec.head_dim
    return [LoraModule("q", h, q), LoraModule("k", h, kv), LoraModule("v", h, kv), output]


def _mlp_modules(spec: ModelSpec, kind: LayerKind, t: int) -> list[LoraModule]:
    h, width = spec.hidden, (spec.shared_expert_ffn if kind.experts else spec.ffn) // t
    if not width:
        return []
    return [LoraModule("down", width, h)] + [
        LoraModule(name, h, width) for name in (("gate", "up") if spec.gated_mlp else ("up",))
    ]


def _peft_name(spec: ModelSpec, module: str) -> str:
    """Empty where a family has one module for several matrices."""
    if module.startswith(("in_proj_", "out_proj")):
        return module
    if not spec.family.startswith(_ONE_MODULE_EACH):
        return ""
    if spec.latent_attention and module == "q" and spec.q_lora_rank:
        return "q_b_proj"
    return ((_OPT_NAMES if spec.family == "opt" else _PEFT_NAMES) | _LATENT_NAMES)[module]
