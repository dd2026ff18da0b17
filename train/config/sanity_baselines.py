"""The sanity baselines of a run: SAEs to compare its own with, as members of the same fleet.

Each SAE that can be a base gets three baselines with half of the dictionary frozen, at its own settings; each number
of active latents in the run gets a baseline of as many principal components. In a comparing recipe, only the base
gets them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from ...cache_schema.sites import RESID
from ..errors import ConfigInvalid
from ..kit import variant_registry
from ..kit.wrapping import Wrapping
from .recipe import Recipe
from .run_config import Limits, Member, smaller_defaults

FROZEN, PCA = "frozen", "pca"  # the variants that are baselines


def with_baselines(members: Iterable[Member], limits: Limits, recipe: Recipe | None = None) -> tuple[Member, ...]:
    """The members and their baselines, without duplicates. In a comparing run, only the base's."""
    own = tuple(members)
    made: list[Member] = []
    for member in own:
        needs = member.config.needs()
        is_skipped = needs.targets is not None or len(needs.inputs) != 1 or member.config.is_baseline
        is_skipped |= needs.windows and not isinstance(member.config, Wrapping)  # neither is a base nor has one
        if not is_skipped and recipe is not None and recipe.against:  # only the base of the recipe, with any seed
            known = [sae.label for sae in recipe.saes if member.label.startswith(sae.label)]
            is_skipped = max(known, key=len) != recipe.against[0]
        if is_skipped:
            continue
        for baseline in (*_frozen(member), *_components(member, limits)):
            if baseline.config not in [other.config for other in made]:
                made.append(baseline)
    if not made:
        raise ConfigInvalid(
            "--with-baselines: expected an SAE that reconstructs tokens of one layer, or whose base does, found "
            f"{', '.join(member.variant for member in own)}: leave it out"
        )
    return (*own, *made)


def _frozen(member: Member) -> Iterator[Member]:
    config_type: Any = variant_registry.config_type(FROZEN)
    known = {field.name for field in dataclasses.fields(config_type)} - {"base", "part", "cosine"}
    config: Any = member.config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {key: value for key, value in values.items() if key in known}
    base = values.get("base", member.variant)
    if "base" not in values:  # what a wrapping variant adds to its base is compared, so a baseline may lack it
        plain = type(config)()
        lost = [key for key, value in values.items() if key not in settings and value != getattr(plain, key)]
        if lost:
            raise ConfigInvalid(
                f"--with-baselines: a frozen {member.variant} has no setting {', '.join(lost)}, so it would not be "
                "comparable: leave that at its default"
            )
    for part in get_args(variant_registry.module(FROZEN).Part):
        yield Member(f"{member.label}_frozen_{part}", FROZEN, config_type(base=base, part=part, **settings))


def _components(member: Member, limits: Limits) -> Iterator[Member]:
    config = member.config
    base: Any = variant_registry.config_type(config.base)() if isinstance(config, Wrapping) else config
    base = dataclasses.replace(base, **smaller_defaults(base, limits(config)))  # as a base is built
    found = (getattr(one, name, None) for one in (config, base) for name in ("k", "target_l0"))
    wanted, layer = next((number for number in found if number), None), getattr(config, "layer", None)
    if wanted is None or layer is None:  # a penalty does not fix the number
        return
    config_type: Any = variant_registry.config_type(PCA)
    hook = config.needs().hook
    pca = config_type(layer=layer, k=max(1, round(wanted)), hook=hook)
    made = dataclasses.replace(pca, width=int(limits(pca)["width"]))
    if made.k > made.width:
        reason = f"it needs {made.k} components, and there are at most {made.width}"
        warnings.warn(f"--with-baselines: {member.label} gets no {PCA} baseline: {reason}", stacklevel=2)
        return
    place = f"layer{layer}" if hook == RESID else f"{hook}{layer}"
    yield Member(f"{PCA}_k{made.k}_{place}", PCA, made)
