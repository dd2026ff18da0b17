"""Push SAEs to the Hugging Face Hub: their folders as saved, with a model card, in one commit.

Whatever the Hub might refuse is checked before anything changes: the token, write access, existing content.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disk.formats import kind_of
from ..disk.sae_lens_folder import CONFIG, EXTRAS, WEIGHTS
from ..errors import ConfigInvalid, NotPushed, RunMissing, SaeInvalid, resume_command
from .find_and_load_sae import ask_hub, list_saes, no_sae
from .model_card import describe, write_card
from .run_folder import is_run, places_of, run_names

LONGEST_MESSAGE = 300  # characters of the Hub's own
GIVEN = {".gitattributes"}  # files that the Hub puts into a new repository


def push(name: str, runs: str | os.PathLike[str], repository: str, private: bool, licence: str | None) -> str:
    """Upload an SAE, or all SAEs of a run; return the URL of the commit."""
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
    if not re.fullmatch(rf"{part}/{part}", repository, re.ASCII) or re.search(r"--|\.\.", repository):
        raise ConfigInvalid(f"expected --push-to-hub OWNER/NAME, found {repository!r}")
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ConfigInvalid(f"expected --license by its name on the Hub, like mit or cc-by-4.0, found {licence!r}")
    folders = _local_saes(name, runs)
    places = {"" if len(folders) == 1 else folder.name: folder for folder in folders}
    pictures = _pictures_of(folders)
    card = write_card(repository, [describe(folder, place) for place, folder in places.items()], licence, [*pictures])
    files = pictures | {
        str(Path(place, file)): folder / file
        for place, folder in places.items()
        for file in (CONFIG, WEIGHTS, EXTRAS)
        if (folder / file).is_file()
    }
    parent = _require_pushable(repository, files, private)
    return _commit(repository, files, card, private, parent)


def _local_saes(name: str, runs: str | os.PathLike[str]) -> list[Path]:
    """The folders to push, which must be in the format that both this package and SAELens read."""
    home = next((path for path in places_of(name, runs) if path.is_dir()), None)
    if home is None:
        raise RunMissing(f"no SAE {name!r} here to push; runs in {runs}: {', '.join(run_names(runs)) or 'none'}")
    folders = list_saes(home)
    if home not in folders and is_run(home) and not (home / "result.json").is_file():
        raise RunMissing(f"{home} is not finished, and more SAEs may follow. Resume it first: {resume_command(home)}")
    if not folders:
        raise no_sae(home)
    for folder in folders:
        if kind_of(folder) != "sae_lens":
            command = f"sae-export {shlex.quote(str(folder))} --to sae_lens --out FOLDER"
            raise SaeInvalid(f"{folder} is in the format of {kind_of(folder)}. Convert it first: {command}")
    return [folder.resolve() for folder in folders]


def _pictures_of(folders: Sequence[Path]) -> dict[str, Path]:
    """A run's plots by their path in the repository, if all its SAEs are pushed: the plots show all of them."""
    run = folders[0].parent
    if not (run / "result.json").is_file() or list_saes(run) != [*folders]:  # any folder may have an SAE in it
        return {}
    found = sorted((run / "plots").glob("*.png"))
    return {f"plots/{path.name}": path for path in found if re.fullmatch(r"[a-z_]+", path.stem)}


def _require_pushable(repository: str, files: Mapping[str, Path], private: bool) -> str | None:
    """The commit to build on if the repository exists. Any obstacle is reported here, before uploading."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise NotPushed("HF_HUB_OFFLINE is set: nothing can be pushed")
    try:
        has_token = get_token() is not None
    except Exception as error:  # noqa: BLE001  token exchange may raise anything
        raise _refusal(repository, error) from None
    if not has_token:
        raise NotPushed(
            "no token for the Hugging Face Hub: run hf auth login or set HF_TOKEN, with a token that may write"
        )
    api = HfApi()
    answer = ask_hub(api.whoami)
    if isinstance(answer, Exception):
        raise _refusal(repository, answer)
    _require_permission(repository.partition("/")[0], answer)
    found = ask_hub(lambda: api.repo_info(repository, files_metadata=True))
    if isinstance(found, Exception):
        if _status(found) == 404:
            return None
        raise _refusal(repository, found)
    if private and not found.private:
        raise NotPushed(f"{repository} exists and is public: choose another name, or leave out --private")
    _require_same(repository, found.siblings or [], files)
    return found.sha


def _require_permission(owner: str, answer: Mapping[str, Any]) -> None:
    """Check write access as far as the Hub can tell beforehand: fine-grained tokens fail only when used."""
    user = str(answer.get("name", ""))
    if ((answer.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise NotPushed(f"the token of {user} may only read: create one that may write, then run hf auth login")
    owners = {user.lower(), *(str(one.get("name", "")).lower() for one in answer.get("orgs") or ())}
    if owner.lower() not in owners:
        raise NotPushed(f"{user} may not write to {owner}: expected one of {', '.join(sorted(owners))}")


def _require_same(repository: str, siblings: Sequence[Any], files: Mapping[str, Path]) -> None:
    """Require that a repository is empty, or holds these same weights; its card is then rewritten."""
    existing = {one.rfilename: one for one in siblings if one.rfilename not in GIVEN}
    weights = [place for place in files if place.endswith(".safetensors")]
    other = [place for place in weights if place not in existing or not _is_same(files[place], existing[place])]
    kept = [place for place in existing if place not in files and Path(place).name in (CONFIG, WEIGHTS)]
    if existing and (other or kept):
        some = ", ".join(sorted(kept or existing)[:4])
        raise NotPushed(
            f"{repository} exists and holds other content ({some}): choose another name, or delete it there"
        )


def _is_same(path: Path, sibling: Any) -> bool:
    """Compare by the digest that the Hub keeps: the file's if it is in LFS, otherwise its git blob's."""
    if sibling.lfs is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sibling.lfs.sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == sibling.blob_id


def _commit(repository: str, files: Mapping[str, Path], card: str, private: bool, parent: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    additions = [CommitOperationAdd(place, path) for place, path in files.items()]
    additions.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi(library_name="saemill")
    try:
        if parent is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        what = "SAE" if sum(place.endswith(WEIGHTS) for place in files) == 1 else "SAEs"
        done = api.create_commit(repository, additions, commit_message=f"{what} and card", parent_commit=parent)
    except Exception as error:  # noqa: BLE001  large files are sent by a separate library
        raise _refusal(repository, error) from None
    return done.commit_url


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refusal(repository: str, error: Exception) -> NotPushed:
    """A one-line error. The repository is unchanged, except that it may have been created."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the outer error says only "Error while uploading"
    reason = {
        401: "the token is not valid: run hf auth login",
        403: "the token may not write there: give it write access, or choose another owner",
        409: "it changed in the meantime: run this again",
        412: "it changed in the meantime: run this again",
    }.get(_status(error) or 0)
    message = " ".join(str(getattr(error, "server_message", None) or error).split())[:LONGEST_MESSAGE]
    return NotPushed(f"nothing was pushed to {repository}: {reason or message or type(error).__name__}")
