"""What evaluations measure on: a data set on the hub by its real name, at a commit that results remember, with errors
that say what is in the way and what to do; and which text of the running Python it is."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...cache_schema.numbers_in_words import first_line
from ...harvest.corpus.hugging_face import CONVERSION
from ...harvest.network import NETWORK_ERRORS, load_dataset
from ...harvest.pocket.text import stdlib_documents, text_digest
from ...train.run.find_and_load_sae import ANSWER_SECONDS, ask_hub
from ..errors import DataMissing

_AWAY: list[Exception] = []
"""Why the hub did not answer; nobody waits for it twice."""

Revision = str | Mapping[str, str]
"""Of data: a digest, or of data sets on the hub the commit of each."""


def load_rows(dataset: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of a split; data that only a script could read is refused."""
    from datasets.exceptions import DatasetsError  # here: it takes seconds to import

    try:
        rows: Any = load_dataset(dataset, name, split=split, revision=commit_of(dataset))
        return list(rows)
    except (*NETWORK_ERRORS, DatasetsError, ValueError, RuntimeError) as error:
        raise _missing(dataset, name, error) from error


def load_json(dataset: str, file: str) -> Any:
    """A JSON file of a data set's repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = hf_hub_download(dataset, file, repo_type="dataset", revision=commit_of(dataset))
        return json.loads(Path(found).read_bytes())
    except (*NETWORK_ERRORS, HFValidationError, ValueError) as error:
        raise _missing(dataset, file, error) from error


@cache
def commit_of(dataset: str, *branch: str) -> str | None:
    """At which commit a data set is read, the same as long as the process lives: the hub's newest, of a branch where
    one is named, or that of what was downloaded before where the hub does not answer. None: nobody knows one."""
    from datasets import config  # here: it takes seconds to import
    from huggingface_hub import HfApi, constants

    if not (constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE or _AWAY):
        of = {"revision": branch[0] if branch else None, "timeout": ANSWER_SECONDS}
        found = ask_hub(lambda: HfApi().dataset_info(dataset, **of).sha)
        if isinstance(found, str):
            return found
        if isinstance(found, (TimeoutError, ConnectionError)):  # nor will it for the next data set
            _AWAY.append(found)
    return downloaded_commit(dataset)


def downloaded_commit(dataset: str) -> str | None:
    """Without the hub `datasets` reads what it prepared last, whichever commit it is told; files come from a snapshot.
    Both lie in a folder that the commit names."""
    from datasets import config  # here: it takes seconds to import
    from huggingface_hub import constants

    owner, name = dataset.split("/")
    prepared = Path(config.HF_DATASETS_CACHE, f"{owner}___{name.lower()}").glob("*/*/*")
    snapshots = Path(constants.HF_HUB_CACHE, f"datasets--{owner}--{name}", "snapshots").glob("*")
    for folders in (prepared, snapshots):
        there = [folder for folder in folders if folder.is_dir() and re.fullmatch("[0-9a-f]{40}", folder.name)]
        if there:
            return max(there, key=lambda folder: folder.stat().st_mtime).name
    return None


def commits_of(datasets: Iterable[str], converted: Container[str] = ()) -> dict[str, str] | None:
    """Those that are known, as an evaluation's `data_revision`; of what is read `converted` that of the conversion."""
    found = {one: commit_of(one, *([CONVERSION] if one in converted else [])) for one in datasets}
    return {dataset: commit for dataset, commit in found.items() if commit} or None


def data_meant(told: Revision | None, now: Revision | None) -> Revision | None:
    """By which data a result is judged that tells of some. Where nobody knows which data were meant its own count: the
    store may be gone, the hub may not answer, and results of before tell of no commit of the hub."""
    if now is None:
        return told
    if isinstance(now, str) or isinstance(told, str):
        return now
    return {dataset: now.get(dataset, commit) for dataset, commit in (told or {}).items()} or None


@cache
def library_revision() -> str:
    """Of the running Python's standard library, for evaluations on its text."""
    return f"sha256:{text_digest(stdlib_documents())}"


def _missing(dataset: str, part: str | None, error: Exception) -> DataMissing:
    return DataMissing(
        f"data set {dataset}{f' ({part})' if part else ''} cannot be loaded ({first_line(error)}). Open "
        f"https://huggingface.co/datasets/{dataset} and accept its terms if it asks, then `hf auth login`, and run "
        "this again with a network, or once elsewhere and copy ~/.cache/huggingface here"
    )
