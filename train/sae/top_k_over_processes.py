"""The selection for a dictionary split by latents: each process offers candidates, and all make the same choice.

B rows, F latents of this process. The choice is the one that a single process with all latents would make if, among
equal entries, it took the lowest latent (in a whole batch: the first row, then the lowest latent). Candidates are in
ascending order of latents, and processes hold ascending ranges of them, so a candidate's place identifies it, and only
values are sent. For a whole batch not even those are, only the places of equal entries at the threshold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..parallel.dictionary_over_processes import Latents
from .kernels.hardware import runs_triton
from .kernels.select_top_k import topk_batch, topk_rows
from .kernels.sparse_support import Support, support_from_flat


def split_topk(pre: Tensor, k: int, latents: Latents) -> Support:
    """This process's part of the k largest of each row."""
    rows, width = pre.shape
    places = first_of_equals(pre, min(k, width))
    parts, at = latents.gather(pre.gather(1, places).t().float().contiguous())
    everyone = torch.cat(parts)
    chosen = everyone.sort(dim=0, descending=True, stable=True).indices[:k]
    is_kept = torch.zeros_like(everyone, dtype=torch.bool).scatter_(0, chosen, True)
    before = sum(len(part) for part in parts[:at])
    flat = torch.arange(rows, device=pre.device)[:, None] * width + places
    return support_from_flat(flat[is_kept[before : before + places.shape[1]].t()], rows, width)


def split_batch(pre: Tensor, count: int, latents: Latents) -> Support:
    """This process's part of the `count` largest positive entries of the batch."""
    rows, width = pre.shape
    flat = _first_of_batch(pre, count)
    own = pre.view(-1)[flat].float()
    found = lowest_of_batch(own, count, latents.sum)
    if found is not None:
        lowest, wanted = found
        is_tied = own == lowest
        place = flat // width * latents.total + latents.first + flat % width
        tied = torch.cat(latents.gather(place[is_tied])[0]).sort().values
        flat = flat[(own > lowest) | (is_tied & (place <= tied[wanted - 1]))]
    return support_from_flat(flat, rows, width)


def lowest_of_batch(own: Tensor, count: int, total: Callable[[Tensor], Tensor]) -> tuple[float, int] | None:
    """The smallest of the `count` largest of all processes' numbers, and how many of these equal it; None if there are
    no more than `count` numbers. `own` are this process's, positive and in float32; `total` sums over processes.

    Bits of positive floats, read as integers, sort like the floats. The number is found digit by digit, so processes
    exchange a few kilobytes of counts and no numbers.
    """
    keys, shift, lowest, wanted = own.view(torch.int32), 31, 0, count
    for bits in (11, 10, 10):
        shift -= bits
        counts = total(torch.bincount(keys >> shift, minlength=2**bits)).cpu()
        reaching = counts.flip(0).cumsum(0).flip(0)  # how many have each digit or a larger one
        if shift == 20 and int(reaching[0]) <= count:
            return None
        digit = int((reaching >= wanted).sum()) - 1
        wanted -= int(reaching[digit] - counts[digit])
        keys = keys[keys >> shift == digit] & (2**shift - 1)
        lowest = lowest << bits | digit
    return float(torch.tensor(lowest, dtype=torch.int32).view(torch.float32)), wanted


def lowest_of_topk(pre: Tensor, k: int, latents: Latents) -> Tensor:
    """[B, 1], the smallest of the k largest of each row."""
    offered = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False).values
    if latents.is_whole:
        return offered.amin(1, keepdim=True)
    parts, _ = latents.gather(offered.t().contiguous())
    return torch.cat(parts).topk(k, dim=0, sorted=False).values.amin(0)[:, None]


def first_of_equals(pre: Tensor, k: int) -> Tensor:
    """int64 [B, k], latents of the k largest of each row in ascending order; among equal entries the lowest ones."""
    if k == 0:  # a process that holds no candidates
        return torch.zeros(len(pre), 0, dtype=torch.int64, device=pre.device)
    if runs_triton(pre):
        from .kernels.triton import exact_top_k

        return exact_top_k.top_latents(pre, k).long()
    values, latents = topk_rows(pre, k)
    if k < pre.shape[1]:  # which of equal entries were taken is undefined: redo rows where that matters
        undecided = (pre >= values.amin(1, keepdim=True)).sum(1) > k
        if bool(undecided.any()):
            latents[undecided] = pre[undecided].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return latents.sort(dim=1).values


def _first_of_batch(pre: Tensor, count: int) -> Tensor:
    """Ascending flat places of the `count` largest positive entries; among equal ones the first."""
    flat = topk_batch(pre, min(count, pre.numel()))
    if flat.numel() < count or flat.numel() == pre.numel():
        return flat
    places = (pre >= pre.view(-1)[flat].amin()).view(-1).nonzero().view(-1)  # also others that equal the lowest
    order = pre.view(-1)[places].sort(descending=True, stable=True).indices
    return places[order[:count]].sort().values
