"""`sae-harvest`: run a model over a corpus once and keep activations and attention in a store."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

import click

from ..cache_schema import Store, StoreError, StoreMissing
from ..cache_schema.cli import as_json, open_console, print_json, report_file_errors
from ..cache_schema.info import describe
from ..cache_schema.info import render as render_store
from ..cache_schema.layout import SHARD_TOKENS
from ..cache_schema.manifest import Codec, Manifest
from ..cache_schema.sites import HOOKS, RESID, by_hook
from ..cache_schema.stored_dtypes import SmallDtype
from .config import ATTENTION_AROUND, HarvestConfig, parse_count, parse_sinks, parse_worker
from .corpus import dataset_help
from .corpus.source import OPENWEBTEXT, STDLIB, DatasetOptions
from .errors import HarvestError, SettingInvalid

if TYPE_CHECKING:
    from .run import Finished

EXAMPLES = """\b
Examples:
  sae-harvest --model pocket --layer 19 --tokens 300k
  sae-harvest --model smollm2 --tokens 10M
  sae-harvest --model google/gemma-2-2b --layer 19 --tokens 100M --dry-run
  sae-harvest --dataset ./texts --column body --layer 12 --resid-layers 10..12 --out s3://bucket/store
  sae-harvest --layer 19 --dry-run --json | jq .seconds
  sae-harvest --worker 3/16 --out /shared/store
"""


@click.command(
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
)
@click.option("--model", default="auto", help="auto, pocket, smollm2, an id on the hub, a folder or a GGUF file.")
@click.option(
    "--layer",
    type=int,
    help="Keep the residual stream after this layer.  [default: 19 for a Gemma-2 of 26 layers, else the middle one]",
)
@click.option(
    "--resid-layers", metavar="LAYERS", help="Layers after which to keep it too: 17..20, or -2..+1 relative to --layer."
)
@click.option(
    "--attention-layers",
    metavar="LAYERS",
    help=f"Layers whose attention to keep, or none.  [default: {ATTENTION_AROUND}, where the model has them]",
)
@click.option(
    "--hooks",
    metavar="HOOKS",
    default=RESID,
    help=f"What to keep at these layers: {','.join(HOOKS)}. At other layers: {RESID},mlp_in:12..19.",
)
@click.option("--attention-mass", default=0.95, help="Keep the largest keys until they carry this much attention.")
@click.option("--attention-topk", default=16, help="Keep at most this many keys per row.")
@click.option(
    "--leave-out",
    metavar="KEYS",
    default="none",
    help="Keys to ignore, in slots and in mass: bos (a window's first token), self, or bos,self.",
)
@click.option(
    "--attention-heads",
    type=click.Choice(["mean", "all"]),
    default="mean",
    help="Keep the mean over a layer's heads, or each head's rows.",
)
@click.option("--dataset", help=f"{dataset_help()}.  [default: {STDLIB} for pocket and smollm2, else {OPENWEBTEXT}]")
@click.option("--dataset-config", help="Configuration of a data set on the hub.")
@click.option("--dataset-split", default="train")
@click.option("--dataset-revision", help="Commit or branch.  [default: the latest, pinned]")
@click.option("--column", default="text", help="The column with the text.")
@click.option("--tokens", metavar="N", help="How many: 200k, 10M, 1.5B.  [default: 10M; 600k for stdlib or pocket]")
@click.option("--context", default=128, help="Tokens in a window.")
@click.option(
    "--packing",
    type=click.Choice(["concat", "documents"]),
    default="concat",
    help="concat: join documents with BOS between them; documents: one per window, leaving out tokens that fill none.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32", "float16"]), default="bfloat16")
@click.option(
    "--stored-as",
    type=click.Choice(get_args(SmallDtype)),
    help="Store activations in this type, one scale per token: half the bytes of bfloat16.  [default: as computed]",
)
@click.option("--codec", type=click.Choice(get_args(Codec)), default="raw")
@click.option(
    "--shard-windows",
    type=int,
    help=f"Windows per shard, the unit of work.  [default: {SHARD_TOKENS:,} tokens, or as in the existing store]",
)
@click.option(
    "--batch-windows", type=int, help="Windows per forward pass.  [default: 2,048 tokens, 512 for small models]"
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--worker",
    default="1/1",
    metavar="I/N",
    help="This is process I of N; when its share is done, it helps with the others'.",
)
@click.option("--out", default="./store", help="The store: a folder, or an fsspec URL (s3://...).")
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Show the size and time without writing a store. A GGUF file is converted for this, once.",
)
@as_json()
def main(is_dry_run: bool, is_json: bool, **options: Any) -> None:
    """Run a language model over a corpus once; keep residuals, attention and tokens in a store.

    If stopped at any point, the same command resumes. Several processes share the work under `accelerate launch` or
    `torchrun`, or each with its own --worker.
    """
    with _reported(options["out"]):
        config = make_config(options)
        if is_dry_run:
            _estimate(config, is_json)
        else:
            _harvest(config, is_json)


def make_config(options: dict[str, Any]) -> HarvestConfig:
    """The configuration that the options of the command line ask for."""
    given = {one.name: options[one.name] for one in fields(HarvestConfig) if one.name in options}
    given["corpus"] = _corpus(options)
    given["resid_layers"] = "none" if options["resid_layers"] is None else options["resid_layers"]
    given["leave_out"] = parse_sinks(options["leave_out"])
    given["tokens"] = None if options["tokens"] is None else parse_count(options["tokens"])
    given["worker"] = parse_worker(options["worker"])
    return HarvestConfig(**given)


def _corpus(options: dict[str, Any]) -> DatasetOptions | None:
    given = DatasetOptions(
        dataset=options["dataset"] or "",
        config=options["dataset_config"],
        split=options["dataset_split"],
        revision=options["dataset_revision"],
        column=options["column"],
    )
    if options["dataset"] is not None:
        return given
    for option in given.given.values():
        raise SettingInvalid(f"{option} needs --dataset: give that too, for example {OPENWEBTEXT}")
    return None


def _harvest(config: HarvestConfig, is_json: bool) -> None:
    from .run import harvest  # imported late: --help must not wait for torch and transformers

    finished = harvest(config)
    if not finished.speaks:
        return
    if is_json:
        print_json(_document_of(finished))
        return
    if finished.committed < finished.shards:
        click.echo(f"{finished.committed} of {finished.shards} shards are committed; others belong to other workers")
        return
    with Store.open(config.out) as store:
        open_console().print(render_store(describe(store)))
        if store.manifest.sites:  # empty if only attention is kept
            click.echo(f"next: {training_command(store.manifest, config)}")
    for line in finished.fell_back:
        click.echo(line)


def training_command(manifest: Manifest, config: HarvestConfig) -> str:
    """A command that trains an SAE on the store: on residuals if it holds any, else on an MLP, else on its first hook.
    Of several layers it names the one asked for, or the middle one."""
    hooks = by_hook(manifest.sites)
    hook, variant = next(iter(hooks)), "topk"
    layers = hooks[hook]
    if RESID not in hooks and (both := sorted({*hooks.get("mlp_in", ())} & {*hooks.get("mlp_out", ())})):
        hook, variant, layers = "mlp_in", "transcoder", tuple(both)
    layer = config.layer if config.layer in layers else layers[len(layers) // 2]
    hook_option = "" if hook == RESID else f" --set hook={hook}"
    layer_option = f" --layer {layer}" if len(hooks[hook]) > 1 else ""
    return f"sae-train --variant {variant}{hook_option}{layer_option} --cache {shlex.quote(config.out)}"


def _document_of(finished: Finished) -> dict[str, Any]:
    """For scripts: the facts of `sae-store info` once the store is finished, and the banner of a fallback model."""
    with Store.open(finished.url) as store:
        facts = describe(store) if finished.committed == finished.shards else {"url": finished.url}
    return {**facts, "shards": finished.shards, "shards_committed": finished.committed, "remarks": finished.fell_back}


def _estimate(config: HarvestConfig, is_json: bool) -> None:
    from .dry_run import document_of, dry_run, render
    from .estimate_cost import require_space

    estimate = dry_run(config)
    if estimate.speaks and is_json:
        print_json(document_of(estimate))
    elif estimate.speaks:
        open_console().print(render(estimate))
    is_started, weights = estimate.work.is_started, estimate.weights_on_store_disk
    require_space(config.out, estimate.free_bytes, estimate.least_bytes, is_started=is_started, weights=weights)


@contextmanager
def _reported(url: str) -> Iterator[None]:
    """Print an expected error as one line; on an interrupt, report what has been kept."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with report_file_errors():
            yield
    except (HarvestError, StoreError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(f"stopped. {_what_is_kept(url)}; the same command resumes from there", err=True)
        sys.exit(130)


def _what_is_kept(url: str) -> str:
    try:
        with Store.open(url) as store:
            return f"{int(store.committed.sum())} of {store.manifest.shards} shards are committed"
    except StoreMissing:
        return "All but the last few seconds of tokenising are kept"
    except StoreError:  # the disk or the network is gone, which may be why it was stopped
        return "Committed shards are safe"


if __name__ == "__main__":
    main()
