"""`sae-store`: inspect a store, verify it, repair it, or make one from existing activations."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from decimal import Decimal
from functools import partial
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

import click
from click.shell_completion import add_completion_class
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .errors import StoreError
from .formats_to_import import NumpySource, SaelensSource, Source, VllmSource
from .import_into_store import ImportSettings, cuts_documents, import_store
from .info import describe, render
from .layout import BEGINNING, SHARD_TOKENS
from .manifest import Codec, Manifest
from .numbers_in_words import counted, numbered
from .reader import CANNOT_HARVEST_AGAIN, Store
from .shell_completion import Bash, Fish, Zsh
from .sites import HOOKS, RESID, Site
from .stored_dtypes import SmallDtype
from .strict_json import nearest, to_json
from .verify_and_repair import Damage, digest, drop_broken_derived, find_wrong_derived, repair, verify_shards
from .watch import follow

NOT_HARVESTED = ("import",)  # corpora that no model can harvest again
RERUN = "Run the same import or harvest again to write what is missing"
TOKEN = click.IntRange(0, 2**32 - 1)
NPY = "A .npy file or a folder of them, of shape"

for shell in (Bash, Fish, Zsh):  # for every command: each imports this module
    add_completion_class(shell)

EXAMPLES = """\b
Examples:
  sae-store info ./store
  sae-store verify s3://bucket/store --json
  sae-store repair ./store
  sae-store import ./store --resid acts.npy --tokens tokens.npy --layer 4 --model NAME
  sae-store import ./store --resid ./folder_of_npy --context 128 --layer 4 --model NAME
"""


def as_json(
    help: str = "Print the results as JSON; everything else goes to standard error.",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The --json option, for scripts: one document on standard output, everything else on standard error."""
    return click.option("--json", "is_json", is_flag=True, help=help)


def read_count(text: str) -> int | None:
    """Parse `10M`, `1.5B`, `200k`, `1e6`, `10,000` (commas at thousands only) or digits; None if not a whole number."""
    plain = text.strip().replace("_", "")
    plain = plain.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", plain) else plain.lower()
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)(e\d{1,2}|[kmbg]?)", plain)
    if found is None:
        return None
    powers = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9}
    value = Decimal(found[1]).scaleb(powers[found[2]] if found[2] in powers else int(found[2][1:]))
    return int(value) if value == int(value) else None


def example(command: str) -> str:
    return f"\b\nExample:\n  sae-store {command}"


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Inspect, verify, repair and import stores of activations."""


@main.command(epilog=example("info ./store --json | jq .tokens_by_split"))
@click.argument("url")
@as_json("Print JSON.")
def info(url: str, is_json: bool) -> None:
    """Show what a store holds and how much space it takes."""
    with _report(), Store.open(url) as store:
        facts = describe(store)
    if is_json:
        print_json(facts)
    else:
        open_console().print(render(facts))


@main.command(epilog=example("watch s3://bucket/store"))
@click.argument("url")
@click.option("--every", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Seconds between polls.")
def watch(url: str, every: float) -> None:
    """Show the progress of all writers until the store is whole."""
    console = open_console()
    with _report():
        if not console.is_terminal:
            for found in follow(url, every):
                click.echo(str(found))
            return
        with Progress(BarColumn(), TextColumn("{task.description}", markup=False), console=console) as progress:
            task = progress.add_task("", total=None)
            for found in follow(url, every):
                progress.update(task, total=found.shards, completed=found.committed, description=str(found))


@main.command(epilog=example("verify ./store"))
@click.argument("url")
@as_json("Print the findings as JSON; the exit status is the same.")
def verify(url: str, is_json: bool) -> None:
    """Read every byte and check it against the commit records."""
    with _report(), Store.open(url) as store:
        damage = _find_damage(store)
        wrong = [] if damage else find_wrong_derived(store)
        for item in damage:
            click.echo(str(item), err=True)
        for key in wrong:
            click.echo(f"{key}: inconsistent with the shards", err=True)
        missing = int((~store.committed).sum())
        shards = store.manifest.shards
    broken = sorted({item.shard for item in damage})
    if is_json:
        can_be_mended = not any(item.array in BEGINNING for item in damage)
        facts = {"url": url, "shards": shards, "missing": missing, "damaged": broken, "can_be_mended": can_be_mended}
        print_json({**facts, "damage": [to_json(item) for item in damage], "derived_damaged": wrong})
        sys.exit(1 if damage or wrong else 0)
    if missing:
        click.echo(f"not committed yet: {missing} of {counted(shards, 'shard')}. {RERUN}")
    if damage:
        click.echo(f"damaged: {numbered('shard', broken)} ({len(broken)} of {shards})")
    lost = _shards_without_tokens(damage)
    if wrong or len(lost) < len(broken):
        click.echo(f"Repair {'the others' if lost else 'them'} with: sae-store repair {shlex.quote(url)}")
    with _report():
        _refuse_if_lost(lost)
    if damage or wrong:
        sys.exit(1)
    click.echo(f"{counted(shards - missing, 'shard')} read, all exactly as committed")


@main.command(name="digest", epilog=example("digest ./store"))
@click.argument("url")
@as_json("Print JSON.")
def digest_command(url: str, is_json: bool) -> None:
    """Print one hash of the whole content, independent of host, path, codec and order of writing."""
    with _report(), Store.open(url) as store:
        found = digest(store)
        shards, committed = store.manifest.shards, int(store.committed.sum())
    if committed < shards:
        click.echo(f"digest of {committed} of {shards} shards: the others are not committed yet", err=True)
    if is_json:
        print_json({"url": url, "digest": found, "shards": shards, "shards_committed": committed})
    else:
        click.echo(found)


@main.command(name="repair", epilog=example("repair ./store"))
@click.argument("url")
@click.option("--remove-only", is_flag=True, help="Remove the damaged shards without harvesting them again.")
@click.option("--model", help="Where the model is now: a folder, a file or an id.  [default: as in the harvest]")
@click.option("--device", help="The device to harvest on: auto, cpu, cuda, cuda:1 and so on.  [default: auto]")
def repair_command(url: str, remove_only: bool, model: str | None, device: str | None) -> None:
    """Undo the commits of damaged shards and harvest only those again."""
    if remove_only and (model or device):
        raise click.UsageError("--model and --device are for harvesting again: leave out either them or --remove-only")
    with _report():
        for key in drop_broken_derived(url):
            click.echo(f"{key} was damaged: rebuilt")
        with Store.open(url) as store:
            damage, manifest = _find_damage(store), store.manifest
            wrong = [] if damage else find_wrong_derived(store)
        for item in damage:
            click.echo(str(item))
        lost = _shards_without_tokens(damage)
        damaged = sorted({item.shard for item in damage} - set(lost))
        undo = partial(repair, url, damaged, wrong)
        if damaged and not remove_only:
            _reharvest(url, manifest, damaged, undo, device, model)
        else:
            undo()
            for key in wrong:
                click.echo(f"{key} was inconsistent with the shards: rebuilt")
            if damaged:
                click.echo(f"removed: {numbered('shard', damaged)}. {RERUN}")
            elif not damage and not wrong:
                click.echo("nothing is damaged")
        _refuse_if_lost(lost)


@main.command(
    name="import",
    epilog="""\b
Examples:
  sae-store import ./store --resid acts.npy --tokens tokens.npy --layer 4 --model NAME
  sae-store import ./store --resid ./folder_of_npy --context 128 --layer 4 --model NAME
  sae-store import ./store --saelens ./cached_activations --model NAME
  sae-store import ./store --vllm ./hidden_states --layer 11 --layer 19 --context 128 --model NAME
""",
)
@click.argument("url")
@click.option(
    "--resid",
    "resid_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help=f"{NPY} [windows, tokens, width] or [rows, width].",
)
@click.option(
    "--acts",
    "act_files",
    metavar="HOOK:LAYER=FILE",
    multiple=True,
    help="The same for a hook: mlp_in:4=mlp_in.npy.",
)
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(path_type=Path),
    help=f"{NPY} [windows, tokens] or [rows]; with --saelens only if that folder has none.",
)
@click.option("--saelens", "saelens_folder", type=click.Path(path_type=Path), help="Cached activations of SAELens.")
@click.option("--vllm", "vllm_folder", type=click.Path(path_type=Path), help="Hidden states of vLLM.")
@click.option(
    "--context", type=click.IntRange(1), help="Cut [rows, width], or vLLM's requests, into windows of this many tokens."
)
@click.option(
    "--layer",
    "layers",
    type=click.IntRange(0),
    multiple=True,
    help="The layer of each --resid file, or each layer that vLLM saved (its id L + 1 is after layer L).",
)
@click.option("--model", required=True, help="The model that made the activations, for the record.")
@click.option(
    "--special-token", "special_tokens", type=TOKEN, multiple=True, help="Id of a token not to train on, such as BOS."
)
@click.option("--bos-token", type=TOKEN, help="Id of the token that windows begin with; not trained on.")
@click.option(
    "--validation", "validation_share", default=0.05, show_default=True, help="Share of windows to validate on."
)
@click.option("--test", "test_share", default=0.05, show_default=True, help="Share of windows to test on.")
@click.option(
    "--shard-windows",
    type=click.IntRange(1),
    help="Windows per shard. Fewer need less memory and give the same store.  "
    f"[default: {SHARD_TOKENS:,} tokens, or as in the existing store]",
)
@click.option("--codec", type=click.Choice(get_args(Codec)), default="raw", show_default=True)
@click.option(
    "--stored-as",
    type=click.Choice(get_args(SmallDtype)),
    help="Store activations in this type, with one scale per token: half the bytes of bfloat16.  [default: as given]",
)
@click.option(
    "--keep-massive", is_flag=True, help="Treat rows of massive norm like all others, unless a run overrides it."
)
def import_command(url: str, **options: Any) -> None:
    """Make a store at URL from existing activations."""
    bos = () if options["bos_token"] is None else (options["bos_token"],)
    options["special_tokens"] = tuple({*options["special_tokens"], *bos})
    settings = ImportSettings(**{one.name: options.pop(one.name) for one in fields(ImportSettings)})
    with _report():
        source = _open_source(**options)
        with _progress(("reading", "parts"), ("importing", "shards")) as (read, write):
            manifest = import_store(url, source, settings, lambda _, total: write(total), read)
    places = ", ".join(map(str, manifest.sites))
    click.echo(f"{counted(manifest.windows, 'window')} of {counted(manifest.context, 'token')}, {places}: {url}")
    sizes = {name: stop - start for name, (start, stop) in manifest.splits.items()}
    click.echo(f"windows: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}")
    if source.left_out:
        click.echo(f"left out: {source.left_out}")
    if source.warning:
        click.echo(f"warning: {source.warning}", err=True)
    if cuts_documents(source, manifest):
        click.echo(
            "warning: there are too few documents for each split to have its own, so one document's windows are in two "
            "splits: held-out data is then easier than it looks. Import more documents into another folder",
            err=True,
        )
    for name, asked in (("validation", settings.validation_share), ("test", settings.test_share)):
        if sizes[name] > 2 * asked * manifest.windows:
            click.echo(
                f"warning: {sizes[name] / manifest.windows:.0%} of the windows are for {name}, not {asked:.0%} as "
                "asked: no document is in two splits, and some of the last ones are long. Import them into another "
                f"folder, with the files of long documents first, or with another --{name}",
                err=True,
            )
    click.echo(f"next: sae-store info {shlex.quote(url)}")


def _open_source(
    resid_files: tuple[Path, ...],
    act_files: tuple[str, ...],
    tokens_file: Path | None,
    saelens_folder: Path | None,
    vllm_folder: Path | None,
    context: int | None,
    layers: tuple[int, ...],
) -> Source:
    if vllm_folder is not None:
        if resid_files or act_files or tokens_file or saelens_folder:
            raise click.UsageError("--vllm goes with --layer and --context only: its files hold everything else")
        return VllmSource(vllm_folder, layers, context)
    if context is not None and saelens_folder is not None:
        raise click.UsageError("--context is for --vllm and for rows: SAELens' activations are already in windows")
    if (saelens_folder is None) == (not (resid_files or act_files)):
        raise click.UsageError("give either --resid with --layer and --acts, or --saelens, or --vllm")
    if saelens_folder is not None:
        if len(layers) > 1:
            raise click.UsageError("a SAELens folder holds one layer: give --layer once or not at all")
        return SaelensSource(saelens_folder, layers[0] if layers else None, tokens_file)
    if len(layers) != len(resid_files) or len(set(layers)) != len(layers):
        raise click.UsageError(f"expected one --layer for each of the {len(resid_files)} --resid files, none twice")
    files = {Site(RESID, layer): path for layer, path in zip(layers, resid_files, strict=True)}
    for text in act_files:
        found = re.fullmatch(r"(\w+):(\d+)=(.+)", text)
        if found is None or found[1] not in HOOKS:
            near = nearest(found[1], HOOKS) if found else ""
            raise click.UsageError(f"--acts {text}: expected HOOK:LAYER=FILE such as mlp_in:4=mlp_in.npy{near}")
        site = Site(found[1], int(found[2]))
        if site in files:
            raise click.UsageError(f"--acts {text}: a file for {site} is already given")
        files[site] = Path(found[3])
    return NumpySource(files, tokens_file, context)


def open_console(**options: Any) -> Console:
    """A console of a usable width: one too small for any text, as from COLUMNS=0, counts as not set. What its encoding
    lacks, such as the ellipsis of a cell that is cut, is escaped."""
    console = Console(**options)
    if console.width < 20:
        console.width = 80
    if isinstance(console.file, TextIOWrapper) and console.file.errors in ("strict", "surrogateescape"):
        console.file.reconfigure(errors=ESCAPED)
    return console


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name in another encoding come back as they were, all else as on standard error."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


ESCAPED = "saemill-escaped"
codecs.register_error(ESCAPED, _escape)


def print_json(document: dict[str, Any]) -> None:
    """Print a command's JSON document."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def _find_damage(store: Store) -> list[Damage]:
    damage: list[Damage] = []
    total = store.manifest.shards
    with _progress(("reading", "shards")) as (advance,):
        for report in verify_shards(store):
            damage += report.damage
            advance(total)
    return damage


def _shards_without_tokens(damage: list[Damage]) -> list[int]:
    """Shards whose tokens or documents are damaged: they cannot be harvested again."""
    return sorted({item.shard for item in damage if item.array in BEGINNING})


def _refuse_if_lost(lost: list[int]) -> None:
    if lost:
        raise StoreError(f"the tokens or documents of {numbered('shard', lost)} are damaged. {CANNOT_HARVEST_AGAIN}")


def _reharvest(
    url: str, manifest: Manifest, shards: list[int], undo: Callable[[], None], device: str | None, model: str | None
) -> None:
    """Harvest the shards again with the registered harvester: the store itself knows no model."""
    harvesters = list(entry_points(group="saemill.reharvest"))  # functions like `harvest.run.reharvest`
    if manifest.corpus.id in NOT_HARVESTED or not harvesters:
        undo()
        click.echo(f"removed: {numbered('shard', shards)}. {RERUN}")
        return
    harvesters[0].load()(url, shards, device, model, undo)
    click.echo(f"harvested again: {numbered('shard', shards)}")


@contextmanager
def _report() -> Iterator[None]:
    """Print a store error as one line instead of a traceback; an interrupt exits with the usual status, 130."""
    try:
        with report_file_errors():
            yield
    except StoreError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def report_file_errors() -> Iterator[None]:
    """Exit with one line if a file cannot be read or written; print warnings without their source line."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        reason = (error.strerror or type(error).__name__).lower()
        advice = "Check the path" if isinstance(error, FileNotFoundError) else "Change its permissions"
        click.echo(f"error: {reason}: {error.filename}. {advice}, or give another", err=True)
        sys.exit(1)
    finally:
        warnings.formatwarning = before


@contextmanager
def _progress(*bars: tuple[str, str]) -> Iterator[list[Callable[[int], None]]]:
    """A progress bar on standard error per (verb, unit); each yielded function takes the total and counts one up."""
    verb, unit = TextColumn("{task.description}"), TextColumn("{task.fields[unit]}")
    columns = (verb, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())

    def advance(task: TaskID) -> Callable[[int], None]:
        return lambda total: progress.update(task, total=total, advance=1)

    console = open_console(stderr=True)
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with while_shown(progress):
        yield [advance(progress.add_task(verb, total=None, unit=unit)) for verb, unit in bars]


def while_shown(bar: Progress) -> AbstractContextManager[object]:
    """Show a bar unless it is disabled: rich before 14.3 ends even such a one with an empty line."""
    return nullcontext() if bar.disable else bar


if __name__ == "__main__":
    main()
