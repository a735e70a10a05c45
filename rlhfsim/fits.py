"""Does it fit: the bytes on every rank in every phase, without simulating.

A phase is a stage of the graph. What rests on a rank (all models that it holds) is there in every phase; the stage that
runs adds its own. The worst instant counts: maximum lengths, Adam's moments after the first step, the engine's copy
beside the training states when it wakes up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import numpy as np

from .costs.model import head_of
from .graph import Stage, StageGraph
from .layout import Holding, shares_with_training, users
from .memory import (
    Bytes,
    Doing,
    cache_bytes_per_token,
    engine_bytes,
    engine_weight_bytes,
    profile_bytes,
    reserved_bytes,
    rounding_bytes,
    scoring_bytes,
    sequence_state_bytes,
    state_blocks,
    static_bytes,
    training_bytes,
)
from .spec.scenario import ModelUse, Scenario

# What to turn when a component is the largest one of the worst instant.
KNOBS = {
    "weights": "a higher zero_stage, tensor_parallel, offload_parameters for frozen models, or offload_states: all for "
    "trained ones",
    "gradients": "zero_stage 2 or 3, offload_gradients, offload_states (but for updates), or lora_rank",
    "optimizer": "zero_stage 1 or higher, offload_states (but for updates), offload_optimizer, lora_rank, or more "
    "GPUs for the trained models",
    "kv_cache": "generation.batch_samples (static) or max_sequences (continuous), or tensor_parallel of the engine",
    "activations": "a smaller micro_batch_samples (or _tokens), recompute: full, flash_attention, context_parallel, or "
    "offload_activations",
    "logits": "logits_chunk_tokens, or a smaller micro_batch_samples (or _tokens)",
    "gathered": "generation.tensor_parallel while generating, else tensor_parallel instead of zero_stage 3",
    "engine": "a larger generation.tensor_parallel or pipeline_parallel (engine: hybrid gathers as many bytes while it "
    "generates)",
    "buffers": "zero_stage 0, or lora_rank",
    "reserved": "overheads.reserved_bytes, if you know better",
}


@dataclass(frozen=True)
class Instant:
    """The memory of one rank while one stage runs there (`resting`: while none does)."""

    rank: int
    phase: str
    bytes: Bytes
    capacity_bytes: float

    @property
    def missing_bytes(self) -> float:
        """Negative where there is room."""
        return self.bytes.total - self.capacity_bytes


@dataclass(frozen=True)
class Fit:
    """Whether everything fits, and what decides it.

    worst: the instant with the least room at maximum lengths; p99_bytes: the same at the 99th percentile of lengths.
    by_phase: the rank with the least room in each phase. kv_capacity_tokens: of the engine with the smallest cache.
    host: bytes of host memory on the node with the least room, by what they are for; host_capacity_bytes: what may be
    used there. reason: empty if it fits, else one sentence with
    the knob that helps.
    micro_batches: largest micro_batch_samples and score_micro_batch_samples that fit (or tokens, where these are
        limited), by model; 0: none does.
    """

    fits: bool
    worst: Instant
    p99_bytes: float
    by_phase: dict[str, Instant]
    host: dict[str, float]
    host_capacity_bytes: float
    kv_capacity_tokens: float | None
    memory_fraction: float | None
    micro_batches: dict[str, int]
    reason: str

    @property
    def host_bytes(self) -> float:
        """Of host memory, in all."""
        return sum(self.host.values())

    @property
    def capacity_bytes(self) -> float:
        """Of the GPU of the worst instant."""
        return self.worst.capacity_bytes

    @property
    def limiting(self) -> tuple[str, str]:
        """(phase, component) of the fullest instant."""
        components = self.worst.bytes.components
        return self.worst.phase, max(components, key=lambda name: components[name])


class Memory:
    """Memory of a scenario's placement: static bytes by rank, bytes of every stage, and the engine's KV capacity."""

    def __init__(self, scenario: Scenario, graph: StageGraph, holdings: dict[str, Holding]) -> None:
        self.scenario, self.graph, self.holdings = scenario, graph, holdings
        self._kinds, self._parts = scenario.cluster.rank_kinds, scenario.cluster.all_parts
        workload = scenario.workload
        self.longest = workload.prompt_tokens.longest, workload.longest_response
        self._resting: dict[tuple[int, str | None], Bytes] = {}
        self._order = [stage.name for stage in graph.stages()]

    # -- ranks --------------------------------------------------------------------------------------------

    @cached_property
    def rank_kinds(self) -> list[int]:
        """One rank of every kind: those of like machines that hold the same shards and run the same stages."""
        kinds: dict[int, list[object]] = defaultdict(list)  # rank -> what it holds and runs
        for name, held in self.holdings.items():
            for position, rank in enumerate(held.ranks):
                stages = position * held.use.pipeline_parallel // len(held.ranks), self._decode_stage(held, rank)
                kinds[rank].append((name, *stages))
        for stage in self.graph.stages():
            for rank in stage.ranks:
                kinds[rank].append(stage.name)
        firsts = {(self._kinds[rank], *kinds[rank]): rank for rank in sorted(kinds, reverse=True)}
        return sorted(firsts.values())

    def capacity_of(self, rank: int) -> float:
        """Bytes of a rank's GPU."""
        return self._parts[self._kinds[rank]].gpu.memory_bytes.value

    @staticmethod
    def _stage_of(holding: Holding, rank: int) -> int:
        """Pipeline stage: ranks are ordered stage by stage."""
        return holding.ranks.index(rank) * holding.use.pipeline_parallel // len(holding.ranks)

    def _decode_stage(self, holding: Holding, rank: int) -> int:
        """Pipeline stage of an engine that a rank is, where it generates with this copy of the actor."""
        generation = self.scenario.generation
        if generation.pipeline_parallel == 1:
            return 0
        if generation.in_stages_of(holding.use):
            return self._stage_of(holding, rank)
        return holding.ranks.index(rank) % generation.ranks_per_engine // generation.tensor_parallel

    def resting(self, rank: int, running: Stage | None = None) -> Bytes:
        """What lies on a rank between stages, or while a stage is running, without what that adds."""
        key = rank, running.name if running else None
        if key not in self._resting:
            self._resting[key] = self._rest(rank, running)
        return self._resting[key]

    def _rest(self, rank: int, running: Stage | None) -> Bytes:
        found = reserved_bytes(self.scenario.overheads_of(self._parts[self._kinds[rank]]))
        for name, held in self.holdings.items():
            if rank in held.ranks and name != "shadow_actor":
                found += static_bytes(
                    held.use,
                    "train" if held.purpose == "train" else "frozen",
                    held.data_parallel,
                    head=head_of(name),
                    stage=self._stage_of(held, rank),
                    doing=self._doing(held, running),
                )
        engine = self.holdings.get("shadow_actor")
        if engine is not None and rank in engine.ranks:
            found += Bytes(reserved=self.scenario.generation.cuda_graph_bytes + self._second_process(rank))
            weights = engine_weight_bytes(engine.use, self.scenario.generation, self._decode_stage(engine, rank))
            if not self._sleeps(engine):
                found += Bytes(engine=weights)
            elif self.scenario.generation.sleep == "level_1":
                found += Bytes(host=weights)
        return found

    def _second_process(self, rank: int) -> float:
        """Device memory that an engine's process keeps on a rank where another one trains or scores."""
        if not any(rank in held.ranks for name, held in self.holdings.items() if name != "shadow_actor"):
            return 0.0
        return self.scenario.overheads_of(self._parts[self._kinds[rank]]).engine_process_bytes

    def _doing(self, held: Holding, running: Stage | None) -> Doing:
        """What a copy of a model does while a stage runs; what leaves is there from its first stage to its last."""
        if running is None:
            return "rests"
        if running.model == held.name:
            if held.use.offload_parameters and running.kind == "sync":
                return "rests"
            return "updates" if running.kind == "train" else "passes"
        if held.purpose != "train" or held.use.offload_states in (None, "calls"):
            return "rests"
        own = [self._order.index(stage.name) for stage in users(self.graph, held.name)]
        return "passes" if own[0] < self._order.index(running.name) < own[-1] else "rests"

    def _sleeps(self, engine: Holding) -> bool:
        """An engine that shares its ranks with training frees its memory there; one on ranks of its own keeps it."""
        return shares_with_training(self.holdings, engine)

    # -- phases -------------------------------------------------------------------------------------------

    def during(self, stage: Stage, rank: int, tokens: tuple[int, int] | None = None) -> Bytes:
        """Bytes on a rank while `stage` runs there; tokens: prompt and response length (default: the longest)."""
        prompt, response = tokens or self.longest
        if not self._needs_memory(stage):
            return self.resting(rank)
        if stage.kind == "sync":
            return self._while_syncing(stage, rank)
        resting = self.resting(rank, running=stage)
        if stage.kind == "generate":
            return resting + self._generating(stage, rank, prompt, response)
        sequence = prompt + response
        micro = self._limit(stage) or self._limited_samples(stage) * sequence
        return resting + self._passing(stage, rank, min(micro, self._most_tokens(stage, sequence)), sequence)

    def _limit(self, stage: Stage) -> int | None:
        """Tokens of a micro-batch, where they are limited instead of its samples."""
        use = self.holdings[stage.model].use
        return use.micro_batch_tokens if stage.kind == "train" else use.score_micro_batch_tokens

    def _limited_samples(self, stage: Stage) -> int:
        use = self.holdings[stage.model].use
        return use.micro_batch_samples if stage.kind == "train" else use.score_micro_batch_samples

    def _most_tokens(self, stage: Stage, sequence: int) -> int:
        """Of all samples that one replica handles in one firing."""
        return self.samples_per_replica(stage) * sequence

    def _needs_memory(self, stage: Stage) -> bool:
        """Not a hand-over, a checkpoint, or a reward that a function computes."""
        return stage.kind not in ("swap", "store") and stage.model in self.holdings

    def _passing(self, stage: Stage, rank: int, tokens: int, sequence: int) -> Bytes:
        """What scoring or training micro-batches of so many tokens adds."""
        held = self.holdings[stage.model]
        head, part = head_of(stage.model), self._stage_of(held, rank)
        if stage.kind == "score":
            return scoring_bytes(held.use, held.data_parallel, tokens, sequence, head=head, stage=part)
        count = ceil(self._most_tokens(stage, sequence) / tokens)
        return training_bytes(
            held.use, held.data_parallel, tokens, sequence, micro_batches=count, head=head, stage=part
        )

    def samples_per_replica(self, stage: Stage) -> int:
        """The most samples that one replica handles in one firing."""
        held = self.holdings[stage.model]
        size = self.scenario.generation.ranks_per_engine if stage.kind == "generate" else held.replica
        replicas = max(1, stage.size // size)
        lanes = len(stage.lanes_of(0)) / self.graph.lanes
        total = ceil(self.scenario.samples_through(stage.name) * self.graph.at_work(stage.name))
        return max(1, ceil(total * lanes / stage.chunks / replicas - 1e-9))

    def _while_syncing(self, stage: Stage, rank: int) -> Bytes:
        bucket = Bytes(buffers=self.scenario.weight_sync.bucket_bytes)
        target = self.holdings[stage.target or ""]
        found = self.resting(rank, running=stage) + bucket
        if rank in target.ranks and target.name == "shadow_actor" and self._sleeps(target):
            # It wakes up beside the training states.
            part = self._decode_stage(target, rank)
            found += engine_bytes(target.use, self.scenario.generation, 0.0, stage=part)
        return found

    def _generating(self, stage: Stage, rank: int, prompt: int, response: int) -> Bytes:
        """The cache is as large as that of the engine's rank with the least room."""
        generation, use = self.scenario.generation, self.holdings[stage.model].use
        found, per_token = self._decoding(stage, rank, prompt, response), self._kv_bytes(use, prompt + response)
        if not generation.continuous:
            whole = per_token * (prompt + response) + sequence_state_bytes(use, generation)
            return found + Bytes(kv_cache=self._sequences(stage) * whole)
        of_stages = [rank]
        if generation.pipeline_parallel > 1:
            of_stages = [r for r in self.rank_kinds if r in stage.ranks and self._kinds[r] == self._kinds[rank]]
        room = min(self._kv_room(stage, r, self._decoding(stage, r, prompt, response)) for r in of_stages)
        return found + Bytes(kv_cache=per_token * min(self._kv_need(stage, prompt, response), room))

    def _decoding(self, stage: Stage, rank: int, prompt: int, response: int) -> Bytes:
        """What generating adds but for the KV cache; one micro-batch at a time is on a pipeline stage."""
        generation, held = self.scenario.generation, self.holdings[stage.model]
        use, part = held.use, self._decode_stage(held, rank)
        found = Bytes()
        if generation.engine == "engine":
            if self._sleeps(held):
                found += engine_bytes(use, generation, 0.0, stage=part)
        elif use.zero_stage == 3 and len(held.ranks) > 1:
            gathered = engine_weight_bytes(use, generation, part)
            if generation.engine == "zero3_per_token":
                gathered = scoring_bytes(use, held.data_parallel, 0, 1).gathered
            found += Bytes(gathered=gathered)
        at_once = self._prefill_tokens(stage, prompt)
        found += replace(scoring_bytes(self._engine_use(use), 1, at_once, prompt), gathered=0.0, logits=0.0)
        draws = part == generation.pipeline_parallel - 1
        return found + Bytes(logits=self._at_once(stage) * use.shape.vocabulary * 4 if draws else 0.0)

    def _engine_use(self, use: ModelUse) -> ModelUse:
        return self.scenario.generation.engine_use(use).model_copy(
            update={
                "tensor_parallel": self.scenario.generation.tensor_parallel,
                "zero_stage": 0,
                "shard_ranks": None,
                "pipeline_parallel": 1,
                "logits_chunk_tokens": None,
            }
        )

    def _kv_bytes(self, use: ModelUse, sequence_tokens: int) -> float:
        """Per token of context, the mean of a sequence of so many, on one rank of the engine.

        With windowed layers a shorter sequence needs more for each of its tokens, but less in all.
        """
        return cache_bytes_per_token(use, self.scenario.generation, sequence_tokens)

    def _sequences(self, stage: Stage) -> int:
        """Sequences that an engine holds at once."""
        generation, samples = self.scenario.generation, self.samples_per_replica(stage)
        return min(samples, generation.max_sequences if generation.continuous else generation.batch_samples or samples)

    def _at_once(self, stage: Stage) -> int:
        """Of these, how many go through the layers together: a micro-batch, with pipeline stages."""
        return ceil(self._sequences(stage) / self.scenario.generation.pipeline_parallel)

    def _prefill_tokens(self, stage: Stage, prompt: int) -> int:
        generation = self.scenario.generation
        together = self._at_once(stage) * prompt
        return min(together, generation.prefill_tokens) if generation.continuous else together

    @property
    def _draft_slots(self) -> int:
        drafting = self.scenario.generation.speculative
        return drafting.slots if drafting else 0

    def _kv_need(self, stage: Stage, prompt: int, response: int) -> float:
        """At most: as if no two sequences shared a prompt."""
        states = self._state_blocks(stage) * self.scenario.generation.block_tokens
        return float(self._sequences(stage) * (prompt + response + self._draft_slots + states))

    def _state_blocks(self, stage: Stage) -> int:
        return state_blocks(self.holdings[stage.model].use, self.scenario.generation)

    def _kv_room(self, stage: Stage, rank: int, engine: Bytes) -> float:
        """Tokens for which a paged cache has room: as given, within the engine's fraction, or in what is left."""
        generation = self.scenario.generation
        if generation.kv_cache_tokens is not None:
            return float(generation.kv_cache_tokens)
        free = self.capacity_of(rank) - self.resting(rank, running=stage).total - engine.total
        if generation.memory_fraction is not None:
            whole, taken = self._shared_by_fraction(stage, rank)
            free = min(free, generation.memory_fraction * whole - taken)
        return max(0.0, free / self._kv_bytes(self.holdings[stage.model].use, sum(self.longest)))

    def _shared_by_fraction(self, stage: Stage, rank: int) -> tuple[float, float]:
        """(bytes of which memory_fraction is a share, what it must hold besides the KV cache)."""
        generation, held = self.scenario.generation, self.holdings[stage.model]
        part = self._decode_stage(held, rank)
        weights = engine_weight_bytes(held.use, generation, part)
        if generation.memory_fraction_covers == "static":
            there = self.resting(rank, running=stage)
            before = there.total - there.engine - generation.cuda_graph_bytes
            return self.capacity_of(rank) - before, weights
        graphs = generation.cuda_graph_bytes if generation.memory_fraction_covers == "profile_and_graphs" else 0.0
        return self.capacity_of(rank), weights + profile_bytes(held.use, generation, part).total + graphs

    @cached_property
    def kv_capacity_by_kind(self) -> dict[int, float] | None:
        """Tokens in the cache of one continuous engine, by the kind of its machines (`Cluster.rank_kinds`).

        None: no such engine, or memory is infinite.
        """
        if not self.scenario.generation.continuous or not self.scenario.effects.memory:
            return None
        found: dict[int, float] = {}
        for stage in self._generating_stages():
            for rank in self.rank_kinds:
                if rank in stage.ranks:
                    engine = self._decoding(stage, rank, *self.longest)
                    room, kind = self._kv_room(stage, rank, engine), self._kinds[rank]
                    found[kind] = min(found.get(kind, room), room)
        return found

    @property
    def kv_capacity_tokens(self) -> float | None:
        """The same of the engine with the smallest cache."""
        found = self.kv_capacity_by_kind
        return None if found is None else min(found.values())

    def _generating_stages(self) -> list[Stage]:
        return [s for s in self.graph.stages() if s.kind == "generate"]

    def of_stage(self, stage: Stage) -> Iterator[Instant]:
        """One stage on every kind of rank that runs it."""
        return (self._instant(r, stage.name, self.during(stage, r)) for r in self.rank_kinds if r in stage.ranks)

    def _instant(self, rank: int, phase: str, found: Bytes) -> Instant:
        return Instant(rank, phase, found, self.capacity_of(rank))

    def instants(self, tokens: tuple[int, int] | None = None) -> Iterator[Instant]:
        """Every phase on every kind of rank."""
        for rank in self.rank_kinds:
            yield self._instant(rank, "resting", self.resting(rank))
            for stage in self.graph.stages():
                if rank in stage.ranks and self._needs_memory(stage):
                    yield self._instant(rank, stage.name, self.during(stage, rank, tokens))

    # -- the answer ---------------------------------------------------------------------------------------

    def fit(self, p99_tokens: tuple[int, int] | None = None) -> Fit:
        """Test every instant at maximum lengths (and at `p99_tokens`) against the device, and the host's share."""
        instants = list(self.instants())
        worst = max(instants, key=lambda i: i.missing_bytes)
        by_phase: dict[str, Instant] = {}
        for instant in instants:
            phase = instant.phase.split(".")[0]
            if phase not in by_phase or instant.missing_bytes > by_phase[phase].missing_bytes:
                by_phase[phase] = instant
        p99 = max(self.instants(p99_tokens), key=lambda i: i.missing_bytes) if p99_tokens else worst
        host, host_capacity = self._host()
        reason = self._reason(worst, host, host_capacity) if self.scenario.effects.memory else ""
        kv = self.kv_capacity_tokens
        return Fit(
            not reason,
            worst,
            p99.bytes.total,
            by_phase,
            host,
            host_capacity,
            kv,
            self._fraction(),
            self.largest_micro_batches(),
            reason,
        )

    def _reason(self, worst: Instant, host: dict[str, float], host_capacity: float) -> str:
        if worst.missing_bytes > 0:
            components = worst.bytes.components
            largest = max(components, key=lambda name: components[name])
            over = worst.missing_bytes / 2**30
            return (
                f"{worst.phase} on rank {worst.rank} needs {worst.bytes.total / 2**30:.3g} GiB of "
                f"{worst.capacity_bytes / 2**30:.3g} ({over:.3g} too many); the largest part is {largest} "
                f"({components[largest] / 2**30:.3g} GiB): try {KNOBS[largest]}"
            )
        if (needed := sum(host.values())) > host_capacity:
            parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in host.items() if size)
            return (
                f"offloaded states need {needed / 2**30:.3g} GiB of host memory per node ({parts}), there are "
                f"{host_capacity / 2**30:.3g}: try more nodes or less offload"
            )
        kv, sequence, block = self.kv_capacity_tokens, sum(self.longest), self.scenario.generation.block_tokens
        # The last token is drawn and never computed, so it needs no room; the cache has whole blocks.
        states = max(map(self._state_blocks, self._generating_stages()), default=0)
        if kv is not None and kv // block < ceil((sequence - 1 + self._draft_slots) / block) + states:
            return (
                f"the engine cannot start: its KV cache holds {kv:.3g} tokens, one sequence needs up to {sequence}: "
                "try tensor_parallel of the engine, a larger memory_fraction, or shorter maximum lengths"
            )
        return ""

    def _host(self) -> tuple[dict[str, float], float]:
        """Host memory that is used, by component, and that there is, on the node with the least room."""
        there = [
            part.node.host_memory_bytes.value * self.scenario.overheads_of(part).host_memory_share
            for part in self._parts
        ]
        if not any(sum(self._host_of(rank).values()) for rank in self.rank_kinds):
            return {}, min(there)
        used: dict[tuple[int, float], Counter[str]] = defaultdict(Counter)
        nodes = self.scenario.cluster.rank_nodes
        for rank in sorted({r for s in self.graph.stages() for r in s.ranks}):
            used[nodes[rank], there[self._kinds[rank]]].update(self._host_of(rank))
        fullest = max(used, key=lambda node: used[node].total() - node[1])
        return dict(used[fullest]), fullest[1]

    def _host_of(self, rank: int) -> dict[str, float]:
        """Host memory of one rank: what rests there, and the activations of the stage that leaves most (states); what
        pinned tensors lose to rounding; and what its processes take, one for training and one for an engine."""
        here = {name: held for name, held in self.holdings.items() if rank in held.ranks}
        rounding = sum(
            rounding_bytes(
                held.use,
                "train" if held.purpose == "train" else "frozen",
                held.data_parallel,
                head=head_of(name),
                stage=self._stage_of(held, rank),
            )
            for name, held in here.items()
            if name != "shadow_actor"
        )
        engine = "shadow_actor" in here and self.scenario.generation.engine == "engine"
        processes = engine + any(name != "shadow_actor" for name in here)
        each = self.scenario.overheads_of(self._parts[self._kinds[rank]]).process_host_bytes
        leaving = [
            self.during(stage, rank).host
            for stage in self.graph.stages()
            if stage.kind == "train" and rank in stage.ranks and self.holdings[stage.model].use.offload_activations
        ]
        states = max([self.resting(rank).host, *leaving])
        return {"states": states, "rounding": rounding, "processes": processes * each}

    def _fraction(self) -> float | None:
        """The engine's share of the device: what was given, or what it can have."""
        if not self.scenario.generation.continuous:
            return None
        if self.scenario.generation.memory_fraction is not None or self.kv_capacity_by_kind is None:
            return self.scenario.generation.memory_fraction
        shares = []
        for stage in self._generating_stages():
            token_bytes = self._kv_bytes(self.holdings[stage.model].use, sum(self.longest))
            for rank in self.rank_kinds:
                if rank in stage.ranks:
                    whole, taken = self._shared_by_fraction(stage, rank)
                    shares.append((self.kv_capacity_by_kind[self._kinds[rank]] * token_bytes + taken) / whole)
        return min(1.0, max(shares))

    def largest_micro_batches(self) -> dict[str, int]:
        """By `models.<role>.micro_batch_samples` or `_tokens` (and `score_...`): the largest that fits.

        At maximum lengths.
        """
        found: dict[str, int] = {}
        for stage in self.graph.stages():
            if stage.kind not in ("score", "train") or stage.model not in self.holdings:
                continue
            role = stage.model.removeprefix("shadow_")
            unit = "samples" if self._limit(stage) is None else "tokens"
            key = f"models.{role}." + ("" if stage.kind == "train" else "score_") + f"micro_batch_{unit}"
            size = self._largest(stage)
            found[key] = min(found.get(key, size), size)
        return found

    def _largest(self, stage: Stage) -> int:
        """Largest micro-batch of a stage, by bisection over what a replica has at all (bytes grow with it)."""
        free = {
            rank: self.capacity_of(rank) - self.resting(rank, running=stage).total
            for rank in self.rank_kinds
            if rank in stage.ranks
        }
        sequence = sum(self.longest)
        one = sequence if self._limit(stage) is None else 1
        low, high = 0, self._most_tokens(stage, sequence) // one
        while low < high:
            middle = (low + high + 1) // 2
            if all(self._passing(stage, rank, middle * one, sequence).total <= room for rank, room in free.items()):
                low = middle
            else:
                high = middle - 1
        return low


def p99_tokens(lengths: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """The 99th percentile of drawn prompt and response lengths."""
    prompts, responses = (np.concatenate(part) for part in zip(*lengths, strict=True))
    return int(np.quantile(prompts, 0.99)), int(np.quantile(responses, 0.99))
