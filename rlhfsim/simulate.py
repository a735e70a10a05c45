"""From a scenario to a timeline: graph, memory, costs, links, and the simulator, put together once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .batch import even
from .cluster import ClusterTopology
from .costs.kernels import Kernels, load_kernels
from .costs.model import CostModel
from .costs.operators import Operators
from .fold import Fold, fold, unfolded
from .graph import StageGraph
from .layout import Holding, graph_of, holdings_of
from .sim.run import run
from .spec.data import data_dir
from .spec.lengths import draw_lengths
from .spec.loader import length_dir
from .spec.scenario import Scenario
from .timeline import Timeline


@dataclass(frozen=True)
class Setup:
    """Everything about a scenario that needs no simulation."""

    scenario: Scenario
    graph: StageGraph
    holdings: dict[str, Holding]
    notes: tuple[str, ...]


def prepare(scenario: Scenario) -> Setup:
    """Build and check the scenario's graph. Raises InputError for impossible options or layouts."""
    graph, notes = graph_of(scenario)
    return Setup(scenario, graph, holdings_of(scenario, graph), tuple(notes))


def simulate(setup: Setup, *, seed: int | None = None) -> Timeline:
    """Run the scenario's iterations on length draws of `seed` (default: the scenario's)."""
    scenario = setup.scenario
    iterations = scenario.simulation.iterations
    seed = scenario.simulation.seed if seed is None else seed
    lengths = lengths_of(scenario, seed)
    operators = Operators(scenario.cluster.gpu, kernels_of(scenario.cluster.gpu.kernels), scenario.effects, scenario.overheads)
    topology = ClusterTopology(scenario.cluster, effects=scenario.effects)
    folded = folded_graph(setup, lengths)
    cost = CostModel(scenario, folded, setup.holdings, operators, lengths, None)
    spans = run(folded, cost, topology, iterations)
    info = {"scenario": scenario.name, "strategy": scenario.strategy.name, "cluster": scenario.cluster.name, "seed": seed}
    return Timeline(spans, scenario.cluster.gpus, iterations, info=info)


def lengths_of(scenario: Scenario, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Prompt and response tokens of every sample, one pair an iteration; equal means with `effects.decode` off."""
    draws = [draw_lengths(scenario.workload, seed, i, length_dir()) for i in range(scenario.simulation.iterations)]
    if scenario.effects.decode:
        return draws
    return [(_mean(prompts), _mean(responses)) for prompts, responses in draws]


def _mean(tokens: np.ndarray) -> np.ndarray:
    return np.full(len(tokens), max(1, round(float(tokens.mean()))))


def folded_graph(setup: Setup, lengths: list[tuple[np.ndarray, np.ndarray]]) -> Fold:
    """Symmetric ranks once, where all samples are equally long and equally many everywhere."""
    equal = all(np.all(tokens == tokens[0]) for pair in lengths for tokens in pair)
    if equal and even(setup.graph, setup.scenario.workload.samples):
        return fold(setup.graph)
    return unfolded(setup.graph)


@lru_cache(maxsize=16)
def kernels_of(name: str) -> Kernels:
    return load_kernels(data_dir("hw_specs") / "kernels" / f"{name}.yaml")
