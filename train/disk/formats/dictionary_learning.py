"""dictionary_learning: a trainer's config.json, and its weights.

dictionary_learning stores weights in a pickle. None is written here: the folder holds the same tensors as safetensors,
and a README with the two lines that turn them into ae.pt. An existing pickle is read with torch's reader for plain
tensors, which runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache_schema.sites import HOOKS, RESID
from ...errors import SaeInvalid
from ..atomic_files import read_json, write_json
from ..hook_metadata import place_metadata
from ..plain_form import Metadata, PlainSae, centred, make_plain, whole_k, write_tensors
from ..sae_lens_folder import read_tensors

# What torch raises for anything but plain tensors.
REFUSED = (torch.serialization.pickle.UnpicklingError,)  # pyright: ignore[reportPrivateImportUsage]
README = """# An SAE for dictionary_learning

`ae.safetensors` holds the tensors under the names that dictionary_learning gives them. It reads `ae.pt`:

    import torch; from safetensors.torch import load_file
    torch.save(load_file("ae.safetensors"), "ae.pt")
"""
_DICTIONARIES = {
    "standard": ("AutoEncoder", "StandardTrainer"),
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_AFFINE = {**_LINEAR, "b_enc": "encoder.bias"}
_TENSORS = {  # by our names, by architecture
    "standard": {**_AFFINE, "b_dec": "bias"},
    "topk": {**_AFFINE, "b_dec": "b_dec"},
    "jumprelu": {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
    "gated": {**_LINEAR, "b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
}
_FROM_DICTIONARY = {  # to the architecture that has its tensors
    "AutoEncoder": "standard",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "topk",  # with a threshold too
    "MatryoshkaBatchTopKSAE": "jumprelu",  # with a centred input, and one threshold for all latents
    "JumpReluAutoEncoder": "jumprelu",
    "GatedAutoEncoder": "gated",
}
_NAMES = {hook: "resid_post" if hook == RESID else hook for hook in HOOKS}  # before `_layer_5`


def write(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    """Only the JumpReLU does not subtract the decoder bias from its input."""
    plain = centred(plain, plain.architecture != "jumprelu")
    layer, hook = (metadata.get("layers") or [None])[0], metadata.get("hook", RESID)
    d_in, width = plain.tensors["W_enc"].shape
    dictionary, trainer = _DICTIONARIES[plain.architecture]
    config = {
        "trainer_class": trainer,
        "dict_class": dictionary,
        "activation_dim": d_in,
        "dict_size": width,
        "layer": layer,
        "lm_name": metadata.get("model_name"),
        "submodule_name": None if layer is None else f"{_NAMES[hook]}_layer_{layer}",
        "k": plain.k,
    }
    names = _TENSORS[plain.architecture].items()
    tensors = {theirs: _transposed_if_linear(theirs, plain.tensors[ours]) for ours, theirs in names}
    if plain.architecture == "topk":
        tensors |= {"k": torch.tensor(plain.k), "threshold": torch.tensor(-1.0)}
    write_tensors(folder / "ae.safetensors", tensors)
    write_json(folder / "config.json", {"trainer": config, "buffer": {}})
    (folder / "README.md").write_text(README, encoding="utf-8")


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    document = read_json(folder / "config.json")
    config = document.get("trainer", {})
    if not isinstance(config, dict):
        raise SaeInvalid(f"{folder / 'config.json'}: expected trainer as an object, found {type(config).__name__}")
    kind = config.get("dict_class")
    if not isinstance(kind, str) or kind not in _FROM_DICTIONARY:
        known = ", ".join(_FROM_DICTIONARY)
        raise SaeInvalid(f"{folder}: expected a dict_class among {known}, found {kind!r}")
    found = _read_any(folder)
    try:
        plain = _from_dictionary(kind, found)
    except KeyError as error:
        raise SaeInvalid(f"{folder}: the weights of a {kind} lack the tensor {error}") from None
    if plain.architecture == "topk":
        plain = replace(plain, k=whole_k(config, folder))
    return plain, {"model_name": config.get("lm_name"), **_place(config, document.get("buffer"), folder)}


def _place(config: Mapping[str, Any], buffer: Any, folder: Path) -> Metadata:
    """The layer and hook; the residual stream if no other hook is named."""
    layer, name = config.get("layer"), config.get("submodule_name")
    io = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    known = {f"{prefix}_layer_{layer}": hook for hook, prefix in _NAMES.items()}
    if io != "out" or name not in (None, *known):
        raise SaeInvalid(
            f"{folder / 'config.json'}: expected a submodule_name among {', '.join(known)}, and io 'out', its "
            f"output, found {name!r} and io {io!r}: if it is one of these, write that into the file"
        )
    if type(layer) is not int or layer < 0:
        return {}
    hook = RESID if name is None else known[name]
    return place_metadata(hook, hook, layer)


def _from_dictionary(kind: str, found: Mapping[str, Tensor]) -> PlainSae:
    names = _TENSORS[_FROM_DICTIONARY[kind]]
    is_batch = "BatchTopK" in kind
    tensors = {ours: _transposed_if_linear(theirs, found[theirs]) for ours, theirs in names.items()}
    if not is_batch:
        return make_plain(_FROM_DICTIONARY[kind], tensors, None, kind != "JumpReluAutoEncoder")
    if float(found["threshold"]) < 0:
        raise SaeInvalid(
            "expected the learned threshold of a batch top-k SAE, found none: it was saved before step 1000"
        )
    threshold = found["threshold"].float().expand(tensors["b_enc"].numel()).clone()
    return make_plain("jumprelu", tensors | {"threshold": threshold}, None, True)


def _transposed_if_linear(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name.endswith(".weight") else tensor


def _read_any(folder: Path) -> dict[str, Tensor]:
    """Read ae.safetensors, or ae.pt as plain tensors."""
    if (folder / "ae.safetensors").is_file():
        return read_tensors(folder / "ae.safetensors")
    try:
        found = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    except (*REFUSED, RuntimeError, EOFError) as error:
        raise SaeInvalid(f"{folder / 'ae.pt'}: expected plain tensors, found something else ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise SaeInvalid(f"{folder / 'ae.pt'}: expected tensors by name, found {type(found).__name__}")
    return found
