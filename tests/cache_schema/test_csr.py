"""Attention rows as CSR, held against a dense array that is cut and joined the obvious way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.cache_schema import AttentionCsr, CsrInvalid
from saemill.cache_schema import csr as csr_module
from saemill.cache_schema.info import count_links


def from_dense(dense_WHTT: np.ndarray) -> AttentionCsr:
    """The obvious way, row by row: keep what is not zero."""
    windows, heads, context, _ = dense_WHTT.shape
    indptr, indices, data = [0], [], []
    for row in dense_WHTT.reshape(-1, context):
        for position, probability in enumerate(row):
            if probability:
                indices.append(position)
                data.append(probability)
        indptr.append(len(indices))
    return AttentionCsr(
        indptr=np.array(indptr, np.uint32),
        indices=np.array(indices, np.uint8),
        data=np.array(data, np.float16),
        kept_mass=dense_WHTT.sum(axis=-1).astype(np.float16).reshape(windows, heads, context),
    )


@st.composite
def dense_attention(draw: st.DrawFn, windows: st.SearchStrategy[int] | None = None, heads: int | None = None):
    """float32 [W, H, T, T], causal; T is 4 where several parts must fit together."""
    num_windows = draw(windows if windows is not None else st.integers(0, 5))
    num_heads = heads or draw(st.integers(1, 3))
    context = 4 if heads else draw(st.integers(1, 6))
    kept = draw(st.floats(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_windows, num_heads, context, context)
    values = rng.integers(1, 100, shape).astype(np.float32) / 128
    return values * np.tri(context, dtype=bool) * (rng.random(shape) < kept)


def assert_is(csr: AttentionCsr, dense: np.ndarray) -> None:
    expected = from_dense(dense)
    csr.validate(topk=None, causal=True)
    for name in vars(expected):
        found, wanted = getattr(csr, name), getattr(expected, name)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)


@given(dense_attention())
def test_dense_is_what_went_in(dense):
    csr = from_dense(dense)
    np.testing.assert_array_equal(csr.dense(), dense)
    assert (csr.windows, csr.heads, csr.context) == dense.shape[:3]
    assert csr.entries == np.count_nonzero(dense)


@given(dense_attention(), st.data())
def test_slice_is_the_dense_slice(dense, data):
    start = data.draw(st.integers(0, len(dense)))
    stop = data.draw(st.integers(start, len(dense)))
    assert_is(from_dense(dense).slice(start, stop), dense[start:stop])


@given(st.lists(dense_attention(heads=2), min_size=1, max_size=4))
def test_concat_is_the_dense_concatenation(parts):
    assert_is(AttentionCsr.concat([from_dense(part) for part in parts]), np.concatenate(parts))


@given(dense_attention(heads=1), st.data())
def test_slices_concatenate_to_the_whole(dense, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(dense)))))
    edges = [0, *cuts, len(dense)]
    csr = from_dense(dense)
    parts = [csr.slice(start, stop) for start, stop in itertools.pairwise(edges)]
    assert_is(AttentionCsr.concat(parts), dense)


@given(dense_attention())
def test_row_of_entry_counts_by_row(dense):
    csr = from_dense(dense)
    lengths = [int(np.count_nonzero(row)) for row in dense.reshape(-1, dense.shape[-1])]
    assert csr.row_of_entry().tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize("count", [2, 3])
def test_a_pool_of_more_entries_than_uint32_counts_has_pointers_that_do(count):
    """8.4M tokens with 8 heads and 64 keys each have 2^32: their rows took entries of others."""
    entries = 3 * 2**29
    one = np.broadcast_to(np.uint8(0), entries)
    csr = AttentionCsr(np.array([0, entries], np.uint32), one, one, np.ones((1, 1, 1), np.float16))
    found = csr_module._joined_pointers([csr] * count)
    assert found.tolist() == [entries * part for part in range(count + 1)]
    assert found.dtype == (np.uint32 if count == 2 else np.int64)


def test_concat_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        AttentionCsr.concat([])


def breaks_a_rule(csr: AttentionCsr, topk: int, causal: bool) -> bool:
    """The rules one after the other, row by row."""
    pointers, context = [int(pointer) for pointer in csr.indptr], csr.context
    if len(pointers) != csr.windows * csr.heads * context + 1 or pointers[0] != 0 or pointers[-1] != csr.entries:
        return True
    for row, (start, stop) in enumerate(itertools.pairwise(pointers)):
        if not 0 <= stop - start <= topk:
            return True
        positions = [int(position) for position in csr.indices[start:stop]]
        if any(position >= context for position in positions) or positions != sorted(set(positions)):
            return True
        if causal and positions and positions[-1] > row % context:
            return True
    return False


@settings(max_examples=300)
@given(
    indptr=st.lists(st.integers(0, 5), min_size=4, max_size=5),
    indices=st.lists(st.integers(0, 3), min_size=0, max_size=5),
    topk=st.integers(1, 3),
    causal=st.booleans(),
)
def test_validate_finds_what_a_row_by_row_check_finds(indptr, indices, topk, causal):
    csr = AttentionCsr(
        indptr=np.array(indptr, np.uint32),
        indices=np.array(indices, np.uint8),
        data=np.ones(len(indices), np.float16),
        kept_mass=np.ones((1, 1, 3), np.float16),
    )
    if breaks_a_rule(csr, topk, causal):
        with pytest.raises(CsrInvalid, match="^here: "):
            csr.validate(topk, causal, "here")
    else:
        csr.validate(topk, causal, "here")


@given(dense_attention(), st.integers(1, 3), st.booleans())
def test_what_obeys_the_rules_is_accepted(dense, topk, causal):
    csr = from_dense(dense)
    if not breaks_a_rule(csr, topk, causal):
        csr.validate(topk, causal)


def test_links_are_what_is_neither_a_sink_nor_special():
    """Two windows of four tokens; token 2 of the second is special, as is every first one."""
    special = np.array([[True, False, False, False], [True, False, True, False]])
    rows = [[0], [0, 1], [1, 2], [0, 1, 2], [0], [0], [0, 1], [0, 1, 2, 3]]
    csr = AttentionCsr(
        np.cumsum([0, *map(len, rows)]).astype(np.uint32),
        np.array([key for row in rows for key in row], np.uint8),
        np.concatenate([np.full(len(row), 1 / len(row)) for row in rows]).astype(np.float16),
        np.ones((2, 1, 4), np.float16),
    )
    rows, links, *masses = count_links(csr, special)
    assert (rows, links) == (5, 4)
    to_links, to_bos, to_self = 1 / 2 + 2 / 3 + 1 / 4, 1 / 2 + 1 / 3 + 1 + 1 / 4, 1 / 2 + 1 / 2 + 1 / 4
    assert masses == pytest.approx([to_links, to_bos, to_self], abs=1e-3)


@settings(deadline=None)  # the first example imports scipy
@given(dense_attention())
def test_scipys_matrix_is_the_dense_one(dense):
    csr = from_dense(dense)
    matrix = csr.to_scipy()
    rows, context = csr.windows * csr.heads * csr.context, csr.context
    assert matrix.shape == (rows, context) and matrix.dtype == np.float32
    assert np.array_equal(matrix.toarray(), csr.dense().reshape(rows, context))
    assert np.array_equal((matrix @ np.ones(context, np.float32)), csr.dense().reshape(rows, context).sum(1))
    matrix.data[:] = 0  # the store's memory is its own
    assert np.array_equal(csr.dense(), from_dense(dense).dense())
