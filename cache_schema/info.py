"""What a person wants to know about a store, from its root and its index alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from .commits import read_index
from .reader import Store


def describe(store: Store) -> dict[str, Any]:
    """Plain JSON values; `render` makes a page of them."""
    manifest = store.manifest
    index = read_index(store.files, manifest)
    indexed = index.mask(manifest.shards)
    windows = sum(stop - start for start, stop in map(manifest.shard_range, indexed.nonzero()[0].tolist()))
    tokens = windows * manifest.context
    return {
        "url": store.url,
        "cache_id": manifest.cache_id,
        "model": manifest.model.id,
        "revision": manifest.model.revision,
        "dtype": manifest.model.dtype,
        "d_model": manifest.model.d_model,
        "corpus": manifest.corpus.id,
        "context": manifest.context,
        "codec": manifest.codec,
        "layers": list(manifest.layers),
        "attention_layers": list(manifest.attention.layers),
        "windows": manifest.windows,
        "tokens_by_split": {name: (stop - start) * manifest.context for name, (start, stop) in manifest.splits.items()},
        "shards": manifest.shards,
        "shards_committed": int(store.committed.sum()),
        "bytes": sum(index.bytes.values()),
        "bytes_per_token": {path: size / max(tokens, 1) for path, size in sorted(index.bytes.items())},
        "attention_kept_mass": {layer: totals.kept_mass for layer, totals in sorted(index.attention.items())},
        "attention_entries_per_row": {
            layer: totals.entries / max(totals.rows, 1) for layer, totals in sorted(index.attention.items())
        },
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """Three small tables: what it is, what it costs, how much attention it kept."""
    head = Table.grid(padding=(0, 2))
    revision = f" at {facts['revision']}" if facts["revision"] else ""
    unfinished = facts["shards"] - facts["shards_committed"]
    rows = {
        "store": facts["url"],
        "cache id": facts["cache_id"],
        "model": f"{facts['model']}{revision}, {facts['dtype']}, width {facts['d_model']:,}",
        "corpus": facts["corpus"],
        "residuals": f"after layers {_join(facts['layers'])}",
        "attention": f"layers {_join(facts['attention_layers'])}" if facts["attention_layers"] else "none",
        "windows": f"{facts['windows']:,} of {facts['context']:,} tokens",
        "tokens": ", ".join(f"{name} {count:,}" for name, count in facts["tokens_by_split"].items()),
        "shards": f"{facts['shards_committed']:,} of {facts['shards']:,} committed"
        + (f" ({unfinished:,} to go: the same harvest goes on)" if unfinished else ""),
        "size": f"{facts['bytes'] / 1e9:,.3f} GB, codec {facts['codec']}",
    }
    for name, value in rows.items():
        head.add_row(f"[bold]{name}[/bold]", value)
    return Group(head, "", *_size_table(facts), *_attention_table(facts))


def _size_table(facts: dict[str, Any]) -> list[RenderableType]:
    table = Table("array", "bytes per token", "share", title="Size by array", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    total = sum(facts["bytes_per_token"].values())
    for path, size in facts["bytes_per_token"].items():
        table.add_row(path, f"{size:,.1f}", f"{size / max(total, 1e-9):.1%}")
    table.add_section()
    table.add_row("all", f"{total:,.1f}", "")
    return [table] if facts["bytes_per_token"] else []


def _attention_table(facts: dict[str, Any]) -> list[RenderableType]:
    table = Table("layer", "kept mass", "entries a row", title="Attention kept", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for layer, mass in facts["attention_kept_mass"].items():
        table.add_row(str(layer), f"{mass:.3f}", f"{facts['attention_entries_per_row'][layer]:.1f}")
    return [table] if facts["attention_kept_mass"] else []


def _join(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
