"""One copy of a model on this rank: held by DeepSpeed, by plain torch with its gradients summed over ranks, or frozen.

Whoever uses an engine's module does so inside `session()`, which confines DeepSpeed to the engine's ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfsim.errors import InputError
from rlhfsim.layout import Holding
from rlhfsim.spec.scenario import Algorithm, ModelUse

from .groups import Groups
from .models import DTYPES, Decoder, LoraLinear

# Smaller parameters (norms, biases) ZeRO-3 keeps whole on every rank; DeepSpeed's default of 1e5 would hold whole
# matrices of small models. The paper's published code sets 1e4 (ds_utils.py).
PERSISTENT_PARAMETERS = 10_000


class Engine:
    """The module of a holding; `train` tells whether it has gradients and an optimizer. All its ranks do all calls."""

    def __init__(self, holding: Holding, module: Decoder, groups: Groups, algorithm: Algorithm) -> None:
        self.holding, self.use, self.ranks, self.groups = holding, holding.use, holding.ranks, groups
        self.train = holding.purpose == "train"
        self.deepspeed = self.use.backend == "deepspeed" and (self.train or self.use.zero_stage == 3)
        self.sharded = self.deepspeed and self.use.zero_stage == 3
        self.module, self._clip = module, algorithm.gradient_clip
        self._resting = self.use.offload_parameters and not self.deepspeed
        if self.use.offload_parameters and self.train and not self.sharded:
            message = "is true; real runs offload trained weights only with backend deepspeed and zero_stage 3"
            raise InputError(message, field=f"models.{holding.name}.offload_parameters")
        if self.train and not self.deepspeed and self.use.precision != "fp32":
            message = f"is {self.use.precision!r}, but backend torch keeps no master weights (allowed: fp32)"
            raise InputError(message, field=f"models.{holding.name}.precision")
        optimizer = _optimizer(module, algorithm) if self.train else None
        if self.deepspeed:
            with self.session():
                self.engine = _initialize(module, optimizer, self.use, len(self.ranks), algorithm)
            self.module = self.engine.module
        else:
            self.optimizer = optimizer
            if not self._resting:
                module.to(groups.device)

    @contextmanager
    def session(self) -> Iterator[nn.Module]:
        """The module, ready for use on the device."""
        scope: AbstractContextManager[None] = nullcontext()
        if self.deepspeed:
            scope = self.groups.deepspeed(self.ranks, sharded=self.sharded)
        with scope:
            if self._resting:
                self.module.to(self.groups.device)
            try:
                yield self.module
            finally:
                if self._resting:
                    self.module.to("cpu")

    # -- training -----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, this rank's part of a sum; the `last` of an update adds up all ranks'."""
        if self.deepspeed:
            self.engine.set_gradient_accumulation_boundary(last)
            self.engine.backward(loss * len(self.ranks))  # DeepSpeed takes the mean over ranks
            return
        loss.backward()
        if last and len(self.ranks) > 1:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            for some in _buckets(gradients, 100e6):
                flat = self.groups.all_reduce(torch.cat([g.reshape(-1) for g in some]), self.ranks)
                for gradient, summed in zip(some, flat.split([g.numel() for g in some]), strict=True):
                    gradient.copy_(summed.view_as(gradient))

    def step(self) -> None:
        if self.deepspeed:
            self.engine.step()
            return
        assert self.optimizer is not None
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def training(self, on: bool) -> None:
        (self.engine if self.deepspeed else self.module).train(on)

    # -- weights ------------------------------------------------------------------------------------------

    def buckets(
        self,
        names: Sequence[str],
        bucket_bytes: float,
        *,
        write: bool = False,
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Whole parameters, some at a time, gathered under ZeRO-3 while the caller uses them. All ranks iterate.

        write: what the caller changes in them is kept.
        """
        parameters = dict(self.module.named_parameters())
        by_tensor = {id(parameters[n]): n for n in names}
        for some in _buckets([parameters[n] for n in names], bucket_bytes):
            with self.gathered(some, write=write):
                yield [(by_tensor[id(p)], p.detach()) for p in some]

    def gathered(self, parameters: Sequence[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def write(self, folder: Path) -> None:
        """Weights and optimizer states of this rank, as a checkpoint."""
        if self.deepspeed:
            with self.session():
                self.engine.save_checkpoint(str(folder), tag=self.holding.name)
        else:
            state = {"weights": self.module.state_dict(), "optimizer": self.optimizer and self.optimizer.state_dict()}
            torch.save(state, folder / f"{self.holding.name}.pt")


class WholeCopy:
    """Weights of a ZeRO-3 engine gathered once for decoding, LoRA's factors added, and dropped afterwards."""

    def __init__(self, engine: Engine, bucket_bytes: float) -> None:
        self.engine, self.bucket_bytes = engine, bucket_bytes
        self.module = Decoder(engine.use.model_copy(update={"lora_rank": 0}), lm=True, value=False).eval()
        self.module.to(DTYPES[engine.use.precision]).requires_grad_(False).to(engine.groups.device)
        self._drop()

    @contextmanager
    def session(self) -> Iterator[nn.Module]:
        own = dict(self.module.named_parameters())
        with self.engine.session(), torch.no_grad():
            names = [n for n, _ in self.engine.module.named_parameters() if not n.startswith("value_head")]
            adapted = {n: m for n, m in self.engine.module.named_modules() if isinstance(m, LoraLinear)}
            for bucket in self.engine.buckets([n for n in names if not n.endswith((".a", ".b"))], self.bucket_bytes):
                for name, weight in bucket:
                    own[name.replace(".base.", ".")].data = weight.clone()
            for name, layer in adapted.items():
                with self.engine.gathered([layer.a, layer.b]):
                    own[f"{name}.weight"] += layer.b @ layer.a
        try:
            yield self.module
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter in self.module.parameters():
            parameter.data = parameter.new_empty(0)


def _buckets(tensors: Sequence[Any], bucket_bytes: float) -> Iterator[list[Any]]:
    """Tensors in order, as many at a time as fit (at least one)."""
    some, size = [], 0
    for x in tensors:
        nbytes = getattr(x, "ds_numel", x.numel()) * x.element_size()
        if some and size + nbytes > bucket_bytes:
            yield some
            some, size = [], 0
        some.append(x)
        size += nbytes
    if some:
        yield some


def _optimizer(module: nn.Module, algorithm: Algorithm) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if algorithm.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=algorithm.learning_rate)
    return torch.optim.Adam(parameters, lr=algorithm.learning_rate, eps=algorithm.adam_epsilon)


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, use: ModelUse, ranks: int, algorithm: Algorithm
) -> Any:
    """A DeepSpeed engine over so many ranks; accumulation is ours (`set_gradient_accumulation_boundary`)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    zero: dict[str, Any] = {"stage": use.zero_stage, "stage3_param_persistence_threshold": PERSISTENT_PARAMETERS}
    if use.offload_optimizer and optimizer is not None:
        zero["offload_optimizer"] = {"device": "cpu"}
    if use.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": algorithm.gradient_clip,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if use.precision != "fp32":
        config[use.precision] = {"enabled": True}
    launched = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)  # ZeRO-3 refuses one rank where the launcher started more
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    finally:
        os.environ.pop("WORLD_SIZE") if launched is None else os.environ.update(WORLD_SIZE=launched)
