"""What the commands have in common: how an expected error ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..cache_schema import StoreError
from .errors import RunInterrupted, TrainError


@contextmanager
def tell_errors() -> Iterator[None]:
    """Expected errors end in one message and an exit code, not in a traceback."""
    try:
        yield
    except RunInterrupted as stop:
        click.echo(str(stop), err=True)
        sys.exit(128 + stop.signal)
    except (TrainError, StoreError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
