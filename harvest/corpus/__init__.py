"""The registry: every file in this folder is a source of documents; `source` defines what such a file contains."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ...cache_schema.users_own_files import and_own
from ..errors import SettingInvalid, SourceInvalid
from .source import Corpus, DatasetOptions, Source

__path__ = and_own(__path__, "harvest/corpus")

CONTRACT = "source"


@cache
def sources() -> dict[str, Source]:
    """All sources by name, in the order in which they are tried."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name != CONTRACT]
    found = {name: _load(name) for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def _load(name: str) -> Source:
    found = getattr(importlib.import_module(f"{__name__}.{name}"), "SOURCE", None)
    if not isinstance(found, Source):
        raise SourceInvalid(f"harvest/corpus/{name}.py: expected SOURCE = Source(...), found {found!r}")
    return found


def source_of(options: DatasetOptions) -> Source:
    """The first source that takes what the user names."""
    return next(source for source in sources().values() if source.takes(options))


def require_heeded(options: DatasetOptions) -> None:
    """Refuse options given with --dataset that would have no effect."""
    heeds = source_of(options).heeds
    for name, words in options.beside.items():
        if name not in heeds:
            raise SettingInvalid(f"{words} has no effect with --dataset {options.dataset}. Leave it out")


def open_corpus(options: DatasetOptions) -> Corpus:
    """The corpus that the user names."""
    return source_of(options).open(options)


def dataset_help() -> str:
    """What --dataset may be."""
    *others, last = (source.help for source in sources().values())
    return f"{', '.join(others)}, or {last}"
