"""Temporal: latents that change slowly over the window, at three time scales, on any base.

Three quarters of the dictionary are encouraged to stay the same, one each over 1-4, 5-16 and 17-128 tokens; the last
quarter is free. The SAE is a plain one unless the position-aware gate is on. With weights of 0 and no gate it equals
its base on whole windows, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...cache_schema import Manifest
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.schedules import Complement, Constant, Doubling, HalfLife, Onset, Product, Ramp, Schedule
from ..engine.terms_and_constraints import Assembly, Term
from ..kit.check_variant_settings import require, require_least, require_positive, require_some_latents, unread_unless
from ..kit.wrapping import Windowed, base_needs, build_base
from ..sae.shapes.masks import PositionGate
from ..sae.shapes.shaped_sae import ShapedAutoencoder
from ..terms.constraints import GradientNoise
from ..terms.temporal import PIECE, PRUNE, SCALES, TEMPORAL, Adaptive, Consistency, Dynamics, Retire

OF_ONSET = ("idle_steps", "warmup_steps", "idle_max_fraction")
OF_LOSSES = ("adaptive", "half_life_fraction", "buffer_mixing", "buffer_std", "other_windows", "progressive_window")
OF_LOSSES += ("variance_floor",)
"""Settings that only temporal losses read."""


@dataclass(frozen=True)
class Config(Windowed):
    short_to: int = 4
    medium_to: int = 16
    long_to: int = 128
    """The longest lag of each scale, in tokens; the shortest is one more than the longest of the previous scale."""
    temporal_weights: tuple[float, float, float] = (0.1, 0.1, 0.1)
    """Short, medium, long. Below 0.01 codes hardly change; from 0.3 on reconstruction suffers."""
    group_shares: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Share of the dictionary for each scale; the rest is free."""
    adaptive: Adaptive = "none"
    """gradient: weights are relative to reconstruction's gradient; variance: all latents count alike in a cosine."""
    idle_steps: int = 0
    """Steps without temporal losses, at most idle_max_fraction of the run."""
    warmup_steps: int = 1000
    """Steps over which their weights rise, at most the same share of the run."""
    idle_max_fraction: float = 0.2
    half_life_fraction: float | None = None
    """Share of the run over which the weights halve, from the end of their warm-up; None: they stay constant."""
    reconstruction_boost: float = 0.0
    """Extra weight of reconstruction before temporal losses come in: 1 doubles it."""
    buffer_mixing: float = 1.0
    """Share of the newest token in the running past that codes are compared with; 1: only the past token."""
    buffer_std: float = 0.0
    """Standard deviation of the random values from which that past starts in each document; 0: it starts empty."""
    other_windows: bool = False
    """The control: codes are compared with another window's past, at the same positions."""
    progressive_window: int | None = None
    """Compare tokens only within pieces of the window, of this length at first, doubling up to the whole window."""
    variance_floor: float = 0.0
    """Latents with less than this share of the mean variance are left out of temporal losses."""
    prune_share: float = 0.0
    """Latents with less than this share of the mean variance are retired; 0: none."""
    prune_from: float = 0.5
    """Share of the run before which no latent is retired."""
    prune_every_steps: int = 100
    gradient_noise: float = 0.0
    """Noise added to gradients, in multiples of each gradient's root mean square."""
    position_gate: bool = False
    gate_rank: int = 8

    def unread(self) -> Mapping[str, str]:
        compares, boosts = self._compares, self.reconstruction_boost > 0
        waits = self.idle_max_fraction > 0 and (self.idle_steps > 0 or self.warmup_steps > 0)
        return {
            **super().unread(),
            **unread_unless("a temporal weight above 0 for a group with latents", compares, *OF_LOSSES),
            **unread_unless("a temporal weight or reconstruction_boost", compares or boosts, *OF_ONSET),
            **unread_unless("an onset (idle_steps or warmup_steps)", waits, "reconstruction_boost"),
            **unread_unless("prune_share", self.prune_share > 0, "prune_from", "prune_every_steps"),
            **unread_unless("position_gate", self.position_gate, "gate_rank"),
        }

    def needs(self) -> Needs:
        self._require_valid()
        least = 2 if self.other_windows else 1  # the control compares windows with each other
        return replace(base_needs(self), windows=True, positions=True, documents=True, least_windows=least)

    def limits(self, manifest: Manifest, tokens: int) -> Mapping[str, float]:
        longest = dict.fromkeys(("short_to", "medium_to", "long_to"), manifest.context)
        return {**super().limits(manifest, tokens), **longest}

    def check(self, manifest: Manifest) -> None:
        super().check(manifest)
        longest = max(self.short_to, self.medium_to, self.long_to)
        require(
            longest <= manifest.context,
            f"long_to: expected lags that fit the store's windows of {manifest.context} tokens, found {longest}: "
            f"set long_to={manifest.context}, or harvest longer windows",
        )
        piece = self.progressive_window
        require(
            piece is None or piece < manifest.context,
            f"progressive_window: expected fewer tokens than the store's windows of {manifest.context}, found {piece}: "
            "set a smaller one, or leave it out",
        )

    def build(self, d_model: int, stats: Stats | None = None) -> Assembly:
        self._require_valid()
        assembly = build_base(self, d_model, stats)
        require(
            self.prune_share == 0 or assembly.sae.gate.can_lower,
            f"prune_share: expected a base whose latents a negative bias keeps closed, found {self.base!r}",
        )
        assembly = self._with_gate(self._with_terms(assembly))
        if self.gradient_noise > 0:
            assembly = assembly.with_constraints(GradientNoise(self.gradient_noise, assembly.generator))
        dynamics = Dynamics(self._group_sizes(), self.prune_every_steps, self.prune_share, self.variance_floor)
        assembly = assembly.with_extra(TEMPORAL, dynamics)
        if self.prune_share > 0:
            begins = Ramp(0.0, 1.0, self.prune_from, self.prune_from)
            assembly = assembly.with_constraints(Retire(dynamics)).with_knobs(**{PRUNE: begins})
        return assembly

    @property
    def _compares(self) -> bool:
        """Whether any group of latents has a temporal loss."""
        groups = zip(self.temporal_weights, self._group_sizes(), strict=False)  # the last group is free
        return any(weight > 0 and size > 0 for weight, size in groups)

    def _with_terms(self, assembly: Assembly) -> Assembly:
        """A loss for each scale, under a shared schedule."""
        weights: dict[str, float] = dict(zip(SCALES, self.temporal_weights, strict=True))
        terms: list[Term] = []
        knobs: dict[str, Schedule] = {}
        for loss in self._losses():
            name, weight = f"temporal_{loss.scale}", Product((Constant(weights[loss.scale]), self._schedule()))
            terms.append(Term(name, loss, weight))
            knobs[name] = weight
        if self.progressive_window is not None and self.context is not None:
            knobs[PIECE] = Doubling(self.progressive_window, self.context)
        if self.reconstruction_boost > 0:
            (old,) = (term for term in assembly.terms if term.name == "reconstruction")
            boost = Complement(self._onset(), self.reconstruction_boost)
            assembly = assembly.replacing(replace(old, weight=Product((old.weight, boost))))
        return assembly.with_terms(*terms).with_knobs(**knobs)

    def _with_gate(self, assembly: Assembly) -> Assembly:
        if not self.position_gate:
            return assembly
        gate = PositionGate(self.width, self.length, self.gate_rank, assembly.generator)
        return assembly.with_sae(ShapedAutoencoder(assembly.sae, {"position_gate": gate}))

    def _losses(self) -> list[Consistency]:
        """One for each scale that has latents and lags."""
        ends, losses, start, first = (self.short_to, self.medium_to, self.long_to), [], 0, 1
        for scale, last, size in zip(SCALES, ends, self._group_sizes(), strict=False):
            last = last if self.context is None else min(last, self.context - 1)
            if size > 0 and last >= first:
                group = (first, last, start, start + size)
                past = (self.buffer_mixing, self.other_windows, self.buffer_std)
                losses.append(Consistency(scale, *group, self.adaptive, *past))
            start, first = start + size, max(first, last + 1)
        return losses

    def _group_sizes(self) -> tuple[int, int, int, int]:
        short, medium, long = (int(share * self.width) for share in self.group_shares)
        return short, medium, long, self.width - short - medium - long

    def _onset(self) -> Onset:
        return Onset(self.idle_steps, self.warmup_steps, self.idle_max_fraction)

    def _schedule(self) -> Schedule:
        onset = self._onset()
        return onset if self.half_life_fraction is None else Product((onset, HalfLife(onset, self.half_life_fraction)))

    def _require_valid(self) -> None:
        require(
            0 < self.short_to <= self.medium_to <= self.long_to, "short_to, medium_to, long_to: expected rising lags"
        )
        for name in ("temporal_weights", "group_shares"):
            require(min(getattr(self, name)) >= 0, f"{name}: expected 0 or more, found {getattr(self, name)}")
        require(sum(self.group_shares) <= 1, f"group_shares: expected at most 1 together, found {self.group_shares}")
        for share, size in zip(self.group_shares, self._group_sizes(), strict=False):  # the last group is free
            if share > 0:
                require_some_latents("group_shares", share, size, self.width)
        require_least(self, idle_steps=0, warmup_steps=0, reconstruction_boost=0, variance_floor=0, prune_share=0)
        require_least(self, gradient_noise=0, prune_every_steps=1, gate_rank=1, progressive_window=1)
        require_positive(self, "buffer_mixing", most=1)
        require_positive(self, "half_life_fraction")
        mixes = self.buffer_mixing < 1 or self.buffer_std == 0
        require(mixes, "buffer_std: expected a buffer_mixing under 1, found only the past token")
        require_least(self, buffer_std=0)
