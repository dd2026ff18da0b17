"""Open our SAEs with the peers' own code, and theirs with ours: codes and reconstructions must agree to 1e-5.

    python bench/check_exports.py --peers-python PATH

Out: each variant that reads the rows of a single layer is trained for a few steps, saved, and exported to SAELens,
dictionary_learning and sparsify, which open it in their environment on the same raw activations. In: SAEs that these
tools trained and saved are opened here, and an SAE started from one with `--init`, on activations of another scale,
must reconstruct the same before its first step. Exits with 1 if any disagrees, or if an SAE that a tool can represent
is refused.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from worker_pipe import Worker

from saemill.cache_schema.strict_json import to_json
from saemill.train.data.batch import Batch, Needs
from saemill.train.data.scaling import Stats
from saemill.train.disk.plain_form import init_from
from saemill.train.disk.sae_lens_folder import read_config, save_sae
from saemill.train.engine.step import Trainee
from saemill.train.errors import SaeInvalid
from saemill.train.export import export
from saemill.train.kit.variant_registry import config_type, names
from saemill.train.run.find_and_load_sae import read_folder

D, WIDTH, K, SCALE, STEPS, ROWS = 64, 256, 8, 0.05, 60, 512
HERE = Path(__file__).parent
TOOLS = ("sae_lens", "dictionary_learning", "sparsify")
# Tried in addition to every variant at its defaults.
EXTRA_SETTINGS = [("transcoder", {"gate": "batchtopk"}), ("skip_transcoder", {"gate": "topk"})]
EXPORTABLE = {  # by tool, the variants that it can represent: the others may be refused
    "sae_lens": {"standard", "topk", "batchtopk", "jumprelu", "gated", "abstopk", "transcoder gate=batchtopk"},
    "dictionary_learning": {"standard", "topk", "batchtopk", "jumprelu", "gated", "abstopk"},
    "sparsify": {"topk", "abstopk", "transcoder", "skip_transcoder gate=topk"},
}
MAPS = {"d_out": D, "apply_b_dec_to_input": False}
# Tool, its name for the variant, further settings, and our variant that can start from it, if there is one.
PEER_SAES: list[tuple[str, str, dict[str, Any], str | None]] = [
    *(("sae_lens", name, {}, name) for name in ("standard", "topk", "batchtopk", "jumprelu", "gated")),
    ("sae_lens", "matryoshka", {}, "batchtopk"),
    ("sae_lens", "abstopk", {"k": K}, "abstopk"),
    *(("sae_lens", name, MAPS, None) for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder")),
    *(("dictionary_learning", name, {}, name) for name in ("standard", "topk", "batchtopk", "jumprelu", "gated")),
    ("dictionary_learning", "matryoshka", {}, "batchtopk"),
    ("sparsify", "topk", {}, "topk"),
    ("sparsify", "transcoder", {"transcode": True}, None),  # its decoder rows are not normalised
    ("sparsify", "skip transcoder", {"transcode": True, "skip_connection": True}, None),
]


def planted(rows: int, rng: torch.Generator) -> Tensor:
    """Rows that each sum a few of many directions, shifted off the origin."""
    directions = normalize(torch.randn(2 * D, D, generator=torch.Generator().manual_seed(7)), dim=1)
    chosen = torch.rand(rows, 2 * D, generator=rng).topk(K // 2).indices
    codes = torch.zeros(rows, 2 * D).scatter_(1, chosen, 80 * torch.rand(rows, K // 2, generator=rng) + 40)
    return codes @ directions + torch.randn(rows, D, generator=rng) + 10


def stats_of(x: Tensor) -> Stats:
    return Stats(torch.full((D,), SCALE), SCALE * x.mean(0), float(D))


def make_trainee(variant: str, settings: Mapping[str, Any], stats: Stats) -> Trainee:
    cls = config_type(variant)
    wanted = {"width": WIDTH, "k": K, "target_l0": float(K), "encoder_product": "float32"}
    known = {name: value for name, value in wanted.items() if getattr(cls(), name, None) is not None}
    config = cls(**known, **settings)
    targets = [] if config.needs().targets is None else [stats]
    return Trainee(variant, config.build(D, stats, *targets), total_steps=STEPS)


def train_and_save(variant: str, settings: Mapping[str, Any], folder: Path, train: Tensor, x: Tensor) -> list[Tensor]:
    """Our own module's codes and reconstruction of raw activations."""
    trainee = make_trainee(variant, settings, stats_of(train))
    is_transcoder = config_type(variant)().needs().targets is not None
    for rows in (SCALE * train).split(ROWS):
        trainee.step(Batch(rows, 0.5 * rows if is_transcoder else None))
    metadata: dict[str, Any] = {"model_name": "none", "hook_name": "blocks.19.hook_resid_post", "layers": [19]}
    if is_transcoder:
        metadata |= {"hook": "mlp_in", "hook_name": "blocks.19.mlp.hook_in", "target_hook": "mlp_out"}
        metadata |= {"hook_name_out": "blocks.19.hook_mlp_out", "target_layers": [19]}
    save_sae(folder, trainee.sae, stats_of(train), metadata, to_json({"width": WIDTH}), variant)
    with torch.no_grad():
        return [trainee.sae.encode(SCALE * x), trainee.sae(SCALE * x) / SCALE]


def differences(own: list[Tensor], work: Path) -> list[float]:
    """The largest relative differences of codes, whose units may differ, and of reconstructions."""
    acts, x_hat = own
    their_acts, their_x_hat = (torch.from_numpy(np.load(work / name)) for name in ("acts.npy", "x_hat.npy"))
    if their_acts.shape != acts.shape:  # the tool has a latent for each sign
        acts = torch.cat([acts.relu(), (-acts).relu()], 1)
    their_acts = their_acts * (acts.norm() / their_acts.norm())
    pairs = ((their_acts, acts), (their_x_hat, x_hat))
    return [float((theirs - ours).abs().max() / ours.abs().max()) for theirs, ours in pairs]


def open_there(variant: str, settings: Mapping[str, Any], peers: Worker, data: Path) -> dict[str, list[float] | None]:
    """The differences by tool; None if the tool has no such architecture."""
    train, x = (torch.from_numpy(np.load(data / name)) for name in ("train.npy", "x.npy"))
    found: dict[str, list[float] | None] = {}
    with tempfile.TemporaryDirectory() as name:
        own = train_and_save(variant, settings, Path(name, "sae"), train, x)
        for tool in TOOLS:
            folder = Path(name, tool)
            try:
                if tool == "sae_lens":  # reads our saved form directly
                    folder = Path(name, "sae")
                    if read_config(folder)["architecture"].startswith("saemill_"):
                        raise SaeInvalid("an architecture of our own")
                else:
                    export(Path(name, "sae"), tool, folder)
            except SaeInvalid:
                found[tool] = None
                continue
            peers.ask(tool=tool, sae=str(folder), work=str(data))
            found[tool] = differences(own, data)
    return found


def open_here(
    tool: str, name: str, more: dict[str, Any], variant: str | None, peers: Worker, data: Path
) -> list[float]:
    """The differences between the opened SAE and theirs, then those of an SAE started from it."""
    x = torch.from_numpy(np.load(data / "x.npy"))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sae = Path(folder, name)
        peers.ask(tool=tool, make=name, settings={"d_sae": WIDTH, "k": K, "more": more}, sae=str(sae), work=str(data))
        source = read_folder(sae)
        acts = source.encode(x)
        found = differences([acts, source(x)], data)
        if variant is not None:
            trainee = make_trainee(variant, {}, stats_of(x))
            init_from(trainee.sae, source, trainee.assembly.input_stats, trainee.assembly.target_stats)
            found += differences([acts, trainee.sae(SCALE * x) / SCALE], data)[1:]
        return found


@click.command()
@click.option("--peers-python", required=True, help="Python with sae-lens, dictionary-learning and sparsify installed.")
@click.option("--tolerance", default=1e-5, show_default=True)
def main(peers_python: str, tolerance: float) -> None:
    """Open our SAEs with the peers' code, and theirs with ours."""
    failed: list[str] = []
    peers = Worker("the peers", [peers_python, "-W", "ignore", HERE / "peers/saved_saes.py"])

    def note(name: str, found: list[float]) -> str:
        if not all(value <= tolerance for value in found):  # fails for NaN too, which means that nothing fired
            failed.append(name)
        return " ".join(f"{value:.1e}" for value in found)

    with tempfile.TemporaryDirectory() as folder:
        # With this seed, no row's last chosen latent and the next one are within rounding of each other.
        data, rng = Path(folder), torch.Generator().manual_seed(1)
        np.save(data / "train.npy", planted(STEPS * ROWS, rng).numpy())
        np.save(data / "x.npy", planted(256, rng).numpy())
        click.echo(f"out: codes and reconstructions; {'':8} " + "".join(f"{tool:22}" for tool in TOOLS))
        for variant, settings in [*((name, {}) for name in names()), *EXTRA_SETTINGS]:
            needs = config_type(variant)().needs()
            if replace(needs, targets=None, to_hook=None) != Needs(needs.inputs) or len(needs.inputs) > 1:
                continue  # reads more than the rows of one layer
            label = " ".join([variant, *(f"{key}={value}" for key, value in settings.items())])
            cells = []
            for tool, found in open_there(variant, settings, peers, data).items():
                if found is None and label in EXPORTABLE[tool]:
                    failed.append(f"{label} in {tool}")
                cells.append("has no form" if found is None else note(f"{label} in {tool}", found))
            click.echo(f"{label:38} " + "".join(f"{cell:22}" for cell in cells))
        click.echo("\nin: codes, reconstructions, reconstructions of an SAE started from it")
        for tool, name, more, variant in PEER_SAES:
            label = f"{name} of {tool}"
            try:
                click.echo(f"{label:38} {note(label, open_here(tool, name, more, variant, peers, data))}")
            except SaeInvalid as error:
                failed.append(label)
                click.echo(f"{label:38} {error}")
    peers.close()
    if failed:
        click.echo(f"more than {tolerance:g} apart, or refused: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
