"""What of a layer's attention can guide: links to other tokens, and how much of the rest is sinks.

A link goes from a token to an earlier one, neither of them special, and not to the window's first token, which is an
attention sink. Counted over a few whole shards spread evenly over the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .csr import AttentionCsr
from .massive_rows import spread
from .moments import is_special
from .reader import Store
from .request import Request

SHARDS = 4


@dataclass(frozen=True)
class LinkCounts:
    """Sums over the rows of tokens that are not special."""

    rows: int = 0
    links: int = 0
    link_mass: float = 0.0
    bos_mass: float = 0.0
    self_mass: float = 0.0

    def __add__(self, other: LinkCounts) -> LinkCounts:
        return LinkCounts(
            self.rows + other.rows,
            self.links + other.links,
            self.link_mass + other.link_mass,
            self.bos_mass + other.bos_mass,
            self.self_mass + other.self_mass,
        )

    def per_row(self) -> dict[str, float]:
        rows = max(self.rows, 1)
        names = ("links", "link_mass", "bos_mass", "self_mass")
        return {name: getattr(self, name) / rows for name in names}


def measure_links(store: Store, layer: int) -> LinkCounts:
    """Of one layer; a row is one of each head where heads are stored apart."""
    total = LinkCounts()
    for span in spread(store.manifest, store.committed, SHARDS):
        part = store.read(Request(attention_layers=(layer,), tokens=True), span)
        assert part.tokens is not None
        total += count_links(part.attention[layer], is_special(part.tokens, store.manifest.model.special_tokens))
    return total


def count_links(csr: AttentionCsr, special_WT: np.ndarray) -> LinkCounts:
    """Of some windows."""
    row, key = csr.row_of_entry(), csr.indices.astype(np.int64)
    window, query = row // (csr.heads * csr.context), row % csr.context
    counts = ~special_WT[window, query]
    is_bos, is_self = counts & (key == 0), counts & (key == query) & (key != 0)
    is_link = counts & ~is_bos & ~is_self & ~special_WT[window, key]
    mass = csr.data.astype(np.float64)
    return LinkCounts(
        int((~special_WT).sum()) * csr.heads,
        int(is_link.sum()),
        *(float(mass[chosen].sum()) for chosen in (is_link, is_bos, is_self)),
    )
