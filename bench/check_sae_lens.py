"""Saved SAEs opened by SAELens itself: encode and decode must agree with ours to 1e-5.

    python bench/check_sae_lens.py --peers-python PATH

Each variant that SAELens can express is trained for a few steps, saved, and opened in the peers'
environment on the same raw activations. Exits with 1 if any of them disagrees.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from talk import Worker
from torch import Tensor

from saemill.cache_schema.strict import to_json
from saemill.train.data.batch import Batch, Needs
from saemill.train.data.scaling import Stats
from saemill.train.disk.sae_folder import CONFIG, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.kit.registry import config_type, names

D, WIDTH, SCALE = 64, 256, 0.05
HERE = Path(__file__).parent


def make_trainee(variant: str, stats: Stats) -> Trainee:
    cls = config_type(variant)
    wanted = {"width": WIDTH, "k": 8, "target_l0": 8.0}
    config = cls(**{name: value for name, value in wanted.items() if getattr(cls(), name, None) is not None})
    targets = [] if config.needs().targets is None else [stats]
    return Trainee(variant, config.build(D, stats, *targets), total_steps=20)


def train_and_save(variant: str, folder: Path, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Raw activations, and what our own module makes of them."""
    stats = Stats(torch.full((D,), SCALE), torch.randn(D, generator=rng), float(D))
    trainee = make_trainee(variant, stats)
    for _ in range(20):
        x = torch.randn(512, D, generator=rng) + stats.mean
        trainee.step(Batch(x, None if config_type(variant)().needs().targets is None else 0.5 * (x + stats.mean)))
    metadata = {"model_name": "none", "hook_name": "blocks.19.hook_resid_post", "context_size": 128, "layers": [19]}
    if config_type(variant)().needs().targets is not None:
        metadata |= {"target_layers": [20], "hook_name_out": "blocks.20.hook_resid_post"}
    save_sae(folder, trainee.sae, stats, metadata, to_json({"width": WIDTH}), variant)
    scaled = torch.randn(256, D, generator=rng) + stats.mean
    with torch.no_grad():
        acts = trainee.sae.encode(scaled)
        return scaled / SCALE, acts, trainee.sae(scaled) / SCALE


def disagreement(variant: str, sae_lens: Worker) -> tuple[float, float] | None:
    """Largest relative difference of x_hat, and of activations; None if SAELens has no such architecture."""
    with tempfile.TemporaryDirectory() as name:
        # A seed at which in no row the last latent chosen and the next stand within a rounding of each other.
        work, rng = Path(name), torch.Generator().manual_seed(1)
        x, acts, x_hat = train_and_save(variant, work / "sae", rng)
        if json.loads((work / "sae" / CONFIG).read_text())["architecture"].startswith("saemill_"):
            return None
        np.save(work / "x.npy", x.numpy())
        sae_lens.ask(sae=str(work / "sae"), work=name)
        theirs = torch.from_numpy(np.load(work / "acts.npy"))
        lengths = float(theirs.norm() / acts.norm())  # codes may be in other units, by one factor
        difference = float((theirs / lengths - acts).abs().max() / acts.abs().max())
        found = torch.from_numpy(np.load(work / "x_hat.npy"))
        return float((found - x_hat).abs().max() / x_hat.abs().max()), difference


@click.command()
@click.option("--peers-python", required=True, help="Python with sae-lens installed.")
@click.option("--tolerance", default=1e-5, show_default=True)
def main(peers_python: str, tolerance: float) -> None:
    """Open saved SAEs with SAELens."""
    failed = []
    sae_lens = Worker("SAELens", [peers_python, "-W", "ignore", HERE / "peers" / "sae_lens_load.py"])
    for variant in names():
        needs = config_type(variant)().needs()
        rows = replace(needs, targets=None, to_hook=None)
        if rows != Needs(needs.inputs) or len(needs.inputs) > 1:  # it reads more than rows of one layer
            continue
        found = disagreement(variant, sae_lens)
        if found is None:
            click.echo(f"{variant:12} has an architecture of its own")
            continue
        click.echo(f"{variant:12} x_hat {found[0]:.1e}   activations {found[1]:.1e}")
        if max(found) > tolerance:
            failed.append(variant)
    sae_lens.close()
    if failed:
        click.echo(f"more than {tolerance:g} apart: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
