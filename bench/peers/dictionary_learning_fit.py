"""Train an SAE of dictionary_learning for the quality benchmark: folder, variant, width, k, coefficient, lr, steps.

Its own defaults, on rows of mean square norm 1 as its `normalize_activations` makes them. What counts steps
or tokens is given the same share of the run as here: warm-up, start of the threshold, dead
latents. Its own p_end of 0 divides by zero.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from dictionary_learning_step import make_trainer
from fitting import ROWS, batches, norms, tell_score

COEFFICIENT = {"standard": "l1_penalty", "gated": "l1_penalty", "p_anneal": "initial_sparsity_penalty"}
COEFFICIENT |= {"jumprelu": "target_l0"}


def settings_of(variant: str, coefficient: float, lr: float, steps: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"steps": steps, "warmup_steps": min(1000, steps // 10)}
    if variant in ("topk", "batchtopk", "matryoshka"):
        settings["threshold_start_step"] = min(1000, steps // 10)
    else:
        settings |= {"sparsity_warmup_steps": min(2000, steps // 10), COEFFICIENT[variant]: coefficient}
    if variant == "p_anneal":
        settings |= {"anneal_start": min(15_000, steps // 4), "sparsity_function": "Lp^p", "p_end": 0.2}
    else:
        settings["decay_start"] = int(0.8 * steps)
    return settings | ({"lr": lr} if lr else {})


def main(folder: str, variant: str, width: str, k: str, coefficient: str, lr: str, steps: str) -> None:
    d_model = next(batches(folder, 1)).shape[1]
    scale = 1 / norms(folder)["rms"]
    settings = settings_of(variant, float(coefficient), float(lr), int(steps))
    trainer = make_trainer(variant, int(width), int(k), d_model, settings)
    trainer.dead_feature_threshold = int(steps) * ROWS // 10
    for step, x in enumerate(batches(folder, int(steps))):
        trainer.update(step, x * scale)
    tell_score(folder, trainer.ae.encode, trainer.ae.decode, scale)


if __name__ == "__main__":
    main(*sys.argv[1:])
