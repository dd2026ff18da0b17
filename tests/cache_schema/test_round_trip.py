"""What was written comes back, whatever the codec, type, cut and way of reading."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from saemill.cache_schema import (
    AttentionCsr,
    AttentionSpec,
    Request,
    ShardCorrupt,
    Span,
    Store,
    StoreWriter,
    encode_and_read_chunks,
    shard_memory,
    to_float32,
    writer,
)
from saemill.cache_schema.encode_and_read_chunks import BLOSC_HEADER_BYTES, CHECKSUM_BYTES, checksum_of, decode, encode
from saemill.cache_schema.layout import ArrayLayout
from saemill.cache_schema.manifest import Codec
from saemill.cache_schema.moments import measure

EVERYTHING = Request(layers=(3, 5), attention_layers=(2, 3), tokens=True, documents=True)
CODECS = get_args(Codec)


def collect(store: Store, request: Request) -> dict[str, np.ndarray]:
    """All that a request yields, joined; attention dense."""
    parts: dict[str, list[np.ndarray]] = {}
    for arrays in store.stream(request):
        for name in ("tokens", "documents"):
            parts.setdefault(name, []).append(getattr(arrays, name).copy())
        for layer, values in arrays.resid.items():
            parts.setdefault(f"resid {layer}", []).append(values.copy())
        for layer, csr in arrays.attention.items():
            parts.setdefault(f"attention {layer}", []).append(csr.dense())
            parts.setdefault(f"kept mass {layer}", []).append(csr.kept_mass.copy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def expect(manifest, corpus, start: int, stop: int) -> dict[str, np.ndarray]:
    attention = {layer: csr.dense()[start:stop] for layer, csr in corpus.attention.items()}
    return {
        "tokens": corpus.tokens[start:stop],
        "documents": corpus.documents[start:stop],
        **{f"resid {layer}": values[start:stop] for layer, values in corpus.resid.items()},
        **{f"attention {layer}": dense for layer, dense in attention.items()},
        **{f"kept mass {layer}": csr.kept_mass[start:stop] for layer, csr in corpus.attention.items()},
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("codec", "heads"), [*((codec, 2) for codec in CODECS), ("raw", 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_everything_comes_back(synthetic, small_chunks, tmp_path, codec, dtype, heads):
    manifest = synthetic.make_manifest(codec=codec, dtype=dtype, heads=heads)
    corpus = synthetic.write_store(tmp_path, manifest)
    for via_zarr in (False, True):
        with Store.open(tmp_path, via_zarr=via_zarr) as store:
            assert store.committed.all()
            assert_same(collect(store, EVERYTHING), expect(manifest, corpus, 0, manifest.windows))


@pytest.mark.parametrize("via_zarr", [False, True], ids=["direct", "via_zarr"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_splits_and_windows_cut_inside_shards(synthetic, small_chunks, tmp_path, split, via_zarr):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    first, last = manifest.splits[split]
    with Store.open(tmp_path, via_zarr=via_zarr) as store:
        request = Request(**{**vars(EVERYTHING), "split": split})
        assert_same(collect(store, request), expect(manifest, corpus, first, last))
        request = Request(**{**vars(EVERYTHING), "split": split, "windows": (1, last - first - 1)})
        assert_same(collect(store, request), expect(manifest, corpus, first + 1, last - 1))


def test_a_request_for_no_windows_reads_nothing(synthetic, tmp_path):
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    with Store.open(tmp_path) as store:
        assert list(store.stream(Request(layers=(3,), windows=(5, 5)))) == []


def test_wide_contexts_store_key_positions_in_sixteen_bits(synthetic, tmp_path):
    manifest = synthetic.make_manifest(windows=3, context=300)
    corpus = synthetic.write_store(tmp_path, manifest)
    with Store.open(tmp_path) as store:
        found = store.read(Request(attention_layers=(2,)), Span(0, 0, 3)).attention[2]
    assert found.indices.dtype == np.uint16
    np.testing.assert_array_equal(found.indices, corpus.attention[2].indices)


def test_contexts_beyond_sixteen_bits_store_key_positions_in_thirty_two(synthetic, tmp_path):
    """In sixteen bits position 69,000 would be 3,464."""
    context, layer, key = 70_000, 2, 69_000
    attention = AttentionSpec(layers=(layer,), topk=1)
    manifest = synthetic.make_manifest(windows=3, context=context, width=1, layers=(3,), attention=attention)
    ends = np.arange(1, 4) * context  # the last query of each window has a link
    csr = AttentionCsr(
        indptr=np.searchsorted(ends, np.arange(3 * context + 1), side="right").astype(np.uint32),
        indices=np.full(3, key, np.uint32),
        data=np.ones(3, np.float16),
        kept_mass=np.ones((3, 1, context), np.float16),
    )
    rng = np.random.default_rng(0)
    shape = (3, context)
    ids, resid = np.zeros(shape, np.uint32), {3: synthetic.make_resid(manifest, rng)}
    synthetic.write_store(tmp_path, manifest, synthetic.Corpus(ids, ids, resid, {layer: csr}))
    for via_zarr in (False, True):
        with Store.open(tmp_path, via_zarr=via_zarr) as store:
            found = store.read(Request(attention_layers=(layer,)), Span(0, 0, 3)).attention[layer]
        assert found.indices.dtype == np.uint32 and found.indices.tolist() == [key] * 3


def test_chunks_of_tokens_are_queued_a_few_at_a_time(synthetic, tmp_path, monkeypatch):
    """Each takes two kilobytes while it waits: a million would take as much as a model."""
    queued, write_chunks = [], StoreWriter._write_chunks
    monkeypatch.setattr(writer, "QUEUED", 4)
    monkeypatch.setattr(
        StoreWriter, "_write_chunks", lambda self, tasks: queued.append(tasks) or write_chunks(self, tasks)
    )
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents):
        pass
    assert [len(tasks) for tasks in queued] == [4, 2, 4, 2]
    with Store.open(tmp_path) as store:
        parts = [store.beginning(shard) for shard in range(manifest.shards)]
    for found, wanted in zip(zip(*parts, strict=True), (corpus.tokens, corpus.documents), strict=True):
        np.testing.assert_array_equal(np.concatenate(found), wanted)


def test_buffers_are_filled_in_place_and_used_again(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    with Store.open(tmp_path) as store:
        out = shard_memory(manifest, EVERYTHING)
        for span in reversed(store.spans(EVERYTHING)):  # the half full shard first: what it left must not be seen
            arrays = store.read(EVERYTHING, span, out)
            np.testing.assert_array_equal(arrays.resid[3], corpus.resid[3][span.start : span.stop])
            np.testing.assert_array_equal(
                arrays.attention[2].dense(), corpus.attention[2].slice(span.start, span.stop).dense()
            )
            assert np.shares_memory(arrays.resid[3], out["resid/layer_3"])
            assert np.shares_memory(arrays.tokens, out["tokens"])


@pytest.mark.parametrize("in_flight", [0, 1, 2, 5, 50])
def test_stream_keeps_the_given_order_whatever_it_reads_ahead(synthetic, tmp_path, in_flight):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    request = Request(layers=(3,))
    with Store.open(tmp_path) as store:
        order = [store.spans(request)[shard] for shard in (4, 0, 5, 2, 2, 1)]
        seen = []
        for arrays in store.stream(request, order, in_flight):
            seen.append(arrays.span)
            np.testing.assert_array_equal(arrays.resid[3], corpus.resid[3][arrays.span.start : arrays.span.stop])
        assert seen == order


def test_stream_holds_no_more_memory_than_is_in_flight(synthetic, tmp_path, monkeypatch):
    manifest = synthetic.make_manifest(windows=100)
    synthetic.write_store(tmp_path, manifest)
    made = []

    def counted(*args):
        made.append(shard_memory(*args))
        return made[-1]

    monkeypatch.setattr("saemill.cache_schema.reader.shard_memory", counted)
    with Store.open(tmp_path) as store:
        assert sum(1 for _ in store.stream(EVERYTHING, in_flight=2)) == 25
    assert len(made) == 3


def test_a_stream_that_is_dropped_leaves_nothing_in_flight(synthetic, tmp_path):
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    with Store.open(tmp_path) as store:
        stream = store.stream(EVERYTHING)
        next(stream)
        stream.close()
        assert next(store.stream(EVERYTHING)).span == Span(0, 0, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_moments_of_the_store_are_those_of_all_its_tokens(synthetic, tmp_path, dtype):
    manifest = synthetic.make_manifest(dtype=dtype)
    corpus = synthetic.write_store(tmp_path, manifest)
    x_WTD = to_float32(corpus.resid[3], dtype).astype(np.float64)
    kept = x_WTD[corpus.tokens != synthetic.SPECIAL]
    with Store.open(tmp_path) as store:
        moments = store.moments(3)
    assert moments.count == len(kept)
    np.testing.assert_allclose(moments.mean, kept.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.rms_norm, np.sqrt((kept**2).sum(axis=1).mean()), rtol=1e-12)
    np.testing.assert_allclose(moments.mean_norm, np.linalg.norm(kept, axis=1).mean(), rtol=1e-12)
    np.testing.assert_allclose(moments.norm_by_position, np.linalg.norm(x_WTD, axis=2).mean(axis=0), rtol=1e-12)
    centred = kept - kept.mean(axis=0)
    np.testing.assert_allclose(moments.total_variance, (centred**2).sum(axis=1).mean(), rtol=1e-10)


def test_moments_are_the_same_bits_without_the_summary(synthetic, tmp_path):
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    with Store.open(tmp_path) as store:
        summarised = store.moments(5)
    (tmp_path / "stats/summary.json").unlink()
    with Store.open(tmp_path) as store:
        merged = store.moments(5)
    for name in vars(merged):
        np.testing.assert_array_equal(getattr(merged, name), getattr(summarised, name), err_msg=name)


def test_the_summary_is_read_once_for_all_layers(synthetic, tmp_path, monkeypatch):
    """With that of 80 layers, read for each of them, a run would begin two minutes late."""
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    with Store.open(tmp_path) as store:
        asked, read = [], store.files.read
        monkeypatch.setattr(store.files, "read", lambda key: asked.append(key) or read(key))
        for layer in (3, 5, 3):
            store.moments(layer)
    assert asked == ["stats/summary.json"]


def test_measure_ignores_special_tokens_only_where_it_says():
    resid = np.ones((1, 2, 4), np.float32)
    resid[0, 1] = 100
    found = measure(resid, np.array([[False, True]]))
    assert (found.count, found.mean_norm, found.windows) == (1, 2.0, 1)
    np.testing.assert_array_equal(found.norm_by_position, [2.0, 200.0])


def chunk_of(codec: Codec, count: int = 1_200_000) -> tuple[ArrayLayout, np.ndarray, np.ndarray]:
    """A line of several blocks, of which the last is shorter, and the bytes of its chunk."""
    layout = ArrayLayout("line", (1, count), (1, count), np.dtype("<u2"), 0, codec, ("shard", "entry"))
    values = (np.arange(count) // 7).astype("<u2")
    return layout, values, np.concatenate([part.view(np.uint8) for part in encode(layout, values[None])])


@pytest.mark.parametrize("codec", CODECS)
def test_a_part_of_a_chunk_is_that_part_of_the_whole_and_little_more_is_decompressed(codec, monkeypatch):
    layout, values, stored = chunk_of(codec)
    count, decompressed = len(values), []

    class Blosc:
        @staticmethod
        def decompress(frame, out, decompress=encode_and_read_chunks.blosc.decompress):
            decompressed.append(out.nbytes)
            decompress(frame, out)

    monkeypatch.setattr(encode_and_read_chunks, "blosc", Blosc)
    edge = 2**18  # values in a block of zstd
    ends = [
        (0, 0),
        (0, 1),
        (5, 900),
        (edge - 1, edge + 1),
        (edge, 2 * edge),
        (count - 3, count),
        (1, count),
        (0, count),
    ]
    for first, last in ends:
        out = np.empty(last - first, "<u2")
        decode(layout, stored, out, "here", first)
        np.testing.assert_array_equal(out, values[first:last])
    assert codec == "raw" or max(decompressed[:-2]) <= 2 * 2**19 < values.nbytes // 2


def test_blocks_that_threads_wrote_in_any_order_are_found():
    layout, values, stored = chunk_of("zstd")
    body = stored[:-CHECKSUM_BYTES]
    listed = BLOSC_HEADER_BYTES + 4 * -(-values.nbytes // 2**19)
    starts = body[BLOSC_HEADER_BYTES:listed].view("<u4")
    order = np.argsort(starts)
    ends = np.append(starts[order][1:], len(body))
    blocks = [body[start:end] for start, end in zip(starts[order], ends, strict=True)]
    places = np.empty(len(blocks), "<u4")
    places[order[::-1]] = listed + np.cumsum([0, *map(len, blocks[:0:-1])])
    turned = np.concatenate([body[:BLOSC_HEADER_BYTES], places.view(np.uint8), *blocks[::-1]])
    out = np.empty(600_000, "<u2")
    decode(layout, np.concatenate([turned, checksum_of(turned)]), out, "here", 300_000)
    np.testing.assert_array_equal(out, values[300_000:900_000])


def test_a_part_of_a_chunk_that_breaks_its_rules_behind_a_right_checksum_is_no_crash():
    layout, _, stored = chunk_of("zstd")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        body = stored[:-CHECKSUM_BYTES].copy()
        body[rng.integers(0, 40, 3)] = rng.integers(0, 256, 3)  # of the header, and of where blocks begin
        try:
            decode(layout, np.concatenate([body, checksum_of(body)]), np.empty(700_000, "<u2"), "here", 400_000)
        except ShardCorrupt:
            refused += 1
    assert refused > 30


def test_of_a_shards_attention_only_the_part_of_a_span_is_decoded(synthetic, tmp_path, monkeypatch):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    decoded = {}

    def spy(layout, stored, out, where, first=0):
        decoded[layout.path.rpartition("/")[2]] = out.size
        decode(layout, stored, out, where, first)

    monkeypatch.setattr(encode_and_read_chunks, "decode", spy)
    with Store.open(tmp_path) as store:
        found = store.read(Request(attention_layers=(2,)), Span(1, 5, 7)).attention[2]
    expected = corpus.attention[2].slice(5, 7)
    np.testing.assert_array_equal(found.dense(), expected.dense())
    rows = 2 * manifest.attention.heads * manifest.context
    assert decoded == {"indptr": rows + 1, "indices": expected.entries, "data": expected.entries, "kept_mass": rows}
