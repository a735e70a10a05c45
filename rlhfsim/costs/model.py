"""From a firing to its segments: which samples it handles, how its model is split there, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rlhfsim.algorithms import IN_ROUNDS
from rlhfsim.batch import kept_together, per_replica, samples_of
from rlhfsim.firing import Firing
from rlhfsim.fold import Fold
from rlhfsim.graph import Message, Stage
from rlhfsim.layout import Holding, shares_with_training, users
from rlhfsim.memory import (
    MASTER_BYTES,
    MOMENT_BYTES,
    Bytes,
    cache_bytes_per_token,
    engine_weight_bytes,
    leaving_bytes,
    static_bytes,
)
from rlhfsim.model import Head, parameters
from rlhfsim.packing import shares_by_tokens
from rlhfsim.spec.lengths import DrawnTurns, Turn
from rlhfsim.spec.scenario import Scenario

from .generation import (
    GenerationResult,
    GenerationStats,
    StepSeconds,
    _Steps,
    generation_counts,
    generation_program,
    route_samples,
)
from .mixed import mixed_program
from .operators import Operators
from .passes import Host, Layout, controller_program, firing_program, score_program, train_program
from .rewards import function_seconds, queue_seconds
from .rollout import Rollouts
from .segment import Segment, Transfer
from .sleep import sleep_program, states_program, wake_program
from .sync import sync_program
from .turns import TurnEngine, turn_steps

# Bytes of a message per token or per sample (paper's code: ids and masks are int64, everything else is cast to 16 bit).
FIELD_BYTES_PER_TOKEN = {"tokens": 8, "mask": 8, "log_probs": 2, "ref_log_probs": 2, "values": 2, "rewards": 2}
FIELD_BYTES_PER_SAMPLE = {"score": 2}

# What a controller hands out and gets back for a padded token. Ids, mask and positions of the sample, prompt and
# response once more, all int64 (verl/workers/rollout/vllm_rollout/vllm_rollout_spmd.py of verl v0.4.1);
# log-probabilities and entropies back, fp32; for updates both log-probabilities, scores, rewards, advantages and
# returns too, since the whole batch is always sent (verl/trainer/ppo/ray_trainer.py).
CONTROLLER_BYTES_PER_TOKEN = {"generate": 4 * 8, "score": 4 * 8 + 2 * 4, "train": 4 * 8 + 6 * 4}

SampleTurns = tuple[tuple[Turn, ...], ...]

VALUE_HEADS = ("critic", "reward", "shadow_critic")


def head_of(model: str) -> Head:
    """What sits on top of a copy of a model."""
    return "value" if model in VALUE_HEADS else "lm"


class _Samples(NamedTuple):
    """Of one firing: tokens of prompts and responses, and how they are generated (`CostModel._generated_as`)."""

    prompts: np.ndarray
    responses: np.ndarray
    groups: np.ndarray
    turns: SampleTurns | None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.prompts.tobytes(), self.responses.tobytes(), self.groups.tobytes(), self.turns


class CostModel:
    """The cost of every firing of one scenario's (folded) graph.

    operators: of each part of the cluster. lengths: prompt and response tokens of every sample, by iteration.
    kv_capacity_tokens: of one engine, by the kind of its ranks (`Cluster.rank_kinds`); None: unlimited.
    batches: numbers of the samples that are kept and train, by iteration (None: all). reward_seconds: what a judge or
        sandbox takes for every sample, by iteration. turns: in which responses are generated, by iteration (None: at
        once, or `effects.decode` off).
    """

    def __init__(
        self,
        scenario: Scenario,
        fold: Fold,
        holdings: dict[str, Holding],
        operators: Sequence[Operators],
        lengths: list[tuple[np.ndarray, np.ndarray]],
        kv_capacity_tokens: Mapping[int, float] | None,
        *,
        batches: list[np.ndarray] | None = None,
        reward_seconds: list[np.ndarray] | None = None,
        turns: list[DrawnTurns] | None = None,
    ) -> None:
        self.scenario, self.fold, self.holdings, self.operators = scenario, fold, holdings, operators
        self.lengths, self.kv_capacity_tokens = lengths, kv_capacity_tokens
        self.batches, self.reward_seconds, self.turns = batches, reward_seconds, turns
        self._kinds, self._nodes = np.array(scenario.cluster.rank_kinds), scenario.cluster.rank_nodes
        self._steps: dict[tuple[str, int], StepSeconds] = {}
        self._programs: dict[tuple[Any, ...], list[Segment]] = {}
        self._finished: dict[tuple[Any, ...], list[GenerationStats]] = {}
        self._arrived: dict[int, np.ndarray] = {}
        workload = scenario.workload
        self._together = {
            again: kept_together(
                fold.original,
                scenario.samples_through("gen") if again else workload.samples,
                workload.responses_per_prompt,
                stages,
            )
            for again in (True, False)
            if (stages := [s for s in fold.original.stages() if self._in_rounds(s.name) == again])
        }
        self.padded_tokens = workload.longest_sample
        self._rollouts = Rollouts(scenario, fold, holdings, operators, lengths, kv_capacity_tokens, turns)
        self._paused: set[Firing] = set()
        self._versions: dict[str, int] = {}  # of the weights of a copy of a model, where it is refreshed
        self._begun_with: dict[Firing, int] = {}

    def program(self, f: Firing) -> list[Segment]:
        places = self.fold.places(f)
        stage = self.fold.original.at(f.stage)
        if stage.kind == "swap" or not stage.works_in(f.iteration):
            return []
        if stage.kind == "store":
            return self._remember((f.stage,), self._checkpoint)
        if stage.kind == "sync":
            return self._with_states(f, self._remember((f.stage,), lambda: self._sync(stage)))
        if f.stage in self._rollouts.stages:
            begin = [] if f in self._paused else self._controller(stage, stage.ranks, len(self.numbers(f)))
            return self._between_sleeps(f, [*begin, *self._rollouts.segments(f)])
        self._begun_with[f] = self._versions.get(stage.model, 0)
        # A firing whose place was decided late is known by its chunk; the place says which ranks do it.
        first = f._replace(place=places[0])
        ids = self.numbers(first)
        if self._in_rounds(f.stage) and not len(ids):
            return []  # the batch was full before
        prompts, responses = self._lengths(first, ids)
        reward = None if stage.model in self.holdings else self._reward_seconds(first, stage, ids)
        ends, samples = self._ends(stage, f), _Samples(prompts, responses, *self._generated_as(first, stage, ids))
        key = (f.stage, tuple(places), samples.key, reward, ends)
        work = self._remember(key, lambda: self._work(stage, places, samples, reward, ends))
        return self._with_states(f, self._between_sleeps(f, work))

    def _ends(self, stage: Stage, f: Firing) -> tuple[bool, bool]:
        """Whether a firing is the first and the last of its stage in an iteration, where it matters to its cost."""
        if stage.kind != "train":
            return True, True
        if not (self.holdings[stage.model].use.gathers_ahead or self.scenario.overheads.controller_call_seconds):
            return True, True
        return f.chunk == 0, f.chunk == stage.firings - 1

    def ended(self, f: Firing, name: Firing) -> dict[str, float]:
        """Book what an ended firing changes: the version of weights, what engines hold; ages of what it generated."""
        stage = self.fold.original.at(f.stage)
        self._paused.discard(f)
        if f.stage in self._rollouts.stages:
            return self._rollouts.ended(f)
        begun_with = self._begun_with.pop(f, 0)
        if stage.kind in ("sync", "train") and f.chunk == stage.firings - 1:
            self._rollouts.enter(stage, f.iteration + 1)
            self._versions[stage.target or stage.model] = f.iteration + 1
        if stage.kind == "generate" and stage.every == 1 and self.fold.original.off_policy:
            count, age = len(self.numbers(name._replace(place=f.place))), name.iteration - begun_with
            return {"samples": float(count), "age_steps": float(count * age), "oldest_steps": float(age)}
        return {}

    def stop_share(self, f: Firing, share: float) -> float | None:
        return self._rollouts.stop_share(f, share)

    def paused(self, f: Firing, share: float) -> dict[str, float]:
        self._paused.add(f)
        return self._rollouts.paused(f)

    def _in_rounds(self, stage: str) -> bool:
        return self.batches is not None and stage.partition(".")[0] in IN_ROUNDS

    def numbers(self, f: Firing) -> np.ndarray:
        """Numbers of a firing's samples, among all that were generated in its iteration."""
        again = self._in_rounds(f.stage)
        count = self.scenario.samples_through(f.stage)
        ids = samples_of(self.fold.original, f, count, together=self._together[again])
        if again:  # rounds that were not needed have none
            return ids[ids < len(self.lengths[f.iteration % len(self.lengths)][0])]
        if self.batches is not None and f.stage != "testing":
            ids = self.batches[f.iteration % len(self.batches)][ids]
        return ids

    def _lengths(self, f: Firing, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response tokens of samples; validation has prompts of its own, as long as the others."""
        prompts, responses = self._rollouts.batch(f.iteration)
        if f.stage == "testing":
            ids = ids % len(prompts)
        return prompts[ids], responses[ids]

    def _generated_as(self, f: Firing, stage: Stage, ids: np.ndarray) -> tuple[np.ndarray, SampleTurns | None]:
        """Who shares a prompt with whom, and in which turns: of samples that are to be generated."""
        turns = None
        if self.turns is not None and stage.kind == "generate":
            by_sample = self.turns[f.iteration % len(self.turns)].by_sample
            turns = tuple(by_sample[k % len(by_sample)] for k in ids.tolist())
        return self._groups(stage, ids), turns

    def _groups(self, stage: Stage, ids: np.ndarray) -> np.ndarray:
        """Which samples have the same prompt, where engines make use of it: equal numbers, counted from 0; else empty.

        Validation generates one response to each prompt.
        """
        if not (self.scenario.generation.prefix_caching and stage.kind == "generate"):
            return np.zeros(0, dtype=int)
        if stage.name == "testing":
            return np.arange(len(ids))
        return np.unique(ids // self.scenario.workload.responses_per_prompt, return_inverse=True)[1]

    def message(self, messages: list[Message]) -> Transfer | None:
        """All lanes of one result on their way to one place; lanes that stay on their rank do not move."""
        original = self.fold.original
        producer, consumer = original.at(messages[0].producer.stage), original.at(messages[0].consumer)
        pairs = [pair for m in messages for pair in self._pairs(producer, consumer, m) if pair[0] != pair[1]]
        if not pairs:
            return None
        moving = tuple(dict.fromkeys(pairs))
        lanes_per_pair = len(pairs) / len(moving)
        if self._in_rounds(producer.name) and not self._generates(messages[0].producer):
            return None
        through = self.scenario.samples_through(producer.name)
        samples = through / original.lanes / producer.chunks * lanes_per_pair
        per_sample = sum(
            FIELD_BYTES_PER_TOKEN.get(name, 0) * self.padded_tokens + FIELD_BYTES_PER_SAMPLE.get(name, 0)
            for name in messages[0].fields
        )
        return Transfer("send", moving, samples * per_sample)

    def _generates(self, f: Firing) -> bool:
        """Whether the round of a chunk was needed."""
        stage, total = self.fold.original.at(f.stage), self.scenario.samples_through(f.stage)
        return f.chunk * total // stage.chunks < len(self.lengths[f.iteration % len(self.lengths)][0])

    def _pairs(self, producer: Stage, consumer: Stage, m: Message) -> list[tuple[int, int]]:
        """Ranks of the original graph between which the lanes of a folded message move."""
        pairs = []
        for lane in self.fold.lanes[m.lane]:
            source_place = next(iter(producer.places_for(range(lane, lane + 1), m.producer.chunk)))
            if source_place < 0:  # the folded graph keeps places that take turns
                source_place = (
                    self.fold.graph.at(producer.name).ranks.index(m.source) // self.fold.graph.at(producer.name).size
                )
            for place in consumer.places_for(range(lane, lane + 1), m.producer.chunk):
                pairs.append((producer.home(lane, source_place), consumer.home(lane, place)))
        return pairs

    # -- the work of a firing -----------------------------------------------------------------------------

    def _kinds_of(self, ranks: Iterable[int]) -> np.ndarray:
        """The kinds of machines of ranks (`Cluster.rank_kinds`)."""
        return np.asarray(self._kinds[list(ranks)])

    def _operators_of(self, ranks: Iterable[int]) -> dict[int, Operators]:
        """Operators by the kinds of machines among these ranks."""
        kinds = np.unique(self._kinds_of(ranks)).tolist() if len(self.operators) > 1 else [0]
        return {kind: self.operators[kind] for kind in kinds}

    def _slowest(self, ranks: Iterable[int], make: Callable[[Operators], list[Segment]]) -> list[Segment]:
        """The program on the machines, among these ranks', on which it takes longest."""
        return max((make(operators) for operators in self._operators_of(ranks).values()), key=_seconds)

    def _remember(self, key: tuple[Any, ...], make: Callable[[], list[Segment]]) -> list[Segment]:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _work(
        self, stage: Stage, places: list[int], samples: _Samples, reward_seconds: float | None, ends: tuple[bool, bool]
    ) -> list[Segment]:
        ranks = stage.ranks_of(places[0])
        if stage.kind == "generate":
            segments = self._generate(stage, places, samples)
        elif reward_seconds is not None:
            segments = self._reward(reward_seconds)
        else:
            tokens = samples.prompts + samples.responses
            if self.scenario.workload.padded:
                tokens = np.full(len(tokens), self.padded_tokens)
            segments = self._pass(stage, ranks, tokens, ends)
        controller = self._controller(stage, ranks, len(samples.prompts), begins=stage.kind != "train" or ends[0])
        if not all(operators.gpu.overlaps_communication for operators in self._operators_of(ranks).values()):
            segments = [replace(s, prefetch=0) for s in segments]
        return [_widen(s, ranks, [stage.ranks_of(p) for p in places]) for s in (*controller, *segments)]

    def _generate(self, stage: Stage, places: list[int], samples: _Samples) -> list[Segment]:
        result = self._generation(stage, places[0], samples)
        if not result.segments:
            return []
        *others, last = result.segments
        return [*others, replace(last, counts=generation_counts(result.stats, len(places)))]

    def _shares(self, stage: Stage, samples: _Samples) -> list[np.ndarray]:
        """Which samples of a place go to which of its engines."""
        generation = self.scenario.generation
        tokens = samples.prompts + samples.responses
        return route_samples(tokens, stage.size // generation.ranks_per_engine, generation.routing)

    def _generation(self, stage: Stage, place: int, samples: _Samples) -> GenerationResult:
        generation, holding = self.scenario.generation, self.holdings[stage.model]
        shares, ranks = self._shares(stage, samples), stage.ranks_of(place)
        kinds = self._kinds[Layout.of_engines(ranks, holding.use, generation).grid]
        of_replicas = kinds[0, :, 0].tolist()
        engines = [(self._steps_of(stage.model, kind), self._kv_capacity(kind)) for kind in of_replicas]
        tables = None
        if samples.turns is not None:
            tables = [
                self._turn_steps(stage.model, kind, samples, share)
                for kind, share in zip(of_replicas, shares, strict=True)
            ]
        results = {
            kind: generation_program(
                holding.use,
                generation,
                [samples.prompts[s] for s in shares],
                [samples.responses[s] for s in shares],
                ranks,
                operators,
                domain=holding.ranks,
                engines=engines,
                groups=[samples.groups[s] for s in shares] if len(samples.groups) else None,
                tables=tables,
            )
            for kind, operators in self._operators_of(ranks).items()
        }
        segments = mixed_program({kind: result.segments for kind, result in results.items()}, kinds)
        stats = next(iter(results.values())).stats
        self._finished[self._finished_key(ranks, samples)] = stats
        return GenerationResult(segments, stats)

    def _turn_steps(self, model: str, kind: int, samples: _Samples, share: np.ndarray) -> _Steps:
        """What one engine does with its share of samples in turns."""
        steps = self._steps_of(model, kind)
        engine = self._rollouts.engine(steps, kind)
        assert isinstance(engine, TurnEngine) and samples.turns is not None
        groups = samples.groups[share] if len(samples.groups) else None
        return turn_steps(engine, samples.prompts[share], [samples.turns[k] for k in share], steps, groups)

    def _finished_key(self, ranks: tuple[int, ...], samples: _Samples) -> tuple[Any, ...]:
        """What the seconds of engines depend on: samples and machines."""
        return *samples.key, self._kinds_of(ranks).tobytes()

    def _steps_of(self, model: str, kind: int) -> StepSeconds:
        if (model, kind) not in self._steps:
            use = self.holdings[model].use
            self._steps[model, kind] = StepSeconds(self.operators[kind], use, self.scenario.generation)
        return self._steps[model, kind]

    def _kv_capacity(self, kind: int) -> float | None:
        if self.kv_capacity_tokens is None or not self.scenario.generation.continuous:
            return None
        return self.kv_capacity_tokens[kind]

    def _pass(self, stage: Stage, ranks: tuple[int, ...], tokens: np.ndarray, ends: tuple[bool, bool]) -> list[Segment]:
        use, head = self.holdings[stage.model].use, head_of(stage.model)
        if stage.model == "actor" and stage.name.partition(".")[0] == "ref":  # with its adapters off
            use = use.model_copy(update={"lora_rank": 0})
        layout = Layout.of(ranks, use)
        share_out = shares_by_tokens if self.scenario.workload.balanced else per_replica
        shares = share_out(tokens, layout.replicas)
        first, last = ends

        def on(kind: int, operators: Operators) -> list[Segment]:
            if stage.kind == "score":
                return score_program(use, shares, layout, operators, head=head)
            node = self.scenario.cluster.all_parts[kind].node
            host = Host(node.host_memory_bytes_per_second.value, self._nodes)
            return train_program(use, shares, layout, operators, head=head, host=host, first=first, last=last)

        programs = {
            kind: self._slowed(stage, on(kind, operators)) for kind, operators in self._operators_of(ranks).items()
        }
        kinds = self._kinds[layout.grid].reshape(layout.pipeline_parallel, layout.replicas, -1)
        return mixed_program(programs, kinds)

    def _slowed(self, stage: Stage, program: list[Segment]) -> list[Segment]:
        """With what no term explains of such a stage (`overheads.unexplained`)."""
        overheads = self.scenario.overheads.unexplained
        factor = overheads.scoring if stage.kind == "score" else overheads.training
        if factor == 1 or not self.scenario.effects.efficiency:
            return program
        return [segment.slowed(factor) for segment in program]

    def _reward_seconds(self, f: Firing, stage: Stage, ids: np.ndarray) -> float:
        """Of a reward that no model of ours gives."""
        chosen = self.scenario.algorithm
        if self.reward_seconds is None:
            return function_seconds(stage, len(ids), chosen, self._nodes)
        latencies = self.reward_seconds[f.iteration % len(self.reward_seconds)][ids]
        arrivals = self._arrivals(f.iteration)[ids] if chosen.reward_streams else np.zeros(len(ids))
        return queue_seconds(stage.ranks_of(f.place), arrivals, latencies, chosen, self._nodes)

    def _reward(self, seconds: float) -> list[Segment]:
        chosen = self.scenario.algorithm.reward
        bound = "host" if chosen == "function" else chosen
        return [Segment(f"reward {chosen}", np.full((1, 1), seconds), bound={bound: seconds})] if seconds else []

    def _arrivals(self, iteration: int) -> np.ndarray:
        """When each response was there, in seconds (not above 0) from the end of its chunk on all places.

        Places are taken to start a chunk together, and transfers to take no time. Responses of engines that go on from
        chunk to chunk all come with their chunk.
        """
        graph = self.fold.original
        gen = next(s for s in graph.stages() if s.kind == "generate")
        key = iteration % len(self.lengths)
        if key in self._arrived:
            return self._arrived[key]
        arrivals = self._arrived[key] = np.zeros(self.scenario.samples_through(gen.name))
        for chunk in range(gen.chunks if gen.name not in self._rollouts.stages else 0):
            done: list[tuple[np.ndarray, np.ndarray]] = []
            for place in gen.all_places(chunk):
                f = Firing(iteration, gen.name, chunk, max(place, 0))
                ids = self.numbers(f)
                prompts, responses = self._lengths(f, ids)
                samples = _Samples(prompts, responses, *self._generated_as(f, gen, ids))
                stats = self._finished.get(self._finished_key(gen.ranks_of(f.place), samples))
                if stats is None:
                    stats = self._generation(gen, f.place, samples).stats
                for share, engine in zip(self._shares(gen, samples), stats, strict=bool(stats)):
                    done.append((ids[share], engine.completion_seconds))
            last = max((float(seconds.max(initial=0.0)) for _, seconds in done), default=0.0)
            for ids, seconds in done:
                arrivals[ids] = seconds - last
        return arrivals

    def _sleeps(self, model: str) -> bool:
        """Whether a copy of a model is an engine that has to make room for training, and that this takes time."""
        generation, effects = self.scenario.generation, self.scenario.effects
        if generation.sleep is None or not effects.sync or model != "shadow_actor":
            return False
        return shares_with_training(self.holdings, self.holdings[model])

    def _between_sleeps(self, f: Firing, work: list[Segment]) -> list[Segment]:
        """The work of a firing of an engine that wakes up for it and sleeps afterwards.

        The sync has brought its weights back before the first chunk; validation comes right after that, and leaves them
        where they are.
        """
        stage = self.fold.original.at(f.stage)
        if stage.kind != "generate" or not work or not self._sleeps(stage.model):
            return work
        generation, use = self.scenario.generation, self.holdings[stage.model].use
        ranks = [rank for place in self.fold.places(f) for rank in stage.ranks_of(place)]
        rate, first = self.scenario.overheads.map_bytes_per_second, f.chunk == 0
        weights = max(engine_weight_bytes(use, generation, stage) for stage in generation.different_stages)
        tokens = max(self._kv_capacity(kind) or 0.0 for kind in self._operators_of(tuple(ranks)))
        cache = tokens * cache_bytes_per_token(use, generation)
        wake = wake_program(
            ranks, weight_bytes=0.0 if first else weights, cache_bytes=cache, from_host=True, map_bytes_per_second=rate
        )
        sleep = sleep_program(
            ranks,
            weight_bytes=0.0 if f.stage == "testing" else weights,
            cache_bytes=cache,
            to_host=generation.sleep == "level_1",
            map_bytes_per_second=rate,
        )
        return [*wake, *work, *sleep]

    def _with_states(self, f: Firing, work: list[Segment]) -> list[Segment]:
        """The work of a firing that finds states of its model on the host, or leaves them there.

        Optimizer states come with the first chunk of updates and leave after the last; weights with the first stage of
        an iteration that needs them and after the last, or with every stage (`calls`).
        """
        stage = self.fold.original.at(f.stage)
        held = self.holdings.get(stage.model)
        if held is None or held.use.offload_states is None or held.purpose != "train" or not self.scenario.effects.sync:
            return work
        own, updates = users(self.fold.original, held.name), stage.kind == "train"
        states = self._leaving_of(held)
        optimizer, weights = states.optimizer + states.gradients, states.weights
        calls = held.use.offload_states == "calls"
        starts, ends = f.chunk == 0, f.chunk == stage.firings - 1
        back = starts * ((calls or stage.name == own[0].name) * weights + updates * optimizer)
        away = ends * ((calls or stage.name == own[-1].name) * weights + updates * optimizer)
        ranks = [rank for place in self.fold.places(f) for rank in stage.ranks_of(place) if rank in held.ranks]
        rate = self.scenario.overheads.pageable_bytes_per_second if calls else None
        there, gone = states_program("from_host", ranks, back, rate), states_program("to_host", ranks, away, rate)
        return [*there, *work, *gone]

    def _leaving_of(self, held: Holding) -> Bytes:
        """States that leave a rank of the fullest pipeline stage."""
        whole = held.use.model_copy(update={"offload_states": None})
        by_stage = (
            leaving_bytes(held.use, static_bytes(whole, "train", held.data_parallel, head=head_of(held.name), stage=s))
            for s in (0, held.use.pipeline_parallel // 2, held.use.pipeline_parallel - 1)
        )
        return max(by_stage, key=lambda states: states.total)

    def _waking(self, target: Holding) -> list[Segment]:
        """The weights of a sleeping engine, before they are overwritten."""
        if not self._sleeps(target.name):
            return []
        generation = self.scenario.generation
        weights = max(engine_weight_bytes(target.use, generation, stage) for stage in generation.different_stages)
        return wake_program(
            target.ranks,
            weight_bytes=weights,
            from_host=generation.sleep == "level_1",
            map_bytes_per_second=self.scenario.overheads.map_bytes_per_second,
        )

    def _sync(self, stage: Stage) -> list[Segment]:
        source, target = self.holdings[stage.model], self.holdings[stage.target or ""]
        same = set(source.ranks) == set(target.ranks)
        choice = self.scenario.weight_sync
        if target.purpose == "generate":
            held = Layout.of_engines(target.ranks, target.use, self.scenario.generation)
        elif target.use.zero_stage == 3 and not same:  # they hold one copy together, each a shard of it
            held = Layout(target.ranks, len(target.ranks))
        else:
            held = Layout.of(target.ranks, target.use)
        segments = self._slowest(
            stage.ranks,
            lambda operators: sync_program(
                source.use,
                Layout.of(source.ranks, source.use),
                held,
                operators,
                method="reshard" if same else choice.method,
                bucket_bytes=choice.bucket_bytes,
                head=head_of(stage.model),
                path=choice,
                rank_nodes=self._nodes,
            ),
        )
        moved = [moved for segment in segments if (moved := _between_ranks(segment)) is not None]
        return [*self._waking(target), *moved]

    def _checkpoint(self) -> list[Segment]:
        """Weights, master weights and moments of the trained models, written at the storage's rate."""
        trained = [h for h in self.holdings.values() if h.purpose == "train"]
        written = sum(
            parameters(h.use.shape, head_of(h.name)) * (h.use.bytes_per_parameter + MASTER_BYTES + MOMENT_BYTES)
            for h in trained
        )
        seconds = written / self.scenario.periodic.checkpoint_bytes_per_second
        return [Segment("save_checkpoint", np.full((1, 1), seconds), bound={"storage": seconds})]

    def _controller(self, stage: Stage, ranks: tuple[int, ...], samples: int, *, begins: bool = True) -> list[Segment]:
        """What the controller and the start of any firing take. begins: False for later mini-batches of one call."""
        moved = samples * stage.places * self.padded_tokens * CONTROLLER_BYTES_PER_TOKEN[stage.kind]
        return self._slowest(
            ranks, lambda operators: [*controller_program(moved, operators, begins=begins), *firing_program(operators)]
        )


def _seconds(program: list[Segment]) -> float:
    """Of its compute, on the slowest replica."""
    return sum(float((s.compute_seconds @ s.repeats).max()) for s in program)


def _between_ranks(segment: Segment) -> Segment | None:
    """A sync's segment without what a rank would send to itself (copies that share some of their ranks)."""
    groups = [
        tuple(g for g in map(tuple, map(dict.fromkeys, t.groups)) if len(g) > 1 or t.op in ("to_host", "from_host"))
        for t in segment.transfers
    ]
    moved = tuple(replace(t, groups=g) for t, g in zip(segment.transfers, groups, strict=True) if g)
    return None if segment.transfers and not moved else replace(segment, transfers=moved)


def _widen(segment: Segment, ranks: tuple[int, ...], places: list[tuple[int, ...]]) -> Segment:
    """The transfers of all places that do the same at the same time, from those of the first."""
    if len(places) == 1 or not segment.transfers:
        return segment
    transfers = []
    for transfer in segment.transfers:
        inside = all(rank in ranks for group in transfer.groups for rank in group)
        if inside:
            as_place = [dict(zip(ranks, other, strict=True)) for other in places]
            groups = tuple(tuple(rename[r] for r in group) for rename in as_place for group in transfer.groups)
            transfer = replace(transfer, groups=groups)
        transfers.append(transfer)
    return replace(segment, transfers=tuple(transfers))
