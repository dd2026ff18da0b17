"""Tokens as pages and results show them.

A token that is not text on its own, such as part of a character, is shown as its bytes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ...errors import ModelMissing
from ..evaluation_contract import Context

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """The distinct tokens that a page shows, read or promoted by latents, and their texts."""

    def __init__(self, context: Context) -> None:
        self.obstacle: str | None = context.without_tokens
        """Why tokens are shown as ids; None if they are shown as text."""
        self._backend, self._bos = None, 0
        if self.obstacle is None:  # made-up tokens would decode to meaningless text
            try:
                self._backend, self._bos = context.tokenizer.backend, context.tokenizer.bos_token
            except ModelMissing as error:
                self.obstacle = str(error)
        self._is_included = np.zeros(0, bool)  # by id

    def include(self, ids: np.ndarray) -> np.ndarray:
        """Include these ids in `texts`, and return them in a page's dtype."""
        if ids.size and (more := int(ids.max()) + 1 - len(self._is_included)) > 0:
            self._is_included = np.concatenate([self._is_included, np.zeros(more, bool)])
        self._is_included[ids] = True
        return ids.astype(np.uint32)

    def texts(self) -> dict[str, Any]:
        ids = np.flatnonzero(self._is_included)
        return {"ids": ids.astype(np.uint32), "texts": self._texts(ids.tolist())}

    def write(self, ids: np.ndarray) -> str:
        if self._backend is None:
            return " ".join(f"<{token}>" for token in ids)
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def _texts(self, ids: list[int]) -> list[str]:
        if self._backend is None:
            return [f"<{token}>" for token in ids]
        start = self._backend.decode([self._bos], skip_special_tokens=False)
        # After BOS, because some tokenizers drop a space at the beginning of a text.
        found = self._backend.decode_batch([[self._bos, token] for token in ids], skip_special_tokens=False)
        return [text_of(self._backend, token, text.removeprefix(start)) for token, text in zip(ids, found, strict=True)]


def text_of(backend: Any, token: int, text: str) -> str:
    """A token's text, or its bytes if it has none."""
    if text and BROKEN not in text:
        return text
    piece = backend.id_to_token(token)
    if piece is None:
        return f"<{token}>"
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return f"\\x{piece[3:5]}"
    letters = [BYTE_OF.get(letter) for letter in piece]
    if all(byte is not None for byte in letters):
        return "".join(f"\\x{byte:02X}" for byte in letters if byte is not None)
    return str(piece)


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes: printable Latin-1 as itself, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_letters()
