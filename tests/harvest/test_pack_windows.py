"""Packing against an obvious oracle, and what it promises for any documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.harvest.pack_windows import Packer

BOS = 2
tokens = st.lists(st.integers(0, 6), max_size=25)  # BOS itself among them
corpora = st.lists(tokens, min_size=1, max_size=8)
contexts = st.integers(2, 9)


def pack_slowly(documents: list[list[int]], context: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token by token, as the protocol says it in words."""
    rows: list[list[int]] = []
    owners: list[list[int]] = []
    row: list[int] = []
    owner: list[int] = []

    def put(token: int, document: int) -> None:
        row.append(token)
        owner.append(document)
        if len(row) == context:
            rows.append(row.copy())
            owners.append(owner.copy())
            row.clear()
            owner.clear()

    for number, document in enumerate(documents):
        for place, token in enumerate(document):
            if (not row or place == 0) and token != BOS:
                put(BOS, number)
                if not row:  # the separator took the last slot
                    put(BOS, number)
            put(token, number)
    return rows, owners


def pack_in_batches(documents: list[list[int]], packer: Packer, size: int) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        packer.pack(documents[i : i + size], range(i, min(i + size, len(documents))))
        for i in range(0, len(documents), size)
    ]
    return np.concatenate([part.tokens for part in parts]), np.concatenate([part.documents for part in parts])


@given(corpora, contexts, st.integers(1, 4))
def test_rows_are_those_of_the_oracle_whatever_the_batches(documents, context, size):
    rows, owners = pack_in_batches(documents, Packer(context, BOS), size)
    expected_rows, expected_owners = pack_slowly(documents, context)
    assert rows.tolist() == expected_rows
    assert owners.tolist() == expected_owners


@given(corpora, contexts)
def test_nothing_is_lost_but_the_last_row_and_nothing_is_there_twice(documents, context):
    packer = Packer(context, BOS)
    rows, owners = pack_in_batches(documents, packer, 3)
    kept = np.concatenate([rows.ravel(), packer.tokens])
    kept_owners = np.concatenate([owners.ravel(), packer.documents])
    assert len(packer.tokens) < context
    for number, document in enumerate(documents):
        text = kept[(kept_owners == number) & (kept != BOS)]
        assert text.tolist() == [token for token in document if token != BOS]


@given(corpora, contexts)
def test_every_row_starts_with_bos_and_owners_never_fall(documents, context):
    rows, owners = pack_in_batches(documents, Packer(context, BOS), 3)
    assert (rows[:, 0] == BOS).all()
    assert (np.diff(owners.ravel().astype(int)) >= 0).all()


@given(corpora, contexts, st.integers(1, 4))
def test_rows_of_single_documents(documents, context, size):
    packer = Packer(context, BOS, "documents")
    rows, owners = pack_in_batches(documents, packer, size)
    expected = []
    for number, document in enumerate(documents):
        text = document[1:] if document[:1] == [BOS] else document
        for start in range(0, len(text) - context + 2, context - 1):
            expected.append((number, [BOS, *text[start : start + context - 1]]))
    assert rows.tolist() == [row for _, row in expected]
    assert owners.tolist() == [[number] * context for number, _ in expected]
    filled = [text for text in documents if text]
    assert packer.short == len(filled) - len({number for number, _ in expected})
    assert packer.left_over == sum(len(text) - (text[0] == BOS) for text in filled) - len(expected) * (context - 1)


def test_a_long_document_fills_its_rows_by_hand():
    rows = Packer(4, BOS).pack([[5, 6, 7, 8, 9], [10, 11]], [0, 1])
    assert rows.tokens.tolist() == [[2, 5, 6, 7], [2, 8, 9, 2]]
    assert rows.documents.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


def test_a_context_without_room_for_text_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Packer(1, BOS)
