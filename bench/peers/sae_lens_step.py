"""Steps of SAELens at its own defaults; bfloat16 is its own switch `autocast`, and so is `compile_sae`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import LONG, Settings, Step, fuse, serve_steps, sparse_bias

SAES = {
    "standard": ("standard_sae", "StandardTrainingSAE"),
    "topk": ("topk_sae", "TopKTrainingSAE"),
    "batchtopk": ("batchtopk_sae", "BatchTopKTrainingSAE"),
    "matryoshka": ("matryoshka_batchtopk_sae", "MatryoshkaBatchTopKTrainingSAE"),
    "jumprelu": ("jumprelu_sae", "JumpReLUTrainingSAE"),
    "gated": ("gated_sae", "GatedTrainingSAE"),
}
PREFIXES = [1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0]


def make_sae(variant: str, width: int, k: int, d_model: int, more: dict[str, Any] | None = None) -> Any:
    file, name = SAES[variant]
    module = importlib.import_module(f"sae_lens.saes.{file}")
    settings: dict[str, Any] = {"d_in": d_model, "d_sae": width}
    if variant in ("topk", "batchtopk", "matryoshka"):
        settings["k"] = k
    if variant == "matryoshka":
        settings["matryoshka_widths"] = [round(fraction * width) for fraction in PREFIXES]
    return getattr(module, name)(getattr(module, f"{name}Config")(**settings, **(more or {})))


def make_trainer(sae: Any, batch_rows: int, more: dict[str, Any] | None = None) -> Any:
    config = importlib.import_module("sae_lens.config")
    trainer = importlib.import_module("sae_lens.training.sae_trainer")
    settings = {
        "total_training_samples": 10**9,
        "train_batch_size_samples": batch_rows,
        "device": "cpu",
        "autocast": False,
        "lr": 3e-4,
        "lr_end": 3e-5,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "dead_feature_window": 1000,
        "feature_sampling_window": 2000,
        "n_batches_for_norm_estimate": 1,
        "logger": config.LoggingConfig(log_to_wandb=False),
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
    }
    return trainer.SAETrainer(cfg=config.SAETrainerConfig(**settings | (more or {})), sae=sae, data_provider=iter(()))


def make_sparse(sae: Any, x: torch.Tensor, l0: float) -> None:
    """Shift the encoder's bias, or the threshold, so that about l0 latents fire."""
    with torch.no_grad():
        bias = sparse_bias(x @ sae.W_enc, l0)
        if hasattr(sae, "threshold"):
            sae.threshold.data.fill_(bias)
        else:
            (sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc).data.fill_(-bias)


def make_step(settings: Settings, batches: list[torch.Tensor]) -> Step:
    rows, d_model = batches[0].shape
    device = {"device": settings.device}
    sae = make_sae(settings.variant, settings.width, settings.k, d_model, device)
    if settings.l0:
        make_sparse(sae, batches[0], settings.l0)
    trainer = make_trainer(sae, rows, device | {"autocast": settings.precision == "bfloat16"})
    if settings.dead:
        sae.b_enc.data[: settings.num_dead] = -1e4
        trainer.n_forward_passes_since_fired[: settings.num_dead] = LONG
    if settings.fused:
        fuse(trainer.optimizer)
    if settings.compiled:  # as in its runner with `compile_sae`
        sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


if __name__ == "__main__":
    serve_steps(make_step)
