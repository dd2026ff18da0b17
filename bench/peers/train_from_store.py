"""The peers' own trainers on a store: SAELens' `SAETrainer` and dictionary_learning's `trainSAE`, fed by `batches`.

    .venv-peers/bin/python bench/peers/train_from_store.py ./store

runs in the peers' environment (`make peers`). Each trains a top-k SAE and says how much of held-out text it explains;
nothing is converted, and no model is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Rebuild = Callable[[Tensor], Tensor]


def open_store(url: str) -> Any:
    """With this repository as the package, which is not installed in the peers' environment."""
    spec = importlib.util.spec_from_file_location("saemill", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["saemill"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package.Store(url)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("store")
    words.add_argument("--layer", type=int, default=19)
    words.add_argument("--width", type=int, default=1024)
    words.add_argument("--k", type=int, default=32)
    words.add_argument("--batch-tokens", type=int, default=1024)
    words.add_argument("--steps", type=int, default=500)
    asked = words.parse_args()
    store = open_store(asked.store)
    for name, train in (("SAELens", with_sae_lens), ("dictionary_learning", with_dictionary_learning)):
        torch.manual_seed(0)
        began = time.perf_counter()
        rebuild = train(store, asked)
        print(f"{name}: {asked.steps} steps in {time.perf_counter() - began:.0f} s")
        print(f"{name}: explained variance of held-out text {explained(store, asked, rebuild):.3f}")


def with_sae_lens(store: Any, asked: Any) -> Rebuild:
    """Its data provider is any iterator of rows; `scaled` gives them the mean norm that its settings expect."""
    rows = store.batches(layers=asked.layer, batch_tokens=asked.batch_tokens, epochs=None, scaled=True)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=store.manifest.model.d_model, d_sae=asked.width, k=asked.k))
    config = SAETrainerConfig(
        total_training_samples=asked.steps * asked.batch_tokens,
        train_batch_size_samples=asked.batch_tokens,
        lr=1e-3,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, iter(rows)).fit()
    return sae.forward


def with_dictionary_learning(store: Any, asked: Any) -> Rebuild:
    """Its data are any iterable of rows, for as many steps as it is told."""
    rows = store.batches(layers=asked.layer, batch_tokens=asked.batch_tokens, epochs=None, scaled=True)
    config = {"trainer": TopKTrainer, "activation_dim": store.manifest.model.d_model, "dict_size": asked.width}
    config |= {"k": asked.k, "lr": 1e-3, "steps": asked.steps, "warmup_steps": asked.steps // 10, "device": "cpu"}
    config |= {"layer": asked.layer, "lm_name": store.manifest.model.id, "threshold_start_step": asked.steps // 10}
    found: list[TopKTrainer] = []

    def made(**settings: Any) -> TopKTrainer:  # `trainSAE` keeps what it trains to itself, or saves it
        found.append(TopKTrainer(**settings))
        return found[0]

    trainSAE(rows, [config | {"trainer": made}], asked.steps, device="cpu")
    return found[0].ae.forward


@torch.no_grad()
def explained(store: Any, asked: Any, rebuild: Rebuild) -> float:
    split = {"split": "validation", "shuffle": False, "scaled": True}
    x = torch.cat(list(store.batches(layers=asked.layer, batch_tokens=asked.batch_tokens, **split)))
    return 1 - float((x - rebuild(x)).square().sum() / (x - x.mean(0)).square().sum())


if __name__ == "__main__":
    main()
