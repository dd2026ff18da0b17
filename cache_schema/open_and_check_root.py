"""Open the root of a store: the manifest and the layout of every array, from one file."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .commits import decode_json
from .disk_and_cloud_files import Files, read_if_there
from .errors import ManifestInvalid, StoreMismatch, StoreMissing
from .layout import ROOT, ArrayLayout, array_document_key, arrays_of, parse_array_document
from .manifest import Manifest, cache_id, read_manifest

_REMEDY = "Restore the file, or harvest the store again"


@dataclass(frozen=True)
class Root:
    """A store's description of itself. An array without a layout can be read only by zarr itself."""

    manifest: Manifest
    arrays: dict[str, ArrayLayout | None]
    raw: bytes = field(repr=False)

    @property
    def chunking(self) -> dict[str, tuple[tuple[int, ...], str] | None]:
        """Chunks and codec of every array; None for those that only zarr reads."""
        return {path: layout and (layout.chunks, layout.codec) for path, layout in self.arrays.items()}

    @property
    def rechunked(self) -> list[str]:
        """Arrays that another tool or version has given other chunks or codecs."""
        ours = arrays_of(self.manifest)
        return [path for path, found in self.chunking.items() if found != (ours[path].chunks, ours[path].codec)]


def require_writable(url: str, root: Root) -> None:
    """Refuse arrays chunked by another tool: shards written in our own chunks could not be read next to them."""
    if paths := root.rechunked:
        raise StoreMismatch(
            f"{url}: {', '.join(paths)} has chunks or codecs other than saemill's: such a store can be read but not "
            "written. Harvest or import into another folder"
        )


def has_root(files: Files) -> bool:
    """Whether there is a store. A failed connection raises: a False would start a new store over an existing one."""
    return read_if_there(files, ROOT) is not None


def read_root(files: Files) -> Root:
    """Read and check zarr.json; every problem is a `StoreError`."""
    where = f"{files.url}/{ROOT}"
    try:
        raw = files.read(ROOT)
    except KeyError:
        raise StoreMissing(f"there is no store at {files.url} (no {ROOT}). {_suggest_another(files.url)}") from None
    document = decode_json(raw, where, _REMEDY)
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or "saemill" not in attributes:
        raise ManifestInvalid(f"{where} is not a saemill store: attributes['saemill'] is missing")
    manifest = read_manifest(attributes["saemill"], where)
    _require_identity(manifest, where)
    nodes = _nodes(document)
    arrays = {path: _layout(files, nodes, expected) for path, expected in arrays_of(manifest).items()}
    return Root(manifest, arrays, raw)


def require_not_replaced(files: Files, opened: Root) -> None:
    """Refuse a store other than the one that was opened: chunks are found by name alone, and the names are the same in
    every store. Writers never change a root, and a repair rewrites it with the same manifest and chunks."""
    raw = read_if_there(files, ROOT)
    if raw == opened.raw:
        return
    again = "Put the first one back, or give its new path, and run the command again"
    if raw is None:
        raise StoreMissing(f"the store at {files.url} was removed or moved while it was being read. {again}")
    found = read_root(files)
    if (found.manifest, found.chunking) != (opened.manifest, opened.chunking):
        was, now = opened.manifest.cache_id, found.manifest.cache_id
        other = now if now != was else "the same activations in other shards, chunks or codecs"
        raise StoreMismatch(
            f"the store at {files.url} was replaced while it was being read: expected cache id {was}, as when opened, "
            f"found {other}. {again}"
        )


def _suggest_another(url: str) -> str:
    """The remedy for a missing store: one inside that folder, such as ./demo/store for ./demo, or a new one."""
    with suppress(OSError):  # it is only a hint
        for found in sorted(Path(url).glob(f"*/{ROOT}")):
            if found.is_file() and b'"saemill"' in found.read_bytes():
                return f"Did you mean {found.parent}?"
    return "Make one with `sae-harvest`, `make harvest` or `sae-store import`"


def _require_identity(manifest: Manifest, where: str) -> None:
    try:
        computed = cache_id(manifest)
    except RecursionError:
        raise ManifestInvalid(f"{where}: the settings are nested too deeply to be read. {_REMEDY}") from None
    if manifest.cache_id != computed:
        raise ManifestInvalid(
            f"{where}: expected cache id {computed} for these settings, found {manifest.cache_id!r}: "
            f"the file was edited or damaged. {_REMEDY}"
        )


def _nodes(document: dict[str, Any]) -> dict[str, Any]:
    """The documents kept inline in the root; none if another tool has rewritten it without them."""
    consolidated = document.get("consolidated_metadata")
    nodes = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    return nodes if isinstance(nodes, dict) else {}


def _layout(files: Files, nodes: dict[str, Any], expected: ArrayLayout) -> ArrayLayout | None:
    """The layout of the array as stored; its shape and type must be those of the manifest."""
    document = nodes.get(expected.path)
    where = f"{files.url}/{array_document_key(expected.path)}"
    if document is None:
        try:
            document = decode_json(files.read(array_document_key(expected.path)), where, _REMEDY)
        except KeyError:
            raise ManifestInvalid(f"{where} is missing. {_REMEDY}") from None
    try:
        return parse_array_document(expected, document)
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestInvalid(f"{where} does not describe a zarr v3 array ({error!r}). {_REMEDY}") from None
    except ValueError as error:
        raise ManifestInvalid(f"{where}: {error}. {_REMEDY}") from None
