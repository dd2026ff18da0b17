"""From the name of a corpus to the corpus: Python's own library, local files, or a data set of the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import CorpusUnavailable
from .source import OPENWEBTEXT, STDLIB, Corpus, CorpusSource, looks_like_path
from .stdlib import StdlibCorpus


def is_on_hub(source: CorpusSource) -> bool:
    """Whether a name can only be found by asking the hub."""
    is_here = source.dataset == STDLIB or Path(source.dataset).expanduser().exists()
    return not is_here and not looks_like_path(source.dataset)


def open_corpus(source: CorpusSource) -> Corpus:
    """The corpus that a user names."""
    from .hub import open_hub  # late: importing datasets takes seconds, which only those who use it should pay
    from .local import LocalCorpus

    if source.dataset == STDLIB:
        return StdlibCorpus()
    path = Path(source.dataset).expanduser()
    if path.exists():
        return LocalCorpus(path, source.column)
    if looks_like_path(source.dataset):
        raise CorpusUnavailable(
            f"there is no file or folder {source.dataset}. Give a text, jsonl or parquet file or a folder of them, "
            f"the id of a data set on the hub such as {OPENWEBTEXT}, or `{STDLIB}`"
        )
    return open_hub(source)
