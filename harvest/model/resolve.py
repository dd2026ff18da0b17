"""Find the model that `--model` names, and its files.

`auto`     google/gemma-2-2b if its weights are cached or can be downloaded, else the pocket model
`pocket`   the small model that comes with this package
`smollm2`  SmolLM2-135M-Instruct, a real model from the package registry
x.gguf     a file, converted once
a folder   as `save_pretrained` writes it
an id      of a model on the hub, which is never replaced by another

`choose` decides without downloading, within `DECISION_SECONDS`; for an existing store, `choose_again` repeats its
decision. `fetch_description` downloads all but the weights, `fetch` everything, if there is room.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from http import HTTPStatus
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...cache_schema import ModelSpec
from ...cache_schema.disk_and_cloud_files import FULL_DISK
from ...cache_schema.numbers_in_words import first_line
from ..errors import ModelDiffers, ModelUnavailable
from ..network import INSTALL, NETWORK_ERRORS, require_room
from ..pocket import MODEL_FOLDER
from .gguf_file import DIGITS, SUFFIX, convert, find_converted, find_smollm2
from .load_and_truncate import CONFIG_FILE, find_weights

AUTO = "auto"
POCKET = "pocket"
SMOLLM2 = "smollm2"
GGUF = "gguf-"  # prefix of the revision of a model from a GGUF file
FIRST_CHOICE = "google/gemma-2-2b"
OWN_NAMES = (AUTO, POCKET, SMOLLM2)

DECISION_SECONDS = 8
ANSWER_SECONDS = 5
DESCRIPTION = ["*.json", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHTS = ["*.safetensors"]
FILES = [*DESCRIPTION, *WEIGHTS]
# A complete cached snapshot has each of these that its repository has. Weights are checked separately.
NEEDED = [CONFIG_FILE, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
OTHER_FILES = ["original/*", "consolidated*"]  # duplicates of the weights
SNAPSHOTS = "snapshots"  # in a model's folder of the hub's cache; holds folders named by commit
KNOWN_BYTES = {FIRST_CHOICE: 10_460_000_000}  # of weights, if the hub does not report their size
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Choice:
    name: str
    """`pocket`, `smollm2`, a GGUF file, a folder, or an id on the hub."""
    revision: str | None = None
    banner: tuple[str, ...] = ()
    """Two lines to print with `auto`: the chosen model and the reason, and how to insist on one."""


@dataclass(frozen=True)
class ModelSource:
    """A model whose files are on this machine."""

    id: str
    revision: str
    """The hub's commit; for a folder or a GGUF file a hash of its content."""
    folder: Path
    to_download: int | None = None
    """Bytes of weights still to download; None if they are on this machine."""


def choose(model: str) -> Choice:
    """Decide which model is meant. Only `auto` leaves a choice, and only then is the network used."""
    if model != AUTO:
        return Choice(model)
    if _cached(FIRST_CHOICE, None):
        return Choice(FIRST_CHOICE, None, _banner(FIRST_CHOICE, "its weights are in the local cache"))
    obstacle = _answer_in_time(lambda: _why_not_downloadable(FIRST_CHOICE))
    if obstacle is None:
        return Choice(FIRST_CHOICE, None, _banner(FIRST_CHOICE, "it can be downloaded"))
    return Choice(POCKET, None, _banner(POCKET, f"{FIRST_CHOICE} is not cached and {obstacle}"))


def choose_again(name: str, found: ModelSpec) -> Choice | None:
    """The choice for a store harvested with `found`, whatever is cached or on the hub now; None if `name` never means
    that model."""
    if name == AUTO and found.id in (FIRST_CHOICE, POCKET):
        return Choice(found.id, _commit_of(found), _banner(found.id, "the store at --out was started with it"))
    return Choice(name, _commit_of(found)) if name == found.id else None


def fetch(choice: Choice) -> ModelSource:
    """The files of a choice, downloaded if necessary."""
    return _find_local(choice) or _download(choice.name, choice.revision)


def fetch_recorded(model: ModelSpec, override: str | None) -> ModelSource:
    """The files of a store's model, at its exact revision; `override` names another place to look."""
    if override is not None and (snapshot := _snapshot_at(override, model)):
        return snapshot
    source = fetch(Choice(override or model.id, _commit_of(model) if override in (None, model.id) else None))
    if model.revision is not None and source.revision != model.revision:
        raise ModelDiffers(
            f"expected {model.id} at {model.revision}, with which the store was made, found {source.id} at "
            f"{source.revision}{_hint_for_commit(model)}"
        )
    return source


def _snapshot_at(name: str, model: ModelSpec) -> ModelSource | None:
    """The recorded commit's folder in a copy of the hub's cache, recognised by its name."""
    folder = Path(os.path.expanduser(name)).absolute()
    if not folder.is_dir() or (folder.parent.name, folder.name) != (SNAPSHOTS, model.revision):
        return None
    _weights_of(folder, name)
    return ModelSource(model.id, folder.name, folder)


def _hint_for_commit(model: ModelSpec) -> str:
    """A hint for a message: only a folder in the hub's cache identifies its commit."""
    if (commit := _commit_of(model)) is None or commit.startswith(GGUF):
        return ""
    return f". Set HF_HOME to the hub's cache that has it, or name its folder there, .../{SNAPSHOTS}/{commit}"


def _commit_of(model: ModelSpec) -> str | None:
    """The commit of a recorded model; None if its revision is a hash of a folder."""
    revision = model.revision or "-"
    return revision if "-" not in revision or revision.startswith(GGUF) else None


def fetch_description(choice: Choice, say: Callable[[str], None] = lambda _: None) -> ModelSource:
    """Download a model's files without its weights. A GGUF file is converted, with a message to `say`."""
    if local := _find_local(choice, say):
        return local
    to_download = _bytes_to_download(choice.name, choice.revision)
    folder = Path(_snapshot(choice.name, choice.revision, allow_patterns=DESCRIPTION))
    return ModelSource(choice.name, folder.name, folder, to_download)


def _find_local(choice: Choice, say: Callable[[str], None] = lambda _: None) -> ModelSource | None:
    """A model on this machine, converted if it is a GGUF file; None if it is not."""
    if choice.name == POCKET:
        return ModelSource(POCKET, _hash_of(MODEL_FOLDER), MODEL_FOLDER)
    if choice.name == SMOLLM2:
        return _converted(SMOLLM2, find_smollm2(), say)
    folder = Path(os.path.expanduser(choice.name))
    if folder.suffix == SUFFIX and not folder.is_dir():
        kept = None if folder.is_file() else find_converted((choice.revision or "").removeprefix(GGUF))
        if kept:
            return ModelSource(folder.name, choice.revision or "", kept)
        return _converted(folder.name, folder, say)
    if choice.name and folder.is_dir():
        return ModelSource(folder.resolve().name, _hash_of(folder), folder)
    snapshot = _cached(choice.name, choice.revision)
    return None if snapshot is None else ModelSource(choice.name, snapshot.name, snapshot)


def _converted(name: str, file: Path, say: Callable[[str], None]) -> ModelSource:
    digest, folder = convert(file, say)
    return ModelSource(name, f"{GGUF}{digest[:DIGITS]}", folder)


def _cached(model: str, revision: str | None) -> Path | None:
    """The snapshot in the local cache, if it has all files that a harvest reads."""
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=NEEDED))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return folder if (folder / CONFIG_FILE).is_file() and find_weights(folder) and has_tokenizer else None


def _download(model: str, revision: str | None) -> ModelSource:
    require_room(model, _bytes_to_download(model, revision), Path(constants.HF_HUB_CACHE))
    folder = Path(_snapshot(model, revision, allow_patterns=FILES))
    _weights_of(folder, model)
    return ModelSource(model, folder.name, folder)


def _bytes_to_download(model: str, revision: str | None) -> int:
    """Bytes of weights that are not in the cache; asks the hub only for sizes."""
    files = _snapshot(model, revision, allow_patterns=WEIGHTS, dry_run=True)
    missing = [file for file in files if file.will_download]
    return sum(file.file_size or 0 for file in missing) or (KNOWN_BYTES.get(model, 0) if missing else 0)


def _snapshot(model: str, revision: str | None, **options: Any) -> Any:
    try:
        return snapshot_download(
            model, revision=revision, ignore_patterns=OTHER_FILES, etag_timeout=ANSWER_SECONDS, **options
        )
    except (*NETWORK_ERRORS, HFValidationError, RuntimeError) as error:  # RuntimeError is raised by the hub's library
        raise ModelUnavailable(f"{model}: {_explain(error, model)}") from error


def _why_not_downloadable(model: str) -> str | None:
    """The reason why a model cannot be downloaded, or None, found by asking for one small file."""
    try:
        get_hf_file_metadata(hf_hub_url(model, CONFIG_FILE), timeout=ANSWER_SECONDS)
    except NETWORK_ERRORS as error:
        return _explain(error, model)
    return None


def _explain(error: Exception, model: str) -> str:
    """The problem and its remedy, by kind of error."""
    close = get_close_matches(model.lower(), OWN_NAMES, n=1)
    near = f" (did you mean {close[0]!r}?)" if close else ""
    if isinstance(error, (DryRunError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # these only report that the network may be gone, whatever the cause
    if isinstance(error, GatedRepoError):
        return f"its licence is not accepted here: accept it at https://huggingface.co/{model}, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such folder, and no model of that name on the hub; if it is private, `hf auth login`{near}"
    if isinstance(error, HFValidationError):
        return f"no such folder, and not a valid name on the hub{near}"
    # The hub's library reports a full disk only in the message.
    if getattr(error, "errno", None) in FULL_DISK or os.strerror(errno.ENOSPC) in str(error):
        return (
            f"the disk is full while downloading into {constants.HF_HUB_CACHE}: free some space, or set HF_HOME to a "
            "folder on another disk, and run the same command again"
        )
    if isinstance(error, HfHubHTTPError):
        gates = ", and give it read access to gated repositories at huggingface.co/settings/tokens"
        asks = gates if error.response.status_code == HTTPStatus.FORBIDDEN else ""
        return f"the hub refused ({first_line(error)}): check your token with `hf auth whoami`{asks}"
    remedy = INSTALL if isinstance(error, ImportError) else "check the network, or name a folder"
    return f"the hub could not be reached ({first_line(error)}): {remedy}{near}"


def _answer_in_time(question: Callable[[], str | None]) -> str | None:
    """The answer of `question`, or a message that there was none in time: a name lookup without a network can hang."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:  # noqa: BLE001  any failure is the answer
            answers.append(f"the hub could not be asked ({first_line(error)})")

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DECISION_SECONDS)
    return answers[0] if answers else f"the hub did not answer within {DECISION_SECONDS} seconds"


def _banner(chosen: str, reason: str) -> tuple[str, str]:
    return (
        f"model: {chosen}, because {reason}",
        f"to insist: --model {FIRST_CHOICE} never falls back, --model {POCKET} is the bundled one (make: MODEL=)",
    )


def _hash_of(folder: Path) -> str:
    """A hash of a folder's configuration and weights, whatever its path."""
    total = hashlib.sha256()
    for file in (folder / CONFIG_FILE, *_weights_of(folder, str(folder))):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256-{total.hexdigest()[:16]}"


def _weights_of(folder: Path, name: str) -> list[Path]:
    """The files with a model's weights; refuses a folder without all that is needed to load them."""
    weights = find_weights(folder)
    if not weights or not (folder / CONFIG_FILE).is_file():
        raise ModelUnavailable(
            f"{name}: expected {CONFIG_FILE} and complete safetensors weights, found not all of them. "
            "Save the model with `save_pretrained`, which writes both, and name that folder"
        )
    return weights
