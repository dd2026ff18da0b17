"""contrast: do latents tell contrasting texts apart, and nothing else? No judge is needed.

Interpretability as in CE-Bench: no language model explains a latent or predicts its firing, and no probe is trained.
1. A contrast is two classes of a data set: texts of two libraries, of two professions, code and prose.
2. A text has one value for each latent, the mean over its tokens (`probing/pooled_features.py`).
3. The effect of a latent at a contrast is 2 AUC - 1 over the texts of both sides: 1 if every text of the first has more
   of the latent than every one of the second, 0 if it makes no difference. Ranks have no scale, so SAEs are comparable.
4. Training texts choose each latent's contrast and its direction; test texts give the number. A latent that differed
   only by chance comes out at 0.
The baseline is the same measure on the channels of the residual. N texts, F latents, C contrasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

from ...cache_schema.strict_json import to_json
from ..context.saes_usable_on_text import require_reading, split_fitting
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .probing.pooled_features import Features, pool_task
from .probing.source_and_settings import LEAST, DataSettings, data_revision, filled, find_source, load_all

AT_ONCE = 1024  # features; 16 bits must be able to number them
NO_LATENTS = "no latent is in enough training texts to be measured (contrast.least_texts)"
NO_OTHERS = "every two contrasts share a class: independence cannot be measured"


@dataclass(frozen=True)
class Config(DataSettings):
    """Texts are those of both sides of a contrast, by default at most 400 for training and 400 for tests."""

    least_texts: int = 5
    """Training texts that a latent must be in to be measured."""
    strong: float = 0.5
    """The effect from which a latent counts as strong: at 0.5 it orders three of four pairs of texts."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of all features at the contrasts of some data sets. float64 [C, F]."""

    contrasts: tuple[tuple[str, str, str], ...]
    """Data set and both classes."""
    train: np.ndarray
    test: np.ndarray
    texts: np.ndarray
    """int64 [F]: how many training texts a feature is in."""


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    source = find_source(context, config.data)
    config = filled(config, source, most=400)  # of the hub's thousands
    assert config.context_length is not None
    length, sizes, seed = config.context_length, config.sizes, config.random_seed
    subjects, failures = split_fitting(context, subjects, context.model, lambda: length, require_reading)
    yield from failures
    if not subjects:
        return
    tasks, missing = load_all(config.dataset_names, lambda name: [source.load_task(name, *sizes, seed)])
    latents: dict[LoadedSae, list[Effects]] = {subject: [] for subject in subjects}
    channels: dict[tuple[int, ...], list[Effects]] = {subject.layers: [] for subject in subjects}
    for task in tasks:
        pool = pool_task(context, subjects, task, length, config.llm_batch_size)
        for layers, found in channels.items():
            found.append(effects_of(task.name, *(pool.of_model(layers, part) for part in (task.train, task.test))))
        with context.watch.stage(f"{task.name}: contrasts", len(subjects), "SAEs") as advance:
            for subject in subjects:
                own = (pool.of_latents(subject, part) for part in (task.train, task.test))
                latents[subject].append(effects_of(task.name, *own))
                advance(1)
    names = tuple(task.name for task in tasks)
    settings = {**to_json(replace(config, dataset_names=names)), **source.settings(source.revision(names))}
    text = source.describe(tasks)
    for subject in subjects:
        effects_of_both = joined(latents[subject]), joined(channels[subject.layers])
        result = make_result(subject, settings, *effects_of_both, config, missing)
        yield replace(result, measured_on=text)


def effects_of(name: str, train: Features, test: Features) -> Effects:
    """The effect of every feature at each pair of classes of a data set."""
    contrasts = tuple((name, one, other) for one, other in combinations(train.spans, 2))
    return Effects(contrasts, effects(train), effects(test), np.diff(train.matrix.indptr).astype(np.int64))


def effects(features: Features) -> np.ndarray:
    """float64 [pairs, F]: 2 AUC - 1 of each pair of classes; equal values count as half above each other."""
    blocks = [features.matrix[:, start : start + AT_ONCE] for start in range(0, features.width, AT_ONCE)]
    return np.concatenate([_effects(block, [len(span) for span in features.spans.values()]) for block in blocks], 1)


def _effects(matrix: csc_matrix, sizes: Sequence[int]) -> np.ndarray:
    """Values are sorted once for all pairs, and all zeros, which are most, count as a single value of many texts. K
    classes; V distinct values, one feature after the other."""
    width, classes = len(matrix.indptr) - 1, len(sizes)
    feature = np.repeat(np.arange(width), np.diff(matrix.indptr))
    class_of = np.repeat(np.arange(classes), sizes)[matrix.indices]
    stored_FK = np.bincount(feature * classes + class_of, minlength=width * classes).reshape(width, classes)
    values, feature = np.append(matrix.data, np.zeros(width, np.float32)), np.append(feature, np.arange(width))
    order = np.argsort(values)
    order = order[np.argsort(feature[order].astype(np.uint16), kind="stable")]  # numpy sorts 16 bits by counting
    values, feature = values[order], feature[order]
    first = np.flatnonzero((np.diff(values, prepend=np.nan) != 0) | (np.diff(feature, prepend=-1) != 0))
    of_V, texts_KV, below_KV = feature[first], [], []
    for number, size in enumerate(sizes):
        texts_V = np.add.reduceat(np.append(class_of == number, size - stored_FK[:, number])[order], first)
        texts_KV.append(texts_V)
        below_KV.append(texts_V.cumsum() - texts_V / 2 - of_V * size)  # minus those of the features before
    return np.stack(
        [
            2 * np.bincount(of_V, texts_KV[one] * below_KV[other], width) / (sizes[one] * sizes[other]) - 1
            for one, other in combinations(range(classes), 2)
        ]
    )


def joined(parts: Sequence[Effects]) -> Effects:
    return Effects(
        tuple(contrast for part in parts for contrast in part.contrasts),
        np.concatenate([part.train for part in parts]),
        np.concatenate([part.test for part in parts]),
        np.sum([part.texts for part in parts], axis=0),
    )


def make_result(
    subject: LoadedSae,
    settings: Mapping[str, Any],
    latents: Effects,
    channels: Effects,
    config: Config,
    missing: str | None,
) -> Result:
    own = summarise(latents, config)
    residual = {key: value for key, value in summarise(channels, config).items() if key in ("mean", "best")}
    best = np.abs(latents.train).argmax(1)
    details = [
        {"contrast": f"{name}: {one} / {other}", "latent": int(latent), "effect": float(latents.test[row, latent])}
        for row, ((name, one, other), latent) in enumerate(zip(latents.contrasts, best, strict=True))
    ]
    remark = None if "independence" in own else NO_OTHERS if own["measured_share"] else NO_LATENTS
    metrics = {"contrast": own, "residual": residual}
    return Result(subject, settings, metrics, details=details, missing=missing, remark=remark)


def summarise(found: Effects, config: Config) -> dict[str, float]:
    """Means over the features that are in enough texts; for `best`, over contrasts. All from test texts, in the
    direction that training texts chose."""
    signed_CF = found.test * np.sign(found.train)
    best = np.abs(found.train).argmax(1)
    metrics = {"best": float(signed_CF[np.arange(len(best)), best].mean())}
    measured = np.flatnonzero(found.texts >= config.least_texts)
    metrics["measured_share"] = len(measured) / len(found.texts)
    if len(measured) == 0:
        return metrics | {"mean": math.nan, "strong_share": math.nan}
    own = np.abs(found.train[:, measured]).argmax(0)
    effect_F = signed_CF[own, measured]
    metrics |= {"mean": float(effect_F.mean()), "strong_share": float((effect_F >= config.strong).mean())}
    apart_CC = np.array([[_share_nothing(one, other) for other in found.contrasts] for one in found.contrasts])
    others_F = apart_CC[own].sum(1)
    if others_F.all():
        elsewhere_F = (apart_CC[own].T * np.abs(found.test[:, measured])).sum(0) / others_F
        metrics["independence"] = float((effect_F - elsewhere_F).mean())
    return metrics


def _share_nothing(one: tuple[str, str, str], other: tuple[str, str, str]) -> bool:
    """Whether two contrasts have no class in common."""
    return one[0] != other[0] or not set(one[1:]) & set(other[1:])


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(model=True),
    summary=("contrast.mean", "contrast.strong_share", "contrast.independence", "residual.mean"),
    least=LEAST,
    data_revision=data_revision,
)
