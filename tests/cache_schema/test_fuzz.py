"""Mutated metadata: a store either works or says by name what is wrong; it never crashes, hangs or swells."""

from __future__ import annotations

import json
import random
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saemill.cache_schema import ManifestInvalid, Request, Store, StoreError
from saemill.cache_schema.info import describe, render
from saemill.cache_schema.layout import encode_json, root_document
from saemill.cache_schema.manifest import cache_id, seal
from saemill.cache_schema.verify_and_repair import verify_shards

from .. import mutations

EVERYTHING = Request(layers=(3, 5), attention_layers=(2, 3), tokens=True, documents=True)

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


def fuzz(folder: Path, name: str, choose: random.Random, via_zarr: bool = False) -> None:
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes(mutations.mutate(whole, choose, mutations.reseal_store))
    try:
        with mutations.bounded_memory(), warnings.catch_warnings():
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


def test_attention_of_a_layer_that_the_store_lacks_is_not_shown(stores):
    index = stores["inline"] / "commits/index.json"
    whole = index.read_bytes()
    other = whole.replace(b'"3":', b'"99":')
    assert other != whole
    try:
        index.write_bytes(other)
        with Store.open(stores["inline"]) as store:
            found = describe(store)
            assert 99 not in found["attention_kept_mass"] and render(found)
    finally:
        index.write_bytes(whole)


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


@pytest.mark.parametrize("depth", [700, 100_000])
def test_settings_nested_beyond_reason_are_named(store, depth):
    """By the cache id if Python can read them: how deep it can differs between versions."""
    file = store / "zarr.json"
    whole = file.read_text()
    nest = '{"a": ' * depth + "0" + "}" * depth
    try:
        file.write_text(whole.replace('"settings": {}', f'"settings": {nest}', 1))
        with pytest.raises(ManifestInvalid, match="deep|JSON|cache id"):
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


@pytest.mark.parametrize("windows", [10**9, 10**13, 10**400])
def test_more_shards_than_a_memory_holds_are_refused_at_once(synthetic, tmp_path, windows):
    """Sealed, as whoever means harm would."""
    root = json.loads(encode_json(root_document(seal(synthetic.make_manifest()))))
    found = root["attributes"]["saemill"]
    found |= {"windows": windows, "shard_windows": 1}
    found["splits"] = {"train": [0, windows], "validation": [windows, windows], "test": [windows, windows]}
    found["cache_id"] = cache_id(SimpleNamespace(to_json=lambda: found))  # type: ignore[arg-type]
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ManifestInvalid, match="expected at most 100,000,000 shards"):
        Store.open(tmp_path)
