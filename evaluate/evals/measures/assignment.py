"""The tier, group or range of each latent: as trained or, for a plain SAE, assigned afterwards.

A variant saves its assignment with its weights, under the names of an extra and its tensor; a module rebuilt from its
variant has the same as attributes. An SAE without one gets equal shares of its dictionary, in the order of its latents:
the baseline that every measure compares with. F latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ...context.loaded_sae import LoadedSae
from .position import ANYWHERE, equal_shares

TIERS, RANGES, GROUPS = "tiers.membership", "mask.range", "temporal.group"
EQUAL_SHARES = "equal shares"  # the source of an assignment for an SAE that has none of its own


@dataclass(frozen=True, eq=False)
class Assignment:
    """A number for each latent, and where it comes from."""

    of_latent: Tensor  # int64 [F]
    count: int
    source: str  # "saved", perhaps with a detail, or how it was assigned

    def members(self, number: int) -> Tensor:
        """bool [F]."""
        return self.of_latent == number


def saved(subject: LoadedSae, name: str) -> Tensor | None:
    """A tensor trained with the SAE, by its name among the weights or its path in the module."""
    tensor = subject.sae.extras_tensors.get(name)
    if tensor is None:
        module = getattr(subject.sae, "inner", subject.sae)
        tensor = reduce(lambda part, key: getattr(part, key, None), name.split("."), module)
    return tensor.detach().to(subject.sae.W_dec.device) if isinstance(tensor, Tensor) else None


def saved_composition(subject: LoadedSae, tier: int, rows: int, columns: int) -> Tensor | None:
    """The composition that was learned for a tier's latents; the saved matrix may have more rows and columns."""
    learned = saved(subject, f"composition.C{tier + 1}")
    if learned is None or learned.shape[0] < rows or learned.shape[1] < columns:
        return None
    return learned[:rows, :columns].float()


def tiers_of(subject: LoadedSae, count: int) -> Assignment:
    """The tier of each latent, 0 the lowest: as saved, or `count` equal shares."""
    return _saved_or_equal(subject, TIERS, count, least=1)


def groups_of(subject: LoadedSae, count: int) -> Assignment:
    """The temporal group of each latent: short, medium, long, free."""
    return _saved_or_equal(subject, GROUPS, count, least=count)


def ranges_of(subject: LoadedSae, count: int, context: int) -> Assignment | None:
    """The range of positions of each latent, from its mask; None for an SAE that was trained without one."""
    ranges = saved(subject, RANGES)
    if ranges is not None:
        known = saved(subject, "mask.num_ranges")
        details = subject.metadata.get("training_architecture_details", {})
        is_found = "mask" in details and (details["mask"] not in ("hard", "soft") or details.get("scattered", False))
        source = "saved, found in training" if is_found else "saved"
        return Assignment(ranges.long(), int(known) if known is not None else max(int(ranges.max()) + 1, 1), source)
    centre = saved(subject, "mask.centre")
    if centre is None:
        return None
    place = centre.round().long().clamp(0, context - 1)
    return Assignment(equal_shares(context, count).to(place.device)[place], count, "saved centres")


def is_bound(assignment: Assignment) -> Tensor:
    """bool [F]: latents that have a range."""
    return assignment.of_latent != ANYWHERE


def _saved_or_equal(subject: LoadedSae, name: str, count: int, least: int) -> Assignment:
    """The saved assignment, or equal shares. A saved one has `least` groups or more: the last may be empty."""
    membership = saved(subject, name)
    if membership is not None:
        return Assignment(membership.long(), max(least, int(membership.max()) + 1), "saved")
    return Assignment(equal_shares(subject.width, count).to(subject.sae.W_dec.device), count, EQUAL_SHARES)


def evenly_spread(members_F: Tensor, most: int) -> Tensor:
    """int64: the marked latents, or `most` of them spread evenly."""
    latents = members_F.nonzero().view(-1)
    if len(latents) <= most:
        return latents
    return latents[torch.linspace(0, len(latents) - 1, most, device=latents.device).long()]
