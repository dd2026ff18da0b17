"""sparsify: cfg.json and sae.safetensors; top-k SAEs and transcoders of one module, with a skip or without."""

from __future__ import annotations

from pathlib import Path

from ...errors import SaeInvalid
from ..plain_form import PlainSae
from ..sae_folder import is_of_one_place
from ..whole_files import read_json, write_json
from .plain import Metadata, centred, make_plain, read_tensors, whole_k, write_tensors


def write(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    """sparsify knows top-k, with the decoder bias taken off its input but for a transcoder's."""
    if plain.architecture != "topk":
        raise SaeInvalid(f"sparsify knows topk SAEs alone, found {plain.architecture}: export it to sae_lens instead")
    transcodes, skips = not is_of_one_place(metadata), "W_skip" in plain.tensors
    plain = centred(plain, not transcodes)
    d_in, width = plain.tensors["W_enc"].shape
    tensors = {
        "encoder.weight": plain.tensors["W_enc"].t(),
        "encoder.bias": plain.tensors["b_enc"],
        "W_dec": plain.tensors["W_dec"],
        "b_dec": plain.tensors["b_dec"],
    }
    tensors |= {"W_skip": plain.tensors["W_skip"]} if skips else {}
    config = {"activation": "topk", "expansion_factor": max(1, width // d_in), "normalize_decoder": True}
    config |= {"num_latents": width, "k": plain.k, "multi_topk": False}
    write_tensors(folder / "sae.safetensors", tensors)
    write_json(folder / "cfg.json", {**config, "skip_connection": skips, "transcode": transcodes, "d_in": d_in})


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    config = read_json(folder / "cfg.json")
    transcodes, skips = (bool(config.get(name, False)) for name in ("transcode", "skip_connection"))
    for key, expected in (("activation", "topk"), ("skip_connection", skips and transcodes)):
        if config.get(key, expected) != expected:
            raise SaeInvalid(f"{folder}: expected {key} {expected!r}, found {config[key]!r}, which has no plain form")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skips else ()))
    found = read_tensors(folder / "sae.safetensors", names)
    tensors = {"W_enc": found["encoder.weight"].t(), "b_enc": found["encoder.bias"]}
    tensors |= {name: found[name] for name in names[2:]}
    metadata: Metadata = {"hook_name": folder.name} | ({"transcodes": True} if transcodes else {})
    return make_plain("topk", tensors, whole_k(config, folder), not transcodes), metadata
