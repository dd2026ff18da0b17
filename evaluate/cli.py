"""`sae-eval`: measure trained SAEs, and report what could not be measured."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..cache_schema.cli import as_json
from ..train import cli_support
from . import evals
from .evals import ALL

EXAMPLES = """\b
Examples:
  sae-eval run_1
  sae-eval run_1 --evals core,browser
  sae-eval run_1 --evals core,sparse_probing --set core.ablations=zero,mean
  sae-eval run_1 run_2 --compare
  sae-eval run_1/topk --evals all --resume
  sae-eval ./some/saelens/folder --cache ./store --layer 19
  sae-eval run_1 --json | jq '.results[].metrics'
"""


def complete_evals(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last of comma-separated names."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(before + comma + name) for name in (ALL, *evals.names()) if name.startswith(last)]


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...", shell_complete=cli_support.runs)
@click.option(
    "--evals",
    default="core",
    show_default=True,
    metavar="NAMES",
    shell_complete=complete_evals,
    help=f"all, or any of {', '.join(evals.names())}. browser makes pages that show all latents.",
)
@click.option("--cache", metavar="URL", help="The store.  [default: the one the run was trained on]")
@click.option("--runs", default=cli_support.RUNS, show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option(
    "--layer", type=click.IntRange(0), metavar="L", help="The layer that an SAE reads, if its files name none."
)
@click.option("--model", metavar="NAME", help="As for sae-harvest.  [default: the one that made the store]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Number type of the model.  [default: the store's; without a store, bfloat16]",
)
@click.option(
    "--from-tokens", is_flag=True, help="For core: run the whole model, not only the layers above the store's."
)
@click.option(
    "--massive-norms",
    metavar="X",
    help="Leave out rows whose norm is over X times the median; inf leaves out none.  "
    "[default: 10; inf if imported with --keep-massive]",
)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1.")
@click.option("--compare", is_flag=True, help="Print one table of results; evaluate only what has no complete result.")
@click.option("--resume", is_flag=True, help="Skip what is already done with the same settings.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Save plots next to the results.")
@click.option(
    "--set", multiple=True, metavar="EVAL.KEY=V", help="A setting, such as core.split=validation; a list is a,b."
)
@as_json()
def main(**words: Any) -> None:
    """Evaluate SAEs: TARGET is a run, a path, the folder of an SAE, or owner/name on the Hub.

    Results are JSON files next to the run. The exit status is 0 when all is done, 1 when something failed,
    2 for an unknown option, 3 when something was not run or is incomplete, for example because a model or
    data is missing, 130 when stopped.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        from .run.command import run  # late: --help must not wait for torch and transformers

        status = run(words, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        click.echo("stopped; finished results are saved, and --resume continues from there", err=True)
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    sys.exit(status)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
