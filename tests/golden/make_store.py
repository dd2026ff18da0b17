"""Write the golden stores anew. Run by hand (`make goldens`), reviewed as any change of format is.

Values are arithmetic, not random, so that the expected arrays can be computed beside the stored bytes.
"""

import shutil
from pathlib import Path
from typing import get_args

import numpy as np

from saemill.cache_schema import (
    AttentionCsr,
    AttentionSpec,
    CorpusSpec,
    Manifest,
    ModelSpec,
    ShardContent,
    StoreWriter,
    from_float32,
)
from saemill.cache_schema.manifest import Codec
from saemill.cache_schema.moments import is_special, measure

FOLDER = Path(__file__).parent
CODECS = get_args(Codec)
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


def tokens() -> np.ndarray:
    return np.arange(WINDOWS * CONTEXT, dtype=np.uint32).reshape(WINDOWS, CONTEXT) % 7


def documents() -> np.ndarray:
    return np.repeat(np.arange(WINDOWS, dtype=np.uint32)[:, None], CONTEXT, axis=1)


def resid() -> np.ndarray:
    values = np.arange(WINDOWS * CONTEXT * WIDTH, dtype=np.float32).reshape(WINDOWS, CONTEXT, WIDTH)
    return np.sin(values) * 8


def attention(windows: int) -> AttentionCsr:
    """Query q keeps min(q + 1, 2) keys, from the first on, with falling probabilities."""
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


def content(shard: int) -> ShardContent:
    start, stop = MANIFEST.shard_range(shard)
    special = is_special(tokens()[start:stop], MANIFEST.model.special_tokens)
    return ShardContent(
        tokens=tokens()[start:stop],
        documents=documents()[start:stop],
        resid={1: from_float32(resid()[start:stop], "bfloat16")},
        moments={1: measure(resid()[start:stop], special)},
        attention={0: attention(stop - start)},
    )


def write(url: Path, codec: str) -> None:
    manifest = Manifest(**{**vars(MANIFEST), "codec": codec})
    with StoreWriter.create(url, manifest, tokens(), documents()) as writer:
        for shard in writer.pending():
            writer.write(shard, content(shard))


if __name__ == "__main__":
    for name in CODECS:
        shutil.rmtree(FOLDER / f"store_{name}", ignore_errors=True)
        write(FOLDER / f"store_{name}", name)
