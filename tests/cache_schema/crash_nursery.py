"""A process that forks writers on demand, so that tests can kill dozens of real processes in seconds.

It imports the store once; every writer is a fork of it. Each line on stdin is a JSON request, each line on stdout its
answer: {"start": url, "die_at": n or null} returns the pid, {"wait": pid} the exit status. With `die_at`, the writer
kills itself before its n-th call into the file system.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import synthetic

from saemill.cache_schema import StoreBusy

FILE_CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "close")


def crash_manifest(shards: int) -> Any:
    """Two windows per shard except the last, one layer of each kind: few files, so there is time for many kills."""
    manifest = synthetic.make_manifest(windows=2 * shards - 1, shard_windows=2, layers=(3,))
    return synthetic.replace(manifest, attention=synthetic.replace(manifest.attention, layers=(2,)))


@functools.cache
def crash_corpus(shards: int) -> Any:
    return synthetic.make_corpus(crash_manifest(shards))


def write(url: str, shards: int, die_at: int | None) -> None:
    manifest = crash_manifest(shards)
    if die_at is not None:
        kill_at_call(die_at)
    while True:
        try:
            synthetic.write_store(url, manifest, crash_corpus(shards))
            return
        except StoreBusy:  # another writer is just creating the store
            time.sleep(0.001)


def kill_at_call(number: int) -> None:
    """Die before the n-th call into the file system, counting those of all threads."""
    calls = itertools.count(1)

    def counted(call: Any) -> Any:
        def dying(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return dying

    for name in FILE_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def start(request: dict[str, Any]) -> int:
    crash_corpus(request["shards"])  # computed before the fork, only once
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        write(request["start"], request["shards"], request.get("die_at"))
        status = 0
    except Exception:  # noqa: BLE001 (the parent sees the exit status, a person the traceback)
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if "start" in request else os.waitpid(request["wait"], 0)[1]
        print(answer, flush=True)
