"""Every number of the official packages on the same activations and texts, draws included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saemill.evaluate.evals import scr, sparse_probing, tpp
from saemill.evaluate.evals.probing import saebench_texts
from saemill.evaluate.evals.probing.draw_classes import OPPOSITES, Table, balanced, by_class, spurious
from saemill.evaluate.evals.probing.fit_probes import Training
from saemill.evaluate.evals.probing.pooled_features import Memo, seeded
from saemill.evaluate.evals.probing.sae_probes_package import rank_latents, split_rows, tuned_scores
from saemill.evaluate.evals.probing.scr_and_tpp import Setup, perturb

from ....golden import make_saebench_probes as maker

pytestmark = pytest.mark.usefixtures("global_random_state_stays")

SEED = 42
PROBES = Training(batch_size=16, epochs=20, lr=1e-3, patience=20, l1_penalty=1e-3)


def test_pooled_features(official):
    name = maker.PROBING[0]
    made = official.probing[name]
    pool = made.pool(official.subject)
    for found, expected in (
        (pool.of_model(official.subject.layers, made.task.train), official.outputs["pooled"]["model"]),
        (pool.of_latents(official.subject, made.task.train), official.outputs["pooled"]["latents"]),
    ):
        for label, span in found.spans.items():
            mean = found.matrix[span.start : span.stop].mean(axis=0)
            np.testing.assert_allclose(np.asarray(mean).ravel(), expected[label], atol=1e-6)


def test_sparse_probing(official):
    config = sparse_probing.Config(random_seed=SEED, k_values=tuple(maker.K_VALUES))
    generator, found = seeded(SEED), {}
    for name, made in official.probing.items():
        shared = Memo()
        pool = made.pool(official.subject)
        found[name] = sparse_probing.probe_subject(
            pool, official.subject, made.task, config, generator, shared, torch.device("cpu")
        )
    result = sparse_probing.make_result(official.subject, {}, found, None)
    expected = official.outputs["sparse_probing"]
    overall = {key: value for key, value in expected["results"].items() if not isinstance(value, dict)}
    assert result.metrics["llm"] | result.metrics["sae"] == pytest.approx(overall, abs=1e-6)
    for name, by_metric in expected["by_class"].items():
        assert {key: by_class for key, by_class in result.unstructured[name].items() if "validated" not in key} == {
            key: pytest.approx(by_class, abs=1e-6) for key, by_class in by_metric.items()
        }
    assert list(result.details[0])[:3] == ["dataset_name", "sae_test_accuracy", "llm_test_accuracy"]


def perturbed(official, made, setup):
    pool = made.pool(official.subject, leaky=True)
    return {made.task.name: perturb(pool, official.subject, made.task, setup, seeded(SEED), Memo())}


def test_tpp(official):
    made = official.probing[maker.PROBING[0]]
    setup = Setup("tpp", list(made.task.train), maker.N_VALUES, PROBES, SEED)
    result = tpp.make_result(official.subject, {}, perturbed(official, made, setup), None)
    expected = official.outputs["tpp"]
    overall = {key: value for key, value in expected["results"].items() if not isinstance(value, dict)}
    assert result.metrics["tpp_metrics"] == pytest.approx(overall, abs=1e-6)
    assert result.details[0]["dataset_name"] in expected["results"]
    assert result.unstructured == {
        name: {label: pytest.approx(scores, abs=1e-6) for label, scores in classes.items()}
        for name, classes in expected["by_class"].items()
    }


def test_scr(official):
    setup = Setup("scr", list(OPPOSITES), maker.N_VALUES, PROBES, SEED)
    result = scr.make_result(official.subject, {}, perturbed(official, official.scr, setup), None)
    overall = {key: value for key, value in official.outputs["scr"]["results"].items() if not isinstance(value, dict)}
    assert result.metrics["scr_metrics"] == pytest.approx(overall, abs=1e-5)
    assert any("metric" in key for key in overall)


def test_samples_of_tables(official):
    rows = maker.table()
    table, expected = Table(rows["text"], rows["one"], rows["two"]), official.outputs["samples"]
    assert balanced(table, [0, 1, 2, 13, 21], 30, SEED) == {
        name: expected["balanced"][name] for name in ("0", "1", "2", "13", "21")
    }
    assert by_class(table.text, table.column1, [0, 2], 25, SEED) == expected["by_class"]
    assert spurious(table, (21, 13), (0, 1), 20, SEED) == expected["spurious"]


def test_samples_of_streams(official, monkeypatch):
    classes = saebench_texts.CLASSES[saebench_texts.GITHUB]
    cut = saebench_texts.split_shuffled(saebench_texts.collect_files(maker.files(), 40), classes, 30, 10, SEED)
    assert [
        {name: [[file[:6], len(file)] for file in files] for name, files in part.items()} for part in cut
    ] == official.outputs["samples"]["files"]
    monkeypatch.setattr(saebench_texts, "commit_of", lambda *_: None)
    monkeypatch.setattr(saebench_texts, "load_dataset", lambda _, pair, **options: maker.speeches(pair))
    speeches = saebench_texts.read_speeches(30)
    cut = saebench_texts.split_shuffled(speeches, saebench_texts.CLASSES[saebench_texts.EUROPARL], 20, 10, SEED)
    assert list(cut) == official.outputs["samples"]["speeches"]


def test_sae_probes(official):
    from scipy.sparse import csr_matrix

    made, expected = maker.binary(), official.outputs["sae_probes"]
    labels, latents = made["labels"], made["latents"]
    split = split_rows(labels, SEED)
    assert split.train.tolist() == expected["train"]
    assert split.test.tolist() == expected["test"]
    ranked = rank_latents(csr_matrix(latents)[split.train], labels[split.train])
    assert ranked.tolist() == expected["ranked"]

    def scores(rows, penalty, fewer=None):
        train, test = split.train[:fewer], split.test
        return tuned_scores(rows[train], labels[train], rows[test], labels[test], penalty, SEED)

    for k, wanted in expected["l1"].items():
        assert_scores(scores(latents[:, ranked[: int(k)]], "l1"), wanted)
    assert_scores(scores(latents, "l2"), expected["l2"])
    assert_scores(scores(latents, "l2", fewer=90), expected["l2_few_rows"])


def assert_scores(found, expected):
    assert found.test_accuracy == pytest.approx(expected["test_acc"], abs=1e-6)
    assert found.test_auc == pytest.approx(expected["test_auc"], abs=1e-6)
    assert found.test_f1 == pytest.approx(expected["test_f1"], abs=1e-6)
