"""What the attention-guided variants share: their settings, and how a base becomes a guided SAE.

Total loss = the base's + alpha (guidance + beta consistency). With alpha = 0 training equals the base's to the bit.
With `guidance = "encode"` the encoder reads attention too, also in the saved SAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...cache_schema import Manifest
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Ramp, Schedule
from ..engine.terms_and_constraints import Assembly, Term
from ..sae.attention.attention_encoder import MIXING, TEMPERATURE, AttendedSae, Attention, Mixing, Noted
from ..sae.attention.attention_links import LinkKind, require_head
from ..terms.attention_guidance import Consistency, Guidance, Objective
from .check_variant_settings import require, require_least, require_positive, unread_unless
from .wrapping import Wrapping, base_needs, build_base

ENCODER_SEEDS = 2**40  # far from the seeds of bases
OF_LINKS = ("min_mass", "head", "shuffle_attention", "links")


@dataclass(frozen=True)
class Guided(Wrapping):
    """Settings of a guided SAE. None means the default of its base."""

    guidance: Literal["loss", "encode"] = "loss"
    alpha: float = 0.1
    """Weight of the guidance."""
    alpha_warmup_fraction: float = 0.1
    """Share of the run over which alpha rises from zero."""
    temperature: float = 0.2
    """Temperature of the softmax over cosines."""
    negatives: int = 64
    """Random tokens of other windows among each token's candidates."""
    min_mass: float = 0.05
    """Rows of attention with less mass than this, apart from the sink and the token itself, are left out."""
    head: int | None = None
    """One head of a store that keeps heads separate; None: their mean."""
    rank: int = 64
    """Rank of the encoder's map through each layer's attention (guidance = "encode")."""
    shuffle_attention: bool = False
    """The control: each token gets the attention of a token at its position in another window."""
    links: LinkKind = "attention"
    """Further controls: as many links to the preceding tokens, or links to the same token earlier in the window."""

    def unread(self) -> Mapping[str, str]:
        guides, encodes = self.alpha > 0, self.guidance == "encode"
        return {
            **super().unread(),
            **unread_unless("guidance=encode", encodes, "rank"),
            **unread_unless("an alpha above 0", guides, "alpha_warmup_fraction", "temperature", "negatives"),
            **unread_unless("an alpha above 0 or guidance=encode", guides or encodes, *OF_LINKS),
        }

    def check(self, manifest: Manifest) -> None:
        """Refuse a store without this head."""
        spec = manifest.attention
        if self.head is not None:
            require_head(self.head, 1 if spec.averaged else spec.heads)

    def weight(self, factor: float = 1.0) -> Schedule:
        """alpha times a factor, with warm-up."""
        return Ramp(0.0, self.alpha * factor, end_fraction=self.alpha_warmup_fraction)


def request_guided(config: Guided, layers: Sequence[int]) -> Needs:
    """Whole windows of the base's layer, and the attention of `layers`."""
    require_least(config, alpha=0, negatives=0, rank=1)
    require_positive(config, "temperature")
    require(0 <= config.min_mass < 1, f"min_mass: expected 0 or more and less than 1, found {config.min_mass}")
    is_one_control = config.links == "attention" or not config.shuffle_attention
    require(is_one_control, f"links={config.links} and shuffle_attention are two controls: set one of them")
    needs = base_needs(config)
    least = 2 if config.shuffle_attention else 1  # the control exchanges rows between windows
    tokens = needs.tokens or config.links == "same_token"
    return replace(needs, attention_layers=tuple(sorted(layers)), windows=True, tokens=tokens, least_windows=least)


def build_guided(
    config: Guided,
    layers: tuple[int, ...],
    d_model: int,
    stats: Stats | None,
    *,
    mixing: tuple[Mixing, Schedule] | None = None,
    beta: float = 0.0,
    objective: Objective = "divergence",
) -> Assembly:
    """The base with the guidance terms and, if guidance="encode", an encoder that reads attention; `mixing` comes with
    the schedule of its temperature."""
    assembly = build_base(config, d_model, stats)
    attention = Attention(layers, config.head, config.min_mass, config.shuffle_attention, config.links)
    if config.guidance == "encode":
        # A generator of its own, so that the base's weights are those of the base alone.
        generator = torch.Generator().manual_seed(ENCODER_SEEDS + config.seed)
        sae = AttendedSae(assembly.sae, attention, mixing and mixing[0], config.rank, generator)
        assembly = assembly.with_sae(sae)
    if mixing is not None:
        assembly = _with_mixing(assembly, attention, *mixing)
    guide = Guidance(attention, config.temperature, config.negatives, objective)
    assembly = assembly.with_terms(Term("guidance", guide, config.weight()))
    if beta > 0:
        assembly = assembly.with_terms(Term("consistency", Consistency(attention), config.weight(beta)))
    return assembly


def _with_mixing(assembly: Assembly, attention: Attention, mixing: Mixing, temperature: Schedule) -> Assembly:
    """Add the mixing, to be learned and logged, and its temperature. An encoder that reads attention already has it."""
    if not isinstance(assembly.sae, AttendedSae):
        assembly = assembly.with_extra(MIXING, mixing)
    first, *others = assembly.terms
    noted = replace(first, fn=Noted(first.fn, attention))
    return replace(assembly, terms=(noted, *others)).with_knobs(**{TEMPERATURE: temperature})
