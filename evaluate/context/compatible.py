"""Which SAEs an evaluation on text can take, and the attention that some of them read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...cache_schema import AttentionSpec
from ..errors import NotRun, WidthMismatch
from ..model.lm import LanguageModel
from .context import Scene
from .loaded_sae import Subject
from .results import Failure


def split_fitting(subjects: Sequence[Subject], model: LanguageModel) -> tuple[list[Subject], list[Failure]]:
    """SAEs that read and write one layer of this model, and for each other one the reason why not."""
    fitting: list[Subject] = []
    failures: list[Failure] = []
    for subject in subjects:
        try:
            require_layer(subject, model)
        except (NotRun, WidthMismatch) as error:
            failures.append(Failure(subject, error))
        else:
            fitting.append(subject)
    return fitting, failures


def require_layer(subject: Subject, model: LanguageModel) -> None:
    """The SAE reads and writes one layer, and the model has it in the SAE's width."""
    facts = model.facts
    if subject.layer >= facts.num_layers or subject.d_in != facts.d_model:
        raise WidthMismatch(
            f"{subject.name} reads width {subject.d_in} after layer {subject.layer}, but the model of this evaluation "
            f"has {facts.num_layers} layers of width {facts.d_model}"
        )


def layers_of(subjects: Sequence[Subject]) -> tuple[int, ...]:
    """The layers that these SAEs read, in rising order."""
    return tuple(sorted({subject.layer for subject in subjects}))


def attention_of(scene: Scene, subjects: Sequence[Subject]) -> AttentionSpec | None:
    """The attention that must come along because some SAE reads it, kept as the store keeps it."""
    layers = tuple(sorted({layer for subject in subjects for layer in subject.attention_layers}))
    return replace(scene.manifest.attention, layers=layers) if layers else None


def model_name_of(scene: Scene) -> str:
    """The model's name as results give it."""
    return scene.model_name or (scene.manifest.model.id if scene.opened else "")
