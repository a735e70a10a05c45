"""What a training framework adds to kernels and links, of a version: `hw_specs/frameworks/*.yaml`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from .base import Record, Sourced
from .hardware import Sources
from .overheads import Overheads, Unexplained

PHASES = ("step", "generation", "scoring", "training", "weight sync")


class Residual(Record):
    """Measured over predicted on the cases that nothing else of this profile can explain.

    log_sd: standard deviation of log(measured / predicted), each with the cases of its own group left out of the fit.
    count: of those quantities.
    """

    log_sd: Annotated[float, Field(ge=0, le=10)]
    count: Annotated[int, Field(ge=1)]


class Framework(Sources):
    """A framework's profile, by which a scenario says with what it runs (`framework: verl_fsdp`).

    versions: the releases that it was read from or measured with. overheads, unexplained: those of `overheads`, for
    scenarios and clusters that do not say their own. fused_kernels: what `models.<role>.fused_kernels` is where it is
    not given. fitted_on: groups of published cases (framework, model, hardware) that its fitted numbers come from; no
    case of them is a prediction. residuals: by phase, how far predictions with this profile were off: it widens
    intervals.
    """

    name: str
    description: str = ""
    versions: str = ""
    fused_kernels: bool = True
    fused_kernels_source: str = "unverified"
    overheads: dict[str, Sourced] = Field(default_factory=dict)
    unexplained: dict[str, Sourced] = Field(default_factory=dict)
    fitted_on: list[str] = Field(default_factory=list)
    residuals: dict[str, Residual] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_exist(self) -> Framework:
        known = Overheads.model_fields.keys() - {"deepspeed", "unexplained"}
        if wrong := sorted(self.overheads.keys() - known):
            raise ValueError(f"overheads has no {wrong[0]!r} (it has: {', '.join(sorted(known))})")
        if wrong := sorted(self.unexplained.keys() - Unexplained.model_fields.keys()):
            raise ValueError(f"unexplained has no {wrong[0]!r} (it has: {', '.join(Unexplained.model_fields)})")
        if wrong := sorted(self.residuals.keys() - set(PHASES)):
            raise ValueError(f"residuals has no phase {wrong[0]!r} (phases: {', '.join(PHASES)})")
        return self

    def usual_overheads(self) -> dict[str, Any]:
        """Plain values of `Overheads`."""
        found: dict[str, Any] = {name: number.value for name, number in self.overheads.items()}
        factors = {name: number.value for name, number in self.unexplained.items()}
        return found | ({"unexplained": factors} if factors else {})
