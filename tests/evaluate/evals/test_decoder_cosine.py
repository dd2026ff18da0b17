"""Decoder rows that are known beforehand: doubled, found again, or each its own."""

from __future__ import annotations

import weakref

import pytest
import torch

from saemill.evaluate.context.context import Context
from saemill.evaluate.evals import decoder_cosine
from saemill.evaluate.evals.decoder_cosine import Config, evaluate
from saemill.train.sae.gates import AbsTopK
from saemill.train.sae.model import SparseAutoencoder


@pytest.fixture
def measure(builder):
    def results(*tables, seeds=None):
        subjects = []
        for number, rows in enumerate(tables):
            sae = builder.make_sae(width=len(rows), d_in=rows.shape[1], W_dec=rows, W_enc=rows.clone(), k=2)
            config = {"width": len(rows), "seed": number} if seeds is None else seeds[number]
            subjects.append(builder.subject(sae, f"sae_{number}", config=config))
        return list(evaluate(Context(None), subjects, Config()))

    return results


def test_doubled_latents_are_counted(measure):
    (result,) = measure(torch.cat([torch.eye(8), torch.eye(8)[:2]]))
    assert result.metrics["decoder_cosine"]["doubled_share"] == pytest.approx(0.4)
    assert result.metrics["decoder_cosine"]["max"] == pytest.approx(1.0)
    assert "across_seeds" not in result.metrics and "differs by its seed alone" in result.remark


def test_latents_that_another_seed_has_are_counted(measure):
    """Six of eight directions in another order; the other two are each shared by two in equal parts: cosine 0.707."""
    other = torch.eye(8)[torch.tensor([5, 4, 3, 2, 1, 0, 6, 7])]
    other[6], other[7] = (other[6] + other[7]) / 2**0.5, (other[6] - other[7]) / 2**0.5
    first, second = measure(torch.eye(8), other)
    for result in (first, second):
        assert result.metrics["across_seeds"]["seeds"] == 2
        assert result.metrics["across_seeds"]["mean"] == pytest.approx((6 + 2 * 0.5**0.5) / 8)
        assert result.metrics["across_seeds"]["shared_share"] == 1.0
        assert result.metrics["across_seeds"]["mean_chance"] < 0.8


def test_of_other_seeds_the_decoders_alone_are_read_and_one_after_the_other(measure, monkeypatch):
    """Four others of 262,144 latents took 19 GB to read, and 10 GB of the device."""
    read, held = decoder_cosine.read_tensor, list[weakref.ref]()

    def read_tensor(path, name):
        assert name == "W_dec" and not any(one() is not None for one in held)
        held.append(weakref.ref(found := read(path, name)))
        return found

    monkeypatch.setattr(decoder_cosine, "read_tensor", read_tensor)
    results = measure(*[torch.eye(8)] * 4)
    assert len(held) == 12 and all(result.metrics["across_seeds"]["seeds"] == 4 for result in results)


def test_latents_of_a_signed_sae_and_their_opposites_are_found_in_another_seed(builder):
    subjects = []
    for seed in range(2):
        sae = SparseAutoencoder(torch.eye(8), torch.eye(8), AbsTopK(2))
        subjects.append(builder.subject(sae, f"sae_{seed}", config={"seed": seed}))
    for result in evaluate(Context(None), subjects, Config()):
        assert result.metrics["across_seeds"]["mean"] == pytest.approx(1.0)


def test_a_damaged_sae_costs_the_others_nothing(measure, builder):
    tables, damaged = [torch.eye(8)] * 2, builder.root / "damaged"
    builder.subject(builder.make_sae(), "damaged")
    (damaged / "cfg.json").write_text("{")
    first, second = measure(*tables)
    for result in (first, second):
        assert result.metrics["across_seeds"]["seeds"] == 2
        assert result.remark.startswith("without damaged, which cannot be read")


def test_only_saes_that_were_trained_alike_are_compared(measure):
    table = torch.eye(8)
    settings = [{"k": 2, "seed": 0}, {"k": 4, "seed": 1}, {}]
    results = measure(table, table, table, seeds=settings)
    assert ["across_seeds" in result.metrics for result in results] == [False] * 3
