"""Figures: what a reader must find is in them, labels do not overlap, and the same input gives the same file."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from timelines import colocated, disaggregated, span

from rlhfsim import plot
from rlhfsim.errors import InputError
from rlhfsim.firing import Firing
from rlhfsim.timeline import Span, Timeline, check

GIB = 2**30
CURVES = [
    {
        "strategy": s,
        "gpus": g,
        "speedup": k * (g / 8) ** 0.9,
        "low": 0.9 * k * (g / 8) ** 0.9,
        "high": 1.1 * k * (g / 8) ** 0.9,
        **({"measured": 2.5} if g == 16 and s == "disaggregated" else {}),
    }
    for s, k in (("disaggregated", 1.5), ("colocated", 1.0))
    for g in (64, 8, 16, 32)
]
BARS: list[dict[str, Any]] = [
    {"strategy": "colocated", "speedup": 1.0, "step_seconds": 27.0},
    {"strategy": "interleaved, asynchronous, half of the ranks", "speedup": 0.96, "low": 0.9, "high": 1.02},
    {"strategy": "disaggregated", "speedup": 1.62, "low": 1.5, "high": 1.75, "measured": 1.7, "step_seconds": 16.6},
]
PHASES = {
    "generate": {"weights": 14 * GIB, "KV cache": 50 * GIB},
    "score": {"weights": 14 * GIB, "logits": 64 * GIB},
    "train actor": {"weights": 14 * GIB, "optimizer": 84 * GIB, "activations": 9 * GIB},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn, laid out as they were saved."""
    figures: list[Any] = []
    original = plot.drawing

    @contextmanager
    def keep(*args: Any, **options: Any) -> Iterator[Any]:
        with original(*args, **options) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(plot, "drawing", keep)
    return figures


def labels(figure: Any) -> list[Any]:
    """All texts that a reader sees, with the box of each in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    axises = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    # matplotlib keeps tick labels beyond the ends of an axis, but does not draw them
    ticks = {t for axis in axises for t in axis.get_majorticklabels() + axis.get_minorticklabels()}
    drawn_ticks = {tick.label1 for axis in axises for tick in axis._update_ticks()}
    return [
        (t.get_text(), t.get_window_extent(renderer))
        for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and (t not in ticks or t in drawn_ticks)
    ]


def assert_legible(figure: Any) -> None:
    found = labels(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"{text!r} is cut off"
    for (one, a), (other, b) in combinations(found, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes include the room above and below letters, of which neighbouring rows may share a little.
        assert not (wide > 1 and high > 0.35 * min(a.height, b.height)), f"{one!r} and {other!r} overlap"


def many_engines(engines: int, chunks: int) -> Timeline:
    """Engines of two ranks that all generate for different times, in chunks, and a training pool that waits for all."""
    spans, ends = [], []
    for place in range(engines):  # 101 is prime: up to 101 engines all differ, more fold
        t, last = 0.0, None
        for chunk in range(chunks):
            seconds = (20 + place * 37 % 101 / 7) / chunks
            last = span("gen", (2 * place, 2 * place + 1), t, seconds, chunk=chunk, place=place, after=last)
            t = last.end_seconds
            spans.append(last)
        ends.append(last)
    slowest = max(ends, key=lambda s: s.end_seconds)
    pool = range(2 * engines, 4 * engines)
    spans.append(span("update_actor", pool, slowest.end_seconds, 9.0, 2.0, after=slowest))
    return check(Timeline(spans, 4 * engines, 1, info={"strategy": "disaggregated", "cluster": "a large one"}))


def test_gantt_says_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "g.svg"
    plot.gantt({"colocated": colocated(), "disaggregated": disaggregated()}, path)
    svg = path.read_text()
    for text in (
        "colocated: 15.0 s per step, 0 % idle, 6 ranks of 3 x test node, simulated",
        "disaggregated: 10.0 s per step, 62 % idle",
        "gen",
        "update_actor",
        "exposed communication",
        "idle",
        "seconds (inside",
        "2-3",
        "end of an iteration",
    ):
        assert text in svg, text


def test_a_simulated_and_a_real_timeline_share_axis_and_colours(tmp_path: Path, drawn: list[Any]) -> None:
    """Panels say which is which, once; a stage has one colour in both."""
    real = replace(disaggregated(), source="real")
    plot.gantt({"simulated": disaggregated(), "run-3": real}, tmp_path / "g.png")
    first, second = drawn[0].axes
    assert first.get_xlim() == second.get_xlim()
    above, below = (axes.get_title(loc="left") for axes in (first, second))
    assert above.startswith("simulated") and above.count("simulated") == 1 and not above.endswith("simulated")
    assert below.startswith("run-3") and below.endswith(", real")
    one, other = ([bars.get_facecolor().tolist() for bars in axes.collections] for axes in (first, second))
    assert one == other and len({tuple(c) for c in one[0]}) > 0
    assert_legible(drawn[0])


def test_a_row_shows_the_parts_of_its_own_ranks(tmp_path: Path) -> None:
    """Two replicas, the second waits for the first: a row has its own replica's parts, a row of both their mean."""
    both = Span(Firing(0, "gen", 0, 0), "generate", "actor", (4, 5, 6, 7), 0.0, 4.0, (3.0, 1.0), (1.0, 1.0), (0.0, 2.0))
    shares = {ranks: plot._shares(both, frozenset(ranks)) for ranks in ((4,), (6, 7), (4, 5, 6, 7))}
    assert shares == {(4,): (0, 3, 1, 0), (6, 7): (0, 1, 1, 2), (4, 5, 6, 7): (0, 2, 1, 1)}


def test_gantt_draws_all_panels_on_one_axis_to_scale(tmp_path: Path, drawn: list[Any]) -> None:
    plot.gantt({"a": colocated(), "b": disaggregated()}, tmp_path / "g.png")
    first, second = drawn[0].axes
    assert first.get_xlim() == second.get_xlim() == (0, pytest.approx(30.3))
    assert [t.get_text() for t in second.get_yticklabels()] == ["0", "1", "2-3", "4", "5"]
    ends = sorted({round(float(path.get_extents().x1), 6) for bars in second.collections for path in bars.get_paths()})
    assert ends[-1] == 20.0 and 4.0 in ends and 17.0 in ends


@pytest.mark.parametrize("engines, chunks", [(3, 2), (31, 3), (128, 40)])
def test_gantt_is_legible_at_any_size(tmp_path: Path, drawn: list[Any], engines: int, chunks: int) -> None:
    timeline = many_engines(engines, chunks)
    plot.gantt({"a rather long label for a scenario with overrides": timeline}, tmp_path / "g.png")
    assert_legible(drawn[0])
    axes = drawn[0].axes[0]
    rows = [t.get_text() for t in axes.get_yticklabels()]
    assert len(rows) <= plot.MAX_ROWS
    assert rows[-1] == f"{2 * engines}-{4 * engines - 1}"  # the training pool is there, however many engines
    assert ("not shown" in axes.get_title(loc="left")) == (min(engines, 101) + 1 > len(rows))
    assert engines < 128 or rows[0] == "0-1, 202-203"


def test_gantt_window_and_tiny_spans(tmp_path: Path, drawn: list[Any]) -> None:
    spans = [span("gen", (0,), 0.0, 100.0), span("adv", (0,), 100.0, 1e-4), span("own_stage", (0,), 101.0, 5.0)]
    plot.gantt({"x": check(Timeline(spans, 1, 1))}, tmp_path / "g.png", window=(99.0, 107.0))
    assert drawn[0].axes[0].get_xlim() == (99.0, 107.0)
    assert_legible(drawn[0])
    tiny = min((b for c in drawn[0].axes[0].collections for b in c.get_paths()), key=lambda p: p.get_extents().width)
    assert tiny.get_extents().width > 1e-3  # drawn a pixel wide, or it could not be seen


def test_gantt_starts_at_zero_whatever_the_clock(tmp_path: Path, drawn: list[Any]) -> None:
    late = check(Timeline([span("gen", (0,), 1000.0, 3.0), span("ref", (0,), 1003.0, 1.0)], 1, 1, source="real"))
    plot.gantt({"x": late}, tmp_path / "g.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlim() == (0.0, pytest.approx(4.04))
    assert [line.get_xdata()[0] for line in axes.lines] == [4.0]
    extents = [path.get_extents() for bars in axes.collections for path in bars.get_paths()]
    assert (min(e.x0 for e in extents), max(e.x1 for e in extents)) == (0.0, 4.0)


def test_speedup_figure_and_its_csv(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "s.svg"
    plot.speedup_figure(CURVES, "colocated on 8 GPUs", "gpus", path, scaling="strong", ideal="linear", x_label="GPUs")
    svg = path.read_text()
    for text in ("speedup over colocated on 8 GPUs", "strong scaling", "ideal (linear)", "disaggregated, measured"):
        assert text in svg, text
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["strategy", "gpus", "speedup", "low", "high", "measured"]
    assert [row["gpus"] for row in rows] == ["8", "16", "32", "64"] * 2
    assert float(rows[3]["speedup"]) == next(
        r["speedup"] for r in CURVES if r["gpus"] == 64 and r["strategy"] == "disaggregated"
    )
    ideal = next(line for line in drawn[0].axes[0].lines if "ideal" in line.get_label())
    assert list(ideal.get_ydata()) == [1, 2, 4, 8]
    assert_legible(drawn[0])


def test_the_ideal_line_is_1_where_the_baseline_is(tmp_path: Path, drawn: list[Any]) -> None:
    """The baseline begins at 16, since 8 is too few for it."""
    plot.speedup_figure(CURVES, "colocated", "gpus", tmp_path / "s.png", ideal="linear", ideal_from=16)
    ideal = next(line for line in drawn[0].axes[0].lines if "ideal" in line.get_label())
    assert list(ideal.get_ydata()) == [0.5, 1, 2, 4]


def test_one_iteration_from_zero_on(tmp_path: Path, drawn: list[Any]) -> None:
    """The second iteration of each, on one axis; idle ranks are grey only until their own timeline ends."""
    spans = [span("gen", (0,), 0.0, 9.0), span("gen", (0,), 9.0, 2.0, iteration=1)]
    twice = check(Timeline([*spans, span("gen", (0,), 11.0, 5.0, iteration=2)], 1, 3))
    once = check(Timeline([span("gen", (0,), 4.0, 8.0)], 2, 1))
    plot.gantt({"a": twice, "b": once}, tmp_path / "g.png", iteration=1)
    first, second = drawn[0].axes
    assert first.get_xlim() == second.get_xlim() == pytest.approx((0.0, 8.08))
    ends = [[path.vertices[:, 0].max() for path in axes.collections[0].get_paths()] for axes in (first, second)]
    assert ends == [[2.0], [8.0]]
    grey = [[patch.get_width() for patch in axes.patches] for axes in (first, second)]
    assert grey == [[2.0], [8.0, 8.0]]


def test_speedup_figure_over_names(tmp_path: Path, drawn: list[Any]) -> None:
    table = [
        {"strategy": s, "model": m, "speedup": 1.2, "low": 1.1, "high": 1.3}
        for s in ("a", "b")
        for m in ("llama-7b-with-a-long-name", "opt-66b", "opt-13b", "pythia-12b", "gpt-neox-20b", "bloom-7b1")
    ]
    plot.speedup_figure(table, "colocated", "model", tmp_path / "s.png", scaling="weak", title="an experiment")
    assert drawn[0].axes[0].get_title() == "an experiment, weak scaling (the same work per rank)"
    assert_legible(drawn[0])


def test_speedup_bars(tmp_path: Path, drawn: list[Any]) -> None:
    plot.speedup_bars(BARS, "colocated", tmp_path / "b.png", title="2 x DGX-A100, Llama-7B")
    assert_legible(drawn[0])
    texts = [text for text, _ in labels(drawn[0])]
    assert {"1.62x (16.6 s per step)", "0.960x"} <= set(texts)
    assert "speedup over colocated (bar: interval, star: measured)" in texts
    assert [bar.get_width() for bar in drawn[0].axes[0].patches] == [1.0, 0.96, 1.62]
    assert "colocated,1.0,,,,27.0" in (tmp_path / "b.csv").read_text()


def test_memory_figure(tmp_path: Path, drawn: list[Any]) -> None:
    plot.memory_figure(PHASES, tmp_path / "m.png", capacity_bytes=80 * GIB, title="Llama-7B on A100-80GB")
    assert_legible(drawn[0])
    texts = {text for text, _ in labels(drawn[0])}
    assert {"64.0 GiB", "78.0 GiB", "107 GiB: 27.0 GiB too much", "capacity 80.0 GiB", "KV cache"} <= texts
    ends = [
        max(p.get_x() + p.get_width() for p in drawn[0].axes[0].patches if round(p.get_y() + 0.31) == y)
        for y in range(3)
    ]
    assert ends == pytest.approx([64, 78, 107])
    assert (tmp_path / "m.csv").read_text().splitlines()[0] == "phase,weights,KV cache,logits,optimizer,activations"


DRAW: dict[str, Callable[[Path], None]] = {
    "gantt": lambda path: plot.gantt({"a": colocated(), "b": disaggregated()}, path),
    "speedup": lambda path: plot.speedup_figure(CURVES, "colocated", "gpus", path, ideal="flat"),
    "bars": lambda path: plot.speedup_bars(BARS, "colocated", path),
    "memory": lambda path: plot.memory_figure(PHASES, path),
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", DRAW)
def test_same_input_same_bytes(tmp_path: Path, name: str, suffix: str) -> None:
    one, two = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    DRAW[name](one)
    DRAW[name](two)
    assert one.read_bytes() == two.read_bytes()
    assert b"date" not in one.read_bytes()[:2000].lower()


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plot.gantt({"a": colocated()}, tmp_path / "g.gif")
    with pytest.raises(InputError, match="no timeline"):
        plot.gantt({}, tmp_path / "g.png")
    with pytest.raises(InputError, match=r"row 1 has no column 'gpu' \(did you mean 'gpus'"):
        plot.speedup_figure(CURVES, "colocated", "gpu", tmp_path / "s.png")
    with pytest.raises(InputError, match="no rows"):
        plot.speedup_bars([], "colocated", tmp_path / "s.png")
    with pytest.raises(InputError, match="no memory"):
        plot.memory_figure({}, tmp_path / "s.png")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, rlhfsim.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(plot.__file__).parents[1]).returncode == 0
