"""A run under any sequence of events, beside a model of what must hold.

Events: it begins; it is killed before a step or before any call into the disk, and the power goes; the disk
is full or fails; the newest checkpoint is damaged; the run, or the store, moves; it is resumed, in as many
processes as before or in others: one, two that have an SAE each, two that have half of each batch. What must
hold: it goes on from the newest checkpoint that was saved whole, and ends with the bits of a run that nobody
disturbed: weights, optimiser, log; to rounding where batches were halved. Steps are those of tiny SAEs, processes
are threads that take turns (processes of their own are in test_distributed.py); everything around them is real.
"""

from __future__ import annotations

import errno
import io
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from rich.console import Console

from saemill.cache_schema import Store
from saemill.train import train_runs
from saemill.train.config.run_config import RunRequest
from saemill.train.disk.write_and_load_checkpoints import list_checkpoints
from saemill.train.errors import ConfigInvalid, NothingToTrain, RunMissing, RunNotWritten
from saemill.train.parallel.processes import SOLO
from saemill.train.run import checkpoints_and_signals as checkpoints_module
from saemill.train.run.fill_config_from_store import settle
from saemill.train.run.log_and_show_progress import Watch
from saemill.train.run.process import Process
from saemill.train.run.run_folder import RunFolder, cache_of
from saemill.train.run.start_or_resume import Run, begin_run, resume_run
from saemill.train.train_runs import train

from ... import shaky_disk
from ...thread_ranks import make as make_ranks

SETTINGS = {"layer": 3, "width": 8, "data.batch_tokens": 16, "data.pool_tokens": 32, "course.epochs": 1}
SETTINGS |= {"course.checkpoint_every_steps": 2, "course.metrics_every_steps": 1}
MEMBERS = [{"k": 2}, {"k": 3}]
MOVES = "same_document_ratio"  # is of the rows of the first process
WINDOWS = (28, 34)  # ends of train and validation: 12 steps

steps, calls, seeds = st.integers(0, 12), st.integers(1, 40), st.integers(0, 10**6)
dies_at_step, dies_at_call = st.tuples(st.just("step"), steps), st.tuples(st.just("call"), calls)
ends = dies_at_step | dies_at_call | st.just(("never", 0))
places = st.sampled_from(["alone", "an SAE each", "half a batch each"])


class Facts:
    """What all machines share: a store, and the bits of a run that nobody disturbed."""

    def __init__(self, home: Path, store: Path, bits: Callable[[Path], Any]) -> None:
        self.home, self.store, self.bits = home, store, bits
        self.count()
        self.begin("alone", home, store)
        self.straight = bits(home / "run")

    def count(self) -> None:
        self.rules, self.faults = 0, Counter[str]()
        self.places: Counter[str] = Counter()

    def begin(self, place: str, home: Path, cache: Path, look: Callable[[Run], None] = lambda run: None) -> None:
        def work(process: Process) -> None:
            with Store.open(cache) as store:
                settled = settle(RunRequest.of_variants(["topk"], SETTINGS, MEMBERS), store)
                with begin_run(settled, store, process, str(home), "run") as run:
                    look(run)
                    train(run)

        self._in_each(place, work)

    def go_on(self, place: str, home: Path, cache: Path, look: Callable[[Run], None]) -> None:
        def work(process: Process) -> None:
            folder = RunFolder.open(home, "run")
            with (
                Store.open(cache, expect_cache_id=cache_of(folder)[1]) as store,
                resume_run(folder, store, process) as run,
            ):
                look(run)
                train(run)

        self._in_each(place, work)

    def _in_each(self, place: str, work: Callable[[Process], None]) -> None:
        """The command in each of its processes."""
        self.places[place] += 1
        cpu, console = torch.device("cpu"), Console(file=io.StringIO())
        if place == "alone":
            work(Process(SOLO, SOLO, cpu, console))
            return
        ranks, run = make_ranks(2)
        is_spread = place == "an SAE each"
        run(lambda at: work(Process(ranks[at], SOLO if is_spread else ranks[at], cpu, console)))


class RunMachine(RuleBasedStateMachine):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.home = facts.home / uuid.uuid4().hex
        self.home.mkdir()
        self.runs, self.cache = self.home / "runs", facts.store
        self.has_halved = False
        self.saved: list[int] = []  # steps of checkpoints whose saving has returned
        self.damaged: set[int] = set()
        self.disk = shaky_disk.ShakyDisk(self.home)
        self.disk.flush_all()
        self.disk.install()

    def teardown(self) -> None:
        """However it went, the run can be ended, and has the bits."""
        self.disk.be_well()
        if self.is_begun and not self.is_finished:
            self.advance("alone", ("never", 0), None)
            assert self.is_finished
        self.disk.remove()
        self.facts.faults += self.disk.faults
        shutil.rmtree(self.home)

    @property
    def folder(self) -> Path:
        return self.runs / "run"

    @property
    def is_begun(self) -> bool:
        return (self.folder / "config.json").exists()

    @property
    def is_finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def advance(self, place: str, end: tuple[str, int], seed: int | None) -> None:
        """Begin or go on, until it is done or until it dies."""
        self.facts.rules += 1
        if end[0] == "call":
            self.disk.die(end[1])
        try:
            with self.watched(end[1] if end[0] == "step" else None):
                if self.is_begun:
                    self.has_halved |= place == "half a batch each"
                    self.facts.go_on(place, self.runs, self.cache, self.look)
                else:
                    self.has_halved = place == "half a batch each"
                    shutil.rmtree(self.folder, ignore_errors=True)  # what died before it had a configuration
                    self.facts.begin(place, self.runs, self.cache, self.look)
        except shaky_disk.Killed:
            self.disk.be_well()
            if seed is not None:
                self.disk.power_cut(seed)
        self.disk.be_well()
        self.check()

    def look(self, run: Run) -> None:
        """Where it goes on from: the newest that was saved, or a newer one whose saving had not returned."""
        whole = [step for step in self.saved if step not in self.damaged]
        assert run.fleet.steps_taken >= max(whole, default=0)

    def check(self) -> None:
        if not self.is_finished:
            return
        (tensors, lines), (expected, expected_lines) = self.facts.bits(self.folder), self.facts.straight
        assert tensors.keys() == expected.keys()
        if not self.has_halved:
            assert lines == expected_lines
            for name, state in expected.items():
                assert all(torch.equal(tensors[name][key], value) for key, value in state.items()), name
            return
        for found, wanted in zip(lines, expected_lines, strict=True):  # another batch would have another loss
            assert found.pop("sae") == wanted["sae"] and found.keys() | {"sae"} == wanted.keys()
            assert found == {key: pytest.approx(wanted[key], rel=2e-2, abs=5e-3) for key in found} | {
                MOVES: found[MOVES]
            }

    @contextmanager
    def watched(self, die_before: int | None) -> Iterator[None]:
        """Note what was saved; die before a step is measured."""
        save, observe = checkpoints_module.Writer.finish, Watch.observe

        def noting(writer: Any) -> None:
            step = writer._writing[0] if writer._writing is not None else None
            save(writer)
            if step is not None and (writer._group is None or writer._group.rank == 0):
                self.saved = [*(found for found in self.saved if found != step), step][-2:]
                self.damaged.discard(step)

        def dying(watch: Any, step: int, *rest: Any) -> None:
            if step == die_before and watch._process.group.rank == watch._process.group.size - 1:
                self.facts.faults["killed"] += 1
                raise shaky_disk.Killed
            observe(watch, step, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints_module.Writer, "finish", noting)
            patch.setattr(Watch, "observe", dying)
            patch.setattr(
                train_runs, "catch_signals", lambda *_: nullcontext(checkpoints_module.Caught())
            )  # of threads
            yield

    @rule(place=places, end=ends, seed=st.none() | seeds)
    @precondition(lambda self: not self.is_finished)
    def take_steps(self, place: str, end: tuple[str, int], seed: int | None) -> None:
        self.advance(place, end, seed)

    @rule(place=places, number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS]), at=calls, sticks=st.booleans())
    @precondition(lambda self: not self.is_finished)
    def meet_a_failing_disk(self, place: str, number: int, at: int, sticks: bool) -> None:
        """A named error, which says how to go on."""
        self.disk.fail(number, at, sticks)
        try:
            self.advance(place, ("never", 0), None)
        except (RunNotWritten, ConfigInvalid) as error:
            assert "--resume" in str(error) or "choose another --out" in str(error)
        self.disk.be_well()

    @rule(seed=seeds)
    @precondition(lambda self: not self.is_finished and not self.damaged)
    def damage_the_newest_checkpoint(self, seed: int) -> None:
        """Where there is one before it."""
        found = list_checkpoints(self.folder / "checkpoints")
        if len(found) < 2:
            return
        self.facts.rules += 1
        draw = random.Random(seed)
        file = draw.choice(sorted(found[0].iterdir()))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data[: draw.choice([len(data), len(data) // 2])])
        self.damaged.add(int(found[0].name.removeprefix("step_")))
        self.facts.faults["damaged checkpoint"] += 1
        self.disk.flush_all()

    @rule()
    @precondition(lambda self: self.is_begun and len(self.runs.name) < 8)
    def move_the_run(self) -> None:
        self.facts.rules += 1
        place = self.runs.with_name(f"{self.runs.name}_a")
        shutil.copytree(self.runs, place)
        shutil.rmtree(self.runs)
        self.runs = place
        self.disk.flush_all()

    @rule()
    @precondition(lambda self: self.cache == self.facts.store)
    def move_the_store(self) -> None:
        self.facts.rules += 1
        self.cache = self.home / "store"
        shutil.copytree(self.facts.store, self.cache)
        self.disk.flush_all()

    @rule()
    def resume_what_is_done_or_was_never_begun(self) -> None:
        if self.is_begun and not self.is_finished:
            return
        self.facts.rules += 1
        with pytest.raises((NothingToTrain, RunMissing)):
            self.facts.go_on("alone", self.runs, self.cache, self.look)


@pytest.fixture(scope="module")
def facts(write_store, memory_folder, bits) -> Facts:
    write_store(memory_folder / "store", windows=40, shard_windows=8, layers=(3,), splits=WINDOWS)
    return Facts(memory_folder, memory_folder / "store", bits)


def run(facts: Facts, tell: Callable[..., None], examples: int, steps: int, derandomize: bool) -> None:
    facts.count()
    course = shaky_disk.course(examples, steps, derandomize)
    run_state_machine_as_test(lambda: RunMachine(facts), settings=course)
    places = ", ".join(f"{count:,} {place}" for place, count in sorted(facts.places.items()))
    tell(f"{facts.rules:,} events of {examples:,} runs; begun or resumed {places}", facts.faults)
    assert len(facts.places) == 3


def test_any_sequence_of_events(facts, tell):
    run(facts, tell, examples=6, steps=8, derandomize=True)
    assert facts.rules >= 25


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_any_sequence_of_events_for_long(facts, tell):
    run(facts, tell, examples=1100, steps=16, derandomize=False)
    assert facts.rules >= 10_000
