"""SAEs of SAELens, dictionary_learning and sparsify, each made, saved and opened by the tool's own code.

{"tool": name, "sae": folder, "work": folder}    opens an SAE, and writes its codes and reconstructions next to x.npy
with "make": variant, "settings"                 trains it briefly and saves it first
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from worker_pipe import serve

STEPS, ROWS = 60, 512
Request = dict[str, Any]
Opened = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def batches(request: Request) -> list[Tensor]:
    """Batches of rows from a planted dictionary: on noise, latents would not start to fire, nor decoders change."""
    x = torch.from_numpy(np.load(Path(request["work"]) / "train.npy"))
    return list(x.split(ROWS))[:STEPS]


def open_sae_lens(folder: Path) -> Opened:
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)
    return sae.encode, sae


def make_sae_lens(request: Request) -> None:
    from sae_lens.registry import get_sae_class
    from sae_lens_step import SAES, make_sae, make_trainer

    settings, d_in = request["settings"], batches(request)[0].shape[1]
    if request["make"] not in SAES:  # a transcoder, which SAELens can load but not train
        cls, config = get_sae_class(request["make"])
        sae: Any = cls(config(d_in=d_in, d_sae=settings["d_sae"], **settings["more"]))
        move(sae)
        sae.save_model(request["sae"])
        return
    sae = make_sae(request["make"], settings["d_sae"], settings["k"], d_in)
    trainer = make_trainer(sae, ROWS, {"lr": 3e-3, "lr_end": 3e-4})
    for x in batches(request):
        trainer.step(x)
        trainer.n_training_steps += 1
    sae.save_inference_model(request["sae"])


def open_dictionary_learning(folder: Path) -> Opened:
    from dictionary_learning.utils import load_dictionary
    from safetensors.torch import load_file

    if not (folder / "ae.pt").is_file():  # the two lines of the README in the export
        torch.save(load_file(folder / "ae.safetensors"), folder / "ae.pt")
    sae, _ = load_dictionary(str(folder), "cpu")
    return sae.encode, sae


def make_dictionary_learning(request: Request) -> None:
    from dictionary_learning.training import trainSAE
    from dictionary_learning_step import make_trainer

    settings, data = request["settings"], batches(request)
    has_k = request["make"] in ("topk", "batchtopk", "matryoshka")
    course = {"steps": STEPS + 1, "lr": 3e-3, "warmup_steps": 1}
    course |= {"threshold_start_step": 0} if has_k else {"sparsity_warmup_steps": 1}
    trainer = make_trainer(request["make"], settings["d_sae"], settings["k"], data[0].shape[1], course)
    folder, trainers = Path(request["sae"]), [{"trainer": lambda: trainer}]
    trainSAE(data, trainers, STEPS, save_dir=str(folder.parent), normalize_activations=True, device="cpu")
    (folder.parent / "trainer_0").rename(folder)


def open_sparsify(folder: Path) -> Opened:
    from sparsify_step import encode_dense, load_coder

    sae = load_coder(folder)
    return lambda x: encode_dense(sae, x), lambda x: sae(x).sae_out


def make_sparsify(request: Request) -> None:
    from sparsify_step import make_coder, make_optimiser

    settings, data = request["settings"], batches(request)
    sae = make_coder(data[0].shape[1], num_latents=settings["d_sae"], k=settings["k"], **settings["more"])
    optimiser = make_optimiser(sae)
    for x in data:  # as in its trainer, which saves the decoder without normalising it again
        if not sae.cfg.transcode:
            sae.set_decoder_norm_to_unit_norm()
        sae(x, x.roll(1, 1) if sae.cfg.transcode else None).fvu.backward()
        if not sae.cfg.transcode:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
    optimiser.eval()
    sae.save_to_disk(request["sae"])


@torch.no_grad()
def move(sae: torch.nn.Module) -> None:
    """Move weights off zero, or comparing them would prove nothing."""
    for parameter in sae.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))


TOOLS: dict[str, tuple[Callable[[Path], Opened], Callable[[Request], None]]] = {
    "sae_lens": (open_sae_lens, make_sae_lens),
    "dictionary_learning": (open_dictionary_learning, make_dictionary_learning),
    "sparsify": (open_sparsify, make_sparsify),
}


def answer(request: Request) -> None:
    torch.manual_seed(0)
    open_folder, make = TOOLS[request["tool"]]
    if "make" in request:
        make(request)
    encode, rebuild = open_folder(Path(request["sae"]))
    work = Path(request["work"])
    x = torch.from_numpy(np.load(work / "x.npy"))
    with torch.no_grad():
        np.save(work / "acts.npy", encode(x).numpy())
        np.save(work / "x_hat.npy", rebuild(x).numpy())


if __name__ == "__main__":
    serve(answer)
