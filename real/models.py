"""The four models as torch modules: a transformers decoder from our `ModelSpec`, with the heads that PPO needs.

Weights are random, keyed by seed, role and parameter name: every rank and every placement builds the same ones.
Samples lie left-aligned, so causal attention needs no mask for padding; without padding they lie one after the other in
one row, each attending to itself only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.initialization import no_init_weights

from rlhfsim.errors import InputError
from rlhfsim.spec.model_spec import ModelSpec, hf_config
from rlhfsim.spec.scenario import ModelUse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Standard deviation of matrices; `initializer_range` of transformers' configurations is the same.
INITIAL_DEVIATION = 0.02


def config_of(spec: ModelSpec) -> transformers.PreTrainedConfig:
    """The configuration with which transformers builds this shape: no dropout, no capped logits, no special tokens.

    (A family ignores what it has not.) Raises InputError for a family that is not built here.
    """
    no_dropout = dict.fromkeys(("attention_dropout", "dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    plain = dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"))
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return transformers.AutoConfig.for_model(**hf_config(spec), **no_dropout, **plain, **tokens)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention without a mask, or with a boolean one.

    options: `scaling`; `segments`, lengths of samples that lie in one row. What else transformers says is not used.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal, grouped = mask is None and q.shape[2] > 1, q.shape[1] != k.shape[1]
        scale = options.get("scaling")
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)

    if (segments := options.get("segments")) is None:
        found = attend(query, key, value)
    else:
        parts = zip(*(x.split(segments, dim=2) for x in (query, key, value)), strict=True)
        found = torch.cat([attend(*part) for part in parts], dim=2)
    return found.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("samples", attention)


class LoraLinear(nn.Module):
    """A frozen linear layer and two trained factors, y = W x + b + B A x; `merged` holds W + B A while generating."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(base.weight.new_zeros(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.merged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """LoRA's factors added to the weights they belong to, in extra memory, so that nothing is rounded away."""
    adapted = [m for m in module.modules() if isinstance(m, LoraLinear)]
    for layer in adapted:
        layer.merged = (layer.base.weight + layer.b @ layer.a).detach()
    try:
        yield
    finally:
        for layer in adapted:
            layer.merged = None


class LanguageHead(nn.Linear):
    """Logits, or log-probabilities of `targets` from logits of so many tokens at a time.

    One call of the module whatever the number of pieces: under ZeRO-3 ranks meet in every call.
    """

    def __init__(self, width: int, vocabulary: int, chunk_tokens: int | None) -> None:
        super().__init__(width, vocabulary, bias=False)
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight).float()
        size = self.chunk_tokens or max(1, len(targets))
        pieces = list(zip(hidden.split(size), targets.split(size), strict=True))
        if len(pieces) > 1 and torch.is_grad_enabled():  # keep no logits: compute them again in the backward pass
            return torch.cat([checkpoint(self._log_probs, *piece, use_reentrant=False) for piece in pieces])
        return torch.cat([self._log_probs(*piece) for piece in pieces])

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight).float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Decoder(nn.Module):
    """A decoder with a language-model head, a value head (one column without bias), or both."""

    def __init__(self, use: ModelUse, *, lm: bool, value: bool) -> None:
        super().__init__()
        spec = use.shape
        self.body = transformers.AutoModel.from_config(config_of(spec), attn_implementation="samples")
        self.lm_head = LanguageHead(spec.embedding_width, spec.vocabulary, use.logits_chunk_tokens) if lm else None
        self.value_head = nn.Linear(spec.embedding_width, 1, bias=False) if value else None
        if self.lm_head is not None and spec.tied_embeddings:
            self.lm_head.weight = self.body.get_input_embeddings().weight

    def forward(
        self, tokens: Tensor, positions: Tensor, *, last: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """tokens, positions: (rows, columns). options: of the body (`cache`, `attention_mask`) and of `attention`.

        With `last` (a column per row): logits after it, (rows, vocabulary). Else, flat over all tokens: `log_probs` of
        each token after those before it (the first of a row or segment has none: ignore it), and `state_values`, the
        value head's at each token.
        """
        read = self.body(input_ids=tokens, position_ids=positions, use_cache="cache" in options, **options)
        hidden = read.last_hidden_state
        if last is not None:
            return {"logits": self.lm_head(hidden[torch.arange(len(hidden), device=hidden.device), last])}
        hidden, found = hidden.flatten(0, 1), {}
        if self.lm_head is not None:
            found["log_probs"] = F.pad(self.lm_head(hidden[:-1], tokens.flatten()[1:]), (1, 0))
        if self.value_head is not None:
            found["state_values"] = self.value_head(hidden).squeeze(-1).float()
        return found


def build(role: str, use: ModelUse, seed: int, *, lm: bool, value: bool, train: bool) -> Decoder:
    """The model of a role, on the host, in its precision; what does not train requires no gradient.

    The reference is the actor as it was before the first update.
    """
    with no_init_weights():
        module = Decoder(use, lm=lm, value=value)
    if use.lora_rank:
        _adapt(module, use, role)
    fill(module, {"reference": "actor"}.get(role, role), seed)
    module.to(DTYPES[use.precision])
    trained = set(trained_names(module, use)) if train else set()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    if train and use.recompute == "full":
        # selective recomputation repeats what is quadratic in the sequence; fused attention never stores it
        module.body.gradient_checkpointing_enable({"use_reentrant": False})
    return module.eval()


def fill(module: nn.Module, role: str, seed: int) -> None:
    """Random matrices, biases of zero, norms of one, each keyed by its name alone; LoRA's factors as in its paper."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = f"{seed}/{role}/{name.replace('.base.', '.')}"  # with LoRA and without it the same weight
            noise = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            if name.endswith(".a"):
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=noise)
            elif name.endswith(("bias", ".b")):
                parameter.zero_()
            elif parameter.ndim < 2:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, INITIAL_DEVIATION, generator=noise)


def _adapt(module: Decoder, use: ModelUse, role: str) -> None:
    """LoRA at the linear modules of the layers that are named."""
    layers, targets = layers_of(module), use.lora_target_modules
    linear = {name: child for name, child in layers.named_modules() if isinstance(child, nn.Linear)}
    if targets == "attention":
        linear = {name: child for name, child in linear.items() if "attn" in name or "attention" in name}
    elif targets != "all-linear":
        linear = {name: child for name, child in linear.items() if name.rpartition(".")[2] in targets}
    if not linear:
        message = f"{use.shape.family} has no linear modules that LoRA could adapt"
        raise InputError(message, field=f"models.{role}.lora_rank")
    for name, child in linear.items():
        parent, _, own = name.rpartition(".")
        setattr(layers.get_submodule(parent), own, LoraLinear(child, use.lora_rank))


def layers_of(module: Decoder) -> nn.ModuleList:
    """The list of layers, wherever the family keeps it."""
    return max((m for m in module.body.modules() if isinstance(m, nn.ModuleList)), key=len)


def trained_names(module: Decoder, use: ModelUse) -> list[str]:
    """What trains: LoRA's factors and the value head, or the top layers and what comes after them, or everything."""
    names = [name for name, _ in module.named_parameters()]
    if use.lora_rank:
        return [n for n in names if n.endswith((".a", ".b")) or n.startswith("value_head")]
    if use.trainable_layers in (None, use.shape.layers):
        return names
    layers = layers_of(module)
    prefix = next(name for name, m in module.named_modules() if m is layers)
    bottom = tuple(f"{prefix}.{i}." for i in range(use.shape.layers - use.trainable_layers))
    embeddings = [f"{n}." for n, m in module.body.named_modules(prefix="body") if isinstance(m, nn.Embedding)]
    frozen = (*bottom, *embeddings, f"{prefix.rpartition('.')[0]}.project_in")
    return [n for n in names if not n.startswith(frozen)]
