"""contrast: features whose effects are known beforehand, and the effect against scipy's U."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from saemill.evaluate.evals import contrast
from saemill.evaluate.evals.contrast import NO_LATENTS, Config, effects, effects_of, joined, make_result, summarise

from .conftest import features_of

CLASSES = ("a", "b", "c", "d")
TEXTS = 40


def features(seed, planted):
    """`planted` gives the columns of class number n: [TEXTS, F]."""
    generator = np.random.default_rng(seed)
    return features_of({name: torch.tensor(planted(n, generator)) for n, name in enumerate(CLASSES)})


def of(planted):
    return joined([effects_of("set", features(0, planted), features(1, planted))])


@pytest.mark.parametrize("least", [0, -9], ids=["latents", "channels"])
@pytest.mark.parametrize("at_once", [2, 1024])
def test_the_effect_is_the_rank_biserial_correlation(least, at_once, monkeypatch):
    """With values that many texts share, and a feature that is zero everywhere."""
    monkeypatch.setattr(contrast, "AT_ONCE", at_once)
    fires = np.array([1, 1, 0, 1, 1])
    found = features(0, lambda n, g: np.maximum((g.normal(size=(TEXTS, 5)) + 0.3 * n).round(1), least) * fires)
    of_class = [found.matrix[list(span)].toarray().astype(float) for span in found.spans.values()]
    wins = np.array([mannwhitneyu(*pair, axis=0).statistic for pair in combinations(of_class, 2)])
    assert effects(found) == pytest.approx(2 * wins / TEXTS**2 - 1)
    assert (effects(found)[1, fires == 1] < 0).all() and (effects(found)[:, 2] == 0).all()


def test_a_latent_that_means_one_thing_one_that_means_nothing_and_one_that_is_everywhere():
    def planted(n, g):
        only_a = (n == 0) * (1.0 + g.random(TEXTS))
        noise, everywhere = g.random(TEXTS), np.ones(TEXTS)
        return np.stack([only_a, noise, everywhere], axis=1)

    found = of(planted)
    alone = [summarise(keep(found, [column]), Config()) for column in range(3)]
    assert [one["mean"] for one in alone] == pytest.approx([1.0, 0.0, 0.0], abs=0.25) and alone[2]["mean"] == 0.0
    assert [one["strong_share"] for one in alone] == [1.0, 0.0, 0.0]
    # Its own contrast is a against b; the only one that shares no class is c against d, at which it is silent.
    assert alone[0]["independence"] == pytest.approx(1.0)
    assert summarise(found, Config())["best"] == pytest.approx(0.5, abs=0.2)  # a against three others, and three others


def test_what_tells_two_unrelated_contrasts_apart_is_not_independent():
    found = of(lambda n, g: np.where(n in (0, 2), 1.0, 0.0) * (1 + g.random((TEXTS, 1))))
    assert summarise(found, Config())["mean"] == 1.0 and summarise(found, Config())["independence"] == 0.0


def test_what_only_seemed_to_care_comes_out_at_chance():
    """Of 300 latents of noise every one has a contrast that it tells apart a little in the training texts."""
    found = of(lambda n, g: g.random((TEXTS, 300)))
    assert np.abs(found.train).max(0).mean() > 0.15
    measured = summarise(found, Config())
    assert abs(measured["mean"]) < 0.03 and abs(measured["best"]) < 0.25 and measured["independence"] < 0


def test_latents_of_few_texts_are_not_measured_and_none_at_all_is_no_error():
    found = of(lambda n, g: np.stack([np.arange(TEXTS) < (4 if n == 0 else 0), np.full(TEXTS, n == 0)], 1) * 1.0)
    assert summarise(found, Config())["measured_share"] == 0.5
    assert summarise(found, Config(least_texts=4))["measured_share"] == 1.0
    silent = summarise(of(lambda n, g: np.zeros((TEXTS, 2))), Config())
    expected = {"best": 0.0, "measured_share": 0.0, "mean": np.nan, "strong_share": np.nan}
    assert silent == pytest.approx(expected, nan_ok=True)
    two = effects_of("set", *(features_of({name: torch.zeros(9, 1) for name in "ab"}),) * 2)
    assert make_result(None, {}, two, two, Config(), None).remark == NO_LATENTS


def test_two_classes_have_no_contrast_apart():
    part = features_of({"a": torch.ones(9, 1), "b": torch.zeros(9, 1)})
    assert "independence" not in summarise(effects_of("set", part, part), Config())


def keep(found, columns):
    """Some of the features alone."""
    return type(found)(found.contrasts, found.train[:, columns], found.test[:, columns], found.texts[columns])
