"""Frozen dataclasses to JSON and back, strictly.

Reading collects every problem before it raises, each with the path of its value (`model.d_model: expected a whole
number, found 'x'`); an unknown key is a problem, reported with similar names. Nothing is coerced except types that
JSON lacks: lists become tuples, integers become floats where a float is declared, and object keys become integers
where the mapping is declared with integer keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

LATER = "later"
"""In a field's metadata: added after stores had been written, so omitted from the JSON if empty."""

_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
_hints_of = cache(typing.get_type_hints)  # resolving hints takes longer than reading a record
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)  # as written by `str`, so that each integer has one form


class StrictError(ValueError):
    """One or more values do not fit the dataclass they were read into."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def to_json(value: Any) -> Any:
    """The plain JSON value of a dataclass, mapping, sequence or scalar."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: to_json(item) for name, (field, item) in fields.items() if item or not field.metadata.get(LATER)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):  # there may be millions of numbers
        return list(value) if set(map(type, value)) <= _SCALARS.keys() else [to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def from_json(cls: type[T], raw: Any, where: str = "") -> T:
    """Read `raw` as the dataclass `cls`; raise `StrictError` with every problem found."""
    problems: list[str] = []
    value = _read(cls, raw, where, problems)
    if problems:
        raise StrictError(problems)
    return value


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested objects, by dotted names; an empty object counts as a value."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or all known names if none is similar. Dotted names also match by their last part."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    if not close:
        last = {one: one.rpartition(".")[2] for one in known}
        parts = difflib.get_close_matches(name.rpartition(".")[2], set(last.values()), n=2)
        close = [one for part in parts for one in known if last[one] == part][:2]
    if close:
        return " (did you mean " + " or ".join(repr(item) for item in close) + "?)"
    return f" (known: {', '.join(known)})" if known else ""


def _read(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    """Dispatch on the declared type; append to `problems` instead of raising."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return raw
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), raw, where, problems)
    if origin in (typing.Union, types.UnionType):
        return _read_union(kind, raw, where, problems)
    if origin is typing.Literal:
        return _read_literal(kind, raw, where, problems)
    if origin in (tuple, list):
        return _read_sequence(kind, origin, raw, where, problems)
    if origin in (dict, Mapping):
        return _read_mapping(kind, raw, where, problems)
    return _read_scalar(kind, raw, where, problems)


def _read_dataclass(cls: type, raw: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        return _mismatch(where, "an object", raw, problems)
    hints, fields = _hints_of(cls), {field.name: field for field in dataclasses.fields(cls) if field.init}
    before = len(problems)
    for key in raw:
        if key not in fields:
            problems.append(f"{_join(where, key)}: unknown key{nearest(str(key), fields)}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _read(hints[name], raw[name], _join(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{where or cls.__name__}: {error}")
        return None


def _read_union(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    options = typing.get_args(kind)
    if raw is None and type(None) in options:
        return None
    attempts = []
    for option in options:
        if option is type(None):
            continue
        found: list[str] = []
        value = _read(option, raw, where, found)
        if not found:
            return value
        attempts.append(found)
    problems.extend(min(attempts, key=len))
    return None


def _read_literal(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    allowed = typing.get_args(kind)
    if any(raw == option and type(raw) is type(option) for option in allowed):
        return raw
    return _mismatch(where, "one of " + ", ".join(repr(option) for option in allowed), raw, problems)


def _read_sequence(kind: Any, origin: type, raw: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(raw, (list, tuple)):
        return _mismatch(where, "a list", raw, problems)
    args = typing.get_args(kind)
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(raw) != len(args):
            return _mismatch(where, f"{len(args)} items", raw, problems)
        kinds = list(args)
    elif args[0] in _SCALARS and set(map(type, raw)) <= {args[0]}:  # fast path: there may be millions
        return origin(raw)
    elif typing.get_origin(args[0]) is tuple and _are_rows(raw, typing.get_args(args[0])):  # fast path, likewise
        return origin(map(tuple, raw))
    else:
        kinds = [args[0]] * len(raw)
    items = zip(kinds, raw, strict=True)
    return origin(_read(item_kind, item, f"{where}[{i}]", problems) for i, (item_kind, item) in enumerate(items))


def _are_rows(raw: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether all items are lists of exactly these types."""
    return set(map(type, raw)) <= {list} and {tuple(map(type, row)) for row in raw} <= {kinds}


def _read_mapping(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        return _mismatch(where, "an object", raw, problems)
    key_kind, value_kind = typing.get_args(kind)
    result = {}
    for key, item in raw.items():
        if key_kind is int and not isinstance(key, int):
            if not _INTEGER.fullmatch(str(key)):
                problems.append(f"{_join(where, key)}: expected an integer key")
                continue
            key = int(key)
        result[key] = _read(value_kind, item, _join(where, key), problems)
    return result


def _read_scalar(kind: Any, raw: Any, where: str, problems: list[str]) -> Any:
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        try:
            return float(raw)
        except OverflowError:
            return _mismatch(where, "a number of at most 1.8e308", raw, problems)
    if isinstance(raw, kind) and (kind is bool or not isinstance(raw, bool)):
        return raw
    return _mismatch(where, _SCALARS.get(kind, kind.__name__), raw, problems)


def _mismatch(where: str, expected: str, raw: Any, problems: list[str]) -> None:
    shown = repr(raw)
    problems.append(
        f"{where or 'value'}: expected {expected}, found {shown[:77] + '...' if len(shown) > 80 else shown}"
    )


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
