"""`sae-train`: from command-line options to a run, and from its results to console output."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from ..cache_schema.cli import as_json, open_console, print_json, read_count
from ..cache_schema.numbers_in_words import counted
from ..cache_schema.strict_json import to_json
from . import cli_support
from .cli_support import report_errors
from .config.recipe import studies
from .errors import TrainingDiverged
from .kit.variant_registry import names

if TYPE_CHECKING:
    from .run.validate_and_save_results import Outcome

EXAMPLES = """\b
Examples:
  sae-train --variant topk --cache ./store
  sae-train --variant topk --variant jumprelu --cache ./store --epochs 2
  sae-train --variant topk --grid k=16,32,64 --cache ./store --epochs 2
  sae-train --variant crosscoder --set layers=18,19 --cache ./two    # of sae-harvest --resid-layers 18..19
  sae-train --variant topk --grid seed=0,1,2 --set course.trackers=wandb --cache ./store
  sae-train --recipe attention/run_4 --cache ./store --name attention_run_4
  sae-train --variant topk --width 65536 --cache ./store --dry-run
  sae-train --resume run_1
  torchrun --nproc-per-node 8 --no-python sae-train --spread --variant topk --grid k=16,32,64 --cache ./store
"""


def count(_: click.Context | None, option: click.Parameter, text: str | None) -> int | None:
    """Parse a count: `50M`, `16k` or plain digits."""
    if text is None:
        return None
    may_be_fleet = option.name != "tokens" and "," in text  # `--k 16,128` is for two SAEs, not 16 thousand latents
    value = None if may_be_fleet else read_count(text)
    if value is None:
        advice = f": for a fleet, give --grid {option.name}={text}" if may_be_fleet else ""
        raise click.BadParameter(f"expected a number like 50M, 16k or 4096, found {text!r}{advice}")
    return value


class NamesElsewhere(click.Command):
    """Answers another library's name of a setting with the option, or the setting, that it is here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from .config.run_config import NAMES_ELSEWHERE

            here = NAMES_ELSEWHERE.get(error.option_name.lstrip("-").replace("-", "_"))
            if here is None:
                raise
            own = here.rpartition(".")[2]
            said = f"--{own}" if own in {option.name for option in self.params} else f"--set {here}=VALUE"
            message = f"No such option {error.option_name!r} (here it is {said})"
            raise click.NoSuchOption(error.option_name, message, ctx=error.ctx) from None


@click.command(
    cls=NamesElsewhere,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--variant",
    multiple=True,
    shell_complete=cli_support.variants,
    help=f"The kind of SAE; repeat it for a fleet. One of: {', '.join(names())}.",
)
@click.option(
    "--recipe",
    metavar="STUDY[/RUN]",
    shell_complete=cli_support.recipes,
    help=f"A run of a study, or all runs of it. Studies: {', '.join(studies())}.",
)
@click.option("--cache", metavar="URL", help="The store: a path, or any fsspec URL such as s3://bucket/store.")
@click.option("--out", default=cli_support.RUNS, show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option("--name", metavar="NAME", help="Name of the run.  [default: run_N, the next free number]")
@click.option("--tokens", callback=count, metavar="N", help="Tokens to train on, such as 50M.")
@click.option("--epochs", type=click.IntRange(1), metavar="N", help="How many times the store may be read.")
@click.option("--layer", type=int, metavar="L", help="The layer to train on.  [default: 19, or the store's only layer]")
@click.option(
    "--width",
    callback=count,
    metavar="F",
    help="Number of latents.  [default: the variant's, at most 16 times the residual width]",
)
@click.option("--k", callback=count, metavar="K", help="Active latents per token, for variants that fix this number.")
@click.option("--lr", type=float, metavar="X", help="Peak learning rate.  [default: the variant's own]")
@click.option(
    "--seed",
    type=int,
    metavar="N",
    help="Seed of the SAE (for several: --grid seed=0,1). The order of the data has its own seed, data.seed.",
)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--spread",
    is_flag=True,
    help="With several processes (torchrun, accelerate launch), each trains some of the SAEs, and reads only their "
    "layers, instead of all SAEs on part of every batch.",
)
@click.option(
    "--set",
    multiple=True,
    metavar="A.B=V",
    help="Any other setting, such as optim.beta1=0; write a list as a,b. If repeated, the last value counts.",
)
@click.option("--grid", multiple=True, metavar="A=V,V", help="An SAE for each value, such as k=16,32,64.")
@click.option(
    "--init",
    metavar="SAE",
    shell_complete=cli_support.runs,
    help="Start from a trained SAE: a run, a folder (of SAELens, dictionary_learning, sparsify or Gemma Scope), or "
    "owner/name on the Hub.",
)
@click.option(
    "--with-baselines",
    is_flag=True,
    help="Also train sanity baselines: decoder frozen, nearly frozen, encoder frozen, principal components.",
)
@click.option(
    "--resume", metavar="NAME", shell_complete=cli_support.runs, help="Resume a run from its last checkpoint."
)
@click.option(
    "--plots/--no-plots",
    default=True,
    show_default=True,
    help="Write a page about the run while it trains, and plots at the end.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Check everything, time a few steps, report what the run would do and need, and write nothing.",
)
@as_json()
def main(*, plots: bool, is_json: bool, is_dry_run: bool, device: str, spread: bool, **options: Any) -> None:
    """Train sparse autoencoders from a store of activations.

    Several --variant, or a --grid, train side by side from one read of the store; each gets the bits it
    would have had alone.
    """
    console = open_console(stderr=is_json, highlight=False, soft_wrap=True, markup=False)
    with report_errors():
        from .train_runs import open_process, train_all  # late: --help and completion must not wait for torch

        if is_dry_run:
            _estimate(options, is_json, device, spread)
            return
        outcomes = []
        with open_process(device, console, spread, is_watched=plots) as process:
            for outcome in train_all(options, process):
                outcomes.append(outcome)
                print_results(console, outcome, plots)
        if is_json and process.is_first:
            print_json(document_of(outcomes))
        if diverged := [outcome.say_diverged() for outcome in outcomes if outcome.diverged]:
            raise TrainingDiverged("\n".join(diverged))


def _estimate(options: dict[str, Any], is_json: bool, device: str, spread: bool) -> None:
    from .dry_run import document_of, dry_run, render
    from .train_runs import open_process

    console, estimates = open_console(stderr=is_json, highlight=False), []
    with open_process(device, console, spread) as process:
        for estimate in dry_run(options, process):
            estimates.append(estimate)
            if process.is_first and not is_json:
                console.print(render(estimate))
    if is_json and process.is_first:
        print_json(document_of(estimates))


def document_of(outcomes: list[Outcome]) -> dict[str, Any]:
    """For scripts: the runs as in their result.json, and their folders."""
    return {"runs": [{"folder": str(folder_of(outcome)), **to_json(outcome)} for outcome in outcomes]}


def print_results(console: Console, outcome: Outcome, plots: bool) -> None:
    """Print the results, where they are and the next command."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("SAE", no_wrap=True)
    has_massive = any(sae.validation_massive for sae in outcome.saes.values())
    for column in ("width", "L0", "EV", *(["EV with massive rows"] if has_massive else []), "dead"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, sae in outcome.saes.items():
        cells = [str(sae.width), f"{sae.l0:.1f}", four_digits(sae.explained_variance)]
        if has_massive:
            every = sae.explained_variance_with_massive
            cells.append(four_digits(sae.explained_variance if every is None else every))
        table.add_row(label, *cells, f"{sae.dead_latents} ({sae.dead_share:.1%})")
    console.print(table)
    held_out = outcome.say_held_out()
    console.print(f"L0 and EV (explained variance) are measured on {held_out}; progress lines show a batch's")
    for line in warnings_of(outcome):
        console.print(line, style="yellow")
    console.print(
        f"{counted(outcome.steps, 'step')}, {outcome.tokens:,} tokens in {outcome.seconds:.0f} s: "
        f"{outcome.tokens_per_second:,.0f} tokens/s, {outcome.waiting_share:.1%} of the time waiting for data"
    )
    console.print(
        f"shuffling: {100 * outcome.same_document_share:.3g}% of pairs in a batch share a document, "
        f"ideally {100 * outcome.same_document_ideal:.3g}% (ratio {outcome.same_document_ratio:.2f})"
    )
    for sae in outcome.saes.values():
        console.print(f"saved: {sae.folder}")
    if plots:
        from .run.after_run import after_run

        after_run(folder_of(outcome), console.print)
    folder = folder_of(outcome)
    # sae-eval finds a run by name only in the default folder.
    name = outcome.run if folder == Path(cli_support.RUNS, outcome.run) else str(folder)
    console.print(f"next: sae-eval {shlex.quote(name)}")


def four_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def warnings_of(outcome: Outcome) -> list[str]:
    """Warnings that the table alone would not make clear."""
    explained = {label: sae.explained_variance for label, sae in outcome.saes.items()}
    alike = [label for label, share in explained.items() if share is None]
    poor = [label for label, share in explained.items() if share is not None and not share > 0]
    labels_by_warning = {
        "rows of the validation split are all alike: there is no variance to explain. "
        "Measure on more of it with --set course.validation_tokens, or on other text": alike,
        "activations of the validation split are reconstructed no better than by their mean. "
        "Train on more --tokens, or with a higher --lr or a smaller --width": poor,
    }
    return [f"warning: {', '.join(labels)}: {text}" for text, labels in labels_by_warning.items() if labels]


def folder_of(outcome: Outcome) -> Path:
    return Path(next(iter(outcome.saes.values())).folder).parent


if __name__ == "__main__":
    main()
