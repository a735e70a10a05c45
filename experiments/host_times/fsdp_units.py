"""Host time of a layer of Hugging Face's Qwen2 under PyTorch's FSDP, as verl wraps it, with and without LoRA.

    python experiments/host_times/fsdp_units.py [--layers 8] [--repeats 7]

Tensors are so small, and collectives so empty (PyTorch's fake process group of 8 ranks), that only Python, dispatcher,
autograd and FSDP's hooks take time: a lower bound of what a layer needs on the host of a GPU, which launches kernels
and waits for the rate limiter of all-gathers besides. CPU seconds of one thread, so that a busy machine matters less;
the best of `repeats` passes. LoRA's factors are units of their own, as in verl's get_fsdp_wrap_policy with is_lora
(verl/utils/fsdp_utils.py @v0.4.1).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from time import process_time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapted(nn.Module):
    """A linear module with a pair of low-rank factors beside it, unless they are off."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.on = base.requires_grad_(False), True
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        return out + self.lora_b(self.lora_a(x)) if self.on else out


def model(layers: int, *, lora: bool) -> nn.Module:
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, use_cache=False,
    )  # fmt: skip
    made = Qwen2ForCausalLM(config)
    if lora:
        made.requires_grad_(False)
        for module in [m for m in made.modules() if any(hasattr(m, name) for name in TARGETS)]:
            for name in TARGETS:
                if isinstance(base := getattr(module, name, None), nn.Linear):
                    setattr(module, name, Adapted(base, 4))
        made.enable_input_require_grads()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def wrapped(made: nn.Module) -> nn.Module:
    """A unit for each layer, and for each trained leaf where only some of the weights are trained."""
    policies = [partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen2DecoderLayer})]
    if not all(p.requires_grad for p in made.parameters()):
        policies.append(partial(lambda_auto_wrap_policy, lambda_fn=_trained_leaf))
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return FullyShardedDataParallel(
        made, auto_wrap_policy=partial(_or_policy, policies=policies), mixed_precision=precision,
        device_id=torch.device("cpu"),
    )  # fmt: skip


def _trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and bool(weight.requires_grad)


def best(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = process_time()
        run()
        seconds.append(process_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    tokens = torch.zeros((1, 4), dtype=torch.long)
    for lora in (False, True):
        for sharded in (False, True):
            made = model(given.layers, lora=lora)
            network = wrapped(made) if sharded else made

            def score(network: nn.Module = network) -> None:
                with torch.no_grad():
                    network(input_ids=tokens)

            def update(network: nn.Module = network) -> None:
                network(input_ids=tokens).logits.sum().backward()

            network.train()
            passes = {"forward": score, "forward, recomputation, backward": update}
            times = {name: best(run, given.repeats) / given.layers for name, run in passes.items()}
            if lora:
                for module in made.modules():
                    if isinstance(module, Adapted):
                        module.on = False
                times["forward, adapters off"] = best(score, given.repeats) / given.layers
            name = ("LoRA" if lora else "all trained") + (", FSDP" if sharded else "")
            print(f"{name}: " + "; ".join(f"{k} {1e3 * v:.2f} ms a layer" for k, v in times.items()), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
