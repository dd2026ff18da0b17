"""Documents to train, validation and test, by a hash of their text.

A pure function of the text: the same document is in the same split of every store, whatever the corpus
around it, its order, the model or the context. Two copies of a document never end in two splits.
"""

from __future__ import annotations

import hashlib

PER_MILLE = {"train": 920, "validation": 40, "test": 40}


def split_of(text: str) -> str:
    """The split of a document."""
    draw = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 1000
    if draw < PER_MILLE["test"]:
        return "test"
    return "validation" if draw < PER_MILLE["test"] + PER_MILLE["validation"] else "train"


def share_windows(total: int) -> dict[str, int]:
    """How many of `total` windows each split gets: its share, and never less than one."""
    held_out = {name: max(1, total * PER_MILLE[name] // 1000) for name in ("validation", "test")}
    return {"train": total - sum(held_out.values()), **held_out}
