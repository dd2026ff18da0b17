"""saemill: harvest a language model's activations once, train every sparse autoencoder from the store.

    from saemill import Store, evaluate, harvest, load_sae, train

    store = harvest(model="pocket", layer=19, tokens="300k", out="./store")
    run = train(cache=store, variant="topk", epochs=2)
    evaluate(run)

The repository root is this package. Its rooms are `cache_schema` (the store), `harvest` (model to
store), `train` (store to SAE, never a language model), `evaluate` (SAE to numbers), `studies` (recipes to tables) and
`api` (harvest, train and evaluate as functions). Nothing is imported before it is asked for.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.calls import evaluate, harvest, train
    from .api.store import Store
    from .train.run.find_and_load_sae import load_sae

__all__ = ["Store", "evaluate", "harvest", "load_sae", "train"]
__version__ = "0.1.0"

# Threads that wait for each other spin, on a busy machine while others hold the core. This spin count costs nothing on
# a quiet machine (60k tokens of the pocket model on two cores: 12.1 s, 12.4 without) and saves much beside other work.
# torch's OpenMP reads it when it is loaded, which is after this.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_PLACES = {"Store": ".api.store", "load_sae": ".train.run.find_and_load_sae"}


def __getattr__(name: str) -> Any:
    """Public names, each imported when it is first asked for."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name], __name__), name)
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Verb(ModuleType):
    """A package that can also be called, by the function of its name in `api/calls.py`.

    `harvest`, `train` and `evaluate` are packages and the three verbs. A function of that name here would be replaced
    by the package as soon as anyone imports a module of it, so the packages themselves answer to a call: Python lets a
    module take a class of its own (`__class__`, the data model's "Customizing module attribute access").
    """

    def __call__(self, *targets: Any, **words: Any) -> Any:
        return self._function(*targets, **words)

    @property
    def __signature__(self) -> Any:
        """For whoever asks before they type: `inspect.signature`, notebooks."""
        return import_module("saemill.api.command_words").signature_of(self._name)

    @property
    def _name(self) -> str:
        return self.__name__.rpartition(".")[2]

    @property
    def _function(self) -> Any:
        return getattr(import_module("saemill.api.calls"), self._name)


def make_callable(package: str) -> None:
    """Called by the packages that are verbs."""
    sys.modules[package].__class__ = _Verb
