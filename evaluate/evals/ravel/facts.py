"""The facts asked about: RAVEL's cities and Nobel laureates from the hub, or Python's identifiers.

Identifiers are counted in the standard library: what a small model of code does know. An entity is an identifier about
to be read from, such as `parser.`. Two attributes: its favourite member where a value is wanted (`x = sys.modules`),
and where a statement begins (`sys.stdout`). As in RAVEL, only prompts that the model answers right are kept, so
nothing here must be true of every model.

The entity ends the prompt, because deep in a small model earlier tokens have no more to say: swapping whole residuals
one token before the end changed one answer in fifty at layer 19 of the pocket model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ....harvest.pocket.text import stdlib_documents
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


ENTITY_CLASS = "identifier"
TEMPLATES = {
    "Value": ("    x = %s", "        value = %s", "        return %s"),
    "Statement": ("    %s", "        %s", "    else:\n        %s"),
}
ATTRIBUTES = tuple(TEMPLATES)
FACTS = {
    "Value": re.compile(r"(?:= |return )([a-z_]{2,}\.)([A-Za-z_]+)"),
    "Statement": re.compile(r"^ +([a-z_]{2,}\.)([A-Za-z_]+)", re.MULTILINE),
}
MIN_COUNT = 5
NUM_ENTITIES = 60
"""Of each attribute."""


def load_identifiers() -> list[EntityClass]:
    """The identifiers that the installed library uses most."""
    return [count_identifiers([text for _, text in stdlib_documents()])]


def count_identifiers(texts: Iterable[str], num_entities: int = NUM_ENTITIES) -> EntityClass:
    """The most frequent identifiers of each attribute; many have one attribute alone."""
    facts: dict[str, dict[str, str]] = defaultdict(dict)
    for attribute, pattern in FACTS.items():
        for name, label in _favourites(texts, pattern, num_entities):
            facts[name][attribute] = label
    return EntityClass(ENTITY_CLASS, dict(facts), TEMPLATES)


def _favourites(texts: Iterable[str], pattern: re.Pattern[str], number: int) -> list[tuple[str, str]]:
    """The most frequent names, each with what most often follows it: the first seen of equals."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for name, label in pattern.findall(text):
            counts[name][label] += 1
    common = {name: each.most_common(1)[0] for name, each in counts.items()}
    known = [name for name, (_, count) in common.items() if count >= MIN_COUNT]
    known.sort(key=lambda name: -counts[name].total())
    return [(name, common[name][0]) for name in known[:number]]
