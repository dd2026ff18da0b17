"""Links to other tokens that an attention budget keeps, by its mass, its slots, and the sinks it leaves out.

    python bench/attention_budget.py --store ./store --model FOLDER [--layers 13,14,15,16] [--tokens 4096]

The model runs once over tokens of the store's test split; every row of attention is sparsified under each budget as in
a harvest, and packed as in a store. A link leads to an earlier token that is neither special nor the window's first.
Prints a Markdown table of means over the layers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch

from saemill.cache_schema import AttentionCsr, AttentionSpec, Request, ShardContent, Store
from saemill.cache_schema.encode_and_read_chunks import encode
from saemill.cache_schema.info import count_links, links_per_row
from saemill.cache_schema.manifest import Manifest
from saemill.cache_schema.moments import is_special
from saemill.cache_schema.shard_content import lay_out
from saemill.harvest.capture import run
from saemill.harvest.model.load_and_truncate import Wanted, load_model
from saemill.harvest.sparsify_attention import KeptRows, sparsify, to_csr

MASSES, SLOTS = (0.9, 0.95, 0.99), (8, 16, 32)
SINKS = ((), ("bos",), ("bos", "self"))
BATCH = 16  # windows


@click.command()
@click.option("--store", "url", required=True)
@click.option("--model", "folder", required=True, help="The folder of the model that made the store.")
@click.option("--layers", default="", help="[default: the store's attention layers]")
@click.option("--tokens", default=4096)
def main(url: str, folder: str, layers: str, tokens: int) -> None:
    with Store.open(url) as store:
        manifest = store.manifest
        first, last = manifest.splits["test"]
        windows = min(tokens // manifest.context, last - first)
        request = Request(tokens=True, split="test", windows=(0, windows))
        ids = np.concatenate([part.tokens.copy() for part in store.stream(request) if part.tokens is not None])
    chosen = tuple(map(int, layers.split(","))) if layers else manifest.attention.layers
    model = load_model(Path(folder), Wanted((), chosen), getattr(torch, manifest.model.dtype), torch.device("cpu"))
    budgets = [AttentionSpec(chosen, topk=k, mass=m, left_out=s) for s, m, k in product(SINKS, MASSES, SLOTS)]
    kept: dict[tuple[AttentionSpec, int], list[KeptRows]] = {pair: [] for pair in product(budgets, chosen)}

    def keep(layer: int, probs: torch.Tensor) -> None:
        for budget in budgets:
            kept[budget, layer].append(sparsify(probs, budget))

    for start in range(0, windows, BATCH):
        batch = torch.from_numpy(ids[start : start + BATCH].astype(np.int64))
        run(model, batch, {layer: partial(keep, layer) for layer in chosen})
    special = is_special(ids, manifest.model.special_tokens)
    print(f"{manifest.model.id}, layers {list(chosen)}, {windows * manifest.context:,} tokens\n")
    print("| left out | mass | slots | links a token | their mass | kept mass | BOS | self | entries | bytes a token |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for budget in budgets:
        csrs = {layer: to_csr(layer, KeptRows.concat(kept[budget, layer])) for layer in chosen}
        found = links_per_row(count_links(csr, special) for csr in csrs.values())
        mass = np.mean([csr.kept_mass.astype(np.float64).mean() for csr in csrs.values()])
        entries = sum(csr.entries for csr in csrs.values()) / len(chosen) / ids.size
        size = sum(packed_bytes(manifest, budget, layer, csr, windows) for layer, csr in csrs.items())
        print(
            f"| {', '.join(budget.left_out) or 'nothing'} | {budget.mass} | {budget.topk} | {found['links']:.1f} "
            f"| {found['link_mass']:.3f} | {mass:.3f} | {found['bos_mass']:.3f} | {found['self_mass']:.3f} "
            f"| {entries:.1f} | {size / len(chosen) / ids.size:.1f} |"
        )


def packed_bytes(manifest: Manifest, budget: AttentionSpec, layer: int, csr: AttentionCsr, windows: int) -> int:
    """The size of one layer on disk."""
    splits = {"train": (0, windows), "validation": (windows, windows), "test": (windows, windows)}
    budget = replace(budget, layers=(layer,))
    shard = replace(manifest, windows=windows, splits=splits, shard_windows=windows, attention=budget)
    zeros = np.zeros((windows, manifest.context), np.uint32)
    parts = lay_out(shard, 0, ShardContent(zeros, zeros, {}, {}, {layer: csr}))
    return sum(buffer.nbytes for part in parts for buffer in encode(part.layout, part.chunk(0)))


if __name__ == "__main__":
    main()
