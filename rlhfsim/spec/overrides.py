"""`a.b=c` on the command line: one value replaces another, several make a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from ..errors import InputError
from .yaml_file import Where, kind_of, parse_value, shown

MAX_POINTS = 1_000_000

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_CLOSING = {"[": "]", "{": "}"}


def parse_override(text: str) -> tuple[str, list[Any]]:
    """The dotted key and the values of `key=value` or `key=value,value`. Commas in brackets or quotes do not split.

    A value is a YAML 1.2 scalar or a `[list]` or `{mapping}`. Raises InputError for anything else.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise InputError(f"an override is written key.subkey=value, given {shown(text)}")
    parts = _split(values, key)
    return key, [_value(part, key) for part in parts]


def single_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by dotted key, each with one value. Raises InputError for a sweep and for a key given twice."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    found: dict[str, Any] = {}
    for key, values in _distinct(overrides):
        if len(values) > 1:
            raise InputError(
                f"is given {len(values)} values, which is a sweep, but one is needed here (a list is written [a,b])",
                field=key,
            )
        found[key] = values[0]
    return found


def expand_sweep(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values given; the last key varies fastest. Without overrides one empty combination."""
    keys_and_values = _distinct(overrides)
    points = prod(len(values) for _, values in keys_and_values)
    if points > MAX_POINTS:
        raise InputError(f"the sweep has {points} points; at most {MAX_POINTS} are allowed")
    keys = [key for key, _ in keys_and_values]
    return [dict(zip(keys, point, strict=True)) for point in product(*(values for _, values in keys_and_values))]


def apply_override(data: dict[str, Any], where: Where, key: str, value: Any, place: str) -> None:
    """Set the value at a dotted path of plain data in place, making the mappings on the way; a number is an entry of a
    list."""
    *parents, last = key.split(".")
    target: Any = data
    for depth, name in enumerate(parents):
        index = _index(target, name, key, place)
        inner = target.get(name) if index is None else target[index]
        if inner is None and index is None:
            inner = target[name] = {}
        if not isinstance(inner, dict | list):
            at = ".".join(parents[: depth + 1])
            raise InputError(f"{at} is {kind_of(inner)}, so {key!r} cannot be set below it", field=key, where=place)
        target = inner
    index = _index(target, last, key, place)
    target[last if index is None else index] = value
    for path in [path for path in where if path.startswith(f"{key}.")]:
        del where[path]
    where[key] = place


def _index(target: dict[str, Any] | list[Any], name: str, key: str, place: str) -> int | None:
    """Of an entry of a list; None: `target` is a mapping."""
    if isinstance(target, dict):
        return None
    if not name.isdecimal() or int(name) >= len(target):
        raise InputError(f"{name!r} is no entry of a list of {len(target)} (they count from 0)", field=key, where=place)
    return int(name)


def _distinct(overrides: Iterable[str]) -> list[tuple[str, list[Any]]]:
    parsed = [parse_override(text) for text in overrides]
    keys = [key for key, _ in parsed]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise InputError("is overridden twice", field=twice)
    return parsed


def _split(text: str, key: str) -> list[str]:
    """The parts between those commas that are in no bracket and no quotes."""
    parts, closing, quote = [""], list[str](), ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and parts[-1].rstrip()[-1:] in ("", *"[{,:"):
            quote = char  # only where a value begins: it's is a word
        elif char in _CLOSING:
            closing.append(_CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            parts.append("")
            continue
        parts[-1] += char
    if quote or closing:
        raise InputError(f"{quote or closing[-1]} is missing in {shown(text)}", field=key)
    return parts


def _value(text: str, key: str) -> Any:
    if not text.strip():
        raise InputError("has an empty value (null unsets it)", field=key)
    if "\n" in text or "\r" in text:
        raise InputError(f"has a value of several lines, {shown(text)}", field=key)
    try:
        value = parse_value(text, "")
    except InputError as error:
        raise InputError(f"has the value {shown(text)}, which {error.message}", field=key) from None
    if isinstance(value, dict | list) and text.strip()[0] not in _CLOSING:
        raise InputError(f"has the value {shown(text)}; a list is written [a,b], a mapping {{a: b}}", field=key)
    if value is None and text.strip().startswith("#"):
        raise InputError(f"has the value {shown(text)}, which is a comment; put it in quotes", field=key)
    return value
