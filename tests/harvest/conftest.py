"""Tiny random models of every supported family, and what they compute when transformers runs them whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, CONTEXT, VOCAB, WINDOWS = 5, 24, 60, 4

SHARED = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,  # large, so that attention is peaked and soft caps bite
}
GROUPED = {**SHARED, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 7}  # shorter than the context
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CONFIGS = {
    "gemma": GROUPED,
    "gemma2": {**GROUPED, **SLIDING, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 5},
    "llama": {**GROUPED, "attention_bias": True},
    "mistral": {**GROUPED, **SLIDING},
    "qwen2": {**GROUPED, **SLIDING, "use_sliding_window": True, "layer_types": MIXED},
    "qwen3": GROUPED,
    "gpt_neox": {**SHARED, "hidden_size": 32, "intermediate_size": 48},
}


@dataclass(frozen=True)
class Reference:
    """All that the whole eager model computes on some windows."""

    ids: torch.Tensor
    resid: list[torch.Tensor]
    attention: list[torch.Tensor]


def _make_model(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for name, parameter in model.named_parameters():  # norms and biases start at constants that would hide errors
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def _run_whole(model: PreTrainedModel) -> Reference:
    ids = torch.randint(3, VOCAB, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    resid: list[torch.Tensor] = []
    whole = copy.deepcopy(model)  # the hooks that transformers installs to report attentions stay on this copy
    for layer in whole.base_model.layers:
        layer.register_forward_hook(lambda _module, _args, output: resid.append(output))
    with torch.no_grad():
        attention = whole(ids, output_attentions=True, use_cache=False).attentions
    return Reference(ids, resid, list(attention))


@pytest.fixture(scope="session")
def model_types() -> list[str]:
    return list(CONFIGS)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Make a random causal language model: make_model(model_type, dtype, **config changes)."""
    return _make_model


@pytest.fixture(scope="session")
def run_whole() -> Callable[[PreTrainedModel], Reference]:
    """Run a model as it is, eagerly, and keep every residual and all attention."""
    return _run_whole
