"""Train sparse autoencoders from a store; never loads a language model.

`saemill.train(variant="topk", cache="./store")` trains, with the words of `sae-train`, and gives the run.
"""

from typing import TYPE_CHECKING, Any

from .. import make_callable

if TYPE_CHECKING:
    from .run.find_and_load_sae import load_sae

__all__ = ["load_sae"]

make_callable(__name__)


def __getattr__(name: str) -> Any:
    """Late: what only asks for names must not wait for torch."""
    if name == "load_sae":
        from .run.find_and_load_sae import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
