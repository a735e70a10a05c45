"""Validation of plain data against a record, with complaints that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..errors import InputError, NeverValid, nearest
from .yaml_file import Where, kind_of, shown

SHOWN_PROBLEMS = 5
EXACT_INTEGERS = 2**53  # up to here every whole number is a float

R = TypeVar("R", bound=BaseModel)

_MISSING = "is missing"
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a plain number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
# How people write a unit into a key, the unit that our keys have, and the factor between the two.
_UNITS = {
    "gbps": ("bytes_per_second", "1 Gbit/s is 1.25e8"),
    "gbit": ("bytes_per_second", "1 Gbit/s is 1.25e8"),
    "mbps": ("bytes_per_second", "1 Mbit/s is 1.25e5"),
    "tbps": ("bytes_per_second", "1 TB/s is 1e12"),
    "gbs": ("bytes_per_second", "1 GB/s is 1e9"),
    "kb": ("bytes", "1 kB is 1e3"),
    "mb": ("bytes", "1 MB is 1e6"),
    "mib": ("bytes", "1 MiB is 1048576"),
    "gb": ("bytes", "1 GB is 1e9"),
    "gib": ("bytes", "1 GiB is 1073741824"),
    "tb": ("bytes", "1 TB is 1e12"),
    "gflops": ("flops_per_second", "1 GFLOP/s is 1e9"),
    "tflops": ("flops_per_second", "1 TFLOP/s is 1e12"),
    "pflops": ("flops_per_second", "1 PFLOP/s is 1e15"),
    "flops": ("flops_per_second", ""),
    "ms": ("seconds", "1 ms is 1e-3"),
    "us": ("seconds", "1 us is 1e-6"),
    "ns": ("seconds", "1 ns is 1e-9"),
    "sec": ("seconds", ""),
    "s": ("seconds", ""),
}
_RATE_WORDS = {"per", "s", "sec", "second"}


def validate(record: type[R], data: Any, where: Where, also: Mapping[str, Iterable[str]] | None = None) -> R:
    """`data` as a `record`; InputError names place, field, value, what is allowed and the nearest name.

    `also`: keys that a person may write at a dotted path beside the record's own fields. Types are taken strictly
    (a number in quotes is text, `true` is no number), except that a float without a fraction is a whole number.
    """
    try:
        return record.model_validate(whole_numbers(data), strict=True)
    except ValidationError as error:
        found = [_problem(each, record, where, also or {}) for each in error.errors()]
    # a value that one model takes over from another is wrong in both: one complaint is enough
    first = {
        (each.field if each.message == _MISSING else _last(each.field), each.message): each for each in reversed(found)
    }
    problems = list(first.values())[::-1]
    if len(problems) == 1:
        raise problems[0]
    lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    never = any(isinstance(problem, NeverValid) for problem in problems)
    raise (NeverValid if never else InputError)("\n".join(lines))


def validate_value(kind: Any, value: Any, field: str) -> None:
    """Raise NeverValid unless a single value is of the annotated type `kind`, taken as strictly as in `validate`."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        path = (*field.split("."), *(str(part) for part in first["loc"] if part != "[key]"))
        raise NeverValid(_message(first, path), field=".".join(path)) from None


def whole_numbers(data: Any) -> Any:
    """A copy of plain data in which floats such as 1e9 are ints."""
    if isinstance(data, dict):
        return {key: whole_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [whole_numbers(value) for value in data]
    if isinstance(data, float) and abs(data) <= EXACT_INTEGERS and data.is_integer():
        return int(data)
    return data


def place_of(where: Where, field: str) -> str:
    """The place of a dotted path or, where it has none, of the innermost part of the path that has one."""
    while field and field not in where:
        field = field.rpartition(".")[0]
    return where.get(field, "")


def only_a_near_name(name: str, allowed: Iterable[str]) -> str:
    """`nearest`, but nothing at all when no name is near (for messages that list what is allowed anyway)."""
    hint = nearest(name, allowed)
    return hint if "did you mean" in hint else ""


def _last(field: str) -> str:
    return field.rpartition(".")[2]


def _problem(error: Any, record: type[BaseModel], where: Where, also: Mapping[str, Iterable[str]]) -> InputError:
    path = tuple(str(part) for part in error["loc"] if part != "[key]")
    if path[-1:] == ("value",):  # of {value, source}, which most people write as the number alone
        path = path[:-1]
    field = ".".join(path)
    if error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",):
        allowed = {*_keys(record, path[:-1]), *also.get(".".join(path[:-1]), ())}
        message = "unknown key" + _near_key(path[-1], allowed)
    else:
        message = _message(error, path)
    never = error["type"] in {"literal_error", *_EXPECTED, *_BOUNDS}
    return (NeverValid if never else InputError)(message, field=field, where=place_of(where, field))


def _message(error: Any, path: tuple[str, ...]) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return _MISSING
    if kind == "value_error":
        return _of_a_value(str(context["error"]), given)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'|(\d+)", context["expected"])
        names = [word or number for word, number in allowed]
        return f"is {kind_of(given)}, but must be one of {', '.join(names)}{only_a_near_name(str(given), names)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        limit = context[key] if isinstance(context[key], int) else f"{context[key]:g}"
        return f"is {shown(given)}, but must be {words} {limit}{_unit(path)}"
    if kind == "int_type" and isinstance(given, float) and abs(given) > EXACT_INTEGERS:
        return f"is {shown(given)}, but must be a whole number of at most 1e12"
    if kind in _EXPECTED:
        return f"is {kind_of(given)}, but must be {_EXPECTED[kind]}{_unit(path)}"
    if kind == "too_short":
        return f"is {kind_of(given)} with {context['actual_length']} entries, but needs {context['min_length']}"
    return f"is {kind_of(given)}: {error['msg'].removeprefix('Input should be ')}"


def _of_a_value(message: str, given: Any) -> str:
    """A validator's own words; those about a single number (`is too large`) gain the number."""
    return f"is {shown(given)}, which {message}" if isinstance(given, int | float) else message


def _unit(path: tuple[str, ...]) -> str:
    """The unit that the key of a number ends in; of a table of peaks it is the key above."""
    key = path[-2] if path[-2:-1] == ("flops_per_second",) else path[-1] if path else ""
    for unit in ("bytes_per_second", "flops_per_second", "bytes", "seconds", "tokens"):
        if key.endswith(unit):
            return f", in {unit.replace('_', ' ')}"
    return ""


def _near_key(key: str, allowed: Iterable[str]) -> str:
    """The nearest allowed key; one with another unit in it (`memory_gb`) is translated first."""
    names = sorted(allowed)
    words = key.lower().split("_")
    first = next((i for i, word in enumerate(words) if word in _UNITS), None)
    if first is None:
        return nearest(key, names)
    unit, factor = _UNITS[words[first]]
    if unit == "bytes" and _RATE_WORDS & set(words[first + 1 :]):
        unit = "bytes_per_second"
    ours = "_".join([*words[:first], unit])
    close = get_close_matches(ours, names, n=1, cutoff=0.6)
    if not close or not close[0].endswith(unit):
        return nearest(key, names)
    return f" (did you mean {close[0]!r}, in {unit.replace('_', ' ')}{': ' + factor if factor else ''}?)"


def _keys(record: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """The keys allowed at `path` below a record."""
    kind: Any = record
    for key in path:
        kind = _below(kind, key)
    if get_origin(kind) is dict:
        return list(map(str, get_args(get_args(kind)[0])))
    parts = (kind, *get_args(kind))
    found = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
    return list(found.model_fields) if found else []


def _below(kind: Any, key: str) -> Any:
    """The annotation of `key` in a record, a dict, a list, or whichever of a union has it."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_fields[key].annotation if key in kind.model_fields else None
    if get_origin(kind) in (dict, list):
        return get_args(kind)[-1]
    if get_origin(kind) in (Union, UnionType):
        return next((found for part in get_args(kind) if (found := _below(part, key)) is not None), None)
    return None
