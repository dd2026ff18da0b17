"""Which SAEs are one from several seeds: plots and pages show them as one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from .records import SEED, Record


def groups_of(records: Sequence[Record]) -> dict[str, str]:
    """By each SAE's name that of its group: the name without its seed, where nothing but seeds differs among those that
    it is the name of."""
    names = {record.name: SEED.sub("", record.name) or record.name for record in records}
    kinds = defaultdict[str, set[str]](set)
    for record in records:
        settings = {key: value for key, value in record.settings.items() if key != "seed"}
        kinds[names[record.name]].add(json.dumps([record.variant, settings], sort_keys=True, default=str))
    return {own: name if len(kinds[name]) == 1 else own for own, name in names.items()}
