"""Dataclasses through JSON and back: nothing is lost, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.cache_schema import AttentionSpec, CorpusSpec, Manifest, ModelSpec
from saemill.cache_schema.commits import ArrayRecord, AttentionTotals, CommitRecord, Index
from saemill.cache_schema.manifest import cache_id, seal
from saemill.cache_schema.strict_json import StrictError, from_json, nearest, to_json


@dataclass(frozen=True)
class Leaf:
    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    name: str
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (1, "a")
    rows: tuple[tuple[int, str], ...] = ()
    by_layer: dict[int, float] = field(default_factory=dict)
    kind: Literal["raw", "lz4"] = "raw"
    note: str | None = None
    ready: bool = False
    anything: Any = None


numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
trees = st.builds(
    Tree,
    name=st.text(),
    leaves=st.lists(st.builds(Leaf, st.integers(), numbers)).map(tuple),
    pair=st.tuples(st.integers(), st.text()),
    rows=st.lists(st.tuples(st.integers(), st.text())).map(tuple),
    by_layer=st.dictionaries(st.integers(-(10**15), 10**15), numbers),
    kind=st.sampled_from(["raw", "lz4"]),
    note=st.none() | st.text(),
    ready=st.booleans(),
    anything=plain,
)
totals = st.builds(AttentionTotals, st.integers(0), st.integers(0), st.integers(0))
records = st.builds(
    CommitRecord,
    cache_id=st.text(),
    shard=st.integers(0),
    windows=st.tuples(st.integers(0), st.integers(0)),
    arrays=st.dictionaries(st.text(), st.builds(ArrayRecord, st.text(), st.integers(0))),
    attention=st.dictionaries(st.integers(0, 99), totals),
)


@given(trees | records | st.builds(Index, cache_id=st.text(), attention=st.dictionaries(st.integers(0, 99), totals)))
def test_what_goes_out_comes_back(value):
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({}, "name: missing"),
        ({"name": 3}, "name: expected a word, found 3"),
        ({"name": "a", "leafs": []}, "leafs: unknown key (did you mean 'leaves'?)"),
        (
            {"name": "a", "leaves": [{"count": 1}, {"count": "x"}]},
            "leaves[1].count: expected a whole number, found 'x'",
        ),
        ({"name": "a", "leaves": [{"count": True}]}, "leaves[0].count: expected a whole number, found True"),
        ({"name": "a", "leaves": [{"count": 1.0}]}, "leaves[0].count: expected a whole number, found 1.0"),
        ({"name": "a", "pair": [1]}, "pair: expected 2 items, found [1]"),
        ({"name": "a", "rows": [[1, "a"], [True, "b"]]}, "rows[1][0]: expected a whole number, found True"),
        ({"name": "a", "rows": [[1, "a"], [2]]}, "rows[1]: expected 2 items, found [2]"),
        ({"name": "a", "by_layer": {"x": 1.0}}, "by_layer.x: expected an integer key"),
        ({"name": "a", "by_layer": {"--5": 1.0}}, "by_layer.--5: expected an integer key"),
        ({"name": "a", "by_layer": {"007": 1.0}}, "by_layer.007: expected an integer key"),
        ({"name": "a", "by_layer": {"9" * 5000: 1.0}}, "expected an integer key"),
        ({"name": "a", "by_layer": {"5": 10**400}}, "by_layer.5: expected a number of at most 1.8e308, found 1000"),
        ({"name": "a", "kind": "zip"}, "kind: expected one of 'raw', 'lz4', found 'zip'"),
        ({"name": "a", "note": 1}, "note: expected a word, found 1"),
        ({"name": "a", "ready": 1}, "ready: expected true or false, found 1"),
        ([], "expected an object, found []"),
    ],
)
def test_each_problem_is_named_with_its_place(raw, problem):
    with pytest.raises(StrictError) as caught:
        from_json(Tree, raw)
    assert len(caught.value.problems) == 1
    assert problem in str(caught.value)


def test_all_problems_come_at_once():
    with pytest.raises(StrictError) as caught:
        from_json(Tree, {"nam": "a", "ready": "yes", "pair": ["x", 1]})
    assert len(caught.value.problems) == 5


def test_nearest_names_neighbours_or_all():
    assert nearest("trian", ["train", "test"]) == " (did you mean 'train'?)"
    assert nearest("layer", ["layers", "layer_"]) == " (did you mean 'layers' or 'layer_'?)"
    assert nearest("zzz", ["train", "test"]) == " (known: test, train)"
    assert nearest("zzz", []) == ""


def test_nearest_of_dotted_names_may_be_near_in_the_last_part_alone():
    known = ["optim.lr", "optim.start", "core.ablations", "k", "seed", "data.seed"]
    assert nearest("optim.lrr", known) == " (did you mean 'optim.lr' or 'optim.start'?)"
    assert nearest("lrr", known) == " (did you mean 'optim.lr'?)"
    assert nearest("ablation", known) == " (did you mean 'core.ablations'?)"
    assert nearest("variant.kk", known) == " (did you mean 'k'?)"


def manifest(**changes: Any) -> Manifest:
    plain = Manifest(
        model=ModelSpec("toy", 6, revision="a"),
        corpus=CorpusSpec("numbers", settings={"seed": 1}),
        context=8,
        layers=(3,),
        windows=10,
        splits={"train": (0, 5), "validation": (5, 8), "test": (8, 10)},
        attention=AttentionSpec(layers=(2,)),
    )
    return dataclasses.replace(plain, **changes)


CHANGES = {
    "model id": {"model": ModelSpec("other", 6, revision="a")},
    "revision": {"model": ModelSpec("toy", 6, revision="b")},
    "dtype": {"model": ModelSpec("toy", 6, revision="a", dtype="float16")},
    "tokenizer": {"model": ModelSpec("toy", 6, revision="a", tokenizer="x")},
    "corpus": {"corpus": CorpusSpec("letters", settings={"seed": 1})},
    "corpus revision": {"corpus": CorpusSpec("numbers", revision="b", settings={"seed": 1})},
    "packing": {"corpus": CorpusSpec("numbers", packing="pad", settings={"seed": 1})},
    "corpus settings": {"corpus": CorpusSpec("numbers", settings={"seed": 2})},
    "context": {"context": 16},
    "layers": {"layers": (3, 4)},
    "attention layers": {"attention": AttentionSpec(layers=(2, 3))},
    "attention topk": {"attention": AttentionSpec(layers=(2,), topk=8)},
    "attention mass": {"attention": AttentionSpec(layers=(2,), mass=0.5)},
    "windows": {"windows": 11, "splits": {"train": (0, 5), "validation": (5, 8), "test": (8, 11)}},
    "splits": {"splits": {"train": (0, 6), "validation": (6, 8), "test": (8, 10)}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_decides_the_bytes_changes_the_cache_id(change):
    assert cache_id(manifest(**change)) != cache_id(manifest())


@pytest.mark.parametrize("change", [{"codec": "zstd"}, {"shard_windows": 2}, {"cache_id": "x"}])
def test_how_the_bytes_lie_does_not_change_the_cache_id(change):
    assert cache_id(manifest(**change)) == cache_id(manifest())


def test_the_cache_id_is_the_same_on_every_host():
    """A literal: a change of it would make every store there is unreadable."""
    assert seal(manifest()).cache_id == "353c78fdfc94d896dd178ad41bba0456"
    assert (
        seal(manifest(corpus=CorpusSpec("Zahlen/über\u2028\U0001f600"))).cache_id == "065f6a9fa53c1306c1691f86087fa5f7"
    )
