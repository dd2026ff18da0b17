"""Stores of int8 and fp8: what rounding costs whom, what is refused, and that all else works as in any store."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from saemill.cache_schema import Request, RequestInvalid, Site, Store, StoreMismatch, StoreWriter, to_float32
from saemill.cache_schema.cli import main
from saemill.cache_schema.massive_activations import measure_massive, row_norms
from saemill.cache_schema.stored_dtypes import FP8_VALUES, LARGEST, SmallDtype, to_codes
from saemill.cache_schema.verify_and_repair import digest

SMALL = get_args(SmallDtype)
BOUND = {"int8": 0.013, "fp8": 0.035}  # of a row's norm, D 64: half a step at most, a third of it on average


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def rounded(rows: np.ndarray, small: SmallDtype) -> np.ndarray:
    codes, scales = to_codes(rows, "float32", small)
    return to_float32(codes, small, scales)


@pytest.mark.parametrize("small", SMALL)
def test_a_massive_row_costs_itself_and_others_nothing(small: SmallDtype, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((300, 64)).astype(np.float32)
    alone = rounded(rows, small)
    massive = rows.copy()
    massive[7] *= 1000  # as long in all directions
    massive[8, 3] = 30_000  # as massive activations are: in few
    found = rounded(massive, small)
    others = np.delete(np.arange(300), [7, 8])
    assert np.array_equal(found[others], alone[others])
    errors = np.linalg.norm(found - massive, axis=1) / np.linalg.norm(massive, axis=1)
    assert errors.max() < BOUND[small]
    assert abs(found[8, 3] / 30_000 - 1) < 1e-6
    codes, scales = to_codes(massive, "float32", small)
    norms = row_norms(codes, small, scales)
    np.testing.assert_allclose(norms, np.linalg.norm(massive, axis=1), rtol=BOUND[small])


@pytest.mark.parametrize("small", SMALL)
def test_rows_of_any_size_are_numbers(small: SmallDtype) -> None:
    """Zeros, rows below what a scale can say, the smallest that it can, the largest there are."""
    sizes = np.array([0, 1e-44, 1e-38, 1e-35, 1, 3e38], np.float32)
    found = rounded(sizes[:, None] * np.array([1, -0.5, 0.25, 0], np.float32), small)
    assert found[:3].tolist() == [[0, 0, 0, 0]] * 3
    np.testing.assert_allclose(found[3:, 0], sizes[3:], rtol=1e-6)
    assert (found[3:, 1] < 0).all() and (found[:, 3] == 0).all()


def test_codes_of_fp8_are_the_nearest_there_are(rng: np.random.Generator) -> None:
    """By looking at all of them; of two as near, the even one."""
    halves = (FP8_VALUES[0:126] + FP8_VALUES[1:127]) / 2
    values = np.concatenate([[448], halves, FP8_VALUES[:127], rng.uniform(-448, 448, 500), rng.uniform(-0.1, 0.1, 500)])
    codes, scales = to_codes(values[None].astype(np.float32), "float32", "fp8")
    assert scales.tolist() == [1.0]
    sizes = np.abs(values.astype(np.float32)).astype(np.float64)
    distance = np.abs(FP8_VALUES[:127].astype(np.float64) - sizes[:, None])
    nearest = distance == distance.min(axis=1, keepdims=True)
    expected = [max(np.flatnonzero(row), key=lambda code: code % 2 == 0) for row in nearest]
    assert (codes[0] & 0x7F).tolist() == expected
    assert LARGEST["fp8"] == FP8_VALUES[126] and np.isnan(FP8_VALUES[127])


def test_codes_of_int8_are_the_nearest_there_are() -> None:
    """Of two as near, the even one."""
    values = np.arange(-127, 127.1, 0.25, np.float32)
    codes, scales = to_codes(values[None], "float32", "int8")
    assert scales.tolist() == [1.0] and codes[0].tolist() == [round(value) for value in values.tolist()]


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_zarr_and_numpy_read_what_our_reader_reads(synthetic, tmp_path: Path, small: str, codec: str) -> None:
    manifest = synthetic.make_manifest(stored_as=small, codec=codec)
    corpus = synthetic.write_store(tmp_path / "store", manifest)
    root = zarr.open_group(tmp_path / "store", mode="r")
    codes, scales = (np.asarray(root[path]) for path in ("resid/layer_3", "scales/resid/layer_3"))
    values = (codes if small == "int8" else FP8_VALUES[codes]) * scales[..., None]
    plain = to_float32(corpus.resid[3], "bfloat16")
    assert np.abs(values - plain).max() < np.abs(plain).max() / (200 if small == "int8" else 28)
    for via_zarr in (False, True):
        with Store.open(tmp_path / "store", via_zarr=via_zarr) as store:
            parts = [part.values(Site("resid", 3)) for part in store.stream(Request(layers=(3,)))]
            assert np.array_equal(np.concatenate(parts), values)
            assert store.moments(3).count == int((corpus.tokens != synthetic.SPECIAL).sum())


@pytest.mark.parametrize("small", SMALL)
def test_damage_of_scales_is_named_and_written_again_to_the_same_bits(synthetic, tmp_path: Path, small: str) -> None:
    folder, manifest = tmp_path / "store", synthetic.make_manifest(stored_as=small)
    corpus = synthetic.write_store(folder, manifest)
    before = synthetic.tree_of(folder)
    for path in ("scales/resid/layer_3/c.1.0", "resid/layer_5/c.2.0.0"):
        chunk = bytearray((folder / path).read_bytes())
        chunk[5] ^= 1
        (folder / path).write_bytes(chunk)
    said = run("verify", folder, code=1)
    assert "shard 1, array scales/resid/layer_3" in said and "shard 2, array resid/layer_5" in said
    run("repair", folder, "--remove-only")
    synthetic.write_store(folder, manifest, corpus)
    run("verify", folder)
    assert synthetic.tree_of(folder) == before


def test_who_asks_for_the_models_own_bits_is_refused_before_anything_is_read(synthetic, tmp_path: Path) -> None:
    synthetic.write_store(tmp_path / "small", synthetic.make_manifest(stored_as="int8"))
    synthetic.write_store(tmp_path / "exact", synthetic.make_manifest())
    with Store.open(tmp_path / "small") as store:
        store.files.read = None  # pyright: ignore[reportAttributeAccessIssue] (nothing may be read)
        with pytest.raises(RequestInvalid, match="computed them, found a store that keeps them as int8.*--stored-as"):
            store.spans(Request(layers=(3,), exact=True))
    with Store.open(tmp_path / "exact") as store:
        assert store.spans(Request(layers=(3,), exact=True))


def test_a_store_is_not_continued_in_another_size(synthetic, tmp_path: Path) -> None:
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path / "store", manifest, shards=[0])
    other = synthetic.make_manifest(stored_as="fp8")
    with pytest.raises(StoreMismatch, match="stored_as: the store has none, but 'fp8' was asked for"):
        StoreWriter.create(tmp_path / "store", other, corpus.tokens, corpus.documents)


def test_massive_rows_are_found_as_in_the_exact_store(synthetic, tmp_path: Path) -> None:
    found = {}
    for small in (None, *SMALL):
        manifest = synthetic.make_manifest(windows=40, width=32, stored_as=small)
        corpus = synthetic.make_corpus(manifest)
        corpus.resid[3].reshape(-1, 32)[[5, 90, 200]] = 0x4600  # 8192 in every channel
        synthetic.write_store(tmp_path / str(small), manifest, corpus)
        with Store.open(tmp_path / str(small)) as store:
            found[small] = measure_massive(store, 3, 10.0)
    for small in SMALL:
        assert found[small].massive == found[None].massive > 0
        assert found[small].median == pytest.approx(found[None].median, rel=2e-3)
        np.testing.assert_allclose(found[small].ordinary.mean, found[None].ordinary.mean, atol=3e-3)


def test_import_keeps_half_the_bytes_and_says_so(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "acts.npy", rng.standard_normal((40, 8, 64)).astype(np.float32))
    words = ("--resid", tmp_path / "acts.npy", "--layer", 4, "--model", "somebody/model", "--shard-windows", 256)
    run("import", tmp_path / "store", *words, "--stored-as", "int8")
    facts = json.loads(run("info", tmp_path / "store", "--json"))
    assert facts["stored_as"] == "int8" and facts["dtype"] == "float32"
    assert facts["bytes_per_token"]["resid/layer_4"] < 64.0 * 256 / 40 + 1  # a whole shard is stored
    assert re.search("kept as +int8, one scale per token", run("info", tmp_path / "store"))
    with Store.open(tmp_path / "store") as store:
        assert store.manifest.format == 3
        digest(store)
