"""The seam for model families: where a decoder keeps its parts, and how to leave out what is not wanted.

Adding a family is adding one `Architecture` to `ARCHITECTURES`. It fits when the base model is a loop over
`layers`, a layer is called with the residual and keywords, and its attention module takes the residual after
`input_layernorm` together with the same keywords.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Architecture:
    """Names of transformers' modules in one family of decoders."""

    attention: str
    """The attention module of a layer."""
    final_norm: str
    """The norm behind the last layer of the base model."""
    drop_values: Callable[[Any], None]
    """Strips an attention module of all that its probabilities do not need."""


class AttentionOnly(nn.Module):
    """A decoder layer of which only the attention probabilities are wanted; the residual passes by."""

    def __init__(self, layer: Any, architecture: Architecture) -> None:
        super().__init__()
        self.input_layernorm: nn.Module = layer.input_layernorm
        self.attention: nn.Module = getattr(layer, architecture.attention)
        architecture.drop_values(self.attention)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        self.attention(hidden_states=self.input_layernorm(hidden_states), probs_only=True, **kwargs)
        return hidden_states


class NoValues(nn.Module):
    """Stands for a value projection whose result nobody reads."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], self.head_width)


class FusedWithoutValues(nn.Module):
    """A fused query-key-value projection without its rows for the values."""

    def __init__(self, fused: nn.Linear, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.weight = nn.Parameter(self._without_values(fused.weight), requires_grad=False)
        bias = fused.bias
        self.bias = None if bias is None else nn.Parameter(self._without_values(bias), requires_grad=False)

    def _without_values(self, rows: Tensor) -> Tensor:
        by_head = rows.detach().unflatten(0, (-1, 3, self.head_width))
        return by_head[:, :2].flatten(0, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        queries_and_keys = nn.functional.linear(x, self.weight, self.bias)
        by_head = queries_and_keys.unflatten(-1, (-1, 2 * self.head_width))
        return nn.functional.pad(by_head, (0, self.head_width)).flatten(-2)


def _drop_split_values(attention: Any) -> None:
    attention.v_proj = NoValues(attention.head_dim)
    attention.o_proj = nn.Identity()


def _drop_fused_values(attention: Any) -> None:
    attention.query_key_value = FusedWithoutValues(attention.query_key_value, attention.head_size)
    attention.dense = nn.Identity()


LLAMA_STYLE = Architecture("self_attn", "norm", _drop_split_values)
NEOX_STYLE = Architecture("attention", "final_layer_norm", _drop_fused_values)

ARCHITECTURES = {  # by transformers' model_type; every entry is tested against its eager model
    "gemma": LLAMA_STYLE,
    "gemma2": LLAMA_STYLE,
    "llama": LLAMA_STYLE,
    "mistral": LLAMA_STYLE,
    "qwen2": LLAMA_STYLE,
    "qwen3": LLAMA_STYLE,
    "gpt_neox": NEOX_STYLE,
}


def architecture_of(model_type: str | None) -> Architecture:
    """The entry of a model type, or an error that lists what there is."""
    if model_type is None or model_type not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"model type {model_type!r} cannot be harvested; supported are {', '.join(sorted(ARCHITECTURES))}. "
            "Another decoder of the same build needs one entry in harvest/model/architectures.py"
        )
    return ARCHITECTURES[model_type]


def cut(stack: Any, num_layers: int, attention_only_layer: int | None, architecture: Architecture) -> None:
    """Leave of a decoder stack its first `num_layers`, the last perhaps for its attention alone, and no norm."""
    stack.layers = stack.layers[:num_layers]
    setattr(stack, architecture.final_norm, nn.Identity())
    if attention_only_layer is not None:
        stack.layers[attention_only_layer] = AttentionOnly(stack.layers[attention_only_layer], architecture)
