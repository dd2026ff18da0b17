"""FORMAT.md is normative: its tables are read here and held against the code."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from saemill.cache_schema import AttentionSpec, CorpusSpec, HookSpec, Manifest, ModelSpec
from saemill.cache_schema import layout as layout_module
from saemill.cache_schema.commits import CommitRecord, Index
from saemill.cache_schema.layout import arrays_of, codec_documents
from saemill.cache_schema.manifest import FORMAT, NOT_IDENTITY, Codec
from saemill.cache_schema.sites import HOOKS
from saemill.cache_schema.stored_dtypes import STORED_AS, SmallDtype

PAGE = (Path(layout_module.__file__).parent / "FORMAT.md").read_text()
N, T, D, E, W, S, H, K = 300, 32, 48, 40, 64, 5, 2, 4
LETTERS = {"N": N, "T": T, "D": D, "E": E, "S": S, "H": H, "R + 1": W * H * T + 1, "C": W * H * T * K, "M": 4 + T + D}
LETTERS["M'"] = 4 + T + E


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its header."""
    lines = PAGE.split(f"\n{heading}", 1)[1].splitlines()
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    assert len(rows) > 2, f"no table below {heading!r}"
    return rows[2:]


def manifest(dtype: str = "bfloat16", codec: str = "raw", stored_as: str | None = None) -> Manifest:
    return Manifest(
        model=ModelSpec("m", D, dtype),
        corpus=CorpusSpec("c"),
        context=T,
        layers=(19,),
        windows=N,
        splits={"train": (0, 200), "validation": (200, 250), "test": (250, N)},
        attention=AttentionSpec(layers=(17,), heads=H, averaged=False, topk=K),
        shard_windows=W,
        codec=codec,
        hooks={"q": HookSpec((19,), E)},
        stored_as=stored_as,
    )


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("codec", get_args(Codec))
def test_array_table_is_what_the_code_lays_out(dtype: str, codec: str) -> None:
    small = dtype in get_args(SmallDtype)
    laid_out = arrays_of(manifest("bfloat16" if small else dtype, codec, dtype if small else None)).items()
    arrays = {re.sub(r"\bq/", "HOOK/", re.sub(r"layer_\d+", "layer_L", path)): array for path, array in laid_out}
    rows = table_after("## 2. Arrays")
    rows = [row for row in rows if small or not row[0].startswith("`scales/")]
    assert {row[0].strip("`") for row in rows} == set(arrays)
    for path, types, shape, chunk, fill, which in rows:
        array = arrays[path.strip("`")]
        assert array.dtype.name in re.split(r", | or ", types)
        assert array.shape == tuple(LETTERS[letter.strip()] for letter in shape.split(","))
        assert (
            array.chunks[0] in {"w": [W], "1": [1], "a divisor of w": [n for n in range(1, W + 1) if W % n == 0]}[chunk]
        )
        assert array.chunks[1:] == array.shape[1:]
        assert str(array.document()["fill_value"]) in re.split(r", | or ", fill)
        assert array.codec == {"store": codec, "packed": "zstd" if codec == "raw" else codec, "raw": "raw"}[which]


def test_codec_table_is_the_chain_that_is_written() -> None:
    assert tuple(name for name, _ in table_after("### Codecs")) == get_args(Codec)
    for name, chain in table_after("### Codecs"):
        documents = codec_documents(name, arrays_of(manifest())["tokens"].dtype)
        written = []
        for document in documents:
            config = document.get("configuration", {})
            extra = f" ({config['cname']}, level {config['clevel']}, {config['shuffle']}" if "cname" in config else ""
            blocks = f", blocks of {config['blocksize']} bytes" if config.get("blocksize") else ""
            written.append(document["name"] + extra + blocks + ")" * bool(extra))
        assert re.split(r", (?![^(]*\))", chain) == written


def test_moment_columns_are_those_of_the_attribute() -> None:
    columns = arrays_of(manifest())["stats/layer_19"].attributes["columns"]
    assert [row[0] for row in table_after("### Statistics")] == list(columns)
    assert columns["mean"][1] - columns["mean"][0] == D
    assert columns["norm_by_position"][1] - columns["norm_by_position"][0] == T


@pytest.mark.parametrize(
    ("heading", "record"),
    [("## 3. The manifest", Manifest), ("## 5. Commits", CommitRecord), ("`commits/index.json`", Index)],
)
def test_record_tables_name_every_key(heading: str, record: type) -> None:
    assert [row[0] for row in table_after(heading)] == [field.name for field in dataclasses.fields(record)]


def test_nested_manifest_keys_are_named() -> None:
    meanings = dict(table_after("## 3. The manifest"))
    for key, record in (
        ("model", ModelSpec),
        ("corpus", CorpusSpec),
        ("attention", AttentionSpec),
        ("hooks", HookSpec),
    ):
        assert set(re.findall(r"`(\w+)`", meanings[key])) == {field.name for field in dataclasses.fields(record)}


def test_hook_table_names_every_hook() -> None:
    assert ["resid", *(row[0] for row in table_after("### Hooks"))] == list(HOOKS)


def test_identity_leaves_out_what_the_page_says() -> None:
    sentence = PAGE.split("## 4. Identity")[1].split("with sorted keys")[0]
    assert set(NOT_IDENTITY) == set(re.findall(r"`(\w+)`", sentence))


def test_version_is_the_one_in_the_title() -> None:
    assert PAGE.startswith(f"# The store, format {FORMAT}\n")
