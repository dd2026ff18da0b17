"""Find a trained SAE: by its run, by its folder, or on the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from posixpath import basename, dirname
from threading import Thread
from typing import Any

from ...cache_schema.numbers_in_words import first_line
from ...cache_schema.strict_json import StrictError
from ...cache_schema.users_own_files import EXTRA as OWN_FILES
from ..data.scaling import unit_stats
from ..disk.formats import FILES, kind_of, read
from ..disk.plain_form import sae_from_plain
from ..disk.sae_lens_folder import CONFIG, EXTRAS, WEIGHTS, read_sae
from ..errors import RunMissing, SaeInvalid, resume_command
from ..kit import variant_registry
from ..sae.model import SparseAutoencoder
from .run_folder import RunFolder, is_run, places_of, run_names

ANSWER_SECONDS = 5.0
SHOWN = 20  # names of a repository's SAEs: Gemma Scope has hundreds


def load_sae(name: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> SparseAutoencoder:
    """Load an SAE in raw units, ready to encode activations as the model computes them.

    `name` is a run or `run/sae` under `runs`, a folder (of this package, SAELens, sparsify or
    dictionary_learning, Gemma Scope), or a repository `owner/name` or `owner/name/folder` on the Hub.
    """
    return read_folder(find_sae(name, runs))


def read_folder(folder: Path) -> SparseAutoencoder:
    """Load the SAE in this folder; every error names the folder."""
    try:
        if kind_of(folder) == "sae_lens":
            return read_sae(folder, rebuild)
        plain, metadata = read(folder)
        sae = sae_from_plain(plain)
    except SaeInvalid as error:
        raise error if str(folder) in str(error) else SaeInvalid(f"{folder}: {error}") from None
    sae.metadata = metadata
    return sae


def rebuild(variant: str, settings: Mapping[str, Any], d_in: int, d_out: int) -> SparseAutoencoder:
    """The untrained module that a variant builds."""
    if variant not in variant_registry.names():
        raise SaeInvalid(f"it needs the file of variant {variant}: set {OWN_FILES} to the folder that has it")
    try:
        config = variant_registry.read_settings(variant, settings, variant)
    except StrictError as error:
        raise SaeInvalid(f"its settings are not those of {variant}: {error}") from None
    needs = config.needs()
    targets = () if needs.targets is None else (unit_stats(d_out),)
    return config.build(d_in // len(needs.inputs), None, *targets).sae


def find_sae(name: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> Path:
    """The folder of an SAE."""
    for path in places_of(name, runs):
        if path.is_dir():
            return _only_sae(path)
    text = os.fspath(name)
    if text.startswith((".", "/", "~")):
        raise RunMissing(f"no SAE {text!r}: no such folder")
    looked = f"no SAE {text!r}: no such folder; runs in {runs}: {', '.join(run_names(runs)) or 'none'}"
    if is_on_hub(name, runs):
        return _only_sae(_download(text, looked))
    run = Path(runs, text.partition("/")[0])
    if run.is_dir():
        raise RunMissing(f"{looked}. {run} holds {', '.join(map(str, list_saes(run))) or 'no SAE'}")
    raise RunMissing(f"{looked}. For an SAE on the Hugging Face Hub, give owner/name")


def find_saes(name: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> list[Path]:
    """The folders of all SAEs of a run, or of the one named."""
    found = next((list_saes(path) for path in places_of(name, runs) if path.is_dir() and list_saes(path)), [])
    return found or [find_sae(name, runs)]


def is_on_hub(name: str | os.PathLike[str], runs: str | os.PathLike[str]) -> bool:
    """Whether a name refers to the Hub: it has that form, and there is no such folder or run here."""
    text = os.fspath(name).rstrip("/")
    has_form = text.count("/") > 0 and not text.startswith((".", "/", "~"))
    owner = text.partition("/")[0]
    is_ours = Path(runs, owner).is_dir() or Path(owner) == Path(runs)
    return has_form and not is_ours and not any(path.is_dir() for path in places_of(name, runs))


def list_saes(folder: Path) -> list[Path]:
    """The SAEs of a run, or the folder itself if it is an SAE. Skips hidden folders, which hold unfinished work."""
    if any((folder / name).is_file() for name in FILES):
        return [folder]
    names = (WEIGHTS,) if is_run(folder) else FILES  # an export inside a run's folder is not one of its SAEs
    return sorted({path.parent for name in names for path in folder.glob(f"[!.]*/{name}")})


def no_sae(folder: Path) -> RunMissing:
    if not is_run(folder):
        return RunMissing(f"{folder} holds no SAE in a known format: give the folder that contains the SAE's files")
    return RunMissing(f"{folder} holds no trained SAE yet: resume its run with: {resume_command(folder)}")


def _only_sae(folder: Path) -> Path:
    found = list_saes(folder)
    if len(found) == 1:
        run = RunFolder(found[0].parent)
        if not (found[0] / CONFIG).is_file() and is_run(run.path) and not run.is_finished:
            raise RunMissing(f"{found[0]} was not saved completely: resume its run with: {resume_command(run.path)}")
        return found[0]
    if not found:
        raise no_sae(folder)
    raise RunMissing(f"{folder} holds {len(found)} SAEs: choose one of {', '.join(str(path) for path in found)}")


def _download(name: str, looked: str) -> Path:
    """Download the only SAE of a Hub repository, or of a folder in it, and nothing else. If the Hub cannot be reached,
    use the local cache, with a warning unless the user is offline on purpose."""
    from huggingface_hub import constants, snapshot_download

    owner, repository, *folder = name.rstrip("/").split("/")
    repository, inside = f"{owner}/{repository}", "/".join(folder)
    files, obstacle = _files_of(repository)
    if obstacle is None:
        inside = _only_folder(repository, inside, files)
    in_folder = [file for file in files if dirname(file) == inside]
    wanted = [glob.escape(file) for file in in_folder if file.endswith(".json") or basename(file) in (*FILES, EXTRAS)]
    try:
        root = snapshot_download(repository, allow_patterns=wanted, local_files_only=obstacle is not None)
    except Exception as error:
        reason = obstacle or first_line(error)
        raise RunMissing(f"{looked}. Asked the Hugging Face Hub for {repository}: {reason}") from error
    if obstacle is not None and not constants.HF_HUB_OFFLINE:
        used = f"{repository}: using commit {Path(root).name} from the local cache, which may not be the newest"
        warnings.warn(f"{used}: the Hugging Face Hub could not be reached ({obstacle})", stacklevel=2)
    return Path(root, inside)


def _only_folder(repository: str, inside: str, files: Sequence[str]) -> str:
    """The named folder if it is an SAE, otherwise the only SAE below it."""
    homes = {dirname(file) for file in files if basename(file) in FILES}
    below = f"{inside}/" if inside else ""
    found = [inside] if inside in homes else sorted(one for one in homes if one.startswith(below))
    if len(found) == 1:
        return found[0]
    asked = f"{repository}/{inside}" if inside else repository
    if not found:
        raise RunMissing(f"{asked} on the Hugging Face Hub holds no SAE: expected one of {', '.join(FILES)} in it")
    names = [f"{repository}/{one}" for one in found]
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise RunMissing(f"{asked} holds {len(names)} SAEs: choose one of {', '.join(names[:SHOWN])}{more}")


def _files_of(repository: str) -> tuple[list[str], str | None]:
    """The names of a repository's files, and why the Hub could not list them, if so."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return [], "HF_HUB_OFFLINE is set, and it is not in the local cache"
    answer = ask_hub(lambda: HfApi().repo_info(repository, timeout=ANSWER_SECONDS))
    if isinstance(answer, Exception):
        return [], first_line(answer)
    return [one.rfilename for one in answer.siblings or ()], None


def ask_hub(ask: Callable[[], Any]) -> Any:
    """The Hub's answer, or the error. Gives up after some seconds: a name lookup without a network can hang."""
    answers: list[Any] = []

    def call() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001  any failure is the answer
            answers.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else TimeoutError(f"no answer within {ANSWER_SECONDS:g} seconds")
