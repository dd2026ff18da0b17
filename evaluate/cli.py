"""`sae-eval`: numbers for trained SAEs, and what could not be had, in words."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from ..cache_schema import StoreError
from ..cache_schema.allocator import keep_large_blocks
from ..harvest.errors import SettingInvalid as PlaceInvalid
from ..harvest.place import find_device
from ..train.errors import TrainError
from ..train.settings import parse_settings, with_settings
from . import evals
from .engine import Row
from .errors import EvalError, SettingInvalid
from .pictures import draw
from .progress import Watch, make_console
from .report import require_comparable, require_one_store, tell
from .scene import DtypeName
from .session import Session
from .subject import Subject
from .subjects import find_all

ALL = "all"
FAILED, NOT_RUN = 1, 3


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option(
    "--evals",
    "wanted",
    default="core",
    show_default=True,
    metavar="NAMES",
    help=f"all, or of {', '.join(evals.names())}.",
)
@click.option("--cache", metavar="URL", help="The store.  [default: the one that the run was trained on]")
@click.option("--runs", default="runs", show_default=True, metavar="DIR", help="Where runs are kept.")
@click.option("--layer", type=int, metavar="L", help="The layer of an SAE that does not say which it reads.")
@click.option("--model", metavar="NAME", help="pocket, a folder or an id.  [default: the one that made the store]")
@click.option("--dtype", type=click.Choice(get_args(DtypeName)), help="The model's.  [default: the store's]")
@click.option("--from-tokens", is_flag=True, help="Run the whole model, instead of starting from the store.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1.")
@click.option("--compare", is_flag=True, help="One table of results; evaluates only what has none yet.")
@click.option("--resume", is_flag=True, help="Skip what is done with the same settings.")
@click.option("--beside-untrained", is_flag=True, help="Also show what was recorded of an SAE that was never trained.")
@click.option("--plots/--no-plots", default=True, show_default=True, help="Pictures beside the results.")
@click.option("--set", "settings", multiple=True, metavar="EVAL.KEY=V", help="A setting, such as core.batch_windows=8.")
def main(targets: tuple[str, ...], wanted: str, settings: tuple[str, ...], runs: str, **options: Any) -> None:
    """Evaluate SAEs: TARGET is a run, a path, the folder of an SAE, or owner/name on the Hub.

    Results are JSON files beside the run. The exit status is 0 when all is done, 1 when something failed,
    3 when something could not be run for want of a model or data.
    """
    console = make_console()
    keep_large_blocks()
    with errors_told():
        configs = make_configs(wanted, settings)
        subjects, problems = find_all(targets, Path(runs), options["layer"])
        for problem in problems:
            click.echo(f"error: {problem}", err=True)
        rows = _evaluate(subjects, configs, options)
        tell(console, rows, beside_untrained=options["beside_untrained"])
        if options["plots"]:
            draw(rows, options["compare"], Watch().say)
    sys.exit(FAILED if problems else exit_code(rows))


def make_configs(wanted: str, settings: Sequence[str]) -> dict[str, Any]:
    """The evaluations asked for, with their settings."""
    names = evals.names() if wanted == ALL else tuple(dict.fromkeys(part.strip() for part in wanted.split(",")))
    given: dict[str, dict[str, Any]] = {}
    for setting in parse_settings(settings):
        head, key = setting.in_front()
        if head not in names or not key:
            raise SettingInvalid(f"expected a setting like {names[0]}.KEY=VALUE of {', '.join(names)}: {setting.key!r}")
        given.setdefault(head, {})[key] = setting.value
    return {name: with_settings(evals.config_type(name)(), given.get(name, {}), name) for name in names}


def exit_code(rows: Sequence[Row]) -> int:
    """0 all done, 1 something failed, 3 something was not run."""
    if any(row.status == "failed" for row in rows):
        return FAILED
    return 0 if all(row.is_good for row in rows) else NOT_RUN


@contextmanager
def errors_told() -> Iterator[None]:
    """Expected errors end in one message and an exit code, not in a traceback."""
    try:
        yield
    except (EvalError, TrainError, StoreError, PlaceInvalid) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        click.echo("stopped; what is done is saved, and --resume goes on from there", err=True)
        sys.exit(130)


def _evaluate(subjects: Sequence[Subject], configs: dict[str, Any], options: dict[str, Any]) -> list[Row]:
    if options["compare"]:
        require_one_store(subjects)
    session = Session(
        configs=configs,
        device=find_device(options["device"]),
        watch=Watch(),
        cache=options["cache"],
        model=options["model"],
        dtype=options["dtype"],
        from_tokens=options["from_tokens"],
        keep="any" if options["compare"] else "same" if options["resume"] else "none",
    )
    rows = session.run(subjects)
    if options["compare"]:
        require_comparable(rows)
    return rows
