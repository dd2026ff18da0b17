"""Data that evaluations measure on: data sets on the hub, at a commit that results record, with errors that say what to
do; and the revision of the running Python's library text."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...cache_schema.numbers_in_words import first_line
from ...harvest.corpus.hugging_face import CONVERSION
from ...harvest.corpus.stdlib import stdlib_documents, text_digest
from ...harvest.network import NETWORK_ERRORS, load_dataset
from ...train.run.find_and_load_sae import ANSWER_SECONDS, ask_hub
from ..errors import DataMissing

_AWAY: list[Exception] = []
"""Why the hub did not answer, kept so that nothing waits for it twice."""

Revision = str | Mapping[str, str]
"""A revision of data: a digest or, for data sets on the hub, the commit of each."""


def load_rows(dataset: str, name: str) -> list[dict[str, Any]]:
    """All rows of the test split. Data that only a script could read is refused."""
    from datasets.exceptions import DatasetsError  # here: it takes seconds to import

    try:
        rows: Any = load_dataset(dataset, name, split="test", revision=commit_of(dataset))
        return list(rows)
    except (*NETWORK_ERRORS, DatasetsError, ValueError, RuntimeError) as error:
        raise _missing(dataset, name, error) from error


def load_json(dataset: str, file: str) -> Any:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = hf_hub_download(dataset, file, repo_type="dataset", revision=commit_of(dataset))
        return json.loads(Path(found).read_bytes())
    except (*NETWORK_ERRORS, HFValidationError, ValueError) as error:
        raise _missing(dataset, file, error) from error


@cache
def commit_of(dataset: str, branch: str | None = None) -> str | None:
    """The commit at which a data set is read, fixed for the life of the process: the hub's newest (of a branch, if one
    is named) or, if the hub does not answer, that of an earlier download. None: unknown."""
    from datasets import config  # here: it takes seconds to import
    from huggingface_hub import HfApi, constants

    if not (constants.HF_HUB_OFFLINE or config.HF_HUB_OFFLINE or _AWAY):
        found = ask_hub(lambda: HfApi().dataset_info(dataset, revision=branch, timeout=ANSWER_SECONDS).sha)
        if isinstance(found, str):
            return found
        if isinstance(found, (TimeoutError, ConnectionError)):  # it will not answer for the next data set either
            _AWAY.append(found)
    return downloaded_commit(dataset)


def downloaded_commit(dataset: str) -> str | None:
    """The commit of the copy on disk. Without the hub, `datasets` reads what it prepared last, whichever commit is
    requested; files come from a snapshot. Both are in a folder named after the commit."""
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
    """The known commits, as an evaluation's `data_revision`; for data sets in `converted`, that of the conversion."""
    found = {one: commit_of(one, CONVERSION) if one in converted else commit_of(one) for one in datasets}
    return {dataset: commit for dataset, commit in found.items() if commit} or None


def expected_data(recorded: Revision | None, now: Revision | None) -> Revision | None:
    """The data revision to judge a result by: the present one, but the recorded one where that is unknown, as the store
    may be gone and the hub may not answer. Older results record no commits, so none are expected."""
    if now is None:
        return recorded
    if isinstance(now, str) or isinstance(recorded, str):
        return now
    return {dataset: now.get(dataset, commit) for dataset, commit in (recorded or {}).items()} or None


@cache
def library_revision() -> str:
    """The revision of the running Python's standard library, for evaluations on its text."""
    return f"sha256:{text_digest(stdlib_documents())}"


def _missing(dataset: str, part: str, error: Exception) -> DataMissing:
    return DataMissing(
        f"data set {dataset} ({part}) cannot be loaded ({first_line(error)}). Open "
        f"https://huggingface.co/datasets/{dataset} and accept its terms if it asks, then `hf auth login`, and run "
        "this again with network access, or once elsewhere and copy ~/.cache/huggingface here"
    )
