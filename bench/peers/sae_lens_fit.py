"""Train an SAE of SAELens for the quality benchmark: folder, variant, width, k, coefficient, lr, steps.

The settings its documentation recommends: rows of mean norm sqrt(D), rate falling to a tenth in the last fifth,
sparsity warming up over 5 % of the run (JumpReLU: tanh, over all of it). Dead after a tenth of the run, as here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import ROWS, batches, norms, tell_score
from sae_lens_step import make_sae, make_trainer


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


def main(folder: str, variant: str, width: str, k: str, coefficient: str, lr: str, steps: str) -> None:
    torch.manual_seed(0)
    total = int(steps)
    d_model = next(batches(folder, 1)).shape[1]
    scale = d_model**0.5 / norms(folder)["mean"]
    sae = make_sae(variant, int(width), int(k), d_model, settings_of(variant, float(coefficient), total))
    rate = float(lr) or 3e-4
    course = {"total_training_samples": total * ROWS, "lr": rate, "lr_end": rate / 10, "lr_decay_steps": total // 5}
    trainer = make_trainer(sae, ROWS, course | {"dead_feature_window": max(1, total // 10)})
    for x in batches(folder, total):
        trainer.step(x * scale)
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as saved:
        sae.save_inference_model(saved)
        inference = SAE.load_from_disk(saved)
    tell_score(folder, inference.encode, inference.decode, scale)


if __name__ == "__main__":
    main(*sys.argv[1:])
