"""Load a Gemma-2 from a folder as a HookedTransformer, offline; runs in sae-bench's environment.

`HookedTransformer.from_pretrained` takes only names of models on the Hub. Here the configuration is built from the
folder's own, and the weights go through transformer_lens' own conversion.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import Gemma2ForCausalLM


def load_hooked(folder: Path, dtype: torch.dtype = torch.float32) -> HookedTransformer:
    """The model in a folder, without any processing of its weights."""
    hugging = Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype)
    config = make_config(hugging.config, dtype)
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gemma_weights(hugging, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return model.eval()


def make_config(config: object, dtype: torch.dtype) -> HookedTransformerConfig:
    """transformer_lens' settings for Gemma-2 with the sizes of this model."""
    layers = config.num_hidden_layers
    return HookedTransformerConfig(
        n_layers=layers,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn="gelu_pytorch_tanh",
        normalization_type="RMS",
        rotary_base=10000,
        rotary_dim=config.head_dim,
        positional_embedding_type="rotary",
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        gated_mlp=True,
        final_rms=True,
        use_normalization_before_and_after=True,
        original_architecture="Gemma2ForCausalLM",
        model_name="tiny-gemma-2",
        dtype=dtype,
    )
