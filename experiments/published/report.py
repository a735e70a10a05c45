"""Predict every case of traces/published again, and write results.json, the tables and the figure of docs/accuracy.md.

python experiments/published/report.py [--tables-only]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from rlhfsim.plot_errors import errors_by_framework
from rlhfsim.published import run_file
from rlhfsim.spec.framework import Framework
from rlhfsim.spec.problems import validate
from rlhfsim.spec.yaml_file import read_yaml
from rlhfsim.uncertainty import t_quantile
from rlhfsim.validate import find_cases, summary

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "traces" / "published" / "results.json"
PAGE = ROOT / "docs" / "accuracy.md"
FIGURE = PAGE.parent / "img" / "accuracy.png"
PROFILES = ROOT / "hw_specs" / "frameworks"
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


def profiles() -> str:
    """What the profiles hold, and how far they were off where a group was left out of the fit."""
    rows = []
    for path in sorted(PROFILES.glob("*.yaml")):
        profile = validate(Framework, read_yaml(path).data, {})
        numbers = {**profile.overheads, **{f"unexplained {k}": v for k, v in profile.unexplained.items()}}
        values = ", ".join(f"{name} {number.value:.3g}" for name, number in numbers.items())
        residuals = ", ".join(
            f"{phase} {t_quantile(r.count) * r.log_sd:.2f} ({r.count})" for phase, r in profile.residuals.items()
        )
        rows.append((profile.name, str(len(profile.fitted_on)), values, residuals))
    return table(("profile", "groups fitted on", "values", "90 % interval, half width of the logarithm (cases)"), rows)


def summary_lines(found: dict[str, Any]) -> str:
    """Mean errors of all predictions by phase and quality; coverage, widths and ranking with their limits."""
    predictions = [r for r in found["cases"] if r["role"] == "prediction"]
    rows = []
    for phase in PHASES:
        for quality in ("A", "B", "C"):
            errors = np.array([r["error"] for r in predictions if (r["phase"], r["quality"]) == (phase, quality)])
            if len(errors):
                held = [r["low"] <= r["measured"] <= r["high"] for r in predictions
                        if (r["phase"], r["quality"]) == (phase, quality) and r["low"]]  # fmt: skip
                shares = f"{np.mean(held):.0%} of {len(held)}" if held else ""
                cells = (np.abs(errors).mean(), np.median(np.abs(errors)), errors.mean())
                rows.append((phase, quality, str(len(errors)), *(f"{c:+.0%}".lstrip("+") for c in cells[:2]),
                             f"{cells[2]:+.0%}", f"{np.mean(np.abs(errors) <= 0.3):.0%}", shares))  # fmt: skip
    head = ("phase", "quality", "predictions", "mean", "median", "bias", "within 30 %", "in their 90 % interval")
    summary = found["summary"]
    lines = [table(head, rows), ""]
    for name, words in (("ranking", "pairs of a group in the right order"), ("coverage", "90 % intervals that hold")):
        if s := summary[name]:
            limits = f"{s['low']:.0%} to {s['high']:.0%} with 90 % confidence"
            lines.append(f"- {words}: {s['share']:.0%} of {s['count']} ({limits})")
    if summary["interval_factor"]:
        lines.append(f"- the middle interval reaches a factor of {summary['interval_factor']:.2f} each way")
    groups = {r["group"] for r in predictions}
    lines.append(
        f"- {len(predictions)} predictions of {len({r['id'] for r in predictions})} cases in {len(groups)} groups"
    )
    return "\n".join(lines)


def tables(found: dict[str, Any]) -> dict[str, str]:
    return {
        "summary": summary_lines(found),
        "profiles": profiles(),
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


def predict() -> dict[str, Any]:
    """What `rlhfsim validate traces/published --json` prints, with two processes."""
    rows = Parallel(n_jobs=2)(delayed(run_file)(path) for path in find_cases([RESULTS.parent]))
    results, gaps = [r for found, _ in rows for r in found], [g for _, found in rows for g in found]
    return {"cases": [r.as_json() for r in results], "summary": summary(results, gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables-only", action="store_true", help="from the committed results.json")
    if not parser.parse_args().tables_only:
        RESULTS.write_text(json.dumps(predict(), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    PAGE.write_text(page(PAGE.read_text(), found))
    errors_by_framework(found["cases"], FIGURE)


if __name__ == "__main__":
    main()
