"""Train transcoders of sparsify for the quality benchmark, at its trainer's defaults, on unscaled activations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import Ask, batches, score_map, serve_fits, split_pair
from sparsify_step import encode_dense, make_coder, make_optimiser


def fit(ask: Ask) -> dict[str, Any]:
    torch.manual_seed(ask.seed)
    d_model = next(batches(ask, 1)).shape[1] // 2
    has_skip = ask.variant == "skip_transcoder"
    sae = make_coder(d_model, num_latents=ask.width, k=ask.k, transcode=True, skip_connection=has_skip)
    optimiser = make_optimiser(sae, ask.lr)
    for step, rows in enumerate(batches(ask)):
        x, target = split_pair(rows)
        if step == 0:
            sae.encoder.bias.data, sae.b_dec.data = -x.mean(0) @ sae.encoder.weight.data.T, target.mean(0)
        sae(x, target).fvu.backward()
        optimiser.step()
        optimiser.zero_grad()
    optimiser.eval()
    return score_map(ask, lambda x: encode_dense(sae, x), lambda x: sae(x).sae_out)


if __name__ == "__main__":
    serve_fits(fit)
