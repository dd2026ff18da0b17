"""The words of the command line, read."""

from typing import Any

import pytest

from saemill.harvest.config import HarvestConfig, Worker, parse_count, parse_worker, read_layers
from saemill.harvest.corpus.source import OPENWEBTEXT, DatasetOptions
from saemill.harvest.errors import LayerOutOfRange, SettingInvalid
from saemill.harvest.model.load_and_truncate import ModelFacts, Wanted
from saemill.harvest.model.resolve import Choice
from saemill.harvest.store_plan import Plan, wanted_layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10M", 10**7),
        ("1.5B", 1_500_000_000),
        ("200k", 200_000),
        ("4096", 4096),
        ("1_000", 1000),
        (" 2m ", 2 * 10**6),
        ("10,000", 10_000),
        ("4.1M", 4_100_000),
        ("1e6", 10**6),
        ("1000000.0", 10**6),
    ],
)
def test_counts(text, expected):
    assert parse_count(text) == expected


@pytest.mark.parametrize(
    "text", ["", "M", "ten", "-5", "2.5", "1e999", "10MB", "1.2.3", "16,32", "1,5M", "1024,2048", "10,000k"]
)
def test_counts_that_are_none(text):
    with pytest.raises(SettingInvalid, match="--tokens: expected a whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("model", "dataset", "tokens"),
    [
        ("google/gemma-2-2b", None, 10_000_000),
        ("google/gemma-2-2b", "stdlib", 600_000),
        ("smollm2", None, 600_000),
        ("pocket", None, 600_000),
        ("pocket", OPENWEBTEXT, 600_000),
    ],
)
def test_default_tokens_suit_model_and_text(model, dataset, tokens):
    config = HarvestConfig("store", corpus=dataset and DatasetOptions(dataset))
    rest: Any = (None, None, None, None)
    assert Plan(config, *rest, Choice(model)).tokens == tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-2..+1", (17, 18, 19, 20)),
        ("17..20", (17, 18, 19, 20)),
        ("20,3", (3, 20)),
        ("+0", (19,)),
        ("0", (0,)),
        ("-1,5..6,+1", (5, 6, 18, 20)),
        ("none", ()),
    ],
)
def test_layers(text, expected):
    assert read_layers(text, 19, "--resid-layers") == expected


@pytest.mark.parametrize("text", ["", "..", "1..2..3", "+1..-2", "all", "1;2", "1-2", "0..9999999999"])
def test_layers_that_are_none(text):
    with pytest.raises(SettingInvalid, match="--resid-layers: expected"):
        read_layers(text, 19, "--resid-layers")


def test_workers():
    assert parse_worker("3/16") == Worker(2, 16)
    shares = [[shard for shard in range(10) if Worker(i, 3).takes(shard)] for i in range(3)]
    assert sorted(shard for share in shares for shard in share) == list(range(10))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "1/" + "9" * 5000], ids=lambda text: text[:3])
def test_workers_that_are_none(text):
    with pytest.raises(SettingInvalid, match="3/16"):
        parse_worker(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 1},
        {"shard_windows": 0},
        {"batch_windows": 0},
        {"batch_windows": 9, "shard_windows": 8},
        {"attention_mass": 0.0},
        {"attention_mass": 1.1},
        {"attention_topk": 0},
        {"tokens": 383},
    ],
)
def test_settings_out_of_range_name_their_option(changes):
    with pytest.raises(SettingInvalid, match="--" + next(iter(changes)).replace("_", "-")):
        HarvestConfig(out="store", **changes)


@pytest.mark.parametrize(
    ("context", "windows"), [(2, 16384), (64, 512), (100, 256), (128, 256), (1024, 32), (32768, 1), (40000, 1)]
)
def test_a_shard_has_as_many_tokens_whatever_the_context(context, windows):
    assert HarvestConfig("store", context=context).windows_per_shard == windows


def test_a_batch_decides_bits_and_does_not_depend_on_how_large_shards_are_by_default():
    for context, windows in ((2, 256), (128, 16), (4096, 1)):
        assert HarvestConfig("store", context=context).windows_per_batch(2304) == windows
    assert HarvestConfig("store", context=1024, batch_windows=64).windows_per_shard == 64


@pytest.mark.parametrize("name", ["resid_layers", "attention_layers"])
@pytest.mark.parametrize("text", ["all", ""])
def test_layers_are_read_before_a_model_is_looked_for(name, text):
    """Those of an unset variable of the shell too."""
    with pytest.raises(SettingInvalid, match=f"--{name.replace('_', '-')}: expected layers such as .*, found '{text}'"):
        HarvestConfig(out="store", **{name: text})


@pytest.mark.parametrize(
    "changes", [{"attention_mass": 0.9}, {"attention_topk": 8}, {"attention_heads": "all"}, {"leave_out": ("bos",)}]
)
def test_what_is_said_of_attention_that_is_not_kept_is_refused(changes):
    option = next(iter(changes)).replace("_", "-")
    for none in ((), "none"):
        with pytest.raises(SettingInvalid, match=f"--{option}: no --attention-layers are asked for"):
            HarvestConfig("store", attention_layers=none, **changes)
    HarvestConfig("store", **changes)


def test_a_range_from_a_number_to_a_distance_is_read_by_the_models_layer():
    """At no layer was it: before one is known, its end seems to lie before its beginning."""
    facts = ModelFacts("llama", num_layers=30, d_model=576, num_heads=9, max_context=8192, vocab_size=49152)
    config = HarvestConfig("store", layer=19, attention_layers="17..+1", hooks="resid,mlp_in:18..+0")
    assert wanted_layers(config, facts) == Wanted((19,), (17, 18, 19, 20), {"mlp_in": (18, 19)})
    with pytest.raises(SettingInvalid, match=r"--attention-layers: expected a rising range .*, found '17\.\.\+1'"):
        wanted_layers(HarvestConfig("store", layer=3, attention_layers="17..+1"), facts)


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ("mlp_in", "mlp_in for none. Add resid"),
        ("resid:5", "resid:5 for those of other layers"),
        ("resid:5,mlp_in", "those of other layers"),
        ({"resid": (5,)}, "those of other layers"),
    ],
)
def test_layers_of_residuals_that_hooks_would_leave_out_are_refused(hooks, words):
    with pytest.raises(SettingInvalid, match=f"--resid-layers asks for residuals, --hooks .*{words}"):
        HarvestConfig("store", resid_layers="17..20", hooks=hooks)
    for kept in ("resid", "resid,resid:5", "mlp_in:2,resid", {"mlp_in": (2,)}):
        HarvestConfig("store", resid_layers="17..20", hooks=kept)


@pytest.mark.parametrize("dataset", ["stdlib", "docs:/usr/share/doc", "./text.jsonl"])
@pytest.mark.parametrize("beside", ["config", "split", "revision", "column"])
def test_what_a_corpus_would_not_heed_is_refused(dataset, beside):
    options = DatasetOptions(dataset, **{beside: "other"})
    if dataset == "./text.jsonl" and beside == "column":
        assert HarvestConfig("store", corpus=options).corpus == options
        return
    with pytest.raises(SettingInvalid, match=rf"--(dataset-)?{beside} other has no effect with --dataset {dataset}"):
        HarvestConfig("store", corpus=options)
    HarvestConfig("store", corpus=DatasetOptions("owner/name", **{beside: "other"}))


@pytest.mark.parametrize(
    ("changes", "resid", "attention"),
    [
        ({}, (15,), (13, 14, 15, 16)),
        ({"resid_layers": "-1..+1"}, (14, 15, 16), (13, 14, 15, 16)),
        ({"layer": 4}, (4,), (2, 3, 4, 5)),
        ({"layer": 4, "resid_layers": "+2", "attention_layers": "none"}, (4, 6), ()),
        ({"resid_layers": (2,), "attention_layers": (3,)}, (2,), (3,)),
        ({"layer": 0}, (0,), (0, 1)),
        ({"layer": 1}, (1,), (0, 1, 2)),
        ({"layer": 29}, (29,), (27, 28, 29)),
    ],
)
def test_layers_are_counted_from_the_models_own_unless_one_is_named(changes, resid, attention):
    facts = ModelFacts("llama", num_layers=30, d_model=576, num_heads=9, max_context=8192, vocab_size=49152)
    assert wanted_layers(HarvestConfig(out="store", **changes), facts) == Wanted(resid, attention)


def test_only_the_usual_layers_of_attention_are_clipped_to_the_models():
    facts = ModelFacts("llama", num_layers=30, d_model=576, num_heads=9, max_context=8192, vocab_size=49152)
    with pytest.raises(LayerOutOfRange, match="attention of layer -2: the model has layers 0 to 29"):
        wanted_layers(HarvestConfig("store", layer=0, attention_layers="-2..+1"), facts)
    with pytest.raises(LayerOutOfRange, match="residual of layer 99: the model has layers 0 to 29"):
        wanted_layers(HarvestConfig("store", layer=99), facts)


def test_layers_in_any_order_ask_for_the_same():
    facts = ModelFacts("llama", num_layers=30, d_model=576, num_heads=9, max_context=8192, vocab_size=49152)
    one = HarvestConfig("store", resid_layers=(4, 2), attention_layers=(3, 3, 1), hooks={"z": (2, 1), "mlp_in": (1, 2)})
    other = HarvestConfig("store", resid_layers=(2, 4), attention_layers=(1, 3), hooks="resid,mlp_in:1..2,z:2,z:1")
    found = wanted_layers(one, facts)
    assert found == wanted_layers(other, facts) == Wanted((2, 4), (1, 3), {"mlp_in": (1, 2), "z": (1, 2)})
    assert list(found.hooks) == ["mlp_in", "z"]


@pytest.mark.parametrize(
    ("kind", "layers", "usual"), [("llama", 30, 15), ("gemma2", 26, 19), ("gemma2", 42, 21), ("qwen2", 24, 12)]
)
def test_the_usual_layer_is_the_middle_one_and_of_gemma_2_2b_the_studies(kind, layers, usual):
    facts = ModelFacts(kind, layers, d_model=8, num_heads=1, max_context=8, vocab_size=8)
    assert facts.usual_layer == usual


def test_the_batch_depends_on_nothing_but_the_context():
    contexts = (128, 1024, 8192)
    assert [HarvestConfig(out="x", context=context).windows_per_batch(2304) for context in contexts] == [16, 2, 1]
    assert [HarvestConfig(out="x", context=context).windows_per_batch(128) for context in contexts] == [4, 1, 1]
