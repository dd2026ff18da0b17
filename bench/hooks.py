"""What harvesting hooks costs: two hooks of eight layers in addition to the residual, against the bare pass and against
writing the same bytes. Jobs take turns within a round; seconds are processor time. The pocket model is so narrow that
a hook costs more, relative to the pass, than in any model worth harvesting.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import process_time

import click
import numpy as np
import torch
from timing_and_tables import ROUNDS, Row, conclude, gather_facts, speeds_of, take_turns

from harvest import CONTEXT, LAYER, Bare, harvest_once, make_manifest
from saemill.cache_schema import HookSpec, Manifest, ShardContent, StoreWriter
from saemill.cache_schema.keep_freed_memory import SMALLER_THAN_SHARDS, keep_large_blocks
from saemill.harvest.model.load_and_truncate import Wanted, load_model, read_facts
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.harvest.shards import Harvester, compute_shard

LAYERS = tuple(range(LAYER - 7, LAYER + 1))
BATCH, VOCABULARY = 4, 4000
DEVICE, DTYPE = torch.device("cpu"), "float32"


def manifest_of(tokens: np.ndarray, hooks: tuple[str, ...]) -> Manifest:
    manifest, width = make_manifest(tokens, DTYPE, attention=()), read_facts(MODEL_FOLDER).d_model
    return replace(
        manifest,
        corpus=replace(manifest.corpus, settings={"batch_windows": BATCH}),
        model=replace(manifest.model, d_model=width),
        hooks={hook: HookSpec(LAYERS, width) for hook in hooks},
    )


class Harvest:
    """From tokens to committed shards, with residuals and hooks, without attention."""

    def __init__(self, folder: Path, tokens: np.ndarray, hooks: tuple[str, ...]) -> None:
        self.store, self.tokens, self.manifest = folder / "store", tokens, manifest_of(tokens, hooks)
        wanted = Wanted((LAYER,), (), dict.fromkeys(hooks, LAYERS))
        self.harvester = Harvester(load_model(MODEL_FOLDER, wanted, getattr(torch, DTYPE)), self.manifest, DEVICE)

    def run(self) -> None:
        """Run the whole harvest."""
        harvest_once(self.store, self.harvester, self.tokens)

    @cached_property
    def content(self) -> ShardContent:
        """The content of one shard; all have the same size."""
        first = self.tokens[slice(*self.manifest.shard_range(0))]
        return compute_shard(self.harvester, first, first)

    def write(self) -> None:
        """Write and commit the precomputed content."""
        with StoreWriter.create(self.store, self.manifest, self.tokens, self.tokens) as writer:
            for shard in writer.pending():
                writer.write(shard, self.content)
        shutil.rmtree(self.store)


def processor_seconds(job: Callable[[], object]) -> float:
    """Processor time of all threads of this process, which other work on the machine does not change."""
    start = process_time()
    job()
    return process_time() - start


@click.command()
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--windows", default=64, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(rounds: int, windows: int, json_file: Path | None) -> None:
    keep_large_blocks(SMALLER_THAN_SHARDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(3, VOCABULARY, (windows, CONTEXT)).astype(np.uint32)
        bare = Bare(MODEL_FOLDER, DTYPE, DEVICE, BATCH)
        plain = Harvest(folder, tokens, ())
        hooked = Harvest(folder, tokens, ("mlp_in", "mlp_out"))
        work = {"bare": lambda: bare.run(tokens), "plain": plain.run, "hooks": hooked.run, "write": hooked.write}
        jobs = {name: partial(processor_seconds, job) for name, job in work.items()}
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
