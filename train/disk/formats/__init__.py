"""SAEs in the folders of other tools, to and from one plain form.

sae_lens             cfg.json, sae_weights.safetensors     what this package writes itself
sparsify             cfg.json, sae.safetensors             top-k alone
dictionary_learning  trainer's config.json, ae.safetensors
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import SaeInvalid, TrainError
from ..plain_form import PlainSae
from . import dictionary_learning, sae_lens, sparsify
from .plain import Metadata

READERS: dict[str, Callable[[Path], tuple[PlainSae, Metadata]]] = {
    "sae_lens": sae_lens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
}
WRITERS: dict[str, Callable[[Path, PlainSae, Metadata], None]] = {
    "sae_lens": sae_lens.write,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
}


def kind_of(folder: Path) -> str:
    """Whose folder it is, by the files in it."""
    if (folder / "sae_weights.safetensors").is_file():
        return "sae_lens"
    if (folder / "sae.safetensors").is_file():
        return "sparsify"
    if (folder / "ae.safetensors").is_file() or (folder / "ae.pt").is_file():
        return "dictionary_learning"
    raise SaeInvalid(
        f"{folder}: expected sae_weights.safetensors (SAELens), sae.safetensors (sparsify), "
        "ae.safetensors or ae.pt (dictionary_learning), found none of them"
    )


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    """The SAE of any of the three kinds of folder."""
    try:
        return READERS[kind_of(folder)](folder)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TrainError):
            raise
        raise SaeInvalid(f"{folder}: its tensors cannot be put together ({error}); copy or export it again") from None
