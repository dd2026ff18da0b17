"""dictionary_learning: a trainer's config.json, and its weights.

It stores weights in a pickle. None is written here: the folder holds the same tensors as safetensors, and
a README with the two lines that turn them into ae.pt. An existing pickle is read with torch's reader for
plain tensors, which runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cache_schema.sites import HOOKS, RESID
from ...errors import SaeInvalid
from ..atomic_files import read_json, write_json
from ..hook_metadata import told_of
from ..plain_form import Metadata, PlainSae, centred, make_plain, whole_k, write_tensors
from ..sae_folder import read_tensors

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
_NAMES = {hook: "resid_post" if hook == RESID else hook for hook in HOOKS}  # before `_layer_5`


def write(folder: Path, plain: PlainSae, metadata: Metadata) -> None:
    """Its JumpReLU does not centre the input; the others subtract the decoder bias."""
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
    write_tensors(folder / "ae.safetensors", _to_dictionary(plain))
    write_json(folder / "config.json", {"trainer": config, "buffer": {}})
    (folder / "README.md").write_text(README, encoding="utf-8")


def read(folder: Path) -> tuple[PlainSae, Metadata]:
    whole = read_json(folder / "config.json")
    config = whole.get("trainer", {})
    if not isinstance(config, dict):
        raise SaeInvalid(f"{folder / 'config.json'}: expected trainer as an object, found {type(config).__name__}")
    kind = config.get("dict_class")
    if not isinstance(kind, str) or kind not in _FROM_DICTIONARY:
        known = ", ".join(_FROM_DICTIONARY)
        raise SaeInvalid(f"{folder}: expected a dict_class among {known}, found {kind!r}")
    found = _read_any(folder)
    try:
        plain = _FROM_DICTIONARY[kind](found)
    except KeyError as error:
        raise SaeInvalid(f"{folder}: the weights of a {kind} lack the tensor {error}") from None
    if plain.architecture == "topk":
        plain = replace(plain, k=whole_k(config, folder))
    return plain, {"model_name": config.get("lm_name"), **_place(config, whole.get("buffer"), folder)}


def _place(config: Mapping[str, Any], buffer: Any, folder: Path) -> Metadata:
    """The layer and hook: the residual stream if nothing else is named."""
    layer, name = config.get("layer"), config.get("submodule_name")
    io = buffer.get("io", "out") if isinstance(buffer, dict) else "out"
    known = {f"{prefix}_layer_{layer}": hook for hook, prefix in _NAMES.items()}
    if io != "out" or name not in (None, *known):
        raise SaeInvalid(
            f"{folder / 'config.json'}: expected a submodule_name among {', '.join(known)}, and io 'out', its "
            f"output, found {name!r} and io {io!r}: if it is one of these, write that there"
        )
    if type(layer) is not int or layer < 0:
        return {}
    hook = RESID if name is None else known[name]
    return told_of(hook, hook, layer)


def _to_dictionary(plain: PlainSae) -> dict[str, Tensor]:
    """Tensors under dictionary_learning's names."""
    tensors = plain.tensors
    linear = {"encoder.weight": tensors["W_enc"].t(), "decoder.weight": tensors["W_dec"].t()}
    match plain.architecture:
        case "standard":
            return {**linear, "encoder.bias": tensors["b_enc"], "bias": tensors["b_dec"]}
        case "topk":
            marks = {"k": torch.tensor(plain.k), "threshold": torch.tensor(-1.0)}
            return {**linear, "encoder.bias": tensors["b_enc"], "b_dec": tensors["b_dec"], **marks}
        case "gated":
            biases = {"gate_bias": tensors["b_gate"], "mag_bias": tensors["b_mag"], "r_mag": tensors["r_mag"]}
            return {**linear, "decoder_bias": tensors["b_dec"], **biases}
        case _:
            return dict(tensors)


def _from_linear(architecture: str, bias: str) -> Callable[[Mapping[str, Tensor]], PlainSae]:
    def convert(found: Mapping[str, Tensor]) -> PlainSae:
        tensors = {"W_enc": found["encoder.weight"].t(), "W_dec": found["decoder.weight"].t(), "b_dec": found[bias]}
        if architecture == "gated":
            named = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
            return make_plain("gated", tensors | {new: found[old] for new, old in named.items()}, None, True)
        return make_plain(architecture, tensors | {"b_enc": found["encoder.bias"]}, None, True)

    return convert


def _from_batch_topk(found: Mapping[str, Tensor]) -> PlainSae:
    plain = _from_linear("standard", "b_dec")(found)
    return _with_threshold(plain, found["threshold"])


def _from_matryoshka(found: Mapping[str, Tensor]) -> PlainSae:
    tensors = {name: found[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return _with_threshold(make_plain("standard", tensors, None, True), found["threshold"])


def _from_jumprelu(found: Mapping[str, Tensor]) -> PlainSae:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    return make_plain("jumprelu", {name: found[name] for name in names}, None, False)


_FROM_DICTIONARY: dict[str, Callable[[Mapping[str, Tensor]], PlainSae]] = {
    "AutoEncoder": _from_linear("standard", "bias"),
    "AutoEncoderTopK": _from_linear("topk", "b_dec"),
    "BatchTopKSAE": _from_batch_topk,
    "MatryoshkaBatchTopKSAE": _from_matryoshka,
    "JumpReluAutoEncoder": _from_jumprelu,
    "GatedAutoEncoder": _from_linear("gated", "decoder_bias"),
}


def _with_threshold(plain: PlainSae, threshold: Tensor) -> PlainSae:
    if float(threshold) < 0:
        raise SaeInvalid(
            "expected the learned threshold of a batch top-k SAE, found none: it was saved before step 1000"
        )
    width = plain.tensors["b_enc"].numel()
    return replace(
        plain, architecture="jumprelu", tensors={**plain.tensors, "threshold": threshold.float().expand(width).clone()}
    )


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
