"""Steps of dictionary_learning at its own defaults, in the middle of a run; bfloat16 is its own `autocast_dtype`."""

from __future__ import annotations

import importlib
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import LONG, Settings, Step, fuse, serve_steps, sparse_bias

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
MIDDLE = 2000  # a step after its warm-up and after the start of its threshold


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


def make_dead(trainer: Any, latents: int) -> None:
    encoder = getattr(trainer.ae, "encoder", None)
    bias = encoder.bias if encoder is not None else trainer.ae.b_enc
    bias.data[:latents] = -1e4
    trainer.num_tokens_since_fired[:latents] = LONG


def make_step(settings: Settings, batches: list[torch.Tensor]) -> Step:
    d_model = batches[0].shape[1]
    trainer = make_trainer(settings.variant, settings.width, settings.k, d_model, {"device": settings.device})
    if settings.l0:
        make_sparse(trainer.ae, batches[0], settings.l0)
    if settings.dead:
        make_dead(trainer, settings.num_dead)
    if settings.fused:
        fuse(trainer.optimizer)
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    steps = count(MIDDLE)

    def step(x: torch.Tensor) -> None:
        """As in its trainSAE, between two reads of the data."""
        with settings.autocast():
            trainer.update(next(steps), x.to(dtype))

    return step


if __name__ == "__main__":
    serve_steps(make_step)
