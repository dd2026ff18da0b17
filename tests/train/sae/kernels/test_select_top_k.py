"""Shortcuts in choosing the support against plain sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.train.sae.kernels.select_top_k import BLOCK, marked, topk_batch, topk_rows


@pytest.mark.parametrize(("width", "k"), [(2304, 32), (512, 5), (4 * BLOCK * 8, 8), (100, 7), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_rows_finds_the_largest(width, k, dtype, rng):
    pre = torch.randn(33, width, generator=rng).to(dtype)
    values, latents = topk_rows(pre, k)
    assert torch.equal(values, pre.gather(1, latents))
    assert torch.equal(values.sort(1).values, pre.topk(k).values.sort(1).values)
    assert all(len(set(row.tolist())) == k for row in latents)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    width=st.integers(1, 40),
    share=st.floats(0, 1),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_topk_batch_finds_the_largest_positive_entries(rows, width, share, shift, seed):
    pre = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + shift
    count = int(share * pre.numel())
    flat = topk_batch(pre, count)
    expected = pre.view(-1).topk(count).values
    expected = expected[expected > 0]
    assert torch.equal(flat, flat.sort().values)
    assert torch.equal(pre.view(-1)[flat].sort(descending=True).values, expected)


def test_topk_batch_when_a_few_rows_hold_everything(rng):
    pre = torch.rand(640, 50, generator=rng) * 0.01
    pre[3] += 5.0  # not among the sampled rows
    flat = topk_batch(pre, 40)
    assert torch.equal(pre.view(-1)[flat].sort().values, pre.view(-1).topk(40).values.sort().values)


def test_a_support_gives_way_to_the_dense_form_above_its_share(rng):
    pre = torch.randn(10, 20, generator=rng)
    support = marked(pre > 0, 1.0)
    assert support is not None
    assert support.latents.numel() == int((pre > 0).sum())
    assert marked(pre > 0, 0.1) is None
    assert marked(torch.zeros(3, 4, dtype=torch.bool), 0.0) is not None
