"""The cache id: a hash of what decides the stored values, and of nothing else.

Left out on purpose: codec and shard size (they change how values are laid out, not the values),
and anything about the machine, the path or the date.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

from .manifest import Manifest

NOT_IDENTITY = ("cache_id", "codec", "shard_windows")


def cache_id(manifest: Manifest) -> str:
    """32 hexadecimal digits of SHA-256 over the canonical JSON of the deciding fields."""
    fields = {key: value for key, value in manifest.to_json().items() if key not in NOT_IDENTITY}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def seal(manifest: Manifest) -> Manifest:
    """The manifest with what follows from it filled in: the lowest format that can say it, and its cache id."""
    manifest = dataclasses.replace(manifest, format=3 if manifest.stored_as else 2 if manifest.hooks else 1)
    return dataclasses.replace(manifest, cache_id=cache_id(manifest))
