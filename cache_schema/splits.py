"""Assign documents to train, validation and test by a hash of their text.

The split depends only on the text and on the intended size of the test split, not on the rest of the corpus, its
order, the model or the context. Copies of a document are always in the same split. A larger test split takes documents
from train alone, so a store's test documents are also test documents of every store with a larger test split.
"""

from __future__ import annotations

import hashlib

PER_MILLE = {"train": 920, "validation": 40, "test": 40}
EVALUATION_TOKENS = 2_200 * 16 * 128  # read by SAEBench's core at full size
SPARED_TOKENS = 1_000_000  # up to this many, users are trying things out and need the tokens for training


def per_mille_for_tests(tokens: int) -> int:
    """The test share of a new store: enough for evaluations, up to a quarter of the tokens beyond the first million,
    and at least 4 %. `tokens` is the number asked for, because the corpus's own is known only once its documents are
    assigned. A store keeps the share it was created with."""
    wanted = min(EVALUATION_TOKENS, max(0, tokens - SPARED_TOKENS) // 4)
    return max(PER_MILLE["test"], -(-1000 * wanted // max(1, tokens)))


def split_of(text: str, test: int = PER_MILLE["test"]) -> str:
    """A document's split if `test` per mille of documents are for tests."""
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 1000
    if draw < PER_MILLE["test"] or draw >= 1000 + PER_MILLE["test"] - test:
        return "test"
    return "validation" if draw < PER_MILLE["test"] + PER_MILLE["validation"] else "train"


def share_windows(total: int, test: int = PER_MILLE["test"]) -> dict[str, int]:
    """How many of `total` windows each split gets: its share, but at least one."""
    shares = {"validation": PER_MILLE["validation"], "test": test}
    held_out = {name: max(1, total * share // 1000) for name, share in shares.items()}
    return {"train": total - sum(held_out.values()), **held_out}
