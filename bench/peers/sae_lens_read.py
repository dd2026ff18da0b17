"""SAELens reading its own cached activations; runs in the peers' environment.

{"make": folder, "resid": file.npy, "tokens": file.npy} writes a cache as its runner does (an Arrow data set with one
row per context); {"read": folder, "batch": n} reads it once through the `ActivationsStore` that its training uses and
answers with seconds and tokens; {"raw": folder, "batch": n} reads the same rows without the store, as numpy, which is
the fastest that the format allows.
"""

from __future__ import annotations

import functools
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from worker_pipe import serve

HOOK = "blocks.19.hook_resid_post"
ROWS_AT_ONCE = 64


def make(folder: str, resid_file: str, tokens_file: str) -> dict[str, Any]:
    resid, tokens = np.load(resid_file, mmap_mode="r"), np.load(tokens_file)
    windows, context, width = resid.shape
    features = datasets.Features(
        {
            HOOK: datasets.Array2D((context, width), "float16"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context),
        }
    )
    parts = [
        datasets.Dataset.from_dict(
            {
                HOOK: np.ascontiguousarray(resid[start : start + ROWS_AT_ONCE]),
                "token_ids": tokens[start : start + ROWS_AT_ONCE].astype(np.int32),
            },
            features=features,
        )
        for start in range(0, windows, ROWS_AT_ONCE)
    ]
    datasets.concatenate_datasets(parts).save_to_disk(folder, max_shard_size="2GB")
    return {"windows": windows}


@functools.cache
def open_store(folder: str, batch: int) -> ActivationsStore:
    """Open once: the store continues with the next epoch by itself."""
    shape = datasets.load_from_disk(folder).features[HOOK].shape
    return ActivationsStore(
        model=None,  # a cache is read without one
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=shape[0],
        d_in=shape[1],
        n_batches_in_buffer=batch,
        total_training_tokens=0,
        store_batch_size_prompts=batch,
        train_batch_size_tokens=4096,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float16",
        cached_activations_path=folder,
    )


def read(folder: str, batch: int) -> dict[str, Any]:
    store, tokens = open_store(folder, batch), 0
    rows = len(store.cached_activation_dataset)
    start = time.perf_counter()
    for _ in range(rows // batch):
        acts, _ids = store.get_raw_llm_batch()
        tokens += len(acts)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def raw(folder: str, batch: int) -> dict[str, Any]:
    data, tokens = datasets.load_from_disk(folder).with_format("numpy"), 0
    start = time.perf_counter()
    for at in range(0, len(data) - batch + 1, batch):
        acts = data[at : at + batch][HOOK]
        tokens += acts.shape[0] * acts.shape[1]
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "make" in request:
        return make(request["make"], request["resid"], request["tokens"])
    if "read" in request:
        return read(request["read"], request["batch"])
    return raw(request["raw"], request["batch"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    serve(answer)
