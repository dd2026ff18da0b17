"""Train sparse autoencoders from a store; no language model is loaded.

`saemill.train(variant="topk", cache="./store")` takes the options of `sae-train` and returns the run.
"""

from typing import TYPE_CHECKING, Any

from .. import make_callable

if TYPE_CHECKING:
    from .run.find_and_load_sae import load_sae

__all__ = ["load_sae"]

make_callable(__name__)


def __getattr__(name: str) -> Any:
    """Imported late: asking for names alone must not wait for torch."""
    if name == "load_sae":
        from .run.find_and_load_sae import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
