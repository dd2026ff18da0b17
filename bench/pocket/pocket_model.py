"""The pocket model's shape: Gemma-2-2b's 26 layers with all its features, made narrow.

It has soft-capping, query scaling, grouped queries, tied embeddings and a sliding window on every other layer; the
window is shorter than the usual context, so that sliding layers do slide.

A training checkpoint is a single safetensors file with a JSON record in its header, so that one rename replaces it: a
killed run leaves the old checkpoint or the new one.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from make_tokenizer import BOS, EOS, PAD, VOCABULARY
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

LAYERS = 26
WIDTH = 128
CONTEXT = 1024
SUBLAYER_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
SUBLAYER_GAIN = 0.25  # at full size, 52 sublayers would drown out the embedding at the start


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
    """A new model, initialised as in transformers except for the gains after each sub-layer."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM(make_config())
    for name, weight in model.named_parameters():
        if name.endswith(SUBLAYER_NORMS):
            torch.nn.init.constant_(weight, SUBLAYER_GAIN - 1)  # Gemma's gain is 1 + weight
    return model


FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (FILE + ".tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, metadata={"record": json.dumps(record)})
    os.replace(temporary, folder / FILE)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, record), or None if there is no checkpoint yet."""
    path = folder / FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["record"])
