"""Which SAEs an evaluation on text can take, and the attention that some of them read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...cache_schema import AttentionSpec
from ..errors import DataMissing, NotRun, WidthMismatch
from ..model.prefix_suffix import LanguageModel
from .context import Context
from .loaded_sae import LoadedSae, attention_layers_of
from .results import Failure


def split_fitting(subjects: Sequence[LoadedSae], model: LanguageModel) -> tuple[list[LoadedSae], list[Failure]]:
    """SAEs that read and write one layer of this model, and for each other one the reason why not."""
    fitting: list[LoadedSae] = []
    failures: list[Failure] = []
    for subject in subjects:
        try:
            require_layer(subject, model)
        except (NotRun, WidthMismatch) as error:
            failures.append(Failure(subject, error))
        else:
            fitting.append(subject)
    return fitting, failures


def require_layer(subject: LoadedSae, model: LanguageModel) -> None:
    """The SAE reads and writes one layer, and the model has it in the SAE's width."""
    facts = model.facts
    if subject.layer >= facts.num_layers or subject.d_in != facts.d_model:
        raise WidthMismatch(
            f"{subject.name} reads width {subject.d_in} after layer {subject.layer}, but the model of this evaluation "
            f"has {facts.num_layers} layers of width {facts.d_model}. Give the SAE's own model by --model"
        )


def attention_of(context: Context, subjects: Sequence[LoadedSae]) -> AttentionSpec | None:
    """The attention that must come along because some SAE reads it, kept as the store keeps it."""
    layers = attention_layers_of(subjects)
    if not layers:
        return None
    if not context.manifest.attention.layers:
        raise DataMissing("an SAE reads attention, and the store holds none: harvest again with --attention-layers")
    return replace(context.manifest.attention, layers=layers)


def model_name_of(context: Context) -> str:
    """The model's name as results give it."""
    return context.model_name or (context.manifest.model.id if context.opened else "")
