"""Where the shipped data lies: in a wheel inside the package, in a checkout beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parent.parent


def data_dir(kind: Literal["hw_specs", "traces"]) -> Path:
    """The folder `kind`: `rlhfsim/_data/<kind>` of an installed wheel, else `<repository>/<kind>`.

    Raises FileNotFoundError when neither exists (a broken installation, nothing that an input can cause).
    """
    places = (PACKAGE / "_data" / kind, PACKAGE.parent / kind)
    for folder in places:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"rlhfsim's data folder {kind!r} is missing; looked in {', '.join(map(str, places))}")
