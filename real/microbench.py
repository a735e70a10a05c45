"""torchrun --nproc-per-node N -m real.microbench --out bench.json [--quick] [--nic-bytes-per-second B]

Measures on the ranks that torchrun started (gloo on CPUs, NCCL on GPUs) what the cost model needs of a machine, for
`rlhfsim calibrate`: kernels as the models of real runs use them, passes of whole models, DeepSpeed's engines, decode
steps of the generation loop, collectives, host copies. All ranks measure at the same time, as they work at the same
time in a run: what they share (memory bandwidth, the machine's power) is shared here too. The first calls are
discarded; each row has the median of the others, and the range that holds the middle 80 % of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from rlhfsim import bench as bench_file
from rlhfsim.bench import Row
from rlhfsim.layout import Holding
from rlhfsim.rollouts import request
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Algorithm, ModelUse, WeightSync
from rlhfsim.spec.yaml_file import read_yaml

from . import generate, models
from .engines import Engine, WholeCopy
from .groups import Groups
from .meter import Meter

# Weights and KV caches take turns, so that they lie in caches or memory as those of a whole model do: of width / 64
# layers (as tiny-2x128 to small-8x512, and twice as many as Llama-2-7B). Between two uses of a weight go 18 width^2
# numbers a layer: 12 of other matrices, and half as much again of embeddings, KV cache and activations. At most so many
# bytes.
WIDTH_PER_LAYER, LAYER_SQUARES, ROTATED_BYTES = 64, 18, 1 << 30
WINDOW_SECONDS = 100e-6  # calls quicker than this are timed several at a time
LONGEST_SECONDS = 0.3  # of a call for which a still larger one is measured
DISCARDED = 2  # passes and steps before those that count
LOG_SOFTMAX_BYTES, ADAM_BYTES = 14, 28  # as rlhfsim.costs.operators charges for a logit and a parameter
Pairs = list[tuple[int, int]]
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")


class Bench:
    """The rows measured so far, and this rank among the others. seconds: spent on each row."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick, self.seconds = device, quick, 0.02 if quick else 0.15
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self.dtype = models.DTYPES[self.precision]
        self.rows: dict[str, list[Row]] = defaultdict(list)
        everyone, leaders = tuple(range(self.ranks)), tuple(range(0, self.ranks, self.per_node))
        inside = [everyone[:n] for n in (2, 4, 8, 16) if n < self.per_node] + [everyone[: self.per_node]]
        self.sets = [s for s in inside if len(s) > 1] + ([leaders] if len(leaders) > 1 else [])
        self.groups = Groups(self.rank, [*self.sets, everyone, *((r,) for r in everyone)], Meter(device))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, table: str, row: Row, run: Callable[..., object], *args: Any, ranks: tuple[int, ...] = ()) -> float:
        """One row: `run(*args)`. ranks: those that run it together, equally often; without any, each on its own.

        Returns the seconds of one call, 0 on the ranks that do not make it.
        """
        dist.barrier()
        if ranks and self.rank not in ranks:
            return 0.0
        run(*args)
        start = self.clock()
        run(*args)
        once = self.clock() - start
        if ranks:
            once = float(self.groups.all_reduce(torch.tensor(once, device=self.device), ranks, dist.ReduceOp.MAX))
        inner = max(1, min(1000, int(WINDOW_SECONDS / max(once, 1e-7))))
        found = []
        for _ in range(max(5, min(200, int(self.seconds / (once * inner))))):
            start = self.clock()
            for _ in range(inner):
                run(*args)
            found.append((self.clock() - start) / inner)
        self.add(table, row, found)
        return once

    def add(self, table: str, row: Row, seconds: list[float]) -> None:
        low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
        self.rows[table].append(row | {"seconds": middle, "low": low, "high": high, "repeats": len(seconds)})

    def gathered(self) -> dict[str, list[Row]]:
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, dict(self.rows))
        return bench_file.merged(everyone)

    def gemm(self, shapes: Pairs, tokens: list[int]) -> None:
        """Linear layers (n outputs, k inputs), and their weight gradients, for so many tokens m."""
        for n, k in shapes:
            model = LAYER_SQUARES * min(n, k) ** 3 // WIDTH_PER_LAYER
            copies = max(1, min(model // (n * k), ROTATED_BYTES // (n * k * self.dtype.itemsize)))
            weights = cycle([self.random(n, k) for _ in range(copies)])
            row = {"weights_bytes": copies * n * k * self.dtype.itemsize * 12 // LAYER_SQUARES}
            for m in tokens:
                x, dy = self.random(m, k), self.random(m, n)
                self.timed("gemm", row | {"m": m, "n": n, "k": k}, lambda: F.linear(x, next(weights)))
                if m > 8:  # the tokens are summed over
                    over_tokens = row | {"m": n, "n": k, "k": m}
                    self.timed("weight_gradient", over_tokens, lambda: torch.matmul(dy.t(), x, out=next(weights)))

    def attention(self, heads: list[tuple[int, int, int]], prefill: Pairs, decode: Pairs) -> None:
        """(heads, kv_heads, head_dim); (batch, tokens of each sequence): whole ones, or in the cache that is read."""
        for h, kv, d in heads:
            shape = {"heads": h, "kv_heads": kv, "head_dim": d}
            config = models.config_of(load_model("tiny-4x256").model_copy(update=shape))
            module = llama.LlamaAttention(config, 0)
            for batch, tokens in prefill:
                q, k, v = (self.random(batch, tokens, x, d).transpose(1, 2).requires_grad_() for x in (h, kv, kv))
                row = shape | {"batch": batch, "tokens": tokens}
                with torch.no_grad():
                    self.timed("prefill", row, models.attention, module, q, k, v, None)
                out, _ = models.attention(module, q, k, v, None)
                self.timed("prefill_backward", row, torch.autograd.grad, out, (q, k, v), torch.ones_like(out), True)
            for batch, tokens in decode:
                size = 2 * batch * tokens * kv * d * self.dtype.itemsize
                between = LAYER_SQUARES * (h * d) ** 3 // WIDTH_PER_LAYER * self.dtype.itemsize
                layers = config.num_hidden_layers = max(1, min(-(-between // size), ROTATED_BYTES // size))
                cache = generate.Cache(config, batch, tokens, self.dtype, self.device)
                cache.use(slice(batch), torch.full((batch,), tokens - 1, device=self.device), tokens)
                q, k, v = (self.random(batch, x, 1, d) for x in (h, kv, kv))
                row, layer = shape | {"batch": batch, "tokens": tokens}, cycle(range(layers))

                def attend() -> object:
                    return models.attention(module, q, *cache.update(k, v, next(layer)), None)

                with torch.no_grad():
                    self.timed("decode", row, attend)

    @torch.no_grad()
    def memory(self, widths: list[int], tokens: list[int], vocabulary: int) -> None:
        """Streaming kernels; `bytes` are those that rlhfsim.costs.operators charges for them."""
        size = self.dtype.itemsize
        for m in tokens:
            for width in widths:
                x, y = self.random(1, m, width), self.random(1, m, width)
                heads = self.random(1, m, width // 32, 32).transpose(1, 2)  # as projections leave them
                angle = self.random(1, m, 32)
                norm = llama.LlamaRMSNorm(width).to(self.device, self.dtype)
                table, ids = self.random(vocabulary, width), torch.randint(vocabulary, (1, m), device=self.device)
                whole = m * width * size
                self.stream("residual_add", 3 * whole, torch.add, x, y)
                self.stream("rms_norm", 2 * whole, norm, x)
                self.stream("rope", 4 * whole, llama.apply_rotary_pos_emb, heads, heads, angle, angle)
                self.stream("gated_activation", 3 * whole, lambda: F.silu(x) * y)
                self.stream("embedding", 2 * whole, F.embedding, ids, table)
            logits, targets = self.random(m, vocabulary), torch.randint(vocabulary, (m, 1), device=self.device)

            def log_probs() -> Tensor:  # as `LanguageHead` takes them
                exact = logits.float()
                return exact.gather(-1, targets) - exact.logsumexp(-1, keepdim=True)

            self.stream("cross_entropy", LOG_SOFTMAX_BYTES * m * vocabulary, log_probs)

    def stream(self, kernel: str, moved: int, run: Callable[..., object], *args: Any) -> None:
        self.timed("memory", {"kernel": kernel, "bytes": moved}, run, *args)

    def optimizer(self, parameters: list[int]) -> None:
        for count in parameters:
            weights = torch.zeros(count, device=self.device, requires_grad=True)
            weights.grad = torch.ones_like(weights)
            self.stream("optimizer", ADAM_BYTES * count, torch.optim.Adam([weights], lr=1e-5).step)

    def passes(self, shape: ModelSpec, batches: Pairs, backend: str, zero_stage: int) -> None:
        """Scoring, forward, backward and update of a model on all ranks; in plain torch each rank has its own model."""
        ranks = tuple(range(self.ranks)) if backend == "deepspeed" else (self.rank,)
        use = self._use(shape, zero_stage=zero_stage, recompute="none", backend=backend)
        module = models.build("actor", use, 0, lm=True, value=False, train=True)
        engine = Engine(Holding("actor", use, "train", ranks), module, self.groups, Algorithm())
        row = _about(shape) | {"backend": backend, "zero_stage": zero_stage, "ranks": len(ranks)}
        with engine.session():
            for batch, tokens in batches:
                ids = torch.randint(shape.vocabulary, (batch, tokens), device=self.device)
                self._phases(engine, row | {"batch": batch, "tokens": tokens}, ids)
        if engine.sharded:  # what the hybrid engine does before it generates
            whole = WholeCopy(engine, WeightSync().bucket_bytes)

            def gather() -> None:
                with whole.session():
                    pass

            self._repeated({"gather": gather}, row | {"batch": 1, "tokens": 1})
        engine.close()

    def _use(self, shape: ModelSpec, **more: Any) -> ModelUse:
        return ModelUse(spec=shape.name, shape=shape, precision=self.precision, **more)

    def _phases(self, engine: Engine, row: Row, ids: Tensor) -> None:
        """In the order of PPO: forward passes alone come before each update (DeepSpeed takes longer for the first)."""
        positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape[0], -1)
        loss = torch.zeros(())

        def score() -> None:
            with torch.no_grad():
                engine.module(ids, positions)

        def forward() -> None:
            nonlocal loss
            loss = engine.callable(ids, positions)["log_probs"].mean()

        def backward() -> None:
            engine.backward(loss, True)

        runs = {"score": score, "score_again": score, "forward": forward, "backward": backward, "step": engine.step}
        self._repeated(runs, row)

    def _repeated(self, runs: dict[str, Callable[[], object]], row: Row) -> None:
        """All runs in turn, again and again; a row for each, with the collectives of its last time."""
        found, moved = defaultdict(list), {}
        for k in range(DISCARDED + (2 if self.quick else 10)):
            for phase, run in runs.items():
                dist.barrier()
                self.groups.meter.begin()
                start = self.clock()
                run()
                if k >= DISCARDED:
                    found[phase].append(self.clock() - start)
                moved[phase] = {op: [len(b), sum(b)] for op, b in self.groups.meter.sent_bytes.items()}
        for phase, seconds in found.items():
            self.add("passes", row | {"phase": phase, "collectives": moved[phase]}, seconds)

    @torch.no_grad()
    def decode_steps(self, shape: ModelSpec, rows: list[int], prompt: int, steps: int) -> None:
        """Steps of the generation loop, with equally long sequences: each after the first adds a token to all."""
        module = models.build("actor", self._use(shape), 0, lm=True, value=False, train=False).to(self.device)
        for count in rows:
            requests = [request((0, 0), s, s, prompt, steps, shape.vocabulary) for s in range(count)]
            options = {"rows": count, "continuous": False, "log_probs": True, "device": self.device}
            loop = generate.Generation(module, requests, **options)
            found = []
            dist.barrier()
            while loop.busy:
                start = self.clock()
                loop.step()
                found.append(self.clock() - start)
            row = _about(shape) | {"rows": count, "tokens": prompt + (steps + 1) / 2}
            self.add("decode_step", row, found[DISCARDED:])

    def collectives(self, sizes: list[int]) -> None:
        """`bytes`: a rank's whole buffer, as large as the link makes bearable. `nodes`: on how many machines they are.

        op `send`: there and back, two calls.
        """
        for ranks in self.sets:
            nodes = 1 + (max(ranks) - min(ranks)) // self.per_node
            for op in (*COLLECTIVES, "send") if len(ranks) == 2 else COLLECTIVES:
                for size in sizes:
                    part = torch.zeros(size // 4 // len(ranks), device=self.device)
                    whole = torch.zeros(len(part) * len(ranks), device=self.device)
                    row = {"ranks": len(ranks), "nodes": nodes, "bytes": whole.nbytes, "op": op}
                    row |= {"calls": 2} if op == "send" else {}
                    run = self._collective(op, whole, part, ranks)
                    once = torch.tensor(self.timed("collectives", row, run, ranks=ranks))
                    dist.all_reduce(once, dist.ReduceOp.MAX)
                    if once > LONGEST_SECONDS:
                        break

    def _collective(self, op: str, whole: Tensor, part: Tensor, ranks: tuple[int, ...]) -> Callable[[], object]:
        calls: dict[str, Callable[..., object]] = {
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
            "all_reduce": partial(dist.all_reduce, whole),
            "broadcast": partial(dist.broadcast, whole, ranks[0]),
            "send": partial(self._there_and_back, whole, ranks),
        }
        return partial(calls[op], group=self.groups.of(ranks))

    def _there_and_back(self, whole: Tensor, ranks: tuple[int, ...], group: dist.ProcessGroup) -> None:
        first = self.rank == ranks[0]
        for away in (True, False):
            (dist.send if first == away else dist.recv)(whole, ranks[first], group=group)

    def copies(self, sizes: list[int]) -> None:
        """Between host and device memory, pinned; on a CPU there is only the host's memory."""
        for size in sizes:
            a, b = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8, device=self.device)
            if self.device.type == "cuda":
                a = a.pin_memory()
                self.timed("copies", {"op": "from_host", "bytes": size}, b.copy_, a, True)
                self.timed("copies", {"op": "to_host", "bytes": size}, a.copy_, b, True)
            self.stream("copy", 2 * size, torch.zeros_like(b).copy_, b)


def _about(shape: ModelSpec) -> Row:
    """A shape without its texts."""
    known = shape.model_dump(exclude_defaults=True)
    return {"model": shape.name, "shape": {k: v for k, v in known.items() if isinstance(v, bool | int)}}


def measure(bench: Bench, links_only: bool = False) -> None:
    """What `grids.yaml` lists for this device."""
    grid = read_yaml(Path(__file__).with_name("grids.yaml")).data["quick" if bench.quick else bench.device.type]
    bench.collectives(grid["collective_bytes"])
    if links_only:
        return
    bench.gemm(grid["gemms"], grid["gemm_tokens"])
    prefill, decode = (list(product(*grid[name])) for name in ("prefill", "decode"))
    bench.attention(grid["heads"], prefill, decode)
    bench.memory(grid["widths"], grid["memory_tokens"], 1024)
    bench.optimizer(grid["optimizer_parameters"])
    bench.copies(grid["copy_bytes"])
    for shape in map(load_model, grid["models"]):
        bench.passes(shape, grid["torch_batches"], "torch", 0)
        for stage in grid["zero_stages"]:
            bench.passes(shape, grid["deepspeed_batches"], "deepspeed", stage)
        bench.decode_steps(shape, grid["decode_rows"], grid["decode_prompt"], grid["decode_steps"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="real.microbench", description="Measure a machine for `rlhfsim calibrate`.")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it works")
    parser.add_argument("--links-only", action="store_true", help="collectives alone, for one more network")
    parser.add_argument("--nic-bytes-per-second", type=float, help="nominal rate between machines, one direction")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir() or options.out.is_dir():
        print(f"real.microbench: --out: {str(options.out)!r} is no file in a folder that exists", file=sys.stderr)
        return 2
    device, gpu = torch.device("cpu"), None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        gpu = torch.cuda.get_device_properties(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer names of collectives, which older torch lacks
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    started, before, bench = time.time(), bench_file.clocks(device.type), Bench(device, options.quick)
    measure(bench, options.links_only)
    tables = bench.gathered()
    if bench.rank == 0:
        clocks = [before, bench_file.clocks(device.type)]
        about = {"clocks": clocks, "precision": bench.precision, "quick": options.quick, "ranks": bench.ranks}
        about |= {"ranks_per_node": bench.per_node, "nic_bytes_per_second": options.nic_bytes_per_second}
        seconds = bench_file.write(options.out, tables, about, bench_file.machine(gpu), started)
        print(f"{sum(map(len, tables.values()))} rows in {seconds:.1f} s: {options.out}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
