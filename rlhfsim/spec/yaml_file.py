"""One YAML file as plain dicts, lists and scalars, and the line of every value.

The scalars are those of the core schema of YAML 1.2.2 (https://yaml.org/spec/1.2.2, section 10.3.2): `1e9` is a
number, `on` and `yes` are words. What a scenario does not need is refused: anchors, tags, several documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from ..errors import InputError, nearest

MAX_BYTES = 4 << 20
MAX_DEPTH = 30
MAX_DIGITS = 40  # of an integer; Python itself refuses to read more than 4300

_NULL = re.compile(r"(?:null|Null|NULL|~)?")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")

Where = dict[str, str]
"""A place (`file:line`) for every dotted path; the path of the whole document is its `prefix`."""


@dataclass(frozen=True)
class Document:
    """A mapping that was read, the place of every value, and the folder that its relative paths start from."""

    data: dict[str, Any]
    where: Where
    folder: Path


def read_yaml(path: str | Path, prefix: str = "") -> Document:
    """The mapping in the file `path`; its dotted paths in `where` begin with `prefix`.

    Raises InputError with file and line for a file that is missing, unreadable, larger than 4 MiB, binary, empty,
    broken, nested more than 30 deep, or that holds a key twice.
    """
    path = Path(path)
    reader = _Reader(str(path), prefix)
    data = reader.read(_text(path))
    if data is None:
        raise InputError("is empty", where=str(path))
    if not isinstance(data, dict):
        raise InputError(f"must hold a mapping (key: value), not {kind_of(data)}", where=str(path))
    return Document(data, reader.where, path.parent)


def parse_value(text: str, place: str) -> Any:
    """A value given outside a file, such as `1e9`, `[0, 1]` or `{name: x}`; `place` is named in an error."""
    return _Reader(place, "", count_lines=False).read(text)


def join(prefix: str, key: str) -> str:
    """The dotted path of `key` below `prefix`."""
    return f"{prefix}.{key}" if prefix else key


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "empty" if value is None else shown(value)


def shown(value: Any) -> str:
    """The value as it appears in a message: at most 60 characters, YAML's spelling of true, false and null."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"


def _text(path: Path) -> str:
    try:
        if not path.exists():
            raise InputError(f"there is no such file{_sibling(path)}", where=str(path))
        if not path.is_file():  # a folder; a pipe or a device would never end
            raise InputError("is not a regular file", where=str(path))
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)[:200]) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(str(path))} is no file name: {error}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES} bytes", where=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError("is not text in UTF-8", where=f"{path}:{line}") from None
    if "\0" in text:
        raise InputError("is a binary file, not text", where=str(path))
    return text


def _sibling(path: Path) -> str:
    """A hint at a file of similar name in the same folder."""
    if not path.parent.is_dir():
        return f"; there is no folder {str(path.parent)!r} either"
    hint = nearest(path.name, (other.name for other in path.parent.iterdir() if other.is_file()))
    return hint if "did you mean" in hint else ""


class _Reader:
    """Builds plain values out of ruamel.yaml's parsing events, which keep the line and build nothing themselves."""

    def __init__(self, name: str, prefix: str, count_lines: bool = True) -> None:
        self.name, self.prefix, self.count_lines = name, prefix, count_lines
        self.where: Where = {prefix: name}

    def read(self, text: str) -> Any:
        try:
            return self._document(YAML(typ="safe", pure=True).parse(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._place(mark.line) if mark else self.name
            raise InputError(f"is not YAML: {error.problem or error.context}", where=place) from None
        except YAMLError as error:  # a character that YAML does not allow
            raise InputError(f"is not YAML: {str(error).splitlines()[0]}", where=self.name) from None

    def _document(self, events: Iterator[Event]) -> Any:
        value: Any = None
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document begins here; only one is allowed")
                if event.version and tuple(event.version) != (1, 2):
                    raise self._error(event, "only YAML 1.2 is read")
                value = self._value(next(events), events, self.prefix, 0)
        return value

    def _value(self, event: Event, events: Iterator[Event], path: str, depth: int) -> Any:
        assert isinstance(event, AliasEvent | ScalarEvent | MappingStartEvent | SequenceStartEvent)
        if event.anchor is not None:
            raise self._error(event, "anchors and aliases (& and *) are not read; write the value itself")
        if not isinstance(event, AliasEvent) and event.tag is not None:
            raise self._error(event, f"tags are not read, given {str(event.tag)!r}")
        if depth > MAX_DEPTH:
            raise self._error(event, f"is nested more than {MAX_DEPTH} deep")
        if isinstance(event, MappingStartEvent):
            return self._mapping(events, path, depth)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(events, path, depth)
        assert isinstance(event, ScalarEvent)
        return self._scalar(event)

    def _mapping(self, events: Iterator[Event], path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.anchor is not None or event.tag is not None:
                raise self._error(event, "a key must be a plain word")
            key = self._text_of(event)
            below = join(path, key)
            if key in found:
                raise self._error(event, f"key {shown(key)} is given twice, first at {self.where[below]}")
            self.where[below] = self._place(event.start_mark.line)
            found[key] = self._value(next(events), events, below, depth + 1)
        return found

    def _sequence(self, events: Iterator[Event], path: str, depth: int) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            below = join(path, str(len(found)))
            self.where[below] = self._place(event.start_mark.line)
            found.append(self._value(event, events, below, depth + 1))
        return found

    def _scalar(self, event: ScalarEvent) -> Any:
        text = self._text_of(event)
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if _INTEGER.fullmatch(text) or _OCTAL.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise self._error(event, f"a number of {len(text)} digits, {shown(text)}; at most {MAX_DIGITS}")
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return _word_or_float(text)

    def _text_of(self, event: ScalarEvent) -> str:
        if any("\ud800" <= char <= "\udfff" for char in event.value):
            raise self._error(event, "has half a character (a surrogate), which no file can hold")
        return str(event.value)

    def _place(self, line: int) -> str:
        return f"{self.name}:{line + 1}" if self.count_lines else self.name

    def _error(self, event: Event, message: str) -> InputError:
        return InputError(message, where=self._place(event.start_mark.line))


def _word_or_float(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinity := _INFINITY.fullmatch(text):
        return -math.inf if infinity[1] == "-" else math.inf
    return math.nan if _NAN.fullmatch(text) else text
