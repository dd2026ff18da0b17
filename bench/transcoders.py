"""Training steps of our transcoders against the peers', on the same activations, measured as in bench/train.py.

The cross-layer transcoder is compared with CLT-Forge, whose code `make bench-transcoders` fetches and which runs in the
peers' environment; it has no k, so it runs with as many active latents as its initialisation gives. The single-layer
transcoder is compared with sparsify. SAELens (6.54) can load transcoders but not train them.

    python bench/transcoders.py --peers-python PATH --clt-forge FOLDER
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click
from racing import Contest, Entrant, make_batches
from timing_and_tables import ROUNDS, Row, compare, conclude, gather_facts, revision_of, speeds_of

OURS = "ours"
PEERS = {"clt": ("CLT-Forge", 2.0), "transcoder": ("sparsify", None)}


@click.command()
@click.option("--peers-python", required=True, help="Python of the peers.")
@click.option("--clt-forge", "forge", required=True, type=click.Path(exists=True, path_type=Path), help="Its source.")
@click.option("--d-model", default=512, show_default=True)
@click.option("--layers", default=6, show_default=True, help="Layers of the cross-layer transcoder.")
@click.option("--width", default=2048, show_default=True, help="Latents per layer.")
@click.option("--k", default=32, show_default=True, help="Active latents per layer.")
@click.option("--rows", default=1024, show_default=True, help="Tokens per batch.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Steps per contestant and round, timed together.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", help="cpu: if the machine is busy.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the results here.")
def main(
    peers_python: str,
    forge: Path,
    d_model: int,
    layers: int,
    width: int,
    k: int,
    rows: int,
    rounds: int,
    steps: int,
    threads: int,
    device: str,
    clock: str,
    json_file: Path | None,
) -> None:
    """Time training steps of transcoders against the peers'."""
    source = {"PYTHONPATH": str((forge / "src").resolve())}
    entrants = [
        Entrant(OURS, "ours", {"precision": "float32"}),
        Entrant("CLT-Forge", "clt_forge", environment=source),
        Entrant("sparsify", "sparsify"),
    ]
    contest, found = Contest(entrants, peers_python, threads), []
    for variant, (peer, target) in PEERS.items():
        count = layers if variant == "clt" else 1
        sizes = {"variant": variant, "layers": count, "width": width * count, "k": k * count}
        with tempfile.TemporaryDirectory() as folder:
            settings = sizes | {"batches": make_batches(folder, rows, 2 * count * d_model)}
            settings |= {"device": device, "clock": clock}
            outcome = contest.race(settings, rounds, steps, names=(OURS, peer))
        name = f"a step of {variant}: {count} layers, {width} latents ({k} of ours fire) each, D {d_model}, {rows} rows"
        if outcome.failures:
            reasons = "; ".join(f"{who} failed: {why}" for who, why in outcome.failures.items())
            found.append(Row(name, reasons, target=target))
            continue
        speeds = speeds_of(rows, outcome.seconds)
        found.append(compare(name, speeds[OURS], speeds[peer], "tok/s", target, peer))
    contest.close()
    facts = gather_facts(peers_python, threads=threads, steps=steps, device=device, clock=clock) | revision_of(forge)
    raise SystemExit(conclude("Transcoders", found, json_file, facts))


if __name__ == "__main__":
    main()
