"""Steps of sparsify at its own defaults. Its forward pass always uses bfloat16 autocast on a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read on import: its kernels need a GPU
from schedulefree import ScheduleFreeWrapper
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder
from stepping import Settings, Step, serve_steps, split_pairs


def make_coder(d_in: int, device: str = "cpu", **settings: Any) -> Any:
    return SparseCoder(d_in, SparseCoderConfig(**settings), device, dtype=torch.float32)


def load_coder(folder: Path) -> Any:
    return SparseCoder.load_from_disk(folder)


@torch.no_grad()
def encode_dense(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """Codes [rows, latents]; its own format is the k active values and their indices."""
    found = sae.encode(x)
    return torch.zeros(len(x), sae.num_latents).scatter_(1, found.top_indices, found.top_acts)


def make_optimiser(sae: Any, lr: float | None = None) -> Any:
    """Its trainer's default: signs of momentum, without a schedule."""
    groups = [{"params": sae.parameters(), "lr": lr or 5e-3 / (sae.num_latents / 2**14) ** 0.5}]
    optimiser = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
    optimiser.train()
    return optimiser


def make_step(settings: Settings, batches: list[torch.Tensor]) -> Step:
    assert settings.variant in ("topk", "transcoder") and not settings.l0, "sparsify has top-k SAEs only"
    # Its trainer turns on TF32 itself.
    torch.set_float32_matmul_precision("high")
    device = settings.device
    is_transcoder = settings.variant == "transcoder"
    pairs = split_pairs(batches) if is_transcoder else {id(x): (x,) for x in batches}
    d_in = pairs[id(batches[0])][0].shape[1]
    sae = make_coder(d_in, device, num_latents=settings.width, k=settings.k, transcode=is_transcoder)
    optimiser = make_optimiser(sae)
    since_fired = torch.zeros(sae.num_latents, dtype=torch.long, device=device)

    def step(x: torch.Tensor) -> None:
        """As in its trainer, for one SAE between two passes of the model."""
        if not is_transcoder:
            sae.set_decoder_norm_to_unit_norm()
        out = sae(*pairs[id(x)], dead_mask=None)  # the auxiliary loss has no weight by default
        fired = torch.zeros_like(since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        if not is_transcoder:
            sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        since_fired.add_(len(x))
        since_fired[fired] = 0

    return step


if __name__ == "__main__":
    serve_steps(make_step)
