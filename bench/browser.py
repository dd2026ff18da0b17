"""The latent browser against SAEDashboard 0.8: the same latents of the same SAEs on the same tokens.

Needs a store of the pocket model. The SAEs have random directions, so all latents fire: a top-k SAE, and a JumpReLU SAE
with about as many active. Ours is a new process each round and covers all latents, attended-to tokens included.
SAEDashboard works through batches of 128 latents and reads all tokens again for each: for a wide SAE one batch is timed
per round, a different one each time, and the time is scaled up; for a narrow SAE all are timed. Its model has already
run, so its cache is warm. Both take turns.

    python bench/browser.py STORE --dashboard .venv-dashboard
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from timing_and_tables import Row, compare, conclude, gather_facts, speeds_of, take_turns
from torch.nn import functional
from worker_pipe import Worker

from saemill.cache_schema import Store
from saemill.evaluate.context.context import find_model
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.model.batches import store_batches
from saemill.train.data.scaling import unit_stats
from saemill.train.disk.atomic_files import write_json
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.sae.gates import JumpRelu, TopK
from saemill.train.sae.model import SparseAutoencoder

PEERS = Path(__file__).with_name("peers")
K, WIDE, NARROW, BATCH = 64, 16_384, 512, 128
WANTED_SPEED, WANTED_RATIO = 20_000, 10.0  # tokens per second of one SAE; speed relative to SAEDashboard
CASES = (("topk", WIDE), ("jumprelu", WIDE), ("topk", NARROW))


@dataclass(frozen=True)
class World:
    """A store, the tokens to read, and a folder for runs."""

    store: str
    folder: Path
    windows: int
    layer: int
    context: int
    special: tuple[int, ...]
    model: Path

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens.safetensors"

    def request(self, run: Path) -> dict[str, Any]:
        return {
            "store": self.store,
            "run": str(run),
            "windows": self.windows,
            "model": str(self.model),
            "sae": str(run / "sae"),
            "tokens": str(self.tokens),
            "hook": f"blocks.{self.layer}.hook_resid_post",
            "cache": str(self.folder / "cache"),
            "special": list(self.special),
        }


def make_world(url: str, folder: Path, wanted: int) -> World:
    """The windows that the browser reads, in its order."""
    with Store.open(url) as store:
        manifest, left, parts = store.manifest, wanted, []
        for split in Config().splits:
            for batch in store_batches(store, split, count=left):
                parts.append(batch.tokens)
                left -= len(batch)
        tokens = torch.cat(parts)
        save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
        layer, special = manifest.layers[-1], manifest.model.special_tokens
        source = find_model(manifest, None)
        return World(url, folder, len(tokens), layer, manifest.context, tuple(special), source.folder)


def make_run(world: World, variant: str, width: int) -> Path:
    """An SAE of random directions as a finished run; a JumpReLU's threshold lets about K latents of a token through."""
    with Store.open(world.store) as store:
        mean = torch.from_numpy(store.moments(world.layer).mean).float()
        (batch, *_) = store_batches(store, "test", (world.layer,), count=16)
        cache = {"url": world.store, "cache_id": store.manifest.cache_id}
    directions = torch.randn(width, len(mean), generator=torch.Generator().manual_seed(0))
    rows = functional.normalize(directions, dim=1)
    gate: Any = TopK(K)
    if variant == "jumprelu":
        pre = (batch.x((world.layer,))[batch.keep] - mean) @ rows.T
        gate = JumpRelu(width, float(np.quantile(pre.numpy(), 1 - K / width)), 0.001)
    run = world.folder / f"{variant}_{width}"
    sae = SparseAutoencoder(rows, rows.clone(), gate, b_dec=mean)
    where = {"layers": [world.layer], "target_layers": [world.layer], "context_size": world.context}
    hook = {"model_name": "pocket", "hook_name": f"blocks.{world.layer}.hook_resid_post"}
    save_sae(run / "sae", sae, unit_stats(len(mean)), {**hook, **where}, {}, variant, unit_stats(len(mean)))
    write_json(run / "config.json", {"cache": cache, "saes": {}})
    write_json(run / "result.json", {"run": run.name})
    return run


def bench(world: World, variant: str, width: int, dashboard: Path | None, rounds: int) -> list[Row]:
    """Time both in turns, and compare the firing rates that they report."""
    run = make_run(world, variant, width)
    request, latents = world.request(run), BATCH if width == WIDE else width
    answers: dict[str, dict[str, Any]] = {}
    batch_numbers = count()

    def ours() -> float:
        with closing(Worker("ours", [sys.executable, "-W", "ignore", PEERS / "ours_browser.py"])) as worker:
            answers["ours"] = worker.ask(**request)
        return answers["ours"]["seconds"]

    def theirs(peer: Worker) -> float:
        first = next(batch_numbers) * latents % width
        answers["SAEDashboard"] = peer.ask(**request, latents=[first, first + latents]) | {"first": first}
        return answers["SAEDashboard"]["seconds"] * width / latents

    if dashboard is None:
        seconds = take_turns(rounds, {"ours": ours})
    else:
        command = [dashboard / "bin/python", "-W", "ignore", PEERS / "sae_dashboard_browser.py"]
        with closing(Worker("SAEDashboard", command)) as peer:
            peer.ask(**request, latents=[0, 2])  # runs the model and fills the cache
            seconds = take_turns(rounds, {"ours": ours, "SAEDashboard": lambda: theirs(peer)})
    tokens = answers["ours"]["tokens"]
    speeds = speeds_of(tokens, seconds)
    what = f"{variant}, {width:,} latents, {tokens:,} tokens"
    sizes = {f"{name}'s {key}": answer[key] for name, answer in answers.items() for key in ("bytes", "peak")}
    rows = []
    if width == WIDE:
        ratio = speeds["ours"].median / WANTED_SPEED
        rounds_of = {"ours": speeds["ours"].rounds}
        rows.append(Row(f"{what}: made", f"{speeds['ours']} tok/s", f"{WANTED_SPEED:,}", ratio, 1.0, rounds_of, sizes))
    if dashboard is not None:
        row = compare(f"{what}: against", speeds["ours"], speeds["SAEDashboard"], "tok/s", WANTED_RATIO, "SAEDashboard")
        rows += [row, compare_densities(what, answers, latents)]
    return rows


def compare_densities(what: str, answers: dict[str, dict[str, Any]], latents: int) -> Row:
    """How far apart the latents' firing rates are: theirs come from another pass of the model."""
    first = answers["SAEDashboard"]["first"]
    ours = np.array(answers["ours"]["densities"][first : first + latents])
    apart = np.abs(ours - np.array(answers["SAEDashboard"]["densities"]))
    text = f"median difference {np.median(apart):.1e}, largest {apart.max():.1e}, mean rate {ours.mean():.1e}"
    return Row(f"{what}: densities", text, f"SAEDashboard, {latents} latents")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store")
@click.option("--dashboard", type=click.Path(path_type=Path), help="Environment of sae-dashboard 0.8.")
@click.option("--windows", default=Config().windows, show_default=True, help="Windows to read.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--case", "cases", multiple=True, type=click.IntRange(0, len(CASES) - 1), default=range(len(CASES)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where to create the temporary folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    store: str,
    dashboard: Path | None,
    windows: int,
    rounds: int,
    cases: tuple[int, ...],
    folder: Path | None,
    json_file: Path | None,
) -> None:
    """Measure the browser; the exit status is 1 if a target is missed."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        world = make_world(str(Path(store).resolve()), Path(place), windows)
        for case in cases:
            rows += bench(world, *CASES[case], dashboard, rounds)
    title = f"Latent browser, {world.windows:,} windows of {world.context}, {torch.get_num_threads()} threads"
    facts = gather_facts(dashboard and dashboard / "bin/python", threads=torch.get_num_threads())
    sys.exit(conclude(title, rows, json_file, facts))


if __name__ == "__main__":
    main()
