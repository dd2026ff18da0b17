"""Choosing the support from dense pre-activations, without gradient.

B rows, F latents. There are two exact shortcuts, both using a bound that only a few entries pass:
- `topk_rows`: the k largest of a row lie in the k blocks with the largest maxima, so k * g
  candidates are searched instead of F.
- `topk_batch`: the k B largest of the batch all pass a threshold guessed from a sample of rows; when
  too few pass, the guess is lowered.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .hardware import reads_at_once, runs_triton
from .sparse_support import Support, support_from_flat, support_from_topk

BLOCK = 8  # latents per block in `topk_rows`; the fastest of 4 to 32
SAMPLE_ROWS = 32  # rows from which `topk_batch` guesses its threshold


def topk_rows(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and latents [B, k] of the k largest entries of each row, in no particular order."""
    rows, width = pre.shape
    blocks = width // BLOCK
    if width % BLOCK or blocks < 4 * k or pre.device.type != "cpu":
        values, latents = pre.topk(k, dim=1, sorted=False)
        return values, latents
    blocked = pre.view(rows, BLOCK, blocks)  # block j holds latents j, j + blocks, j + 2 blocks, ...
    block = blocked.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = blocked.gather(2, block[:, None, :].expand(rows, BLOCK, k)).view(rows, BLOCK * k)
    values, chosen = candidates.topk(k, dim=1, sorted=False)
    return values, (chosen // k) * blocks + block.gather(1, chosen % k)


def support_of_batch(pre: Tensor, count: int) -> Support:
    """Support of the `count` largest entries of the batch.

    On a GPU it holds exactly `count` entries, so that its size is known in advance; some may not be positive, which a
    gate turns to zero.
    """
    if runs_triton(pre):
        from .triton import exact_top_k

        offsets, latents = exact_top_k.top_of_batch(pre, count)
        return Support(offsets, latents, pre.shape[1])
    return support_from_flat(topk_batch(pre, count), *pre.shape)


def topk_batch(pre: Tensor, count: int) -> Tensor:
    """Increasing flat positions of the `count` largest positive entries of the whole batch."""
    for share in (1.4, 3.0):
        guess = _sampled_threshold(pre, int(share * count))
        flat = (pre > guess).view(-1).nonzero().view(-1)
        if flat.numel() >= count or guess <= 0:
            return _largest(pre, flat, count)
    return _largest(pre, (pre > 0).view(-1).nonzero().view(-1), count)


def marked(mask: Tensor, max_share: float) -> Support | None:
    """Support of the true entries; None if they are more than `max_share` of the batch, or on a GPU.

    There dense products run in matrix units, and the host would wait for a support of unknown size.
    """
    rows, width = mask.shape
    if not reads_at_once(mask):
        return None
    flags = mask.numpy().reshape(-1)  # numpy scans them in a quarter of torch's time
    if np.count_nonzero(flags) > max_share * flags.size:
        return None
    return support_from_flat(torch.from_numpy(np.flatnonzero(flags)), rows, width)


def support_topk(pre: Tensor, k: int) -> Support:
    """Support of the k largest entries of each row."""
    if runs_triton(pre):
        from .triton import exact_top_k

        return support_from_topk(exact_top_k.top_latents(pre, k), pre.shape[1])
    return support_from_topk(topk_rows(pre, k)[1], pre.shape[1])


def _sampled_threshold(pre: Tensor, count: int) -> Tensor:
    """A value that about `count` entries of the batch exceed, never below zero."""
    rows = pre.shape[0]
    sample = pre[:: max(1, rows // SAMPLE_ROWS)]
    rank = min(sample.numel(), max(1, count * sample.shape[0] // rows))
    return sample.reshape(-1).kthvalue(sample.numel() - rank + 1).values.clamp_min(0)


def _largest(pre: Tensor, flat: Tensor, count: int) -> Tensor:
    """The candidates in `flat` with the `count` largest entries, in increasing order."""
    if flat.numel() <= count:
        return flat
    kept = pre.view(-1)[flat].topk(count, sorted=False).indices
    return flat[kept.sort().values]
