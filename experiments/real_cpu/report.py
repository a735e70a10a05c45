"""From measured runs to a folder that can be kept: the calibrated machine, a case for each one, the report."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
from grid import NETWORKS, Config
from ruamel.yaml import YAML

from rlhfsim import metrics, timeline
from rlhfsim.calibrate import calibrate, write
from rlhfsim.spec.overrides import apply_override
from rlhfsim.spec.yaml_file import read_yaml
from rlhfsim.validate import Result, run_case, summary

matplotlib.use("Agg")
from matplotlib import pyplot

SCENARIO = Path(__file__).with_name("scenario.yaml")
MACHINE = "machine.yaml"
STEP = "step_seconds"
COLORS = {"host": "#3b6ea5", "1gbit": "#c77d1e", "100mbit": "#9c3d54"}
MARKERS = {"colocated": "o", "interleaved": "^", "disaggregated": "s"}
SLOW, BASELINE = "100mbit", "zero3_per_token"


# --- what is kept ----------------------------------------------------------------------------------------------------


def record(runs: dict[Config, list[Path]], benches: list[Path], folder: Path) -> list[Path]:
    """Fit the machine's spec to the benches and the calibration runs; write a case for each configuration.

    Of the rounds of a configuration the one with the median step is kept whole. Returns the cases.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    benches = [Path(shutil.copy(bench, folder)) for bench in benches]
    write(calibrate(benches, name="machine"), folder / MACHINE)  # for the scenarios to name
    fitted = []
    for config, paths in runs.items():
        shutil.copy(_middle(paths), folder / f"{_name(config)}.jsonl")
        if config.calibration:
            _write_yaml(scenario(config), folder / f"{_name(config)}.scenario.yaml")
            fitted.append((str(folder / f"{_name(config)}.jsonl"), str(folder / f"{_name(config)}.scenario.yaml")))
    found = write(calibrate(benches, fitted, name="machine"), folder / MACHINE, force=True)
    (folder / "calibration.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    cases = []
    for config, paths in runs.items():
        cases.append(folder / f"{_name(config)}.case.yaml")
        _write_yaml(_case(config, [timeline.read(path) for path in paths]), cases[-1])
    return cases


def scenario(config: Config) -> dict[str, Any]:
    """Whole, on the calibrated machine."""
    data, rate = read_yaml(SCENARIO).data, NETWORKS[config.network]
    cluster: dict[str, Any] = {"spec": f"./{MACHINE}", "nodes": 1, "gpus_per_node": 2}
    if rate is not None:
        cluster |= {"nodes": 2, "gpus_per_node": 1, "network": {"nic_bytes_per_second": rate}}
    for key, value in ({"cluster": cluster} | config.overrides).items():
        apply_override(data, {}, key, value, "")
    return dict(data)


def _case(config: Config, rounds: list[timeline.Timeline]) -> dict[str, Any]:
    """Medians over the rounds, low and high from round to round."""
    by_round = [{STEP: metrics.step_seconds(t)} | metrics.stage_seconds(t) for t in rounds]
    measured = {}
    for quantity in by_round[0]:
        values = [found[quantity] for found in by_round]
        if min(values) > 0:
            spread = zip(("low", "value", "high"), (min(values), median(values), max(values)), strict=True)
            measured[quantity] = {name: float(f"{value:.5g}") for name, value in spread}
    own = {key: value for key, value in config.overrides.items() if key.startswith(("workload", "algorithm"))}
    work = [config.overrides["models.actor.spec"], *(f"{k.partition('.')[2]} {v}" for k, v in own.items())]
    name = f"{_name(config)}.scenario.yaml" if config.calibration else scenario(config)
    info = rounds[0].info
    return {
        "id": config.id,
        "role": "calibration" if config.calibration else "prediction",
        "group": f"{config.network}: {', '.join(work)}",
        "scenario": name,
        "timeline": f"{_name(config)}.jsonl",
        "measured": measured,
        "tolerance": {STEP: 0.1, "stages": 0.1},
        "source": f"experiments/real_cpu, {len(rounds)} rounds of {rounds[0].iterations - 1} measured iterations on "
        f"{info.get('machine')}, torch {info.get('versions', {}).get('torch')}",
    }


def _name(config: Config) -> str:
    return config.id.replace("/", "-")


def _middle(paths: list[Path]) -> Path:
    return sorted(paths, key=lambda path: metrics.step_seconds(timeline.read(path)))[len(paths) // 2]


def _write_yaml(data: Any, path: Path) -> None:
    yaml = YAML()
    yaml.width, yaml.default_flow_style = 120, None
    with path.open("w", encoding="utf-8") as out:
        yaml.dump(json.loads(json.dumps(data)), out)


# --- the report ------------------------------------------------------------------------------------------------------


def report(cases: list[Path], folder: Path) -> str:
    """report.md, predicted.png and results.json; returns the summary's lines."""
    results = [result for case in cases for result in run_case(case)]
    found = summary(results)
    figure(results, folder / "predicted.png")
    steps = [r for r in results if r.quantity == STEP]
    lines = _summary(results, found)
    table = [
        "| configuration | measured s | spread | predicted s | error | worst stage |",
        "|---|---|---|---|---|---|",
        *(_row(r, [x for x in results if x.id == r.id and x.quantity != STEP]) for r in steps),
    ]
    stages = ["| stage | cases | mean error | bias | worst | within 10 % beyond spread |", "|---|---|---|---|---|---|"]
    by_stage: dict[str, list[Result]] = defaultdict(list)
    for r in results:
        if r.quantity != STEP and r.role == "prediction":
            by_stage[r.quantity].append(r)
    for stage, rows in by_stage.items():
        errors, worst = [r.error for r in rows], max(rows, key=lambda r: abs(r.error))
        stages.append(
            f"| {stage} | {len(rows)} | {fmean(map(abs, errors)):.1%} | {fmean(errors):+.1%} | {worst.error:+.1%} "
            f"({worst.id}) | {sum(r.ok for r in rows)} |"
        )
    text = ["# Predicted against measured", "", *lines, "", "![predicted over measured](predicted.png)", ""]
    text += [*table, "", "Calibration runs are marked (c).", "", *stages, "", *speedups(steps), ""]
    (folder / "report.md").write_text("\n".join(text))
    (folder / "results.json").write_text(json.dumps([r.as_json() for r in results], indent=1) + "\n")
    return "\n".join(lines)


def _summary(results: list[Result], found: dict[str, Any]) -> list[str]:
    steps = [r for r in results if r.quantity == STEP and r.role == "prediction"]
    stages = [r for r in results if r.quantity != STEP and r.role == "prediction"]
    beyond = [max(0.0, abs(r.error) - r.spread) for r in steps]
    ranking = "none" if found["ranking"] is None else f"{found['ranking']['share']:.0%}"
    return [
        f"- iterations: {len(steps)} predictions, mean error {found['mean_abs_error']:.1%} (beyond the run-to-run "
        f"spread {fmean(beyond):.1%}), bias {found['bias']:+.1%}, worst {found['worst']['error']:+.1%} "
        f"({found['worst']['id']}; beyond its spread {max(beyond):.1%} at worst)",
        f"- stages: {len(stages)}, mean error {fmean(abs(r.error) for r in stages):.1%}, "
        f"{sum(r.ok for r in stages)} within 10 % beyond their spread",
        f"- ranking of pairs that do the same work and differ by more than their spread: {ranking} right",
    ]


def _row(step: Result, stages: list[Result]) -> str:
    worst = max(stages, key=lambda r: abs(r.excess_seconds))
    mark = " (c)" if step.role == "calibration" else ""
    return (
        f"| {step.id}{mark} | {step.measured:.3f} | ±{step.spread:.1%} | {step.predicted:.3f} | {step.error:+.1%} "
        f"| {worst.quantity} {worst.error:+.0%} of {worst.measured:.3f} s |"
    )


def speedups(steps: list[Result]) -> list[str]:
    """On the slow network, of everything over gathering parameters for every token."""
    own = {r.id: r for r in steps if r.id.startswith(f"{SLOW}/") and r.id.endswith("long")}
    base = next((r for name, r in own.items() if BASELINE in name), None)
    if base is None:
        return []
    lines = [f"Speedup over {base.id}:", "", "| configuration | measured | predicted | error |", "|---|---|---|---|"]
    for name, r in own.items():
        if r is not base:
            measured, predicted = base.measured / r.measured, base.predicted / r.predicted
            lines.append(f"| {name} | {measured:.2f}x | {predicted:.2f}x | {predicted / measured - 1:+.1%} |")
    return lines


def figure(results: list[Result], path: Path) -> None:
    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for r in results:
        network, _, name = r.id.partition("/")
        style: dict[str, Any] = {
            "color": COLORS[network],
            "marker": MARKERS[name.partition("-")[0]],
            "markerfacecolor": "none" if r.role == "calibration" else COLORS[network],
            "linestyle": "none",
        }
        if r.quantity == STEP:
            spread = [[r.measured * r.spread], [r.measured * r.spread]]
            left.errorbar(r.measured, r.predicted, xerr=spread, markersize=6, elinewidth=0.8, **style)
        else:
            right.plot(r.measured, r.predicted, markersize=4, alpha=0.8, **style)
    for axes, title in ((left, "seconds per iteration"), (right, "seconds of each stage")):
        low, high = axes.get_xlim()
        low = max(low, min(r.measured for r in results if (r.quantity == STEP) == (axes is left)) / 1.3)
        ends = [low, high * 1.3]
        axes.plot(ends, ends, color="#444444", linewidth=0.8)
        axes.fill_between(ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="#444444", alpha=0.12)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title, xlabel="measured", ylabel="predicted")
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="none", label=n) for n, c in COLORS.items()]
    handles += [pyplot.Line2D([], [], color="#444444", marker=m, linestyle="none", label=n) for n, m in MARKERS.items()]
    handles.append(
        pyplot.Line2D([], [], color="#444444", marker="o", markerfacecolor="none", linestyle="none", label="fitted on")
    )
    left.legend(handles=handles, fontsize=8, loc="upper left")
    drawn.suptitle("Band: within 10 % of the measurement")
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
