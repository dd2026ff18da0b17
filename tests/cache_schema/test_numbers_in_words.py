"""Numbers for a person."""

import pytest

from saemill.cache_schema.numbers_in_words import counted, first_line, say_busy, say_size, say_time


@pytest.mark.parametrize(("number", "words"), [(0, "0 shards"), (1, "1 shard"), (2000, "2,000 shards")])
def test_of_one_there_is_no_plural(number, words):
    assert counted(number, "shard") == words


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (say_size(30_400_000), "30.40 MB"),
        (say_size(10_460_000_000), "10.46 GB"),
        (say_time(1.2), "1 second"),
        (say_time(40), "40 seconds"),
        (say_time(90), "1.5 minutes"),
        (say_time(7200), "2.0 hours"),
    ],
)
def test_the_unit_is_one_that_fits(said, words):
    assert said == words


def test_a_machine_is_busy_if_others_use_more_than_half_of_it(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for load, said in ((2.0, ""), (2.5, "load 2.5 on 4 cores")):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert said in say_busy() and bool(said) == bool(say_busy())


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError("\nno route\nmore"), "no route"), (MemoryError(), "MemoryError"), (OSError(" "), "OSError")],
)
def test_of_an_error_there_is_a_line(error, words):
    assert first_line(error) == words
