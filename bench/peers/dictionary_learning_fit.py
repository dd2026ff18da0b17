"""Train SAEs of dictionary_learning for the quality benchmark.

Its own defaults, on rows of mean square norm 1, as its `normalize_activations` makes them. Defaults in steps or tokens,
meant for long runs, become shares of this one: a tenth for warm-up, as in ours, and for the start of the threshold; a
hundredth for the threshold's averaging (at its 0.999 it would stay close to its start in a short run); a thirtieth
until a latent is dead, as for all contestants (its ten million tokens are a twentieth of 100,000 batches of 2,048, a
fiftieth of 500M). Its own p_end of 0 divides by zero. Uses torch's fused Adam, which is faster and equivalent.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dictionary_learning_step import make_trainer
from fitting import DEAD_PART, ROWS, Ask, batches, norms, score, serve_fits, threshold_of
from stepping import fuse

COEFFICIENT = {"standard": "l1_penalty", "gated": "l1_penalty", "p_anneal": "initial_sparsity_penalty"}


def settings_of(ask: Ask) -> dict[str, Any]:
    steps = ask.steps
    settings: dict[str, Any] = {"steps": steps, "warmup_steps": min(1000, steps // 10), "seed": ask.seed}
    if ask.variant in ("topk", "batchtopk", "matryoshka"):
        settings |= {"threshold_start_step": min(1000, steps // 10), "threshold_beta": threshold_beta(steps)}
    else:
        settings |= {"sparsity_warmup_steps": min(2000, steps // 10)}
    if ask.variant in COEFFICIENT:
        settings |= {COEFFICIENT[ask.variant]: ask.coefficient}
    if ask.variant == "p_anneal":
        settings |= {"anneal_start": min(15_000, steps // 4), "sparsity_function": "Lp^p", "p_end": 0.2}
    else:
        settings["decay_start"] = int(0.8 * steps)
    return settings | {"lr": ask.lr}


def threshold_beta(steps: int) -> float:
    """The decay that averages over the last hundredth of the run, at most its own 0.999, reached at 100,000 steps."""
    return min(0.999, 1 - 1 / max(2.0, steps / 100))


def fit(ask: Ask) -> dict[str, Any]:
    torch.manual_seed(ask.seed)
    d_model = next(batches(ask, 1)).shape[1]
    scale = 1 / norms(ask.folder)["rms"]
    trainer = make_trainer(ask.variant, ask.width, ask.k, d_model, settings_of(ask))
    trainer.dead_feature_threshold = ask.steps * ROWS // DEAD_PART
    fuse(trainer.optimizer)
    for step, x in enumerate(batches(ask)):
        trainer.update(step, x * scale)
    return score(ask, trainer.ae.encode, trainer.ae.decode, scale, threshold_of(ask, trainer.ae))


if __name__ == "__main__":
    serve_fits(fit)
