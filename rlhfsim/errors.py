"""Errors that a user can act on.

`InputError` is raised for anything wrong in what a person gave us (a file, an override, an option);
the command line shows its text without a traceback and exits with 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something that the user gave is wrong: which field, what was given, what is allowed.

    `field` is a dotted path (``models.actor.zero_stage``), `where` a place in a file (``scenario.yaml:12``).
    """

    def __init__(self, message: str, *, field: str = "", where: str = "") -> None:
        self.message, self.field, self.where = message, field, where
        super().__init__(": ".join(part for part in (where, field, message) if part))


class NeverValid(InputError):
    """A value that its field allows in no scenario: of another type, out of bounds, no such name."""


class DoesNotFit(Exception):
    """The scenario is valid, but needs more memory than there is; the text names the component and the instant."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint for a misspelt name: `` (did you mean 'x'?)`` or, without a near one, the allowed names."""
    names = sorted(map(str, allowed))
    close = get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f" (allowed: {shown})"
