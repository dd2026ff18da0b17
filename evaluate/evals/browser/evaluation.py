"""browser: all latents of all SAEs of a run, to be looked at: a folder of pages beside the run that opens from disk.

1. One pass over windows encodes them for all SAEs, keeps examples of every latent, and writes tokens, and what these
   attended to, as it goes.
2. Each SAE's latents: neighbours, counterparts in the other SAEs, what they promote through the model's own head.
3. The page, and the folder moves to its place.

F latents, D width, T context.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....cache_schema.strict import to_json
from ....train.run.folder import RunFolder
from ...context.ordinary import ordinary_rows
from ...context.split_windows import read_windows
from ...errors import BrowserUnwritten, ModelMissing, NotApplicable
from ...model.batches import count_windows
from ...model.head import Head
from ...model.windows import Windows
from ...output.figures.records import read_records
from ..contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from ..core.encoding import encode_codes
from .attended import LEVELS, attended
from .config import Config
from .folder import NAME, Folder, Pieces, making, read_data, unpacked, write_page
from .kept import Room
from .latents import FILE_LATENTS, Shown, neighbours, promoted, summary_of, write_latents
from .numbers import write_numbers
from .report import report_of
from .seen import Batch, Seen, lower_edges
from .words import Vocabulary

FORMAT = 1
TEXT_TOKENS, ATTENTION_TOKENS = 1 << 15, 1 << 10  # in a file
LEFT_OUT, BEGINS = 1, 2  # of a token, as bits: no SAE is asked about it; it begins a document
LATENT_BYTES = 4000  # on disk, about
SAME = ("format", "cache_id", "windows", "config")  # where SAEs of another build can stand beside these


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    """One browser for each run."""
    for home in dict.fromkeys(subject.home for subject in subjects):
        yield from browse(context, home, [subject for subject in subjects if subject.home == home], config)


def browse(context: Context, home: Path, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    windows = share_out(context, config)
    head, missing = find_head(context)
    try:
        with making(home, size_of(context, subjects, sum(windows.values()))) as folder:
            words = Vocabulary(context)
            seen, tokens = read(context, subjects, config, windows, folder, words)
            shown = [Shown(f"sae_{subject.label}", subject, seen[subject]) for subject in subjects]
            for one in shown:
                promotes = promoted(one, head, config.promoted, words)
                write_latents(folder, one, neighbours(one, shown, config), promotes, tokens, context.watch)
            about = describe(context, home, config, windows, words, missing)
            kept = keep_others(home, folder, about, subjects, words)
            folder.write("words", words.texts())
            folder.write("run", about | {"saes": [*(summary_of(one) for one in shown), *kept]})
            write_numbers(folder.path, read_records([RunFolder.at(home)]))
            write_page(folder, about["build"])
    except BrowserUnwritten as error:
        yield from (Failure(subject, error) for subject in subjects)
        return
    context.say(f"browser: {home / 'browser' / 'index.html'}")
    for one in shown:
        firing = {"tokens": one.seen.tokens, "massive_tokens": one.seen.massive, **one.shares}
        report = report_of(one.seen, *one.kept, tokens, words)
        yield Result(one.subject, to_json(config), {"firing": firing}, unstructured=report, missing=missing)


def share_out(context: Context, config: Config) -> dict[str, int]:
    """How many windows of which split are read."""
    left, found = config.windows, {}
    for split in config.splits:
        found[split] = min(left, count_windows(context.store, split))
        left -= found[split]
    if not any(found.values()):
        raise NotApplicable(f"the store's splits {', '.join(config.splits)} have no windows: harvest more text")
    return {split: count for split, count in found.items() if count}


def size_of(context: Context, subjects: Sequence[LoadedSae], windows: int) -> int:
    """Bytes on disk, about."""
    token = 8 + 4 * 3 * len(context.manifest.attention.layers)
    return windows * context.manifest.context * token + sum(subject.width for subject in subjects) * LATENT_BYTES


def find_head(context: Context) -> tuple[Head | None, str | None]:
    """The model's head, or why there is none."""
    try:
        return context.head, None
    except ModelMissing as error:
        return None, f"promoted tokens need the model: {error}"


def read(
    context: Context,
    subjects: Sequence[LoadedSae],
    config: Config,
    windows: dict[str, int],
    folder: Folder,
    words: Vocabulary,
) -> tuple[dict[LoadedSae, Seen], np.ndarray]:
    """The one pass; also every token [W, T]."""
    length, layers = context.manifest.context, context.manifest.attention.layers
    room = Room(config.top, config.sample, config.low)
    seen = {subject: Seen(subject.width, length, room) for subject in subjects}
    texts = Pieces(folder, "text", files_of(TEXT_TOKENS, length))
    attention = Pieces(folder, "attention", files_of(ATTENTION_TOKENS, length))
    every = max(1, sum(windows.values()) * length // max(config.together_tokens, 1))
    number, batches, tokens = 0, 0, []
    for split, count in windows.items():
        title = f"browser, {split} split"
        for batch in read_windows(
            context, subjects, title, count, config.batch_windows, split=split, attention_layers=layers
        ):
            place = Batch.of(batch, number, is_sampled=batches % every == 0)
            tokens.append(words.meet(batch.tokens.cpu().numpy()))
            rows = {subject: ordinary_rows(context, subject, batch) for subject in subjects}
            texts.add(tokens=tokens[-1], marks=marks_of(batch, rows.values()))
            if layers:
                positions, weights = attended(batch, layers, config.attended)
                kind = np.uint8 if length <= 1 << 8 else np.uint16
                attention.add(positions=positions.astype(kind), weights=weights)
            for subject, one in seen.items():
                one.take(encode_codes(subject, batch), place, rows[subject][batch.keep].cpu().numpy())
            number, batches = number + len(batch), batches + 1
    texts.finish()
    attention.finish()
    return seen, np.concatenate(tokens)


def files_of(tokens: int, context: int) -> int:
    """Windows in a file."""
    return max(1, tokens // context)


def marks_of(batch: Windows, rows: Iterable[Tensor]) -> np.ndarray:
    """uint8 [W, T]: LEFT_OUT by some SAE, and BEGINS."""
    kept = reduce(torch.logical_and, rows)
    marks = (~kept).cpu().numpy().astype(np.uint8) * LEFT_OUT
    if batch.documents is not None:
        begins = torch.zeros_like(batch.keep)
        begins[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
        marks |= begins.cpu().numpy().astype(np.uint8) * BEGINS
    return marks


def keep_others(
    home: Path, folder: Folder, about: dict[str, Any], subjects: Sequence[LoadedSae], words: Vocabulary
) -> list[dict[str, Any]]:
    """SAEs of the run that are not evaluated now go on to be shown, if they were read on the same tokens."""
    before = read_data(home / NAME, "run")
    if before is None or any(before.get(key) != about[key] for key in SAME):
        return []
    known = {subject.label for subject in subjects}
    kept = [sae for sae in before["saes"] if sae["label"] not in known and (home / sae["label"]).is_dir()]
    for sae in kept:
        shutil.copytree(home / NAME / "data" / sae["folder"], folder.path / "data" / sae["folder"])
    if kept:
        told = read_data(home / NAME, "words") or {}
        words.meet(unpacked(told["ids"]))
    return kept


def describe(
    context: Context, home: Path, config: Config, windows: dict[str, int], words: Vocabulary, missing: str | None
) -> dict[str, Any]:
    """What the page says of the run and has to know of the files."""
    manifest = context.manifest
    return {
        "format": FORMAT,
        "build": uuid.uuid4().hex[:12],
        "run": home.name,
        "config": to_json(config),
        "model": manifest.model.id,
        "corpus": manifest.corpus.id,
        "cache_id": manifest.cache_id,
        "context": manifest.context,
        "windows": windows,
        "text_windows": files_of(TEXT_TOKENS, manifest.context),
        "attention_windows": files_of(ATTENTION_TOKENS, manifest.context),
        "attention_layers": list(manifest.attention.layers),
        "attended": min(config.attended, manifest.context),
        "levels": LEVELS,
        "edges": lower_edges(),
        "file_latents": FILE_LATENTS,
        "sampled": config.sample,
        "without_words": words.obstacle,
        "without_model": missing,
    }


EVALUATION = Evaluation(Config, evaluate, needs=Needs(store=True), summary=("firing.alive_share", "firing.dense_share"))
