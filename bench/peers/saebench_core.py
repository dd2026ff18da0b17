"""Official SAEBench's core evaluation of some SAEs, one after the other as `multiple_evals` does; answers seconds.

The request names the model's folder, the rows of tokens, SAELens folders of the SAEs, the data type and
the numbers of batches. Loading is not timed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from core_flags import FLAGS
from hooked_gemma import load_hooked
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import calculate_misc_metrics, run_evals
from sae_bench.sae_bench_utils import general_utils
from sae_lens import SAE
from safetensors.torch import load_file
from token_rows import TokenRows

sys.path.insert(0, str(Path(__file__).parents[1]))
from talk import serve


def evaluate_all(request: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, request["dtype"])
    model = load_hooked(Path(request["model"]), dtype)
    tokens = load_file(request["tokens"])["tokens"]
    seconds, scores = [], []
    for folder in request["saes"]:
        sae = SAE.load_from_disk(folder, device="cpu")
        _, sae, _ = general_utils.load_and_format_sae("bench", sae, "cpu")
        sae = sae.to(device="cpu", dtype=dtype)
        start = perf_counter()
        metrics = evaluate(sae, model, tokens, request)
        seconds.append(perf_counter() - start)
        scores.append(metrics["model_performance_preservation"]["ce_loss_score"])
    return {"seconds": seconds, "scores": scores}


def evaluate(sae: object, model: object, tokens: torch.Tensor, request: dict) -> dict:
    config = CoreEvalConfig(
        batch_size_prompts=request["batch"],
        n_eval_reconstruction_batches=request["reconstruction"],
        n_eval_sparsity_variance_batches=request["sparsity"],
        context_size=tokens.shape[1],
        **FLAGS,
    )
    rows = TokenRows(tokens, request["batch"])
    scalars, latents = run_evals(sae, rows, model, config, ignore_tokens=set(request["special"]))
    return scalars | {"misc_metrics": calculate_misc_metrics(latents)}


if __name__ == "__main__":
    serve(evaluate_all)
