"""What of an SAE and its training is cut where a dictionary is split by latents, and which SAEs can be."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import ConfigInvalid
from ..parallel.latents import Latents
from ..sae.model import SparseAutoencoder
from .compose import Assembly


def require_splittable(name: str, assembly: Assembly) -> None:
    """Refuse an SAE of which some part needs all latents in one process."""
    sae, needy = assembly.sae, [term.name for term in assembly.terms if term.split is None]
    if type(sae) is not SparseAutoencoder or len(sae.extras) > 0 or not sae.gate.may_split or needy:
        why = f" (its loss {needy[0]} does)" if needy else ""
        raise ConfigInvalid(
            f"{name}: course.shard_width is for SAEs of which no part needs all latents in one process{why}: "
            "leave it out, or choose its base"
        )


def split_parameters(sae: SparseAutoencoder) -> tuple[str, ...]:
    """The parameters with a row, or a number, for each latent."""
    of_gate = (f"gate.{name}" for name, own in sae.gate.named_parameters() if own.shape == (sae.num_latents,))
    return ("W_enc", "b_enc", "W_dec", *of_gate)


def split_state(parameters: Iterable[str]) -> set[str]:
    """The same of a trainee's state."""
    found = {"latents.tokens_since_fired", "latents.listed"}
    for name in parameters:
        found |= {f"sae.{name}", f"adam.{name}.first_moment", f"adam.{name}.second_moment"}
    return found


def cut(sae: SparseAutoencoder, parameters: Iterable[str], latents: Latents) -> None:
    """Leave the latents of this process."""
    for name in parameters:
        module, _, own = name.rpartition(".")
        setattr(sae.get_submodule(module), own, nn.Parameter(latents.own(sae.get_parameter(name).detach()).clone()))
