"""Figures from timelines and tables: Gantt charts, speedups, memory. PNG or SVG, by the suffix of the path.

A figure explains itself: units on the axes, the baseline's name, a legend, and no date in the file, so that the same
input gives the same bytes. matplotlib is loaded when the first figure is drawn.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import InputError, nearest
from .format import gib, human_seconds, three
from .metrics import RankGroup, base_stage, evenly, idle_share, iteration_ends, rank_groups, step_seconds, whole
from .output import replacing
from .timeline import Span, Timeline, per_replica

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with any kind of colour vision tell apart: the schemes "muted", "light" and "bright" of Paul Tol,
# "Colour Schemes", SRON/EPS/TN/09-002, issue 3.2, 2021-08-18.
STAGE_COLOURS = {
    "gen": "#88CCEE",
    "old_log_prob": "#44AA99",
    "ref": "#117733",
    "values": "#999933",
    "reward": "#DDCC77",
    "adv": "#AA4499",
    "update_critic": "#CC6677",
    "update_actor": "#882255",
    "update_weights": "#332288",
}
OTHER_COLOURS = ("#EE8866", "#77AADD", "#BBCC33", "#FFAABB")
COMPONENT_COLOURS = ("#88CCEE", "#332288", "#44AA99", "#DDCC77", "#CC6677", "#882255", "#117733", "#999933", "#AA4499")
CURVE_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
IDLE_COLOUR = "#EEEEEE"
WIDTH_INCHES = 12.0
MAX_ROWS = 64
DPI = 150


@contextmanager
def drawing(path: str | Path, height_inches: float, width_inches: float = WIDTH_INCHES) -> Iterator[Figure]:
    """A figure that is saved at the end. It belongs to no window and no global state."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".png", ".svg"):
        raise InputError(f"figures are .png or .svg files, not {path.suffix!r}", field="path", where=str(path))
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "rlhfsim",
        "svg.fonttype": "none",
        "hatch.linewidth": 0.6,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        # Neither file may hold the date, nor the program's version.
        metadata: dict[str, Any] = {"Date": None} if kind == ".svg" else {"Software": None}
        with replacing(path) as file:
            figure.savefig(file, format=kind[1:], metadata=metadata)


# ---------------------------------------------------------------- Gantt


class _Row(NamedTuple):
    label: str
    ranks: frozenset[int]
    spans: Sequence[Span]


def gantt(
    timelines: Mapping[str, Timeline],
    path: str | Path,
    *,
    max_rows: int = MAX_ROWS,
    window: tuple[float, float] | None = None,
    iteration: int | None = None,
) -> None:
    """What each rank does when, one panel a timeline on one time axis.

    A row is a group of ranks that do the same at the same times; where a timeline has more than its share of
    `max_rows`, rows are evenly chosen and the panel's title says so. window: seconds to show (default: all).
    iteration: show only the spans of this one (of a shorter timeline the last), each timeline's from 0 on.
    """
    if not timelines:
        raise InputError("there is no timeline to draw", field="timelines")
    headlines = timelines  # rates and shares are those of all iterations
    if iteration is not None:
        timelines = {label: _only(timeline, iteration) for label, timeline in timelines.items()}
    rows_of = {label: _rows(timeline, max(1, max_rows // len(timelines))) for label, timeline in timelines.items()}
    count = sum(len(rows) for rows, _ in rows_of.values())
    row_inches = min(0.36, max(0.14, 9.0 / count))
    height = 1.5 + 0.45 * len(timelines) + row_inches * count
    starts = [whole(t).start_seconds for t in timelines.values()]
    longest = max(whole(t).seconds for t in timelines.values()) or 1.0
    limits = window or (0.0, longest * 1.01)
    stages = _stages(timelines.values())
    colours = _stage_colours(stages)
    with drawing(path, height) as figure:
        panels = figure.subplots(
            len(timelines), 1, sharex=True, squeeze=False, height_ratios=[len(rows) for rows, _ in rows_of.values()]
        )[:, 0]
        # The axis is about 10 of the figure's 12 inches; what that means for a letter or a pixel need not be exact.
        per_inch = (limits[1] - limits[0]) / (WIDTH_INCHES - 2.0)
        for axes, (label, timeline), start in zip(panels, timelines.items(), starts, strict=True):
            rows, skipped = rows_of[label]
            _draw_rows(axes, rows, colours, start, whole(timeline).seconds, limits, per_inch, row_inches)
            for end in iteration_ends(timeline):
                axes.axvline(end - start, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
            axes.set_title(_headline(label, headlines[label], skipped), loc="left", fontsize=10, wrap=True)
        which = "" if iteration is None else " of one iteration in steady state"
        panels[-1].set_xlabel(
            f"seconds{which} (inside a span: how much is compute, communication, waiting; not their order)"
        )
        panels[0].set_xlim(*limits)
        _gantt_legend(figure, stages, colours)


def _only(timeline: Timeline, iteration: int) -> Timeline:
    """The spans of one iteration; of the last one where there are fewer."""
    return replace(timeline, spans=timeline.of(iteration=min(iteration, timeline.iterations - 1)))


def _rows(timeline: Timeline, limit: int) -> tuple[list[_Row], int]:
    """About `limit` rows, and how many were left out. Groups that run the same stages are a pool: pools stay together,
    and each keeps its share of the rows, at least one."""
    pools: dict[frozenset[str], list[RankGroup]] = {}
    groups = sorted(rank_groups(timeline), key=lambda group: not group.spans)  # idle ranks last
    for group in groups:
        pools.setdefault(frozenset(group.stages), []).append(group)
    rows = []
    for pool in pools.values():
        count = max(1, len(pool) * min(limit, len(groups)) // len(groups))
        rows += [_Row(_row_label(group), frozenset(group.ranks), group.spans) for group in evenly(pool, count)]
    return rows, len(groups) - len(rows)


def _row_label(group: RankGroup) -> str:
    """Ranks that are no single run are many: the first run and how many there are."""
    if len(group.label) <= 16:
        return group.label
    return f"{group.label.partition(',')[0]}, … ({len(group.ranks)} ranks)"


def _headline(label: str, timeline: Timeline, skipped: int) -> str:
    info = timeline.info
    strategy, cluster = info.get("strategy"), info.get("cluster")
    name = label if not isinstance(strategy, str) or strategy in label else f"{label} ({strategy})"
    where = f"{timeline.ranks} ranks" + (f" of {cluster}" if isinstance(cluster, str) else "")
    parts = [
        f"{human_seconds(step_seconds(timeline))} per step",
        f"{100 * idle_share(timeline):.0f} % idle",
        where,
        *([] if timeline.source in label else [timeline.source]),
    ]
    if skipped:
        parts.append(f"{skipped} further rows not shown")
    return f"{name}: " + ", ".join(parts)


def _stages(timelines: Iterable[Timeline]) -> list[str]:
    """The stages that occur: the known ones in the order of a step, then others by name."""
    found = {base_stage(span.firing.stage) for timeline in timelines for span in timeline.spans}
    return [s for s in STAGE_COLOURS if s in found] + sorted(found - set(STAGE_COLOURS))


def _stage_colours(stages: Sequence[str]) -> dict[str, str]:
    """The same colour for the same stage in every figure."""
    others = [s for s in stages if s not in STAGE_COLOURS]
    return STAGE_COLOURS | {s: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, s in enumerate(others)}


def _draw_rows(
    axes: Axes,
    rows: Sequence[_Row],
    colours: Mapping[str, str],
    origin: float,
    seconds: float,
    limits: tuple[float, float],
    per_inch: float,
    row_inches: float,
) -> None:
    from matplotlib.patheffects import withStroke

    pixel, letter = per_inch / DPI, per_inch * 0.075
    font = min(8.0, 72 * row_inches * 0.62)
    for y, row in enumerate(rows):
        axes.barh(y, seconds, 0.8, color=IDLE_COLOUR, zorder=0)  # ends with the timeline: after it nobody idles
        bars, fills, edges, hidden, hatched = [], [], [], [], []
        for span in row.spans:
            start, width = span.start_seconds - origin, max(span.seconds, pixel)
            bars.append((start, width))
            fills.append(colours[base_stage(span.firing.stage)])
            edges.append(0.5 if width > 6 * pixel else 0.0)
            waits_before, communication_from, communication, waits_after = _shares(span, row.ranks)
            hidden += [(start, waits_before), (start + span.seconds - waits_after, waits_after)]
            hatched.append((start + communication_from, communication))
            middle = start + width / 2
            if width > letter * (len(span.firing.stage) + 1) and limits[0] <= middle <= limits[1]:
                # A rim of the span's own colour keeps the letters clear of the hatching.
                axes.text(
                    middle,
                    y,
                    span.firing.stage,
                    ha="center",
                    va="center",
                    fontsize=font,
                    zorder=4,
                    clip_on=True,
                    color="white" if _dark(fills[-1]) else "black",
                    path_effects=[withStroke(linewidth=2.5, foreground=fills[-1])],
                )
        axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=fills, edgecolors="white", linewidths=edges, zorder=1)
        axes.broken_barh(_visible(hatched), (y - 0.4, 0.8), facecolor=(0, 0, 0, 0.28), linewidth=0, zorder=2)
        axes.broken_barh(
            [bar for bar in hatched if bar[1] > 4 * pixel],
            (y - 0.4, 0.8),
            facecolor="none",
            edgecolor="black",
            hatch="/////",
            linewidth=0,
            zorder=2,
        )
        axes.broken_barh(_visible(hidden), (y - 0.4, 0.8), facecolor=(1, 1, 1, 0.7), linewidth=0, zorder=2)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=font)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_ylabel("rank")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _dark(colour: str) -> bool:
    """By relative luminance (coefficients of Recommendation ITU-R BT.709), gamma left out: for letters it is enough."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5


def _visible(bars: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [bar for bar in bars if bar[1] > 0]


def _shares(span: Span, ranks: frozenset[int]) -> tuple[float, float, float, float]:
    """(waiting at the start, where communication begins, communication, waiting at the end), mean over the replicas of
    these ranks."""
    replicas = per_replica(span)
    if len(replicas) > 1:
        shown = {k * len(replicas) // len(span.ranks) for k, rank in enumerate(span.ranks) if rank in ranks}
        replicas = [replicas[k] for k in sorted(shown)]
    compute, communication, peers, data, link = (sum(column) / len(replicas) for column in zip(*replicas, strict=True))
    return data, data + compute, communication, peers + link


def _gantt_legend(figure: Figure, stages: Sequence[str], colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(facecolor=colours[stage], label=stage) for stage in stages]
    handles += [
        Patch(facecolor="#B8B8B8", hatch="/////", linewidth=0, label="hatched: exposed communication"),
        Patch(facecolor="#D8E8EE", label="pale: waiting (data, peers, links)"),
        Patch(facecolor=IDLE_COLOUR, label="idle"),
        Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 2)), label="end of an iteration"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=8)


def _short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1].rstrip(", ") + "…"


# ---------------------------------------------------------------- speedups


def speedup_figure(
    table: Sequence[Mapping[str, Any]],
    baseline: str,
    x: str,
    path: str | Path,
    *,
    scaling: Literal["strong", "weak"] | None = None,
    ideal: Literal["linear", "flat"] | None = None,
    ideal_from: float | None = None,
    x_label: str = "",
    title: str = "",
) -> None:
    """Speedup over `baseline` along column `x`, one curve a strategy, and a CSV file of it beside the figure.

    Rows hold `strategy`, the column `x` (numbers, or names in the order of the rows) and `speedup`; where known `low`
    and `high` (drawn as a band) and `measured` (drawn as a point). strong: the work is fixed; weak: the work per rank
    is. ideal: a speedup in proportion to x, which is 1 at `ideal_from` (the baseline's x; default: the smallest), or
    the same for all.
    """
    _require_columns(table, ("strategy", x, "speedup"))
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        curves.setdefault(str(row["strategy"]), []).append(row)
    values = list(dict.fromkeys(row[x] for row in table))
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    values = sorted(values) if numeric else values
    place = {v: v if numeric else i for i, v in enumerate(values)}
    with drawing(path, 5.2, 8.5) as figure:
        axes = figure.subplots()
        for number, (strategy, rows) in enumerate(curves.items()):
            rows = curves[strategy] = sorted(rows, key=lambda row: place[row[x]])
            # Names have no order that a line could follow: points, side by side.
            aside = 0.0 if numeric else 0.4 * ((number + 0.5) / len(curves) - 0.5)
            _draw_curve(axes, strategy, [place[row[x]] + aside for row in rows], rows, number, joined=numeric)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label=f"{baseline} (1x)")
        if ideal and numeric:
            reached = [1.0 if ideal == "flat" else v / (ideal_from or values[0]) for v in values]
            axes.plot(values, reached, color="#999999", linewidth=1.2, linestyle=(0, (5, 3)), label=f"ideal ({ideal})")
        _speedup_axes(axes, values, numeric, log_y=ideal == "linear")
        axes.set_xlabel(x_label or x.replace("_", " "))
        axes.set_ylabel(f"speedup over {baseline}")
        kinds = {
            "strong": "strong scaling (the same work at every point)",
            "weak": "weak scaling (the same work per rank)",
            None: "",
        }
        axes.set_title(", ".join(filter(None, (title, kinds[scaling]))), fontsize=10, wrap=True)
        figure.legend(loc="outside lower center", ncols=min(4, len(curves) + 2), frameon=False, fontsize=8)
    _write_csv(
        path,
        ["strategy", x, "speedup", "low", "high", "measured"],
        [row | {"strategy": strategy} for strategy, rows in curves.items() for row in map(dict, rows)],
    )


def _draw_curve(
    axes: Axes, strategy: str, xs: Sequence[float], rows: Sequence[Mapping[str, Any]], number: int, *, joined: bool
) -> None:
    colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
    axes.plot(
        xs,
        [row["speedup"] for row in rows],
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linestyle=DASHES[number // len(CURVE_COLOURS) % len(DASHES)] if joined else "",
        label=strategy,
    )
    band = [
        (at, row["low"], row["high"])
        for at, row in zip(xs, rows, strict=True)
        if _known(row, "low") and _known(row, "high")
    ]
    if band:
        places, low, high = zip(*band, strict=True)
        if joined:
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            axes.vlines(places, low, high, color=colour, linewidth=1.5)
    points = [(at, row["measured"]) for at, row in zip(xs, rows, strict=True) if _known(row, "measured")]
    if points:
        places, seen = zip(*points, strict=True)
        axes.scatter(
            places,
            seen,
            facecolor="none",
            edgecolor=colour,
            marker="*",
            s=130,
            linewidth=1.2,
            zorder=5,
            label=f"{strategy}, measured",
        )


def _speedup_axes(axes: Axes, values: Sequence[Any], numeric: bool, log_y: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    if numeric and values[0] > 0 and values[-1] / values[0] >= 4:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    if log_y:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    shown = values if len(values) <= 12 else values[:: math.ceil(len(values) / 12)]
    if numeric:
        axes.set_xticks(shown, [f"{v:g}" for v in shown])
    else:
        axes.set_xticks(range(len(values)), [_short(str(v), 18) for v in values], rotation=20 if len(values) > 5 else 0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.grid(alpha=0.3, linewidth=0.6)


def speedup_bars(table: Sequence[Mapping[str, Any]], baseline: str, path: str | Path, *, title: str = "") -> None:
    """One comparison: a bar a strategy (rows as in `speedup_figure`, without x), and its CSV file.

    A row may hold `step_seconds`, which is written beside the bar.
    """
    _require_columns(table, ("strategy", "speedup"))
    with drawing(path, 1.3 + 0.42 * len(table), 8.5) as figure:
        axes = figure.subplots()
        ends = []
        for y, row in enumerate(table):
            speedup = float(row["speedup"])
            is_baseline = row["strategy"] == baseline
            axes.barh(y, speedup, 0.62, color="#BBBBBB" if is_baseline else CURVE_COLOURS[0])
            end = max(speedup, 1.0)  # numbers stand right of the baseline's line, not on it
            if _known(row, "low") and _known(row, "high"):
                axes.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.5, marker="|", markersize=9)
                end = max(end, row["high"])
            if _known(row, "measured"):
                axes.plot(row["measured"], y, marker="*", markersize=11, color="white", markeredgecolor="black")
                end = max(end, row["measured"])
            ends.append(end)
        for y, (row, end) in enumerate(zip(table, ends, strict=True)):
            seconds = f" ({human_seconds(row['step_seconds'])} per step)" if _known(row, "step_seconds") else ""
            axes.text(end + 0.02 * max(ends), y, f"{three(row['speedup'])}x{seconds}", va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, max(ends) * 1.35)
        axes.set_yticks(range(len(table)), [_short(str(row["strategy"]), 32) for row in table])
        axes.set_ylim(len(table) - 0.5, -0.5)
        notes = [
            text
            for column, text in (("low", "bar: interval"), ("measured", "star: measured"))
            if any(_known(row, column) for row in table)
        ]
        axes.set_xlabel(f"speedup over {baseline}" + (f" ({', '.join(notes)})" if notes else ""))
        axes.set_title(title, loc="left", fontsize=10, wrap=True)
    _write_csv(path, ["strategy", "speedup", "low", "high", "measured", "step_seconds"], table)


def _known(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return isinstance(value, (int, float)) and math.isfinite(value)


def _require_columns(table: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    if not table:
        raise InputError("there is nothing to draw: the table has no rows", field="table")
    for column in columns:
        for number, row in enumerate(table, 1):
            if column not in row:
                raise InputError(f"row {number} has no column {column!r}{nearest(column, row)}", field="table")


def _write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """What a figure shows, beside it; columns that no row has are left out."""
    used = [column for column in columns if any(row.get(column) is not None for row in rows)]
    with replacing(Path(path).with_suffix(".csv")) as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, used, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------- memory


def memory_figure(
    phases: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    capacity_bytes: float | Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Bytes of the worst rank in each phase, by component, against what its device holds; and a CSV file (bytes).

    capacity_bytes: one for all phases, or by phase.
    """
    if not phases:
        raise InputError("there is no memory to draw", field="phases")
    components = list(dict.fromkeys(name for parts in phases.values() for name in parts))
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    held = capacity_bytes if isinstance(capacity_bytes, Mapping) else dict.fromkeys(phases, capacity_bytes or 0.0)
    widest = max([*totals.values(), *held.values()]) / 2**30 or 1.0
    with drawing(path, 1.7 + 0.42 * len(phases), 8.5) as figure:
        axes = figure.subplots()
        left = dict.fromkeys(phases, 0.0)
        for number, component in enumerate(components):
            widths = [phases[phase].get(component, 0.0) / 2**30 for phase in phases]
            axes.barh(
                range(len(phases)),
                widths,
                0.62,
                left=list(left.values()),
                label=component,
                edgecolor="white",
                linewidth=0.5,
                color=COMPONENT_COLOURS[number % len(COMPONENT_COLOURS)],
                hatch="" if number < len(COMPONENT_COLOURS) else "///",
            )
            left = {phase: at + width for (phase, at), width in zip(left.items(), widths, strict=True)}
        for y, (phase, total) in enumerate(totals.items()):
            capacity = held[phase]
            over = total > (capacity or math.inf)
            text = gib(total) + (f": {gib(total - capacity)} too much" if over else "")
            # Beyond the capacity line where the bar ends just short of it, so that line and number do not meet.
            end = max(total, capacity) / 2**30
            axes.text(
                end + 0.015 * widest,
                y,
                text,
                va="center",
                fontsize=8,
                weight="bold" if over else "normal",
                color="#B00020" if over else "black",
            )
        for capacity in sorted(set(held.values()) - {0.0}):
            own = [y for y, phase in enumerate(phases) if held[phase] == capacity]
            drawn: dict[str, Any] = {"color": "black", "linewidth": 1.4, "linestyle": "--"}
            if len(own) == len(phases):
                axes.axvline(capacity / 2**30, label=f"capacity {gib(capacity)}", **drawn)
            else:
                ends = [y - 0.5 for y in own], [y + 0.5 for y in own]
                axes.vlines([capacity / 2**30] * len(own), *ends, label=f"capacity {gib(capacity)}", **drawn)
        axes.set_xlim(0, widest * 1.4)
        axes.set_yticks(range(len(phases)), [_short(phase, 24) for phase in phases])
        axes.set_ylim(len(phases) - 0.5, -0.5)
        axes.set_xlabel("GiB on the fullest rank")
        axes.set_title(title, loc="left", fontsize=10, wrap=True)
        figure.legend(loc="outside lower center", ncols=min(6, len(components) + 1), frameon=False, fontsize=8)
    _write_csv(path, ["phase", *components], [{"phase": phase, **parts} for phase, parts in phases.items()])
