"""The one pass over windows: SAEs encode some batches while the codes of an earlier one are sorted into place.

Batches are encoded side by side, each on its share of the cores: a product on all cores would always wait for the one
that sorts. Progress is saved from time to time between two batches, and a stopped build resumes from it to the same
bytes. W windows, T context, L layers, K keys.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ....train.data.batch import AttentionRows
from ....train.data.device_copies import take_device
from ....train.disk.write_and_load_checkpoints import Standing, list_checkpoints, load_checkpoint, save_checkpoint
from ....train.errors import CheckpointDamaged
from ....train.sae.kernels.codes import Codes
from ...context.stored_windows import ordinary_rows, read_windows
from ...model.batches import Windows
from ..core.encoding import encode_codes
from ..evaluation_contract import Context, LoadedSae
from ..measures.token_text import Vocabulary
from .browser_folder import ATTENTION, TEXT, Folder, Pieces
from .collect_firings import Batch, Seen
from .config import Config

TEXT_TOKENS, ATTENTION_TOKENS = 1 << 15, 1 << 10  # in a file
LEVELS = 255  # of a written attention weight
SAVED = 2  # format of saved progress
WORKERS = 2  # at most: each holds a batch with its codes
EVERY, SHARE = 30, 20  # least seconds between saves, and as a multiple of the time that the last save took
LEFT_OUT, BEGINS = 1, 2  # bits of a token: some SAE leaves it out; it begins a document
CodesBySae = Mapping[LoadedSae, Sequence[Codes]]


def read(
    context: Context,
    subjects: Sequence[LoadedSae],
    config: Config,
    windows: Mapping[str, int],
    folder: Folder,
    words: Vocabulary,
) -> tuple[dict[LoadedSae, Seen], np.ndarray]:
    """What was collected about every SAE, and every token [W, T]; text and attention are written on the way."""
    layers = context.manifest.attention.layers
    gathering = Gathering(context, subjects, config, sum(windows.values()), folder, words)
    done = gathering.resume()

    def encode(batch: Windows) -> CodesBySae:
        return {subject: encode_codes(subject, batch) for subject in subjects}

    def sort(batch: Windows, codes: Future[CodesBySae]) -> None:
        rows = {subject: ordinary_rows(context, subject, batch) for subject in subjects}
        gathering.add(batch, rows, codes.result())

    with side_by_side(context.device, subjects) as (workers, pool):
        encoding: deque[tuple[Windows, Future[CodesBySae]]] = deque()
        for split, count in windows.items():
            title, size, first = f"browser, {split} split", config.batch_windows, min(done, count)
            done -= first
            for batch in read_windows(context, subjects, title, count, size, split, layers, first=first):
                encoding.append((batch, pool.submit(encode, batch)))
                if len(encoding) > workers:
                    sort(*encoding.popleft())
        while encoding:
            sort(*encoding.popleft())
    return gathering.finish()


@contextmanager
def side_by_side(device: torch.device, subjects: Sequence[LoadedSae]) -> Iterator[tuple[int, ThreadPoolExecutor]]:
    """A pool of workers, and its size: each worker's products use its share of the threads.

    There is only one for a GPU, and, to save memory, where SAEs are encoded into dense tables.
    """
    threads = torch.get_num_threads()
    are_sparse = all(subject.sae.is_plain and not subject.needs for subject in subjects)
    workers = min(threads, WORKERS) if device.type == "cpu" and are_sparse else 1
    torch.set_num_threads(threads // workers)
    pool = ThreadPoolExecutor(workers, "saemill-browser", initializer=take_device, initargs=(device,))
    try:
        yield workers, pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class Gathering:
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
        self._layers, self._config, self._words = context.manifest.attention.layers, config, words
        self._seen = {subject: Seen(subject.width, length, config) for subject in subjects}
        self._texts = Pieces(folder, TEXT, windows_per_file(TEXT_TOKENS, length))
        self._attention = Pieces(folder, ATTENTION, windows_per_file(ATTENTION_TOKENS, length))
        self._every = max(1, windows * length // max(config.together_tokens, 1))
        self._tokens: list[np.ndarray] = []
        self._windows = self._batches = 0
        self._total, self._say, self._saved = windows, context.say, folder.saved
        self._save_at = time.monotonic() + EVERY

    def add(self, batch: Windows, rows: Mapping[LoadedSae, Tensor], codes: CodesBySae) -> None:
        """Add the next batch: which rows count, and the codes of its kept tokens."""
        place = Batch.of(batch, self._windows, is_sampled=self._batches % self._every == 0)
        self._tokens.append(self._words.include(batch.tokens.cpu().numpy()))
        self._windows, self._batches = self._windows + len(batch), self._batches + 1
        self._texts.add(tokens=self._tokens[-1], marks=marks_of(batch, rows.values()))
        if self._layers:
            positions, weights = attended(batch, self._layers, self._config.attended)
            kind = np.uint8 if batch.context <= 1 << 8 else np.uint16
            self._attention.add(positions=positions.astype(kind), weights=weights)
        for subject, seen in self._seen.items():
            seen.take(codes[subject], place, rows[subject][batch.keep].cpu().numpy())
        if time.monotonic() >= self._save_at:
            self._save()

    def _save(self) -> None:
        """Save progress, if possible: a disk without room for it may still have room for the browser."""
        started = time.monotonic()
        try:
            text = {"tokens": np.concatenate(self._tokens), "batches": np.array([self._batches])}
            state = {"text": {**text, **self._texts.state(), **self._attention.state()}}
            state |= {f"sae_{number}": seen.state() for number, seen in enumerate(self._seen.values())}
            tensors = {part: {name: torch.from_numpy(one) for name, one in of.items()} for part, of in state.items()}
            at = Standing(step=self._windows, metrics_bytes=0, seconds=0.0, waited_seconds=0.0, same_pairs=0, pairs=0)
            save_checkpoint(self._saved, at, tensors)
        except (OSError, SafetensorError) as error:
            for part in self._saved.glob(".step_*.tmp"):
                shutil.rmtree(part, ignore_errors=True)
            then = "resume from the last save" if list_checkpoints(self._saved) else "start again"
            self._say(f"browser: progress cannot be saved ({error}): if it is stopped now, it will {then}")
        self._save_at = time.monotonic() + max(EVERY, SHARE * (time.monotonic() - started))

    def resume(self) -> int:
        """Resume a stopped build of the same inputs, if there was one; return how many windows it had read."""
        try:
            found = load_checkpoint(self._saved)
        except CheckpointDamaged:
            self._say("browser: the saved progress of a stopped build is damaged: starting again")
            shutil.rmtree(self._saved)
            return 0
        if found is None:
            return 0
        state = {part: {name: one.numpy() for name, one in of.items()} for part, of in found.tensors.items()}
        text, self._windows = state["text"], found.standing.step
        self._tokens, self._batches = [self._words.include(text["tokens"])], text["batches"].item()
        for pieces in (self._texts, self._attention):
            pieces.restore(self._windows, text)
        for number, seen in enumerate(self._seen.values()):
            seen.restore(state[f"sae_{number}"])
        self._say(f"browser: resuming after {self._windows:,} of {self._total:,} windows")
        return self._windows

    def finish(self) -> tuple[dict[LoadedSae, Seen], np.ndarray]:
        self._texts.finish()
        self._attention.finish()
        return self._seen, np.concatenate(self._tokens)


def windows_per_file(tokens: int, context: int) -> int:
    return max(1, tokens // context)


def marks_of(batch: Windows, rows: Iterable[Tensor]) -> np.ndarray:
    """uint8 [W, T]: LEFT_OUT and BEGINS."""
    marks = (~reduce(torch.logical_and, rows)).cpu().numpy().astype(np.uint8) * LEFT_OUT
    assert batch.documents is not None, "windows of a store have documents"
    begins = torch.zeros_like(batch.keep)
    begins[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    return marks | begins.cpu().numpy().astype(np.uint8) * BEGINS


def attended(batch: Windows, layers: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which earlier tokens the model attended to: for every token, the strongest keys of each stored layer.

    Positions and weights [W, T, L, K], uint16 and uint8 in steps of 1 / LEVELS; weight 0 where there are no more. Heads
    are averaged. The token itself and special tokens, above all the first, are left out as uninformative.
    """
    found = [strongest_keys(batch.attention[layer], batch.keep, count) for layer in layers]
    positions = torch.stack([position for position, _ in found], 2).cpu().numpy().astype(np.uint16)
    weights = torch.stack([weight for _, weight in found], 2)
    return positions, (weights * LEVELS).round().clamp(0, LEVELS).to(torch.uint8).cpu().numpy()


def strongest_keys(rows: AttentionRows, keep_WT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions and weights [W, T, K]."""
    windows, heads, context = rows.kept_mass.shape
    row = torch.repeat_interleave(torch.arange(windows * heads * context, device=rows.data.device), rows.indptr.diff())
    query = row // (heads * context) * context + row % context
    mean = rows.data.new_zeros(windows * context * context)
    mean.index_add_(0, query * context + rows.indices, rows.data / heads)
    mean_WTT = mean.view(windows, context, context) * keep_WT[:, None, :]
    mean_WTT.diagonal(dim1=1, dim2=2).zero_()
    weights, positions = mean_WTT.topk(min(count, context), dim=2)
    return positions, weights
