"""ravel: swap one attribute of an entity through an SAE's latents, and see whether the others stay.

1. Keep the prompts that the model answers correctly, about the entities it knows best.
2. For each attribute draw equal numbers of pairs for cause (this attribute) and isolation (the others).
3. Learn which latents to swap from 70 % of them; all SAEs see the same pairs.
4. On the rest: how often does the swapped attribute appear (cause), and how often do the others stay (isolation)?

SAEBench's entities are cities and Nobel laureates; the pocket model is asked about Python's identifiers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ....cache_schema.numbers_in_words import counted
from ...context.disk_cache import decided_by, model_print, remembered
from ...context.evaluation_data_sets import commits_of, library_revision
from ...context.prompt_positions import Reader
from ...context.saes_usable_on_text import attention_of, official_config, split_fitting
from ...errors import SettingInvalid
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .prompts_and_pairs import (
    ATTRIBUTES,
    DATASET,
    ENTITY_CLASS,
    EntityClass,
    Pair,
    Prompt,
    Scores,
    answered_prompts,
    by_first_token,
    by_kind,
    draw_pairs,
    load_facts,
    load_identifiers,
    make_prompts,
    mean_scores,
    require_labels,
)
from .swapper import Swapper, complete

GENERATION_FACTOR = 8
"""How much larger batches are for completing prompts, which takes less memory than learning masks."""
OFFICIAL_SELECTION = {
    "city": ("Country", "Continent", "Language"),
    "nobel_prize_winner": ("Country of Birth", "Field", "Gender"),
}


@dataclass(frozen=True)
class Config:
    """SAEBench's settings."""

    data: Literal["auto", "ravel", "stdlib"] = "auto"
    """auto: identifiers of the standard library for the pocket model, RAVEL's prompts for all others."""
    entity_attribute_selection: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Empty: SAEBench's, or all of the data used instead."""
    cache: str = "~/.cache/saemill/ravel"
    """Where a model's answers to the prompts are cached."""
    top_n_entities: int = 500
    num_pairs_per_attribute: int = 5000
    train_test_split: float = 0.7
    learning_rate: float = 1e-3
    num_epochs: int = 2
    n_generated_tokens: int = 6
    llm_batch_size: int = 8
    random_seed: int = 42


@dataclass
class Findings:
    """What was found about one SAE, by entity class and attribute."""

    official: dict[str, dict[str, Scores]] = field(default_factory=dict)
    ours: dict[str, dict[str, Scores]] = field(default_factory=dict)
    latents: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: int = 0
    """How many pairs its swaps were judged on."""

    def add(self, entity: str, attribute: str, pairs: Sequence[Pair], answers: Sequence[str], chosen: Tensor) -> None:
        self.official.setdefault(entity, {})[attribute] = by_first_token(pairs, answers)
        self.ours.setdefault(entity, {})[attribute] = by_kind(pairs, answers)
        self.latents.setdefault(entity, {})[attribute] = int(chosen.sum())
        self.pairs += len(pairs)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    if not 0 < config.train_test_split < 1:
        raise SettingInvalid(
            "ravel.train_test_split: expected a share of pairs to learn masks from, more than 0 and less than 1, found "
            f"{config.train_test_split}"
        )
    is_stdlib = context.takes_library(config.data)
    selection = config.entity_attribute_selection or ({ENTITY_CLASS: ATTRIBUTES} if is_stdlib else OFFICIAL_SELECTION)
    entities = load_identifiers() if is_stdlib else load_facts(tuple(selection))
    require_selectable(selection, entities)

    def longest_prompt() -> int:
        encode, bos = context.model.tokenizer.encode, context.model.bos
        by_class = (make_prompts(each, selection[each.name], encode, bos) for each in entities)
        return max((len(prompt.tokens) for prompts in by_class for prompt in prompts), default=0)

    fitting, failures = split_fitting(context, subjects, context.model, longest_prompt)
    yield from failures
    if not fitting:
        return
    findings = {subject: Findings() for subject in fitting}
    draw = random.Random(config.random_seed)
    for entity_class in entities:
        swap_attributes(context, entity_class, selection[entity_class.name], findings, config, draw)
    for subject in fitting:
        yield make_result(context, subject, findings[subject], selection, config)


def require_selectable(selection: Mapping[str, Sequence[str]], entities: Sequence[EntityClass]) -> None:
    """Require a selection that is in the data, of at least two attributes: one is swapped, the others stay."""
    known = {entity_class.name: tuple(entity_class.templates) for entity_class in entities}
    fits = selection.keys() == known.keys() and all(set(selection[name]) <= set(known[name]) for name in known)
    if not fits or any(len(set(attributes)) < 2 for attributes in selection.values()):
        raise SettingInvalid(
            f"ravel.entity_attribute_selection: expected attributes of {listed(known)}, found {listed(selection)}: "
            "select two attributes or more of each (isolation is measured on the others), or use other data with "
            "ravel.data"
        )


def listed(selection: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{name} ({', '.join(attributes)})" for name, attributes in selection.items())


def swap_attributes(
    context: Context,
    entity_class: EntityClass,
    attributes: Sequence[str],
    findings: Mapping[LoadedSae, Findings],
    config: Config,
    draw: random.Random,
) -> None:
    """One entity class, attribute by attribute, for all SAEs."""
    prompts = known_prompts(context, entity_class, attributes, config)
    require_labels(prompts, attributes)
    subjects = tuple(findings)
    batch_size = config.llm_batch_size * GENERATION_FACTOR
    reader = Reader(context.model, subjects, attention_of(context, subjects), batch_size, context.say)
    with context.watch.stage(f"ravel: reading {entity_class.name}", len(prompts), "prompts") as advance:
        swapper = Swapper(reader, prompts, advance)
    for attribute in attributes:
        others = [other for other in attributes if other != attribute]
        pairs = draw_pairs(prompts, attribute, others, config.num_pairs_per_attribute, draw)
        swap_attribute(context, swapper, entity_class.name, attribute, pairs, findings, config)


def known_prompts(
    context: Context, entity_class: EntityClass, attributes: Sequence[str], config: Config
) -> list[Prompt]:
    """Prompts that the model answers correctly; its answers to SAEBench's are cached between runs."""
    model, name, count = context.model, entity_class.name, config.n_generated_tokens
    prompts = make_prompts(entity_class, attributes, model.tokenizer.encode, model.bos)

    def ask() -> tuple[list[int], list[str]]:
        with context.watch.stage(f"ravel: asking about {name}", len(prompts), "prompts") as advance:
            return complete(model, prompts, count, config.llm_batch_size * GENERATION_FACTOR, advance)

    if name == ENTITY_CLASS:
        first, answers = ask()
    else:
        decided = decided_by(model=model_print(model), tokens=count, prompts=[prompt.text for prompt in prompts])
        first, answers = remembered(config.cache, name, decided, ask)
    return answered_prompts(prompts, first, answers, config.top_n_entities)


def swap_attribute(
    context: Context,
    swapper: Swapper,
    entity: str,
    attribute: str,
    pairs: Sequence[Pair],
    findings: Mapping[LoadedSae, Findings],
    config: Config,
) -> None:
    cut = int(len(pairs) * config.train_test_split)
    epochs, lr, batch_size = config.num_epochs, config.learning_rate, config.llm_batch_size
    total = epochs * cut + len(pairs) - cut
    with context.watch.stage(f"ravel: {entity}, {attribute}", total, "pairs") as advance:
        chosen = swapper.learn(pairs[:cut], epochs, lr, batch_size, advance)
        judged, answers = swapper.completions(pairs[cut:], chosen, config.n_generated_tokens, batch_size, advance)
    for subject, found in findings.items():
        found.add(entity, attribute, judged, answers[subject], chosen[subject])


def make_result(
    context: Context, subject: LoadedSae, found: Findings, selection: Mapping[str, Sequence[str]], config: Config
) -> Result:
    """Means over attributes, then over entity classes."""
    total = mean_scores([mean_scores(list(scores.values())) for scores in found.official.values()])
    ours = mean_scores([mean_scores(list(scores.values())) for scores in found.ours.values()])
    data = "stdlib: identifiers" if ENTITY_CLASS in selection else DATASET
    return Result(
        subject,
        official_config(
            context,
            config,
            entity_attribute_selection={entity: list(attributes) for entity, attributes in selection.items()},
            top_n_templates=90,  # declared by SAEBench, and never used
            full_dataset_downsample=None,
            force_dataset_recompute=False,
            train_mdas=False,
        ),
        {
            "ravel": {
                "disentanglement_score": total.disentangle,
                "cause_score": total.cause,
                "isolation_score": total.isolation,
            }
        },
        unstructured=by_class(found.official),
        extra={
            "ravel": {
                "data": data,
                "by_kind": {**ours.to_json(), **by_class(found.ours)},
                "swapped_latents": found.latents,
            }
        },
        measured_on=f"{data}, {counted(found.pairs, 'pair')} of prompts",
    )


def by_class(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, dict[str, dict[str, float]]]:
    """Under SAEBench's keys: city_results -> city_Country -> scores."""
    return {
        f"{entity}_results": {f"{entity}_{attribute}": each.to_json() for attribute, each in attributes.items()}
        for entity, attributes in scores.items()
    }


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(model=True),
    summary=("ravel.disentanglement_score", "ravel.cause_score", "ravel.isolation_score"),
    least=dict.fromkeys(
        ("top_n_entities", "num_pairs_per_attribute", "num_epochs", "n_generated_tokens", "llm_batch_size"), 1
    ),
    data_revision=lambda context, config: (
        library_revision() if context.takes_library(config.data) else commits_of([DATASET])
    ),
    revision=2,  # the tokens of a template's tail are counted after a word
)
