"""Steps of CLT-Forge's trainer at its own defaults, on one device. PYTHONPATH must contain its `src`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from clt_forge.clt import CLT
from clt_forge.config import CLTConfig, CLTTrainingRunnerConfig
from clt_forge.training.clt_trainer import CLTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from stepping import Settings, Step, serve_steps, split_pairs


def make_step(settings: Settings, batches: list[torch.Tensor]) -> Step:
    logging.disable(logging.INFO)
    pairs, layers = split_pairs(batches), settings.layers
    rows, d_in = len(batches[0]), batches[0].shape[1] // 2 // layers
    config = CLTTrainingRunnerConfig(
        device=settings.device,
        distributed_setup="None",
        d_in=d_in,
        d_latent=settings.width // layers,
        train_batch_size_tokens=rows,
        total_training_tokens=rows * 100_000,
        log_to_wandb=False,
        logger_verbose=False,
        n_checkpoints=0,
    )
    clt = CLT(config.create_sub_config(CLTConfig, n_layers=layers)).to(settings.device)
    store: Any = None  # a step does not use its store of activations
    trainer = CLTTrainer(clt, store, config, lambda **_: None)
    by_layer = {key: [part.unflatten(1, (layers, d_in)) for part in pair] for key, pair in pairs.items()}
    return lambda x: trainer._compute_training_step_loss(*by_layer[id(x)])


if __name__ == "__main__":
    serve_steps(make_step)
