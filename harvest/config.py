"""The settings of a harvest, and how the command line's values are parsed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..cache_schema.cli import read_count
from ..cache_schema.layout import windows_of_a_shard
from ..cache_schema.manifest import Codec, Sink
from ..cache_schema.sites import HOOKS, RESID, Site, by_hook
from ..cache_schema.stored_dtypes import SmallDtype
from ..cache_schema.strict_json import nearest
from .corpus import refuse_unused
from .corpus.source import DatasetOptions
from .errors import SettingInvalid
from .pack_windows import Packing

Dtype = Literal["bfloat16", "float16", "float32"]
Heads = Literal["mean", "all"]

# Tokens per forward pass: the same on every machine, because the batch decides the last bits of a residual.
BATCH_TOKENS = 2048
SMALL_BATCH_TOKENS = 512  # for models so narrow that this keeps their activations in a CPU's cache
SMALL_WIDTH = 512
MOST_BATCH_WINDOWS = 256  # reached by windows of a few tokens each
ATTENTION_AROUND = "-2..+1"
ANY_LAYER = 2**40  # stands for --resid-layers where only the hooks that use them matter


@dataclass(frozen=True)
class Worker:
    """One of several processes that share the shards of a store."""

    index: int = 0  # counted from 0, though users count from 1
    count: int = 1

    def takes(self, shard: int) -> bool:
        return shard % self.count == self.index


@dataclass(frozen=True)
class HarvestConfig:
    """The settings of one harvest. None means a default that suits the model."""

    out: str
    model: str = "auto"
    layer: int | None = None
    resid_layers: tuple[int, ...] | str = "none"
    """Layers besides `layer`; text is parsed by `read_layers`."""
    attention_layers: tuple[int, ...] | str | None = None
    """None: `ATTENTION_AROUND`, where the model has those layers."""
    hooks: Mapping[str, tuple[int, ...]] | str = field(default_factory=dict)
    """Hook -> layers, besides the residual stream; text, parsed by `read_hooks`, names everything to keep."""
    attention_mass: float = 0.95
    attention_topk: int = 16
    attention_heads: Heads = "mean"
    leave_out: tuple[Sink, ...] = ()
    corpus: DatasetOptions | None = None
    tokens: int | None = None
    context: int = 128
    packing: Packing = "concat"
    dtype: Dtype = "bfloat16"
    stored_as: SmallDtype | None = None
    codec: Codec = "raw"
    shard_windows: int | None = None
    """None: enough to fill `SHARD_TOKENS`, or a batch if that is more; an existing store keeps its own."""
    batch_windows: int | None = None
    device: str = "auto"
    worker: Worker = Worker()

    def __post_init__(self) -> None:
        # refuse values that cannot be parsed before looking for a model
        resid = read_layers(self.resid_layers, None, "--resid-layers")
        attention = self.attention_layers
        keeps_attention = attention is None or read_layers(attention, None, "--attention-layers")
        kept = read_hooks(self.hooks, None, (ANY_LAYER,)).get(RESID, ())
        if resid and ANY_LAYER not in kept:
            problem = "for those of other layers. Leave out one of the two" if kept else f"for none. Add {RESID}"
            raise SettingInvalid(f"--resid-layers asks for residuals, --hooks {self.hooks} {problem}")
        if self.corpus is not None:
            refuse_unused(self.corpus)
        if self.context < 2:
            raise SettingInvalid(f"--context: expected at least 2 (BOS and one token), found {self.context}")
        for name in ("shard_windows", "batch_windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingInvalid(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        if self.batch_windows is not None and self.batch_windows > self.windows_per_shard:
            raise SettingInvalid(
                f"--batch-windows {self.batch_windows}: expected at most --shard-windows ({self.shard_windows}): "
                "no batch is larger than its shard. Lower it, leave it out, or give larger shards"
            )
        for name in () if keeps_attention else ("attention_mass", "attention_topk", "attention_heads", "leave_out"):
            if getattr(self, name) != getattr(HarvestConfig, name):
                option = name.replace("_", "-")
                raise SettingInvalid(f"--{option}: no --attention-layers are asked for. Name some, or leave it out")
        if not 0 < self.attention_mass <= 1:
            raise SettingInvalid(f"--attention-mass: expected more than 0 and at most 1, found {self.attention_mass}")
        if self.attention_topk < 1:
            raise SettingInvalid(f"--attention-topk: expected at least 1, found {self.attention_topk}")
        if self.tokens is not None and self.tokens < 3 * self.context:
            raise SettingInvalid(
                f"--tokens {self.tokens}: expected at least {3 * self.context}, one window of {self.context} tokens "
                "for each of train, validation and test"
            )

    @property
    def windows_per_shard(self) -> int:
        return self.shard_windows or max(windows_of_a_shard(self.context), self.batch_windows or 0)

    def windows_per_batch(self, d_model: int) -> int:
        tokens = SMALL_BATCH_TOKENS if d_model <= SMALL_WIDTH else BATCH_TOKENS
        return self.batch_windows or max(1, min(tokens // self.context, self.shard_windows or MOST_BATCH_WINDOWS))


def parse_count(text: str) -> int:
    """Parse --tokens, or raise."""
    count = read_count(text)
    if count is None:
        raise SettingInvalid(f"--tokens: expected a whole number such as 200k, 10M or 1.5B, found {text!r}")
    return count


def read_layers(layers: tuple[int, ...] | str, layer: int | None, option: str) -> tuple[int, ...]:
    """Layers in rising order, as their order does not change the store, from numbers or text: `17,19`, `17..20` or,
    relative to `layer`, `-2..+1`; `none` for no layer. While `layer` is unknown (None), ranges need not rise."""
    if isinstance(layers, tuple):
        return tuple(sorted(set(layers)))
    if layers.strip().lower() == "none":
        return ()
    found: set[int] = set()
    for item in layers.split(","):
        ends = [_parse_layer(end, layer or 0, option) for end in item.split("..")]
        if len(ends) > 2 or (layer is not None and ends[0] > ends[-1]):
            raise SettingInvalid(f"{option}: expected a rising range such as 17..20 or -2..+1, found {item!r}")
        found.update(range(ends[0], max(ends) + 1))
    return tuple(sorted(found))


def read_hooks(
    hooks: Mapping[str, tuple[int, ...]] | str, layer: int | None, layers: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Hook -> layers, the residual stream included, from a mapping of the other hooks or from text such as
    `resid,mlp_in,mlp_out`, all at the same `layers`, or `resid,mlp_in:12..19`, with layers of its own."""
    if not isinstance(hooks, str):
        return by_hook(Site(hook, number) for hook, own in {RESID: layers, **hooks}.items() for number in own)
    sites: list[Site] = []
    for item in hooks.split(","):
        hook, colon, own = (part.strip() for part in item.partition(":"))
        if hook not in HOOKS:
            raise SettingInvalid(f"--hooks {hooks}: unknown hook {hook!r}{nearest(hook, HOOKS)}")
        sites += [Site(hook, number) for number in (read_layers(own, layer, f"--hooks {hook}") if colon else layers)]
    return by_hook(sites)


def _parse_layer(text: str, layer: int, option: str) -> int:
    found = re.fullmatch(r"([+-]?)(\d{1,4})", text.strip())  # bounded: ranges are filled before any check
    if found is None:
        raise SettingInvalid(f"{option}: expected layers such as 17,19 or 17..20 or -2..+1 or none, found {text!r}")
    return layer + int(text) if found[1] else int(text)


def parse_sinks(text: str) -> tuple[Sink, ...]:
    """Parse `bos,self`, or `none`."""
    found: set[Sink] = set()
    for name in text.lower().split(","):
        match name.strip():
            case "bos" | "self" as sink:
                found.add(sink)
            case "none" | "":
                pass
            case other:
                raise SettingInvalid(f"--leave-out {text}: expected bos, self, bos,self or none, found {other!r}")
    return tuple(sorted(found))


def parse_worker(text: str) -> Worker:
    """`3/16`: the third of sixteen workers."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise SettingInvalid(f"--worker {text}: expected i/n with i from 1 to n, for example 3/16")
    return Worker(int(found[1]) - 1, int(found[2]))
