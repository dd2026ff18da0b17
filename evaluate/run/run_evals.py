"""Run evaluations over SAEs, so that a failure in one does not cost another its result.

1. Skip what is done, if asked to; a result that cannot be read is measured again.
2. Hand all SAEs to an evaluation at once and write each result as it comes.
3. If an evaluation raises NotRun, that is the reason for every SAE that has no result yet.
4. After any other error, the SAEs that have no result yet are tried one by one, so that each fails alone.
"""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from ...cache_schema import StoreError
from ...cache_schema.numbers_in_words import first_line
from ...cache_schema.sites import RESID
from ...cache_schema.strict_json import to_json
from ...cache_schema.users_own_files import digest_of_users_files
from ...harvest.errors import HarvestError
from ...train.errors import TrainError
from .. import evals
from ..context.context import Context
from ..context.disk_cache import decided_by
from ..context.evaluation_data_sets import data_meant
from ..context.loaded_sae import LoadedSae
from ..context.write_and_read_results import (
    DATA,
    Failure,
    Result,
    Row,
    deciding,
    describe_differences,
    earlier_result,
    is_of_store_now_gone,
    is_whole,
    ours_in,
    places_in,
    result_path,
    settings_in,
    standing_result,
    tell_no_number,
    write_result,
)
from ..errors import EvalError, MemoryTooSmall, NotRun, ResultFromLater, ResultInvalid, SaeGone
from ..evals.browser.browser_folder import NAME as BROWSER
from ..evals.evaluation_contract import remark_of
from ..model.smaller_pieces import NO_ROOM, is_out_of_memory

BATCHES = ("batch_windows", "llm_batch_size")  # settings of how much is in memory at once

Keep = Literal["none", "same", "any"]
"""Which existing results are kept: none, those with the same settings, or all of the same SAE and store. One that a
later saemill wrote is never overwritten."""


def kept_rows(context: Context, subjects: Sequence[LoadedSae], configs: Mapping[str, Any], keep: Keep) -> list[Row]:
    """The existing results that are kept, and those that cannot be replaced. No weights are read for them."""
    rows: list[Row] = []
    for eval_id, config in configs.items():
        settings = settings_of(context, eval_id, config)
        rows += [row for subject in subjects if (row := _kept(context, subject, eval_id, settings, keep))]
    return rows


def run_evals(
    context: Context, subjects: Sequence[LoadedSae], configs: Mapping[str, Any], kept: Collection[Row] = ()
) -> list[Row]:
    """Run every evaluation on every SAE that has no kept row of it; configs are by the evaluations' ids."""
    rows, known = list[Row](), {(row.subject, row.eval_id) for row in kept}
    for eval_id, config in configs.items():
        pending = [subject for subject in subjects if (subject, eval_id) not in known]
        if pending:
            settings = settings_of(context, eval_id, config)
            if context.from_tokens and not settings["from_tokens"]:
                context.say(f"{eval_id}: --from-tokens has no effect here, and its results say so")
            if context.massive_norms != "store's" and not evals.load(eval_id).needs.store:
                context.say(f"{eval_id}: --massive-norms has no effect here: it reads no store")
            rows += _Attempts(context, eval_id, config, settings).run(pending)
    return rows


def _kept(context: Context, subject: LoadedSae, eval_id: str, settings: Mapping[str, Any], keep: Keep) -> Row | None:
    """An existing result that is kept; the reason says which of its settings differ."""
    try:
        document = standing_result(subject, eval_id)
    except ResultFromLater as error:
        return Row(subject, eval_id, "failed", str(error))
    except ResultInvalid as error:  # counts as none, so that no other SAE loses its result
        context.say(f"{eval_id}: {error}. It is now measured again for {subject.name}")
        return None
    if keep == "none" or document is None:
        return None
    found = settings_in(document)
    settings = _as_meant(found, settings)
    store, meant = found.get("cache_id"), settings["cache_id"] or subject.cache_id
    if settings["cache_id"] not in (None, store) or (store and meant not in (None, store)):  # measured on another store
        return None
    is_gone = is_of_store_now_gone(document, settings) and context.dtype_name in (None, found.get("dtype"))
    remark = ours_in(document).get("remark")
    if keep == "same" or is_gone:
        stands = (is_whole(document, settings) or is_gone) and evals.load(eval_id).is_there(subject)
        gone = "its result was measured on a store, and none is read now" if is_gone else None
        return Row(subject, eval_id, "kept", remark_of(gone, remark) or "", document) if stands else None
    other, missing = describe_differences(document, settings), ours_in(document).get("missing")
    if missing and not other:
        return None  # an incomplete result is measured again, as by --resume
    reason = f"its result has {other}. Evaluate it again without --compare to get what was asked for" if other else ""
    if missing:
        return Row(subject, eval_id, "incomplete", f"{missing}; {reason}", document)
    return Row(subject, eval_id, "kept", remark_of(reason, remark) or "", document)


def _as_meant(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to judge a result by: it may record more about its data than is known now, or less."""
    data = data_meant(found.get(DATA), settings.get(DATA))
    return {name: value for name, value in {**settings, DATA: data}.items() if value is not None or name != DATA}


def settings_of(context: Context, eval_id: str, config: Any) -> dict[str, Any]:
    """Everything besides the SAE that decides a result."""
    evaluation = evals.load(eval_id)
    settings = {
        "config": deciding(to_json(config)),
        "cache_id": context.opened.manifest.cache_id if context.opened else None,
        "dtype": str(context.dtype).removeprefix("torch."),
        "from_tokens": context.from_tokens and evaluation.needs.from_tokens,
    }
    if evaluation.revision != 1:  # results from before there were revisions are of the first
        settings["revision"] = evaluation.revision
    if evals.is_own(eval_id):  # no commit of this package shows its changes
        settings["own_files"] = digest_of_users_files("evaluate")
    if evaluation.needs.store and (context.opened is not None or context.massive_norms != "store's"):
        settings["massive_norms"] = context.massive_multiple
    data = evaluation.data_revision(context, config)
    if data is not None:
        settings[DATA] = data
    return settings if context.model_name is None else settings | {"model": context.model_name}


def crash_path(subject: LoadedSae, eval_id: str) -> Path:
    """Where the traceback of an unexpected error is kept."""
    return result_path(subject, eval_id).with_name(f"{subject.label}_crash.txt")


def _why_apart(subject: LoadedSae) -> str:
    reads, writes = subject.hooks
    return (
        f"it reads {reads} of layer {', '.join(map(str, subject.layers))} and rebuilds {writes}: evaluations read and "
        "replace the residual stream after a layer"
    )


class _Attempts:
    def __init__(self, context: Context, eval_id: str, config: Any, settings: Mapping[str, Any]) -> None:
        self._context, self._eval_id, self._config, self._settings = context, eval_id, config, settings
        self._evaluation = evals.load(eval_id)

    def run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        is_for_all = not self._evaluation.needs.residuals
        apart = [subject for subject in subjects if not (is_for_all or set(subject.hooks) == {RESID})]
        rows = [self._not_run(subject, _why_apart(subject)) for subject in apart]
        rows += [row for subject in subjects if subject not in apart and (row := self._load(subject))]
        refused = {row.subject for row in rows}
        subjects = [subject for subject in subjects if subject not in refused]
        return rows + (self._run(subjects) if subjects else [])

    def _load(self, subject: LoadedSae) -> Row | None:
        """Have the weights on the device; the row of an SAE that cannot be read, or does not fit there."""
        device = self._context.device
        try:
            subject.to(device)
            subject.sha256  # noqa: B018  of what was read, even if the files change before a result is written
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not lose their results
            subject.release()
            if is_out_of_memory(error):
                error = MemoryTooSmall(f"it does not fit on {device}. {NO_ROOM}")
            return self._failed(subject, error)
        return None

    def _run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        """A row for each; where an error ends the evaluation of several, those without one are tried one by one."""
        rows: list[Row] = []
        crash, reason = None, "the evaluation gave no result for it"
        try:
            self._evaluation.require(self._config)
            self._evaluation.needs.require(self._context)
            for item in self._evaluation.evaluate(self._context, subjects, self._config):
                rows.append(self._take(item))
        except NotRun as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not lose their results
            crash = error
        owed = [subject for subject in subjects if subject not in {row.subject for row in rows}]
        if crash is None:
            return rows + [self._not_run(subject, reason) for subject in owed]
        if len(owed) == 1 and len(subjects) == 1:
            return [self._failed(owed[0], crash)]
        for subject in owed:
            rows += self._run([subject])
        return rows

    def _take(self, item: Result | Failure) -> Row:
        if isinstance(item, Failure):
            if isinstance(item.error, NotRun):
                return self._not_run(item.subject, str(item.error))
            return self._failed(item.subject, item.error)
        empty = None if item.missing else tell_no_number(item, self._evaluation.summary)
        item = replace(item, remark=remark_of(item.remark, empty, self._remark_of_store()))
        other = self._other_store(item.subject)
        item = replace(item, measured_on=remark_of(item.measured_on, other))
        before, of_other = None, ""
        with suppress(ResultInvalid):  # reported already
            before, of_other = earlier_result(item.subject, self._eval_id)
        if before and not of_other and item.missing and self._eval_id != BROWSER and is_whole(before, self._settings):
            reason = f"{item.missing}. The earlier, complete result with these settings is kept"
            return Row(item.subject, self._eval_id, "kept", reason, before)
        place, aside = result_path(item.subject, self._eval_id), None
        replaced = f"of {of_other}" if of_other else ""
        if before and not (of_other or self._completes(before)):
            differences = describe_differences(before, _as_meant(settings_in(before), self._settings))
            replaced = f"with {differences}" if differences else ""
        try:
            if before and replaced and self._eval_id != BROWSER:  # its store, its model or its weights may be gone
                of = {"sha256": ours_in(before).get("sha256"), "places": places_in(before)}
                aside = place.with_suffix(f".{decided_by(**settings_in(before), **of)}.json")
                shutil.copyfile(place, aside)
            document = write_result(item, self._eval_id, self._settings)
        except SaeGone as error:
            return self._failed(item.subject, error)
        except OSError as error:  # a disk error is no reason to measure anything again
            if aside is not None:
                with suppress(OSError):
                    aside.unlink()
            said = f"its result could not be written to {place} ({error}): free some space, then --resume"
            return Row(item.subject, self._eval_id, "failed", said)
        crash_path(item.subject, self._eval_id).unlink(missing_ok=True)  # from an earlier attempt
        before_it = f". Its result {replaced} is now {aside}" if aside else f", replacing one {replaced}"
        self._context.say(f"{self._eval_id}: {item.subject.name} done{before_it if replaced else ''}")
        if item.missing:
            return Row(item.subject, self._eval_id, "incomplete", item.missing, document)
        return Row(item.subject, self._eval_id, "done", item.remark or "", document)

    def _completes(self, before: Mapping[str, Any]) -> bool:
        """Whether the new result completes an earlier one for which a model was missing that is named now."""
        same = {name: value for name, value in self._settings.items() if name != "model"} == settings_in(before)
        return same and ours_in(before).get("missing") is not None

    def _remark_of_store(self) -> str | None:
        """What a result says if it was read from a store whose activations are not exactly the model's."""
        opened, needs = self._context.opened, self._evaluation.needs
        if not needs.store or needs.tokens_only or opened is None or opened.manifest.stored_as is None:
            return None
        said = f"the store keeps activations as {opened.manifest.stored_as}: they are the model's own only nearly"
        if self._settings["from_tokens"]:
            return f"{said}; here they are computed anew from tokens"
        return f"{said}; --from-tokens computes them anew" if needs.from_tokens else said

    def _other_store(self, subject: LoadedSae) -> str | None:
        """What a result says if it was measured on another store than its SAE was trained on."""
        opened = self._context.opened
        if opened is None or not self._evaluation.needs.store or subject.cache_id in (None, opened.manifest.cache_id):
            return None
        return f"on the store with cache id {opened.manifest.cache_id}, trained on another one ({subject.cache_id})"

    def _not_run(self, subject: LoadedSae, reason: str) -> Row:
        return Row(subject, self._eval_id, "not run", reason)

    def _failed(self, subject: LoadedSae, error: Exception) -> Row:
        """A row for the table; the traceback of an unexpected error is kept next to the results."""
        if isinstance(error, (EvalError, StoreError, TrainError, HarvestError)):
            return Row(subject, self._eval_id, "failed", str(error))
        if is_out_of_memory(error):
            return Row(subject, self._eval_id, "failed", self._no_room(error))
        path, said = crash_path(subject, self._eval_id), f"{type(error).__name__}: {error}"
        try:
            subject.make_home()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except SaeGone as gone:
            return Row(subject, self._eval_id, "failed", str(gone))
        except OSError as obstacle:  # a full or read-only disk, which may be the very error
            return Row(subject, self._eval_id, "failed", f"{said} (its traceback cannot be saved: {obstacle})")
        return Row(subject, self._eval_id, "failed", f"{said} (traceback in {path})")

    def _no_room(self, error: Exception) -> str:
        """What failed and what to do: most evaluations have a setting for the batch size."""
        sizes = {field.name: getattr(self._config, field.name) for field in fields(self._config)}
        smaller = [f"{self._eval_id}.{name}=N, less than {sizes[name]}" for name in BATCHES if sizes.get(name, 1) > 1]
        learns = ", which changes its numbers, since it trains on them" if "learning_rate" in sizes else ""
        advice = "".join(f"Make batches smaller with --set {setting}{learns}. " for setting in smaller)
        return f"out of memory ({first_line(error)}). {advice}{NO_ROOM}"
