"""Rewrite the golden stores. Run by hand (`make goldens`); the result is reviewed like any format change.

Values are arithmetic, not random, so that tests can compute the expected arrays.
"""

import shutil
from pathlib import Path
from typing import get_args

import numpy as np

from saemill.cache_schema import (
    AttentionCsr,
    AttentionSpec,
    CorpusSpec,
    HookSpec,
    Manifest,
    ModelSpec,
    ShardContent,
    Site,
    StoreWriter,
    from_float32,
)
from saemill.cache_schema.layout import COUNTS
from saemill.cache_schema.manifest import Codec
from saemill.cache_schema.moments import is_special, measure
from saemill.cache_schema.stored_dtypes import SmallDtype

FOLDER = Path(__file__).parent
CODECS = get_args(Codec)
SMALL = get_args(SmallDtype)
NAMES = (*CODECS, "hooks", *SMALL)
WINDOWS, CONTEXT, WIDTH, HEADS, TOPK = 5, 4, 3, 2, 2
MANIFEST = Manifest(
    model=ModelSpec("golden", WIDTH, revision="1", num_layers=2, tokenizer="none", bos_token=0, special_tokens=(0,)),
    corpus=CorpusSpec("golden", "1", settings={"made": "by arithmetic"}),
    context=CONTEXT,
    layers=(1,),
    windows=WINDOWS,
    splits={"train": (0, 3), "validation": (3, 4), "test": (4, 5)},
    attention=AttentionSpec(layers=(0,), heads=HEADS, averaged=False, topk=TOPK),
    shard_windows=2,
)
HOOKS = {"mlp_in": HookSpec((0, 1), WIDTH), "mlp_out": HookSpec((1,), WIDTH), "z": HookSpec((1,), 2)}  # format 2


def tokens() -> np.ndarray:
    return np.arange(WINDOWS * CONTEXT, dtype=np.uint32).reshape(WINDOWS, CONTEXT) % 7


def documents() -> np.ndarray:
    return np.repeat(np.arange(WINDOWS, dtype=np.uint32)[:, None], CONTEXT, axis=1)


def resid() -> np.ndarray:
    values = np.arange(WINDOWS * CONTEXT * WIDTH, dtype=np.float32).reshape(WINDOWS, CONTEXT, WIDTH)
    return np.sin(values) * 8


def act(site: Site) -> np.ndarray:
    """Activations of a hook."""
    width = HOOKS[site.hook].width
    values = np.arange(WINDOWS * CONTEXT * width, dtype=np.float32).reshape(WINDOWS, CONTEXT, width)
    return np.cos(values + site.layer) * len(site.hook)


def attention(windows: int) -> AttentionCsr:
    """Query q keeps its first min(q + 1, 2) keys, with falling probabilities."""
    lengths = np.minimum(np.tile(np.arange(CONTEXT) + 1, windows * HEADS), TOPK)
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    data = (0.5 / (1 + place)).astype(np.float16)
    kept = np.add.reduceat(data.astype(np.float32), ends - lengths).astype(np.float16)
    return AttentionCsr(
        indptr=np.concatenate([[0], ends]).astype(np.uint32),
        indices=place.astype(np.uint8),
        data=data,
        kept_mass=kept.reshape(windows, HEADS, CONTEXT),
    )


def content(manifest: Manifest, shard: int) -> ShardContent:
    start, stop = manifest.shard_range(shard)
    acts = {site: (act(site) if site.hook in manifest.hooks else resid())[start:stop] for site in manifest.sites}
    special = is_special(tokens()[start:stop], MANIFEST.model.special_tokens)
    return ShardContent(
        tokens=tokens()[start:stop],
        documents=documents()[start:stop],
        acts={site: from_float32(values, "bfloat16") for site, values in acts.items()},
        moments={site: measure(values, special) for site, values in acts.items()},
        attention={0: attention(stop - start)},
    )


def write(url: Path, name: str) -> None:
    """Write a store by its name: a codec; `hooks`, in format 2; `int8` or `fp8`, in format 3."""
    of_hooks = {"hooks": HOOKS, "codec": "lz4"}
    small = {small: of_hooks | {"stored_as": small} for small in SMALL}
    changes = {"hooks": of_hooks, **small}.get(name, {"codec": name})
    manifest = Manifest(**{**vars(MANIFEST), **changes})
    with StoreWriter.create(url, manifest, tokens(), documents()) as writer:
        for shard in writer.pending():
            writer.write(shard, content(writer.manifest, shard))
    (url / COUNTS).unlink()  # derived, so later versions need not read it


if __name__ == "__main__":
    for name in NAMES:
        shutil.rmtree(FOLDER / f"store_{name}", ignore_errors=True)
        write(FOLDER / f"store_{name}", name)
