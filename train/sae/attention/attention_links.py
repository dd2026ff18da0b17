"""Which tokens attend to which in a batch of windows: a sparse matrix A^l for each layer, on the rows of the batch.

From the store's rows (window, head, query):
1. heads are averaged, or one is taken;
2. the column of position 0 (an attention sink) is dropped, and so are the token itself, later
   positions, and tokens that have no row in the batch (special ones);
3. a row that keeps less than `min_mass` of its probability is left out;
4. the rest of each row is divided by its sum.

On a GPU, where listing the remaining entries would make the host wait, dropped ones stay, with a share of zero.

A control, `apart`, moves rows between windows: a token then gets what a token at the same position of another window
attended to. Everything else about the rows stays: how many keys, how far back, how sharp.

Two more controls replace the model's attention with other links, for tokens whose attention had links:
- `nearest`: the same number of links, to the preceding tokens, weighted by 1 / distance;
- `same_token`: links to earlier occurrences of the same token in the window, all with equal weight.
L layers, B rows, W windows, T context, H heads, E links.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ...data.batch import AttentionRows
from ...errors import ConfigInvalid
from ..kernels.hardware import reads_at_once
from ..kernels.sparse_support import group_offsets, index_sum
from ..kernels.window_gram import other_window
from ..side_inputs import Side

LinkKind = Literal["attention", "nearest", "same_token"]
LINK_SIDE_INPUTS = {"attention": (), "nearest": ("window", "position"), "same_token": ("window", "position", "token")}
"""Side inputs that each kind of links needs besides the attention."""


@dataclass(frozen=True, eq=False)
class Links:
    """The entries of A^0 .. A^(L-1), by layer and row."""

    layer: Tensor  # int64 [E], index in the requested order
    row: Tensor  # int64 [E], the row that attends
    key: Tensor  # int64 [E], the position attended to
    key_row: Tensor  # int64 [E], its row
    share: Tensor  # float32 [E], sums to one over the links of a layer and row
    attends: Tensor  # bool [L, B], the rows that a layer has links for
    context: int
    has_heads: bool = False  # several heads, so several links of a layer and row may go to one key

    @property
    def place(self) -> Tensor:
        """int64 [E], layer and row in one number."""
        return self.layer * self.attends.shape[1] + self.row

    @cached_property
    def offsets(self) -> Tensor:
        """int32 [L * B + 1], where the links of each layer and row start."""
        return group_offsets(self.place, self.attends.numel())

    @cached_property
    def is_first(self) -> Tensor:
        """bool [E], marks one link from each layer and row to each key with a share."""
        if not self.has_heads:
            return self.share > 0
        spot = self.place * self.context + self.key
        number = torch.arange(len(spot), device=spot.device, dtype=torch.int32)
        first = number.new_full((self.attends.numel() * self.context,), len(spot))
        first.scatter_reduce_(0, spot, torch.where(self.share > 0, number, len(spot)), "amin")
        return first[spot] == number


def links_of(
    attention: Mapping[int, AttentionRows],
    layers: Sequence[int],
    row_of: Tensor,
    num_rows: int,
    *,
    head: int | None = None,
    min_mass: float = 0.05,
    apart: bool = False,
) -> Links:
    """The links of a batch; `row_of` [W, T] is the row at a position, or -1."""
    parts = [_layer_links(attention[layer], row_of, num_rows, head, apart) for layer in layers]
    layer = torch.cat([row_of.new_full((len(weight),), at) for at, (*_, weight) in enumerate(parts)])
    row, key, key_row, weight = (torch.cat(column) for column in zip(*parts, strict=True))
    place = layer * num_rows + row
    has_heads = head is None and any(attention[number].kept_mass.shape[1] > 1 for number in layers)
    if not reads_at_once(place) or not bool((place[1:] >= place[:-1]).all()):  # several heads, or rows moved apart
        order = torch.argsort(place, stable=True)
        layer, row, key, key_row, weight, place = (x[order] for x in (layer, row, key, key_row, weight, place))
    mass = index_sum(weight, place, len(layers) * num_rows)
    attends = (mass >= min_mass) & (mass > 0)
    is_kept, attends = attends[place], attends.view(len(layers), num_rows)
    if not reads_at_once(place):
        share = torch.where(is_kept, weight / mass[place], 0.0)
        return Links(layer, row, key, key_row, share, attends, row_of.shape[1], has_heads)
    kept = is_kept.nonzero().view(-1)
    share = weight[kept] / mass[place[kept]]
    return Links(layer[kept], row[kept], key[kept], key_row[kept], share, attends, row_of.shape[1], has_heads)


def _layer_links(
    attention: AttentionRows, row_of: Tensor, num_rows: int, head: int | None, apart: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, key, key's row and weight of all links of a layer, not yet renormalised."""
    _, heads, context = attention.kept_mass.shape
    lengths = attention.indptr.diff()
    place = torch.arange(lengths.numel(), device=row_of.device)
    place = place.repeat_interleave(lengths, output_size=attention.indices.numel())
    query, key = place % context, attention.indices
    window = place // (context * heads)
    if apart:
        window = other_window(window, query, row_of.shape[0], "shuffle_attention")
    row, key_row = row_of[window, query], row_of[window, key]
    kept = (key > 0) & (key < query) & (row >= 0) & (key_row >= 0)
    if head is not None:
        require_head(head, heads)
        kept &= place // context % heads == head
    weight = attention.data / (heads if head is None else 1)
    if not reads_at_once(kept):
        # Dropped links stay where they are, and go from there to themselves: for a single row, thousands of zeros would
        # be summed one after the other.
        row = torch.where(row >= 0, row, place % num_rows)
        return row, key, torch.where(kept, key_row, row), torch.where(kept, weight, 0.0)
    chosen = kept.nonzero().view(-1)
    return row[chosen], key[chosen], key_row[chosen], weight[chosen]


def require_head(head: int, heads: int) -> None:
    """Refuse a head that the store does not have, say because its heads were averaged into one."""
    if not 0 <= head < heads:
        found = "heads averaged into one" if heads == 1 else f"{heads} heads"
        raise ConfigInvalid(f"head: expected a head that the store has, found {head} and a store with {found}")


def nearest_links(links: Links, side: Side) -> Links:
    window, position, row_of = side["window"][links.row], side["position"][links.row], side["row_of"]
    is_link = links.is_first  # the others are of further heads or, on a GPU, without a share
    before = torch.cat([is_link.new_zeros(1, dtype=torch.int64), is_link.cumsum(0)])
    rank = before[:-1] - before[links.offsets.long()[links.place]]
    key = (position - 1 - rank).clamp_min(0)
    key_row = row_of[window, key]
    is_kept = is_link & (key > 0) & (key_row >= 0)
    weight = torch.where(is_kept, 1.0 / (rank + 1), 0.0).to(links.share.dtype)
    total = index_sum(weight, links.place, links.attends.numel())
    share = torch.where(is_kept, weight / total[links.place], 0.0)
    attends = links.attends & (total.view(links.attends.shape) > 0)
    return Links(links.layer, links.row, key, torch.where(is_kept, key_row, links.row), share, attends, links.context)


def same_token_links(links: Links, side: Side) -> Links:
    window, position, row_of = side["window"], side["position"], side["row_of"]
    token_WT = torch.full_like(row_of, -1)
    token_WT[window, position] = side["token"].to(row_of.dtype)
    place = torch.arange(links.context, device=row_of.device)
    same_BT = token_WT[window] == side["token"].to(row_of.dtype)[:, None]
    same_BT &= (place < position[:, None]) & (place > 0) & (row_of >= 0)[window]
    count_B = same_BT.sum(1)
    attends = links.attends & (count_B > 0)
    # On a GPU all entries: listing those that are links would make the host wait.
    is_listed = reads_at_once(same_BT)
    place = same_BT.view(-1).nonzero().view(-1) if is_listed else torch.arange(same_BT.numel(), device=row_of.device)
    row, key = place // links.context, place % links.context
    layers = len(attends)
    layer = torch.arange(layers, device=row.device).repeat_interleave(len(row), output_size=layers * len(row))
    row, key = row.repeat(layers), key.repeat(layers)
    is_kept = same_BT[row, key] & attends[layer, row]
    share = torch.where(is_kept, 1.0 / count_B.clamp_min(1)[row], 0.0).to(links.share.dtype)
    key_row = torch.where(is_kept, row_of[window[row], key], row)
    return Links(layer, row, key, key_row, share, attends, links.context)
