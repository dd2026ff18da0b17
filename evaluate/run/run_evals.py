"""Run evaluations over SAEs, so that a failure in one does not cost another its result.

1. Skip what is done, if asked to; a result that cannot be read is measured again.
2. Hand all SAEs to an evaluation at once and write each result as it arrives.
3. If an evaluation raises NotRun, that is the reason for every SAE without a result so far.
4. After any other error, the SAEs without a result so far are tried one by one, so that each fails alone.
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
from ..context.evaluation_data_sets import expected_data
from ..context.loaded_sae import LoadedSae
from ..context.write_and_read_results import (
    DATA,
    MODEL,
    Failure,
    Result,
    Row,
    deciding,
    describe_differences,
    earlier_result,
    is_from_missing_store,
    is_whole,
    name_empty_metrics,
    ours_in,
    places_in,
    result_path,
    settings_in,
    standing_result,
    write_result,
)
from ..errors import EvalError, MemoryTooSmall, NotRun, ResultFromLater, ResultInvalid, SaeGone
from ..evals.browser.browser_folder import NAME as BROWSER
from ..evals.evaluation_contract import remark_of
from ..model.smaller_pieces import NO_ROOM, is_out_of_memory

BATCHES = ("batch_windows", "llm_batch_size")  # settings of how much is in memory at once

Keep = Literal["none", "same", "any"]
"""Which existing results are kept: none, those with the same settings, or all from the same SAE and store. A result
that a later saemill wrote is never overwritten."""


def kept_rows(context: Context, subjects: Sequence[LoadedSae], configs: Mapping[str, Any], keep: Keep) -> list[Row]:
    """The existing results that are kept, and those that cannot be replaced. No weights are read for this."""
    rows: list[Row] = []
    for eval_id, config in configs.items():
        settings = settings_of(context, eval_id, config)
        rows += [row for subject in subjects if (row := _kept(context, subject, eval_id, settings, keep))]
    return rows


def run_evals(
    context: Context, subjects: Sequence[LoadedSae], configs: Mapping[str, Any], kept: Collection[Row] = ()
) -> list[Row]:
    """Run every evaluation, by its id in `configs`, on every SAE that has no row of it in `kept`."""
    rows, done = list[Row](), {(row.subject, row.eval_id) for row in kept}
    for eval_id, config in configs.items():
        pending = [subject for subject in subjects if (subject, eval_id) not in done]
        if pending:
            settings = settings_of(context, eval_id, config)
            if context.from_tokens and not settings["from_tokens"]:
                context.say(f"{eval_id}: --from-tokens has no effect here, and its results say so")
            if context.massive_norms != "store's" and not evals.load(eval_id).needs.store:
                context.say(f"{eval_id}: --massive-norms has no effect here: it reads no store")
            rows += _Attempts(context, eval_id, config, settings).run(pending)
    return rows


def _kept(context: Context, subject: LoadedSae, eval_id: str, settings: Mapping[str, Any], keep: Keep) -> Row | None:
    """An existing result that is kept; the reason names the settings that differ."""
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
    settings = _with_known_data(found, settings)
    store, expected = found.get("cache_id"), settings["cache_id"] or subject.cache_id
    if settings["cache_id"] not in (None, store) or (store and expected not in (None, store)):  # from another store
        return None
    is_gone = is_from_missing_store(document, settings) and context.dtype_name in (None, found.get("dtype"))
    remark = ours_in(document).get("remark")
    if keep == "same" or is_gone:
        stands = (is_whole(document, settings) or is_gone) and evals.load(eval_id).is_there(subject)
        gone = "its result was measured on a store, and none is read now" if is_gone else None
        return Row(subject, eval_id, "kept", remark_of(gone, remark) or "", document) if stands else None
    differences, missing = describe_differences(document, settings), ours_in(document).get("missing")
    if missing and not differences:
        return None  # an incomplete result is measured again, as with --resume
    advice = "Evaluate it again without --compare to get what was asked for"
    reason = f"its result has {differences}. {advice}" if differences else ""
    if missing:
        return Row(subject, eval_id, "incomplete", f"{missing}; {reason}", document)
    return Row(subject, eval_id, "kept", remark_of(reason, remark) or "", document)


def _with_known_data(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings to judge a result by: it may record more about its data or its model than is known now, or less."""
    known = {DATA: expected_data(found.get(DATA), settings.get(DATA))}
    known[MODEL] = settings.get(MODEL, found[MODEL]) if MODEL in found else None
    return {name: value for name, value in {**settings, **known}.items() if value is not None or name not in known}


def settings_of(context: Context, eval_id: str, config: Any) -> dict[str, Any]:
    """Everything besides the SAE that a result depends on."""
    evaluation = evals.load(eval_id)
    settings = {
        "config": deciding(to_json(config)),
        "cache_id": context.opened.manifest.cache_id if context.opened else None,
        "dtype": str(context.dtype).removeprefix("torch."),
        "from_tokens": context.from_tokens and evaluation.needs.from_tokens,
    }
    if evaluation.revision != 1:  # results that name no revision have the first
        settings["revision"] = evaluation.revision
    if evals.is_own(eval_id):  # the user's own file: no commit of this package shows its changes
        settings["own_files"] = digest_of_users_files("evaluate")
    if evaluation.needs.store and (context.opened is not None or context.massive_norms != "store's"):
        settings["massive_norms"] = context.massive_multiple
    data = evaluation.data_revision(context, config)
    if data is not None:
        settings[DATA] = data
    if context.model_name is not None:
        settings["model"] = context.model_name
    if context.folder_revision is not None:
        settings[MODEL] = context.folder_revision
    return settings


def crash_path(subject: LoadedSae, eval_id: str) -> Path:
    """Where the traceback of an unexpected error is kept."""
    return result_path(subject, eval_id).with_name(f"{subject.label}_crash.txt")


class _Attempts:
    """One evaluation of several SAEs, together and, after an error, one by one."""

    def __init__(self, context: Context, eval_id: str, config: Any, settings: Mapping[str, Any]) -> None:
        self._context, self._eval_id, self._config, self._settings = context, eval_id, config, settings
        self._evaluation = evals.load(eval_id)

    def run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        refused = {subject: row for subject in subjects if (row := self._refuse(subject))}
        subjects = [subject for subject in subjects if subject not in refused]
        return [*refused.values(), *(self._run(subjects) if subjects else ())]

    def _refuse(self, subject: LoadedSae) -> Row | None:
        """Move the weights to the device; the row of an SAE on another hook, or one that cannot be read or does not fit
        there."""
        if self._evaluation.needs.residuals and set(subject.hooks) != {RESID}:
            reads, writes = subject.hooks
            reason = (
                f"it reads {reads} of layer {', '.join(map(str, subject.layers))} and rebuilds {writes}: evaluations "
                "read and replace the residual stream after a layer"
            )
            return self._not_run(subject, reason)
        device = self._context.device
        try:
            subject.to(device)
            subject.sha256  # noqa: B018  now: the files may change before a result is written
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not lose their results
            subject.release()
            if is_out_of_memory(error):
                error = MemoryTooSmall(f"it does not fit on {device}. {NO_ROOM}")
            return self._failed(subject, error)
        return None

    def _run(self, subjects: Sequence[LoadedSae]) -> list[Row]:
        """A row for each; after an error, those without one are tried one by one."""
        rows: list[Row] = []
        crash, reason = None, "the evaluation gave no result for it"
        try:
            self._evaluation.require(self._config)
            self._evaluation.needs.require(self._context)
            for item in self._evaluation.evaluate(self._context, subjects, self._config):
                rows.append(self._save(item))
        except NotRun as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  whatever it is, the others must not lose their results
            crash = error
        pending = [subject for subject in subjects if subject not in {row.subject for row in rows}]
        if crash is None:
            return rows + [self._not_run(subject, reason) for subject in pending]
        if len(pending) == len(subjects) == 1:
            return [self._failed(pending[0], crash)]
        for subject in pending:
            rows += self._run([subject])
        return rows

    def _save(self, item: Result | Failure) -> Row:
        """Write a result, unless an earlier one is more complete; one with other settings is kept as a copy."""
        if isinstance(item, Failure):
            return self._failed(item.subject, item.error)
        empty = None if item.missing else name_empty_metrics(item, self._evaluation.summary)
        item = replace(
            item,
            remark=remark_of(item.remark, empty, self._remark_of_store()),
            measured_on=remark_of(item.measured_on, self._other_store(item.subject)),
        )
        earlier, mismatch = None, ""
        with suppress(ResultInvalid):  # reported already
            earlier, mismatch = earlier_result(item.subject, self._eval_id)
        asked = _with_known_data(settings_in(earlier or {}), self._settings)
        if earlier and not mismatch and item.missing and self._eval_id != BROWSER and is_whole(earlier, asked):
            reason = f"{item.missing}. The earlier, complete result with these settings is kept"
            return Row(item.subject, self._eval_id, "kept", reason, earlier)
        path, copy = result_path(item.subject, self._eval_id), None
        replaced = f"of {mismatch}" if mismatch else ""
        if earlier and not (mismatch or self._completes(earlier)):
            differences = describe_differences(earlier, asked)
            replaced = f"with {differences}" if differences else ""
        try:
            if earlier and replaced and self._eval_id != BROWSER:  # its store, its model or its weights may be gone
                of = {"sha256": ours_in(earlier).get("sha256"), "places": places_in(earlier)}
                copy = path.with_suffix(f".{decided_by(**settings_in(earlier), **of)}.json")
                shutil.copyfile(path, copy)
            document = write_result(item, self._eval_id, self._settings)
        except SaeGone as error:
            return self._failed(item.subject, error)
        except OSError as error:  # a disk error is no reason to measure anything again
            if copy is not None:
                with suppress(OSError):
                    copy.unlink()
            reason = f"its result could not be written to {path} ({error}): free some space, then --resume"
            return Row(item.subject, self._eval_id, "failed", reason)
        crash_path(item.subject, self._eval_id).unlink(missing_ok=True)  # from an earlier attempt
        fate = f". Its earlier result {replaced} is now {copy}" if copy else f", replacing one {replaced}"
        self._context.say(f"{self._eval_id}: {item.subject.name} done{fate if replaced else ''}")
        if item.missing:
            return Row(item.subject, self._eval_id, "incomplete", item.missing, document)
        return Row(item.subject, self._eval_id, "done", item.remark or "", document)

    def _completes(self, earlier: Mapping[str, Any]) -> bool:
        """Whether an earlier result is incomplete, and differs only in that no model was named."""
        of_model = ("model", MODEL)
        is_same = {name: v for name, v in self._settings.items() if name not in of_model} == settings_in(earlier)
        return is_same and ours_in(earlier).get("missing") is not None

    def _remark_of_store(self) -> str | None:
        """The remark on results read from a store whose activations are not exactly the model's."""
        opened, needs = self._context.opened, self._evaluation.needs
        if not needs.store or needs.tokens_only or opened is None or opened.manifest.stored_as is None:
            return None
        remark = f"the store keeps activations as {opened.manifest.stored_as}, which only approximate the model's own"
        if self._settings["from_tokens"]:
            return f"{remark}; here they are recomputed from tokens"
        return f"{remark}; --from-tokens recomputes them" if needs.from_tokens else remark

    def _other_store(self, subject: LoadedSae) -> str | None:
        """A note on results measured on another store than the one their SAE was trained on."""
        opened = self._context.opened
        if opened is None or not self._evaluation.needs.store or subject.cache_id in (None, opened.manifest.cache_id):
            return None
        return f"on the store with cache id {opened.manifest.cache_id}, trained on another one ({subject.cache_id})"

    def _not_run(self, subject: LoadedSae, reason: str) -> Row:
        return Row(subject, self._eval_id, "not run", reason)

    def _failed(self, subject: LoadedSae, error: Exception) -> Row:
        """A row for the table; the traceback of an unexpected error is kept next to the results."""
        if isinstance(error, NotRun):
            return self._not_run(subject, str(error))
        if isinstance(error, (EvalError, StoreError, TrainError, HarvestError)):
            return Row(subject, self._eval_id, "failed", str(error))
        if is_out_of_memory(error):
            return Row(subject, self._eval_id, "failed", self._no_room(error))
        path, summary = crash_path(subject, self._eval_id), f"{type(error).__name__}: {error}"
        try:
            subject.make_home()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except SaeGone as gone:
            return Row(subject, self._eval_id, "failed", str(gone))
        except OSError as obstacle:  # a full or read-only disk, which may be the very error
            return Row(subject, self._eval_id, "failed", f"{summary} (its traceback cannot be saved: {obstacle})")
        return Row(subject, self._eval_id, "failed", f"{summary} (traceback in {path})")

    def _no_room(self, error: Exception) -> str:
        """What failed and what to do: most evaluations have a setting for the batch size."""
        sizes = {field.name: getattr(self._config, field.name) for field in fields(self._config)}
        smaller = [f"{self._eval_id}.{name}=N, less than {sizes[name]}" for name in BATCHES if sizes.get(name, 1) > 1]
        caveat = ", which changes its numbers, since it trains on them" if "learning_rate" in sizes else ""
        advice = "".join(f"Make batches smaller with --set {setting}{caveat}. " for setting in smaller)
        return f"out of memory ({first_line(error)}). {advice}{NO_ROOM}"
