"""The facts that `sae-store info` shows, from a store's root and index; row norms come from a sample of shards.

For attention these are links to other tokens, which can guide training, and the sinks' share of the rest. A link goes
from a token to an earlier one, neither of them special, and not to the window's first token, which is an attention
sink. Links are counted in a few whole shards, spread evenly over the store.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .commits import read_devices, read_index
from .csr import AttentionCsr
from .errors import ShardCorrupt
from .manifest import PART
from .massive_activations import MULTIPLE, default_multiple, measure_massive, sample_few, spread
from .moments import is_special
from .numbers_in_words import counted, say_size, some_of
from .reader import Store
from .requests_and_spans import Request, Span
from .sites import Place, key_of, place_of, say_place

SHARDS = 4
LINKS = ("links", "link_mass", "bos_mass", "self_mass")
BUNDLED = ("pocket", "sha256-00b9ddea572b327b")  # used by MODEL=auto if Gemma cannot be reached


def describe(store: Store) -> dict[str, Any]:
    """The facts as plain JSON values, which `render` lays out. Links and massive rows are read from a few shards."""
    links = {layer: _links(store, layer) for layer in store.manifest.attention.layers}
    places = [place_of(site.hook, site.layer) for site in store.manifest.sites]
    massive = {place: _massive_rows(store, place) for place in places}
    damaged = [f"attention of layer {layer}" for layer, found in links.items() if found is None]
    damaged += [say_place(place) for place, found in massive.items() if found is None]
    massive_rows = {key_of(place): found for place, found in massive.items()}
    return {**facts(store), "attention_links": links, "massive_rows": massive_rows, "damaged": damaged}


def facts(store: Store) -> dict[str, Any]:
    """The facts in the manifest and the commits; no shard is read."""
    manifest = store.manifest
    index = read_index(store.files, manifest)
    indexed = index.mask(manifest.shards)
    windows = sum(stop - start for start, stop in map(manifest.shard_range, indexed.nonzero()[0].tolist()))
    tokens = windows * manifest.context
    kept = {layer: index.attention[layer] for layer in manifest.attention.layers if layer in index.attention}
    devices = read_devices(store.files, np.flatnonzero(store.committed).tolist())
    return {
        "url": store.url,
        "cache_id": manifest.cache_id,
        "model": manifest.model.id,
        "revision": manifest.model.revision,
        "dtype": manifest.model.dtype,
        "stored_as": manifest.stored_as,
        "d_model": manifest.model.d_model,
        "corpus": manifest.corpus.id,
        "corpus_part": manifest.corpus.settings.get(PART),
        "context": manifest.context,
        "codec": manifest.codec,
        "layers": list(manifest.layers),
        "hooks": {hook: list(spec.layers) for hook, spec in manifest.hooks.items()},
        "attention_layers": list(manifest.attention.layers),
        "windows": manifest.windows,
        "tokens_by_split": {name: (stop - start) * manifest.context for name, (start, stop) in manifest.splits.items()},
        "shards": manifest.shards,
        "shards_committed": int(store.committed.sum()),
        "shards_indexed": int(indexed.sum()),
        "bytes": sum(index.bytes.values()),
        "bytes_per_token": {path: size / max(tokens, 1) for path, size in sorted(index.bytes.items())},
        "attention_kept_mass": {layer: totals.kept_mass for layer, totals in kept.items()},
        "attention_entries_per_row": {layer: totals.entries / max(totals.rows, 1) for layer, totals in kept.items()},
        "attention_left_out": list(manifest.attention.left_out),
        "computed_on": sorted(set(map(str, devices.values()))),  # from a sample of the shards
    }


def _links(store: Store, layer: int) -> dict[str, float] | None:
    """Links per row, the mass by target and the number of shards read; None if any of them is damaged."""
    spans = spread(store.manifest, store.committed, SHARDS)

    def count_in(span: Span) -> np.ndarray:
        part = store.read(Request(attention_layers=(layer,), tokens=True), span)
        assert part.tokens is not None
        return count_links(part.attention[layer], is_special(part.tokens, store.manifest.model.special_tokens))

    try:
        return links_per_row(count_in(span) for span in spans) | {"shards": len(spans)}
    except ShardCorrupt:
        return None


def _massive_rows(store: Store, layer: Place) -> dict[str, Any] | None:
    """None if a shard that was read is damaged; `verify` reports the damage."""
    spans = sample_few(store.manifest, layer, store.committed)
    try:
        found = measure_massive(store, layer, MULTIPLE, spans, with_mean=False)
    except ShardCorrupt:
        return None
    return {
        "multiple": found.multiple,
        "median_norm": found.median,
        "mean_norm_of_others": found.ordinary.mean_norm,
        "tokens": found.rows,
        "massive": found.massive,
        "share_of_squares": found.square_share,
        "rms_norm": found.rms_norm,
        "rms_norm_of_others": found.ordinary.rms_norm,
        "shards": found.shards,
        "windows": sum(span.windows for span in spans),
        "left_out": default_multiple(store.manifest) is not None,
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """Small tables: the store's properties, sizes, attention and massive rows."""
    head = Table.grid(padding=(0, 2))
    for name, value in {"store": facts["url"], **describe_lines(facts)}.items():
        head.add_row(Text(name, "bold"), Text(value))  # names and paths are not markup
    verify = f"sae-store verify {shlex.quote(facts['url'])}"
    warning = f"not measured, because shards that were read are damaged: {some_of(facts['damaged'])}: {verify}"
    damaged = [Text(warning, "yellow")] if facts["damaged"] else []
    return Group(head, "", *_size_table(facts), *_attention_table(facts), *_massive_table(facts), *damaged)


def describe_lines(facts: dict[str, Any]) -> dict[str, str]:
    """One line of text per property of the store."""
    revision = f" at {facts['revision']}" if facts["revision"] else ""
    bundled = " (the small bundled model, not Gemma-2-2B)" if (facts["model"], facts["revision"]) == BUNDLED else ""
    unfinished, indexed = facts["shards"] - facts["shards_committed"], facts["shards_indexed"]
    lines = {
        "cache id": facts["cache_id"],
        "model": f"{facts['model']}{bundled}{revision}, {facts['dtype']}, width {facts['d_model']:,}",
        **({"kept as": f"{facts['stored_as']}, one scale per token: not bit-exact"} if facts["stored_as"] else {}),
        "corpus": facts["corpus"] + (f", a part of it ({facts['corpus_part']})" if facts["corpus_part"] else ""),
        "residuals": f"after layers {_join(facts['layers'])}" if facts["layers"] else "none",
        **{hook: f"of layers {_join(layers)}" for hook, layers in facts["hooks"].items()},
        "attention": f"layers {_join(facts['attention_layers'])}" if facts["attention_layers"] else "none",
        "windows": f"{facts['windows']:,} of {facts['context']:,} tokens",
        "tokens": ", ".join(f"{name} {count:,}" for name, count in facts["tokens_by_split"].items()),
        "shards": f"{facts['shards_committed']:,} of {facts['shards']:,} committed"
        + (f" ({unfinished:,} to go: run the same import or harvest again)" if unfinished else ""),
        "size": f"{say_size(facts['bytes'])}, codec {facts['codec']}"
        + (f", of the {indexed:,} shards in the index" if indexed < facts["shards_committed"] else ""),
    }
    return lines | ({"computed on": "; ".join(facts["computed_on"])} if facts["computed_on"] else {})


def make_table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first are right-justified."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def sum_by_place(sizes: Mapping[str, float]) -> dict[str, float]:
    """Sizes of arrays, with those of one layer's attention, `attention/layer_17/data` and others, added up."""
    sums: dict[str, float] = {}
    for path, size in sorted(sizes.items()):
        place = "/".join(path.split("/")[:2]) if path.startswith("attention/") else path
        sums[place] = sums.get(place, 0) + size
    return sums


def _size_table(facts: dict[str, Any]) -> list[RenderableType]:
    table = make_table("Size", "array", "bytes per token", "share")
    total = sum(facts["bytes_per_token"].values())
    for path, size in sum_by_place(facts["bytes_per_token"]).items():
        table.add_row(Text(path), f"{size:,.1f}", f"{size / max(total, 1e-9):.1%}")
    table.add_section()
    table.add_row("all", f"{total:,.1f}", "")
    return [table] if facts["bytes_per_token"] else []


def _attention_table(facts: dict[str, Any]) -> list[RenderableType]:
    title = "Attention kept" + (f", without {' and '.join(left)}" if (left := facts["attention_left_out"]) else "")
    shards = max((found["shards"] for found in facts["attention_links"].values() if found), default=0)
    if shards < facts["shards_committed"]:
        title += f"; links, BOS and self in {counted(shards, 'shard')}"
    columns = ("layer", "kept mass", "entries a row", "links a row", "their mass", "to BOS", "to self")
    table = make_table(title, *columns)
    for layer, mass in facts["attention_kept_mass"].items():
        found = facts["attention_links"][layer]
        parts = [""] * len(LINKS) if found is None else [f"{found[name]:.3f}" for name in LINKS]
        table.add_row(str(layer), f"{mass:.3f}", f"{facts['attention_entries_per_row'][layer]:.1f}", *parts)
    return [table] if facts["attention_kept_mass"] else []


def _massive_table(facts: dict[str, Any]) -> list[RenderableType]:
    """How many rows training leaves out, and norms with and without them."""
    found = {place: row for place, row in facts["massive_rows"].items() if row is not None and row["tokens"]}
    if not found:
        return []
    first = next(iter(found.values()))
    title = f"Massive rows: norm beyond {first['multiple']:g} times the median" + (
        "" if first["left_out"] else " (trained on, as the import asked)"
    )
    parts = [row for row in found.values() if row["windows"] < facts["windows"]]
    where = dict.fromkeys(f"{counted(row['windows'], 'window')} of {counted(row['shards'], 'shard')}" for row in parts)
    title += f"; in {' or '.join(where)}" if where else ""
    columns = ("place", "median norm", "massive", "of tokens", "of squared norm", "RMS norm", "RMS norm without")
    table = make_table(title, *columns)
    for place, row in found.items():
        table.add_row(
            place,
            f"{row['median_norm']:,.4g}",
            f"{row['massive']:,} ({row['massive'] / row['tokens']:.3%})",
            f"{row['tokens']:,}",
            f"{row['share_of_squares']:.1%}",
            f"{row['rms_norm']:,.4g}",
            f"{row['rms_norm_of_others']:,.4g}",
        )
    return [table]


def _join(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def count_links(csr: AttentionCsr, special_WT: np.ndarray) -> np.ndarray:
    """float64 [5]: the number of rows of non-special tokens, one per head if heads are stored separately, and the sums
    of `LINKS` over them."""
    row, key = csr.row_of_entry(), csr.indices.astype(np.int64)
    window, query = row // (csr.heads * csr.context), row % csr.context
    counts = ~special_WT[window, query]
    is_bos, is_self = counts & (key == 0), counts & (key == query) & (key != 0)
    is_link = counts & ~is_bos & ~is_self & ~special_WT[window, key]
    masses = [csr.data[chosen].sum(dtype=np.float64) for chosen in (is_link, is_bos, is_self)]
    return np.array([(~special_WT).sum() * csr.heads, is_link.sum(), *masses])


def links_per_row(parts: Iterable[np.ndarray]) -> dict[str, float]:
    rows, *sums = sum(parts, np.zeros(1 + len(LINKS))).tolist()
    return {name: total / max(rows, 1) for name, total in zip(LINKS, sums, strict=True)}
