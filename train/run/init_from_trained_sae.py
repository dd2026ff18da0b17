"""`--init`: SAEs that begin as one that was trained before, here or elsewhere.

Its scale is undone and that of the store redone, so that the first step rebuilds what the source rebuilds. Where it
lay and its digest are kept with the run: until the first checkpoint a resumed run begins as it again.
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
from ..disk.hook_metadata import places_told
from ..disk.plain_form import begin_as
from ..disk.sae_folder import WEIGHT_SUFFIXES
from ..engine.fleet_of_saes import Fleet
from ..errors import ConfigInvalid, SaeInvalid
from ..kit.check_variant_settings import require
from .find_and_load_sae import read_folder

SETTINGS = ("cfg.json", "config.json")
COMMIT = re.compile("[0-9a-f]{40}")  # the revision of a model of the Hub, whose name says which one it is


@dataclass(frozen=True)
class Source:
    """A trained SAE on disk."""

    folder: str
    sha256: str
    """Of its weights and settings."""


def source_of(folder: Path) -> Source:
    return Source(str(folder.resolve()), _digest(folder))


def without_start(member: Member) -> Member:
    """The same with no start of its own: the source's weights are not to be fitted."""
    config: Any = member.config
    require(
        not config.is_baseline,
        f"{member.label}: a baseline begins at random: leave out --init, or the baseline (--with-baselines or "
        f"--variant {member.variant})",
    )
    return replace(member, config=replace(config, optim=replace(config.optim, start="drawn")))


def require_unchanged(source: Source) -> None:
    """Refuse to begin again from another SAE than the run was begun from."""
    folder = Path(source.folder)
    if not folder.is_dir() or _digest(folder) != source.sha256:
        raise ConfigInvalid(f"--init {folder}: it is gone, or not what the run was begun from; start the run anew")


def begin_fleet_as(source: Source, fleet: Fleet, manifest: Manifest) -> None:
    """Every SAE of the fleet, before its first step."""
    folder = Path(source.folder)
    sae = read_folder(folder)
    require_model(folder, sae.metadata.get("model_name"), manifest.model)
    for label, trainee in fleet.trainees.items():
        try:
            _require_place(sae.metadata, fleet.needs[label])
            begin_as(trainee.sae, sae, trainee.assembly.input_stats, trainee.assembly.target_stats, trainee.latents)
        except SaeInvalid as error:
            raise ConfigInvalid(f"{label}: --init {folder}: {error}") from None


def require_model(folder: Path, told: str | None, model: ModelSpec) -> None:
    """The source's own, as far as names say it: one without an owner is another tool's, and that of a model from a
    file or folder here may be any."""
    if told is None or told.split("/")[-1] == model.id.split("/")[-1]:
        return
    said = f"--init {folder}: it was trained on {told}, and the store holds activations of {model.id}"
    if "/" in told and COMMIT.fullmatch(model.revision or ""):
        raise ConfigInvalid(said)
    warnings.warn(f"{said}: whether that is the same model their names do not tell", stacklevel=2)


def _require_place(metadata: Mapping[str, Any], needs: Needs) -> None:
    """What the source reads and rebuilds, where it says so, is what is read and rebuilt here."""
    whole, wanted = places_told(metadata), (needs.input_places, needs.target_places)
    told = whole and whole.places
    if told is None and metadata.get("transcodes") and needs.targets is None:
        raise SaeInvalid("it is a transcoder, and an SAE that rebuilds what it reads is to begin as it")
    if told is not None and told != wanted:
        found, asked = (" to ".join(", ".join(map(say_place, side)) for side in sides) for sides in (told, wanted))
        raise SaeInvalid(f"it goes from {found}, and here from {asked}: choose the --layer and hook that it has")


def files_of(folder: Path) -> list[Path]:
    """Those that an SAE is: its weights and its settings, under the names that tools give them."""
    return sorted(path for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES or path.name in SETTINGS)


def _digest(folder: Path) -> str:
    known = ((file, file.stat()) for file in files_of(folder))
    return _digest_of(tuple((file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in known))


@cache
def _digest_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Of files as they are: the same are read once."""
    found = hashlib.sha256()
    for path, *_ in files:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()
