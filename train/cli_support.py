"""Shared by the commands: handling of expected errors, and shell completion. Does not import torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import click
from click.shell_completion import CompletionItem

from ..cache_schema import StoreError
from ..cache_schema.cli import report_file_errors
from .config.recipe import runs_of, studies
from .errors import RunInterrupted, TrainError
from .kit.variant_registry import names
from .run.run_folder import RUNS, run_names


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn expected errors into one message and an exit code instead of a traceback."""
    try:
        with report_file_errors():
            yield
    except RunInterrupted as stop:
        with suppress(OSError):  # its terminal is closed
            click.echo(str(stop), err=True)
        sys.exit(128 + stop.signal)
    except (TrainError, StoreError) as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(1) from error  # a study continues after some of them
    except KeyboardInterrupt:
        sys.exit(130)


def beginning_with(incomplete: str, words: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def variants(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return beginning_with(incomplete, names())


def recipes(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Studies, and the runs of each."""
    found = [word for study in studies() for word in (study, *(f"{study}/{run.name}" for run in runs_of(study)))]
    return beginning_with(incomplete, found)


def runs(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs in the folder that the command names, and folders: an SAE may be anywhere."""
    root = context.params.get("runs") or context.params.get("out") or RUNS
    found = beginning_with(incomplete, run_names(root))
    return found or [CompletionItem(incomplete, type="dir")]
