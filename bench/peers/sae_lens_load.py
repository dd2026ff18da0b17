"""Open an SAE's folder with SAELens and say what it computes: folder of the SAE, folder of x.npy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE


def main(sae_folder: str, work: str) -> None:
    sae = SAE.load_from_disk(sae_folder)
    x = torch.from_numpy(np.load(Path(work) / "x.npy"))
    with torch.no_grad():
        acts = sae.encode(x)
        x_hat = sae.decode(acts)
    np.save(Path(work) / "acts.npy", acts.numpy())
    np.save(Path(work) / "x_hat.npy", x_hat.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
