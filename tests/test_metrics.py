"""Metrics against answers known in closed form, and laws that every timeline obeys."""

from __future__ import annotations

import ast
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timelines import colocated, disaggregated, scaled, span, timelines

from rlhfsim import format as text
from rlhfsim import metrics
from rlhfsim.firing import Firing
from rlhfsim.format import rank_text
from rlhfsim.timeline import MemorySample, Span, Timeline, check, per_replica

approx = pytest.approx
many = settings(max_examples=150, deadline=None)


# ---------------------------------------------------------------- closed forms


def test_step_is_the_interval_between_iteration_ends() -> None:
    """A pipeline: gen takes 5 s, training 4 s beside the next gen. Fill 9 s, then one iteration every 5 s."""
    spans = []
    for i in range(4):
        gen = span("gen", (0,), 5.0 * i, 5.0, iteration=i)
        spans += [gen, span("update_actor", (1,), gen.end_seconds, 4.0, iteration=i, after=gen)]
    timeline = check(Timeline(spans, 2, 4))
    assert metrics.step_seconds(timeline) == 5.0
    assert metrics.measured(timeline) == (9.0, 24.0)
    assert metrics.stage_seconds(timeline) == {"gen": 5.0, "update_actor": 4.0}


def test_step_does_not_follow_fill_and_drain() -> None:
    ends = (30.0, 40.0, 54.0, 64.0, 67.0)
    spans = [span("gen", (0,), end - 1, 1.0, iteration=i) for i, end in enumerate(ends)]
    assert metrics.step_seconds(Timeline(spans, 1, 5)) == 10.0


def test_one_iteration_is_its_makespan() -> None:
    timeline = check(Timeline([span("gen", (0,), 2.0, 3.0), span("ref", (0,), 6.0, 1.0)], 1, 1))
    assert metrics.step_seconds(timeline) == 5.0
    assert metrics.measured(timeline) == (2.0, 7.0)


def test_no_span_at_all() -> None:
    empty = Timeline([], 2, 1)
    assert (metrics.step_seconds(empty), metrics.idle_share(empty), metrics.bound_by(empty)) == (0.0, 0.0, "nothing")
    assert metrics.memory_peak(empty) is None


def test_stage_seconds_are_unions_and_halves_of_a_stage_are_one() -> None:
    spans = [span("ref.0", (0,), 0.0, 3.0), span("ref.1", (1,), 1.0, 3.0), span("ref.0", (0,), 6.0, 1.0, chunk=1)]
    assert metrics.stage_seconds(check(Timeline(spans, 2, 1))) == {"ref": 5.0}


def test_stage_seconds_leave_out_the_first_of_several_iterations() -> None:
    spans = [
        span("gen", (0,), 0.0, 9.0),
        span("gen", (0,), 9.0, 2.0, iteration=1),
        span("gen", (0,), 11.0, 3.0, iteration=2),
    ]
    assert metrics.stage_seconds(check(Timeline(spans, 1, 3))) == {"gen": 2.5}


def test_disaggregated_by_hand() -> None:
    timeline = disaggregated()
    assert metrics.stage_seconds(timeline) == {"gen": 4.0, "ref": 2.0, "reward": 3.0, "update_actor": 3.0}
    assert metrics.step_seconds(timeline) == 10.0
    second = metrics.measured(timeline)
    account = metrics.rank_seconds(timeline, second)
    assert metrics.total_seconds(account) == {
        "compute": 3 + 2 + 2 * 2 + 2.5 + 3 * 2,
        "wait_peers": 0,
        "wait_data": 0,
        "communication": 1 + 1 + 0.5 + 3 * 0.5,
        "wait_link": 1.5,
        "idle": 37.0,
    }
    assert metrics.idle_share(timeline) == 37 / 60
    assert metrics.group_seconds(timeline)[4,]["idle"] == 4.0
    assert set(metrics.group_seconds(timeline)) == {(0, 1), (2, 3), (4,), (5,)}
    # Every second of the step is on the path: gen 4, reward 3, update_actor 3.
    path = metrics.critical_path(timeline)
    assert path.seconds == 10.0
    assert path.table() == {
        ("reward", "compute"): 2.5,
        ("gen", "hbm"): 2.0,
        ("update_actor", "flops"): 2.0,
        ("gen", "exposed communication"): 1.0,
        ("gen", "launch"): 1.0,
        ("reward", "exposed communication"): 0.5,
        ("update_actor", "exposed communication"): 0.5,
        ("update_actor", "shared links"): 0.5,
    }
    assert metrics.bound_by(timeline) == "reward: compute (25 % of the critical path)"


def test_slack_is_how_much_longer_a_stage_may_take() -> None:
    timeline = disaggregated()
    assert metrics.slack_seconds(timeline) == {"gen": 0.0, "reward": 0.0, "ref": 1.0, "update_actor": 0.0}
    # A span on its own ranks whose output training needs 5 s later: only the graph knows that.
    values = span("values", (5,), 11.0, 1.0, iteration=1)
    timeline.spans.append(values)

    def needs(firing: Firing) -> list[Firing]:
        return [values.firing, Firing(0, "absent", 0, 0)] if firing == Firing(1, "update_actor", 0, 0) else []

    assert metrics.slack_seconds(timeline)["values"] == 8.0
    assert metrics.slack_seconds(timeline, needs) == {
        "gen": 0.0,
        "reward": 0.0,
        "ref": 1.0,
        "update_actor": 0.0,
        "values": 5.0,
    }


def test_slack_of_what_was_interrupted_and_of_what_waits_inside() -> None:
    """gen is interrupted by a sync and ends at 7; training on rank 1 waits inside until 9 for the reward of rank 2."""
    gen = span("gen", (0,), 0.0, 4.0)
    sync = span("update_weights", (0,), 4.0, 0.0, 1.0, after=gen)
    rest = replace(span("gen", (0,), 5.0, 2.0, after=sync), firing=gen.firing)
    ref, reward = span("ref", (1,), 0.0, 2.0), span("reward", (2,), 0.0, 9.0)
    train = span("update_actor", (1,), 3.0, 1.0, data=6.0, after=reward)
    slack = metrics.slack_seconds(check(Timeline([gen, sync, rest, ref, reward, train], 3, 1)))
    assert slack == {"gen": 3.0, "update_weights": 3.0, "ref": 7.0, "reward": 0.0, "update_actor": 0.0}


def test_overlap_share() -> None:
    share = metrics.overlap_share(disaggregated())
    assert share == {"gen": 0.0, "ref": 1.0, "reward": approx(2 / 3), "update_actor": 0.0}


def test_generation_counts_of_the_measured_iterations() -> None:
    def counts(scale: float, most: float) -> dict[str, float]:
        return {
            "replica_seconds": 10 * scale, "low_occupancy_seconds": 2.5 * scale, "sequence_seconds": 80 * scale,
            "preemptions": scale, "recomputed_tokens": 100 * scale, "most_running": most,
        }  # fmt: skip

    spans = [
        span("gen", (0,), 0.0, 9.0, counts=counts(50, 99)),  # the first iteration is not measured
        span("gen", (0,), 9.0, 2.0, iteration=1, counts=counts(1, 16)),
        span("gen", (1,), 9.0, 2.0, iteration=1, place=1, counts=counts(3, 20)),
        span("testing", (0,), 11.0, 2.0, iteration=1, counts=counts(7, 99)),
        span("gen", (0,), 13.0, 2.0, iteration=2, counts=counts(2, 12)),
    ]
    found = metrics.generation_summary(check(Timeline(spans, 2, 3)))
    assert found == metrics.GenerationSummary(3.0, 300.0, 0.25, 8.0, 20.0)
    assert metrics.generation_summary(disaggregated()) is None


def test_path_through_waits_inside_spans_gaps_and_interruptions() -> None:
    """gen is interrupted for a weight sync; training holds its rank from the start and waits for data inside."""
    gen = span("gen", (0,), 0.0, 4.0)
    sync = span("update_weights", (0,), 4.5, 0.0, 1.0, after=gen)  # half a second between release and start
    rest = replace(span("gen", (0,), 5.5, 2.0, after=sync), firing=gen.firing)
    train = span("update_actor", (1,), 0.0, 3.0, data=7.5, after=rest)
    path = metrics.critical_path(check(Timeline([gen, sync, rest, train], 2, 1)))
    assert [(s.span.firing.stage, s.start_seconds) for s in path.steps] == [
        ("gen", 0.0),
        ("update_weights", 4.0),
        ("gen", 5.5),
        ("update_actor", 7.5),
    ]
    assert path.table() == {
        ("gen", "compute"): 6.0,
        ("update_actor", "compute"): 3.0,
        ("update_weights", "exposed communication"): 1.0,
        ("update_weights", "dispatch"): 0.5,
    }
    assert path.seconds == 10.5


def test_path_follows_the_replica_that_does_not_wait() -> None:
    both = Span(Firing(0, "gen", 0, 0), "generate", "actor", (0, 1), 0.0, 4.0, (1.0, 3.0), (1.0,), (2.0, 0.0))
    assert metrics.critical_path(check(Timeline([both], 2, 1))).table() == {
        ("gen", "compute"): 3.0,
        ("gen", "exposed communication"): 1.0,
    }


def test_like_ranks_are_one_group() -> None:
    timeline = disaggregated()
    groups = metrics.rank_groups(timeline)
    assert {g.label: g.stages for g in groups} == {
        "0": ("gen",),
        "1": ("gen",),
        "2-3": ("ref", "update_actor"),
        "4": ("reward", "update_actor"),
        "5": (),
    }
    # Two places that run at the same times fold, whatever their numbers.
    timeline.spans += [
        replace(s, ranks=(5,), firing=s.firing._replace(place=2)) for s in timeline.spans if s.ranks == (0,)
    ]
    assert metrics.rank_groups(check(timeline))[0].ranks == (0, 5)
    assert rank_text((7, 1, 2, 3, 9)) == "1-3, 7, 9"


def test_memory_peaks_name_instant_phase_and_content() -> None:
    timeline = disaggregated()
    peak = metrics.memory_peak(timeline)
    assert peak == (2, 7.0, "train", 80.0, {"weights": 20.0, "optimizer": 60.0})
    assert {phase: p.bytes for phase, p in metrics.peaks_by_phase(timeline).items()} == {
        "generate": 40.0,
        "idle": 10.0,
        "score": 25.0,
        "train": 80.0,
    }
    assert list(metrics.peaks_by_phase(timeline)) == ["generate", "idle", "score", "train"]
    timeline.memory.append(MemorySample(1, 7.0, "train", {"weights": 80.0}))
    assert metrics.memory_peak(timeline).rank == 1  # equal peaks: the lowest rank


# ---------------------------------------------------------------- laws


@many
@given(timelines())
def test_every_rank_second_is_exactly_one_thing(timeline: Timeline) -> None:
    """Against counting: is a rank held in each unit of time, and by how much of what."""
    window = metrics.whole(timeline)
    account = metrics.rank_seconds(timeline)
    assert sum(metrics.total_seconds(account).values()) == approx(timeline.ranks * window.seconds)
    for rank in range(timeline.ranks):
        held = [s for s in timeline.spans if rank in s.ranks]
        free = sum(
            not any(s.start_seconds <= t < s.end_seconds for s in held)
            for t in range(int(window.start_seconds), int(window.end_seconds))
        )
        assert account["idle"][rank] == approx(free)
        own = [per_replica(s)[s.ranks.index(rank) * len(per_replica(s)) // len(s.ranks)] for s in held if s.seconds]
        for part, column in zip(metrics.BUSY_PARTS, zip(*own, strict=True), strict=False):
            assert account[part][rank] == approx(sum(column))


@many
@given(timelines(), st.lists(st.floats(0, 1), min_size=0, max_size=4))
def test_windows_add_up(timeline: Timeline, cuts: list[float]) -> None:
    start, end = metrics.whole(timeline)
    edges = [start, *sorted(start + c * (end - start) for c in cuts), end]
    pieces = [metrics.total_seconds(metrics.rank_seconds(timeline, metrics.Window(a, b))) for a, b in pairwise(edges)]
    total = metrics.total_seconds(metrics.rank_seconds(timeline))
    for part in metrics.PARTS:
        assert sum(piece[part] for piece in pieces) == approx(total[part], abs=1e-9)


@many
@given(timelines())
def test_groups_and_ranks_agree(timeline: Timeline) -> None:
    groups = metrics.group_seconds(timeline, metrics.whole(timeline))
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(timeline.ranks))
    total = metrics.total_seconds(metrics.rank_seconds(timeline))
    for part in metrics.PARTS:
        assert sum(group[part] for group in groups.values()) == approx(total[part])


@many
@given(timelines())
def test_critical_path_fills_the_window_and_never_more(timeline: Timeline) -> None:
    """These spans start as soon as they may, so an unbroken chain leads back to the window's start."""
    path = metrics.critical_path(timeline)
    assert path.seconds == approx(path.window.seconds)
    assert path.window.seconds <= metrics.whole(timeline).seconds
    for before, after in zip(path.steps, path.steps[1:], strict=False):
        assert before.span.end_seconds <= after.start_seconds
    assert sum(path.table().values()) == approx(path.seconds)


@many
@given(timelines(), st.data())
def test_a_broken_chain_only_shortens_the_path(timeline: Timeline, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(timeline.spans) - 1))
    timeline.spans[number] = replace(timeline.spans[number], released_by=None)
    path = metrics.critical_path(timeline)
    assert path.seconds <= path.window.seconds * (1 + 1e-9)


@many
@given(timelines())
def test_no_slack_on_the_critical_path(timeline: Timeline) -> None:
    slack = metrics.slack_seconds(timeline)
    assert all(0 <= seconds <= timeline.end_seconds for seconds in slack.values())
    measured = metrics.measured_iterations(timeline)
    for step in metrics.critical_path(timeline).steps:
        if step.span.firing.iteration in measured:
            assert slack[metrics.base_stage(step.span.firing.stage)] == 0.0


@many
@given(timelines())
def test_stage_and_step_bounds(timeline: Timeline) -> None:
    """The makespan is at most the sum of all spans and their gaps, and at least any iteration's interval."""
    makespan = metrics.whole(timeline).seconds
    assert all(0 <= seconds <= makespan for seconds in metrics.stage_seconds(timeline).values())
    assert 0 <= metrics.step_seconds(timeline) <= makespan
    assert sum(metrics.step_intervals(timeline)) <= makespan
    assert all(0 <= share <= 1 for share in metrics.overlap_share(timeline).values())


@many
@given(timelines())
def test_twice_the_durations_is_twice_everything(timeline: Timeline) -> None:
    double = scaled(timeline, 2.0)
    assert metrics.step_seconds(double) == 2 * metrics.step_seconds(timeline)
    for table in (metrics.stage_seconds, metrics.slack_seconds, lambda t: metrics.critical_path(t).table()):
        assert table(double) == {key: 2 * seconds for key, seconds in table(timeline).items()}
    assert metrics.idle_share(double) == metrics.idle_share(timeline)
    assert metrics.bound_by(double) == metrics.bound_by(timeline)
    for part, seconds in metrics.rank_seconds(double).items():
        assert (seconds == 2 * metrics.rank_seconds(timeline)[part]).all()
    assert [g.ranks for g in metrics.rank_groups(double)] == [g.ranks for g in metrics.rank_groups(timeline)]


@many
@given(timelines(), st.randoms(use_true_random=False))
def test_the_order_of_spans_in_the_file_does_not_matter(timeline: Timeline, random: object) -> None:
    shuffled = replace(timeline, spans=list(timeline.spans))
    random.shuffle(shuffled.spans)  # type: ignore[attr-defined]
    for measure in (
        metrics.step_seconds,
        metrics.stage_seconds,
        metrics.slack_seconds,
        metrics.overlap_share,
        metrics.idle_share,
        lambda t: metrics.critical_path(t).table(),
    ):
        assert measure(shuffled) == approx(measure(timeline))
    assert metrics.bound_by(shuffled) == metrics.bound_by(timeline)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=8))
def test_union_against_counting(intervals: list[list[int]]) -> None:
    covered = sum(any(a <= t < b for a, b in intervals) for t in range(20))
    assert metrics.union_seconds([(float(a), float(b)) for a, b in intervals]) == covered


def test_colocated_has_no_idle_and_no_overlap() -> None:
    timeline = colocated()
    assert metrics.idle_share(timeline) == 0.0
    assert set(metrics.overlap_share(timeline).values()) == {0.0}
    assert sum(metrics.stage_seconds(timeline).values()) == metrics.step_seconds(timeline) == 15.0


# ---------------------------------------------------------------- numbers for people, and who imports whom


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (1, "1.00"),
        (0.012345, "0.0123"),
        (9.996, "10.0"),
        (999.6, "1000"),
        (12345, "12300"),
        (-2.5, "-2.50"),
        (1234567, "1.23e+06"),
        (0.00001234, "1.23e-05"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_three_digits(value: float, shown: str) -> None:
    assert text.three(value) == shown


@given(st.floats(-1e9, 1e9))
def test_three_digits_are_right(value: float) -> None:
    assert float(text.three(value)) == approx(value, rel=5.01e-3, abs=0)


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0 s"),
        (85e-6, "85.0 µs"),
        (0.0123, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.9997, "1.00 s"),
        (4.5, "4.50 s"),
        (59.96, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.7, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (86399, "1 d 0 h"),
        (187200, "2 d 4 h"),
        (-4.5, "-4.50 s"),
        (float("inf"), "inf s"),
    ],
)
def test_human_seconds(seconds: float, shown: str) -> None:
    assert text.human_seconds(seconds) == shown


def test_gib() -> None:
    assert text.gib(80 * 2**30) == "80.0 GiB"


def test_readers_of_timelines_know_nothing_else() -> None:
    package = Path(metrics.__file__).parent
    allowed = {"timeline", "firing", "errors", "metrics", "format", "output"}
    for name in ("timeline", "metrics", "trace", "plot", "format"):
        tree = ast.parse((package / f"{name}.py").read_text())
        own = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert own <= allowed, f"{name} imports {own - allowed}"
