"""SAELens' CacheActivationsRunner; runs in the peers' environment.

{"model": folder, "rows": file.npy, "out": folder, "layer", "width", "batch", "dtype", "device"} caches one residual of
the given tokens and answers with seconds and tokens; loading the model, once per process, is not timed. Attention is
eager, like ours: transformers' default for Gemma-2 leaves out its softcap, which is faster but a different function.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker_pipe import serve

STORED_AS = {"float32": ("float32", 4), "bfloat16": ("float16", 2)}  # Arrow files have no bfloat16


def cache(request: dict[str, Any]) -> dict[str, Any]:
    rows = np.load(request["rows"])
    tokens, width = rows.size, request["width"]
    stored_as, itemsize = STORED_AS[request["dtype"]]
    config = CacheActivationsRunnerConfig(
        dataset_path="rows",
        model_name=request["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": request["dtype"], "attn_implementation": "eager"},
        model_batch_size=request["batch"],
        hook_name=f"model.layers.{request['layer']}",
        d_in=width,
        training_tokens=tokens,
        context_size=rows.shape[1],
        new_cached_activations_path=request["out"],
        dtype=stored_as,
        device=request["device"],
        buffer_size_gb=(tokens * width * itemsize + 1) / 1e9,  # everything in one buffer, without a row to spare
        streaming=False,
        shuffle=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=datasets.Dataset.from_dict({"tokens": rows.tolist()}))
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    shutil.rmtree(request["out"])
    return {"seconds": seconds, "tokens": tokens}


def load_once() -> None:
    """Use one model for all requests; the runner would reload it for each."""
    load, models = cache_activations_runner.load_model, {}

    @functools.wraps(load)
    def loaded(**words: Any) -> Any:
        key = repr(sorted(words.items()))
        if key not in models:
            models[key] = load(**words)
        return models[key]

    cache_activations_runner.load_model = loaded


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    load_once()
    serve(cache)
