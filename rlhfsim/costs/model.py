"""From a firing to its segments: which samples it handles, how its model is split there, and what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np

from rlhfsim.batch import kept_together, per_replica, samples_of
from rlhfsim.firing import Firing
from rlhfsim.fold import Fold
from rlhfsim.graph import Message, Stage
from rlhfsim.layout import Holding
from rlhfsim.memory import MASTER_BYTES, MOMENT_BYTES
from rlhfsim.model import Head, parameters
from rlhfsim.spec.scenario import Scenario

from .generation import StepSeconds, generation_counts, generation_program, route_samples
from .operators import Operators
from .passes import Host, Layout, controller_program, firing_program, score_program, train_program
from .segment import Segment, Transfer
from .sync import sync_program

# Bytes of a message per token or per sample (paper's code: ids and masks are int64, everything else is cast to 16 bit).
FIELD_BYTES_PER_TOKEN = {"tokens": 8, "mask": 8, "log_probs": 2, "ref_log_probs": 2, "values": 2, "rewards": 2}
FIELD_BYTES_PER_SAMPLE = {"score": 2}

VALUE_HEADS = ("critic", "reward", "shadow_critic")


def head_of(model: str) -> Head:
    """What sits on top of a copy of a model."""
    return "value" if model in VALUE_HEADS else "lm"


class CostModel:
    """The cost of every firing of one scenario's (folded) graph.

    lengths: prompt and response tokens of every sample, by iteration. kv_capacity_tokens: of one engine, by model copy.
    """

    def __init__(
        self,
        scenario: Scenario,
        fold: Fold,
        holdings: dict[str, Holding],
        operators: Operators,
        lengths: list[tuple[np.ndarray, np.ndarray]],
        kv_capacity_tokens: float | None,
    ) -> None:
        self.scenario, self.fold, self.holdings, self.operators = scenario, fold, holdings, operators
        self.lengths, self.kv_capacity_tokens = lengths, kv_capacity_tokens
        self._steps: dict[str, StepSeconds] = {}
        self._programs: dict[tuple[Any, ...], list[Segment]] = {}
        workload = scenario.workload
        self._together = kept_together(fold.original, workload.samples, workload.responses_per_prompt)
        self.padded_tokens = workload.prompt_tokens.longest + workload.response_tokens.longest

    def program(self, f: Firing) -> list[Segment]:
        places = self.fold.places(f)
        stage = self.fold.original.at(f.stage)
        if stage.kind == "swap" or not stage.works_in(f.iteration):
            return []
        if stage.kind == "store":
            return self._remember((f.stage,), self._checkpoint)
        if stage.kind == "sync":
            return self._remember((f.stage,), lambda: self._sync(stage))
        # A firing whose place was decided late is known by its chunk; the place says which ranks do it.
        first = f._replace(place=places[0])
        prompts, responses = self._samples(first)
        key = (f.stage, tuple(places), prompts.tobytes(), responses.tobytes())
        return self._remember(key, lambda: self._work(stage, places, prompts, responses))

    def _samples(self, f: Firing) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response tokens of a firing; validation has prompts of its own, as long as the others."""
        prompts, responses = self.lengths[f.iteration % len(self.lengths)]
        if f.stage == "testing":
            count = self.scenario.periodic.validation_prompts
            prompts, responses = np.resize(prompts, count), np.resize(responses, count)
        ids = samples_of(self.fold.original, f, len(prompts), together=self._together)
        return prompts[ids], responses[ids]

    def message(self, messages: list[Message]) -> Transfer | None:
        """All lanes of one result on their way to one place; lanes that stay on their rank do not move."""
        original = self.fold.original
        producer, consumer = original.at(messages[0].producer.stage), original.at(messages[0].consumer)
        pairs = [pair for m in messages for pair in self._pairs(producer, consumer, m) if pair[0] != pair[1]]
        if not pairs:
            return None
        moving = tuple(dict.fromkeys(pairs))
        lanes_per_pair = len(pairs) / len(moving)
        samples = self.scenario.workload.samples / original.lanes / producer.chunks * lanes_per_pair
        per_sample = sum(
            FIELD_BYTES_PER_TOKEN.get(name, 0) * self.padded_tokens + FIELD_BYTES_PER_SAMPLE.get(name, 0)
            for name in messages[0].fields
        )
        return Transfer("send", moving, samples * per_sample)

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

    def _remember(self, key: tuple[Any, ...], make: Callable[[], list[Segment]]) -> list[Segment]:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _work(self, stage: Stage, places: list[int], prompts: np.ndarray, responses: np.ndarray) -> list[Segment]:
        ranks = stage.ranks_of(places[0])
        if stage.kind == "generate":
            segments = self._generate(stage, places, prompts, responses)
        elif stage.model not in self.holdings:
            segments = self._reward_function(stage, len(prompts))
        else:
            tokens = prompts + responses
            if self.scenario.workload.padded:
                tokens = np.full(len(tokens), self.padded_tokens)
            segments = self._pass(stage, ranks, tokens)
        controller = controller_program(self._controller_bytes(stage, len(prompts)), self.operators)
        controller += firing_program(self.operators)
        if not self.scenario.cluster.gpu.overlaps_communication:
            segments = [replace(s, prefetch=0) for s in segments]
        return [_widen(s, ranks, [stage.ranks_of(p) for p in places]) for s in (*controller, *segments)]

    def _generate(self, stage: Stage, places: list[int], prompts: np.ndarray, responses: np.ndarray) -> list[Segment]:
        generation, holding, ranks = self.scenario.generation, self.holdings[stage.model], stage.ranks_of(places[0])
        engines = len(ranks) // generation.tensor_parallel
        shares = route_samples(prompts + responses, engines, generation.routing)
        if stage.model not in self._steps:
            self._steps[stage.model] = StepSeconds(self.operators, holding.use, generation)
        result = generation_program(
            holding.use,
            generation,
            [prompts[s] for s in shares],
            [responses[s] for s in shares],
            ranks,
            self.operators,
            kv_capacity_tokens=self.kv_capacity_tokens if generation.continuous else None,
            domain=holding.ranks,
            steps=self._steps[stage.model],
        )
        if not result.segments:
            return []
        *others, last = result.segments
        return [*others, replace(last, counts=generation_counts(result.stats, len(places)))]

    def _pass(self, stage: Stage, ranks: tuple[int, ...], tokens: np.ndarray) -> list[Segment]:
        use, head = self.holdings[stage.model].use, head_of(stage.model)
        layout = Layout.of(ranks, use)
        shares = per_replica(tokens, layout.replicas)
        if stage.kind == "score":
            return score_program(use, shares, layout, self.operators, head=head)
        node = self.scenario.cluster.node
        host = Host(node.host_memory_bytes_per_second.value, node.gpus_per_node)
        return train_program(use, shares, layout, self.operators, head=head, host=host)

    def _reward_function(self, stage: Stage, samples: int) -> list[Segment]:
        """The host's time for the samples of one place, in rounds of one a process.

        A node's processes are shared by all ranks of the stage there, equally; the node with the most ranks is slowest.
        """
        chosen, per_node = self.scenario.algorithm, self.scenario.cluster.node.gpus_per_node
        ranks = max(Counter(rank // per_node for rank in stage.ranks).values())
        rounds = ceil(Fraction(samples * ranks, stage.size * (chosen.reward_function_workers or ranks)))
        seconds = rounds * chosen.reward_function_seconds
        return [Segment("reward function", np.full((1, 1), seconds), bound={"host": seconds})] if seconds else []

    def _sync(self, stage: Stage) -> list[Segment]:
        source, target = self.holdings[stage.model], self.holdings[stage.target or ""]
        same = set(source.ranks) == set(target.ranks)
        choice = self.scenario.weight_sync
        # ZeRO-3 ranks hold one copy together, each a shard of it; other layouts one copy a replica.
        held = (
            Layout(target.ranks, len(target.ranks))
            if target.use.zero_stage == 3 and not same
            else Layout.of(target.ranks, target.use)
        )
        return sync_program(
            source.use,
            Layout.of(source.ranks, source.use),
            held,
            self.operators,
            method="reshard" if same else choice.method,
            bucket_bytes=choice.bucket_bytes,
            head=head_of(stage.model),
        )

    def _checkpoint(self) -> list[Segment]:
        """Weights, master weights and moments of the trained models, written at the storage's rate."""
        trained = [h for h in self.holdings.values() if h.purpose == "train"]
        written = sum(
            parameters(h.use.shape, head_of(h.name)) * (h.use.bytes_per_parameter + MASTER_BYTES + MOMENT_BYTES)
            for h in trained
        )
        seconds = written / self.scenario.periodic.checkpoint_bytes_per_second
        return [Segment("save_checkpoint", np.full((1, 1), seconds), bound={"storage": seconds})]

    def _controller_bytes(self, stage: Stage, samples: int) -> float:
        """Padded tokens and masks out to the workers of all places, one field back."""
        return samples * stage.places * self.padded_tokens * (2 * 8 + 4)


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
