"""sparse_probing_sae_probes: k latents at the last token of a prompt against a probe of the whole residual.

The steps of sae-probes 0.4.2 as SAEBench 0.6.0 runs them (setting `normal`), on 113 binary data sets:
1. Activations at each prompt's last token, in one pass of the model for all SAEs.
2. Latents are ranked on the training rows; for each k a probe is tuned on k of them (`probing/sae_probes_package.py`).
3. The baseline is the same probe, with an L2 penalty, on the residual.
Every draw has its own seed, so that neither SAEs nor values of k affect one another. A prompt that is too long loses
its beginning, never its last token. N prompts, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ...cache_schema.numbers_in_words import counted
from ..context.evaluation_data_sets import Revision
from ..context.loaded_sae import batch_size_for
from ..context.prompt_positions import Reader, Spot, stacked, to_sparse
from ..context.saes_usable_on_text import attention_of, official_config, require_reading, split_fitting
from ..model.logistic_regression import unconverged
from ..model.prefix_suffix import LanguageModel
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, beyond, remark_of
from .probing import sae_probes_package, stdlib_texts
from .probing.draw_classes import BinarySet
from .probing.sae_probes_package import MOST_ROWS, Penalty, Scores, Split, rank_latents, split_rows, tuned_scores
from .probing.scr_and_tpp import mean_scores
from .probing.source_and_settings import DataChoice, Source, find_source, load_all

MAX_TOKENS = 1024
ByK = dict[int, Scores]


@dataclass(frozen=True)
class Config(DataChoice):
    reg_type: Penalty = "l1"
    ks: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """SAEBench's default is 1, 2, 5."""
    binarize: bool = False
    include_llm_baseline: bool = True


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    source = find_source(context, config.data)
    loaded = cache(lambda: load_sets(source, config))
    length = min(MAX_TOKENS, context.model.facts.max_context)
    subjects, failures = split_fitting(
        context, subjects, context.model, lambda: longest_prompt(context.model, loaded()[0], length), require_reading
    )
    yield from failures
    if not subjects:
        return
    sets, missing = loaded()
    found: dict[LoadedSae, dict[str, ByK]] = {subject: {} for subject in subjects}  # by data set
    baselines: dict[tuple[int, ...], dict[str, Scores]] = {subject.layers: {} for subject in subjects}
    used = cut = 0
    for data in sets:
        split = split_rows(data.labels, config.random_seed)
        rows, shortened = token_rows(context.model, data.prompts[:MOST_ROWS], length)
        used, cut = used + len(rows), cut + shortened
        resid, latents = read_prompts(context, subjects, data.name, rows, config.llm_batch_size)
        if config.include_llm_baseline:
            for layers, dense in resid.items():
                baselines[layers][data.name] = _scores(dense, data, split, "l2", config.random_seed)
        with context.watch.stage(f"{data.name}: probes", len(subjects), "SAEs") as advance:
            for subject in subjects:
                found[subject][data.name] = score_latents(latents[subject], data, split, config)
                advance(1)
    names = tuple(data.name for data in sets)
    fixed = {"setting": "normal", "results_path": "", "model_cache_path": None, "baseline_method": "logreg"}
    data = source.settings(data_revision(context, config))
    settings = official_config(context, replace(config, dataset_names=names), **fixed, **data)
    kind = "stdlib" if source.name == "stdlib" else "sae-probes"
    text = f"{kind} prompts, {used:,} of two classes in {counted(len(sets), 'task')}"
    text += f", {counted(cut, 'prompt')} cut to {length:,} tokens" if cut else ""
    for subject in subjects:
        result = make_result(subject, settings, found[subject], baselines[subject.layers], missing)
        scores = [one for by_k in found[subject].values() for one in by_k.values()]
        scores += baselines[subject.layers].values()
        remark = remark_of(beyond("k", config.ks, subject.width), unconverged([one.has_converged for one in scores]))
        yield replace(result, remark=remark, measured_on=text)


def data_revision(context: Context, config: Config) -> Revision | None:
    """The revision of this Python's text, or the version of the package that contains the prompts."""
    source = find_source(context, config.data)
    return source.revision(()) if source.name == "stdlib" else sae_probes_package.revision()


def load_sets(source: Source, config: Config) -> tuple[list[BinarySet], str | None]:
    """The requested data sets, and why some are missing."""
    if source.name == "stdlib":
        names = config.dataset_names or stdlib_texts.BINARY_NAMES
        return load_all(names, lambda name: [stdlib_texts.load_binary(name, config.random_seed)])
    return load_all(config.dataset_names or sae_probes_package.names(), lambda name: [sae_probes_package.load(name)])


def score_latents(latents: csr_matrix, data: BinarySet, split: Split, config: Config) -> ByK:
    """Probes on the k latents that rank first, for each k."""
    ranked = rank_latents(latents[split.train], data.labels[split.train])

    def at(k: int) -> Scores:
        chosen = latents[:, ranked[:k]].toarray()
        rows = (chosen != 0).astype(np.float32) if config.binarize else chosen
        return _scores(rows, data, split, config.reg_type, config.random_seed)

    return {k: at(k) for k in config.ks}


def make_result(
    subject: LoadedSae,
    settings: Mapping[str, Any],
    found: Mapping[str, ByK],
    of_model: Mapping[str, Scores],
    missing: str | None,
) -> Result:
    """Means over data sets."""
    by_set = {
        name: {key: value for k, scores in by_k.items() for key, value in _named(f"sae_top_{k}", scores).items()}
        for name, by_k in found.items()
    }
    baselines = {name: _named("llm", scores) for name, scores in of_model.items()}
    means = mean_scores(by_set)
    ks = next(iter(found.values()))
    return Result(
        subject,
        settings,
        metrics={"llm": mean_scores(baselines), "sae": means},
        details=[
            {
                "dataset_name": name,
                **baselines.get(name, {}),
                **by_set[name],
                "sae_metrics_by_k": {str(k): scores.to_json() for k, scores in by_k.items()},
            }
            for name, by_k in found.items()
        ],
        extra={
            "sae_metrics_by_k": {
                str(k): {name: means[f"sae_top_{k}_{name}"] for name in scores.to_json()} for k, scores in ks.items()
            }
        },
        missing=missing,
    )


def _scores(rows: np.ndarray, data: BinarySet, split: Split, penalty: Penalty, seed: int) -> Scores:
    train, test = split.train, split.test
    return tuned_scores(rows[train], data.labels[train], rows[test], data.labels[test], penalty, seed)


def _named(prefix: str, scores: Scores) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in scores.to_json().items()}


def read_prompts(
    context: Context, subjects: Sequence[LoadedSae], title: str, rows: Sequence[Sequence[int]], batch_size: int
) -> tuple[dict[tuple[int, ...], np.ndarray], dict[LoadedSae, csr_matrix]]:
    """Residuals [N, D] by layers and latents [N, F] at the last token of each row, in the order of the rows; the model
    runs rows of similar length together."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    dense = [subject for subject in subjects if subject.needs]  # the others are encoded at the last tokens alone
    size = batch_size_for(dense, max(map(len, rows)), batch_size) if dense else batch_size
    reader = Reader(context.model, subjects, attention_of(context, subjects), size, context.say)
    with context.watch.stage(title, len(rows), "prompts") as advance:
        read = reader.read([Spot(rows[row], -1) for row in order], advance)
    back = np.argsort(order)
    resid = {subject.layers: read.x_of(subject.layers).cpu().numpy()[back] for subject in subjects}
    latents = {subject: stacked([to_sparse(acts) for acts in read.all_acts_of(subject)])[back] for subject in subjects}
    return resid, latents


def token_rows(model: LanguageModel, prompts: Sequence[str], context: int) -> tuple[list[list[int]], int]:
    """BOS and the last tokens of each prompt, at most `context` in all; and how many prompts lost their beginning."""
    encoded, room = model.tokenizer.encode(prompts), context - 1
    return [[model.bos, *ids[-room:]] for ids in encoded], sum(len(ids) > room for ids in encoded)


def longest_prompt(model: LanguageModel, sets: Sequence[BinarySet], context: int) -> int:
    """The most tokens that are read from a prompt."""
    return max(len(row) for data in sets for row in token_rows(model, data.prompts[:MOST_ROWS], context)[0])


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(model=True),
    summary=("sae.sae_top_1_test_auc", "sae.sae_top_5_test_auc", "llm.llm_test_auc"),
    least={"ks": 1},
    data_revision=data_revision,
)
