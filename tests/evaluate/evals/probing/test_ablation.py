"""Ablation by logits against ablation by decoding, and scores of planted latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saemill.evaluate.evals import scr
from saemill.evaluate.evals.probing.draw_classes import OPPOSITES
from saemill.evaluate.evals.probing.fit_probes import Training, fresh_probe
from saemill.evaluate.evals.probing.pooled_features import Draw, Memo, seeded
from saemill.evaluate.evals.probing.scr_and_tpp import (
    Outcome,
    Perturbed,
    Probed,
    Setup,
    effects,
    logits_of,
    mean_scores,
    perturb,
    scr_scores,
    top_effects,
    tpp_scores,
)
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder

from ....golden import make_saebench_probes as maker
from .conftest import features_of, make_subject, make_task

PROBES = Training(batch_size=16, epochs=20, lr=1e-2, patience=20, l1_penalty=1e-3)


def test_logits_are_those_of_texts_encoded_and_decoded_without_the_latents(official):
    made = official.scr
    subject, sae = official.subject, official.subject.sae
    pool = made.pool(subject, leaky=True)
    test = made.task.test
    probes = {name: fresh_probe(sae.d_in, torch.float32, seeded(i)) for i, name in enumerate(test)}
    probed = Probed(probes, logits_of(pool.of_model(subject.layers, test), probes), {})
    off = np.array([3, 11, 40, 7])
    found = probed.logits_without(off, pool.of_leaky_latents(subject, test), sae.W_dec.detach())
    for name, group in test.items():
        x = torch.stack([made.acts[text] for text in group])
        with torch.no_grad():
            acts = sae.encode(x)
            error = x - sae.decode(acts)
            acts[..., off] = 0
            ablated = (sae.decode(acts) + error).sum(1) / (x.sum(-1) != 0).sum(1, keepdim=True)
        for number, probe in enumerate(probes.values()):
            span = found.spans[name]
            torch.testing.assert_close(
                torch.from_numpy(found.table[span.start : span.stop, number]).float(),
                probe.logits(ablated),
                atol=1e-4,
                rtol=1e-4,
            )


def test_nothing_off_is_the_probe_itself():
    features = features_of({"a": torch.randn(5, 6), "b": torch.randn(5, 6)})
    probe = fresh_probe(6, torch.float32, seeded(0))
    whole = torch.from_numpy(features.matrix.toarray())
    found = logits_of(features, {"a": probe}).table[:, 0]
    torch.testing.assert_close(torch.from_numpy(found).float(), probe.logits(whole))


def test_what_all_ablations_begin_with_is_computed_once(official):
    """Residuals of texts are dense: taken anew for each SAE, class and number of latents they were most of the work."""
    made, subject = official.scr, official.subject
    pool, test = made.pool(subject, leaky=True), made.task.test
    resid = pool.of_model(subject.layers, test)
    assert pool.of_model(subject.layers, test) is resid
    assert pool.of_model(subject.layers, made.task.train) is not resid
    probes = {name: fresh_probe(resid.width, torch.float32, seeded(i)) for i, name in enumerate(test)}
    probed, latents = Probed(probes, logits_of(resid, probes), {}), pool.of_leaky_latents(subject, test)
    whole = probed.untouched.table.copy()
    changed = [probed.logits_without(np.array([n]), latents, subject.sae.W_dec.detach()).table for n in range(3)]
    assert np.array_equal(probed.untouched.table, whole)
    assert any(not np.array_equal(table, whole) for table in changed)


def test_effects_weigh_firing_by_direction():
    rows = torch.tensor([[2.0, 0, 1], [2.0, 0, 1], [0, 1.0, 1], [0, 1.0, 1]])
    latents = features_of({"a": rows[:2], "b": rows[2:]})
    draw = Draw(np.arange(4), np.array([1, 1, 0, 0], dtype=np.int32))
    probe = fresh_probe(3, torch.float32, seeded(0))
    probe.weight.copy_(torch.tensor([[0.5, 3.0, 9.0]]))
    assert effects(latents, draw, probe, torch.eye(3), "scr").tolist() == pytest.approx([1.0, 3.0, 0.0])
    assert effects(latents, draw, probe, torch.eye(3), "tpp").tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_no_more_latents_are_taken_than_have_an_effect():
    assert sorted(top_effects(torch.tensor([0.0, 2.0, 0.0, 1.0]), 3)) == [1, 3]
    assert list(top_effects(torch.zeros(4), 3)) == []
    assert len(top_effects(torch.ones(4), 500)) == 4


def identity_sae(width: int) -> SparseAutoencoder:
    """One latent a direction, both ways."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return SparseAutoencoder(both.clone(), both, Relu())


def planted(rng: np.random.RandomState, directions: np.ndarray, rows: int) -> np.ndarray:
    acts = np.repeat(directions[None, None], rows, axis=0).repeat(4, axis=1)
    return (acts + 0.5 * rng.randn(rows, 4, directions.shape[-1])).astype(np.float32)


def test_tpp_finds_the_one_latent_of_each_class():
    rng, width = np.random.RandomState(0), 8
    axes = 2.5 * np.eye(width)
    parts = {p: {name: planted(rng, axes[i], 80) for i, name in enumerate("abc")} for p in ("train", "test")}
    made, subject = make_task("planted", parts), make_subject(identity_sae(width))
    pool = made.pool(subject, leaky=True)
    setup = Setup("tpp", list("abc"), (2,), PROBES, 0)
    both = perturb(pool, subject, made.task, setup, seeded(0), Memo())
    for outcome in (both.official, both.corrected):
        scores, by_class = tpp_scores(outcome.ablated, outcome.clean)
        assert scores["tpp_threshold_2_intended_diff_only"] > 0.3
        assert scores["tpp_threshold_2_total_metric"] > 0.15  # every probe leans on the others' latents too
        assert set(by_class) == set("abc")


def test_scr_frees_a_probe_of_the_attribute():
    rng, width = np.random.RandomState(1), 6
    concept, attribute = 0.9 * np.eye(width)[0], 2.0 * np.eye(width)[1]

    def group(*members: tuple[int, int]) -> np.ndarray:
        return np.concatenate([planted(rng, c * concept + a * attribute, 60) for c, a in members])

    def groups() -> dict[str, np.ndarray]:
        members = (
            ((1, 1), (-1, 1)),
            ((1, -1), (-1, -1)),
            ((1, 1), (1, -1)),
            ((-1, 1), (-1, -1)),
            ((1, 1),) * 2,
            ((-1, -1),) * 2,
        )
        names = [name for pair in OPPOSITES.items() for name in pair]
        return {name: group(*each) for name, each in zip(names, members, strict=True)}

    made, subject = make_task("planted", {"train": groups(), "test": groups()}), make_subject(identity_sae(width))
    setup = Setup("scr", list(OPPOSITES), (2,), PROBES, 0)
    pool = made.pool(subject, leaky=True)
    outcome = perturb(pool, subject, made.task, setup, seeded(0), Memo()).corrected
    scores = scr_scores(outcome.ablated, outcome.clean)
    assert scores["scr_dir1_threshold_2"] > 0.6
    assert scores["scr_metric_threshold_2"] == scores["scr_dir1_threshold_2"]  # there the probe did worse


def test_scr_has_no_metric_where_both_directions_are_even_and_none_to_gain():
    probe = "male_professor / female_nurse probe on {} data"
    clean = {"male / female": 0.9, "professor / nurse": 0.8}
    clean |= {probe.format(name): 0.8 for name in ("male / female", "professor / nurse")}
    ablated = {name: {2: dict.fromkeys(clean, 0.85)} for name in ("male / female", "professor / nurse")}
    scores = scr_scores(ablated, clean)
    assert scores == {"scr_dir1_threshold_2": 0, "scr_dir2_threshold_2": pytest.approx(0.5)}


def pair_of(*confounded: float) -> Perturbed:
    """A pair of concepts, by what the confounded probe scores on the data of each, where the clean ones have 0.9."""
    names, probe = ("professor / nurse", "male / female"), "male_professor / female_nurse probe on {} data"
    clean = dict.fromkeys(names, 0.9) | dict(zip(map(probe.format, names), confounded, strict=True))
    return Perturbed(clean, {name: {2: dict.fromkeys(clean, 0.9)} for name in names})


def test_scr_says_of_how_many_pairs_its_mean_is_and_in_how_many_there_was_nothing_to_remove(official):
    even, empty, full = pair_of(0.7, 0.7), pair_of(0.9, 0.95), pair_of(0.6, 0.8)
    for pairs, mean, remark in (
        ([(full, full), (full, full)], 1, None),
        ([(even, full), (empty, full)], 0, "1 of 2 pairs counted, 1 of them as 0 with nothing to remove"),
        ([(full, even)], 1, "corrected: 0 of 1 pair counted"),
    ):
        outcomes = {str(number): Outcome(*pair) for number, pair in enumerate(pairs)}
        result = scr.make_result(official.subject, {}, outcomes, None)
        assert result.metrics["scr_metrics"]["scr_metric_threshold_2"] == pytest.approx(mean)
        assert result.remark == remark


def test_means_are_over_the_parts_that_have_a_score():
    assert mean_scores({"a": {"x": 1.0, "y": 4.0}, "b": {"x": 3.0}}) == {"x": 2.0, "y": 4.0}


def test_corrected_scores_compare_the_same_rows(official):
    """Nothing switched off must change nothing; the protocol's fresh rows make it look as if it did."""
    made = official.probing[maker.PROBING[0]]
    setup = Setup("tpp", list(made.task.train), (0,), PROBES, 0)
    pool = made.pool(official.subject, leaky=True)
    both = perturb(pool, official.subject, made.task, setup, seeded(42), Memo())
    assert all(by_n[0] == both.corrected.clean for by_n in both.corrected.ablated.values())
    assert any(by_n[0] != both.official.clean for by_n in both.official.ablated.values())


def test_both_ways_choose_latents_from_the_same_table_of_the_training_texts(official, monkeypatch):
    """Cutting it out of all texts was done for each."""
    made, pool = official.scr, official.scr.pool(official.subject, leaky=True)
    setup, cut, of_latents = Setup("scr", list(OPPOSITES), (2,), PROBES, 0), [], pool.of_latents
    monkeypatch.setattr(pool, "of_latents", lambda *given: cut.append(given[1]) or of_latents(*given))
    perturb(pool, official.subject, made.task, setup, seeded(0), Memo())
    assert cut == [made.task.train, made.task.test]
