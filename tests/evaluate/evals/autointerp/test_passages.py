"""Which passages are drawn, and how a judge reads them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from saemill.evaluate.evals.autointerp.config import Config
from saemill.evaluate.evals.autointerp.passages import (
    Drawing,
    NeverSilent,
    Passage,
    TooRare,
    draw_latents,
    written,
)

from .conftest import activations_of

WINDOWS, CONTEXT, BUFFER = 60, 40, 3
CONFIG = Config(buffer=BUFFER)


@pytest.fixture(scope="module")
def acts():
    rng = np.random.default_rng(0)
    fires = rng.random((WINDOWS, CONTEXT, 4)) < 0.03
    return (fires * rng.gamma(2.0, size=fires.shape)).astype(np.float32)


def middles(passages):
    return [int(one.tokens[BUFFER]) for one in passages]


def drawn(acts, latent, config=CONFIG, **how):
    kept = activations_of(acts, **how)
    return Drawing(kept, config).passages(kept.latents.tolist().index(latent))


@pytest.mark.parametrize("latent", range(4))
def test_passages_are_those_of_the_protocol(acts, latent):
    explain, score = drawn(acts, latent)
    flat = acts[:, :, latent].reshape(-1)
    assert len(explain) == 15 and len(score) == 14
    assert sum(one.is_active for one in score) == 4
    firing = middles(explain) + middles([one for one in score if one.is_active])
    assert len(firing) == len(set(firing)) == 19
    places = sorted(firing)
    assert min(np.diff(places)) > BUFFER, "no place is used twice"
    top = sorted(firing, key=lambda place: -flat[place])[:12]
    assert set(top) == set(highest_apart(flat, 12))
    assert len(set(top) & set(middles(explain))) == 10
    threshold = 0.01 * max(flat[place - BUFFER : place + BUFFER + 1].max() for place in top)
    for one in explain + score:
        assert len(one.tokens) == 2 * BUFFER + 1 and one.tokens[-1] // CONTEXT == one.tokens[0] // CONTEXT
        assert (one.active == (flat[one.tokens] > threshold)).all()
    peaks = [flat[one.tokens].max() for one in explain]
    assert peaks == sorted(peaks, reverse=True)


def highest_apart(flat, count):
    found: list[int] = []
    for place in np.argsort(-flat, kind="stable"):
        is_inner = BUFFER <= place % CONTEXT < CONTEXT - BUFFER
        if is_inner and all(abs(place - other) > BUFFER for other in found):
            found.append(int(place))
    return found[:count]


def test_what_is_drawn_depends_on_the_seed_and_on_no_other_latent(acts):
    def places(passages):
        return [one.tokens.tolist() for part in passages for one in part]

    whole = places(drawn(acts, 2))
    assert whole == places(drawn(acts, 2, latents=[1, 2]))
    assert whole != places(drawn(acts, 2, Config(buffer=BUFFER, random_seed=43)))


def test_places_that_do_not_count_are_in_the_middle_of_no_passage(acts):
    rows_WT = np.ones((WINDOWS, CONTEXT), bool)
    rows_WT[::2] = False
    found = drawn(acts, 1, latents=[1], rows_WT=rows_WT)
    assert all(place // CONTEXT % 2 == 1 for part in found for place in middles(part))


def test_what_is_drawn_below_the_highest_goes_by_squared_activation():
    """Half of the other places have 3, half 1: nine in ten of those drawn first."""
    counted: Counter[float] = Counter()
    acts = np.zeros((400, 10, 1), np.float32)
    acts[:, 5, 0] = np.where(np.arange(400) < 12, 9.0, np.where(np.arange(400) % 2, 3.0, 1.0))
    kept = activations_of(acts)
    for seed in range(60):
        explain, score = Drawing(kept, Config(buffer=2, random_seed=seed)).passages(0)
        counted.update(acts[one.tokens[2] // 10, 5, 0] for one in explain + score if one.is_active)
    assert 0.85 < counted[3.0] / (counted[3.0] + counted[1.0]) < 0.95


def test_a_latent_without_enough_places_is_too_rare_and_one_without_pauses_never_silent(acts):
    rare = np.zeros_like(acts)
    rare[:18, 20, 0] = np.arange(1, 19)  # 12 and 7 are asked for
    rare[:60, 1, 0] = 1  # too close to the beginning of windows
    with pytest.raises(TooRare):
        drawn(rare, 0)
    rare[18, 20, 0] = 0.5
    assert len(drawn(rare, 0).explain) == 15
    with pytest.raises(TooRare):
        drawn(np.zeros_like(acts), 0)
    always = 1 + acts
    with pytest.raises(NeverSilent):
        drawn(always, 0)


def test_latents_are_drawn_from_those_that_fire_more_often():
    fired = np.array([15, 16, 0, 100, 17, 16])
    assert draw_latents(fired, Config()).tolist() == [1, 3, 4, 5]
    few = draw_latents(fired, Config(n_latents=2)).tolist()
    assert len(few) == 2 and few == sorted(few) and set(few) < {1, 3, 4, 5}
    assert draw_latents(fired, Config(override_latents=(5, 2, 2))).tolist() == [2, 5]


class Bytes:
    """Tokens that are single bytes of UTF-8."""

    @staticmethod
    def write(ids):
        return bytes(ids.tolist()).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "active", "marked"),
    [
        ("a b", (0,), "<<a>> b"),
        ("ab\ncd", (1, 2), "a<<b>><<\u21b5>>cd"),
        ("x\u00e9y", (1,), "x<<\u00e9>>y"),  # the first of two bytes
        ("x\u00e9y", (2,), "x<<\u00e9>>y"),
        ("\U0001f600!", (), "\U0001f600!"),
    ],
)
def test_active_tokens_are_marked_whole_characters_at_a_time(text, active, marked):
    tokens = np.frombuffer(text.encode(), np.uint8)
    passage = Passage(tokens, np.isin(np.arange(len(tokens)), active))
    words = SimpleNamespace(write=Bytes.write)
    assert written(passage, words, True) == marked
    assert written(passage, words, False) == text.replace("\n", "\u21b5")
    cut = Passage(tokens[1:-2], passage.active[1:-2])
    assert "\ufffd" not in written(cut, words, True)
