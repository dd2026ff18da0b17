"""Sparsification against a row-by-row oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema import AttentionCsr, AttentionSpec
from saemill.harvest import sparsify_attention as sparsify_module
from saemill.harvest.errors import ContextTooLong, NonFiniteAttention
from saemill.harvest.sparsify_attention import KeptRows, sparsify, to_csr


def causal_probs(seed: int, windows: int, heads: int, context: int, sharpness: float = 3.0, dtype=torch.float32):
    """Random causal attention; with whole-number scores, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(windows, heads, context, context, generator=generator) * sharpness).round()
    above = torch.ones(context, context, dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1).to(dtype)


def oracle_row(row: np.ndarray, topk: int, mass: float, whole: float) -> tuple[list[int], float]:
    """Walk down the sorted row, as the definition says."""
    kept: list[int] = []
    total = 0.0
    for position in sorted(range(len(row)), key=lambda at: (-row[at], at)):
        reached = mass < 1 and total >= np.float32(mass * whole)
        if row[position] <= 0 or reached or len(kept) == topk:
            break
        kept.append(position)
        total += float(row[position])
    return sorted(kept), total


def oracle(probs: torch.Tensor, spec: AttentionSpec) -> AttentionCsr:
    if spec.averaged:
        probs = probs.float().mean(1, keepdim=True)
    stored = probs.half().numpy().copy()
    if "bos" in spec.left_out:
        stored[..., 0] = 0
    if "self" in spec.left_out:
        stored[..., np.arange(stored.shape[2]), np.arange(stored.shape[2])] = 0
    windows, heads, context, _ = stored.shape
    rows = stored.reshape(-1, context)
    picks = [oracle_row(row, spec.topk, spec.mass, row.sum(dtype=np.float64) if spec.left_out else 1.0) for row in rows]
    return AttentionCsr(
        indptr=np.cumsum([0] + [len(kept) for kept, _ in picks]).astype(np.uint32),
        indices=np.array([at for kept, _ in picks for at in kept], np.uint8 if context <= 256 else np.uint16),
        data=np.array([row[at] for row, (kept, _) in zip(rows, picks, strict=True) for at in kept], np.float16),
        kept_mass=np.array([total for _, total in picks], np.float16).reshape(windows, heads, context),
    )


def assert_same(found: AttentionCsr, expected: AttentionCsr) -> None:
    for name in ("indptr", "indices", "data", "kept_mass"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        # A sum halfway between two halves rounds up or down with the order it is made in.
        step = np.float16(1 / 1024) if name == "kept_mass" else 0
        np.testing.assert_allclose(a, b, rtol=0, atol=step, err_msg=name)


SPECS = st.builds(
    AttentionSpec,
    topk=st.integers(1, 40),
    mass=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
    averaged=st.booleans(),
)


@given(
    seed=st.integers(0, 10**6),
    windows=st.integers(1, 3),
    heads=st.integers(1, 4),
    context=st.integers(1, 33),
    sharpness=st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spec=SPECS,
    left_out=st.sampled_from([(), ("bos",), ("self",), ("bos", "self")]),
)
def test_equals_the_oracle(seed, windows, heads, context, sharpness, dtype, spec, left_out):
    spec = replace(spec, left_out=left_out)
    probs = causal_probs(seed, windows, heads, context, sharpness, dtype)
    csr = to_csr(0, sparsify(probs, spec))
    assert_same(csr, oracle(probs, spec))
    csr.validate(spec.topk, causal=True)


@pytest.mark.parametrize("context", [256, 257, 300])
@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(averaged=False, topk=300, mass=1.0)], ids=str)
def test_equals_the_oracle_for_long_rows(context, spec):
    probs = causal_probs(3, 1, 2, context, sharpness=1.0)
    assert_same(to_csr(0, sparsify(probs, spec)), oracle(probs, spec))


@given(seed=st.integers(0, 10**6), spec=SPECS)
def test_both_ways_to_select_agree(seed, spec):
    probs = causal_probs(seed, 2, 2, 20)
    by_numpy = to_csr(0, sparsify(probs, spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsify_module, "SHORT_ROW", 0)
        by_torch = to_csr(0, sparsify(probs, spec))
    assert_same(by_torch, by_numpy)


@pytest.mark.gpu
@pytest.mark.parametrize("context", [128, 1024])
def test_the_accelerator_keeps_the_same_entries(context):
    probs = causal_probs(0, 2, 4, context)
    for spec in (AttentionSpec(averaged=False), AttentionSpec(averaged=False, topk=context, mass=1.0)):
        assert_same(to_csr(0, sparsify(probs.cuda(), spec)), to_csr(0, sparsify(probs, spec)))


def test_ties_go_to_the_lower_position():
    row = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3]).expand(1, 1, 5, 5)
    csr = to_csr(0, sparsify(row, AttentionSpec(topk=3, mass=1.0)))
    assert csr.indices[:3].tolist() == [1, 2, 4]


def test_the_entry_that_reaches_the_mass_is_the_last():
    row = torch.tensor([0.25, 0.5, 0.125, 0.125]).expand(1, 1, 4, 4)
    for mass, kept in ((0.5, [1]), (0.50001, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        csr = to_csr(0, sparsify(row, AttentionSpec(mass=mass)))
        assert csr.slice(0, 1).indices[: len(kept)].tolist() == kept
        assert csr.indptr[1] == len(kept)
        assert csr.kept_mass[0, 0, 0] == row[0, 0, 0, kept].sum()


@given(seed=st.integers(0, 10**6), spec=SPECS)
def test_kept_mass_is_the_sum_of_what_is_stored(seed, spec):
    csr = to_csr(0, sparsify(causal_probs(seed, 2, 2, 24, dtype=torch.bfloat16), spec))
    sums = csr.dense().astype(np.float64).sum(-1)
    np.testing.assert_allclose(csr.kept_mass, sums, rtol=2**-10)
    full = np.diff(csr.indptr.astype(int)).reshape(sums.shape) == min(spec.topk, 24)
    if spec.mass < 1:
        assert (full | (sums >= np.float32(spec.mass)) | (sums > 0.99)).all()


@given(seed=st.integers(0, 10**6), averaged=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_without_limits_the_dense_rows_come_back(seed, averaged, dtype):
    probs = causal_probs(seed, 2, 3, 17, dtype=dtype)
    csr = to_csr(0, sparsify(probs, AttentionSpec(averaged=averaged, topk=17, mass=1.0)))
    expected = probs.float().mean(1, keepdim=True) if averaged else probs
    np.testing.assert_array_equal(csr.dense(), expected.half().float().numpy())


def test_sinks_take_no_slot_and_no_mass():
    """Of the last row 0.9 stands on BOS and itself: half of the rest is reached by its largest, all by both."""
    rows = torch.tensor([[1, 0, 0, 0], [0.7, 0.3, 0, 0], [0.5, 0.25, 0.25, 0], [0.6, 0.0625, 0.03125, 0.30625]])
    for mass, kept in ((0.5, [1]), (0.95, [1, 2])):
        spec = AttentionSpec(mass=mass, topk=2, left_out=("bos", "self"))
        csr = to_csr(0, sparsify(rows.half().expand(1, 1, 4, 4), spec))
        assert csr.indptr.tolist() == [0, 0, 0, 1, 1 + len(kept)]
        assert csr.indices[1:].tolist() == kept
        assert csr.kept_mass[0, 0].tolist() == [0, 0, 0.25, sum(rows[3, kept].tolist())]
        csr.validate(2, causal=True)


def test_probabilities_that_are_halves_already_stay_as_they_are():
    probs = causal_probs(0, 1, 2, 8, dtype=torch.float16)
    before = probs.clone()
    sparsify(probs, AttentionSpec(averaged=False, left_out=("bos", "self")))
    assert torch.equal(probs, before)


def test_runs_of_windows_join_to_the_whole():
    probs = causal_probs(1, 5, 2, 16)
    spec = AttentionSpec(averaged=False)
    joined = KeptRows.concat([sparsify(part, spec) for part in probs.split(2)])
    assert_same(to_csr(0, joined), to_csr(0, sparsify(probs, spec)))


def test_at_the_defaults_four_layers_cost_at_most_a_quarter_of_the_residual():
    """The dearest attention there is: uniform, so that every row fills its slots."""
    context, d_model = 128, 2304
    uniform = torch.ones(1, 8, context, context).tril()
    csr = to_csr(0, sparsify(uniform / uniform.sum(-1, keepdim=True), AttentionSpec()))
    attention = 4 * sum(array.nbytes for array in (csr.indptr, csr.indices, csr.data, csr.kept_mass))
    assert attention <= context * d_model * 2 / 4


def test_more_keys_than_can_be_packed_are_refused():
    with pytest.raises(ContextTooLong, match="at most 32768"):
        sparsify(torch.zeros(1, 1, 1, 32769), AttentionSpec())


def test_the_last_key_that_can_be_packed_is_kept():
    row = torch.zeros(1, 1, 1, 32768)
    row[..., -1] = 1.0
    packed = sparsify(row, AttentionSpec()).packed
    assert (packed[0, 0, 0, 0].item() >> 16, (packed != sparsify_module.DROPPED).sum().item()) == (32767, 1)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("float16", "overflows in float16: harvest with --dtype bfloat16 or float32 into another --out$"),
        ("bfloat16", "overflows in bfloat16: harvest with --dtype float32 into another --out$"),
        ("float32", "the model computes them even in float32: check its weights$"),
    ],
)
def test_attention_that_is_not_finite_names_a_dtype_that_is_wider(dtype, said):
    probs = torch.full((1, 1, 2, 2), torch.nan)
    with pytest.raises(NonFiniteAttention, match=said):
        to_csr(17, sparsify(probs, AttentionSpec()), dtype=dtype)


@pytest.mark.parametrize("left_out", [(), ("bos", "self")])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_attention_that_is_not_finite_names_its_layer(value, left_out):
    probs = causal_probs(0, 2, 2, 8)
    probs[1, 0, 5] = value
    with pytest.raises(NonFiniteAttention, match=r"layer 17: .* window 1 of the batch, query 5"):
        to_csr(17, sparsify(probs, AttentionSpec(left_out=left_out)))
    with pytest.raises(NonFiniteAttention, match=r"window 41 of the store, query 5"):
        to_csr(17, sparsify(probs, AttentionSpec(left_out=left_out)), first=40)
