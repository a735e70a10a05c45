"""Responses in several turns: against twins that go token by token, against one long response, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import scenario, timeline_of
from test_generation import expanded, operators, use
from test_pool import DRAFTING
from test_pool import Both as PlainBoth
from turn_twin import BlockTwin, Conversation, TurnTwinPool

from rlhfsim.costs.engine import Progress, continuous_runs
from rlhfsim.costs.generation import StepSeconds
from rlhfsim.costs.pool import Pool, Sample
from rlhfsim.costs.turns import TurnEngine, turn_steps
from rlhfsim.errors import DoesNotFit, InputError
from rlhfsim.metrics import stage_seconds, tool_summary
from rlhfsim.real_limits import check_real
from rlhfsim.simulate import lengths_of, prepare, turns_of
from rlhfsim.spec.lengths import Turn, draw_turns
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import Generation, Latency, Lengths, Speculative, Turns, Workload

STEPS: dict[str, StepSeconds] = {}

Talks = list[tuple[int, list[Turn]]]


def engine(blocks: int | None = None, *, keep: bool = True, places: int | None = None, **options: Any) -> TurnEngine:
    turns = Turns(number=Lengths(tokens=1), keep_prefix=keep, tool_concurrency=places)
    return TurnEngine(Generation(engine="engine", **options), blocks, turns, steps_of(options.get("speculative")))


def steps_of(drafting: Speculative | None) -> StepSeconds:
    """Kept, with their tables."""
    key = repr(drafting)
    if key not in STEPS:
        STEPS[key] = StepSeconds(operators(), use("opt-125m"), Generation(engine="engine", speculative=drafting))
    return STEPS[key]


def worked(samples: Talks, blocks: int | None = None, sharing: int = 0, **options: Any):
    """What an engine does with these samples, `sharing` in a row of which have one prompt."""
    prompts, groups = np.array([prompt for prompt, _ in samples]), None
    if sharing:
        groups = np.arange(len(samples)) // sharing
    one = engine(blocks, prefix_caching=sharing > 0, **options)
    return turn_steps(one, prompts, [tuple(turns) for _, turns in samples], one.seconds, groups)


def total(prompt: int, turns: list[Turn]) -> int:
    return prompt + sum(t.tokens + t.observation_tokens for t in turns)


# ---------------------------------------------------------------- one engine, against its twin

turn = st.builds(Turn, st.integers(1, 25), st.integers(0, 12), st.sampled_from((0.0, 0.0031, 0.0173, 0.11)))
talks = st.lists(st.tuples(st.integers(1, 30), st.lists(turn, min_size=1, max_size=4)), min_size=1, max_size=8)
options = st.fixed_dictionaries(
    {
        "limit": st.integers(1, 6),
        "budget": st.integers(6, 48),
        "block": st.sampled_from((1, 4, 16)),
        "spare": st.integers(0, 80),
        "whole": st.booleans(),
        "padded": st.booleans(),
        "keep": st.booleans(),
        "places": st.sampled_from((None, 1, 2)),
        "sharing": st.sampled_from((0, 0, 2, 3)),
        "drafting": st.sampled_from((None, None, (1, 0.5), (2, 0.1), (3, 0.37), (4, 1.0))),
    }
)
CROWDED = {
    "limit": 5, "budget": 24, "block": 4, "spare": 24, "whole": False, "padded": False, "keep": True, "places": 1,
}  # fmt: skip
LONG = [(9 + k, [Turn(12 + 3 * k, 5, 0.02 * k), Turn(20 - k, 3, 0.01), Turn(9)]) for k in range(6)]


def compared(samples: Talks, given: dict[str, Any]):
    """The steps of the engine, after comparing all it does with the twin."""
    sharing, drafting = given.get("sharing", 0), None
    samples = [(prompt, [*turns[:-1], Turn(turns[-1].tokens)]) for prompt, turns in samples]
    if sharing:
        samples = [(samples[k // sharing * sharing][0], turns) for k, (_, turns) in enumerate(samples)]
    if given.get("drafting"):
        tokens, accepted = given["drafting"]
        drafting = Speculative(tokens=tokens, acceptance_length=round(1 + accepted * tokens, 2))
    slots, width = (drafting.slots, drafting.tokens + 1) if drafting else (0, 1)
    blocks = max(-(-(total(*s) - 1 + slots) // given["block"]) for s in samples) + given["spare"] // given["block"]
    keep = given["keep"] or sharing > 0
    found = worked(
        samples, blocks, sharing, speculative=drafting, keep=keep, places=given["places"], max_sequences=given["limit"],
        prefill_tokens=given["budget"], block_tokens=given["block"], chunked_prefill=not given["whole"],
        kv_cache="preallocated" if given["padded"] else "paged",
    )  # fmt: skip
    twin = BlockTwin(
        min(given["limit"], max(1, given["budget"] // width)), given["budget"], given["block"], blocks,
        steps_of(drafting), whole=given["whole"], padded=given["padded"], keep=keep, places=given["places"],
        sharing=sharing, drafting=drafting,
    ).run(samples)  # fmt: skip
    runs = found.runs
    assert expanded(runs) == twin.steps
    idle = np.zeros(len(twin.steps))
    idle[np.cumsum(runs.steps) - runs.steps] = runs.idle_seconds
    np.testing.assert_allclose(idle, twin.idle, rtol=1e-6, atol=1e-12)
    ends = found.stats().completion_seconds
    np.testing.assert_allclose(ends, [twin.ends[k] for k in range(len(samples))], rtol=1e-9)
    counts = runs.preemptions, runs.recomputed_tokens, runs.reused_tokens
    assert counts == (twin.preemptions, twin.recomputed, twin.reused)
    assert (runs.tool_calls, runs.tool_seconds) == (twin.calls, approx(twin.tool_seconds, rel=1e-9))
    if drafting or (sharing and runs.preemptions):
        return found
    # No token is lost: all but each sample's last go through the layers, and again what was not kept.
    through = int((runs.steps * (runs.decodes + runs.prompt_tokens)).sum())
    assert through == sum(total(*s) - 1 for s in samples) + runs.recomputed_tokens - runs.reused_tokens
    assert int(runs.steps @ runs.sampled) == sum(t.tokens for _, turns in samples for t in turns)
    return found


@settings(max_examples=150, deadline=None)
@example(LONG, CROWDED)
@example(LONG, CROWDED | {"whole": True, "padded": True, "places": None})
@example(LONG, CROWDED | {"sharing": 3})
@example(LONG, CROWDED | {"sharing": 2, "whole": True, "places": None})
@example(LONG, CROWDED | {"drafting": (3, 0.37)})
@example(LONG, CROWDED | {"drafting": (2, 0.1), "sharing": 3, "spare": 60})
@given(talks, options)
def test_every_step_is_that_of_the_twin(samples: Talks, given: dict[str, Any]) -> None:
    compared(samples, given)


def test_the_crowded_example_has_everything() -> None:
    runs = compared(LONG, CROWDED).runs
    assert runs.preemptions and runs.tool_calls == 12
    kept, lost = compared(LONG, CROWDED | {"spare": 400}), compared(LONG, CROWDED | {"spare": 400, "keep": False})
    assert 0 < kept.runs.recomputed_tokens <= 12 * 3 < lost.runs.recomputed_tokens  # of a block not all is kept
    assert runs.recomputed_tokens > kept.runs.recomputed_tokens  # blocks that were needed by others
    assert compared(LONG[:1], CROWDED).runs.idle_seconds.any()


# ---------------------------------------------------------------- closed forms


def test_a_prompt_is_computed_once_for_all_turns_of_all_responses() -> None:
    """8 responses to a prompt of 161 tokens, of which 160 are in whole blocks; with and without their second turns."""
    talks = [(161, [Turn(15, 16, 1.0), Turn(9)])] * 8
    alone, together = worked(talks).runs, worked(talks, sharing=8).runs
    assert together.reused_tokens == 7 * 160 and not alone.reused_tokens
    assert alone.prompt_tokens.sum() - together.prompt_tokens.sum() == 7 * 160
    # Everybody is at a tool at once: the prompt is found again all the same, but where others needed the room.
    assert together.recomputed_tokens == alone.recomputed_tokens == 8 * ((161 + 14) % 16)
    small = worked([*talks, (1000, [Turn(9)])], 66, sharing=8, max_sequences=8).runs
    assert small.recomputed_tokens > together.recomputed_tokens


def test_perfect_free_drafts_divide_the_steps_of_every_turn() -> None:
    drafts = Speculative(tokens=3, acceptance_length=4, layers=0)
    talk = [(32, [Turn(41, 8, 0.5), Turn(81)])]
    plain, drafted = worked(talk).runs, worked(talk, speculative=drafts).runs
    assert (plain.steps.sum(), drafted.steps.sum()) == (41 + 81, (1 + 10) + (1 + 20))


def random_runs(drafting: Speculative | None, seed: int) -> tuple[Any, list[tuple[Any, list[float]]]]:
    """An engine's runs, all at once and one by one."""
    rng = np.random.default_rng(seed)
    one = continuous_runs(
        rng.integers(1, 300, 20),
        rng.integers(1, 200, 20),
        max_sequences=8,
        step_tokens=256,
        progress=Progress.of(drafting),
    )
    columns = (
        one.steps,
        one.decodes,
        one.context_tokens * one.progress.unit,
        one.prompt_tokens,
        one.sampled,
        one.running,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return one, [(row, one.chunk_tokens[one.chunk_run == k].tolist()) for k, row in enumerate(rows)]


@pytest.mark.parametrize("model", ["opt-125m", "gpt-oss-20b"])  # without and with windows
@pytest.mark.parametrize("drafting", [None, DRAFTING, Speculative(tokens=4, acceptance_length=2.5, layers=0)])
@pytest.mark.parametrize("floor", [0.0, 1e-5, 3e-5, 1e-3])
def test_a_run_alone_takes_what_it_takes_among_others(model: str, drafting: Speculative | None, floor: float) -> None:
    generation = Generation(engine="engine", cuda_graphs=False, speculative=drafting)
    ops = operators(eager_layer_seconds=floor, decode_step_seconds=1e-4, decode_sequence_seconds=1e-6)
    found = StepSeconds(ops, use(model), generation)
    runs, rows = random_runs(drafting, 0)
    np.testing.assert_allclose([found.single.of(*row) for row in rows], found.of(runs).sum(axis=0), rtol=1e-9)
    found.single.expect([pieces[0] for _, pieces in rows if len(pieces) == 1])
    np.testing.assert_allclose([found.single.of(*row) for row in rows], found.of(runs).sum(axis=0), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(talks, st.integers(1, 6), st.integers(8, 48), st.integers(0, 80))
def test_one_turn_is_what_there_was(samples: Talks, limit: int, budget: int, spare: int) -> None:
    single = [(prompt, [Turn(turns[0].tokens)]) for prompt, turns in samples]
    blocks = max(-(-(total(*s) - 1) // 4) for s in single) + spare // 4
    found = worked(single, blocks, max_sequences=limit, prefill_tokens=budget, block_tokens=4).runs
    prompts, responses = (np.array(x) for x in zip(*((p, t[0].tokens) for p, t in single), strict=True))
    plain = continuous_runs(
        prompts, responses, max_sequences=limit, step_tokens=budget, block_tokens=4, kv_blocks=blocks,
        groups=np.arange(len(prompts)),
    )  # fmt: skip
    assert expanded(found) == expanded(plain)
    assert (found.preemptions, found.recomputed_tokens) == (plain.preemptions, plain.recomputed_tokens)
    assert not found.idle_seconds.any() and not found.tool_calls


def test_turns_without_tools_and_answers_are_one_long_response() -> None:
    """With the prefix kept, a new turn computes the token drawn last as a prompt of one: the step is the same one."""
    many = worked([(32, [Turn(20)] * 3 + [Turn(40)])], block_tokens=1).runs
    one = continuous_runs(np.array([32]), np.array([100]), max_sequences=256, step_tokens=8192)
    assert many.steps.sum() == one.steps.sum() == 100 and not many.recomputed_tokens
    assert [d + p for d, _, p, *_ in expanded(many)] == [d + p for d, _, p, *_ in expanded(one)]
    dropped = worked([(32, [Turn(20)] * 3 + [Turn(40)])], keep=False).runs
    assert dropped.recomputed_tokens == (32 + 19) + (32 + 39) + (32 + 59)


def test_a_tool_is_waited_for() -> None:
    """Alone on an engine, a sample takes its steps and its tools' seconds, so that a slower tool is never faster."""
    quick, slow = (worked([(32, [Turn(20, 8, s), Turn(20, 8, 2 * s), Turn(9)])]) for s in (0.0, 1.5))
    assert slow.stats().seconds == approx(quick.stats().seconds + 3 * 1.5, rel=1e-12)
    assert slow.idle_seconds == approx(4.5) and slow.runs.tool_seconds == approx(4.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(turn, min_size=1, max_size=5), st.integers(0, 4), st.floats(0.001, 5))
def test_a_longer_latency_never_helps_a_sample_alone(turns: list[Turn], which: int, more: float) -> None:
    which %= len(turns)
    slower = [t._replace(tool_seconds=t.tool_seconds + more * (k == which)) for k, t in enumerate(turns)]
    assert worked([(8, slower)]).stats().seconds >= worked([(8, turns)]).stats().seconds


def test_one_place_for_tools_is_a_queue() -> None:
    """Equal samples call at once; with one place their second turns begin one latency after the other."""
    samples = [(16, [Turn(10, 4, 1.0), Turn(5)])] * 4
    free, queue = worked(samples), worked(samples, places=1)
    ends = queue.stats().completion_seconds
    np.testing.assert_allclose(np.diff(ends), 1.0, rtol=1e-9)
    assert queue.stats().seconds == approx(ends[0] + 3.0) and free.stats().seconds < 1.5
    assert (free.runs.tool_seconds, queue.runs.tool_seconds) == (approx(4.0), approx(1 + 2 + 3 + 4))
    assert worked(samples, places=2).runs.tool_seconds == approx(1 + 1 + 2 + 2)


def test_others_decode_while_a_tool_is_at_work() -> None:
    """A tool that is done before a longer response has ended costs nothing but the steps that are shared."""
    alone = worked([(16, [Turn(400)])]).stats().seconds
    both = worked([(16, [Turn(400)]), (16, [Turn(10, 4, alone / 2), Turn(10)])])
    assert not both.idle_seconds and both.stats().seconds == approx(alone, rel=0.05)


def test_a_sample_that_grows_too_long_does_not_fit() -> None:
    with pytest.raises(DoesNotFit, match="needs 4"):
        worked([(8, [Turn(20, 16, 0.1), Turn(8)])], 3)


# ---------------------------------------------------------------- pools, against the twin


class Both(PlainBoth):
    """A pool of engines with turns and its twin, given the same work."""

    def __init__(self, given: dict[str, Any]) -> None:
        sizes = given["engines"], given["limit"], given["budget"]
        super().__init__(*sizes, given["group_size"])
        drafting, sharing = DRAFTING if given["drafts"] else None, given["sharing"]
        keep = given["keep"] or sharing
        one = engine(
            keep=keep, places=given["places"], max_sequences=given["limit"], prefill_tokens=given["budget"],
            speculative=drafting, prefix_caching=sharing,
        )  # fmt: skip
        self.pool = Pool(one, one.seconds, given["group_size"])
        self.pool.set_engines(given["engines"])
        self.twin = TurnTwinPool(
            *sizes, one.seconds, given["group_size"], keep, given["places"], drafting, sharing
        )  # fmt: skip
        self.sharing = sharing
        self.talks, self.size = given["talks"], given["group_size"]

    def deal(self, groups: int, carried: list[Conversation] | None = None) -> None:
        """Whole groups, and before them in the twin what is carried over."""
        numbers = range(self.number, self.number + groups * self.size)
        self.number += len(numbers)
        # No two prompts are alike: engines that did the same would end at the same instant, but for rounding.
        talks = [self.talks[n % len(self.talks)] for n in numbers]
        same = self.size if self.sharing else 1
        dealt = [
            (n, n // same * same + 1 + 20 * self.sharing, [*turns[:-1], Turn(turns[-1].tokens)])
            for n, turns in zip(numbers, talks, strict=True)
        ]
        self.pool.submit([Sample(n, n // self.size, p, total(0, ts), tuple(ts)) for n, p, ts in dealt])
        self.twin.submit(carried or [])
        self.twin.submit([Conversation(n, n // self.size, p, ts[0].tokens, turns=list(ts)) for n, p, ts in dealt])

    def check_counts(self) -> None:
        self.twin.finish_steps()
        self.twin.recomputed += sum(e.recomputed for e in self.twin.engines)
        super().check_counts()


rollouts = st.fixed_dictionaries(
    {
        "engines": st.integers(1, 3),
        "limit": st.integers(1, 6),
        "budget": st.integers(8, 64),
        "group_size": st.sampled_from((1, 1, 2)),
        "keep": st.booleans(),
        "places": st.sampled_from((None, 1, 2)),
        "drafts": st.booleans(),
        "sharing": st.booleans(),
        "talks": st.lists(st.lists(turn, min_size=1, max_size=3), min_size=6, max_size=20),
    }
)


@settings(max_examples=40, deadline=None)
@given(rollouts, st.lists(st.integers(1, 97), min_size=2, max_size=5), st.booleans(), st.integers(1, 2))
def test_interrupted_engines_go_on_as_the_twin(
    given: dict[str, Any], shares: list[int], recompute: bool, ahead: int
) -> None:
    both = Both(given)
    wanted = 4 * both.size
    both.deal(4 * (1 + ahead))
    for version, share in enumerate(shares, start=1):
        ended = both.run(wanted, (share + 0.1234567) / 98)  # not where a step ends
        both.enter(version, recompute)
        both.deal(4)
        if not ended:
            both.run(wanted)
        both.hand_over(wanted)
    both.check_counts()


@settings(max_examples=40, deadline=None)
@given(rollouts, st.integers(2, 5), st.integers(0, 4))
def test_partial_rollouts_go_on_as_the_twin(given: dict[str, Any], iterations: int, more: int) -> None:
    """What is taken out between or within turns goes on where it was; no token is lost."""
    both = Both(given)
    wanted, carried, given_tokens = 4 * both.size, list[Conversation](), 0
    for version in range(iterations):
        both.pool.version = both.twin.version = version
        both.deal(4 + more - both.pool.outstanding // both.size, carried)
        both.run(wanted, stop=True)
        both.pool.take_out()
        carried = both.twin.take_out()
        assert [(s.number, drawn) for s, drawn in both.pool.outside] == [(r.number, r.all_drawn) for r in carried]
        given_tokens += sum(s.generated for s in both.hand_over(wanted))
        both.pool.enter(version + 1, True)
    both.check_counts()
    done = [s for group in both.pool.ended.values() for s in group] + both.pool.ready
    kept = sum(drawn for _, drawn in both.pool.outside) + sum(s.generated for s in done)
    assert given["drafts"] or both.drawn == kept + given_tokens  # drafts that are verified count as drawn


def test_removed_samples_leave_their_tools_and_blocks() -> None:
    one = engine(40, block_tokens=4)
    one.submit([Sample(k, k, 9, 32, (Turn(8, 4, 5.0), Turn(20))) for k in range(4)], [0] * 4)
    one.run_steps(8)
    assert len(one.away) == 4 and one.unfinished() == [(s, 8) for s in one.samples]
    one.remove({1, 2})
    one = one.copy()
    assert {s.number for s, _ in one.unfinished()} == {0, 3}
    assert one.queue is not None and sum(one.queue.counts.values()) == one.queue.total == one.free == 40
    one.run_until(2)
    assert one.queue is not None and one.free == one.total == one.queue.total and not one.busy


# ---------------------------------------------------------------- drawing


def workload(**turns: Any) -> Workload:
    drawn = Lengths(distribution="lognormal", mean_tokens=50, sigma=0.6, max_tokens=200)
    return Workload(
        prompts=500, responses_per_prompt=2, prompt_tokens=Lengths(tokens=10), response_tokens=drawn,
        turns=Turns(**{"number": Lengths(distribution="uniform", max_tokens=4), **turns}),
    )  # fmt: skip


def test_turns_are_drawn_as_they_say() -> None:
    tools = Latency(distribution="lognormal", mean_seconds=2.0, sigma=0.5)
    drawn = draw_turns(workload(observation_tokens=Lengths(tokens=30), tool_latency=tools), 0, 0, length_dir())
    count = (drawn.tokens > 0).sum(axis=1)
    assert np.bincount(count, minlength=5)[1:] / 1000 == approx(0.25, abs=0.05)
    assert [len(turns) for turns in drawn.by_sample] == count.tolist()
    assert ((drawn.observation_tokens == 30).sum(axis=1) == count - 1).all()
    assert ((drawn.tool_seconds > 0).sum(axis=1) == count - 1).all()
    assert drawn.tool_seconds[drawn.tool_seconds > 0].mean() == approx(2.0, rel=0.06)
    assert drawn.tokens[drawn.tokens > 0].mean() == approx(50, rel=0.06)
    assert all(turns[-1][1:] == (0, 0.0) for turns in drawn.by_sample)
    assert np.corrcoef(drawn.tokens[count > 1, :2].T)[0, 1] == approx(0, abs=0.1)


def test_a_response_is_cut_at_its_longest() -> None:
    whole = draw_turns(workload(observation_tokens=Lengths(tokens=30)), 0, 0, length_dir())
    cut = draw_turns(workload(observation_tokens=Lengths(tokens=30), max_tokens=120), 0, 0, length_dir())
    for before, after in zip(whole.by_sample, cut.by_sample, strict=True):
        expected, left = [], 120  # by hand, turn by turn
        for one in before:
            if expected and left - expected[-1].observation_tokens <= 0:
                break
            left -= expected[-1].observation_tokens if expected else 0
            expected.append(one._replace(tokens=min(one.tokens, left)))
            left -= expected[-1].tokens
        expected[-1] = Turn(expected[-1].tokens)
        assert list(after) == expected
    assert cut.response_tokens.max() == 120 and (whole.response_tokens > 120).any()
    assert workload(max_tokens=120).longest_response == 120
    assert workload(observation_tokens=Lengths(tokens=30)).longest_response == 4 * 200 + 3 * 30


# ---------------------------------------------------------------- whole simulations

TURNS: dict[str, Any] = {
    "number": 3,
    "observation_tokens": {"distribution": "uniform", "min_tokens": 5, "max_tokens": 40},
    "tool_latency": {"distribution": "lognormal", "mean_seconds": 0.3, "sigma": 0.5},
}


def seconds(**changes: Any) -> dict[str, float]:
    return stage_seconds(timeline_of(scenario(engine="engine", **changes)))


@pytest.mark.parametrize("strategy", ["colocated", "partial_rollout", "asynchronous", "disaggregated", "streaming"])
def test_every_strategy_takes_turns(strategy: str) -> None:
    one = seconds(strategy=strategy)
    assert seconds(strategy=strategy, workload__turns={"number": 1, "tool_latency": 7.0}) == approx(one, rel=1e-6)
    found = timeline_of(scenario(strategy, "engine", workload__turns=TURNS))
    tools = tool_summary(found)
    assert tools is not None and tools.calls == approx(2 * 64, rel=0.5)
    assert tools.seconds_per_call == approx(0.3, rel=0.2)
    assert stage_seconds(found)["gen"] > one["gen"] + (0.3 if strategy != "asynchronous" else 0)
    assert tool_summary(timeline_of(scenario(strategy, "engine"))) is None


def test_what_tools_say_is_scored_and_trained() -> None:
    """Three turns of 128 and two answers of 64 cost the passes that one response of 512 costs."""
    turns = {"number": 3, "observation_tokens": 64, "tool_latency": 0.1}
    for padded in (True, False):
        many = seconds(workload__turns=turns, workload__padded=padded)
        long = seconds(workload__response_tokens=512, workload__padded=padded)
        passes = [name for name in long if name not in ("gen", "step")]
        assert {n: many[n] for n in passes} == approx({n: long[n] for n in passes}) and "update_actor" in passes


def test_equal_samples_wait_for_equal_tools() -> None:
    """All samples are at their tools at once, so the engines idle for as long; a span says what for."""
    turns = {"number": 3, "observation_tokens": 64, "tool_latency": 0.5}
    found = timeline_of(scenario(engine="engine", workload__turns=turns))
    quick = timeline_of(scenario(engine="engine", workload__turns=turns | {"tool_latency": 0.0}))
    assert stage_seconds(found)["gen"] == approx(stage_seconds(quick)["gen"] + 2 * 0.5, rel=1e-6)
    gen = found.of(stage="gen")[0]
    assert gen.detail["tools"] == approx(1.0) == gen.bound["tools"]
    tools = tool_summary(found)
    assert tools is not None and tools.idle_share == approx(1.0 / stage_seconds(found)["gen"], rel=0.05)


def test_engines_of_two_kinds_in_one_place_wait_for_tools_as_long() -> None:
    """With equal samples the place takes what the slower kind takes alone; both idle for the same tools."""
    turns = {"number": 3, "observation_tokens": 64, "tool_latency": 0.5}
    mixed, slow, fast = (
        timeline_of(
            scenario(
                cluster={"parts": [{"spec": spec, "nodes": 1, "gpus_per_node": 4} for spec in specs]},
                generation__batching="continuous", effects__links=False, workload__turns=turns,
                models__actor__spec="llama-7b", models__actor__zero_stage=3, workload__prompts=256,
            )
        )
        for specs in (("a100-80g-sxm", "h20-96g"), ("a100-80g-sxm",) * 2, ("h20-96g",) * 2)
    )  # fmt: skip
    slow, fast = sorted((slow, fast), key=lambda found: -stage_seconds(found)["gen"])
    assert stage_seconds(mixed)["gen"] == approx(stage_seconds(slow)["gen"], rel=1e-9)
    assert stage_seconds(mixed)["gen"] > 1.01 * stage_seconds(fast)["gen"]
    assert mixed.of(stage="gen")[0].bound["tools"] == approx(1.0)


def test_lengths_are_those_of_the_turns() -> None:
    found = scenario(engine="engine", workload__turns=TURNS)
    drawn = turns_of(found, 0)
    assert drawn is not None
    for (_, responses), turns in zip(lengths_of(found, 0), drawn, strict=True):
        assert responses.tolist() == turns.response_tokens.tolist()
    assert turns_of(scenario(engine="engine", workload__turns=TURNS, effects__decode=False), 0) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generation.batching": "static", "workload.turns": 2}, "generation.batching.*workload.turns.*continuous"),
        ({"generation.engine": "hybrid", "workload.turns": 2}, "generation.engine.*is hybrid.*allowed: engine"),
        ({"generation.prefix_caching": True, "workload.turns": {"number": 2, "keep_prefix": False}},
         "workload.turns.keep_prefix.*generation.prefix_caching"),
        ({"models.actor.micro_batch_tokens": 319, "workload.padded": False, "workload.turns": 2}, "have 320 tokens"),
        ({"workload.turns": {"observation_tokens": 3}}, "workload.turns.number"),
        ({"workload.turns": {"number": 0}}, "at least 1"),
        ({"workload.turns": 5000}, "at most 1000"),
        ({"workload.turns": {"number": 2, "tool_latency": -1}}, "at least 0"),
        ({"workload.turns": {"number": 2, "tool_concurrency": 0}}, "at least 1"),
        ({"workload.turns": {"number": 2, "tool_latncy": 1}}, "tool_latency"),
        ({"workload.turns": {"number": {"distribution": "empirical", "file": "none.csv", "column": "turns",
                                        "max_tokens": 9}}}, "neither a shipped file"),
    ],
)  # fmt: skip
def test_impossible_turns(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare(scenario(**({"generation.engine": "engine"} | changes)))


def test_real_runs_have_one_turn() -> None:
    with pytest.raises(InputError, match=r"workload\.turns: are not part of real runs"):
        check_real(scenario(engine="engine", workload__turns=2))
