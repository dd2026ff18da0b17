"""Reading single tokens of prompts: what the model, and each SAE, makes of them. N prompts, D width, F latents.

A prompt is read at one position, counted from its end, so prompts of any length will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..cache_schema import AttentionSpec
from .feed import make_rows, run_windows
from .fitting import layers_of
from .lm import LanguageModel
from .subject import Subject
from .windows import Windows

Key = TypeVar("Key")
CHUNK_BYTES = 64 << 20
"""Of dense activations held at once."""


@dataclass(frozen=True)
class Spot:
    """A prompt's tokens, and the position that is read: below zero, counted from the end."""

    tokens: Sequence[int]
    position: int


@dataclass(frozen=True, eq=False)
class Reading:
    """Residuals at the spots; activations too of SAEs that read more than the residual there."""

    x: dict[int, Tensor]  # layer -> float32 [N, D]
    acts: dict[Subject, Tensor]  # [N, F]

    def acts_of(self, subject: Subject, rows: Tensor) -> Tensor:
        """Activations at some spots: [rows, F]."""
        if subject in self.acts:
            return self.acts[subject][rows]
        with torch.no_grad():
            return subject.sae.encode(self.x[subject.layer][rows])

    def columns_of(self, subject: Subject, latents: Tensor) -> Tensor:
        """Activations of some latents at all spots: [N, latents]."""
        return torch.cat([self.acts_of(subject, rows)[:, latents] for rows in self._chunks(subject)])

    def _chunks(self, subject: Subject) -> Iterator[Tensor]:
        """The numbers of all spots, in pieces whose activations fit into memory."""
        x_ND = self.x[subject.layer]
        size = max(1, CHUNK_BYTES // (4 * subject.width))
        yield from torch.arange(len(x_ND), device=x_ND.device).split(size)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts for all SAEs in one pass of the model."""

    model: LanguageModel
    subjects: Sequence[Subject]
    attention: AttentionSpec | None
    batch_size: int

    def read(self, spots: Sequence[Spot], advance: Callable[[int], None]) -> Reading:
        layers = layers_of(self.subjects)
        needy = [subject for subject in self.subjects if subject.needs]
        x: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        acts: dict[Subject, list[Tensor]] = {subject: [] for subject in needy}
        for start in range(0, len(spots), self.batch_size):
            batch, at = self._run(spots[start : start + self.batch_size], layers)
            for layer in layers:
                x[layer].append(batch.x((layer,))[at].clone())
            for subject in needy:
                acts[subject].append(subject.encode(batch)[at].clone())
            advance(len(batch))
        return Reading(_joined(x), _joined(acts))

    def _run(self, spots: Sequence[Spot], layers: Sequence[int]) -> tuple[Windows, tuple[Tensor, Tensor]]:
        """A batch, and where its spots are."""
        tokens, valid = make_rows(self.model, [spot.tokens for spot in spots], max(len(spot.tokens) for spot in spots))
        batch = run_windows(self.model, tokens, valid, layers, self.attention)
        places = torch.tensor([len(spot.tokens) + spot.position for spot in spots], device=batch.tokens.device)
        return batch, (torch.arange(len(spots), device=places.device), places)


def _joined(parts: dict[Key, list[Tensor]]) -> dict[Key, Tensor]:
    return {key: torch.cat(tensors) for key, tensors in parts.items()}
