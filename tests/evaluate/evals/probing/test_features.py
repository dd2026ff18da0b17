"""Draws, sparse features and samples against slow obvious versions."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.evaluate.errors import DataMissing
from saemill.evaluate.evals.probing import fit_probes
from saemill.evaluate.evals.probing.draw_classes import Table, balanced, sample, spurious
from saemill.evaluate.evals.probing.fit_probes import sparse_accuracy, top_features
from saemill.evaluate.evals.probing.pooled_features import Draw, Memo, draw_probe, seeded, spans_of

from .conftest import features_of


@given(num_classes=st.integers(2, 6), size=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_draw_is_a_class_and_as_many_of_the_others(num_classes, size, seed):
    spans = spans_of({str(i): range(size) for i in range(num_classes)})
    draw = draw_probe(spans, "1", seeded(seed))
    assert len(draw.rows) == 2 * size
    assert sorted(draw.rows[draw.labels == 1]) == list(spans["1"])
    negatives = draw.rows[draw.labels == 0]
    assert len(set(negatives)) == size
    assert not set(negatives) & set(spans["1"])
    if size >= num_classes - 1:
        assert all(set(negatives) & set(spans[name]) or size < 2 * num_classes for name in spans if name != "1")


def test_a_draw_from_the_opposite_takes_it_alone_and_whole():
    spans = spans_of({"a": range(5), "b": range(5), "c": range(5)})
    draw = draw_probe(spans, "a", seeded(0), opposite="c")
    assert sorted(draw.rows[draw.labels == 0]) == list(spans["c"])


def test_negatives_are_drawn_anew_each_time():
    spans, generator = spans_of({name: range(20) for name in "abc"}), seeded(0)
    first, second = (draw_probe(spans, "a", generator) for _ in range(2))
    assert sorted(first.rows) != sorted(second.rows)


def some_features(dtype=torch.float32):
    torch.manual_seed(0)
    dense = {name: torch.relu(torch.randn(8, 12)).to(dtype) for name in "abc"}
    return dense, features_of(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_features_read_like_dense_ones(dtype):
    dense, features = some_features(dtype)
    whole = torch.cat(list(dense.values()))
    draw = Draw(np.array([3, 3, 20, 9]), np.array([1, 1, 0, 0], dtype=np.int32))
    assert torch.equal(features.dense(draw), whole[draw.rows])
    assert features.dense(draw).dtype == dtype
    assert np.array_equal(features.columns(draw, np.array([7, 2])), whole[draw.rows][:, [7, 2]].float().numpy())
    torch.testing.assert_close(
        features.mean(draw.rows).double(), whole[draw.rows].double().mean(0), rtol=1e-2, atol=1e-3
    )


def test_the_top_features_have_the_largest_difference_of_means():
    dense, features = some_features()
    draw = draw_probe(features.spans, "b", seeded(1))
    whole = torch.cat(list(dense.values()))
    positive, negative = whole[draw.rows[draw.labels == 1]], whole[draw.rows[draw.labels == 0]]
    order = (positive.mean(0) - negative.mean(0)).abs().argsort(descending=True)
    assert list(top_features(features, draw, 4)) == sorted(order[:4].tolist())


def test_one_planted_feature_is_found_and_enough(monkeypatch):
    classes = {name: torch.rand(40, 30) for name in "abc"}
    classes["b"][:, 17] += 2
    train = test = features_of(classes)
    draws = [draw_probe(train.spans, "b", seeded(seed)) for seed in (0, 1)]
    assert list(top_features(train, draws[0], 1)) == [17]
    assert sparse_accuracy(train, draws[0], test, draws[1], 1) == (1.0, True)
    monkeypatch.setattr(fit_probes, "MAX_ITERATIONS", 2)  # stopped early, it is scored, and nothing warns
    accuracy, has_converged = sparse_accuracy(train, draws[0], test, draws[1], 1)
    assert 0.5 < accuracy < 1.0 and not has_converged


@given(rows=st.integers(1, 60), count=st.integers(1, 60), seed=st.integers(0, 99))
def test_samples_are_those_of_a_data_frame(rows, count, seed):
    texts = [f"text {i}" for i in range(rows)]
    if count > rows:
        with pytest.raises(DataMissing, match="smaller sets"):
            sample(texts, count, seed)
        return
    frame = pandas.DataFrame({"text": texts})
    assert sample(texts, count, seed) == frame["text"].sample(n=count, random_state=seed).tolist()


def test_balanced_classes_hold_every_value_as_often():
    table = Table([f"{i}" for i in range(80)], [i % 2 for i in range(80)], [i % 4 // 2 for i in range(80)])
    found = balanced(table, [0, 1], 5, seed=3)
    for name, texts in found.items():
        assert [int(text) % 4 // 2 for text in texts] == [0] * 5 + [1] * 5
        assert {int(text) % 2 for text in texts} == {int(name)}


def test_too_few_confounded_texts_are_refused():
    table = Table([f"{i}" for i in range(40)], [i % 2 for i in range(40)], [i % 4 // 2 for i in range(40)])
    assert len(spurious(table, (0, 1), (0, 1), 4, 0)["male / female"]) == 8
    with pytest.raises(DataMissing, match="expected at least 11 texts"):
        spurious(table, (0, 1), (0, 1), 5, 0)


def test_a_memo_computes_once_per_state_and_name_and_moves_the_generator_on():
    memo, calls = Memo(), []

    def run(generator, what="one"):
        def compute():
            calls.append(1)
            return torch.rand(3, generator=generator).tolist()

        return memo.recall(what, generator, compute)

    one, two, three = seeded(0), seeded(0), seeded(1)
    assert run(one) == run(two) != run(three)
    assert len(calls) == 2
    assert run(seeded(0), "other") == run(seeded(0)) and len(calls) == 3
    assert torch.equal(one.get_state(), two.get_state())
    torch.rand(3, generator=(expected := seeded(0)))
    assert torch.equal(two.get_state(), expected.get_state())
