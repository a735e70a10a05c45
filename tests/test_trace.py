"""Trace files: what a viewer needs is there, in microseconds, and nothing overlaps on a track."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from timelines import colocated, disaggregated, timelines

from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.metrics import BUSY_PARTS
from rlhfsim.timeline import Span, Timeline, check
from rlhfsim.trace import write_trace


def events_of(path: Path, shown: dict[str, Timeline], **options: Any) -> list[dict[str, Any]]:
    write_trace(shown, path, **options)
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    return trace["traceEvents"]


def by_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == kind]


def names(events: list[dict[str, Any]], what: str) -> list[str]:
    return [event["args"]["name"] for event in by_kind(events, "M") if event["name"] == what]


def test_one_process_a_node_and_one_thread_a_group(tmp_path: Path) -> None:
    events = events_of(tmp_path / "t.json", {"a": disaggregated(), "b": colocated()})
    assert names(events, "process_name") == [
        *(f"a (simulated): node {k}" for k in range(3)),
        "b (simulated): node 0",
    ]
    assert names(events, "thread_name") == ["rank 0", "rank 1", "ranks 2-3", "rank 4", "rank 5", "ranks 0-5"]
    assert {event["pid"] for event in events} == {1, 2, 3, 4}


def test_a_simulated_and_a_real_timeline_lie_side_by_side(tmp_path: Path) -> None:
    """A process each, named by its source, the same tracks and categories (by which a viewer colours), from 0 on."""
    real = replace(colocated(), source="real")
    events = events_of(tmp_path / "t.json", {"simulated": colocated(), "run-3": real})
    assert names(events, "process_name") == ["simulated: node 0", "run-3 (real): node 0"]
    one, other = ([e for e in by_kind(events, "X") if e["pid"] == pid] for pid in (1, 2))
    assert [(e["ts"], e["dur"], e["tid"], e["name"], e["cat"]) for e in one] == [
        (e["ts"], e["dur"], e["tid"], e["name"], e["cat"]) for e in other
    ]
    assert min(e["ts"] for e in one) == 0.0


def test_a_span_is_a_complete_event_in_microseconds(tmp_path: Path) -> None:
    events = by_kind(events_of(tmp_path / "t.json", {"a": disaggregated()}), "X")
    event = next(e for e in events if e["name"] == "update_actor" and e["tid"] == 2 and e["args"]["iteration"] == 1)
    assert (event["ts"], event["dur"], event["pid"], event["cat"]) == (17e6, 3e6, 2, "update_actor")
    args = event["args"]
    assert (args["compute_seconds"], args["communication_seconds"], args["wait_link_seconds"]) == (2.0, 0.5, 0.5)
    assert args["released_by"] == "reward, iteration 1, chunk 0, place 0"
    assert args["ranks"] == "2-4" and args["bound_seconds"] == {"flops": 2.0}


def test_each_rank_shows_its_own_replica(tmp_path: Path) -> None:
    both = Span(Firing(0, "gen", 0, 0), "generate", "actor", (4, 5, 6, 7), 0.0, 4.0, (1.0, 3.0), (1.0,), (2.0, 0.0))
    events = by_kind(events_of(tmp_path / "t.json", {"a": check(Timeline([both], 8, 1))}, ranks=range(4, 8)), "X")
    assert {e["tid"]: e["args"]["wait_peers_seconds"] for e in events} == {4: 2.0, 5: 2.0, 6: 0.0, 7: 0.0}


def test_arrows_join_releaser_and_released(tmp_path: Path) -> None:
    events = events_of(tmp_path / "t.json", {"a": disaggregated()})
    starts = {event["id"]: event for event in by_kind(events, "s")}
    ends = {event["id"]: event for event in by_kind(events, "f")}
    assert starts.keys() == ends.keys() and len(starts) == len(by_kind(events, "s")) == 10
    assert {event["bp"] for event in ends.values()} == {"e"}  # ends in the slice around it, not in the next one
    joined = {((s["tid"], s["ts"]), (ends[i]["tid"], ends[i]["ts"])) for i, s in starts.items()}
    assert ((0, 4e6 - 1e-3), (2, 4e6)) in joined  # gen on rank 0 releases ref on ranks 2-3
    for at, side in ((starts, "s"), (ends, "f")):
        for event in at.values():  # each lies in a slice of its track, or a viewer drops it
            assert any(
                x["ts"] <= event["ts"] <= x["ts"] + x["dur"]
                for x in by_kind(events, "X")
                if (x["pid"], x["tid"]) == (event["pid"], event["tid"])
            ), side
    assert not by_kind(events_of(tmp_path / "t.json", {"a": disaggregated()}, flows=False), "s")


def test_memory_counters_end_what_is_gone(tmp_path: Path) -> None:
    counters = by_kind(events_of(tmp_path / "t.json", {"a": disaggregated()}), "C")
    assert [(e["ts"], e["args"]) for e in counters if e["tid"] == 0] == [
        (0.0, {"weights": 10.0, "kv_cache": 30.0}),
        (4e6, {"weights": 10.0, "kv_cache": 0.0}),
    ]


def test_chosen_ranks_are_not_folded(tmp_path: Path) -> None:
    events = events_of(tmp_path / "t.json", {"a": disaggregated()}, ranks=[3, 2])
    assert names(events, "thread_name") == ["rank 2", "rank 3"]
    assert {e["tid"] for e in by_kind(events, "X")} == {2, 3}
    with pytest.raises(InputError, match="no rank 6"):
        write_trace({"a": disaggregated()}, tmp_path / "t.json", ranks=[6])


def test_too_many_groups_are_thinned_and_it_says_so(tmp_path: Path) -> None:
    events = events_of(tmp_path / "t.json", {"a": disaggregated()}, max_tracks=2)
    assert names(events, "thread_name") == ["rank 0", "ranks 2-3"]
    assert names(events, "process_name")[0] == "a (simulated): node 0, 3 more groups of ranks not shown"


def test_same_timelines_same_bytes(tmp_path: Path) -> None:
    write_trace({"a": disaggregated()}, tmp_path / "1.json")
    write_trace({"a": disaggregated()}, tmp_path / "2.json")
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


@settings(max_examples=50, deadline=None)
@given(timelines())
def test_tracks_hold_all_seconds_and_no_overlap(tmp_path_factory: pytest.TempPathFactory, timeline: Timeline) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.json"
    tracks = defaultdict(list)
    for event in by_kind(events_of(path, {"x": timeline}, ranks=range(timeline.ranks)), "X"):
        tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        parts = sum(event["args"][f"{part}_seconds"] for part in BUSY_PARTS)
        assert parts * 1e6 == pytest.approx(event["dur"])
    for rank in range(timeline.ranks):
        slices = sorted(tracks[rank])
        assert all(a[1] <= b[0] for a, b in pairwise(slices))
        held = sum(s.seconds for s in timeline.spans if rank in s.ranks)
        assert sum(end - start for start, end in slices) == pytest.approx(held * 1e6)
