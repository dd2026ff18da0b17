"""A reader with nothing but zarr, numpy and scipy gets the same arrays, and this package writes what zarr writes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import zarr
from numcodecs import blosc
from scipy.sparse import csr_matrix

from saemill.cache_schema import (
    AttentionSpec,
    ManifestInvalid,
    Request,
    Site,
    Store,
    StoreMismatch,
    StoreWriter,
    encode_and_read_chunks,
    strict_json,
)
from saemill.cache_schema import layout as layouts
from saemill.cache_schema import manifest as manifests
from saemill.cache_schema.disk_and_cloud_files import open_files
from saemill.cache_schema.encode_and_read_chunks import decode, encode, plan_reads, read_chunk
from saemill.cache_schema.layout import ArrayLayout, arrays_of, is_line
from saemill.cache_schema.manifest import Codec, seal
from saemill.cache_schema.verify_and_repair import drop_broken_derived, repair, verify_shards

CODECS = get_args(Codec)


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_alone_reads_every_array(synthetic, small_chunks, tmp_path, codec):
    manifest = synthetic.make_manifest(codec=codec)
    corpus = synthetic.write_store(tmp_path, manifest)
    group = zarr.open_group(tmp_path, mode="r")
    np.testing.assert_array_equal(group["tokens"][:], corpus.tokens)
    np.testing.assert_array_equal(group["documents"][:], corpus.documents)
    for layer in manifest.layers:
        array = group[f"resid/layer_{layer}"]
        assert dict(array.attrs) == {"dtype": "bfloat16"}
        np.testing.assert_array_equal(array[:], corpus.resid[layer])


def test_codes_become_values_by_the_line_of_the_page(synthetic, tmp_path):
    """FORMAT.md's own reading, run as it stands there."""
    synthetic.write_store(tmp_path, synthetic.make_manifest(stored_as="int8"))
    page = (Path(layouts.__file__).parent / "FORMAT.md").read_text()
    (line,) = re.findall(r'is "int8": (.+)', page)
    names = {"store": zarr.open_group(tmp_path, mode="r"), "a": 5, "b": 9}
    exec(f"values = {line.replace('layer_19', 'layer_3')}", names)
    with Store.open(tmp_path) as store:
        parts = [part.values(Site("resid", 3)).copy() for part in store.stream(Request(layers=(3,), windows=(5, 9)))]
    np.testing.assert_array_equal(names["values"], np.concatenate(parts))


@pytest.mark.parametrize("codec", CODECS)
def test_scipy_reads_a_shard_of_attention_as_documented(synthetic, tmp_path, codec):
    manifest = synthetic.make_manifest(codec=codec)
    corpus = synthetic.write_store(tmp_path, manifest)
    parts = zarr.open_group(tmp_path, mode="r")["attention/layer_2"]
    rows = manifest.shard_windows * manifest.attention.heads * manifest.context
    for shard in range(manifest.shards):
        start, stop = manifest.shard_range(shard)
        indptr = parts["indptr"][shard]
        n = int(indptr[-1])
        data, indices = parts["data"][shard, :n], parts["indices"][shard, :n]
        matrix = csr_matrix((data.astype(np.float32), indices, indptr), shape=(rows, manifest.context))
        expected = corpus.attention[2].slice(start, stop).dense().reshape(-1, manifest.context)
        np.testing.assert_array_equal(matrix.toarray()[: len(expected)], expected)
        assert matrix[len(expected) :].nnz == 0
        assert not parts["data"][shard, n:].any() and not parts["indices"][shard, n:].any()
    np.testing.assert_array_equal(parts["kept_mass"][:], corpus.attention[2].kept_mass)


def test_array_groups_and_root_open_without_the_inline_documents(synthetic, tmp_path):
    corpus = synthetic.write_store(tmp_path, synthetic.make_manifest())
    group = zarr.open_group(tmp_path, mode="r", use_consolidated=False)
    np.testing.assert_array_equal(group["tokens"][:], corpus.tokens)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "resid/layer_3", mode="r")[:], corpus.resid[3])


def test_unwritten_shards_read_as_not_a_number_in_zarr(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    synthetic.write_store(tmp_path, manifest, shards=[0])
    group = zarr.open_group(tmp_path, mode="r")
    bits = group["resid/layer_3"][4:]
    assert np.isnan((bits.astype(np.uint32) << 16).view(np.float32)).all()
    for name in ("data", "kept_mass"):
        assert np.isnan(group[f"attention/layer_2/{name}"][-1]).all(), name
    assert np.isnan(group["stats/layer_3"][1:]).all()
    assert (group["attention/layer_2/indptr"][1:] == 2**32 - 1).all()
    assert (group["attention/layer_2/indices"][1:] == 255).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unwritten_residuals_of_other_types_are_no_zeros_either(synthetic, tmp_path, dtype):
    synthetic.write_store(tmp_path, synthetic.make_manifest(dtype=dtype), shards=[1])
    assert np.isnan(zarr.open_group(tmp_path, mode="r")["resid/layer_3"][:4]).all()


def zarr_chunk(layout: ArrayLayout, chunk: np.ndarray) -> bytes:
    """The bytes that zarr itself writes for one chunk of an array."""
    store = zarr.storage.MemoryStore()
    document = layout.document() | {"shape": list(layout.chunks)}
    key, buffers = layout.chunk_key(0).removeprefix(f"{layout.path}/"), zarr.core.buffer.default_buffer_prototype()
    zarr.core.sync.sync(store.set("zarr.json", buffers.buffer.from_bytes(json.dumps(document).encode())))
    zarr.open_array(store, mode="r+")[:] = chunk
    found = zarr.core.sync.sync(store.get(key, buffers))
    assert found is not None
    return found.to_bytes()


def sample_chunk(layout: ArrayLayout, rng: np.random.Generator) -> np.ndarray:
    bits = rng.integers(0, 60, (int(np.prod(layout.chunks)), layout.dtype.itemsize), np.uint8)
    return np.ascontiguousarray(bits).view(layout.dtype).reshape(layout.chunks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", CODECS)
def test_chunks_are_those_that_zarr_writes(synthetic, rng, codec, dtype):
    """Byte for byte where nothing is compressed; where something is, each side decodes the other's."""
    for layout in arrays_of(synthetic.make_manifest(codec=codec, dtype=dtype)).values():
        chunk = sample_chunk(layout, rng)
        ours = b"".join(buffer.tobytes() for buffer in encode(layout, chunk))
        theirs = zarr_chunk(layout, chunk)
        if layout.codec == "raw":
            assert ours == theirs, layout.path
        out = np.empty(layout.chunks, layout.dtype)
        decode(layout, np.frombuffer(theirs, np.uint8), out, layout.path)
        assert out.tobytes() == chunk.tobytes(), layout.path


def test_our_chunks_are_decoded_by_zarr(synthetic, tmp_path):
    """All arrays of a compressed store through zarr's own codecs, against this package's reader."""
    manifest = synthetic.make_manifest(codec="zstd")
    synthetic.write_store(tmp_path, manifest)
    group, files = zarr.open_group(tmp_path, mode="r"), open_files(tmp_path)
    for path, layout in arrays_of(manifest).items():
        out = np.empty(layout.shape, layout.dtype)
        for read in plan_reads(layout, 0, layout.shape[0], out):
            read_chunk(files, layout, *read)
        np.testing.assert_array_equal(group[path][:], out, err_msg=path)


def test_documents_are_those_that_zarr_would_write(synthetic):
    """zarr reads each document and gives it back unchanged: no field is missing, superfluous or misspelt."""
    for layout in arrays_of(synthetic.make_manifest(codec="lz4")).values():
        document = layout.document()
        parsed = zarr.core.metadata.ArrayV3Metadata.from_dict(json.loads(json.dumps(document)))
        again = json.loads(parsed.to_buffer_dict(zarr.core.buffer.default_buffer_prototype())["zarr.json"].to_bytes())
        assert again == json.loads(json.dumps(document)), layout.path


@pytest.mark.parametrize("chunks", [1, 3, 22])
def test_arrays_cut_anew_by_another_tool_are_read_too(synthetic, tmp_path, chunks):
    """Somebody rewrites residuals with other chunks and another codec: only zarr can read them, so zarr does."""
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    rewrite_residuals(tmp_path, corpus.resid[3], chunks)
    request = Request(layers=(3,))
    with Store.open(tmp_path) as store:
        for span in store.spans(request):
            found = store.read(request, span).resid[3]
            np.testing.assert_array_equal(found, corpus.resid[3][span.start : span.stop])
        # Who reads a shard in parts takes whole chunks; of those that zarr reads, whole shards.
        assert store.chunk_windows(Site("resid", 3)) == manifest.shard_windows


def test_arrays_cut_anew_by_another_tool_are_left_as_they_are(synthetic, tmp_path):
    """Repair finds nothing to mend, and nobody writes shards that would be cut in another way."""
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest, shards=range(5))
    rewrite_residuals(tmp_path, corpus.resid[3], 3)
    assert drop_broken_derived(str(tmp_path)) == []
    with Store.open(tmp_path) as store:
        assert not any(report.damage for report in verify_shards(store))
    for write in (
        lambda: StoreWriter.open(tmp_path),
        lambda: StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents),
        lambda: repair(str(tmp_path), [0]),
    ):
        with pytest.raises(StoreMismatch, match="resid/layer_3 has chunks or codecs other than saemill's"):
            write()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_store_of_the_largest_chunks_is_gone_on_with_and_of_larger_ones_none_is_begun(synthetic, tmp_path, codec):
    """Tokens of 32 bytes a window; of the first store only the root is written, which says how it is cut."""
    assert layouts.MAX_CHUNK_BYTES <= blosc.MAX_BUFFERSIZE
    manifest = synthetic.make_manifest(attention=AttentionSpec(), codec=codec, shard_windows=2**26 - 1)
    (tmp_path / "zarr.json").write_bytes(layouts.encode_json(layouts.root_document(seal(manifest))))
    StoreWriter.open(tmp_path).close()
    larger = replace(manifest, shard_windows=2**26)
    with pytest.raises(ManifestInvalid, match="tokens: .* found 2.00 GiB, .* fewer windows than 67108864"):
        StoreWriter.create(tmp_path / "new", larger, *np.zeros((2, 22, 8), np.uint32))
    assert not (tmp_path / "new").exists()


def test_of_windows_that_are_too_large_each_by_itself_shorter_ones_are_asked_for(synthetic, tmp_path):
    """131,072 tokens of a width of 8,192 in bfloat16: 2 GiB, however few windows a shard has."""
    for shard_windows in (1, 4):
        manifest = synthetic.make_manifest(context=2**17, width=2**13, shard_windows=shard_windows)
        manifest = replace(manifest, attention=AttentionSpec(), layers=(3,))
        ids = np.broadcast_to(np.uint32(0), (22, 2**17))
        with pytest.raises(ManifestInvalid, match=r"2.00 GiB, a single window. Make windows shorter than 131072"):
            StoreWriter.create(tmp_path, manifest, ids, ids)


def rewrite_residuals(folder, values: np.ndarray, chunks: int) -> None:
    shutil.rmtree(folder / "resid/layer_3")
    root = json.loads((folder / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (folder / "zarr.json").write_text(json.dumps(root))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.open_group(folder, mode="r+")["resid"].create_array(
            "layer_3", shape=values.shape, dtype=values.dtype, chunks=(chunks, *values.shape[1:]), fill_value=0x7FFF
        )
    array[:] = values


def test_line_arrays_are_known_by_their_names(synthetic):
    manifest = synthetic.make_manifest()
    by_shape = {path for path, layout in arrays_of(manifest).items() if layout.shape[0] == manifest.shards}
    assert {path for path in arrays_of(manifest) if is_line(path)} == by_shape


def test_encoding_leaves_no_trace_of_the_thread_that_does_it(synthetic, rng):
    """A compressor that works in several threads may order its blocks by chance: bytes must not."""
    layout = arrays_of(synthetic.make_manifest(windows=4, context=128, width=2304, codec="zstd"))["resid/layer_3"]
    chunk = rng.normal(size=layout.chunks).astype(np.float32).view(np.uint32)
    chunk = (chunk >> 16).astype(np.uint16)
    here = {b"".join(part.tobytes() for part in encode(layout, chunk)) for _ in range(5)}
    with ThreadPoolExecutor(4) as pool:
        there = set(pool.map(lambda _: b"".join(part.tobytes() for part in encode(layout, chunk)), range(8)))
    assert len(here | there) == 1


def test_the_template_of_a_codec_is_read_by_zarr_and_by_us(synthetic, tmp_path, entry, monkeypatch):
    """CONTRIBUTING.md: a name and settings are all there is to it."""
    name, own = entry("cache_schema/layout.py", {})
    settings = {**layouts.BLOSC, name: own}
    for module in (layouts, manifests):
        monkeypatch.setattr(module, "Codec", Literal[(*get_args(Codec), name)])
    for module in (layouts, encode_and_read_chunks):
        monkeypatch.setattr(module, "BLOSC", settings)
    monkeypatch.setattr(strict_json, "_hints_of", strict_json._hints_of.__wrapped__)  # of the list before, where kept
    corpus = synthetic.write_store(tmp_path, synthetic.make_manifest(codec=name))
    np.testing.assert_array_equal(zarr.open_group(tmp_path, mode="r")["tokens"][:], corpus.tokens)
    with Store.open(tmp_path) as store:
        assert store.manifest.codec == name
        (arrays,) = store.stream(Request(tokens=True, windows=(0, 1)))
        np.testing.assert_array_equal(arrays.tokens, corpus.tokens[:1])
