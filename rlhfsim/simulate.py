"""From a scenario to a timeline: graph, memory, costs, links, and the simulator, put together once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .batch import even, first_kept
from .cluster import ClusterTopology, Collectives, default_collectives
from .costs.kernels import Kernels, load_kernels
from .costs.measured import measured_kernels
from .costs.model import CostModel, head_of
from .costs.operators import Operators
from .errors import InputError
from .fits import Fit, Memory, p99_tokens
from .fold import Fold, fold, unfolded
from .graph import Stage, StageGraph
from .layout import Holding, graph_of, holdings_of, placement_notes
from .metrics import slack_seconds
from .model import forward_flops, training_flops
from .spec.data import data_dir
from .spec.hardware import Cluster, Precision
from .spec.lengths import DrawnTurns, draw_kept, draw_lengths, draw_seconds, draw_turns
from .spec.loader import length_dir
from .spec.scenario import Scenario, Workload
from .timeline import MemorySample, Span, Timeline


@dataclass(frozen=True)
class Setup:
    """Everything about a scenario that needs no simulation."""

    scenario: Scenario
    graph: StageGraph
    holdings: dict[str, Holding]
    memory: Memory
    notes: tuple[str, ...]

    def fit(self, seed: int | None = None) -> Fit:
        """Memory at maximum lengths, and at the 99th percentile of the drawn ones."""
        return self.memory.fit(p99_tokens(lengths_of(self.scenario, self._seed(seed))))

    @property
    def label(self) -> str:
        """Strategy and engine, as tables and figures call this setup."""
        return f"{self.scenario.strategy.name}, {self.scenario.generation.engine}"

    def _seed(self, seed: int | None) -> int:
        return self.scenario.simulation.seed if seed is None else seed


def prepare(scenario: Scenario) -> Setup:
    """Build and check the scenario's graph. Raises InputError for impossible options or layouts."""
    graph, notes = graph_of(scenario)
    holdings = holdings_of(scenario, graph)
    notes += placement_notes(scenario, graph, holdings)
    notes += measured_of(scenario)
    return Setup(scenario, graph, holdings, Memory(scenario, graph, holdings), (*scenario.cluster.doubts, *notes))


def measured_of(scenario: Scenario) -> list[str]:
    """Which numbers are measured tables' instead of the curves', and of which software; of each kind of GPU."""
    tables = [measured_kernels(part.gpu, kernels_of(part.gpu.kernels)) for part in scenario.cluster.all_parts]
    return list(dict.fromkeys(one.label for one in tables if one))


def simulate(setup: Setup, *, seed: int | None = None) -> Timeline:
    """Run the scenario's iterations on length draws of `seed` (default: the scenario's).

    Raises DoesNotFit where an engine cannot hold one sequence. Whether the rest fits is `Setup.fit`'s to say.
    """
    scenario, seed = setup.scenario, setup._seed(seed)
    lengths = lengths_of(scenario, seed)
    spans = _run(setup, folded_graph(setup, lengths), lengths, scenario.simulation.iterations, seed)
    info = {
        "scenario": scenario.name,
        "strategy": scenario.strategy.name,
        "cluster": scenario.cluster.name,
        "seed": seed,
        "engine": scenario.generation.engine,
        "ranks_per_node": scenario.cluster.node.gpus_per_node,
    }
    if scenario.cluster.parts:
        info["nodes"] = scenario.cluster.rank_nodes
    if setup.graph.off_policy:
        info["off_policy"] = True
    return Timeline(
        spans,
        scenario.cluster.gpus,
        scenario.simulation.iterations,
        memory=_memory_samples(setup.memory, spans),
        info=info,
    )


def slack(setup: Setup, timeline: Timeline) -> dict[str, float]:
    """How much longer each stage could take, in seconds; which firings wait for which, the setup's graph says."""
    return slack_seconds(timeline, folded_graph(setup, lengths_of(setup.scenario, timeline.info["seed"])).graph.needs)


def _run(
    setup: Setup, folded: Fold, lengths: list[tuple[np.ndarray, np.ndarray]], iterations: int, seed: int
) -> list[Span]:
    from .sim.run import run  # SimPy is not needed by those who only ask what fits

    return run(folded, costs_of(setup, folded, lengths, seed), topology_of(setup.scenario), iterations)


def topology_of(scenario: Scenario) -> ClusterTopology:
    """The links of the scenario's cluster, with what its kernels' files measured."""
    collectives = [collectives_of(part) for part in scenario.cluster.all_parts]
    return ClusterTopology(scenario.cluster, collectives, scenario.effects)


def collectives_of(part: Cluster) -> Collectives:
    collectives = default_collectives(part)
    if part.node.gpu_link != "pcie" or part.gpu.fitted_on:  # shipped curves were measured over NVLink
        kernels = kernels_of(part.gpu.kernels)
        tables = measured_kernels(part.gpu, kernels)
        collectives = collectives.updated(tables.with_collectives if tables else kernels)
    return collectives


def costs_of(setup: Setup, folded: Fold, lengths: list[tuple[np.ndarray, np.ndarray]], seed: int) -> CostModel:
    """What every firing costs, with lengths drawn by `lengths_of` with this seed."""
    scenario = setup.scenario
    return CostModel(
        scenario,
        folded,
        setup.holdings,
        [
            Operators(
                part.gpu,
                kernels_of(part.gpu.kernels),
                scenario.effects,
                scenario.overheads_of(part),
                host_gpus=part.node.host_gpus,
            )
            for part in scenario.cluster.all_parts
        ],
        lengths,
        setup.memory.kv_capacity_by_kind,
        batches=[numbers for _, numbers in rounds_of(scenario, seed)] if scenario.rounds > 1 else None,
        reward_seconds=reward_seconds_of(scenario, seed) if scenario.algorithm.queued else None,
        turns=turns_of(scenario, seed),
    )


def periodic_seconds(setup: Setup) -> float:
    """What validation and checkpoints add to an iteration, on average over their periods (no part of the step time).

    What comes in every iteration is in the step time already.
    """
    scenario, total = setup.scenario, 0.0
    for stage in setup.graph.stages():
        if stage.every > 1:
            alone = StageGraph(lanes=setup.graph.lanes)
            alone.stage(stage.name, stage.kind, stage.model, stage.ranks, size=stage.size)
            spans = _run(setup, unfolded(alone), lengths_of(scenario, 0), 1, seed=0)
            total += max(s.end_seconds for s in spans) / stage.every
    return total


def alone_seconds(setup: Setup, stage: str) -> float:
    """Of one iteration of a stage that runs alone, whether the rest of the scenario fits or not."""
    graph = StageGraph(lanes=setup.graph.lanes)
    graph.add_node(stage, stage=replace(setup.graph.at(stage), order=0, loop=None))
    alone, seed = replace(setup, graph=graph), setup.scenario.simulation.seed
    lengths = lengths_of(setup.scenario, seed)
    return max(s.end_seconds for s in _run(alone, folded_graph(alone, lengths), lengths, 1, seed))


def model_flops_utilisation(setup: Setup, step_seconds: float) -> float:
    """Share of the GPUs' peak that an iteration's floating-point operations need (MFU), of all GPUs and stages.

    Counted once: no recomputation (Chowdhery et al., "PaLM", 2022, appendix B). Padding counts where it is computed.
    Each stage at the peak of its model's precision, which is the mean of all GPUs' where they differ.
    """
    cluster = setup.scenario.cluster
    at_peak = sum(
        _stage_flops(setup, stage) / _mean_peak(cluster, setup.holdings[stage.model].use.precision)
        for stage in setup.graph.stages()
        if stage.kind in ("generate", "score", "train") and stage.every == 1 and stage.model in setup.holdings
    )
    return at_peak / (cluster.gpus * step_seconds)


def _mean_peak(cluster: Cluster, precision: Precision) -> float:
    """FLOP/s of one GPU."""
    rates = [part.gpu.flops_per_second.get(precision) for part in cluster.all_parts]
    peaks = [(rate.value if rate else 0.0, part.gpus) for rate, part in zip(rates, cluster.all_parts, strict=True)]
    if len({peak for peak, _ in peaks}) == 1:
        return peaks[0][0]
    return sum(peak * gpus for peak, gpus in peaks) / cluster.gpus


def _stage_flops(setup: Setup, stage: Stage) -> float:
    """Of one iteration, mean over the drawn lengths. With frozen lower layers the backward pass is the upper ones'
    share of the whole."""
    scenario, use, head = setup.scenario, setup.holdings[stage.model].use, head_of(stage.model)
    workload, spec = scenario.workload, use.shape
    generated = scenario.samples_through(stage.name) != workload.samples
    draws = (lengths_of if generated else trained_lengths_of)(scenario, scenario.simulation.seed)
    vectors: Any = [np.concatenate(part).astype(float) for part in zip(*draws, strict=True)]
    prompts, responses = vectors
    share = len(stage.serves) / setup.graph.lanes / len(draws)
    if stage.kind == "generate":  # the last token is drawn and never computed
        return float(np.sum(forward_flops(spec, 1, prompts + responses - 1, head, head_tokens=responses))) * share
    tokens = prompts + responses
    if workload.padded:
        tokens = np.full(len(tokens), float(workload.longest_sample))
    forward = np.sum(forward_flops(spec, 1, tokens, head))
    if stage.kind == "score":
        return float(forward) * share
    both = np.sum(training_flops(spec, 1, tokens, head, frozen_weights=use.lora_rank > 0))
    trained = (use.trainable_layers or spec.layers) / spec.layers
    return float(forward + (both - forward) * trained) * share * stage.epochs


def _memory_samples(memory: Memory, spans: list[Span]) -> list[MemorySample]:
    """Bytes on one rank of every kind: what the running stage needs, and what rests between stages."""
    samples = []
    for rank in memory.rank_kinds:
        resting = memory.resting(rank).components
        free_since = 0.0
        for span in (s for s in spans if rank in s.ranks):
            if span.start_seconds > free_since:
                samples.append(MemorySample(rank, free_since, "resting", resting))
            during = memory.during(memory.graph.at(span.firing.stage), rank).components
            samples.append(MemorySample(rank, span.start_seconds, span.firing.stage, during))
            free_since = span.end_seconds
        samples.append(MemorySample(rank, free_since, "resting", resting))
    return samples


def lengths_of(scenario: Scenario, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and response tokens of every sample that is generated, one pair an iteration; equal means with
    `effects.decode` off."""
    draws = [draw_lengths(workload, seed, i, length_dir()) for i, workload in enumerate(_generated(scenario, seed))]
    if scenario.effects.decode:
        return draws
    return [(_mean(prompts), _mean(responses)) for prompts, responses in draws]


def turns_of(scenario: Scenario, seed: int) -> list[DrawnTurns] | None:
    """The turns of these samples; None where there is one, or with `effects.decode` off."""
    if scenario.workload.turns is None or not scenario.effects.decode:
        return None
    return [draw_turns(workload, seed, i, length_dir()) for i, workload in enumerate(_generated(scenario, seed))]


def _generated(scenario: Scenario, seed: int) -> list[Workload]:
    """The workload of each iteration, with all prompts that are generated."""
    counts = [scenario.workload.prompts] * scenario.simulation.iterations
    if scenario.rounds > 1:
        counts = [rounds * scenario.gen_prompts for rounds, _ in rounds_of(scenario, seed)]
    return [scenario.workload.model_copy(update={"prompts": count}) for count in counts]


def trained_lengths_of(scenario: Scenario, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of the samples that are not thrown away."""
    draws = lengths_of(scenario, seed)
    if scenario.rounds == 1:
        return draws
    kept = [numbers for _, numbers in rounds_of(scenario, seed)]
    return [(prompts[ids], responses[ids]) for (prompts, responses), ids in zip(draws, kept, strict=True)]


def rounds_of(scenario: Scenario, seed: int) -> list[tuple[int, np.ndarray]]:
    """(rounds of generation, numbers of the samples that train), one pair an iteration.

    Raises InputError where the batch is not full after `algorithm.max_rounds`, as the frameworks do.
    """
    chosen, workload, most = scenario.algorithm, scenario.workload, scenario.rounds * scenario.gen_prompts
    found = []
    for iteration in range(scenario.simulation.iterations):
        kept = draw_kept(chosen.filter_accept_probability, most, seed, iteration)
        try:
            found.append(first_kept(kept, workload.prompts, scenario.gen_prompts, workload.responses_per_prompt))
        except ValueError as error:
            raise InputError(
                f"is {chosen.max_rounds}; in iteration {iteration} (seed {seed}) the batch of {workload.prompts} "
                f"prompts is not full by then: {error}",
                field="algorithm.max_rounds",
            ) from error
    return found


def reward_seconds_of(scenario: Scenario, seed: int) -> list[np.ndarray]:
    """What judge or sandbox take for every sample that is generated, one array an iteration."""
    latency = scenario.algorithm.reward_latency
    assert latency is not None
    samples = scenario.samples_through("reward")
    return [draw_seconds(latency, samples, seed, i, length_dir()) for i in range(scenario.simulation.iterations)]


def _mean(tokens: np.ndarray) -> np.ndarray:
    return np.full(len(tokens), max(1, round(float(tokens.mean()))))


def folded_graph(setup: Setup, lengths: list[tuple[np.ndarray, np.ndarray]]) -> Fold:
    """Symmetric ranks once, where all samples are alike and equally many everywhere."""
    equal = all(np.all(tokens == tokens[0]) for pair in lengths for tokens in pair)
    equal = equal and setup.scenario.workload.turns_alike
    if equal and setup.scenario.rounds == 1 and even(setup.graph, setup.scenario.workload.samples):
        return fold(setup.graph, cuts=accumulate(part.gpus for part in setup.scenario.cluster.parts))
    return unfolded(setup.graph)


@lru_cache(maxsize=16)
def kernels_of(name: str) -> Kernels:
    """The curves of that name, or in the file of that path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else data_dir("hw_specs") / "kernels" / f"{name}.yaml"
    return load_kernels(path)
