"""torchrun --nproc-per-node N -m real.microbench --out bench.json [--quick] [--nic-bytes-per-second B]

Measures on the ranks that torchrun started (gloo on CPUs, NCCL on GPUs) what the cost model needs of a machine, for
`rlhfsim calibrate`: kernels as the models of real runs use them, passes of whole models, DeepSpeed's engines, decode
steps of the generation loop, collectives, host copies. All ranks measure at the same time, as they work at the same time
in a run: what they share (memory bandwidth, the machine's power) is shared here too. Calls before a clock is read are
discarded; each row has the median of the repeats, and the range that holds the middle 80 % of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from rlhfsim.layout import Holding
from rlhfsim.spec.model_spec import ModelSpec, load_model
from rlhfsim.spec.scenario import Algorithm, ModelUse

from . import generate, models
from .engines import Engine
from .groups import Groups
from .meter import Meter

VERSION = 1
LAYERS_ROTATED, ROTATED_BYTES = 8, 1 << 28  # weights that take turns, as in a model of so many layers; at most so much
WINDOW_SECONDS = 100e-6  # calls quicker than this are timed several at a time


class Counter(Meter):
    """A meter that also tells collectives apart: payload bytes of each call, by name."""

    def begin(self) -> None:
        super().begin()
        self.bytes_by_name: dict[str, list[int]] = defaultdict(list)

    @contextmanager
    def collective(self, name: str, ranks: tuple[int, ...], sent_bytes: int = 0, called: Any = None) -> Iterator[Any]:
        if called is None:
            self.bytes_by_name[name.removesuffix("_tensor").removesuffix("_into")].append(sent_bytes)
        with super().collective(name, ranks, sent_bytes, called) as entered:
            yield entered


class Bench:
    """The rows measured so far, and this rank among the others. seconds: spent on each row."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.quick, self.seconds = device, quick, 0.02 if quick else 0.25
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.per_node = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        self.dtype = models.DTYPES[self.precision]
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        everyone, leaders = tuple(range(self.ranks)), tuple(range(0, self.ranks, self.per_node))
        inside = [everyone[:n] for n in (2, 4, 8, 16) if n < self.per_node] + [everyone[: self.per_node]]
        self.sets = [s for s in inside if len(s) > 1] + ([leaders] if len(leaders) > 1 else [])
        self.counter = Counter(device)
        self.groups = Groups(self.rank, [*self.sets, everyone, *((r,) for r in everyone)], self.counter)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, table: str, row: dict[str, Any], run: Callable[[], object], ranks: tuple[int, ...] = ()) -> None:
        """One row. ranks: those that run it together, the same number of times; without any, each on its own."""
        dist.barrier()
        if ranks and self.rank not in ranks:
            return
        run()
        start = self.clock()
        run()
        once = self.clock() - start
        if ranks:
            once = float(self.groups.all_reduce(torch.tensor(once, device=self.device), ranks, dist.ReduceOp.MAX))
        inner = max(1, min(1000, int(WINDOW_SECONDS / max(once, 1e-7))))
        found = []
        for _ in range(max(5, min(200, int(self.seconds / (once * inner))))):
            start = self.clock()
            for _ in range(inner):
                run()
            found.append((self.clock() - start) / inner)
        self.add(table, row, found)

    def add(self, table: str, row: dict[str, Any], seconds: list[float]) -> None:
        low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)).tolist()
        self.rows[table].append(row | {"seconds": middle, "low": low, "high": high, "repeats": len(seconds)})

    def gathered(self) -> dict[str, list[dict[str, Any]]]:
        """Medians over the ranks that have a row (they agree on what it is), with the ranks' full range."""
        rows: list[Any] = [None] * self.ranks
        dist.all_gather_object(rows, dict(self.rows))
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for table in dict.fromkeys(name for own in rows for name in own):
            same: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for row in (row for own in rows for row in own.get(table, [])):
                same[json.dumps({k: v for k, v in row.items() if k not in ("seconds", "low", "high", "repeats")})].append(row)
            for rank_rows in same.values():
                found[table].append(rank_rows[0] | {
                    "seconds": float(np.median([r["seconds"] for r in rank_rows])),
                    "low": min(r["low"] for r in rank_rows), "high": max(r["high"] for r in rank_rows)})
        return found

    # -- kernels ------------------------------------------------------------------------------------------

    def gemm(self, shapes: list[tuple[int, int]], tokens: list[int]) -> None:
        """Linear layers (n outputs, k inputs), and their weight gradients, for so many tokens m."""
        for n, k in shapes:
            copies = max(1, min(LAYERS_ROTATED, ROTATED_BYTES // (n * k * self.dtype.itemsize)))
            weights, turn = [self.random(n, k) for _ in range(copies)], iter(range(1 << 62))
            for m in tokens:
                x, dy = self.random(m, k), self.random(m, n)
                self.timed("gemm", {"m": m, "n": n, "k": k}, lambda: F.linear(x, weights[next(turn) % copies]))
                if m > 8:  # dy^T x: the tokens are summed over
                    self.timed("weight_gradient", {"m": n, "n": k, "k": m}, lambda: dy.t() @ x)

    def attention(self, heads: list[tuple[int, int, int]], prefill: list[tuple[int, int]], decode: list[tuple[int, int]]) -> None:
        """(heads, kv_heads, head_dim); (batch, tokens of each sequence): whole ones, or in the cache that is read."""
        for h, kv, d in heads:
            shape = {"heads": h, "kv_heads": kv, "head_dim": d}
            module = llama.LlamaAttention(models.config_of(spec(heads=h, kv_heads=kv, head_dim=d)), 0)
            for batch, tokens in prefill:
                q, k, v = (self.random(batch, x, tokens, d).requires_grad_() for x in (h, kv, kv))
                row = shape | {"batch": batch, "tokens": tokens}
                with torch.no_grad():
                    self.timed("prefill", row, lambda: models.attention(module, q, k, v, None))
                out, _ = models.attention(module, q, k, v, None)
                grad = torch.ones_like(out)
                self.timed("prefill_backward", row, lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
            for batch, tokens in decode:
                cache = generate.Cache(module.config, batch, tokens, self.dtype, self.device)
                cache.decode(torch.full((batch,), tokens - 1, device=self.device), tokens)
                q, k, v = (self.random(batch, x, 1, d) for x in (h, kv, kv))
                with torch.no_grad():
                    self.timed("decode", shape | {"batch": batch, "tokens": tokens},
                               lambda: models.attention(module, q, *cache.update(k, v, 0), None))

    @torch.no_grad()
    def memory(self, widths: list[int], tokens: list[int], vocabulary: int) -> None:
        """Streaming kernels; `bytes` are those that rlhfsim.costs.operators charges for them."""
        size = self.dtype.itemsize
        for m in tokens:
            for width in widths:
                x, y = self.random(1, m, width), self.random(1, m, width)
                heads = self.random(1, width // 32, m, 32)
                angle = self.random(1, m, 32)
                norm = llama.LlamaRMSNorm(width).to(self.device, self.dtype)
                table, ids = self.random(vocabulary, width), torch.randint(vocabulary, (1, m), device=self.device)
                whole = m * width * size
                kernels: dict[str, tuple[float, Callable[[], object]]] = {
                    "residual_add": (3 * whole, lambda: x + y), "rms_norm": (2 * whole, lambda: norm(x)),
                    "rope": (4 * whole, lambda: llama.apply_rotary_pos_emb(heads, heads, angle, angle)),
                    "gated_activation": (3 * whole, lambda: F.silu(x) * y),
                    "embedding": (2 * whole, lambda: F.embedding(ids, table))}
                for kernel, (moved, run) in kernels.items():
                    self.timed("memory", {"kernel": kernel, "bytes": moved}, run)
            logits, targets = self.random(m, vocabulary), torch.randint(vocabulary, (m, 1), device=self.device)
            # 14 bytes a logit, whatever the precision (LOG_SOFTMAX_BYTES)
            self.timed("memory", {"kernel": "cross_entropy", "bytes": 14 * m * vocabulary},
                       lambda: logits.float().gather(-1, targets) - logits.float().logsumexp(-1, keepdim=True))

    def optimizer(self, parameters: list[int]) -> None:
        for count in parameters:
            weights = torch.zeros(count, device=self.device, requires_grad=True)
            weights.grad = torch.ones_like(weights)
            adam = torch.optim.Adam([weights], lr=1e-5)
            self.timed("memory", {"kernel": "optimizer", "bytes": 28 * count}, adam.step)

    # -- models -------------------------------------------------------------------------------------------

    def passes(self, shape: ModelSpec, batches: list[tuple[int, int]], backend: str, zero_stage: int, repeats: int) -> None:
        """Scoring, forward, backward and update of a model on all ranks; plain torch: each rank its own, no collectives."""
        ranks = tuple(range(self.ranks)) if backend == "deepspeed" else (self.rank,)
        use = ModelUse(spec=shape.name, shape=shape, precision=self.precision, zero_stage=zero_stage, recompute="none",
                       backend=backend)  # type: ignore[arg-type]
        module = models.build("actor", use, 0, lm=True, value=False, train=True)
        engine = Engine(Holding("actor", use, "train", ranks), module, self.groups, Algorithm())
        names = ("score", "forward", "backward", "step")
        with engine.session():
            for batch, tokens in batches:
                ids = torch.randint(shape.vocabulary, (batch, tokens), device=self.device)
                positions = torch.arange(tokens, device=self.device).expand(batch, -1)
                loss, found, moved = torch.zeros(()), defaultdict(list), {}

                def score() -> None:
                    with torch.no_grad():
                        engine.module(ids, positions)

                def forward() -> None:
                    nonlocal loss
                    loss = (engine.engine if engine.deepspeed else engine.module)(ids, positions)["log_probs"].mean()

                runs = (score, forward, lambda: engine.backward(loss, True), engine.step)
                for k in range(repeats + 2):
                    for name, run in zip(names, runs, strict=True):
                        dist.barrier()
                        self.counter.begin()
                        start = self.clock()
                        run()
                        if k >= 2:
                            found[name].append(self.clock() - start)
                        moved[name] = {op: [len(b), sum(b)] for op, b in self.counter.bytes_by_name.items()}
                for name in names:
                    self.add("passes", {"model": shape.name, "shape": _numbers(shape), "backend": backend, "phase": name,
                                        "zero_stage": zero_stage, "batch": batch, "tokens": tokens, "ranks": len(ranks),
                                        "collectives": moved[name]}, found[name])
        if engine.deepspeed:
            engine.engine.destroy()

    @torch.no_grad()
    def decode_steps(self, shape: ModelSpec, rows: list[int], prompt: int, steps: int) -> None:
        """Steps of the generation loop, with equally long sequences: each after the first adds a token to all."""
        use = ModelUse(spec=shape.name, shape=shape, precision=self.precision)
        module = models.build("actor", use, 0, lm=True, value=False, train=False).to(self.device)
        for count in rows:
            requests = [generate.request((0, 0), s, s, prompt, steps, shape.vocabulary) for s in range(count)]
            loop = generate.Generation(module, module.body.config, requests, rows=count, continuous=False, log_probs=True,
                                       dtype=self.dtype, device=self.device)
            found = []
            dist.barrier()
            while loop.busy:
                start = self.clock()
                loop.step()
                found.append(self.clock() - start)
            row = {"model": shape.name, "shape": _numbers(shape), "rows": count}
            self.add("decode_step", row | {"tokens": prompt + (steps + 1) / 2}, found[2:])

    # -- links --------------------------------------------------------------------------------------------

    def collectives(self, sizes: list[int]) -> None:
        """`bytes`: a rank's whole buffer. `nodes`: on how many machines the ranks are."""
        for ranks in self.sets:
            group, n = self.groups.of(ranks), len(ranks)
            for size in sizes:
                whole = torch.zeros(size // n * n, dtype=torch.uint8, device=self.device)
                part, floats = torch.zeros(size // n, dtype=torch.uint8, device=self.device), whole[: size // 4 // n * 4 * n].view(torch.float32)
                share = torch.zeros(len(floats) // n, device=self.device)

                def send(whole: Tensor = whole, ranks: tuple[int, ...] = ranks, group: Any = group) -> None:
                    """There and back."""
                    first = self.rank == ranks[0]
                    for away in (True, False):
                        (dist.send if first == away else dist.recv)(whole, ranks[1 if first else 0], group=group)

                runs: dict[str, Callable[[], object]] = {
                    "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
                    "reduce_scatter": lambda: dist.reduce_scatter_tensor(share, floats, group=group),
                    "all_reduce": lambda: dist.all_reduce(floats, group=group),
                    "broadcast": lambda: dist.broadcast(whole, ranks[0], group=group)}
                row = {"ranks": n, "nodes": 1 + (max(ranks) - min(ranks)) // self.per_node, "bytes": size // n * n}
                for op, run in runs.items():
                    self.timed("collectives", row | {"op": op}, run, ranks)
                if n == 2:
                    self.timed("collectives", row | {"op": "send", "calls": 2}, send, ranks)

    def copies(self, sizes: list[int]) -> None:
        """Between host and device memory, pinned; on a CPU there is only the host's memory."""
        for size in sizes:
            a, b = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8, device=self.device)
            if self.device.type == "cuda":
                a = a.pin_memory()
                self.timed("copies", {"op": "from_host", "bytes": size}, lambda: b.copy_(a, non_blocking=True))
                self.timed("copies", {"op": "to_host", "bytes": size}, lambda: a.copy_(b, non_blocking=True))
            c = torch.zeros_like(b)
            self.timed("memory", {"kernel": "copy", "bytes": 2 * size}, lambda: c.copy_(b))


def spec(**changes: Any) -> ModelSpec:
    return load_model("tiny-4x256").model_copy(update=changes)


def _numbers(shape: ModelSpec) -> dict[str, Any]:
    """A shape without its texts."""
    return {k: v for k, v in shape.model_dump(exclude_defaults=True).items() if isinstance(v, bool | int)}


def measure(bench: Bench) -> None:
    cuda, quick = bench.device.type == "cuda", bench.quick
    widths = [128, 256] if quick else [1024, 2048, 4096] if cuda else [128, 256, 512]
    tokens = [8, 64, 256] if quick else [1, 8, 64, 256, 1024, 4096, 16384] if cuda else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    shapes = [(n, k) for w in widths for n, k in ((3 * w, w), (w, w), (11 * w // 4, w), (w, 11 * w // 4))]
    bench.gemm(shapes[::2] if quick else [*shapes, (1024, widths[0]), (1024, widths[-1])], tokens)
    heads = [(4, 4, 32)] if quick else [(16, 16, 128), (32, 8, 128)] if cuda else [(4, 4, 32), (4, 4, 64), (8, 8, 64)]
    batches = [(1, 16), (4, 32)] if quick else [(b, t * (16 if cuda else 1)) for b in (1, 4, 16) for t in (16, 64, 128, 256)]
    bench.attention(heads, batches, batches if quick else [*batches, (2, 64), (8, 64), (32, 64)])
    bench.memory(widths, tokens[1::2] if not quick else tokens[:2], 1024)
    bench.optimizer([10**4, 10**6] if quick else [10**4, 10**5, 10**6, 4 * 10**6, 16 * 10**6])
    bench.copies([1 << 20] if quick else [1 << 16, 1 << 20, 1 << 24, 1 << 26])
    sizes = [1 << 12, 1 << 18] if quick else [1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
    bench.collectives(sizes)
    names = ["tiny-2x128"] if quick else ["tiny-2x128", "tiny-4x256", "small-8x512"]
    if cuda and not quick:
        names = ["small-8x512", "qwen2.5-0.5b"]
    for shape in map(load_model, names):
        bench.passes(shape, [(2, 16)] if quick else [(1, 32), (4, 64), (4, 128)], "torch", 0, 2 if quick else 10)
        for stage in (0, 3) if quick else (0, 1, 2, 3):
            bench.passes(shape, [(2, 16)] if quick else [(4, 64)], "deepspeed", stage, 2 if quick else 10)
        bench.decode_steps(shape, [2, 4] if quick else [1, 4, 16, 32], 16 if quick else 64, 6 if quick else 32)


# --- the machine -----------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on, as far as it can be read."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    found: dict[str, Any] = {
        "device": "cpu", "name": next((v.strip() for k, v in fields.items() if k.strip() == "model name"), platform.processor()),
        "cores": os.cpu_count(), "multiprocessors": 1, "clocks": next((v.strip() for k, v in fields.items() if k.strip() == "cpu MHz"), None),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "transformers", "deepspeed")}}
    found["memory_bytes"] = found["host_memory_bytes"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu", "--format=csv,noheader"]
        found |= {"device": "cuda", "name": properties.name, "multiprocessors": properties.multi_processor_count,
                  "memory_bytes": properties.total_memory}
        with nullcontext() if os.access("/usr/bin/nvidia-smi", os.X_OK) else contextmanager(lambda: iter([None]))():
            found["clocks"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="real.microbench", description="Measure this machine for `rlhfsim calibrate`.")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it works")
    parser.add_argument("--nic-bytes-per-second", type=float, help="nominal rate between machines, one direction")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir() or options.out.is_dir():
        print(f"real.microbench: --out: {str(options.out)!r} is no file in a folder that exists", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    started, before, bench = time.time(), machine(device), Bench(device, options.quick)
    measure(bench)
    tables = bench.gathered()
    if bench.rank == 0:
        found = {"kind": "rlhfsim microbench", "version": VERSION, "machine": before | {"clocks_after": machine(device)["clocks"]},
                 "precision": bench.precision, "ranks": bench.ranks, "ranks_per_node": bench.per_node, "quick": options.quick,
                 "nic_bytes_per_second": options.nic_bytes_per_second, "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime(started)),
                 "seconds": round(time.time() - started, 1), "tables": tables}
        options.out.write_text(json.dumps(found, indent=1))
        print(f"{sum(map(len, tables.values()))} rows in {found['seconds']} s: {options.out}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
