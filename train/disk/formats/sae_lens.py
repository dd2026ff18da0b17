"""SAELens: cfg.json and sae_weights.safetensors, also this package's own layout, read and written by `sae_folder`."""

from __future__ import annotations

from pathlib import Path

from ...data.scaling import unit_stats
from ..plain_form import Metadata, PlainSae, in_raw_units, sae_from_plain
from ..sae_folder import load_plain_sae, save_sae


def write(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    sae = sae_from_plain(plain)
    stats = unit_stats(sae.d_in)
    told = metadata.get("training_architecture_details")
    details = told if isinstance(told, dict) else {}
    variant = metadata.get("training_architecture", plain.architecture)
    save_sae(folder, sae, stats, metadata, details, variant, unit_stats(sae.d_out))


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    sae = load_plain_sae(folder)
    return in_raw_units(sae), dict(sae.metadata)
