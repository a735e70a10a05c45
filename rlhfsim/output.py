"""Files that people name for results: looked at before any work is done, and never left half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


def check_writable(*paths: str | Path | None) -> None:
    """Complain about an output path before any work is done. Raises InputError."""
    for path in (path for path in paths if path):
        target = Path(path)
        if target.is_dir():
            raise InputError("is a folder, a file is needed", where=str(path))
        if not target.parent.is_dir():
            raise InputError(f"there is no folder {str(target.parent)!r}", where=str(path))
        # a file is replaced by another in its folder; what is no file (a pipe, /dev/null) is written itself
        places = {target, target.parent} if target.is_file() else {target if target.exists() else target.parent}
        if not all(os.access(place, os.W_OK) for place in places):
            raise InputError("is not writable", where=str(path))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, so that at any instant the old or the new one is complete.

    Where `path` is no regular file (a pipe, /dev/null) it is given itself. OSError becomes an InputError.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if Path(path).exists() and not Path(path).is_file():
            yield Path(path)
        else:
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror or error}", where=str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
