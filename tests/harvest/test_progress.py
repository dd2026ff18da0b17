"""What a person sees."""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
from rich.console import Console

from saemill.cache_schema.commits import ArrayRecord, CommitRecord
from saemill.cache_schema.disk_and_cloud_files import LocalFiles
from saemill.harvest import progress
from saemill.harvest.progress import Watch
from saemill.harvest.run import report_shard

RECORD = CommitRecord("id", 0, (0, 10), {"tokens": ArrayRecord("digest", 3 * 10**9)})


def watched(is_terminal: bool, tmp_path, width: int = 200) -> str:
    out = io.StringIO()
    watch = Watch(Console(file=out, force_terminal=is_terminal, width=width))
    with watch.stage("harvesting", 2560) as stage:
        report_shard(stage, Counter(), 128, LocalFiles(tmp_path), RECORD)
    return out.getvalue()


def test_a_terminal_shows_rate_time_left_bytes_and_disk(tmp_path):
    shown = watched(True, tmp_path)
    for words in ("harvesting", "1,280 of 2,560 tokens", "/s", "3.00 GB written", "B free", "left"):
        assert words in shown


def test_of_the_shards_before_only_the_sum_is_kept(tmp_path):
    """A list of a million sizes, added up at every shard, is an hour."""
    sizes, said = Counter[str](), list[str]()
    for _ in range(3):
        report_shard(lambda _, facts="": said.append(facts), sizes, 128, LocalFiles(tmp_path), RECORD)
    assert sizes == {"bytes": 9 * 10**9}
    assert [line.split(",")[0] for line in said] == ["3.00 GB written", "6.00 GB written", "9.00 GB written"]


@pytest.mark.parametrize(("width", "has_bar"), [(60, False), (80, False), (110, True), (150, True)])
def test_the_time_left_is_whole_on_a_narrow_terminal_and_what_has_no_room_is_left_out(tmp_path, width, has_bar):
    last = re.split(r"[\r\n]+", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", watched(True, tmp_path, width)).strip())[-1]
    assert re.search(r" 50% 1,280 of 2,560 tokens.* left (\d:\d\d:\d\d|-:--:--)$", last), last
    assert len(last) <= width and "…" not in last and ("━" in last) == has_bar and (" free" in last) == (width == 150)


def test_a_log_gets_a_line_now_and_then(tmp_path, monkeypatch):
    assert watched(False, tmp_path) == ""
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)
    assert watched(False, tmp_path).count("\n") == 1
    assert re.search(r", 3\.00 GB written, .*B free, \d+ seconds? left", watched(False, tmp_path))


@pytest.mark.parametrize("lines", ["one", ["one", "two"], ()])
def test_brackets_in_messages_are_not_markup(lines):
    out = io.StringIO()
    Watch(Console(file=out)).say(lines)
    Watch(Console(file=out)).say("[bold]")
    assert out.getvalue().endswith("[bold]\n")


def test_what_earlier_runs_packed_is_not_counted_into_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    watch = Watch(Console(file=out, width=200))
    with watch.stage("tokenising", 10_000) as stage:
        stage.reach(6_000, "10 documents")
        now[0] = 40.0
        stage.reach(8_000, "20 documents")
    assert "8,000 of 10,000 tokens, 50/s, 20 documents, 40 seconds left" in out.getvalue()
