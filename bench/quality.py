"""Quality against the peers: explained variance on held-out text at equal sparsity, and dead latents.

All contestants train on the same rows in the same order, in a process and an environment of their own, peers at
the settings they recommend. At k fixed the numbers stand beside each other; where sparsity follows a coefficient,
several are trained and explained variance is read off at the wanted L0, between the two nearest.
A fit that is in the results already is not made again.

    python bench/quality.py STORE --peers-python PATH --out bench/results/quality.json
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from saemill.cache_schema import Request, Store, to_float32

HERE = Path(__file__).parent
PEERS = ("sae_lens", "dictionary_learning")
BY_K = ("topk", "batchtopk", "matryoshka")
COEFFICIENTS = {  # from dense to sparse, spanning the wanted L0
    "standard": {"ours": (0.1, 0.2, 0.3), "sae_lens": (2.0, 5.0, 10.0), "dictionary_learning": (0.03, 0.1, 0.3)},
    "gated": {"ours": (0.2, 0.3, 0.5), "sae_lens": (3.0, 8.0, 16.0), "dictionary_learning": (0.3, 1.0, 3.0)},
    "p_anneal": {"ours": (0.06, 0.1, 0.2), "dictionary_learning": (0.03, 0.1, 0.3)},
    "jumprelu": {"ours": (16.0,), "sae_lens": (0.5, 2.0, 5.0), "dictionary_learning": (16.0,)},
}


@dataclass(frozen=True)
class Fit:
    """One SAE to be trained."""

    variant: str
    width: int
    contestant: str
    k: int = 0
    coefficient: float = 0.0
    lr: float = 0.0
    """0: the contestant's own."""


@dataclass(frozen=True)
class Score:
    explained_variance: float
    l0: float
    dead: float


def write_rows(store: Store, folder: Path) -> None:
    """train.npy and held_out.npy: float32 rows of tokens that may train."""
    layer, special = store.manifest.layers[0], store.manifest.model.special_tokens
    for name, splits in {"train": ("train",), "held_out": ("validation", "test")}.items():
        rows = []
        for split in splits:
            for part in store.stream(Request(layers=(layer,), tokens=True, split=split)):
                values = to_float32(part.resid[layer], store.manifest.model.dtype)
                rows.append(values[~np.isin(part.tokens, special)])
        np.save(folder / f"{name}.npy", np.concatenate(rows))


def fits_of(
    widths: tuple[int, ...], ks: tuple[int, ...], variants: tuple[str, ...], lrs: tuple[float, ...]
) -> list[Fit]:
    fits = []
    for variant, width, contestant in itertools.product(variants, widths, ("ours", *PEERS)):
        rates = (0.0,) if contestant == "ours" else (0.0, *lrs)
        if variant in BY_K:
            names = ("ours", "ours bfloat16") if contestant == "ours" else (contestant,)
            fits += [Fit(variant, width, n, k=k, lr=lr) for n, k, lr in itertools.product(names, ks, rates)]
        else:
            coefficients = COEFFICIENTS[variant].get(contestant, ())
            fits += [Fit(variant, width, contestant, 0, c, lr) for c, lr in itertools.product(coefficients, rates)]
    return fits


def train(fit: Fit, folder: Path, steps: int, peers_python: str) -> Score:
    """Train in a process of its own and read what it says in the end."""
    script = "ours" if fit.contestant.startswith("ours") else fit.contestant
    python = sys.executable if script == "ours" else peers_python
    words = [str(folder), fit.variant, str(fit.width), str(fit.k), str(fit.coefficient), str(fit.lr), str(steps)]
    if script == "ours":
        words.append("bfloat16" if fit.contestant.endswith("bfloat16") else "float32")
    command = [python, "-W", "ignore", str(HERE / "peers" / f"{script}_fit.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    scores = [line.removeprefix("score ") for line in done.stdout.splitlines() if line.startswith("score ")]
    if done.returncode or not scores:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return Score(**json.loads(scores[-1]))


def at_l0(scores: list[Score], l0: float) -> float:
    """Explained variance between the two scores that lie around an L0; not a number where none do."""
    ordered = sorted(scores, key=lambda score: score.l0)
    for low, high in itertools.pairwise(ordered):
        if 0 < low.l0 <= l0 <= high.l0:
            share = math.log(l0 / low.l0) / math.log(high.l0 / low.l0) if high.l0 > low.l0 else 0.0
            return low.explained_variance + share * (high.explained_variance - low.explained_variance)
    return math.nan


class Results:
    """Scores by fit, in a file that grows."""

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path, self.settings = path, settings
        self.scores: dict[Fit, Score] = {}
        if path.is_file():
            raw = json.loads(path.read_text())
            if raw["settings"] == settings:
                self.scores = {Fit(**row["fit"]): Score(**row["score"]) for row in raw["fits"]}

    def add(self, fit: Fit, score: Score) -> None:
        self.scores[fit] = score
        rows = [{"fit": asdict(fit), "score": asdict(score)} for fit, score in self.scores.items()]
        self.path.write_text(json.dumps({"settings": self.settings, "fits": rows}, indent=1) + "\n")


def best(results: Results, fits: list[Fit], l0: float | None) -> tuple[float, float]:
    """Explained variance and dead share of one contestant: at its best learning rate."""
    found = []
    for _, group in itertools.groupby(sorted(fits, key=lambda fit: fit.lr), key=lambda fit: fit.lr):
        scores = [results.scores[fit] for fit in group]
        dead = min(scores, key=lambda score: abs(score.l0 - (l0 or score.l0))).dead
        found.append((scores[0].explained_variance if l0 is None else at_l0(scores, l0), dead))
    return max(found, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])


def show(results: Results, fits: list[Fit], l0: float) -> None:
    table = Table(title="explained variance on held-out text (dead share); peers at the better of their learning rates")
    contestants = list(dict.fromkeys(fit.contestant for fit in fits))
    for heading in ("variant", "width", "k / L0", *contestants, "lead"):
        table.add_column(heading, justify="right")
    for (variant, width, k), group in itertools.groupby(fits_in_order(fits), key=lambda f: (f.variant, f.width, f.k)):
        rows = list(group)
        cells = {}
        for contestant in contestants:
            own = [fit for fit in rows if fit.contestant == contestant]
            if own:
                one_target = variant in BY_K or len({fit.coefficient for fit in own}) == 1
                cells[contestant] = best(results, own, None if one_target else l0)
        ours = [value for name, (value, _) in cells.items() if name.startswith("ours")]
        theirs = [value for name, (value, _) in cells.items() if not name.startswith("ours") and not math.isnan(value)]
        lead = f"{ours[-1] - max(theirs):+.4f}" if theirs else ""
        texts = [f"{cells[c][0]:.4f} ({cells[c][1]:.1%})" if c in cells else "" for c in contestants]
        table.add_row(variant, str(width), str(k or f"{l0:g}"), *texts, lead)
    Console(width=150).print(table)


def fits_in_order(fits: list[Fit]) -> list[Fit]:
    return sorted(fits, key=lambda fit: (fit.variant, fit.width, fit.k))


@click.command()
@click.argument("store")
@click.option("--peers-python", required=True, help="Python with sae-lens and dictionary-learning installed.")
@click.option("--variant", "variants", multiple=True, default=(*BY_K, *COEFFICIENTS))
@click.option("--width", "widths", multiple=True, type=int, default=(512, 2048))
@click.option("--k", "ks", multiple=True, type=int, default=(8, 32))
@click.option("--l0", default=16.0, show_default=True, help="Where variants without k are compared.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--lr", "lrs", multiple=True, type=float, help="Also try the peers at this learning rate.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "results" / "quality.json")
def main(
    store: str,
    peers_python: str,
    variants: tuple[str, ...],
    widths: tuple[int, ...],
    ks: tuple[int, ...],
    l0: float,
    steps: int,
    lrs: tuple[float, ...],
    out: Path,
) -> None:
    """Train everything on the activations of STORE and compare."""
    with Store.open(store) as opened, tempfile.TemporaryDirectory() as folder:
        write_rows(opened, Path(folder))
        results = Results(out, {"cache_id": opened.manifest.cache_id, "steps": steps})
        fits = fits_of(widths, ks, variants, lrs)
        for fit in track([fit for fit in fits if fit not in results.scores], "training"):
            results.add(fit, train(fit, Path(folder), steps, peers_python))
    show(results, fits, l0)


if __name__ == "__main__":
    main()
