"""What scr and tpp share: what switching a probe's latents off does to every probe.

For each data set the model reads the texts once, then every SAE is perturbed.

SAEBench 0.6.0's steps, for every SAE as if it were evaluated alone; one generator draws in this order:
1. Linear probes of all classes on mean residuals, kept at the epoch that is best on the test rows.
2. Their accuracies on newly drawn rows: what is clean.
3. Effects of all latents on the probe of each class, from training texts.
4. For each class and n: the n strongest latents are switched off in the test texts, then all probes are
   tested, on rows drawn anew. Positions that had been set to zero are not masked again.

`corrected` repeats 2 to 4 without what is wrong there: probes are picked by held-out training rows, clean and
ablated accuracies are of the same rows, and padding contributes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...context.usable_saes import split_fitting
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result
from .ablation import Ablatable, Kind, Logits, effects, top_effects
from .choose_source import Source, find_source, revision_of_perturbed
from .draw_classes import OPPOSITES, Task
from .features import Draw, Features, Memo, draw_probe, seeded
from .fit_probes import LinearProbe, Training, probe_every_class
from .pooling import Pool, pool_task
from .scr_and_tpp_formulas import Ablated, Accuracies, on_data
from .settings import LEAST_PERTURBED, Settings, filled

BOTH_WAYS = OPPOSITES | {negative: name for name, negative in OPPOSITES.items()}

NewGenerator = Callable[[], torch.Generator]


@dataclass(frozen=True)
class Setup:
    """What scr and tpp do differently, and the settings they share."""

    kind: Kind
    classes: Sequence[str]
    """Whose latents are switched off."""
    n_values: Sequence[int]
    training: Training
    seed: int

    @property
    def opposites(self) -> Mapping[str, str] | None:
        """Where negatives come from, if not from all other classes."""
        return BOTH_WAYS if self.kind == "absolute" else None


@dataclass(frozen=True)
class Probed:
    """Probes of the model's own features and what they score untouched."""

    probes: Mapping[str, LinearProbe]
    clean: Accuracies


@dataclass(frozen=True)
class Perturbed:
    """What came out for one SAE and one task."""

    clean: Accuracies
    ablated: Ablated


@dataclass(frozen=True)
class Outcome:
    """What one task says about one SAE, as SAEBench does it and without its faults."""

    official: Perturbed
    corrected: Perturbed


def perturb(
    pool: Pool, subject: LoadedSae, task: Task, setup: Setup, generator: torch.Generator, of_model: Memo[Probed]
) -> Outcome:
    """Perturb both ways; the corrected way draws nothing from SAEBench's generator. SAEs share probes, whose training
    draws the same for all."""
    resid = pool.of_model(subject.layers, task.train), pool.of_model(subject.layers, task.test)
    own = seeded(setup.seed)
    official = of_model.recall("official", generator, lambda: probe_model(*resid, setup, generator))
    corrected = of_model.recall("corrected", own, lambda: probe_model(*resid, setup, own, corrected=True))
    latents = pool.of_latents(subject, task.train)

    def off(probed: Probed, tests: Features, new_generator: NewGenerator) -> Perturbed:
        ablatable = Ablatable(resid[1], tests, subject.sae.W_dec.detach(), probed.probes)
        return Perturbed(probed.clean, switch_off(latents, ablatable, setup, new_generator))

    return Outcome(
        off(official, pool.of_leaky_latents(subject, task.test), lambda: generator),
        off(corrected, pool.of_latents(subject, task.test), lambda: seeded(setup.seed)),
    )


def probe_model(
    train: Features, test: Features, setup: Setup, generator: torch.Generator, corrected: bool = False
) -> Probed:
    """Probes of all classes, and their accuracies on the texts as they are: on newly drawn rows; corrected, on test
    rows that are seen once, the same for all accuracies that follow."""
    probes, _ = probe_every_class(
        train, test, setup.training, generator, opposites=setup.opposites, validated=corrected
    )
    untouched = Ablatable(test, test, torch.empty(0, test.width), probes).logits()
    return Probed(probes, accuracies(untouched, setup, seeded(setup.seed) if corrected else generator))


def switch_off(latents: Features, tests: Ablatable, setup: Setup, new_generator: NewGenerator) -> Ablated:
    """Accuracies of all probes with each class's strongest latents off."""
    generator, opposites = new_generator(), setup.opposites or {}
    draws = {name: draw_probe(latents.spans, name, generator, opposites.get(name)) for name in setup.classes}
    found = {name: effects(latents, draws[name], tests.probes[name], tests.W_dec, setup.kind) for name in draws}
    return {
        name: {n: accuracies(tests.logits(top_effects(of, n)), setup, new_generator()) for n in setup.n_values}
        for name, of in found.items()
    }


def accuracies(logits: Logits, setup: Setup, generator: torch.Generator) -> dict[str, float]:
    """Each class's probe on its own data; for scr also on the others'."""

    def draw(data: str) -> Draw:
        return draw_probe(logits.spans, data, generator, (setup.opposites or {}).get(data))

    found = {name: logits.accuracy(name, draw(name)) for name in setup.classes}
    if setup.opposites is None:
        return found
    for data in setup.classes:
        rows = draw(data)
        found |= {on_data(name, data): logits.accuracy(name, rows) for name in setup.classes if name != data}
    return found


Measure = Callable[[Context, Sequence[LoadedSae], Source, Settings], Iterator[Result]]


def evaluation_of(measure: Measure, summary: tuple[str, ...]) -> Evaluation[Settings]:
    """scr or tpp: a Failure for each SAE that cannot be evaluated, then what `measure` yields for the others."""

    def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Settings) -> Iterator[Result | Failure]:
        source = find_source(context, config.data)
        config = filled(config, source, source.perturbed)
        assert config.context_length is not None
        length = config.context_length
        able, unable = split_fitting(context, subjects, context.model, lambda: length)
        yield from unable
        if able:
            yield from measure(context, able, source, config)

    return Evaluation(
        Settings, evaluate, Needs(model=True), summary, least=LEAST_PERTURBED, data_revision=revision_of_perturbed
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
        of_model = {subject.layers: Memo[Probed]() for subject in subjects}
        with context.watch.stage(f"{task.name}: ablations", len(subjects), "SAEs") as advance:
            for subject in subjects:
                outcomes[subject][task.name] = perturb(
                    pool, subject, task, setup, generators[subject], of_model[subject.layers]
                )
                advance(1)
    yield from outcomes.items()
