"""What `sae-eval` does with the words of its command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...cache_schema import StoreError
from ...cache_schema.allocator import keep_large_blocks
from ...harvest.errors import HarvestError
from ...harvest.model.device import find_device
from ...train.ask.settings import parse_settings, split_key, with_settings
from ...train.errors import TrainError
from .. import evals
from ..context.loaded_sae import LoadedSae
from ..context.progress import Watch, make_console
from ..context.results import Row
from ..errors import EvalError, SettingInvalid
from ..output.pictures import draw
from .by_store import Session
from .console_table import require_comparable, require_one_store, tell
from .find_saes import find_all

ALL = "all"
FAILED, NOT_RUN = 1, 3
Complain = Callable[[str], None]


def run(
    targets: Sequence[str], wanted: str, settings: Sequence[str], runs: str, options: dict[str, Any], complain: Complain
) -> int:
    """Evaluate, print, draw; the exit status. What is wrong with one target does not stop the others."""
    keep_large_blocks()
    with errors_told(complain):
        configs = make_configs(wanted, settings)
        subjects, problems = find_all(targets, Path(runs), options["layer"])
        for problem in problems:
            complain(f"error: {problem}")
        rows = evaluate(subjects, configs, options)
        tell(make_console(), rows, beside_untrained=options["beside_untrained"])
        if options["plots"]:
            draw(rows, options["compare"], Watch().say)
        return FAILED if problems else exit_code(rows)
    return FAILED


def make_configs(wanted: str, settings: Sequence[str]) -> dict[str, Any]:
    """The evaluations asked for, with their settings."""
    names = evals.names() if wanted == ALL else tuple(dict.fromkeys(part.strip() for part in wanted.split(",")))
    given: dict[str, dict[str, Any]] = {}
    for said, value in parse_settings(settings).items():
        head, key = split_key(said)
        if head not in names or not key:
            raise SettingInvalid(f"expected a setting like {names[0]}.KEY=VALUE of {', '.join(names)}: {said!r}")
        given.setdefault(head, {})[key] = value
    return {name: with_settings(evals.load(name).config(), given.get(name, {}), name) for name in names}


def evaluate(subjects: Sequence[LoadedSae], configs: dict[str, Any], options: dict[str, Any]) -> list[Row]:
    """All that was asked for, of all SAEs that were found."""
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


def exit_code(rows: Sequence[Row]) -> int:
    """0 all done, 1 something failed, 3 something was not run."""
    if any(row.status == "failed" for row in rows):
        return FAILED
    return 0 if all(row.is_good for row in rows) else NOT_RUN


@contextmanager
def errors_told(complain: Complain) -> Iterator[None]:
    """Expected errors end in one message, not in a traceback."""
    try:
        yield
    except (EvalError, TrainError, StoreError, HarvestError) as error:
        complain(f"error: {error}")
