"""Requests to a store, the spans that they are read in, and the arrays of a span."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from .csr import AttentionCsr
from .errors import RequestInvalid
from .manifest import Manifest
from .numbers_in_words import numbered
from .sites import HOOKS, RESID, Site, by_hook
from .stored_dtypes import to_float32
from .strict_json import nearest


@dataclass(frozen=True)
class Request:
    """Which arrays to read, and of which windows. `windows` is a range within the split, or within the store.

    `layers` are for the residual stream, `hooks` for other hooks: `{"mlp_in": (19,), "mlp_out": (19,)}`.
    `exact` requires activations bit for bit as the model computed them.
    """

    layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()
    tokens: bool = False
    documents: bool = False
    split: str | None = None
    windows: tuple[int, int] | None = None
    hooks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    exact: bool = False

    @classmethod
    def of(cls, sites: Iterable[Site], **more: Any) -> Self:
        """The request for these sites."""
        hooks = by_hook(sites)
        return cls(layers=hooks.pop(RESID, ()), hooks=hooks, **more)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The requested sites, each once."""
        asked = [(RESID, self.layers), *self.hooks.items()]
        return tuple(dict.fromkeys(Site(hook, layer) for hook, layers in asked for layer in layers))


@dataclass(frozen=True)
class Span:
    """Windows start..stop of one shard, numbered over the whole store."""

    shard: int
    start: int
    stop: int

    def cut(self, length: int, shard_windows: int) -> Iterator[Span]:
        """The span, cut at multiples of `length` windows from the start of its shard."""
        shard = self.shard * shard_windows
        for start in range(shard, self.stop, length):
            part = Span(self.shard, max(start, self.start), min(start + length, self.stop))
            if part.windows > 0:
                yield part

    @property
    def windows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ShardArrays:
    """The arrays of one span. W its windows, T context, D residual width."""

    span: Span
    tokens: np.ndarray | None = None  # uint32 [W, T]
    documents: np.ndarray | None = None  # uint32 [W, T]
    acts: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)  # hook -> layer -> [W, T, D] as stored
    scales: dict[Site, np.ndarray] = field(default_factory=dict)  # float32 [W, T], if `acts` are codes
    attention: dict[int, AttentionCsr] = field(default_factory=dict)
    dtype: str = "bfloat16"  # of `acts`

    def at(self, site: Site) -> np.ndarray:
        """The activations of one site, as stored."""
        return self.acts[site.hook][site.layer]

    def values(self, site: Site) -> np.ndarray:
        """float32 [W, T, D]: the activations of one site."""
        return to_float32(self.at(site), self.dtype, self.scales.get(site))

    @property
    def resid(self) -> dict[int, np.ndarray]:
        """Layer -> residuals."""
        return self.acts.get(RESID, {})


def validate_request(manifest: Manifest, request: Request) -> None:
    """Raise one error that names everything requested that the store does not hold."""
    if request.exact and manifest.stored_as:
        raise RequestInvalid(
            f"expected activations exactly as {manifest.model.id} computed them, found a store that keeps them as "
            f"{manifest.stored_as} with one scale per token. Harvest again without --stored-as, or do not ask for exact"
        )
    problems, absent, held = [], [], by_hook(manifest.sites)
    for hook, layers in by_hook(request.sites).items():
        missing = sorted(set(layers) - set(held.get(hook, ())))
        if hook not in HOOKS:
            problems.append(f"a hook {hook!r}{nearest(hook, HOOKS)}")
        elif missing:
            what, option = ("residuals", "--resid-layers") if hook == RESID else (hook, "--hooks")
            problems.append(f"{what} of {numbered('layer', missing)} (it has {numbered('layer', held.get(hook, ()))})")
            absent.append(option)
    missing, kept = sorted(set(request.attention_layers) - set(manifest.attention.layers)), manifest.attention.layers
    if missing:
        problems.append(f"attention of {numbered('layer', missing)} (it has {numbered('layer', kept)})")
        absent.append("--attention-layers")
    if request.split is not None and request.split not in manifest.splits:
        problems.append(f"a split {request.split!r}{nearest(request.split, manifest.splits)}")
    if problems:
        options = " and ".join(dict.fromkeys(absent))
        remedy = f". Ask for others, or harvest into another --out with these {options}" if absent else ""
        raise RequestInvalid(f"the store does not hold {' and '.join(problems)}{remedy}")


def validate_span(manifest: Manifest, span: Span) -> None:
    """Refuse a span that reaches beyond its shard: another shard's windows would be taken for its own."""
    if 0 <= span.shard < manifest.shards:
        start, stop = manifest.shard_range(span.shard)
        if start <= span.start < span.stop <= stop:
            return
    raise RequestInvalid(
        f"expected a span of windows inside one of the {manifest.shards} shards of {manifest.shard_windows} windows, "
        f"found {span}. `Store.spans(request)` makes the spans of a request"
    )


def spans_of(manifest: Manifest, request: Request) -> list[Span]:
    """The request cut at shard borders."""
    first, last = manifest.splits[request.split] if request.split is not None else (0, manifest.windows)
    if request.windows is not None:
        start, stop = request.windows
        if not 0 <= start <= stop <= last - first:
            place = f"the {request.split} split" if request.split is not None else "the store"
            raise RequestInvalid(f"expected windows within 0 to {last - first} of {place}, found {start} to {stop}")
        first, last = first + start, first + stop
    size = manifest.shard_windows
    shards = range(first // size, -(-last // size)) if last > first else range(0)
    return [Span(shard, max(first, shard * size), min(last, (shard + 1) * size)) for shard in shards]
