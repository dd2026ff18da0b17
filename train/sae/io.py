"""SAEs on disk: a folder with cfg.json and sae_weights.safetensors.

`save_sae` writes the layout that SAELens opens as it stands (6.54), for every SAE that its
architectures can express; one with several input layers, or with another target, has the same files
with an architecture of our own name. `load_plain_sae` reads both, and SAELens folders from elsewhere.
Files are written beside their place and renamed; cfg.json comes last, so a folder that has one is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SaeInvalid
from .export_form import PlainSae, plain_sae, sae_from_plain
from .model import SparseAutoencoder
from .scaling import Stats

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
PLAIN = ("standard", "topk", "jumprelu", "gated")
TENSORS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}


def save_sae(
    folder: Path,
    sae: SparseAutoencoder,
    stats: Stats,
    metadata: Mapping[str, Any],
    config: Mapping[str, Any],
    variant: str,
    target_stats: Stats | None = None,
) -> None:
    """Write a trained SAE, its scale folded in and its decoder rows of length one."""
    plain = plain_sae(sae, stats, target_stats or stats)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = _config_of(plain, variant, metadata, config)
    _write(folder / WEIGHTS, lambda path: save_file(plain.tensors, path))
    _write(folder / CONFIG, lambda path: path.write_text(json.dumps(written, indent=1) + "\n"))


def load_plain_sae(folder: Path) -> SparseAutoencoder:
    """The SAE of a folder, in raw units and float32; its `metadata` is that of cfg.json."""
    folder = Path(folder)
    config = read_config(folder)
    architecture = config.get("gate", config.get("architecture"))
    if architecture not in PLAIN:
        raise SaeInvalid(f"{folder}: expected an architecture of {', '.join(PLAIN)}, found {architecture!r}")
    if config.get("normalize_activations", "none") not in ("none", "expected_average_only_in"):
        raise SaeInvalid(
            f"{folder}: normalize_activations is {config['normalize_activations']!r}, which cannot be folded into "
            "weights; save the SAE with normalize_activations 'none'"
        )
    tensors = _read_tensors(folder, TENSORS[architecture])
    plain = PlainSae(architecture, tensors, config.get("k"), config.get("apply_b_dec_to_input", True))
    if config.get("rescale_acts_by_decoder_norm", False):
        plain = _with_norms_folded(plain)
    sae = sae_from_plain(plain)
    sae.metadata = {**config.get("metadata", {})}
    return sae


def read_config(folder: Path) -> dict[str, Any]:
    """cfg.json of an SAE's folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise SaeInvalid(f"{folder}: expected an SAE's folder with {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SaeInvalid(f"{path}: expected JSON, found {error}; copy or export the SAE again") from error
    if not isinstance(config, dict):
        raise SaeInvalid(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _config_of(plain: PlainSae, variant: str, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    d_in, width = plain.tensors["W_enc"].shape
    expressible = plain.centres_input and len(metadata.get("layers", [0])) == 1
    written = {
        "architecture": plain.architecture if expressible else f"saemill_{variant}",
        "d_in": d_in,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": plain.centres_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            **metadata,
            "training_architecture": variant,
            "training_architecture_details": dict(config),
        },
    }
    if not expressible:
        written |= {"gate": plain.architecture, "d_out": plain.tensors["W_dec"].shape[1]}
    if plain.k is not None:
        written |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    return written


def _read_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise SaeInvalid(f"{folder}: expected {WEIGHTS} beside {CONFIG}, found none")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise SaeInvalid(f"{path}: damaged ({error}); copy or export the SAE again") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise SaeInvalid(f"{path}: expected tensors {', '.join(names)}, lacks {', '.join(missing)}")
    return {name: tensors[name].to(torch.float32) for name in names}


def _with_norms_folded(plain: PlainSae) -> PlainSae:
    """The same SAE with codes in multiples of its decoder rows' lengths."""
    tensors = dict(plain.tensors)
    lengths = torch.linalg.vector_norm(tensors["W_dec"], dim=1)
    tensors["W_enc"] = tensors["W_enc"] * lengths
    tensors["W_dec"] = tensors["W_dec"] / lengths[:, None]
    for name in ("b_enc", "threshold"):
        if name in tensors:
            tensors[name] = tensors[name] * lengths
    return replace(plain, tensors=tensors)


def _write(path: Path, write: Any) -> None:
    """Write beside the place, flush, rename."""
    beside = path.with_name(path.name + ".partial")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
