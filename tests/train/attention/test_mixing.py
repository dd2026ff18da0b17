"""Weights over layers."""

from __future__ import annotations

import torch

from saemill.train.sae.attention.attention_encoder import Mixing, link_weights, mixture, weights_by_row
from saemill.train.sae.attention.attention_links import links_of


def test_weights_are_a_softmax_that_temperature_flattens():
    mixing = Mixing((17, 18, 20))
    torch.testing.assert_close(mixing(1.0), torch.full((3,), 1 / 3))
    with torch.no_grad():
        mixing.theta.copy_(torch.tensor([1.0, 0.0, -2.0]))
    torch.testing.assert_close(mixing(1.5), torch.softmax(torch.tensor([1.0, 0.0, -2.0]) / 1.5, 0))
    assert mixing(0.5).max() > mixing(1.0).max() > mixing(1.5).max()


def test_an_ablated_layer_weighs_nothing_and_learns_nothing():
    mixing = Mixing((17, 18, 20), ablated=(18,))
    weights = mixing(1.0)
    assert weights[1] == 0.0 and float(weights.sum().detach()) == 1.0
    assert mixing.state_dict()["layers"].tolist() == [17, 18, 20]
    assert torch.equal(mixing.state_dict()["weight"], weights)
    weights.square()[0].backward()
    assert mixing.theta.grad[1] == 0.0 and mixing.theta.grad[0] != 0.0


def test_rows_share_out_the_weight_of_layers_that_have_nothing_for_them(guidance, rng):
    windows = guidance.make_windows(rng)
    links = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows)
    weights = torch.tensor([0.5, 0.3, 0.2])
    by_row = weights_by_row(weights, links)
    tables = [guidance.oracle_links(windows, layer) for layer in guidance.LAYERS]
    A = torch.zeros(windows.rows, windows.rows, dtype=torch.float64)
    for row in range(windows.rows):
        present = [index for index in range(3) if tables[index][row].any()]
        for index in present:
            A[row] += weights[index] / weights[present].sum() * tables[index][row]
    found = mixture(links, link_weights(by_row, links), windows.rows).double()
    expected = torch.zeros(windows.rows, guidance.CONTEXT, dtype=torch.float64)
    for row in range(windows.rows):
        for other in range(windows.rows):
            if A[row, other]:
                expected[row, windows.places.position[other]] = A[row, other]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    sums = expected.sum(1)
    assert bool(((sums - 1).abs() < 1e-6).logical_or(sums == 0).all()) and bool((sums == 0).any())


def test_a_layer_of_no_weight_gives_nothing_even_where_it_is_alone(guidance, rng):
    windows = guidance.make_windows(rng)
    links = links_of(windows.attention, guidance.LAYERS, windows.row_of, windows.rows)
    by_row = weights_by_row(torch.tensor([0.0, 1.0, 0.0]), links)
    assert bool((by_row[[0, 2]] == 0).all())
    assert torch.equal(by_row[1] > 0, links.attends[1])
