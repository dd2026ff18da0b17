"""The peers' own trainers on a store: SAELens' `SAETrainer` and dictionary_learning's `trainSAE`, fed by `batches`.

    .venv-peers/bin/python bench/peers/train_from_store.py ./store --own harvest/pocket/model

runs in the peers' environment (`make peers`). Each trains a top-k SAE and reports its explained variance on held-out
text; nothing is converted, and no model is loaded. With `--own`, the folder of the store's model, each trains the same
number of steps again, fed by its own pipeline, which runs that model over the same windows; the tokens per second of
both are printed, without the time to load the model.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import datasets
import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.training import trainSAE
from nnsight import LanguageModel
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
Rebuild = Callable[[Tensor], Tensor]


def open_store(url: str) -> Any:
    """Open a store with this repository as the package, which is not installed in the peers' environment."""
    spec = importlib.util.spec_from_file_location("saemill", ROOT / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["saemill"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package.Store(url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--layer", type=int, default=19)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--own", type=Path, metavar="MODEL", help="Also time the peers' own pipelines on this folder.")
    args = parser.parse_args()
    store = open_store(args.store)
    for name, train, own_rows in (
        ("SAELens", with_sae_lens, rows_of_sae_lens),
        ("dictionary_learning", with_dictionary_learning, rows_of_dictionary_learning),
    ):
        rebuild = timed(f"{name} fed by the store", train, store, args, rows_of_store(store, args))
        print(f"{name}: explained variance of held-out text {explained(store, args, rebuild):.3f}", flush=True)
        if args.own is not None:
            timed(f"{name} fed by its own pipeline", train, store, args, own_rows(store, args))


def timed(name: str, train: Callable[[Any, Any, Any], Rebuild], store: Any, args: Any, rows: Any) -> Rebuild:
    torch.manual_seed(0)
    start = time.perf_counter()
    rebuild = train(store, args, rows)
    seconds = time.perf_counter() - start
    print(f"{name}: {args.steps} steps in {seconds:.0f} s, {args.steps * args.batch_tokens / seconds:,.0f} tokens/s")
    return rebuild


def rows_of_store(store: Any, args: Any) -> Any:
    """Rows from the store; `scaled` gives them the mean norm that the peers' settings expect."""
    return store.batches(layers=args.layer, batch_tokens=args.batch_tokens, epochs=None, scaled=True)


def with_sae_lens(store: Any, args: Any, rows: Any) -> Rebuild:
    """Train with SAELens, whose data provider is any iterator of rows."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=store.manifest.model.d_model, d_sae=args.width, k=args.k))
    config = SAETrainerConfig(
        total_training_samples=args.steps * args.batch_tokens,
        train_batch_size_samples=args.batch_tokens,
        lr=1e-3,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, iter(rows)).fit()
    return sae.forward


def with_dictionary_learning(store: Any, args: Any, rows: Any) -> Rebuild:
    """Train with dictionary_learning, whose data is any iterable of rows, for a given number of steps."""
    config = {"trainer": TopKTrainer, "activation_dim": store.manifest.model.d_model, "dict_size": args.width}
    config |= {"k": args.k, "lr": 1e-3, "steps": args.steps, "warmup_steps": args.steps // 10, "device": "cpu"}
    config |= {"layer": args.layer, "lm_name": store.manifest.model.id, "threshold_start_step": args.steps // 10}
    found: list[TopKTrainer] = []

    def make(**settings: Any) -> TopKTrainer:  # `trainSAE` only saves the SAE, it does not return it
        found.append(TopKTrainer(**settings))
        return found[0]

    trainSAE(rows, [config | {"trainer": make}], args.steps, device="cpu")
    return found[0].ae.forward


def rows_of_sae_lens(store: Any, args: Any) -> ActivationsStore:
    """Its own pipeline at its own settings: the model runs while the SAE trains."""
    name = f"model.layers.{args.layer}"
    loading = {"dtype": store.manifest.model.dtype, "attn_implementation": "eager"}
    return ActivationsStore(
        model=load_model("AutoModelForCausalLM", str(args.own), "cpu", loading, hook_names=[name]),
        dataset=datasets.Dataset.from_dict({"tokens": [row.tolist() for row in windows(store, args)]}),
        streaming=False,
        hook_name=name,
        hook_head_index=None,
        context_size=store.manifest.context,
        d_in=store.manifest.model.d_model,
        n_batches_in_buffer=20,
        total_training_tokens=args.steps * args.batch_tokens,
        store_batch_size_prompts=32,
        train_batch_size_tokens=args.batch_tokens,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )


def rows_of_dictionary_learning(store: Any, args: Any) -> Iterator[Tensor]:
    """Its own pipeline, over the same windows as text. The buffer holds eight batches (by default, 3.8M tokens)."""
    context = store.manifest.context
    model = LanguageModel(
        str(args.own), device_map="cpu", dispatch=True, dtype=torch.float32, attn_implementation="eager"
    )
    texts = cycle([model.tokenizer.decode(row[1:]) for row in windows(store, args)])  # the buffer adds BOS itself
    sizes = {"n_ctxs": 8 * args.batch_tokens // context, "ctx_len": context, "refresh_batch_size": 32}
    sizes |= {"d_submodule": store.manifest.model.d_model, "out_batch_size": args.batch_tokens}
    return ActivationBuffer(texts, model, model.model.layers[args.layer], remove_bos=True, **sizes)


def windows(store: Any, args: Any) -> Iterator[Any]:
    """The store's windows, as many as the steps read."""
    left = -(-args.steps * args.batch_tokens // store.manifest.context)
    request = sys.modules["saemill"].cache_schema.Request(tokens=True, split="train")
    for part in store.stream(request):
        yield from part.tokens[:left].astype("int64")
        left -= len(part.tokens)
        if left <= 0:
            return


@torch.no_grad()
def explained(store: Any, args: Any, rebuild: Rebuild) -> float:
    split = {"split": "validation", "shuffle": False, "scaled": True}
    x = torch.cat(list(store.batches(layers=args.layer, batch_tokens=args.batch_tokens, **split)))
    return 1 - float((x - rebuild(x)).square().sum() / (x - x.mean(0)).square().sum())


if __name__ == "__main__":
    main()
