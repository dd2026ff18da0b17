"""Steps of dictionary_learning for bench_train, at its own defaults: folder, variant, width, k, L0, clock, device."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import load_batches, serve, sparse_bias

TRAINERS = {
    "standard": ("standard", "StandardTrainer"),
    "topk": ("top_k", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
    "p_anneal": ("p_anneal", "PAnnealTrainer"),
}
FRACTIONS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]


def make_trainer(variant: str, width: int, k: int, d_model: int, more: dict[str, Any] | None = None) -> Any:
    file, name = TRAINERS[variant]
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{file}"), name)
    settings: dict[str, Any] = {"steps": 100_000, "activation_dim": d_model, "dict_size": width}
    settings |= {"layer": 19, "lm_name": "none", "device": "cpu"}
    if variant in ("topk", "batchtopk", "matryoshka"):
        settings["k"] = k
    if variant == "matryoshka":
        settings["group_fractions"] = FRACTIONS
    if variant == "jumprelu":
        settings["target_l0"] = float(k)
    return trainer(**settings | (more or {}))


def make_sparse(autoencoder: Any, x: torch.Tensor, l0: float) -> None:
    """Shift the encoder's bias, or the threshold, so that about l0 latents fire."""
    with torch.no_grad():
        W_enc = autoencoder.encoder.weight.t() if hasattr(autoencoder, "encoder") else autoencoder.W_enc
        bias = sparse_bias(x @ W_enc, l0)
        if hasattr(autoencoder, "threshold"):
            autoencoder.threshold.data.fill_(bias)
        elif hasattr(autoencoder, "gate_bias"):
            autoencoder.gate_bias.data.fill_(-bias)
        else:
            autoencoder.encoder.bias.data.fill_(-bias)


def main(folder: str, variant: str, width: str, k: str, l0: str, clock: str, device: str) -> None:
    torch.manual_seed(0)
    batches = load_batches(folder, device)
    trainer = make_trainer(variant, int(width), int(k), batches[0].shape[1], {"device": device})
    if float(l0):
        make_sparse(trainer.ae, batches[0], float(l0))
    step = iter(range(1, 10**9))
    serve(lambda x: trainer.update(next(step), x), batches, clock)


if __name__ == "__main__":
    main(*sys.argv[1:])
