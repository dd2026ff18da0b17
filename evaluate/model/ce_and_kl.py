"""Cross entropy and KL divergence of next-token distributions, without ever holding all logits.

Nothing of the size rows x vocabulary outlives a chunk of rows. Elementwise work on a chunk goes block by block, so that
it stays in the processor's cache.

All arithmetic after the logits is float32. `kl_published` is SAEBench's formula to the letter, with the logarithm of a
softmax: NaN where a probability underflows, which does not affect `kl`.
N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .prefix_suffix import LanguageModel
from .smaller_pieces import PieceSize, in_pieces

LogitsOf = Callable[[int, int], Tensor]
"""Logits [stop - start, V] of the rows start..stop."""

CHUNK_ELEMENTS = 1 << 24  # logits at once, in memory that is reused, unless that is fewer than LEAST_ROWS
LEAST_ROWS = 256  # enough to pay for reading the head's weights
BLOCK_ELEMENTS = 1 << 19  # float32 in a cache
MAY_UNDERFLOW = -80.0  # a float32 probability below this logarithm may be zero


@dataclass(frozen=True)
class Losses:
    """Losses of one distribution for each row: float32 [N]."""

    ce: Tensor  # NaN where the row predicts nothing
    kl: Tensor
    kl_published: Tensor

    @staticmethod
    def concat(parts: Sequence[Losses]) -> Losses:
        return Losses(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Losses)))


def logits_of(model: LanguageModel, hidden_ND: Tensor) -> LogitsOf:
    """Logits of hidden states after the final norm."""
    return lambda start, stop: model.head(hidden_ND[start:stop])


def rows_of_logits(model: LanguageModel, say: Callable[[str], None]) -> PieceSize:
    """How many rows have logits at once. Use one for all batches, as it remembers what did not fit."""
    return PieceSize(max(LEAST_ROWS, CHUNK_ELEMENTS // model.facts.vocab_size), "rows of logits", say)


@torch.inference_mode()
def compare(
    clean: LogitsOf, others: Sequence[LogitsOf], targets_N: Tensor, rows: PieceSize
) -> tuple[Tensor, list[Losses]]:
    """Cross entropy [N] of the clean distribution; for the others also their divergence from it.

    `targets_N` holds the next token of each row, or -1; `rows` says how many have logits at once.
    """

    def work(start: int, stop: int) -> tuple[Tensor, list[Losses]]:
        targets = targets_N[start:stop]
        logp_NV = _normalised(clean(start, stop))
        return _cross_entropy(logp_NV, targets), [_losses(logp_NV, other(start, stop), targets) for other in others]

    chunks = list(in_pieces(len(targets_N), rows, work))
    nothing = torch.empty(0, device=targets_N.device)
    losses = [
        Losses.concat([Losses(nothing, nothing, nothing), *(chunk[1][number] for chunk in chunks)])
        for number in range(len(others))
    ]
    return torch.cat([nothing, *(chunk[0] for chunk in chunks)]), losses


def next_tokens(tokens_WT: Tensor, keep_WT: Tensor) -> Tensor:
    """int64 [N]: for each kept token the next one in its window, -1 for the last."""
    following = torch.cat([tokens_WT[:, 1:], torch.full_like(tokens_WT[:, :1], -1)], dim=1)
    return following[keep_WT]


def kl_as_published(clean_NV: Tensor, other_NV: Tensor) -> Tensor:
    """SAEBench 0.6.0: p (log p - log q), with logarithms of softmaxes."""
    p, q = clean_NV.softmax(dim=-1), other_NV.softmax(dim=-1)
    return (p * (p.log() - q.log())).sum(dim=-1)


def _losses(logp_NV: Tensor, logits_NV: Tensor, targets_N: Tensor) -> Losses:
    parts = []
    for rows in _blocks(logp_NV):
        logp, logq = logp_NV[rows], _log_softmax(logits_NV[rows])
        kl = (logp.exp() * (logp - logq)).sum(dim=-1)
        is_safe = min(float(logp.amin()), float(logq.amin())) > MAY_UNDERFLOW
        published = kl if is_safe else kl_as_published(logp, logq)
        parts.append(Losses(_cross_entropy(logq, targets_N[rows]), kl, published))
    return Losses.concat(parts)


def _normalised(logits_NV: Tensor) -> Tensor:
    """Log probabilities in float32, block by block."""
    logp_NV = torch.empty(logits_NV.shape, dtype=torch.float32, device=logits_NV.device)
    for rows in _blocks(logits_NV):
        logp_NV[rows] = _log_softmax(logits_NV[rows])
    return logp_NV


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)


def _cross_entropy(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    chosen = logp_NV.gather(1, targets_N.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets_N >= 0, -chosen, torch.nan)


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    """As many rows at a time as fit in the processor's cache; on a GPU all."""
    rows, vocabulary = logits_NV.shape
    size = max(1, BLOCK_ELEMENTS // vocabulary if logits_NV.device.type == "cpu" else rows)
    return (slice(start, start + size) for start in range(0, rows, size))
