"""Process groups for any set of ranks, collectives that are counted, and DeepSpeed confined to one engine's ranks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .meter import Meter

Fields = dict[str, Tensor]
Shapes = dict[str, list[Any]]  # field -> [type, *shape]
Samples = dict[int, Fields]
T = TypeVar("T")

_NUMBERS = 10**7  # more than the parameters and modules of all engines of one group


def shapes_of(fields: Fields) -> Shapes:
    """What `unpack` must know, as JSON data."""
    return {name: [str(x.dtype).removeprefix("torch."), *x.shape] for name, x in fields.items()}


def pack(fields: Fields) -> Tensor:
    """All fields one after the other, as bytes in host memory."""
    parts = [x.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for x in fields.values()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def packed_bytes(shapes: Shapes) -> int:
    return sum(map(_bytes, shapes.values()))


def unpack(packed: Tensor, shapes: Shapes, device: torch.device) -> Fields:
    """The fields of a packed message, apart from it."""
    parts = zip(shapes.items(), packed.split([_bytes(shape) for shape in shapes.values()]), strict=True)
    return {
        name: part.clone().view(getattr(torch, kind)).reshape(shape).to(device)
        for (name, (kind, *shape)), part in parts
    }


def _bytes(shape: list[Any]) -> int:
    return prod(shape[1:]) * getattr(torch, shape[0]).itemsize


class Groups:
    """One process group for each distinct set of ranks. Every rank must make it with the same sets, at the same time.

    A set is named by its ranks in any order.
    """

    def __init__(self, rank: int, sets: Iterable[Iterable[int]], meter: Meter) -> None:
        self.rank, self.world_size, self.meter, self.device = rank, dist.get_world_size(), meter, meter.device
        self._groups = {ranks: dist.new_group(list(ranks)) for ranks in sorted({tuple(sorted(s)) for s in sets})}
        # DeepSpeed's next parameter and module, apart for each group: unique in a process, alike on a group's ranks.
        self._numbers = {ranks: (k * _NUMBERS, k * _NUMBERS) for k, ranks in enumerate(self._groups, start=1)}
        self._sharded_linear = F.linear  # what ZeRO-3 computes linear layers by

    def of(self, ranks: Iterable[int]) -> dist.ProcessGroup:
        """The group of exactly these ranks; KeyError where none was made."""
        return self._groups[tuple(sorted(ranks))]

    def all_reduce(self, tensor: Tensor, ranks: Iterable[int], op: Any = dist.ReduceOp.SUM) -> Tensor:
        """In place."""
        with self._counted("all_reduce", ranks, tensor) as group:
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def broadcast(self, tensor: Tensor, source: int, ranks: Iterable[int]) -> Tensor:
        """In place, from rank `source`."""
        with self._counted("broadcast", ranks, tensor) as group:
            dist.broadcast(tensor, src=source, group=group)
        return tensor

    def exchange(self, samples: Samples, ranks: Sequence[int]) -> Samples:
        """Everyone's samples, on the host: they are small beside weights."""
        own = {s: {name: x.cpu().clone() for name, x in fields.items()} for s, fields in samples.items()}
        found = self.gather(own, ranks, *(x for fields in own.values() for x in fields.values()))
        return {s: fields for part in found for s, fields in part.items()}

    def gather(self, own: T, ranks: Sequence[int], *moved: Tensor) -> list[T]:
        """Everyone's objects, in the order of the group's ranks. moved: the tensors in it, for the count of bytes."""
        found = [own for _ in ranks]
        with self._counted("all_gather", ranks, *moved) as group:
            dist.all_gather_object(found, own, group=group)
        return found

    def meet(self, ranks: Iterable[int]) -> None:
        """Wait until all have come. Not counted: it belongs to no firing's work."""
        dist.all_reduce(torch.zeros(1), group=self.of(ranks))

    @contextmanager
    def _counted(self, name: str, ranks: Iterable[int], *moved: Tensor) -> Iterator[dist.ProcessGroup]:
        key = tuple(sorted(ranks))
        with self.meter.collective(name, key, sum(x.nbytes for x in moved)):
            yield self._groups[key]

    @contextmanager
    def deepspeed(self, ranks: Iterable[int], *, sharded: bool) -> Iterator[None]:
        """Inside, DeepSpeed's world is these ranks, numbered from 0 in ascending order; its collectives are counted.

        sharded: at ZeRO stage 3. Enclose everything that DeepSpeed does for an engine: `zero.Init` (which wants the
        group as `data_parallel_group`), `initialize`, forward, backward, `step`, `GatheredParameters`.

        Where a data-parallel group is passed, ZeRO-3 of DeepSpeed 0.19.8 takes the world all the same: three barriers
        while the optimizer is set up (runtime/zero/stage3.py, `_setup_for_real_optimizer`,
        `_create_fp16_partitions_with_defragmentation`), and at the first steps broadcasts of the parameter trace from
        world rank 0 (runtime/zero/utils.py, `assert_ints_same_as_other_ranks`), of numbers that each process counts up
        over all its engines. It also replaces `torch.nn.functional.linear` for all models of the process
        (partition_parameters.py: "This will persist unless manually reset"). So while the block runs, replaced are the
        backend of all `deepspeed.comm`, the remembered clone of the world group, those counters, and `linear`.
        """
        import deepspeed.comm.comm as comm
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.utils import groups

        if comm.cdb is None:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        key = tuple(sorted(ranks))
        modules = inspect.signature(DeepSpeedZeRoOffload._register_deepspeed_module).parameters["count"].default
        before, linear = (comm.cdb, groups._WORLD_GROUP, Init.param_id, modules[0]), F.linear
        comm.cdb, groups._WORLD_GROUP = EngineWorld(comm.cdb, key, self._groups[key], self.meter), self._groups[key]
        Init.param_id, modules[0] = self._numbers[key]
        F.linear = self._sharded_linear if sharded else linear
        try:
            yield
        finally:
            self._numbers[key] = Init.param_id, modules[0]
            if sharded:
                self._sharded_linear = F.linear
            F.linear = linear
            comm.cdb, groups._WORLD_GROUP, Init.param_id, modules[0] = before


# Methods of deepspeed.comm.torch.TorchBackend that all ranks of a group call together.
_COLLECTIVE = re.compile("all_|barrier|broadcast|gather|inference_all_|monitored_barrier|reduce|scatter")
_ENDS = ("src", "dst")
_GROUP_POSITION = 2  # where deepspeed.comm passes the group by position (all_reduce and its relatives)


class EngineWorld:
    """DeepSpeed's communication backend, where `ranks` are the world: they count from 0, no group means them all."""

    def __init__(self, backend: Any, ranks: tuple[int, ...], group: dist.ProcessGroup, meter: Meter) -> None:
        self._backend, self._ranks, self._group, self._meter = backend, ranks, group, meter

    def get_world_group(self) -> dist.ProcessGroup:
        return self._group

    def get_world_size(self, group: Any = None) -> int:
        return self._backend.get_world_size(group or self._group)

    def get_rank(self, group: Any = None) -> int:
        return self._backend.get_rank(group or self._group)

    def get_global_rank(self, group: Any, group_rank: int) -> int:
        return self._ranks.index(self._backend.get_global_rank(group, group_rank))

    def new_group(self, ranks: Iterable[int]) -> Any:
        raise NotImplementedError(f"DeepSpeed asks for a group of {list(ranks)}, which all ranks would have to make")

    def __getattr__(self, name: str) -> Any:
        """Asked for once per name: what is found is kept."""
        method = getattr(self._backend, name)
        if _COLLECTIVE.match(name):
            method = self._confined(name, method)
        self.__dict__[name] = method
        return method

    def _confined(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, counted, with this group where none is named, and ranks of the world for its ends."""
        counted = re.sub("(_into)?_tensor", "", name)

        def called(*args: Any, **kwargs: Any) -> Any:
            if len(args) > _GROUP_POSITION:
                args = (*args[:_GROUP_POSITION], args[_GROUP_POSITION] or self._group, *args[_GROUP_POSITION + 1 :])
            else:
                kwargs["group"] = kwargs.get("group") or self._group
            kwargs |= {end: self._ranks[kwargs[end]] for end in _ENDS if kwargs.get(end) is not None}
            with self._meter.collective(counted, self._ranks, _moved_bytes((*args, *kwargs.values()))) as entered:
                result = method(*args, **kwargs)
            return _Awaited(result, counted, self._ranks, self._meter, entered) if hasattr(result, "wait") else result

        return called


class _Awaited:
    """The handle of a collective that runs on; what counts is how long `wait` holds this rank up."""

    def __init__(self, work: Any, name: str, ranks: tuple[int, ...], meter: Meter, called: Any) -> None:
        self._work, self._name, self._ranks, self._meter, self._called = work, name, ranks, meter, called

    def wait(self, *args: Any) -> Any:
        with self._meter.collective(self._name, self._ranks, called=self._called):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _moved_bytes(arguments: Iterable[Any]) -> int:
    """Of a collective's whole result or input, whichever is larger."""
    tensors = [[x] if isinstance(x, Tensor) else x for x in arguments if isinstance(x, Tensor | list)]
    sizes = [sum(t.nbytes for t in some) for some in tensors if all(isinstance(t, Tensor) for t in some)]
    return max(sizes, default=0)
