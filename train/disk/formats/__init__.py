"""SAEs in the folders of other tools, converted to and from one plain form.

sae_lens             cfg.json, sae_weights.safetensors     what this package writes itself
sparsify             cfg.json, sae.safetensors             top-k only
dictionary_learning  trainer's config.json, ae.safetensors
gemma_scope          params.npz                            read only
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...data.scaling import unit_stats
from ...errors import SaeInvalid, TrainError
from ..plain_form import Metadata, PlainSae, in_raw_units, sae_from_plain
from ..sae_lens_folder import load_plain_sae, read_config, save_sae
from . import dictionary_learning, gemma_scope, sparsify


def _write_own(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    sae = sae_from_plain(plain)
    details = metadata.get("training_architecture_details")
    details = details if isinstance(details, dict) else {}
    variant = metadata.get("training_architecture", plain.architecture)
    save_sae(folder, sae, unit_stats(sae.d_in), metadata, details, variant, unit_stats(sae.d_out))


def _read_own(folder: Path) -> tuple[PlainSae, Metadata]:
    config = read_config(folder)
    if "needs_side" in config:
        named = str(config.get("architecture")).removeprefix("saemill_")
        to_tracer = ", or export it to circuit_tracer" if named == "clt" else ""
        raise SaeInvalid(
            f"{folder}: expected an SAE that consists of its weights and a gate, found one of {named} with an encoder "
            f"of its own, for which other tools have no format. Keep its folder, which load_sae opens{to_tracer}"
        )
    sae = load_plain_sae(folder)
    return in_raw_units(sae), dict(sae.metadata)


READERS: dict[str, Callable[[Path], tuple[PlainSae, Metadata]]] = {
    "sae_lens": _read_own,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
    "gemma_scope": gemma_scope.read,
}
WRITERS: dict[str, Callable[[Path, PlainSae, Metadata], None]] = {
    "sae_lens": _write_own,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
}
FILES = {
    "sae_weights.safetensors": "sae_lens",
    "sae.safetensors": "sparsify",
    "ae.safetensors": "dictionary_learning",
    "ae.pt": "dictionary_learning",
    gemma_scope.PARAMS: "gemma_scope",
}


def kind_of(folder: Path) -> str:
    """The tool that a folder belongs to, by its files."""
    for name, kind in FILES.items():
        if (folder / name).is_file():
            return kind
    known = ", ".join(f"{name} ({kind})" for name, kind in FILES.items())
    raise SaeInvalid(f"{folder}: expected one of {known}, found none of them")


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    """Read the SAE of a folder of any of these kinds."""
    try:
        return READERS[kind_of(folder)](folder)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, TrainError):
            raise
        raise SaeInvalid(f"{folder}: its tensors do not fit together ({error}); copy or export it again") from None
