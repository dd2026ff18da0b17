"""A corpus from the Hugging Face hub, streamed.

1. Pin the revision to a commit, so that the text is the same tomorrow. A state records the commit, so that a
   resumed harvest keeps it.
2. Read a repository whose data comes from a script through its parquet conversion instead: no downloaded code is
   ever run.
3. When the network is lost, wait and continue after the last document, a bounded number of times. Errors that waiting
   cannot fix, such as a missing data set or a damaged file, end the stream at once.
"""

from __future__ import annotations

import errno
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...cache_schema.disk_and_cloud_files import FULL_DISK
from ...cache_schema.numbers_in_words import first_line
from ..errors import CorpusUnavailable, DocumentInvalid, NetworkLost
from ..network import INSTALL, NETWORK_ERRORS, load_dataset
from .source import DatasetOptions, Source, State, cell_text

CONVERSION = "refs/convert/parquet"
PARTIAL = "partial-"
REFUSALS = (
    DisabledRepoError,
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
REFUSING = (401, 403, 404)  # statuses that will be the same next time
DAMAGE = (ValueError, EOFError, zlib.error)  # pyarrow's errors about the content of a file are ValueErrors
WAITS_SECONDS = (1, 4, 15, 60, 120, 300)  # after failures in a row, without a document in between
REPORTED_SECONDS = 60  # waits of at least this length are reported
TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Repository:
    """A data set on the hub at a fixed commit."""

    id: str
    commit: str
    files: tuple[str, ...] = ()  # parquet files to read; empty if `datasets` finds them
    part: str | None = None  # for a conversion that has only the start of a very large data set


class HubCorpus:
    """Documents of one split of a streamed data set. `load` returns an iterable with `datasets`' resumable state."""

    def __init__(
        self,
        source: DatasetOptions,
        repository: Repository,
        load: Callable[[], Any],
        waits: Sequence[float] = WAITS_SECONDS,
    ) -> None:
        self.id, self.revision, self.part = repository.id, repository.commit, repository.part
        self._source = source
        self._repository = repository
        self._load = load
        self._waits = waits
        self._position: Any = None
        self._read = 0

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self._source)

    def documents(self, state: State | None = None) -> Iterator[str]:
        self._read, self._position = (state or {}).get("documents", 0), (state or {}).get("stream")
        for row in self._stream():
            self._read += 1
            yield self._text(row)

    def state(self) -> State:
        pinned = asdict(self._repository)
        return {"documents": self._read, "stream": self._position, "options": asdict(self._source), "pinned": pinned}

    def _stream(self) -> Iterator[dict[str, Any]]:
        """Rows from the current position on, reconnecting unless too many failures come in a row."""
        failures = 0
        while True:
            try:
                rows = self._load()
                if self._position is not None:
                    rows.load_state_dict(self._position)
                for row in rows:
                    failures = 0
                    self._position = rows.state_dict()  # now: after a failure it may count a row never received
                    yield row
                return
            except UnicodeDecodeError as error:
                raise DocumentInvalid(
                    f"data set {self.id}: a row after document {self._read:,} is not UTF-8 ({error}). "
                    "Choose another --dataset-revision, or convert the files and give them as a local --dataset"
                ) from error
            except (*NETWORK_ERRORS, *DAMAGE) as error:
                _refuse_if_permanent(self.id, error, self._read)
                self._wait(failures, error)
                failures += 1

    def _wait(self, failures: int, error: Exception) -> None:
        if failures == len(self._waits):
            raise NetworkLost(
                f"the connection to {self.id} was lost {failures + 1} times in a row after {self._read:,} documents "
                f"({first_line(error)}). Nothing is lost. Run the same command again: it resumes from there"
            ) from error
        if self._waits[failures] >= REPORTED_SECONDS:
            problem = f"the connection to {self.id} is lost ({first_line(error)})"
            warnings.warn(f"{problem}: trying again in {self._waits[failures]} seconds", stacklevel=2)
        time.sleep(self._waits[failures])

    def _text(self, row: dict[str, Any]) -> str:
        column = self._source.column
        if column not in row:
            raise CorpusUnavailable(
                f"{self.id} has no column {column!r}; it has {', '.join(row)}. Name one with --column"
            )
        return cell_text(row[column], f"{self.id}, document {self._read - 1}")


def settings_of(options: DatasetOptions) -> dict[str, Any]:
    """The settings that decide the text of a data set on the hub, apart from its id and commit."""
    return {"config": options.config, "split": options.split, "column": options.column}


def open_hub(source: DatasetOptions) -> HubCorpus:
    """Find the data set on the hub and pin it to a commit."""
    try:
        repository = find_repository(source)
    except HFValidationError as error:
        _refuse(source.dataset, error, "it is neither a local file or folder nor a valid name on the hub")
    except NETWORK_ERRORS as error:
        _refuse_if_permanent(source.dataset, error, 0)
        _refuse(source.dataset, error, "check the network, or use a local file or `--dataset stdlib`")
    return HubCorpus(source, repository, partial(_load, source, repository))


def open_again(source: DatasetOptions, state: State) -> HubCorpus | None:
    """The data set at the commit that a state was taken from, if the user's options are the same."""
    if state.get("options") != asdict(source):
        return None
    kept = state["pinned"]
    repository = Repository(**{**kept, "files": tuple(kept["files"])})
    return HubCorpus(source, repository, partial(_load, source, repository))


def find_repository(source: DatasetOptions, api: Any = None) -> Repository:
    """The commit to read, and the files if they must be listed."""
    from huggingface_hub import HfApi

    api = api or HfApi()
    revision = source.revision
    info = api.dataset_info(source.dataset, revision=revision, timeout=TIMEOUT_SECONDS)
    names = [sibling.rfilename for sibling in info.siblings]
    if revision is None and f"{source.dataset.rsplit('/', 1)[-1]}.py" in names:
        revision = CONVERSION
        info = api.dataset_info(source.dataset, revision=revision, timeout=TIMEOUT_SECONDS)
        names = [sibling.rfilename for sibling in info.siblings]
    if revision == CONVERSION:
        files = _converted_files(names, source)
        folder = files[0].split("/")[1]
        return Repository(source.dataset, info.sha, files, folder if folder.startswith(PARTIAL) else None)
    return Repository(source.dataset, info.sha)


def _converted_files(names: Sequence[str], source: DatasetOptions) -> tuple[str, ...]:
    """The files of a conversion: CONFIG/SPLIT/*.parquet, or CONFIG/partial-SPLIT/ for a very large data set."""
    folders = sorted({name.rsplit("/", 1)[0] for name in names if name.endswith(".parquet") and name.count("/") == 2})
    wanted = (source.split, f"{PARTIAL}{source.split}")
    matching = [
        folder for folder in folders if folder.split("/")[1] in wanted and source.config in (None, folder.split("/")[0])
    ]
    if len(matching) != 1:
        raise CorpusUnavailable(
            f"{source.dataset}: expected one config with a split {source.split!r}, found "
            f"{', '.join(matching or folders) or 'no parquet conversion'}. "
            "Choose with --dataset-config and --dataset-split"
        )
    return tuple(sorted(name for name in names if name.startswith(f"{matching[0]}/") and name.endswith(".parquet")))


def _load(source: DatasetOptions, repository: Repository) -> Any:
    if repository.files:
        urls = [f"hf://datasets/{repository.id}@{repository.commit}/{name}" for name in repository.files]
        return load_dataset("parquet", data_files={"train": urls}, split="train", streaming=True)
    try:
        return load_dataset(
            source.dataset, source.config, split=source.split, revision=repository.commit, streaming=True
        )
    except (ValueError, RuntimeError) as error:  # an unknown config or split, or data that only a script can read
        raise CorpusUnavailable(
            f"{source.dataset} cannot be streamed: {error}. "
            f"Choose with --dataset-config and --dataset-split, or try --dataset-revision {CONVERSION}"
        ) from error


def _refuse_if_permanent(dataset: str, error: Exception, documents: int) -> None:
    """Raise on an error that waiting cannot fix."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import FileNotFoundDatasetsError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REFUSING or isinstance(error, (*REFUSALS, EmptyDatasetError, FileNotFoundDatasetsError)):
        _refuse(
            dataset, error, "check the id and the revision, accept its terms on the hub, and log in (`hf auth login`)"
        )
    if isinstance(error, ImportError):
        _refuse(dataset, error, INSTALL)
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, *FULL_DISK):
        _refuse(dataset, error, "files are kept under HF_HOME: free some space there, or set it to a writable folder")
    if _is_damage(error):
        raise CorpusUnavailable(
            f"data set {dataset} is damaged after document {documents:,} ({first_line(error)}). "
            "Choose another --dataset-revision, or another data set"
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether the bytes arrived but are corrupt: pyarrow raises a bare OSError for a corrupt page."""
    is_bare = type(error) is OSError and error.errno is None
    return is_bare or (isinstance(error, DAMAGE) and not isinstance(error, NETWORK_ERRORS))


def _refuse(dataset: str, error: Exception, remedy: str) -> NoReturn:
    raise CorpusUnavailable(f"data set {dataset} cannot be reached ({first_line(error)}): {remedy}") from error


SOURCE = Source(
    help="a data set's id on the hub",
    takes=lambda _: True,
    open=open_hub,
    rank=2,
    pinned=settings_of,
    open_again=open_again,
)
