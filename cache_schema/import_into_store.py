"""Make a store from activations harvested elsewhere, so that they can be trained on too.

Windows keep their order: row i of the source is window i of the store. Splits are therefore cut by position; windows
that a source assigns to one document are all in one split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .disk_and_cloud_files import LocalFiles, open_files, require_folder
from .errors import ImportInvalid, StoreBusy
from .formats_to_import import Source
from .layout import windows_of_a_shard
from .manifest import AttentionSpec, Codec, CorpusSpec, HookSpec, Manifest, ModelSpec
from .massive_activations import KEEP
from .moments import is_special, measure
from .open_and_check_root import has_root, read_root
from .shard_content import ShardContent, array_digest
from .sites import RESID, Site, by_hook
from .stored_dtypes import SmallDtype, all_finite
from .writer import StoreWriter

FINGERPRINT_WINDOWS = 256  # hashed at a time; part of every import's fingerprint, so it never changes


@dataclass(frozen=True)
class ImportSettings:
    """Settings that the arrays themselves do not contain."""

    model: str
    special_tokens: tuple[int, ...] = ()
    bos_token: int | None = None
    validation_share: float = 0.05
    test_share: float = 0.05
    shard_windows: int | None = None
    """None: enough to fill `SHARD_TOKENS`, or as in the existing store."""
    codec: Codec = "raw"
    keep_massive: bool = False
    """Every row counts, however large its norm, unless a run overrides it."""
    stored_as: SmallDtype | None = None


def import_store(
    url: str,
    source: Source,
    settings: ImportSettings,
    on_shard: Callable[[int, int], None],
    on_read: Callable[[int], None] = lambda parts: None,
) -> Manifest:
    """Write the source as a store, or resume an earlier import of the same source. `on_shard` gets the shard and the
    number of shards. `on_read` gets the number of parts, once per part read for the fingerprint beforehand."""
    if isinstance(files := open_files(url), LocalFiles):
        require_folder(files.root.absolute(), url)
    tokens = source.tokens
    if tokens is None and (settings.special_tokens or settings.bos_token is not None):
        raise ImportInvalid(
            "special tokens and BOS cannot be found without tokens: give the tokens (--tokens FILE), or leave out "
            "--special-token and --bos-token, so that every row trains"
        )
    if settings.shard_windows is None and has_root(files):
        settings = replace(settings, shard_windows=read_root(files).manifest.shard_windows)
    shape = (source.windows, source.context)
    tokens = np.zeros(shape, np.uint32) if tokens is None else tokens
    documents = np.broadcast_to(source.document_of[:, None], shape)
    manifest = _manifest(source, settings, _fingerprint(source, tokens, on_read))
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
                f"another import is writing {len(left)} of {manifest.shards} shards of {url}: wait for it to finish, "
                "then run this command again"
            )
        return writer.manifest


def cuts_documents(source: Source, manifest: Manifest) -> bool:
    """Whether a document has windows in two splits, because there were too few documents to give each split its own."""
    borders = {start for start, stop in manifest.splits.values() if 0 < start < stop}
    return any(source.document_of[border - 1] == source.document_of[border] for border in borders)


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
            {"tokens": source.tokens is not None} | ({KEEP: True} if settings.keep_massive else {}),
        ),
        context=source.context,
        layers=hooks.pop(RESID, ()),
        windows=source.windows,
        splits=_splits(source, settings),
        attention=AttentionSpec(),
        shard_windows=settings.shard_windows or windows_of_a_shard(source.context),
        codec=settings.codec,
        hooks={hook: HookSpec(layers, source.d_model) for hook, layers in hooks.items()},
        stored_as=settings.stored_as,
    )


def _splits(source: Source, settings: ImportSettings) -> dict[str, tuple[int, int]]:
    shares, windows = (settings.validation_share, settings.test_share), source.windows
    if not (min(shares) >= 0 and sum(shares) < 1):  # neither holds for NaN
        raise ImportInvalid(f"expected shares of at least 0 that leave some windows to train on, found {shares}")
    validation, test = (round(windows * share) for share in shares)
    starts = np.unique(source.document_of, return_index=True)[1]
    if len(starts) <= (validation > 0) + (test > 0):  # too few for all splits: documents are cut, see `cuts_documents`
        starts = np.arange(windows)

    def border(left: int, behind: int, before: int) -> int:
        """The start of a document between `behind` and `before` that leaves about `left` windows after it."""
        here = starts[(starts > behind) & (starts < before)]
        return int(here[np.abs(here - (windows - left)).argmin()]) if len(here) else 0

    first = int(starts[1]) if validation and test else 0  # at least this document is for train
    seen = border(test, first, windows) if test else windows
    train = border(validation + test, 0, seen) if validation else seen
    if train < 1:
        raise ImportInvalid(f"{windows} windows with shares {shares} leave no window to train on")
    return {"train": (0, train), "validation": (train, seen), "test": (seen, windows)}


def _fingerprint(source: Source, tokens: np.ndarray, on_read: Callable[[int], None]) -> str:
    """Imported values alone decide the stored bytes, so their digest identifies both model run and corpus."""
    starts, parts = range(0, source.windows, FINGERPRINT_WINDOWS), list[str]()
    for site in source.sites:
        for start in starts:
            stop = min(start + FINGERPRINT_WINDOWS, source.windows)
            parts.append(array_digest(_finite_acts(source, site, start, stop)))
            on_read(len(source.sites) * len(starts))
    own = np.array_equal(source.document_of, np.arange(source.windows))  # one document per window: nothing more to hash
    documents = [] if own else [source.document_of]
    return array_digest(tokens, np.frombuffer("".join(parts).encode(), np.uint8), *documents)


def _finite_acts(source: Source, site: Site, start: int, stop: int) -> np.ndarray:
    """Activations of some windows, required to be finite before anything is written: a started store is fixed."""
    values = source.acts(site, start, stop)
    for window, stored in enumerate(values, start):
        if not all_finite(stored, source.dtype):
            what = "residuals" if site.hook == RESID else site.hook
            raise ImportInvalid(f"layer {site.layer}, window {window}: expected finite {what}, found NaN or infinity")
    return values


def _content(manifest: Manifest, source: Source, shard: int, tokens: np.ndarray, documents: np.ndarray) -> ShardContent:
    start, stop = manifest.shard_range(shard)
    special = is_special(tokens[start:stop], manifest.model.special_tokens)
    acts = {site: source.acts(site, start, stop) for site in manifest.sites}
    moments = {site: measure(values, special, manifest.model.dtype) for site, values in acts.items()}
    return ShardContent(tokens[start:stop], documents[start:stop], acts, moments)
