"""Damaged inputs: JSON with other keys, values and types; bytes flipped, cut and inserted; safetensors headers."""

from __future__ import annotations

import json
import math
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from saemill.cache_schema import StoreError
from saemill.cache_schema.manifest import read_manifest, seal

SPARE_BYTES = 512 * 2**20  # the most memory that reading a store or file of a few kilobytes may take

NASTY: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    10**9,
    10**18,
    10**30,
    -(10**40),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "raw",
    "zstd",
    "uint8",
    "float64",
    "NaN",
    "../../../etc/passwd",
    "\ud800",
    "\0",
    "x" * 10_000,
    [],
    [0],
    [1, 1, 1],
    [10**12, 8, 6],
    {},
    {"name": "gzip", "configuration": {}},
)


def nested(depth: int, kind: str) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys or indices."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children):
        yield value, key
        yield from places_of(child)


def mutate_json(document: Any, choose: random.Random, seal: Callable[[Any], None] = lambda _: None) -> bytes:
    """Change one to three keys, values or types; `seal` then mostly repairs a check that would hide all others."""
    for _ in range(choose.randint(1, 3)):
        container, key = choose.choice(list(places_of(document)) or [({}, None)])
        action = choose.choice(["drop", "replace", "replace", "nest", "add", "copy"])
        if action == "drop" and key is not None:
            del container[key]
        elif action == "replace" and key is not None:
            container[key] = deepcopy(choose.choice(NASTY))
        elif action == "nest" and key is not None:
            container[key] = nested(choose.choice([3, 100, 250]), choose.choice(["list", "dict"]))
        elif action == "add" and isinstance(container, dict):
            container[choose.choice(["novelty", "", "--5", "007", "٣", "9" * 5000])] = deepcopy(choose.choice(NASTY))
        elif action == "copy" and isinstance(container, list):
            container.append(container[key])
    if choose.random() < 0.7:
        seal(document)
    return json.dumps(document).encode()


def mutate_bytes(raw: bytes, choose: random.Random) -> bytes:
    at, action = choose.randrange(len(raw)), choose.choice(["flip", "cut", "truncate", "insert", "digit", "replace"])
    if action == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << choose.randrange(8))]) + raw[at + 1 :]
    if action == "cut":
        return raw[:at] + raw[at + choose.randint(1, 40) :]
    if action == "truncate":
        return raw[:at]
    if action == "insert":
        return raw[:at] + choose.randbytes(choose.randint(1, 8)) + raw[at:]
    if action == "digit":
        digits = [i for i, byte in enumerate(raw) if chr(byte).isdigit()] or [at]
        where = choose.choice(digits)
        return raw[:where] + choose.choice([b"0", b"9", b"-", b"99999999", b"9" * 5000]) + raw[where + 1 :]
    return choose.choice(
        [b"", b"null", b"[]", b"0", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b'{"a":1,"a":2}']
    )


def mutate(raw: bytes, choose: random.Random, seal: Callable[[Any], None] = lambda _: None) -> bytes:
    """Damage a JSON file."""
    return mutate_json(json.loads(raw), choose, seal) if choose.random() < 0.7 else mutate_bytes(raw, choose)


def reseal_store(document: Any) -> None:
    """Recompute the identity in a store's root, whose check would hide all later ones."""
    try:
        found = document["attributes"]["saemill"]
        found["cache_id"] = seal(read_manifest(found, "")).cache_id
    except (KeyError, TypeError, StoreError):
        return


def mutate_tensors(raw: bytes, choose: random.Random) -> bytes:
    """Damage a safetensors file: its header, as JSON with a matching length, or its first bytes."""
    length = int.from_bytes(raw[:8], "little")
    header, body = raw[8 : 8 + length], raw[8 + length :]
    if choose.random() < 0.7:
        document = json.loads(header)
        if choose.random() < 0.4:  # still a valid file: a tensor is missing, or has another name, shape or type
            name = choose.choice(sorted(document))
            entry = document.pop(name)
            shape = entry.get("shape", [])
            change = choose.choice(["drop", "rename", "turn", "flatten", "type"])
            if change != "drop":
                shapes = {"turn": shape[::-1], "flatten": [-1 if 0 in shape else math.prod(shape)]}
                types = {"F32": "I32", "I64": "F64"}
                entry = entry | {"shape": shapes.get(change, shape)}
                if change == "type":
                    entry["dtype"] = types.get(entry.get("dtype"), "F32")
                document["renamed" if change == "rename" else name] = entry
            header = json.dumps(document).encode()
        else:
            header = mutate_json(document, choose)
        return len(header).to_bytes(8, "little") + header + body
    broken = mutate_bytes(raw[: 8 + length], choose)
    return broken + (body if choose.random() < 0.8 else b"")


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Make absurd allocations fail instead of swapping the machine to death."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
