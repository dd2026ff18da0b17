"""Prompts, the filter by what a model knows, and the drawing of pairs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from saemill.evaluate.errors import NotApplicable
from saemill.evaluate.evals.ravel.prompts_and_pairs import (
    EntityClass,
    Pair,
    Prompt,
    answered_prompts,
    by_first_token,
    by_kind,
    draw_pairs,
    make_prompts,
    require_labels,
)

CITIES = EntityClass(
    name="city",
    facts={
        "Rome": {"Country": "Italy", "Language": "Italian", "Area": "big"},
        "Bonn": {"Country": "Germany", "Language": "German", "Area": "small"},
        "Milan": {"Country": "Italy", "Language": "Italian", "Area": "big"},
    },
    templates={"Country": ["%s is in", "%s lies in the land of"], "Language": ["In %s they speak"], "Area": ["%s is"]},
)


def encode(texts):
    """A token for each word: its length."""
    return [[len(word) for word in text.split()] for text in texts]


def prompts_of_cities() -> list[Prompt]:
    return make_prompts(CITIES, ["Country", "Language"], encode, bos=99)


def known() -> list[Prompt]:
    """Every prompt answered right; the first token is the label's length."""
    return [
        replace(prompt, first_token=len(prompt.label), completion=prompt.label + ".") for prompt in prompts_of_cities()
    ]


def test_every_template_is_asked_of_every_entity_and_points_at_its_last_token():
    prompts = prompts_of_cities()
    assert [prompt.text for prompt in prompts[:4]] == [
        "Rome is in",
        "Rome lies in the land of",
        "In Rome they speak",
        "Bonn is in",
    ]
    assert {prompt.attribute for prompt in prompts} == {"Country", "Language"}
    for prompt in prompts:
        assert prompt.tokens[0] == 99
        assert prompt.tokens[prompt.entity_position] == len(prompt.entity)


def test_only_right_answers_about_the_best_known_entities_stay():
    prompts = prompts_of_cities()
    completions = [prompt.label if prompt.entity != "Rome" or "in" in prompt.text else "?" for prompt in prompts]
    completions[-1] = "nonsense"
    kept = answered_prompts(prompts, range(len(prompts)), completions, top_entities=1)
    assert {prompt.entity for prompt in kept} == {"Bonn"}
    assert [prompt.first_token for prompt in kept] == [3, 4, 5]
    everything = answered_prompts(prompts, range(len(prompts)), completions, top_entities=3)
    assert [prompt.entity for prompt in everything] == ["Rome"] * 2 + ["Bonn"] * 3 + ["Milan"] * 2


def test_pairs_are_balanced_and_differ_in_the_label():
    pairs = draw_pairs(known(), "Country", ["Language"], number=3, draw=random.Random(0))
    assert sum(pair.is_cause for pair in pairs) == sum(not pair.is_cause for pair in pairs) == 3
    for pair in pairs:
        assert pair.base.label != pair.source.label
        assert {pair.base.attribute, pair.source.attribute} == {"Country" if pair.is_cause else "Language"}
        assert pair.label == (pair.source if pair.is_cause else pair.base).label
        assert pair.target_token == len(pair.label)


def test_the_same_seed_draws_the_same_pairs_and_no_global_state_moves():
    state = random.getstate()
    first, again = (draw_pairs(known(), "Country", ["Language"], 2, random.Random(5)) for _ in range(2))
    assert first == again
    assert random.getstate() == state


def test_one_label_cannot_be_swapped():
    italians = [prompt for prompt in known() if prompt.label != "Germany"]
    with pytest.raises(NotApplicable, match="1 different labels"):
        require_labels(italians, ["Country"])


def test_a_cause_pair_with_equal_first_tokens_counts_as_isolation_in_the_protocol_only():
    rome, bonn = (next(prompt for prompt in known() if prompt.entity == name) for name in ("Rome", "Bonn"))
    twin = replace(bonn, first_token=rome.first_token)
    pairs = [Pair(rome, bonn, True), Pair(rome, twin, True), Pair(rome, bonn, False)]
    completions = ["Germany", "Germany", "nothing"]
    assert (by_kind(pairs, completions).cause, by_kind(pairs, completions).isolation) == (1.0, 0.0)
    official = by_first_token(pairs, completions)
    assert (official.cause, official.isolation, official.disentangle) == (1.0, 0.5, 0.75)
