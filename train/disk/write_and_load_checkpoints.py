"""Checkpoints: complete or absent, verified when read; the last two are kept, or the last one of a finished run.

1. All tensors of each SAE go into one safetensors file, in a folder with a temporary name that readers ignore.
2. state.json records the run's progress, and the digest of every file and of itself.
3. Everything is flushed; the folder gets its final name; older ones are deleted.
A reader takes the newest complete one, and reports why it skipped newer ones. If SAEs are spread over processes, each
does step 1 for its own in the same folder, and the first does the rest for all; each reads its own.

A run on a GPU continues while its checkpoint is written (`Writer`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...cache_schema.disk_and_cloud_files import make_folder, sync
from ...cache_schema.strict_json import LATER, StrictError, from_json, to_json
from ..errors import CheckpointDamaged, ConfigInvalid, RunNotWritten, resume_command
from ..parallel.processes import SOLO, Group, all_or_none
from .atomic_files import read_json, write_json

KEPT = 2
FILE_ERRORS = (OSError, SafetensorError)
NOT_WRITTEN_ELSEWHERE = "another process could not write its part of a checkpoint"
FORMAT = 2
FILE_NAME = re.compile(r"[\w+-][\w.+-]{0,200}[.]safetensors")


@dataclass(frozen=True)
class Standing:
    """A run's progress, apart from its tensors."""

    step: int  # steps taken
    metrics_bytes: int
    seconds: float  # spent training
    waited_seconds: float
    same_pairs: int
    pairs: int
    run_id: str = field(default="", metadata={LATER: True})  # empty for runs from before run ids


@dataclass(frozen=True)
class _State:
    standing: Standing
    files: dict[str, str]  # name -> digest
    format: int = FORMAT
    digest: str = ""  # of everything else

    def own_digest(self) -> str:
        rest = json.dumps(to_json(replace(self, digest="")), sort_keys=True)
        return xxhash.xxh3_128(rest.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded checkpoint, and why newer ones were skipped."""

    standing: Standing
    tensors: dict[str, dict[str, Tensor]]  # by label
    complaints: tuple[str, ...]


def save_checkpoint(
    folder: Path, standing: Standing, tensors: Mapping[str, Mapping[str, Tensor]], group: Group = SOLO
) -> None:
    """Write a checkpoint into `folder`, then delete all but the last two; a collective call of a group."""
    final = path_of(folder, standing.step)
    temporary = folder / f".{final.name}.tmp"
    with all_or_none(group, FILE_ERRORS, NOT_WRITTEN_ELSEWHERE):
        if group.rank == 0:
            for leftover in (*folder.glob(".step_*.tmp"), final):  # of a killed process or a full disk, at any step
                shutil.rmtree(leftover, ignore_errors=True)
            make_folder(temporary)
    digests = {}
    with all_or_none(group, FILE_ERRORS, NOT_WRITTEN_ELSEWHERE):
        for label, named in tensors.items():
            path = temporary / f"{label}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
            sync(path)
            digests[path.name] = _digest(path)
    for text in group.texts(json.dumps(digests)):
        digests |= json.loads(text)
    if group.rank == 0:
        state = _State(standing, digests)
        write_json(temporary / "state.json", to_json(replace(state, digest=state.own_digest())))
        os.rename(temporary, final)
        sync(folder)
        keep_newest(folder, KEPT, final)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}"


def keep_newest(folder: Path, count: int, last: Path) -> None:
    """Delete the checkpoints before the last `count`. Those after `last`, which the run could not read when it resumed,
    do not count and stay until the run reaches their steps again."""
    for old in [path for path in list_checkpoints(folder) if path <= last][count:]:
        shutil.rmtree(old, ignore_errors=True)  # the next save tries again


class Writer:
    """Writes checkpoints during training, one at a time. An error is raised by the next call.

    A group writes one together, and only this writer's thread may use the group.
    """

    def __init__(self, folder: Path, group: Group = SOLO) -> None:
        self._folder, self._group = folder, group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saemill-checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def begin(self, standing: Standing, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a checkpoint as soon as the previous one is written; the tensors must not change until it is done."""
        self.finish()
        submitted = self._thread.submit(save_checkpoint, self._folder, standing, tensors, self._group)
        self._writing = standing.step, submitted

    def check(self) -> None:
        """Raise an error if one has occurred, without waiting."""
        if not self.is_writing:
            self.finish()

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing[1].done()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing is None:
            return
        step, written = self._writing
        try:
            written.result()
        except FILE_ERRORS as error:
            command = resume_command(self._folder.parent)
            raise RunNotWritten(
                f"the checkpoint of step {step} could not be written to {self._folder} ({error}). The previous one "
                f"is intact: make room there, or fix the problem, then resume with: {command}"
            ) from error
        finally:
            if written.done():
                self._writing = None

    def close(self) -> None:
        """Wait, but raise nothing: another error may already be propagating."""
        self._thread.shutdown(wait=True)


def load_checkpoint(
    folder: Path,
    labels: Collection[str] | None = None,
    group: Group = SOLO,
    run_id: str = "",
    most_steps: int | None = None,
) -> Checkpoint | None:
    """Load the newest complete checkpoint, with the tensors of these SAEs; None if none was ever written.

    A collective call of a group: each process verifies only the files that it loads, and all take the newest checkpoint
    that no process finds damaged.
    """
    names = [path.name for path in list_checkpoints(folder)]
    seen = [json.loads(text) for text in group.texts(json.dumps(names))]
    newest = [of[0] if of else "none" for of in seen]
    if len(set(newest)) > 1:
        raise CheckpointDamaged(
            f"{folder}: expected the same newest checkpoint in every process, found "
            f"{', '.join(dict.fromkeys(newest))}: some host does not see the current folder yet; run this again"
        )
    complaints: list[str] = []
    for name in seen[0]:
        read, complaint = None, ""
        try:
            read = _read(folder / name, labels, run_id, most_steps)
        except CheckpointDamaged as error:
            complaint = str(error)
        found = [text for text in dict.fromkeys(group.texts(complaint)) if text]
        if read is not None and not found:
            return Checkpoint(*read, tuple(complaints))
        complaints += found
    if complaints:
        raise CheckpointDamaged(
            "no checkpoint can be read: " + "; ".join(complaints) + ". Start the run again under another name"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def _read(
    path: Path, labels: Collection[str] | None, run_id: str, most_steps: int | None
) -> tuple[Standing, dict[str, dict[str, Tensor]]]:
    try:
        state = from_json(_State, read_json(path / "state.json"))
    except (StrictError, ConfigInvalid, OSError) as error:
        raise CheckpointDamaged(f"{path}: {error}") from None
    if state.format != FORMAT:
        is_later = state.format > FORMAT
        why = "update saemill" if is_later else "it is from an earlier version, whose checkpoints are no longer read"
        raise CheckpointDamaged(f"{path}: expected format {FORMAT}, found {state.format}: {why}")
    if state.digest != state.own_digest():
        raise CheckpointDamaged(f"{path / 'state.json'} differs from the file that was written")
    _require_of_run(path, state.standing, run_id, most_steps)
    tensors = {}
    for name, digest in state.files.items():
        if not FILE_NAME.fullmatch(name):
            raise CheckpointDamaged(f"{path / 'state.json'}: expected names of files in its folder, found {name!r:.80}")
        label = name.removesuffix(".safetensors")
        if labels is not None and label not in labels:
            continue
        try:
            if not (path / name).is_file() or _digest(path / name) != digest:
                raise CheckpointDamaged(f"{path / name} differs from the file that was written")
            tensors[label] = load_file(path / name)
        except FILE_ERRORS as error:
            raise CheckpointDamaged(f"{path / name} cannot be read ({error})") from None
    return state.standing, tensors


def _require_of_run(path: Path, standing: Standing, run_id: str, most_steps: int | None) -> None:
    """Refuse a checkpoint of another run. Those from before run ids name none."""
    if run_id and standing.run_id not in ("", run_id):
        raise CheckpointDamaged(
            f"{path} belongs to another run, perhaps one that kept training after its folder was removed: expected one "
            f"of the run {run_id}, found one of {standing.run_id}"
        )
    if most_steps is not None and standing.step > most_steps:
        raise CheckpointDamaged(
            f"{path} does not belong to this run: expected at most its {most_steps} steps, found {standing.step}"
        )


def _digest(path: Path) -> str:
    """Digest of a file's bytes, read back."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
