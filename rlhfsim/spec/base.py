"""What all records share: strict, frozen pydantic models, and numbers that carry their source."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Sourced(Record):
    """A number and where it comes from.

    `source` is a key of the file's own `sources`, or ``unverified``.
    """

    value: Annotated[float, Field(gt=0)]
    source: str

    @property
    def verified(self) -> bool:
        return self.source != "unverified"


def _power_of_ten_safe(value: int) -> int:
    if value > 10**12:
        raise ValueError("is unreasonably large (at most 1e12)")
    return value


Count = Annotated[int, Field(ge=1), AfterValidator(_power_of_ten_safe)]
NonNegativeCount = Annotated[int, Field(ge=0), AfterValidator(_power_of_ten_safe)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
BytesPerSecond = Annotated[float, Field(gt=0, le=1e18)]
