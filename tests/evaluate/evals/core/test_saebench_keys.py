"""Divergences, weights, bootstrap and rows against slow and obvious versions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.evaluate.context import bfloat16_then_float32
from saemill.evaluate.context.bfloat16_then_float32 import largest_of_rows
from saemill.evaluate.context.loaded_sae import LoadedSae
from saemill.evaluate.errors import NotApplicable, SettingInvalid
from saemill.evaluate.evals.core import encoding, weight_metrics
from saemill.evaluate.evals.core.bootstrap import DocumentSums, describe_text, intervals, resampled
from saemill.evaluate.evals.core.choose_rows import choose_rows
from saemill.evaluate.evals.core.sparsity_and_variance import Firing, summarise_density
from saemill.evaluate.model import ce_and_kl
from saemill.evaluate.model.batches import Windows
from saemill.evaluate.model.ce_and_kl import compare, kl_as_published, next_tokens, rows_of_logits
from saemill.evaluate.model.smaller_pieces import PieceSize
from saemill.train.sae.gates import BatchTopK, JumpRelu


def logits(rows, vocab, seed, scale=3.0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def rows_of(table):
    return lambda start, stop: table[start:stop]


def rows_at_once(count):
    return PieceSize(count, "rows", lambda _: None)


@pytest.mark.parametrize(("chunk", "block"), [(1 << 20, 1 << 19), (3, 7 * 2), (1, 1)])
def test_losses_are_those_of_whole_distributions(monkeypatch, chunk, block):
    """In chunks and blocks of any size."""
    monkeypatch.setattr(ce_and_kl, "BLOCK_ELEMENTS", block)
    clean, others = logits(11, 7, 0), [logits(11, 7, 1), logits(11, 7, 2)]
    targets = torch.tensor([0, 6, -1, 3, 3, 2, -1, 5, 1, 0, 4])
    ce, losses = compare(
        lambda a, b: clean[a:b], [lambda a, b, o=o: o[a:b] for o in others], targets, rows_at_once(chunk)
    )
    p, has = clean.double().softmax(-1), targets >= 0
    for other, found in zip(others, losses, strict=True):
        q = other.double().softmax(-1)
        expected = (p * (p / q).log()).sum(-1)
        torch.testing.assert_close(found.kl.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.kl_published.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.ce[has].double(), -q.log()[has, targets[has]], rtol=1e-5, atol=1e-7)
        assert found.ce[~has].isnan().all()
    torch.testing.assert_close(ce[has].double(), -p.log()[has, targets[has]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "width", "k"), [(33, 2048, 5), (3, 2048, 16), (9, 2048, 17), (5, 2050, 3), (0, 2048, 3)]
)
@pytest.mark.parametrize("kind", ["random", "equal", "not a number"])
def test_the_largest_of_rows_are_those_of_a_sort(rows, width, k, kind):
    pre = logits(rows, width, 0)
    if kind == "equal":
        pre = pre.round()
    if kind == "not a number" and rows:
        pre[1, 7] = torch.nan
    values, latents = largest_of_rows(pre, k)
    assert values.shape == latents.shape == (rows, k)
    assert torch.equal(values.nan_to_num(99), pre.gather(1, latents).nan_to_num(99))
    assert torch.equal(values.sort(1).values.nan_to_num(99), pre.topk(k).values.sort(1).values.nan_to_num(99))
    assert all(len(set(row)) == k for row in latents.tolist())


def test_what_is_not_a_number_is_kept_beside_as_many_numbers_as_are_asked_for():
    """Two of the largest lie in one group, so that the bound alone would find k numbers and drop it."""
    pre = torch.arange(2048.0).flip(0).view(1, -1) / 2048
    pre[0, 7], pre[0, 10], pre[0, 74] = torch.nan, 9.0, 8.0
    values, _ = largest_of_rows(pre, 5)
    assert torch.equal(values.sort(1).values.nan_to_num(99), pre.topk(5).values.sort(1).values.nan_to_num(99))


def test_nothing_larger_than_a_chunk_is_asked_for():
    asked = []

    def clean(start, stop):
        asked.append(stop - start)
        return torch.zeros(stop - start, 10)

    compare(clean, [clean], torch.zeros(11, dtype=torch.int64), rows_at_once(4))
    assert max(asked) == 4
    assert sum(asked) == 22
    gemma: Any = SimpleNamespace(facts=SimpleNamespace(vocab_size=256_000))
    assert rows_of_logits(gemma, print).size * 256_000 * 4 < 300e6


def test_logits_that_do_not_fit_are_asked_for_in_smaller_chunks():
    clean, said = logits(11, 7, 0), []

    def tight(start, stop):
        if stop - start > 2:
            raise MemoryError("tight")
        return clean[start:stop]

    size = PieceSize(8, "rows of logits", said.append)
    ce, _ = compare(tight, [tight], torch.zeros(11, dtype=torch.int64), size)
    torch.testing.assert_close(ce, -clean.log_softmax(-1)[:, 0])
    assert said == [f"out of memory: continuing with {n} rows of logits at a time" for n in (4, 2)]


def test_where_a_probability_underflows_only_the_published_divergence_breaks():
    clean = torch.tensor([[0.0, -200.0, 0.0], [0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    _, (found,) = compare(rows_of(clean), [rows_of(other)], torch.tensor([0, 0]), rows_at_once(9))
    assert found.kl.isfinite().all()
    assert found.kl_published[0].isnan()
    assert found.kl_published[1] == pytest.approx(float(found.kl[1]))
    assert kl_as_published(clean, other)[0].isnan()


def test_a_divergence_from_itself_is_zero_to_the_bit():
    clean = logits(5, 9, 3)
    _, (found,) = compare(
        lambda a, b: clean[a:b], [lambda a, b: clean[a:b]], torch.zeros(5, dtype=torch.int64), rows_at_once(9)
    )
    assert (found.kl == 0).all()


def test_nothing_to_compare():
    ce, (found,) = compare(
        lambda a, b: torch.zeros(b - a, 3),
        [lambda a, b: torch.zeros(b - a, 3)],
        torch.zeros(0, dtype=torch.int64),
        rows_at_once(9),
    )
    assert len(ce) == len(found.kl) == 0


def test_the_last_token_of_a_window_predicts_nothing():
    tokens = torch.tensor([[2, 5, 6], [2, 7, 1]])
    keep = torch.tensor([[False, True, True], [False, True, False]])
    assert next_tokens(tokens, keep).tolist() == [6, -1, 1]


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_the_nearest_other_row(block, monkeypatch):
    monkeypatch.setattr(weight_metrics, "BLOCK", block)
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-9)
    torch.testing.assert_close(weight_metrics.max_cosine(rows), cosines.amax(1))


@pytest.mark.parametrize("block", [3, 5, 100])
def test_how_far_the_cosines_of_weights_have_come_is_told(builder, block, monkeypatch):
    """Those of 262,144 latents take a core an hour."""
    monkeypatch.setattr(weight_metrics, "BLOCK", block)
    of_one, of_both = [], []
    weight_metrics.max_cosine(builder.make_sae(width=10).W_dec, advance=of_one.append)
    assert sum(of_one) == 10 * 9 / 2 and len(of_one) == math.ceil(10 / block)
    weight_metrics.weight_metrics(builder.make_sae(width=10), of_both.append)
    assert sum(of_both) == 10 * 9


def test_a_lone_latent_has_no_neighbour(builder):
    found = weight_metrics.weight_metrics(builder.make_sae(width=1, k=1))
    assert found["max_decoder_cosine_sim"].tolist() == [-math.inf]
    assert weight_metrics.BLOCK > 1


@pytest.mark.parametrize(("piece", "share"), [(24, 0.0), (24, 1.0), (24 * 5, 0.06), (1 << 20, 0.0), (1 << 20, 0.06)])
@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("looks_twice", [False, True])
def test_sparse_readings_are_the_dense_activations(golden, tmp_path, monkeypatch, looks_twice, kind, piece, share):
    """In pieces of any size, by sparse and by dense products, by one look and by two."""
    name = {"relu": "standard"}.get(kind, kind)
    monkeypatch.setattr(bfloat16_then_float32, "has_fast_bfloat16", lambda device: looks_twice)
    monkeypatch.setattr(encoding, "CPU_PIECE", piece)
    monkeypatch.setattr(encoding, "DENSE_SHARE", share)
    subject = golden.subject(name, tmp_path)
    keep = golden.tokens > 2
    batch = Windows(golden.tokens, keep, torch.ones_like(keep), {1: golden.resid})
    acts = subject.encode(batch)
    reading = encoding.encode_kept(subject, batch)
    torch.testing.assert_close(reading.x_hat, subject.decode(acts)[keep], rtol=1e-5, atol=1e-5)
    assert torch.equal(reading.l0, (acts != 0).sum(-1)[keep].float())
    torch.testing.assert_close(reading.l1, acts.sum(-1)[keep])
    fires = (acts > 0) & keep[..., None]
    assert torch.equal(reading.fired(), fires.sum((0, 1)))
    assert torch.equal(reading.fired_in(keep.nonzero()[:, 0], len(keep)), fires.any(1).sum(0))


@pytest.mark.parametrize("looks_twice", [False, True])
@pytest.mark.parametrize("gate", ["topk", "batchtopk", "jumprelu"])
def test_a_wide_sae_chooses_what_its_gate_would(builder, monkeypatch, gate, looks_twice):
    """Wide enough for groups; a massive row and one without positive products among the others."""
    monkeypatch.setattr(bfloat16_then_float32, "has_fast_bfloat16", lambda device: looks_twice)
    made = torch.Generator().manual_seed(1)
    sae, x = builder.make_sae(width=2048, d_in=256, k=9), torch.randn(30, 256, generator=made)
    x[4] *= 100
    x[7] = 0
    sae.b_enc.data = torch.randn(2048, generator=made) * 0.1 - 1
    if gate == "batchtopk":
        sae.gate = BatchTopK(9)
        sae.gate.threshold.fill_(0.3)
    if gate == "jumprelu":
        sae.gate = JumpRelu(2048, 0.3, 0.01)
        sae.gate.raw_threshold.data += torch.rand(2048, generator=made) * 0.2
    subject = cast(
        LoadedSae, SimpleNamespace(sae=sae, encoder=bfloat16_then_float32.Affine(sae.W_enc.data, sae.b_enc.data))
    )
    looks, again = [], bfloat16_then_float32.Affine.look_again
    monkeypatch.setattr(bfloat16_then_float32.Affine, "look_again", lambda *at: looks.append(at) or again(*at))
    with torch.no_grad():
        codes, expected = encoding.encode(subject, x), sae.encode(x)
    assert codes.support is not None and len(looks) == looks_twice
    torch.testing.assert_close(codes.dense(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(codes.dense() > 0, expected > 0)


def test_a_latent_that_never_fires_has_no_heuristic():
    firing = Firing.none(2, torch.device("cpu"))
    firing += Firing(torch.tensor([2, 0]), torch.tensor([1, 0]), 5)
    firing += Firing(torch.tensor([3, 0]), torch.tensor([2, 0]), 5)
    assert firing.density.tolist() == pytest.approx([0.5, 0])
    assert firing.tokens_per_window[0] == pytest.approx(5 / 3)
    assert firing.tokens_per_window[1].isnan()


def test_density_of_a_dead_sae():
    found = summarise_density(torch.zeros(4))
    assert found["normalized_freq_over_1_percent"] == 0.0
    assert found["frac_alive"] == 0.0


def test_sums_by_document_over_batches():
    sums = DocumentSums()
    sums.add(np.array([4, 4, 9]), {"a": np.array([1.0, 2.0, 3.0]), "b": np.ones(3)})
    sums.add(np.array([9, 2]), {"a": np.array([5.0, 7.0]), "b": np.array([np.nan, 1])})
    table = sums.table()
    assert table["a"].tolist() == [7.0, 3.0, 8.0]
    np.testing.assert_array_equal(table["b"], [1.0, 2.0, np.nan])


def test_an_interval_is_as_wide_as_theory_says():
    """The mean of independent documents: about two standard errors to either side."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    table = {"sum": values, "tokens": np.ones(400)}
    low, high = intervals(table, {"mean": lambda s: s["sum"] / s["tokens"]}, 4000)["mean"]
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_long_documents_weigh_what_they_hold():
    """Resampling documents keeps their tokens together."""
    table = {"sum": np.array([10.0, 0.0]), "tokens": np.array([10.0, 1.0])}
    drawn = resampled(table, 200)
    ratios = set((drawn["sum"] / drawn["tokens"]).round(6))
    assert ratios == {0.0, 1.0, round(10 / 11, 6)}


def test_few_documents_have_no_interval():
    """Of two, a resample is one of three: all intervals would be as wide as the two are apart."""
    whole = {"a": lambda sums: sums["a"] / sums["tokens"]}
    for documents in (1, 2, 9, 10, 11):
        table = {"a": np.arange(float(documents)), "tokens": np.ones(documents)}
        assert (
            (intervals(table, whole, 1000)["a"] is None)
            == (documents < 10)
            == (" (intervals need 10)" in describe_text(table))
        )


def test_what_is_not_a_number_has_no_interval():
    table = {"a": np.arange(10.0), "b": np.array([np.nan, *np.ones(9)])}
    found = intervals(table, {name: lambda sums, name=name: sums[name] for name in table}, 1000)
    assert found["b"] is None and found["a"] == intervals({"a": table["a"]}, {"a": lambda sums: sums["a"]}, 1000)["a"]


def test_intervals_are_the_same_every_time():
    table = {"a": np.arange(10.0)}
    assert intervals(table, {"a": lambda s: s["a"]}, 100) == intervals(table, {"a": lambda s: s["a"]}, 100)


@settings(max_examples=200, deadline=None)
@given(windows=st.integers(2, 100_000), batch=st.integers(1, 64))
def test_the_default_blocks_fit_the_split(windows, batch):
    rows = choose_rows(windows, "test", batch, None, None)
    first, second = rows.reconstruction, rows.sparsity
    assert first.first == 0
    assert second.first == first.windows
    assert first.windows + second.windows <= windows
    assert 1 <= first.batches <= 200
    assert 1 <= second.batches <= 2000
    assert first.batch_windows == second.batch_windows <= batch
    left = windows - first.windows - second.windows
    assert left < first.batch_windows or second.batches == 2000


@pytest.mark.parametrize(
    ("windows", "expected"), [(187, (5, 6)), (16 * 100, (20, 80)), (16 * 2200, (200, 2000)), (10**6, (200, 2000))]
)
def test_how_a_split_is_shared(windows, expected):
    rows = choose_rows(windows, "test", 16, None, None)
    assert (rows.reconstruction.batches, rows.sparsity.batches) == expected


def test_blocks_that_were_asked_for():
    rows = choose_rows(100, "test", 10, 1, 9)
    assert (rows.reconstruction.batches, rows.sparsity.batches) == (1, 9)
    assert choose_rows(100, "test", 10, None, 7).reconstruction.batches == 3
    assert choose_rows(100, "test", 10, 9, None).sparsity.batches == 1
    with pytest.raises(SettingInvalid, match="the test split has 10"):
        choose_rows(100, "test", 10, 1, 10)
    with pytest.raises(SettingInvalid, match="at least one"):
        choose_rows(100, "test", 10, 0, 4)
    with pytest.raises(NotApplicable, match="1 windows"):
        choose_rows(1, "test", 10, None, None)
