"""SAEs as other tools read them: raw units, decoder rows of length one, one of five plain architectures.

D width, F latents, s the activation scale, n the lengths of decoder rows. Trained on s x:
1. W_enc *= s, W_dec /= s, b_dec /= s: the same SAE on x. A skip *= s and /= the target's.
2. codes in multiples of n: W_enc, b_enc, thresholds and magnitudes *= n, W_dec /= n. For a top-k SAE n is one number,
   the mean: the k largest of a row must stay the k largest. Our rows have one length; sparsify's have several.
A batch top-k becomes a jump threshold, the same for all latents. `init_from` goes the other way. The last functions are
shared by the formats of other tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..data.scaling import Stats, unit_stats
from ..errors import SaeInvalid
from ..parallel.dictionary_over_processes import ALL_LATENTS, Latents
from ..sae.gates import AbsTopK, BatchTopK, Gate, Gated, JumpRelu, Relu, TopK
from ..sae.model import SparseAutoencoder

Metadata = dict[str, Any]
NAMED_OTHERWISE = {"relu": "standard", "annealedrelu": "p_anneal"}  # variants that are not named after their gates
FAR = 4.0  # times the mean length
ALMOST_ONE = 1e-5  # tolerance for a length of one, as in SAEBench


@dataclass(frozen=True, eq=False)
class PlainSae:
    """Weights in the layout of the SAELens format: W_enc [D_in, F], W_skip [D_out, D_in] if there is one, everything
    else as named."""

    architecture: str  # standard, topk, abstopk, jumprelu or gated
    tensors: dict[str, Tensor]
    k: int | None
    centres_input: bool


@torch.no_grad()
def plain_sae(sae: SparseAutoencoder, stats: Stats, target_stats: Stats) -> PlainSae:
    """The plain form of a trained SAE."""
    scale, target_scale = (part.scale.to(sae.W_dec).clone() for part in (stats, target_stats))
    W_dec = sae.W_dec / target_scale
    lengths = _code_lengths(W_dec, sae.gate)
    tensors = {
        "W_enc": (sae.W_enc * scale * lengths[:, None]).t(),
        "W_dec": W_dec / lengths[:, None],
        "b_dec": sae.b_dec / target_scale,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip * scale / target_scale[:, None]
    architecture, extra = _gate_form(sae, lengths)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in (tensors | extra).items()}
    k = sae.gate.k if isinstance(sae.gate, TopK | AbsTopK) else None
    return PlainSae(architecture, tensors, k, sae.centres_input)


def sae_from_plain(plain: PlainSae) -> SparseAutoencoder:
    """The module that computes a plain form."""
    require_shapes(plain)
    tensors = plain.tensors
    gate: Gate
    match plain.architecture:
        case "standard":
            gate = Relu()
        case "topk" if plain.k is not None:
            gate = TopK(plain.k)
        case "abstopk" if plain.k is not None:
            gate = AbsTopK(plain.k)
        case "jumprelu":
            gate = JumpRelu(tensors["threshold"].numel(), 0.0, 1.0)
            # In this form the output is rectified after the jump, so a threshold below zero acts as zero.
            gate.raw_threshold.data.copy_(tensors["threshold"].clamp_min(0.0))
        case "gated":
            gate = Gated(tensors["r_mag"].numel())
            gate.r_mag.data.copy_(tensors["r_mag"])
            gate.b_mag.data.copy_(tensors["b_mag"])
        case other:
            raise SaeInvalid(f"expected architecture standard, topk, abstopk, jumprelu or gated, found {other!r}")
    bias = tensors["b_gate" if plain.architecture == "gated" else "b_enc"]
    return SparseAutoencoder(
        tensors["W_enc"].t().contiguous(),
        tensors["W_dec"].contiguous(),
        gate,
        b_dec=tensors["b_dec"],
        b_enc=bias,
        centres_input=plain.centres_input,
        W_skip=tensors.get("W_skip"),
    )


def require_shapes(plain: PlainSae) -> None:
    """Require that the weights of a foreign file fit together, and that k fits them."""
    W_enc, W_dec = plain.tensors["W_enc"], plain.tensors["W_dec"]
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.tensors.items()}
    if W_enc.ndim != 2 or W_dec.ndim != 2 or W_enc.shape[1] != W_dec.shape[0] or 0 in (*W_enc.shape, *W_dec.shape):
        raise SaeInvalid(f"expected W_enc [inputs, latents] and W_dec [latents, outputs], found {shapes}")
    latents, outputs = W_dec.shape
    wrong = [name for name in shapes if name.startswith(("b_", "r_")) or name == "threshold"]
    wrong = [name for name in wrong if shapes[name] != ((outputs if name == "b_dec" else latents),)]
    if wrong:
        raise SaeInvalid(f"expected one value per latent or output in {', '.join(wrong)}, found {shapes}")
    if plain.centres_input and W_enc.shape[0] != outputs:
        raise SaeInvalid(f"expected as many outputs as inputs where b_dec is subtracted from the input, found {shapes}")
    if "W_skip" in shapes and shapes["W_skip"] != (outputs, W_enc.shape[0]):
        raise SaeInvalid(f"expected W_skip [outputs, inputs], found {shapes}")
    if plain.architecture in ("topk", "abstopk") and (type(plain.k) is not int or not 1 <= plain.k <= latents):
        raise SaeInvalid(f"expected k from 1 to {latents}, found {plain.k!r}")


def unsigned(plain: PlainSae) -> PlainSae:
    """The same SAE without negative codes: a signed one becomes a top-k SAE with each latent repeated, sign reversed.

    Of a latent and its opposite at most one is positive, so the k largest of all are the k furthest from zero.
    """
    if plain.architecture != "abstopk":
        return plain
    one = plain.tensors
    tensors = {"W_enc": torch.cat([one["W_enc"], -one["W_enc"]], dim=1)}
    tensors |= {name: torch.cat([one[name], -one[name]]) for name in ("b_enc", "W_dec")}
    return replace(plain, architecture="topk", tensors=one | tensors)


def without_signs(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same for an SAE in raw units. Extras with one value per latent are repeated; others, which describe the
    original latents, are dropped."""
    if not isinstance(sae.gate, AbsTopK):
        return sae
    if not sae.is_plain:
        raise SaeInvalid(
            "expected a signed SAE that consists only of its weights and gate, found one with masks, attention or the "
            "like: evaluations read codes without signs, and such an SAE has no form without them"
        )
    found = _rebuilt(sae, unsigned(in_raw_units(sae)))
    of_each = {name: one for name, one in sae.extras_tensors.items() if one.shape == (sae.num_latents,)}
    found.extras_tensors = {name: torch.cat([one, one]) for name, one in of_each.items()}
    return found


def with_unit_rows(sae: SparseAutoencoder) -> SparseAutoencoder:
    """An SAE in raw units with codes in multiples of its decoder rows' lengths. Unchanged if rows have length one, to
    within `ALMOST_ONE`, or if it is a top-k SAE, whose choice of latents would change."""
    if not sae.is_plain or isinstance(sae.gate, TopK | AbsTopK):
        return sae
    return _rebuilt(sae, in_raw_units(sae)) if bool((row_lengths(sae.W_dec.detach()) != 1).any()) else sae


def row_lengths(W_dec: Tensor) -> Tensor:
    """[F]: lengths of decoder rows; exactly 1 for those within `ALMOST_ONE` of it, and for rows of zeros."""
    lengths = torch.linalg.vector_norm(W_dec, dim=1)
    return torch.where(((lengths - 1).abs() > ALMOST_ONE) & (lengths > 0), lengths, 1.0)


def in_raw_units(sae: SparseAutoencoder) -> PlainSae:
    """The plain form of an SAE that reads raw activations."""
    return plain_sae(sae, unit_stats(sae.d_in), unit_stats(sae.d_out))


def _rebuilt(sae: SparseAutoencoder, plain: PlainSae) -> SparseAutoencoder:
    found = sae_from_plain(plain)
    found.metadata, found.extras_tensors = sae.metadata, sae.extras_tensors
    return found


@torch.no_grad()
def init_from(
    sae: SparseAutoencoder, source: SparseAutoencoder, stats: Stats, target_stats: Stats, latents: Latents = ALL_LATENTS
) -> None:
    """Give an untrained SAE, or this process's part of it, the weights of a complete SAE in raw units, so that it
    computes the same."""
    _require_alike(sae, source, sae.num_latents if latents.is_whole else latents.total)
    scale, target_scale = (part.scale.to(source.W_dec) for part in (stats, target_stats))
    W_dec = source.W_dec * target_scale
    lengths = _code_lengths(W_dec, source.gate)
    if isinstance(source.gate, TopK | AbsTopK):
        _require_near_one(torch.linalg.vector_norm(W_dec, dim=1) / lengths)
    own_lengths = latents.own(lengths)
    center = source.b_dec if sae.centres_input else torch.zeros_like(scale)  # what `sae` subtracts, in raw units
    if sae.input_mean is not None:
        center = sae.input_mean.to(scale) / scale
    bias = source.b_enc + source.W_enc @ (center - (source.b_dec if source.centres_input else 0.0))
    values = {
        "W_enc": latents.own(source.W_enc) * own_lengths[:, None] / scale,
        "b_enc": latents.own(bias) * own_lengths,
        "W_dec": latents.own(W_dec) / own_lengths[:, None],
        "b_dec": source.b_dec * target_scale,
    }
    if source.W_skip is not None:
        values["W_skip"] = source.W_skip * target_scale[:, None] / scale
    for name, value in values.items():
        sae.get_parameter(name).copy_(value)
    _init_gate(sae.gate, source.gate, lengths, bias - source.b_enc, latents)


def _require_alike(sae: SparseAutoencoder, source: SparseAutoencoder, num_latents: int) -> None:
    found, wanted = (source.num_latents, source.d_in, source.d_out), (num_latents, sae.d_in, sae.d_out)
    if found != wanted:
        raise SaeInvalid(
            f"expected an SAE with {wanted[0]} latents from width {wanted[1]} to {wanted[2]}, found {found[0]} from "
            f"{found[1]} to {found[2]}" + (f": set --width {found[0]}" if found[1:] == wanted[1:] else "")
        )
    if (sae.W_skip is None) != (source.W_skip is None):
        wanted, has = ("with", "without") if source.W_skip is None else ("without", "with")
        raise SaeInvalid(f"expected an SAE {wanted} a skip, found one {has}: only the variant skip_transcoder has one")
    if not (sae.is_plain and source.is_plain):
        raise SaeInvalid("expected two SAEs that consist only of their weights and gates")


def _require_near_one(lengths_F: Tensor) -> None:
    """Training sets decoder rows to length one in its first step. That improves means of unit rows, as sparsify saves;
    rows of any length, as in its transcoders, would reconstruct something else."""
    least, most = (float(part) for part in torch.aminmax(lengths_F))
    if not (least >= 1 / FAR and most <= FAR):
        raise SaeInvalid(
            f"expected a top-k SAE whose decoder rows have about the same length, found {least:.2g} to {most:.2g} "
            "times their mean: training keeps rows at one length, and its first step would change the reconstruction"
        )


def _init_gate(gate: Gate, source: Gate, lengths: Tensor, moved_F: Tensor, latents: Latents) -> None:
    """Copy thresholds and magnitudes. A batch top-k can start from a jump threshold if all latents share it."""
    match gate, source:
        case (TopK(), TopK()) | (AbsTopK(), AbsTopK()):
            if gate.k != source.k:
                raise SaeInvalid(f"expected an SAE with {gate.k} active latents, found {source.k}: set --k {source.k}")
        case Relu(), Relu():
            pass
        case JumpRelu(), JumpRelu():
            gate.raw_threshold.copy_(latents.own(source.threshold * lengths) / gate.unit)
        case BatchTopK(), JumpRelu():
            thresholds = source.threshold * lengths
            if float(thresholds.amax() - thresholds.amin()) > 1e-3 * float(thresholds.abs().amax()):
                raise SaeInvalid("expected a jump threshold that is the same for all latents, found several")
            gate.threshold.copy_(thresholds.mean())
            gate.threshold_steps.fill_(1)
        case Gated(), Gated():
            gate.r_mag.copy_(latents.own(source.r_mag))
            gate.b_mag.copy_(latents.own((source.b_mag + (moved_F * source.r_mag.exp())) * lengths))
        case _:
            kinds = (type(one).__name__.lower() for one in (gate, source))
            wanted, found = (NAMED_OTHERWISE.get(kind, kind) for kind in kinds)
            raise SaeInvalid(
                f"expected an SAE with the gate of {wanted}, found one with that of {found}: choose a variant with "
                f"that gate, such as --variant {found}"
            )


def _code_lengths(W_dec: Tensor, gate: Gate) -> Tensor:
    """[F]: the factors of the codes for which decoder rows have length one; for a top-k SAE only on average."""
    lengths = torch.linalg.vector_norm(W_dec, dim=1)
    return lengths.mean().expand_as(lengths) if isinstance(gate, TopK | AbsTopK) else lengths.clamp_min(1e-30)


def _gate_form(sae: SparseAutoencoder, lengths: Tensor) -> tuple[str, dict[str, Any]]:
    moved = sae.bias_if_saved()
    bias = (sae.b_enc + moved) * lengths
    match sae.gate:
        case Gated() as gate:
            b_mag = gate.b_mag + moved * gate.r_mag.exp()
            return "gated", {"b_gate": bias, "r_mag": gate.r_mag, "b_mag": b_mag * lengths}
        case (JumpRelu() | BatchTopK()) as gate:
            return "jumprelu", {"b_enc": bias, "threshold": gate.threshold * lengths}
        case TopK():
            return "topk", {"b_enc": bias}
        case AbsTopK():
            return "abstopk", {"b_enc": bias}
        case Relu():
            return "standard", {"b_enc": bias}
        case other:
            raise SaeInvalid(f"no plain form for the gate {type(other).__name__}")


def centred(plain: PlainSae, wanted: bool) -> PlainSae:
    """The same SAE with or without the decoder bias subtracted from its input; the encoder's biases compensate."""
    if plain.centres_input == wanted:
        return plain
    tensors = plain.tensors
    shift = tensors["b_dec"] @ tensors["W_enc"] * (1.0 if wanted else -1.0)
    if plain.architecture == "gated":
        b_mag = tensors["b_mag"] + shift * tensors["r_mag"].exp()
        moved = {"b_gate": tensors["b_gate"] + shift, "b_mag": b_mag}
    else:
        moved = {"b_enc": tensors["b_enc"] + shift}
    return replace(plain, tensors=tensors | moved, centres_input=wanted)


def make_plain(architecture: str, tensors: Mapping[str, Tensor], k: int | None, centres_input: bool) -> PlainSae:
    return PlainSae(architecture, {n: t.float().contiguous() for n, t in tensors.items()}, k, centres_input)


def whole_k(config: Mapping[str, Any], folder: Path) -> int:
    k = config.get("k")
    if type(k) is not int or k < 1:
        raise SaeInvalid(f"{folder}: expected k of at least 1 in its configuration, found {k!r}")
    return k


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
