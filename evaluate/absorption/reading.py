"""What models and SAEs make of words in prompts. N words, D width, F latents.

A prompt is read at its word's last token: as many tokens before its end as the template has behind the word,
wherever that end lies, so words and tokenizers of any length will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...cache_schema import AttentionSpec
from ..feed import make_rows, run_windows
from ..fitting import layers_of
from ..lm import LanguageModel
from ..subject import Subject
from ..windows import Windows
from .prompts import Prompt

Key = TypeVar("Key")
CHUNK_BYTES = 64 << 20
"""Of dense activations held at once."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Residuals at the words; activations too of SAEs that read more than the residual there."""

    x: dict[int, Tensor]  # layer -> float32 [N, D]
    acts: dict[Subject, Tensor]  # [N, F]

    def acts_of(self, subject: Subject, rows: Tensor) -> Tensor:
        """Activations of some words: [rows, F]."""
        if subject in self.acts:
            return self.acts[subject][rows]
        with torch.no_grad():
            return subject.sae.encode(self.x[subject.layer][rows])

    def columns_of(self, subject: Subject, latents: Tensor) -> Tensor:
        """Activations of some latents at all words: [N, latents]."""
        parts = [self.acts_of(subject, rows)[:, latents] for rows in self.chunks(subject)]
        return torch.cat(parts)

    def chunks(self, subject: Subject) -> Iterator[Tensor]:
        """The numbers of all words, in pieces whose activations fit into memory."""
        x_ND = self.x[subject.layer]
        size = max(1, CHUNK_BYTES // (4 * subject.width))
        yield from torch.arange(len(x_ND), device=x_ND.device).split(size)


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts for all SAEs in one pass of the model."""

    model: LanguageModel
    subjects: Sequence[Subject]
    attention: AttentionSpec | None
    word_position: int
    """Of the word's last token, counted from the prompt's end: below zero."""
    batch_size: int

    def read(self, prompts: Sequence[Prompt], advance: Callable[[int], None]) -> Reading:
        layers = layers_of(self.subjects)
        needy = [subject for subject in self.subjects if subject.needs]
        x: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        acts: dict[Subject, list[Tensor]] = {subject: [] for subject in needy}
        for start in range(0, len(prompts), self.batch_size):
            batch, at = self._run(prompts[start : start + self.batch_size], layers)
            for layer in layers:
                x[layer].append(batch.x((layer,))[at].clone())
            for subject in needy:
                acts[subject].append(subject.encode(batch)[at].clone())
            advance(len(batch))
        return Reading(_joined(x), _joined(acts))

    def _run(self, prompts: Sequence[Prompt], layers: Sequence[int]) -> tuple[Windows, tuple[Tensor, Tensor]]:
        """A batch, and where its words are."""
        ids = self.model.tokenizer.encode([prompt.text for prompt in prompts])
        rows = [[self.model.bos, *tokens] for tokens in ids]
        tokens, valid = make_rows(self.model, rows, max(map(len, rows)))
        batch = run_windows(self.model, tokens, valid, layers, self.attention)
        ends = torch.tensor([len(row) + self.word_position for row in rows], device=batch.tokens.device)
        return batch, (torch.arange(len(rows), device=ends.device), ends)


def word_position(model: LanguageModel, template: str) -> int:
    """Where the word ends in a prompt, counted from its end; -6 for the protocol's template and Gemma's tokens."""
    return -len(model.tokenizer.encode([template.split("{word}")[1]])[0]) - 1


def _joined(parts: dict[Key, list[Tensor]]) -> dict[Key, Tensor]:
    return {key: torch.cat(tensors) for key, tensors in parts.items()}
