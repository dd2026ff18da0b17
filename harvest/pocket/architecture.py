"""The pocket model's shape: Gemma-2-2b's 26 layers and every trick of its kind, made narrow.

Soft-capping, query scaling, grouped queries, tied embeddings and a sliding window
on every other layer are real; the window is shorter than the usual context, so
that sliding layers do slide.
"""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from .make_tokenizer import BOS, EOS, PAD, VOCABULARY

LAYERS = 26
WIDTH = 128
CONTEXT = 1024
SUBLAYER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
SUBLAYER_GAIN = 0.25  # 52 sub-layers of full size would drown the embedding at the start


def make_config() -> Gemma2Config:
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=CONTEXT,
        sliding_window=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        tie_word_embeddings=True,
    )


def make_model(seed: int) -> Gemma2ForCausalLM:
    """A fresh model, initialised as transformers does but for the gains after each sub-layer."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(make_config())
    for name, weight in model.named_parameters():
        if name.endswith(SUBLAYER_NORMS):
            torch.nn.init.constant_(weight, SUBLAYER_GAIN - 1)  # Gemma's gain is 1 + weight
    return model
