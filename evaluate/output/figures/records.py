"""What plots and pages know about an SAE: its run's log, its settings, its outcome, and its evaluations."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

from ....train.disk.atomic_files import read_json
from ....train.run.run_folder import RunFolder
from ...context.write_and_read_results import (
    RESULTS,
    agree,
    differing,
    first_few,
    lines_of_each,
    metric_of,
    ours_in,
    places_in,
    read_result,
    still_stands,
)
from ...errors import EvalError, ResultInvalid

CURVE_POINTS = 200
Documents = Mapping[Path, Mapping[str, Any]]
Now = Mapping[str, Sequence[Any]]  # the weights and place that each SAE has now, by its label
Say = Callable[[str], object]
T = TypeVar("T")
SEED = re.compile(r"_seed(\d+)(?=_|$)")  # in an SAE's label
CORE = {  # where core's results have what pages show; SAEBench's explained variance is a different one
    "l0": "sparsity.l0",
    "explained_variance": "saemill_metrics.explained_variance",
    "explained_variance_with_massive": "saemill_metrics.explained_variance_with_massive",
    "ce_score": "model_performance_preservation.ce_loss_score",
    "kl_score": "model_behavior_preservation.kl_div_score",
}


@dataclass(frozen=True, eq=False)
class Record:
    """One SAE of a run."""

    name: str  # in figures
    run: str
    label: str
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the variant's config
    log: Sequence[Mapping[str, Any]] = ()  # its lines of metrics.jsonl, thinned
    outcome: Mapping[str, Any] = field(default_factory=dict)  # its part of result.json
    steps: int | None = None
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # results by evaluation
    asked: Mapping[str, Any] = field(default_factory=dict)  # config.json of its run

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged number, wherever it is a number."""
        points = [(line["step"], line[name]) for line in self.log if isinstance(line.get(name), (int, float))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return values[-1] if values else None

    @cached_property
    def logged(self) -> frozenset[str]:
        return frozenset(name for line in self.log for name in line)

    def numbered(self, prefix: str) -> dict[int, str]:
        """Logged names that are a prefix and a number, by that number: mixing/weight_17."""
        ends = {name.removeprefix(prefix): name for name in self.logged if name.startswith(prefix)}
        return {int(end): name for end, name in sorted(ends.items()) if end.isdigit()}

    def metric(self, evaluation: str, path: str) -> float | None:
        """A dotted metric of an evaluation; None if it was not measured."""
        document = self.documents.get(evaluation)
        return None if document is None else metric_of(document, path)

    def held_out(self, name: str) -> float | None:
        """As measured by core or, without a result of core, by the run's own validation."""
        measured = self.metric("core", CORE[name])
        return self.outcome.get(name) if measured is None else measured

    @property
    def asked_l0(self) -> float | None:
        """Active latents per token that the variant's settings ask for."""
        return self.setting("k", "target_l0")

    def setting(self, *names: str) -> float | None:
        """The first of these settings of the variant that is a number."""
        found = (self.settings.get(name) for name in names)
        numbers = (float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool))
        return next(numbers, None)

    def unstructured(self, evaluation: str) -> Mapping[str, Any]:
        return self.documents.get(evaluation, {}).get("eval_result_unstructured") or {}


@dataclass(frozen=True)
class Column:
    """A column of a table: a heading, its meaning in a few words, and where its numbers come from."""

    heading: str
    meaning: str
    value: Callable[[Record], float | None]
    evaluation: str = ""
    metric: str = ""
    form: str = ".4g"


def measured(heading: str, meaning: str, evaluation: str, path: str) -> Column:
    return Column(heading, meaning, lambda record: record.metric(evaluation, path), evaluation, path)


def held_out(heading: str, meaning: str, name: str) -> Column:
    return Column(heading, meaning, lambda record: record.held_out(name), "core", CORE[name])


COLUMNS = {  # those that every table of SAEs has
    "l0": held_out("L0", "active latents per token", "l0"),
    "explained_variance": held_out("explained variance", "of held-out residuals, centred", "explained_variance"),
    "ce_score": held_out("CE score", "cross entropy restored: 1 clean, 0 zero ablation", "ce_score"),
    "kl_score": held_out("KL score", "predictions restored: 1 clean, 0 zero ablation", "kl_score"),
    "probing": measured("probing", "test accuracy, k = 5", "sparse_probing", "sae.sae_top_5_test_accuracy"),
    "attention": measured("attention fidelity", "1 true, 0 mean ablation", "attention", "fidelity.score"),
}


def read_records(
    runs: Sequence[RunFolder],
    say: Say,
    known: Documents | None = None,
    only_known: bool = False,
    now: Now | None = None,
) -> list[Record]:
    """The SAEs of some runs in a fixed order; names include the run if there are several, and its path if several runs
    have the same name.

    `known` are results that are in memory already, by their path; with `only_known` no others are read, and SAEs
    without any are left out: it has not been checked whether others compare. `now` has the weights and place that
    results must belong to, by the SAEs' labels.
    """
    times, found = Counter(run.name for run in runs), list[Record]()
    for run in runs:
        documents = read_documents(run.path / "evals", say, known or {}, only_known, now)
        name = run.name if times[run.name] == 1 else str(run.path)
        found += _records_of(run, name, documents, is_alone=len(runs) == 1)
    return [record for record in found if record.documents or not only_known]


def _records_of(
    run: RunFolder, name: str, documents: Mapping[str, Mapping[str, Mapping[str, Any]]], *, is_alone: bool
) -> Iterator[Record]:
    config = run.read_config() if (run.path / "config.json").is_file() else {}
    result = read_json(run.path / "result.json") if run.is_finished else {}
    members, outcomes = config.get("saes", {}), result.get("saes", {})
    logs = thinned_log(run.metrics)
    for label in sorted({*members, *outcomes, *documents}):
        member = members.get(label, {})
        yield Record(
            name=label if is_alone else f"{name}/{label}",
            run=name,
            label=label,
            variant=member.get("variant", ""),
            settings=member.get("config", {}),
            asked=config,
            log=logs.get(label, ()),
            outcome=outcomes.get(label, {}),
            steps=result.get("steps"),
            documents=documents.get(label, {}),
        )


def notes(records: Sequence[Record], evaluations: Iterable[str]) -> list[str]:
    """What a table's numbers were measured on, remarks, what is missing, and for which of these evaluations they do not
    compare."""
    results = [(one.name, name, document) for one in records for name, document in one.documents.items()]
    found = [f"{line}." for line in (*lines_of_each(results), *first_few(lines_of_each(results, "remark")))]
    found += [f"incomplete: {line.removesuffix('.')}." for line in first_few(lines_of_each(results, "missing"))]
    for name in dict.fromkeys(evaluations):
        if uneven := differing(one.documents[name] for one in records if name in one.documents):
            found.append(f"{name}: these numbers do not compare, results differ in {uneven}.")
    others = [one for one in records if one.outcome and one.metric("core", CORE["explained_variance"]) is None]
    if by_training := [one.name for one in others]:
        found.append(f"L0 and explained variance of {', '.join(by_training)}: validation split, measured by training.")
    return found


def thinned_log(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The lines of metrics.jsonl by SAE: for each as many as a chart can show, evenly spaced, with the last. Only these
    are parsed, as a log may have millions; `read_log` parses all."""
    if not path.is_file():
        return {}
    places: dict[bytes, array[int]] = defaultdict(lambda: array("q"))
    found, place = defaultdict(list), 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line != b"\n":
                # Training writes the SAE first, then the step. A line that begins otherwise is always parsed.
                places[line.partition(b'"step"')[0] if line.startswith(b'{"sae"') else line].append(place)
            place += len(line)
        for line in _parsed(path, _lines_at(file, sorted(chain.from_iterable(map(_thinned, places.values()))))):
            found[str(line.get("sae"))].append(line)
    return found


def _thinned(places: array[int]) -> Iterator[int]:
    every = -(-len(places) // CURVE_POINTS)
    return chain(places[:-1:every], places[-1:])


def _lines_at(file: IO[bytes], places: Iterable[int]) -> Iterator[bytes]:
    for place in places:
        file.seek(place)
        yield file.readline()


def read_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every line of metrics.jsonl, one at a time; an incomplete last line is one that a run is still writing."""
    if path.is_file():
        with path.open("rb") as file:
            yield from _parsed(path, (line for line in file if line.endswith(b"\n") and line != b"\n"))


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[Mapping[str, Any]]:
    try:
        yield from (line for line in map(json.loads, lines) if isinstance(line, Mapping))
    except (ValueError, RecursionError) as error:
        raise ResultInvalid(f"{path} is damaged ({error}): remove the line, or copy the file again") from None


def read_documents(
    folder: Path, say: Say, known: Documents, only_known: bool = False, now: Now | None = None
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Results for the SAEs' present weights and places, by label and evaluation, without any that cannot be read."""
    found: dict[str, dict[Path, Mapping[str, Any]]] = {}
    left_out = list[Path]()
    for path in sorted(folder.glob(f"*/*{RESULTS}")):
        if only_known and path.absolute() not in known:
            continue
        try:
            document = known.get(path.absolute()) or read_result(path)
        except (EvalError, OSError) as error:
            say(f"left out of pages and plots: {error}")
            continue
        if still_stands(document, path):
            found.setdefault(path.name.removesuffix(RESULTS), {})[path] = document
        else:
            left_out.append(path)
    shown = {label: of_one_version(one, known, (now or {}).get(label)) for label, one in found.items()}
    left_out += [path for label, documents in found.items() for path in documents if path not in shown[label]]
    if left_out:
        each = ", ".join(f"{path.parent.name} of {path.name.removesuffix(RESULTS)}" for path in sorted(left_out))
        say(f"left out of pages and plots, from other weights, another layer or hook than the SAE has now: {each}")
    return {
        label: {path.parent.name: document for path, document in documents.items()}
        for label, documents in shown.items()
    }


def of_one_version(documents: Documents, known: Documents, now: Sequence[Any] | None) -> dict[Path, Mapping[str, Any]]:
    """The results with the weights and place `now` or, if that is None, with those of a result in memory or the newest
    one: nothing else tells apart revisions of an SAE from the Hub, or the layers that `--layer` gave to one."""

    def recency(path: Path) -> tuple[bool, float]:
        return path.absolute() in known, documents[path].get("datetime_epoch_millis", 0)

    if now is None:
        latest = max((path for path in documents if ours_in(documents[path])), key=recency, default=None)
        now = latest and weights_and_place(documents[latest])
    return those_of(documents, now)


def those_of(documents: Mapping[T, Mapping[str, Any]], now: Sequence[Any] | None) -> dict[T, Mapping[str, Any]]:
    """The results with these weights and this place, as far as they name theirs; all if `now` is None."""
    return {key: one for key, one in documents.items() if now is None or agree(weights_and_place(one), now)}


def weights_and_place(document: Mapping[str, Any]) -> list[Any]:
    return [ours_in(document).get("sha256"), *places_in(document)]
