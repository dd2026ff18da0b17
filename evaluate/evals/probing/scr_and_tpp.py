"""What scr and tpp share: how switching off the latents of one class's probe affects every probe, and the scores.

For each data set the model reads the texts once, then every SAE is perturbed.

SAEBench 0.6.0's steps, for every SAE as if it were evaluated alone; one generator draws in this order:
1. Linear probes of all classes on mean residuals, kept at the epoch that is best on the test rows.
2. Their clean accuracies, on newly drawn rows.
3. Effects of all latents on the probe of each class, from training texts.
4. For each class and n: the n strongest latents are switched off in the test texts, then all probes are tested on newly
   drawn rows. Positions that had been set to zero are not masked again.

`corrected` repeats these steps without their faults: probes are picked by held-out training rows, clean and ablated
accuracies are from the same rows, and padding contributes nothing.

N texts, P probes, D residual width, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ....cache_schema.numbers_in_words import counted
from ...context.saes_usable_on_text import official_config, split_fitting
from ..evaluation_contract import Context, Evaluation, Failure, LoadedSae, Needs, Result, beyond, remark_of
from .draw_classes import OPPOSITES, Task
from .fit_probes import LinearProbe, Training, probe_every_class
from .pooled_features import Draw, Features, Memo, Pool, draw_probe, pool_task, seeded
from .source_and_settings import LEAST, Settings, Source, data_revision, filled, find_source, load_all

BOTH_WAYS = OPPOSITES | {negative: name for name, negative in OPPOSITES.items()}
CONCEPT, ATTRIBUTE, CONFOUNDED = "professor / nurse", "male / female", "male_professor / female_nurse"
LEAST_ROOM = 0.001  # less than this between clean and confounded leaves nothing to remove

Accuracies = Mapping[str, float]
Ablated = Mapping[str, Mapping[int, Accuracies]]
"""`Ablated[class][n][probe]` is a probe's accuracy with the n strongest latents of a class switched off."""
NewGenerator = Callable[[], torch.Generator]
Kind = Literal["scr", "tpp"]


@torch.no_grad()
def effects(latents: Features, draw: Draw, probe: LinearProbe, W_dec: Tensor, kind: Kind) -> Tensor:
    """float32 [F], from training texts: how much more a latent fires on the class, times how much its decoder row
    shifts the probe's logit. scr takes the absolute value; tpp the signed one, of latents that fire more on the
    class."""
    difference_F = latents.contrast(draw)
    direction_F = (probe.weight.cpu().float() @ W_dec.cpu().float().T).squeeze(0)
    if kind == "scr":
        return (difference_F * direction_F).abs()
    return difference_F.clamp(min=0) * direction_F


def top_effects(effects_F: Tensor, count: int) -> np.ndarray:
    """The latents with the largest effects; fewer if fewer have any."""
    available = min(count, int((effects_F != 0).sum()), len(effects_F))
    return torch.topk(effects_F, available).indices.numpy()


@dataclass(frozen=True, eq=False)
class Logits:
    """Every probe's logit of every test text."""

    table: np.ndarray  # float64 [N, P]
    probes: Sequence[str]
    spans: Mapping[str, range]

    def accuracy(self, probe: str, draw: Draw) -> float:
        says_yes = self.table[draw.rows, self.probes.index(probe)] > 0
        return float((says_yes == draw.labels).mean())


def logits_of(resid: Features, probes: Mapping[str, LinearProbe]) -> Logits:
    """The logits of texts as they are."""
    biases = torch.cat([probe.bias for probe in probes.values()]).double().cpu().numpy()
    return Logits(resid.matrix @ weights_of(probes) + biases, list(probes), resid.spans)


def weights_of(probes: Mapping[str, LinearProbe]) -> np.ndarray:
    """float64 [D, P]"""
    return torch.cat([probe.weight for probe in probes.values()]).double().cpu().numpy().T


@dataclass(frozen=True, eq=False)
class Probed:
    """Probes of the model's own features, and their logits and accuracies on unchanged test texts."""

    probes: Mapping[str, LinearProbe]
    untouched: Logits
    clean: Accuracies

    def logits_without(self, off: np.ndarray, latents: Features, W_dec: Tensor) -> Logits:
        """The logits with the latents `off` switched off: x' = decode(acts without them) + (x - decode(acts)).

        The decoder is linear, so this is x minus what those latents write. Probes are linear too, so a text's logit
        falls by its mean activations (`latents`) times the probe's products with the decoder rows. No text is encoded
        twice, and no ablated activation is ever computed, whatever the number of latents, classes and probes.
        """
        written = W_dec[torch.from_numpy(off)].double().cpu().numpy() @ weights_of(self.probes)
        return replace(self.untouched, table=self.untouched.table - latents.matrix[:, off] @ written)


@dataclass(frozen=True)
class Setup:
    """What differs between scr and tpp, and the settings they share."""

    kind: Kind
    classes: Sequence[str]
    """Those whose latents are switched off."""
    n_values: Sequence[int]
    training: Training
    seed: int

    @property
    def opposites(self) -> Mapping[str, str]:
        """Where negatives come from, if not from all other classes."""
        return BOTH_WAYS if self.kind == "scr" else {}


@dataclass(frozen=True)
class Perturbed:
    clean: Accuracies
    ablated: Ablated


@dataclass(frozen=True)
class Outcome:
    """One SAE's accuracies on one task, by SAEBench's steps and without their faults."""

    official: Perturbed
    corrected: Perturbed


def perturb(
    pool: Pool, subject: LoadedSae, task: Task, setup: Setup, generator: torch.Generator, of_model: Memo[Probed]
) -> Outcome:
    """Perturb both ways; the corrected way draws nothing from SAEBench's generator. SAEs share probes trained on the
    same draws."""
    resid = pool.of_model(subject.layers, task.train), pool.of_model(subject.layers, task.test)
    own = seeded(setup.seed)
    official = of_model.recall("official", generator, lambda: probe_model(*resid, setup, generator))
    corrected = of_model.recall("corrected", own, lambda: probe_model(*resid, setup, own, corrected=True))
    latents, W_dec = pool.of_latents(subject, task.train), subject.sae.W_dec.detach()

    def off(probed: Probed, tests: Features, new_generator: NewGenerator) -> Perturbed:
        return Perturbed(probed.clean, switch_off(latents, tests, W_dec, probed, setup, new_generator))

    return Outcome(
        off(official, pool.of_leaky_latents(subject, task.test), lambda: generator),
        off(corrected, pool.of_latents(subject, task.test), lambda: seeded(setup.seed)),
    )


def probe_model(
    train: Features, test: Features, setup: Setup, generator: torch.Generator, corrected: bool = False
) -> Probed:
    """Probes of all classes, and their accuracies on the texts as they are: on newly drawn rows or, if corrected, on
    test rows that are the same for all accuracies that follow."""
    probes, _ = probe_every_class(
        train, test, setup.training, generator, opposites=setup.opposites, validated=corrected
    )
    untouched = logits_of(test, probes)
    clean = accuracies(untouched, setup, seeded(setup.seed) if corrected else generator)
    return Probed(probes, untouched, clean)


def switch_off(
    train: Features, test: Features, W_dec: Tensor, probed: Probed, setup: Setup, new_generator: NewGenerator
) -> Ablated:
    """Accuracies of all probes on the test texts with each class's strongest latents off."""
    generator = new_generator()
    draws = {name: draw_probe(train.spans, name, generator, setup.opposites.get(name)) for name in setup.classes}
    found = {name: effects(train, draws[name], probed.probes[name], W_dec, setup.kind) for name in draws}

    def without(off: np.ndarray) -> Accuracies:
        return accuracies(probed.logits_without(off, test, W_dec), setup, new_generator())

    return {name: {n: without(top_effects(of, n)) for n in setup.n_values} for name, of in found.items()}


def accuracies(logits: Logits, setup: Setup, generator: torch.Generator) -> dict[str, float]:
    """Each class's probe on its own data; for scr also on the others'."""

    def draw(data: str) -> Draw:
        return draw_probe(logits.spans, data, generator, setup.opposites.get(data))

    found = {name: logits.accuracy(name, draw(name)) for name in setup.classes}
    if not setup.opposites:
        return found
    for data in setup.classes:
        rows = draw(data)
        found |= {on_data(name, data): logits.accuracy(name, rows) for name in setup.classes if name != data}
    return found


def evaluation_of(
    kind: Kind,
    load: Callable[[Source, str, Settings], list[Task]],
    make_result: Callable[[LoadedSae, Mapping[str, Any], Mapping[str, Outcome], str | None], Result],
    summary: tuple[str, ...],
) -> Evaluation[Settings]:
    """scr or tpp: a Failure for each SAE that cannot be evaluated, then the results of the others."""

    def evaluate(context: Context, subjects: Sequence[LoadedSae], config: Settings) -> Iterator[Result | Failure]:
        source = find_source(context, config.data)
        config = filled(config, source)
        assert config.context_length is not None
        length = config.context_length
        subjects, failures = split_fitting(context, subjects, context.model, lambda: length)
        yield from failures
        if not subjects:
            return
        tasks, missing = load_all(config.dataset_names, lambda name: load(source, name, config))
        settings, text = official_settings(config, context, source, kind, tasks), source.describe(tasks)
        for subject, outcomes in perturb_all(context, subjects, tasks, config, kind).items():
            result = make_result(subject, settings, outcomes, missing)
            remark = remark_of(result.remark, beyond("n", config.n_values, subject.width))
            yield replace(result, remark=remark, measured_on=text)

    least = LEAST | {"n_values": 1, "probe_train_batch_size": 1, "probe_epochs": 1}
    return Evaluation(Settings, evaluate, Needs(model=True), summary, least=least, data_revision=data_revision)


def official_settings(
    config: Settings, context: Context, source: Source, kind: Kind, tasks: Sequence[Task]
) -> dict[str, Any]:
    """The settings as results report them, with the data sets that were used."""
    loaded = {task.name.split("_scr_")[0] for task in tasks}
    names = [name for name in config.dataset_names if name in loaded]
    is_scr = kind == "scr"
    return official_config(
        context,
        replace(config, dataset_names=tuple(names)),
        perform_scr=is_scr,
        probe_test_batch_size=500,  # SAEBench's, without effect here: reported for its schema
        sae_batch_size=125,
        lower_vram_usage=False,
        column1_vals_lookup={name: [list(pair) for pair in source.pairs[name].column1] for name in names if is_scr},
        **source.settings(source.revision(names)),
    )


def perturb_all(
    context: Context, subjects: Sequence[LoadedSae], tasks: Sequence[Task], settings: Settings, kind: Kind
) -> dict[LoadedSae, dict[str, Outcome]]:
    """Every SAE's outcomes by task; the model reads each task's texts once for all."""
    assert settings.context_length is not None
    generators = {subject: seeded(settings.random_seed) for subject in subjects}
    outcomes: dict[LoadedSae, dict[str, Outcome]] = {subject: {} for subject in subjects}
    for task in tasks:
        classes = list(OPPOSITES if kind == "scr" else task.train)
        setup = Setup(kind, classes, settings.n_values, settings.training, settings.random_seed)
        pool = pool_task(context, subjects, task, settings.context_length, settings.llm_batch_size, leaky=True)
        of_model = {subject.layers: Memo[Probed]() for subject in subjects}
        with context.watch.stage(f"{task.name}: ablations", len(subjects), "SAEs") as advance:
            for subject in subjects:
                outcomes[subject][task.name] = perturb(
                    pool, subject, task, setup, generators[subject], of_model[subject.layers]
                )
                advance(1)
    return outcomes


def on_data(probe: str, data: str) -> str:
    """Key of the accuracy of one class's probe on another's data."""
    return f"{probe} probe on {data} data"


def tpp_scores(ablated: Ablated, clean: Accuracies) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over classes, and the scores of each class."""
    by_class: dict[str, dict[str, float]] = {name: {} for name in clean}
    for name, found in by_class.items():
        for n, accuracies in ablated[name].items():
            drops = {other: clean[other] - accuracies[other] for other in clean}
            intended = drops.pop(name)
            unintended = sum(drops.values()) / len(drops)
            found[f"tpp_threshold_{n}_total_metric"] = intended - unintended
            found[f"tpp_threshold_{n}_intended_diff_only"] = intended
            found[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
    return mean_scores(by_class), by_class


def scr_scores(ablated: Ablated, clean: Accuracies) -> dict[str, float]:
    """How much of the gap from confounded to clean accuracy the ablation closes, in both directions.

    The metric is the direction in which the confounded probe did worse; if they are equal there is none.
    """
    scores: dict[str, float] = {}
    start = before_ablation(clean)
    for direction, off, data, other in ((1, ATTRIBUTE, CONCEPT, ATTRIBUTE), (2, CONCEPT, ATTRIBUTE, CONCEPT)):
        room = clean[data] - start[data]
        for n, accuracies in ablated[off].items():
            moved = accuracies[on_data(CONFOUNDED, data)] - start[data]
            scores[f"scr_dir{direction}_threshold_{n}"] = 0 if room < LEAST_ROOM else moved / room
            if start[data] < start[other]:
                scores[f"scr_metric_threshold_{n}"] = scores[f"scr_dir{direction}_threshold_{n}"]
    return scores


def before_ablation(clean: Accuracies) -> dict[str, float]:
    """The confounded probe's accuracy on each group of data."""
    return {data: clean[on_data(CONFOUNDED, data)] for data in (CONCEPT, ATTRIBUTE)}


def scr_remark(cleans: Collection[Accuracies]) -> str | None:
    """How many pairs of concepts have a metric, and how many of these had nothing to remove; None if all is well."""
    rooms = list[float]()
    for clean in cleans:
        start = before_ablation(clean)
        if start[CONCEPT] != start[ATTRIBUTE]:
            worse = min(start, key=start.__getitem__)
            rooms.append(clean[worse] - start[worse])
    empty = sum(room < LEAST_ROOM for room in rooms)
    if len(rooms) == len(cleans) and not empty:
        return None
    as_zero = f", {empty} of them as 0 with nothing to remove" if empty else ""
    return f"{len(rooms)} of {counted(len(cleans), 'pair')} counted{as_zero}"


def mean_scores(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the parts that have it, in the order in which they first appear."""
    values: dict[str, list[float]] = {}
    for part in parts.values():
        for key, value in part.items():
            values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in values.items()}
