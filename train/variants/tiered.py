"""Tiered: nested tiers of latents on any base; higher tiers are composed of lower ones.

The base's reconstruction loss becomes the weighted sum of the losses of tiers 1 to t on their own (the last is the
whole SAE), and a tier's decoder rows are drawn towards sums of rows of the tier below. Tiers, composition matrices and
weights are saved in extras.safetensors; the SAE itself is plain unless there is layer norm between the tiers. With
fixed tier weights (0, 0, 1) and no composition it equals its base to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Constant, Ramp
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import (
    ends_of,
    is_rising,
    require,
    require_least,
    require_positive,
    unread_unless,
    unread_where_dense,
)
from ..kit.wrapping import Wrapping, base_needs, build_base
from ..sae.kernels.sparse_support import group_of_each
from ..sae.shapes.masks import TierGates
from ..sae.shapes.shaped_sae import Init, PreNorm, Shape, ShapedAutoencoder, initialise
from ..terms.constraints import NonNegative, TierGradients
from ..terms.move_idle_latents import Moves, Structure
from ..terms.reconstruction_and_sparsity import reconstruction
from ..terms.resampling import RESAMPLING, Resampling
from ..terms.tiers import (
    COMPOSITION,
    TIERS,
    Composition,
    Importance,
    TieredReconstruction,
    Tiers,
    composition_l1,
    composition_loss,
    importance_loss,
    switch_name,
    tier_residual,
)


@dataclass(frozen=True)
class Config(Wrapping):
    own_tables: ClassVar[float] = 1.5

    tier_fractions: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    """Where each tier ends, as shares of the dictionary."""
    boundaries: tuple[int, ...] | None = None
    """Where each tier ends, in latents, such as 768, 1536, 2304; replaces tier_fractions."""
    importance: Importance = "learned"
    """How tiers' reconstructions are weighted: learned (sum to 1), uncertainty (exp(-s) alone), or fixed."""
    tier_weights: tuple[float, ...] = (0.1, 0.3, 0.6)
    """Weights of the tiers: constant if fixed, otherwise initial."""
    composition_weight: float = 0.01
    composition_l1: float = 2e-3
    """Relative to composition_weight, sets how few parts a latent has. If far smaller, any row is a sum of many."""
    composition_warmup_fraction: float = 0.1
    """Share of the run over which both rise from zero."""
    curriculum: tuple[float, ...] | None = None
    """Share of the run at which each tier's loss and latents start to come in; the first is 0."""
    curriculum_rise_fraction: float = 0.1
    """Share of the run over which they come in: a whole tier of untrained latents at once would be noise."""
    moves_every_steps: int = 0
    """Steps between moves of idle latents to the tier with the largest relative residual; 0: never."""
    moves_live: bool = False
    """Also move live latents, alone or by swapping two, if the weighted loss of the tiers falls."""
    idle_frequency: float = 1e-5
    moves_at_once: float = 0.01
    """Largest share of latents to move at once; at least one latent may."""
    tier_drift: float = 0.25
    """Share of its initial size by which a tier may grow or shrink."""
    resample_every_steps: int = 0
    """Steps between restarts of dead latents at the worst reconstructions, on top of the auxiliary loss; 0: never."""
    resample_until: float = 0.7
    """Share of the run after which no latent restarts: late restarts achieve nothing."""
    tier_norm: bool = False
    """Layer norm of each tier's pre-activations."""
    init: Init = "tied"
    tier_clip_norm: float | None = None
    tier_grad_norms: bool = False
    """Log the norm of each tier's gradient."""
    gradient_scaling: bool = False
    """Divide the gradient of a tier's loss by the loss if that is above 1."""

    def unread(self) -> Mapping[str, str]:
        composes, moves = self.composition_weight > 0, self.moves_every_steps > 0
        return {
            **super().unread(),
            **unread_where_dense({"tier_norm": self.tier_norm}),
            **unread_unless("boundaries=null", self.boundaries is None, "tier_fractions"),
            **unread_unless("composition_weight", composes, "composition_l1", "composition_warmup_fraction"),
            **unread_unless("curriculum", self.curriculum is not None, "curriculum_rise_fraction"),
            **unread_unless("moves_every_steps", moves, "idle_frequency", "moves_at_once", "tier_drift"),
            **unread_unless("resample_every_steps", self.resample_every_steps > 0, "resample_until"),
            **unread_unless("importance or an earlier entry of tier_weights", self._is_nested, "gradient_scaling"),
            **unread_unless(
                "importance, an earlier entry of tier_weights or composition_weight",
                self._is_nested or composes,
                "tier_clip_norm",
                "tier_grad_norms",
            ),
        }

    def needs(self) -> Needs:
        self._require_valid()
        return base_needs(self)

    def sizes(self) -> tuple[int, ...]:
        """Latents of each tier."""
        ends = self.boundaries or ends_of("tier_fractions", self.tier_fractions, self.width)
        require(
            is_rising(ends) and ends[-1] == self.width,
            f"boundaries: expected rising numbers, the last --width {self.width}, found {ends}",
        )
        return tuple(end - start for start, end in pairwise((0, *ends)))

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self._require_valid()
        assembly = build_base(self, d_model, stats)
        initialise(assembly.sae, self.init, assembly.generator, self.optim.start == "fitted")
        if self.resample_every_steps:
            ends = Ramp(0.0, 1.0, self.resample_until, self.resample_until)
            assembly = assembly.with_extra(RESAMPLING, Resampling(self.resample_every_steps))
            assembly = assembly.with_knobs(**{RESAMPLING: ends})
        if not self._is_nested and self.composition_weight == 0 and self.curriculum is None:
            return self._with_shapes(assembly)
        tiers = Tiers(self.sizes(), self.tier_weights, self.importance)
        assembly = self._with_composition(self._with_nesting(assembly.with_extra(TIERS, tiers)))
        return self._with_structure(self._with_shapes(assembly))

    @property
    def _is_nested(self) -> bool:
        return self.importance != "fixed" or any(self.tier_weights[:-1])

    def _with_nesting(self, assembly: Assembly) -> Assembly:
        """Make every tier reconstruct."""
        if self._is_nested:
            old = next((term for term in assembly.terms if term.fn is reconstruction), None)
            require(old is not None, f"base: expected one with a single reconstruction, found {self.base!r}")
            assembly = assembly.replacing(
                Term("reconstruction", TieredReconstruction(self.gradient_scaling), Constant(1.0), tier_residual)
            )
        if self.importance != "fixed":
            assembly = assembly.with_terms(Term("importance", importance_loss, Constant(1.0)))
        if self.tier_grad_norms or self.tier_clip_norm is not None:
            assembly = assembly.with_constraints(TierGradients(self.tier_clip_norm))
        return assembly

    def _with_composition(self, assembly: Assembly) -> Assembly:
        """Make higher tiers sums of lower ones."""
        if self.composition_weight == 0 or len(self.sizes()) == 1:
            return assembly
        room = self._moves().room(self.sizes()) if self.moves_every_steps else self.sizes()
        error, sparsity = (
            Ramp(0.0, weight, end_fraction=self.composition_warmup_fraction)
            for weight in (self.composition_weight, self.composition_l1)
        )
        composition = Composition(room)
        tables = tuple(f"extras.{COMPOSITION}.{name}" for name in dict(composition.named_parameters()))
        return (
            assembly.with_extra(COMPOSITION, composition)
            .with_terms(Term("composition", composition_loss, error), Term("composition_l1", composition_l1, sparsity))
            .with_constraints(NonNegative(tables))
        )

    def _with_structure(self, assembly: Assembly) -> Assembly:
        """Let idle latents move."""
        if not self.moves_every_steps:
            return assembly
        sae = assembly.sae
        followers = [extra.follow for extra in assembly.extras.values() if isinstance(extra, Composition)]
        if isinstance(sae, ShapedAutoencoder):
            followers.append(lambda view, before, after: sae.follow(after))
        return assembly.with_extra("structure", Structure(self._moves(), self.sizes(), followers))

    def _with_shapes(self, assembly: Assembly) -> Assembly:
        """Add layer norm between tiers, and the gates of the curriculum."""
        membership = group_of_each(self.sizes())
        shapes: dict[str, Shape] = {}
        if self.tier_norm:
            shapes["norm"] = PreNorm(membership, len(self.sizes()))
        if self.curriculum is not None:
            names = tuple(switch_name(tier) for tier in range(len(self.sizes())))
            shapes["tier_gates"] = TierGates(membership, names)
            rises = [Ramp(0.0, 1.0, begin, begin + self.curriculum_rise_fraction) for begin in self.curriculum[1:]]
            assembly = assembly.with_knobs(**dict(zip(names[1:], rises, strict=True)))
        return assembly.with_sae(ShapedAutoencoder(assembly.sae, shapes)) if shapes else assembly

    def _moves(self) -> Moves:
        return Moves(self.moves_every_steps, self.idle_frequency, self.moves_at_once, self.tier_drift, self.moves_live)

    def _require_valid(self) -> None:
        count, weights = len(self.sizes()), self.tier_weights
        require(len(weights) == count, f"tier_weights: expected {count}, one per tier, found {weights}")
        require(min(weights) >= 0 and sum(weights) > 0, f"tier_weights: expected 0 or more, found {weights}")
        learns = self.importance != "fixed"
        require(not learns or min(weights) > 0, f"tier_weights: expected more than 0 to learn from, found {weights}")
        begins = self.curriculum is None or weights[0] > 0 or not self._is_nested
        require(begins, f"tier_weights: expected more than 0 for the tier that starts the curriculum, found {weights}")
        require_least(self, composition_weight=0, composition_l1=0, moves_every_steps=0, idle_frequency=0, tier_drift=0)
        require_least(self, resample_every_steps=0, resample_until=0)
        require_positive(self, "tier_clip_norm")
        require(self.tier_drift < 1, f"tier_drift: expected less than 1, found {self.tier_drift}")
        require_positive(self, "moves_at_once", most=1)
        nested = self._is_nested or not self.moves_every_steps
        require(nested, "moves_every_steps: expected tiers that reconstruct on their own, found weights of 0")
        require(self.moves_every_steps > 0 or not self.moves_live, "moves_live: expected moves_every_steps, found 0")
        rising = self.curriculum is None or (
            len(self.curriculum) == count
            and self.curriculum[0] == 0
            and min(self.curriculum) == 0
            and max(self.curriculum) + self.curriculum_rise_fraction <= 1
            and self.curriculum_rise_fraction > 0
        )
        require(
            rising,
            f"curriculum: expected {count} shares of the run, the first 0, no other below it, with each rise complete "
            f"before the end, found {self.curriculum} with rises of {self.curriculum_rise_fraction}",
        )
