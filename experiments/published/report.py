"""Writes the tables of docs/accuracy.md from traces/published/results.json.

rlhfsim validate traces/published --json > traces/published/results.json
python experiments/published/report.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "traces" / "published" / "results.json"
PAGE = ROOT / "docs" / "accuracy.md"
PHASES = ("step", "generation", "scoring", "training", "weight sync")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_framework(found: dict[str, Any]) -> str:
    """Errors of predictions by framework and phase."""
    cells = sorted(found["summary"]["frameworks"], key=lambda c: (c["framework"], PHASES.index(c["phase"])))
    return table(
        ("framework", "phase", "predictions", "mean", "median", "bias", "worst", "of case"),
        (
            (
                cell["framework"],
                cell["phase"],
                str(cell["count"]),
                f"{cell['mean_abs_error']:.0%}",
                f"{cell['median_abs_error']:.0%}",
                f"{cell['bias']:+.0%}",
                f"{cell['worst']['error']:+.0%}",
                cell["worst"]["id"],
            )
            for cell in cells
        ),
    )


def by_case(found: dict[str, Any]) -> str:
    """Every predicted quantity."""
    return table(
        ("case", "quantity", "quality", "predicted s", "interval s", "measured s", "error", ""),
        (
            (
                r["id"],
                r["quantity"],
                r["quality"],
                f"{r['predicted']:.3g}",
                "" if r["low"] is None else f"{r['low']:.3g} to {r['high']:.3g}",
                f"{r['measured']:.4g}",
                f"{r['error']:+.0%}",
                "" if r["role"] == "prediction" else r["role"],
            )
            for r in found["cases"]
        ),
    )


def gaps(found: dict[str, Any], *kinds: str) -> str:
    return table(
        ("case", "", "why"),
        ((g["id"], g["kind"], " ".join(g["reason"].split())) for g in found["summary"]["gaps"] if g["kind"] in kinds),
    )


def tables(found: dict[str, Any]) -> dict[str, str]:
    return {
        "frameworks": by_framework(found),
        "cases": by_case(found),
        "inexpressible": gaps(found, "inexpressible"),
        "refused": gaps(found, "refused", "does not fit"),
    }


def page(text: str, found: dict[str, Any]) -> str:
    """The page with its tables made again."""
    for name, made in tables(found).items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, made=made: m[1] + made + "\n" + m[2], text, flags=re.S
        )
        assert count == 1, f"{PAGE.name} has no place for {name}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))
