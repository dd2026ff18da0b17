"""Damage of every kind: each ends in one named error that says what to do, and loses nothing else."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from saemill.cache_schema import (
    ChunkMissing,
    CorpusSpec,
    CsrInvalid,
    FormatTooNew,
    ManifestInvalid,
    Moments,
    Request,
    RequestInvalid,
    ShardCorrupt,
    ShardInvalid,
    Site,
    Span,
    Store,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreMismatch,
    StoreMissing,
    StoreUnfinished,
    StoreUnreachable,
    StoreWriter,
    verify_and_repair,
)
from saemill.cache_schema.cli import main
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.cache_schema.encode_and_read_chunks import decode, encode
from saemill.cache_schema.layout import BEGINNING, arrays_of, attention_path, record_key
from saemill.cache_schema.manifest import FORMAT
from saemill.cache_schema.requests_and_spans import spans_of
from saemill.cache_schema.shard_claims import open_claims

EVERYTHING = Request(layers=(3, 5), attention_layers=(2, 3), tokens=True, documents=True)
HURT = 2  # the shard that is damaged; all others must stay readable
ARRAYS = (
    "tokens",
    "documents",
    "resid/layer_3",
    "attention/layer_2/indptr",
    "attention/layer_2/indices",
    "attention/layer_2/data",
    "attention/layer_2/kept_mass",
)


@pytest.fixture(scope="module")
def written(synthetic, tmp_path_factory) -> Callable[[str], tuple[Path, Any]]:
    """From a codec to a finished store in a folder, and its manifest."""

    @cache
    def write(codec: str) -> tuple[Path, Any]:
        folder, manifest = tmp_path_factory.mktemp("written") / "store", synthetic.make_manifest(codec=codec)
        synthetic.write_store(folder, manifest)
        return folder, manifest

    return write


@pytest.fixture
def finished(request, written, tmp_path):
    """A copy of one, and its manifest."""
    folder, manifest = written(getattr(request, "param", "raw"))
    return shutil.copytree(folder, tmp_path / "store"), manifest


in_both_codecs = pytest.mark.parametrize("finished", ["raw", "zstd"], indirect=True)


def chunk_of(folder: Path, manifest, path: str) -> Path:
    return folder / arrays_of(manifest)[path].chunk_key(HURT)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGE: dict[str, tuple[Callable[[Path], None], type[StoreError]]] = {
    "first byte flipped": (lambda file: flip(file, 0), ShardCorrupt),
    "a byte in the middle flipped": (lambda file: flip(file, file.stat().st_size // 2), ShardCorrupt),
    "last byte flipped": (lambda file: flip(file, -1), ShardCorrupt),
    "last byte lost": (lambda file: truncate(file, file.stat().st_size - 1), ShardCorrupt),
    "half of it lost": (lambda file: truncate(file, file.stat().st_size // 2), ShardCorrupt),
    "all but three bytes lost": (lambda file: truncate(file, 3), ShardCorrupt),
    "empty": (lambda file: truncate(file, 0), ShardCorrupt),
    "one byte too many": (lambda file: file.write_bytes(file.read_bytes() + b"\0"), ShardCorrupt),
    "missing": (lambda file: file.unlink(), ChunkMissing),
}


@in_both_codecs
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_chunks_are_named_and_the_other_shards_stay(finished, damage):
    folder, manifest = finished
    hurt, error = DAMAGE[damage]
    for path in ARRAYS:
        chunk = chunk_of(folder, manifest, path)
        whole = chunk.read_bytes()
        hurt(chunk)
        require_named(folder, path, error)
        chunk.write_bytes(whole)
    with Store.open(folder) as store:
        assert sum(1 for _ in store.stream(EVERYTHING)) == manifest.shards


def require_named(folder: Path, path: str, error: type[StoreError]) -> None:
    """Reading fails at the hurt shard alone; the message has the place and the remedy."""
    with Store.open(folder) as store:
        for span in store.spans(EVERYTHING):
            if span.shard != HURT:
                store.read(EVERYTHING, span)
                continue
            with pytest.raises(ShardCorrupt) as caught:
                store.read(EVERYTHING, span)
            assert type(caught.value) is error
            remedy = "restore their files" if path in BEGINNING else "sae-store repair"
            for word in (f"shard {HURT}", path, "sae-store verify", remedy):
                assert word in str(caught.value)


@in_both_codecs
@pytest.mark.parametrize("damage", ["a byte in the middle flipped", "half of it lost", "missing"])
def test_the_slow_way_finds_the_same_damage(finished, damage):
    folder, manifest = finished
    hurt, error = DAMAGE[damage]
    hurt(chunk_of(folder, manifest, "resid/layer_3"))
    span = Span(HURT, *manifest.shard_range(HURT))
    with Store.open(folder, via_zarr=True) as store, pytest.raises(error, match=f"shard {HURT}, array resid/layer_3"):
        store.read(Request(layers=(3,)), span)


@in_both_codecs
def test_verify_and_repair_handle_exactly_what_is_damaged(finished):
    folder, manifest = finished
    flip(chunk_of(folder, manifest, "resid/layer_5"), 7)
    flip(chunk_of(folder, manifest, "stats/layer_3"), 7)
    found = CliRunner().invoke(main, ["verify", str(folder)])
    assert found.exit_code == 1
    assert f"damaged: shard {HURT} (1 of {manifest.shards})" in found.output
    assert "resid/layer_5" in found.output and "stats/layer_3" in found.output
    mended = CliRunner().invoke(main, ["repair", str(folder), "--remove-only"])
    assert mended.exit_code == 0, mended.output
    with Store.open(folder) as store:
        assert np.flatnonzero(~store.committed).tolist() == [HURT]
    assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 0


def test_verify_finds_sums_that_are_not_of_the_values(finished):
    """What `info` tells of attention is added up from the records alone."""
    folder, _ = finished
    path = folder / record_key(HURT)
    record = json.loads(path.read_text())
    layer, sums = next(iter(record["attention"].items()))
    sums["entries"] += 1
    path.write_text(json.dumps(record))
    found = CliRunner().invoke(main, ["verify", str(folder)])
    assert found.exit_code == 1
    assert f"shard {HURT}: attention/layer_{layer}: expected " in found.output


def test_a_damaged_line_of_moments_is_named(finished):
    folder, manifest = finished
    flip(chunk_of(folder, manifest, "stats/layer_3"), 9)
    (folder / "stats/summary.json").unlink()
    with Store.open(folder) as store, pytest.raises(ShardCorrupt, match=f"shard {HURT}, array stats/layer_3"):
        store.moments(3)


def rewrite(folder: Path, manifest, path: str, change: Callable[[np.ndarray], None]) -> None:
    """Change values of the hurt shard and write the chunk with a right checksum."""
    layout = arrays_of(manifest)[path]
    file = folder / layout.chunk_key(HURT)
    values = np.empty(layout.chunks, layout.dtype)
    decode(layout, np.frombuffer(file.read_bytes(), np.uint8), values, path)
    change(values)
    file.write_bytes(b"".join(buffer.tobytes() for buffer in encode(layout, values)))


def widest_row(indptr: np.ndarray) -> int:
    return int(np.argmax(np.diff(indptr[0].astype(np.int64))))


def decrease(indptr: np.ndarray) -> None:
    row = widest_row(indptr)
    indptr[0, row], indptr[0, row + 1] = indptr[0, row + 1], indptr[0, row]


CSR_DAMAGE: dict[str, tuple[str, Callable[[np.ndarray], None], str]] = {
    "indptr decreases": ("indptr", decrease, "decrease"),
    "indptr has a hole": ("indptr", lambda p: np.add(p, 9, out=p, where=np.arange(p.size) > 20), "gap"),
    "indptr has a hole in front": ("indptr", lambda p: np.add(p, 1, out=p), "gap at the start"),
    "indptr points behind the line": ("indptr", lambda p: p.__setitem__((0, slice(30, None)), 2**31), "entries"),
    "indptr was never written": ("indptr", lambda p: p.fill(2**32 - 1), "gap"),
    "a position outside the window": ("indices", lambda i: i.__setitem__((0, 5), 200), "outside the window"),
    "positions do not rise": ("indices", lambda i: i.fill(0), "do not rise"),
    "a position after its query": ("indices", lambda i: np.subtract(7, i, out=i), "rise|later position"),
    "a mass of NaN": ("kept_mass", lambda m: m.__setitem__((1, 0, 3), np.nan), "kept mass of row 19 is not a number"),
    "an endless mass": ("kept_mass", lambda m: m.__setitem__((0, 1, 0), np.inf), "kept mass of row 8 is not a number"),
}


@pytest.mark.parametrize("damage", CSR_DAMAGE)
def test_rows_that_break_a_rule_are_found_behind_right_checksums(finished, damage):
    folder, manifest = finished
    part, change, words = CSR_DAMAGE[damage]
    rewrite(folder, manifest, attention_path(2, part), change)
    request, span = Request(attention_layers=(2,)), Span(HURT, *manifest.shard_range(HURT))
    with Store.open(folder) as store, pytest.raises(CsrInvalid, match=words) as caught:
        store.read(request, span)
    for word in (f"shard {HURT}", "attention/layer_2", "sae-store repair"):
        assert word in str(caught.value)
    with Store.open(folder) as store:
        assert [report.shard for report in verify_and_repair.verify_shards(store) if report.damage] == [HURT]


def edit(file: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def settings(root: dict) -> dict:
    return root["attributes"]["saemill"]


def test_a_root_from_the_future_is_refused_whatever_else_it_says(finished):
    folder, _ = finished
    edit(folder / "zarr.json", lambda root: settings(root).update(format=FORMAT + 1, novelty=1))
    with pytest.raises(FormatTooNew, match="Update saemill"):
        Store.open(folder)


RECORDS = ["commits/00002.json", "commits/index.json", "stats/summary.json", "stats/counts.json"]


@pytest.mark.parametrize("name", RECORDS)
def test_records_from_the_future_are_refused(finished, name):
    folder, _ = finished
    edit(folder / name, lambda record: record.update(format=FORMAT + 1, novelty=1))
    with pytest.raises(FormatTooNew, match="Update saemill"), Store.open(folder) as store:
        store.record(2)
        store.moments(3)
        store.counts("train")


@pytest.mark.parametrize("change", [{"cache_id": "0" * 32}, {"context": 9}, {"layers": [3]}])
def test_a_root_edited_by_hand_is_refused(finished, change):
    folder, _ = finished
    edit(folder / "zarr.json", lambda root: settings(root).update(change))
    with pytest.raises(ManifestInvalid, match="cache id"):
        Store.open(folder)


def test_a_record_of_another_store_is_refused(finished):
    folder, _ = finished
    edit(folder / "commits/00002.json", lambda record: record.update(cache_id="0" * 32))
    with Store.open(folder) as store, pytest.raises(ManifestInvalid, match="another store.*repair"):
        store.record(2)


def test_a_record_under_another_name_is_refused(finished):
    folder, _ = finished
    shutil.copy(folder / "commits/00001.json", folder / "commits/00002.json")
    with Store.open(folder) as store, pytest.raises(ManifestInvalid, match="expected shard 2.*found shard 1"):
        store.record(2)


@pytest.mark.parametrize("ranges", [[[0, 7]], [[-1, 2]], [[3, 2]], [[0, 3], [2, 5]], [[2, 3], [0, 1]], [[2, 2]]])
def test_an_index_with_ranges_outside_the_store_is_refused(finished, ranges):
    folder, _ = finished
    edit(folder / "commits/index.json", lambda index: index.update(committed=ranges))
    with pytest.raises(ManifestInvalid, match="can be deleted"):
        Store.open(folder)
    assert CliRunner().invoke(main, ["repair", str(folder)]).exit_code == 0
    with Store.open(folder) as store:
        assert store.committed.all()


@pytest.mark.parametrize("name", ["mean", "norm_by_position"])
def test_a_summary_of_other_lengths_is_refused(finished, name):
    folder, _ = finished
    edit(folder / "stats/summary.json", lambda summary: summary["resid"]["3"][name].pop())
    with Store.open(folder) as store, pytest.raises(ManifestInvalid, match="can be deleted"):
        store.moments(3)


def test_a_lost_index_and_summary_are_made_again(finished, synthetic):
    folder, _ = finished
    expected = synthetic.tree_of(folder)
    for name in ("commits/index.json", "stats/summary.json"):
        (folder / name).unlink()
    with Store.open(folder) as store:
        assert store.committed.all()
    with StoreWriter.open(folder):
        pass
    assert synthetic.tree_of(folder) == expected


def test_no_store_is_a_named_error(tmp_path):
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StoreMissing, match=r"no store at .*harvest"):
            Store.open(place)
    with pytest.raises(StoreMissing):
        StoreWriter.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreMissing):
        Store.open(tmp_path / "file")


def test_another_cache_id_than_expected_is_refused(finished):
    folder, _ = finished
    with pytest.raises(StoreMismatch, match="expected the store with cache id 123"):
        Store.open(folder, expect_cache_id="123")


REPLACEMENTS = {  # each has files of the same names
    "text": {"corpus": CorpusSpec("others")},
    "dtype": {"dtype": "float32"},
    "shards": {"shard_windows": 8},
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_store_that_was_replaced_while_it_was_read_is_refused(synthetic, finished, tmp_path, how):
    """As a link to the newest store is moved on to the next."""
    folder, _ = finished
    synthetic.write_store(tmp_path / "other", synthetic.make_manifest(**REPLACEMENTS[how]))
    link = tmp_path / "newest"
    link.symlink_to(folder)
    with Store.open(link) as store:
        parts = store.stream(EVERYTHING, in_flight=1)
        next(parts)
        (tmp_path / "next").symlink_to(tmp_path / "other")
        os.replace(tmp_path / "next", link)
        with pytest.raises(StoreMismatch, match=f"was replaced .* expected cache id {store.manifest.cache_id}"):
            next(parts)


def test_a_store_that_was_moved_while_it_was_read_is_called_neither_damaged_nor_unfinished(finished):
    folder, manifest = finished
    with Store.open(folder) as store:
        folder.rename(folder.with_name("moved"))
        with pytest.raises(StoreMissing, match="removed or moved while it was being read"):
            store.read(EVERYTHING, Span(0, *manifest.shard_range(0)))


def test_what_writers_and_repairs_change_leaves_the_store_the_same(synthetic, finished):
    folder, manifest = finished
    with Store.open(folder) as store:
        verify_and_repair.repair(str(folder), [HURT])
        root = folder / "zarr.json"
        document = json.loads(root.read_text())
        del document["consolidated_metadata"]  # another tool's way to write the same
        root.write_text(json.dumps(document))
        kept = [span for span in spans_of(manifest, EVERYTHING) if span.shard != HURT]
        assert len(list(store.stream(EVERYTHING, kept))) == len(kept)
        with StoreWriter.open(folder) as writer:
            synthetic.write_pending(writer, synthetic.make_corpus(manifest))
        assert len(list(store.stream(EVERYTHING))) == manifest.shards


def test_requests_list_all_that_is_not_there(finished):
    folder, _ = finished
    with Store.open(folder) as store, pytest.raises(RequestInvalid) as caught:
        store.spans(Request(layers=(3, 4), attention_layers=(7,), split="trian"))
    for word in (
        "layer 4 (it has layers 3, 5)",
        "layer 7 (it has layers 2, 3)",
        "did you mean 'train'",
        "another --out",
    ):
        assert word in str(caught.value)
    with Store.open(folder) as store, pytest.raises(RequestInvalid, match=r"a hook 'mlp' \(did you mean .*\?\)$"):
        store.spans(Request(hooks={"mlp": (3,)}))


def test_what_has_no_record_does_not_exist_although_its_chunks_lie_there(finished):
    folder, manifest = finished
    (folder / "commits/00002.json").unlink()
    (folder / "commits/index.json").unlink()
    span = Span(HURT, *manifest.shard_range(HURT))
    with Store.open(folder) as store:
        with pytest.raises(StoreUnfinished, match=r"resumes where it stopped"):
            store.spans(EVERYTHING)
        with pytest.raises(StoreUnfinished):
            store.read(EVERYTHING, span)
        with pytest.raises(StoreUnfinished):
            next(store.stream(EVERYTHING, [span]))
        with pytest.raises(StoreUnfinished):
            store.moments(3)
        with pytest.raises(StoreUnfinished):
            store.record(HURT)


def test_other_settings_on_one_path_are_refused_with_their_differences(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    model = dataclasses.replace(manifest.model, id="other")
    with pytest.raises(StoreMismatch) as caught:
        StoreWriter.create(
            tmp_path, dataclasses.replace(manifest, model=model, codec="lz4"), corpus.tokens, corpus.documents
        )
    assert "model.id: the store has 'toy', but 'other' was asked for" in str(caught.value)
    assert "codec: the store has 'raw', but 'lz4' was asked for" in str(caught.value)
    assert "context" not in str(caught.value)


def test_a_refused_create_leaves_nothing_open(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path, manifest)
    gc.collect()  # of tests before
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StoreMismatch):
            StoreWriter.create(tmp_path, dataclasses.replace(manifest, codec="lz4"), corpus.tokens, corpus.documents)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_exactly_one_of_two_writers_gets_a_shard(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with (
        StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents) as one,
        StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents) as two,
    ):
        with one.claim(0) as first, two.claim(0) as second, two.claim(1) as other:
            assert (first, second, other) == (True, False, True)
        with two.claim(0) as is_free_again:
            assert is_free_again
            two.write(0, synthetic.make_content(manifest, corpus, 0))
        with one.claim(0) as is_to_do:
            assert not is_to_do
        assert one.pending() == [1, 2, 3, 4, 5]


def test_a_store_being_created_is_busy(synthetic, tmp_path, monkeypatch):
    """The second comes while the first writes the beginning."""
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    begin = StoreWriter._write_beginning
    refused = []

    def second_comes(self, *args):
        monkeypatch.setattr(StoreWriter, "_write_beginning", begin)
        with pytest.raises(StoreBusy, match="try again") as caught:
            StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents)
        refused.append(caught.value)
        begin(self, *args)

    monkeypatch.setattr(StoreWriter, "_write_beginning", second_comes)
    with StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents) as writer:
        assert len(refused) == 1
        assert len(writer.pending()) == manifest.shards


PLACE = Site("resid", 3)


def misfit(content, **changes):
    return dataclasses.replace(content, **changes)


def with_attention(content, **changes):
    layer, csr = 2, content.attention[2]
    return misfit(content, attention={**content.attention, layer: dataclasses.replace(csr, **changes)})


def longer_moments(content):
    moments: Moments = content.moments[PLACE]
    return misfit(content, moments={**content.moments, PLACE: dataclasses.replace(moments, mean=np.zeros(7))})


MISFITS: dict[str, Callable] = {
    "a layer is missing": lambda c: misfit(c, acts={PLACE: c.acts[PLACE]}),
    "a layer too many": lambda c: misfit(c, acts={**c.acts, Site("resid", 9): c.acts[PLACE]}),
    "a hook too many": lambda c: misfit(c, acts={**c.acts, Site("q", 3): c.acts[PLACE]}),
    "a layer without moments": lambda c: misfit(c, moments={PLACE: c.moments[PLACE]}),
    "residuals of another type": lambda c: misfit(c, acts={**c.acts, PLACE: c.acts[PLACE].astype(np.float32)}),
    "residuals of another width": lambda c: misfit(c, acts={**c.acts, PLACE: c.acts[PLACE][..., :-1]}),
    "a window too few": lambda c: misfit(c, tokens=c.tokens[:-1]),
    "documents too short": lambda c: misfit(c, documents=c.documents[:, :-1]),
    "moments of another width": longer_moments,
    "attention without a layer": lambda c: misfit(c, attention={2: c.attention[2]}),
    "kept mass too short": lambda c: with_attention(c, kept_mass=c.attention[2].kept_mass[:-1]),
    "positions of another type": lambda c: with_attention(c, indices=c.attention[2].indices.astype(np.int64)),
    "probabilities of another type": lambda c: with_attention(c, data=c.attention[2].data.astype(np.float32)),
    "kept mass of another type": lambda c: with_attention(c, kept_mass=c.attention[2].kept_mass.astype(np.float32)),
    "row pointers of another type": lambda c: with_attention(c, indptr=c.attention[2].indptr.astype(np.int64)),
    "fewer probabilities than positions": lambda c: with_attention(c, data=c.attention[2].data[:-1]),
    "rows that are no CSR": lambda c: with_attention(c, indices=c.attention[2].indices[::-1].copy()),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(synthetic, tmp_path, name):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    with StoreWriter.create(tmp_path, manifest, corpus.tokens, corpus.documents) as writer:
        before = synthetic.tree_of(tmp_path)
        with writer.claim(0), pytest.raises((ShardInvalid, CsrInvalid), match="shard 0"):
            writer.write(0, MISFITS[name](synthetic.make_content(manifest, corpus, 0)))
        assert synthetic.tree_of(tmp_path) == before


@pytest.mark.parametrize("name", ["tokens", "documents"])
def test_tokens_that_do_not_fit_are_refused(synthetic, tmp_path, name):
    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    arrays = {"tokens": corpus.tokens, "documents": corpus.documents}
    below, above = arrays[name] - np.int64(60), arrays[name] + np.int64(2**32)  # would be stored as others
    for wrong in (arrays[name][:-1], arrays[name].astype(np.float32), below, above):
        with pytest.raises(ShardInvalid, match=f"expected {name}"):
            StoreWriter.create(tmp_path, manifest, **{**arrays, name: wrong})
    assert not (tmp_path / "zarr.json").exists()


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of a few kilobytes, where this user may mount one."""
    folder.mkdir()
    options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_its_name_and_goes_on_when_there_is_space(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    with small_disk(tmp_path / "disk", 1024) as disk:
        store, ballast = disk / "store", disk / "ballast"
        corpus = synthetic.write_store(store, manifest, shards=[0, 1])
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(bytes(free - 5 * 4096))
        with pytest.raises(StoreFull, match=r"committed shards are untouched.*run the same command again"):
            synthetic.write_store(store, manifest, corpus)
        with Store.open(store) as found:
            assert np.flatnonzero(found.committed).tolist() == [0, 1]
            assert sum(1 for _ in found.stream(EVERYTHING, [Span(0, 0, 4), Span(1, 4, 8)])) == 2
        ballast.unlink()
        synthetic.write_store(store, manifest, corpus)
        found = synthetic.tree_of(store)
    synthetic.write_store(tmp_path / "straight", manifest, corpus)
    assert found == synthetic.tree_of(tmp_path / "straight")


@pytest.mark.parametrize("write", [LocalFiles.write, LocalFiles.replace])
def test_a_disk_without_space_for_a_folder_ends_in_the_same_name(tmp_path, monkeypatch, write):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(
        StoreFull, match=r"^the disk is full while writing folder.*key.* of .*committed shards are untouched"
    ):
        write(LocalFiles(tmp_path), "folder/key", b"" if write is LocalFiles.replace else [])
    with pytest.raises(StoreFull, match="full while opening .*commits/lock"):
        open_claims(LocalFiles(tmp_path))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The same without root: no file may grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_file_size_ends_in_the_same_name(synthetic, tmp_path):
    manifest = synthetic.make_manifest()
    corpus = synthetic.write_store(tmp_path / "store", manifest, shards=[0])
    full = pytest.raises(StoreFull, match="committed shards are untouched")
    with file_size_limit(300), full, StoreWriter.open(tmp_path / "store") as writer:
        synthetic.write_pending(writer, corpus, [1])
    with Store.open(tmp_path / "store") as store:
        assert np.flatnonzero(store.committed).tolist() == [0]
    synthetic.write_store(tmp_path / "store", manifest, corpus)
    synthetic.write_store(tmp_path / "straight", manifest, corpus)
    assert synthetic.tree_of(tmp_path / "store") == synthetic.tree_of(tmp_path / "straight")


@pytest.mark.parametrize("link", ["resid/layer_3/c.0.0.0", "commits/.00000.json.tmp"])
def test_nothing_is_written_through_a_symbolic_link(synthetic, tmp_path, link):
    """A store from elsewhere may bring one that leads anywhere."""
    manifest, mine = synthetic.make_manifest(), tmp_path / "mine"
    corpus = synthetic.write_store(tmp_path / "store", manifest, shards=[1])
    mine.write_text("mine")
    (tmp_path / "store" / link).symlink_to(mine)
    with pytest.raises(StoreUnreachable, match=r"is a symbolic link.* Remove it"):
        synthetic.write_store(tmp_path / "store", manifest, corpus)
    assert mine.read_text() == "mine"
    (tmp_path / "store" / link).unlink()
    synthetic.write_store(tmp_path / "store", manifest, corpus)


@pytest.mark.parametrize("link", ["commits/lock", "commits"])
def test_nothing_is_made_where_a_link_of_a_store_leads(synthetic, tmp_path, link):
    """Its target is not there: whoever opens what a link names would make it."""
    manifest, mine = synthetic.make_manifest(), tmp_path / "mine"
    corpus = synthetic.write_store(tmp_path / "store", manifest, shards=[1])
    (tmp_path / "store" / link).rename(tmp_path / "aside")
    (tmp_path / "store" / link).symlink_to(mine)
    for _ in range(2):
        with pytest.raises(StoreUnreachable, match=rf"{link} is a symbolic link.* Remove it"):
            synthetic.write_store(tmp_path / "store", manifest, corpus)
        assert not mine.exists() or not list(mine.iterdir())
        mine.mkdir(exist_ok=True)
    (tmp_path / "store" / link).unlink()
    (tmp_path / "aside").rename(tmp_path / "store" / link)
    synthetic.write_store(tmp_path / "store", manifest, corpus)


def test_nothing_is_written_or_removed_where_a_link_stands_for_a_folder(synthetic, tmp_path):
    manifest, elsewhere = synthetic.make_manifest(), tmp_path / "elsewhere"
    corpus = synthetic.write_store(tmp_path / "store", manifest, shards=[1])
    resid = tmp_path / "store/resid"
    resid.rename(elsewhere)
    before = synthetic.tree_of(elsewhere)
    resid.symlink_to(elsewhere)
    with pytest.raises(StoreUnreachable, match=r"resid is a symbolic link.* Remove it"):
        synthetic.write_store(tmp_path / "store", manifest, corpus)
    with pytest.raises(StoreUnreachable, match="resid is a symbolic link"):
        LocalFiles(tmp_path / "store").remove("resid/layer_3/zarr.json")
    assert synthetic.tree_of(elsewhere) == before


def test_a_record_that_cannot_be_read_for_now_is_not_called_damaged(synthetic, tmp_path, monkeypatch):
    """Repair would throw a whole shard away."""
    synthetic.write_store(tmp_path / "store", synthetic.make_manifest())

    def read_record(*_):
        raise StoreUnreachable(errno.EIO, "the network is away")

    with Store.open(tmp_path / "store") as store:
        monkeypatch.setattr(verify_and_repair, "read_record", read_record)
        with pytest.raises(StoreUnreachable, match="the network is away"):
            list(verify_and_repair.verify_shards(store))


def test_a_disk_without_locks_is_named(synthetic, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    manifest = synthetic.make_manifest()
    corpus = synthetic.make_corpus(manifest)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(StoreUnreachable, match="No locks available while locking .*lock: expected a disk"):
        StoreWriter.create(tmp_path / "store", manifest, corpus.tokens, corpus.documents)
