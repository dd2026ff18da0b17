"""Open an SAE's folder with SAELens and write what it computes beside x.npy: {"sae": folder, "work": folder}."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE

sys.path.insert(0, str(Path(__file__).parents[1]))
from talk import serve


def compute(request: dict[str, str]) -> None:
    sae, work = SAE.load_from_disk(request["sae"]), Path(request["work"])
    x = torch.from_numpy(np.load(work / "x.npy"))
    with torch.no_grad():
        acts = sae.encode(x)
        x_hat = sae(x)
    np.save(work / "acts.npy", acts.numpy())
    np.save(work / "x_hat.npy", x_hat.numpy())


if __name__ == "__main__":
    serve(compute)
