"""Which SAEs are one from several seeds: plots and pages show them as one, in one colour."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from .records import SEED, Record


def groups_of(records: Sequence[Record]) -> dict[str, str]:
    """By each SAE's name that of its group: the name without its seed, where nothing but seeds differs among those that
    it is the name of."""
    names = {
        record.name: record.name.removesuffix(record.label) + (SEED.sub("", record.label) or record.label)
        for record in records  # a run's name before the label may have a seed as well, and stays
    }
    kinds = defaultdict[str, set[str]](set)
    for record in records:
        settings = {key: value for key, value in record.settings.items() if key != "seed"}
        kinds[names[record.name]].add(json.dumps([record.variant, settings], sort_keys=True, default=str))
    return {own: name if len(kinds[name]) == 1 else own for own, name in names.items()}


def places_of(records: Sequence[Record]) -> dict[str, int]:
    """By each SAE's name the place of its group among all groups, which says how the SAE looks."""
    groups = groups_of(records)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: places[group] for name, group in groups.items()}
