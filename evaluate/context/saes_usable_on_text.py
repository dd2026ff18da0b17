"""Which SAEs an evaluation on text can take, and the attention that some of them read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from ...cache_schema import AttentionSpec
from ...cache_schema.strict_json import to_json
from ..errors import DataMissing, NotApplicable, NotRun, WidthMismatch
from ..model.prefix_suffix import LanguageModel
from .context import Context
from .loaded_sae import LoadedSae, attention_layers_of
from .write_and_read_results import Failure, deciding

Require = Callable[[LoadedSae, LanguageModel], None]


def require_reading(subject: LoadedSae, model: LanguageModel) -> None:
    """Require that the model has the layers that the SAE reads and that side by side they have its width."""
    facts, layers = model.facts, subject.layers
    if max(layers) >= facts.num_layers or subject.d_in != len(layers) * facts.d_model:
        named = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        raise WidthMismatch(
            f"{subject.name} reads width {subject.d_in} after {named}, but the model of this evaluation "
            f"has {facts.num_layers} layers of width {facts.d_model}. Give the SAE's own model with --model"
        )


def require_layer(subject: LoadedSae, model: LanguageModel) -> None:
    """Require that the SAE reads and writes one layer, and that the model has it in the SAE's width."""
    _ = subject.layer
    require_reading(subject, model)


def require_places(subject: LoadedSae, longest: int) -> None:
    """Refuse longer texts than an SAE that reads positions was trained on: it knows no positions beyond those."""
    context = subject.metadata.get("context_size")
    if isinstance(context, int) and context < longest:
        raise NotApplicable(
            f"{subject.name} reads the positions of tokens and was trained on windows of {context}, but a text of this "
            f"evaluation has up to {longest} tokens. Ask for shorter texts if a setting gives their length "
            "(context_length), or train the SAE on longer windows"
        )


def split_fitting(
    context: Context,
    subjects: Sequence[LoadedSae],
    model: LanguageModel,
    longest: Callable[[], int],
    require: Require = require_layer,
) -> tuple[list[LoadedSae], list[Failure]]:
    """The SAEs that an evaluation can take, and a failure for each of the others: what `require` raises, that the
    attention it reads is not available, or that texts are too long for it. `longest` returns the most tokens that a
    text has; it is called only if an SAE reads positions."""
    fitting: list[LoadedSae] = []
    failures: list[Failure] = []
    longest = cache(longest)
    for subject in subjects:
        try:
            require(subject, model)
            attention_of(context, [subject])
            # SAEs that read attention use positions only to count tokens back, so texts may have any length.
            if "position" in subject.needs and "attention" not in subject.needs:
                require_places(subject, longest())
        except (NotRun, WidthMismatch) as error:
            failures.append(Failure(subject, error))
        else:
            fitting.append(subject)
    return fitting, failures


def attention_of(context: Context, subjects: Sequence[LoadedSae]) -> AttentionSpec | None:
    """The attention that these SAEs read, to be computed and kept as in the store; None if they read none."""
    layers = attention_layers_of(subjects)
    if not layers:
        return None
    if not context.manifest.attention.layers:
        raise DataMissing("an SAE reads attention, but the store holds none: harvest again with --attention-layers")
    return replace(context.manifest.attention, layers=layers)


def official_config(context: Context, config: Any, **fixed: Any) -> dict[str, Any]:
    """A result's settings under SAEBench's keys, along with ours; `fixed` are those that a `Config` lacks or holds in
    another form."""
    dtype = str(context.model.dtype).removeprefix("torch.")
    return {**deciding(to_json(config)), "model_name": context.name_of_model, "llm_dtype": dtype, **fixed}
