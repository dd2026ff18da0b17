"""The tables of docs/measured.md and docs/smaller_stores.md, from bench/results: `--check` fails if a page differs.

python bench/measured_tables.py [--check]
"""

from __future__ import annotations

import difflib
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from fitting import ROWS
from quality import CONTESTANTS, last_scores, lines_of
from timing_and_tables import mean_and_range

from saemill.studies.compare_and_decide import half_width

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")
PAGE, SMALLER = "docs/measured.md", "docs/smaller_stores.md"
BEGIN, END = "<!-- measured: written by `make measured` -->", "<!-- measured: end -->"

Rows = list[dict[str, Any]]
STORE, HARVEST, TRAIN, CORE, BROWSER = (
    f"make bench-{name}" for name in ("store", "harvest", "train", "eval", "browser")
)
SPEED = {  # file of results: its command, and for each line of the table the names of the rows
    "store": (
        STORE,
        {
            "write raw shards, checksums and commits, against plain files with as many fsyncs": (
                "write raw, checksums and commit",
            ),
            "read raw shards, every checksum verified, against `readinto` from the page cache": ("read raw, verified",),
            "stream activations, verified, against SAELens reading its own cache unverified": ("stream, verified",),
            "zstd size of bfloat16 residuals (synthetic: Gaussian, lognormal scale per dimension)": ("size of zstd",),
        },
    ),
    "harvest": (
        HARVEST,
        {
            "the whole harvest, attention of four layers included, against SAELens caching one residual: "
            "both in float32; each at its defaults": ("both in float32", "both at their defaults"),
            "the same against transformers' eager pass: float32; bfloat16": (
                "whole harvest, float32",
                "whole harvest, bfloat16",
            ),
        },
    ),
    "hooks": (
        "python bench/hooks.py",
        {
            "eight layers' mlp_in and mlp_out harvested, against 1.10 bare passes plus the time of writing": (
                "eight layers' mlp_in and mlp_out: 1.10 times the bare pass plus the time of writing, "
                "against the harvest",
            ),
        },
    ),
    "transcoders": (
        "make bench-transcoders",
        {
            "a step of a cross-layer transcoder of six layers, 2,048 latents each, 32 firing, against CLT-Forge as "
            "initialised": ("a step of clt: 6 layers, 2048 latents (32 of ours fire) each, D 512, 1024 rows",),
            "a step of a transcoder, 2,048 latents, against sparsify": (
                "a step of transcoder: 1 layers, 2048 latents (32 of ours fire) each, D 512, 1024 rows",
            ),
        },
    ),
    "guided": (
        TRAIN,
        {
            "a hierarchical step against its base's on the same windows: base standard; base topk": (
                "standard, 32 active, float32: step",
                "topk, 32 active, float32: step",
            ),
        },
    ),
    "fleet": (
        TRAIN,
        {
            "a fleet of eight top-k SAEs on the stream, against their single steps on a batch in memory": (
                "a fleet of 8",
            ),
        },
    ),
}
MODELS = {
    "pocket model, 4 + 40 batches": "the pocket model",
    "random model, 1 + 10 batches": "a random Gemma-2 of 26 layers and width 576",
}
GPU_PARTS = ("steps", "fleet", "guided", "harvest")
PEERS = ("sae_lens", "dictionary_learning", "sparsify", "SAELens")
ABOUT_SPEED = (
    "Ratios of medians, with the range of the rounds' ratios in parentheses if rounds were kept. For training steps: "
    "the median of the rounds' ratios, and the lowest in parentheses. Square brackets give the day and processor if a "
    "benchmark's rows come from several."
)
ABOUT_QUALITY = (
    "Explained variance on the test split of {model} after layer {layer}, {tokens} training tokens, ordinary tokens "
    "only (massive ones are left out for every contestant). First each contestant at its best learning rate on "
    "validation text, searched for in factors of three with the first seed: {seeds}; then at its own default rate: one "
    "seed. Off target means an L0 more than a tenth from the requested one: nothing is compared or claimed. Where a "
    "threshold decides which latents are active, it is placed on validation text, for every contestant, so that L0 is "
    "32 there. Compare within a row: variants may have been trained on different machines' text "
    "([quality.md](quality.md))."
)
ABOUT_SMALLER = (
    "The pocket model after layer 19, 276,096 training tokens, three epochs; topk, 1,024 latents, 32 active, three "
    "seeds, 198 steps of 4,096 tokens"
)
SMALLER_MEASURES = ("explained variance", "CE", "KL")
RATES = {"best": "its best", "own": "its own"}


def rows_of(name: str) -> Rows:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def ratio_of(row: dict[str, Any]) -> str:
    """The ratio, with its range over rounds if these were kept, and the goal if it was missed."""
    text = f"{row['ratio']:.2f}"
    rounds = list(row.get("rounds", {}).values())
    if len(rounds) == 2:
        each = [ours / theirs for ours, theirs in zip(*rounds, strict=True)]
        text += f" ({min(each):.2f} to {max(each):.2f})"
    return text if row["is_met"] else f"{text}, goal {row['target']:.3g}"


def ratios_of(rows: Rows, file_rows: Iterable[dict[str, Any]]) -> str:
    """The ratios, with day and processor if these differ within their file."""
    text = ", ".join(map(ratio_of, rows))
    return text if len(set(map(when, file_rows))) == 1 else f"{text} [{'; '.join(dict.fromkeys(map(when, rows)))}]"


def when(row: dict[str, Any]) -> str:
    return f"{row['date']}, {row.get('processor') or row['machine']}"


def speed_lines() -> Iterable[tuple[str, str, str]]:
    for name, (command, lines) in SPEED.items():
        found = {row["name"]: row for row in rows_of(name)}
        for what, row_names in lines.items():
            yield what, "; ".join(ratios_of([found[row]], found.values()) for row in row_names), command
    yield from train_lines()
    found = {row["name"]: row for row in rows_of("evaluate")}
    for key, model in MODELS.items():
        for dtype in ("float32", "bfloat16"):
            pairs = [[f"{key}, {dtype}, {saes}, {state}" for state in ("cold", "warm")] for saes in ("1 SAE", "8 SAEs")]
            measured = [[found[name] for name in pair if name in found] for pair in pairs]
            ratios = "; ".join(ratios_of(pair, found.values()) if pair else "not measured" for pair in measured)
            what = f"core evaluation on {model} in {dtype}, against official SAEBench: one SAE; eight"
            yield f"{what} (each cold, and with the clean pass kept from an earlier run)", ratios, CORE
    for row in rows_of("browser"):
        what, _, kind = row["name"].rpartition(": ")
        if kind == "made":
            missed = "" if row["is_met"] else f", goal {row['against']}"
            speed = row["found"].removesuffix(" tok/s") + missed
            yield f"the latent browser of {what}: tokens per second", speed, BROWSER
        elif kind == "against":
            wide = "" if ", 512 latents" in what else " (timed on 128 latents per round and scaled up)"
            yield f"the same, at {row['commit']}, against SAEDashboard 0.8, {what}{wide}", ratio_of(row), BROWSER


def train_lines() -> Iterable[tuple[str, str, str]]:
    """For each width: every variant, in float32 and with a bfloat16 product."""
    for name in ("train", "train_bfloat16", "train_relu"):
        rows = [row for row in rows_of(name) if "ratio_to_faster_peer" in row]
        for width in sorted({row["width"] for row in rows}, reverse=True):
            ratios: dict[str, list[str]] = {}
            for row in rows:
                if row["width"] == width:
                    ratio = f"{row['ratio_to_faster_peer']:.2f} ({row['lowest_ratio']:.2f})"
                    ratios.setdefault(row["variant"], []).append(ratio)
            some = rows[0]
            firing = f", {some['l0']:g} of them firing" if some["l0"] else ""
            products = "float32, bfloat16 product" if max(map(len, ratios.values())) > 1 else "float32"
            what = f"a training step of {some['batch']:,} tokens, D {some['d_model']:,}, {width:,} latents{firing}"
            text = "; ".join(f"{variant} {', '.join(values)}" for variant, values in ratios.items())
            theirs = [row for row in rows_of(name) if row["contestant"].startswith(PEERS) and row["width"] == width]
            ran = {row["contestant"] for row in theirs if "failed" not in row}
            failed = [f"{row['variant']} {row['contestant']}" for row in theirs if "failed" in row]
            peers = "float32 or bfloat16 autocast" if any("bfloat16" in who for who in ran) else "float32"
            peers += ", with fused Adam" if any("fused" in who for who in ran) else ""
            text += f"; without {', '.join(failed)}, which failed" if failed else ""
            yield f"{what} ({products}), against the faster of the peers in {peers}", f"{text} [{when(some)}]", TRAIN


def quality_lines() -> Iterable[str]:
    """The quality tables, each contestant at its best learning rate first."""
    rows = rows_of("quality")
    scores, run = last_scores(rows), rows[-1]
    seeds = len({fit.seed for fit in scores})
    run_facts = {"model": run["model"], "layer": run["layer"], "tokens": f"{run['steps'] * ROWS:,}"}
    yield ABOUT_QUALITY.format(**run_facts, seeds="one seed" if seeds == 1 else f"median of {seeds} seeds (range)")
    yield from ("", "| what | learning rate | here | SAELens | dictionary_learning |", "|---|---|---|---|---|")
    for kind, lines in lines_of(scores).items():
        for what, cells in lines:
            texts = (str(cells[who]) if who in cells else "" for who in CONTESTANTS)
            yield f"| {what} | {RATES[kind]} | {' | '.join(texts)} |"


def gpu_lines() -> Iterable[str]:
    """The table of the newest day in bench/results/gpu; the later of two measurements of the same on that day."""
    calls = [path for path in sorted((RESULTS / "gpu").glob("*/*.json")) if '"parts"' in path.read_text()]
    newest: dict[str, Rows] = {}
    if not calls:
        yield "No run of `make bench-gpu` is kept."
        return
    for folder in sorted({path.parent for path in calls if path.parent.name[:10] == calls[-1].parent.name[:10]}):
        rows: Rows = [row for path in calls if path.parent == folder for row in json.loads(path.read_text())["rows"]]
        shown = [row for row in rows if row["part"] in GPU_PARTS or ": a step, " in row["what"]]
        newest |= {what: [row for row in shown if name_of(row) == what] for what in dict.fromkeys(map(name_of, shown))}
    facts = next(iter(newest.values()))[0]
    yield (
        f"On one {facts['card']}, {facts['date']}, torch {facts['torch']}. Medians of rounds. "
        "The goals, and which of them were missed: [performance.md](performance.md)."
    )
    yield from ("", "| what | here | best peer or baseline | ratio | commit |", "|---|---|---|---|---|")
    for what, rows in newest.items():
        timed = [row for row in rows if "median" in row]
        if timed:
            yield f"{gpu_line(what, timed)} {rows[0]['commit']} |"
        elif rows[0].get("ratio"):
            cells = what, rows[0]["who"], rows[0]["against"], ratio_of(rows[0]), rows[0]["commit"]
            yield f"| {' | '.join(cells)} |"


def name_of(row: dict[str, Any]) -> str:
    """A row's name, without the speed that rows of bench/gpu/kernels.py have in it."""
    name, found, _ = row["what"].partition(": a step, ")
    return f"{name}, alone" if found else name


def gpu_line(what: str, rows: Rows) -> str:
    """Ours, at its defaults (the first row) or in turns with the peer, against the best peer."""
    if rows[0]["part"] == "kernels":
        return f"| {what} | {rows[0]['what'].partition(': a step, ')[2]} | | |"
    own = [row for row in rows if row["who"].startswith("ours")]
    best = max((row for row in rows if row["who"].startswith(PEERS)), key=lambda row: row["median"], default=None)
    peer = "not compared" if best is None else f"{best['who']}: {best['median']:,.0f}"
    if not own:
        return f"| {what} | failed | {peer} | |"
    ours = next((row for row in own if best is not None and ", beside " in row["who"]), own[0])
    share = ours.get("share_of_matrix_rate")
    found = f"{ours['median']:,.0f} ({ours['low']:,.0f} to {ours['high']:,.0f}) tok/s"
    found += f", {share:.0%} of the matrix rate" if share else ""
    ratio = " " if best is None else f" {ours['median'] / best['median']:.2f} "
    return f"| {what} | {found} | {peer} |{ratio}|"


def smaller_lines() -> Iterable[str]:
    """For each model: every kind of store, then its cost relative to the exact one, seed by seed."""
    for path in sorted(RESULTS.glob("smaller_stores*.json")):
        measured = [row for row in rows_of(path.stem) if "explained variance" in row.get("rounds", {})]
        for about in dict.fromkeys(row.get("about") for row in measured):
            yield from smaller_lines_of([row for row in measured if row.get("about") == about], path)


def smaller_lines_of(rows: Rows, path: Path) -> Iterable[str]:
    exact = rows[0]["rounds"]
    yield from ("", f"{rows[0].get('about', ABOUT_SMALLER)} ([all rounds](../bench/results/{path.name})):", "")
    yield from ("| store | bytes a token | explained variance | CE | KL |", "|---|---|---|---|---|")
    for row in rows:
        size = row["found"].partition(" bytes")[0].removesuffix(".0")
        yield f"| {row['name']} | {size} | {' | '.join(mean_and_range(row['rounds'][of]) for of in SMALLER_MEASURES)} |"
    title = f"difference from {rows[0]['name']} at the same seed, {len(exact['CE'])} seeds: mean ± 95 % (range)"
    yield from ("", f"| {title} | explained variance | CE | KL |", "|---|---|---|---|")
    for row in rows[1:]:
        pairs = (zip(row["rounds"][of], exact[of], strict=True) for of in SMALLER_MEASURES)
        yield f"| {row['name']} | {' | '.join(cost([a - b for a, b in pair]) for pair in pairs)} |"


def cost(values: list[float]) -> str:
    """The mean of differences by seed, its interval if there are several, and their range."""
    reach = f" ± {half_width(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.4f}{reach} ({min(values):+.4f} to {max(values):+.4f})"


def write_tables() -> str:
    """All lines of docs/measured.md between the two marks."""
    lines = ["### On an accelerator", "", *gpu_lines(), "", "### On two cores", "", ABOUT_SPEED, ""]
    lines += ["| what | ratio | command |", "|---|---|---|"]
    lines += [f"| {what} | {found} | `{command}` |" for what, found, command in speed_lines()]
    lines += ["", "### Quality at equal sparsity", "", *quality_lines()]
    return "\n".join(lines)


PAGES = {PAGE: write_tables, SMALLER: lambda: "\n".join(smaller_lines()).lstrip()}


def with_tables(page: str, name: str) -> str:
    before, found, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise click.ClickException(f"{name}: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{PAGES[name]()}\n\n{END}{after}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a page differs.")
def main(check: bool) -> None:
    is_old = False
    for name in PAGES:
        page = (ROOT / name).read_text()
        wanted = with_tables(page, name)
        if not check:
            (ROOT / name).write_text(wanted)
        elif page != wanted:
            diff = difflib.unified_diff(page.splitlines(), wanted.splitlines(), name, "bench/results", lineterm="")
            click.echo("\n".join(diff))
            is_old = True
    if is_old:
        click.echo("the tables differ from bench/results: run `make measured`")
        sys.exit(1)


if __name__ == "__main__":
    main()
