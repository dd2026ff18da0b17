"""Assign documents to train, validation and test by a hash of their text.

The split is a pure function of the text and of the intended size of the test split, whatever the rest of the corpus,
its order, the model or the context. Two copies of a document are never in two splits. A larger test split takes
documents from train alone, so test documents of one store are also test documents of every store with a larger one.
"""

from __future__ import annotations

import hashlib

PER_MILLE = {"train": 920, "validation": 40, "test": 40}
EVALUATION_TOKENS = 2_200 * 16 * 128  # what SAEBench's core reads at full size
SPARED_TOKENS = 1_000_000  # up to this many, people are trying things out and train on what there is


def per_mille_for_tests(tokens: int) -> int:
    """How much of a new store is for tests: what evaluations need, up to a quarter of what lies beyond the first
    million tokens, and never less than 4 %. `tokens` is the number asked for: how many a corpus has is known only once
    its documents are assigned. A store keeps the share it was begun with."""
    wanted = min(EVALUATION_TOKENS, max(0, tokens - SPARED_TOKENS) // 4)
    return max(PER_MILLE["test"], -(-1000 * wanted // max(1, tokens)))


def split_of(text: str, test: int = PER_MILLE["test"]) -> str:
    """The split of a document if `test` per mille are for tests."""
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 1000
    if draw < PER_MILLE["test"] or draw >= 1000 + PER_MILLE["test"] - test:
        return "test"
    return "validation" if draw < PER_MILLE["test"] + PER_MILLE["validation"] else "train"


def share_windows(total: int, test: int = PER_MILLE["test"]) -> dict[str, int]:
    """How many of `total` windows each split gets: its share, but never less than one."""
    shares = {"validation": PER_MILLE["validation"], "test": test}
    held_out = {name: max(1, total * share // 1000) for name, share in shares.items()}
    return {"train": total - sum(held_out.values()), **held_out}
