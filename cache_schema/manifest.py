"""A store's description of itself: the records in the root's attributes["saemill"]."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .errors import FormatTooNew, ManifestInvalid, StoreMismatch
from .sites import HOOKS, RESID, Site
from .stored_dtypes import SmallDtype
from .strict_json import LATER, StrictError, flatten, from_json, nearest, to_json

FORMAT = 3  # the highest that is read; `seal` chooses the one for a new store
SPLITS = ("train", "validation", "test")
Codec = Literal["raw", "lz4", "zstd"]
Sink = Literal["bos", "self"]
MOST_SHARDS = 10**8  # readers keep a byte for each
NOT_IDENTITY = ("cache_id", "codec", "shard_windows")  # these decide the layout, not the values
PART = "part"  # in a corpus's settings: only this part of the named corpus was read


@dataclass(frozen=True)
class ModelSpec:
    """The model, with everything about it that decides the bits of its activations."""

    id: str
    d_model: int
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    revision: str | None = None
    num_layers: int | None = None
    tokenizer: str | None = None  # a hash of vocabulary and rules; None if there are no tokens
    bos_token: int | None = None
    special_tokens: tuple[int, ...] = ()  # ids that never train and are never replaced

    def __post_init__(self) -> None:
        if self.d_model < 1:
            raise ValueError(f"expected d_model of at least 1, found {self.d_model}")


@dataclass(frozen=True)
class CorpusSpec:
    """The text, and how it became windows."""

    id: str
    revision: str | None = None
    packing: str = "concat"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionSpec:
    """Which attention is kept and how much of it."""

    layers: tuple[int, ...] = ()
    heads: int = 1  # stored heads; 1 if they were averaged
    averaged: bool = True
    topk: int = 16
    mass: float = 0.95
    causal: bool = True
    left_out: tuple[Sink, ...] = field(default=(), metadata={LATER: True})
    """Keys that are ignored: the window's first token, the query itself."""

    def __post_init__(self) -> None:
        if list(self.left_out) != sorted(set(self.left_out)):
            raise ValueError(f"expected left_out in rising order, each once, found {self.left_out}")
        if self.heads < 1 or self.topk < 1 or not 0 < self.mass <= 1:
            raise ValueError(
                f"expected heads >= 1, topk >= 1 and 0 < mass <= 1, "
                f"found heads {self.heads}, topk {self.topk}, mass {self.mass}"
            )


@dataclass(frozen=True)
class HookSpec:
    """The layers at which a hook other than the residual stream is stored, and its width."""

    layers: tuple[int, ...]
    width: int

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers) or self.width < 1:
            raise ValueError(
                f"expected layers, each once, and a width of at least 1, found {self.layers} and {self.width}"
            )


@dataclass(frozen=True)
class Manifest:
    """Everything that is fixed before the first shard is written."""

    model: ModelSpec
    corpus: CorpusSpec
    context: int
    layers: tuple[int, ...]
    windows: int
    splits: dict[str, tuple[int, int]]
    attention: AttentionSpec = AttentionSpec()
    shard_windows: int = 256
    codec: Codec = "raw"
    hooks: dict[str, HookSpec] = field(default_factory=dict, metadata={LATER: True})
    stored_as: SmallDtype | None = field(default=None, metadata={LATER: True})  # None: as computed by the model
    format: int = 1  # set by `seal`
    cache_id: str = ""

    def __post_init__(self) -> None:
        for name in ("context", "windows", "shard_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.shards > MOST_SHARDS:
            raise ValueError(f"expected at most {MOST_SHARDS:,} shards, found {self.windows} windows in {self.shards}")
        if len(set(self.layers)) != len(self.layers) or len(set(self.attention.layers)) != len(self.attention.layers):
            raise ValueError(f"expected each layer once, found {self.layers} and {self.attention.layers}")
        for hook in self.hooks:
            if hook == RESID or hook not in HOOKS:
                raise ValueError(f"expected hooks other than {RESID}, found {hook!r}{nearest(hook, HOOKS)}")
        _validate_splits(self.splits, self.windows)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every place whose activations are stored, residuals first."""
        hooks = {RESID: self.layers} | {hook: spec.layers for hook, spec in self.hooks.items()}
        return tuple(Site(hook, layer) for hook, layers in hooks.items() for layer in layers)

    def width_of(self, hook: str) -> int:
        return self.model.d_model if hook == RESID else self.hooks[hook].width

    @property
    def stored_dtype(self) -> str:
        """The type of activations in the store; `stored_as` types come with one scale per token."""
        return self.stored_as or self.model.dtype

    @property
    def shards(self) -> int:
        return -(-self.windows // self.shard_windows)

    @property
    def tokens(self) -> int:
        return self.windows * self.context

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and last-plus-one window of a shard; the last shard may be shorter."""
        start = shard * self.shard_windows
        return start, min(start + self.shard_windows, self.windows)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)


def cache_id(manifest: Manifest) -> str:
    """32 hexadecimal digits of SHA-256 over the canonical JSON of all settings that decide the stored values.

    Left out on purpose: codec, shard size, and anything about the machine, the path or the date.
    """
    fields = {key: value for key, value in manifest.to_json().items() if key not in NOT_IDENTITY}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def seal(manifest: Manifest) -> Manifest:
    """The manifest completed: with the lowest format that can express it, and its cache id."""
    manifest = replace(manifest, format=3 if manifest.stored_as else 2 if manifest.hooks else 1)
    return replace(manifest, cache_id=cache_id(manifest))


def read_manifest(raw: Any, where: str) -> Manifest:
    """The manifest in a root group's attributes, or an error that lists every problem."""
    if not isinstance(raw, dict):
        raise ManifestInvalid(f"{where}: expected attributes['saemill'] to be an object, found {type(raw).__name__}")
    check_format(raw.get("format"), where)
    try:
        return from_json(Manifest, raw)
    except StrictError as error:
        raise ManifestInvalid(f"{where} is not a valid manifest: {error}") from None


def check_format(found: Any, where: str) -> None:
    """Refuse records of a later format before reading anything else in them."""
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ManifestInvalid(f"{where}: expected a format number of at least 1, found {found!r}")
    if found > FORMAT:
        raise FormatTooNew(
            f"{where} has format {found}; this saemill reads formats up to {FORMAT}. Update saemill to read it."
        )


def require_same(url: str, found: Manifest, wanted: Manifest) -> None:
    """Refuse to resume a store with other settings; the error lists each difference on a line."""
    old, new = flatten(found.to_json()), flatten(wanted.to_json())
    keys = [key for key in {**old, **new} if key not in ("cache_id", "format")]  # derived from the others
    differences = [
        f"  {key}: the store has {_in_words(old.get(key))}, but {_in_words(new.get(key))} was asked for"
        for key in keys
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise StoreMismatch(
            f"{url} holds a store with other settings:\n" + "\n".join(differences) + "\n"
            "Use the same settings to resume it, or another place for a new store"
        )


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else repr(value)


def _validate_splits(splits: dict[str, tuple[int, int]], windows: int) -> None:
    if tuple(splits) != SPLITS:
        raise ValueError(f"expected the splits {', '.join(SPLITS)} in this order, found {', '.join(splits)}")
    edges = [edge for span in splits.values() for edge in span]
    if edges[0] != 0 or edges[-1] != windows or edges != sorted(edges) or edges[1:-1:2] != edges[2:-1:2]:
        raise ValueError(f"expected splits that follow each other from 0 to {windows}, found {splits}")
