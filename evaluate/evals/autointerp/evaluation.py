"""autointerp: a language model explains latents from passages, and tells from an explanation alone which others fire.

SAEBench 0.6.0's protocol, with three questions for each latent:
1. What do the marked tokens of these passages have in common? The answer is the latent's explanation.
2. Which of these other passages, unmarked and shuffled, fit the explanation? The share of right answers is its score.
3. The control: the second question with the explanation of another latent of the same SAE.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....cache_schema.numbers_in_words import counted
from ....cache_schema.strict_json import to_json
from ...context.stored_windows import windows_by_split
from ...context.write_and_read_results import result_path
from ...errors import DataMissing, JudgeMissing, NotApplicable, SettingInvalid
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, remark_of
from ..measures.token_text import Vocabulary
from .config import Config
from .judge import Answers, Judge, Question, ask_all
from .passages import Drawing, NeverSilent, Passages, TooRare, first_pass, second_pass, written
from .prompts import ask_to_explain, ask_to_score, read_explanation, read_numbers

ID = "autointerp"
WORDING = "the questions are worded by saemill, not by SAEBench: scores compare only within one judge and one wording"


@dataclass(frozen=True)
class Scored:
    """What a latent's questions gave; None where an answer cannot be read, or was not asked for."""

    latent: int
    active: list[int]  # the passages in which it is active, from 1
    explanation: str | None = None
    named: list[int] | None = None  # the passages that the judge names
    other: int | None = None  # the latent with whose explanation the control is asked
    control_named: list[int] | None = None

    def score(self, passages: int) -> float | None:
        return share_right(self.named, self.active, passages)

    def control(self, passages: int) -> float | None:
        return share_right(self.control_named, self.active, passages)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    judge = Judge(config.endpoint, config.judge, config.random_seed, config.timeout)
    judge.check()
    words, length = Vocabulary(context), context.manifest.context
    if words.obstacle:
        raise DataMissing(f"the judge needs tokens as text: {words.obstacle}")
    if length <= 2 * config.buffer:
        raise NotApplicable(
            f"expected windows of at least {2 * config.buffer + 1} tokens, found {length}: set a smaller buffer"
        )
    wrong = {subject: error for subject in subjects if (error := latents_beyond(subject, config))}
    yield from (Failure(subject, error) for subject, error in wrong.items())
    subjects = [subject for subject in subjects if subject not in wrong]
    if not subjects:
        return
    is_default = config.total_tokens == Config().total_tokens
    windows = windows_by_split(context, ID, -(-config.total_tokens // length), config.splits, is_default)
    text = first_pass(context, subjects, windows, config)
    if sum(words.write(token) != "" for token in text.tokens[0, :, None]) < length / 2:  # an empty tokenizer's
        raise DataMissing("the model's tokenizer has no text for the store's tokens: give the right model with --model")
    for subject, acts in second_pass(context, subjects, windows, text, config):
        drawn, absent = draw(Drawing(acts, config), text.latents[subject].tolist())
        scored, judges, refused = ask(context, subject, judge, drawn, words, config)
        yield make_result(context, subject, judge, scored, judges, absent, refused, config, str(text.counts[subject]))


def latents_beyond(subject: LoadedSae, config: Config) -> SettingInvalid | None:
    wrong = [latent for latent in config.override_latents or () if not 0 <= latent < subject.width]
    return SettingInvalid(f"override_latents: expected 0 to {subject.width - 1}, found {wrong}") if wrong else None


def draw(drawing: Drawing, latents: Sequence[int]) -> tuple[dict[int, Passages], Counter[str]]:
    """The passages of every latent that has enough of them, and how many latents do not, by why."""
    drawn, absent = dict[int, Passages](), Counter[str]()
    for number, latent in enumerate(latents):
        try:
            drawn[latent] = drawing.passages(number)
        except TooRare:
            absent["too_rare"] += 1
        except NeverSilent:
            absent["never_silent"] += 1
    return drawn, absent


def ask(
    context: Context,
    subject: LoadedSae,
    judge: Judge,
    drawn: Mapping[int, Passages],
    words: Vocabulary,
    config: Config,
) -> tuple[list[Scored], list[str], list[str]]:
    """What the judge said about each latent, the judges' names as the endpoint reports them, and why it did not take
    some questions."""
    answers = Answers(result_path(subject, ID).with_name(f"{subject.label}_answers.jsonl"))
    subject.make_home()
    used, refused = set[str](), dict[str, str]()

    def answer_all(title: str, questions: Mapping[Any, Question]) -> dict[Any, str]:
        keys = {name: judge.key_of(question) for name, question in questions.items()}
        todo = answers.lacking({key: questions[name] for name, key in keys.items()})
        with context.watch.stage(f"autointerp: {title} of {subject.label}", len(todo), "answers") as advance:
            try:
                refused.update(ask_all(judge, todo, answers, config.requests_at_once, advance))
            except JudgeMissing as error:
                kept = f"{counted(len(answers.found), 'answer')} so far are kept: the same command asks for the rest"
                raise JudgeMissing(f"{error}. {kept}") from None
        found = {name: answers.found[key] for name, key in keys.items() if key in answers.found}
        used.update(answer.model for answer in found.values())
        return {name: answer.text for name, answer in found.items()}

    limit = config.max_tokens_in_explanation + config.thinking_tokens
    to_explain = {
        latent: Question(ask_to_explain([written(one, words, True) for one in passages.explain]), limit)
        for latent, passages in drawn.items()
    }
    explained = answer_all("explanations", to_explain)
    explanations = {latent: text for latent, answer in explained.items() if (text := read_explanation(answer))}
    others = deranged(list(explanations), config.random_seed)
    limit = 2 * config.n_scoring + 5 + config.thinking_tokens  # SAEBench's: a number and a comma for each
    to_score = dict[tuple[int, int], Question]()  # by latent, and by whose explanation it is
    for latent in explanations:
        texts = [written(one, words, False) for one in drawn[latent].score]
        for of in (latent, *((others[latent],) if latent in others else ())):
            to_score[latent, of] = Question(ask_to_score(explanations[of], texts), limit)
    named = {pair: read_numbers(answer) for pair, answer in answer_all("scores", to_score).items()}
    scored = []
    for latent, passages in drawn.items():
        active = [number for number, one in enumerate(passages.score, 1) if one.is_active]
        other = others.get(latent)
        control = named.get((latent, other)) if other is not None else None
        explanation = explanations.get(latent)
        scored.append(Scored(latent, active, explanation, named.get((latent, latent)), other, control))
    return scored, sorted(used), list(refused.values())


def deranged(latents: Sequence[int], seed: int) -> dict[int, int]:
    """Another latent for each, drawn: all in one circle. None for one alone."""
    circle = np.random.default_rng(seed).permutation(np.array(latents, np.int64)).tolist()
    return dict(zip(circle, circle[1:] + circle[:1], strict=True)) if len(circle) > 1 else {}


def share_right(named: Sequence[int] | None, active: Sequence[int], passages: int) -> float | None:
    """The share of passages that are named and active, or neither. Numbers beyond the passages do not count."""
    if named is None:
        return None
    return sum((number in named) == (number in active) for number in range(1, passages + 1)) / passages


def make_result(
    context: Context,
    subject: LoadedSae,
    judge: Judge,
    scored: Sequence[Scored],
    judges: Sequence[str],
    absent: Mapping[str, int],
    refused: Sequence[str],
    config: Config,
    text: str,
) -> Result:
    passages = config.n_scoring
    scores = [(one.score(passages), one.control(passages)) for one in scored]
    own = [score for score, _ in scores if score is not None]
    control = [score for _, score in scores if score is not None]
    gains = [score - other for score, other in scores if score is not None and other is not None]
    gain, error = mean(gains), deviation(gains) / math.sqrt(len(gains)) if gains else math.nan
    ours = {
        "latents": len(own),
        "control_score": mean(control),
        "control_std_dev": deviation(control),
        "gain": gain,
        "gain_standard_error": error,
        "always_none": config.n_random_ex_for_scoring / passages,
        "too_rare": absent.get("too_rare", 0),
        "never_silent": absent.get("never_silent", 0),
        "unreadable_explanations": sum(one.explanation is None for one in scored),
        "unreadable_answers": sum(one.explanation is not None and one.named is None for one in scored),
        "unreadable_control_answers": sum(one.other is not None and one.control_named is None for one in scored),
    }
    settings = to_json(config) | {
        "n_latents": config.n_latents if config.override_latents is None else None,  # SAEBench takes only one of them
        "model_name": context.manifest.model.id,
        "dataset_name": context.manifest.corpus.id,
        "llm_context_size": context.manifest.context,
        "llm_dtype": context.manifest.model.dtype,
        "no_overlap": True,
        "scoring": True,
        "use_demos_in_explanation": False,
    }
    asked = {"asked_for": judge.model, "answered": list(judges), "not_sent": list(judge.refused), "wording": WORDING}
    return Result(
        subject,
        settings,
        {"autointerp": {"autointerp_score": mean(own), "autointerp_std_dev": deviation(own)}},
        unstructured={str(one.latent): row_of(one, passages) for one in scored},
        extra={"saemill_metrics": ours, "judge": asked},
        remark=remark_of(*remarks(ours, judges, refused, sum(absent.values()) + len(scored))),
        measured_on=f"{text}; {counted(ours['latents'], 'latent')}, judged by {', '.join(judges) or judge.model}",
    )


def row_of(one: Scored, passages: int) -> dict[str, Any]:
    """What a result says about a latent, under SAEBench's keys; a score that does not exist is left out."""
    numbers = {
        "predictions": one.named,
        "score": one.score(passages),
        "control_latent": one.other,
        "control_predictions": one.control_named,
        "control_score": one.control(passages),
    }
    found = {"latent": one.latent, "explanation": one.explanation, "correct seqs": one.active, **numbers}
    return {name: value for name, value in found.items() if value is not None}


def remarks(ours: Mapping[str, Any], judges: Sequence[str], refused: Sequence[str], drawn: int) -> Iterator[str]:
    """What makes the score say less than it seems to."""
    reasons = {
        "too_rare": "fired in too few separate places",
        "never_silent": "are active in almost every passage",
        "unreadable_explanations": "have no readable explanation",
        "unreadable_answers": "have no readable answer",
    }
    left_out = [f"{ours[name]:,} {why}" for name, why in reasons.items() if ours[name]]
    if left_out:
        yield f"{ours['latents']:,} of {counted(drawn, 'latent')} have a score: {', '.join(left_out)}"
    elif not drawn:
        yield "no latent fires often enough to be explained"
    if len(judges) > 1:
        yield f"several judges answered ({', '.join(judges)}): without the file of answers all is asked anew"
    if refused:
        yield f"the judge did not take {counted(len(refused), 'question')}, such as: {refused[0]}"
    gain, error = ours["gain"], ours["gain_standard_error"]
    if ours["latents"] and math.isnan(error):
        yield "fewer than two latents have both scores: whether their explanations help is not known"
    elif ours["latents"] and not gain > 2 * error:
        yield (
            "the judge does no better with a latent's explanation than with another's (a gain of "
            f"{gain:.3f}, standard error {error:.3f}): the score says nothing about the latents"
        )


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(store=True),
    summary=("autointerp.autointerp_score", "saemill_metrics.control_score"),
    least={
        "n_latents": 1,
        "dead_latent_threshold": 0,
        "total_tokens": 1,
        "batch_windows": 1,
        "buffer": 0,
        "n_top_ex_for_generation": 1,
        "n_iw_sampled_ex_for_generation": 0,
        "n_top_ex_for_scoring": 0,
        "n_iw_sampled_ex_for_scoring": 0,
        "n_random_ex_for_scoring": 1,
        "max_tokens_in_explanation": 1,
        "thinking_tokens": 0,
        "requests_at_once": 1,
        "timeout": 1,
    },
)
