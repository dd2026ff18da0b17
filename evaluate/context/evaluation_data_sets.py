"""What evaluations measure on: a data set on the hub by its real name, with errors that say what is in the way and
what to do; and which text of the running Python it is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from ...cache_schema.numbers_in_words import first_line
from ...harvest.network import NETWORK_ERRORS, load_dataset
from ...harvest.pocket.text import stdlib_documents, text_digest
from ..errors import DataMissing


def load_rows(dataset: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of a split; data that only a script could read is refused."""
    from datasets.exceptions import DatasetsError  # here: it takes seconds to import

    try:
        rows: Any = load_dataset(dataset, name, split=split)
        return list(rows)
    except (*NETWORK_ERRORS, DatasetsError, ValueError, RuntimeError) as error:
        raise _missing(dataset, name, error) from error


def load_json(dataset: str, file: str) -> Any:
    """A JSON file of a data set's repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return json.loads(Path(hf_hub_download(dataset, file, repo_type="dataset")).read_bytes())
    except (*NETWORK_ERRORS, HFValidationError, ValueError) as error:
        raise _missing(dataset, file, error) from error


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
