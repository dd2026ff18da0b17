"""Facts about Python's identifiers, counted in the standard library: what a small model of code does know.

An entity is an identifier such as `parser`. Two attributes: the member that is most often read from it
(`parser.add_argument`), and its name again, where an assignment or an import repeats it. As in RAVEL, only prompts
that the model answers right are kept, so nothing here must be true of every model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from ...harvest.pocket.text import stdlib_documents
from ..ravel.prompts import EntityClass

ENTITY_CLASS = "identifier"
ATTRIBUTES = ("Member", "Name")
TEMPLATES = {
    "Member": ("    %s.", "    x = %s.", "        if %s."),
    "Name": ("        self.%s =", "        self._%s =", "\n\nimport %s\nimport"),
}
ACCESS = re.compile(r"\b([a-z_]{2,})\.([A-Za-z_]+)")
MIN_COUNT = 5
NUM_ENTITIES = 100


def load_identifiers() -> list[EntityClass]:
    """The identifiers that the installed library uses most."""
    return [count_identifiers(text for _, text in stdlib_documents())]


def count_identifiers(texts: Iterable[str], num_entities: int = NUM_ENTITIES) -> EntityClass:
    """Each of the most frequent identifiers with its most frequent member, the first seen of equals."""
    members: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for name, member in ACCESS.findall(text):
            members[name][member] += 1
    favourites = {name: counts.most_common(1)[0] for name, counts in members.items()}
    known = [name for name, (_, count) in favourites.items() if count >= MIN_COUNT]
    known.sort(key=lambda name: -members[name].total())
    facts = {name: {"Member": favourites[name][0], "Name": name} for name in known[:num_entities]}
    return EntityClass(ENTITY_CLASS, facts, TEMPLATES)
