"""Engines that go on between firings: against a token-by-token twin, and against one run to the end."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from engine_twin import Response, TwinPool
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_generation import expanded, operators, use

from rlhfsim.costs.engine import Progress, continuous_runs
from rlhfsim.costs.generation import StepSeconds
from rlhfsim.costs.pool import Engine, Plan, Pool, Sample
from rlhfsim.spec.scenario import Generation, Speculative

DRAFTING = Speculative(tokens=2, acceptance_length=1.75, layers=0)


@functools.cache
def steps(drafts: bool = False) -> StepSeconds:
    return StepSeconds(
        operators(), use("opt-125m"), Generation(engine="engine", speculative=DRAFTING if drafts else None)
    )


# ---------------------------------------------------------------- one engine

pieces = st.lists(st.integers(1, 40), max_size=30)
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@example([(5, 60)] * 6, [3] * 30, 6, 32, 8, True, False, 0, None)
@example([(13, 60)] * 6, [3] * 30, 6, 32, 8, True, False, 3, None)
@example([(13, 60)] * 6, [3] * 30, 6, 32, 8, True, False, 3, Speculative(tokens=3, acceptance_length=2.6))
@given(
    lengths, pieces, st.integers(1, 8), st.integers(8, 64), st.integers(0, 60), st.booleans(), st.booleans(),
    st.integers(0, 4), st.sampled_from([None, DRAFTING]),
)  # fmt: skip
def test_an_engine_in_pieces_does_what_it_does_at_once(
    samples: list[tuple[int, int]], pieces: list[int], limit: int, budget: int, spare: int, chunked: bool, padded: bool,
    size: int, drafting: Speculative | None,
) -> None:  # fmt: skip
    """Also with a small cache, where sequences are put back, and with `size` responses that share a prompt (0: none):
    stopped after any steps and copied, it loses nothing."""
    groups = np.arange(len(samples)) // max(size, 1)
    samples = [(samples[g * max(size, 1)][0], r) for g, (_, r) in zip(groups.tolist(), samples, strict=True)]
    slots = drafting.slots if drafting else 0
    blocks = max(-(-(p + r - 1 + slots) // 4) for p, r in samples) + spare // 4
    generation = Generation(
        engine="engine",
        max_sequences=limit,
        prefill_tokens=budget,
        block_tokens=4,
        chunked_prefill=chunked,
        kv_cache="preallocated" if padded else "paged",
        prefix_caching=size > 0,
        speculative=drafting,
    )
    prompts, responses = (np.array(x) for x in zip(*samples, strict=True))
    whole = continuous_runs(
        prompts,
        responses,
        max_sequences=limit,
        step_tokens=budget,
        block_tokens=4,
        kv_blocks=blocks,
        chunked_prefill=chunked,
        padded=padded,
        groups=groups if size else None,
        progress=Progress.of(drafting),
    )
    engine = Engine(generation, blocks)
    engine.submit([Sample(k, int(groups[k]), p, r) for k, (p, r) in enumerate(samples)], [0] * len(samples))
    found, preemptions, recomputed, reused, total = [], 0, 0, 0, int(whole.steps.sum())
    for count in (*pieces, total):
        count = min(count, total - len(found))
        engine.run_steps(count)
        found += expanded(engine.builder.runs())
        preemptions, recomputed = preemptions + engine.preemptions, recomputed + engine.recomputed
        reused += engine.reused
        engine = engine.copy()
    assert found == expanded(whole)
    assert (preemptions, recomputed, reused) == (whole.preemptions, whole.recomputed_tokens, whole.reused_tokens)
    assert not engine.samples and engine.free == engine.total


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 60), st.sets(st.integers(0, 8)), st.booleans())
def test_removed_samples_give_their_blocks_back(
    samples: list[tuple[int, int]], count: int, gone: set[int], sharing: bool
) -> None:
    engine = Engine(
        Generation(engine="engine", max_sequences=4, prefill_tokens=16, block_tokens=4, prefix_caching=sharing), 200
    )
    if sharing:  # one prompt for all
        samples = [(samples[0][0], r) for _, r in samples]
    engine.submit([Sample(k, 0 if sharing else k, p, r) for k, (p, r) in enumerate(samples)], [0] * len(samples))
    for _ in range(count):
        if engine.running or engine.waiting:
            engine.run_steps(1)
    engine.remove(gone)
    engine = engine.copy()
    assert not {s.number for s in engine.samples} & gone
    engine.run_until(10**9)
    assert engine.free == engine.total and not engine.running


# ---------------------------------------------------------------- a pool, against the twin


class Both:
    """The pool and its twin, given the same work."""

    def __init__(
        self, engines: int, limit: int, budget: int, group_size: int, drafts: bool = False, sharing: bool = False
    ) -> None:
        drafting, self.sharing = DRAFTING if drafts else None, sharing
        generation = Generation(
            engine="engine", max_sequences=limit, prefill_tokens=budget, speculative=drafting, prefix_caching=sharing
        )
        self.pool = Pool(Engine(generation, None), steps(drafts), group_size)
        self.pool.set_engines(engines)
        self.twin = TwinPool(engines, limit, budget, steps(drafts), group_size, drafting, sharing)
        self.number = self.drawn = 0
        self.given: list[tuple[int, int]] = []

    def submit(self, lengths: list[tuple[int, int]], carried: list[Response] | None = None) -> None:
        numbers = range(self.number, self.number + len(lengths))
        size = self.twin.group_size
        if self.sharing:
            lengths = [(lengths[k // size * size][0], r) for k, (_, r) in enumerate(lengths)]
        self.pool.submit([Sample(n, n // size, p, r) for n, (p, r) in zip(numbers, lengths, strict=True)])
        self.twin.submit(carried or [])
        self.twin.submit([Response(n, n // size, p, r) for n, (p, r) in zip(numbers, lengths, strict=True)])
        self.number += len(lengths)

    def run(self, wanted: int, share: float | None = None, *, stop: bool = False) -> bool:
        """A firing, or the part of one until it is stopped at `share` of the time that it would take.

        stop: it stops the engines at its end. Returns whether it came to its end.
        """
        plan, begin = Plan(self.pool, wanted), self.twin.now
        instant = plan.seconds if share is None else share * plan.seconds
        cut = plan.cut(instant)
        ended = share is None or plan.ends_within(cut, wanted)
        took = plan.seconds if ended and not stop else max(cut.seconds, plan.seconds if ended else 0.0)
        self.drawn += sum(int(t.runs.steps @ t.runs.sampled) for t in cut.tables)
        self.pool.go_to(plan, cut, took)
        assert self.twin.run(wanted, float("inf") if share is None else begin + instant) == ended
        if stop or not ended:
            self.pool.finish_steps()
            self.twin.finish_steps()
        assert self.twin.now - begin == pytest.approx(took, rel=1e-6, abs=1e-12)
        return ended

    def enter(self, version: int, recompute: bool) -> None:
        self.twin.finish_steps()
        self.pool.enter(version, recompute)
        self.twin.enter(version, recompute)

    def hand_over(self, count: int) -> list[Sample]:
        done = self.pool.hand_over(count)
        expected, self.twin.ready = self.twin.ready[:count], self.twin.ready[count:]
        assert [s.number for s in done] == [r.number for r in expected]
        assert [dict(s.tokens_by_version) for s in done] == [dict(r.versions) for r in expected]
        self.given += [(s.prompt, s.response) for s in done]
        return done

    def check_counts(self) -> None:
        self.twin.finish_steps()
        self.pool.finish_steps()
        assert self.pool.counts["recomputed_tokens"] == self.twin.recomputed
        assert self.drawn == self.twin.drawn


rollouts = st.fixed_dictionaries(
    {
        "engines": st.integers(1, 3),
        "limit": st.integers(1, 6),
        "budget": st.integers(8, 64),
        "group_size": st.sampled_from((1, 1, 2, 4)),
        "lengths": st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=8, max_size=40),
        "drafts": st.booleans(),
        "sharing": st.booleans(),
    }
)


def both_of(given: dict) -> Both:
    names = ("engines", "limit", "budget", "group_size", "drafts", "sharing")
    return Both(**{name: given[name] for name in names})


def dealer(lengths: list[tuple[int, int]], group_size: int):
    """Endless lengths, whole groups at a time."""
    position = 0

    def deal(groups: int) -> list[tuple[int, int]]:
        nonlocal position
        taken = [lengths[(position + k) % len(lengths)] for k in range(groups * group_size)]
        position += len(taken)
        return taken

    return deal


@settings(max_examples=40, deadline=None)
@given(rollouts, st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6), st.booleans(), st.integers(1, 2))
def test_interrupted_engines_go_on_as_the_twin(given: dict, shares: list[float], recompute: bool, ahead: int) -> None:
    """Asynchronous: each firing wants four groups, is interrupted by new weights once, and `ahead` more are at work."""
    both = both_of(given)
    deal = dealer(given["lengths"], given["group_size"])
    wanted = 4 * given["group_size"]
    both.submit(deal(4 * (1 + ahead)))
    for version, share in enumerate(shares, start=1):
        ended = both.run(wanted, share)
        both.enter(version, recompute)
        both.submit(deal(4))
        if not ended:
            both.run(wanted)
        both.hand_over(wanted)
    both.check_counts()


@settings(max_examples=40, deadline=None)
@given(rollouts, st.integers(2, 6), st.integers(0, 4))
def test_partial_rollouts_go_on_as_the_twin(given: dict, iterations: int, more: int) -> None:
    """Four groups are wanted of four and some more; the rest is carried to the next iteration. No token is lost."""
    both = both_of(given)
    deal = dealer(given["lengths"], given["group_size"])
    wanted, carried = 4 * given["group_size"], []
    for version in range(iterations):
        both.pool.version = both.twin.version = version
        both.submit(deal(4 + more - both.pool.outstanding // given["group_size"]), carried)
        both.run(wanted, stop=True)
        both.pool.take_out()
        carried = both.twin.take_out()
        assert [(s.number, drawn) for s, drawn in both.pool.outside] == [(r.number, r.drawn) for r in carried]
        both.hand_over(wanted)
        both.pool.enter(version + 1, True)
    both.check_counts()
    done = [s for group in both.pool.ended.values() for s in group] + both.pool.ready
    kept = sum(drawn for _, drawn in both.pool.outside) + sum(s.response for s in done)
    if not given["drafts"]:  # else it is what was verified
        assert both.drawn == kept + sum(response for _, response in both.given)


def test_throwing_away_takes_whole_prompts() -> None:
    both = Both(2, 8, 64, 2)
    both.submit([(4, 3), (4, 50), (4, 4), (4, 4), (4, 5), (4, 60)])
    both.run(2)
    pool = both.pool
    assert [s.number for s in pool.ready] == [2, 3]
    pool.enter(1, True)
    pool.throw_away(1)  # whatever version 0 began: all of it
    assert (pool.outstanding, pool.thrown_away) == (0, 6)
    drawn = 3 + 4 + 4 + 5 + 2 * 4
    assert abs(pool.counts["thrown_away_tokens"] - drawn) <= 4  # the long ones, and steps in flight
