"""Seconds of generating responses: prefill and decode steps of static and continuous engines, and their transfers.

`engine.py` says what every step contains; here each step is given seconds. A decode step is

    layers x (products for one token per sequence + attention over the KV cache) + logits and sampling + host

where attention is nearly linear in the cached tokens, so a run of steps with the same sequences takes what its mean
step takes. A step that computes prompt tokens counts as prefill, also when other sequences decode in it.

The host's time (scheduling, sampling, detokenising) is serial with the device's, as in vLLM before it scheduled ahead
(vLLM blog, "vLLM v0.6.0", 2024-09: Llama-3-8B on H100 spent 29 % of the time in scheduling, 33 % in the API server).
For an engine that schedules one step ahead lower `overheads.decode_step_seconds`. Launches run ahead of the device: a
step without CUDA graphs takes the longer of both (unverified: how far eager launches and the host's rest overlap).

What drafts runs once over the tokens of a step (prompts too) and once more for each further draft, one token of every
decoding sequence at a time.

An engine with pipeline stages takes rounds of steps (see `stages.py`): one of every micro-batch in flight. Its runs are
of rounds, and so are its limits.

Not modelled: the vocabulary-parallel gather of logits, the all-reduces of what drafts, experts spread over several
engines (their all-to-all makes the engines meet at every layer).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil

import numpy as np

from rlhfsim.errors import InputError
from rlhfsim.memory import PREFETCH_PARAMETERS, state_blocks
from rlhfsim.model import parameters
from rlhfsim.spec.scenario import Effects, Generation, ModelUse

from .engine import Progress, Runs, continuous_runs, static_runs
from .kernels import Numbers
from .operators import EAGER_KERNELS_PER_LAYER, Operators, OperatorTime
from .passes import Layout, weight_tensors
from .run_seconds import RunSeconds
from .segment import Op, Segment, Transfer
from .stages import StageSteps, rounds

# Host time of one layer in an eager decode step. Hugging Face generate, Llama-2-7B, batch 4 on A800: (975.4 s - 91 s
# for the forward passes over the samples at half of peak) / (32 batches x 1024 steps) / 32 layers; OpenRLHF branch
# wuxibin/benchmark (8201f882), benchmark/README.md, DeepSpeed-Chat without offload. An upper bound: it contains the
# host's time between steps. ReaLHF's published plans without CUDA graphs give 1.2 to 1.4 ms (docs/source/images/vws.svg
# @be75fce9).
EAGER_DECODE_LAYER_SECONDS = 0.84e-3

# Host time of a continuous engine per step: vLLM 0.19, Llama-3.1-8B on RTX 4090, 2026-08 (casys-kaist/LLMServingSim,
# MIT): the mean step of 25.3 ms (35 sequences, 41 k cached tokens) takes 5.1 ms more than reading weights and cache at
# the datasheet's bandwidth, 2.2 ms (linear fit) to 5.3 ms (roofline) of it per step whatever the batch.
# How much is the host's was not separated: unverified.
ENGINE_STEP_SECONDS = 2.2e-3

# Host time per drawn token: 0 is unverified. Engines with serial post-processing in Python need more: 0.124 ms fits
# vLLM of the V0 era in eager mode (public verl log, Qwen2-7B GPG on 8 GPUs, 120 steps, residual 2.6 %).
ENGINE_SEQUENCE_SECONDS = 0.0

# Hugging Face's DynamicCache appends by torch.cat (transformers, cache_utils.py): the cache is read and written once
# more in each step besides the read of attention.
CONCATENATED_CACHE_TRAFFIC = 3

# With FlashAttention-2 and padding each layer then copies keys and values twice more, once to bring tokens before heads
# and once to gather those that are no padding (transformers 4.38.2, models/llama/modeling_llama.py,
# LlamaFlashAttention2._upad_input: a reshape of the transposed cache, index_first_axis).
UNPADDED_CACHE_TRAFFIC = CONCATENATED_CACHE_TRAFFIC + 4

# Kernels that unmerged LoRA adds to a layer: down and up at qkv, attention output, gate and up, down (unverified).
SERVED_LORA_KERNELS_PER_LAYER = 8

SHARED_BATCH = 16  # sequences behind the constant seconds per token of `effects.decode` off: enough to saturate
# Tensors between the stages of vLLM: hidden states and residual (vllm/model_executor/models/llama.py,
# IntermediateTensors), of which a tensor-parallel rank sends its share (vllm/distributed/parallel_state.py,
# send_tensor_dict). The gather of the shares on the other side is left out.
ENGINE_STAGE_TENSORS = 2

MAX_KINDS = 64  # of steps in a segment; more runs than that are averaged
LOW_OCCUPANCY = 0.1

BOUNDS = ("flops", "hbm", "launch", "host")
HOST = BOUNDS.index("host")
WAITS = HOST + 1  # a fifth row with pipeline stages: see `rounds`
LONGEST_CONTEXT = 1e12  # tokens: beyond every one


@dataclass(frozen=True)
class GenerationStats:
    """What one replica did. Seconds are compute (with the host's), without transfers.

    completion_seconds: one entry per sample, in the order given: when its response was there.
    timeline_seconds, timeline_running: `running` sequences from that instant on.
    prompt_tokens, decoded_tokens: that went through the layers, recomputed ones, padding and drafts included;
        sequence_steps is their sum. The first token of a response comes from its prefill. reused_tokens: of prompts,
        found in the cache.
    low_occupancy_share: of the time, with less than 10 % of the largest running batch.
    idle_seconds: with nothing to do but to wait for tools. tool_calls, tool_seconds: as in `Runs`.
    """

    completion_seconds: np.ndarray
    timeline_seconds: np.ndarray
    timeline_running: np.ndarray
    prefill_seconds: float
    decode_seconds: float
    bound: dict[str, float]
    prefill_steps: int
    decode_steps: int
    prompt_tokens: int
    decoded_tokens: int
    preemptions: int = 0
    recomputed_tokens: int = 0
    reused_tokens: int = 0
    idle_seconds: float = 0.0
    tool_calls: int = 0
    tool_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds + self.idle_seconds

    @property
    def sequence_steps(self) -> int:
        return self.prompt_tokens + self.decoded_tokens

    @property
    def low_occupancy_share(self) -> float:
        if not self.seconds:
            return 0.0
        low = self.timeline_running < LOW_OCCUPANCY * self.timeline_running.max()
        return float(self._durations[low].sum() / self.seconds)

    @property
    def sequence_seconds(self) -> float:
        """Seconds that sequences were running, all together: over `seconds`, the mean batch."""
        return float(self._durations @ self.timeline_running)

    @property
    def _durations(self) -> np.ndarray:
        return np.diff(self.timeline_seconds, append=self.seconds)


def generation_counts(stats: Sequence[GenerationStats], copies: int = 1) -> dict[str, float]:
    """What `copies` places with these replicas did, for `Span.counts`: sums over all replicas, but `most_running`.

    Seconds are the replicas' own, without transfers. sequence_seconds: the integral of the running sequences.
    """
    if not stats:
        return {}
    sums = {
        "replica_seconds": sum(s.seconds for s in stats),
        "low_occupancy_seconds": sum(s.low_occupancy_share * s.seconds for s in stats),
        "sequence_seconds": sum(s.sequence_seconds for s in stats),
        "preemptions": sum(s.preemptions for s in stats),
        "recomputed_tokens": sum(s.recomputed_tokens for s in stats),
    }
    if reused := sum(s.reused_tokens for s in stats):
        sums["reused_tokens"] = reused
    if any(s.tool_calls or s.idle_seconds for s in stats):
        for name in ("tool_calls", "tool_seconds", "idle_seconds"):
            sums[name] = sum(getattr(s, name) for s in stats)
    most = max(float(s.timeline_running.max(initial=0)) for s in stats)
    return {name: float(copies * value) for name, value in sums.items()} | {"most_running": most}


@dataclass(frozen=True)
class GenerationResult:
    """segments: what the simulator runs. stats: one entry per replica; empty with `effects.decode` off."""

    segments: list[Segment]
    stats: list[GenerationStats] = field(default_factory=list)


def route_samples(tokens: np.ndarray, engines: int, routing: str = "static") -> list[np.ndarray]:
    """Indices of the samples of each engine, in order.

    static: contiguous equal shares. least_loaded: each sample in turn goes to the engine with the fewest `tokens`
    (prompt + response) so far, as when engines fetch work one by one: optimistic for a router that sends all at once.
    """
    if routing == "static":
        return np.array_split(np.arange(len(tokens)), engines)
    shares: list[list[int]] = [[] for _ in range(engines)]
    load = [(0, engine) for engine in range(engines)]
    for sample, count in enumerate(tokens.tolist()):
        total, engine = load[0]
        heapq.heapreplace(load, (total + count, engine))
        shares[engine].append(sample)
    return [np.array(share, dtype=int) for share in shares]


def generation_program(
    use: ModelUse,
    generation: Generation,
    prompt_tokens: Sequence[np.ndarray],
    response_tokens: Sequence[np.ndarray],
    ranks: Sequence[int],
    operators: Operators,
    *,
    kv_capacity_tokens: float | None = None,
    domain: Sequence[int] | None = None,
    steps: StepSeconds | None = None,
    engines: Sequence[tuple[StepSeconds, float | None]] | None = None,
    groups: Sequence[np.ndarray] | None = None,
    tables: list[_Steps] | None = None,
) -> GenerationResult:
    """Segments of one place that generates the responses to its prompts.

    prompt_tokens, response_tokens: one array per replica, one entry per sample. ranks: of the place, replica by
    replica. kv_capacity_tokens: of one engine, for continuous batching; None: unlimited. domain: ranks over which the
    weights are sharded (default: `ranks`). steps: pass it again to share its tables between places. engines: steps and
    KV capacity of every replica, where they differ. groups: the prompt of every sample, for prefix caching. tables: of
    replicas whose steps are known (see `turns.py`).
    Raises DoesNotFit when a sequence is longer than the KV cache, InputError for settings that cannot be combined.
    """
    prompts, responses = _integers(prompt_tokens), _integers(response_tokens)
    if len(ranks) != len(prompts) * generation.ranks_per_engine:
        stages = f" x pipeline_parallel {generation.pipeline_parallel}" if generation.pipeline_parallel > 1 else ""
        raise InputError(
            f"{len(ranks)} ranks do not hold {len(prompts)} replicas of tensor_parallel {generation.tensor_parallel}"
            f"{stages}",
            field="generation.tensor_parallel",
        )
    if generation.engine == "zero3_per_token" and generation.continuous:
        raise InputError(
            "engine zero3_per_token has static batches only: all ranks must take every step together",
            field="generation.batching",
        )
    holders = tuple(domain or ranks)
    gather = _gather(use, generation, holders, len(prompts), operators)
    if not sum(map(len, prompts)):
        return GenerationResult([])
    if not engines:
        engines = [(steps or StepSeconds(operators, use, generation), kv_capacity_tokens)] * len(prompts)
    if not operators.effects.decode:
        return GenerationResult([*gather, *_proportional(use, generation, prompts, responses, ranks, operators)])
    # Without shards plain generation needs no other rank: each replica stops at its own longest response.
    together = generation.engine == "zero3_per_token" and use.zero_stage == 3 and len(holders) > 1
    until = _longest(responses, generation.batch_samples) if together else None
    if tables is None:
        tables = _tables(generation, prompts, responses, engines, until, groups)
    if together:
        segments = _sharded_segments(use, tables, holders, operators)
    else:
        segments = _segments(use, generation, tables, ranks, operators)
    return GenerationResult([*gather, *segments], [table.stats() for table in tables])


# --- seconds of steps ------------------------------------------------------------------------------------------------


class StepSeconds:
    """Seconds of runs of steps on one engine. Keeps a table for each batch size that occurred: reuse it.

    drafts: of the model that drafts for another one, whose steps have the host's time. stage: of one of an engine's
    pipeline stages; otherwise of all, and a step is a round of them.
    """

    def __init__(
        self, operators: Operators, use: ModelUse, generation: Generation, *, drafts: bool = False,
        stage: int | None = None,
    ) -> None:  # fmt: skip
        degree, ideal = generation.tensor_parallel, not operators.effects.efficiency
        count = generation.pipeline_parallel
        layers = use.shape.layers // count
        self.stages: list[tuple[int, StepSeconds]] = []  # that are alike, and how many
        if count > 1 and stage is None:
            alike = {s: 1 if s in (0, count - 1) else count - 2 for s in generation.different_stages}
            self.stages = [(n, StepSeconds(operators, use, generation, stage=s)) for s, n in alike.items()]
        per_token = generation.engine == "zero3_per_token"
        self.draft: StepSeconds | None = None
        if generation.speculative and (draft := generation.draft_use(use)):
            self.draft = StepSeconds(operators, draft, generation.without_drafts(), drafts=True)
        queries = generation.speculative.tokens + 1 if generation.speculative else 1
        use = generation.engine_use(use)
        overheads = operators.overheads
        self.operators, self.use, self.degree, self.layers = operators, use, degree, layers
        self.generation = generation
        self.cache_traffic = CONCATENATED_CACHE_TRAFFIC if generation.copies_cache else 1
        if generation.kv_cache == "unpadded":
            self.cache_traffic = UNPADDED_CACHE_TRAFFIC
        eager = overheads.decode_layer_seconds
        eager = overheads.eager_layer_seconds if eager is None else eager
        launch_seconds = layers * (EAGER_DECODE_LAYER_SECONDS if eager is None else eager)
        if generation.lora == "served" and use.lora_rank:
            share, adapters = (
                SERVED_LORA_KERNELS_PER_LAYER / EAGER_KERNELS_PER_LAYER,
                overheads.decode_lora_layer_seconds,
            )
            launch_seconds += share * launch_seconds if adapters is None else layers * adapters
        self.floor_seconds = launch_seconds
        if ideal or generation.graphs or not operators.gpu.overlaps_launches:
            self.floor_seconds = 0.0
        self.step_seconds = self.sequence_seconds = 0.0
        if generation.continuous:  # the eager floor of static batches has it
            self.step_seconds, self.sequence_seconds = ENGINE_STEP_SECONDS, ENGINE_SEQUENCE_SECONDS
        if overheads.decode_step_seconds is not None:
            self.step_seconds = overheads.decode_step_seconds
        if overheads.decode_sequence_seconds is not None:
            self.sequence_seconds = overheads.decode_sequence_seconds
        if generation.continuous and degree > 1:
            self.step_seconds += ceil(degree / (operators.host_gpus or degree)) * overheads.decode_hosts_seconds
        if drafts:
            self.step_seconds = self.sequence_seconds = 0.0
        self.step_seconds += overheads.eager_pass_seconds
        self.launch_seconds = 0.0
        if not operators.gpu.overlaps_launches:  # no graphs either: nothing hides what every layer's launches take
            self.launch_seconds = 0.0 if ideal else launch_seconds
        if count == 1:
            self.step_seconds += self.launch_seconds
        if per_token and use.zero_stage == 3:
            added = operators.engine_launches(use, "forward", parameters(use.shape))
            self.step_seconds += float(added.seconds)
        self.unexplained = overheads.unexplained.generation
        if ideal:
            self.step_seconds, self.sequence_seconds, self.unexplained = 0.0, 0.0, 1.0
        first, last = stage in (None, 0), stage in (None, count - 1)

        def body(tokens: np.ndarray) -> OperatorTime:
            time = layers * operators.layer_forward(
                use, tokens, degree, adapters=generation.runs_adapters, serving=generation.continuous
            )
            return time + operators.embedding(use, tokens) if first else time

        self._body = _Table(body)
        self._head = _Table(lambda m: float(last) * operators.head_forward(use, m, degree, "lm"))
        kv_bytes = generation.kv_bytes(use)

        self.state_blocks = state_blocks(use, generation)
        self._kv_bytes, self._queries = kv_bytes, queries
        kinds = use.shape.layer_kinds()
        attending = sum(count for kind, count in kinds.items() if not kind.linear)
        self.windows = [(kind.window, count / attending) for kind, count in kinds.items() if kind.window]
        self.breaks = self._breaks()

    def _breaks(self) -> np.ndarray:
        """Contexts of a sequence between which the seconds of its steps are linear: windows, knots of the curve."""
        windows = sorted({0.0, *(float(window) for window, _ in self.windows), float(LONGEST_CONTEXT)})
        attended = [t - sum(share * max(t - window, 0.0) for window, share in self.windows) for t in windows]
        knots = np.array(self.operators.decode_knots(self.use)) / self.cache_traffic
        found = np.interp(knots[knots < attended[-1]], attended, windows)
        return np.unique(np.concatenate([windows[1:-1], found]))

    def attention(self, sequences: Numbers, context_tokens: Numbers) -> OperatorTime:
        """Of all layers for one step, with so many cached tokens attended to in the mean layer."""
        context = self.cache_traffic * np.asarray(context_tokens)
        return self.layers * self.operators.attention_decode(
            self.use, sequences, context, self.degree, kv_bytes=self._kv_bytes, queries=self._queries
        )

    @property
    def tables(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        """Seconds of the layers by tokens, of the head by tokens drawn."""
        return [table.seconds for table in (self._body, self._head)]

    @cached_property
    def single(self) -> RunSeconds:
        """The same for one run at a time."""
        return RunSeconds(self, Progress.of(self.generation.speculative))

    def of(self, runs: Runs) -> np.ndarray:
        """Seconds of each run by what limits it: rows as in `BOUNDS`; what nothing explains is the host's."""
        seconds = self._with_drafts(runs)
        seconds[HOST] += (self.unexplained - 1) * seconds.sum(axis=0)
        return seconds

    def _with_drafts(self, runs: Runs) -> np.ndarray:
        seconds = self._of(runs)
        if self.draft is None:
            return seconds
        one = replace(runs.progress, width=1)
        drawn = runs.sampled - (runs.progress.width - 1) * runs.decodes
        seconds += self.draft._of(replace(runs, sampled=drawn, progress=one))
        decoding = runs.decodes > 0
        some = [column[decoding] for column in (runs.steps, runs.decodes, runs.context_tokens, runs.running)]
        steps, decodes, context, running = some
        none = np.zeros(0, dtype=int)
        again = Runs(steps, decodes, context, 0 * steps, decodes, running, none, none.astype(float), none, progress=one)
        seconds[:, decoding] += (runs.progress.width - 2) * self.draft._of(again)
        return seconds

    def _of(self, runs: Runs) -> np.ndarray:
        """Without what drafts."""
        runs, first = runs.cut(self.breaks)
        found = self._through_stages(runs) if self.stages else self._through_all(runs)
        return np.add.reduceat(found, first, axis=1) if len(first) < len(runs.steps) else found

    def _through_all(self, runs: Runs) -> np.ndarray:
        host = runs.steps * (self.step_seconds + self.sequence_seconds * runs.sampled)
        return np.array([*self._device(runs).work, host])

    def _device(self, runs: Runs, count: int = 1, parts: np.ndarray | None = None) -> StageSteps:
        """Without the host's time. parts: of the mean one of so many micro-batches of each run."""
        tokens, sampled, decodes, share = runs.computed, runs.sampled, runs.decodes, np.ones(1)
        if parts is not None:
            tokens, sampled, decodes, share = tokens / parts, sampled / parts, decodes / parts, 1 / parts
        last = runs.decodes * runs.progress.advance * (runs.steps - 1)

        def attention(passed: np.ndarray) -> OperatorTime:
            return self.attention(decodes, share * self.attended(runs, passed))

        fixed = self._body(tokens) + self._head(sampled)
        device = fixed + np.array(attention(last / 2).parts) + share * self._prefill(runs)
        launch = device[3] * runs.steps
        first, growth = device[0], np.zeros(len(runs.steps))
        if self.floor_seconds or parts is not None:
            begin, end = (attention(at).seconds for at in (0 * last, last))
            growth = (np.asarray(end) - begin) / np.maximum(runs.steps - 1, 1)
            first = first - growth * (runs.steps - 1) / 2
        if self.floor_seconds:
            launch = launch + _below(self.floor_seconds, first, growth, runs.steps)
        work = np.array([device[1] * runs.steps, device[2] * runs.steps, launch])
        return StageSteps(count, work, first, growth, self.floor_seconds)

    def _through_stages(self, runs: Runs) -> np.ndarray:
        """With a fifth row; see `rounds`. `effects.efficiency` off: every stage is busy all the time."""
        parts = self.micro_batches(runs)
        stages = []
        for count, stage in self.stages:
            steps = stage._device(runs, count, parts)
            work = steps.work + np.outer((0, 0, stage.launch_seconds), runs.steps)
            stages.append(replace(steps, work=work, first=steps.first + stage.launch_seconds))
        if self.operators.ideal:
            own = sum(s.count * s.work for s in stages) * parts / self.generation.pipeline_parallel
            return np.vstack([own, np.zeros((2, len(parts)))])
        host = self.step_seconds + self.sequence_seconds * runs.sampled / parts
        fills = (runs.prompt_tokens > 0) & (not self.generation.continuous)
        return rounds(stages, host, parts, runs.steps, fills)

    def micro_batches(self, runs: Runs) -> np.ndarray:
        """In which the sequences of each run's steps go through the pipeline stages."""
        pieces = np.bincount(runs.chunk_run, minlength=len(runs.steps))
        most = np.maximum(runs.decodes + pieces, -(-runs.prompt_tokens // self.generation.prefill_tokens))
        return np.asarray(np.clip(most, 1, self.generation.pipeline_parallel))

    def table(self, runs: Runs) -> _Steps:
        return _Steps(runs, self.of(runs), self.micro_batches(runs))

    def attended(self, runs: Runs, passed: np.ndarray) -> np.ndarray:
        """Cached tokens attended to, so many after those of a run's first step.

        Of the mean layer (of those with attention, where others have none). With a window of w no sequence has more
        than w; the running ones count as equally long, which is too much where some are below and some above it.
        """
        context = runs.context_tokens + passed
        attended = context
        for window, share in self.windows:
            attended = attended - share * np.maximum(context - window * runs.decodes, 0.0)
        return np.asarray(attended)

    def _prefill(self, runs: Runs) -> np.ndarray:
        """Attention of the pieces of prompts, all pieces of a step in one kernel."""
        seconds = np.zeros((4, len(runs.steps)))
        if not len(runs.chunk_run):
            return seconds
        owners, first, counts = np.unique(runs.chunk_run, return_index=True, return_counts=True)
        lengths = np.zeros((len(owners), counts.max()))
        row = np.repeat(np.arange(len(owners)), counts)
        lengths[row, np.arange(len(row)) - np.repeat(first, counts)] = runs.chunk_tokens
        tokens = runs.prompt_tokens[owners]
        time = self.operators.attention_prefill(self.use, lengths, self.degree, tokens=tokens)
        seconds[:, owners] = self.layers * np.array(time.parts)
        return seconds


class _Table:
    """An operator's time by a count, evaluated once for every count below `SIZE` that occurs."""

    SIZE = 1 << 15

    def __init__(self, evaluate: Callable[[np.ndarray], OperatorTime]) -> None:
        self._evaluate = evaluate
        self._known = np.full((4, self.SIZE), np.nan)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        if counts.dtype.kind == "f":  # the mean of the next whole numbers
            whole = np.floor(counts).astype(int)
            below, above = self(whole), self(np.ceil(counts).astype(int))
            return np.asarray(below + (counts - whole) * (above - below))
        if counts.max(initial=0) >= self.SIZE:
            unique, inverse = np.unique(counts, return_inverse=True)
            return np.asarray(self._rows(unique)[:, inverse])
        times = self._known[:, counts]
        if np.isnan(times[0]).any():
            missing = np.unique(counts[np.isnan(times[0])])
            self._known[:, missing] = self._rows(missing)
            times = self._known[:, counts]
        return times

    def seconds(self, counts: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self._evaluate(counts.astype(float)).seconds, counts.shape)

    def _rows(self, counts: np.ndarray) -> np.ndarray:
        return np.array([np.broadcast_to(part, counts.shape) for part in self._evaluate(counts.astype(float)).parts])


def _below(floor: float, first: np.ndarray, growth: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Sum over i < steps of max(floor - (first + growth i), 0)."""
    gap = floor - first
    until = np.divide(gap, growth, out=np.where(gap > 0, np.inf, 0.0), where=growth > 0)
    count = np.clip(np.ceil(until), 0, steps)
    return np.asarray(count * gap - growth * count * (count - 1) / 2)


@dataclass(frozen=True)
class _Steps:
    """The runs of one replica with their seconds (rows as in `BOUNDS`).

    parts: micro-batches in which the tokens of a step go through the layers.
    """

    runs: Runs
    by_bound: np.ndarray
    parts: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        return np.asarray(self.by_bound.sum(axis=0))

    @property
    def prefill(self) -> np.ndarray:
        return np.asarray(self.runs.prompt_tokens > 0)

    @property
    def idle_seconds(self) -> float:
        return float(self.runs.idle_seconds.sum())

    def stats(self) -> GenerationStats:
        runs, ends = self.runs, np.cumsum(self.seconds + self.runs.idle_seconds)
        begins, running = ends - self.seconds, runs.running
        if waits := np.flatnonzero(runs.idle_seconds).tolist():
            begins = np.insert(begins, waits, begins[waits] - runs.idle_seconds[waits])
            running = np.insert(running, waits, 0)
        return GenerationStats(
            completion_seconds=ends[runs.completion_run],
            timeline_seconds=begins,
            timeline_running=running,
            prefill_seconds=float(self.seconds[self.prefill].sum()),
            decode_seconds=float(self.seconds[~self.prefill].sum()),
            bound=by_name(self.by_bound.sum(axis=1)),
            prefill_steps=int(self.prefill.sum()),
            decode_steps=int(runs.steps[~self.prefill].sum()),
            prompt_tokens=int(runs.prompt_tokens.sum()),
            decoded_tokens=int((runs.steps * (runs.computed - runs.prompt_tokens)).sum()),
            preemptions=runs.preemptions,
            recomputed_tokens=runs.recomputed_tokens,
            reused_tokens=runs.reused_tokens,
            idle_seconds=self.idle_seconds,
            tool_calls=runs.tool_calls,
            tool_seconds=runs.tool_seconds,
        )


def _tables(
    generation: Generation,
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    engines: Sequence[tuple[StepSeconds, float | None]],
    until: list[int] | None,
    groups: Sequence[np.ndarray] | None = None,
) -> list[_Steps]:
    """One entry per replica; replicas with the same lengths on the same machines are computed once."""
    done: dict[tuple[bytes, bytes, bytes, int, float | None], _Steps] = {}
    tables = []
    for k, (prompt, response, (steps, kv_capacity_tokens)) in enumerate(zip(prompts, responses, engines, strict=True)):
        group = groups[k] if groups is not None and generation.prefix_caching else None
        prefixes = b"" if group is None else group.tobytes()
        key = prompt.tobytes(), response.tobytes(), prefixes, id(steps), kv_capacity_tokens
        if key not in done:
            blocks = None if kv_capacity_tokens is None else int(kv_capacity_tokens) // generation.block_tokens
            if generation.continuous:
                runs = continuous_runs(
                    prompt, response, max_sequences=generation.max_sequences, step_tokens=generation.round_tokens,
                    block_tokens=generation.block_tokens, kv_blocks=blocks,
                    chunked_prefill=generation.chunked_prefill, padded=generation.kv_cache == "preallocated",
                    groups=group, progress=Progress.of(generation.speculative), state_blocks=steps.state_blocks,
                )  # fmt: skip
            else:
                runs = static_runs(prompt, response, generation.batch_samples, until=until)
            done[key] = steps.table(runs)
        tables.append(done[key])
    return tables


def _longest(responses: list[np.ndarray], batch_samples: int | None) -> list[int]:
    """The longest response of the domain in every batch: rank r's batch j runs with all other batches j."""
    size = batch_samples or max(map(len, responses))
    batches = range(0, max(map(len, responses)), size)
    return [max(int(r[start : start + size].max(initial=1)) for r in responses) for start in batches]


# --- segments --------------------------------------------------------------------------------------------------------


def _segments(
    use: ModelUse, generation: Generation, tables: list[_Steps], ranks: Sequence[int], operators: Operators
) -> list[Segment]:
    """Replicas that run on their own and meet at the end; two all-reduces per layer and step inside each."""
    prefill, decode = (_axis(tables, phase) for phase in (True, False))
    waits = np.array([table.idle_seconds for table in tables])
    if len(tables) > 1:
        # Replicas do not meet between prefill and decode: what one needs longer to prefill counts as its decode, and
        # so does what it waits longer for tools.
        extra = prefill.totals - prefill.totals.min() + (waits - waits.min())
        prefill = prefill.scaled(prefill.totals.min())
        decode = decode.plus(extra)
    wait = float(waits.min())
    tools = [Segment("tools", np.full((len(tables), 1), wait), bound={"tools": wait})] if wait else []
    beyond = {"tools": float(waits.mean()) - wait} if waits.mean() > wait else {}
    return [
        Segment(
            label,
            _balanced(axis.compute_seconds, operators.effects),
            axis.steps,
            _inside(use, generation, ranks, axis.tokens, axis.waits if generation.continuous or not phase else 0.0),
            bound=_bound(tables, phase) | more,
        )
        for label, phase, axis, more in (("prefill", True, prefill, {}), ("decode", False, decode, beyond))
        if len(axis.steps)
    ] + tools


def _sharded_segments(
    use: ModelUse, tables: list[_Steps], domain: tuple[int, ...], operators: Operators
) -> list[Segment]:
    """Every step gathers every layer's weights again, one layer ahead; all ranks take every step together.

    Embedding and head are spread over the layers, so that a step gathers all parameters. One call a layer, fewer where
    a bucket covers several layers.
    """
    layers = use.shape.layers
    messages = min(1.0, np.ceil(parameters(use.shape) / PREFETCH_PARAMETERS) / layers)
    return [
        Segment(
            label,
            _balanced(axis.compute_seconds, operators.effects) / layers,
            axis.steps * layers,
            (Transfer("all_gather", use.shard_groups(domain), _weight_bytes(use) / layers, messages),),
            prefetch=1,
            lockstep=True,
            bound=_bound(tables, phase),
        )
        for label, phase in (("prefill", True), ("decode", False))
        if len((axis := _axis(tables, phase)).steps)
    ]


@dataclass(frozen=True)
class _Axis:
    """Steps of one phase of all replicas, side by side, in at most `MAX_KINDS` bins.

    compute_seconds: (replicas, bins), of the mean step. steps: per bin, of the replica with most. tokens: of a micro-
    batch through the layers in the mean step of the bin, on the replica with most. waits: seconds in which it waits for
    other micro-batches, on the replica with fewest.
    """

    compute_seconds: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    waits: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        return np.asarray(self.compute_seconds @ self.steps)

    def scaled(self, seconds: float) -> _Axis:
        """Every replica with that many seconds in all."""
        factor = np.divide(seconds, self.totals, out=np.zeros_like(self.totals), where=self.totals > 0)
        return replace(self, compute_seconds=self.compute_seconds * factor[:, None])

    def plus(self, seconds: np.ndarray) -> _Axis:
        """Every replica with so many seconds more, at the end."""
        if not seconds.any():
            return self
        return _Axis(
            np.concatenate([self.compute_seconds, seconds[:, None]], axis=1),
            np.append(self.steps, 1.0),
            np.append(self.tokens, 0.0),
            np.append(self.waits, 0.0),
        )


def _axis(tables: list[_Steps], prefill: bool) -> _Axis:
    """Bins end where a run of some replica ends, or are evenly spaced among those ends."""
    ends, seconds, tokens, waits = [], [], [], []
    for table in tables:
        chosen = table.prefill == prefill
        runs = table.runs
        ends.append(np.concatenate([[0], np.cumsum(runs.steps[chosen])]))
        seconds.append(np.concatenate([[0.0], np.cumsum(table.seconds[chosen])]))
        through = runs.steps * runs.computed / table.parts
        tokens.append(np.concatenate([[0.0], np.cumsum(through[chosen])]))
        waits.append(np.concatenate([[0.0], np.cumsum(table.by_bound[WAITS:, chosen].sum(axis=0))]))
    edges = np.unique(np.concatenate(ends))
    if len(edges) > MAX_KINDS + 1:
        edges = edges[np.linspace(0, len(edges) - 1, MAX_KINDS + 1).astype(int)]
    steps = np.diff(edges).astype(float)

    def per_step(sums: list[np.ndarray]) -> np.ndarray:
        rows = [np.diff(np.interp(edges, e, s)) / steps for e, s in zip(ends, sums, strict=True)]
        return np.array(rows)

    return _Axis(per_step(seconds), steps, per_step(tokens).max(axis=0), per_step(waits).min(axis=0))


def _inside(
    use: ModelUse, generation: Generation, ranks: Sequence[int], tokens: np.ndarray, waits: Numbers = 0.0
) -> tuple[Transfer, ...]:
    """What the ranks of each replica exchange in a step of so many tokens (of a micro-batch, which waits so long for
    others)."""
    return _all_reduces(use, generation, ranks, tokens) + _hops(use, generation, ranks, tokens, waits)


def _hops(
    use: ModelUse, generation: Generation, ranks: Sequence[int], tokens: np.ndarray, waits: Numbers
) -> tuple[Transfer, ...]:
    """A micro-batch from stage to stage, and what was drawn back to the first. All stages send at the same time, so
    one micro-batch's way is that of a message to each neighbour after the other."""
    stages, degree = generation.pipeline_parallel, generation.tensor_parallel
    if stages == 1:
        return ()
    layout = Layout.of_engines(ranks, use, generation)
    tensors = ENGINE_STAGE_TENSORS / degree if generation.continuous else 1.0
    payload = (stages - 1) * tokens * tensors * use.shape.hidden * use.bytes_per_parameter
    return (Transfer("send", layout.hops, payload, messages=float(stages), hidden_seconds=waits),)


def _all_reduces(
    use: ModelUse, generation: Generation, ranks: Sequence[int], tokens: np.ndarray
) -> tuple[Transfer, ...]:
    """After attention and after the MLP of every layer, over the ranks of each replica, or of each of its stages: as
    many in a round of one micro-batch through all stages as of all through one."""
    degree, layers = generation.tensor_parallel, use.shape.layers
    if degree == 1:
        return ()
    groups = tuple(tuple(ranks[i : i + degree]) for i in range(0, len(ranks), degree))
    payload = 2.0 * layers * tokens * use.shape.hidden * use.bytes_per_parameter
    # vLLM and SGLang replace NCCL by kernels of their own for small messages inside CUDA graphs (vLLM documentation,
    # engine argument disable_custom_all_reduce); eager generation uses NCCL.
    op: Op = "custom_all_reduce" if generation.continuous and generation.graphs else "all_reduce"
    return (Transfer(op, groups, payload, messages=2.0 * layers),)


def _gather(
    use: ModelUse, generation: Generation, domain: tuple[int, ...], replicas: int, operators: Operators
) -> list[Segment]:
    """Weights into the layout in which the place decodes, once per call.

    ZeRO-3 shards: all weights to every rank, tensor by tensor (DeepSpeed's GatheredParameters; with tensor parallelism
    each then keeps its part, as in verl's FSDP to vLLM resharding). Tensor-parallel training weights: the ranks that
    together hold one generation shard exchange theirs. `zero3_per_token` needs it only with `effects.decode` off, an
    own engine never.
    """
    effects, host_seconds = operators.effects, 0.0
    sharded = use.zero_stage == 3 and len(use.shard_groups(domain)[0]) > 1
    if generation.engine == "zero3_per_token":
        needed = sharded and not effects.decode
    else:
        needed = generation.engine == "hybrid" and effects.sync
    if not needed:
        return []
    held, wanted = use.tensor_parallel, generation.tensor_parallel
    if sharded:
        groups = use.shard_groups(domain)
        payload, calls = _weight_bytes(use), weight_tensors(use.shape)
        host_seconds = float(operators.engine_launches(use, "gather", parameters(use.shape)).seconds)
    elif held > wanted and held % wanted == 0:
        size = held // wanted
        groups = tuple(domain[i : i + size] for i in range(0, len(domain), size))
        stages = generation.pipeline_parallel
        payload, calls = _weight_bytes(use) / wanted / stages, use.shape.layers // stages
    else:
        return []
    transfer = Transfer("all_gather", groups, payload, messages=calls)
    bound = {"host": host_seconds} if host_seconds else {}
    return [Segment("gather", np.full((replicas, 1), host_seconds), transfers=(transfer,), bound=bound)]


def _proportional(
    use: ModelUse,
    generation: Generation,
    prompts: list[np.ndarray],
    responses: list[np.ndarray],
    ranks: Sequence[int],
    operators: Operators,
) -> list[Segment]:
    """`effects.decode` off: samples of equal (mean) lengths, a constant time per token: that of a large forward."""
    samples = np.array([len(r) for r in responses])
    prompt, response = np.concatenate(prompts).mean(), np.concatenate(responses).mean()
    degree, tokens = generation.tensor_parallel, SHARED_BATCH * (prompt + response)
    layers, stages = use.shape.layers, generation.pipeline_parallel  # which are all busy
    use = generation.engine_use(use)
    per_layer = operators.layer_forward(use, tokens, degree, adapters=generation.runs_adapters)
    per_layer += operators.attention_prefill(use, np.full(SHARED_BATCH, prompt + response), degree)
    time = layers * per_layer + operators.embedding(use, tokens)
    time += operators.head_forward(use, SHARED_BATCH * response, degree, "lm")
    compute = _balanced(samples[:, None] * float(time.seconds) / SHARED_BATCH / stages, operators.effects)
    scale = samples.mean() / SHARED_BATCH / stages
    bound = {name: float(part) * scale for name, part in zip(BOUNDS, time.parts[1:], strict=False)}
    most = np.array([samples.max() * (prompt + response)]) / stages
    return [Segment("decode", compute, transfers=_all_reduces(use, generation, ranks, most), bound=bound)]


def _weight_bytes(use: ModelUse) -> float:
    return float(parameters(use.shape) * use.bytes_per_parameter)


def _balanced(compute_seconds: np.ndarray, effects: Effects) -> np.ndarray:
    """`effects.efficiency` off: no imbalance between the replicas of a place."""
    if effects.efficiency:
        return compute_seconds
    return np.broadcast_to(compute_seconds.mean(axis=0), compute_seconds.shape)


def _bound(tables: list[_Steps], prefill: bool) -> dict[str, float]:
    """Mean over replicas."""
    sums = np.mean([t.by_bound[:, t.prefill == prefill].sum(axis=1) for t in tables], axis=0)
    return by_name(sums)


def by_name(seconds: np.ndarray) -> dict[str, float]:
    """Rows as in `BOUNDS`; `pipeline`: of a micro-batch that waits for others."""
    return dict(zip((*BOUNDS, "pipeline"), seconds.tolist(), strict=False))


def _integers(lengths: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(x, dtype=np.int64) for x in lengths]
