"""Documents to windows: full rows of `context` tokens, BOS first, never padded.

`concat`, as in SAEBench's core evaluation: documents are joined with a BOS between them; a document longer than the
rest of its row continues in the next, after that row's own BOS. A document that starts a row gets one BOS, not two.
`documents`: each row holds a single document.

Tokens that fill no window are left out: under `concat` the end of the last row, under `documents` the end of every
document. Nothing else is lost, and nothing appears twice.

How `concat` works without a loop over tokens:
1. Cut documents at every BOS, so that a piece is one BOS and the text after it.
2. Walk over pieces, not tokens, to find the slots where each piece and its text start.
3. Fill all slots with BOS, then scatter the text to its slots by arithmetic on whole arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Packing = Literal["concat", "documents"]


@dataclass(frozen=True)
class Windows:
    """Full windows, and the document that each token belongs to."""

    tokens: np.ndarray  # uint32 [N, T]
    documents: np.ndarray  # uint32 [N, T]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Packer:
    """Packs documents one after another; keeps the unfinished row."""

    context: int
    bos: int
    packing: Packing = "concat"
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))  # in the unfinished row
    documents: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    short: int = 0
    """Under `documents`: the number that filled no window."""
    left_over: int = 0
    """Under `documents`: tokens of these and of the ends of others."""

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"expected a context of at least 2 (BOS and one token), found {self.context}")

    def pack(self, texts: Sequence[Sequence[int]], ids: Sequence[int]) -> Windows:
        """The windows completed by these documents (token ids without BOS, and a number for each)."""
        filled = [(np.asarray(text, np.uint32), number) for text, number in zip(texts, ids, strict=True) if len(text)]
        if not filled:
            return Windows(*(np.empty((0, self.context), np.uint32) for _ in range(2)))
        tokens, starts = _with_bos_in_front([text for text, _ in filled], self.bos)
        numbers = np.array([number for _, number in filled], np.uint32)
        if self.packing == "documents":
            return self._rows_of_documents(tokens, starts, numbers)
        return self._rows(tokens, starts, numbers)

    def _rows(self, tokens: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> Windows:
        """Rows of consecutive documents; the unfinished row is kept."""
        lengths = np.diff(starts, append=len(tokens))
        pieces = np.flatnonzero(tokens == self.bos)
        piece_lengths = np.diff(pieces, append=len(tokens)) - 1
        begins, firsts, end = _walk(len(self.tokens), piece_lengths, self.context)
        out = np.full(end, self.bos, np.uint32)
        out[: len(self.tokens)] = self.tokens
        out[_slots(firsts, piece_lengths, self.context)] = np.delete(tokens, pieces)
        document_of_piece = np.repeat(numbers, lengths)[pieces]
        documents = np.concatenate([self.documents, np.repeat(document_of_piece, np.diff(begins, append=end))])
        full = end // self.context * self.context
        self.tokens, self.documents = out[full:].copy(), documents[full:].copy()
        return Windows(out[:full].reshape(-1, self.context), documents[:full].reshape(-1, self.context))

    def _rows_of_documents(self, tokens: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> Windows:
        """Rows of one document each."""
        payload = self.context - 1
        lengths = np.diff(starts, append=len(tokens)) - 1
        rows = lengths // payload
        self.short += int((rows == 0).sum())
        self.left_over += int((lengths % payload).sum())
        row_in_document = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        first = np.repeat(starts + 1, rows) + row_in_document * payload
        out = np.full((len(first), self.context), self.bos, np.uint32)
        out[:, 1:] = tokens[first[:, None] + np.arange(payload)]
        return Windows(out, np.repeat(np.repeat(numbers, rows)[:, None], self.context, axis=1))


def _with_bos_in_front(texts: Sequence[np.ndarray], bos: int) -> tuple[np.ndarray, np.ndarray]:
    """All documents in one array, each with a single BOS in front, and the start of each."""
    opened = [text if text[0] == bos else np.concatenate([np.array([bos], np.uint32), text]) for text in texts]
    starts = np.cumsum([0, *(len(text) for text in opened[:-1])])
    return np.concatenate(opened), starts


def _walk(cursor: int, lengths: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The slot of each piece's BOS, the slot of its first token, and the slot after the last piece."""
    begins, firsts = [], []
    for length in lengths.tolist():
        begins.append(cursor)
        cursor += 1
        if length and cursor % context == 0:
            cursor += 1  # this BOS took the last slot of its row: skip the next row's own
        firsts.append(cursor)
        room = context - cursor % context
        breaks = max(0, -(-(length - room) // (context - 1)))
        cursor += length + breaks
    return np.array(begins), np.array(firsts), cursor


def _slots(firsts: np.ndarray, lengths: np.ndarray, context: int) -> np.ndarray:
    """The slot of every token: shifted by one for each row that its piece has started."""
    ends = np.cumsum(lengths)
    within = np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)
    first = np.repeat(firsts, lengths)
    over = within - (context - first % context)
    return first + within + np.where(over >= 0, 1 + over // (context - 1), 0)
