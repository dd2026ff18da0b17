"""The words of the command line, read."""

import pytest

from saemill.harvest.config import HarvestConfig, Worker, parse_count, parse_layers, parse_worker
from saemill.harvest.errors import SettingInvalid


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10M", 10**7), ("1.5B", 1_500_000_000), ("200k", 200_000), ("4096", 4096), ("1_000", 1000), (" 2m ", 2 * 10**6)],
)
def test_counts(text, expected):
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "M", "ten", "-5", "1e6", "10MB", "1.2.3"])
def test_counts_that_are_none(text):
    with pytest.raises(SettingInvalid, match="for example"):
        parse_count(text)


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
    assert parse_layers(text, 19) == expected


@pytest.mark.parametrize("text", ["", "..", "1..2..3", "+1..-2", "all", "1;2", "1-2"])
def test_layers_that_are_none(text):
    with pytest.raises(SettingInvalid, match="expected"):
        parse_layers(text, 19)


def test_workers():
    assert parse_worker("3/16") == Worker(2, 16)
    shares = [[shard for shard in range(10) if Worker(i, 3).takes(shard)] for i in range(3)]
    assert sorted(shard for share in shares for shard in share) == list(range(10))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b"])
def test_workers_that_are_none(text):
    with pytest.raises(SettingInvalid, match="3/16"):
        parse_worker(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 1},
        {"shard_windows": 0},
        {"batch_windows": 0},
        {"attention_mass": 0.0},
        {"attention_mass": 1.1},
        {"attention_topk": 0},
        {"tokens": 383},
    ],
)
def test_settings_out_of_range_name_their_option(changes):
    with pytest.raises(SettingInvalid, match="--" + next(iter(changes)).replace("_", "-")):
        HarvestConfig(out="store", **changes)


def test_the_batch_depends_on_nothing_but_the_context():
    contexts = (128, 1024, 8192)
    assert [HarvestConfig(out="x", context=context).windows_per_batch(2304) for context in contexts] == [16, 2, 1]
    assert [HarvestConfig(out="x", context=context).windows_per_batch(128) for context in contexts] == [4, 1, 1]
