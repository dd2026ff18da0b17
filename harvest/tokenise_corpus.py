"""All windows of a corpus, on disk, before the first forward pass: resumable, in bounded memory.

A document's split depends on its text alone; documents of full splits are counted and skipped. Every few seconds, and
when the network is lost, a checkpoint records the valid length of the splits' files and the position in the corpus: a
later run truncates the files and resumes. The windows depend neither on batches nor on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache_schema.disk_and_cloud_files import Files, LocalFiles, name_failure, sync
from ..cache_schema.numbers_in_words import counted
from ..cache_schema.splits import PER_MILLE, share_windows, split_of
from .corpus.source import Corpus, State, left_alone_by
from .errors import CorpusEmpty, NetworkLost, SplitEmpty
from .model.tokenizer import TextEncoder
from .pack_windows import Packer, Packing

BATCH_CHARACTERS = 2_000_000
CHECKPOINT_SECONDS = 10.0
ARRAYS = ("tokens", "documents")
CHECKPOINT = "checkpoint.json"
BYTES_PER_TOKEN = 2 * 4 * len(ARRAYS)  # each array twice: by split, and joined


@dataclass(frozen=True)
class PackedCorpus:
    """The windows of all splits, in the order train, validation, test."""

    tokens: np.ndarray  # uint32 [N, T]
    documents: np.ndarray  # uint32 [N, T]
    splits: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class PackingJob:
    """The settings that decide the windows, besides the corpus and the tokenizer."""

    windows: int
    context: int
    packing: Packing
    test_per_mille: int = PER_MILLE["test"]


class Spool:
    """A folder with one file per split and array, and a checkpoint."""

    def __init__(self, folder: Path, job: PackingJob, bos: int, fingerprint: dict[str, Any]) -> None:
        self.folder, self._checkpoint = folder, folder / CHECKPOINT
        self.job = job
        self.quotas = share_windows(job.windows, job.test_per_mille)
        self.counts = dict.fromkeys(self.quotas, 0)
        self.documents = 0
        self.empty = 0  # of these documents
        self.counts_all = True  # whether all left-out tokens are counted: earlier versions did not
        self.has_text = False
        self.discards = False  # whether existing files, of other text or settings, are discarded
        self._packers = {name: Packer(job.context, bos, job.packing) for name in self.quotas}
        self._fingerprint = fingerprint | asdict(job)

    @property
    def is_full(self) -> bool:
        return self.counts == self.quotas

    def resume(self) -> dict[str, Any] | None:
        """Return to the last checkpoint of the same job; return its corpus state, or None."""
        with self._name_failure():
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint = self._read_checkpoint()
            if checkpoint is None:
                self.discards = self._checkpoint.exists()
                # It may be another job's, and must not describe the new files.
                self._checkpoint.unlink(missing_ok=True)
                sync(self.folder)
                for split, array in self._keys():
                    self._path(split, array).write_bytes(b"")
                return None
            self.counts, self.documents = checkpoint["counts"], checkpoint["documents"]
            self.has_text = checkpoint["has_text"]
            self.empty = checkpoint.get("empty", 0)  # not counted by an earlier version
            self.counts_all = checkpoint.get("counts_all", False)
            for split, array in self._keys():
                os.truncate(self._path(split, array), self.counts[split] * self.job.context * 4)
            for split, packer in self._packers.items():
                packer.tokens, packer.documents = (np.array(row, np.uint32) for row in checkpoint["rows"][split])
                packer.short, packer.left_over = checkpoint.get("left_out", {}).get(split, (0, 0))
            return checkpoint["corpus"]

    def append(self, split: str, texts: list[list[int]], numbers: list[int]) -> None:
        """Pack documents and write the windows that they complete, up to the split's quota."""
        self.has_text = self.has_text or any(texts)
        windows = self._packers[split].pack(texts, numbers)
        wanted = min(len(windows), self.quotas[split] - self.counts[split])
        for array, values in zip(ARRAYS, (windows.tokens, windows.documents), strict=True):
            with self._name_failure(), self._path(split, array).open("ab") as file:
                file.write(values[:wanted].tobytes())
        self.counts[split] += wanted

    def checkpoint(self, corpus_state: dict[str, Any]) -> None:
        """Record everything appended so far, for a later run to resume after."""
        with self._name_failure():
            for split, array in self._keys():
                sync(self._path(split, array))
        rows = {name: [packer.tokens.tolist(), packer.documents.tolist()] for name, packer in self._packers.items()}
        document = {
            "fingerprint": self._fingerprint,
            "counts": self.counts,
            "documents": self.documents,
            "empty": self.empty,
            "left_out": {name: [packer.short, packer.left_over] for name, packer in self._packers.items()},
            "counts_all": self.counts_all,
            "has_text": self.has_text,
            "rows": rows,
            "corpus": corpus_state,
        }
        LocalFiles(self.folder).replace(CHECKPOINT, json.dumps(document).encode())

    def say_left_out(self) -> str:
        """In words: the text that filled no window; empty under `concat`, which joins it to the next document."""
        packers, at_least = self._packers.values(), "" if self.counts_all else "at least "
        short, tokens = sum(packer.short for packer in packers), sum(packer.left_over for packer in packers)
        total = f"--packing documents left out {at_least}{counted(tokens, 'token')}: those of"
        documents = f"{counted(short, 'document')} shorter than a window of {self.job.context}"
        return f"{total} {documents}, and the ends of others" if tokens else ""

    def join(self) -> PackedCorpus:
        """All splits in sequence, read from disk as needed."""
        ends = np.cumsum(list(self.counts.values())).tolist()
        splits = {name: (end - count, end) for (name, count), end in zip(self.counts.items(), ends, strict=True)}
        tokens, documents = (self._joined(array, ends[-1]) for array in ARRAYS)
        return PackedCorpus(tokens, documents, splits)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _joined(self, array: str, windows: int) -> np.ndarray:
        path = self.folder / f"{array}.u32"
        with self._name_failure():
            with path.open("wb") as out:
                for split in self.quotas:
                    with self._path(split, array).open("rb") as part:
                        shutil.copyfileobj(part, out, 1 << 24)
            return np.memmap(path, "<u4", "r", shape=(windows, self.job.context))

    def _name_failure(self) -> AbstractContextManager[None]:
        """Turn a disk's error into one that names the operation."""
        return name_failure(f"tokenising into {self.folder}")

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint; None also if it is damaged, or if files are shorter: the rest would become zeros."""
        try:
            checkpoint = json.loads(self._checkpoint.read_bytes())
            if checkpoint["fingerprint"] != self._fingerprint:
                return None
            sizes = {key: self._path(*key).stat().st_size for key in self._keys()}
        except (FileNotFoundError, KeyError, TypeError, ValueError):
            return None
        wanted = {split: count * self.job.context * 4 for split, count in checkpoint["counts"].items()}
        return checkpoint if all(size >= wanted[split] for (split, _), size in sizes.items()) else None

    def _keys(self) -> Iterator[tuple[str, str]]:
        return ((split, array) for split in self.quotas for array in ARRAYS)

    def _path(self, split: str, array: str) -> Path:
        return self.folder / f"{split}.{array}.u32"


def spool_folder(files: Files) -> Path:
    """The folder for tokens: next to a local store, on its disk (inside it if it is a mount point); for a remote store
    among temporary files."""
    if isinstance(files, LocalFiles):
        root = files.root.resolve()  # a link's target may be on another disk
        return root / ".spool" if root.is_mount() else root.with_name(f"{root.name}.spool")
    name = hashlib.sha256(files.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"saemill-{name}.spool"


def saved_corpus_state(folder: Path) -> State:
    """The corpus state of the last checkpoint, of any job; empty if none can be read."""
    try:
        state = json.loads((folder / CHECKPOINT).read_bytes())["corpus"]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def spool_corpus(
    corpus: Corpus,
    encoder: TextEncoder,
    job: PackingJob,
    folder: Path,
    report: Callable[[int, int], None] = lambda windows, documents: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Spool, PackedCorpus]:
    """Tokenise and pack until all splits are full. `report` is called with the numbers of windows packed and documents
    read, `say` with messages about discarded tokens and left-out text."""
    fingerprint = {
        "corpus": [corpus.id, corpus.revision, corpus.settings],
        "tokenizer": [encoder.digest, encoder.bos_token],
    }
    spool = Spool(folder, job, encoder.bos_token, fingerprint)
    state = spool.resume()
    if spool.discards:
        say(f"tokenising starts over: {folder} is damaged, or has other text or settings")
    if left := left_alone_by(corpus):  # early, in case the user named a wrong folder
        say(f"warning: {left}")
    report(sum(spool.counts.values()), spool.documents)
    if not spool.is_full:
        try:
            _fill(spool, corpus, encoder, state, report)
        except NetworkLost:
            spool.checkpoint(corpus.state())
            raise
    spool.checkpoint(corpus.state())
    if (found := left_alone_by(corpus)) != left:
        say(f"warning: {found}")
    if spool.empty:
        remedy = ". If their text is in another column, name it with --column" if "column" in corpus.settings else ""
        share = f"{spool.empty:,} of {counted(spool.documents, 'document')}"
        say(f"warning: {share} read from {corpus.id} are empty or null{remedy}")
    if left_out := spool.say_left_out():
        say(left_out)
    _require_text(spool, corpus)
    return spool, spool.join()


def _fill(
    spool: Spool, corpus: Corpus, encoder: TextEncoder, state: dict[str, Any] | None, report: Callable[[int, int], None]
) -> None:
    """Add batches until all splits are full or the corpus ends."""
    saved = time.monotonic()
    for batch in _batches(corpus.documents(state)):
        _add(spool, encoder, batch)
        report(sum(spool.counts.values()), spool.documents)
        if spool.is_full:
            return
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            spool.checkpoint(corpus.state())
            saved = time.monotonic()


def _add(spool: Spool, encoder: TextEncoder, texts: list[str]) -> None:
    """Tokenise and pack one batch, split by split. A document's number is its index in the corpus."""
    by_split: dict[str, tuple[list[str], list[int]]] = {name: ([], []) for name in spool.quotas}
    for number, text in enumerate(texts, spool.documents):
        split = split_of(text, spool.job.test_per_mille)
        if spool.counts[split] < spool.quotas[split]:
            by_split[split][0].append(text)
            by_split[split][1].append(number)
    for split, (chosen, numbers) in by_split.items():
        if chosen:
            spool.append(split, encoder.encode(chosen), numbers)
    spool.documents += len(texts)
    spool.empty += texts.count("")


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in lists of bounded size, each completed in time for a checkpoint.

    If the network is lost, the documents before are still yielded. Not for any other error: at an interrupt, or at a
    document that is not text, the corpus already counts a document that has not been packed, and a checkpoint would
    silently skip it.
    """
    batch, characters, start = [], 0, time.monotonic()
    try:
        for text in documents:
            batch.append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS or time.monotonic() - start > CHECKPOINT_SECONDS:
                yield batch
                batch, characters, start = [], 0, time.monotonic()
    except NetworkLost:
        yield batch
        raise
    yield batch


def _require_text(spool: Spool, corpus: Corpus) -> None:
    """Require that every split has at least one window."""
    if not spool.has_text:
        what = "no text in its documents" if spool.documents else "no document"
        raise CorpusEmpty(f"the corpus {corpus.id} holds {what}. Give one with text in it")
    empty = [name for name, count in spool.counts.items() if not count]
    if empty:
        raise SplitEmpty(
            f"the {spool.documents:,} documents of corpus {corpus.id} fill no window of {spool.job.context} tokens in "
            f"{' and '.join(empty)}: documents go to train, validation and test by a hash of their text. "
            f"{window_remedy(spool.job.packing)}"
        )


def window_remedy(packing: Packing) -> str:
    """The remedy, in words, for a corpus that fills too few windows."""
    if packing == "concat":
        return "Give more text, or a smaller --context"
    return "Give longer documents or more of them, --packing concat, which joins short ones, or a smaller --context"
