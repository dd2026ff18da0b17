"""Links that are not the model's attention, in its place: what guidance by attention must beat.

- `nearest`: each token has as many links as its attention gave it, to the tokens just before, the nearer the
  stronger (1 / distance);
- `same_token`: to the earlier tokens of the window that are the same token, all alike.
A token counts only where its attention had links. B rows, W windows, T context, L layers, E links.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kernels.hardware import reads_at_once
from ..kernels.sparse_support import index_sum
from ..side_inputs import Side
from .attention_links import Links

LinkKind = Literal["attention", "nearest", "same_token"]
READ_BESIDE = {"attention": (), "nearest": ("window", "position"), "same_token": ("window", "position", "token")}
"""Side inputs that the links are made of, beside the attention."""


def nearest_links(links: Links, side: Side) -> Links:
    window, position, row_of = side["window"][links.row], side["position"][links.row], side["row_of"]
    is_link = links.share > 0  # on a GPU others lie among them
    before = torch.cat([is_link.new_zeros(1, dtype=torch.int64), is_link.cumsum(0)])
    rank = before[:-1] - before[links.offsets.long()[links.place]]
    key = (position - 1 - rank).clamp_min(0)
    key_row = row_of[window, key]
    held = is_link & (key > 0) & (key_row >= 0)
    weight = torch.where(held, 1.0 / (rank + 1), 0.0).to(links.share.dtype)
    total = index_sum(weight, links.place, links.attends.numel())
    share = torch.where(held, weight / total[links.place], 0.0)
    attends = links.attends & (total.view(links.attends.shape) > 0)
    return Links(links.layer, links.row, key, key_row.clamp_min(0), share, attends, links.context)


def same_token_links(links: Links, side: Side) -> Links:
    window, position, row_of = side["window"], side["position"], side["row_of"]
    token_WT = torch.full_like(row_of, -1)
    token_WT[window, position] = side["token"].to(row_of.dtype)
    place = torch.arange(links.context, device=row_of.device)
    same_BT = token_WT[window] == side["token"].to(row_of.dtype)[:, None]
    same_BT &= (place < position[:, None]) & (place > 0) & (row_of >= 0)[window]
    count_B = same_BT.sum(1)
    attends = links.attends & (count_B > 0)
    row, key = _places(same_BT)
    layers = len(attends)
    layer = torch.arange(layers, device=row.device).repeat_interleave(len(row), output_size=layers * len(row))
    row, key = row.repeat(layers), key.repeat(layers)
    held = same_BT[row, key] & attends[layer, row]
    share = torch.where(held, 1.0 / count_B.clamp_min(1)[row], 0.0).to(links.share.dtype)
    return Links(layer, row, key, row_of[window[row], key].clamp_min(0), share, attends, links.context)


def _places(marked_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of what is marked, in order; on a GPU of every place, since a list would be waited for."""
    if reads_at_once(marked_BT):
        row, key = marked_BT.nonzero(as_tuple=True)
        return row, key
    rows, context = marked_BT.shape
    place = torch.arange(rows * context, device=marked_BT.device)
    return place // context, place % context
