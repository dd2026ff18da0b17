"""browser: all latents of all SAEs of a run, in a folder of pages next to the run that opens from disk.

1. One pass over windows encodes them for all SAEs, keeps examples of every latent, and writes tokens, and what these
   attended to, as it goes. A build that was stopped continues from there.
2. Each SAE's latents: neighbours, counterparts in the other SAEs, what they promote through the model's own head.
3. The page is written, and the folder is moved to its place.

F latents, D width, T context.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .... import __version__
from ....cache_schema.errors import RequestInvalid, StoreError
from ....cache_schema.requests_and_spans import Request, validate_request
from ....cache_schema.strict_json import to_json
from ....train.errors import TrainError
from ....train.run.init_from_trained_sae import source_of
from ....train.run.run_folder import RunFolder
from ....train.sae.kernels.hardware import has_fast_bfloat16
from ...context.disk_cache import decided_by
from ...context.loaded_sae import attention_layers_of, layers_of
from ...context.stored_windows import TextCount, require_some
from ...context.write_and_read_results import place_now
from ...errors import BrowserUnwritten, ModelMissing, NotApplicable, ResultInvalid, SaeGone
from ...model.batches import count_windows
from ...model.unembedding_head import Head
from ...output.figures.records import read_records
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from ..measures.token_text import Vocabulary
from .browser_folder import (
    LATENT_BYTES,
    NAME,
    TEXT,
    Folder,
    making,
    read_data,
    require_space,
    saes_in,
    unpacked,
    write_page,
)
from .collect_firings import lower_edges
from .config import Config
from .exports import Exported, bytes_of, exports_in, keep_exports, require_known, tell_exports, write_exports
from .latents import COMPARED, FILE_LATENTS, LIST_BYTES, Shown, neighbours, promoted, summary_of, write_latents
from .latents_for_report import contexts, pattern
from .overview import write_numbers
from .read_and_encode import ATTENTION_TOKENS, LEVELS, SAVED, TEXT_TOKENS, files_of, read

FORMAT = 2  # 1 had samples of windows, each by its strongest token
SAME = ("format", "cache_id", "windows", "config", "massive_norms")  # of SAEs that can be shown side by side


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    """One browser for each run."""
    for home in dict.fromkeys(subject.home for subject in subjects):
        yield from browse(context, home, [subject for subject in subjects if subject.home == home], config)


def browse(context: Context, home: Path, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    require_known(config.exports)
    windows = share_out(context, config)
    subjects, failures = readable(context, subjects)
    yield from failures
    if not subjects:
        return
    head, missing = find_head(context)
    words = Vocabulary(context)
    about = describe(context, home, config, windows, words, missing)
    saes = [[subject.label, subject.sha256] for subject in subjects]
    # What computes the same numbers to the bit: sums by different programs are not joined.
    programs = [__version__, torch.__version__, torch.get_num_threads(), has_fast_bfloat16("cpu")]
    inputs = decided_by(
        **{key: about[key] for key in SAME}, saes=saes, saved=SAVED, device=str(context.device), programs=programs
    )
    try:
        require_own_store_or_none(context, home, subjects)
        now = {subject.label: [subject.sha256, *place_now(subject)] for subject in subjects}
        # Before all text is read: the log may be damaged.
        records = read_records([RunFolder(home)], context.say, now=now)
        exported_before = exports_in(home / NAME)
        subjects[0].make_home()
        with making(home, size_of(context, subjects, sum(windows.values())), inputs, context.say) as folder:
            seen, tokens = read(context, subjects, config, windows, folder, words)
            shown = [Shown(f"sae_{subject.label}", subject, seen[subject]) for subject in subjects]
            examples = sum(len(one.kept[0].latent) for one in shown)
            require_space(home, bytes_of(config.exports, examples, context.manifest.context))
            exported = {}
            for one in shown:
                near = neighbours(one, shown, config, context.watch)
                promotes = promoted(one, head, config.promoted, words, context.say)
                write_latents(folder, one, near, promotes, tokens, context.watch)
                if config.exports:  # all else is released: it grows with the fleet
                    exported[one] = promotes, near["by_direction"]
            kept = keep_others(context, home, folder, about, subjects, words)
            told = words.texts()
            folder.write("words", told)
            texts = dict(zip(told["ids"].tolist(), told["texts"], strict=True)) if config.exports else {}
            of = (about["model"], about["corpus"], about["run"])
            for one, (promotes, near) in exported.items():
                write_exports(folder.path, config.exports, Exported(one, tokens, texts, promotes, near, *of))
            also = {"not_compared": max(0, len(shown) - 1 - COMPARED)}
            own = [summary_of(one) | also for one in shown]
            folder.write("run", about | {"saes": [*own, *kept]})
            write_numbers(folder.path, records)
            write_page(folder.path, about["build"])
    except (BrowserUnwritten, ResultInvalid, SaeGone, StoreError, TrainError) as error:  # of this run alone
        yield from (Failure(subject, error) for subject in subjects)
        return
    for line in tell_exports(home / NAME, exported_before):
        context.say(line)
    context.say(f"browser: {home / 'browser' / 'index.html'}")
    for one in shown:
        firing = {"tokens": one.seen.tokens, "massive_tokens": one.seen.massive, **one.shares}
        report = {"latents": contexts(one.seen, *one.kept, tokens, words), "pattern": pattern(one.seen, tokens, words)}
        *others, last = windows
        splits = f"{', '.join(others)} and {last}" if others else last
        text = TextCount(splits, sum(windows.values()), one.seen.tokens, one.seen.massive)
        metrics = {"firing": firing}
        yield Result(one.subject, to_json(config), metrics, unstructured=report, missing=missing, measured_on=str(text))


def readable(context: Context, subjects: Sequence[LoadedSae]) -> tuple[list[LoadedSae], list[Failure]]:
    """The SAEs whose layers and attention the store holds, and why each other one is not read."""
    fitting, failures = list[LoadedSae](), list[Failure]()
    for subject in subjects:
        layers, attention = layers_of([subject]), attention_layers_of([subject])
        try:
            validate_request(context.manifest, Request(layers=layers, attention_layers=attention))
            fitting.append(subject)
        except RequestInvalid as error:
            failures.append(Failure(subject, error))
    return fitting, failures


def require_own_store_or_none(context: Context, home: Path, subjects: Sequence[LoadedSae]) -> None:
    """Keep a browser of the store that the SAEs were trained on: it cannot be made again from another store."""
    of = (read_data(home / NAME, "run") or {}).get("cache_id")
    if of != context.manifest.cache_id and any(subject.cache_id == of for subject in subjects if of):
        raise BrowserUnwritten(
            f"{home / NAME} was made from the store with cache id {of}, on which these SAEs were trained, and not from "
            f"{context.store.url}: move that folder elsewhere to make one from this store"
        )


def share_out(context: Context, config: Config) -> dict[str, int]:
    require_some(config.windows)
    left, found = config.windows, dict[str, int]()
    for split in dict.fromkeys(config.splits):  # one that is named twice is read once
        found[split] = min(left, count_windows(context.store, split))
        left -= found[split]
    if not any(found.values()):
        raise NotApplicable(f"the store's splits {', '.join(config.splits)} have no windows: harvest more text")
    if left > 0 and config.windows != Config().windows:
        there = sum(found.values())
        context.say(
            f"browser: asked for {config.windows:,} windows, but {', '.join(found)} have {there:,}: all are read"
        )
    return {split: count for split, count in found.items() if count}


def size_of(context: Context, subjects: Sequence[LoadedSae], windows: int) -> int:
    """Bytes on disk, about, without exports."""
    token = 8 + 4 * 3 * len(context.manifest.attention.layers)
    lists = 2 * min(len(subjects) - 1, COMPARED)  # by direction and by firing
    latent = LATENT_BYTES + lists * LIST_BYTES
    return windows * context.manifest.context * token + sum(subject.width for subject in subjects) * latent


def find_head(context: Context) -> tuple[Head | None, str | None]:
    """The model's head, or why there is none."""
    try:
        return context.head, None
    except ModelMissing as error:
        return None, f"promoted tokens need the model: {error}"


def keep_others(
    context: Context,
    home: Path,
    folder: Folder,
    about: dict[str, Any],
    subjects: Sequence[LoadedSae],
    words: Vocabulary,
) -> list[dict[str, Any]]:
    """Keep showing SAEs of the run that are not evaluated now, if they were read on the same tokens and have not
    changed since."""
    before, known = read_data(home / NAME, "run") or {}, {subject.label for subject in subjects}

    def leave_out(saes: Sequence[dict[str, Any]], why: str) -> None:
        if saes:
            names = ", ".join(sae["label"] for sae in saes)
            context.say(f"browser: {names} left out, {why}: name them too to show them")

    there = [sae for sae in saes_in(before) if sae["label"] not in known and (home / sae["label"]).is_dir()]
    same = [sae for sae in there if sae.get("sha256") == source_of(home / sae["label"]).sha256]
    leave_out([sae for sae in there if sae not in same], "whose weights have changed since")
    if _deciding(before) != _deciding(about):
        is_of_before = before.get("format") != FORMAT
        leave_out(same, "made by another version of saemill" if is_of_before else "read with other settings")
        return []
    ids, data = stored(home / NAME, "words", "ids"), home / NAME / "data"
    kept = [sae for sae in same if ids is not None and (data / sae["folder"]).is_dir()]
    leave_out([sae for sae in same if sae not in kept], "whose pages are damaged")
    if ids is None or not kept:
        return []
    for sae in kept:
        shutil.copytree(data / sae["folder"], folder.path / "data" / sae["folder"])
    keep_marks(home / NAME, folder)
    keep_exports(home / NAME, folder.path, about["run"], [sae["label"] for sae in kept])
    words.meet(ids)
    return kept


def keep_marks(before: Path, folder: Folder) -> None:
    """Keep the marks of text that SAEs which are kept leave out and none of those read now does: wherever there were
    marks before, since it is not stored which SAE left a row out."""
    for file in (folder.path / "data" / TEXT).glob("*.js"):
        name = f"{TEXT}/{file.stem}"
        marks = stored(before, name, "marks")
        text = {key: unpacked(array) for key, array in (read_data(folder.path, name) or {}).items()}
        if marks is not None and len(marks) == len(text["marks"]):
            folder.write(name, text | {"marks": text["marks"] | marks})


def stored(folder: Path, name: str, key: str) -> np.ndarray | None:
    """An array of a browser, if its file exists and is intact."""
    try:
        return unpacked((read_data(folder, name) or {})[key])
    except (KeyError, TypeError, ValueError):
        return None


def _deciding(about: Mapping[str, Any]) -> dict[str, Any]:
    """What SAEs shown side by side must have in common: `SAME`, without the exports."""
    config = about.get("config")
    settings = config if isinstance(config, Mapping) else {}
    found = {key: about.get(key) for key in SAME}
    return found | {"config": {name: value for name, value in settings.items() if name != "exports"}}


def is_there(subject: LoadedSae) -> bool:
    """Whether the SAE's pages exist: a browser can be removed, or be made without it or by another version."""
    about = read_data(subject.home / NAME, "run") or {}
    return about.get("format") == FORMAT and any(sae["label"] == subject.label for sae in saes_in(about))


def describe(
    context: Context, home: Path, config: Config, windows: dict[str, int], words: Vocabulary, missing: str | None
) -> dict[str, Any]:
    """What the page says about the run and has to know about the files."""
    manifest = context.manifest
    return {
        "format": FORMAT,
        "build": uuid.uuid4().hex[:12],
        "run": home.name,
        "config": to_json(config),
        "massive_norms": str(context.massive_multiple),
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
        "without_words": words.obstacle,
        "without_model": missing,
    }


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=("firing.alive_share", "firing.dense_share"),
    least=dict.fromkeys(("top", "sample", "low", "neighbours", "promoted", "attended"), 0),
    is_there=is_there,
)
