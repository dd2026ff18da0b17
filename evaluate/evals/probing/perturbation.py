"""scr and tpp: what switching a probe's latents off does to every probe.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...context.loaded_sae import LoadedSae
from .ablation import Ablatable, Kind, Logits, effects_of_classes, top_effects
from .dense_probe import LinearProbe, Training, probe_every_class
from .features import Draw, Features, Memo, draw_probe, seeded
from .pooling import Pool
from .scores import Ablated, Accuracies, on_data
from .texts import OPPOSITES, Task

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
        """Where negatives come from, where they are not drawn from all other classes."""
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
class OfModel:
    """Probes that SAEs share: their training draws the same for all."""

    official: Memo[Probed] = field(default_factory=Memo)
    corrected: Memo[Probed] = field(default_factory=Memo)


def perturb(
    pool: Pool, subject: LoadedSae, task: Task, setup: Setup, generator: torch.Generator, of_model: OfModel
) -> Perturbed:
    """As SAEBench does it."""
    resid = pool.of_model(subject.layers, task.train), pool.of_model(subject.layers, task.test)
    probed = of_model.official.recall(generator, lambda: probe_model(*resid, setup, generator))
    latents = pool.of_latents(subject, task.train)
    leaky = pool.of_leaky_latents(subject, task.test)
    tests = Ablatable(resid[1], leaky, subject.sae.W_dec.detach(), probed.probes)
    return Perturbed(probed.clean, switch_off(latents, tests, setup, lambda: generator))


def perturb_corrected(pool: Pool, subject: LoadedSae, task: Task, setup: Setup, of_model: OfModel) -> Perturbed:
    """The same without what is wrong in it; draws nothing from SAEBench's generator."""
    resid = pool.of_model(subject.layers, task.train), pool.of_model(subject.layers, task.test)
    own = seeded(setup.seed)
    probed = of_model.corrected.recall(own, lambda: probe_model_corrected(*resid, setup, own))
    latents = pool.of_latents(subject, task.train)
    masked = pool.of_latents(subject, task.test)
    tests = Ablatable(resid[1], masked, subject.sae.W_dec.detach(), probed.probes)
    return Perturbed(probed.clean, switch_off(latents, tests, setup, lambda: seeded(setup.seed)))


def probe_model(train: Features, test: Features, setup: Setup, generator: torch.Generator) -> Probed:
    """Probes of all classes, and their accuracies on rows drawn anew."""
    probes, _ = probe_every_class(train, test, setup.training, generator, opposites=setup.opposites)
    return Probed(probes, accuracies(untouched(test, probes), setup, generator))


def probe_model_corrected(train: Features, test: Features, setup: Setup, generator: torch.Generator) -> Probed:
    """The same, but test rows are seen once: those of the clean accuracies, and of all that follow."""
    probes, _ = probe_every_class(train, test, setup.training, generator, opposites=setup.opposites, validated=True)
    return Probed(probes, accuracies(untouched(test, probes), setup, seeded(setup.seed)))


def untouched(test: Features, probes: Mapping[str, LinearProbe]) -> Logits:
    """What the probes say of the texts as they are."""
    nothing = torch.empty(0, test.width)
    return Ablatable(test, test, nothing, probes).logits()


def switch_off(latents: Features, tests: Ablatable, setup: Setup, new_generator: NewGenerator) -> Ablated:
    """Accuracies of all probes with each class's strongest latents off."""
    generator = new_generator()
    effects = effects_of_classes(
        latents, tests.probes, setup.classes, tests.W_dec, setup.kind, generator, setup.opposites
    )
    return {
        name: {
            n: accuracies(tests.logits(top_effects(effects[name], n)), setup, new_generator()) for n in setup.n_values
        }
        for name in setup.classes
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
