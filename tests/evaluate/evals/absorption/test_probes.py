"""Words, prompts, probes and the choice of a letter's latents."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from saemill.evaluate.evals.absorption import task_and_probes
from saemill.evaluate.evals.absorption.task_and_probes import (
    FIRST_LETTER,
    Probe,
    Training,
    alphabetic_words,
    choose_latents,
    f1_score,
    fit_probe,
    make_prompt,
    split_words,
)

WORDS = [f"{letter}{tail}" for letter in "abcdef" for tail in ("xy", "zq")]


def test_words_are_alphabetic_tokens_with_or_without_a_space():
    tokens = ["\u2581cat", "dog", "\u2581", "x1", "<0x41>", "caf\u00e9", "A"]

    def to_text(token: str) -> str:
        """A decoder that drops the leading space of a first token."""
        return token.replace("\u2581", " ").removeprefix(" ")

    assert alphabetic_words(tokens, to_text) == [" cat", "dog", "A"]
    assert [FIRST_LETTER.class_of(word) for word in (" cat", "Zoo", "a")] == [2, 25, 0]


def test_a_prompt_has_ten_solved_examples_without_the_word_and_ends_in_it():
    prompt = make_prompt(WORDS[0], WORDS, FIRST_LETTER, random.Random(0))
    lines = prompt.split("\n")
    assert lines[0] == ""
    assert lines[-1] == "axy has the first letter:"
    assert len(lines) == 12
    for line in lines[1:-1]:
        word, letter = line.split(" has the first letter: ")
        assert letter == word[0].upper()
        assert word != WORDS[0]


def test_words_are_split_at_random_but_by_the_seed():
    train, test = split_words(WORDS, random.Random(3))
    assert (len(train), len(test)) == (9, 3)
    assert sorted(train + test) == WORDS
    assert split_words(WORDS, random.Random(3)) == (train, test)
    assert split_words(WORDS, random.Random(4)) != (train, test)


def planted_rows(letters: int = 4, rows: int = 200, width: int = 12):
    """Latent i says letter i; latent 4 says letter 0 for half of its words; the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(letters, (rows,), generator=generator)
    acts = 0.05 * torch.rand(rows, width, generator=generator)
    acts[torch.arange(rows), labels] = 1.0
    split = (labels == 0) & (torch.arange(rows) % 2 == 0)
    acts[split, 0], acts[split, 4] = 0.0, 1.0
    return acts, labels


def fitted(**changes) -> Probe:
    acts, labels = planted_rows()
    return fit_probe(acts, labels, 4, Training(**changes), torch.Generator().manual_seed(1))


def test_a_probe_separates_what_is_separable_and_repeats_by_its_seed():
    acts, labels = planted_rows()
    state = torch.random.get_rng_state()
    probe = fitted()
    assert (probe.scores(acts) > 0).float().argmax(1).eq(labels).float().mean() == 1.0
    assert torch.equal(probe.weights, fitted().weights)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_letter_without_words_does_not_spoil_the_others():
    acts, labels = planted_rows()
    probe = fit_probe(acts, labels, 5, Training(epochs=5), torch.Generator().manual_seed(1))
    assert bool(probe.weights.isfinite().all())


def test_the_sparse_probe_ranks_the_planted_latents_first():
    ranked = fitted(l1_decay=0.01, weight_decay=1e-6).weights.topk(3, dim=1).indices
    assert set(ranked[0, :2].tolist()) == {0, 4}
    assert [int(ranked[letter, 0]) for letter in (1, 2, 3)] == [1, 2, 3]


def test_encoded_rows_are_what_the_probe_sees():
    acts, labels = planted_rows()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    direct = fit_probe(2 * acts, labels, 4, Training(epochs=2), generators[0])
    encoded = fit_probe(acts, labels, 4, Training(epochs=2), generators[1], lambda x: 2 * x, width=12)
    torch.testing.assert_close(direct.weights, encoded.weights)


@pytest.mark.parametrize(("letter", "ranking", "own"), [(0, (0, 4, 7), (0, 4)), (1, (1, 7, 8), (1,))])
def test_a_split_letter_takes_two_latents_and_a_whole_one_takes_one(letter, ranking, own, monkeypatch):
    tried, f1_of_first = [], task_and_probes._f1_of_first
    monkeypatch.setattr(task_and_probes, "_f1_of_first", lambda k, *rest: tried.append(k) or f1_of_first(k, *rest))
    acts, labels = planted_rows()
    columns, truth = acts[:, list(ranking)].numpy(), (labels == letter).numpy()
    assert choose_latents(ranking, columns, truth, columns, truth, jump=0.03) == (own, (True,) * len(tried))
    assert len(tried) == len(own) + 1  # the first k that gained nothing was the last that was looked at


def test_f1_by_hand():
    truth, claimed = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 1], bool)
    assert f1_score(truth, claimed) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert f1_score(truth, ~truth) == 0.0
