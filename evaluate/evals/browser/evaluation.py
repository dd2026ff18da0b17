"""browser: all latents of a run's SAEs, in a folder of pages in the run's folder that opens from disk.

1. One pass over windows encodes them for all SAEs, keeps examples of every latent, and writes tokens, and what these
   attended to, as it goes. A stopped build resumes there.
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
from ...context.stored_windows import TextCount, say_splits, windows_by_split
from ...context.write_and_read_results import place_now
from ...errors import BrowserUnwritten, ModelMissing, NotApplicable, ResultInvalid, SaeGone
from ...model.unembedding_head import Head
from ...output.figures.records import read_records
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from ..measures.token_text import Vocabulary
from .browser_folder import (
    LATENT_BYTES,
    NAME,
    TEXT,
    Folder,
    building,
    read_data,
    require_space,
    saes_in,
    unpacked,
    write_page,
)
from .collect_firings import LONGEST, lower_edges
from .config import Config
from .exports import Exported, bytes_of, exports_in, keep_exports, report_exports, require_known, write_exports
from .latents import COMPARED, FILE_LATENTS, LIST_BYTES, Shown, neighbours, promoted, summary_of, write_latents
from .latents_for_report import contexts, pattern
from .overview import write_numbers
from .read_and_encode import ATTENTION_TOKENS, LEVELS, SAVED, TEXT_TOKENS, read, windows_per_file

FORMAT = 2  # 1 had samples of windows, each by its strongest token
SHARED = ("format", "cache_id", "windows", "config", "massive_norms")  # the same for SAEs shown side by side


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    """One browser for each run."""
    for home in dict.fromkeys(subject.home for subject in subjects):
        yield from browse(context, home, [subject for subject in subjects if subject.home == home], config)


def browse(context: Context, home: Path, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    require_known(config.exports)
    if context.manifest.context > LONGEST:
        raise NotApplicable(
            f"the browser shows windows of at most {LONGEST:,} tokens, but the store's have "
            f"{context.manifest.context:,}: harvest text in shorter ones"
        )
    is_default = config.windows == Config().windows
    windows = windows_by_split(context, "browser", config.windows, config.splits, is_default)
    subjects, failures = readable(context, subjects)
    yield from failures
    if not subjects:
        return
    head, missing = find_head(context)
    words = Vocabulary(context)
    about = describe(context, home, config, windows, words, missing)
    saes = [[subject.label, subject.sha256] for subject in subjects]
    # Everything that can change a number's last bits: sums by different programs must not be joined.
    programs = [__version__, torch.__version__, torch.get_num_threads(), has_fast_bfloat16("cpu")]
    inputs = decided_by(
        **{key: about[key] for key in SHARED}, saes=saes, saved=SAVED, device=str(context.device), programs=programs
    )
    try:
        require_own_store_or_none(context, home, subjects)
        now = {subject.label: [subject.sha256, *place_now(subject)] for subject in subjects}
        # Before the long pass over text, because the log may be damaged.
        records = read_records([RunFolder(home)], context.say, now=now)
        exported_before = exports_in(home / NAME)
        subjects[0].make_home()
        with building(home, size_of(context, subjects, sum(windows.values())), inputs, context.say) as folder:
            seen, tokens = read(context, subjects, config, windows, folder, words)
            shown = [Shown(f"sae_{subject.label}", subject, seen[subject]) for subject in subjects]
            examples = sum(len(one.kept[0].latent) for one in shown)
            require_space(home, bytes_of(config.exports, examples, context.manifest.context))
            exported = {}
            for one in shown:
                near = neighbours(one, shown, config, context.watch)
                promotes = promoted(one, head, config.promoted, words, context.say)
                write_latents(folder, one, near, promotes, tokens, context.watch)
                if config.exports:  # the rest is released, because it grows with the number of SAEs
                    exported[one] = promotes, near["by_direction"]
            kept = keep_others(context, home, folder, about, subjects, words)
            written = words.texts()
            folder.write("words", written)
            texts = dict(zip(written["ids"].tolist(), written["texts"], strict=True)) if config.exports else {}
            names = about["model"], about["corpus"], about["run"]
            for one, (promotes, near) in exported.items():
                write_exports(folder.path, config.exports, Exported(one, tokens, texts, promotes, near, *names))
            own = [summary_of(one) | {"not_compared": max(0, len(shown) - 1 - COMPARED)} for one in shown]
            folder.write("run", about | {"saes": [*own, *kept]})
            write_numbers(folder.path, records)
            write_page(folder.path, about["build"])
    except (BrowserUnwritten, ResultInvalid, SaeGone, StoreError, TrainError) as error:  # other runs go ahead
        yield from (Failure(subject, error) for subject in subjects)
        return
    for line in report_exports(home / NAME, exported_before):
        context.say(line)
    context.say(f"browser: {home / 'browser' / 'index.html'}")
    for one in shown:
        metrics = {"firing": {"tokens": one.seen.tokens, "massive_tokens": one.seen.massive, **one.shares}}
        report = {"latents": contexts(one.seen, *one.kept, tokens, words), "pattern": pattern(one.seen, tokens, words)}
        text = TextCount(say_splits(windows), sum(windows.values()), one.seen.tokens, one.seen.massive)
        yield Result(one.subject, to_json(config), metrics, unstructured=report, missing=missing, measured_on=str(text))


def readable(context: Context, subjects: Sequence[LoadedSae]) -> tuple[list[LoadedSae], list[Failure]]:
    """The SAEs whose layers and attention the store holds, and a failure for each of the others."""
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
    """Refuse to replace a browser of the store that the SAEs were trained on by one of another store."""
    made_from = (read_data(home / NAME, "run") or {}).get("cache_id")
    is_their_own = any(subject.cache_id == made_from for subject in subjects if made_from)
    if made_from != context.manifest.cache_id and is_their_own:
        raise BrowserUnwritten(
            f"{home / NAME} was made from the store with cache id {made_from}, on which these SAEs were trained, not "
            f"from {context.store.url}: move that folder elsewhere to build one from this store"
        )


def size_of(context: Context, subjects: Sequence[LoadedSae], windows: int) -> int:
    """About how many bytes the browser takes on disk, without exports."""
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
    """Keep showing SAEs of the run that are not evaluated now, if they were read on the same tokens and are
    unchanged."""
    before, known = read_data(home / NAME, "run") or {}, {subject.label for subject in subjects}

    def leave_out(saes: Sequence[dict[str, Any]], why: str) -> None:
        if saes:
            names = ", ".join(sae["label"] for sae in saes)
            context.say(f"browser: {names} left out ({why}): name them too to show them")

    there = [sae for sae in saes_in(before) if sae["label"] not in known and (home / sae["label"]).is_dir()]
    same = [sae for sae in there if sae.get("sha256") == source_of(home / sae["label"]).sha256]
    leave_out([sae for sae in there if sae not in same], "weights have changed since")
    if _shared(before) != _shared(about):
        is_other_format = before.get("format") != FORMAT
        leave_out(same, "made by another version of saemill" if is_other_format else "read with other settings")
        return []
    ids, data = stored(home / NAME, "words", "ids"), home / NAME / "data"
    kept = [sae for sae in same if ids is not None and (data / sae["folder"]).is_dir()]
    leave_out([sae for sae in same if sae not in kept], "pages are damaged")
    if ids is None or not kept:
        return []
    for sae in kept:
        shutil.copytree(data / sae["folder"], folder.path / "data" / sae["folder"])
    keep_marks(home / NAME, folder)
    keep_exports(home / NAME, folder.path, about["run"], [sae["label"] for sae in kept])
    words.include(ids)
    return kept


def keep_marks(before: Path, folder: Folder) -> None:
    """Keep marks of text that only kept SAEs leave out: all that there were before, because it is not stored which SAE
    left a row out."""
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


def _shared(about: Mapping[str, Any]) -> dict[str, Any]:
    """What SAEs shown side by side must have in common: `SHARED`, without the exports."""
    config = about.get("config")
    settings = config if isinstance(config, Mapping) else {}
    found = {key: about.get(key) for key in SHARED}
    return found | {"config": {name: value for name, value in settings.items() if name != "exports"}}


def is_there(subject: LoadedSae) -> bool:
    """Whether the SAE's pages exist: a browser can be deleted, or built without it or by another version."""
    about = read_data(subject.home / NAME, "run") or {}
    return about.get("format") == FORMAT and any(sae["label"] == subject.label for sae in saes_in(about))


def describe(
    context: Context, home: Path, config: Config, windows: dict[str, int], words: Vocabulary, missing: str | None
) -> dict[str, Any]:
    """What the page shows about the run and needs to know about the files."""
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
        "text_windows": windows_per_file(TEXT_TOKENS, manifest.context),
        "attention_windows": windows_per_file(ATTENTION_TOKENS, manifest.context),
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
