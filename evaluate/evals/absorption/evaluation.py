"""absorption: do latents for "starts with L" stay silent on words that have a latent of their own?

The task uses the model's own vocabulary, so it needs no data and works with any tokenizer. It measures letters that the
model knows, by the F1 of a probe; if there are too few, the evaluation is not run. The pocket model knows none (no F1
above 0.4), so for it the classes are the shapes of words, and the result says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ....cache_schema.numbers_in_words import counted
from ...context.prompt_positions import Reader
from ...context.saes_usable_on_text import attention_of, official_config, split_fitting
from ...errors import NotApplicable
from ...model.logistic_regression import unconverged
from ...model.prefix_suffix import LanguageModel
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, remark_of
from .measure_absorption import Sparse, mean_metrics, measure_letters
from .task_and_probes import (
    FIRST_LETTER,
    WORD_SHAPES,
    Task,
    Training,
    WordClasses,
    alphabetic_words,
    longest_prompt,
    make_task,
    require_template,
    word_position,
)

POCKET_WORDS, POCKET_CLASSES = 1000, 4
"""How many words are asked, for about a minute, and how many of the shapes must be known."""


@dataclass(frozen=True)
class Config:
    """SAEBench's settings."""

    classes: Literal["auto", "first_letter", "shape"] = "auto"
    """auto: shapes for the pocket model, first letters for all others."""
    random_seed: int = 42
    f1_jump_threshold: float = 0.03
    max_k_value: int = 10
    prompt_template: str | None = None
    """None: "{word} has the first letter:", or the template of the shapes."""
    llm_batch_size: int = 32
    k_sparse_probe_l1_decay: float = 0.01
    k_sparse_probe_batch_size: int | None = None
    """None: SAEBench's 4096, or 32 for a sample of the words, where batches of 4096 would leave too few steps."""
    k_sparse_probe_num_epochs: int = 50
    min_GT_probe_f1: float = 0.6  # noqa: N815  SAEBench's name
    min_feats_for_eval: int | None = None
    """Letters that the model must know; None: SAEBench's 20, or 4 of the 6 shapes."""
    max_words: int | None = None
    """The most words to ask; None: all, or fewer for the pocket model."""

    def word_limit(self, context: Context) -> int | None:
        """How many words are asked; None: all."""
        return self.max_words or (POCKET_WORDS if context.is_pocket else None)

    def batch_size(self, context: Context) -> int:
        return self.k_sparse_probe_batch_size or (4096 if self.word_limit(context) is None else 32)

    def sparse(self, context: Context) -> Sparse:
        training = Training(
            epochs=self.k_sparse_probe_num_epochs,
            batch_size=self.batch_size(context),
            weight_decay=1e-6,
            l1_decay=self.k_sparse_probe_l1_decay,
        )
        return Sparse(training, self.max_k_value, self.f1_jump_threshold)


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    if config.prompt_template:
        require_template(config.prompt_template)
    model, classes, words = context.model, choose_classes(context, config), choose_words(context, config)
    fitting, failures = split_fitting(context, subjects, model, lambda: longest_prompt(words, classes, model))
    yield from failures
    if not fitting:
        return
    reader = Reader(model, fitting, attention_of(context, fitting), config.llm_batch_size, context.say)
    task = make_task(reader, words, classes, config.random_seed, context.watch)
    for subject in fitting:
        yield one_result(context, task, subject, config)


def choose_classes(context: Context, config: Config) -> WordClasses:
    name = config.classes if config.classes != "auto" else "shape" if context.is_pocket else "first_letter"
    classes = WORD_SHAPES if name == "shape" else FIRST_LETTER
    return replace(classes, template=config.prompt_template or classes.template)


def choose_words(context: Context, config: Config) -> list[str]:
    """Alphabetic words of the vocabulary by token id, or a sample of them."""
    words = vocabulary_words(context.model)
    limit = config.word_limit(context) or len(words)
    return random.Random(config.random_seed).sample(words, limit) if limit < len(words) else words


def vocabulary_words(model: LanguageModel) -> list[str]:
    backend = model.tokenizer.backend
    tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return alphabetic_words((token for token, _ in tokens), lambda token: backend.decoder.decode([token]))


def one_result(context: Context, task: Task, subject: LoadedSae, config: Config) -> Result | Failure:
    probe = task.probes[subject.layer]
    known, is_official = probe.known(config.min_GT_probe_f1), task.classes.names == FIRST_LETTER.names
    needed = config.min_feats_for_eval or (20 if is_official else POCKET_CLASSES)
    if len(known) < needed:
        return Failure(subject, _too_few(subject, task, known, needed, config))
    generator = torch.Generator().manual_seed(config.random_seed)
    results = measure_letters(task, subject, known, config.sparse(context), generator)
    words = len(task.train.words) + len(task.test.words)
    classes = f"{len(known)} of {len(task.classes.names)} classes known"
    return Result(
        subject,
        official_config(
            context,
            config,
            prompt_template=task.classes.template,
            prompt_token_pos=word_position(context.model, task.classes.template),  # -6 with Gemma's tokenizer
            k_sparse_probe_batch_size=config.batch_size(context),
            min_feats_for_eval=needed,
            eval_k_sparse_probe_batch_size=24,  # affects only memory in the official package
            precalc_k_sparse_probe_sae_acts=False,
        ),
        {"mean": mean_metrics(results)},
        details=[result.to_json() for result in results],
        extra={
            "eval_type_id": "absorption_first_letter" if is_official else "absorption_word_shape",
            "absorption": {  # not in SAEBench's document
                "is_random_seed_applied": True,
                "words": words,
                "probe_f1": dict(zip(task.classes.names, probe.f1, strict=True)),
                "split_latents": {result.letter: list(result.latents) for result in results},
            },
        },
        remark=remark_of(
            None if any(result.fires for result in results) else "0 because no latent fires on these words",
            unconverged([one for result in results for one in result.converged]),
        ),
        measured_on=f"the model's vocabulary, {counted(words, 'word')}; {classes}",
    )


def _too_few(subject: LoadedSae, task: Task, known: Sequence[int], needed: int, config: Config) -> NotApplicable:
    names = ", ".join(task.classes.names[number] for number in known) or "none"
    return NotApplicable(
        f"layer {subject.layer} of the model knows {len(known)} of {len(task.classes.names)} classes of words "
        f"({names}) with F1 above {config.min_GT_probe_f1}, but {needed} are needed: try a larger model or an earlier "
        "layer, or lower the bar with --set absorption.min_feats_for_eval=N, which the result records"
    )


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(model=True),
    summary=("mean.mean_absorption_fraction_score", "mean.mean_full_absorption_score"),
    least=dict.fromkeys(("max_words", "min_feats_for_eval", "max_k_value", "k_sparse_probe_batch_size"), 1)
    | {"min_GT_probe_f1": 0},
    # 2: top-k SAEs with decoder rows of any length count as if these had length one; the tokens of a template's tail
    # are counted after a word
    revision=2,
)
