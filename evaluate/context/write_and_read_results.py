"""Results: what an evaluation found about one SAE, as JSON in SAEBench's layout, next to the run.

<home>/evals/<evaluation>/<label>_eval_results.json, where home is the run's folder, the SAE's own, or
runs/hub/OWNER--NAME.
Keys and their order are those of SAEBench 0.6.0; ours follow, under `saemill` and from `extra`. JSON has no NaN:
official metrics have -1 instead, as in SAEBench, our own have null.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...cache_schema.numbers_in_words import counted
from ...cache_schema.sites import RESID, SAE_LENS_NAMES
from ...cache_schema.strict_json import flatten
from ...train.disk.atomic_files import replace_file
from ...train.disk.sae_lens_folder import SAELENS_VERSION
from ...train.run.find_and_load_sae import list_saes
from ...train.run.init_from_trained_sae import files_of, source_of
from ...train.run.process import describe_hardware
from ...train.run.run_folder import provenance
from ..errors import ResultFromLater, ResultInvalid
from .loaded_sae import LoadedSae

RESULTS = "_eval_results.json"  # after an SAE's label
FORMAT = 1  # of our part of a result, which does not name it until there is another
DATA = "data_revision"  # among a result's settings: which text, if neither other settings nor the store determine it
MODEL = "model_revision"  # the same for the model, if it is in a folder that the user named
MOST_REMARKS = 6  # in one place
INTERVALS = "saemill_metrics.confidence_95"  # where core's results have theirs
REACH = "\N{PLUS-MINUS SIGN}"
DETAILS = "eval_result_details"
NO_DETAILS = f'\n  "{DETAILS}": []'
DETAILS_BEGIN, DETAILS_END = f'\n  "{DETAILS}": [\n'.encode(), b"\n  ]"
MOST_PLACES = 6  # of a number and its interval
UNMEASURED = -1  # what SAEBench writes where there is no number


@dataclass(frozen=True)
class Result:
    """What one evaluation found about one SAE."""

    subject: LoadedSae
    eval_config: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    details: Sequence[Mapping[str, Any]] = ()
    unstructured: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Our own top-level keys."""
    missing: str | None = None
    """What is needed for the numbers that are absent; None: nothing is."""
    remark: str | None = None
    """Why this SAE cannot have some of the numbers."""
    measured_on: str | None = None
    """Which text, and how much of it, in words."""


@dataclass(frozen=True)
class Failure:
    """An evaluation could not be done for one SAE."""

    subject: LoadedSae
    error: Exception


def result_path(subject: LoadedSae, eval_id: str) -> Path:
    return subject.home / "evals" / eval_id / f"{subject.label}{RESULTS}"


def write_result(result: Result, eval_id: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write a result atomically; return it as `read_result` reads it. `settings`: all it depends on besides the SAE."""
    path = result_path(result.subject, eval_id)
    result.subject.require_unchanged()
    result.subject.make_home()
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = frame(result, eval_id, settings)
    text = json.dumps(whole | {DETAILS: []}, indent=2, allow_nan=False)
    document = json.loads(text)
    each = ",\n    ".join(json.dumps(one, allow_nan=False) for one in whole[DETAILS])
    if each:  # one line per detail: indenting them would take json much longer, and more of the disk
        before, after = text.split(NO_DETAILS)  # the only one: deeper keys have a larger indent
        text = f'{before}\n  "{DETAILS}": [\n    {each}\n  ]{after}'
    replace_file(path, text.encode() + b"\n")
    return _without_details(document)


def frame(result: Result, eval_id: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The whole document of a result, in SAEBench's layout."""
    subject = result.subject
    return {
        "eval_type_id": eval_id,
        "eval_config": dict(result.eval_config),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": without_nan(result.metrics, UNMEASURED),
        DETAILS: without_nan(result.details, UNMEASURED),
        "sae_bench_commit_hash": "Unknown",
        "sae_lens_id": subject.label,
        "sae_lens_release_id": subject.run or subject.folder.name,
        "sae_lens_version": SAELENS_VERSION,
        "sae_cfg_dict": without_nan(sae_config(subject), None),
        "eval_result_unstructured": without_nan(result.unstructured, UNMEASURED),
        **without_nan(result.extra, None),
        "saemill": {
            "settings": dict(settings),
            "cache_id": settings.get("cache_id"),
            "run": subject.run,
            "label": subject.label,
            "variant": subject.variant,
            "sha256": subject.sha256,
            "missing": result.missing,
            "remark": result.remark,
            "measured_on": result.measured_on,
            "provenance": provenance(describe_hardware(subject.sae.b_dec.device)),
        },
    }


def sae_config(subject: LoadedSae) -> dict[str, Any]:
    """cfg.json with the entries that SAEBench's tools look for at its top level."""
    metadata = subject.metadata
    hook = metadata.get("hook_name") or f"blocks.{subject.layers[-1]}.{SAE_LENS_NAMES[subject.hooks[0]]}"
    return {
        **subject.config,
        "model_name": metadata.get("model_name", subject.config.get("model_name")),
        "d_in": subject.d_in,
        "d_sae": subject.width,
        "hook_layer": subject.layers[-1],
        "hook_name": hook,
        "context_size": metadata.get("context_size", subject.config.get("context_size")),
        "training_tokens": metadata.get("training_tokens", -1),
    }


def read_result(path: Path) -> dict[str, Any]:
    """A document without its details: core's are one object for each latent, and nothing reads them."""
    try:
        found = json.loads(_cut_details(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ResultInvalid(f"{path} is damaged ({error}): remove it and evaluate again") from None
    ours: Any = found.get("saemill", {}) if isinstance(found, dict) else None  # SAEBench's own have none
    is_result = isinstance(ours, dict) and "eval_result_metrics" in found
    if not is_result or not isinstance(ours.get("settings", {}), dict):
        raise ResultInvalid(f"{path} is not a results file: remove it and evaluate again")
    if ours.get("format", FORMAT) != FORMAT:
        raise ResultFromLater(f"{path} was written by a later saemill: update, or remove it and evaluate again")
    return _without_details(found)


def _cut_details(text: bytes) -> bytes:
    """A results file with empty details, if it is indented as ours and SAEBench's are: no JSON string has a line break,
    and lists that end inside the details are indented further."""
    start = text.find(DETAILS_BEGIN)
    end = text.find(DETAILS_END, start)
    return text if -1 in (start, end) else text[: start + len(DETAILS_BEGIN)] + text[end:]


def _without_details(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != DETAILS}


def metric_of(document: Mapping[str, Any], metric: str) -> float | None:
    """A number by its dotted name: an official metric, or one under a top-level key of ours; None for no number. A
    number that really is -1 is written as -1.0 in our results; in SAEBench's own, that too means no number."""
    value = _at(document, f"eval_result_metrics.{metric}")
    if value == UNMEASURED and (isinstance(value, int) or not ours_in(document)):
        return None
    value = value if isinstance(value, (int, float)) else _at(document, metric)
    return float(value) if isinstance(value, (int, float)) else None


def name_empty_metrics(result: Result, summary: Sequence[str]) -> str | None:
    """Name the metrics of a summary that were measured and gave no number, as a mean over nothing does."""
    empty = [metric for metric in summary if _is_empty(result.metrics, metric) or _is_empty(result.extra, metric)]
    names = ", ".join(short_name(metric, summary) for metric in empty)
    return f"no number for {names}" if empty else None


def _is_empty(place: Mapping[str, Any], path: str) -> bool:
    """Whether there is a value at a dotted path that is not a number."""
    group, _, name = path.rpartition(".")
    entries = _at(place, group)
    value = entries.get(name, 0) if isinstance(entries, Mapping) else 0
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _at(place: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for part in path.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def short_name(metric: str, among: Iterable[str]) -> str:
    """The last part of a dotted name; the whole name if another of these ends alike."""
    last = metric.rsplit(".", 1)[-1]
    return metric if any(other.rsplit(".", 1)[-1] == last for other in among if other != metric) else last


def heading(metric: str, among: Iterable[str] = ()) -> str:
    """The short name as words, which can wrap."""
    return short_name(metric, among).replace(".", " ").replace("_", " ")


def ours_in(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our own part of a result; empty for SAEBench's own results."""
    ours = document.get("saemill")
    return ours if isinstance(ours, Mapping) else {}


def lines_of_each(
    results: Sequence[tuple[str, str, Mapping[str, Any]]],
    part: Literal["measured_on", "remark", "missing"] = "measured_on",
) -> list[str]:
    """The text that SAEs were measured on, the remarks about them, or what is missing, with the SAEs' names if it is
    not the same for all. `results` has the names of SAEs, evaluations, and results."""
    names_by_text: dict[tuple[str, str], list[str]] = {}
    for name, eval_id, document in results:
        if text := ours_in(document).get(part):
            names_by_text.setdefault((eval_id, str(text)), []).append(name)
    times = Counter(eval_id for _, eval_id, _ in results)
    return [
        f"{eval_id}: {text}" if len(names) == times[eval_id] else f"{eval_id} of {', '.join(names)}: {text}"
        for (eval_id, text), names in names_by_text.items()
    ]


def first_few(lines: Sequence[str]) -> list[str]:
    """The first of many remarks, such as those of 64 SAEs that differ in a count."""
    left = len(lines) - MOST_REMARKS
    return [*lines] if left <= 0 else [*lines[:MOST_REMARKS], f"{counted(left, 'more remark')} in the results' files"]


def reach_of(document: Mapping[str, Any], intervals: str | None, metric: str) -> float | None:
    """The distance from a number to the farther end of its interval, if it has one."""
    value, interval = metric_of(document, metric), interval_of(document, intervals, metric)
    return None if value is None or interval is None else max(interval[1] - value, value - interval[0])


def rounded_to(value: float, reach: float) -> tuple[str, str]:
    """A number and its reach, both to the second digit of the reach, beyond which neither is meaningful."""
    if not reach:
        return f"{value:.4g}", "0"
    places = min(max(0, 1 - int(f"{reach:.1e}".partition("e")[2])), MOST_PLACES)
    return f"{value:,.{places}f}", f"{reach:,.{places}f}"


def interval_of(document: Mapping[str, Any], intervals: str | None, metric: str) -> tuple[float, float] | None:
    """The interval of a metric; None if there is none, or if it is over other rows: ours leave out massive ones, which
    SAEBench's L0 counts."""
    if metric == "sparsity.l0" and _at(document, "saemill_metrics.massive.tokens"):
        return None
    found = _at(document, f"{intervals}.{metric.rsplit('.', 1)[-1]}") if intervals else None
    value = metric_of(document, metric)
    if value is None or not isinstance(found, list) or not all(isinstance(end, (int, float)) for end in found):
        return None
    low, high = min(found), max(found)
    return (low, high) if low <= value <= high else None


def standing_result(subject: LoadedSae, eval_id: str) -> dict[str, Any] | None:
    """The result on disk, if it belongs to the weights, layers and hooks that the SAE has now."""
    document, other = earlier_result(subject, eval_id)
    return None if other else document


def earlier_result(subject: LoadedSae, eval_id: str) -> tuple[dict[str, Any] | None, str]:
    """The result on disk, and what it belongs to if not to the weights, layers and hooks that the SAE has now. An SAE
    that names no place has the one it is given."""
    path = result_path(subject, eval_id)
    document = read_result(path) if path.is_file() else None
    if document is None:
        return None, ""
    if not still_stands(document, path, subject.folder):
        return document, "other weights"
    layer, *_, name, hook, _ = found = places_in(document)
    now = place_now(subject)
    is_here = agree(found, now) if ours_in(document) else found == now
    return document, "" if is_here else f"layer {layer} ({name}, {hook})"


def still_stands(document: Mapping[str, Any], path: Path, folder: Path | None = None) -> bool:
    """Whether a result belongs to the weights that are there now. Without `folder`, the result's path says where.

    The SAE's files are read only if one was written, moved or copied since, or if they are not next to the result, as
    on the Hub, where no time shows an earlier revision. For results without a digest, such as SAEBench's own, only file
    times are compared."""
    home, label = path.parents[2], path.name.removesuffix(RESULTS)
    folder = folder or (home if list_saes(home) == [home] else home / label)
    files, measured, recorded = files_of(folder), path.stat().st_mtime, ours_in(document).get("sha256")
    if recorded is None:
        return not any(file.stat().st_mtime > measured for file in files)
    if not files:
        return True
    made = document.get("datetime_epoch_millis")
    if isinstance(made, (int, float)):  # earlier than the file's own time if it is a copy
        measured = min(measured, (made + 1) / 1000)
    # A folder's time is the only sign that it was moved; a link's, that it leads elsewhere.
    times = [seen.st_ctime for place in (folder, *files) for seen in (place.stat(), place.lstat())]
    times += [file.stat().st_mtime for file in files]
    is_beside = folder.resolve() in (home.resolve(), (home.resolve() / label).resolve())
    return (is_beside and max(times) <= measured) or source_of(folder).sha256 == recorded


def is_whole(document: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a result has exactly these settings and lacks nothing."""
    return settings_in(document) == dict(settings) and ours_in(document).get("missing") is None


def is_from_missing_store(document: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a complete result was measured on a store, and these settings differ only in having none and in what
    follows from that: another number type, a named model, no bound of its own for massive rows."""
    found = settings_in(document)
    from_store = {"cache_id", "dtype"} | ({"model", MODEL} - found.keys()) | ({"massive_norms"} - settings.keys())
    asked = {name: value for name, value in settings.items() if name not in from_store}
    asked |= {name: found[name] for name in from_store & found.keys()}
    return settings["cache_id"] is None and found.get("cache_id") is not None and is_whole(document, asked)


def settings_in(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Everything that a result depends on besides the SAE."""
    return ours_in(document).get("settings", {})


def differing(documents: Iterable[Mapping[str, Any]]) -> str:
    """In which settings results of one evaluation differ, so that their numbers do not compare; or in the data sets
    that could be loaded, over which means are taken."""
    all_of = [flatten(settings_in(document)) | _loaded(document) for document in documents]
    keys = sorted({key for one in all_of for key in one})
    return ", ".join(key for key in keys if any(one.get(key) != all_of[0].get(key) for one in all_of))


def _loaded(document: Mapping[str, Any]) -> dict[str, Any]:
    """The data sets that a result names, as one entry of settings; empty if it names none, or is SAEBench's own."""
    config = document.get("eval_config")
    names = config.get("dataset_names") if ours_in(document) and isinstance(config, Mapping) else None
    return {"loaded data sets": names} if names else {}


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an evaluation that can change a number: all but its cache folder and how a server is asked."""
    return {name: value for name, value in config.items() if name not in ("cache", "requests_at_once", "timeout")}


def describe_differences(document: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Where a result's settings differ from these, in words; empty if they are the same."""
    found, wanted = flatten(settings_in(document)), flatten(settings)
    keys = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {found.get(key)!r} (asked for: {wanted.get(key)!r})" for key in keys)


def places_in(document: Mapping[str, Any]) -> list[Any]:
    """Where the SAE of a result reads and writes, as far as the result says."""
    config = document.get("sae_cfg_dict")
    return _places_of(config if isinstance(config, Mapping) else {})


def place_now(subject: LoadedSae) -> list[Any]:
    """The same for an SAE, as its results will say."""
    return _places_of(sae_config(subject))


def _places_of(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("metadata")
    metadata = found if isinstance(found, Mapping) else {}
    hook = metadata.get("hook", RESID if config else None)  # the residual stream is not named there
    layer, name = (config.get(key, metadata.get(key)) for key in ("hook_layer", "hook_name"))  # SAELens 6: in metadata
    return [layer, metadata.get("layers"), metadata.get("target_layers"), name, hook, metadata.get("target_hook", hook)]


def agree(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether both say the same wherever both say something: earlier results say less."""
    return all(first == second for first, second in zip(one, other, strict=True) if None not in (first, second))


def without_nan(value: Any, instead: Any) -> Any:
    """The same value with every NaN and infinity replaced."""
    if isinstance(value, Mapping):
        return {key: without_nan(item, instead) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item, instead) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return instead
    return value


@dataclass(frozen=True, eq=False)
class Row:
    """The outcome of one evaluation of one SAE, with the result, so that it is not read from disk again."""

    subject: LoadedSae
    eval_id: str
    status: Literal["done", "incomplete", "kept", "not run", "failed"]
    reason: str = ""
    document: Mapping[str, Any] | None = None
    """The result without its details, new or kept; None for `not run` and `failed`."""

    @property
    def path(self) -> Path:
        return result_path(self.subject, self.eval_id)

    @property
    def is_good(self) -> bool:
        return self.status in ("done", "kept")
