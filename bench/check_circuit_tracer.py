"""Open exported transcoders with circuit-tracer's own code, and build an attribution graph with them.

    python bench/check_circuit_tracer.py --python PATH

Transcoders for every layer of the pocket model (a Gemma-2), with and without a skip connection, and one cross-layer
transcoder are trained briefly and exported. circuit-tracer, in its own environment, must load each, agree with our
reconstructions to 1e-5, build a graph that has features, and find a lower loss with all MLPs replaced than with all of
them left out. Exits with 1 if any of this fails.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from worker_pipe import Worker

from saemill import Store, harvest, train
from saemill.cache_schema import Request
from saemill.cache_schema.sites import Site
from saemill.harvest.model.load_and_truncate import read_facts
from saemill.harvest.pocket import MODEL_FOLDER
from saemill.train.export import export_set
from saemill.train.run.find_and_load_sae import find_saes, read_folder
from saemill.train.sae.model import SparseAutoencoder

HERE = Path(__file__).parent
LAYERS = tuple(range(read_facts(MODEL_FOLDER).num_layers))
PROMPT = "import os\nimport sys\n\ndef main(argv):\n    return"
ROWS, WINDOWS = 256, 4


def train_all(folder: Path, width: int, epochs: int) -> dict[str, Path]:
    """Train each variant on a store of every MLP's inputs and outputs; return the runs by variant."""
    store, runs = folder / "store", {}
    shared = {"hook": "mlp_in", "data.batch_tokens": 1024}
    per_layer = {"width": width, "grid": {"layer": LAYERS}, "set": shared | {"k": width // 8, "gate": "batchtopk"}}
    cross_layer = shared | {"layers": list(LAYERS), "k": width // 8 * len(LAYERS), "width": width * len(LAYERS)}
    options = {"transcoder": per_layer, "skip_transcoder": per_layer, "clt": {"set": cross_layer}}
    with chdir(folder):  # runs go to ./runs
        for variant, more in options.items():
            run = train(cache=store, variant=variant, epochs=epochs, device="cpu", plots=False, name=variant, **more)
            runs[variant] = run.path.resolve()
    return runs


def first_rows(store: Store, hook: str) -> Tensor:
    """[L, N, D]: the rows of the first shard."""
    request = Request(hooks={hook: LAYERS})
    part = store.read(request, store.spans(request)[0])
    windows = [part.values(Site(hook, layer))[:, 1:] for layer in LAYERS]
    return torch.from_numpy(np.stack([x_WTD.reshape(-1, x_WTD.shape[-1])[:ROWS] for x_WTD in windows]))


@torch.no_grad()
def rebuild(saes: list[SparseAutoencoder], x_LND: Tensor) -> Tensor:
    if len(saes) == 1:
        return saes[0](x_LND.transpose(0, 1).flatten(1)).unflatten(1, (len(LAYERS), -1)).transpose(0, 1)
    by_layer = sorted(saes, key=lambda sae: sae.metadata["layers"])
    return torch.stack([sae(x) for sae, x in zip(by_layer, x_LND, strict=True)])


def check(variant: str, run: Path, work: Path, tracer: Worker, x: Tensor, nodes: int) -> tuple[float, dict[str, Any]]:
    """How far apart the two reconstructions are, and circuit-tracer's results."""
    folders = find_saes(str(run), run.parent)
    export_set(folders, work / variant)
    paths = {"model": str(MODEL_FOLDER), "folder": str(work / variant), "work": str(work)}
    found = tracer.ask(**paths, prompt=PROMPT, nodes=nodes)
    own = rebuild([read_folder(folder) for folder in folders], x)
    theirs = torch.from_numpy(np.load(work / "rebuilt.npy"))
    return float((own - theirs).abs().max() / own.abs().max()), found


@click.command()
@click.option("--python", required=True, help="Python with circuit-tracer installed.")
@click.option("--tokens", default="20k", show_default=True, help="Tokens of the pocket model to train on.")
@click.option("--width", default=64, show_default=True, help="Latents per layer.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--nodes", default=64, show_default=True, help="Features in the graph.")
@click.option("--tolerance", default=1e-5, show_default=True)
def main(python: str, tokens: str, width: int, epochs: int, nodes: int, tolerance: float) -> None:
    """Open exported transcoders with circuit-tracer."""
    failed = []
    with tempfile.TemporaryDirectory() as name:
        work, hooks = Path(name), ",".join(f"{hook}:0..{LAYERS[-1]}" for hook in ("mlp_in", "mlp_out"))
        store = harvest(
            model="pocket", layer=LAYERS[-1], hooks=hooks, attention_layers="none", tokens=tokens, out=work / "store"
        )
        x = first_rows(store, "mlp_in")
        np.save(work / "x.npy", x.numpy())
        np.save(work / "ids.npy", store.beginning(store.manifest.shards - 1)[0][-WINDOWS:])
        script = HERE / "peers/circuit_tracer_graph.py"
        offline = {"HF_HOME": name, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": name}
        tracer = Worker("circuit-tracer", [python, "-W", "ignore", script], offline)
        for variant, run in train_all(work, width, epochs).items():
            apart, found = check(variant, run, work, tracer, x, nodes)
            clean, replaced, skipped = (found[kind] for kind in ("clean", "replaced", "skipped"))
            click.echo(f"{variant}: reconstructions {apart:.1e} apart")
            click.echo(f"  graph: {found['features']} of {found['active']} active features, {found['edges']} edges; ")
            click.echo("  replacement score {:.3f}, completeness {:.3f}".format(*found["scores"]))
            click.echo(f"  loss {clean:.3f}; all MLPs replaced {replaced:.3f}, left out {skipped:.3f}")
            if apart > tolerance or not found["features"] or replaced >= skipped:
                failed.append(variant)
        tracer.close()
    if failed:
        click.echo(f"more than {tolerance:g} apart, without features, or no better than no MLPs: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
