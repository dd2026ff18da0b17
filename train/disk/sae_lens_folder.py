"""SAEs on disk, in our own format, which is SAELens': a folder with cfg.json and sae_weights.safetensors.

`save_sae` writes the layout that SAELens opens directly (6.54), for every SAE that its architectures can express.
Others (several input layers, an unsupported target, special inference) have the same files with an architecture name of
our own. `read_sae` reads all of them, and SAELens folders from elsewhere. Modules that trained along (`extras`) are in
extras.safetensors. Files are written under a temporary name and renamed; cfg.json comes last, so a folder that has one
is complete.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...cache_schema.disk_and_cloud_files import make_folder
from ...cache_schema.numbers_in_words import first_line
from ...cache_schema.sites import RESID
from ..data.scaling import Stats
from ..errors import ConfigInvalid, SaeInvalid, TrainError
from ..sae.model import SparseAutoencoder
from .atomic_files import read_json, replace_file, replace_written
from .module_form import (
    SCALE,
    TARGET_SCALE,
    Rebuild,
    build_without_values,
    module_form,
    require_tensors,
    sae_from_module_form,
)
from .plain_form import PlainSae, plain_sae, require_shapes, sae_from_plain

CONFIG, WEIGHTS, EXTRAS = "cfg.json", "sae_weights.safetensors", "extras.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".npz")  # of this package and of other tools
NORM_BOUNDS = "norm_bounds"  # in the metadata: for each place, the norm above which rows were not trained on
SAELENS_VERSION = "6.54.12"
TRANSCODERS = {  # SAELens' names, and their gates; none subtracts the decoder's bias from its input
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_AFFINE = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {  # tensors of each plain architecture
    "standard": _AFFINE,
    "topk": _AFFINE,
    "abstopk": _AFFINE,
    "jumprelu": (*_AFFINE, "threshold"),
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
    knobs: Mapping[str, float] | None = None,
) -> None:
    """Write a trained SAE, with its scale folded in and decoder rows of length one."""
    target_stats = target_stats or stats
    if sae.is_plain:
        plain = plain_sae(sae, stats, target_stats)
        tensors, form = plain.tensors, _plain_form(plain, variant, metadata)
    else:
        tensors = module_form(sae, stats, target_stats)
        form = {
            "architecture": f"saemill_{variant}",
            "d_in": sae.d_in,
            "d_sae": sae.num_latents,
            "d_out": sae.d_out,
            "apply_b_dec_to_input": sae.centres_input,
            "needs_side": list(sae.needs_side),
            "knobs": dict(knobs or {}),
        }
    make_folder(folder)
    for leftover in folder.glob(".*.tmp"):  # of a killed process: only one process at a time writes an SAE
        leftover.unlink(missing_ok=True)
    written = _config_of(form, variant, metadata, config)
    replace_written(folder / WEIGHTS, lambda path: save_file(tensors, path))
    extras = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.extras.state_dict().items()}
    if extras:
        replace_written(folder / EXTRAS, lambda path: save_file(extras, path))
    replace_file(folder / CONFIG, json.dumps(written, indent=1).encode() + b"\n")


def read_sae(folder: Path, rebuild: Rebuild) -> SparseAutoencoder:
    """Read the SAE of a folder, in raw units and float32; its `metadata` is that of cfg.json."""
    config = read_config(folder)
    sae = _read_module_form(folder, config, rebuild) if "needs_side" in config else load_plain_sae(folder)
    sae.extras_tensors = read_tensors(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}
    return sae


def load_plain_sae(folder: Path) -> SparseAutoencoder:
    """The same for an SAE that is fully described by its weights."""
    config = upgrade_config(read_config(folder), folder)
    named = config.get("architecture")
    architecture = config.get("gate", TRANSCODERS.get(str(named), named))
    if architecture not in TENSORS:
        raise SaeInvalid(f"{folder}: expected an architecture among {', '.join(TENSORS)}, found {architecture!r}")
    if config["normalize_activations"] != "none":
        raise SaeInvalid(
            f"{folder}: expected weights for the model's raw activations, found normalize_activations "
            f"{config['normalize_activations']!r}. If that is expected_average_only_in, fold the factor into them "
            "with SAELens (fold_activation_norm_scaling_factor) and save the SAE again; other kinds cannot be folded"
        )
    names = TENSORS[architecture]
    found = read_tensors(folder / WEIGHTS, names)
    wanted = (*names, "W_skip") if "W_skip" in found else names
    tensors = {name: found[name].to(torch.float32) for name in wanted}
    centres_input = str(named) not in TRANSCODERS and config.get("apply_b_dec_to_input", True)
    plain = PlainSae(architecture, tensors, config.get("k"), centres_input)
    require_shapes(plain)
    if config.get("rescale_acts_by_decoder_norm", False):
        plain = _fold_norms(plain)
    sae = sae_from_plain(plain)
    sae.metadata = metadata_of(config)
    kwargs = sae.metadata.get("model_from_pretrained_kwargs")
    if isinstance(kwargs, dict) and kwargs.get("center_writing_weights"):
        warnings.warn(
            f"{folder}: it was trained on residuals with their mean subtracted (center_writing_weights), but here "
            "residuals are the model's own: its numbers are for activations that it was not trained on",
            stacklevel=2,
        )
    return sae


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a configuration; a transcoder that names no layers is marked as one."""
    metadata, is_transcoder = config.get("metadata", {}), str(config.get("architecture")) in TRANSCODERS
    names_layers = metadata.get("layers") and metadata.get("target_layers")
    return {**metadata, "transcodes": True} if is_transcoder and not names_layers else dict(metadata)


def upgrade_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration under SAELens 6.0's names; earlier versions named or placed some settings differently."""
    activation = config.get("activation_fn_str", config.get("activation_fn")) or "relu"
    factor = config.get("finetuning_scaling_factor") or 1
    if activation not in ("relu", "topk") or factor is True or factor != 1:
        raise SaeInvalid(
            f"{folder}: expected relu or topk as activation and no finetuning_scaling_factor, found {activation!r} and "
            f"{factor!r}, which no plain form computes"
        )
    form: dict[str, Any] = {"architecture": config.get("architecture") or "standard"}
    if activation == "topk":
        kwargs = config.get("activation_fn_kwargs")
        form = {"architecture": "topk", "k": config.get("k"), **(kwargs if isinstance(kwargs, dict) else {})}
    form |= {"normalize_activations": config.get("normalize_activations") or "none"}
    name = config.get("hook_name") or config.get("hook_point")
    place = {"hook_name": name} if name else {}
    place |= {key: config[key] for key in ("model_name", "model_from_pretrained_kwargs") if config.get(key)}
    return {**config, **form, "metadata": {**place, **config.get("metadata", {})}}


def is_of_one_place(metadata: Mapping[str, Any]) -> bool:
    """Whether the SAE reads one layer and reconstructs its input, the only kind that other tools support."""
    layers = metadata.get("layers") or [None]
    targets = metadata.get("target_layers") or layers
    hook = metadata.get("hook", RESID)
    is_one = len(layers) == 1 and targets == layers and metadata.get("target_hook", hook) == hook
    return is_one and not metadata.get("transcodes", False)


def architecture_of(plain: PlainSae, metadata: Mapping[str, Any]) -> str | None:
    """SAELens' name for the architecture; None if it has none."""
    if is_of_one_place(metadata):
        return plain.architecture if "W_skip" not in plain.tensors else None
    is_from_one_to_one = [len(metadata.get(name) or ()) for name in ("layers", "target_layers")] == [1, 1]
    if plain.centres_input or not is_from_one_to_one:
        return None
    kind = "skip_transcoder" if "W_skip" in plain.tensors else "transcoder"
    return {"standard": kind, "jumprelu": f"jumprelu_{kind}"}.get(plain.architecture)


CONFIG_TYPES = {
    "architecture": (str, type(None)),
    "gate": (str, type(None)),
    "metadata": (dict,),
    "knobs": (dict,),
    "needs_side": (list,),
}


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise SaeInvalid(f"{folder}: expected an SAE's folder with {CONFIG} and {WEIGHTS}, found no {CONFIG}")
    try:
        config = read_json(path)
    except ConfigInvalid as error:
        raise SaeInvalid(f"{error}, or export the SAE again") from error
    for name, kinds in CONFIG_TYPES.items():
        if name in config and not isinstance(config[name], kinds):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise SaeInvalid(f"{path}: expected {name} as a {expected}, found {config[name]!r:.60}")
    return config


def _read_module_form(folder: Path, config: Mapping[str, Any], rebuild: Rebuild) -> SparseAutoencoder:
    tensors, metadata = read_tensors(folder / WEIGHTS), config.get("metadata", {})
    for name, kind in (("training_architecture", str), ("training_architecture_details", dict)):
        if not isinstance(metadata.get(name), kind):
            raise SaeInvalid(
                f"{folder / CONFIG}: expected metadata.{name} as a {kind.__name__}, found {metadata.get(name)!r:.60}"
            )
    d_in = tensors[SCALE].numel() if SCALE in tensors else 0
    if config.get("d_in") != d_in:  # before memory is allocated for it
        raise SaeInvalid(f"{folder / CONFIG}: expected d_in {d_in} by its weights, found {config.get('d_in')!r}")
    d_out = tensors[TARGET_SCALE].numel() if TARGET_SCALE in tensors else d_in
    built = metadata["training_architecture"], metadata["training_architecture_details"], d_in, d_out
    try:
        inner = build_without_values(lambda: rebuild(*built))
        if inner is not None:  # refuse other tensors before allocating memory
            require_tensors(tensors, inner, str(folder))
        sae = sae_from_module_form(tensors, config.get("knobs", {}), rebuild(*built), str(folder))
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TrainError):
            raise
        reason = first_line(error)
        raise SaeInvalid(f"{folder}: no {built[0]} can be built from its settings ({reason}): copy it again") from None
    sae.metadata = dict(metadata)
    return sae


def _plain_form(plain: PlainSae, variant: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The part of cfg.json that defines how to compute with the tensors."""
    d_in, width = plain.tensors["W_enc"].shape
    architecture = architecture_of(plain, metadata)
    form: dict[str, Any] = {
        "architecture": architecture or f"saemill_{variant}",
        "d_in": d_in,
        "d_sae": width,
        "apply_b_dec_to_input": plain.centres_input,
    }
    if architecture != plain.architecture:
        form |= {"gate": plain.architecture, "d_out": plain.tensors["W_dec"].shape[1]}
    if architecture in TRANSCODERS:
        name = metadata.get("hook_name_out", "")
        form |= {"hook_name_out": name, "hook_layer_out": metadata["target_layers"][0], "hook_head_index_out": None}
    if plain.k is not None:
        form |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    return form


def _config_of(
    form: Mapping[str, Any], variant: str, metadata: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **form,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        # In the model SAELens reads `z` head by head.
        "reshape_activations": "hook_z" if str(metadata.get("hook_name")).endswith("_z") else "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            **metadata,
            "training_architecture": variant,
            "training_architecture_details": dict(config),
        },
    }


def read_tensors(path: Path, names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read all tensors of a file in an SAE's folder; those with these names must be there."""
    with _readable(path):
        found = load_file(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise SaeInvalid(f"{path}: expected tensors {', '.join(names)}, found none of {', '.join(missing)}")
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """Read a single tensor of a file in an SAE's folder."""
    with _readable(path), safe_open(path, "pt") as file:
        return file.get_tensor(name)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a file in an SAE's folder, from its header alone."""
    with _readable(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Report a file that is missing or damaged."""
    if not path.is_file():
        raise SaeInvalid(f"{path.parent}: expected {path.name}, found none: copy or export the SAE again")
    try:
        yield
    except SafetensorError as error:
        raise SaeInvalid(f"{path}: damaged ({error}); copy, download or export the SAE again") from None


def _fold_norms(plain: PlainSae) -> PlainSae:
    """The same SAE with codes in multiples of its decoder rows' lengths; almost zero for rows of zeros."""
    lengths = torch.linalg.vector_norm(plain.tensors["W_dec"], dim=1).clamp_min(1e-30)
    scaled = {name: plain.tensors[name] * lengths for name in ("W_enc", "b_enc", "threshold") if name in plain.tensors}
    return replace(plain, tensors=plain.tensors | scaled | {"W_dec": plain.tensors["W_dec"] / lengths[:, None]})
