"""sparsify: cfg.json and sae.safetensors; top-k SAEs and transcoders of one module, with a skip or without."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import SaeInvalid
from ..atomic_files import read_json, write_json
from ..plain_form import Metadata, PlainSae, centred, make_plain, whole_k, write_tensors
from ..sae_lens_folder import is_of_one_place, read_tensors

NORMED = re.compile(r"(gemma-?[23]|olmo-?2|\bpocket)(?![a-z0-9])", re.IGNORECASE)
"""Names of models with a norm after the MLP; an SAE's metadata says no more about its model."""


def write(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    """sparsify supports top-k, with the decoder bias subtracted from the input except in transcoders."""
    if plain.architecture != "topk":
        raise SaeInvalid(f"sparsify supports only topk SAEs, found {plain.architecture}: export it to sae_lens instead")
    transcodes, skips = not is_of_one_place(metadata), "W_skip" in plain.tensors
    model = str(metadata.get("model_name"))
    if transcodes and metadata.get("target_hook") == "mlp_out" and NORMED.search(model):
        raise SaeInvalid(
            f"expected a transcoder of a model that adds its MLP's output directly to the residual stream, found one "
            f"of {model}: its mlp_out is after a norm, and sparsify, which hooks the MLP itself, would insert "
            "normed values before that norm. Keep its folder, which load_sae opens, or train it with --set "
            "gate=batchtopk and export that to circuit_tracer"
        )
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
    for key in ("embed_skip", "gram_lookup"):  # EleutherAI's: more is added to the output, or subtracted from the input
        if config.get(key):
            raise SaeInvalid(f"{folder}: expected no {key}, found {config[key]!r:.60}, which has no plain form")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(("W_skip",) if skips else ()))
    found = read_tensors(folder / "sae.safetensors", names)
    tensors = {"W_enc": found["encoder.weight"].t(), "b_enc": found["encoder.bias"]}
    tensors |= {name: found[name] for name in names[2:]}
    given = config.get("metadata")  # not sparsify's own: the user may add where the SAE reads and writes
    metadata: Metadata = {"hook_name": folder.name, **(given if isinstance(given, dict) else {})}
    if transcodes and not (metadata.get("layers") and metadata.get("target_layers")):
        metadata["transcodes"] = True
    architecture = "abstopk" if config.get("signed") else "topk"  # sparsify's first releases could have signed codes
    return make_plain(architecture, tensors, whole_k(config, folder), not transcodes), metadata
