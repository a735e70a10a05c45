"""The paper's comparison: strategies x models x GPUs x networks, as CSV files and figures. README.md explains it.

python experiments/paper/run.py [--quick] [--jobs N] [--out DIR]
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cells import BASELINES, DISAGGREGATED, EFFECTS, read_csv
from joblib import Parallel, delayed
from ruamel.yaml import YAML

from rlhfsim.compare import Row, compare
from rlhfsim.errors import InputError
from rlhfsim.metrics import bound_by, stage_seconds
from rlhfsim.simulate import prepare
from rlhfsim.spec.loader import load_scenario
from rlhfsim.spec.scenario import ROLES, Scenario

HERE = Path(__file__).parent
SCENARIO = HERE / "scenario.yaml"
GRID = YAML(typ="safe").load((HERE / "grid.yaml").read_text(encoding="utf-8"))
MEGATRON = "colocated, megatron"
STRATEGIES = (*GRID["candidates"], MEGATRON, DISAGGREGATED)
NIC_GB_PER_SECOND = 25
CELL = ("study", "model", "gpus", "network_gb_per_second", "samples_per_gpu")
COLUMNS = (
    *CELL,
    "strategy",
    "step_seconds",
    *(f"speedup_over {b}" for b in BASELINES),
    "gen_seconds",
    "score_seconds",
    "train_seconds",
    "sync_seconds",
    "peak_gib",
    "bound_by",
    "settings",
    "reason",
)
Overrides = dict[str, Any]


# -- scenarios ----------------------------------------------------------------------------------------------------


def overrides_of(cell: dict[str, Any]) -> Overrides:
    """What makes scenario.yaml the scenario of a cell."""
    return {
        "cluster.nodes": cell["gpus"] // 8,
        "cluster.network.nics_per_node": cell["network_gb_per_second"] // NIC_GB_PER_SECOND,
        "workload.prompts": round(cell["gpus"] * cell["samples_per_gpu"]),
        "models.actor.spec": cell["model"],
        "models.critic.spec": cell["model"],
    }


def with_micro_batches(scenario: Scenario) -> Scenario:
    """Each model's largest micro-batches that fit, as powers of two; one where nothing fits. Raises InputError."""
    models = scenario.models
    for key, size in prepare(scenario).memory.largest_micro_batches().items():
        _, role, name = key.split(".")
        use = getattr(models, role).model_copy(update={name: 1 << max(0, size.bit_length() - 1)})
        models = models.model_copy(update={role: use})
    return scenario.model_copy(update={"models": models})


def disaggregated(layout: dict[str, Any], split: list[float]) -> Overrides:
    """A layout and a split of grid.yaml as overrides."""
    generate, score, train = split
    scoring = ["reference", "reward"] + ["shadow_critic"] * layout["shadow_critic"]
    shares = {
        "shadow_actor": generate,
        **{m: score / len(scoring) for m in scoring},
        "actor": train / 2,
        "critic": train / 2,
    }
    found = {
        "strategy.name": "disaggregated",
        "generation.engine": "engine",
        "generation.tensor_parallel": layout["generate"],
        "strategy.shadow_critic": layout["shadow_critic"],
        "strategy.split": shares,
    }
    return found | layout_of(layout)


def megatron(layout: dict[str, Any]) -> Overrides:
    """A layout of grid.yaml for co-location with an engine, as overrides."""
    engine = {"generation.engine": "engine", "generation.tensor_parallel": layout["generate"]}
    return {"strategy.name": "colocated", **engine, **layout_of(layout)}


def layout_of(layout: dict[str, Any]) -> Overrides:
    """Of each model: ZeRO-3, or tensor-parallel ranks with ZeRO-1 (frozen: whole copies), and pipeline stages."""
    found: Overrides = {}
    for role in ROLES:
        trained = role in ("actor", "critic")
        how = layout["train" if trained else "frozen"]
        tensor, stage = (1, 3) if how == "zero3" else (how, 1)
        found |= {f"models.{role}.tensor_parallel": tensor, f"models.{role}.zero_stage": stage}
        found[f"models.{role}.pipeline_parallel"] = layout.get("stages", 1) if trained else 1
    return found


def best(base: Overrides, candidates: Iterable[Overrides]) -> tuple[Row | None, Overrides, str]:
    """The fastest candidate that fits, with its overrides; where none does, why the nearest does not."""
    scenarios, given, problem = {}, {}, ""
    for number, own in enumerate(candidates):
        try:
            scenarios[str(number)] = with_micro_batches(load_scenario(SCENARIO, base | own))
            given[str(number)] = own
        except InputError as error:  # a layout that this model or this number of ranks does not divide into
            problem = problem or str(error)
    if not scenarios:
        return None, {}, problem
    comparison = compare(scenarios, next(iter(scenarios)), tune=False)
    if (row := comparison.winner) is not None:
        return row, given[row.label], ""
    nearest = min(comparison.rows, key=lambda r: r.fit.worst.bytes.total if r.fit else float("inf"))
    return nearest, {}, nearest.reason


def candidates_of(strategy: str) -> list[Overrides]:
    if strategy == MEGATRON:
        return [megatron(layout) for layout in GRID["megatron"]["layouts"]]
    if strategy != DISAGGREGATED:
        return GRID["candidates"][strategy]
    own = GRID["disaggregated"]
    return [disaggregated(layout, split) | own["start"] for layout in own["layouts"] for split in own["splits"]]


def best_of(strategy: str, base: Overrides) -> tuple[Row | None, Overrides, str]:
    """A strategy's fastest candidate in a cell."""
    row, chosen, reason = best(base, candidates_of(strategy))
    if strategy == DISAGGREGATED and chosen:
        row, chosen, reason = best(base, [chosen, *(chosen | change for change in GRID["disaggregated"]["changes"])])
    return row, chosen, reason


# -- studies ------------------------------------------------------------------------------------------------------


def cells(quick: bool) -> Iterator[dict[str, Any]]:
    """The cells of both studies."""
    gpus = [16, 64] if quick else GRID["gpus"]
    networks = [100] if quick else GRID["networks_gb_per_second"]
    for network in networks:
        for count in gpus:
            for model in ["llama-7b"] if quick else GRID["models"]:
                yield dict(zip(CELL, ("strong", model, count, network, GRID["strong"]["samples"] / count), strict=True))
            for samples in [4] if quick else GRID["weak"]["samples_per_gpu"]:
                for model in GRID["weak"]["models"]:
                    yield dict(zip(CELL, ("weak", model, count, network, float(samples)), strict=True))


def cell_rows(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a strategy: its time, its speedup over each baseline, where the time goes; or why it has none."""
    found = {strategy: best_of(strategy, overrides_of(cell)) for strategy in STRATEGIES}
    seconds = {strategy: row.step_seconds if row and row.fits else None for strategy, (row, _, _) in found.items()}
    lines = []
    for strategy, (row, _, reason) in found.items():
        line = cell | {"strategy": strategy, "reason": reason} | result(row)
        for baseline in BASELINES:
            if seconds[strategy] and seconds[baseline]:
                line[f"speedup_over {baseline}"] = three(seconds[baseline] / seconds[strategy])
        lines.append(line)
    return lines


def result(row: Row | None) -> dict[str, Any]:
    """What a row of a comparison says, as columns."""
    if row is None:
        return {}
    line: dict[str, Any] = {"peak_gib": three(row.fit.worst.bytes.total / 2**30)} if row.fit else {}
    if row.timeline is None or row.step_seconds is None:
        return line
    stages = stage_seconds(row.timeline)
    kinds = {
        "gen": ("gen",),
        "score": ("old_log_prob", "ref", "reward", "values"),
        "train": ("update_actor", "update_critic"),
        "sync": ("update_weights",),
    }
    line |= {f"{kind}_seconds": three(sum(stages.get(s, 0.0) for s in names)) for kind, names in kinds.items()}
    return line | {"step_seconds": three(row.step_seconds), "bound_by": bound_by(row.timeline), "settings": words(row)}


def words(row: Row) -> str:
    """The settings of a row in a few words."""
    used, actor = row.used, row.scenario.models.actor
    text = [f"engine TP {used['generation.tensor_parallel']}, trained ZeRO-{actor.zero_stage}"]
    if actor.ranks_per_replica > 1:
        text.append(f"TP {actor.tensor_parallel} PP {actor.pipeline_parallel}")
    if ranks := used.get("ranks"):
        text += [*(f"{name} {count}" for name, count in ranks.items()), f"batches {used['strategy.batches']}"]
        text.append(f"replicas {used['strategy.replicas']}")
    text.append(f"micro-batch {actor.micro_batch_samples}")
    return " ".join(text)


def three(value: float) -> float:
    return float(f"{value:.4g}")


# Single options, each against the same strategy without it: (strategy, name, overrides).
VARIANTS: tuple[tuple[str, str, Overrides], ...] = (
    ("colocated, hybrid", "one optimizer step", {"algorithm.minibatches": 1}),
    ("colocated, hybrid", "four optimizer steps", {"algorithm.minibatches": 4}),
    ("colocated, hybrid", "decoding as CUDA graphs", {"generation.cuda_graphs": True}),
    ("colocated, hybrid", "LoRA 128", {"models.actor.lora_rank": 128, "models.critic.lora_rank": 128}),
    ("colocated, hybrid", "ZeRO-2", {f"models.{role}.zero_stage": 2 for role in ROLES}),
    ("colocated, zero3_per_token", "LoRA 128", {"models.actor.lora_rank": 128, "models.critic.lora_rank": 128}),
    ("colocated, engine", "LoRA 128", {"models.actor.lora_rank": 128, "models.critic.lora_rank": 128}),
    ("colocated, engine", "one optimizer step", {"algorithm.minibatches": 1}),
    ("colocated, engine", "four optimizer steps", {"algorithm.minibatches": 4}),
    ("interleaved, hybrid", "synchronous", {"strategy.mode": "sync"}),
    ("interleaved, hybrid", "concatenated batches", {"strategy.concat": True}),
    ("interleaved, hybrid", "ZeRO-2", {f"models.{role}.zero_stage": 2 for role in ROLES}),
    (DISAGGREGATED, "point-to-point weight sync", {"weight_sync.method": "p2p"}),
    (DISAGGREGATED, "channels of four batches", {"strategy.capacity": 4}),
    (DISAGGREGATED, "four generator replicas", {"strategy.batches": 4, "strategy.replicas": 4}),
    (DISAGGREGATED, "eight batches", {"strategy.batches": 8}),
    (DISAGGREGATED, "one optimizer step", {"algorithm.minibatches": 1}),
    (DISAGGREGATED, "four optimizer steps, four batches", {"algorithm.minibatches": 4, "strategy.batches": 4}),
    (DISAGGREGATED, "LoRA 128", {"models.actor.lora_rank": 128, "models.critic.lora_rank": 128}),
    (
        DISAGGREGATED,
        "LoRA 128, point-to-point weight sync",
        {"models.actor.lora_rank": 128, "models.critic.lora_rank": 128, "weight_sync.method": "p2p"},
    ),
)
VARIANT_COLUMNS = (*CELL[1:], "strategy", "variant", "step_seconds", "speedup_over_without", "reason")
EFFECT_COLUMNS = (
    *CELL[1:],
    "effect_off",
    "strategy",
    "step_seconds",
    "gen_seconds",
    "speedup_over colocated, zero3_per_token",
)


def variant_rows(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of VARIANTS in a cell, over its strategy's best candidate there; longer rollouts last."""
    base, chosen, lines = overrides_of(cell), {}, []
    for strategy, name, change in VARIANTS:
        if strategy not in chosen:
            chosen[strategy] = best_of(strategy, base)
        row, own, reason = chosen[strategy]
        line = cell | {"strategy": strategy, "variant": name, "reason": reason}
        if own and row is not None:
            found, _, reason = best(base, [own | change])
            seconds = found.step_seconds if found else None
            line |= {
                "reason": reason,
                "step_seconds": seconds and three(seconds),
                "speedup_over_without": seconds and three(row.step_seconds / seconds),
            }
        lines.append(line)
    return lines + long_rollouts(cell, chosen)


def long_rollouts(cell: dict[str, Any], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Eight times the samples in eight times the optimizer steps: does the weight sync get cheaper per sample?"""
    lines, factor = [], 8
    for strategy in (*BASELINES[1:], DISAGGREGATED):
        row, own, reason = chosen[strategy]
        line = cell | {"strategy": strategy, "variant": f"rollout of {factor} times the samples", "reason": reason}
        if own and row is not None:
            longer = {
                "workload.prompts": round(cell["gpus"] * cell["samples_per_gpu"] * factor),
                "algorithm.minibatches": 2 * factor,
            }
            calls = (
                {"strategy.calls": factor}
                if strategy != DISAGGREGATED
                else {"strategy.batches": own["strategy.batches"] * factor}
            )
            found, _, reason = best(overrides_of(cell) | longer, [own | calls])
            seconds = found.step_seconds if found else None
            line |= {
                "reason": reason,
                "step_seconds": seconds and three(seconds),
                "speedup_over_without": seconds and three(factor * row.step_seconds / seconds),
            }
        lines.append(line)
    return lines


def effect_rows(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The strategies of one cell with all effects, then with each of the five taken away, at unchanged settings."""
    base = overrides_of(cell)
    chosen = {
        strategy: best_of(strategy, base)[1] for strategy in (*BASELINES, "interleaved, zero3_per_token", DISAGGREGATED)
    }
    lines = []
    for effect in ("none", *EFFECTS):
        off = {f"effects.{effect}": False} if effect != "none" else {}
        rows = {s: best(base | off, [own])[0] for s, own in chosen.items()}
        reference = rows[BASELINES[0]]
        for strategy, row in rows.items():
            lines.append(
                cell
                | {"effect_off": effect, "strategy": strategy}
                | result(row)
                | {f"speedup_over {BASELINES[0]}": three(reference.step_seconds / row.step_seconds)}
            )
    return lines


def special_cells() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The cells of the variants and of the effects."""
    as_cell = [
        {
            **{k: c[k] for k in ("model", "gpus")},
            "network_gb_per_second": c["network"],
            "samples_per_gpu": float(c["samples_per_gpu"]),
        }
        for c in (*GRID["variant_cells"], GRID["effects_cell"])
    ]
    return as_cell[:-1], as_cell[-1]


# -- files --------------------------------------------------------------------------------------------------------


def write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)


# A number in README.md and, as a comment behind it, where it stands:
# 11.3x<!--weak 13b 64 50 4: disaggregated, engine; over colocated, zero3_per_token-->
# 0.88<!--variants 13b 64 100 4: disaggregated, engine; eight batches; speedup_over_without-->
QUOTE = re.compile(r"(\d+(?:\.\d+)?)(x| s| GiB|)<!--([^>]+?)-->")


def quoted(tables: dict[str, list[dict[str, str]]], source: str) -> float:
    """The number that a comment of the README names. Raises ValueError unless it is exactly one."""
    place, _, rest = source.partition(":")
    (study, *where), (*names, column) = place.split(), (part.strip() for part in rest.split(";"))
    if study == "effects":
        wanted: dict[str, Any] = dict(zip(("effect_off", "strategy"), (*where, *names), strict=True))
    else:
        wanted = dict(zip(CELL[1:], (f"llama-{where[0]}", *map(float, where[1:])), strict=False))
        wanted |= dict(zip(("strategy", "variant"), names, strict=False))
    if study in ("strong", "weak"):
        wanted["study"] = study
    column = f"speedup_over {column[5:]}" if column.startswith("over ") else column
    lines = [
        line
        for line in tables["cells" if "study" in wanted else study]
        if all((float(line[k]) if isinstance(v, float) else line[k]) == v for k, v in wanted.items())
    ]
    if len(lines) != 1 or not lines[0].get(column):
        raise ValueError(f"README: {source!r} names {len(lines)} lines, of which one with a number is needed")
    return float(lines[0][column])


def read_tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {name: read_csv(folder / f"{name}.csv") for name in ("cells", "variants", "effects")}


def refresh(readme: Path, tables: dict[str, list[dict[str, str]]]) -> None:
    """Put the tables' numbers in the README, with as many decimals as are there."""

    def current(match: re.Match[str]) -> str:
        decimals = len(match[1].partition(".")[2])
        return f"{quoted(tables, match[3]):.{decimals}f}{match[2]}<!--{match[3]}-->"

    readme.write_text(QUOTE.sub(current, readme.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--figures", action="store_true", help="only draw again what is in --out")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.figures:
        compute(given.out, given.quick, given.jobs)
    from figures import draw

    draw(given.out)
    if not given.quick and given.out.resolve() == HERE / "results":
        refresh(HERE / "README.md", read_tables(given.out))
    return 0


def compute(out: Path, quick: bool, jobs: int) -> None:
    """Simulate everything and write the three tables."""
    started, (several, one) = time.perf_counter(), special_cells()
    work = [
        ("cells.csv", COLUMNS, cell_rows, list(cells(quick))),
        ("variants.csv", VARIANT_COLUMNS, variant_rows, several[:1] if quick else several),
        ("effects.csv", EFFECT_COLUMNS, effect_rows, [one]),
    ]
    for name, columns, function, wanted in work:
        lines: list[dict[str, Any]] = []
        groups = Parallel(n_jobs=jobs, batch_size=1, return_as="generator")(delayed(function)(cell) for cell in wanted)
        for done, group in enumerate(groups, 1):
            lines += group
            print(
                f"\r{name}: {done} of {len(wanted)} cells, {time.perf_counter() - started:.0f} s",
                end="",
                file=sys.stderr,
            )
        print(file=sys.stderr)
        write_csv(out / name, columns, lines)


if __name__ == "__main__":
    sys.exit(main())
