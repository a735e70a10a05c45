"""Generate firings that leave responses unfinished: which are begun, which end, and how old they are when trained.

One pool of engines for all stages of one step (`gen`, and `gen.tail` on fewer ranks). The responses that end first
fill the first chunk, so scoring and training see their lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rlhfsim.batch import kept_together, samples_of
from rlhfsim.firing import Firing
from rlhfsim.fold import Fold
from rlhfsim.graph import Stage
from rlhfsim.layout import Holding
from rlhfsim.rollouts import to_begin
from rlhfsim.spec.lengths import DrawnTurns
from rlhfsim.spec.scenario import Scenario

from .generation import StepSeconds, _axis, _balanced, _bound, _gather, _inside, generation_counts
from .operators import Operators
from .pool import Cut, Engine, Plan, Pool, Sample
from .segment import Segment
from .turns import TurnEngine

Lengths = list[tuple[np.ndarray, np.ndarray]]


def base_name(stage: str) -> str:
    """`gen` of `gen.tail`."""
    return stage.partition(".")[0]


class Rollouts:
    """All such firings of one scenario's graph, in the order in which they happen.

    operators, kv_capacity_tokens: as of `CostModel`; all engines of a pool are of one kind.
    lengths: prompt and response tokens by iteration; response number n has those of iteration n // samples. turns: in
        which these responses are generated, by iteration (None: at once).
    """

    def __init__(
        self,
        scenario: Scenario,
        fold: Fold,
        holdings: dict[str, Holding],
        operators: Sequence[Operators],
        lengths: Lengths,
        kv_capacity_tokens: Mapping[int, float] | None,
        turns: list[DrawnTurns] | None = None,
    ) -> None:
        self.scenario, self.graph, self.holdings, self.operators = scenario, fold.original, holdings, operators
        self._kinds = scenario.cluster.rank_kinds
        self.lengths, self.kv_capacity_tokens, self.turns = lengths, kv_capacity_tokens, turns
        self.samples = scenario.workload.samples
        self._together = kept_together(self.graph, self.samples, scenario.workload.responses_per_prompt)
        steps = {base_name(s.name) for s in self.graph.stages() if s.unfinished != "wait"}
        self.stages = {s.name for s in self.graph.stages() if base_name(s.name) in steps and scenario.effects.decode}
        self._pools: dict[str, Pool] = {}
        self._plans: dict[Firing, Plan] = {}
        self._stops: dict[Firing, Cut] = {}
        self._batches: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[str, np.ndarray] = {}
        self._begun = 0  # responses, of all pools

    def batch(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response tokens of an iteration's samples, as they were handed over."""
        if iteration in self._batches:
            return self._batches[iteration]
        return self.lengths[iteration % len(self.lengths)]

    # -- a firing -----------------------------------------------------------------------------------------

    def segments(self, f: Firing) -> list[Segment]:
        """What it takes to begin f, or to go on with it, until its chunk is full."""
        stage, pool = self.graph.at(f.stage), self._pool(f.stage)
        generation, holding = self.scenario.generation, self.holdings[stage.model]
        engines = stage.size // generation.ranks_per_engine
        pool.set_engines(engines)
        if stage.max_age is not None:
            pool.throw_away(f.iteration - stage.max_age)
        self._begin(f, stage, pool)
        plan = self._plans[f] = Plan(pool, len(self._ids(f)))
        cut = plan.cut(plan.seconds)
        operators = self.operators[self._kinds[stage.ranks[0]]]
        working = _segment(plan, cut, self._seconds(stage, plan, cut), self.scenario, holding, stage, operators)
        return [*_gather(holding.use, generation, holding.ranks, engines, operators), working]

    def _begin(self, f: Firing, stage: Stage, pool: Pool) -> None:
        """Hand new prompts to the engines: as many as the stage may have at work."""
        counted = pool.begun - pool.thrown_away
        chunk = len(self._ids(f))
        missing = to_begin(self.graph, stage, self.samples, chunk, pool.version, counted, pool.handed_over)
        size = pool.group_size
        pool.submit([self._sample(stage, size) for _ in range(max(0, -(-missing // size)) * size)])

    def _sample(self, stage: Stage, group_size: int) -> Sample:
        """The next response, in the order in which plain generation begins those of an iteration."""
        iteration, k = divmod(self._begun, self.samples)
        self._begun += 1
        index = int(self._order(stage.name, group_size)[k])
        number = iteration * self.samples + index
        prompts, responses = self.lengths[iteration % len(self.lengths)]
        turns = self.turns[iteration % len(self.turns)].by_sample[index] if self.turns else ()
        return Sample(number, number // group_size, int(prompts[index]), int(responses[index]), turns)

    def _order(self, name: str, group_size: int) -> np.ndarray:
        """An iteration's samples lane by lane; as they are where that would part a prompt's responses."""
        if name not in self._orders:
            chunks = [Firing(0, name, chunk, 0) for chunk in range(self.graph.at(name).chunks)]
            everyone = range(self.graph.lanes)
            ids = [samples_of(self.graph, f, self.samples, together=self._together, lanes=everyone) for f in chunks]
            whole = self._together == group_size
            self._orders[name] = np.concatenate(ids) if whole else np.arange(self.samples)
        return self._orders[name]

    def stop_share(self, f: Firing, share: float) -> float | None:
        """The share at which every engine has ended the step in which it is asked to stop; None: the chunk is full."""
        plan = self._plans[f]
        cut = self._stops[f] = plan.cut(share * plan.seconds)
        return None if plan.ends_within(cut, len(self._ids(f))) else cut.seconds / plan.seconds

    def paused(self, f: Firing) -> dict[str, float]:
        """f has stopped where `stop_share` said (or before it began)."""
        plan, pool = self._plans.pop(f), self._pool(f.stage)
        cut = self._stops.pop(f, None) or plan.cut(0.0)
        pool.go_to(plan, cut, cut.seconds)
        return self._counts(pool, cut)

    def ended(self, f: Firing) -> dict[str, float]:
        """f has filled its chunk: hand it over, and see to what is unfinished."""
        stage, plan, pool = self.graph.at(f.stage), self._plans.pop(f), self._pool(f.stage)
        cut = self._stops.pop(f, None) or plan.cut(plan.seconds)
        pool.go_to(plan, cut, self._seconds(stage, plan, cut))
        if stage.unfinished in ("carry", "drop"):
            pool.take_out()
        done = self._hand_over(f, pool)
        if stage.unfinished == "drop":
            pool.throw_away()
        return self._counts(pool, cut) | _ages(done, f.iteration)

    def _seconds(self, stage: Stage, plan: Plan, cut: Cut) -> float:
        """How long a firing takes: until its chunk is full, and where it stops the engines until their steps end."""
        return plan.seconds if stage.unfinished == "keep" else max(plan.seconds, cut.seconds)

    def _hand_over(self, f: Firing, pool: Pool) -> list[Sample]:
        """They fill the chunk in the order of their numbers (as slime sorts a batch)."""
        ids = np.sort(self._ids(f))
        done = sorted(pool.hand_over(len(ids)), key=lambda sample: sample.number)
        if f.iteration not in self._batches:
            prompts, responses = self.batch(f.iteration)
            self._batches[f.iteration] = prompts.copy(), responses.copy()
        prompts, responses = self._batches[f.iteration]
        prompts[ids], responses[ids] = [s.prompt for s in done], [s.response for s in done]
        return done

    def _ids(self, f: Firing) -> np.ndarray:
        return samples_of(self.graph, f, self.samples, together=self._together)

    @staticmethod
    def _counts(pool: Pool, cut: Cut) -> dict[str, float]:
        """Of a firing, or a part of one."""
        found = generation_counts([table.stats() for table in cut.tables])
        found |= dict.fromkeys(("preemptions", "recomputed_tokens", "thrown_away_tokens"), 0.0)
        found |= {name: float(count) for name, count in pool.counts.items()}
        pool.counts.clear()
        return found

    # -- engines ------------------------------------------------------------------------------------------

    def enter(self, stage: Stage, version: int) -> None:
        """A stage has given its copy of a model weights of this version."""
        for name in self.stages:
            if stage in self.graph.refreshed_by(self.graph.at(name).model):
                self._pool(name).enter(version, self.graph.at(name).recompute)

    def engine(self, steps: StepSeconds, kind: int) -> Engine:
        """One without work, on machines of this kind."""
        generation, turns, blocks = self.scenario.generation, self.scenario.workload.turns, None
        if self.kv_capacity_tokens is not None:
            blocks = int(self.kv_capacity_tokens[kind]) // generation.block_tokens
        if turns:
            return TurnEngine(generation, blocks, turns, steps)
        return Engine(generation, blocks, steps.state_blocks)

    def _pool(self, stage: str) -> Pool:
        step = base_name(stage)
        if step not in self._pools:
            kind, use = self._kinds[self.graph.at(stage).ranks[0]], self.holdings[self.graph.at(stage).model].use
            steps = StepSeconds(self.operators[kind], use, self.scenario.generation)
            size = self.scenario.workload.responses_per_prompt
            self._pools[step] = Pool(self.engine(steps, kind), steps, size)
        return self._pools[step]


def _segment(
    plan: Plan, cut: Cut, seconds: float, scenario: Scenario, holding: Holding, stage: Stage, operators: Operators
) -> Segment:
    """The engines' steps as one segment that may be stopped: they meet at its end and nowhere else."""
    prefill, decode = _axis(cut.tables, True), _axis(cut.tables, False)
    compute = np.hstack([prefill.compute_seconds, decode.compute_seconds, np.zeros((len(cut.tables), 1))])
    repeats = np.concatenate([prefill.steps, decode.steps, [1.0]])
    tokens = np.concatenate([prefill.tokens, decode.tokens, [0.0]])
    own = compute @ repeats
    # Each engine works from the plan's begin: first at the step that was in flight, last at one that is not done yet.
    busy = np.minimum(cut.ends, seconds)
    compute *= np.divide(np.minimum(busy, own), own, out=np.zeros_like(own), where=own > 0)[:, None]
    compute[:, -1] += np.maximum(busy - own, 0.0)
    others = np.concatenate([prefill.waits, decode.waits, [0.0]])
    transfers = _inside(holding.use, scenario.generation, stage.ranks, tokens, others)
    bound: dict[str, float] = dict(Counter(_bound(cut.tables, True)) + Counter(_bound(cut.tables, False)))
    if waits := sum(table.idle_seconds for table in cut.tables):
        bound["tools"] = waits / len(cut.tables)
    return Segment("generate", _balanced(compute, operators.effects), repeats, transfers, bound=bound, stops=True)


def _ages(samples: list[Sample], version: int) -> dict[str, float]:
    """By how many versions the weights that train these responses are newer than those that drew them."""
    return {
        "samples": float(len(samples)),
        "age_steps": float(sum(s.age(version) for s in samples)),
        "oldest_steps": float(max((version - (s.begun_with or 0) for s in samples), default=0)),
    }
