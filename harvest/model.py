"""Load a causal language model and cut it down to what a harvest asks for.

1. Read the facts (layers, width, context) from the configuration alone, and refuse what cannot be had.
2. Load the decoder stack with no more layers than needed: the layers above, the final norm and the vocabulary
   projection are neither computed nor kept in memory.
3. Where the attention of a layer is wanted but not its residual, leave of that layer its input norm and the
   projections to queries and keys.

Everything that runs is transformers' own code; `architectures` says where its parts are found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .architectures import architecture_of, cut
from .attend import ATTENTION, register_attention
from .errors import ContextTooLong, LayerOutOfRange, WeightsIncomplete


@dataclass(frozen=True)
class ModelFacts:
    """What the configuration of a model says."""

    model_type: str
    num_layers: int
    d_model: int
    num_heads: int
    max_context: int
    vocab_size: int

    @staticmethod
    def of(config: PretrainedConfig) -> "ModelFacts":
        return ModelFacts(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            num_heads=config.num_attention_heads,
            max_context=config.max_position_embeddings,
            vocab_size=config.vocab_size,
        )

    def validate_context(self, context: int) -> None:
        if context > self.max_context:
            raise ContextTooLong(
                f"context {context}: the model was made for at most {self.max_context} tokens; lower --context"
            )


@dataclass(frozen=True)
class Wanted:
    """The layers whose residual stream (after the layer) and whose attention are to be captured."""

    resid_layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()

    @property
    def whole_layers(self) -> int:
        """How many layers are computed in full."""
        return max((*(layer + 1 for layer in self.resid_layers), *self.attention_layers), default=0)

    @property
    def num_layers(self) -> int:
        """How many layers are loaded: one more than computed in full where only its attention is wanted."""
        return max((self.whole_layers, *(layer + 1 for layer in self.attention_layers)))

    def validate(self, facts: ModelFacts) -> None:
        """Every layer exists and there is one to compute."""
        for kind, layers in (("residual", self.resid_layers), ("attention", self.attention_layers)):
            absent = [layer for layer in layers if not 0 <= layer < facts.num_layers]
            if absent:
                raise LayerOutOfRange(
                    f"{kind} of layer {absent[0]}: the model has layers 0 to {facts.num_layers - 1}; "
                    f"ask for layers in that range (--layer, --{kind.replace('residual', 'resid')}-layers)"
                )
        if self.num_layers == 0:
            raise LayerOutOfRange("no residual and no attention layer was asked for: name at least one layer")


@dataclass(frozen=True)
class TruncatedModel:
    """A decoder stack that computes what is wanted and stops there."""

    stack: PreTrainedModel
    facts: ModelFacts
    wanted: Wanted


def read_facts(source: str | Path) -> ModelFacts:
    """Facts of a model by its folder or hub id, without its weights."""
    facts = ModelFacts.of(AutoConfig.from_pretrained(source))
    architecture_of(facts.model_type)
    return facts


def load_model(
    source: str | Path, wanted: Wanted, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> TruncatedModel:
    """Load from a folder or hub id the part of a model that `wanted` needs."""
    facts = read_facts(source)
    wanted.validate(facts)
    register_attention()
    with _without_report():
        stack, report = AutoModel.from_pretrained(
            source,
            config=_shortened(AutoConfig.from_pretrained(source), wanted.num_layers),
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
        )
    _validate_report(report, source)
    return _truncated(stack.to(device), facts, wanted)


def truncate(model: PreTrainedModel, wanted: Wanted) -> TruncatedModel:
    """Cut a model that is in memory already; it is taken over, not copied."""
    facts = ModelFacts.of(model.config)
    wanted.validate(facts)
    register_attention()
    stack = model.base_model
    stack.set_attn_implementation(ATTENTION)
    _shortened(stack.config, wanted.num_layers)
    return _truncated(stack, facts, wanted)


def _truncated(stack: PreTrainedModel, facts: ModelFacts, wanted: Wanted) -> TruncatedModel:
    attention_only = wanted.whole_layers if wanted.num_layers > wanted.whole_layers else None
    cut(stack, wanted.num_layers, attention_only, architecture_of(facts.model_type))
    return TruncatedModel(stack.eval().requires_grad_(False), facts, wanted)


def _shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers
    return config


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the report that lists the layers left out on purpose; what matters in it is checked after."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _validate_report(report: dict, source: str | Path) -> None:
    """transformers fills missing weights with random numbers: never harvest those."""
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise WeightsIncomplete(
            f"{source}: {len(absent)} weights are missing or of another shape, the first is {absent[0]}; "
            "the download may be damaged, fetch the model again"
        )
