"""A store under any sequence of events, beside a model of what must hold.

Events: two writers that create, claim, write, wait and close; kills and power cuts before any call; disks
that are full or fail; damage, verification, repair; lost derived files; a copy; an import; an old reader.
After each event a reader opens the store: it finds the committed shards of the model and no other, reads
every value of the whole ones, and names the damage of the rest. A store that is finished has the bytes of
one that nobody disturbed. The store needs no model of language: its values are arithmetic.
"""

from __future__ import annotations

import errno
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from saemill.cache_schema import (
    FormatTooNew,
    ManifestInvalid,
    Request,
    ShardCorrupt,
    Site,
    Span,
    Store,
    StoreBusy,
    StoreError,
    StoreMissing,
    StoreWriter,
)
from saemill.cache_schema import manifest as manifest_module
from saemill.cache_schema import writer as writer_module
from saemill.cache_schema.formats_to_import import NumpySource
from saemill.cache_schema.import_into_store import ImportSettings, import_store
from saemill.cache_schema.layout import INDEX, SUMMARY, arrays_of, record_key
from saemill.cache_schema.verify_and_repair import drop_broken_derived, repair, verify_shards

from .. import shaky_disk
from . import synthetic

SHARDS = 4
PLACE = Site("resid", 3)
EVERYTHING = Request(layers=(3,), attention_layers=(2,), tokens=True, documents=True)
CAN_BE_MENDED = (
    "resid/layer_3",
    "stats/layer_3",
    *(f"attention/layer_2/{part}" for part in ("indptr", "indices", "data", "kept_mass")),
    "record",
)
slots, shards, calls, seeds = st.integers(0, 1), st.integers(0, SHARDS - 1), st.integers(1, 60), st.integers(0, 10**6)


class Facts:
    """What all machines share: the corpus, what each shard holds, the bytes of stores that nobody disturbed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        manifest = synthetic.make_manifest(windows=2 * SHARDS - 1, context=4, width=3, shard_windows=2, layers=(3,))
        self.manifest = synthetic.replace(manifest, attention=synthetic.replace(manifest.attention, layers=(2,)))
        self.corpus = synthetic.make_corpus(self.manifest)
        self.contents = [synthetic.make_content(self.manifest, self.corpus, shard) for shard in range(SHARDS)]
        synthetic.write_store(home / "straight", self.manifest, self.corpus)
        self.straight = self.tree(home / "straight")
        np.save(home / "acts.npy", np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2))
        self.importing(home / "imported")
        self.imported = self.tree(home / "imported")
        self.count()

    def count(self) -> None:
        self.rules, self.faults = 0, Counter[str]()

    def importing(self, place: Path) -> None:
        source = NumpySource({Site("resid", 1): self.home / "acts.npy"}, None)
        import_store(str(place), source, ImportSettings("toy", shard_windows=2), lambda *_: None)

    def tree(self, place: Path) -> dict[str, str]:
        """All but what a killed writer may leave and nobody reads."""
        return {name: found for name, found in synthetic.tree_of(place).items() if not name.endswith(".tmp")}


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.home = facts.home / uuid.uuid4().hex
        self.home.mkdir()
        self.place = self.home / "store"
        self.disk = shaky_disk.ShakyDisk(self.home)
        self.writers: list[StoreWriter | None] = [None, None]
        self.held: list[dict[int, ExitStack]] = [{}, {}]
        self.exists = self.has_imported = False
        self.committed: set[int] = set()
        self.damaged: dict[int, set[str]] = {}
        self.disk.flush_all()
        self.disk.install()

    def teardown(self) -> None:
        self.disk.be_well()
        for slot in (0, 1):
            self.lose(slot)
        self.disk.remove()
        self.facts.faults += self.disk.faults
        shutil.rmtree(self.home)

    # What becomes of writers

    def lose(self, slot: int) -> None:
        """A writer's process is gone: the kernel closes its files, and nothing else happens."""
        writer, self.writers[slot], self.held[slot] = self.writers[slot], None, {}
        if writer is not None:
            writer._release()

    def lose_all(self, seed: int | None = None) -> None:
        """Both are gone, and with a seed the power is."""
        for slot in (0, 1):
            self.lose(slot)
        self.disk.be_well()
        if seed is not None:
            self.disk.power_cut(seed)

    def look(self, shard: int) -> None:
        """What a fault left undecided: a shard is there, whole, or it is not."""
        try:
            with Store.open(self.place) as store:
                is_there = bool(store.committed[shard])
        except StoreMissing:
            assert not self.exists
            return
        self.exists = True
        if is_there:
            self.committed.add(shard)
        else:
            self.committed.discard(shard)
            self.damaged.pop(shard, None)

    @property
    def is_unfinished(self) -> bool:
        return len(self.committed) < SHARDS

    # Rules

    def writer(self, slot: int) -> StoreWriter:
        """The writer of a slot: one that begins the store, or goes on with it."""
        found = self.writers[slot]
        if found is None:
            corpus = self.facts.corpus
            found = StoreWriter.create(self.place, self.facts.manifest, corpus.tokens, corpus.documents)
            self.writers[slot], self.exists = found, True
        return found

    @rule(slot=slots)
    @precondition(lambda self: not all(self.writers))
    def create(self, slot: int) -> None:
        self.writer(slot)

    @rule(at=calls, seed=st.none() | seeds)
    @precondition(lambda self: not self.exists)
    def die_creating(self, at: int, seed: int | None) -> None:
        self.disk.die(at)
        try:
            self.writer(0)
        except shaky_disk.Killed:
            self.lose_all(seed)
            self.look(0)
        self.disk.be_well()

    @rule(slot=slots, shard=shards)
    @precondition(lambda self: self.is_unfinished)
    def hold(self, slot: int, shard: int) -> None:
        """Claim, and keep it for a while."""
        held, stack = self.held[slot], ExitStack()
        if shard in held:
            return
        is_mine = stack.enter_context(self.writer(slot).claim(shard))
        assert is_mine == (shard not in self.held[1 - slot] and shard not in self.committed)
        if is_mine:
            held[shard] = stack
        else:
            stack.close()

    @rule(slot=slots, shard=shards)
    @precondition(lambda self: any(self.held))
    def let_go(self, slot: int, shard: int) -> None:
        if shard in self.held[slot]:
            self.held[slot].pop(shard).close()

    @rule(slot=slots, shard=shards)
    @precondition(lambda self: self.is_unfinished)
    def write(self, slot: int, shard: int) -> None:
        self.hold(slot, shard)
        if shard in self.held[slot]:
            record = self.writer(slot).write(shard, self.facts.contents[shard])
            self.committed.add(shard)
            assert record is not None and record.shard == shard
            self.let_go(slot, shard)

    @rule(slot=slots, shard=shards, at=calls, seed=st.none() | seeds)
    @precondition(lambda self: self.is_unfinished)
    def die_writing(self, slot: int, shard: int, at: int, seed: int | None) -> None:
        """Killed before a call; with a seed the whole machine goes down, and both writers with it."""
        self.hold(slot, shard)
        self.disk.die(at)
        try:
            self.write(slot, shard)
        except shaky_disk.Killed:
            self.disk.be_well()
            self.lose(slot)
            if seed is not None:
                self.lose_all(seed)
            self.look(shard)
        self.disk.be_well()

    @rule(
        slot=slots,
        shard=shards,
        number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]),
        at=calls,
        sticks=st.booleans(),
    )
    @precondition(lambda self: self.is_unfinished)
    def write_on_a_failing_disk(self, slot: int, shard: int, number: int, at: int, sticks: bool) -> None:
        """Full, or broken, once or for good: a named error that says what to do, and the writer can go on."""
        self.hold(slot, shard)
        self.disk.fail(number, at, sticks)
        try:
            self.write(slot, shard)
        except StoreError as error:
            assert "committed shards are untouched" in str(error) and "same command again" in str(error)
            self.disk.be_well()
            self.look(shard)
            self.let_go(slot, shard)
        self.disk.be_well()

    @rule(slot=slots)
    @precondition(lambda self: any(self.writers))
    def close(self, slot: int) -> None:
        writer = self.writers[slot]
        if writer is None or self.held[slot]:
            return
        self.writers[slot] = None
        try:
            writer.close()
        except (ShardCorrupt, ManifestInvalid):  # what is derived cannot be made of damaged lines or records
            assert self.damaged

    @rule(slot=slots, at=st.integers(1, 12), seed=st.none() | seeds)
    @precondition(lambda self: any(self.writers))
    def die_closing(self, slot: int, at: int, seed: int | None) -> None:
        self.disk.die(at)
        try:
            self.close(slot)
        except shaky_disk.Killed:
            self.lose_all(seed)
        self.disk.be_well()

    @rule()
    @precondition(lambda self: self.exists and not any(self.held) and not self.damaged and self.is_unfinished)
    def finish(self) -> None:
        """Write all that lacks: the bytes are those of a run that nobody disturbed, wherever nothing is damaged."""
        for slot in (0, 1):
            self.close(slot)
        with StoreWriter.open(self.place) as writer:
            assert set(writer.pending()) == set(range(SHARDS)) - self.committed
            synthetic.write_pending(writer, self.facts.corpus)
        self.committed = set(range(SHARDS))
        assert self.facts.tree(self.place) == self.facts.straight

    @rule(shard=shards, array=st.sampled_from(CAN_BE_MENDED), seed=seeds)
    @precondition(lambda self: self.committed and len(self.damaged) < 2)
    def damage(self, shard: int, array: str, seed: int) -> None:
        """Some bytes of a committed shard change, end early, or are gone."""
        draw = random.Random(seed)
        if shard not in self.committed or array in self.damaged.get(shard, ()):
            return
        key = record_key(shard) if array == "record" else arrays_of(self.facts.manifest)[array].chunk_key(shard)
        file = self.place / key
        data = bytearray(file.read_bytes())
        if array == "record" or draw.random() < 0.3:
            file.write_bytes(data[: draw.randrange(len(data) - 1)])
        elif draw.random() < 0.6:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
        else:
            file.unlink()
        self.damaged.setdefault(shard, set()).add(array)
        self.facts.faults["damaged file"] += 1
        self.disk.flush_all()

    @rule()
    @precondition(lambda self: self.exists)
    def verify(self) -> None:
        with Store.open(self.place) as store:
            reports = list(verify_shards(store))
        assert {report.shard for report in reports if report.damage} == set(self.damaged)
        for report in reports:
            for found in report.damage:
                assert f"shard {report.shard}" in str(found) or record_key(report.shard) in str(found)

    @rule(whole=shards, at=st.none() | st.integers(1, 12), seed=st.none() | seeds)
    @precondition(lambda self: self.committed and not any(self.held))
    def repair(self, whole: int, at: int | None, seed: int | None) -> None:
        """What is named is removed; killed in the middle, a shard is as it was or it is gone."""
        hurt = sorted({*self.damaged, whole})
        if at is not None:
            self.disk.die(at)
        try:
            repair(str(self.place), hurt)
        except shaky_disk.Killed:
            self.lose_all(seed)
            for shard in hurt:
                self.look(shard)
        else:
            self.committed -= set(hurt)
            self.damaged.clear()
        self.disk.be_well()

    @rule(shard=shards)
    @precondition(lambda self: any(self.held))
    def repair_what_is_being_written(self, shard: int) -> None:
        if any(shard in held for held in self.held):
            with pytest.raises(StoreBusy, match="being written right now"):
                repair(str(self.place), [shard])

    @rule(key=st.sampled_from([INDEX, SUMMARY, "resid/layer_3/zarr.json"]), junk=st.sampled_from([None, b"", b"{"]))
    @precondition(lambda self: self.exists and not self.damaged)
    def lose_what_is_derived(self, key: str, junk: bytes | None) -> None:
        file = self.place / key
        if not file.exists():
            return
        file.unlink()
        self.facts.faults["lost derived file"] += 1
        if junk is not None:
            file.write_bytes(junk)
            if key == INDEX:
                with pytest.raises(ManifestInvalid, match="sae-store repair"):
                    Store.open(self.place)
        drop_broken_derived(str(self.place))
        repair(str(self.place), [])
        self.disk.flush_all()

    @rule()
    @precondition(lambda self: self.committed and not any(self.held) and len(self.place.name) < 16)
    def move(self) -> None:
        """A copy is the same store, wherever it lies."""
        for slot in (0, 1):
            self.close(slot)
        place = self.place.with_name(f"{self.place.name}_moved")
        shutil.copytree(self.place, place)
        shutil.rmtree(self.place)
        self.place = place
        self.disk.flush_all()

    @rule()
    @precondition(lambda self: self.exists)
    def read_by_an_older_version(self) -> None:
        """It refuses by the number, and changes nothing."""
        before = synthetic.tree_of(self.place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest_module, "FORMAT", 0)
            for use in (Store.open, StoreWriter.open, drop_broken_derived, lambda place: repair(str(place), [0])):
                with pytest.raises(FormatTooNew, match="Update saemill"):
                    use(self.place)  # type: ignore[operator]
        assert synthetic.tree_of(self.place) == before

    @rule(at=calls, seed=st.none() | seeds)
    @precondition(lambda self: not self.has_imported and not any(self.writers))
    def die_importing(self, at: int, seed: int | None) -> None:
        """A second store, of activations from elsewhere: killed and made again, it is that of one import."""
        place, self.has_imported = self.home / "imported", True
        self.disk.die(at)
        try:
            self.facts.importing(place)
        except shaky_disk.Killed:
            self.lose_all(seed)
        self.disk.be_well()
        self.facts.importing(place)
        assert self.facts.tree(place) == self.facts.imported
        shutil.rmtree(place)
        self.disk.flush_all()

    # What must hold after each of them

    @invariant()
    def committed_shards_are_whole_and_no_other_is_there(self) -> None:
        self.facts.rules += 1
        if not self.exists:
            with pytest.raises(StoreMissing):
                Store.open(self.place)
            return
        with Store.open(self.place) as store:
            assert set(np.flatnonzero(store.committed).tolist()) == self.committed
            for shard in self.committed:
                self.read(store, shard)

    def read(self, store: Store, shard: int) -> None:
        span = Span(shard, *store.manifest.shard_range(shard))
        hurt = self.damaged.get(shard, set()) - {"record", "stats/layer_3"}
        if hurt:
            with pytest.raises(ShardCorrupt, match=f"shard {shard}, array .*sae-store repair"):
                store.read(EVERYTHING, span)
            return
        found, expected = store.read(EVERYTHING, span), self.facts.contents[shard]
        assert found.tokens is not None and found.documents is not None
        assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.documents, expected.documents)
        assert np.array_equal(found.at(PLACE), expected.acts[PLACE])
        csr, wanted = found.attention[2], expected.attention[2]
        for part in ("indptr", "indices", "data", "kept_mass"):
            assert np.array_equal(getattr(csr, part), getattr(wanted, part))


@pytest.fixture(scope="module")
def facts(memory_folder) -> Facts:
    return Facts(memory_folder)


def run(facts: Facts, tell: Callable[..., None], examples: int, steps: int, derandomize: bool) -> None:
    facts.count()
    course = shaky_disk.course(examples, steps, derandomize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "WRITERS", 1)  # the same events lead to the same state: Hypothesis insists on that
        run_state_machine_as_test(lambda: StoreMachine(facts), settings=course)
    tell(f"{facts.rules:,} events of {examples:,} stores", facts.faults)


def test_any_sequence_of_events(facts, tell):
    run(facts, tell, examples=8, steps=30, derandomize=True)
    assert facts.rules >= 200


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_any_sequence_of_events_for_long(facts, tell):
    run(facts, tell, examples=220, steps=60, derandomize=False)
    assert facts.rules >= 10_000
