"""SAEs on disk whose inference needs more than the plain weights: masks, gates, separate encoders.

The folder has the usual files; sae_weights.safetensors holds the module's whole state in the units that it was trained
in, and the scales. cfg.json has an architecture name of our own, the knobs' final values and the side inputs that
`encode` reads. Reading it back requires the variant that built the module.
D width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.scaling import Stats
from ..errors import SaeInvalid
from ..sae.model import SparseAutoencoder
from ..sae.side_inputs import NO_SIDE, Side

T = TypeVar("T")
MODULE, SCALE, TARGET_SCALE = "module.", "scale", "target_scale"

Rebuild = Callable[[str, Mapping[str, Any], int, int], SparseAutoencoder]
"""(variant, its config in JSON, width of the input, width of the target) -> the untrained module."""


class RawUnits(SparseAutoencoder):
    """A trained module for the model's raw activations, with decoder rows of length one."""

    is_plain = False

    def __init__(self, inner: SparseAutoencoder, scale: Tensor, target_scale: Tensor, knobs: Mapping[str, float]):
        W_dec = inner.W_dec.detach() / target_scale
        lengths = torch.linalg.vector_norm(W_dec, dim=1).clamp_min(1e-30)
        super().__init__(
            inner.encoder_times(scale).detach() * lengths[:, None],
            W_dec / lengths[:, None],
            inner.gate,
            b_dec=inner.b_dec.detach() / target_scale,
            b_enc=(inner.b_enc + inner.bias_if_saved()).detach() * lengths,
            centres_input=inner.centres_input,
        )
        self.inner = inner
        self.needs_side = inner.needs_side
        self.knobs = dict(knobs)
        self.register_buffer("scale", scale)
        self.register_buffer("lengths", lengths)

    scale: Tensor
    lengths: Tensor

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    def encode(self, x: Tensor, side: Side = NO_SIDE) -> Tensor:
        return self.inner.encode(x * self.scale, side.with_knobs(self.knobs)) * self.lengths


@torch.no_grad()
def module_form(sae: SparseAutoencoder, stats: Stats, target_stats: Stats) -> dict[str, Tensor]:
    """The tensors to save for a trained module."""
    state = {name: tensor for name, tensor in sae.state_dict().items() if not name.startswith("extras.")}
    tensors = {f"{MODULE}{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
    return tensors | {SCALE: stats.scale.cpu().clone(), TARGET_SCALE: target_stats.scale.cpu().clone()}


@torch.no_grad()
def sae_from_module_form(
    tensors: Mapping[str, Tensor], knobs: Mapping[str, float], inner: SparseAutoencoder, where: str
) -> RawUnits:
    """The module of a saved form, from an untrained one, `inner`."""
    require_tensors(tensors, inner, where)
    inner.load_state_dict(_state_of(tensors), strict=False)
    inner.require_sound(where)
    return RawUnits(inner, tensors[SCALE], tensors[TARGET_SCALE], knobs)


def build_without_values(build: Callable[[], T]) -> T | None:
    """Build with shapes but no values, which takes no memory; None if a user's variant cannot be built without
    values."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError) as error:  # NumPy raises the latter
        if "meta" not in str(error).lower():
            raise
        return None


def require_tensors(tensors: Mapping[str, Tensor], inner: SparseAutoencoder, where: str) -> None:
    """Require the module's names and shapes; `inner` may be on the meta device, where it takes no memory."""
    state = _state_of(tensors)
    expected = {name for name in inner.state_dict() if not name.startswith("extras.")}
    different = sorted(expected ^ state.keys())
    if different or not {SCALE, TARGET_SCALE} <= tensors.keys():
        raise SaeInvalid(
            f"{where}: the tensors are not those of the variant ({', '.join(different) or 'no scale'}): copy "
            "the folder again"
        )
    scales = {SCALE: (inner.d_in,), TARGET_SCALE: (inner.d_out,)}
    expected_shapes = scales | {f"{MODULE}{name}": tuple(t.shape) for name, t in inner.state_dict().items()}
    wrong = sorted(name for name, t in tensors.items() if tuple(t.shape) != expected_shapes.get(name))
    if wrong:
        raise SaeInvalid(f"{where}: the tensors {', '.join(wrong)} do not have the variant's shapes: copy it again")


def _state_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(MODULE): t for name, t in tensors.items() if name.startswith(MODULE)}
