"""Quality against the peers: explained variance on held-out text at equal sparsity, and dead latents.

All contestants train on the same rows in the same order, each in its own process and environment. Training and results
use ordinary tokens only: rows of massive norm would serve no peer well. The learning rate decides a short run, so each
contestant's first seed is tried at its own rate, then at rates a factor of three apart, up and down as long as
validation text improves; the other seeds train at the best rate. If `--lr` has trained all seeds at another rate too,
the median on validation text decides. If sparsity depends on a coefficient, that is searched for in the same way until
L0 is the wanted one; if a threshold decides which latents are active, it is placed on validation text to give exactly
that L0. Reported numbers are from the test split, which decides nothing. A fit whose L0 is more than a tenth off is off
target: it is kept and marked, but not compared. A fit that is already in the results is not repeated.

    python bench/quality.py STORE --peers-python PATH

Transcoders, on a store with mlp_in and mlp_out, are compared with sparsify's, both with k active latents per row:

    python bench/quality.py STORE --peers-python PATH --variant transcoder --variant skip_transcoder

Cross-layer transcoders, over all layers of such a store, are compared with CLT-Forge's, whose code
`make bench-transcoders` fetches. Width, L0 and the squares in explained variance are over all layers together; both
train on layers scaled to the same mean norm:

    python bench/quality.py STORE --peers-python PATH --clt-forge FOLDER --variant clt
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from fitting import CROSS_LAYER, TRANSCODERS
from rich.console import Console
from rich.table import Table
from timing_and_tables import gather_facts, revision_of, write_rows
from worker_pipe import Worker

from saemill import Store
from saemill.cache_schema.sites import RESID
from saemill.train.kit.variant_registry import config_type

HERE = Path(__file__).parent
CONTESTANTS = ("ours", "sae_lens", "dictionary_learning")
OF_TRANSCODERS = ("ours", "sparsify")
OF_CROSS_LAYER = ("ours", "clt_forge")
BY_K = ("topk", "batchtopk", "matryoshka", *TRANSCODERS)
VARIANTS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated")
SEEDS = (0, 1, 2)
PROTOCOL = 4  # raised when a contestant's training changes: earlier rows then belong to another comparison
OFF = 0.1  # how far L0 may be from the wanted one, relative to it
NEAR = 0.03  # how near L0 must come for the search for a coefficient to stop
FACTOR = 3.0  # between learning rates
COEFFICIENTS = {  # where the search starts
    "standard": {"ours": 0.2, "sae_lens": 5.0, "dictionary_learning": 0.17},
    "gated": {"ours": 0.3, "sae_lens": 8.0, "dictionary_learning": 0.3},
    "p_anneal": {"ours": 0.14, "dictionary_learning": 0.17},
    "jumprelu": {"sae_lens": 2.0},
    CROSS_LAYER: {"clt_forge": 0.2},
}
# These are given the wanted L0.
TARGETED = {("jumprelu", "ours"), ("jumprelu", "dictionary_learning"), (CROSS_LAYER, "ours")}


@dataclass(frozen=True)
class Fit:
    """One SAE to train."""

    variant: str
    width: int
    l0: float
    """The wanted L0: k, a target, or the goal of the search for a coefficient."""
    contestant: str
    lr: float
    coefficient: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Scores on the test split, and on the validation split, by which rates and coefficients are chosen."""

    explained_variance: float
    l0: float
    dead: float
    validation: float
    validation_l0: float
    came_to: float | None = None
    """L0 on validation text as trained, if a threshold was then placed to reach the wanted one."""

    @property
    def as_trained(self) -> float:
        """L0 on validation text, before any threshold was placed."""
        return self.validation_l0 if self.came_to is None else self.came_to

    def is_on_target(self, wanted: float) -> bool:
        return is_near(self.l0, wanted)

    def worth(self, wanted: float) -> tuple[bool, float]:
        """The sort key that decides between rates, from validation text only."""
        return is_near(self.validation_l0, wanted), self.validation


def is_near(l0: float, wanted: float) -> bool:
    return abs(l0 - wanted) <= OFF * wanted


def rows_read_by(variant: str) -> str:
    """The kind of rows: from the residual stream, one MLP, or the MLPs of several layers."""
    return "MLPs" if variant == CROSS_LAYER else "MLP" if variant in TRANSCODERS else RESID


def layers_of(store: Store, kind: str) -> tuple[int, ...]:
    hooks = store.manifest.hooks
    if kind != RESID and not {"mlp_in", "mlp_out"} <= hooks.keys():
        raise click.UsageError(f"{store.url} has no mlp_in and mlp_out: harvest with --hooks mlp_in,mlp_out")
    layers = store.manifest.layers if kind == RESID else hooks["mlp_in"].layers
    return tuple(layers) if kind == "MLPs" else tuple(layers[:1])


def write_rows_of(store: Store, layers: Sequence[int], folder: Path, kind: str) -> None:
    """Write a table of float32 rows for each split. For SAEs: of ordinary tokens, neither special nor of massive norm.
    For transcoders: the MLP's inputs and outputs side by side, of all but special tokens; [N, 2 layers, D] if there
    are several layers."""
    of_mlp = kind != RESID
    how = {"batch_tokens": 512, "shuffle": False, "device": "cpu"} | ({"massive_norms": None} if of_mlp else {})
    join = np.stack if kind == "MLPs" else np.concatenate
    for split in ("train", "validation", "test"):
        parts = [
            np.concatenate([batch.numpy() for batch in store.batches(layer, hook=hook, split=split, **how)])
            for hook in (("mlp_in", "mlp_out") if of_mlp else (RESID,))
            for layer in layers
        ]
        np.save(folder / f"{split}.npy", join(parts, axis=1))


def own_rate(contestant: str, variant: str, width: int, d_model: int) -> float:
    """The learning rate a contestant uses by default."""
    match contestant, variant:
        case "ours", _:
            rate = config_type(variant)(width=width).build(d_model).optim.lr
            assert rate is not None
            return rate
        case "sparsify", _:
            return 5e-3 / (width / 2**14) ** 0.5
        case "clt_forge", _:
            return 4e-4  # from its GPT-2 runner; the field's default is 1e-5
        case "sae_lens", _:
            return 3e-4  # its default
        case _, "jumprelu":
            return 7e-5
        case _, "gated":
            return 5e-5
        case _, "standard" | "p_anneal":
            return 1e-3
        case _:
            return 2e-4 / (width / 2**14) ** 0.5


class Contestants:
    """A process per contestant, started on first use."""

    def __init__(self, folder: Path, steps: int, peers_python: str, clt_forge: Path | None) -> None:
        self._folder, self._steps, self._peers_python = str(folder), steps, peers_python
        self._sources = {"clt_forge": {"PYTHONPATH": str((clt_forge / "src").resolve())}} if clt_forge else {}
        self._workers: dict[str, Worker] = {}

    def train(self, fit: Fit) -> Score:
        if fit.contestant not in self._workers:
            python = sys.executable if fit.contestant == "ours" else self._peers_python
            script = [python, "-W", "ignore", HERE / "peers" / f"{fit.contestant}_fit.py"]
            self._workers[fit.contestant] = Worker(fit.contestant, script, self._sources.get(fit.contestant))
        request = {name: value for name, value in asdict(fit).items() if name != "contestant"}
        return Score(**self._workers[fit.contestant].ask(folder=self._folder, steps=self._steps, **request))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


class Results:
    """Scores by fit, in a file that grows; each row records the facts of its measurement."""

    def __init__(self, path: Path, run: dict[str, Any], facts: dict[str, Any]) -> None:
        self.path, self._run, self._facts = path, run | {"protocol": PROTOCOL}, facts
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
        self.scores = {fit_of(row): score_of(row) for row in self.rows if row.items() >= self._run.items()}

    def add(self, fit: Fit, score: Score, more: dict[str, float] | None = None) -> None:
        self.scores[fit] = score
        self.rows.append(row_of(fit, score) | (more or {}) | self._run | self._facts)
        write_rows(self.path, "Quality at equal sparsity, on held-out text", self.rows)


def row_of(fit: Fit, score: Score) -> dict[str, Any]:
    scores = {f"test_{name}" if name == "l0" else name: value for name, value in asdict(score).items()}
    return asdict(fit) | scores | {"on_target": score.is_on_target(fit.l0)}


def fit_of(row: dict[str, Any]) -> Fit:
    return Fit(**{name: row[name] for name in Fit.__dataclass_fields__})


def score_of(row: dict[str, Any]) -> Score:
    return Score(**{name: row.get("test_l0" if name == "l0" else name) for name in Score.__dataclass_fields__})


Train = Callable[[Fit], Score]


def best_of(first: Fit, train: Train, is_targeted: bool) -> Fit:
    """The best rate for the first seed: from `first` up, or else down, as long as validation text improves."""

    def attempt(fit: Fit) -> tuple[Fit, tuple[bool, float]]:
        fit = fit if is_targeted else seek(fit, train)
        return fit, train(fit).worth(fit.l0)

    best, worth = attempt(first)
    start = best
    for factor in (FACTOR, 1 / FACTOR):
        while (there := attempt(replace(best, lr=float(f"{best.lr * factor:.4g}"))))[1] > worth:
            best, worth = there
        if best is not start:  # the other direction leads back to a rate that was already beaten
            break
    return best


def seek(fit: Fit, train: Train) -> Fit:
    """Search for the coefficient that gives the wanted L0, by secants on logarithmic scales; return the nearest."""
    seen: list[tuple[float, float, Fit]] = []  # log of the coefficient, log of L0 over the wanted L0
    slope = -1.0
    for _ in range(6):
        score = train(fit)
        off = math.log(max(score.as_trained, 1e-3) / fit.l0)
        seen.append((math.log(fit.coefficient), off, fit))
        # No coefficient fixes a fit that diverged, unless the wanted L0 lies between this one's and another's.
        is_hopeless = score.validation < 0.0 and all(off * other >= 0 for _, other, _ in seen)
        if is_hopeless or abs(off) <= (NEAR if score.came_to is None else OFF):
            break
        if len(seen) > 1:
            (before, off_before, _), (now, off_now, _) = seen[-2:]
            # A larger penalty never gives more active latents: a rising slope is noise.
            slope = min((off_now - off_before) / (now - before), -0.2)
        step = max(-1.5, min(1.5, -off / slope))
        fit = replace(fit, coefficient=float(f"{fit.coefficient * math.exp(step):.4g}"))
    return min(seen, key=lambda one: abs(one[1]))[2]


@dataclass(frozen=True)
class Cell:
    """The results of one contestant at one rate: a score per seed."""

    fits: tuple[Fit, ...]
    scores: tuple[Score, ...]

    def worth(self) -> tuple[int, tuple[bool, float]]:
        """The sort key that decides between rates: the number of seeds, then the median score on validation text."""
        each = [score.worth(fit.l0) for fit, score in zip(self.fits, self.scores, strict=True)]
        return len(each), statistics.median_high(each)

    @property
    def on_target(self) -> list[Score]:
        return [score for fit, score in zip(self.fits, self.scores, strict=True) if score.is_on_target(fit.l0)]

    def __str__(self) -> str:
        at = f"rate {self.fits[0].lr:.2g}"
        if not self.on_target:
            return f"off target: L0 {range_of([score.l0 for score in self.scores], '.1f')} ({at})"
        values = [score.explained_variance for score in self.on_target]
        spread = f" ({range_of(values, '.4f')})" if len(values) > 1 else ""
        dead = statistics.median(score.dead for score in self.on_target)
        missing = len(self.scores) - len(values)
        return (
            f"{statistics.median(values):.3f}{spread} at L0 {range_of([score.l0 for score in self.on_target], '.1f')}, "
            f"{dead:.1%} dead, {at}" + (f", {missing} of {len(self.scores)} seeds off target" if missing else "")
        )


def range_of(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


Line = tuple[str, dict[str, Cell]]  # what is compared, and the cells by contestant


def lines_of(scores: dict[Fit, Score]) -> dict[str, list[Line]]:
    """For each variant, width and wanted L0: every contestant at its best rate, and at its own."""
    found: dict[str, list[Line]] = {"best": [], "own": []}
    for what in dict.fromkeys((fit.variant, fit.width, fit.l0) for fit in scores):
        variant, width, l0 = what
        cells: dict[str, dict[str, Cell]] = {"best": {}, "own": {}}
        for contestant in dict.fromkeys((*CONTESTANTS, *OF_TRANSCODERS, *OF_CROSS_LAYER)):
            own = {f: s for f, s in scores.items() if (f.variant, f.width, f.l0) == what and f.contestant == contestant}
            if own:
                by_rate = {lr: cell_at(own, lr) for lr in dict.fromkeys(fit.lr for fit in own)}
                cells["own"][contestant] = next(iter(by_rate.values()))  # the first one tried
                cells["best"][contestant] = max(by_rate.values(), key=Cell.worth)
        for kind, by_contestant in cells.items():
            found[kind].append((f"{variant}, {width:,} latents, L0 {l0:g}", by_contestant))
    return found


def cell_at(scores: dict[Fit, Score], lr: float) -> Cell:
    """For each seed, the fit whose L0 as trained is nearest to the wanted one, as the search chose it."""
    chosen: dict[int, Fit] = {}
    for fit in sorted((fit for fit in scores if fit.lr == lr), key=lambda fit: abs(scores[fit].as_trained - fit.l0)):
        chosen.setdefault(fit.seed, fit)
    fits = tuple(chosen[seed] for seed in sorted(chosen))
    return Cell(fits, tuple(scores[fit] for fit in fits))


def last_scores(rows: list[dict[str, Any]]) -> dict[Fit, Score]:
    """For each variant, the scores of the comparison in which most contestants have all seeds, the latest of several.
    Rows with other steps, another store or another protocol belong to another comparison."""
    runs: dict[str, dict[tuple[Any, ...], dict[Fit, Score]]] = {}
    for row in rows:
        # Removed and reinserted, so that the latest comes last.
        of_variant = runs[row["variant"]] = runs.pop(row["variant"], {})
        run = tuple(row.get(name) for name in ("steps", "cache_id", "protocol"))
        of_variant[run] = of_variant.pop(run, {}) | {fit_of(row): score_of(row)}
    chosen = (max(reversed(of_variant.values()), key=count_complete) for of_variant in runs.values())
    return {fit: score for scores in chosen for fit, score in scores.items()}


def count_complete(scores: dict[Fit, Score]) -> int:
    """The number of contestants that have a rate with all seeds."""
    seeds: dict[tuple[str, float], set[int]] = {}
    for fit in scores:
        seeds.setdefault((fit.contestant, fit.lr), set()).add(fit.seed)
    return len({contestant for (contestant, _), found in seeds.items() if len(found) >= len(SEEDS)})


def show(scores: dict[Fit, Score]) -> None:
    titles = {"best": "each at its best learning rate", "own": "each at its own learning rate"}
    for kind, lines in lines_of(scores).items():
        present = dict.fromkeys(who for _, cells in lines for who in cells)
        table = Table(title=f"explained variance of the test split, {titles[kind]}: median of seeds (range)")
        for heading in ("what", *present):
            table.add_column(heading)
        for what, cells in lines:
            table.add_row(what, *(str(cells[who]) if who in cells else "" for who in present))
        Console(width=190).print(table)


def make_fits(first: Fit, seeds: tuple[int, ...], train: Train, lr: float | None = None) -> None:
    """Train all seeds. The first finds the rate, unless it is given. Each finds its own coefficient, if there is one:
    where L0 is steep in it, the first seed's coefficient would leave another seed off target."""
    is_targeted = first.variant in BY_K or (first.variant, first.contestant) in TARGETED
    best = replace(first, seed=seeds[0], lr=lr) if lr else best_of(replace(first, seed=seeds[0]), train, is_targeted)
    for seed in seeds if lr else seeds[1:]:
        fit = replace(best, seed=seed)
        train(fit if is_targeted else seek(fit, train))


def contests(variants: tuple[str, ...], width: int, l0: float, d_model: int) -> Iterator[Fit]:
    """The first fit of each contestant."""
    contestants = {RESID: CONTESTANTS, "MLP": OF_TRANSCODERS, "MLPs": OF_CROSS_LAYER}
    for variant in variants:
        for contestant in contestants[rows_read_by(variant)]:
            coefficient = COEFFICIENTS.get(variant, {}).get(contestant, 0.0)
            if coefficient or variant in BY_K or (variant, contestant) in TARGETED:
                yield Fit(variant, width, l0, contestant, own_rate(contestant, variant, width, d_model), coefficient)


@click.command()
@click.argument("store")
@click.option("--peers-python", required=True, help="Python with sae-lens, dictionary-learning, sparsify installed.")
@click.option("--clt-forge", type=click.Path(exists=True, path_type=Path), help="Its checkout, for --variant clt.")
@click.option("--variant", "variants", multiple=True, default=VARIANTS, show_default=True)
@click.option("--width", default=2304, show_default=True)
@click.option("--l0", default=32.0, show_default=True)
@click.option("--steps", default=440, show_default=True, help="Steps of 2,048 tokens; clt: of 512.")
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS, show_default=True)
@click.option("--contestant", "wanted", multiple=True, help="Only these.  [default: all for the variant]")
@click.option("--lr", type=float, help="Train at this rate instead of searching for one.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-results/quality.json"))
def main(
    store: str,
    peers_python: str,
    clt_forge: Path | None,
    variants: tuple[str, ...],
    width: int,
    l0: float,
    steps: int,
    seeds: tuple[int, ...],
    wanted: tuple[str, ...],
    lr: float | None,
    out: Path,
) -> None:
    """Train all contestants on the activations of STORE and compare them."""
    kind, *others = dict.fromkeys(map(rows_read_by, variants))
    if others:
        raise click.UsageError(
            "--variant: expected SAEs, transcoders or cross-layer transcoders, found a mix: they read different rows"
        )
    if kind == "MLPs" and clt_forge is None:
        raise click.UsageError("--variant clt: expected --clt-forge with CLT-Forge's checkout, found none")
    with Store.open(store) as opened, tempfile.TemporaryDirectory() as folder:
        manifest = opened.manifest
        layers = layers_of(opened, kind)
        write_rows_of(opened, layers, Path(folder), kind)
        where = {"layers": layers} if kind == "MLPs" else {"layer": layers[0]}
        where |= revision_of(clt_forge)
        run = {"steps": steps, "cache_id": manifest.cache_id}
        results = Results(out, run, gather_facts(peers_python, model=manifest.model.id, **where))
        contestants = Contestants(Path(folder), steps, peers_python, clt_forge)

        def train(fit: Fit) -> Score:
            if fit not in results.scores:
                click.echo(f"training {fit}", err=True)
                results.add(fit, contestants.train(fit))
                click.echo(f"  {results.scores[fit]}", err=True)
            return results.scores[fit]

        for first in contests(variants, width, l0, manifest.model.d_model):
            if not wanted or first.contestant in wanted:
                make_fits(first, seeds, train, lr)
        contestants.close()
    show(results.scores)


if __name__ == "__main__":
    main()
