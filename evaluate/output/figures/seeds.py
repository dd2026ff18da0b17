"""Which SAEs are seeds of the same one: plots and pages show them as one, in one colour."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from .records import SEED, Record


def groups_of(records: Sequence[Record]) -> dict[str, str]:
    """Each SAE's name to that of its group: the name without its seed if all SAEs that share it differ by nothing but
    their seeds, otherwise its own."""
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
    """Each SAE's name to the place of its group among all groups, which decides its look."""
    groups = groups_of(records)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: places[group] for name, group in groups.items()}
