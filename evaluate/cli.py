"""`sae-eval`: not built yet, and honest about it."""

from __future__ import annotations

import sys

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True})
@click.argument("runs", nargs=-1, type=click.UNPROCESSED)
def main(runs: tuple[str, ...]) -> None:
    """Evaluate trained SAEs. This release cannot: it evaluates nothing and writes nothing."""
    click.echo(
        "sae-eval: evaluation is not part of this release, nothing was evaluated. "
        "`sae-train` prints explained variance, L0 and dead latents on the validation split; "
        "`saemill.train.load_sae(folder)` gives the SAE to your own code",
        err=True,
    )
    sys.exit(2)
