"""Three of ten thousand rows, a hundred and fifty times as long as the others: found, counted, left out of moments."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from saemill.cache_schema import Span, Store, from_float32, layout, massive_activations, to_float32
from saemill.cache_schema.cli import main
from saemill.cache_schema.info import describe, render
from saemill.cache_schema.massive_activations import (
    count_ordinary,
    default_multiple,
    is_massive,
    measure_massive,
    row_norms,
)
from saemill.cache_schema.sites import key_of, place_of

PLANTED = ((3, 7), (700, 0), (1249, 5))


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import 10,000 rows; a function, so that a test can add options."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1250, 8, 16)).astype(np.float32) + 0.5
    for place in PLANTED:
        rows[place] *= 150
    np.save(tmp_path / "rows.npy", rows)

    def make(*options):
        words = ["import", tmp_path / "store", "--resid", tmp_path / "rows.npy", "--layer", 4, "--model", "m"]
        words += ["--shard-windows", 256, *options]
        result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return tmp_path / "store", rows

    return make


def test_massive_rows_are_counted_and_moments_are_of_the_others(imported):
    url, rows = imported()
    with Store.open(url) as store:
        found = measure_massive(store, 4, 10.0)
    mask = np.zeros(rows.shape[:2], bool)
    mask[tuple(np.array(PLANTED).T)] = True
    others = rows[~mask].astype(np.float64)
    squares = np.square(rows.astype(np.float64)).sum(-1)
    assert (found.rows, found.massive, found.shards) == (10_000, 3, 5)
    assert found.median == pytest.approx(np.median(np.sqrt(squares)), rel=1e-6)
    assert found.square_share == pytest.approx(squares[mask].sum() / squares.sum(), rel=1e-6)
    assert found.ordinary.count == 9_997
    np.testing.assert_allclose(found.ordinary.mean, others.mean(0), rtol=1e-6)
    assert found.ordinary.mean_norm == pytest.approx(np.sqrt(squares[~mask]).mean(), rel=1e-6)
    assert found.ordinary.total_variance == pytest.approx(np.square(others - others.mean(0)).sum(-1).mean(), rel=1e-5)


def test_the_norm_of_a_row_is_computed_once(imported, monkeypatch):
    """Though the mean of the others takes a second read: every start measures every layer."""
    norms, counted = massive_activations.row_norms, []
    monkeypatch.setattr(
        massive_activations, "row_norms", lambda rows, *more: counted.append(rows[..., 0].size) or norms(rows, *more)
    )
    url, _ = imported()
    with Store.open(url) as store:
        measure_massive(store, 4, 10.0)
    assert sum(counted) == 10_000


def test_special_tokens_are_no_rows(imported, tmp_path):
    tokens = np.zeros((1250, 8), np.int64)
    tokens[:, 0] = 7
    np.save(tmp_path / "tokens.npy", tokens)
    url, _ = imported("--tokens", tmp_path / "tokens.npy", "--special-token", 7)
    with Store.open(url) as store:
        found = measure_massive(store, 4, 10.0)
        ordinary = count_ordinary(store, {}, "validation", 1, enough=100), count_ordinary(store, {}, "train", 500, 2)
    assert (found.rows, found.massive) == (8_750, 2)
    assert ordinary[0] == 7 and ordinary[1] >= 2


def test_two_held_out_tokens_are_found_without_a_whole_shard(imported, monkeypatch):
    """Two tokens were wanted of two layers, and 302 MB were read."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4 * 8 * 16 * 4)
    url, _ = imported()
    begin, seen = Store._begin, []
    monkeypatch.setattr(
        Store, "_begin", lambda store, asked, span, *more: seen.append(span) or begin(store, asked, span, *more)
    )
    with Store.open(url) as store:
        assert count_ordinary(store, {4: 1e9}, "train", 500, enough=2) == 4 * 8
        assert [(span.start, span.stop) for span in seen] == [(0, 4), (4, 8)]  # one, and the next meanwhile
        assert count_ordinary(store, {4: 1e9}, "train", 500, enough=10**6) == 500 * 8


def test_info_tells_both_numbers(imported):
    url, _ = imported()
    facts = json.loads(CliRunner().invoke(main, ["info", str(url), "--json"]).output)["massive_rows"]["4"]
    assert (facts["tokens"], facts["massive"], facts["left_out"]) == (10_000, 3, True)
    assert facts["rms_norm"] > 1.5 * facts["rms_norm_of_others"]
    said = CliRunner().invoke(main, ["info", str(url)], env={"COLUMNS": "200"}).output
    assert "norm beyond 10 times the median" in said and "3 (0.030%)" in said


def test_info_counts_them_in_every_place_where_training_leaves_them_out():
    with Store.open(Path(__file__).parent.parent / "golden/store_hooks") as store:
        facts = describe(store)
        places = [key_of(place_of(*site)) for site in store.manifest.sites]
    assert list(facts["massive_rows"]) == places and {"1", "mlp_in/layer_0", "mlp_out/layer_1"} < {*places}
    assert all(facts["massive_rows"][place]["tokens"] for place in places)
    page = io.StringIO()
    Console(file=page, width=200).print(render(facts))
    assert "mlp_out/layer_1 " in page.getvalue().partition("Massive rows")[2]


def test_info_reads_each_shard_of_a_layer_once(imported, monkeypatch):
    url, _ = imported()
    begin, seen = Store._begin, []
    monkeypatch.setattr(
        Store, "_begin", lambda store, asked, span, *more: seen.append(span) or begin(store, asked, span, *more)
    )
    with Store.open(url) as store:
        describe(store)
        assert seen == [Span(shard, *store.manifest.shard_range(shard)) for shard in range(5)]


def test_an_import_can_ask_that_every_row_counts(imported):
    url, _ = imported("--keep-massive")
    with Store.open(url) as store:
        assert default_multiple(store.manifest) is None
    assert (
        "trained on, as the import asked" in CliRunner().invoke(main, ["info", str(url)], env={"COLUMNS": "120"}).output
    )


def test_a_large_store_is_looked_at_in_shards_spread_over_it(imported, monkeypatch):
    url, _ = imported()
    monkeypatch.setattr(massive_activations, "SAMPLE_BYTES", 3 * 256 * 8 * 16 * 4 + 1)
    with Store.open(url) as store:
        spans = massive_activations.sample(store.manifest, 4, store.committed)
        found = measure_massive(store, 4, 10.0)
    assert [span.shard for span in spans] == [0, 2, 4]
    assert (found.shards, found.shards_in_store, found.massive, found.rows) == (3, 5, 3, 738 * 8)
    assert "in 3 of 5 shards" in str(found)


@pytest.mark.parametrize("windows", [100, 2 * 256, 3 * 256 - 1])
def test_where_few_whole_shards_fit_parts_from_all_over_the_store_are_read(imported, monkeypatch, windows):
    """Shards of 1.2 GB, and a corpus in the order of its sources: the first shard is not like the others."""
    window = 8 * 16 * 4
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2 * window)
    monkeypatch.setattr(massive_activations, "SAMPLE_BYTES", windows * window)
    url, _ = imported()
    with Store.open(url) as store:
        spans = massive_activations.sample(store.manifest, 4, store.committed)
        found = measure_massive(store, 4, 10.0)
        first = massive_activations.sample(store.manifest, 4, np.arange(5) == 0)
    read = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    assert len(spans) == massive_activations.PARTS and windows / 2 < len(read) <= windows
    assert np.diff(read).max() < 1250 / 25 and read[0] == 0 and read[-1] == 1249
    assert {span.start % 2 for span in spans} == {0}, "chunks are read whole"
    assert (found.rows, found.shards) == (8 * len(read), 5) and "in parts of 5 of 5 shards" in str(found)
    whole = [Span(0, 0, 256)]
    assert first == whole if windows >= 256 else {span.shard for span in first} == {0} and len(first) == 32


def test_info_looks_at_a_part_of_a_large_store_and_says_so(imported, monkeypatch):
    """At the end of a harvest too: a gigabyte of each layer would take longer than anything it tells."""
    url, _ = imported()
    window = 8 * 16 * 4
    for windows, told in [(20, "; in 20 windows"), (600, "; in 600 windows"), (1100, "; in 994 windows")]:
        monkeypatch.setattr(massive_activations, "FEW_BYTES", windows * window)
        with Store.open(url) as store:
            spans = massive_activations.sample_few(store.manifest, 4, store.committed)
            facts = describe(store)
        assert [span.shard for span in spans] == [0, 1, 3, 4]
        row = facts["massive_rows"]["4"]
        assert row["windows"] == min(windows, 3 * 256 + 226) and row["tokens"] == 8 * row["windows"]
        said = CliRunner().invoke(main, ["info", str(url)], env={"COLUMNS": "200"}).output
        assert f"times the median{told} of 4 shards" in " ".join(said.split())


def test_damaged_shards_leave_the_rest_of_info(imported):
    url, _ = imported()
    chunk = next((url / "resid/layer_4").glob("c.0.*"))
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    result = CliRunner().invoke(main, ["info", str(url), "--json"], catch_exceptions=False)
    assert json.loads(result.output)["massive_rows"] == {"4": None}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_norms_are_those_of_the_values(rng, dtype):
    stored = from_float32(rng.standard_normal((3, 700, 24)).astype(np.float32), dtype)
    expected = np.linalg.norm(to_float32(stored, dtype).astype(np.float64), axis=-1)
    np.testing.assert_allclose(row_norms(stored, dtype), expected, rtol=1e-6)


def test_what_is_no_number_is_not_hidden_as_massive():
    assert is_massive(np.array([1.0, 99.0, np.inf, np.nan]), 10.0).tolist() == [False, True, False, False]
