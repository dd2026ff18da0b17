"""The beginning of a store: write all its tokens, or resume the store that exists already.

The first worker tokenises and packs the corpus and writes all tokens; the others wait for it. If the
store exists, its settings must be the ones asked for, and nothing is tokenised again.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ..cache_schema import CorpusSpec, Manifest, StoreBusy, StoreWriter
from ..cache_schema.disk_and_cloud_files import Files, LocalFiles, name_full_disk, require_folder
from ..cache_schema.manifest import PART, require_same
from ..cache_schema.numbers_in_words import say_time
from ..cache_schema.open_and_check_root import has_root
from ..cache_schema.shard_claims import no_locks
from ..cache_schema.splits import PER_MILLE, per_mille_for_tests
from .corpus import open_corpus, source_of
from .corpus.source import Corpus, part_of, revision_of
from .errors import SettingInvalid, TokensMissing
from .process import Process
from .progress import Watch
from .store_plan import TEST, Plan, corpus_spec, make_manifest, require_known_tokens, settings_of_begun, settings_of_new
from .tokenise_corpus import PackingJob, spool_corpus, spool_folder, state_of_begun

POLL_SECONDS = 0.5  # at first; it doubles
LONGEST_POLL_SECONDS = 30.0
WAIT_SECONDS = 12 * 3600
LOOK_SECONDS = 120.0  # between looks at the lock: thousands of waiting workers must not hold up the one that takes it
IDLE_SECONDS = 3600.0  # how long the lock may be free: a worker 1 that lost its machine waits for another one first
LOCK_TRIES = 3
LOCK_FILE = "lock"
WORTH_TELLING = 10  # per mille of the documents: report it if so many more than needed are for tests


def go_on_with_store(plan: Plan, process: Process, files: Files, watch: Watch) -> StoreWriter:
    """A writer of a store whose tokens are written, if it is the plan's store."""
    writer = StoreWriter.open(plan.config.out)
    try:
        require_ours(plan, writer.manifest, files.url, watch)
    except BaseException:
        writer.close()
        raise
    asked, kept = plan.corpus.revision, writer.manifest.corpus.revision
    if asked and kept and not kept.startswith(asked):
        watch.say(f"the store stays at commit {kept} of {writer.manifest.corpus.id}, whatever {asked!r} is now")
    if process.is_first:
        _remove_leftover(spool_folder(files))
    watch.say(f"resuming the store at {files.url}")
    return writer


def require_place(files: Files) -> None:
    """Refuse an --out that cannot be written to, before anything is downloaded or tokenised for it."""
    if not isinstance(files, LocalFiles):
        return
    if not files.root.resolve().name:
        raise SettingInvalid(f"--out {files.url}: expected a folder or a place for one, not the root. Give a folder")
    require_folder(files.root.absolute(), f"--out {files.url}")
    if not has_root(files):
        require_folder(spool_folder(files), f"--out {files.url}")


def find_corpus(plan: Plan, files: Files) -> Corpus:
    """The corpus for a new store, or the one that its tokenising was begun with: hours of that would be lost once a
    name on the hub changes commit."""
    folder, begun = spool_folder(files), None
    if folder.exists():
        _require_own(folder)
        begun = source_of(plan.corpus).open_again(plan.corpus, state_of_begun(folder))
    return begun or open_corpus(plan.corpus)


def create_store(plan: Plan, corpus: Corpus, files: Files, watch: Watch) -> StoreWriter | None:
    """Tokenise, pack and write the beginning of the store; None if another process has done so meanwhile."""
    folder = spool_folder(files)
    # the store reports a full disk itself; this is for what comes before it
    with name_full_disk(f"tokenising into {folder}"), lock_spool(folder):
        return None if has_root(files) else _tokenise(plan, corpus, folder, watch)


def _tokenise(plan: Plan, corpus: Corpus, folder: Path, watch: Watch) -> StoreWriter:
    revision = revision_of(corpus, watch.say)
    spec = corpus_spec(plan, corpus.id, revision, settings_of_new(plan, corpus.settings, part_of(corpus)))
    if PART in spec.settings:
        watch.say(f"corpus: {corpus.id} can be streamed only in part ({spec.settings[PART]}), which the store records")
    context, total = plan.config.context, plan.windows * plan.config.context
    job = PackingJob(plan.windows, context, plan.config.packing, spec.settings.get(TEST, PER_MILLE["test"]))
    with watch.stage("tokenising", total, stays=True) as stage:

        def report(windows: int, documents: int) -> None:
            stage.reach(windows * context, f"{documents:,} documents")

        spool, packed = spool_corpus(corpus, plan.encoder, job, folder, report, watch.say)
        if len(packed.tokens) < plan.windows:
            watch.say(tell_shortage(plan.windows, len(packed.tokens), context, job.test_per_mille))
        require_known_tokens(packed.tokens, plan.facts)
        manifest = make_manifest(plan, spec, len(packed.tokens), packed.splits)
        writer = StoreWriter.create(plan.config.out, manifest, packed.tokens, packed.documents)
        del packed
        spool.remove()
    return writer


def tell_shortage(asked: int, filled: int, context: int, test: int) -> str:
    """A message that the corpus ended early; the share of tests was set for the tokens asked for, before reading."""
    said = f"the corpus fills {filled:,} windows of the {asked:,} asked for"
    own = per_mille_for_tests(filled * context)
    if test - own < WORTH_TELLING:
        return said
    return (
        f"{said}; {test / 10:g} % of its documents are for tests, which suits so many, instead of {own / 10:g} %. "
        f"To train on the difference, remove the store and begin it with --tokens {filled * context}"
    )


def require_ours(plan: Plan, found: Manifest, url: str, watch: Watch) -> None:
    """Require an existing store to have the plan's settings and corpus; shards of any size, if none was asked for."""
    wanted = make_manifest(plan, _corpus_of_existing(plan, found, watch), found.windows, found.splits)
    if plan.config.shard_windows is None:
        wanted = replace(wanted, shard_windows=found.shard_windows)
    require_same(url, found, wanted)


def _corpus_of_existing(plan: Plan, found: Manifest, watch: Watch) -> CorpusSpec:
    """The corpus that a store of ours must have. A remote one stays pinned without asking the network."""
    options, recorded, pinned = plan.corpus, found.corpus, source_of(plan.corpus).pinned
    if pinned and options.dataset == recorded.id and not _names_another_commit(options.revision, recorded.revision):
        return corpus_spec(plan, recorded.id, recorded.revision, settings_of_begun(pinned(options), found))
    corpus = open_corpus(options)
    return corpus_spec(plan, corpus.id, revision_of(corpus, watch.say), settings_of_begun(corpus.settings, found))


def _names_another_commit(revision: str | None, recorded: str | None) -> bool:
    """Whether a commit other than the recorded one is named. A branch may have moved since, and be out of reach."""
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{7,40}", revision) is not None
    return is_commit and not (recorded or "").startswith(revision or "")


def wait_for_tokens(files: Files, watch: Watch) -> None:
    """Wait until the first worker has written all tokens; give up sooner if nobody is seen working on it."""
    if has_root(files):
        return
    watch.say(f"waiting for worker 1 to write the tokens of {files.url}")
    began = looked = busy = time.monotonic()
    pause = POLL_SECONDS
    while not has_root(files):
        now = time.monotonic()
        if now - looked >= LOOK_SECONDS:
            looked, is_held = now, _is_locked(files)
            busy = busy if is_held is False else now
            watch.say(f"still waiting for the tokens of {files.url}: {_SEEN[is_held]}")
            if now - busy >= IDLE_SECONDS:
                raise TokensMissing(
                    f"for {say_time(now - busy)} nobody has tokenised for {files.url} or downloaded its model: "
                    "worker 1 (or rank 0) has failed or was not started. Check its last output and start it, then "
                    "start this one again"
                )
        if now - began > WAIT_SECONDS:
            raise TokensMissing(
                f"waited {WAIT_SECONDS // 3600} hours for the first worker to write the tokens of {files.url}. "
                "Start worker 1 (or rank 0), then start this one again"
            )
        time.sleep(pause * random.uniform(0.5, 1.0))  # thousands of workers may wait for one object
        pause = min(2 * pause, LONGEST_POLL_SECONDS)


_SEEN = {
    True: "worker 1 is working on it",
    False: "nobody is working on it",
    None: "whether anybody is working on it cannot be seen from here",
}


def _is_locked(files: Files) -> bool | None:
    """Whether another process is writing the beginning of the store; None if that cannot be seen from here."""
    if not isinstance(files, LocalFiles):
        return None
    try:
        fd = os.open(spool_folder(files) / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return True if isinstance(error, BlockingIOError) else None
    finally:
        os.close(fd)


def _require_own(folder: Path) -> None:
    """Refuse another user's folder: it could hold false tokens, or links to files that would be emptied."""
    if folder.parent.resolve() != Path(tempfile.gettempdir()).resolve():
        return
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise SettingInvalid(
            f"{folder}, which holds tokens until the store has them, is another user's or not a folder. Remove it, or "
            "set TMPDIR to a folder of your own"
        )


def _remove_leftover(folder: Path) -> None:
    """Remove the scratch folder of a process that died after writing the store's root."""
    if (folder / LOCK_FILE).exists():
        with suppress(OSError, SettingInvalid), lock_spool(folder):  # a folder that is in use, or another user's, stays
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock_spool(folder: Path) -> Iterator[None]:
    """Let one process at a time tokenise for a store; those that wait see that one is at work."""
    with name_full_disk(f"making {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take_lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _take_lock(fd: int, folder: Path) -> None:
    for left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise StoreBusy(
                    f"another process is tokenising into {folder}. Wait for it to end, then run this command again"
                ) from None
            time.sleep(0.05)  # a process that waits for the tokens takes it for a moment, to see whether it is held
        except OSError as error:
            raise no_locks(error, folder / LOCK_FILE) from error
