"""The contract of an architecture: where a family of decoders keeps its parts, and how to drop unneeded ones.

To add a family, add one `Architecture` to `ARCHITECTURES` under transformers' model_type, and a small config of it to
CONFIGS in tests/harvest/conftest.py: the tests then compare its residuals and attention with transformers' own eager
model. These conditions must hold, or the model is refused by name:

1. The base model loops over the modules in `layers` and ends with the norm `final_norm`. `positions` names the table
   that it adds to embeddings before the first layer.
2. A layer takes the residual and more, returns the residual, and passes its other arguments on to its attention.
3. The layer's `attention` reads the residual through `input_norm`, has a `layer_idx`, and calls transformers'
   attention interface (`attn_implementation`).
4. `norm` is the computation of `final_norm`, so that a head can be read without the model's classes.
5. `drop_values` keeps the attention's probabilities bit-exact while saving the cost of the values.
6. `hooks` locates the activations of each hook in a layer; a hook that is not listed does not exist. An output that a
   family scales before adding it to the residual (granite's `residual_multiplier`) is kept unscaled.

A decoder of another structure does not fit, and `require_parts` reports the parts that it lacks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from ...cache_schema.strict_json import nearest
from ..errors import HookMissing, UnsupportedArchitecture
from .products_in_16_bits import conv1d, linear

Norm = Literal["rms", "rms from one", "layer"]


@dataclass(frozen=True)
class Tap:
    """Where to find a hook's activations: a module's first argument or its output."""

    module: str
    """The module's path below the layer."""
    of_input: bool = False
    take: Callable[[Any, Tensor], Tensor] | None = None
    """Selects the hook's part, given the layer; None if it is all."""


@dataclass(frozen=True)
class Architecture:
    """The names of transformers' modules in one family of decoders."""

    attention: str
    """The attention module of a layer."""
    final_norm: str
    """The norm after the last layer of the base model."""
    norm: Norm
    """Its computation: RMS norm times its weight, or times one plus its weight; or torch's layer_norm."""
    drop_values: Callable[[Any], None]
    """Strips an attention module of everything not needed for its probabilities."""
    hooks: Mapping[str, Tap]
    """Hooks other than the residual stream."""
    layers: str = "layers"
    input_norm: str = "input_layernorm"
    """The norm of a layer before its attention."""
    positions: str | None = None
    """The base model's table of learned positions."""

    def layers_of(self, stack: Any) -> Any:
        """The decoder layers of a base model."""
        return getattr(stack, self.layers)

    def tap(self, hook: str) -> Tap:
        """Where a hook is, or an error that lists the existing hooks."""
        if hook not in self.hooks:
            raise HookMissing(
                f"--hooks {hook}: the layers of this model have {', '.join(self.hooks)}"
                f"{nearest(hook, self.hooks)}. harvest/model/architectures.py lists where each is found"
            )
        return self.hooks[hook]


class AttentionOnly(nn.Module):
    """A decoder layer reduced to its attention probabilities; the residual passes through unchanged."""

    def __init__(self, layer: Any, architecture: Architecture) -> None:
        super().__init__()
        self.input_layernorm: nn.Module = getattr(layer, architecture.input_norm)
        self.attention: nn.Module = getattr(layer, architecture.attention)
        architecture.drop_values(self.attention)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.attention(self.input_layernorm(hidden_states), *args, probs_only=True, **kwargs)
        return hidden_states


class NoValues(nn.Module):
    """Replaces a value projection whose output is not used."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], self.head_width)


class FusedWithoutValues(nn.Module):
    """A fused query-key-value projection without its value rows."""

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
        queries_and_keys = linear(x, self.weight, self.bias)
        by_head = queries_and_keys.unflatten(-1, (-1, 2 * self.head_width))
        return nn.functional.pad(by_head, (0, self.head_width)).flatten(-2)


class ColumnsWithoutValues(nn.Module):
    """The same for GPT-2's projection, whose weight has queries, keys and values side by side."""

    def __init__(self, fused: Any, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(fused.weight.detach()[:, : 2 * width].contiguous(), requires_grad=False)
        self.bias = nn.Parameter(fused.bias.detach()[: 2 * width].contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(conv1d(x, self.weight, self.bias), (0, self.width))


class NoPositions(nn.Module):
    """Replaces a table of positions for input that already includes them."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return position_ids.new_zeros(())


def _drop_split_values(attention: Any) -> None:
    attention.v_proj = NoValues(attention.head_dim)
    attention.o_proj = nn.Identity()


def _drop_fused_values(attention: Any) -> None:
    attention.query_key_value = FusedWithoutValues(attention.query_key_value, attention.head_size)
    attention.dense = nn.Identity()


def _drop_columns_of_values(attention: Any) -> None:
    attention.c_attn = ColumnsWithoutValues(attention.c_attn, attention.split_size)
    attention.c_proj = nn.Identity()


def _of_columns(part: int, layer: Any, fused: Tensor) -> Tensor:
    """Queries (0) or keys (1) of all heads side by side, from the output of GPT-2's projection."""
    return fused.split(layer.attn.split_size, dim=-1)[part]


def _of_fused(part: int, layer: Any, fused: Tensor) -> Tensor:
    """Queries (0) or keys (1) of all heads side by side, from the output of a fused projection."""
    return fused.unflatten(-1, (-1, 3, layer.attention.head_size))[..., part, :].flatten(-2)


LLAMA_STYLE = Architecture(
    "self_attn",
    "norm",
    "rms",
    _drop_split_values,
    {
        "mlp_in": Tap("mlp", of_input=True),
        "mlp_out": Tap("mlp"),
        "attn_out": Tap("self_attn"),
        "q": Tap("self_attn.q_proj"),
        "k": Tap("self_attn.k_proj"),
        "z": Tap("self_attn.o_proj", of_input=True),
    },
)
NORMED_SUBLAYERS = {"mlp_out": Tap("post_feedforward_layernorm"), "attn_out": Tap("post_attention_layernorm")}
GEMMA_STYLE = replace(LLAMA_STYLE, norm="rms from one")
GEMMA2_STYLE = replace(GEMMA_STYLE, hooks={**LLAMA_STYLE.hooks, **NORMED_SUBLAYERS})
NEOX_STYLE = Architecture(
    "attention",
    "final_layer_norm",
    "layer",
    _drop_fused_values,
    {
        "mlp_in": Tap("mlp", of_input=True),
        "mlp_out": Tap("mlp"),
        "attn_out": Tap("attention"),
        "q": Tap("attention.query_key_value", take=partial(_of_fused, 0)),
        "k": Tap("attention.query_key_value", take=partial(_of_fused, 1)),
        "z": Tap("attention.dense", of_input=True),
    },
)
GPT2_STYLE = Architecture(
    "attn",
    "ln_f",
    "layer",
    _drop_columns_of_values,
    {
        "mlp_in": Tap("mlp", of_input=True),
        "mlp_out": Tap("mlp"),
        "attn_out": Tap("attn"),
        "q": Tap("attn.c_attn", take=partial(_of_columns, 0)),
        "k": Tap("attn.c_attn", take=partial(_of_columns, 1)),
        "z": Tap("attn.c_proj", of_input=True),
    },
    layers="h",
    input_norm="ln_1",
    positions="wpe",
)

ARCHITECTURES = {  # by transformers' model_type; every entry is tested against transformers' eager model
    "gemma": GEMMA_STYLE,
    "gemma2": GEMMA2_STYLE,
    "gemma3_text": GEMMA2_STYLE,
    "llama": LLAMA_STYLE,
    "mistral": LLAMA_STYLE,
    "qwen2": LLAMA_STYLE,
    "qwen3": LLAMA_STYLE,
    "gpt_neox": NEOX_STYLE,
    "gpt2": GPT2_STYLE,
}


def architecture_of(model_type: str | None) -> Architecture:
    """The entry for a model type, or an error that lists the supported ones."""
    if model_type is None or model_type not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"model type {model_type!r} cannot be harvested; supported are {', '.join(sorted(ARCHITECTURES))}. "
            "Another decoder of the same structure needs one entry in harvest/model/architectures.py"
        )
    return ARCHITECTURES[model_type]


def require_parts(stack: Any, architecture: Architecture) -> None:
    """Require the contract's modules, in the base model and in its first layer."""
    names = (architecture.layers, architecture.final_norm, architecture.positions)
    missing = [name for name in names if name and not hasattr(stack, name)]
    for layer in getattr(stack, architecture.layers, ())[:1]:
        parts = (architecture.input_norm, architecture.attention)
        missing += [f"{architecture.layers}[0].{name}" for name in parts if not hasattr(layer, name)]
    if missing:
        raise UnsupportedArchitecture(
            f"{type(stack).__name__} has no {', '.join(missing)}; it has {', '.join(dict(stack.named_children()))}. "
            "harvest/model/architectures.py has the requirements"
        )


def cut(stack: Any, num_layers: int, attention_only_layer: int | None, architecture: Architecture) -> None:
    """Cut a decoder stack to its first `num_layers`, without the final norm; one layer may keep only its attention."""
    require_parts(stack, architecture)
    layers = architecture.layers_of(stack)[:num_layers]
    if attention_only_layer is not None:
        layers[attention_only_layer] = AttentionOnly(layers[attention_only_layer], architecture)
    setattr(stack, architecture.layers, layers)
    setattr(stack, architecture.final_norm, nn.Identity())
