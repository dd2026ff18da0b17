"""Train cross-layer transcoders of CLT-Forge for the quality benchmark. PYTHONPATH must contain its `src`.

Uses its trainer's own `fit`, in float32, with the settings of its runner for GPT-2, which its README points to (its
fields' defaults are a rate of 1e-5 and a penalty of 0.001). Settings in steps keep their share of the run: the penalty
rises over 70 % of it, the rate falls over a twentieth; its warm-up of 1,000 steps is at most a tenth, as in
dictionary_learning. In that runner the rate is zero from 75 % on, because it stops once L0 is low enough; here it falls
at the end. Its code makes 10,000 latents per layer fire at the start; in narrower layers the same share fires as of the
runner's 24,576.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clt_forge.clt import CLT
from clt_forge.config import CLTConfig, CLTTrainingRunnerConfig
from clt_forge.training.clt_trainer import CLTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import Ask, batches, pair_scales, score_map, serve_fits, split_pair
from torch import Tensor

RUNNERS_WIDTH = 24_576  # latents of a layer
PENALTY_RISES, RATE_RISES, RATE_FALLS = 0.7, 0.1, 0.05  # shares of the run


class Rows:
    """The part of an activation store that its trainer needs: rows from the first on, scaled as its own store does."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.scale, self.to = pair_scales(ask.folder)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in batches(self._ask):
            x, target = split_pair(rows)
            yield x * self.scale, target * self.to


def settings_of(ask: Ask, layers: int, d_in: int) -> CLTTrainingRunnerConfig:
    return CLTTrainingRunnerConfig(
        device="cpu",
        distributed_setup="None",
        seed=ask.seed,
        d_in=d_in,
        d_latent=ask.width // layers,
        train_batch_size_tokens=ask.rows,
        total_training_tokens=ask.rows * ask.steps,
        adam_beta1=0.9,
        lr=ask.lr,
        lr_warm_up_steps=min(1000, int(RATE_RISES * ask.steps)),
        lr_decay_steps=int(RATE_FALLS * ask.steps),
        l0_coefficient=ask.coefficient,
        l0_warm_up_steps=int(PENALTY_RISES * ask.steps),
        dead_penalty_coef=1e-5,
        log_to_wandb=False,
        logger_verbose=False,
        n_checkpoints=0,
    )


def fit(ask: Ask) -> dict[str, Any]:
    logging.disable(logging.INFO)
    rows: Any = Rows(ask)
    _, layers, d_in = next(iter(rows))[0].shape
    config = settings_of(ask, layers, d_in)
    clt = CLT(config.create_sub_config(CLTConfig, n_layers=layers))
    clt.d_latent = max(clt.d_latent, RUNNERS_WIDTH)  # from here on only determines the share that fires at the start
    CLTTrainer(clt, rows, config, lambda **_: None).fit()
    return score_map(ask, lambda x: clt.encode(x)[0].flatten(1), clt.forward_eval, rows.scale, rows.to)


if __name__ == "__main__":
    serve_fits(fit)
