"""What scr and tpp share: for each data set the model reads the texts once, then every SAE is perturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ....train.sae.model import SparseAutoencoder
from ...context.context import Context
from ...context.loaded_sae import LoadedSae
from ...context.results import Failure, Result
from ...errors import NotApplicable
from .ablation import Kind
from .features import seeded
from .perturbation import OfModel, Perturbed, Setup, perturb, perturb_corrected
from .pooling import pool_task
from .settings import Settings, filled
from .sources import Source, find_source
from .texts import Task


@dataclass(frozen=True)
class Outcome:
    """What one task says of one SAE, as SAEBench does it and without its faults."""

    official: Perturbed
    corrected: Perturbed


def evaluate_able(
    context: Context,
    subjects: Sequence[LoadedSae],
    config: Settings,
    evaluate: Callable[[Context, Sequence[LoadedSae], Source, Settings], Iterator[Result]],
) -> Iterator[Result | Failure]:
    """A Failure for each SAE that cannot be evaluated, then the results that `evaluate` gives for the others."""
    able, unable = divide(subjects)
    yield from unable
    if able:
        source = find_source(context, config.data)
        yield from evaluate(context, able, source, filled(config, source))


def divide(subjects: Sequence[LoadedSae]) -> tuple[list[LoadedSae], list[Failure]]:
    """The SAEs that write what they read by a plain decoder matrix, and why the others cannot be evaluated."""
    able: list[LoadedSae] = []
    unable: list[Failure] = []
    for subject in subjects:
        try:
            require_linear(subject)
            able.append(subject)
        except NotApplicable as reason:
            unable.append(Failure(subject, reason))
    return able, unable


def require_linear(subject: LoadedSae) -> None:
    """Switching latents off by logits rests on a decoder that is one matrix, back into the same layer."""
    _ = subject.layer
    if type(subject.sae).decode is not SparseAutoencoder.decode:
        raise NotApplicable(
            f"{subject.name} decodes by more than one matrix: this evaluation ablates latents by their decoder rows"
        )


def perturb_all(
    context: Context,
    subjects: Sequence[LoadedSae],
    tasks: Sequence[Task],
    settings: Settings,
    kind: Kind,
    classes_of: Callable[[Task], Sequence[str]],
) -> Iterator[tuple[LoadedSae, dict[str, Outcome]]]:
    """Outcomes by task, for every SAE; the model reads each task's texts once for all."""
    assert settings.context_length is not None
    generators: dict[LoadedSae, torch.Generator] = {subject: seeded(settings.random_seed) for subject in subjects}
    outcomes: dict[LoadedSae, dict[str, Outcome]] = {subject: {} for subject in subjects}
    for task in tasks:
        setup = Setup(kind, classes_of(task), settings.n_values, settings.training, settings.random_seed)
        pool = pool_task(context, subjects, task, settings.context_length, settings.llm_batch_size, leaky=True)
        of_model = {subject.layers: OfModel() for subject in subjects}
        with context.watch.stage(f"{task.name}: ablations", len(subjects), "SAEs") as advance:
            for subject in subjects:
                shared = of_model[subject.layers]
                outcomes[subject][task.name] = Outcome(
                    perturb(pool, subject, task, setup, generators[subject], shared),
                    perturb_corrected(pool, subject, task, setup, shared),
                )
                advance(1)
    yield from outcomes.items()
