"""The results of a study's runs: each SAE's numbers, what is wrong with them, and why some are missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cache_schema.strict_json import to_json
from ..evaluate import evals
from ..evaluate.context.write_and_read_results import (
    RESULTS,
    deciding,
    describe_differences,
    differing,
    metric_of,
    read_result,
    settings_in,
    short_name,
    still_stands,
)
from ..evaluate.output.figures.records import SEED, read_log
from ..evaluate.run.console_table import signs_of_no_learning
from ..train.config.recipe import HALF, Recipe
from ..train.disk.atomic_files import read_json
from ..train.run.run_folder import RunFolder, cache_of, is_run
from .compare_and_decide import Families

CORE = "core"
LOGGED = "explained_variance"
ASKS_FOR_MATERIAL = ("unlearning",)
"""WMDP's text is given on request only, and is about one model: a study is complete without it."""


@dataclass(frozen=True)
class Line:
    """One SAE of a study."""

    run: str
    label: str
    values: dict[str, float | None]
    """None for a measure that gave no number."""
    problems: list[str]
    remarks: list[str] = field(default_factory=list)
    """Why numbers are missing, if an evaluation says so."""
    model: str | None = None
    """The model that its results name."""

    @property
    def family(self) -> str:
        """The label without its seed."""
        return SEED.sub("", self.label)

    @property
    def seed(self) -> int:
        found = SEED.search(self.label)
        return int(found[1]) if found else 0


Results = Sequence[tuple[Recipe, Sequence[Line]]]


def read_lines(
    folder: RunFolder, eval_ids: Sequence[str], costs: bool = False, asked: Mapping[str, Any] | None = None
) -> list[Line]:
    """The results of a finished run and, as far as they have the settings `asked` for, of its evaluations."""
    result = read_json(folder.path / "result.json")
    half = RunFolder(folder.path.with_name(folder.name + HALF))
    at_half = read_json(half.path / "result.json") if half.is_finished else {"saes": {}}
    without_half = half.read_config()["saes"] if is_run(half.path) and not half.is_finished else ()
    lines = []
    documents = {
        eval_id: {
            label: read_result(path)
            for label in result["saes"]
            if (path := folder.path / "evals" / eval_id / (label + RESULTS)).is_file()
        }
        for eval_id in eval_ids
    }
    uneven = {eval_id: differing(found.values()) for eval_id, found in documents.items()}
    for label, sae in result["saes"].items():
        values: dict[str, float | None] = {"steps": result["steps"], "dead": sae["dead_share"]}
        problems = [] if result["steps"] > 0 else ["it made no step"]
        if label in without_half:
            problems.append(f"its growth is not known: {half.name} diverged, or has not ended")
        elif label in at_half["saes"] and at_half["steps"] == result["steps"] // 2:
            now, then = sae["explained_variance"], at_half["saes"][label]["explained_variance"]
            values["growth"] = None if now is None or then is None else now - then
        elif label in at_half["saes"]:
            problems.append(
                f"its growth is not known: expected {result['steps'] // 2} steps of {half.name}, found "
                f"{at_half['steps']}: remove {half.path} and ask for the study again"
            )
        if costs:
            seconds, size = sae.get("step_seconds"), sae.get("state_bytes")
            values["ms_per_step"] = None if seconds is None else 1e3 * seconds
            values["state_mb"] = None if size is None else size / 1e6
        model = None
        remarks = [f"a warm-up or onset of {wanted} steps took {given}" for wanted, given in sae.get("cut_short", ())]
        for eval_id in eval_ids:
            document = documents[eval_id].get(label)
            if document is None:
                (remarks if eval_id in ASKS_FOR_MATERIAL else problems).append(f"{eval_id} gave no result")
                continue
            reason = f"results of this run differ in {uneven[eval_id]}" if uneven[eval_id] else ""
            if reason := reason or why_outdated(eval_id, document, label, folder, (asked or {}).get(eval_id)):
                problems.append(f"{eval_id} is left out: {reason}")
                continue
            found = {metric: metric_of(document, metric) for metric in evals.load(eval_id).summary}
            values |= {column_of(eval_id, metric, eval_ids): value for metric, value in found.items()}
            problems += signs_of_no_learning(document)
            remarks += absences(eval_id, document, found)
            if eval_id == CORE:
                model = model_of(document)
                remarks += measured_on(document, result)
                problems += [f"{metric.rsplit('.', 1)[-1]} is not a number" for metric, v in found.items() if v is None]
        problems += [f"{name} is not a number" for name, value in values.items() if not math.isfinite(value or 0.0)]
        lines.append(Line(folder.name, label, values, problems, remarks, model))
    return lines + [Line(folder.name, label, {}, [reason]) for label, reason in result.get("diverged", {}).items()]


def column_of(eval_id: str, metric: str, among: Sequence[str]) -> str:
    """The short name of a metric, after its evaluation's if core or another of these has one of the same name."""
    name = short_name(metric, evals.load(eval_id).summary)
    others = [evals.load(other).summary for other in {CORE, *among} - {eval_id}]
    is_shared = any(name == short_name(other, summary) for summary in others for other in summary)
    return f"{eval_id}.{name}" if is_shared and eval_id != CORE else name


def titles_of(eval_ids: Sequence[str]) -> dict[str, str]:
    """Headings for columns whose names do not show their evaluation; core's have none."""
    columns = ((eval_id, metric) for eval_id in eval_ids if eval_id != CORE for metric in evals.load(eval_id).summary)
    return {
        column_of(eval_id, metric, eval_ids): f"{eval_id}: {name}"
        for eval_id, metric in columns
        if not (name := short_name(metric, evals.load(eval_id).summary)).startswith(eval_id)
    }


def why_outdated(eval_id: str, document: Mapping[str, Any], label: str, folder: RunFolder, asked: Any | None) -> str:
    """Why a result is not about the run as it is now, with the settings asked for; empty if it is."""
    if not still_stands(document, folder.path / "evals" / eval_id / (label + RESULTS)):
        return "its result is of weights that the SAE no longer has"
    difference = other_settings(eval_id, document, asked) or other_store(eval_id, document, folder)
    return f"its result is of {difference}" if difference else ""


def other_settings(eval_id: str, document: Mapping[str, Any], asked: Any | None) -> str:
    """The settings in which a result differs: it is an earlier one if the evaluation with those asked for failed."""
    if asked is None:
        return ""
    revision = evals.load(eval_id).revision
    others = {name: value for name, value in settings_in(document).items() if name != "revision"}
    wanted = others | {"config": deciding(to_json(asked))} | ({} if revision == 1 else {"revision": revision})
    return describe_differences(document, wanted)


def other_store(eval_id: str, document: Mapping[str, Any], folder: RunFolder) -> str:
    """How a result differs if `sae-eval` has since measured the run on other activations."""
    settings = settings_in(document)
    if not evals.load(eval_id).needs.store:
        return ""
    if settings.get("from_tokens"):
        return "residuals computed from tokens (--from-tokens), not those of the store"
    found = settings.get("cache_id")
    own = None if found is None else cache_of(folder)[1]
    return "" if found == own else f"the store with cache id {found}, but the run is of {own}"


def model_of(document: Mapping[str, Any]) -> str | None:
    return (document.get("sae_cfg_dict") or {}).get("model_name")


def curve_by_label(folder: RunFolder) -> dict[str, list[tuple[float, float]]]:
    """Steps and the explained variance of their batches, as the run logged them."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in read_log(folder.metrics):
        if isinstance(line.get(LOGGED), float):
            curves.setdefault(line["sae"], []).append((line["step"], line[LOGGED]))
    return curves


def absences(eval_id: str, document: Mapping[str, Any], found: Mapping[str, float | None]) -> list[str]:
    """The metrics that a result lacks, and why, as far as it says."""
    names = [short_name(metric, found) for metric, value in found.items() if value is None]
    ours = document.get("saemill", {})
    if not names and ours.get("missing"):
        return [f"{eval_id} is of a part of its data: {ours['missing']}"]
    remark = f"its result says: {ours['remark']}" if ours.get("remark") else "its result does not say why"
    reason = ours.get("missing") or remark
    return [f"{eval_id} has no {', '.join(names)}: {reason}"] if names else []


def measured_on(document: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """The model and the store that a run's numbers come from, as far as its results say."""
    store = document.get("saemill", {}).get("cache_id")
    if store is None:
        return []
    size = f"{result.get('tokens', 0):,} tokens in {result['steps']:,} steps"
    return [f"of the model {model_of(document)}, store id {store}: {size}"]


def families(lines: Iterable[Line]) -> Families:
    """Values by SAE and seed."""
    values: dict[str, dict[int, dict[str, float | None]]] = {}
    for line in lines:
        values.setdefault(line.family, {})[line.seed] = line.values
    return values
