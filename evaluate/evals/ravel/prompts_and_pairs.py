"""Prompts about entities, every template of an attribute with every entity's name in it; and pairs of them.

Entities are RAVEL's cities and Nobel laureates from the hub, or Python's identifiers.

Identifiers are counted in the standard library, which even a small model of code knows. An entity is an identifier
followed by a dot, such as `parser.`. It has two attributes: its most frequent member where a value is expected
(`x = sys.modules`), and where a statement begins (`sys.stdout`). As in RAVEL, only prompts that the model answers
correctly are kept, so nothing here has to be true for every model.

The entity ends the prompt, because deep in a small model earlier tokens no longer matter: swapping whole residuals one
token before the end changed one answer in fifty at layer 19 of the pocket model.

Pairs of prompts: the source's entity passes an attribute on to the base's.

Cause: the base asks for the attribute that is swapped, the source's label differs, and the answer must become the
source's. Isolation: both ask for another attribute, and the base's own answer must stay.

Scores are shares of right answers. SAEBench takes pairs with equal first tokens for isolation pairs, so a cause pair
whose two labels begin with the same token is counted there, with the source's label: SAEBench's keys keep this. Our own
scores (`by_kind`) go by what each pair was made for.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ....harvest.corpus.stdlib import stdlib_documents
from ...context.evaluation_data_sets import load_json
from ...errors import NotApplicable
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
    """A question about one attribute of one entity, and the model's answer."""

    text: str
    attribute: str
    label: str
    entity: str
    tokens: tuple[int, ...]  # with BOS
    entity_position: int  # of the entity's last token, counted from the end: negative
    first_token: int = -1  # of the model's own completion
    completion: str = ""


def make_prompts(entities: EntityClass, attributes: Sequence[str], encode: Encode, bos: int) -> list[Prompt]:
    """All prompts, in the order of the data: by entity, then attribute, then template.

    An entity is asked only about attributes that it has.
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
    name = next(iter(entities.facts), "")
    bare, *ended = encode([name, *(f"{name}{template.split(SLOT)[1]}" for _, template in asked)])
    tail_of = {template: len(each) - len(bare) for (_, template), each in zip(asked, ended, strict=True)}
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
    """Prompts that the model answers correctly, about the entities that it knows best; in a tie, about those that come
    first in the data."""
    answered = (
        replace(prompt, first_token=token, completion=completion)
        for prompt, token, completion in zip(prompts, first_tokens, completions, strict=True)
    )
    known = [prompt for prompt in answered if is_right(prompt.text, prompt.label, prompt.completion)]
    counts = Counter(prompt.entity for prompt in known)  # keeps the order of first appearance
    kept = set(sorted(counts, key=counts.__getitem__, reverse=True)[:top_entities])
    return [prompt for prompt in known if prompt.entity in kept]


DATASET = "adamkarvonen/ravel_prompts"


def load_facts(names: Sequence[str]) -> list[EntityClass]:
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


def load_identifiers() -> list[EntityClass]:
    """The identifiers that the standard library uses most."""
    return [count_identifiers([text for _, text in stdlib_documents()])]


def count_identifiers(texts: Iterable[str]) -> EntityClass:
    """The most frequent identifiers of each attribute; many have only one of the two."""
    facts: dict[str, dict[str, str]] = defaultdict(dict)
    for attribute, pattern in FACTS.items():
        for name, label in _favourites(texts, pattern):
            facts[name][attribute] = label
    return EntityClass(ENTITY_CLASS, dict(facts), TEMPLATES)


def _favourites(texts: Iterable[str], pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    """The 60 most frequent names, each with what follows it most often, at least five times; in a tie, the first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        for name, label in pattern.findall(text):
            counts[name][label] += 1
    common = {name: each.most_common(1)[0] for name, each in counts.items()}
    known = [name for name, (_, count) in common.items() if count >= 5]
    known.sort(key=lambda name: -counts[name].total())
    return [(name, common[name][0]) for name in known[:60]]


@dataclass(frozen=True)
class Pair:
    base: Prompt
    source: Prompt
    is_cause: bool

    @property
    def label(self) -> str:
        """The right answer to the base once the source's latents are swapped in."""
        return self.source.label if self.is_cause else self.base.label

    @property
    def target_token(self) -> int:
        """The first token of that answer."""
        return self.source.first_token if self.is_cause else self.base.first_token


def require_labels(prompts: Sequence[Prompt], attributes: Sequence[str]) -> None:
    """Require two labels of each attribute to draw pairs from."""
    for attribute in attributes:
        labels = {prompt.label for prompt in prompts if prompt.attribute == attribute}
        if len(labels) < 2:
            raise NotApplicable(
                f"RAVEL: the model answers prompts about {attribute!r} with {len(labels)} different labels, "
                "but swapping needs two: a larger model knows more"
            )


def draw_pairs(
    prompts: Sequence[Prompt], cause: str, others: Sequence[str], number: int, draw: random.Random
) -> list[Pair]:
    """At most as many pairs for isolation as for cause, in random order; draws are made in SAEBench's order."""
    cause_pairs = _pairs(prompts, cause, number, draw, is_cause=True)
    isolation_pairs = [pair for other in others for pair in _pairs(prompts, other, number, draw, is_cause=False)]
    draw.shuffle(isolation_pairs)
    pairs = cause_pairs + isolation_pairs[: len(cause_pairs)]
    draw.shuffle(pairs)
    return pairs


def _pairs(
    prompts: Sequence[Prompt], attribute: str, number: int, draw: random.Random, *, is_cause: bool
) -> list[Pair]:
    """Bases drawn without repetition (all if there are fewer), each with a random source of another label."""
    asking = [prompt for prompt in prompts if prompt.attribute == attribute]
    sources = {label: [one for one in asking if one.label != label] for label in {prompt.label for prompt in asking}}
    bases = asking if len(asking) < number else draw.sample(asking, number)
    return [Pair(base, draw.choice(sources[base.label]), is_cause) for base in bases]


@dataclass(frozen=True)
class Scores:
    cause: float
    isolation: float

    @property
    def disentangle(self) -> float:
        return (self.cause + self.isolation) / 2

    def to_json(self) -> dict[str, float]:
        return {"cause_score": self.cause, "isolation_score": self.isolation, "disentangle_score": self.disentangle}


def by_first_token(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """Scores by SAEBench's rule."""
    return _scores(pairs, completions, lambda pair: pair.target_token != pair.base.first_token)


def by_kind(pairs: Sequence[Pair], completions: Sequence[str]) -> Scores:
    """Scores by what each pair was made for."""
    return _scores(pairs, completions, lambda pair: pair.is_cause)


def mean_scores(scores: Sequence[Scores]) -> Scores:
    return Scores(fmean(each.cause for each in scores), fmean(each.isolation for each in scores))


def _scores(pairs: Sequence[Pair], completions: Sequence[str], is_cause: Callable[[Pair], bool]) -> Scores:
    right: dict[bool, list[bool]] = {True: [], False: []}
    for pair, completion in zip(pairs, completions, strict=True):
        right[is_cause(pair)].append(is_right(pair.base.text, pair.label, completion))
    return Scores(*(fmean(found) if found else math.nan for found in right.values()))  # results have NaN as -1
