"""What training on rows of massive norm costs us and the peers: explained variance and cross-entropy.

Each contestant trains twice: on all rows except special tokens, which is as far as the peers' own settings go
(`remove_bos`, `exclude_special_tokens`), and on ordinary rows only, which is our default. On ordinary rows each uses
the learning rate that `quality.py` found best for it; on all rows the search continues from there, judged on ordinary
rows of validation text. Then each reconstructs the same windows of the test split, which are spliced into the model:
once all rows, and once all but the massive ones.

    python bench/massive_rows.py STORE --peers-python PATH
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from quality import (
    CONTESTANTS,
    PROTOCOL,
    SEEDS,
    Contestants,
    Fit,
    Results,
    best_of,
    last_scores,
    range_of,
    write_rows_of,
)
from rich.console import Console
from rich.table import Table
from timing_and_tables import gather_facts
from torch import Tensor
from torch.nn import functional

from saemill import Store
from saemill.cache_schema.sites import RESID
from saemill.evaluate.context.context import Context
from saemill.evaluate.context.stored_windows import without_massive
from saemill.evaluate.model.batches import Windows, store_batches
from saemill.evaluate.model.ce_and_kl import next_tokens
from saemill.evaluate.model.prefix_suffix import LanguageModel
from saemill.harvest.progress import Watch

ALL, ORDINARY = "all rows", "ordinary rows"
RATES = Path(__file__).parent / "results" / "quality.json"
MEASURES = {
    "explained_variance": "explained variance, ordinary rows",
    "windows_all": "of the windows, all rows",
    "ce_all": "CE, all rows spliced",
    "ce_ordinary": "CE, massive rows as they are",
}


@dataclass(frozen=True)
class SpliceWindows:
    """Windows of the test split, and the model to splice their reconstructions into."""

    model: LanguageModel
    layer: int
    windows: Windows
    is_ordinary: Tensor

    @staticmethod
    def of(store: Store, layer: int, count: int) -> SpliceWindows:
        windows = next(store_batches(store, "test", (layer,), batch_windows=count, count=count))
        context = Context(store, watch=Watch(is_quiet=True))
        return SpliceWindows(context.model, layer, windows, without_massive(context, windows.keep, windows.resid))

    @property
    def rows(self) -> Tensor:
        return self.windows.resid[self.layer].float().flatten(0, 1)

    def measure(self, rebuilt_ND: Tensor) -> dict[str, float]:
        resid = self.windows.resid[self.layer]
        rebuilt = rebuilt_ND.view(resid.shape)
        found = {}
        for name, chosen in {"all": self.windows.keep, "ordinary": self.is_ordinary}.items():
            x, x_hat = resid.float()[chosen].double(), rebuilt[chosen].double()
            found[f"windows_{name}"] = float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
            found[f"ce_{name}"] = self.cross_entropy(torch.where(chosen[..., None], rebuilt.to(resid.dtype), resid))
        return found

    @torch.inference_mode()
    def cross_entropy(self, resid_WTD: Tensor) -> float:
        """The loss on the token after each token that is not special."""
        total, count = 0.0, 0
        for start in range(0, len(self.windows), 8):
            part = self.windows.slice(start, start + 8)
            next_N = next_tokens(part.tokens, part.keep)
            hidden_ND = self.model.suffix(resid_WTD[start : start + 8], self.layer)[part.keep]
            logits_NV = self.model.head(hidden_ND[next_N >= 0]).float()
            total += float(functional.cross_entropy(logits_NV, next_N[next_N >= 0], reduction="sum"))
            count += len(logits_NV)
        return total / count


def write_rows(store: Store, test: SpliceWindows, folder: Path) -> None:
    """Write the rows of both kinds. Only training rows differ: rates are chosen and reported on ordinary rows."""
    for kind in (ALL, ORDINARY):
        (folder / kind).mkdir()
        np.save(folder / kind / "windows.npy", test.rows.numpy())
    write_rows_of(store, (test.layer,), folder / ORDINARY, RESID)
    for split in ("validation", "test"):
        shutil.copy(folder / ORDINARY / f"{split}.npy", folder / ALL)
    how: dict[str, Any] = {"batch_tokens": 512, "shuffle": False, "device": "cpu", "massive_norms": None}
    rows = [batch.numpy() for batch in store.batches(test.layer, hook=RESID, split="train", **how)]
    np.save(folder / ALL / "train.npy", np.concatenate(rows))


def best_rates(path: Path) -> dict[tuple[str, str], float]:
    """The best rate of the first seed, by variant and contestant."""
    scores = {fit: score for fit, score in last_scores(json.loads(path.read_text())["rows"]).items() if not fit.seed}
    rising = sorted(scores, key=lambda fit: scores[fit].worth(fit.l0))
    return {(fit.variant, fit.contestant): fit.lr for fit in rising}


def show(rows: list[dict[str, Any]], run: dict[str, Any]) -> None:
    """Print the rows of one run: the file also keeps those of other stores, steps and widths."""
    rows = [row for row in rows if row.items() >= run.items()]
    table = Table(title="each at its best rate: median of seeds (range)")
    for heading in ("variant", "trained on", "contestant", "rate", "dead", *MEASURES.values()):
        table.add_column(heading)
    for key in dict.fromkeys((row["variant"], row["trained_on"], row["contestant"]) for row in rows):
        found = [row for row in rows if (row["variant"], row["trained_on"], row["contestant"]) == key]
        best = max((row for row in found if row["seed"] == SEEDS[0]), key=lambda row: row["validation"])["lr"]
        found = [row for row in found if row["lr"] == best]
        numbers = [
            f"{median(row[name] for row in found):.3f} ({range_of([row[name] for row in found], '.4f')})"
            for name in MEASURES
        ]
        table.add_row(*key, f"{best:.2g}", range_of([row["dead"] for row in found], ".1%"), *numbers)
    Console(width=220).print(table)


@click.command()
@click.argument("store")
@click.option("--peers-python", required=True, help="Python with sae-lens, dictionary-learning, sparsify installed.")
@click.option("--contestant", "contestants", multiple=True, default=CONTESTANTS, show_default=True)
@click.option("--variant", "variants", multiple=True, default=("topk",), show_default=True, help="A variant with a k.")
@click.option("--rates", type=click.Path(path_type=Path), default=RATES, help="Results of quality.py.")
@click.option("--width", default=2304, show_default=True)
@click.option("--l0", default=32.0, show_default=True)
@click.option("--steps", default=440, show_default=True, help="Steps of 2,048 tokens.")
@click.option("--windows", default=128, show_default=True, help="Windows of the test split to splice.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results/massive_rows.json"))
def main(
    store: str,
    peers_python: str,
    contestants: tuple[str, ...],
    variants: tuple[str, ...],
    rates: Path,
    width: int,
    l0: float,
    steps: int,
    windows: int,
    out: Path,
) -> None:
    """Train on STORE with and without its massive rows."""
    with Store.open(store) as opened, tempfile.TemporaryDirectory() as made:
        manifest, folder = opened.manifest, Path(made)
        layer = manifest.layers[0]
        test = SpliceWindows.of(opened, layer, windows)
        write_rows(opened, test, folder)
        rate_of = best_rates(rates)
        facts = gather_facts(peers_python, model=manifest.model.id, layer=layer) | {
            "massive": int((test.windows.keep & ~test.is_ordinary).sum()),
            "ce_clean": test.cross_entropy(test.windows.resid[layer]),
        }
        run = {"steps": steps, "cache_id": manifest.cache_id, "windows": windows}
        for kind in (ALL, ORDINARY):
            results = Results(out, run | {"trained_on": kind}, facts)
            workers = Contestants(folder / kind, steps, peers_python, None)

            def train(fit: Fit, results: Results = results, workers: Contestants = workers, kind: str = kind) -> Any:
                if fit not in results.scores:
                    click.echo(f"training on {kind}: {fit}", err=True)
                    score = workers.train(fit)
                    rebuilt = torch.from_numpy(np.load(folder / kind / "rebuilt.npy"))
                    results.add(fit, score, test.measure(rebuilt))
                    click.echo(f"  {results.rows[-1]['explained_variance']:.4f}", err=True)
                return results.scores[fit]

            for variant in variants:
                for contestant in contestants:
                    best = Fit(variant, width, l0, contestant, rate_of[variant, contestant])
                    if kind == ALL:
                        best = best_of(best, train, True)
                    for seed in SEEDS:
                        train(replace(best, seed=seed))
            workers.close()
    show(results.rows, run | {"protocol": PROTOCOL, "width": width, "l0": l0})


if __name__ == "__main__":
    main()
