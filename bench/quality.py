"""Quality against the peers: explained variance on held-out text at equal sparsity, and dead latents.

All contestants train on the same rows in the same order, in a process and an environment of their own, with three
seeds. The peers at the settings they recommend, and at k fixed also at our learning rate: in a short run the rate
decides much, so the comparison at equal rates comes first. At k fixed a fit whose held-out L0 is more than a tenth
from k is off target: it is kept and marked, and stands in no comparison. Where sparsity follows a coefficient,
several are trained and explained variance is read off at the wanted L0, between the two nearest; where those do
not lie around it, or are more than fourfold apart, there is no number. A fit that is in the results already is not
made again.

    python bench/quality.py STORE --peers-python PATH
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from ratios import gather_facts, write_rows
from rich.console import Console
from rich.progress import track
from rich.table import Table
from talk import Worker

from saemill.cache_schema import Request, Site, Store
from saemill.train.kit.registry import config_type

HERE = Path(__file__).parent
PEERS = ("sae_lens", "dictionary_learning")
OURS = ("ours", "ours bfloat16")
BY_K = ("topk", "batchtopk", "matryoshka")
SEEDS = (0, 1, 2)
PROTOCOL = 2  # raised when a contestant is trained in another way: rows of before are of another comparison
OFF = 0.1  # how far L0 may be from what was asked
WIDE = 4.0  # between fits whose L0 are further apart than this, as a ratio, nothing is read off
COEFFICIENTS = {  # from dense to sparse, spanning the wanted L0
    "standard": {"ours": (0.1, 0.2, 0.3), "sae_lens": (2.0, 5.0, 10.0), "dictionary_learning": (0.1, 0.17, 0.3)},
    "gated": {"ours": (0.2, 0.3, 0.5), "sae_lens": (3.0, 8.0, 16.0), "dictionary_learning": (1.0, 3.0, 10.0)},
    "p_anneal": {"ours": (0.1, 0.14, 0.2), "dictionary_learning": (0.1, 0.17, 0.3)},
    "jumprelu": {"ours": (16.0,), "sae_lens": (0.5, 2.0, 5.0), "dictionary_learning": (16.0,)},
}
TARGETED = {("jumprelu", "ours"), ("jumprelu", "dictionary_learning")}  # their coefficient is the wanted L0


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
    seed: int = 0

    @property
    def wanted_l0(self) -> float | None:
        """None where a coefficient is tried, whose L0 nobody knows before."""
        if self.variant in BY_K:
            return float(self.k)
        return self.coefficient if (self.variant, self.contestant) in TARGETED else None


@dataclass(frozen=True)
class Score:
    explained_variance: float
    l0: float
    dead: float

    def is_on_target(self, wanted: float | None) -> bool:
        return wanted is None or abs(self.l0 - wanted) <= OFF * wanted


def write_rows_of(store: Store, folder: Path) -> None:
    """train.npy and held_out.npy: float32 rows of tokens that may train."""
    layer, special = store.manifest.layers[0], store.manifest.model.special_tokens
    for name, splits in {"train": ("train",), "held_out": ("validation", "test")}.items():
        rows = []
        for split in splits:
            for part in store.stream(Request(layers=(layer,), tokens=True, split=split)):
                values = part.values(Site("resid", layer))
                rows.append(values[~np.isin(part.tokens, special)])
        np.save(folder / f"{name}.npy", np.concatenate(rows))


def our_rate(variant: str, width: int, d_model: int) -> float:
    """The learning rate of this variant here."""
    rate = config_type(variant)(width=width).build(d_model).optim.lr
    assert rate is not None
    return rate


def fits_of(
    widths: tuple[int, ...], ks: tuple[int, ...], variants: tuple[str, ...], seeds: Iterable[int], d_model: int
) -> list[Fit]:
    fits = []
    for variant, width, contestant, seed in itertools.product(variants, widths, (*OURS, *PEERS), seeds):
        if variant in BY_K:
            rates = (0.0,) if contestant in OURS else (our_rate(variant, width, d_model), 0.0)
            fits += [Fit(variant, width, contestant, k, 0.0, lr, seed) for lr, k in itertools.product(rates, ks)]
        else:
            coefficients = COEFFICIENTS[variant].get(contestant, ())
            fits += [Fit(variant, width, contestant, 0, c, 0.0, seed) for c in coefficients]
    return fits


class Contestants:
    """A process each, started when it is first asked."""

    def __init__(self, folder: Path, steps: int, peers_python: str) -> None:
        self._folder, self._steps, self._peers_python = str(folder), steps, peers_python
        self._workers: dict[str, Worker] = {}

    def train(self, fit: Fit) -> Score:
        script = "ours" if fit.contestant in OURS else fit.contestant
        if script not in self._workers:
            python = sys.executable if script == "ours" else self._peers_python
            self._workers[script] = Worker(script, [python, "-W", "ignore", HERE / "peers" / f"{script}_fit.py"])
        asked = {name: value for name, value in asdict(fit).items() if name != "contestant"}
        asked |= {"precision": "bfloat16" if fit.contestant.endswith("bfloat16") else "float32"}
        return Score(**self._workers[script].ask(folder=self._folder, steps=self._steps, **asked))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


class Results:
    """Scores by fit, in a file that grows; each row with what it was measured with."""

    def __init__(self, path: Path, cache_id: str, steps: int, facts: dict[str, Any]) -> None:
        self.path, self._facts = path, facts
        self._run = {"steps": steps, "cache_id": cache_id, "protocol": PROTOCOL}
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
        self.scores = {fit_of(row): score_of(row) for row in self.rows if row.items() >= self._run.items()}

    def add(self, fit: Fit, score: Score) -> None:
        self.scores[fit] = score
        self.rows.append(row_of(fit, score) | self._run | self._facts)
        write_rows(self.path, "Quality at equal sparsity, on held-out text of a pocket store", self.rows)


def row_of(fit: Fit, score: Score) -> dict[str, Any]:
    on = score.is_on_target(fit.wanted_l0)
    return asdict(fit) | asdict(score) | {"wanted_l0": fit.wanted_l0, "on_target": on}


def fit_of(row: dict[str, Any]) -> Fit:
    return Fit(**{name: row[name] for name in Fit.__dataclass_fields__})


def score_of(row: dict[str, Any]) -> Score:
    return Score(**{name: row[name] for name in Score.__dataclass_fields__})


@dataclass(frozen=True)
class Cell:
    """What one contestant has come to at one place of the table: a value of each seed."""

    values: tuple[float, ...]  # explained variance; none where no seed is on target
    l0: tuple[float, ...]  # of the fits, or of those between which the values are read off
    dead: tuple[float, ...]
    off: tuple[float, ...] = ()
    """L0 of the seeds that are off target, or whose fits do not lie around the wanted one."""
    is_read_off: bool = False

    def __str__(self) -> str:
        if not self.values:
            return f"off target: L0 {from_to(self.off)}"
        spread = f" ({min(self.values):.3f} to {max(self.values):.3f})" if len(self.values) > 1 else ""
        where = f"between L0 {from_to(self.l0, 'and')}" if self.is_read_off else f"at L0 {from_to(self.l0)}"
        dead = f", {statistics.median(self.dead):.1%} dead" if any(self.dead) else ""
        missing = f", {len(self.off)} of {len(self.off) + len(self.values)} seeds off target" if self.off else ""
        return f"{statistics.median(self.values):.3f}{spread} {where}{dead}{missing}"


def from_to(values: tuple[float, ...], word: str = "to") -> str:
    return f" {word} ".join(dict.fromkeys(f"{value:.1f}" for value in (min(values), max(values))))


def cell_of(scores: dict[Fit, Score], wanted: float) -> Cell | None:
    """Of one contestant, variant, width, k and rate; None where nothing was trained."""
    if not scores:
        return None
    is_read_off = all(fit.wanted_l0 is None for fit in scores)
    values, l0, dead, off = [], [], [], []
    for seed in sorted({fit.seed for fit in scores}):
        own = [score for fit, score in scores.items() if fit.seed == seed]
        near = min(own, key=lambda score: abs(score.l0 - wanted))
        value, used = read_off(own, wanted) if is_read_off else (near.explained_variance, [near])
        if math.isnan(value) or not (is_read_off or near.is_on_target(wanted)):
            off += [score.l0 for score in used]
        else:
            values.append(value)
            l0 += [score.l0 for score in used]
            dead.append(near.dead)
    return Cell(tuple(values), tuple(l0), tuple(dead), tuple(off), is_read_off)


def read_off(scores: list[Score], l0: float) -> tuple[float, list[Score]]:
    """Explained variance between the two scores that lie around an L0, and these; not a number where none do."""
    ordered = sorted(scores, key=lambda score: score.l0)
    for low, high in itertools.pairwise(ordered):
        if 0 < low.l0 <= l0 <= high.l0:
            if high.l0 > WIDE * low.l0:
                return math.nan, [low, high]
            share = math.log(l0 / low.l0) / math.log(high.l0 / low.l0) if high.l0 > low.l0 else 0.0
            return low.explained_variance + share * (high.explained_variance - low.explained_variance), [low, high]
    return math.nan, [min(ordered, key=lambda score: abs(score.l0 - l0))]


def last_scores(rows: list[dict[str, Any]]) -> dict[Fit, Score]:
    """Of the latest comparison in a file: rows of other steps, of another store or protocol are not beside it."""
    same = [tuple(row.get(name) for name in ("steps", "cache_id", "protocol")) for row in rows]
    return {fit_of(row): score_of(row) for row, run in zip(rows, same, strict=True) if run == same[-1]}


def lines_of(scores: dict[Fit, Score], l0: float) -> list[tuple[str, str, dict[str, Cell]]]:
    """Rates, what is compared, and the cells by contestant: equal learning rates first."""
    lines = []
    for equal in (True, False):
        for variant, width, k in sorted({(fit.variant, fit.width, fit.k) for fit in scores}):
            here = {f: s for f, s in scores.items() if (f.variant, f.width, f.k) == (variant, width, k)}
            if equal and not any(fit.lr for fit in here):
                continue
            cells = {}
            for contestant in (*OURS, *PEERS):
                is_theirs = contestant in PEERS
                own = {
                    f: s for f, s in here.items() if f.contestant == contestant and bool(f.lr) == (equal and is_theirs)
                }
                if (cell := cell_of(own, float(k or l0))) is not None:
                    cells[contestant] = cell
            lines.append(("equal" if equal else "own", f"{variant}, {width:,} latents, L0 {k or l0:g}", cells))
    return lines


def show(scores: dict[Fit, Score], l0: float) -> None:
    for rates, title in (("equal", "the peers at our learning rate"), ("own", "each at its own learning rate")):
        table = Table(
            title=f"explained variance on held-out text, {title}: median of seeds (from to), L0, dead latents"
        )
        for heading in ("what", *OURS, *PEERS):
            table.add_column(heading)
        for kind, what, cells in lines_of(scores, l0):
            if kind == rates:
                table.add_row(what, *(str(cells[who]) if who in cells else "" for who in (*OURS, *PEERS)))
        Console(width=190).print(table)


@click.command()
@click.argument("store")
@click.option("--peers-python", required=True, help="Python with sae-lens and dictionary-learning installed.")
@click.option("--variant", "variants", multiple=True, default=(*BY_K, *COEFFICIENTS))
@click.option("--width", "widths", multiple=True, type=int, default=(512, 2048))
@click.option("--k", "ks", multiple=True, type=int, default=(8, 32))
@click.option("--l0", default=16.0, show_default=True, help="Where variants without k are compared.")
@click.option("--steps", default=600, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results/quality.json"))
def main(
    store: str,
    peers_python: str,
    variants: tuple[str, ...],
    widths: tuple[int, ...],
    ks: tuple[int, ...],
    l0: float,
    steps: int,
    seeds: tuple[int, ...],
    out: Path,
) -> None:
    """Train everything on the activations of STORE and compare."""
    with Store.open(store) as opened, tempfile.TemporaryDirectory() as folder:
        write_rows_of(opened, Path(folder))
        facts = gather_facts(peers_python)
        results = Results(out, opened.manifest.cache_id, steps, facts)
        fits = fits_of(widths, ks, variants, seeds, opened.manifest.model.d_model)
        contestants = Contestants(Path(folder), steps, peers_python)
        for fit in track([fit for fit in fits if fit not in results.scores], "training"):
            results.add(fit, contestants.train(fit))
        contestants.close()
    show({fit: results.scores[fit] for fit in fits}, l0)


if __name__ == "__main__":
    main()
