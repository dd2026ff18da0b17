"""`sae-store` as a person types it."""

import io
import json
import re
import shutil
import tracemalloc
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console

from saemill.cache_schema import (
    ImportInvalid,
    Request,
    ShardCorrupt,
    Site,
    Store,
    StoreWriter,
    formats_to_import,
    import_into_store,
    to_float32,
)
from saemill.cache_schema import verify_and_repair as verify_module
from saemill.cache_schema.cli import main, open_console
from saemill.cache_schema.commits import CommitRecord
from saemill.cache_schema.encode_and_read_chunks import checksum_of
from saemill.cache_schema.info import BUNDLED, describe, render, sum_by_place
from saemill.cache_schema.stored_dtypes import STORED_AS, all_finite
from saemill.cache_schema.verify_and_repair import digest, repair, store_digest


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_a_stop_has_the_status_of_one(monkeypatch, tmp_path):
    def stopped(url):
        raise KeyboardInterrupt

    assert open_console(width=40).width == 40
    monkeypatch.setenv("COLUMNS", "0")  # as some launchers have it
    assert open_console().width == 80
    monkeypatch.setattr(Store, "open", stopped)
    assert run("info", tmp_path).exit_code == 130


@pytest.mark.parametrize(
    ("encoding", "errors"), [("ascii", "strict"), ("latin-1", "strict"), ("ascii", "surrogateescape")]
)
def test_what_the_encoding_of_a_terminal_lacks_is_escaped(imported, encoding, errors):
    """On a narrow one a cell is cut, with an ellipsis that is in neither encoding."""
    out = io.BytesIO()
    console = open_console(file=io.TextIOWrapper(out, encoding, errors), width=40)
    with Store.open(imported / "store") as store:
        console.print(render(describe(store)))
    console.print("\udce4 \u5e97")  # a byte of a file's name that is no UTF-8; a character
    console.file.flush()
    assert b"\\u2026" in out.getvalue() and out.getvalue().endswith(b"\xe4 \\u5e97\n")


def test_without_a_terminal_no_empty_line_stands_for_a_bar(imported):
    assert run("verify", imported / "store").output == "3 shards read, all exactly as committed\n"


def import_files(folder: Path, store: Path) -> Result:
    """The .npy files of a folder, as `imported` has them."""
    files = ["--resid", folder / "resid.npy", "--tokens", folder / "tokens.npy", "--layer", 4]
    return run("import", store, *files, "--model", "somebody/model", "--special-token", 7, "--shard-windows", 256)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Residuals and tokens of 600 short windows as .npy files, and beside them their store of three shards."""
    folder, rng = tmp_path_factory.mktemp("imported"), np.random.default_rng(0)
    np.save(folder / "resid.npy", rng.standard_normal((600, 8, 16)).astype(np.float32))
    np.save(folder / "tokens.npy", rng.integers(0, 50, (600, 8)).astype(np.int64))
    result = import_files(folder, folder / "store")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def arrays(imported: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """Copies of the files, and what is in them."""
    files = {name: Path(shutil.copy(imported / f"{name}.npy", tmp_path)) for name in ("resid", "tokens")}
    return {name: np.load(file) for name, file in files.items()}


@pytest.fixture
def store(imported: Path, arrays: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A copy, beside copies of the files."""
    return Path(shutil.copytree(imported / "store", tmp_path / "store"))


def flip_byte(store: Path, array: str, chunk: str) -> None:
    path = store / array / chunk
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_import_keeps_every_window_in_order(store: Path, arrays: dict[str, np.ndarray]) -> None:
    with Store.open(store) as opened:
        request = Request(layers=(4,), tokens=True)
        parts = [(part.resid[4].copy(), part.tokens.copy()) for part in opened.stream(request)]
        assert opened.manifest.splits == {"train": (0, 540), "validation": (540, 570), "test": (570, 600)}
        moments = opened.moments(4)
    assert np.array_equal(np.concatenate([resid for resid, _ in parts]), arrays["resid"])
    assert np.array_equal(np.concatenate([tokens for _, tokens in parts]), arrays["tokens"])
    kept = arrays["resid"][arrays["tokens"] != 7].astype(np.float64)
    assert moments.count == len(kept)
    np.testing.assert_allclose(moments.mean, kept.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.rms_norm, np.sqrt((kept**2).sum(axis=1).mean()), rtol=1e-12)


def test_import_twice_writes_nothing_new(store: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert import_files(tmp_path, store).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_an_import_beside_another_says_that_it_is_not_whole(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said how many windows there were, and what to do next."""
    monkeypatch.setattr(StoreWriter, "claim", lambda *_: nullcontext(False))
    result = import_files(tmp_path, tmp_path / "other")
    assert result.exit_code == 1 and "another import is writing 3 of 3 shards" in result.output
    monkeypatch.undo()
    assert import_files(tmp_path, tmp_path / "other").exit_code == 0


def test_import_of_other_values_into_the_same_path_is_refused(store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "resid.npy", np.zeros((600, 8, 16), np.float32))
    result = import_files(tmp_path, store)
    assert result.exit_code == 1
    assert "error: " in result.output and "corpus.revision" in result.output


def test_import_without_tokens_says_so_in_the_manifest(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    url = tmp_path / "patches"
    result = run("import", url, "--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "vision")
    assert result.exit_code == 0, result.output
    with Store.open(url) as opened:
        assert opened.manifest.corpus.settings == {"tokens": False}
        assert opened.moments(4).count == 600 * 8


@pytest.mark.parametrize("more", [("--bos-token", 0), ("--special-token", 7)])
def test_special_tokens_without_tokens_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], more) -> None:
    """Rows would all count as BOS, or none."""
    result = run("import", tmp_path / "s", "--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "m", *more)
    assert result.exit_code == 1 and not (tmp_path / "s").exists()
    assert result.output.lstrip().startswith("error: special tokens and BOS cannot be found without tokens")


@pytest.mark.parametrize("option", ["--special-token", "--bos-token", "--layer"])
def test_numbers_below_zero_are_refused_by_their_option(tmp_path: Path, option: str) -> None:
    result = run("import", tmp_path / "s", "--resid", tmp_path / "x.npy", option, -1, "--model", "m")
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': -1 is not in the range" in " ".join(result.output.split())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_import_keeps_the_dtype_it_was_given(tmp_path: Path, dtype: str) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    stored = values.astype(np.float16) if dtype == "float16" else (values.view(np.uint32) >> 16).astype(np.uint16)
    np.save(tmp_path / "resid.npy", stored)
    assert run("import", tmp_path / "s", "--resid", tmp_path / "resid.npy", "--layer", 0, "--model", "m").exit_code == 0
    with Store.open(tmp_path / "s") as opened:
        (part,) = opened.stream(Request(layers=(0,)))
        assert opened.manifest.model.dtype == dtype
        assert np.array_equal(to_float32(part.resid[0], dtype), values)


@pytest.mark.parametrize(
    ("resid", "tokens", "message"),
    [
        (
            np.zeros((4, 8, 2)),
            None,
            "expected activations as float32, float16 or bfloat16 bits in uint16, found float64",
        ),
        (np.zeros((4, 8), np.float32), None, "or [rows, width] with --context T, the number of consecutive"),
        (np.zeros(4, np.float32), None, "rows from one text (1 if none are consecutive), found (4,)"),
        (np.zeros((4, 8), np.float32), np.zeros((1, 5), int), "of at least 1 each, found (0, 5, 8)"),
        (
            np.zeros((4, 8, 2), np.float32),
            np.zeros((4, 7), int),
            "expected tokens of shape (4, 8), or one per row: 32; found (4, 7)",
        ),
        (np.zeros((4, 8, 2), np.float32), np.zeros(4, int), "or one per row: 32; found (4,)"),
        (np.zeros((4, 8, 2), np.float32), np.full((4, 8), -1), "expected token ids from 0 to 2^32 - 1"),
        (np.zeros((4, 8, 0), np.float32), None, "of at least 1 each, found (4, 8, 0)"),
        (np.zeros((0, 8, 2), np.float32), np.zeros((0, 8)), "of at least 1 each, found (0, 8, 2)"),
        (np.zeros((4, 1, 2), np.float32), np.array([["a"]] * 4), "expected token ids from 0 to 2^32 - 1, found <U1"),
        (np.repeat([0, np.nan], [300, 100]).astype(np.float32).reshape(400, 1, 1), None, "window 300: expected finite"),
        (np.full((4, 1, 2), 0x7F80, np.uint16), None, "window 0: expected finite residuals, found NaN or infinity"),
    ],
)
def test_import_names_what_is_wrong(tmp_path: Path, resid: np.ndarray, tokens: np.ndarray | None, message: str) -> None:
    np.save(tmp_path / "resid.npy", resid)
    args: list[object] = ["--resid", tmp_path / "resid.npy", "--layer", 0, "--model", "m"]
    if tokens is not None:
        np.save(tmp_path / "tokens.npy", tokens)
        args += ["--tokens", tmp_path / "tokens.npy"]
    result = run("import", tmp_path / "s", *args)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "s").exists()  # or the files, once they are mended, would be refused there


def test_import_of_folders_and_of_rows(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """However a dump is cut into files, and whether it knows of windows, it is the store of one file."""
    resid, tokens = arrays["resid"], arrays["tokens"]
    windows, context, _ = resid.shape
    words = ("--layer", 4, "--model", "m")
    files = ("--resid", tmp_path / "resid.npy", "--tokens", tmp_path / "tokens.npy")
    assert run("import", tmp_path / "whole", *words, *files).exit_code == 0
    for name, array in (("resid", resid), ("tokens", tokens)):
        for kind, joined in (("windows", array), ("rows", array.reshape(windows * context, *array.shape[2:]))):
            (tmp_path / f"{name}_{kind}").mkdir()
            for number, part in enumerate(np.array_split(joined, 11)):
                np.save(tmp_path / f"{name}_{kind}" / f"part_{number}.npy", part)
    for number, more in enumerate(
        [
            ("--resid", tmp_path / "resid_windows", "--tokens", tmp_path / "tokens_windows"),
            ("--resid", tmp_path / "resid_rows", "--tokens", tmp_path / "tokens.npy"),
            ("--resid", tmp_path / "resid.npy", "--tokens", tmp_path / "tokens_rows"),
            ("--resid", tmp_path / "resid_rows", "--tokens", tmp_path / "tokens_rows", "--context", context),
        ]
    ):
        result = run("import", tmp_path / f"s{number}", *words, *more)
        assert result.exit_code == 0, result.output
        assert ("rows run across files" in " ".join(result.output.split())) == ("resid_rows" in str(more))
        with Store.open(tmp_path / f"s{number}") as found, Store.open(tmp_path / "whole") as expected:
            assert digest(found) == digest(expected)
    result = run("import", tmp_path / "rest", "--resid", tmp_path / "resid_rows", "--context", context + 1, *words)
    rest = windows * context % (context + 1)
    assert result.exit_code == 0 and f"left out: {rest:,} rows, which fill no window of {context + 1}" in result.output
    np.save(tmp_path / "resid_rows" / "part_11.npy", np.zeros((3, 5), np.float32))
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("resid_rows", "one shape except for length, found float32 [16], float32 [5]"),
        ("empty", "expected .npy files in this folder, found none"),
    ):
        result = run("import", tmp_path / "bad", "--resid", tmp_path / folder, "--context", context, *words)
        assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_other_files_of_a_folder_are_told(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A dump of which a part is of another kind, or in folders, would look whole."""
    acts, tokens = tmp_path / "acts", tmp_path / "ids"
    for folder, name in ((acts, "resid"), (tokens, "tokens")):
        (folder / "more").mkdir(parents=True)
        np.save(folder / "part_0.npy", arrays[name])
    words = ("--resid", acts, "--tokens", tokens, "--layer", 4, "--model", "m")
    assert "left out" not in run("import", tmp_path / "whole", *words).output
    shutil.copy(acts / "part_0.npy", acts / "more" / "part_2.npy")
    (acts / "part_1.pt").touch()
    for number in range(9):
        (tokens / f"{number}.txt").touch()
    said = run("import", tmp_path / "part", *words).output
    assert (
        f"left out: 2 other files of {acts} ('more/part_2.npy', 'part_1.pt'): only the .npy files at its top are read; "
        in said
    )
    assert f"9 other files of {tokens} ('0.txt', '1.txt'," in said
    assert said.count(".txt'") == 8 and "'7.txt', and others)" in said


def test_import_of_a_file_of_the_other_byte_order(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.save(tmp_path / "resid.npy", arrays["resid"].astype(">f4"))
    assert run("import", tmp_path / "s", "--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "m").exit_code == 0
    with Store.open(tmp_path / "s") as opened:
        parts = [part.resid[4].copy() for part in opened.stream(Request(layers=(4,)))]
    assert np.array_equal(np.concatenate(parts), arrays["resid"])


@pytest.mark.parametrize("share", ["nan", "-0.1", "0.95"])
def test_shares_that_are_none_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], share: str) -> None:
    words = ["--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "m", "--validation", share]
    result = run("import", tmp_path / "s", *words)
    assert result.exit_code == 1 and "expected shares of at least 0" in result.output
    assert not (tmp_path / "s").exists()


def test_import_onto_a_file_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    result = import_files(tmp_path, tmp_path / "resid.npy")
    assert result.exit_code == 1 and f"but {tmp_path}/resid.npy is a file. Give another" in result.output


def test_import_of_what_is_no_array_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "resid.npy"
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for content in (file.read_bytes(), b"", b"PK\x03\x04"):
        file.write_bytes(content)
        result = run("import", tmp_path / "s", "--resid", file, "--layer", 0, "--model", "m")
        assert result.exit_code == 1
        assert f"error: {file} is not a readable .npy file" in result.output


def test_a_pickle_is_refused_and_the_way_out_that_is_told_works(tmp_path: Path) -> None:
    """As activault writes it: bfloat16 states beside their tokens."""
    states = torch.randn(40, 8, 6).bfloat16()
    torch.save({"states": states, "input_ids": torch.arange(320).view(40, 8), "tensor_bytes": 1}, tmp_path / "a.pt")
    words = ["import", tmp_path / "s", "--layer", 0, "--model", "m", "--resid"]
    result = run(*words, tmp_path / "a.pt")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    told = said.partition("convert it once: ")[2].partition("; then ")[0]
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert "np.save('acts.npy', found['states'].view(torch.uint16)); np.save('tokens.npy', found['input_ids'])" in told
    np.save(tmp_path / "acts.npy", found["states"].view(torch.uint16))
    np.save(tmp_path / "tokens.npy", found["input_ids"])
    result = run(*words, tmp_path / "acts.npy", "--tokens", tmp_path / "tokens.npy")
    assert result.exit_code == 0, result.output
    with Store.open(tmp_path / "s") as opened:
        (part, *_) = opened.stream(Request(layers=(0,), windows=(0, 40)))
        kept = part.values(Site("resid", 0))
        assert np.array_equal(kept, states[: len(kept)].float().numpy())


def test_import_of_hooks(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.save(tmp_path / "out.npy", -arrays["resid"])
    files = ["--acts", f"mlp_in:4={tmp_path}/resid.npy", "--acts", f"mlp_out:4={tmp_path}/out.npy"]
    result = run("import", tmp_path / "s", *files, "--tokens", tmp_path / "tokens.npy", "--model", "m")
    assert result.exit_code == 0 and "mlp_in of layer 4, mlp_out of layer 4" in result.output, result.output
    with Store.open(tmp_path / "s") as opened:
        assert opened.manifest.format == 2 and opened.manifest.layers == ()
        parts = list(opened.stream(Request(hooks={"mlp_out": (4,)}, windows=(0, 100))))
        assert np.array_equal(parts[0].acts["mlp_out"][4], -arrays["resid"][:100])
        np.testing.assert_allclose(opened.moments(4, "mlp_in").mean, -opened.moments(4, "mlp_out").mean)
    assert run("verify", tmp_path / "s").exit_code == 0
    for wrong, message in (("mlpin:4=x.npy", "did you mean 'mlp_in'"), ("mlp_in=x.npy", "expected HOOK:LAYER=FILE")):
        refused = run("import", tmp_path / "t", "--acts", wrong, "--model", "m")
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output


def write_saelens(folder: Path, hook: str, acts: np.ndarray, tokens: np.ndarray | None) -> None:
    """As SAELens' cache runner leaves it: Array2D by hook name, and token_ids where it was asked for them."""
    datasets = pytest.importorskip("datasets")
    features, columns = {hook: datasets.Array2D(shape=acts.shape[1:], dtype=acts.dtype.name)}, {hook: list(acts)}
    if tokens is not None:
        features["token_ids"] = datasets.Sequence(datasets.Value("int32"), length=acts.shape[1])
        columns["token_ids"] = list(tokens)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)


@pytest.mark.parametrize(
    ("name", "site"), [("hook_resid_post", Site("resid", 12)), ("hook_mlp_out", Site("mlp_out", 12))], ids=str
)
@pytest.mark.parametrize("holds_tokens", [True, False])
def test_import_of_a_saelens_folder(
    tmp_path: Path, arrays: dict[str, np.ndarray], name: str, site: Site, holds_tokens: bool
) -> None:
    resid, tokens = arrays["resid"][:20], arrays["tokens"][:20]
    write_saelens(tmp_path / "cache", f"blocks.12.{name}", resid, tokens if holds_tokens else None)
    np.save(tmp_path / "tokens.npy", tokens)
    beside = ["--tokens", tmp_path / "tokens.npy"]
    words = ["import", tmp_path / "s", "--saelens", tmp_path / "cache", "--model", "m", "--bos-token", 7]
    result = run(*words, *([] if holds_tokens else beside))
    assert result.exit_code == 0, result.output
    with Store.open(tmp_path / "s") as opened:
        (part,) = opened.stream(Request.of([site], tokens=True))
        assert np.array_equal(part.acts[site.hook][12], resid)
        assert np.array_equal(part.tokens, tokens)
    np.save(tmp_path / "tokens.npy", tokens[:19])
    refused = run(*words, *beside)
    assert refused.exit_code == 1
    assert ("holds token_ids: leave out --tokens" if holds_tokens else "expected tokens of shape") in refused.output


def test_tokens_of_a_saelens_folder_are_read_without_its_activations(tmp_path: Path) -> None:
    """Those of all windows are read at once, and their activations may be larger than memory."""
    acts, tokens = np.zeros((64, 16, 1024), np.float32), np.arange(1024).reshape(64, 16)
    write_saelens(tmp_path / "cache", "blocks.12.hook_resid_post", acts, tokens)
    formats_to_import.SaelensSource(tmp_path / "cache", None)  # imports what it takes
    tracemalloc.start()
    try:
        found = formats_to_import.SaelensSource(tmp_path / "cache", None).tokens
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(found, tokens) and peak < acts.nbytes / 4


def test_import_of_a_saelens_folder_of_bfloat16_bits(tmp_path: Path) -> None:
    bits = np.arange(0x3F80, 0x3F80 + 24, dtype=np.uint16).reshape(2, 3, 4)
    write_saelens(tmp_path / "cache", "blocks.12.hook_resid_post", bits, None)
    result = run("import", tmp_path / "s", "--saelens", tmp_path / "cache", "--model", "m")
    assert result.exit_code == 0, result.output
    with Store.open(tmp_path / "s") as opened:
        (part,) = opened.stream(Request(layers=(12,)))
        assert opened.manifest.model.dtype == "bfloat16" and np.array_equal(part.resid[12], bits)


@pytest.mark.parametrize(
    ("name", "layer", "site"),
    [
        ("blocks.12.hook_resid_pre", None, Site("resid", 11)),  # before layer 12 is after layer 11
        ("blocks.12.hook_resid_pre", 11, Site("resid", 11)),
        ("model.layers.12", None, Site("resid", 12)),
        ("blocks.12.mlp.hook_in", None, Site("mlp_in", 12)),
        ("blocks.12.hook_resid_mid", 12, Site("resid", 12)),
    ],
)
def test_a_saelens_column_is_of_the_place_that_its_name_says(name: str, layer: int | None, site: Site) -> None:
    assert formats_to_import._site_of(name, layer) == site


@pytest.mark.parametrize("name", ["blocks.12.hook_resid_mid", "model.layers.12.mlp", "acts", "layer2"])
def test_a_saelens_column_whose_name_says_no_place_needs_a_layer(name: str) -> None:
    with pytest.raises(ImportInvalid, match=f"the name '{name}' .* give --layer L"):
        formats_to_import._site_of(name, None)


@pytest.mark.parametrize(
    ("name", "layer", "said"),
    [
        ("blocks.5.hook_resid_pre", 5, "expected --layer 4, as blocks.5.hook_resid_pre is residuals of layer 4, found"),
        ("blocks.5.hook_mlp_out", 19, "expected --layer 5, as blocks.5.hook_mlp_out is mlp_out of layer 5, found"),
    ],
)
def test_a_layer_that_contradicts_a_saelens_column_is_refused(name: str, layer: int, said: str) -> None:
    with pytest.raises(ImportInvalid, match=f"{said} --layer {layer}"):
        formats_to_import._site_of(name, layer)


@pytest.mark.parametrize("layer", [None, 0])
def test_a_saelens_column_of_the_embedding_has_no_place(layer: int | None) -> None:
    with pytest.raises(ImportInvalid, match="hook_resid_pre is the embedding, before the first layer"):
        formats_to_import._site_of("blocks.0.hook_resid_pre", layer)


def test_info_tells_a_person_and_a_program_the_same(store: Path) -> None:
    facts = json.loads(run("info", store, "--json").output)
    assert facts["model"] == "somebody/model"
    assert facts["tokens_by_split"] == {"train": 4320, "validation": 240, "test": 240}
    assert facts["shards_committed"] == facts["shards"] == 3
    on_disk = sum(path.stat().st_size for path in store.rglob("c.*"))
    assert facts["bytes"] == on_disk
    assert sum(facts["bytes_per_token"].values()) == pytest.approx(on_disk / 4800)
    page = run("info", store).output
    assert "somebody/model" in page and facts["cache_id"] in page and "train 4,320" in page


def test_info_says_names_as_they_are_and_which_model_is_the_bundled_one(store: Path) -> None:
    facts = json.loads(run("info", store, "--json").output)
    bundled = "pocket (the small bundled model, not Gemma-2-2B) at sha256-"
    for *model, said in (("me/[/b]m", "1", "me/[/b]m at 1, "), ("pocket", "1", "pocket at 1, "), (*BUNDLED, bundled)):
        console = Console(file=io.StringIO(), width=200)
        console.print(render(facts | dict(zip(("model", "revision"), model, strict=True))))
        assert said in console.file.getvalue()  # pyright: ignore


def test_verify_reads_every_byte(store: Path) -> None:
    result = run("verify", store)
    assert result.exit_code == 0
    assert "3 shards read, all exactly as committed" in result.output


@pytest.mark.parametrize("array", ["resid/layer_4", "tokens", "documents"])
def test_verify_names_shard_array_and_remedy(store: Path, array: str) -> None:
    flip_byte(store, array, "c.1.0.0" if "resid" in array else "c.1.0")
    result = run("verify", store)
    assert result.exit_code == 1
    assert f"shard 1, array {array}: chunk" in result.output
    is_gone = array in ("tokens", "documents")
    assert (f"sae-store repair {store}" in result.output) is not is_gone
    assert ("restore their files from a copy" in result.output) is is_gone


@pytest.mark.parametrize("array", ["resid/layer_4", "tokens"])
def test_verify_tells_a_program_what_it_tells_a_person(store: Path, array: str) -> None:
    flip_byte(store, array, "c.1.0.0" if "resid" in array else "c.1.0")
    result = run("verify", store, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (found["shards"], found["missing"], found["damaged"]) == (3, 0, [1])
    assert found["can_be_mended"] == (array != "tokens")
    assert found["damage"][0]["array"] == array and found["damage"][0]["problem"] in result.stderr


@pytest.mark.parametrize("array", ["tokens", "documents"])
def test_what_a_shard_to_come_is_made_from_is_read_too(store: Path, array: str) -> None:
    """A harvest would stop there: verify must not call the store sound, nor repair say that nothing is damaged."""
    flip_byte(store, "resid/layer_4", "c.1.0.0")
    run("repair", store, "--remove-only")
    before = run("digest", store).output
    assert run("verify", store).exit_code == 0
    flip_byte(store, array, "c.1.0")
    for command in ("verify", "repair"):
        result = run(command, store)
        assert result.exit_code == 1
        assert f"shard 1, array {array}: chunk" in result.output
        assert "the tokens or documents of shard 1 are damaged" in result.output
        assert f"sae-store repair {store}" not in result.output
        assert "nothing is damaged" not in result.output
    assert run("digest", store).output == before


def test_verify_finds_values_that_were_rewritten_with_a_right_checksum(store: Path) -> None:
    chunk = store / "resid/layer_4/c.2.0.0"
    chunk.write_bytes((store / "resid/layer_4/c.1.0.0").read_bytes())
    result = run("verify", store)
    assert result.exit_code == 1
    assert "shard 2: array resid/layer_4: expected xxh3_128:" in result.output


@pytest.mark.parametrize(("at", "number"), [(0, np.nan), (3, np.inf), (0, -1.0), (3, 2.5)])
def test_counts_that_are_none_are_damage_though_their_checksum_is_right(store: Path, at: int, number: float) -> None:
    """Of tokens and of windows, in a line of moments."""
    chunk = store / "stats/layer_4/c.1.0"
    line = np.frombuffer(chunk.read_bytes()[:-4], np.float64).copy()
    line[at] = number
    chunk.write_bytes(line.tobytes() + checksum_of(line.view(np.uint8)).tobytes())
    result = run("verify", store)
    assert result.exit_code == 1
    assert "shard 1, array stats/layer_4: expected whole numbers of tokens and of windows" in result.output
    (store / "stats/summary.json").unlink()
    with Store.open(store) as opened, pytest.raises(ShardCorrupt, match="array stats/layer_4: expected whole"):
        opened.moments(4)


@pytest.mark.parametrize("windows", [(970, 10, 10, 10), (97, 2, 1), (1, 1, 98), (50, 50), (100,)])
def test_an_import_is_split_wherever_documents_allow_it(windows: tuple[int, ...]) -> None:
    source = SimpleNamespace(document_of=np.repeat(range(len(windows)), windows), windows=sum(windows))
    splits = import_into_store._splits(source, import_into_store.ImportSettings("m"))
    starts = [0, *np.cumsum(windows)]
    for begin, end in splits.values():
        assert begin < end and (len(windows) < 3 or {begin, end} <= set(starts))


def test_sizes_say_of_which_shards_they_are_while_the_index_lags(store: Path) -> None:
    (store / "commits/index.json").unlink()
    assert ", of the 0 shards in the index" in " ".join(run("info", store).output.split())
    assert json.loads(run("info", store, "--json").output)["shards_indexed"] == 0


def test_only_a_layers_attention_is_added_up() -> None:
    sizes = {"attention/layer_3/data": 2, "attention/layer_3/indptr": 1, "attention/layer_4/data": 5}
    scales = {"scales/resid/layer_3": 4, "scales/resid/layer_4": 4}
    together = {"attention/layer_3": 3, "attention/layer_4": 5}
    assert sum_by_place(sizes | scales) == together | scales


def test_links_say_in_how_many_shards_they_were_counted(synthetic, tmp_path: Path) -> None:
    synthetic.write_store(tmp_path, synthetic.make_manifest())
    facts = json.loads(run("info", tmp_path, "--json").output)
    assert [found["shards"] for found in facts["attention_links"].values()] == [4, 4] and facts["shards"] == 6
    said = run("info", tmp_path).output
    assert "; links, BOS and self in 4 shards" in " ".join(said.split())
    for layer in facts["attention_layers"]:  # its four arrays are one row
        rate = sum(size for path, size in facts["bytes_per_token"].items() if f"/layer_{layer}/" in path)
        (row,) = (line for line in said.splitlines() if f"attention/layer_{layer}" in line)
        assert f" {rate:,.1f} " in row
    repair(str(tmp_path), [0, 1])
    assert "BOS and self in" not in " ".join(run("info", tmp_path).output.split())


def test_info_names_what_it_could_not_measure_as_shards_are_damaged(synthetic, tmp_path: Path) -> None:
    """Its rows would just be missing from the tables, as if a layer had none."""
    manifest = synthetic.make_manifest()
    synthetic.write_store(tmp_path, manifest)
    assert json.loads(run("info", tmp_path, "--json").output)["damaged"] == []
    layer = manifest.layers[0]
    flip_byte(tmp_path, f"resid/layer_{layer}", "c.0.0.0")
    facts, page = json.loads(run("info", tmp_path, "--json").output), run("info", tmp_path)
    assert facts["damaged"] == [f"layer {layer}"] and facts["massive_rows"][str(layer)] is None
    said = f"not measured, because shards that were read are damaged: layer {layer}: sae-store verify {tmp_path}"
    assert page.exit_code == 0 and said.replace(" ", "") in "".join(page.output.split())
    flip_byte(tmp_path, "tokens", "c.0.0")
    found = json.loads(run("info", tmp_path, "--json").output)["damaged"]
    assert found[0] == f"attention of layer {manifest.attention.layers[0]}" and f"layer {manifest.layers[-1]}" in found


def test_names_in_a_strangers_index_are_no_markup(store: Path) -> None:
    index = store / "commits/index.json"
    found = json.loads(index.read_text())
    index.write_text(json.dumps(found | {"bytes": {"[/bold]": 1}}))
    assert "[/bold]" in run("info", store).output


def test_repair_then_the_same_import_gives_the_same_digest(store: Path, tmp_path: Path) -> None:
    before = run("digest", store).output
    flip_byte(store, "resid/layer_4", "c.1.0.0")
    result = run("repair", store)
    assert result.exit_code == 0 and "removed: shard 1. Run the same import or harvest again" in result.output, (
        result.output
    )
    assert "2 of 3 committed (1 to go: run the same import or harvest" in run("info", store).output
    assert import_files(tmp_path, store).exit_code == 0
    assert run("digest", store).output == before


def test_repair_makes_index_and_array_documents_again(store: Path) -> None:
    derived = [store / name for name in ("commits/index.json", "tokens/zarr.json")]
    before = [path.read_bytes() for path in derived]
    for path in derived:
        path.write_bytes(b"{")
    result = run("repair", store)
    assert result.exit_code == 0, result.output
    assert "nothing is damaged" in result.output
    assert [path.read_bytes() for path in derived] == before


@pytest.mark.parametrize(
    ("key", "find", "put"),
    [
        ("stats/summary.json", r'"mean_norm": [0-9.]+', '"mean_norm": 400.0'),
        ("stats/summary.json", "^.*$", "{"),
        ("stats/counts.json", r"\b8, 7\b", "7, 8"),
        ("stats/counts.json", r'"same_document": ?[0-9.e-]+', '"same_document": 0.5'),
        ("commits/index.json", r'"tokens": [0-9]+', '"tokens": 1'),
    ],
)
def test_what_is_derived_and_wrong_is_found_and_made_again(store: Path, key: str, find: str, put: str) -> None:
    """Its numbers are used in place of those of the shards."""
    whole = (store / key).read_text()
    changed = re.sub(find, put, whole, count=1, flags=re.S)
    assert changed != whole
    (store / key).write_text(changed)
    result = run("verify", store)
    assert result.exit_code == 1
    assert f"{key}: inconsistent with the shards" in result.stderr and f"sae-store repair {store}" in result.stdout
    found = json.loads(run("verify", store, "--json").stdout)
    assert (found["damaged"], found["derived_damaged"]) == ([], [key])
    result = run("repair", store)
    assert result.exit_code == 0 and f"{key} was" in result.output, result.output
    assert (store / key).read_text() == whole
    assert run("verify", store).exit_code == 0


def test_what_is_derived_and_not_there_is_no_fault(store: Path) -> None:
    for key in ("stats/summary.json", "stats/counts.json", "commits/index.json"):
        (store / key).unlink()
    assert run("verify", store).exit_code == 0


def test_repair_mends_the_others_where_tokens_are_gone(store: Path) -> None:
    flip_byte(store, "tokens", "c.0.0")
    flip_byte(store, "resid/layer_4", "c.1.0.0")
    assert f"Repair the others with: sae-store repair {store}" in run("verify", store).output
    result = run("repair", store)
    assert result.exit_code == 1
    assert "removed: shard 1." in result.output
    assert "of shard 0 are damaged" in result.output and "restore their files from a copy" in result.output
    with Store.open(store) as opened:
        assert opened.committed.tolist() == [True, False, True]
    assert "damaged: shard 0 (1 of 3)" in run("verify", store).output


def test_digest_is_that_of_the_records_and_free_of_path_and_codec(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "zipped"
    source = importer_source(tmp_path)
    settings = import_into_store.ImportSettings("somebody/model", special_tokens=(7,), shard_windows=256, codec="zstd")
    import_into_store.import_store(str(other), source, settings, lambda *_: None)
    digests = {run("digest", url).output.strip() for url in (store, other)}
    with Store.open(store) as opened:
        records = [opened.record(shard) for shard in range(3)]
        digests.add(store_digest(opened.manifest, records))
    assert len(digests) == 1


def test_digest_keeps_no_record_of_the_shards_before(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 30,000 shards with 158 arrays each are more than a gigabyte."""
    read, records, alive = verify_module.read_record, list[weakref.ref[CommitRecord]](), list[int]()

    def read_and_count(*args: Any) -> CommitRecord:
        alive.append(sum(record() is not None for record in records))
        records.append(weakref.ref(found := read(*args)))
        return found

    monkeypatch.setattr(verify_module, "read_record", read_and_count)
    with Store.open(store) as opened:
        digest(opened)
    assert len(alive) == 3 and max(alive) <= 1


def test_digest_of_a_part_says_of_how_many_shards_it_is(store: Path) -> None:
    whole = run("digest", store)
    assert whole.stderr == ""
    flip_byte(store, "resid/layer_4", "c.0.0.0")
    run("repair", store, "--remove-only")
    assert "of 2 of 3 shards" in run("digest", store).stderr
    told = json.loads(run("digest", store, "--json").stdout)
    assert (told["shards"], told["shards_committed"]) == (3, 2) and told["digest"] != whole.stdout.strip()


def test_the_fingerprint_of_an_import_is_of_its_values_and_not_of_its_shards(store: Path, tmp_path: Path) -> None:
    settings = import_into_store.ImportSettings("somebody/model", special_tokens=(7,), shard_windows=100)
    made = import_into_store.import_store(str(tmp_path / "s"), importer_source(tmp_path), settings, lambda *_: None)
    with Store.open(store) as opened:
        assert made.corpus.revision == opened.manifest.corpus.revision


def test_an_import_tells_how_far_it_has_read_its_source_before_it_writes(tmp_path: Path) -> None:
    """Of a billion tokens of one layer that is 4.6 TB, again where it is resumed."""
    files, told = {Site("resid", layer): tmp_path / f"{layer}.npy" for layer in (4, 5)}, []
    for file in files.values():
        np.save(file, np.zeros((300, 2, 4), np.float32))
    source = formats_to_import.NumpySource(files, None)
    settings = import_into_store.ImportSettings("m", shard_windows=256)
    for _ in range(2):
        import_into_store.import_store(
            str(tmp_path / "s"), source, settings, lambda shard, shards: told.append("shard"), told.append
        )
    assert told == [4] * 4 + ["shard"] * 2 + [4] * 4


def test_an_import_holds_less_than_a_shard_and_a_half_and_smaller_shards_are_the_same_store(tmp_path: Path) -> None:
    """Of bfloat16 bits, whose float32 values alone would be two."""
    bits = np.random.default_rng(0).integers(0x3C00, 0x4000, (256, 64, 64), np.uint16)
    np.save(tmp_path / "resid.npy", bits)
    files = ("--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "m")
    tracemalloc.start()
    assert run("import", tmp_path / "256", *files, "--shard-windows", 256).exit_code == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * bits.nbytes
    assert run("import", tmp_path / "8", *files, "--shard-windows", 8).exit_code == 0
    manifests = [Store.open(tmp_path / windows).manifest for windows in ("256", "8")]
    assert [manifest.shards for manifest in manifests] == [1, 32]
    assert manifests[0].cache_id == manifests[1].cache_id


def test_an_import_has_shards_of_as_many_tokens_unless_it_was_begun_with_others(tmp_path: Path) -> None:
    np.save(tmp_path / "resid.npy", np.ones((40, 1), np.float32))
    files = ("--resid", tmp_path / "resid.npy", "--layer", 4, "--model", "m", "--context")
    for context, *begun in ((1,), (4,), (4, "--shard-windows", 2)):
        store = tmp_path / f"store_{context}_{len(begun)}"
        assert run("import", store, *files, context, *begun).exit_code == 0
        assert run("import", store, *files, context).exit_code == 0
        expected = 2 if begun else 32768 // context
        assert Store.open(store).manifest.shard_windows == expected
        assert "shard_windows" in run("import", store, *files, context, "--shard-windows", 3).output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_import_finds_every_value_that_is_not_finite_without_a_copy_in_float32(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(STORED_AS[dtype])
    is_finite = np.isfinite(to_float32(every, dtype))
    assert all_finite(every[is_finite], dtype)
    assert not any(all_finite(every[[at]], dtype) for at in np.flatnonzero(~is_finite))
    values = np.zeros((1, 2**10, 2**10), STORED_AS[dtype])
    tracemalloc.start()
    import_into_store._finite_acts(SimpleNamespace(dtype=dtype, acts=lambda *_: values), Site("resid", 4), 0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * values.nbytes


def importer_source(folder: Path) -> import_into_store.Source:
    from saemill.cache_schema.formats_to_import import NumpySource

    return NumpySource({Site("resid", 4): folder / "resid.npy"}, folder / "tokens.npy")


def test_digest_of_a_damaged_store_is_no_digest(store: Path) -> None:
    flip_byte(store, "resid/layer_4", "c.0.0.0")
    result = run("digest", store)
    assert result.exit_code == 1
    assert "sha256:" not in result.output


def test_a_store_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for command in ("info", "verify", "digest", "repair"):
        result = run(command, tmp_path / "nothing")
        assert result.exit_code == 1
        assert result.output.startswith("error: there is no store at")
        assert "Make one with" in result.output


def test_a_store_inside_the_folder_is_named(store: Path) -> None:
    """`make demo` leaves ./demo/store, and ./demo is what is typed."""
    assert f"Did you mean {store}?" in run("info", store.parent).output
    (store.parent / "a/zarr.json").mkdir(parents=True)
    assert f"Did you mean {store}?" in run("info", store.parent).output
    (store / "zarr.json").rename(store / "lost")  # what is left inside is an array, or a group
    assert "Did you mean" not in run("info", store).output


@pytest.mark.parametrize("error", [ValueError("Protocol not known: foo"), ImportError("Install s3fs to access S3")])
def test_an_address_that_cannot_be_opened_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refused(_: str) -> None:
        raise error

    monkeypatch.setattr("fsspec.core.url_to_fs", refused)
    for command in ("info", "verify", "digest", "repair"):
        result = run(command, "foo://store")
        assert result.exit_code == 1
        assert result.output.startswith(f"error: foo://store cannot be opened ({error})")
        assert "pip install s3fs" in " ".join(result.output.split())


def test_an_empty_name_is_not_the_current_folder() -> None:
    """As of a variable of the shell that is not set."""
    assert run("info", "").output.startswith("error:  cannot be opened (an empty name)")


def test_repair_hands_damaged_shards_to_whoever_can_harvest(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple] = []

    class Entry:
        @staticmethod
        def load() -> object:
            return lambda url, shards, device, model, undo: (undo(), handed.append((url, shards, device, model)))

    monkeypatch.setattr("saemill.cache_schema.cli.entry_points", lambda group: [Entry])
    monkeypatch.setattr("saemill.cache_schema.cli.NOT_HARVESTED", ())
    flip_byte(store, "resid/layer_4", "c.2.0.0")
    assert run("repair", store, "--device", "cpu").exit_code == 0
    assert handed == [(str(store), [2], "cpu", None)]
    refused = run("repair", store, "--device", "cpu", "--remove-only")
    assert refused.exit_code == 2 and "--model and --device are for harvesting again" in refused.output


def test_verify_goes_on_after_a_broken_record(store: Path) -> None:
    (store / "commits/00000.json").write_text("{")
    flip_byte(store, "resid/layer_4", "c.2.0.0")
    with Store.open(store) as opened:
        reports = list(verify_module.verify_shards(opened))
    assert [bool(report.damage) for report in reports] == [True, False, True]
