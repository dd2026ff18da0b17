"""What `sae-eval` does: find SAEs, match them with their stores, evaluate, print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from ...cache_schema import Store, StoreError, StoreMissing
from ...cache_schema.cli import print_json, report_file_errors
from ...cache_schema.keep_freed_memory import keep_large_blocks
from ...cache_schema.launcher_environment import count_processes
from ...cache_schema.numbers_in_words import say_size
from ...cache_schema.sites import RESID
from ...cache_schema.strict_json import flatten, nearest, to_json
from ...harvest.errors import HarvestError
from ...harvest.model.load_and_truncate import find_device
from ...harvest.progress import Watch
from ...train.cli_support import RUNS
from ...train.config.parse_settings import parse_settings, split_key, with_settings
from ...train.data.device_copies import take_device
from ...train.errors import RunInterrupted, TrainError
from .. import evals
from ..context.context import Context
from ..context.loaded_sae import LoadedSae, layers_of
from ..context.write_and_read_results import Row
from ..errors import CacheIdMismatch, EvalError, SettingInvalid, StoreGone, WidthMismatch
from ..evals.browser.browser_folder import LATENT_BYTES
from ..evals.browser.browser_folder import NAME as BROWSER
from ..model.smaller_pieces import room_for_weights, within
from ..output.pictures import draw
from .console_table import document_of, make_console, print_results, require_comparable, require_one_store
from .find_saes_to_evaluate import Absent, Problem, find_all, say_absent
from .offer_training import offer_training
from .run_evals import Keep, kept_rows, run_evals

FAILED, NOT_RUN = 1, 3  # exit statuses, if anything failed or was not run
Complain = Callable[[str], None]


def run(words: Mapping[str, Any], complain: Complain) -> int:
    """Evaluate, print and draw; return the exit status. A problem with one target does not stop the others."""
    with report_errors(complain):
        rows, problems, absent = measure(
            words, lambda problem: complain(f"error: {problem}"), may_train=is_at_terminal()
        )
        console = make_console(is_stderr=words["is_json"])
        print_results(console, rows, absent)
        if words["plots"]:
            draw(rows, words["compare"], Watch().say)
        for problem in problems if rows else ():  # repeated, as the table may have scrolled the first report away
            complain(f"error: {problem}")
        if not problems and (line := suggest_browser(rows, words)):
            console.print(line)
        if words["is_json"]:
            print_json(document_of(rows, problems, absent))
        if problems or any(row.status == "failed" for row in rows):
            return FAILED
        is_whole = all(row.is_good for row in rows) and not any(one.is_lost for one in absent)
        return 0 if is_whole else NOT_RUN
    return FAILED


def suggest_browser(rows: Sequence[Row], words: Mapping[str, Any]) -> str | None:
    """The command that makes browser pages; None if they exist, were just requested, or have no store to read."""
    if any(row.eval_id == BROWSER for row in rows):
        return None
    subjects = dict.fromkeys(row.subject for row in rows if row.document is not None)
    without_pages = [one for one in subjects if set(one.hooks) == {RESID} and not (one.home / BROWSER).is_dir()]
    ids = {url: id_of_store(url) for url in {words["cache"] or one.cache_url for one in without_pages}}
    possible = [one for one in without_pages if ids[words["cache"] or one.cache_url]]
    if not possible:
        return None
    given = [] if words["runs"] == RUNS else ["runs"]
    given += [name for name in ("cache", "layer", "model", "dtype", "massive_norms") if words[name] is not None]
    options = chain.from_iterable((f"--{name.replace('_', '-')}", str(words[name])) for name in given)
    command = shlex.join(["sae-eval", *words["targets"], *options, "--evals", "browser"])
    size = say_size(sum(subject.width for subject in possible) * LATENT_BYTES)
    return f"next: {command}    # pages that show all latents, about {size}"


def id_of_store(url: str | None) -> str | None:
    """The cache id of the store at `url`; None if it cannot be opened."""
    if url is None:
        return None
    try:
        with Store.open(url) as store:
            return store.manifest.cache_id
    except StoreError:
        return None


def is_at_terminal() -> bool:
    """Whether there is someone to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def measure(
    words: Mapping[str, Any], refuse: Callable[[Problem], None], may_train: bool = False
) -> tuple[list[Row], list[Problem], list[Absent]]:
    """The results of all targets that can be loaded, and the problems of the others. Each problem goes to `refuse` at
    once; if that raises, nothing is evaluated. With `may_train`, the user is asked whether to train a missing run."""
    if (launched := count_processes()) > 1:
        raise SettingInvalid(
            f"expected one process, found {launched}, each of which would evaluate all SAEs and write the same files: "
            "start a single one, or several separately, each with some of the SAEs (docs/cluster.md)"
        )
    session = make_session(words)  # first, so that no run is trained for options that are then refused
    if may_train:
        offer_training(words["targets"], Path(words["runs"]), words["cache"], words["device"], words["plots"])
    keep_large_blocks()
    subjects, problems, absent = find_all(words["targets"], Path(words["runs"]), words["layer"], words["cache"])
    for problem in problems:
        refuse(problem)
    for line in say_absent(absent):  # repeated with the results
        Watch().say(line)
    if words["compare"] and not words["cache"]:
        require_one_store(subjects)
    take_device(session.device)
    rows = session.run(subjects)
    if words["compare"]:
        require_comparable(rows)
    return rows, problems, absent


def make_session(words: Mapping[str, Any]) -> Session:
    device = find_device(words["device"])
    context = partial(
        Context,
        model_name=words["model"],
        dtype_name=words["dtype"],
        from_tokens=words["from_tokens"],
        massive_norms=parse_multiple(words["massive_norms"]),
        device=device,
        watch=Watch(),
    )
    keep: Keep = "any" if words["compare"] else "same" if words["resume"] else "none"
    return Session(make_configs(words["evals"], words["set"]), context, device, words["cache"], keep)


def make_configs(wanted: str, settings: Sequence[str]) -> dict[str, Any]:
    names = evals.names() if wanted == evals.ALL else tuple(dict.fromkeys(part.strip() for part in wanted.split(",")))
    defaults = {name: evals.load(name).config() for name in names}
    given: dict[str, dict[str, Any]] = {}
    for setting, value in parse_settings(settings).items():
        name, key = split_key(setting)
        if name not in names or not key:
            example = f"{names[0]}.KEY=VALUE of {', '.join(names)}"
            suggestion = nearest(setting, flatten(to_json(defaults)))
            raise SettingInvalid(f"expected a setting like {example}, found {setting!r}{suggestion}")
        given.setdefault(name, {})[key] = value
    configs = {name: with_settings(default, given.get(name, {}), name) for name, default in defaults.items()}
    for name, config in configs.items():
        evals.load(name).require(config)
    return configs


def parse_multiple(text: str | None) -> float | Literal["store's"] | None:
    """A multiple of the median norm; `inf` is None."""
    if text is None:
        return "store's"
    try:
        multiple = float(text)
    except ValueError:
        multiple = float("nan")
    if not multiple > 1:
        raise SettingInvalid(f"--massive-norms: expected a multiple of the median norm above 1, or inf, found {text}")
    return None if multiple == float("inf") else multiple


@contextmanager
def report_errors(complain: Complain) -> Iterator[None]:
    """Report an expected error as one message, without a traceback."""
    try:
        with report_file_errors():
            yield
    except RunInterrupted as stop:  # from a run that was trained on the way
        complain(str(stop))
        sys.exit(128 + stop.signal)
    except (EvalError, TrainError, StoreError, HarvestError) as error:
        complain(f"error: {error}")


@dataclass(frozen=True)
class Session:
    """The evaluations requested on the command line.

    SAEs of one store share a context: the store is opened once, and the model loaded once. SAEs that have something to
    measure are in memory together as far as there is room. A missing or wrong store fails only its own SAEs.
    """

    configs: Mapping[str, Any]
    context: Callable[[Store | None], Context]
    device: torch.device
    cache: str | None
    keep: Keep

    def run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        """Every evaluation of every SAE, evaluation by evaluation, with SAEs in the order given."""
        groups: dict[str | None, list[LoadedSae]] = {}
        for subject in subjects:
            groups.setdefault(self.cache or subject.cache_url, []).append(subject)
        rows = [row for url, group in groups.items() for row in self._run_group(url, group)]
        eval_ids, places = list(self.configs), {subject: place for place, subject in enumerate(subjects)}
        return sorted(rows, key=lambda row: (eval_ids.index(row.eval_id), places[row.subject]))

    def _run_group(self, url: str | None, subjects: Sequence[LoadedSae]) -> list[Row]:
        try:
            store = open_store(url, subjects)
        except (EvalError, StoreError) as error:
            return self._run_without_store(subjects, error)
        with nullcontext() if store is None else store:
            return self._run_fitting(self.context(store), subjects)

    def _run_without_store(self, subjects: Sequence[LoadedSae], error: Exception) -> list[Row]:
        """Run what needs no store and keep earlier results from the missing one, unless --cache named it."""
        if self.cache is not None:
            return [row for subject in subjects for row in self._fail(subject, error)]
        storeless = {name: config for name, config in self.configs.items() if not evals.load(name).needs.store}
        on_store = replace(self, configs={n: config for n, config in self.configs.items() if n not in storeless})
        context = self.context(None)
        rows = kept_rows(context, subjects, on_store.configs, self.keep)
        kept = {(row.subject, row.eval_id) for row in rows}
        failed = [row for subject in subjects for row in on_store._fail(subject, error)]
        rows += [row for row in failed if (row.subject, row.eval_id) not in kept]
        if storeless or any(row.is_good for row in rows):
            context.say(str(error))
        if storeless:
            rows += replace(self, configs=storeless)._run_group(None, subjects)
        return rows

    def _run_fitting(self, context: Context, subjects: Sequence[LoadedSae]) -> list[Row]:
        rows: list[Row] = []
        fitting = []
        for subject in subjects:
            try:
                require_fit(subject, context.opened, is_named=self.cache is not None)
            except EvalError as error:
                rows += self._fail(subject, error)
            else:
                fitting.append(subject)
        rows += (kept := kept_rows(context, fitting, self.configs, self.keep))
        done = {(row.subject, row.eval_id) for row in kept}
        pending = [subject for subject in fitting if any((subject, name) not in done for name in self.configs)]
        groups = list(within(room_for_weights(context.device), pending, lambda subject: subject.num_bytes))
        if len(groups) > 1 and BROWSER in self.configs:
            named = "; ".join(", ".join(subject.name for subject in group) for group in groups)
            context.say(f"{BROWSER}: not all SAEs fit in memory at once: counterparts are sought only within {named}")
        for group in groups:
            try:
                rows += run_evals(context, group, self.configs, kept)
            finally:
                for subject in group:
                    subject.release()
        return rows

    def _fail(self, subject: LoadedSae, error: Exception) -> list[Row]:
        return [Row(subject, eval_id, "failed", str(error)) for eval_id in self.configs]


def open_store(url: str | None, subjects: Sequence[LoadedSae]) -> Store | None:
    if url is None:
        return None
    try:
        return Store.open(url)
    except StoreMissing as error:
        name, own = subjects[0].name, subjects[0].cache_url
        if url == own:
            raise StoreGone(
                f"the store of {name} was at {url}, and is no longer there. Give its new place with --cache, or "
                "harvest it again"
            ) from error
        instead = f", or leave it out to use {own}, which {name} was trained on" if id_of_store(own) else ""
        raise StoreGone(f"there is no store at {url}, the value of --cache: correct it{instead}") from error


def require_substitute(subject: LoadedSae, store: Store, is_named: bool) -> None:
    """Require that a store the SAE was not trained on was named for it, has the same model, and has no positions that
    the SAE was not trained at. Missing layers and hooks are left to the evaluations."""
    name, revision, context = (subject.metadata.get(key) for key in ("model_name", "model_revision", "context_size"))
    manifest, model = store.manifest, store.manifest.model
    names = str(name), model.id
    if not all(one.count("/") == 1 for one in names):  # one is a folder, not owner/name: compare the last parts
        names = [one.split("/")[-1] for one in names]
    if name is None or names[0] != names[1]:
        why = f", of the model {model.id}, " + (f"not of {name}" if name else "and the SAE names no model")
    elif None not in (revision, model.revision) and revision != model.revision:
        why = f", of revision {model.revision} of {model.id}, not {revision}"
    elif isinstance(context, int) and context < manifest.context:
        why = f", whose windows have {manifest.context} tokens, more than {context}"
    elif is_named:
        return
    else:
        why = ""
    raise CacheIdMismatch(
        f"trained on the store with cache id {subject.cache_id}, found {manifest.cache_id} at {store.url}{why}. "
        "Give --cache its own store, or a store of the same model and context"
    )


def require_fit(subject: LoadedSae, store: Store | None, *, is_named: bool = False) -> None:
    """Require a store of the SAE's width: its own, as far as the SAE says, or a substitute that was named for it."""
    if store is None:
        return
    manifest = store.manifest
    depth, highest = manifest.model.num_layers, max(layers_of([subject]))
    if depth is not None and highest >= depth:
        raise WidthMismatch(
            f"{subject.name} reads or writes layer {highest}, but the model of {store.url} ({manifest.model.id}) has "
            f"{depth} layers, counted from 0"
        )
    if subject.cache_id not in (None, manifest.cache_id):  # a substitute is only for a store that is not available
        require_substitute(subject, store, is_named and id_of_store(subject.cache_url) != subject.cache_id)
    hook = subject.hooks[0]
    if hook != RESID and hook not in manifest.hooks:
        return  # the store does not keep it; evaluations that read it report that
    expected = manifest.width_of(hook) * len(subject.layers)
    if subject.d_in != expected:
        raise WidthMismatch(
            f"{subject.name} reads activations of width {subject.d_in}, but {len(subject.layers)} layers of "
            f"{store.url} ({manifest.model.id}) have {expected}: it belongs to another model"
        )
