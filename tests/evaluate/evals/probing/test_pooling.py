"""Pooled features against a loop over texts and positions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from saemill.evaluate.context.loaded_sae import batch_size_for
from saemill.evaluate.evals.probing.pooled_features import (
    make_pool,
    masked,
    mean_latents,
    mean_resid,
    read_piece,
    valid_positions,
)
from saemill.evaluate.model.batches import Windows
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder
from saemill.train.sae.side_inputs import NO_SIDE

from ....golden import make_saebench_probes as maker
from .conftest import make_subject

LAYER = 3


def slow_means(subject, x, leaky):
    """One text after the other, one position after the other."""
    rows = []
    for text in x:
        valid = [position for position in range(len(text)) if text[position].sum() != 0]
        counted = range(len(text)) if leaky else valid
        with torch.no_grad():
            rows.append(sum(subject.sae.encode(text[position]) for position in counted) / len(valid))
    return torch.stack(rows)


def test_latents_are_means_over_valid_positions_and_leaky_ones_count_padding_too(official):
    made = official.scr
    pool = made.pool(official.subject, leaky=True)
    x = torch.stack(list(made.acts.values()))
    masked_means, leaky_means = (slow_means(official.subject, x, leaky) for leaky in (False, True))
    np.testing.assert_allclose(pool.whole.latents[official.subject].toarray(), masked_means, atol=1e-5)
    np.testing.assert_allclose(pool.whole.leaky[official.subject].toarray(), leaky_means, atol=1e-5)
    assert (masked_means - leaky_means).abs().max() > 0.1  # some latents fire on a vector of zeros


@pytest.mark.parametrize("leaky", [False, True])
def test_a_text_without_a_valid_token_has_features_of_zero(leaky):
    valid = torch.tensor([[True, False, True], [False, False, False]])
    acts = torch.ones(2, 3, 4)
    counted = torch.ones_like(valid) if leaky else valid
    assert mean_latents(acts, valid, counted).tolist() == [[1.5 if leaky else 1.0] * 4, [0.0] * 4]
    resid = Windows(valid.long(), valid, valid, {LAYER: acts * valid[:, :, None]})
    assert mean_resid(resid, (LAYER,), valid).tolist() == [[1.0] * 4, [0.0] * 4]


def test_a_token_that_sums_to_zero_is_taken_for_padding(official):
    made = official.scr
    batch = made.batches(len(made.acts))[0]
    x = batch.resid[LAYER]
    balanced = (x.sum(-1) == 0) & (x != 0).any(-1)
    assert balanced.any()
    assert not valid_positions(batch, (LAYER,))[balanced].any()
    count = (x.sum(-1) != 0).sum(1, keepdim=True)
    torch.testing.assert_close(mean_resid(batch, (LAYER,), valid_positions(batch, (LAYER,))), x.sum(1) / count)


def test_how_texts_are_batched_makes_no_difference(official):
    made, subject = official.scr, official.subject
    one, other = (
        make_pool(list(made.acts), [read_piece(part, [subject], False) for part in made.batches(size)], torch.float32)
        for size in (7, 60)
    )
    np.testing.assert_allclose(one.whole.latents[subject].toarray(), other.whole.latents[subject].toarray(), atol=1e-6)


def test_a_text_used_in_several_classes_is_one_row(official):
    made = official.probing[maker.PROBING[0]]
    pool = made.pool(official.subject)
    first = made.task.train["0"][:4]
    twice = pool.of_latents(official.subject, {"a": first, "b": first[::-1]})
    rows = twice.matrix.toarray()
    assert np.array_equal(rows[:4], rows[4:][::-1])
    assert twice.spans == {"a": range(4), "b": range(4, 8)}


def test_special_positions_are_zeroed_for_model_and_sae():
    x = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    valid = torch.ones(2, 4, dtype=torch.bool)
    batch = Windows(tokens=torch.zeros(2, 4, dtype=torch.int64), keep=valid, valid=valid, resid={LAYER: x})
    keep = torch.tensor([[False, True, True, False], [False, True, True, True]])
    found = masked(batch, keep)
    assert (found.resid[LAYER][~keep] == 0).all()
    assert torch.equal(found.resid[LAYER][keep], x[keep])
    assert torch.equal(found.keep, keep)


def test_saes_of_several_layers_read_them_side_by_side():
    generator = torch.Generator().manual_seed(0)
    x = {layer: torch.randn(3, 4, 5, generator=generator) for layer in (LAYER, LAYER + 1)}
    valid = torch.ones(3, 4, dtype=torch.bool)
    batch = Windows(tokens=torch.zeros(3, 4, dtype=torch.int64), keep=valid, valid=valid, resid=x)
    wide = torch.randn(7, 10, generator=generator)
    both = dataclasses.replace(
        make_subject(SparseAutoencoder(wide, wide.clone(), Relu()), "both"), layers=(LAYER, LAYER + 1)
    )
    narrow = make_subject(SparseAutoencoder(wide[:, :5].clone(), wide[:, :5].clone(), Relu()), "one")
    piece = read_piece(batch, [both, narrow], leaky=False)
    assert piece.model[both.layers].shape == (3, 10)
    assert piece.model[narrow.layers].shape == (3, 5)
    expected = both.sae.encode(torch.cat(list(x.values()), dim=-1)).mean(1)
    np.testing.assert_allclose(piece.latents[both].toarray(), expected.detach(), atol=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(100, 32), (2**20, 1), (2**16, 16)])
def test_wide_saes_take_fewer_texts_at_once(width, expected):
    sae = SparseAutoencoder(torch.zeros(1, 1).expand(width, 1), torch.zeros(1, 1).expand(width, 1), Relu())
    assert batch_size_for([make_subject(sae)], context=128, wanted=32) == expected


class LateOnly(SparseAutoencoder):
    """Fires from position 2 on."""

    is_plain = False
    needs_side = ("position",)

    def encode(self, x, side=NO_SIDE):
        return super().encode(x) * (side["position"] >= 2)[:, None]


def test_an_sae_that_reads_more_than_the_residual_gets_it():
    x = torch.rand(3, 5, 4)
    valid = torch.ones(3, 5, dtype=torch.bool)
    batch = Windows(tokens=torch.zeros(3, 5, dtype=torch.int64), keep=valid, valid=valid, resid={LAYER: x})
    subject = make_subject(LateOnly(torch.eye(4), torch.eye(4), Relu()))
    keep = valid.clone()
    keep[:, 4] = False  # as if padded
    piece = read_piece(masked(batch, keep), [subject], leaky=True)
    expected = x[:, 2:4].sum(1) / 4
    np.testing.assert_allclose(piece.latents[subject].toarray(), expected, atol=1e-6)
    np.testing.assert_allclose(piece.leaky[subject].toarray(), expected, atol=1e-6)
