"""Files of measurements in the formats of other projects, read as they are. One file per format; the file is the
registration.

A module here has

- `TITLE`: what the format is called in messages,
- `recognises(probe) -> bool`: whether a file is of this format, by its content,
- `read(path) -> Measurements`: what it holds; raises InputError with file, line and field for what is wrong in it,

and says in its text where the format is documented.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from rlhfsim.errors import InputError
from rlhfsim.measurements import Measurements

HEAD_BYTES = 1 << 16
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """The beginning of a file, to recognise its format: columns of a table, or keys of a mapping, whichever it is.

    names: of the files in a folder.
    """

    path: Path
    head: str = ""
    columns: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    names: frozenset[str] = field(default=frozenset())


@cache
def formats() -> dict[str, ModuleType]:
    """The modules of this folder by name."""
    return {module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)}


def probe(path: str | Path) -> Probe:
    """Raises InputError for a file that is missing, empty, or too large to be one of these."""
    path = Path(path)
    try:
        if path.is_dir():
            return Probe(path, names=frozenset(p.name for p in path.iterdir()))
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(HEAD_BYTES)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if size == 0 or not raw.strip():
        raise InputError("is empty", where=str(path))
    if size > MAX_BYTES:
        raise InputError(f"has {size} bytes; at most {MAX_BYTES} are read", where=str(path))
    head = raw.decode("utf-8", errors="replace")
    columns: frozenset[str] = frozenset()
    if path.suffix == ".csv":
        columns = frozenset(next(csv.reader([head.splitlines()[0]]), []))
    return Probe(path, head, columns, _keys(path, head))


def _keys(path: Path, head: str) -> frozenset[str]:
    """Of a JSON or YAML mapping, the outermost ones (of a long file those of its beginning)."""
    if path.suffix == ".json":
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"is damaged, or no JSON: {str(error)[:100]}", where=str(path)) from None
        return frozenset(found) if isinstance(found, dict) else frozenset()
    if path.suffix in (".yaml", ".yml"):
        lines = (line for line in head.splitlines() if line[:1].isalpha() and ":" in line)
        return frozenset(line.partition(":")[0].strip() for line in lines)
    return frozenset()


def format_of(path: str | Path) -> ModuleType | None:
    """The module that reads this file; None: no format of this folder."""
    found = probe(path)
    return next((module for module in formats().values() if module.recognises(found)), None)


def read(path: str | Path) -> Measurements:
    """What the file holds. Raises InputError for a file of no known format."""
    module = format_of(path)
    if module is None:
        titles = "; ".join(sorted(m.TITLE for m in formats().values()))
        raise InputError(f"is of no format that is read ({titles})", where=str(path))
    return module.read(Path(path))  # type: ignore[no-any-return]
