"""unlearning: clamp a topic's latents, and see whether the topic is forgotten and the rest is not.

1. Measure how often each latent fires on the text to forget, and on the text to retain.
2. Rank the latents that fire on the first and hardly on the second.
3. For each threshold, number of latents and multiplier: clamp, and mark both exams.
4. The score is 1 minus the lowest accuracy on the topic among interventions that keep 99 % of the rest.

SAEBench's material is WMDP's biology on gemma-2-2b-it; the pocket model forgets a package of the standard library. The
score is 0 if nothing was forgotten, and 1 if everything was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ....cache_schema.numbers_in_words import counted
from ....cache_schema.strict_json import to_json
from ...context.evaluation_data_sets import Revision, commits_of, library_revision
from ...context.saes_usable_on_text import attention_of, split_fitting
from ...errors import NotApplicable, SettingInvalid
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Result
from .exams import Exam
from .interventions import Outcome, SharedPasses, Sweep, make_settings, remembered_questions, unlearning_score, why_zero
from .texts_and_exams import WIKITEXT, Material, corpus_file, data_set_of, load_topic, load_wmdp

WMDP, STDLIB = "wmdp", "stdlib"
OF_DATA = {WMDP: ("model", "forget_corpus", "dataset_names", "dataset_size", "seq_len"), STDLIB: ("topic",)}
"""Settings that apply to only one kind of data."""


@dataclass(frozen=True)
class Config:
    """SAEBench's settings; some are for one kind of data only (`OF_DATA`)."""

    data: Literal["auto", "wmdp", "stdlib"] = "auto"
    """auto: the standard library for the pocket model, WMDP for all others."""
    model: str = "google/gemma-2-2b-it"
    """The model that answers WMDP's questions."""
    forget_corpus: str = "data/bio-forget-corpus.jsonl"
    topic: str = "asyncio"
    """The package of the standard library to forget."""
    cache: str = "~/.cache/saemill/unlearning"
    """Where the questions that a model can answer are cached."""
    random_seed: int = 42
    dataset_names: tuple[str, ...] = (
        "wmdp-bio",
        "high_school_us_history",
        "college_computer_science",
        "high_school_geography",
        "human_aging",
    )
    retain_thresholds: tuple[float, ...] = ()
    n_features_list: tuple[int, ...] = ()
    multipliers: tuple[float, ...] = ()
    """Empty: what suits the data; for WMDP, SAEBench's."""
    dataset_size: int = 1024
    seq_len: int = 1024
    llm_batch_size: int = 4

    def sweep(self, default: Sweep) -> Sweep:
        return Sweep(
            self.retain_thresholds or default.retain_thresholds,
            self.n_features_list or default.num_latents,
            self.multipliers or default.multipliers,
        )


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    material = load_material(context, config)
    longest_row = max(material.forget_rows.shape[1], material.retain_rows.shape[1])
    fitting, failures = split_fitting(context, subjects, material.model, lambda: longest_row)
    yield from failures
    exams = set_exams(material, config) if fitting else []
    fitting, failures = split_fitting(context, fitting, material.model, lambda: max(exam.longest for exam in exams))
    yield from failures
    if not fitting:
        return
    passes = SharedPasses(material.model, fitting, attention_of(context, fitting), config.llm_batch_size, context.say)
    rows, sweep = (material.forget_rows, material.retain_rows), config.sweep(material.sweep)
    with context.watch.stage("unlearning: firing", sum(each.numel() for each in rows)) as advance:
        forget, retain = (passes.firing_shares(each, advance) for each in rows)
    settings = {subject: make_settings(forget[subject], retain[subject], sweep) for subject in fitting}
    with context.watch.stage("unlearning: exams", sum(map(len, exams)), "questions") as advance:
        outcomes = passes.take_exams(exams, settings, advance)
    for subject in fitting:
        yield make_result(subject, outcomes[subject], material, exams, config)


def data_revision(context: Context, config: Config) -> Revision | None:
    """The revision of this Python's text, or of WMDP's material: commits, and a digest of the corpus, a local file."""
    if context.takes_library(config.data):
        return library_revision()
    found = commits_of(dict.fromkeys((WIKITEXT, *map(data_set_of, config.dataset_names)))) or {}
    if (corpus := corpus_file(config.forget_corpus)).is_file():
        with corpus.open("rb") as file:
            found |= {"forget_corpus": f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"}
    return found or None


def load_material(context: Context, config: Config) -> Material:
    is_stdlib = context.takes_library(config.data)
    require_applicable(config, is_stdlib)
    if is_stdlib:
        return load_topic(context.model, context.name_of_model, config.topic, config.random_seed)
    return load_wmdp(
        context,
        config.model,
        config.forget_corpus,
        config.dataset_names,
        config.dataset_size,
        config.seq_len,
        config.llm_batch_size * 2,  # questions are shorter than the rows of text
        config.random_seed,
    )


def require_applicable(config: Config, is_stdlib: bool) -> None:
    """Refuse settings that do not apply to the data in use, since the result would record them."""
    used, other = (STDLIB, WMDP) if is_stdlib else (WMDP, STDLIB)
    given = [f"unlearning.{name}" for name in OF_DATA[other] if getattr(config, name) != getattr(Config(), name)]
    if given:
        raise SettingInvalid(
            f"{', '.join(given)}: only for the data {other}, but the data here are {used} "
            f"(unlearning.data={config.data}): leave it out, or use --set unlearning.data={other}"
        )


def set_exams(material: Material, config: Config) -> list[Exam]:
    """The questions of each paper that the undisturbed model answers correctly."""
    exams = [paper.exam(remembered_questions(material.model, paper, config.cache)) for paper in material.papers]
    for papers, kind in ((material.forget, "to forget"), (material.retain, "to retain")):
        if not any(len(exam) for exam in exams if exam.name in {paper.name for paper in papers}):
            raise NotApplicable(f"the model correctly answers no question about what it is {kind}: nothing to measure")
    return exams


def make_result(
    subject: LoadedSae, outcomes: Sequence[Outcome], material: Material, exams: Sequence[Exam], config: Config
) -> Result:
    asked, rows = [exam.name for exam in exams if len(exam)], len(material.forget_rows) + len(material.retain_rows)
    forget, retain = (
        [one.name for one in papers if one.name in asked] for papers in (material.forget, material.retain)
    )
    return Result(
        subject,
        settings_by_saebench(config, material),
        {"unlearning": {"unlearning_score": unlearning_score(outcomes, forget, retain)}},
        extra={
            "unlearning": {
                "data": material.name,
                "questions": {exam.name: len(exam) for exam in exams},
                "runs": [to_json(outcome.setting) | {"accuracy": outcome.shares} for outcome in outcomes],
            }
        },
        remark=why_zero(outcomes, retain),
        measured_on=f"{material.name}, {counted(rows, 'row')} of text and {counted(sum(map(len, exams)), 'question')}",
    )


def settings_by_saebench(config: Config, material: Material) -> dict[str, Any]:
    """The settings that were used, under SAEBench's keys; sizes are those of the rows that were read."""
    sweep = config.sweep(material.sweep)
    return {
        "random_seed": config.random_seed,
        "dataset_names": [paper.name for paper in material.papers],
        "intervention_method": "clamp_feature_activation",
        "retain_thresholds": list(sweep.retain_thresholds),
        "n_features_list": list(sweep.num_latents),
        "multipliers": list(sweep.multipliers),
        "dataset_size": len(material.forget_rows),
        "seq_len": material.forget_rows.shape[1],
        "n_batch_loss_added": 50,  # declared by SAEBench, and never used
        "target_metric": "correct",
        "save_metrics": True,
        "model_name": material.model_name,
        "llm_batch_size": config.llm_batch_size,
        "llm_dtype": str(material.model.dtype).removeprefix("torch."),
    }


EVALUATION = Evaluation(
    Config,
    evaluate,
    summary=("unlearning.unlearning_score",),
    least={"n_features_list": 1, "dataset_size": 1, "seq_len": 2, "llm_batch_size": 1},
    data_revision=data_revision,
    # 2: top-k SAEs with decoder rows of any length count as if these had length one; 3: college_biology is not retained
    revision=3,
)
