"""Make a store of activations from elsewhere, so that trainers serve people who never harvested here.

Windows keep their order: row i of the source is window i of the store. Splits are therefore cut by
position, and each window counts as a document of its own unless documents are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .content import ShardContent
from .digest import array_digest
from .errors import ImportInvalid, StoreBusy
from .manifest import AttentionSpec, Codec, CorpusSpec, HookSpec, Manifest, ModelSpec
from .massive_rows import KEEP
from .moments import is_special, measure
from .sites import RESID, by_hook
from .sources import Source
from .stored_dtypes import SmallDtype, to_float32
from .writer import StoreWriter


@dataclass(frozen=True)
class ImportSettings:
    """What the arrays themselves do not say."""

    model: str
    special_tokens: tuple[int, ...] = ()
    bos_token: int | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    shard_windows: int = 256
    codec: Codec = "raw"
    keep_massive: bool = False
    """Every row counts, however large, unless a run asks otherwise."""
    stored_as: SmallDtype | None = None


def import_store(url: str, source: Source, settings: ImportSettings, on_shard: Callable[[int, int], None]) -> Manifest:
    """Write the source as a store; goes on where an earlier import of the same source stopped."""
    if not source.has_tokens and (settings.special_tokens or settings.bos_token is not None):
        raise ImportInvalid(
            "special tokens and BOS cannot be found without tokens: give them (--tokens FILE), or leave out "
            "--special-token and --bos-token, so that every row trains"
        )
    tokens = source.tokens(0, source.windows)
    documents = np.repeat(np.arange(source.windows, dtype=np.uint32)[:, None], source.context, axis=1)
    manifest = _manifest(source, settings, _fingerprint(source, tokens, settings.shard_windows))
    with StoreWriter.create(url, manifest, tokens, documents) as writer:
        left = []
        for shard in writer.pending():
            with writer.claim(shard) as is_mine:
                if is_mine:
                    writer.write(shard, _content(manifest, source, shard, tokens, documents))
                else:
                    left.append(shard)
            on_shard(shard, manifest.shards)
        if left:
            raise StoreBusy(
                f"another import is writing {len(left)} of {manifest.shards} shards of {url}: let it end, then run "
                "this command again"
            )
        return writer.manifest


def _manifest(source: Source, settings: ImportSettings, fingerprint: str) -> Manifest:
    hooks = by_hook(source.sites)
    return Manifest(
        model=ModelSpec(
            id=settings.model,
            d_model=source.d_model,
            dtype=source.dtype,  # pyright: ignore[reportArgumentType] (checked when the source was opened)
            bos_token=settings.bos_token,
            special_tokens=tuple(sorted(settings.special_tokens)),
        ),
        corpus=CorpusSpec(
            "import",
            fingerprint,
            "as given",
            {"tokens": source.has_tokens} | ({KEEP: True} if settings.keep_massive else {}),
        ),
        context=source.context,
        layers=hooks.pop(RESID, ()),
        windows=source.windows,
        splits=_splits(source.windows, settings),
        attention=AttentionSpec(),
        shard_windows=settings.shard_windows,
        codec=settings.codec,
        hooks={hook: HookSpec(layers, source.d_model) for hook, layers in hooks.items()},
        stored_as=settings.stored_as,
    )


def _splits(windows: int, settings: ImportSettings) -> dict[str, tuple[int, int]]:
    shares = (settings.validation_share, settings.test_share)
    if min(shares) < 0 or sum(shares) >= 1:
        raise ImportInvalid(f"expected shares of at least 0 that leave some windows to train on, found {shares}")
    validation, test = (round(windows * share) for share in shares)
    train = windows - validation - test
    if train < 1:
        raise ImportInvalid(f"{windows} windows with shares {shares} leave no window to train on")
    return {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, windows)}


def _fingerprint(source: Source, tokens: np.ndarray, step: int) -> str:
    """Imported values decide the bytes by themselves, so their digest stands for model run and corpus."""
    starts = range(0, source.windows, step)
    parts = [
        array_digest(source.acts(site, start, min(start + step, source.windows)))
        for site in source.sites
        for start in starts
    ]
    return array_digest(tokens, np.frombuffer("".join(parts).encode(), np.uint8))


def _content(manifest: Manifest, source: Source, shard: int, tokens: np.ndarray, documents: np.ndarray) -> ShardContent:
    start, stop = manifest.shard_range(shard)
    special = is_special(tokens[start:stop], manifest.model.special_tokens)
    acts = {site: source.acts(site, start, stop) for site in manifest.sites}
    moments = {}
    for site, values in acts.items():
        plain = to_float32(values, manifest.model.dtype)
        if not np.isfinite(plain).all():
            window = start + int(np.argmin(np.isfinite(plain).all(axis=(1, 2))))
            what = "residuals" if site.hook == RESID else site.hook
            raise ImportInvalid(f"layer {site.layer}, window {window}: expected finite {what}, found NaN or infinity")
        moments[site] = measure(plain, special)
    return ShardContent.of(tokens[start:stop], documents[start:stop], acts, moments)
