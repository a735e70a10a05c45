"""One copy of a model on this rank: held by DeepSpeed, by plain torch with its gradients summed over ranks, or frozen.

Whoever uses an engine's module does so inside `session()`, which confines DeepSpeed to the engine's ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import getclosurevars
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhfsim.errors import InputError
from rlhfsim.layout import Holding
from rlhfsim.spec.scenario import Algorithm, ModelUse

from .groups import Groups
from .models import DTYPES, Decoder

# Smaller parameters (norms, biases) ZeRO-3 keeps whole on every rank; DeepSpeed's default of 1e5 would hold whole
# matrices of small models. The paper's published code sets 1e4 (ds_utils.py).
PERSISTENT_PARAMETERS = 10_000

Named = tuple[str, Tensor]


class Engine:
    """The module of a holding; `train` tells whether it has gradients and an optimizer. All its ranks do all calls."""

    def __init__(self, holding: Holding, module: Decoder, groups: Groups, algorithm: Algorithm) -> None:
        self.holding, self.use, self.ranks, self.groups = holding, holding.use, holding.ranks, groups
        self.train = holding.purpose == "train"
        self.deepspeed = self.use.backend == "deepspeed" and (self.train or self.use.zero_stage == 3)
        self.sharded = self.deepspeed and self.use.zero_stage == 3
        self.module, self._clip = module, algorithm.gradient_clip
        self._resting = self.use.offload_parameters and not self.deepspeed
        if self.train and not self.deepspeed and self.use.precision != "fp32":
            message = f"is {self.use.precision!r}, but backend torch keeps no master weights (allowed: fp32)"
            raise InputError(message, field=f"models.{holding.name}.precision")
        self.optimizer = _optimizer(module, algorithm) if self.train else None
        self.callable: Any = module  # what computes losses
        if self.deepspeed:
            with self.session():
                self.callable = _initialize(module, self.optimizer, self.use, len(self.ranks), algorithm)
            self.module = self.callable.module
        elif not self._resting:
            module.to(groups.device)

    @contextmanager
    def session(self) -> Iterator[nn.Module]:
        """The module, ready for use on the device."""
        with self.groups.deepspeed(self.ranks, sharded=self.sharded) if self.deepspeed else nullcontext():
            if self._resting:
                self.module.to(self.groups.device)
            try:
                yield self.module
            finally:
                if self._resting:
                    self.module.to("cpu")

    def close(self) -> None:
        """Let go of what DeepSpeed 0.19.8 would keep for ever: hooks in C++, ZeRO-3's list of modules, cached calls."""
        if self.deepspeed:
            with self.session():
                self.callable.destroy()
        if self.sharded:
            from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

            stack, mine = parameter_offload.FWD_MODULE_STACK, set(self.module.modules())
            stack[:] = [module for module in stack if module not in mine]
            coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
            cached = vars(coordinator)["_PartitionedParameterCoordinator__params_to_release"]
            getclosurevars(cached).nonlocals["func"].cache_clear()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, this rank's part of a sum; the `last` of an update adds up all ranks'."""
        if self.deepspeed:
            self.callable.set_gradient_accumulation_boundary(last)
            self.callable.backward(loss * len(self.ranks))  # DeepSpeed takes the mean over ranks
            return
        loss.backward()
        if last and len(self.ranks) > 1:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            for some in _buckets(gradients, 100e6):
                fill(some, self.groups.all_reduce(flat(some), self.ranks))

    def step(self) -> None:
        if self.deepspeed:
            self.callable.step()
            return
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def buckets(self, names: Sequence[str], bucket_bytes: float, *, write: bool = False) -> Iterator[list[Named]]:
        """Whole parameters, some at a time, gathered under ZeRO-3 while the caller uses them. All ranks iterate.

        write: what the caller changes in them is kept.
        """
        parameters = dict(self.module.named_parameters())
        by_tensor = {id(parameters[n]): n for n in names}
        for some in _buckets([parameters[n] for n in names], bucket_bytes):
            with self._gathered(some, modifier_rank=0 if write else None):
                yield [(by_tensor[id(p)], p.detach()) for p in some]

    def _gathered(self, parameters: list[nn.Parameter], **options: Any) -> AbstractContextManager[Any]:
        if not self.sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, **options)

    def write(self, folder: Path) -> None:
        """Weights and optimizer states of this rank, as a checkpoint."""
        if self.deepspeed:
            with self.session():
                self.callable.save_checkpoint(str(folder), tag=self.holding.name)
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
        names = [n for n, _ in self.engine.module.named_parameters() if not n.startswith("value_head")]
        whole: dict[str, Tensor] = {}
        with self.engine.session(), torch.no_grad():
            for bucket in self.engine.buckets(names, self.bucket_bytes):
                whole |= {name.replace(".base.", "."): weight.clone() for name, weight in bucket}
        for name, parameter in self.module.named_parameters():
            parameter.data = whole[name]
            layer = name.removesuffix(".weight")
            if f"{layer}.a" in whole:
                parameter.data += whole[f"{layer}.b"] @ whole[f"{layer}.a"]
        try:
            yield self.module
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter in self.module.parameters():
            parameter.data = parameter.new_empty(0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Write what `flat` made of such tensors into these."""
    for x, part in zip(tensors, values.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))


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
    on_host = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": use.zero_stage, "stage3_param_persistence_threshold": PERSISTENT_PARAMETERS}
    zero |= {"offload_optimizer": on_host} if use.offload_optimizer and optimizer is not None else {}
    zero |= {"offload_param": on_host} if use.offload_parameters else {}
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
