"""The registry: every file in this folder is a source of documents; `source` has their contract."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ...cache_schema.users_own_files import with_users_files
from ..errors import SettingInvalid, SourceInvalid
from .source import Corpus, DatasetOptions, Source

__path__ = with_users_files(__path__, "harvest/corpus")

CONTRACT = "source"


@cache
def sources() -> dict[str, Source]:
    """All sources by name, in the order they are tried."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name != CONTRACT]
    found = {name: _load(name) for name in names}
    return dict(sorted(found.items(), key=lambda item: (item[1].rank, item[0])))


def _load(name: str) -> Source:
    found = getattr(importlib.import_module(f"{__name__}.{name}"), "SOURCE", None)
    if not isinstance(found, Source):
        raise SourceInvalid(f"harvest/corpus/{name}.py: expected SOURCE = Source(...), found {found!r}")
    return found


def source_of(options: DatasetOptions) -> Source:
    """The first source that takes the user's --dataset."""
    return next(source for source in sources().values() if source.takes(options))


def refuse_unused(options: DatasetOptions) -> None:
    """Refuse options given with --dataset that would have no effect."""
    heeds = source_of(options).heeds
    for name, option in options.given.items():
        if name not in heeds:
            raise SettingInvalid(f"{option} has no effect with --dataset {options.dataset}. Leave it out")


def open_corpus(options: DatasetOptions) -> Corpus:
    """Open the corpus that the user names."""
    return source_of(options).open(options)


def dataset_help() -> str:
    """The help text of --dataset."""
    *others, last = (source.help for source in sources().values())
    return f"{', '.join(others)}, or {last}"
