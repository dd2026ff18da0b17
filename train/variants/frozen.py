"""A sanity baseline: any base, with half of its dictionary left at random.

A result that these baselines show too is not evidence of what an SAE learned. `part` chooses the random half:
- `decoder`: random directions; the encoder learns to use them;
- `soft_decoder`: the decoder is trained, but no row turns from its random start by more than `cosine` allows;
- `encoder`: random features; the decoder learns what they mean.
The encoder's bias is trained in all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.terms_and_constraints import Assembly, Constraint
from ..kit.check_variant_settings import require, unread_unless
from ..kit.wrapping import Wrapping, base_needs, build_base
from ..sae.extra_modules import Extra
from ..sae.model import SparseAutoencoder
from ..terms.constraints import Still

Part = Literal["decoder", "soft_decoder", "encoder"]
ANCHOR = "anchor"


class Anchor(Extra):
    """The initial decoder rows."""

    is_recordable = True
    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.detach().clone())


@dataclass(frozen=True)
class Near(Constraint):
    """Keeps decoder rows at length one, and their cosine with their start from falling below `cosine`."""

    cosine: float
    table_use = "gradients"

    @torch.no_grad()
    def after_step(self, sae: SparseAutoencoder) -> None:
        start = sae.get_submodule(f"extras.{ANCHOR}").get_buffer("rows")
        along = torch.linalg.vecdot(sae.W_dec, start)[:, None]
        aside = functional.normalize(sae.W_dec - along * start, dim=1)
        nearest = self.cosine * start + (1.0 - self.cosine**2) ** 0.5 * aside
        sae.W_dec.copy_(torch.where(along < self.cosine, nearest, sae.W_dec))


@dataclass(frozen=True)
class Config(Wrapping):
    is_baseline: ClassVar[bool] = True
    own_tables: ClassVar[float] = 0.0

    base: str = "topk"
    part: Part = "decoder"
    cosine: float = 0.8
    """Smallest cosine of a decoder row with its start (part = "soft_decoder")."""

    def unread(self) -> Mapping[str, str]:
        return {**super().unread(), **unread_unless("part=soft_decoder", self.part == "soft_decoder", "cosine")}

    def needs(self) -> Needs:
        require(-1.0 <= self.cosine <= 1.0, f"cosine: expected a number from -1 to 1, found {self.cosine}")
        return base_needs(self)

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self.needs()
        assembly = build_base(self, d_model, stats)
        if self.part == "soft_decoder":
            return assembly.with_extra(ANCHOR, Anchor(assembly.sae.W_dec)).with_constraints(Near(self.cosine))
        return assembly.with_constraints(Still(("W_dec" if self.part == "decoder" else "W_enc",)))
