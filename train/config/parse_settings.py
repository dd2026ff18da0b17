"""Parse command-line words (`a.b=value`, and grids of them) to typed values, and set them in records."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ...cache_schema.strict_json import StrictError, flatten, from_json, nearest, to_json
from ..errors import ConfigInvalid

T = TypeVar("T")
ALIASES = {"lr": "optim.lr"}
_UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}


def split_key(key: str) -> tuple[str, str]:
    """The part before the first dot, and the part after it."""
    head, _, rest = key.partition(".")
    return head, rest


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` words, by key. The last value of a key counts, so that a script's can be overridden."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigInvalid(f"expected a setting like optim.lr=1e-4, found {word!r}")
        settings[key.strip()] = parse_value(value.strip())
    return settings


def parse_grid(words: Iterable[str]) -> list[dict[str, Any]]:
    """The settings of each point of the grid that `k=16,32` words span. A key may be given only once, because only its
    last values would count."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not values:
            raise ConfigInvalid(f"expected a grid like k=16,32,64, found {word!r}")
        key = ALIASES.get(key.strip(), key.strip())
        if key in axes:
            raise ConfigInvalid(
                f"expected {key} once in a grid, found it in several --grid options: give all its values in one"
            )
        outside_brackets = re.split(r",(?![^\[]*\])", values)
        axes[key] = [parse_value(value.strip()) for value in outside_brackets]
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def parse_value(text: str) -> Any:
    """Parse JSON, a number with a unit such as `50M`, or a list separated by commas."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB])", text)
    if number:
        value = float(number[1]) * _UNITS[number[2]]
        return round(value) if math.isfinite(value) else text
    try:  # NaN, Infinity and numbers too large to represent stay strings: no setting takes them
        return json.loads(text, parse_constant=str, parse_int=_if_finite(int), parse_float=_if_finite(float))
    except (json.JSONDecodeError, RecursionError):
        pass
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    return [parse_value(part) for part in text.split(",")] if "," in text else text


def _if_finite(kind: Callable[[str], T]) -> Callable[[str], T | str]:
    return lambda text: kind(text) if math.isfinite(float(text)) else text


def with_settings(record: T, settings: Mapping[str, Any], where: str) -> T:
    """The record with dotted keys replaced; all unknown keys in one error. A lone value becomes a list where needed."""
    raw, problems = to_json(record), []
    known = flatten(raw)
    for key, value in settings.items():
        path = key.split(".")
        if not _assign(raw, path, _as_list(value) if _wants_list(type(record), path) else value):
            problems.append(f"unknown setting {key!r} of {where}{nearest(key, known)}")
    if problems:
        raise ConfigInvalid("; ".join(problems))
    try:
        return from_json(type(record), raw, where)
    except StrictError as error:
        raise ConfigInvalid(str(error)) from None


def _assign(raw: dict[str, Any], path: list[str], value: Any) -> bool:
    if path[0] not in raw:
        return False
    if len(path) == 1:
        raw[path[0]] = value
        return True
    return isinstance(raw[path[0]], dict) and _assign(raw[path[0]], path[1:], value)


def _wants_list(kind: Any, path: list[str]) -> bool:
    """Whether the setting at this path is declared as a list."""
    for name in path:
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return any(typing.get_origin(option) in (tuple, list) for option in options)


def _as_list(value: Any) -> Any:
    """`zero` and `5` become lists of one item, an empty string an empty list."""
    if value is None or isinstance(value, list | tuple):
        return value
    return [] if value == "" else [value]
