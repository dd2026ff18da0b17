"""Prompts about entities: every template of an attribute with every entity's name in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .answers import is_right

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to token ids, without BOS."""
SLOT = "%s"


@dataclass(frozen=True)
class EntityClass:
    """Facts about entities of one kind, and templates that ask for them."""

    name: str
    facts: Mapping[str, Mapping[str, str]]  # entity -> attribute -> label
    templates: Mapping[str, Sequence[str]]  # attribute -> templates with one slot


@dataclass(frozen=True)
class Prompt:
    """A question about one attribute of one entity, and what the model says to it."""

    text: str
    attribute: str
    label: str
    entity: str
    tokens: tuple[int, ...]  # with BOS
    entity_position: int  # of the entity's last token, counted from the end: below zero
    first_token: int = -1  # of the model's own completion
    completion: str = ""

    @property
    def is_answered(self) -> bool:
        return is_right(self.text, self.label, self.completion)


def make_prompts(entities: EntityClass, attributes: Sequence[str], encode: Encode, bos: int) -> list[Prompt]:
    """All prompts, in the order of the data: by entity, then attribute, then template.

    An entity without an attribute is not asked for it.
    """
    asked = [
        (attribute, template)
        for attribute, templates in entities.templates.items()
        if attribute in attributes
        for template in templates
    ]
    filled = [
        (entity, attribute, template)
        for entity, facts in entities.facts.items()
        for attribute, template in asked
        if attribute in facts
    ]
    texts = encode([template.replace(SLOT, entity, 1) for entity, _, template in filled])
    tails = encode([template.split(SLOT)[1] for _, template in asked])
    tail_of = {template: len(tail) for (_, template), tail in zip(asked, tails, strict=True)}
    return [
        Prompt(
            text=template.replace(SLOT, entity, 1),
            attribute=attribute,
            label=entities.facts[entity][attribute],
            entity=entity,
            tokens=(bos, *tokens),
            entity_position=-tail_of[template] - 1,
        )
        for (entity, attribute, template), tokens in zip(filled, texts, strict=True)
    ]


def answered_prompts(
    prompts: Sequence[Prompt], first_tokens: Sequence[int], completions: Sequence[str], top_entities: int
) -> list[Prompt]:
    """Prompts that the model answers right, of the entities about which it knows most.

    Among entities that are known equally well those that come first in the data stay.
    """
    answered = (
        replace(prompt, first_token=token, completion=completion)
        for prompt, token, completion in zip(prompts, first_tokens, completions, strict=True)
    )
    known = [prompt for prompt in answered if prompt.is_answered]
    counts = Counter(prompt.entity for prompt in known)  # keeps the order of first appearance
    kept = set(sorted(counts, key=counts.__getitem__, reverse=True)[:top_entities])
    return [prompt for prompt in known if prompt.entity in kept]
