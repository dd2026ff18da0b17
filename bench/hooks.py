"""What it costs to harvest hooks: two hooks of eight layers beside the residual, against the bare pass and against
writing the same bytes. Jobs take turns within a round; one random Gemma-2 of `bench/harvest.py`, in float32.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import torch
from ratios import ROUNDS, Row, conclude, gather_facts, speeds_of, take_turns

from harvest import CONTEXT, LAYER, Bare, make_manifest, make_model, make_tokens
from saemill.cache_schema import HookSpec, Manifest, StoreWriter
from saemill.cache_schema.allocator import SMALLER_THAN_SHARDS, keep_large_blocks
from saemill.harvest.model.load import Wanted, load_model
from saemill.harvest.shards import Harvester, compute_shard, harvest_shards

LAYERS = tuple(range(LAYER - 7, LAYER + 1))
DEVICE, DTYPE = torch.device("cpu"), "float32"


def manifest_of(tokens: np.ndarray, hooks: tuple[str, ...]) -> Manifest:
    plain = make_manifest(tokens, DTYPE, attention=())
    return replace(plain, hooks={hook: HookSpec(LAYERS, plain.model.d_model) for hook in hooks})


class Harvest:
    """Tokens to committed shards, residuals and hooks, without attention."""

    def __init__(self, folder: Path, model: Path, tokens: np.ndarray, hooks: tuple[str, ...]) -> None:
        self.store, self.tokens, self.manifest = folder / "store", tokens, manifest_of(tokens, hooks)
        wanted = Wanted((LAYER,), (), dict.fromkeys(hooks, LAYERS))
        self.harvester = Harvester(load_model(model, wanted, getattr(torch, DTYPE)), self.manifest, DEVICE)

    def run(self) -> float:
        """Seconds, all in all."""
        with StoreWriter.create(self.store, self.manifest, self.tokens, self.tokens) as writer:
            start = perf_counter()
            harvest_shards(writer, replace(self.harvester, manifest=writer.manifest), writer.pending(), lambda _: None)
            seconds = perf_counter() - start
        shutil.rmtree(self.store)
        return seconds

    def write(self) -> float:
        """Seconds to write and commit what was computed before."""
        rows = self.manifest.shard_range(0)
        content = compute_shard(self.harvester, self.tokens[slice(*rows)], self.tokens[slice(*rows)])
        seconds = 0.0
        with StoreWriter.create(self.store, self.manifest, self.tokens, self.tokens) as writer:
            for shard in writer.pending():
                start = perf_counter()
                writer.write(shard, content)
                seconds += perf_counter() - start
        shutil.rmtree(self.store)
        return seconds


@click.command()
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--windows", default=64, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(rounds: int, windows: int, json_file: Path | None) -> None:
    keep_large_blocks(SMALLER_THAN_SHARDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokens = make_model(folder), make_tokens(windows)
        bare = Bare(model, DTYPE, DEVICE)
        plain = Harvest(folder, model, tokens, ())
        hooked = Harvest(folder, model, tokens, ("mlp_in", "mlp_out"))
        jobs = {"bare": lambda: bare.run(tokens), "plain": plain.run, "hooks": hooked.run, "write": hooked.write}
        take_turns(1, jobs)  # warm
        seconds = take_turns(rounds, jobs)
    speeds = speeds_of(windows * CONTEXT, seconds)
    medians = {job: float(np.median(values)) for job, values in seconds.items()}
    allowed = 1.10 * medians["bare"] + medians["write"]
    rows = [
        Row(
            "eight layers' mlp_in and mlp_out: 1.10 times the bare pass plus the time of writing, against the harvest",
            f"{speeds['hooks']} tok/s",
            f"bare {speeds['bare']}, writing {speeds['write']} tok/s",
            allowed / medians["hooks"],
            1.0,
            {job: tuple(values) for job, values in seconds.items()},
        ),
        Row(
            "the same: the harvest of hooks against that of the residual alone",
            f"{speeds['hooks']} tok/s",
            f"residual alone {speeds['plain']} tok/s",
            medians["plain"] / medians["hooks"],
        ),
    ]
    raise SystemExit(conclude("Hooks", rows, json_file, gather_facts()))


if __name__ == "__main__":
    main()
