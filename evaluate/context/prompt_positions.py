"""Residuals and activations at single positions of prompts. N prompts, D width, F latents.

A prompt is read at one position, counted from its end, so prompts may have any length. Activations of an SAE that reads
more than the residual there are kept from the pass, as sparse: dense ones of all spots may not fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from ...cache_schema import AttentionSpec
from ..model.batches import make_rows, run_windows
from ..model.prefix_suffix import LanguageModel
from ..model.smaller_pieces import PieceSize, in_pieces
from .loaded_sae import LoadedSae, layers_of, together

CHUNK_BYTES = 64 << 20
"""The most bytes of dense activations held at once."""


@dataclass(frozen=True)
class Spot:
    """A prompt's tokens, and the position that is read: below zero, counted from the end."""

    tokens: Sequence[int]
    position: int


@dataclass(frozen=True, eq=False)
class Reading:
    """Residuals at the spots, and the activations of SAEs that read more than the residual there."""

    x: dict[int, Tensor]  # layer -> float32 [N, D]
    acts: dict[LoadedSae, csr_matrix]  # float32 [N, F]

    @property
    def size(self) -> int:
        return len(next(iter(self.x.values())))

    def x_of(self, layers: Sequence[int]) -> Tensor:
        """float32 [N, D]: the residuals of some layers side by side."""
        return self.x[layers[0]] if len(layers) == 1 else torch.cat([self.x[layer] for layer in layers], dim=-1)

    def acts_of(self, subject: LoadedSae, rows: Tensor) -> Tensor:
        """Activations at some spots: [rows, F]."""
        if subject in self.acts:
            return torch.from_numpy(self.acts[subject][rows.cpu().numpy()].toarray()).to(rows.device)
        with torch.no_grad():
            return subject.sae.encode(self.x_of(subject.layers)[rows])

    def all_acts_of(self, subject: LoadedSae) -> Iterator[Tensor]:
        """Activations at all spots, in pieces [n, F] that fit into memory."""
        numbers = torch.arange(self.size, device=next(iter(self.x.values())).device)
        for rows in numbers.split(max(1, CHUNK_BYTES // (4 * subject.width))):
            yield self.acts_of(subject, rows)

    def columns_of(self, subject: LoadedSae, latents: Tensor) -> Tensor:
        """Activations of some latents at all spots: [N, latents]."""
        return torch.cat([acts[:, latents] for acts in self.all_acts_of(subject)])


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts for all SAEs in one pass of the model."""

    model: LanguageModel
    subjects: Sequence[LoadedSae]
    attention: AttentionSpec | None
    batch_size: int
    say: Callable[[str], None] = lambda _: None

    def read(self, spots: Sequence[Spot], advance: Callable[[int], None]) -> Reading:
        """Read all spots, in smaller batches if memory runs out."""
        size = PieceSize(self.batch_size, "prompts", self.say, together(self.subjects))
        parts = []
        for part in in_pieces(len(spots), size, lambda start, stop: self._read(spots[start:stop])):
            parts.append(part)
            advance(part.size)
        x = {layer: torch.cat([part.x[layer] for part in parts]) for layer in parts[0].x}
        return Reading(x, {subject: stacked([part.acts[subject] for part in parts]) for subject in parts[0].acts})

    def _read(self, spots: Sequence[Spot]) -> Reading:
        layers = layers_of(self.subjects)
        tokens, valid = make_rows(self.model, [spot.tokens for spot in spots], max(len(spot.tokens) for spot in spots))
        batch = run_windows(self.model, tokens, valid, layers, self.attention)
        places = torch.tensor([len(spot.tokens) + spot.position for spot in spots], device=batch.tokens.device)
        at = torch.arange(len(spots), device=places.device), places
        return Reading(
            x={layer: batch.x((layer,))[at].clone() for layer in layers},
            acts={subject: to_sparse(subject.encode(batch)[at]) for subject in self.subjects if subject.needs},
        )


def to_sparse(dense: Tensor) -> csr_matrix:
    return csr_matrix(dense.float().cpu().numpy())


def stacked(parts: Sequence[csr_matrix]) -> csr_matrix:
    return csr_matrix(vstack(parts, dtype=np.float32))
