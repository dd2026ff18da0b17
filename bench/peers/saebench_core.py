"""Official SAEBench's core evaluation of some SAEs, one after another as in `multiple_evals`; answers with seconds.

A request names the model's folder, the rows of tokens, the SAEs' SAELens folders, the data type and the numbers of
batches. Loading is not timed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hooked_gemma import load_hooked
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import calculate_misc_metrics, run_evals
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker_pipe import serve

FLAGS = {  # ask for every part of the evaluation
    "compute_kl": True,
    "compute_ce_loss": True,
    "compute_l2_norms": True,
    "compute_sparsity_metrics": True,
    "compute_variance_metrics": True,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
    "exclude_special_tokens_from_reconstruction": True,
}


class TokenRows:
    """Rows of a table in order: the part of an activation store that the evaluation needs."""

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        self._rows, self._at = rows, 0
        self.context_size = rows.shape[1]
        self.store_batch_size_prompts = batch

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        self._at += count
        return self._rows[self._at - count : self._at]

    def reset_input_dataset(self) -> None:
        """Does nothing: the official store restarts its data set but continues with its pending sequences."""


def evaluate_all(request: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, request["dtype"])
    model = load_hooked(Path(request["model"]), dtype)
    tokens = load_file(request["tokens"])["tokens"]
    seconds = []
    for folder in request["saes"]:
        sae = SAE.load_from_disk(folder, device="cpu")
        _, sae, _ = general_utils.load_and_format_sae("bench", sae, "cpu")
        sae = sae.to(device="cpu", dtype=dtype)
        start = perf_counter()
        evaluate(sae, model, tokens, request)
        seconds.append(perf_counter() - start)
    return {"seconds": seconds}


def evaluate(sae: object, model: object, tokens: torch.Tensor, request: dict) -> None:
    config = CoreEvalConfig(
        batch_size_prompts=request["batch"],
        n_eval_reconstruction_batches=request["reconstruction"],
        n_eval_sparsity_variance_batches=request["sparsity"],
        context_size=tokens.shape[1],
        **FLAGS,
    )
    rows = TokenRows(tokens, request["batch"])
    _, latents = run_evals(sae, rows, model, config, ignore_tokens=set(request["special"]))
    calculate_misc_metrics(latents)


if __name__ == "__main__":
    serve(evaluate_all)
