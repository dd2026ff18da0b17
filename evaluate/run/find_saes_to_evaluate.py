"""Find the SAEs to evaluate: runs by name or path, single SAEs, folders of other tools, the Hub.

1. A run stands for all its SAEs; it must have finished.
2. An SAE's folder inside a run belongs to that run and its store.
3. Any other folder names its layer, if at all, by `hook_name` in its cfg.json.
4. An SAE from the Hub is in a cache that is not ours to write to: its results go to runs/hub.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...cache_schema.layout import ROOT
from ...cache_schema.sites import RESID
from ...train.config.recipe import runs_of, studies
from ...train.disk.atomic_files import read_json
from ...train.disk.hook_metadata import NO_PLACES, Places, read_places
from ...train.disk.plain_form import with_unit_rows, without_signs
from ...train.disk.sae_lens_folder import CONFIG, WEIGHTS, metadata_of, read_config, read_shapes, upgrade_config
from ...train.errors import RunMissing, SaeInvalid, TrainError, resume_command
from ...train.run.find_and_load_sae import find_sae, is_on_hub, list_saes, read_folder
from ...train.run.run_folder import RUNS, RunFolder, cache_of, is_run, places_of, run_names
from ...train.sae.model import SparseAutoencoder
from ..context.loaded_sae import LoadedSae
from ..errors import EvalError, RunUnfinished, SettingInvalid, TargetUnknown

STORES = ("./store", "./demo/store")
"""Where `make harvest` and `make demo` put theirs."""
FIRST = ("--variant", "topk")  # what to train if there is no run yet

Problem = EvalError | TrainError


@dataclass(frozen=True)
class Absent:
    """A run's SAE that cannot be evaluated, because it has no folder."""

    folder: Path
    reason: str
    is_lost: bool
    """Its folder was removed; otherwise it diverged and never had one."""


def say_absent(absent: Iterable[Absent]) -> list[str]:
    """A line for each reason."""
    folders_by_reason: dict[str, list[str]] = {}
    for one in absent:
        folders_by_reason.setdefault(one.reason, []).append(str(one.folder))
    return [f"not evaluated: {', '.join(folders)}: {reason}" for reason, folders in folders_by_reason.items()]


def find_subjects(targets: Iterable[str], runs: Path, layer: int | None = None) -> list[LoadedSae]:
    """All SAEs of all targets, each once; raises the error of the first that cannot be found."""
    subjects, problems, _ = find_all(targets, runs, layer)
    if problems:
        raise problems[0]
    return subjects


def find_all(
    targets: Iterable[str], runs: Path, layer: int | None = None, cache: str | None = None
) -> tuple[list[LoadedSae], list[Problem], list[Absent]]:
    """All SAEs of all targets that can be found, the problems of the others, and runs' SAEs without a folder.

    `layer` is for SAEs that name none; `cache` is the store that a missing run would be trained on.
    """
    found: dict[Path, LoadedSae] = {}
    absent: dict[Path, Absent] = {}  # a run may be named twice
    homes: dict[Path, Path] = {}  # a run is the same whatever path names it
    problems: list[Problem] = []
    targets = list(targets)
    for target in targets:
        try:
            places, lacking = find_places(target, runs, cache)
        except (EvalError, TrainError) as error:
            problems.append(error)
            continue
        absent |= {one.folder.resolve(): one for one in lacking}
        home = runs / "hub" / target.rstrip("/").replace("/", "--") if is_on_hub(target, runs) else None
        for folder, run in places:
            try:
                is_alone = len(targets) == len(places) == 1  # several may not fit in memory together
                subject = make_subject(folder, run, layer, home, keeps=is_alone)
                first = homes.setdefault(subject.home.resolve(), subject.home)
                found.setdefault(folder.resolve(), subject if first == subject.home else replace(subject, home=first))
            except (EvalError, TrainError) as error:
                problems.append(error)
    return list(found.values()), problems, list(absent.values())


def find_places(
    target: str, runs: Path, cache: str | None = None
) -> tuple[list[tuple[Path, RunFolder | None]], list[Absent]]:
    """The SAE folders that a target means, with the run that each belongs to; and a run's SAEs without a folder."""
    found = (path for path in places_of(target, runs) if is_run(path) and list_saes(path) != [path])
    if (path := next(found, None)) is not None:
        run = RunFolder(path)
        folders = _saes_of(run)
        diverged = read_json(path / "result.json").get("diverged") or {}
        there = {folder.name for folder in folders}
        absent = [
            Absent(path / label, diverged.get(label, "its folder is gone"), is_lost=label not in diverged)
            for label in run.read_config()["saes"]
            if label not in there
        ]
        return [(folder, run) for folder in folders], absent
    try:
        folder = find_sae(target, runs)
    except RunMissing as error:
        raise TargetUnknown(_explain_missing(target, runs, cache, error)) from error
    parent = folder.resolve().parent
    parent = folder.parent if folder.parent.resolve() == parent else parent  # as named, except by `.` and links
    return [(folder, RunFolder(parent) if is_run(parent) else None)], []


def make_subject(
    folder: Path, run: RunFolder | None, layer: int | None = None, home: Path | None = None, keeps: bool = False
) -> LoadedSae:
    """The SAE of a folder. A separate `home` for its results also names it; with `keeps`, weights read here stay."""

    @torch.inference_mode(False)  # gradients may flow through it later, wherever it is first used
    def read() -> SparseAutoencoder:
        sae = with_unit_rows(without_signs(read_folder(folder))).eval().requires_grad_(False)
        if sizes and (sae.d_in, sae.num_latents) != sizes[:2]:
            raise SaeInvalid(
                f"{folder}: expected {sizes[0]} inputs and {sizes[1]} latents, as its files said, found "
                f"{sae.d_in} and {sae.num_latents}: it has changed since it was found, so evaluate it again"
            )
        return sae

    config = _config_of(folder)
    sizes, metadata, sae = _read_sizes(folder, config), metadata_of(config), None
    if sizes is None:  # a folder of another tool, whose settings may be anywhere
        sae = read()
        tables = (*sae.parameters(), *sae.buffers())
        sizes = sae.d_in, sae.num_latents, sum(table.numel() * table.element_size() for table in tables)
        metadata = {**sae.metadata, **metadata}
    place = _place_of(metadata, folder, layer)
    if (place.hook, place.target_hook) != (RESID, RESID):
        metadata |= {"hook": place.hook, "target_hook": place.target_hook}
    url, cache_id = cache_of(run) if run else (None, metadata.get("cache_id"))
    subject = LoadedSae(
        label=(home or folder.resolve()).name,
        folder=folder,
        home=home or (run.path if run else folder),
        run=run.name if run else None,
        variant=metadata.get("training_architecture") or str(config.get("architecture", "unknown")),
        read=read,
        d_in=sizes[0],
        width=sizes[1],
        num_bytes=sizes[2],
        config={**config, "metadata": metadata},
        layers=place.layers,
        target_layers=place.target_layers,
        cache_id=cache_id,
        cache_url=url,
    )
    if sae is not None and keeps:
        vars(subject).update(sae=sae, sha256=subject.sha256)  # before the files can change
    return subject


def _config_of(folder: Path) -> dict[str, Any]:
    """cfg.json, if there is one, with an older SAELens' keys renamed to today's."""
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    return upgrade_config(config, folder) if config and (folder / WEIGHTS).is_file() else config


def _read_sizes(folder: Path, config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Inputs, latents and bytes in memory, if a folder in SAELens' layout gives them without reading its weights."""
    if not config or not (folder / WEIGHTS).is_file():
        return None
    shapes = read_shapes(folder / WEIGHTS)
    match shapes.get("W_enc", (config.get("d_in"), config.get("d_sae"))):
        case (int(d_in), int(width)):
            # A signed SAE is evaluated with each latent twice.
            is_signed = "abstopk" in (config.get("gate"), config.get("architecture"))
            return d_in, width * (1 + is_signed), 4 * sum(map(math.prod, shapes.values())) * (1 + is_signed)
        case _:
            return None


def _saes_of(run: RunFolder) -> list[Path]:
    if not run.is_finished:
        raise RunUnfinished(f"{run.path} has not ended: it has no result.json. Resume it: {resume_command(run.path)}")
    found = list_saes(run.path)
    if not found:
        raise RunUnfinished(f"{run.path} has no saved SAEs: they were removed. Train it again")
    return found


def _explain_missing(target: str, runs: Path, cache: str | None, error: TrainError) -> str:
    if "/" in target:
        return str(error)
    known = run_names(runs)
    text = f"no run {target!r} in {runs} (it has: {', '.join(known) or 'none'}), and no SAE folder of that name"
    store = cache or known_store()
    ways = []
    if not known:
        ways.append(f"`{command_to_train(FIRST, store or STORES[0], runs)}` trains a first run")
    if found := studies_with(target):
        others = f" (also in the studies {', '.join(found[1:])})" if len(found) > 1 else ""
        command = command_to_train(("--recipe", f"{found[0]}/{target}"), store or STORES[0], runs)
        ways.append(f"`{command}` trains the one of the study {found[0]}{others}")
    first = "; first `make harvest`, as there is no store here yet" if ways and not store else ""
    return ". ".join([text, *ways]) + first


def command_to_train(what: Sequence[str], store: str, runs: Path) -> str:
    """The command that trains this on a store, into a folder of runs."""
    out = [] if runs == Path(RUNS) else ["--out", str(runs)]
    return shlex.join(["sae-train", *what, "--cache", store, *out])


def known_store() -> str | None:
    """The first store that `make` has left in this folder."""
    return next((place for place in STORES if (Path(place) / ROOT).is_file()), None)


def studies_with(run: str) -> list[str]:
    return [study for study in studies() if any(recipe.name == run for recipe in runs_of(study))]


def _place_of(metadata: Mapping[str, Any], folder: Path, given: int | None) -> Places:
    """Where an SAE reads and writes: as its metadata says or, if that names no place, in the layer `given`."""
    try:
        place = read_places(metadata)
    except SaeInvalid as error:
        raise SettingInvalid(f"{folder}: {error}") from None
    if place is not None:
        if given is not None and given not in place.layers:
            named = ", ".join(map(str, place.layers))
            raise SettingInvalid(
                f"{folder}: expected the layer that the SAE says it reads, {named}, found --layer {given}, which is "
                "for SAEs that name none: leave it out"
            )
        return place
    if metadata.get("transcodes"):
        raise SettingInvalid(f"{folder}: {NO_PLACES}")
    if given is None:
        raise SettingInvalid(
            f"{folder} does not say which layer's residual stream it reads (hook_name "
            f"{metadata.get('hook_name', '')!r}): give --layer"
        )
    return Places((given,), RESID, (given,), RESID)
