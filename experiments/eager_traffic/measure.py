"""Count the bytes that eager PyTorch moves for a decoder layer of Hugging Face, beside products and attention.

    python experiments/eager_traffic/measure.py

A TorchDispatchMode sees every operation of models with two and with three layers, in bf16 on the CPU; the difference is
one layer. Each operation reads its floating-point inputs and writes its outputs once (broadcast dimensions are read
once). Widths are varied one at a time, and the differences give bytes per token and element of each width. Needs torch
and transformers, and takes seconds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

TOKENS = 64
PRODUCTS = ("mm", "bmm", "addmm", "attention", "flash")
MOVES_NOTHING = {"empty", "empty_strided", "empty_like", "new_empty_strided", "detach"}
ONLY_WRITES = {"zeros", "ones", "fill_", "zero_", "zeros_like", "ones_like", "full", "new_zeros"}
WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
HEAD = 64


class Traffic(TorchDispatchMode):
    """Bytes by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs, outputs = (
            [t for t in tree_flatten(x)[0] if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out)
        )
        there = {t.untyped_storage().data_ptr() for t in inputs}
        is_view = all(t.untyped_storage().data_ptr() in there for t in outputs) and not func._schema.is_mutable
        if not is_view and name not in MOVES_NOTHING and not any(product in name for product in PRODUCTS):
            read = [] if name in ONLY_WRITES else [t for t in inputs if t.dtype.is_floating_point]
            self.moved_bytes[name] += sum(map(size_bytes, outputs)) + sum(map(size_bytes, read))
        return out


def size_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() if 0 in tensor.stride() else tensor.numel() * tensor.element_size()


def moved_bytes(config: type[Any], layers: int, widths: dict[str, int], *, backward: bool) -> int:
    settings = widths | {"head_dim": HEAD, "num_hidden_layers": layers, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(config(**settings, attn_implementation="sdpa")).to(torch.bfloat16).train()
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    with Traffic() as forward:
        loss = model(tokens, use_cache=False).logits.float().sum()
    with Traffic() as back:
        loss.backward()
    return sum((back if backward else forward).moved_bytes.values())


def of_layer(config: type[Any], widths: dict[str, int], *, backward: bool) -> float:
    """Bytes per token."""
    two, three = (moved_bytes(config, layers, widths, backward=backward) for layers in (2, 3))
    return (three - two) / TOKENS


def main() -> None:
    print("bytes per token and element of a 16-bit tensor")
    for config in (LlamaConfig, Qwen2Config, Qwen3Config):
        for backward in (False, True):
            base = of_layer(config, WIDTHS, backward=backward)
            found = []
            for name, width in WIDTHS.items():
                more = of_layer(config, WIDTHS | {name: 2 * width}, backward=backward)
                elements = width * (HEAD if "heads" in name else 1)
                found.append(f"{name} {(more - base) / elements:.1f}")
            print(config.__name__, "backward" if backward else "forward", ", ".join(found))


if __name__ == "__main__":
    main()
