"""`--init`: SAEs that start from one that was trained before, here or elsewhere.

The source's scale is undone and the store's applied, so that the first step reconstructs what the source reconstructs.
Its folder and digest are kept with the run: without a checkpoint, a resumed run starts from it again.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ...cache_schema import Manifest, ModelSpec
from ...cache_schema.sites import say_place
from ..config.run_config import Member
from ..data.batch import Needs
from ..disk.hook_metadata import read_places
from ..disk.plain_form import init_from
from ..disk.sae_lens_folder import WEIGHT_SUFFIXES
from ..engine.fleet_of_saes import Fleet
from ..errors import ConfigInvalid, SaeInvalid
from ..kit.check_variant_settings import require
from .find_and_load_sae import read_folder

SETTINGS = ("cfg.json", "config.json")
COMMIT = re.compile("[0-9a-f]{40}")  # the revision of a model on the Hub, whose name identifies it


@dataclass(frozen=True)
class Source:
    """A trained SAE on disk."""

    folder: str
    sha256: str
    """Digest of its weights and settings."""


def source_of(folder: Path) -> Source:
    return Source(str(folder.resolve()), _digest(folder))


def without_start(member: Member) -> Member:
    """The same member with optim.start=drawn: the source's weights must not be fitted to the data first."""
    config: Any = member.config
    require(
        not config.is_baseline,
        f"{member.label}: a baseline starts at random: leave out --init, or the baseline (--with-baselines or "
        f"--variant {member.variant})",
    )
    return replace(member, config=replace(config, optim=replace(config.optim, start="drawn")))


def require_unchanged(source: Source) -> None:
    """Refuse to start again from an SAE that has changed since the run was first started from it."""
    folder = Path(source.folder)
    if not folder.is_dir() or _digest(folder) != source.sha256:
        raise ConfigInvalid(f"--init {folder}: it is missing, or has changed since the run started; start a new run")


def init_fleet(source: Source, fleet: Fleet, manifest: Manifest) -> None:
    """Start every SAE of the fleet from the source, before its first step."""
    folder = Path(source.folder)
    sae = read_folder(folder)
    require_model(folder, sae.metadata.get("model_name"), manifest.model)
    for label, trainee in fleet.trainees.items():
        try:
            _require_place(sae.metadata, fleet.needs[label])
            init_from(trainee.sae, sae, trainee.assembly.input_stats, trainee.assembly.target_stats, trainee.latents)
        except SaeInvalid as error:
            raise ConfigInvalid(f"{label}: --init {folder}: {error}") from None


def require_model(folder: Path, name: str | None, model: ModelSpec) -> None:
    """Require that the source was trained on the store's model, as far as names can tell: a name without an owner is
    another tool's, and a model from a local file or folder may have any name."""
    if name is None or name.split("/")[-1] == model.id.split("/")[-1]:
        return
    problem = f"--init {folder}: it was trained on {name}, but the store holds activations of {model.id}"
    if "/" in name and COMMIT.fullmatch(model.revision or ""):
        raise ConfigInvalid(problem)
    warnings.warn(f"{problem}: the names do not show whether that is the same model", stacklevel=2)


def _require_place(metadata: Mapping[str, Any], needs: Needs) -> None:
    """Require that the source, if it names its places, reads and reconstructs those that are trained here."""
    named, wanted = read_places(metadata), (needs.input_places, needs.target_places)
    if named is None and metadata.get("transcodes") and needs.targets is None:
        raise SaeInvalid("it is a transcoder, but the SAE to train reconstructs its own input")
    if named is not None and named.sides != wanted:
        sides = (named.sides, wanted)
        found, asked = (" to ".join(", ".join(map(say_place, side)) for side in pair) for pair in sides)
        raise SaeInvalid(f"expected an SAE from {asked}, found one from {found}: choose its --layer and hook")


def files_of(folder: Path) -> list[Path]:
    """The files of an SAE: its weights and settings, under the names that tools give them."""
    return sorted(path for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES or path.name in SETTINGS)


def _digest(folder: Path) -> str:
    known = ((path, path.stat()) for path in files_of(folder))
    return _digest_of(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in known))


@cache
def _digest_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Digest of the files' contents. Cached, so that unchanged files are read once."""
    found = hashlib.sha256()
    for path, *_ in files:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()
