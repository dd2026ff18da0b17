"""Test the claims of published variants on a real model, at equal sparsity where sparsity can be set.

1. Trains, on a store of a real model, top-k and the variants that claim to improve on it, with three seeds each.
2. Reads the test split once for each SAE: explained variance and L0 on ordinary tokens, and the claimed quantity.
3. Prints them next to the SAE that the variant claims to improve on, seed by seed.

    sae-harvest --model smollm2 --dataset docs:/usr/share/doc --tokens 1200k --out ./store
    python bench/claims.py ./store

A run that already exists is resumed or read, provided that the same commit and packages started it. Runs do not record
which machine trained them, so their step times are reported as this machine's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from timing_and_tables import gather_facts, write_rows
from torch import Tensor
from torch.nn import functional

from saemill import Store, train
from saemill.api.run import Run
from saemill.evaluate.evals.core.weight_metrics import max_cosine
from saemill.studies.tables import spread
from saemill.train.run.run_folder import RunFolder, provenance
from saemill.train.sae.model import SparseAutoencoder

K = 32
KS = (8, 16, 32, 64)
SEEDS = (0, 1, 2)
COMPARED = ("batchtopk", "matryoshka", "ortsae", "tsae", "abstopk", "matching_pursuit", "treesae")
SMOOTH_PART = 0.2  # the part of the dictionary that T-SAE smooths over time; a matryoshka's third group ends near it
BATCH = 2048
BOTH_SIGNS = 0.1  # a latent counts as used with both signs if more than this share of its firings has the rarer one


@dataclass
class Sums:
    """Sums over the test split for one SAE at one number of active latents."""

    rows: int = 0
    unexplained: float = 0.0
    active: float = 0.0
    neighbours: list[float] = field(default_factory=list)  # cosines between the codes of neighbouring tokens
    distant: list[float] = field(default_factory=list)  # and of tokens half a batch apart
    signs: Tensor | None = None  # [2, F], firings above and below zero

    def add(self, sae: SparseAutoencoder, x: Tensor) -> None:
        f = sae.encode(x)
        self.rows += len(x)
        self.unexplained += float((sae.decode(f) - x).double().square().sum())
        self.active += float((f != 0).sum())
        smooth = f[:, : round(SMOOTH_PART * f.shape[1])]
        self.neighbours.append(_cosine(smooth[1:], smooth[:-1]))
        self.distant.append(_cosine(smooth, smooth.roll(len(x) // 2, 0)))
        signs = torch.stack([(f > 0).sum(0), (f < 0).sum(0)])
        self.signs = signs if self.signs is None else self.signs + signs

    def measures(self, variance: float) -> dict[str, float]:
        assert self.signs is not None
        rarer, firings = self.signs.amin(0), self.signs.sum(0)
        return {
            "explained_variance": 1.0 - self.unexplained / self.rows / variance,
            "l0": self.active / self.rows,
            "never_fired": float((firings == 0).double().mean()),
            "neighbours": fmean(self.neighbours) - fmean(self.distant),
            "both_signs": float((rarer > BOTH_SIGNS * firings).double().mean()),
        }


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(functional.cosine_similarity(one, other, dim=1).mean())


@torch.no_grad()
def measure(runs: Iterable[Run], batches: list[Tensor]) -> list[dict[str, Any]]:
    """A row for each SAE; those trained at the largest k are also measured at every smaller one."""
    rows = torch.cat(batches)
    variance = float((rows - rows.mean(0)).double().square().sum(1).mean())
    found = []
    for run in runs:
        saes = RunFolder(run.path).read_config()["saes"]
        for label in run.saes:
            variant, config, result = saes[label]["variant"], saes[label]["config"], run.results["saes"][label]
            sae, trained_at = run.load(label), round(config["k"])
            for k in KS if trained_at == KS[-1] else (trained_at,):
                if trained_at == KS[-1]:
                    sae.gate.k = k  # pyright: ignore[reportAttributeAccessIssue]
                sums = Sums()
                for x in batches:
                    sums.add(sae, x)
                name = variant if k == trained_at else f"{variant}, trained at {trained_at}"
                row = {"variant": name, "k": k, "seed": config["seed"], "decoder": float(max_cosine(sae.W_dec).mean())}
                found.append(row | sums.measures(variance) | {"step_seconds": result["step_seconds"]})
    return found


def train_all(out: Path, **settings: Any) -> list[Run]:
    """Three runs: all variants at one k, the dictionary for every k, and one top-k SAE for each k."""
    seeds = "seed=" + ",".join(map(str, SEEDS))
    runs = {
        "claims_32": {"variant": ["topk", *COMPARED], "k": K, "grid": [seeds]},
        "claims_every_k": {"variant": "hierarchical_topk", "k": KS[-1], "grid": [seeds]},
        "claims_topk": {"variant": "topk", "grid": ["k=" + ",".join(str(k) for k in KS if k != K), seeds]},
    }
    return [read_or_train(out / name, {"out": str(out), "name": name, **settings, **own}) for name, own in runs.items()]


def read_or_train(folder: Path, settings: Mapping[str, Any]) -> Run:
    """Read the run in a folder if it is finished; otherwise resume or start it."""
    if not (folder / "config.json").is_file():
        return train(plots=False, **settings)
    require_same_code(folder)
    return Run(folder) if (folder / "result.json").is_file() else train(resume=str(folder))


def require_same_code(folder: Path) -> None:
    """Rows name the current commit and packages, so an existing run must have the same."""
    found, now = (_code(about) for about in (RunFolder(folder).read_config()["provenance"], provenance({})))
    if found != now:
        raise click.ClickException(f"{folder} was started with {found}, but this is {now}: choose another --runs")


def _code(about: Mapping[str, Any]) -> str:
    commit = (about["git"] or {}).get("commit") or "no commit"
    return ", ".join([commit, *(f"{name} {version}" for name, version in about["packages"].items())])


def require_same_settings(runs: Iterable[Run], cache_id: str, width: int, tokens: int) -> None:
    """Existing runs are reported like new ones, so they must have the settings of this call."""
    for run in runs:
        config = RunFolder(run.path).read_config()
        found = (config["cache"]["cache_id"], {sae["config"]["width"] for sae in config["saes"].values()})
        least = tokens - config["data"]["batch_tokens"]
        if found != (cache_id, {width}) or not least < run.results["tokens"] <= tokens:
            raise click.ClickException(
                f"{run.path}: expected store {cache_id}, width {width}, {tokens:,} tokens, "
                f"found {found[0]}, {found[1]}, {run.results['tokens']:,}: choose another --runs"
            )


COLUMNS = ("explained_variance", "l0", "never_fired", "decoder", "neighbours", "both_signs", "step_seconds")


def show(found: list[dict[str, Any]], console: Console) -> None:
    """Print a line per variant and k: mean and deviation over seeds, and the difference from top-k by seed."""
    table = Table(title="the test split: mean ± standard deviation over seeds", title_justify="left", box=None)
    for heading in ("variant", "k", *COLUMNS, "EV, against topk at this k"):
        table.add_column(heading.replace("_", " "))
    base = {(row["k"], row["seed"]): row["explained_variance"] for row in found if row["variant"] == "topk"}
    for variant, k in dict.fromkeys((row["variant"], row["k"]) for row in found):
        rows = [row for row in found if (row["variant"], row["k"]) == (variant, k)]
        gains = [row["explained_variance"] - base[k, row["seed"]] for row in rows]
        cells = [spread([row[column] for row in rows]) for column in COLUMNS]
        table.add_row(variant, str(k), *cells, "" if variant == "topk" else spread(gains))
    console.print(table)


@click.command()
@click.argument("store")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("bench-results/claims"), show_default=True)
@click.option("--width", default=1152, show_default=True)
@click.option("--tokens", default=546304, show_default=True, help="Training tokens of each SAE.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), default=Path("bench-results/claims.json"))
def main(store: str, runs: Path, width: int, tokens: int, json_file: Path) -> None:
    """Train and compare the variants on the residual stream of STORE."""
    with Store(store) as opened:
        manifest, layer = opened.manifest, opened.manifest.layers[0]
        settings = {"width": width, "tokens": tokens, "epochs": 1, "layer": layer, "set": {"data.batch_tokens": 1024}}
        trained = train_all(runs, cache=store, **settings)
        require_same_settings(trained, manifest.cache_id, width, tokens)
        batches = list(opened.batches(layers=layer, split="test", batch_tokens=BATCH, shuffle=False, device="cpu"))
    found = measure(trained, batches)
    show(found, Console(width=200))
    facts = gather_facts(cache_id=manifest.cache_id, model=manifest.model.id, layer=layer, width=width, tokens=tokens)
    facts |= {"threads": torch.get_num_threads(), "rows": sum(map(len, batches))}
    write_rows(json_file, "What the variants claim, on a real model", [row | facts for row in found])


if __name__ == "__main__":
    main()
