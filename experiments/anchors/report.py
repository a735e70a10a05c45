"""Predict every record of traces/anchors again, and write results.json and the tables of docs/accuracy.md.

python experiments/anchors/report.py [--tables-only]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rlhfsim.formats.run_records import read
from rlhfsim.run_records import results_of
from rlhfsim.validate import summary

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "traces" / "anchors" / "training.yaml"
RESULTS = RECORDS.parent / "results.json"
PAGE = ROOT / "docs" / "accuracy.md"


def by_source(found: dict[str, Any]) -> str:
    """Errors of each source."""
    lines = ["| source | predictions | mean | bias | worst |", "| --- | --- | --- | --- | --- |"]
    for cell in found["summary"]["frameworks"]:
        errors = f"{cell['mean_abs_error']:.1%} | {cell['bias']:+.1%} | {cell['worst']['error']:+.1%}"
        lines.append(f"| {cell['framework']} | {cell['count']} | {errors} |")
    return "\n".join(lines)


def one_by_one(found: dict[str, Any]) -> str:
    """Seconds of an iteration, predicted and measured; between the ends of what the source leaves open."""
    lines = ["| record | measured s | predicted s | between | error |", "| --- | --- | --- | --- | --- |"]
    for case in found["cases"]:
        between = f"{case['low']:.3g} to {case['high']:.3g}" if "low" in case and case["low"] is not None else ""
        seconds = f"{case['measured']:.3g} | {case['predicted']:.3g} | {between}"
        lines.append(f"| {case['id']} | {seconds} | {case['error']:+.1%} |")
    return "\n".join(lines)


def page(text: str, found: dict[str, Any]) -> str:
    """The page with its tables made again."""
    for name, made in (("anchors by source", by_source(found)), ("anchors", one_by_one(found))):
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, made=made: m[1] + made + "\n" + m[2], text, flags=re.S
        )
        assert count == 1, f"{PAGE.name} has no place for {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables-only", action="store_true", help="from the committed results.json")
    if not parser.parse_args().tables_only:
        results, gaps = results_of(read(RECORDS), None)
        found = {"cases": [r.as_json() for r in results], "summary": summary(results, gaps)}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
