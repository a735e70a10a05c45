"""Results as people and programs read them: tables with three significant digits, JSON objects with full numbers."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .compare import Comparison, Row, why
from .fits import Fit
from .format import gib, human_seconds, rank_text, three
from .metrics import (
    BUSY_PARTS,
    STEP,
    GenerationSummary,
    OffPolicySummary,
    base_stage,
    bound_by,
    generation_summary,
    group_seconds,
    idle_share,
    memory_peak,
    off_policy_summary,
    overlap_share,
    peaks_by_phase,
    stage_seconds,
    step_seconds,
    tool_summary,
)
from .simulate import (
    Setup,
    kernels_of,
    measured_of,
    model_flops_utilisation,
    periodic_seconds,
    rounds_of,
    slack,
    trained_lengths_of,
)
from .spec.loader import scenario_sources
from .spec.scenario import ROLES, Scenario
from .timeline import Timeline
from .uncertainty import extrapolation, intervals, residual_of
from .validate import Result

if TYPE_CHECKING:
    from .calibrate import Calibration
    from .sync_cost import SyncCost


def console() -> Console:
    """Plain text of the terminal's width; 120 columns where the output is a file or a pipe. `[x]` and `:x:` stay."""
    width = None if sys.stdout.isatty() else max(120, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr (only on a terminal); the yielded function names what begins."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=total)
        started = False

        def begin(label: str) -> None:
            nonlocal started
            bar.update(task, description=label, advance=1 if started else 0)
            started = True

        yield begin


# -- fits ---------------------------------------------------------------------------------------------------------


def fit_json(fit: Fit) -> dict[str, Any]:
    phase, component = fit.limiting
    return {
        "fits": fit.fits,
        "reason": fit.reason,
        "peak_memory_bytes": fit.worst.bytes.total,
        "capacity_bytes": fit.capacity_bytes,
        "headroom_bytes": fit.capacity_bytes - fit.worst.bytes.total,
        "p99_peak_memory_bytes": fit.p99_bytes,
        "by_component": fit.worst.bytes.components,
        "by_phase": {
            name: {"rank": i.rank, "bytes": i.bytes.total, "by_component": i.bytes.components}
            for name, i in fit.by_phase.items()
        },
        "limiting": {"phase": phase, "component": component, "rank": fit.worst.rank},
        "largest_micro_batch": fit.micro_batches,
        "host_bytes_per_node": fit.host_bytes,
        "host_by_component": fit.host,
        "host_capacity_bytes": fit.host_capacity_bytes,
        "kv_capacity_tokens": fit.kv_capacity_tokens,
        "memory_fraction": fit.memory_fraction,
    }


def print_fit(setup: Setup, fit: Fit) -> None:
    out = console()
    out.print(("Fits" if fit.fits else "Does not fit") + f": {setup.label} on {_cluster(setup.scenario)}.")
    if not fit.fits:
        out.print(f"Reason: {fit.reason}.")
    table = _memory_table(fit)
    narrow = Measurement.get(out, out.options.update(width=1000), table).maximum > out.width
    out.print(_short_memory_table(fit) if narrow else table)
    phase, component = fit.limiting
    out.print(
        f"Worst instant: {phase} on rank {fit.worst.rank}, {gib(fit.worst.bytes.total)} of {gib(fit.capacity_bytes)} "
        f"(largest part: {component}); at the 99th percentile of lengths {gib(fit.p99_bytes)}."
    )
    if fit.kv_capacity_tokens is not None:
        out.print(
            f"KV cache of one engine: {three(fit.kv_capacity_tokens)} tokens at a memory fraction of "
            f"{three(fit.memory_fraction or 0)}."
        )
    if fit.host_bytes:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in fit.host.items() if size)
        out.print(f"Host memory per node: {gib(fit.host_bytes)} of {gib(fit.host_capacity_bytes)} ({parts}).")
    out.print("Largest micro-batches that fit: " + " ".join(f"{k}={v}" for k, v in fit.micro_batches.items()))
    _print_unverified(out, setup.scenario)


def draw_fit(setup: Setup, fit: Fit, path: str) -> None:
    """The memory of every phase as a figure (PNG or SVG), and its CSV file."""
    from .plot import memory_figure

    phases = {phase: instant.bytes.components for phase, instant in fit.by_phase.items()}
    capacity = {phase: instant.capacity_bytes for phase, instant in fit.by_phase.items()}
    memory_figure(phases, path, capacity_bytes=capacity, title=f"{setup.label} on {_cluster(setup.scenario)}")


def print_fit_reason(fit: Fit) -> None:
    console().print("Does not fit: " + fit.reason + ".")


def _memory_table(fit: Fit) -> Table:
    components = [c for c in fit.worst.bytes.components if any(i.bytes.components[c] for i in fit.by_phase.values())]
    table = Table(title="GiB on the fullest rank of each phase", title_justify="left", box=None, pad_edge=False)
    table.add_column("phase")
    for name in [*components, "total", "free"]:
        table.add_column(name, justify="right")
    for phase, instant in fit.by_phase.items():
        parts = [three(instant.bytes.components[c] / 2**30) for c in components]
        table.add_row(phase, *parts, three(instant.bytes.total / 2**30), three(-instant.missing_bytes / 2**30))
    return table


def _short_memory_table(fit: Fit) -> Table:
    """For terminals that are too narrow for all components; cropped numbers would be wrong ones."""
    table = Table(title="GiB on the fullest rank of each phase", title_justify="left", box=None, pad_edge=False)
    table.add_column("phase")
    for name in ("total", "free", "largest part"):
        table.add_column(name, justify="right")
    for phase, instant in fit.by_phase.items():
        components = instant.bytes.components
        largest = max(components, key=lambda name: components[name])
        table.add_row(
            phase,
            three(instant.bytes.total / 2**30),
            three(-instant.missing_bytes / 2**30),
            f"{largest} {three(components[largest] / 2**30)}",
        )
    return table


# -- simulate -----------------------------------------------------------------------------------------------------


def simulation_json(setup: Setup, fit: Fit, timeline: Timeline | None) -> dict[str, Any]:
    from .sync_cost import weight_syncs  # needs the simulator, which `fits` does without

    scenario = setup.scenario
    found: dict[str, Any] = {
        "scenario": scenario.name,
        "strategy": scenario.strategy.name,
        "engine": scenario.generation.engine,
        "cluster": scenario.cluster.name,
        "gpus": scenario.cluster.gpus,
        "fits": fit.fits,
        "reason": fit.reason,
        "peak_memory_bytes": fit.worst.bytes.total,
        "capacity_bytes": fit.capacity_bytes,
        "unverified": unverified(scenario),
        **({"measured": measured} if (measured := measured_of(scenario)) else {}),
        "step_seconds": None,
        "stage_seconds": {},
        "samples_per_second": None,
        "tokens_per_second": None,
    }
    if timeline is not None:
        seconds = step_seconds(timeline)
        found |= {
            "step_seconds": seconds,
            "periodic_seconds": periodic_seconds(setup),
            "stage_seconds": stage_seconds(timeline),
            "extrapolated": [
                words
                for part in scenario.cluster.all_parts
                if (words := extrapolation(scenario.framework, part.gpu.name, scenario.cluster.gpus))
            ],
            "intervals": intervals(scenario.framework, stage_seconds(timeline) | {STEP: seconds}),
            "samples_per_second": scenario.workload.samples / seconds,
            "tokens_per_second": tokens_per_iteration(scenario) / seconds,
            "model_flops_utilisation": model_flops_utilisation(setup, seconds),
            "bound_by": bound_by(timeline),
            "idle_share": idle_share(timeline),
            "rank_groups": _group_shares(timeline),
            "weight_syncs": [asdict(sync) for sync in weight_syncs(setup)],
            "slack_seconds": slack(setup, timeline),
            "overlap_share": overlap_share(timeline),
            "memory_peaks": {
                phase: {"rank": peak.rank, "seconds": peak.seconds, "bytes": peak.bytes}
                for phase, peak in peaks_by_phase(timeline).items()
            },
            "generation": summary._asdict() if (summary := generation_summary(timeline)) else None,
            "tools": tools._asdict() if (tools := tool_summary(timeline)) else None,
            "off_policy": age._asdict() if (age := off_policy_summary(timeline)) else None,
        }
        if scenario.rounds > 1:
            found["dynamic_sampling"] = _dynamic_sampling(scenario, timeline.info["seed"])
    return found


def _dynamic_sampling(scenario: Scenario, seed: int) -> dict[str, float]:
    """Rounds, samples generated and samples thrown away in an iteration, mean over the simulated ones."""
    rounds = sum(count for count, _ in rounds_of(scenario, seed)) / scenario.simulation.iterations
    generated = rounds * scenario.gen_prompts * scenario.workload.responses_per_prompt
    dropped = generated - scenario.workload.samples
    return {"rounds": rounds, "generated_samples": generated, "dropped_samples": dropped}


def _group_shares(timeline: Timeline) -> list[dict[str, Any]]:
    """Shares of their time by part, of ranks that run the same stages."""
    found = []
    for ranks, parts in group_seconds(timeline).items():
        total = sum(parts.values()) or 1.0
        stages = dict.fromkeys(base_stage(s.firing.stage) for s in timeline.spans if ranks[0] in s.ranks)
        shares = {part: seconds / total for part, seconds in parts.items()}
        found.append({"ranks": rank_text(ranks), "stages": list(stages), **shares})
    return found


def _print_groups(out: Console, timeline: Timeline) -> None:
    """Where the ranks' time goes; only where ranks have different stages."""
    if len(groups := _group_shares(timeline)) < 2:
        return
    waits = [part for part in BUSY_PARTS if part.startswith("wait_") and any(g[part] >= 0.005 for g in groups)]
    table = Table(box=None, pad_edge=False)
    table.add_column("ranks", overflow="fold")
    for part in ("compute", "communication", *waits, "idle"):
        table.add_column(part.replace("_", " "), justify="right")
    table.add_column("stages", overflow="fold")
    for group in groups:
        shares = (f"{group[part]:.0%}" for part in ("compute", "communication", *waits, "idle"))
        table.add_row(group["ranks"], *shares, ", ".join(group["stages"]))
    out.print(table)


def _generation_line(summary: GenerationSummary) -> str:
    """Empty where every engine is full all the time and nothing is computed twice."""
    words = []
    if summary.low_occupancy_share >= 0.005:
        words.append(f"{summary.low_occupancy_share:.0%} of its time below 10 % of the largest batch")
    if summary.preemptions:
        words.append(
            f"{three(summary.preemptions)} preemptions ({three(summary.recomputed_tokens)} tokens computed again)"
        )
    if not words:
        return ""
    running = f"{three(summary.mean_running)} sequences at once per engine (at most {three(summary.most_running)})"
    return f"Generation: {', '.join([running, *words])}."


def _off_policy_line(age: OffPolicySummary) -> str:
    words = [f"data are {three(age.mean_age_steps)} steps old (oldest token {three(age.max_age_steps)})"]
    if age.interrupts:
        words.append(f"{three(age.interrupts)} interrupts")
    if age.recomputed_tokens:
        words.append(f"{three(age.recomputed_tokens)} tokens computed again")
    if age.thrown_away_tokens:
        words.append(f"{three(age.thrown_away_tokens)} tokens thrown away")
    return f"Per iteration: {', '.join(words)}."


def _sync_line(sync: SyncCost) -> str:
    words = [f"{three(sync.floor_seconds)} s at the rates of links and storage"]
    if sync.sent_bytes:
        words[0] += f" ({three(sync.sent_bytes / 1e9)} GB sent; {sync.busiest_link or 'no link'} is busiest)"
    if sync.overhead_seconds:
        words.append(f"{three(sync.overhead_seconds)} s per tensor and bucket")
    return f"{sync.stage} takes {human_seconds(sync.seconds)} alone: {', '.join(words)}."


def print_simulation(setup: Setup, fit: Fit, timeline: Timeline) -> None:
    from .sync_cost import weight_syncs

    out, scenario = console(), setup.scenario
    seconds = step_seconds(timeline)
    out.print(
        f"{setup.label} on {_cluster(scenario)}: {human_seconds(seconds)} per iteration of "
        f"{scenario.workload.samples} samples."
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("share of step", justify="right")
    ranges = intervals(scenario.framework, stage_seconds(timeline) | {STEP: seconds})
    if ranges:
        table.add_column("90 % interval", justify="right")
    for stage, value in (stage_seconds(timeline) | {STEP: seconds}).items():
        name, share = ("step", "") if stage == STEP else (stage, f"{value / seconds:.0%}")
        interval = [" to ".join(map(three, ranges[stage]))] if stage in ranges else []
        table.add_row(f"timing_s/{name}", three(value), share, *interval)
    out.print(table)
    out.print(_interval_line(scenario))
    tokens = tokens_per_iteration(scenario)
    out.print(
        f"{three(scenario.workload.samples / seconds)} samples/s, {three(tokens / seconds)} tokens/s, "
        f"{three(tokens / seconds / scenario.cluster.gpus)} tokens/s per GPU."
    )
    if scenario.rounds > 1:
        found = _dynamic_sampling(scenario, timeline.info["seed"])
        out.print(
            f"Dynamic sampling: {three(found['rounds'])} rounds per iteration; {three(found['dropped_samples'])} of "
            f"{three(found['generated_samples'])} samples are generated and thrown away."
        )
    if (extra := periodic_seconds(setup)) > 0:
        out.print(f"Validation and checkpoints add {human_seconds(extra)} per iteration on average.")
    if (summary := generation_summary(timeline)) and (line := _generation_line(summary)):
        out.print(line)
    if tools := tool_summary(timeline):
        out.print(
            f"Tools: {three(tools.calls)} calls per iteration, "
            f"{three(tools.seconds_per_call)} s each; {tools.idle_share:.0%} of the engines' time all samples of an "
            "engine wait for them."
        )
    if age := off_policy_summary(timeline):
        out.print(_off_policy_line(age))
    for sync in weight_syncs(setup):
        if sync.sent_bytes or sync.overhead_seconds:
            out.print(_sync_line(sync))
    out.print(
        f"Bound by {bound_by(timeline)}; {idle_share(timeline):.0%} of the GPU time is idle; "
        f"model FLOPs utilisation {model_flops_utilisation(setup, seconds):.1%}."
    )
    _print_groups(out, timeline)
    if peak := memory_peak(timeline):
        out.print(
            f"Peak memory {gib(peak.bytes)} of {gib(setup.memory.capacity_of(peak.rank))}, in {peak.phase} on rank "
            f"{peak.rank} from {human_seconds(peak.seconds)} on."
        )
    _print_unverified(out, scenario)


def _interval_line(scenario: Scenario) -> str:
    """What the intervals rest on, or how to get some."""
    profile = scenario.framework
    if profile is None:
        return "No interval: it takes the framework's profile (framework: verl_fsdp; rlhfsim show frameworks)."
    residual = residual_of(profile, "step")
    text = f"No interval: no published step of {profile.name} calibrates its profile."
    if residual:
        text = f"Intervals: how far {residual.count} published steps are off that calibrate the profile {profile.name}."
    far = [extrapolation(profile, part.gpu.name, scenario.cluster.gpus) for part in scenario.cluster.all_parts]
    return text + "".join(f" Extrapolated: {words}." for words in dict.fromkeys(filter(None, far)))


def tokens_per_iteration(scenario: Scenario) -> float:
    """Prompt and response tokens of one iteration's batch, mean over the simulated ones."""
    draws = trained_lengths_of(scenario, scenario.simulation.seed)
    return float(sum(prompts.sum() + responses.sum() for prompts, responses in draws)) / len(draws)


# -- compare ------------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows that have a speedup, as figures take them."""
    table = []
    for row in comparison.rows:
        if (speedup := comparison.speedup(row)) is not None:
            entry: dict[str, Any] = {"strategy": row.label, "speedup": speedup, "step_seconds": row.step_seconds}
            if interval := comparison.speedup_interval(row):
                entry |= {"low": interval[0], "high": interval[1]}
            table.append(entry)
    return table


def comparison_title(comparison: Comparison) -> str:
    scenario = comparison.base.scenario
    return f"{scenario.name}: {scenario.workload.samples} samples per iteration on {_cluster(scenario)}"


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    rows = []
    for row in comparison.rows:
        interval = comparison.speedup_interval(row)
        rows.append(
            {
                "strategy": row.label,
                "step_seconds": row.step_seconds,
                "speedup": comparison.speedup(row),
                "speedup_low": interval[0] if interval else None,
                "speedup_high": interval[1] if interval else None,
                "wins_in_draws": comparison.win_share(row),
                "bound_by": bound_by(row.timeline) if row.timeline else None,
                "off_policy": row.off_policy,
                "fits": row.fits,
                "reason": row.reason,
                "peak_memory_bytes": row.fit.worst.bytes.total if row.fit else None,
                "stage_seconds": stage_seconds(row.timeline) if row.timeline else {},
                "used": row.used,
            }
        )
    winner = comparison.winner
    base = comparison.base.scenario
    return {
        "baseline": comparison.baseline,
        "baseline_settings": baseline_settings(comparison),
        "tuned": comparison.tuned,
        "rows": rows,
        "winner": winner.label if winner else None,
        "why": why(comparison),
        "unverified": unverified(base),
    }


def baseline_settings(comparison: Comparison) -> dict[str, Any]:
    """What a speedup over the baseline depends on: its engine, per-GPU batch and network."""
    scenario = comparison.base.scenario
    networks = [part.network for part in scenario.cluster.all_parts]
    return {
        "engine": scenario.generation.engine,
        "samples_per_gpu": scenario.workload.samples / scenario.cluster.gpus,
        "network_bytes_per_second_per_node": min(n.nics_per_node * n.nic_bytes_per_second.value for n in networks),
    }


def print_comparison(comparison: Comparison) -> None:
    out = console()
    base = baseline_settings(comparison)
    scenario = comparison.base.scenario
    out.print(comparison_title(comparison) + ".")
    table = Table(box=None, pad_edge=False)
    columns = (
        ("strategy", "left"),
        ("s/iteration", "right"),
        ("speedup", "right"),
        ("peak GiB", "right"),
        ("bound by", "left"),
        ("uses", "left"),
    )[: 6 if out.width >= 80 else 5]  # `--json` has what is left out
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")  # type: ignore[arg-type]
    for row in comparison.rows:
        table.add_row(*_comparison_cells(comparison, row)[: len(columns)])
    out.print(table)
    out.print(
        f"Speedup over {comparison.baseline} (engine {base['engine']}, "
        f"{three(base['samples_per_gpu'])} samples per GPU, "
        f"{three(base['network_bytes_per_second_per_node'] / 1e9)} GB/s per node); "
        + (
            "each row with the best micro-batch, TP and split found."
            if comparison.tuned
            else "settings as given, not tuned."
        )
    )
    if any(row.off_policy for row in comparison.rows):
        out.print("* trains on responses of older weights: another algorithm, of which a step may teach less.")
    out.print(why(comparison))
    _print_unverified(out, scenario)


def _comparison_cells(comparison: Comparison, row: Row) -> tuple[str, ...]:
    peak = three(row.fit.worst.bytes.total / 2**30) if row.fit else "-"
    if row.timeline is None:
        return row.label, "-", "-", peak, f"{'does not fit' if row.fit else 'impossible'}: {row.reason}", ""
    speedup = comparison.speedup(row)
    text = (f"{three(speedup)}x" if speedup is not None else "-") + ("*" if row.off_policy else "")
    if interval := comparison.speedup_interval(row):
        text += f" [{three(interval[0])}, {three(interval[1])}]"
    if (wins := comparison.win_share(row)) is not None:
        text += f", wins {wins:.0%}"
    return row.label, three(row.step_seconds or 0.0), text, peak, bound_by(row.timeline), _short_settings(row)


def _short_settings(row: Row) -> str:
    """The settings of a row in a few words; `--json` has them in full."""
    used = row.used
    words = [f"TP {used['generation.tensor_parallel']}"]
    if stages := used.get("generation.pipeline_parallel"):
        words.append(f"PP {stages}")
    for unit, suffix in (("samples", ""), ("tokens", " tokens")):
        found = (used.get(f"models.{role}.micro_batch_{unit}") for role in ("actor", "critic"))
        if micro := {m for m in found if m is not None}:
            words.append("micro-batch " + "/".join(str(m) for m in sorted(micro)) + suffix)
    if "ranks" in used:
        words.append(" ".join(f"{name} {count}" for name, count in used["ranks"].items()))
    words += [f"{name} {used[key]}" for name in ("batches", "replicas") if (key := f"strategy.{name}") in used]
    return ", ".join(words)


# -- show ---------------------------------------------------------------------------------------------------------


def print_sources(sources: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("field", "value", "source"):
        table.add_column(name, overflow="fold")
    for entry in sources:
        table.add_row(entry["field"], f"{entry['value']:g}", entry["source"])
    console().print(table)


def unverified(scenario: Scenario) -> list[str]:
    """What this result rests on and nobody has opened a document or made a measurement for."""
    names = [
        name for name, _, source in scenario_sources(scenario) if source == "unverified" and _is_used(name, scenario)
    ]
    overheads, continuous = scenario.overheads, scenario.generation.continuous
    defaults = {
        "reserved_bytes": True,
        "decode_step_seconds": continuous,
        "decode_sequence_seconds": continuous,
        "eager_layer_seconds": not scenario.generation.graphs,
    }
    names += [f"overheads.{name}" for name, used in defaults.items() if used and getattr(overheads, name) is None]
    for kernels in dict.fromkeys(part.gpu.kernels for part in scenario.cluster.all_parts):
        if not all(fit.measured for fit in kernels_of(kernels).fits().values()):
            names.append(f"kernel curves {kernels} (some copied from another architecture)")
    return names


def _is_used(name: str, scenario: Scenario) -> bool:
    """Whether a number of the cluster can change this scenario's result."""
    uses = [getattr(scenario.models, role) for role in ROLES]
    name = re.sub(r"^cluster\.parts\.\d+", "cluster", name)
    if name.startswith("cluster.gpu.flops_per_second."):
        return name.rpartition(".")[2] in {use.precision for use in uses}
    if name.startswith("cluster.node.host_memory"):
        return any(use.offload_optimizer or use.offload_parameters or use.offload_states for use in uses)
    if name.startswith("cluster.network."):
        return scenario.cluster.nodes > 1
    return True


def _print_unverified(out: Console, scenario: Scenario) -> None:
    if names := unverified(scenario):
        out.print("Unverified behind this result: " + ", ".join(names) + ".")


def _cluster(scenario: Scenario) -> str:
    parts = scenario.cluster.all_parts
    return " + ".join(f"{p.gpus} x {p.gpu.name} ({p.nodes} node{'s' if p.nodes > 1 else ''})" for p in parts)


# -- validate -----------------------------------------------------------------------------------------------------


def print_validation(results: list[Result], found: dict[str, Any]) -> None:
    """One line a quantity, predictions and calibration apart, then the summary of the predictions."""
    out = console()
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("case", "left"),
        ("quantity", "left"),
        ("predicted s", "right"),
        ("measured s", "right"),
        ("spread", "right"),
        ("error", "right"),
        ("excess s", "right"),
        ("tolerance", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for framework, own in groupby(sorted(results, key=lambda r: r.framework), key=lambda r: r.framework):
        if framework:
            table.add_row(f"{framework}:")
        for r in own:
            table.add_row(
                r.id,
                r.quantity,
                three(r.predicted) + (f" ({three(r.low)} to {three(r.high)})" if r.low and r.high else ""),
                three(r.measured),
                f"{r.spread:.1%}",
                f"{r.error:+.1%}",
                three(r.excess_seconds),
                f"{r.tolerance:.0%}",
                r.role if r.role != "prediction" else "ok" if r.ok else "TOO FAR",
            )
    out.print(table)
    for gap in found["gaps"]:
        out.print(f"{gap['id']}: {gap['kind']}: {gap['reason']}")
    if found["mean_abs_error"] is None:
        out.print("No predictions among these cases.")
        return
    if found["frameworks"]:
        _print_frameworks(out, found["frameworks"])
    worst = found["worst"]
    out.print(
        f"{found['predictions']} predictions in {found['groups']} groups: mean error {found['mean_abs_error']:.1%}, "
        f"bias {found['bias']:+.1%}, worst {worst['error']:+.1%} ({worst['id']}, {worst['quantity']})."
    )
    if found["ranking"] is not None:
        words = "Pairs that differ by more than their spread, in the right order"
        out.print(f"{words}: {_share_of(found['ranking'])}.")
    if found["coverage"] is not None:
        width = f"(in the middle a factor of {found['interval_factor']:.2f} each way)"
        out.print(f"90 % intervals {width} hold the measurement: {_share_of(found['coverage'])}.")
    if found["failed"]:
        out.print("Beyond tolerance: " + ", ".join(found["failed"]) + ".")


def _share_of(found: dict[str, Any]) -> str:
    limits = f"{found['low']:.0%} to {found['high']:.0%}"
    return f"{found['share']:.0%} of {found['count']} ({limits} with 90 % confidence)"


def _print_frameworks(out: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("framework", "phase"):
        table.add_column(name)
    for name in ("predictions", "mean error", "median", "bias", "worst"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["framework"],
            row["phase"],
            str(row["count"]),
            f"{row['mean_abs_error']:.0%}",
            f"{row['median_abs_error']:.0%}",
            f"{row['bias']:+.0%}",
            f"{row['worst']['error']:+.0%}",
        )
    out.print(table)


def print_calibration(found: Calibration) -> None:
    """Errors of every curve, what the machine's host needs, and what no file told."""
    out = console()
    table = Table(box=None, pad_edge=False)
    table.add_column("fitted", overflow="fold")
    for name in ("rows", "held out", "mean error", "weighted", "worst", "bias"):
        table.add_column(name, justify="right")
    for name, fit in found.fits.items():
        measures = (fit.get(key) for key in ("mean_error", "weighted_error", "worst_error"))
        percent = ["" if value is None else f"{value:.1%}" for value in measures]
        bias = "" if fit.get("bias") is None else f"{fit['bias']:+.1%}"
        table.add_row(name, str(fit["rows"]), str(fit["held_out_rows"]), *percent, bias)
    out.print(table)
    for name, value in found.cluster["overheads"].items():
        if name != "deepspeed":
            out.print(f"{name}: {three(value)}")
    out.print("Not determined:")
    for what, run in found.undetermined:
        out.print(f"- {what}: {run}")
    out.print("Written: " + ", ".join(map(str, found.paths)))
