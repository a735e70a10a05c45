"""The errors of published cases as a figure: predicted over measured, one panel a framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot import CURVE_COLOURS, MARKERS, drawing
from .spec.framework import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
PANEL_INCHES = 2.6
AIM = 0.3  # the band that is drawn


def errors_by_framework(cases: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """`cases`: results as `validate --json` prints them. Filled marks are predictions, hollow ones calibrated; lines
    are 90 % intervals of the prediction.

    Raises InputError for a path that is no PNG or SVG.
    """
    names = sorted({r["framework"] for r in cases if r.get("framework")})
    rows = ceil(len(names) / COLUMNS)
    with drawing(path, PANEL_INCHES * rows + 0.8) as found:
        panels = found.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True).flat
        for name, panel in zip(names, panels, strict=False):
            _panel(panel, name, [r for r in cases if r["framework"] == name and r["role"] != "unscored"])
        for panel in list(panels):
            panel.axis("off")
        for row in range(rows):
            found.axes[row * COLUMNS].set_ylabel("predicted / measured")
        for panel in found.axes[max(0, len(names) - COLUMNS) : len(names)]:
            panel.set_xlabel("measured (s)")
        marks = [
            found.axes[0].plot([], [], linestyle="", marker=MARKERS[k], color=CURVE_COLOURS[k], label=phase)[0]
            for k, phase in enumerate(PHASES)
        ]
        marks += found.axes[0].plot([], [], linestyle="", marker="o", color="#777777", mfc="none", label="calibrated")
        found.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)


def _panel(panel: Axes, name: str, cases: Sequence[Mapping[str, Any]]) -> None:
    panel.set_title(name, fontsize=10)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(0.05, 5)
    panel.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
    panel.minorticks_off()
    panel.axhspan(1 - AIM, 1 + AIM, color="#EEEEEE")
    panel.axhline(1, color="#777777", linewidth=0.8)
    for k, phase in enumerate(PHASES):
        for r in (r for r in cases if r["phase"] == phase):
            middle, measured = r["predicted"] / r["measured"], r["measured"]
            colour, fill = CURVE_COLOURS[k], CURVE_COLOURS[k] if r["role"] == "prediction" else "none"
            if r["low"] is not None:
                panel.plot([measured] * 2, [r["low"] / measured, r["high"] / measured], color=colour, lw=0.8, alpha=0.5)
            panel.plot(measured, middle, marker=MARKERS[k], ms=5, color=colour, mfc=fill, linestyle="")
