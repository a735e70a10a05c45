"""Figures of the paper's comparison: speedup curves, who wins where, and where a factor of 11 comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cells import BASELINES, DISAGGREGATED, EFFECTS, read_csv
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

# Placement by colour (Paul Tol, "Colour Schemes", bright), engine by line.
COLOURS = {"colocated": "#4477AA", "interleaved": "#228833", "disaggregated": "#EE6677"}
MARKERS = {"colocated": "o", "interleaved": "x", "disaggregated": "s"}
DASHES = {"zero3_per_token": ":", "hybrid": "--", "engine": "-", "megatron": "-."}
NETWORK_COLOURS = ("#332288", "#88CCEE", "#DDCC77", "#CC6677")
TIE = 1.02  # closer than this nobody wins: the simpler placement is taken
Line = dict[str, Any]
# Rows of the map of winners: what co-located and interleaved may use.
ALLOWED = {
    "zero3_per_token": ("colocated, zero3_per_token", "interleaved, zero3_per_token"),
    "hybrid": ("colocated, hybrid", "interleaved, hybrid"),
    "engine": ("colocated, engine", "interleaved, engine"),
    "engine, and training\nlaid out as Megatron's": ("colocated, engine", "colocated, megatron", "interleaved, engine"),
}


def draw(folder: Path) -> None:
    """All figures that the tables in `folder` allow."""
    cells = [typed(line) for line in read_csv(folder / "cells.csv")]
    for network in distinct(cells, "network_gb_per_second"):
        strong(cells, network, folder / f"speedup_strong_{network:g}gbs.png")
    weak(cells, folder / "speedup_weak_13b.png")
    winners(cells, folder / "winners.png")
    eleven(cells, [typed(line) for line in read_csv(folder / "effects.csv")], folder / "eleven.png")


# -- data ---------------------------------------------------------------------------------------------------------


def typed(line: dict[str, str]) -> Line:
    """Numbers as numbers, empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    return {name: value(text) for name, text in line.items()}


def distinct(lines: list[Line], column: str) -> list[Any]:
    return list(dict.fromkeys(line[column] for line in lines))


def pick(lines: list[Line], **wanted: Any) -> list[Line]:
    return [line for line in lines if all(line[k] == v for k, v in wanted.items())]


def parts(strategy: str) -> tuple[str, str]:
    """(placement, engine)."""
    placement, engine = strategy.split(", ")
    return placement, engine


def short(model: str) -> str:
    return model.removeprefix("llama-").upper()


# -- figures ------------------------------------------------------------------------------------------------------


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is saved at the end, the same bytes for the same tables."""
    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    yield made
    made.savefig(path, metadata={"Software": None})


def strong(cells: list[Line], network: float, path: Path) -> None:
    """Speedup over each baseline against GPUs, a column per model."""
    lines = pick(cells, study="strong", network_gb_per_second=network)
    columns = {f"LLaMA {short(m)} x 4 models": pick(lines, model=m) for m in distinct(lines, "model")}
    curves(
        columns,
        path,
        f"Strong scaling: 1024 samples per iteration, 256 + 256 tokens, {network:g} GB/s per node of 8 A100-80G",
    )


def weak(cells: list[Line], path: Path) -> None:
    lines = pick(cells, study="weak", samples_per_gpu=4.0)
    columns = {
        f"{n:g} GB/s per node": pick(lines, network_gb_per_second=n) for n in distinct(lines, "network_gb_per_second")
    }
    curves(
        columns,
        path,
        "Weak scaling: LLaMA 13B x 4 models, 4 samples per GPU and iteration, 256 + 256 tokens, nodes of 8 A100-80G",
    )


def curves(columns: dict[str, list[Line]], path: Path, title: str) -> None:
    with figure(path, max(9.0, 3.6 * len(columns) + 0.4), 10.2) as made:
        panels = made.subplots(len(BASELINES), len(columns), sharex=True, sharey="row", squeeze=False)
        for row, baseline in zip(panels, BASELINES, strict=True):
            for axes, (name, lines) in zip(row, columns.items(), strict=True):
                speedup_curves(axes, lines, baseline)
                axes.set_title(name if baseline == BASELINES[0] else "", fontsize=10)
                axes.label_outer()
            row[0].set_ylim(top=row[0].get_ylim()[1] * 1.5)  # room for a note above the curves
            row[0].set_ylabel(f"speedup over\n{baseline}")
        for axes in panels[-1]:
            axes.set_xlabel("GPUs")
        made.suptitle(title, fontsize=11)
        strategies = distinct([line for lines in columns.values() for line in lines], "strategy")
        handles = [Line2D([], [], label=s, **style(s)) for s in strategies]
        handles.append(
            Line2D(
                [],
                [],
                color="black",
                linewidth=0,
                marker="|",
                markersize=9,
                label="tick at the bottom: does not fit, or fits no layout",
            )
        )
        made.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def style(strategy: str) -> dict[str, Any]:
    placement, engine = parts(strategy)
    return {
        "color": COLOURS[placement],
        "marker": MARKERS[placement],
        "linestyle": DASHES[engine],
        "markersize": 5,
        "markerfacecolor": "none",
        "linewidth": 1.4,
    }


def speedup_curves(axes: Axes, lines: list[Line], baseline: str) -> None:
    column = f"speedup_over {baseline}"
    gpus = distinct(lines, "gpus")
    missing = 0
    for strategy in distinct(lines, "strategy"):
        own = pick(lines, strategy=strategy)
        drawn = [(line["gpus"], line[column]) for line in own if line[column]]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), **style(strategy))
        absent = [line["gpus"] for line in own if line["step_seconds"] is None]
        if absent:  # the colour says who, each a step to the right of the one before
            axes.plot(
                [g * 1.07 ** (missing - 2) for g in absent],
                [0.025] * len(absent),
                "|",
                color=COLOURS[parts(strategy)[0]],
                markersize=9,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            missing += 1
    axes.axhline(1.0, color="black", linewidth=0.8)
    if baseline == BASELINES[0]:
        axes.axhline(11.0, color="black", linewidth=0.8, linestyle=(0, (6, 3)))
        axes.text(gpus[0], 11.4, "11x", fontsize=8, va="bottom")
    if any(not line["step_seconds"] for line in pick(lines, strategy=baseline)):
        none = [f"{line['gpus']:g}" for line in pick(lines, strategy=baseline) if not line["step_seconds"]]
        axes.text(
            0.98,
            0.97,
            f"baseline does not fit on {', '.join(none)} GPUs",
            transform=axes.transAxes,
            fontsize=7.5,
            ha="right",
            va="top",
        )
    log_axes(axes, gpus)


def log_axes(axes: Axes, gpus: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(gpus, [f"{g:g}" for g in gpus])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.grid(alpha=0.3, linewidth=0.6)


def winners(cells: list[Line], path: Path) -> None:
    """The placement that wins, by what the placements on all ranks may generate with."""
    lines = pick(cells, study="strong")
    networks = distinct(lines, "network_gb_per_second")
    with figure(path, max(9.0, 3.7 * len(networks) + 0.6), 10.4) as made:
        panels = made.subplots(len(ALLOWED), len(networks), squeeze=False, sharex=True, sharey=True)
        for row, (name, allowed) in zip(panels, ALLOWED.items(), strict=True):
            for axes, network in zip(row, networks, strict=True):
                winner_map(axes, pick(lines, network_gb_per_second=network), allowed)
                axes.set_title(f"{network:g} GB/s per node" if name == next(iter(ALLOWED)) else "", fontsize=10)
            row[0].set_ylabel(name, fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("GPUs")
        made.suptitle(
            "Fastest placement at 1024 samples per iteration, nodes of 8 A100-80G. Number: speedup of disaggregated\n"
            "over co-located. Co-located and interleaved generate as the row says, disaggregated always with an engine",
            fontsize=11,
        )
        handles = [
            Patch(
                color=light(p),
                label={"colocated": f"co-located (or within {100 * (TIE - 1):.0f} % of the fastest)"}.get(p, p),
            )
            for p in COLOURS
        ] + [
            Patch(color="#DDDDDD", label="nothing fits"),
            Line2D([], [], linewidth=0, label="'only': the other of the two does not fit"),
        ]
        made.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def light(placement: str) -> Any:
    return (*to_rgba(COLOURS[placement])[:3], 0.55)


def winner_map(axes: Axes, lines: list[Line], allowed: tuple[str, ...]) -> None:
    models, gpus = distinct(lines, "model"), distinct(lines, "gpus")
    for y, model in enumerate(models):
        for x, count in enumerate(gpus):
            placement, text = winner(pick(lines, model=model, gpus=count), allowed)
            colour = light(placement) if placement else "#DDDDDD"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(gpus) - 0.5)
    axes.set_ylim(-0.5, len(models) - 0.5)
    axes.set_xticks(range(len(gpus)), [f"{g:g}" for g in gpus])
    axes.set_yticks(range(len(models)), [short(m) for m in models])
    axes.tick_params(length=0)


def winner(cell: list[Line], allowed: tuple[str, ...]) -> tuple[str | None, str]:
    """(placement, speedup of disaggregated): the fastest; co-located where it is as good as the fastest."""
    seconds: dict[str, float] = {}
    for line in cell:
        if line["strategy"] in (*allowed, DISAGGREGATED) and line["step_seconds"]:
            placement = parts(line["strategy"])[0]
            seconds[placement] = min(line["step_seconds"], seconds.get(placement, float("inf")))
    if not seconds:
        return None, ""
    fastest = min(seconds, key=lambda p: seconds[p])
    if "colocated" not in seconds:
        return fastest, "only"
    if seconds["colocated"] <= TIE * seconds[fastest]:
        fastest = "colocated"
    if "disaggregated" not in seconds:
        return fastest, "only"
    ratio = seconds["colocated"] / seconds["disaggregated"]
    return fastest, f"{ratio:.0f}x" if ratio > 9.95 else f"{ratio:.1f}x"


def eleven(cells: list[Line], effects: list[Line], path: Path) -> None:
    """Where a factor of 11 appears, against whom it does not, and which effect makes it."""
    lines = [line for line in pick(cells, study="weak", samples_per_gpu=4.0) if line["strategy"] == DISAGGREGATED]
    gpus, networks = distinct(lines, "gpus"), distinct(lines, "network_gb_per_second")
    with figure(path, 14.5, 5.4) as made:
        left, middle, right = made.subplots(1, 3, width_ratios=[1, 1, 1.15])
        for axes, baseline in ((left, BASELINES[0]), (middle, BASELINES[1])):
            for colour, network in zip(NETWORK_COLOURS, networks, strict=False):
                for name, dash in ((baseline, "-"),) if axes is left else ((BASELINES[1], "--"), (BASELINES[2], "-")):
                    drawn = [
                        (line["gpus"], line[f"speedup_over {name}"])
                        for line in pick(lines, network_gb_per_second=network)
                        if line[f"speedup_over {name}"]
                    ]
                    engine = "" if axes is left else f" over {parts(name)[1]}"
                    axes.plot(
                        *zip(*drawn, strict=True),
                        color=colour,
                        linestyle=dash,
                        marker="s",
                        markersize=4,
                        label=f"{network:g} GB/s{engine}",
                    )
            log_axes(axes, gpus)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.axhline(11.0, color="black", linewidth=0.8, linestyle=(0, (6, 3)))
            axes.text(gpus[0], 11.4, "11x", fontsize=8)
            axes.set_ylim(0.25, 64)
            axes.set_xlabel("GPUs")
            axes.set_ylabel("speedup of disaggregated")
            axes.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper left" if axes is middle else "lower right")
        left.set_title(
            "over co-located, zero3_per_token\n(LLaMA 13B, 4 samples per GPU, by network per node)", fontsize=10
        )
        middle.set_title("the same runs over co-located with\nhybrid (dashed) or with an engine (solid)", fontsize=10)
        effect_bars(right, effects)


def effect_bars(axes: Axes, effects: list[Line]) -> None:
    """Speedup over zero3_per_token with all effects, and with one of the five off."""
    names = {
        "none": "all effects",
        "decode": "decode off:\nno gather per token",
        "links": "links off:\ntransfers free",
        "memory": "memory off:\nunlimited",
        "sync": "sync off:\nweight sync free",
        "efficiency": "efficiency off:\nno overheads",
    }
    shown = (DISAGGREGATED, BASELINES[2], BASELINES[1])
    width = 0.8 / len(shown)
    for number, strategy in enumerate(shown):
        values = [
            pick(effects, effect_off=e, strategy=strategy)[0][f"speedup_over {BASELINES[0]}"]
            for e in ("none", *EFFECTS)
        ]
        places = [y + (number - 1) * width for y in range(len(values))]
        placement, engine = parts(strategy)
        colour = COLOURS[placement] if engine == "engine" else "#AACCEE"
        axes.barh(places, values, width * 0.92, color=colour, label=strategy)
        for place, value in zip(places, values, strict=True):
            axes.text(
                value + 0.08,
                place,
                f"{value:.3g}x",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
            )
    axes.set_yticks(range(len(names)), list(names.values()), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.3, -0.6)
    axes.axvline(1.0, color="black", linewidth=0.8, zorder=0)
    axes.axvline(11.0, zorder=0, color="black", linewidth=0.8, linestyle=(0, (6, 3)))
    axes.set_xlim(0, max(line[f"speedup_over {BASELINES[0]}"] for line in effects) * 1.12)
    axes.set_xlabel(f"speedup over {BASELINES[0]}, dashed: 11x")
    one = effects[0]
    axes.set_title(
        f"which effect makes it: LLaMA {short(one['model'])}, {one['gpus']:g} GPUs,\n"
        f"{one['network_gb_per_second']:g} GB/s per node, {one['samples_per_gpu']:g} samples per GPU",
        fontsize=10,
    )
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False, fontsize=8)
