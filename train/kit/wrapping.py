"""A base inside another variant: `attention(base=topk, k=32)` is a config, not a class.

The config of a variant that wraps a base is flat. Settings that the base's config also has are passed on;
an optional setting (None by default) may be given only if the base has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from ...cache_schema import Manifest
from ...cache_schema.sites import RESID
from ..data.batch import Needs
from ..data.scaling import Stats
from ..engine.adam import Optim
from ..engine.terms_and_constraints import Assembly
from ..sae.kernels.dense_products import Product
from . import variant_registry
from .check_variant_settings import require
from .variant_contract import Variant, most_active

# Optional; wrapping variants only pass them on.
BASE_SETTINGS = ("k", "penalty", "target_l0", "aux_weight", "aux_k", "centre_by_mean")


@dataclass(frozen=True)
class Wrapping(Variant):
    """Settings of every variant with a base; None means the base's own default."""

    own_tables: ClassVar[float] = 1.0
    """Tables [B, F] in float32 that a step holds at its peak, on top of the base's."""

    base: str = "standard"
    layer: int = 19
    hook: str = RESID
    width: int = 2304
    k: float | None = None
    penalty: float | None = None
    target_l0: float | None = None
    aux_weight: float | None = None
    aux_k: int | None = None
    seed: int = 0
    dead_after_tokens: int = 10_000_000
    centre_by_mean: bool | None = None
    encoder_product: Product = "float32"
    optim: Optim = field(default_factory=Optim)

    def unread(self) -> Mapping[str, str]:
        """What the base does not read of the settings that are passed on to it."""
        own = {field.name for field in dataclasses.fields(self)}
        return {name: why for name, why in _base_config(self, None).unread().items() if name.partition(".")[0] in own}

    def step_tables(self) -> float:
        return _base_config(self, None).step_tables() + self.own_tables

    def dead_part(self) -> int:
        return variant_registry.config_type(self.base)().dead_part()


@dataclass(frozen=True)
class Windowed(Wrapping):
    """Settings of variants whose SAE depends on positions in the window."""

    context: int | None = None
    """Length of the store's windows; None: read from the store."""

    @property
    def length(self) -> int:
        require(self.context is not None, "context: expected the length of the store's windows, found none")
        assert self.context is not None
        return self.context

    def fill(self, manifest: Manifest) -> Self:
        return self if self.context is not None else replace(self, context=manifest.context)

    def check(self, manifest: Manifest) -> None:
        require(
            self.context in (None, manifest.context),
            f"context: expected {manifest.context}, the store's window length, found {self.context}; leave it out",
        )


def build_base(config: Wrapping, d_model: int, stats: Stats | None = None) -> Assembly:
    """The assembly of the variant that `config.base` names, with the settings of `config`."""
    base_needs(config)
    return _base_config(config, d_model).build(d_model, stats)


def base_needs(config: Wrapping) -> Needs:
    """The needs of the base, which must learn, read single tokens of one layer and reconstruct them."""
    base = _base_config(config, None)
    needs = base.needs()
    plain = len(needs.inputs) == 1 and needs.targets is None and not needs.windows
    require(
        plain, f"base: expected a variant that reads tokens of one layer and reconstructs them, found {config.base!r}"
    )
    require(
        not base.is_baseline,
        f"base: expected a variant that learns, found the baseline {config.base!r}: train it on its own",
    )
    return needs


def _base_config(config: Wrapping, d_model: int | None) -> Variant:
    cls: Any = variant_registry.config_type(config.base)
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    require("base" not in known, f"base: expected a variant that wraps no other, found {config.base!r}")
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "base"}
    foreign = [name for name in BASE_SETTINGS if given.get(name) is not None and name not in known]
    require(
        not foreign, f"base {config.base} has no setting {', '.join(foreign)}: leave it out, or choose another base"
    )
    settings: dict[str, Any] = {}
    if d_model is not None:  # the base's default sparsity may be too large for the width of the residual
        limit = most_active(d_model)
        settings = {name: limit for name in ("k", "target_l0") if name in known and known[name] > limit}
    settings |= {name: value for name, value in given.items() if name in known and value is not None}
    # A mean `k` per token may be 32.5; a fixed one may not.
    numbers = {name: value for name, value in settings.items() if type(known[name]) is int and type(value) is float}
    fractional = [name for name, value in numbers.items() if value != int(value)]
    require(
        not fractional,
        f"{', '.join(fractional)}: expected a whole number for the base {config.base}, found "
        + ", ".join(str(numbers[name]) for name in fractional),
    )
    return cls(**settings | {name: int(value) for name, value in numbers.items()})
