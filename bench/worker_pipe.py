"""The two ends of a pipe: a benchmark that asks, and a script in its own process that answers.

A request is a line of JSON, and so is its answer: `{"ok": ...}`, or `{"error": ...}` if the request failed.
Imports only the standard library, so that scripts in the peers' environment can use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LAST_LINES = 12
MARK = "answer: "  # before each answer, to tell it from the output of libraries


class WorkerFailed(Exception):
    """A script exited, failed or did not answer in time; the message has its last output."""


class Worker:
    """The asking side. The script's standard error is kept and shown if it fails."""

    def __init__(self, name: str, command: Sequence[object], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"} | dict(environment or {}),
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, timeout: float | None = None, **request: Any) -> Any:
        self.send(**request)
        return self.receive(timeout)

    def send(self, **request: Any) -> None:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError):  # it has exited, or was closed
            raise WorkerFailed(f"{self.name} has exited: {self._last_output()}") from None

    def receive(self, timeout: float | None = None) -> Any:
        """The answer to the oldest unanswered request."""
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()  # a late answer would be taken for that of the next request
            raise WorkerFailed(f"{self.name}: no answer within {timeout:.0f} s") from None
        if line is None:
            raise WorkerFailed(f"{self.name} has exited: {self._last_output()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}")
        return answer["ok"]

    def _last_output(self) -> str:
        if not self._stderr.closed:
            self._stderr.seek(0)
            lines = [line for line in self._stderr.read().splitlines() if line.strip()]
            self._output = "\n".join(lines[-LAST_LINES:]) or "without output"
        return self._output

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._last_output()  # while the file is open
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                file.close()  # pyright: ignore

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
        self._answers.put(None)


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """The answering side, until the input ends. From here on the output of libraries goes to standard error."""
    pipe, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            reply = {"ok": answer(json.loads(line))}
        except Exception as error:  # noqa: BLE001  # the other side decides what a failure means
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(MARK + json.dumps(reply), file=pipe, flush=True)
