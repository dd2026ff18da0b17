"""The protocol's facts: prompts about cities and Nobel laureates, by their real name on the hub."""

from __future__ import annotations

from collections.abc import Sequence

from ...context.hub_data import load_json
from .prompts import EntityClass

DATASET = "adamkarvonen/ravel_prompts"


def load_facts(names: Sequence[str]) -> list[EntityClass]:
    """Entity classes in the order asked for."""
    return [
        EntityClass(
            name=name,
            facts=load_json(DATASET, f"ravel_{name}_entity_attributes.json"),
            templates=load_json(DATASET, f"ravel_{name}_attribute_to_prompts.json"),
        )
        for name in names
    ]
