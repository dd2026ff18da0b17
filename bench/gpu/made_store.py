"""Write a store of random residuals of gemma-2-2b's width, for the parts that read one: made_store.py FOLDER SHARDS."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from records import tell
from store_speed import make_manifest, make_residuals, write_store

from saemill.cache_schema import from_float32


def main(folder: str, shards: str) -> None:
    resid = make_residuals(np.random.default_rng(0))
    norm = float(np.linalg.norm(resid[:4], axis=-1).mean())
    write_store(Path(folder), make_manifest(int(shards)), from_float32(resid, "bfloat16"), norm)
    tell(f"{int(shards) * resid.nbytes / 2e9:.1f} GB written and checksummed")


if __name__ == "__main__":
    main(*sys.argv[1:])
