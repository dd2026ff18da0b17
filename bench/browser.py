"""The latent browser against SAEDashboard 0.8: the same latents of the same SAEs on the same tokens.

On a store of the pocket model: SAEs of random directions, whose latents all fire, top-k and JumpReLU with about equally
many active. Ours is a new process each round and makes all latents, attended-to tokens included. SAEDashboard goes
through batches of 128 latents one after another, each of which reads all tokens again: for a wide SAE one batch per
round is timed, a different one each time, and multiplied; for a narrow one all are. Its model has run before, so its
cache is warm. Rounds take turns.

    python bench/browser.py STORE --dashboard .venv-dashboard
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from timing_and_tables import Row, Speeds, compare, conclude, gather_facts, take_turns
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
ENOUGH, TIMES = 20_000, 10.0  # SAE-tokens a second; as fast as SAEDashboard
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
    """Time both in turns; the last rows say what each made."""
    run = make_run(world, variant, width)
    request, latents = world.request(run), BATCH if width == WIDE else width
    made: dict[str, dict[str, Any]] = {}
    begun = 0

    def ours() -> float:
        with closing(Worker("ours", [sys.executable, "-W", "ignore", PEERS / "ours_browser.py"])) as one:
            made["ours"] = one.ask(**request)
        return made["ours"]["seconds"]

    def theirs(peer: Worker) -> float:
        nonlocal begun
        begun, first = begun + 1, begun * latents % width
        made["SAEDashboard"] = peer.ask(**request, latents=[first, first + latents]) | {"first": first}
        return made["SAEDashboard"]["seconds"] * width / latents

    if dashboard is None:
        seconds = take_turns(rounds, {"ours": ours})
    else:
        command = [dashboard / "bin/python", "-W", "ignore", PEERS / "sae_dashboard_browser.py"]
        with closing(Worker("SAEDashboard", command)) as peer:
            peer.ask(**request, latents=[0, 2])  # the model runs, the cache fills
            seconds = take_turns(rounds, {"ours": ours, "SAEDashboard": lambda: theirs(peer)})
    tokens = made["ours"]["tokens"]
    speeds = {name: Speeds(tuple(tokens / one for one in values)) for name, values in seconds.items()}
    what = f"{variant}, {width:,} latents, {tokens:,} tokens"
    sizes = {f"{name}'s {key}": said[key] for name, said in made.items() for key in ("bytes", "peak")}
    rows = []
    if width == WIDE:
        found = speeds["ours"].median / ENOUGH
        told = {"ours": speeds["ours"].rounds}
        rows.append(Row(f"{what}: made", f"{speeds['ours']} tok/s", f"{ENOUGH:,}", found, 1.0, told, sizes))
    if dashboard is not None:
        row = compare(f"{what}: against", speeds["ours"], speeds["SAEDashboard"], "tok/s", TIMES, "SAEDashboard")
        rows += [row, agreement(what, made, latents)]
    return rows


def agreement(what: str, made: dict[str, dict[str, Any]], latents: int) -> Row:
    """How far apart the latents' firing rates are: theirs come from another pass of the model."""
    first = made["SAEDashboard"]["first"]
    ours = np.array(made["ours"]["densities"][first : first + latents])
    theirs = np.array(made["SAEDashboard"]["densities"])
    apart = np.abs(ours - theirs)
    text = f"apart by {np.median(apart):.1e} in the median, {apart.max():.1e} at the most, of {ours.mean():.1e}"
    return Row(f"{what}: densities", text, f"{latents} latents of SAEDashboard's")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store")
@click.option("--dashboard", type=click.Path(path_type=Path), help="Environment of sae-dashboard 0.8; none: ours only.")
@click.option("--windows", default=Config().windows, show_default=True, help="By default as many as the browser.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--case", "cases", multiple=True, type=click.IntRange(0, len(CASES) - 1), default=range(len(CASES)))
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary folder by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the table here.")
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
