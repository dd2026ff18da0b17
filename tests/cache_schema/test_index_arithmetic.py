"""Requests cut into spans and spans into chunks: held against counting window by window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema import Request, RequestInvalid, Span, Store
from saemill.cache_schema.encode_and_read_chunks import plan_reads
from saemill.cache_schema.layout import ArrayLayout, arrays_of, is_line
from saemill.cache_schema.requests_and_spans import spans_of


@st.composite
def manifests(draw: st.DrawFn, synthetic):
    windows = draw(st.integers(1, 40))
    first = draw(st.integers(0, windows))
    second = draw(st.integers(first, windows))
    return synthetic.make_manifest(
        windows=windows,
        shard_windows=draw(st.integers(1, 12)),
        splits={"train": (0, first), "validation": (first, second), "test": (second, windows)},
    )


@given(st.data())
def test_spans_cover_each_window_asked_for_once_and_in_order(synthetic, data):
    manifest = data.draw(manifests(synthetic))
    split = data.draw(st.sampled_from([None, "train", "validation", "test"]))
    first, last = (0, manifest.windows) if split is None else manifest.splits[split]
    windows = data.draw(st.none() | st.tuples(st.integers(0, last - first), st.integers(0, last - first)).map(sorted))
    wanted = list(range(first, last)) if windows is None else list(range(first, last))[windows[0] : windows[1]]
    request = Request(split=split, windows=None if windows is None else tuple(windows))
    spans = spans_of(manifest, request)
    assert [(window // manifest.shard_windows, window) for window in wanted] == [
        (span.shard, window) for span in spans for window in range(span.start, span.stop)
    ]
    assert len({span.shard for span in spans}) == len(spans)
    assert all(span.windows > 0 for span in spans)


@pytest.mark.parametrize("windows", [(-1, 2), (2, 1), (0, 6), (7, 9)])
def test_windows_outside_the_split_are_refused(synthetic, windows):
    manifest = synthetic.make_manifest(windows=10, splits={"train": (0, 2), "validation": (2, 7), "test": (7, 10)})
    with pytest.raises(RequestInvalid, match="expected windows within 0 to 5 of the validation split"):
        spans_of(manifest, Request(split="validation", windows=windows))


def layout_of(rows: int, chunk: int) -> ArrayLayout:
    return ArrayLayout("a", (rows, 2), (chunk, 2), np.dtype("<u4"), 0, "raw", ("row", "column"))


@given(rows=st.integers(1, 50), chunk=st.integers(1, 20), data=st.data())
def test_planned_reads_put_each_row_in_its_place(rows, chunk, data):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    whole = np.arange(-(-rows // chunk) * chunk)
    out = np.full((stop - start, 2), -1)
    chunks = []
    for index, first, part in plan_reads(layout_of(rows, chunk), start, stop, out):
        assert (part == -1).all(), "a row was planned twice"
        begin = index * chunk + first // 2
        part[:] = whole[begin : begin + len(part), None]
        chunks.append(index)
    np.testing.assert_array_equal(out[:, 0], np.arange(start, stop))
    assert chunks == sorted({row // chunk for row in range(start, stop)})


@given(st.data())
def test_shards_are_whole_chunks_of_every_array(synthetic, data):
    """No chunk belongs to two shards: two writers never touch the same file."""
    manifest = data.draw(manifests(synthetic))
    for layout in arrays_of(manifest).values():
        owners: dict[int, int] = {}
        for shard in range(manifest.shards):
            rows = (shard, shard + 1) if is_line(layout.path) else manifest.shard_range(shard)
            for row in range(*rows):
                assert owners.setdefault(row // layout.chunks[0], shard) == shard, layout.path


@given(shard_windows=st.integers(1, 600), width=st.integers(1, 4000), context=st.sampled_from([1, 16, 128, 1024]))
def test_chunks_divide_a_shard_and_stay_near_their_size(synthetic, shard_windows, width, context):
    manifest = synthetic.make_manifest(windows=601, shard_windows=shard_windows, width=width, context=context)
    layout = arrays_of(manifest)["resid/layer_3"]
    divisors = [n for n in range(1, shard_windows + 1) if shard_windows % n == 0]
    fitting = [n for n in divisors if n * context * width * 2 <= 16 * 2**20]
    assert layout.chunks[0] == max(fitting, default=1)


@pytest.mark.parametrize("span", [Span(0, 3, 5), Span(1, 3, 5), Span(5, 20, 24), Span(9, 36, 40), Span(-1, 0, 4)])
def test_a_span_that_is_none_of_the_store_is_refused(synthetic, tmp_path, span):
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    with Store.open(tmp_path) as store, pytest.raises(RequestInvalid, match="span"):
        store.read(Request(layers=(3,)), span)
