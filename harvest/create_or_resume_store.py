"""Create a store with all its tokens, or resume an existing one.

The first worker tokenises and packs the corpus and writes all tokens; the others wait for it. If the store exists,
its settings must be the ones asked for, and nothing is tokenised again.
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
from ..cache_schema.shard_claims import locking_failed
from ..cache_schema.splits import PER_MILLE, per_mille_for_tests
from .corpus import open_corpus, source_of
from .corpus.source import Corpus, part_of, revision_of
from .errors import SettingInvalid, TokensMissing
from .process import Process
from .progress import Watch
from .store_plan import TEST, Plan, corpus_spec, make_manifest, require_known_tokens, settings_of_new, settings_of_store
from .tokenise_corpus import PackingJob, saved_corpus_state, spool_corpus, spool_folder

POLL_SECONDS = 0.5  # at first; it doubles
LONGEST_POLL_SECONDS = 30.0
WAIT_SECONDS = 12 * 3600
LOOK_SECONDS = 120.0  # between checks of the lock: thousands of waiting workers must not obstruct the one that takes it
IDLE_SECONDS = 3600.0  # how long the lock may stay free: a worker 1 that lost its machine first waits for another
LOCK_TRIES = 3
LOCK_FILE = "lock"
REPORTED_EXCESS = 10  # per mille of documents: report a test share that is this much larger than needed


def resume_store(plan: Plan, process: Process, files: Files, watch: Watch) -> StoreWriter:
    """A writer for an existing store, which must be the plan's."""
    writer = StoreWriter.open(plan.config.out)
    try:
        require_same_plan(plan, writer.manifest, files.url, watch)
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
    """Refuse an --out that is not writable, before anything is downloaded or tokenised for it."""
    if not isinstance(files, LocalFiles):
        return
    if not files.root.resolve().name:
        raise SettingInvalid(f"--out {files.url}: expected a folder or a place for one, not the root. Give a folder")
    require_folder(files.root.absolute(), f"--out {files.url}")
    if not has_root(files):
        require_folder(spool_folder(files), f"--out {files.url}")


def find_corpus(plan: Plan, files: Files) -> Corpus:
    """The corpus for a new store; if tokenising has started, at the same commit: hours of work would otherwise be lost
    whenever a name on the hub moves to another."""
    folder, started = spool_folder(files), None
    if folder.exists():
        _require_own_folder(folder)
        started = source_of(plan.corpus).open_again(plan.corpus, saved_corpus_state(folder))
    return started or open_corpus(plan.corpus)


def create_store(plan: Plan, corpus: Corpus, files: Files, watch: Watch) -> StoreWriter | None:
    """Tokenise, pack and create the store; None if another process has done so in the meantime."""
    folder = spool_folder(files)
    # once it exists, the store reports a full disk itself
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
            watch.say(describe_shortage(plan.windows, len(packed.tokens), context, job.test_per_mille))
        require_known_tokens(packed.tokens, plan.facts)
        manifest = make_manifest(plan, spec, len(packed.tokens), packed.splits)
        writer = StoreWriter.create(plan.config.out, manifest, packed.tokens, packed.documents)
        del packed
        spool.remove()
    return writer


def describe_shortage(asked: int, filled: int, context: int, test: int) -> str:
    """A message that the corpus ended early. The test share was set earlier, for the tokens asked for."""
    shortage = f"the corpus fills {filled:,} windows of the {asked:,} asked for"
    enough = per_mille_for_tests(filled * context)
    if test - enough < REPORTED_EXCESS:
        return shortage
    return (
        f"{shortage}; {test / 10:g} % of its documents are for tests, the share for {asked:,} windows, instead of "
        f"{enough / 10:g} %. To train on the difference, remove the store and start again with --tokens "
        f"{filled * context}"
    )


def require_same_plan(plan: Plan, found: Manifest, url: str, watch: Watch) -> None:
    """Require an existing store to have the plan's settings and corpus, and its shard size if one was asked for."""
    wanted = make_manifest(plan, _corpus_of_existing(plan, found, watch), found.windows, found.splits)
    if plan.config.shard_windows is None:
        wanted = replace(wanted, shard_windows=found.shard_windows)
    require_same(url, found, wanted)


def _corpus_of_existing(plan: Plan, found: Manifest, watch: Watch) -> CorpusSpec:
    """The corpus that the plan's store must have. A remote one stays at the recorded commit, without network access."""
    options, recorded, pinned = plan.corpus, found.corpus, source_of(plan.corpus).pinned
    if pinned and options.dataset == recorded.id and not _names_another_commit(options.revision, recorded.revision):
        return corpus_spec(plan, recorded.id, recorded.revision, settings_of_store(pinned(options), found))
    corpus = open_corpus(options)
    return corpus_spec(plan, corpus.id, revision_of(corpus, watch.say), settings_of_store(corpus.settings, found))


def _names_another_commit(revision: str | None, recorded: str | None) -> bool:
    """Whether a commit other than the recorded one is named. Branches do not count: they may have moved since."""
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{7,40}", revision) is not None
    return is_commit and not (recorded or "").startswith(revision or "")


_SEEN = {
    True: "worker 1 is working on it",
    False: "nobody is working on it",
    None: "whether anybody is working on it cannot be seen from here",
}


def wait_for_tokens(files: Files, watch: Watch) -> None:
    """Wait until the first worker has written all tokens; give up early if nobody is seen working on it."""
    if has_root(files):
        return
    watch.say(f"waiting for worker 1 to write the tokens of {files.url}")
    start = last_look = last_busy = time.monotonic()
    pause = POLL_SECONDS
    while not has_root(files):
        now = time.monotonic()
        if now - last_look >= LOOK_SECONDS:
            last_look, is_held = now, _is_locked(files)
            last_busy = last_busy if is_held is False else now
            watch.say(f"still waiting for the tokens of {files.url}: {_SEEN[is_held]}")
            if now - last_busy >= IDLE_SECONDS:
                raise TokensMissing(
                    f"for {say_time(now - last_busy)} nobody has tokenised for {files.url} or downloaded its model: "
                    "worker 1 (or rank 0) has failed or was not started. Check its last output and start it, then "
                    "start this one again"
                )
        if now - start > WAIT_SECONDS:
            raise TokensMissing(
                f"waited {WAIT_SECONDS // 3600} hours for the first worker to write the tokens of {files.url}. "
                "Start worker 1 (or rank 0), then start this one again"
            )
        time.sleep(pause * random.uniform(0.5, 1.0))  # thousands of workers may poll one object
        pause = min(2 * pause, LONGEST_POLL_SECONDS)


def _is_locked(files: Files) -> bool | None:
    """Whether another process is creating the store; None if that cannot be seen from here."""
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


def _require_own_folder(folder: Path) -> None:
    """Refuse another user's folder: it could hold forged tokens, or links to files that would be truncated."""
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
        with suppress(OSError, SettingInvalid), lock_spool(folder):  # keep a folder that is in use or another user's
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock_spool(folder: Path) -> Iterator[None]:
    """Let one process at a time tokenise for a store; the lock shows waiting workers that one is running."""
    with name_full_disk(f"making {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own_folder(folder)
        fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take_lock(fd, folder)
        yield
    finally:
        os.close(fd)


def _take_lock(fd: int, folder: Path) -> None:
    for tries_left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not tries_left:
                raise StoreBusy(
                    f"another process is tokenising into {folder}. Wait for it to finish, then run this command again"
                ) from None
            time.sleep(0.05)  # a waiting worker takes it for a moment, to see whether it is held
        except OSError as error:
            raise locking_failed(error, folder / LOCK_FILE) from error
