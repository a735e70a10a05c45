"""What there is to choose from, and where the numbers of a scenario come from."""

from __future__ import annotations

from typing import Any

from .errors import InputError, nearest
from .spec.data import data_dir

FOLDERS = ("models", "gpus", "nodes", "clusters", "kernels", "frameworks")  # of hw_specs, one file each
LISTINGS = (*FOLDERS, "strategies", "algorithms", "fields")


def shown(what: str | None, overrides: tuple[str, ...]) -> Any:
    """A listing by name (names, or texts by name), or field, value and source of a scenario's numbers; without a name,
    the names of the listings.

    Raises InputError for what is neither a listing nor a scenario file.
    """
    if what is None:
        return list(LISTINGS)
    if what.endswith((".yaml", ".yml")):
        from .spec.loader import load_scenario, scenario_sources

        return [{"field": f, "value": v, "source": s} for f, v, s in scenario_sources(load_scenario(what, overrides))]
    if what not in LISTINGS:
        raise InputError(
            f"{what!r} is neither a listing nor a scenario file (.yaml){nearest(what, LISTINGS)}", field="show"
        )
    if overrides:
        raise InputError(f"overrides belong to a scenario file, not to {what!r}", field=overrides[0])
    if what in FOLDERS:
        return sorted(path.stem for path in (data_dir("hw_specs") / what).glob("*.yaml"))
    if what == "fields":
        return _field_docs()
    from .layout import algorithm_names, strategy_names

    return strategy_names() if what == "strategies" else algorithm_names()


def _field_docs() -> dict[str, str]:
    """Every section of a scenario file and what its fields mean."""
    from .spec import hardware
    from .spec import scenario as records

    sections = {
        "cluster": hardware.Cluster,
        "cluster.node": hardware.Node,
        "cluster.gpu": hardware.Gpu,
        "cluster.network": hardware.Network,
        "cluster.between": hardware.Interconnect,
        "models": records.Models,
        "models.<role>": records.ModelUse,
        "workload": records.Workload,
        "workload.*_tokens": records.Lengths,
        "workload.turns": records.Turns,
        "algorithm": records.Algorithm,
        "algorithm.reward_latency": records.Latency,
        "generation": records.Generation,
        "generation.speculative": records.Speculative,
        "strategy": records.StrategyChoice,
        "weight_sync": records.WeightSync,
        "overheads": records.Overheads,
        "periodic": records.Periodic,
        "effects": records.Effects,
        "simulation": records.Simulation,
        "compare": records.Compare,
        "keep": records.Scenario,
    }
    return {name: (record.__doc__ or "").strip() for name, record in sections.items()}
