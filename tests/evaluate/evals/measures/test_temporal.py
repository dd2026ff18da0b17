"""Codes along a text against slow oracles that walk from token to token."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from saemill.evaluate.evals import temporal

CONTEXT = 20


def make_codes(seed: int, windows: int = 3, latents: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(windows, CONTEXT, latents, generator=generator))


def make_segments(seed: int, windows: int = 3) -> torch.Tensor:
    """Documents that begin anywhere, special tokens anywhere."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(windows, CONTEXT, generator=generator) < 0.15).cumsum(1)
    keep = torch.rand(windows, CONTEXT, generator=generator) > 0.1
    return temporal.segments(keep, documents)


def pairs_of(segment: torch.Tensor) -> list[tuple[int, int, int]]:
    """(window, query, earlier key) of one document."""
    return [
        (w, i, j)
        for w, row in enumerate(segment.tolist())
        for i, j in itertools.product(range(CONTEXT), repeat=2)
        if j < i and row[i] >= 0 and row[i] == row[j]
    ]


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_consistency_is_what_walking_all_pairs_gives(seed):
    codes, segment = make_codes(seed), make_segments(seed)
    cosine = {
        pair: float(cosine_similarity(codes[pair[0], pair[1]], codes[pair[0], pair[2]], dim=0))
        for pair in pairs_of(segment)
    }
    found = temporal.consistency(codes, segment)
    for place, (first, last) in enumerate(temporal.SCALES.values()):
        chosen = [pair for pair in cosine if first <= pair[1] - pair[2] <= last]
        usual = [
            [value for other, value in cosine.items() if other[0] == w and segment[w, other[1]] == segment[w, i]]
            for w, i, _ in chosen
        ]
        assert found.pairs[place] == len(chosen)
        assert float(found.in_order[place]) == pytest.approx(sum(cosine[pair] for pair in chosen), abs=1e-4)
        assert float(found.shuffled[place]) == pytest.approx(sum(sum(v) / len(v) for v in usual), abs=1e-4)


def test_the_shuffled_cosine_is_the_mean_over_real_shuffles():
    codes, segment = make_codes(5, windows=1), torch.zeros(1, CONTEXT, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(CONTEXT, generator=generator) for _ in range(400)]
    shuffled = torch.stack([temporal.consistency(codes[:, order], segment).in_order for order in orders]).mean(0)
    expected = temporal.consistency(codes, segment).shuffled
    assert torch.allclose(shuffled, expected, rtol=0.02)


def test_slow_latents_score_and_shuffled_ones_do_not():
    pick = torch.arange(64).div(8, rounding_mode="floor")
    slow = torch.nn.functional.one_hot(pick).float()[None]
    segment = torch.zeros(1, 64, dtype=torch.int64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    scores = temporal.consistency(slow, segment).scores()
    assert scores["short"]["tcs"] > 0.5
    assert scores["long"]["tcs"] < 0
    assert abs(temporal.consistency(slow[:, order], segment).scores()["short"]["tcs"]) < 0.1


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_persistence_is_what_walking_the_tokens_gives(seed):
    codes, segment = make_codes(seed), make_segments(seed)
    on = (codes > 0) & (segment >= 0)[:, :, None]
    found = temporal.persistence(codes, segment)
    for latent in range(codes.shape[2]):
        fired = runs = followed = stayed = 0
        for w, i in itertools.product(range(len(codes)), range(CONTEXT)):
            if not on[w, i, latent]:
                continue
            fired += 1
            runs += not (i > 0 and segment[w, i] == segment[w, i - 1] and on[w, i - 1, latent])
            if i + 1 < CONTEXT and segment[w, i] == segment[w, i + 1]:
                followed += 1
                stayed += bool(on[w, i + 1, latent])
        mine = [int(t[latent]) for t in (found.fired, found.runs, found.followed, found.stayed)]
        assert mine == [fired, runs, followed, stayed]


def test_planted_lifetimes_come_back():
    codes = torch.zeros(1, 40, 3)
    codes[0, [0, 1, 2, 3, 10, 11, 12, 13], 0] = 1.0  # two runs of four
    codes[0, ::2, 1] = 1.0  # every other token: never twice in a row
    found = temporal.persistence(codes, torch.zeros(1, 40, dtype=torch.int64))
    assert found.lifetime.tolist() == [4.0, 1.0, 0.0]
    assert found.stay.tolist() == pytest.approx([6 / 8, 0.0, 0.0])
    assert float(found.stability[0]) == pytest.approx((6 / 8) / (8 / 40))


def test_a_latent_that_does_not_care_has_stability_one():
    codes = (torch.rand(50, 400, 1, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    found = temporal.persistence(codes, torch.zeros(50, 400, dtype=torch.int64))
    assert float(found.stability[0]) == pytest.approx(1.0, abs=0.05)


def test_transitions_count_who_follows_whom():
    codes = torch.zeros(2, 6, 2)
    codes[0, [0, 2], 0] = 1.0
    codes[0, [1, 3], 1] = 1.0  # the second always follows the first
    codes[1, 5, 0] = 1.0  # at the end of a window nothing follows
    segment = torch.zeros(2, 6, dtype=torch.int64)
    assert temporal.transitions(codes, segment).tolist() == [[0.0, 2.0], [1.0, 0.0]]
    apart = segment.clone()
    apart[0, 1:] = 1  # another document begins
    assert temporal.transitions(codes, apart).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_parts_add_up_to_the_whole():
    codes, segment = make_codes(1, windows=4), make_segments(1, windows=4)
    for measure, fields in (
        (temporal.consistency, ("in_order", "shuffled", "pairs")),
        (temporal.persistence, ("fired", "runs", "followed", "stayed")),
    ):
        whole = measure(codes, segment)
        parts = measure(codes[:1], segment[:1]) + measure(codes[1:], segment[1:])
        for name in fields:
            assert torch.allclose(getattr(parts, name), getattr(whole, name))
