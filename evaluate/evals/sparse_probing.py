"""sparse_probing: how well k latents predict a class, against k channels and the whole residual.

SAEBench 0.6.0's steps, for every SAE as if it were evaluated alone:
1. Residuals and every SAE's latents are averaged over the tokens of each text, in one pass.
2. One generator, seeded once, draws everything in SAEBench's order: for each data set the probe on the whole residual,
   those on k channels for each k, the probe on all latents, those on k latents.
3. Every probe separates a class from the same number of rows of the others, which are drawn anew each time.

SAEBench picks the epoch of the full-width probes by the test rows and reports that accuracy. The same number with
epochs picked by held-out training rows is under `validated`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..context.saes_usable_on_text import official_config, require_reading, split_fitting
from ..model.logistic_regression import unconverged
from .evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, beyond, remark_of
from .probing.draw_classes import Task
from .probing.fit_probes import FULL_WIDTH, probe_every_class, sparse_accuracy
from .probing.pooled_features import Features, Memo, Pool, draw_probe, pool_task, seeded
from .probing.source_and_settings import DataChoice, Source, data_revision, find_source, load_all

Accuracies = dict[str, dict[str, float]]  # by metric, then by class


@dataclass(frozen=True)
class Probed:
    """The scores of some probes of one data set."""

    accuracies: Accuracies
    converged: list[bool] = field(default_factory=list)
    """Whether each probe on k features did."""

    def __or__(self, other: Probed) -> Probed:
        return Probed(self.accuracies | other.accuracies, self.converged + other.converged)


@dataclass(frozen=True)
class Config(DataChoice):
    probe_train_set_size: int | None = None
    """Rows of one probe, half of them the class; None: 4000 of the hub's data, 320 of this Python's text."""
    probe_test_set_size: int | None = None
    """The same for tests; None: 1000 and 160."""
    context_length: int | None = None
    """None: 128 tokens of the hub's data, 48 of this Python's text."""
    k_values: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """SAEBench's default is 1, 2, 5; every additional k changes all draws after it."""


def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Config) -> Iterator[Result | Failure]:
    source = find_source(context, config.data)
    config = filled(config, source)
    train_size, test_size, length = config.probe_train_set_size, config.probe_test_set_size, config.context_length
    assert train_size is not None and test_size is not None and length is not None
    seed = config.random_seed
    subjects, failures = split_fitting(context, subjects, context.model, lambda: length, require_reading)
    yield from failures
    if not subjects:
        return
    tasks, missing = load_all(config.dataset_names, lambda name: [source.load_task(name, train_size, test_size, seed)])
    generators = {subject: seeded(seed) for subject in subjects}
    found: dict[LoadedSae, dict[str, Probed]] = {subject: {} for subject in subjects}  # by data set
    for task in tasks:
        pool = pool_task(context, subjects, task, length, config.llm_batch_size)
        of_model = {subject.layers: Memo[Probed]() for subject in subjects}
        with context.watch.stage(f"{task.name}: probes", len(subjects), "SAEs") as advance:
            for subject in subjects:
                found[subject][task.name] = probe_subject(
                    pool, subject, task, config, generators[subject], of_model[subject.layers], context.device
                )
                advance(1)
    config = replace(config, dataset_names=tuple(task.name for task in tasks))
    data = source.settings(source.revision(config.dataset_names))
    settings = official_config(context, config, sae_batch_size=125, lower_vram_usage=False, **data)
    text = source.describe(tasks)
    for subject in subjects:
        remark = remark_of(
            beyond("k", config.k_values, subject.width),
            beyond("k", config.k_values, subject.d_in, "channel", "the residual"),
            unconverged([one for probed in found[subject].values() for one in probed.converged]),
        )
        yield replace(make_result(subject, settings, found[subject], missing), remark=remark, measured_on=text)


def filled(config: Config, source: Source) -> Config:
    return replace(
        config,
        data=source.name,
        dataset_names=config.dataset_names or source.probing,
        probe_train_set_size=config.probe_train_set_size or source.train_size,
        probe_test_set_size=config.probe_test_set_size or source.test_size,
        context_length=config.context_length or source.context,
    )


def probe_subject(
    pool: Pool,
    subject: LoadedSae,
    task: Task,
    config: Config,
    generator: torch.Generator,
    of_model: Memo[Probed],
    device: torch.device,
) -> Probed:
    """Every probe of one data set for one SAE, in SAEBench's order. SAEs share the probes of the model's own features
    where their draws are the same."""
    residual = [pool.of_model(subject.layers, part) for part in (task.train, task.test)]
    latents = [pool.of_latents(subject, part) for part in (task.train, task.test)]
    llm = of_model.recall(
        "official", generator, lambda: probe_features("llm", residual, config.k_values, generator, device)
    )
    sae = probe_features("sae", latents, config.k_values, generator, device)
    own = seeded(config.random_seed)  # our own probes draw nothing from SAEBench's generator
    llm |= of_model.recall("validated", own, lambda: probe_validated("llm", residual, own, device))
    sae |= probe_validated("sae", latents, seeded(config.random_seed), device)
    first = "sae_test_accuracy"  # SAEBench's order of keys
    return Probed({first: sae.accuracies[first]}) | llm | sae


def probe_features(
    name: str, features: Sequence[Features], k_values: Sequence[int], generator: torch.Generator, device: torch.device
) -> Probed:
    """The full-width probes, then those on k features, of every class."""
    train, test = features
    _, full = probe_every_class(train, test, FULL_WIDTH, generator, device)
    found, converged = {f"{name}_test_accuracy": full}, list[bool]()
    for k in k_values:
        accuracies = found[f"{name}_top_{k}_test_accuracy"] = {}
        for label in train.spans:
            train_draw = draw_probe(train.spans, label, generator)
            test_draw = draw_probe(test.spans, label, generator)
            accuracies[label], is_done = sparse_accuracy(train, train_draw, test, test_draw, k)
            converged.append(is_done)
    return Probed(found, converged)


def probe_validated(
    name: str, features: Sequence[Features], generator: torch.Generator, device: torch.device
) -> Probed:
    """The full-width probes at the epoch that held-out training rows pick."""
    train, test = features
    _, accuracies = probe_every_class(train, test, FULL_WIDTH, generator, device, validated=True)
    return Probed({f"{name}_validated_test_accuracy": accuracies})


def make_result(
    subject: LoadedSae, settings: Mapping[str, Any], probed: Mapping[str, Probed], missing: str | None
) -> Result:
    """Means over classes, then over data sets."""
    by_data_set = {name: found.accuracies for name, found in probed.items()}
    means = {name: {key: _mean(values) for key, values in found.items()} for name, found in by_data_set.items()}
    overall = {key: _mean({name: found[key] for name, found in means.items()}) for key in next(iter(means.values()))}
    validated = {key: value for key, value in overall.items() if "validated" in key}
    official = {key: value for key, value in overall.items() if key not in validated}
    return Result(
        subject,
        settings,
        metrics={kind: {k: v for k, v in official.items() if k.startswith(f"{kind}_")} for kind in ("llm", "sae")},
        details=[{"dataset_name": f"{name}_results", **found} for name, found in means.items()],
        unstructured={f"{name}_results": found for name, found in by_data_set.items()},
        extra={"validated": {key.replace("_validated", ""): value for key, value in validated.items()}},
        missing=missing,
    )


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


EVALUATION = Evaluation(
    Config,
    evaluate,
    needs=Needs(model=True),
    summary=("sae.sae_top_1_test_accuracy", "sae.sae_top_5_test_accuracy", "llm.llm_top_5_test_accuracy"),
    least={"probe_train_set_size": 4, "probe_test_set_size": 4, "context_length": 2, "k_values": 1},
    data_revision=data_revision,
)
