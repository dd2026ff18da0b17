"""What the formats share: plain forms from tensors, and tensors into files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...errors import SaeInvalid
from ..plain_form import PlainSae

Metadata = dict[str, Any]


def centred(plain: PlainSae, wanted: bool) -> PlainSae:
    """The same SAE with, or without, the decoder bias taken off its input: the encoder's biases make up for it."""
    if plain.centres_input == wanted:
        return plain
    tensors = dict(plain.tensors)
    shift = tensors["b_dec"] @ tensors["W_enc"] * (1.0 if wanted else -1.0)
    if plain.architecture == "gated":
        tensors["b_gate"] = tensors["b_gate"] + shift
        tensors["b_mag"] = tensors["b_mag"] + shift * tensors["r_mag"].exp()
    else:
        tensors["b_enc"] = tensors["b_enc"] + shift
    return replace(plain, tensors=tensors, centres_input=wanted)


def make_plain(architecture: str, tensors: Mapping[str, Tensor], k: int | None, centres_input: bool) -> PlainSae:
    return PlainSae(architecture, {n: t.float().contiguous() for n, t in tensors.items()}, k, centres_input)


def whole_k(config: Mapping[str, Any], folder: Path) -> int:
    k = config.get("k")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise SaeInvalid(f"{folder}: expected k of at least 1 in its configuration, found {k!r}")
    return k


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
