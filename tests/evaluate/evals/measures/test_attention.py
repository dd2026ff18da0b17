"""Attention and codes: planted explanations are attributed, divergences are those of dense rows."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from saemill.evaluate.evals.measures import attention

WINDOWS, CONTEXT, LAYERS = 4, 12, 3


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def random_attention(rng: torch.Generator, heads: int = LAYERS, windows: int = WINDOWS) -> torch.Tensor:
    """[heads, W, T, T], causal."""
    scores = torch.randn(heads, windows, CONTEXT, CONTEXT, generator=rng)
    return scores.masked_fill(~torch.ones(CONTEXT, CONTEXT).tril().bool(), -torch.inf).softmax(-1)


def codes_with_similarity(similarity: torch.Tensor) -> torch.Tensor:
    """Unit codes whose Gram matrix is near 1 on the diagonal and `similarity` off it."""
    gram = torch.eye(CONTEXT) + similarity.tril(-1) + similarity.tril(-1).mT
    return torch.linalg.cholesky(gram)


def test_similarity_that_one_layer_made_is_its_own(rng):
    rows, keep = random_attention(rng), torch.ones(WINDOWS, CONTEXT, dtype=torch.bool)
    codes = codes_with_similarity(0.2 * rows[1])
    found = attention.explain(codes, rows, keep)
    shares = found.contributions()
    assert found.alone()[1] > 0.999
    assert sum(shares) == pytest.approx(1 - found.nearness(), abs=1e-3)
    assert shares == pytest.approx(gains_over_all_orders(codes, rows, keep), abs=1e-5)
    assert shares[1] > 10 * max(shares[0], shares[2], 0)
    assert found.similarity_gain()[1] > 0.01


def gains_over_all_orders(codes, rows, keep) -> list[float]:
    """Each layer's mean gain in R^2 when layers enter one by one beside nearness, in every order."""
    similarity, near, *layers = centred_oracle(codes, rows, keep)
    gains = [0.0] * len(layers)
    orders = list(itertools.permutations(range(len(layers))))
    for order in orders:
        for place, layer in enumerate(order):
            before, after = ([near, *(layers[at] for at in order[:end])] for end in (place, place + 1))
            gains[layer] += (r_squared(similarity, after) - r_squared(similarity, before)) / len(orders)
    return gains


def test_similarity_of_nothing_is_explained_by_nothing(rng):
    codes = torch.randn(60, CONTEXT, 40, generator=rng)
    found = attention.explain(codes, random_attention(rng, windows=60), torch.ones(60, CONTEXT, dtype=torch.bool))
    assert max(found.contributions()) < 0.01


def test_contributions_add_up_to_what_all_explain(rng):
    rows = random_attention(rng)
    codes = torch.randn(WINDOWS, CONTEXT, 5, generator=rng)
    keep = torch.rand(WINDOWS, CONTEXT, generator=rng) > 0.2
    found = attention.explain(codes, rows, keep)
    similarity, near, *layers = centred_oracle(codes, rows, keep)
    everything = r_squared(similarity, [near, *layers])
    assert sum(found.contributions()) + found.nearness() == pytest.approx(everything, abs=1e-6)
    assert found.nearness() == pytest.approx(r_squared(similarity, [near]), abs=1e-6)
    assert found.alone() == pytest.approx([r_squared(similarity, [layer]) for layer in layers], abs=1e-6)


def centred_oracle(codes, rows, keep) -> list[np.ndarray]:
    """Pair by pair, row by row."""
    unit = normalize(codes, dim=2)
    columns: list[list[float]] = [[] for _ in range(2 + len(rows))]
    for w, i in itertools.product(range(WINDOWS), range(CONTEXT)):
        keys = [j for j in range(i) if keep[w, i] and keep[w, j]]
        if not keys:
            continue
        values = [[float(unit[w, i] @ unit[w, j]) for j in keys], [1 / (i - j) for j in keys]]
        values += [[float(layer[w, i, j]) for j in keys] for layer in rows]
        for column, part in zip(columns, values, strict=True):
            column.extend(np.array(part) - np.mean(part))
    return [np.array(column) for column in columns]


def r_squared(target: np.ndarray, regressors: list[np.ndarray]) -> float:
    table = np.stack(regressors, 1)
    fitted = table @ np.linalg.lstsq(table, target, rcond=None)[0]
    return float(1 - ((target - fitted) ** 2).sum() / (target**2).sum())


def test_two_equal_layers_share_what_they_explain(rng):
    rows = random_attention(rng)
    codes = codes_with_similarity(0.2 * rows[0])
    twins = attention.explain(codes, rows[[0, 0]], torch.ones(WINDOWS, CONTEXT, dtype=torch.bool)).contributions()
    assert twins[0] == pytest.approx(twins[1], abs=1e-6)
    assert sum(twins) > 0.5


@pytest.mark.parametrize("layers", [11, 14])
def test_of_many_layers_contributions_are_those_of_drawn_orders(rng, layers, monkeypatch):
    """Near the exact ones, the same each time, and as many fits as there are orders to enter by."""
    rows = random_attention(rng, heads=layers)
    codes = codes_with_similarity(0.1 * rows[1] + 0.1 * rows[4])
    found = attention.explain(codes, rows, torch.ones(WINDOWS, CONTEXT, dtype=torch.bool))
    fits, fit = [], attention.Explained._r_squared
    monkeypatch.setattr(attention.Explained, "_r_squared", lambda *args: fits.append(args) or fit(*args))
    shares = found.contributions()
    assert len(fits) < attention.ORDERS * layers
    assert found.contributions() == shares
    assert sum(shares) + found.nearness() == pytest.approx(fit(found, range(layers)), abs=1e-6)
    if layers == 11:
        monkeypatch.setattr(attention, "EXACT_LAYERS", layers)
        assert shares == pytest.approx(found.contributions(), abs=0.01)


def test_another_document_is_no_key(rng):
    """Two documents in a window are measured as if they stood in windows of their own."""
    rows, half = random_attention(rng), CONTEXT // 2
    codes = torch.randn(WINDOWS, CONTEXT, 5, generator=rng)
    keep = torch.ones(WINDOWS, CONTEXT, dtype=torch.bool)
    documents = (torch.arange(CONTEXT) >= half).long().expand(WINDOWS, CONTEXT)
    found = attention.explain(codes, rows, keep, documents)
    parts = [slice(0, half), slice(half, CONTEXT)]
    apart = [attention.explain(codes[:, part], rows[:, :, part, part], keep[:, part]) for part in parts]
    whole = apart[0] + apart[1]
    assert found.contributions() == pytest.approx(whole.contributions(), abs=1e-6)
    assert found.similarity_gain() == pytest.approx(whole.similarity_gain(), abs=1e-6)
    pairs = attention.choose_pairs(rows[0], keep, 3, documents)
    assert pairs.is_pair.any()
    assert torch.equal(pairs.later[pairs.is_pair] >= half, pairs.most[pairs.is_pair] >= half)
    assert torch.equal(pairs.later[pairs.is_pair] >= half, pairs.least[pairs.is_pair] >= half)


def test_batches_add_up(rng):
    rows, codes = random_attention(rng), torch.randn(WINDOWS, CONTEXT, 5, generator=rng)
    keep = torch.ones(WINDOWS, CONTEXT, dtype=torch.bool)
    whole = attention.explain(codes, rows, keep)
    parts = attention.explain(codes[:1], rows[:, :1], keep[:1]) + attention.explain(codes[1:], rows[:, 1:], keep[1:])
    assert parts.contributions() == pytest.approx(whole.contributions(), abs=1e-6)
    assert parts.similarity_gain() == pytest.approx(whole.similarity_gain(), abs=1e-6)


def test_the_same_attention_has_no_divergence(rng):
    rows = random_attention(rng, heads=1)[0][:, None]
    assert attention.attention_divergence(rows, rows).abs().max() < 1e-6


def test_divergence_on_whole_rows_is_the_dense_one(rng):
    stored, found = (random_attention(rng, heads=1)[0][:, None] for _ in range(2))
    expected = torch.xlogy(stored, torch.where(stored > 0, stored / found, 1.0)).sum(-1).double()
    torch.testing.assert_close(attention.attention_divergence(stored, found), expected, atol=1e-5, rtol=1e-4)


def test_what_was_not_stored_counts_as_one_key(rng):
    stored, found = (random_attention(rng, heads=1)[0][:, None] for _ in range(2))
    kept = torch.where(stored >= stored.topk(3, dim=-1).values[..., -1:], stored, 0.0)
    divergence = attention.attention_divergence(kept, found)
    for w, i in itertools.product(range(WINDOWS), range(CONTEXT)):
        support = kept[w, 0, i] > 0
        p, q = kept[w, 0, i][support].double(), found[w, 0, i][support].double()
        expected = float((p * (p / q).log()).sum())
        if not support.all() and i >= 3:
            expected += float((1 - p.sum()) * ((1 - p.sum()) / (1 - q.sum())).log())
        assert float(divergence[w, 0, i]) == pytest.approx(expected, abs=1e-4)
    assert (divergence > -1e-9).all()


def test_rows_that_rounding_made_more_than_whole_are_rows(rng):
    rows = random_attention(rng, heads=1)[0][:, None]
    assert attention.attention_divergence(1.002 * rows, rows).abs().max() < 1e-6
