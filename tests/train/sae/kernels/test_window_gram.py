"""Products within windows against dense codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saemill.train.sae.kernels.codes import Codes
from saemill.train.sae.kernels.sparse_support import support_from_flat
from saemill.train.sae.kernels.window_gram import Places, window_gram
from saemill.train.terms.attention_guidance import columns_of


def make_places(has_row: Tensor) -> Places:
    window, position = has_row.nonzero().unbind(1)
    row_of = torch.full(has_row.shape, -1)
    row_of[window, position] = torch.arange(len(window))
    return Places(window, position, row_of)


def oracle(acts: Tensor, places: Places) -> Tensor:
    """[B, T], one pair at a time."""
    columns = []
    for row in range(len(acts)):
        others = places.row_of[places.window[row]].tolist()
        columns.append(torch.stack([acts[row] @ acts[o] if o >= 0 else acts.new_zeros(()) for o in others]))
    return torch.stack(columns)


def random_case(seed: int, windows: int, context: int, latents: int, share: float) -> tuple[Places, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    has_row = torch.rand(windows, context, generator=rng) > 0.2
    has_row[0, 0] = True
    places = make_places(has_row)
    mask = torch.rand(len(places.window), latents, generator=rng) < share
    values = torch.randn(len(places.window), latents, generator=rng, dtype=torch.float64)
    return places, mask, values


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9), st.sampled_from([0, 0.2, 0.7]))
@pytest.mark.parametrize("is_sparse", [True, False])
def test_gram_and_its_gradient_are_those_of_dense_codes(is_sparse, seed, windows, context, latents, share):
    places, mask, table = random_case(seed, windows, context, latents, share)
    acts = torch.where(mask, table, 0.0).requires_grad_()
    support = support_from_flat(mask.view(-1).nonzero().view(-1), *mask.shape) if is_sparse else None
    values = (table[mask] if is_sparse else acts.detach().clone()).requires_grad_()
    found = window_gram(Codes(values, support, *mask.shape), places)
    expected = oracle(acts, places)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (grad,) = torch.autograd.grad((found * weights).sum(), values)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), acts)
    torch.testing.assert_close(grad, expected_grad[mask] if is_sparse else expected_grad)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_columns_are_the_codes_of_some_rows_with_their_gradient(is_sparse):
    _, mask, table = random_case(3, 3, 5, 8, 0.4)
    acts = torch.where(mask, table, 0.0).requires_grad_()
    support = support_from_flat(mask.view(-1).nonzero().view(-1), *mask.shape) if is_sparse else None
    values = (table[mask] if is_sparse else acts.detach().clone()).requires_grad_()
    rows = torch.tensor([7, 2, 5])
    found = columns_of(Codes(values, support, *mask.shape), rows)
    torch.testing.assert_close(found, acts[rows].t())
    (grad,) = torch.autograd.grad(found.square().sum(), values)
    (expected,) = torch.autograd.grad(acts[rows].square().sum(), acts)
    torch.testing.assert_close(grad, expected[mask] if is_sparse else expected)
