"""A build that is stopped goes on: at whatever moment, it ends with the bytes of one that nothing disturbed."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from saemill.cache_schema import StoreUnreachable
from saemill.evaluate.errors import BrowserUnwritten
from saemill.evaluate.evals.browser import browser_folder, collect_firings, evaluation, read_and_encode
from saemill.evaluate.evals.browser.config import Config
from saemill.evaluate.run.find_saes_to_evaluate import find_all
from saemill.train.run.init_from_trained_sae import source_of

CONFIG = Config(windows=30, batch_windows=5, top=2, sample=3, low=1, promoted=4, together_tokens=120)
BATCHES = 4 + 1 + 2  # of 20 windows of test, 4 of validation, 6 of train


class Bench:
    """Builds of one run, with what they encoded and said."""

    def __init__(self, run: Path, open_context, world, monkeypatch):
        self.run, self._open, self._world, self._patch = run, open_context, world, monkeypatch
        self._encoded, self.said, self._stop = [], [], None
        self._number: dict[int, int] = {}  # of each batch of a build
        encode, read = read_and_encode.encode_codes, read_and_encode.read_windows

        def count(subject, batch):
            if self._stop and self._stop[:2] == (self._number[id(batch)], subject.label):
                raise self._stop[2]
            self._encoded.append(subject)
            return encode(subject, batch)

        def numbered(*args, **words):
            for batch in read(*args, **words):
                self._number[id(batch)] = len(self._number) + 1
                self._held.append(batch)
                yield batch

        monkeypatch.setattr(read_and_encode, "encode_codes", count)
        monkeypatch.setattr(read_and_encode, "read_windows", numbered)

    @property
    def encoded(self) -> int:
        """Batches of one SAE each."""
        return len(self._encoded)

    def build(self, home: Path | None = None, config=CONFIG, every=0.0, labels="ab", **settings):
        """What a build, saved behind every batch, says of its SAEs."""
        home = home or self.run
        self._encoded, self.said, self._number, self._held = [], [], {}, []
        self._patch.setattr(read_and_encode, "EVERY", every)
        context = self._open(self._world, **settings)
        self._patch.setattr(context.watch, "say", self.said.append)
        subjects = [one for one in find_all([str(home)], home.parent)[0] if one.label in labels]
        found = list(evaluation.evaluate(context, subjects, config))
        return [(one.metrics, one.unstructured) if hasattr(one, "metrics") else one for one in found]

    @contextmanager
    def stopped(self, number: int, stop: BaseException | type[BaseException]):
        """In a batch, between its two SAEs; the batches before are saved."""
        self._stop = number, "b", stop
        yield
        self._stop = None

    def stop_in_batch(self, number: int, stop: type[BaseException] = KeyboardInterrupt) -> None:
        with self.stopped(number, stop), pytest.raises(stop):
            self.build()

    def goes_on_behind(self) -> int:
        """Batches of all SAEs that the last build did not encode."""
        assert self.encoded % 2 == 0
        told = [line for line in self.said if "continuing where it was stopped" in line]
        assert len(told) == (self.encoded < 2 * BATCHES)
        return BATCHES - self.encoded // 2


@pytest.fixture
def bench(world, builder, open_context, monkeypatch):
    """A run of two SAEs, one sparse, read by two workers; files and what waits are so short that all are met."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(read_and_encode, "SHARE", 0)
    monkeypatch.setattr(read_and_encode, "TEXT_TOKENS", 5 * builder.CONTEXT)
    monkeypatch.setattr(read_and_encode, "ATTENTION_TOKENS", 4 * builder.CONTEXT)
    monkeypatch.setattr(collect_firings, "WAITING", 40)
    run = builder.run(world, "run_1", {"a": builder.make_sae(k=4, seed=1), "b": builder.make_sae(k=None, seed=2)})
    yield Bench(run, open_context, world, monkeypatch)
    torch.set_num_threads(threads)


def taken(home: Path) -> dict[str, bytes]:
    """A run's browser, without the number of its build; nothing of a build is left beside it."""
    assert [path.name for path in home.iterdir() if path.name.startswith(".")] == []
    files = {str(file.relative_to(home)): file.read_bytes() for file in (home / "browser").rglob("*") if file.is_file()}
    (about,) = [json.loads(files["browser/data/run.js"][len(b'saemill("run",') : -len(b");\n")])]
    return {name: data.replace(about["build"].encode(), b"BUILD") for name, data in files.items()}


KILLED = {  # in the middle of which write, and how many batches are not encoded again then
    "data/text/4.js": 5,
    "data/sae_b/latents/0.js": BATCHES,
    "exports/saedashboard/b/batch-0.json": BATCHES,
    "index.html": BATCHES,
    "between the renames": BATCHES,
    "behind the renames": 0,  # the browser is made: another one is asked for
}


def test_killed_on_the_way_it_goes_on_to_the_same_bytes(bench, tmp_path, monkeypatch):
    """What lies on the disk in the middle of a write is all that a killed build leaves."""
    config = replace(CONFIG, exports=("saedashboard",))
    results = bench.build(every=math.inf, config=config)
    whole, home = taken(bench.run), bench.run
    shutil.rmtree(home / "browser")
    (home / "browser").mkdir()  # the one of before

    def keep_what_lies_there(moment: str) -> None:
        shutil.copytree(home, tmp_path / "killed" / moment / home.name)

    write, rename, save = Path.write_text, Path.rename, read_and_encode.save_checkpoint

    def watched_write(path, text, **words):
        moment = str(path.relative_to(home / ".browser.making" / "browser"))
        if moment in KILLED:
            write(path, text[: len(text) // 2], **words)
            keep_what_lies_there(moment)
        return write(path, text, **words)

    def watched_rename(path, to):
        if to == home / "browser":
            keep_what_lies_there("between the renames")
            rename(path, to)
            keep_what_lies_there("behind the renames")
        else:
            rename(path, to)

    def watched_save(path, *args):
        save(path, *args)
        (path / ".step_000000099.tmp").mkdir()  # the next one, killed while it was written
        (path / ".step_000000099.tmp" / "sae_0.safetensors").write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", watched_write)
        patch.setattr(Path, "rename", watched_rename)
        patch.setattr(read_and_encode, "save_checkpoint", watched_save)
        assert bench.build(config=config) == results and taken(home) == whole
    for moment, batches in KILLED.items():
        killed = tmp_path / "killed" / moment / home.name
        assert bench.build(killed, config=config) == results and taken(killed) == whole, moment
        assert bench.goes_on_behind() == batches, moment


@pytest.mark.parametrize("moment", ["read", "write_numbers"])
def test_a_run_that_was_removed_meanwhile_gets_no_browser(bench, monkeypatch, moment):
    """Although what is saved and written behind that makes folders."""
    with monkeypatch.context() as patch:
        go_on = getattr(evaluation, moment)
        patch.setattr(evaluation, moment, lambda *args: shutil.rmtree(bench.run) or go_on(*args))
        found = bench.build()
    assert ["was removed or moved meanwhile" in str(one.error) for one in found] == [True, True]
    assert not bench.run.exists()


def test_while_one_process_makes_a_browser_another_is_told_so(bench, monkeypatch):
    """And touches nothing of it; the lock goes with the process, and what a killed one left of it locks nobody out."""
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    told, write = [], evaluation.write_numbers

    def meanwhile(*args):  # the lock is the open file's: who opens it anew is another, in this process too
        with pytest.raises(BrowserUnwritten) as refused, browser_folder.making(bench.run, 1, "other", print):
            pytest.fail("made")
        told.append(str(refused.value))
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_numbers", meanwhile)
        assert bench.build() == whole and taken(bench.run) == files
    assert told == [f"another process is building {bench.run / 'browser'}: wait until it ends, or stop it"]
    (bench.run / browser_folder.LOCK).touch()
    assert bench.build(every=math.inf) == whole and taken(bench.run) == files


def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    said = []
    with browser_folder.making(tmp_path, 1, "inputs", said.append):
        pass
    assert said == [f"{tmp_path}: no locks on this disk, so nothing keeps a second process from building this browser"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_was_encoded_before_a_stop_is_not_encoded_again(bench, stop):
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    bench.stop_in_batch(4, stop)
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == 3


def test_other_inputs_begin_anew(bench, builder, monkeypatch):
    """Other settings, another SAE under the same name, other rows left out, another program: nothing is taken."""
    for change in ("weights", "rows", "settings", "program"):
        bench.stop_in_batch(4)
        if change == "weights":
            builder.save(bench.run / "a", builder.make_sae(k=4, seed=3))
        if change == "program":
            monkeypatch.setattr(evaluation, "__version__", "0.0.9")
        other = replace(CONFIG, top=5) if change == "settings" else CONFIG
        norms = {"massive_norms": 1.3} if change == "rows" else {}
        result = bench.build(config=other, **norms)
        assert bench.goes_on_behind() == 0, change
    files = taken(bench.run)
    assert bench.build(config=other, every=math.inf) == result and taken(bench.run) == files


def test_all_that_may_compute_other_sums_is_among_the_inputs(bench, monkeypatch):
    """saemill, torch, the number of threads, the processor."""
    inputs = []

    def making(home, size, decided, say):
        inputs.append(decided)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "making", making)
    for change in (
        lambda: None,
        lambda: monkeypatch.setattr(evaluation, "__version__", "0.0.9"),
        lambda: monkeypatch.setattr(torch, "__version__", "0.0.9"),
        lambda: torch.set_num_threads(1),
        lambda: monkeypatch.setattr(evaluation, "has_fast_bfloat16", lambda _: "never"),
    ):
        change()
        with pytest.raises(KeyboardInterrupt):
            bench.build()
    assert len({*inputs}) == 5


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
    assert "browser: what a stopped build had read is damaged: it is read again" in bench.said
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == 1


def test_what_is_killed_while_it_clears_goes_on_or_begins_anew(bench, tmp_path, monkeypatch):
    """A save whose text is gone is not gone on from."""
    whole = bench.build(every=math.inf)
    files, moments = taken(bench.run), []
    bench.stop_in_batch(4)

    def watched_removal(path, **words):
        if bench.encoded == 0:
            moments.append(tmp_path / "killed" / str(len(moments)) / bench.run.name)
            shutil.copytree(bench.run, moments[-1])
        shutil.rmtree(path, **words)

    with monkeypatch.context() as patch:
        patch.setattr(browser_folder, "shutil", SimpleNamespace(rmtree=watched_removal))
        bench.build(config=replace(CONFIG, top=5))
    for moment in moments[1:4]:  # before the save, the text and the attention go
        assert bench.build(moment) == whole and taken(moment) == files, moment


def test_what_is_refused_for_want_of_room_costs_no_save(bench, monkeypatch):
    bench.stop_in_batch(4)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "LATENT_BYTES", 1 << 50)
        failures = bench.build(config=replace(CONFIG, top=5))
    assert ["are free there" in str(failure.error) for failure in failures] == [True] * 2
    bench.build()
    assert bench.goes_on_behind() == 3


def let_saves_fail(monkeypatch, *numbers: int) -> None:
    """Those of these numbers, when the disk has taken a part of them."""
    made, save = itertools.count(1), read_and_encode.save_checkpoint

    def full(path, *args):
        if next(made) not in numbers:
            return save(path, *args)
        (path / ".step_000000099.tmp").mkdir(parents=True)
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(read_and_encode, "save_checkpoint", full)


def test_a_disk_that_takes_no_saves_may_take_the_browser(bench, monkeypatch):
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    let_saves_fail(monkeypatch, *range(1, BATCHES + 1))
    assert bench.build() == whole and taken(bench.run) == files
    (said,) = {line for line in bench.said if "cannot be saved" in line}
    assert said.endswith("(No space left on device): if it is stopped now, it will start again")


@pytest.mark.parametrize("failing, behind", [((2, 3), 1), ((2,), 3)])
def test_a_save_that_fails_costs_none_before_and_none_behind(bench, monkeypatch, failing, behind):
    whole = bench.build(every=math.inf)
    files = taken(bench.run)
    with monkeypatch.context() as patch:
        let_saves_fail(patch, *failing)
        bench.stop_in_batch(4)
    said = [line for line in bench.said if "cannot be saved" in line]
    assert len(said) == len(failing) and all(line.endswith("it will continue from the last save") for line in said)
    assert not list(bench.run.glob(".browser.making/read-*/.step_*"))
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == behind


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
        first, second = bench.build()
    for failure in (first, second):
        assert isinstance(failure.error, BrowserUnwritten)
        assert str(failure.error).endswith("What was read is kept: the same command continues from there")
    assert bench.build() == whole and taken(bench.run) == files
    assert bench.goes_on_behind() == BATCHES


def test_a_store_that_goes_away_is_named_as_it_is(bench):
    """And is not asked again for each SAE alone, which would cost what was read for all."""
    unreachable = StoreUnreachable(errno.EIO, "the network is gone")

    with bench.stopped(4, unreachable):
        assert [failure.error for failure in bench.build()] == [unreachable] * 2
    bench.build()
    assert bench.goes_on_behind() == 3


@pytest.mark.parametrize("seconds, saves", [(1, BATCHES), (100, 1)])
def test_saving_takes_a_small_share_of_the_time(bench, monkeypatch, seconds, saves):
    """By a clock on which each batch takes half a minute and each save so many seconds."""
    clock, saved = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(read_and_encode, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(read_and_encode, "SHARE", 20)
    meet = read_and_encode.Vocabulary.meet

    def slow_meet(words, ids):  # once for each batch, before it may be saved
        clock.now += 30
        return meet(words, ids)

    def slow_save(*_):
        clock.now += seconds
        saved.append(clock.now)

    monkeypatch.setattr(read_and_encode.Vocabulary, "meet", slow_meet)
    monkeypatch.setattr(read_and_encode, "save_checkpoint", slow_save)
    bench.build(every=30)
    assert len(saved) == saves


def test_pages_of_other_weights_do_not_stay(bench, builder):
    """An SAE trained anew under its label is not shown with the pages of the one before."""
    bench.build(every=math.inf)
    bench.build(every=math.inf, labels="a")
    saes = browser_folder.read_data(bench.run / "browser", "run")["saes"]
    assert [(sae["label"], sae["sha256"]) for sae in saes] == [
        (label, source_of(bench.run / label).sha256) for label in "ab"
    ]
    builder.save(bench.run / "b", builder.make_sae(k=None, seed=9))
    bench.build(every=math.inf, labels="a")
    assert [sae["label"] for sae in browser_folder.read_data(bench.run / "browser", "run")["saes"]] == ["a"]
    assert [line for line in bench.said if line.startswith("browser: b left out, whose weights have changed")]
