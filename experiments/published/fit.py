"""Fit what the frameworks' profiles cannot take from code, on the calibration cases of traces/published.

    python experiments/published/fit.py [FRAMEWORK ...] [--dry-run] [--as-it-is]

Writes overheads, unexplained, fitted_on and residuals of hw_specs/frameworks/*.yaml; the rest of those files is written
by hand. Least squares of log(predicted / measured) over the calibration cases of a framework, each group and phase with
the same weight, less where inputs are unknown, soft for outliers. A value is drawn to its start (`START`), so that few
cases cannot carry it away: host times with a standard deviation of a factor e, unexplained factors of 1.65. Residuals:
each group left out in turn, and predicted by a step of Gauss and Newton on the others.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from ruamel.yaml import YAML
from scipy.optimize import least_squares

from rlhfsim import published
from rlhfsim.spec.yaml_file import Document, read_yaml
from rlhfsim.validate import Result

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "hw_specs" / "frameworks"

# Where fits begin, and to where they are drawn. eager_layer, decode_layer: 38 launches of 5.5 us a layer and as much of
# Python. lora_unit: experiments/host_times/fsdp_units.py. decode_step, decode_sequence: rlhfsim/costs/generation.py.
# decode_lora_layer: two Triton kernels for each of 4 modules, 40 us of Python each. pageable: two copies of a byte in
# host memory by one thread. controller_bytes: five copies of a byte (torch.save, pickle, Ray's store, load,
# concatenation). Others: a guess of the right size.
START = {
    "eager_layer_seconds": 4e-4,
    "lora_unit_seconds": 3.3e-4,
    "lora_unit_backward_seconds": 3.3e-4,
    "decode_layer_seconds": 8e-4,
    "decode_lora_layer_seconds": 3e-4,
    "decode_step_seconds": 4e-3,
    "decode_sequence_seconds": 2e-5,
    "decode_hosts_seconds": 4e-3,
    "controller_call_seconds": 0.3,
    "controller_bytes_per_second": 5e8,
    "pageable_bytes_per_second": 1e10,
    "sync_layer_seconds": 0.02,
    "sync_tensor_seconds": 1e-3,
}
FACTORS = ("generation", "scoring", "training")
# A quantity whose inputs leave it open by so much, in logarithms, has half the weight; by so much, it tells nothing.
UNKNOWN, TELLS_NOTHING = 0.3, log(1.5)
SPREAD_OF_TIMES, SPREAD_OF_FACTORS = 1.0, 0.5  # of logarithms

# What the calibration cases of a framework can tell: eager engines and passes, stages timed by themselves, syncs.
FITTED = {
    "verl_fsdp": [
        "eager_layer_seconds", "lora_unit_seconds", "lora_unit_backward_seconds", "pageable_bytes_per_second",
        "decode_layer_seconds", "decode_lora_layer_seconds", "decode_step_seconds", "decode_sequence_seconds",
        "controller_call_seconds", "controller_bytes_per_second", "sync_layer_seconds",
    ],
    "verl_megatron": ["sync_tensor_seconds"],
    "areal": ["decode_sequence_seconds", "generation", "training"],
    "deepspeed_chat": ["decode_layer_seconds", *FACTORS],
    "nemo_rl": ["decode_hosts_seconds"],  # whole steps of five groups, nearly all of them generation
    "openrlhf": FACTORS,
    "real": ["eager_layer_seconds", *FACTORS],  # decode too: the same modules, without CUDA graphs
    "rlinf": FACTORS,
}  # fmt: skip


@dataclass(frozen=True)
class File:
    path: Path
    document: Document
    cases: published.CaseFile


def files_of(framework: str) -> list[File]:
    """The case files that say they run with that profile."""
    found = []
    for path in sorted((ROOT / "traces" / "published").rglob("*.cases.yaml")):
        document = read_yaml(path)
        if document.data["scenario"].get("framework") == framework:
            found.append(File(path, document, published.cases_of(document)))
    return found


def with_values(document: Document, values: dict[str, float]) -> Document:
    """The cases with values of the profile replaced."""
    data = deepcopy(document.data)
    given = data["scenario"].setdefault("overheads", {})
    for name, value in values.items():
        target = given.setdefault("unexplained", {}) if name in FACTORS else given
        target.setdefault(name, value)
    return replace(document, data=data)


def predict(file: File, number: int, values: dict[str, float]) -> list[Result]:
    document = with_values(file.document, values)
    return published.predicted(file.cases, file.cases.cases[number], document, number, file.path)


def calibration(files: list[File]) -> list[tuple[File, int]]:
    return [(f, n) for f in files for n, c in enumerate(f.cases.cases) if c.role == "calibration" and not c.unscored]


def half_width(result: Result) -> float:
    """Of the interval of what the source leaves open, in logarithms."""
    return log(result.high / result.low) / 2 if result.low and result.high else 0.0


def fit(framework: str, parallel: Parallel, *, as_it_is: bool = False) -> dict[str, Any] | None:
    """as_it_is: keep the values of the profile, and only look how far they are off: quick, as no group is left out, and
    errors are enlarged as for so many fitted values instead."""
    names, cases = list(FITTED[framework]), calibration(files_of(framework))
    vague: set[tuple[str, str]] = set()

    def results_at(logs: np.ndarray) -> list[Result]:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        rows = parallel(delayed(predict)(file, number, values) for file, number in cases)
        return [r for row in rows for r in row if (r.id, r.quantity) not in vague]

    start = np.array([0.0 if name in FACTORS else log(START[name]) for name in names])
    everything = results_at(start)
    vague |= {(r.id, r.quantity) for r in everything if half_width(r) > TELLS_NOTHING}
    first = [r for r in everything if (r.id, r.quantity) not in vague]
    if not first:
        return None
    told = {r.id for r in first}
    cases = [(file, number) for file, number in cases if file.cases.cases[number].id in told]
    spread = np.array([SPREAD_OF_FACTORS if name in FACTORS else SPREAD_OF_TIMES for name in names])
    counts = Counter((r.group, r.phase) for r in first)
    weights = np.array([(counts[r.group, r.phase] * (1 + (half_width(r) / UNKNOWN) ** 2)) ** -0.5 for r in first])

    def errors(results: list[Result]) -> np.ndarray:
        return np.array([log(r.predicted / r.measured) for r in results])

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.append(weights * errors(results_at(logs)), 0.3 * (logs - start) / spread)

    if as_it_is:
        x = _profile(framework, names, start)
        last = results_at(x)
        left_out = errors(last) * max(1.0, len(last) / max(len(last) - len(names), 1)) ** 0.5
    else:
        found = least_squares(
            residuals, start, loss="soft_l1", f_scale=0.5, diff_step=0.02, max_nfev=5, xtol=1e-2, ftol=1e-2
        )
        x, last = found.x, results_at(found.x)
        left_out = _left_out(last, errors(last), weights, found.jac, residuals(x))
    by_phase = defaultdict(list)
    for r, error in zip(last, left_out, strict=True):
        by_phase[r.phase].append(error)
    print(f"\n{framework}: {len(first)} quantities of {len({r.group for r in first})} groups")
    for r, before, error in zip(last, errors(first), left_out, strict=True):
        print(
            f"  {r.id:44s} {r.quantity:20s} {np.expm1(before):+.2f} -> {r.error:+.2f} (left out {np.expm1(error):+.2f})"
        )
    values = dict(zip(names, np.exp(x).tolist(), strict=True))
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    return {
        "values": values,
        "fitted_on": sorted({r.group for r in first}),
        "residuals": {p: (float(np.sqrt(np.mean(np.square(e)))), len(e)) for p, e in sorted(by_phase.items())},
    }


def _left_out(
    results: list[Result], errors: np.ndarray, weights: np.ndarray, jacobian: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Errors of each group after a step of Gauss and Newton on the others."""
    found = np.zeros(len(results))
    for group in {r.group for r in results}:
        mine = np.array([r.group == group for r in results])
        kept = np.append(~mine, np.ones(jacobian.shape[1], dtype=bool))
        step = np.linalg.lstsq(jacobian[kept], -value[kept], rcond=None)[0]
        found[mine] = (errors + (jacobian[: len(results)] / weights[:, None]) @ step)[mine]
    return found


def _profile(framework: str, names: list[str], start: np.ndarray) -> np.ndarray:
    """Logarithms of what the profile holds; of what it does not hold, those of the start."""
    data = YAML(typ="safe").load(PROFILES / f"{framework}.yaml")
    held = {**data.get("overheads", {}), **data.get("unexplained", {})}
    return np.array([log(held[n]["value"]) if n in held else at for n, at in zip(names, start.tolist(), strict=True)])


def write(framework: str, found: dict[str, Any], *, keep: bool) -> None:
    yaml = YAML()
    yaml.width = 120
    path = PROFILES / f"{framework}.yaml"
    data = yaml.load(path)
    if not keep:
        _write_values(data, framework, found)
        data["fitted_on"] = found["fitted_on"]
    data["residuals"] = {
        phase: {"log_sd": round(sd, 3), "count": count} for phase, (sd, count) in found["residuals"].items()
    }
    yaml.dump(data, path)


def _write_values(data: Any, framework: str, found: dict[str, Any]) -> None:
    data.setdefault("sources", {})["fit"] = f"python experiments/published/fit.py {framework}, {date.today()}"
    for section in ("overheads", "unexplained"):
        own = {k: v for k, v in data.get(section, {}).items() if v["source"] != "fit"}
        fitted = {n: v for n, v in found["values"].items() if (n in FACTORS) == (section == "unexplained")}
        own |= {n: {"value": float(f"{v:.3g}"), "source": "fit"} for n, v in fitted.items()}
        if own:
            data[section] = own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", nargs="*", choices=[*FITTED, []])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--as-it-is", action="store_true", help="residuals of the values in the profile")
    given = parser.parse_args()
    with Parallel(n_jobs=2) as parallel:
        for framework in given.framework or FITTED:
            found = fit(framework, parallel, as_it_is=given.as_it_is)
            if found and not given.dry_run:
                write(framework, found, keep=given.as_it_is)


if __name__ == "__main__":
    main()
