"""`sae-export`: convert an SAE between folder formats, checking that it computes the same; or push it to the Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..cache_schema.cli import as_json, print_json
from ..cache_schema.disk_and_cloud_files import FULL_DISK, sync
from ..cache_schema.sites import RESID
from . import cli_support
from .cli_support import report_errors
from .disk.atomic_files import hidden_name_beside, replace_written
from .disk.formats import FILES, WRITERS, circuit_tracer, kind_of, read
from .disk.hook_metadata import place_metadata, read_places, require_places
from .disk.plain_form import PlainSae, in_raw_units, sae_from_plain, unsigned
from .disk.sae_lens_folder import EXTRAS, is_of_one_place, read_shapes
from .errors import RunNotWritten, RunTaken, SaeInvalid
from .run.find_and_load_sae import find_sae, find_saes, read_folder
from .run.push_to_hub import push

ROWS = 256
TOLERANCE = 1e-3  # of a row's reconstruction, as a share of the mean row's length
FLIPPED = 0.1  # share of rows that may differ by more, because a latent near a tie or its threshold flips
CIRCUIT_TRACER = "circuit_tracer"

EXAMPLES = """\b
Examples:
  sae-export run_1/topk --to sparsify --out ./exported
  sae-export run_1/topk --to dictionary_learning --out ./exported_dl
  sae-export ./sparsify/folder --to sae_lens --out ./exported
  sae-export run_7 --to circuit_tracer --out ./exported    # all transcoders of the run, or its cross-layer one
  sae-export run_1 --push-to-hub me/my-saes --license mit --private
  sae-export run_1 --push-to-hub me/my-saes --json | jq -r .pushed
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source", shell_complete=cli_support.runs)
@click.option(
    "--to", "kind", type=click.Choice(sorted([*WRITERS, CIRCUIT_TRACER])), help="The tool whose folder format to write."
)
@click.option("--out", "target", type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--push-to-hub", "repository", metavar="OWNER/NAME", help="Upload to this repository instead, with a model card."
)
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@click.option(
    "--license", "licence", metavar="NAME", help="The licence to name in the card, such as mit. Default: none."
)
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Where runs are kept.")
@as_json()
def main(
    source: str,
    kind: str | None,
    target: Path | None,
    repository: str | None,
    private: bool,
    licence: str | None,
    runs: str,
    is_json: bool,
) -> None:
    """Convert SOURCE: a run, an SAE's folder (SAELens, sparsify, dictionary_learning, Gemma Scope), or one on the Hub.

    Or push it to the Hub: a run with all its SAEs, one of them, or a folder.
    """
    if repository is not None and (kind is not None or target is not None):
        raise click.UsageError("expected either --to and --out or --push-to-hub, found both")
    if repository is None and (private or licence is not None):
        raise click.UsageError("--private and --license need --push-to-hub OWNER/NAME")
    with report_errors():
        if repository is not None:
            address = push(source, runs, repository, private, licence)
            report({"pushed": address}, [f"pushed: {address}"], is_json)
            return
        if kind is None or target is None:
            raise click.UsageError("expected --to KIND and --out FOLDER, or --push-to-hub OWNER/NAME")
        folders = find_saes(source, runs) if kind == CIRCUIT_TRACER else [find_sae(source, runs)]
        whole = kind == "sae_lens"  # its layout keeps the extras
        left_out = [] if whole else sorted({name for folder in folders for name in names_of_extras(folder)})
        if kind == CIRCUIT_TRACER:
            difference, compared = export_set(folders, target), "reconstructions differ"
        else:
            difference, compared = export(folders[0], kind, target), "codes and reconstructions differ"
        read_from = [{"folder": str(folder), "kind": kind_of(folder)} for folder in folders]
        written = {"folder": str(target), "kind": kind}
        document = {"read": read_from, "written": written, "difference": difference, "left_out": left_out}
        lines = [
            f"{', '.join(map(str, folders))} ({read_from[0]['kind']}) -> {target} ({kind})",
            f"read back: {compared} by at most {difference:.2g} on {ROWS} random rows",
        ]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)} of {EXTRAS}, for which {kind} has no place")
        if kind == "dictionary_learning":  # ae.pt is a pickle, so it is not written here
            lines.append(f"next: run the two lines in {target / 'README.md'} to make ae.pt, the file that {kind} opens")
        report(document, lines, is_json)


def report(document: dict[str, Any], lines: Sequence[str], is_json: bool) -> None:
    """Print the outcome as lines of text; with `is_json`, as a document on stdout and the lines on stderr."""
    for line in lines:
        click.echo(line, err=is_json)
    if is_json:
        print_json(document)


def export(folder: Path, kind: str, target: Path) -> float:
    """Write a folder's SAE in another format; return the largest difference between the two."""
    _require_free(target)
    plain, metadata = read(folder)
    metadata = _with_place(metadata)
    _require_one_place(metadata, kind)
    plain = plain if kind == "sae_lens" else unsigned(plain)
    # SAELens' format has decoder rows of length one; the codes absorb their lengths.
    coded = in_raw_units(sae_from_plain(plain)) if kind == "sae_lens" else None
    with _written_whole(target) as hidden:
        WRITERS[kind](hidden, plain, metadata)
        if kind == "sae_lens" and names_of_extras(folder):
            replace_written(hidden / EXTRAS, lambda path: shutil.copyfile(folder / EXTRAS, path))
        codes, x_hats = _outputs(plain, read(hidden)[0], coded)
        _require_alike(*x_hats, may_flip=plain.architecture != "standard")
        return max(_relative_difference(*codes), _relative_difference(*x_hats))


def names_of_extras(folder: Path) -> set[str]:
    """The modules saved next to an SAE of this package because they trained along with it, such as its tiers."""
    has_any = kind_of(folder) == "sae_lens" and (folder / EXTRAS).is_file()
    return {name.partition(".")[0] for name in read_shapes(folder / EXTRAS)} if has_any else set()


@torch.no_grad()
def export_set(folders: Sequence[Path], target: Path) -> float:
    """Write transcoders, one per layer or a cross-layer one, for circuit-tracer; return the largest difference."""
    _require_free(target)
    saes = [read_folder(folder) for folder in folders]
    for sae in saes:
        require_places(sae.metadata)
    with _written_whole(target) as hidden:
        circuit_tracer.write(hidden, saes)
        layers = sum(len(sae.metadata["layers"]) for sae in saes)
        size = max(float(sae.b_dec.norm()) for sae in saes) or 1.0
        width = saes[0].d_in * len(saes) // layers
        x = size * torch.randn(ROWS, layers, width, generator=torch.Generator().manual_seed(0))
        parts = sorted(saes, key=lambda sae: sae.metadata["layers"])
        own = [sae(rows.flatten(1)) for sae, rows in zip(parts, x.chunk(len(parts), 1), strict=True)]
        x_hats = torch.cat(own, 1), circuit_tracer.reconstruct(hidden, x).flatten(1)
        _require_alike(*x_hats, may_flip=True)
        return _relative_difference(*x_hats)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


@torch.no_grad()
def _outputs(one: PlainSae, other: PlainSae, coded: PlainSae | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """Codes and reconstructions of both SAEs for random rows; the first's codes are those of `coded`, if given."""
    first, second = sae_from_plain(one), sae_from_plain(other)
    size = first.b_dec.norm().clamp_min(1.0)
    x = first.b_dec + size * torch.randn(ROWS, first.d_in, generator=torch.Generator().manual_seed(0))
    return (sae_from_plain(coded or one).encode(x), second.encode(x)), (first(x), second(x))


def _require_alike(x_hat: Tensor, found: Tensor, may_flip: bool) -> None:
    """Refuse reconstructions that differ from the source's; some rows may differ if latents can flip."""
    differences = (x_hat - found).norm(dim=1) / x_hat.norm(dim=1).mean().clamp_min(1e-30)
    different = int((~(differences <= TOLERANCE)).sum())  # including those that are not finite
    if different > (FLIPPED * len(differences) if may_flip else 0):
        raise SaeInvalid(
            f"expected the written SAE to reconstruct as its source does, found {different} of {len(differences)} "
            f"random rows that differ by more than {TOLERANCE:g} of their length: it was deleted. Choose another --to, "
            "and report this SAE"
        )


def _require_free(target: Path) -> None:
    """Refuse a target that exists, unless it is a folder with nothing in it but leftovers of unfinished exports."""
    if target.exists() and (not target.is_dir() or any(not path.match(".*.tmp") for path in target.iterdir())):
        raise RunTaken(f"{target} exists and is not an empty folder: choose another --out")


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, then move it to the target, unless another export has filled that in the
    meantime. If writing fails or is interrupted, delete the hidden folder."""
    place = Path(os.path.realpath(target))  # a link stays a link
    # An existing empty folder is filled, not replaced: it may be a mount, have special modes or an unwritable parent.
    is_there = place.is_dir()
    hidden = hidden_name_beside(place / place.name if is_there else place)
    try:
        yield hidden
        if is_there:
            _move_files_up(hidden)
        else:
            os.rename(hidden, place)
            sync(place.parent)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        _require_free(target)
        is_full = any(os.strerror(number) in str(error) for number in FULL_DISK)  # safetensors says it only in words
        remedy = "make room, or choose another --out" if is_full else "choose another --out"
        raise RunNotWritten(f"{target} could not be written ({error}): {remedy}") from error


def _move_files_up(folder: Path) -> None:
    """Move a folder's files into its parent, weights last, because they make it an SAE. If one cannot be moved, delete
    those that were."""
    _require_free(folder.parent)
    moved: list[Path] = []
    try:
        for file in sorted(folder.iterdir(), key=lambda file: (file.suffix == ".safetensors", file.name in FILES)):
            place = folder.parent / file.name
            if not moved:
                place.touch(exist_ok=False)  # fails if another export has started to move its files
            moved.append(place)
            file.replace(place)
        folder.rmdir()
        sync(folder.parent)
    except BaseException:
        for place in moved:
            place.unlink(missing_ok=True)
        raise


def _with_place(metadata: dict[str, Any]) -> dict[str, Any]:
    """Add the place under our own names, which writers read, if only another tool's name gives it."""
    require_places(metadata)
    try:
        places = read_places(metadata)
    except SaeInvalid:  # an unknown place keeps its name
        return metadata
    if places is None or len(places.layers) != 1 or places.layers != places.target_layers:
        return metadata
    return metadata | place_metadata(places.hook, places.target_hook, places.layers[0])


def _require_one_place(metadata: dict[str, Any], kind: str) -> None:
    """Other tools support only SAEs of one layer that reconstruct their input; sparsify also a layer's MLP."""
    layers, hooks = metadata.get("layers") or (), (metadata.get("hook"), metadata.get("target_hook"))
    is_of_mlp = hooks == ("mlp_in", "mlp_out") and len(layers) == 1 and metadata.get("target_layers") == layers
    is_of_module = kind == "sparsify" and (is_of_mlp or metadata.get("transcodes", False))
    if kind != "sae_lens" and not is_of_one_place(metadata) and not is_of_module:
        hook, elsewhere = metadata.get("hook", RESID), "another place" if metadata.get("transcodes") else layers
        raise SaeInvalid(
            f"expected an SAE of one layer that reconstructs its input, found {hook} {layers} to "
            f"{metadata.get('target_hook', hook)} {metadata.get('target_layers', elsewhere)}: {kind} has no format for "
            "it. Keep its folder, which load_sae opens"
        )


if __name__ == "__main__":
    main()
