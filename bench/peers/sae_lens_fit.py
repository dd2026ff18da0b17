"""Train SAEs of SAELens for the quality benchmark.

Uses the settings that its documentation recommends: rows of mean norm sqrt(D), a rate that falls to a tenth in the last
fifth, sparsity that warms up over 5 % of the run (JumpReLU: tanh, over all of it), latents dead after a thirtieth, like
its 1,000 of 30,000 steps. And torch's fused Adam, which is faster and equivalent.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import DEAD_PART, ROWS, Ask, batches, norms, score, serve_fits, threshold_of
from sae_lens_step import make_sae, make_trainer
from stepping import fuse


def settings_of(variant: str, coefficient: float, steps: int) -> dict[str, Any]:
    match variant:
        case "standard" | "gated":
            return {"l1_coefficient": coefficient, "l1_warm_up_steps": steps // 20}
        case "jumprelu":
            tanh = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1}
            tanh |= {"pre_act_loss_coefficient": 3e-6, "jumprelu_ste_to_input": True}
            return {"l0_coefficient": coefficient, "l0_warm_up_steps": steps, **tanh}
        case _:
            return {}


def fit(ask: Ask) -> dict[str, Any]:
    torch.manual_seed(ask.seed)
    d_model = next(batches(ask, 1)).shape[1]
    scale = d_model**0.5 / norms(ask.folder)["mean"]
    sae = make_sae(ask.variant, ask.width, ask.k, d_model, settings_of(ask.variant, ask.coefficient, ask.steps))
    course = {"total_training_samples": ask.steps * ROWS, "lr": ask.lr, "lr_end": ask.lr / 10}
    course |= {"lr_decay_steps": ask.steps // 5, "dead_feature_window": max(1, ask.steps // DEAD_PART)}
    trainer = make_trainer(sae, ROWS, course)
    fuse(trainer.optimizer)
    for x in batches(ask):
        trainer.step(x * scale)
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as saved:
        sae.save_inference_model(saved)
        inference = SAE.load_from_disk(saved)
    return score(ask, inference.encode, inference.decode, scale, threshold_of(ask, inference))


if __name__ == "__main__":
    serve_fits(fit)
