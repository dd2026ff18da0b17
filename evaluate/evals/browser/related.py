"""Latents that are near each other: by the direction they write in, and by firing on the same tokens.

F latents, D width, N tokens, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...context.bfloat16_then_float32 import Affine, largest_products
from .collect_firings import Table, largest, ranks

BLOCK = 1024
LEAST_TOGETHER = 3  # tokens on which both fire: fewer may be chance
PAIRS = 50_000_000  # most pairs of latents on one token, over all tokens, that a comparison counts


@dataclass(frozen=True, eq=False)
class Near:
    """The K nearest of each latent, the nearest first; -1 where there are fewer."""

    latents: np.ndarray  # int32 [F, K]
    scores: np.ndarray  # float32 [F, K]
    tokens: int | None = None
    """How many tokens firing together was counted on."""


@torch.inference_mode()
def by_direction(
    rows_FD: Tensor, others_GD: Tensor, count: int, is_same: bool, advance: Callable[[int], object] = lambda rows: None
) -> Near:
    """The nearest by cosine of decoder rows; in the same table, a row is not its own neighbour. `advance` is called
    with the number of further rows done."""
    rows, others = functional.normalize(rows_FD.float(), dim=1), functional.normalize(others_GD.float(), dim=1)
    count = min(count, len(others) - is_same)
    latents, scores = np.empty((len(rows), count), np.int32), np.empty((len(rows), count), np.float32)
    affine = Affine(others, others.new_zeros(len(others)))
    for start in range(0, len(rows), BLOCK) if count > 0 else ():
        cosines, found = largest_products(affine, rows[start : start + BLOCK], count + is_same)
        if is_same:
            cosines[found == torch.arange(start, start + len(found), device=found.device)[:, None]] = -torch.inf
        cosines, order = cosines.sort(dim=1, descending=True)
        latents[start : start + BLOCK] = found.gather(1, order)[:, :count].cpu().numpy()
        scores[start : start + BLOCK] = cosines[:, :count].cpu().numpy()
        advance(len(found))
    return Near(latents, scores)


def by_firing(rows: Table, others: Table, count: int, is_same: bool) -> Near:
    """The nearest by tokens on which both fire, over the geometric mean of those on which each does."""
    tokens = min(rows.shape[0], others.shape[0])  # both tables start with the same tokens
    pairs = int(np.diff(rows.indptr[: tokens + 1]).astype(np.int64) @ np.diff(others.indptr[: tokens + 1]))
    counted = tokens if pairs <= PAIRS else tokens * PAIRS // pairs  # bounds the cost of the product below
    chosen = np.arange(counted) * tokens // max(counted, 1)  # spread over the text
    rows, others = rows[chosen], others[chosen]
    latents = np.full((rows.shape[1], count), -1, np.int32)
    scores = np.zeros((rows.shape[1], count), np.float32)
    own, their = (np.asarray(table.sum(axis=0)).ravel() for table in (rows, others))
    turned = rows.T.tocsr()
    for start in range(0, rows.shape[1], BLOCK):
        together = (turned[start : start + BLOCK] @ others).tocoo()
        often = together.data >= LEAST_TOGETHER
        if is_same:
            often &= together.row + start != together.col
        row, column = together.row[often], together.col[often]
        score = together.data[often] / np.sqrt(own[row + start] * their[column])
        best = largest(row, score, count)
        place = row[best] + start, ranks(row[best])
        latents[place], scores[place] = column[best], score[best]
    return Near(latents, scores, counted)
