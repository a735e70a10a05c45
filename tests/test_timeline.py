"""Timelines: what is written is read, damaged files are named by line, and `check` finds each broken promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.timeline import MemorySample, Span, Timeline, check, read, write

GEN, TRAIN = Firing(0, "gen", 0, 0), Firing(0, "update_actor", 0, 0)


def two_spans() -> Timeline:
    """gen on ranks 0-3 for 2 s (two replicas, the second waits for the first), then update_actor for 3 s."""
    gen = Span(
        GEN,
        "generate",
        "actor",
        (0, 1, 2, 3),
        0.0,
        2.0,
        (1.5, 1.0),
        (0.5, 0.25),
        (0.0, 0.75),
        detail={"prefill": 0.25, "decode": 1.0},
        bound={"hbm": 1.25},
        counts={"preemptions": 2.0},
    )
    train = Span(TRAIN, "train", "actor", (0, 1, 2, 3), 2.0, 5.0, (2.0,), (0.25,), (0.0,), 0.5, 0.25, released_by=GEN)
    memory = [
        MemorySample(0, 0.0, "generate", {"weights": 14e9, "kv_cache": 1 / 3}),
        MemorySample(0, 2.0, "train", {"weights": 14e9}),
    ]
    return check(Timeline([gen, train], ranks=4, iterations=1, memory=memory, info={"seed": 7, "x": [1, None, 0.1]}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "timeline.jsonl"
    write(two_spans(), path)
    return path


def test_round_trip(file: Path) -> None:
    assert read(file) == two_spans()
    first = file.read_bytes()
    write(read(file), file)
    assert file.read_bytes() == first


finite = st.floats(allow_nan=False, allow_infinity=False)
firings = st.builds(Firing, st.integers(0, 9), st.text(max_size=8), st.integers(0, 99), st.integers(0, 99))
seconds = st.lists(finite, min_size=1, max_size=3).map(tuple)
spans = st.builds(
    Span,
    firings,
    st.text(max_size=5),
    st.text(max_size=5),
    st.lists(st.integers(0, 9)).map(tuple),
    finite,
    finite,
    seconds,
    seconds,
    seconds,
    finite,
    finite,
    st.dictionaries(st.text(), finite),
    st.dictionaries(st.text(), finite),
    st.none() | firings,
    st.dictionaries(st.text(), finite),
)
samples = st.builds(MemorySample, st.integers(0, 9), finite, st.text(), st.dictionaries(st.text(), finite))


@settings(max_examples=60, deadline=None)
@given(st.lists(spans, max_size=3), st.lists(samples, max_size=3))
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, some: list[Span], memory: list[MemorySample]
) -> None:
    timeline = Timeline(some, ranks=10, iterations=10, source="real", memory=memory, info={"strategy": "é\n"})
    path = tmp_path_factory.mktemp("any") / "t.jsonl"
    write(timeline, path)
    assert read(path) == timeline


def damage(file: Path, number: int, line: str | None) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "number, line, said",
    [
        (1, "", "header"),
        (1, "[1, 2]", "header"),
        (1, '{"rlhfsim_timeline": ', "JSON"),
        (1, '{"rlhfsim_timeline": 2}', "version 2"),
        (1, '{"rlhfsim_timeline": 1, "ranks": 4}', "required"),
        (2, '{"span": {"firing": [0, "gen"', "JSON"),
        (2, '{"span": {}}', "span.firing"),
        (3, '{"spam": {}}', "spam"),
        (3, "{}", "either"),
        (4, '{"memory": {"rank": "0", "seconds": 0, "phase": "x", "bytes_by_component": {}}}', "memory.rank"),
        (5, '{"memory": {"rank": 0, "seconds": NaN, "phase": "x", "bytes_by_component": {}}}', "memory.seconds"),
    ],
)
def test_damaged_line_is_named(file: Path, number: int, line: str, said: str) -> None:
    damage(file, number, line)
    with pytest.raises(InputError, match=said) as caught:
        read(file)
    assert caught.value.where == f"{file}:{number}"


def test_missing_and_unknown_fields_are_named(file: Path) -> None:
    row = json.loads(file.read_text().splitlines()[1])
    row["span"]["end_second"] = row["span"].pop("end_seconds")
    damage(file, 2, json.dumps(row))
    with pytest.raises(InputError, match=r"span\.end_second"):
        read(file)


@pytest.mark.parametrize("number", [2, 5])
def test_lost_lines_are_noticed(file: Path, number: int) -> None:
    damage(file, number, None)
    with pytest.raises(InputError, match="cut off"):
        read(file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary"):
        read(tmp_path / "binary")


def test_no_file_holds_what_json_does_not(tmp_path: Path) -> None:
    timeline = two_spans()
    timeline.spans[0] = replace(timeline.spans[0], link_seconds=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        write(timeline, tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"end_seconds": 1.0}, "before it starts"),
        ({"end_seconds": float("inf")}, "finite"),
        ({"compute_seconds": (2.0 + 1e-7,)}, "do not sum"),
        ({"data_seconds": 1.0, "link_seconds": -0.25}, "negative part"),
        ({"compute_seconds": (2.0, 2.0, 2.0)}, "share the ranks"),
        ({"compute_seconds": (2.0, 2.0), "communication_seconds": (0.25,) * 4}, "different numbers"),
        ({"ranks": ()}, "no ranks"),
        ({"ranks": (0, 0)}, "twice"),
        ({"ranks": (3, 4)}, "of 4 ranks"),
        ({"firing": Firing(1, "update_actor", 0, 0)}, "of 1 iterations"),
        ({"bound": {"flops": -1.0}}, "negative detail"),
        ({"released_by": Firing(0, "ref", 0, 0)}, "no span"),
        ({"released_by": TRAIN}, "itself"),
        ({"start_seconds": 1.0, "end_seconds": 4.0}, "before .* ends"),
        ({"start_seconds": 1.75, "end_seconds": 4.75}, "rank 0 is still held"),  # its wait for data covers the release
    ],
)
def test_check_finds(changes: dict[str, object], said: str) -> None:
    timeline = two_spans()
    timeline.spans[1] = replace(timeline.spans[1], **changes)
    with pytest.raises(AssertionError, match=said):
        check(timeline)


def test_check_allows_rounding_and_clock_error() -> None:
    timeline = two_spans()
    timeline.spans[1] = replace(timeline.spans[1], compute_seconds=(2.0 + 1e-10,))
    check(timeline)
    late = replace(timeline.spans[0], ranks=(0, 1), end_seconds=2.0)
    early = replace(timeline.spans[1], ranks=(2, 3), start_seconds=1.25, end_seconds=4.25)
    with pytest.raises(AssertionError, match="before"):
        check(Timeline([late, early], 4, 1, "real"))
    check(Timeline([late, early], 4, 1, "real", info={"clock_error_seconds": 0.5}))


def test_check_of_memory() -> None:
    timeline = two_spans()
    timeline.memory.append(MemorySample(4, 0.0, "x", {}))
    with pytest.raises(AssertionError, match="out of range"):
        check(timeline)
