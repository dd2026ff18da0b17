"""The one pass over windows: SAEs encode a batch while what the batch before says is sorted into its place.

Encoding keeps all cores busy and sorting keeps one; side by side neither waits for the other. W windows, T context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ....train.sae.kernels.codes import Codes
from ...context.split_windows import ordinary_rows, read_windows
from ...model.batches import Windows
from ..contract import Context, LoadedSae
from ..core.encoding import encode_codes
from .attended import attended
from .config import Config
from .firing_counts import Batch, Seen
from .folder import Folder, Pieces
from .kept_firings import Room
from .token_text import Vocabulary

TEXT_TOKENS, ATTENTION_TOKENS = 1 << 15, 1 << 10  # in a file
LEFT_OUT, BEGINS = 1, 2  # of a token, as bits: some SAE is not asked about it; it begins a document


def read(
    context: Context,
    subjects: Sequence[LoadedSae],
    config: Config,
    windows: Mapping[str, int],
    folder: Folder,
    words: Vocabulary,
) -> tuple[dict[LoadedSae, Seen], np.ndarray]:
    """What was seen of every SAE, and every token [W, T]; texts and attention are written on the way."""
    layers = context.manifest.attention.layers
    gathering = Gathering(context, subjects, config, sum(windows.values()), folder, words)
    with ThreadPoolExecutor(1, thread_name_prefix="saemill-browser") as worker:
        sorting: Future[None] | None = None
        for split, count in windows.items():
            title = f"browser, {split} split"
            for batch in read_windows(context, subjects, title, count, config.batch_windows, split, layers):
                rows = {subject: ordinary_rows(context, subject, batch) for subject in subjects}
                codes = {subject: encode_codes(subject, batch) for subject in subjects}
                if sorting is not None:
                    sorting.result()
                sorting = worker.submit(gathering.add, batch, rows, codes)
        if sorting is not None:
            sorting.result()
    return gathering.finish()


class Gathering:
    """What is left of the batches that were read."""

    def __init__(
        self,
        context: Context,
        subjects: Sequence[LoadedSae],
        config: Config,
        windows: int,
        folder: Folder,
        words: Vocabulary,
    ) -> None:
        length = context.manifest.context
        room = Room(config.top, config.sample, config.low)
        self._layers, self._config, self._words = context.manifest.attention.layers, config, words
        self._seen = {subject: Seen(subject.width, length, room) for subject in subjects}
        self._texts = Pieces(folder, "text", files_of(TEXT_TOKENS, length))
        self._attention = Pieces(folder, "attention", files_of(ATTENTION_TOKENS, length))
        self._every = max(1, windows * length // max(config.together_tokens, 1))
        self._tokens: list[np.ndarray] = []
        self._windows = 0

    def add(self, batch: Windows, rows: Mapping[LoadedSae, Tensor], codes: Mapping[LoadedSae, Sequence[Codes]]) -> None:
        """The next batch: which rows count, and the codes of its kept tokens."""
        place = Batch.of(batch, self._windows, is_sampled=len(self._tokens) % self._every == 0)
        self._tokens.append(self._words.meet(batch.tokens.cpu().numpy()))
        self._windows += len(batch)
        self._texts.add(tokens=self._tokens[-1], marks=marks_of(batch, rows.values()))
        if self._layers:
            positions, weights = attended(batch, self._layers, self._config.attended)
            kind = np.uint8 if batch.context <= 1 << 8 else np.uint16
            self._attention.add(positions=positions.astype(kind), weights=weights)
        for subject, seen in self._seen.items():
            seen.take(codes[subject], place, rows[subject][batch.keep].cpu().numpy())

    def finish(self) -> tuple[dict[LoadedSae, Seen], np.ndarray]:
        self._texts.finish()
        self._attention.finish()
        return self._seen, np.concatenate(self._tokens)


def files_of(tokens: int, context: int) -> int:
    """Windows in a file."""
    return max(1, tokens // context)


def marks_of(batch: Windows, rows: Iterable[Tensor]) -> np.ndarray:
    """uint8 [W, T]: LEFT_OUT and BEGINS."""
    marks = (~reduce(torch.logical_and, rows)).cpu().numpy().astype(np.uint8) * LEFT_OUT
    if batch.documents is not None:
        begins = torch.zeros_like(batch.keep)
        begins[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
        marks |= begins.cpu().numpy().astype(np.uint8) * BEGINS
    return marks
