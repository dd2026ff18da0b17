"""Keyword arguments to the words of a command: one way to say things, and one place that reads them.

`train(variant="topk", grid={"k": [16, 32]}, tokens="50M")` is read by `sae-train`'s own options, so that both take,
default and refuse the same.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import click
import numpy as np
import torch

from ..cache_schema import Store
from ..cache_schema.strict_json import nearest
from ..evaluate.cli import main as sae_eval
from ..harvest.cli import main as sae_harvest
from ..train.cli import main as sae_train

COMMANDS: Mapping[str, click.Command] = {"harvest": sae_harvest, "train": sae_train, "evaluate": sae_eval}
FOR_SHELLS = ("is_json", "is_dry_run")
LISTS = ("resid_layers", "attention_layers", "hooks", "leave_out", "evals")  # options of several words between commas


def words_of(verb: str, targets: Iterable[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the verb's command by their names, with its defaults where nothing is given."""
    options = _options(verb)
    unknown = [name for name in given if name not in options]
    if unknown:
        raise TypeError(f"{verb}() has no argument {unknown[0]!r}{nearest(unknown[0], options)}")
    try:
        words = [word for name, value in given.items() if value is not None for word in _say(options[name], value)]
        return COMMANDS[verb].make_context(verb, [*words, "--", *map(_text, targets)]).params
    except click.UsageError as error:
        raise ValueError(f"{verb}(): {error.format_message()}") from None


def signature_of(verb: str) -> inspect.Signature:
    """What the verb takes."""
    keyword, several = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
    targets = [inspect.Parameter("targets", several)] if verb == "evaluate" else []
    defaults = {name: _default(option) for name, option in _options(verb).items()}
    return inspect.Signature(
        [*targets, *(inspect.Parameter(name, keyword, default=default) for name, default in defaults.items())]
    )


def _options(verb: str) -> dict[str, click.Option]:
    found = [option for option in COMMANDS[verb].params if isinstance(option, click.Option)]
    return {option.name: option for option in found if option.name and option.name not in FOR_SHELLS}


def _default(option: click.Option) -> Any:
    if isinstance(option.default, (str, int, float)):
        return option.default
    return False if option.is_flag else () if option.multiple else None


def _say(option: click.Option, value: Any) -> list[str]:
    """An option as one would type it."""
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name] if value else list(option.secondary_opts)
    if not option.multiple:
        if _is_list(value) and option.name not in LISTS:
            advice = "train() takes several values of a setting as grid={'k': [16, 32]}"
            raise click.BadParameter(f"expected one value, found {value!r}: {advice}", param=option)
        return [f"{name}={_text(value) or ('none' if _is_list(value) else '')}"]
    if isinstance(value, Mapping):
        value = [f"{key}={_text(item)}" for key, item in value.items()]
    return [f"{name}={_text(item)}" for item in (value if _is_list(value) else [value])]


def _text(value: Any) -> str:
    """A value as one would type it: lists with commas, what lies somewhere by its place."""
    if isinstance(value, Store):
        return value.url
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, torch.device):
        return str(value)
    if _is_list(value):
        return ",".join(json.dumps(item, default=_plain) if _is_list(item) else _text(item) for item in value)
    return json.dumps(value, default=_plain)


def _is_list(value: Any) -> bool:
    """Also a range, an array or a set."""
    return isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, Mapping))


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers, and lists of other kinds."""
    if isinstance(value, np.generic):
        return value.item()
    if _is_list(value):
        return list(value)
    raise TypeError(f"expected text, a path, a number or a list of them, found {value!r}")
