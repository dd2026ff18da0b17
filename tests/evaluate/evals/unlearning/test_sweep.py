"""Firing shares, ranking with thresholds and ties, the sweep and its score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.evaluate.evals.unlearning.interventions import (
    FiringCounts,
    Outcome,
    Setting,
    Sweep,
    make_settings,
    topic_latents,
    unlearning_score,
    why_zero,
)

SHARES = st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.002, 0.3]), min_size=1, max_size=30)


def test_shares_count_kept_tokens_over_batches_and_have_six_decimals():
    acts = torch.tensor([[[1.0, 0.0, -1.0], [2.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
    keep = torch.tensor([[False, True, True]])
    counts = FiringCounts.of(acts, keep) + FiringCounts.of(acts[:, :1], torch.tensor([[True]]))
    assert counts.shares().tolist() == [0.666667, 0.333333, 0.0]


def test_a_latent_that_fires_less_than_once_in_two_million_tokens_is_a_zero():
    counts = FiringCounts(torch.tensor([1, 3]), tokens=3_000_000)
    assert counts.shares().tolist() == [0.0, 1e-06]


@given(SHARES, st.data(), st.sampled_from([0.001, 0.01]))
def test_ranking_is_what_a_loop_would_pick(forget, data, threshold):
    retain = data.draw(st.lists(st.sampled_from([0.0, 0.001, 0.02]), min_size=len(forget), max_size=len(forget)))
    candidates = [i for i in range(len(forget)) if retain[i] < threshold and forget[i] > 0]
    expected = sorted(candidates, key=lambda i: (forget[i], i), reverse=True)  # of ties the higher index
    assert topic_latents(np.array(forget), np.array(retain), threshold).tolist() == expected


def test_a_retain_share_at_the_threshold_is_too_much():
    assert topic_latents(np.array([0.5, 0.4]), np.array([0.01, 0.009999]), 0.01).tolist() == [1]


def test_every_combination_is_tried_in_order_and_short_rankings_are_taken_whole():
    settings = make_settings(np.array([0.1, 0.2]), np.array([0.0, 0.005]), Sweep((0.001, 0.01), (1, 20), (25, 50)))
    assert [(s.retain_threshold, s.num_latents, s.multiplier, s.latents) for s in settings] == [
        (0.001, 1, 25, (0,)),
        (0.001, 1, 50, (0,)),
        (0.001, 20, 25, (0,)),
        (0.001, 20, 50, (0,)),
        (0.01, 1, 25, (1,)),
        (0.01, 1, 50, (1,)),
        (0.01, 20, 25, (1, 0)),
        (0.01, 20, 50, (1, 0)),
    ]


def outcome(forget: int, *retain: tuple[int, int], latents: tuple[int, ...] = (3,)) -> Outcome:
    exams = {f"retain {i}": numbers for i, numbers in enumerate(retain)}
    return Outcome(Setting(0.01, 10, 25, latents), {"forget": (forget, 100), **exams})


def score(*outcomes: Outcome) -> float:
    return unlearning_score(outcomes, ["forget"], [f"retain {i}" for i in range(2)])


def test_the_score_pools_questions_not_exams():
    # 99 of 100 pooled although the small exam lost half: the protocol counts questions.
    assert score(outcome(40, (98, 98), (1, 2))) == pytest.approx(0.6)
    assert score(outcome(40, (97, 98), (1, 2))) == 0.0


KEPT, SPOILT = ((100, 100), (100, 100)), ((90, 100), (90, 100))


def test_the_best_setting_that_keeps_the_rest_wins():
    assert score(outcome(70, *KEPT), outcome(55, *KEPT), outcome(0, *SPOILT)) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("outcomes", "why"),
    [
        ([outcome(0, *SPOILT), outcome(100, *KEPT, latents=())], "no intervention keeps 99 % of the rest"),
        ([outcome(100, *KEPT, latents=())], "no latent fires on the text to forget and rarely enough"),
        ([outcome(0, *SPOILT), outcome(100, *KEPT)], None),  # which forgot nothing
    ],
)
def test_a_score_of_nothing_that_could_be_forgotten_says_so(outcomes, why):
    assert score(*outcomes) == 0
    said = why_zero(outcomes, ["retain 0", "retain 1"])
    assert said is None if why is None else why in said
