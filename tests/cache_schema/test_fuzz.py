"""Mutated metadata: a store either works or says by name what is wrong; it never crashes, hangs or swells."""

from __future__ import annotations

import json
import random
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saemill.cache_schema import ManifestInvalid, Request, Store, StoreError
from saemill.cache_schema.identity import seal
from saemill.cache_schema.info import describe, render
from saemill.cache_schema.manifest import read_manifest
from saemill.cache_schema.verify import verify_shards

EVERYTHING = Request(layers=(3, 5), attention_layers=(2, 3), tokens=True, documents=True)
SPARE_BYTES = 512 * 2**20  # what a store of some kilobytes may take, at the very most

# Which file of which store: array documents stand inline in the root, or only apart, as other tools leave them.
CASES = (
    ("inline", "zarr.json"),
    ("inline", "commits/00001.json"),
    ("inline", "commits/index.json"),
    ("inline", "stats/summary.json"),
    ("inline", "stats/counts.json"),
    ("apart", "zarr.json"),
    ("apart", "tokens/zarr.json"),
    ("apart", "resid/layer_3/zarr.json"),
    ("apart", "attention/layer_2/indptr/zarr.json"),
    ("apart", "stats/layer_3/zarr.json"),
)
BY_ZARR = (("inline", "zarr.json"), ("apart", "resid/layer_3/zarr.json"))

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
    """Every container in a JSON value with every key or index of it."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children):
        yield value, key
        yield from places_of(child)


def mutate_json(document: Any, choose: random.Random) -> bytes:
    """One to three changes to keys, values and types; a root may get the cache id that its settings ask for."""
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
        reseal(document)
    return json.dumps(document).encode()


def reseal(document: Any) -> None:
    """The identity check must not be what hides every later one."""
    try:
        found = document["attributes"]["saemill"]
        found["cache_id"] = seal(read_manifest(found, "")).cache_id
    except (KeyError, TypeError, StoreError):
        return


def mutate_bytes(raw: bytes, choose: random.Random) -> bytes:
    at, action = choose.randrange(len(raw)), choose.choice(["flip", "cut", "truncate", "insert", "digit", "replace"])
    if action == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << choose.randrange(8))]) + raw[at + 1 :]
    if action == "cut":
        return raw[:at] + raw[at + choose.randint(1, 50) :]
    if action == "truncate":
        return raw[:at]
    if action == "insert":
        return raw[:at] + choose.randbytes(choose.randint(1, 8)) + raw[at:]
    if action == "digit":
        digits = [i for i, byte in enumerate(raw) if chr(byte).isdigit()]
        where = choose.choice(digits)
        return raw[:where] + choose.choice([b"0", b"9", b"-", b"99999999", b"9" * 5000]) + raw[where + 1 :]
    return choose.choice(
        [b"", b"null", b"[]", b"0", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b'{"a":1,"a":2}']
    )


def mutate(raw: bytes, choose: random.Random) -> bytes:
    return mutate_json(json.loads(raw), choose) if choose.random() < 0.7 else mutate_bytes(raw, choose)


def use(folder: Path, via_zarr: bool) -> None:
    """All that a reader does with a store."""
    with Store.open(folder, via_zarr=via_zarr) as store:
        render(describe(store))
        for report in verify_shards(store):
            assert all(str(damage) for damage in report.damage)
        for _ in store.stream(EVERYTHING):
            pass
        store.moments(3)
        store.counts("train")


@contextmanager
def bounded_memory() -> Iterator[None]:
    """An absurd allocation fails here instead of swapping the machine to death."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(folder: Path, name: str, choose: random.Random, via_zarr: bool = False) -> None:
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(mutate(whole, choose))
    try:
        with bounded_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of a fill value that float16 cannot hold
            use(folder, via_zarr)
    except StoreError as error:
        assert str(error)
    finally:
        file.write_bytes(whole)


@pytest.fixture(scope="module")
def stores(synthetic, tmp_path_factory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("inline", "apart")}
    for folder in folders.values():
        synthetic.write_store(folder, synthetic.make_manifest(windows=10))
    root = json.loads((folders["apart"] / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (folders["apart"] / "zarr.json").write_text(json.dumps(root))
    for folder in folders.values():
        use(folder, via_zarr=False)
    return folders


@pytest.fixture
def store(stores) -> Path:
    return stores["inline"]


ONE_SLOW_EXAMPLE_IS_A_HANG = timedelta(seconds=20)
quick = settings(
    max_examples=25,
    deadline=ONE_SLOW_EXAMPLE_IS_A_HANG,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes and makes a mutation no clearer
)
long = settings(quick, max_examples=1000)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("kind", "name"), CASES)
@quick
@given(seed=seeds)
def test_mutated_metadata_work_or_are_named(stores, kind, name, seed):
    fuzz(stores[kind], name, random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "name"), CASES)
@long
@given(seed=seeds)
def test_mutated_metadata_work_or_are_named_for_long(stores, kind, name, seed):
    fuzz(stores[kind], name, random.Random(seed))


@pytest.mark.parametrize(("kind", "name"), BY_ZARR)
@settings(quick, max_examples=15)
@given(seed=seeds)
def test_mutated_documents_are_named_where_zarr_reads_them(stores, kind, name, seed):
    fuzz(stores[kind], name, random.Random(seed), via_zarr=True)


def test_settings_nested_beyond_reason_are_named(store):
    file = store / "zarr.json"
    whole = file.read_text()
    nest = '{"a": ' * 700 + "0" + "}" * 700
    try:
        file.write_text(whole.replace('"settings": {}', f'"settings": {nest}', 1))
        with pytest.raises(ManifestInvalid, match="deep|JSON"):
            Store.open(store)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("shard_windows", [10**12, 10**18])
def test_absurd_shards_are_refused_at_once(store, shard_windows):
    """Not part of the cache id, so nothing else stands before it."""
    file = store / "zarr.json"
    whole = file.read_text()
    root = json.loads(whole)
    root["attributes"]["saemill"]["shard_windows"] = shard_windows
    try:
        file.write_text(json.dumps(root))
        with pytest.raises(ManifestInvalid):
            Store.open(store)
    finally:
        file.write_text(whole)
