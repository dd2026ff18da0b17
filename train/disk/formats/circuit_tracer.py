"""circuit-tracer (0.5): transcoders of every layer from the first on, or one cross-layer transcoder; write only.

    config.yaml                   which of the two, and where in a block they read and write (JSON, which is also YAML)
    layer_0.safetensors, ...      transcoders: W_enc [F, D], b_enc, W_dec [F, D], b_dec, the jump threshold, W_skip
    W_enc_0.safetensors, ...      a cross-layer one: W_enc_0 [F_0, D], b_enc_0, b_dec_0, threshold_0
    W_dec_0.safetensors, ...      W_dec_0 [F_0, L, D]: what layer 0's latents write to layers 0 to L - 1

L layers, B rows, D width, F latents. circuit-tracer's replacement model needs all layers of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ....cache_schema.sites import RESID, SAE_LENS_NAMES
from ...errors import SaeInvalid
from ...sae.cross_layer import CrossLayerSae
from ...sae.gates import BatchTopK, Gate, JumpRelu, Relu
from ...sae.model import SparseAutoencoder
from ..atomic_files import read_json, write_json
from ..module_form import RawUnits
from ..plain_form import write_tensors

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"


@torch.no_grad()
def write(folder: Path, saes: Sequence[SparseAutoencoder]) -> None:
    """Write SAEs in raw units, as loaded, in any order."""
    layers = [layer for sae in saes for layer in sae.metadata.get("layers") or ()]
    _require_every_layer(saes, layers)
    if len(layers) > len(saes):
        if len(saes) > 1:
            raise SaeInvalid(f"expected a single clt, or transcoders of one layer each, found {len(saes)} together")
        kind, tensors = "cross_layer_transcoder", _cross_layer_tensors(saes[0])
    else:
        in_order = sorted(saes, key=lambda sae: sae.metadata["layers"])
        kind, tensors = "transcoder_set", {f"layer_{i}": _layer_tensors(sae) for i, sae in enumerate(in_order)}
    for name, table in tensors.items():
        write_tensors(folder / f"{name}.safetensors", {key: tensor.float().cpu() for key, tensor in table.items()})
    write_json(folder / CONFIG, {"model_kind": kind, **_places(saes[0].metadata)})


@torch.no_grad()
def reconstruct(folder: Path, x_BLD: Tensor) -> Tensor:
    """The output of the folder's transcoders for the input of each layer, by circuit-tracer's formulas: [B, L, D] with
    the width that they write."""
    if read_json(folder / CONFIG)["model_kind"] == "transcoder_set":
        parts = enumerate(x_BLD.unbind(1))
        return torch.stack([_transcode(load_file(folder / f"layer_{i}.safetensors"), x) for i, x in parts], 1)
    layers = [load_file(folder / f"W_enc_{i}.safetensors") for i in range(x_BLD.shape[1])]
    total = torch.stack([w[f"b_dec_{i}"] for i, w in enumerate(layers)]).repeat(len(x_BLD), 1, 1)
    for i, (x, w) in enumerate(zip(x_BLD.unbind(1), layers, strict=True)):
        pre = x @ w[f"W_enc_{i}"].t() + w[f"b_enc_{i}"]
        acts = pre * (pre > w[f"threshold_{i}"])
        W_dec = load_file(folder / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        total[:, i:] += torch.einsum("bf,fld->bld", acts, W_dec)
    return total


def _transcode(w: dict[str, Tensor], x: Tensor) -> Tensor:
    pre = x @ w["W_enc"].t() + w["b_enc"]
    acts = pre * (pre > w[THRESHOLD]) if THRESHOLD in w else pre.relu()
    y = acts @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].t() if "W_skip" in w else y


def _layer_tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    if not sae.is_plain:
        raise SaeInvalid("expected transcoders that consist only of weights and a gate, or a clt of several layers")
    bias = sae.b_enc - sae.W_enc @ sae.b_dec if sae.centres_input else sae.b_enc
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc, "b_enc": bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    threshold = _threshold(sae.gate)
    tensors |= {} if threshold is None else {THRESHOLD: threshold.expand(sae.num_latents)}
    return tensors | ({} if sae.W_skip is None else {"W_skip": sae.W_skip})


def _cross_layer_tensors(sae: SparseAutoencoder) -> dict[str, dict[str, Tensor]]:
    inner = sae.inner if isinstance(sae, RawUnits) else None
    if not isinstance(inner, CrossLayerSae) or len(set(inner.sizes)) > 1:
        raise SaeInvalid(
            "expected transcoders of one layer each, or a clt with the same number of latents in every layer"
        )
    threshold = _threshold(sae.gate)
    assert isinstance(sae, RawUnits) and threshold is not None
    parts = (sae.W_enc, sae.b_enc, threshold * sae.lengths, sae.W_dec.unflatten(1, (inner.num_layers, -1)))
    found: dict[str, dict[str, Tensor]] = {}
    b_dec = sae.b_dec.view(inner.num_layers, -1)
    for i, (W_enc, b_enc, theta, W_dec) in enumerate(zip(*(p.split(inner.sizes) for p in parts), strict=True)):
        own = {f"W_enc_{i}": W_enc, f"b_enc_{i}": b_enc, f"b_dec_{i}": b_dec[i], f"threshold_{i}": theta}
        found |= {f"W_enc_{i}": own, f"W_dec_{i}": {f"W_dec_{i}": W_dec[:, i:]}}
    return found


def _threshold(gate: Gate) -> Tensor | None:
    """The jump threshold; None for a ReLU."""
    match gate:
        case JumpRelu() | BatchTopK():
            return gate.threshold
        case Relu():
            return None
        case other:
            raise SaeInvalid(
                f"expected transcoders with a jump threshold or a ReLU, found {type(other).__name__}: circuit-tracer's "
                "top-k keeps negative values. Train them with --set gate=batchtopk"
            )


def _require_every_layer(saes: Sequence[SparseAutoencoder], layers: Sequence[int]) -> None:
    places = [_places(sae.metadata) for sae in saes]
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise SaeInvalid(
            f"expected one transcoder for each layer, starting at 0, found layers {sorted(layers)}: train all of them "
            "in one run (--grid layer=0,1,2; for a clt --set layers=0,1,2)"
        )
    for sae, place in zip(saes, places, strict=True):
        if sae.metadata.get("target_layers") != sae.metadata["layers"]:
            raise SaeInvalid("expected transcoders that write to the layers they read, found others")
        if (place, sae.num_latents) != (places[0], saes[0].num_latents):
            raise SaeInvalid("expected transcoders of one model, with the same hooks and width, found others")


def _places(metadata: dict[str, Any]) -> dict[str, Any]:
    """Where in a block they read and write, under TransformerLens' names."""
    read = str(metadata.get("hook", RESID))
    written = str(metadata.get("target_hook", read))
    if written != "mlp_out" or read not in SAE_LENS_NAMES:
        raise SaeInvalid(
            f"expected transcoders that write mlp_out, found {read} to {written}: circuit-tracer replaces MLPs. Train "
            "--variant transcoder, skip_transcoder or clt with --set hook=mlp_in"
        )
    return {
        "model_name": metadata.get("model_name"),
        "feature_input_hook": SAE_LENS_NAMES[read],
        "feature_output_hook": SAE_LENS_NAMES[written],
    }
