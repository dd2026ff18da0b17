"""A build that is stopped goes on: at whatever moment, it ends with the bytes of one that nothing disturbed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from saemill.cache_schema import StoreUnreachable
from saemill.evaluate.errors import BrowserUnwritten
from saemill.evaluate.evals.browser import evaluation, folder, kept_firings, reading
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.run.find_saes import find_subjects

CONFIG = Config(windows=30, batch_windows=5, top=2, sample=3, low=1, promoted=4, together_tokens=120)
BATCHES = 4 + 1 + 2  # of 20 windows of test, 4 of validation, 6 of train


class Bench:
    """Builds of one run, with what they encoded and said."""

    def __init__(self, run: Path, open_context, world, monkeypatch):
        self.run, self._open, self._world, self._patch = run, open_context, world, monkeypatch
        self.encoded, self.said, self.before_encoding = 0, [], lambda: None
        encode = reading.encode_codes

        def count(subject, batch):
            self.before_encoding()
            self.encoded += 1
            return encode(subject, batch)

        monkeypatch.setattr(reading, "encode_codes", count)

    def build(self, home: Path | None = None, config=CONFIG, every=0.0, labels="ab", **settings):
        """What a build, saved behind every batch, says of its SAEs."""
        home = home or self.run
        self.encoded, self.said = 0, []
        self._patch.setattr(reading, "EVERY", every)
        context = self._open(self._world, **settings)
        self._patch.setattr(context.watch, "say", self.said.append)
        subjects = [one for one in find_subjects([str(home)], home.parent) if one.label in labels]
        found = list(evaluation.evaluate(context, subjects, config))
        return [(one.metrics, one.unstructured) if hasattr(one, "metrics") else one for one in found]

    def stop_in_batch(self, number: int, stop: type[BaseException] = KeyboardInterrupt) -> None:
        """Between its two SAEs; the batches before are saved."""

        def stop_there():
            if self.encoded == 2 * number - 1:
                raise stop

        self.before_encoding = stop_there
        with pytest.raises(stop):
            self.build()
        self.before_encoding = lambda: None

    def goes_on_behind(self) -> int:
        """Batches of all SAEs that the last build did not encode."""
        assert self.encoded % 2 == 0
        told = [line for line in self.said if "goes on where it was stopped" in line]
        assert len(told) == (self.encoded < 2 * BATCHES)
        return BATCHES - self.encoded // 2


@pytest.fixture
def bench(world, builder, open_context, monkeypatch):
    """A run of two SAEs, one of them sparse; files and what waits are so short that all of them are met."""
    monkeypatch.setattr(reading, "SHARE", 0)
    monkeypatch.setattr(reading, "TEXT_TOKENS", 5 * builder.CONTEXT)
    monkeypatch.setattr(reading, "ATTENTION_TOKENS", 4 * builder.CONTEXT)
    monkeypatch.setattr(kept_firings, "WAITING", 40)
    run = builder.run(world, "run_1", {"a": builder.make_sae(k=4, seed=1), "b": builder.make_sae(k=None, seed=2)})
    return Bench(run, open_context, world, monkeypatch)


def taken(home: Path) -> dict[str, bytes]:
    """A run's browser, without the number of its build; nothing of a build is left beside it."""
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []
    files = {str(file.relative_to(home)): file.read_bytes() for file in (home / "browser").rglob("*") if file.is_file()}
    (about,) = [json.loads(files["browser/data/run.js"][len(b'saemill("run",') : -len(b");\n")])]
    return {name: data.replace(about["build"].encode(), b"BUILD") for name, data in files.items()}


def test_killed_at_any_write_it_goes_on_to_the_same_bytes(bench, tmp_path, monkeypatch):
    """What lies on the disk before and in the middle of each write is all that a killed build leaves."""
    results = bench.build(every=math.inf)
    whole, home, moments = taken(bench.run), bench.run, []
    shutil.rmtree(home / "browser")

    def keep_what_lies_there() -> None:
        moments.append(tmp_path / "killed" / str(len(moments)) / home.name)
        shutil.copytree(home, moments[-1])

    write, save = folder.write_data, reading.save_checkpoint

    def watched_write(*args):
        keep_what_lies_there()
        return write(*args)

    def watched_save(path, *args):
        save(path, *args)
        (path / ".step_000000099.tmp").mkdir()  # the next one, killed while it was written
        (path / ".step_000000099.tmp" / "sae_0.safetensors").write_bytes(b"half")

    monkeypatch.setattr(folder, "write_data", watched_write)
    monkeypatch.setattr(reading, "save_checkpoint", watched_save)
    assert bench.build() == results and taken(home) == whole
    monkeypatch.setattr(folder, "write_data", write)
    monkeypatch.setattr(reading, "save_checkpoint", save)
    read_before = []
    for moment in moments[:: len(moments) // 4]:
        assert bench.build(moment) == results and taken(moment) == whole, moment
        read_before.append(bench.goes_on_behind())
    assert read_before == sorted(read_before) and read_before[0] < 3 and read_before[-2:] == [BATCHES] * 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_was_encoded_before_a_stop_is_not_encoded_again(bench, stop):
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    bench.stop_in_batch(4, stop)
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == 3


def test_other_inputs_begin_anew(bench, builder, open_context, world):
    """Other settings, another SAE under the same name, other rows left out: nothing of before is taken."""
    for change in ("weights", "rows", "settings"):
        bench.stop_in_batch(4)
        if change == "weights":
            builder.save(bench.run / "a", builder.make_sae(k=4, seed=3))
        other = replace(CONFIG, top=5) if change == "settings" else CONFIG
        norms = {"massive_norms": 1.3} if change == "rows" else {}
        result = bench.build(config=other, **norms)
        assert bench.goes_on_behind() == 0, change
    files = taken(bench.run)
    assert bench.build(config=other, every=math.inf) == result and taken(bench.run) == files


def test_what_was_damaged_is_not_read(bench):
    """The save before is taken; where that is damaged too, it begins anew, says why, and can be stopped again."""
    whole = bench.build(every=math.inf)
    files = taken(bench.run)

    def damage(newest: int) -> None:
        saves = sorted(bench.run.glob(".browser.making/read-*/step_*"), reverse=True)
        for save in saves[:newest]:
            data = bytearray((save / "sae_1.safetensors").read_bytes())
            data[-1] ^= 1
            (save / "sae_1.safetensors").write_bytes(data)

    bench.stop_in_batch(4)
    damage(newest=1)
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == 2
    bench.stop_in_batch(4)
    damage(newest=2)
    bench.stop_in_batch(2)
    assert "browser: what a stopped build had read is damaged: it is read anew" in bench.said
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == 1


def test_a_disk_that_takes_no_saves_may_take_the_browser(bench, monkeypatch):
    whole = bench.build(every=math.inf)
    files, save = taken(bench.run), reading.save_checkpoint

    def full(path, *args):
        save(path, *args)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(reading, "save_checkpoint", full)
    assert bench.build() == whole and taken(bench.run) == files
    (said,) = [line for line in bench.said if "cannot be saved" in line]  # and is not tried again
    assert said.endswith("(No space left on device): stopped, it would be read anew")


def test_where_the_disk_was_full_it_goes_on_when_there_is_room(bench, builder, monkeypatch):
    """Beside an SAE of the browser before, which a stopped build has copied already."""
    builder.save(bench.run / "c", builder.make_sae(seed=4))
    bench.build(every=math.inf, labels="abc")
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    assert "browser/data/sae_c/columns.js" in files

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_numbers", full)
        failures = bench.build()
    for failure in failures:
        assert isinstance(failure.error, BrowserUnwritten)
        assert str(failure.error).endswith("What was read is kept: the same command goes on from there")
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == BATCHES


def test_a_store_that_goes_away_is_named_as_it_is(bench):
    """And is not asked again for each SAE alone, which would cost what was read for all."""
    unreachable = StoreUnreachable(errno.EIO, "the network is gone")

    def gone():
        if bench.encoded == 7:
            raise unreachable

    bench.before_encoding = gone
    assert [failure.error for failure in bench.build()] == [unreachable] * 2
    bench.before_encoding = lambda: None
    bench.build()
    assert bench.goes_on_behind() == 3


@pytest.mark.parametrize("seconds, saves", [(1, BATCHES), (100, 1)])
def test_saving_takes_a_small_share_of_the_time(bench, monkeypatch, seconds, saves):
    """By a clock on which each batch takes half a minute and each save so many seconds."""
    clock, saved = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(reading, "SHARE", 20)
    meet = reading.Vocabulary.meet

    def slow_meet(words, ids):  # once for each batch, before it may be saved
        clock.now += 30
        return meet(words, ids)

    def slow_save(*_):
        clock.now += seconds
        saved.append(clock.now)

    monkeypatch.setattr(reading.Vocabulary, "meet", slow_meet)
    monkeypatch.setattr(reading, "save_checkpoint", slow_save)
    bench.build(every=30)
    assert len(saved) == saves
