"""The judge: a language model behind an OpenAI-compatible chat-completions endpoint.

The answers are kept in a file beside the result, so that a stopped or failed evaluation asks only for what is missing.
The key comes from the environment and is sent to the endpoint alone: no file, message or error contains it.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ...errors import JudgeMissing, SettingInvalid

PATH = "/chat/completions"
KEY = "SAEMILL_JUDGE_KEY"
EXAMPLE = "--set autointerp.endpoint=http://localhost:8000/v1 --set autointerp.judge=NAME"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before asking again, if the server does not say
LONGEST_WAIT = 600.0
MOST_BYTES = 1 << 20  # of a response
MAY_BE_REFUSED = ("max_tokens", "temperature", "seed")  # by some servers and models
SECRET = 12  # characters: shorter keys, such as `none`, are what servers without keys are given
BUSY = (408, 409, 425, 429)
NOT_TAKEN = (400, 413, 422)  # by what is asked, not by who asks


@dataclass(frozen=True)
class Question:
    text: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    model: str
    """As the endpoint names it."""


class Passing(Exception):
    """An error that may be gone when the question is asked again."""

    def __init__(self, reason: str, is_there: bool, wait: float | None = None) -> None:
        super().__init__(reason)
        self.is_there, self.wait = is_there, wait


class NotTaken(Exception):
    """The server does not take this request, but may take others."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """The key is sent to no address but the one that was given."""


class Judge:
    def __init__(self, endpoint: str | None, model: str | None, seed: int, timeout: float) -> None:
        if not endpoint or not model:
            raise JudgeMissing(
                "explanations are written and judged by a language model, and none is named. Give an OpenAI-compatible "
                f"server and the model's name there, for a local server: {EXAMPLE}. If it needs a key, set {KEY}"
            )
        self.endpoint, self.model = endpoint, model
        self.sampling: dict[str, Any] = {"temperature": 0, "seed": seed}
        self.refused = list[str]()
        self._key, self._timeout = key_from_environment(), timeout
        is_local = check_address(endpoint, self._key)
        proxies = urllib.request.ProxyHandler({} if is_local else None)  # a proxy does not reach this machine's servers
        self._opener = urllib.request.build_opener(_NoRedirects, proxies)

    def check(self) -> None:
        """Ask something small, so that what is wrong with the endpoint is known before anything is computed. Finds out
        which settings it refuses."""
        question = Question("Answer with the single word: yes", 16)
        while True:
            try:
                self.ask(question, threading.Event(), is_patient=False)
                return
            except NotTaken as error:
                told = [name for name in MAY_BE_REFUSED if name in str(error) and name not in self.refused]
                if not told:
                    raise JudgeMissing(f"{self.endpoint} refuses a small request to {self.model}: {error}") from None
                self.refused.append(told[0])

    def key_of(self, question: Question) -> str:
        """Identifies a request, whatever server takes it."""
        request = {"model": self.model, **asdict(question), **self.sampling}
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def ask(self, question: Question, stop: threading.Event, is_patient: bool = True) -> Answer:
        """Ask until there is an answer. Without patience, only a server that is there is asked again."""
        limit = "max_completion_tokens" if "max_tokens" in self.refused else "max_tokens"
        sampling = {name: value for name, value in self.sampling.items() if name not in self.refused}
        messages = [{"role": "user", "content": question.text}]  # a system role is refused by some models
        body = {"model": self.model, "messages": messages, limit: question.max_tokens, **sampling}
        for wait in (*WAITS, None):
            try:
                return self._request(body)
            except Passing as error:
                if wait is None or not (is_patient or error.is_there):
                    raise JudgeMissing(f"{self.endpoint}: {error}") from None
                wait = wait * (1 + random.random() / 4) if error.wait is None else error.wait
                if wait > LONGEST_WAIT:
                    raise JudgeMissing(f"{self.endpoint} asks to wait {wait:,.0f} seconds: {error}") from None
                if stop.wait(wait):
                    break
        raise JudgeMissing("stopped")

    def _request(self, body: Mapping[str, Any]) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "saemill"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        url = self.endpoint.rstrip("/").removesuffix(PATH) + PATH
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._read(response.read(MOST_BYTES + 1))
        except urllib.error.HTTPError as error:
            with error:
                raise self._meaning(error) from None
        except TimeoutError:
            raise Passing(f"no answer within {self._timeout:g} seconds (autointerp.timeout)", is_there=False) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last for addresses that cannot be
            reason = getattr(error, "reason", error)
            told = self._plain(str(reason) or type(reason).__name__)
            raise Passing(f"no connection ({told}): is the server running, and is the address right?", False) from None

    def _read(self, body: bytes) -> Answer:
        try:
            document = json.loads(body)
            text = document["choices"][0]["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise Passing(
                "expected the JSON of a chat completion (choices[0].message.content), found "
                f"{self._plain(body.decode(errors='replace'))!r}: the address must be that of an OpenAI-compatible "
                "server, and usually ends in /v1",
                is_there=False,
            ) from None
        return Answer(self._without_key(text), self._plain(str(document.get("model") or self.model)))

    def _meaning(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status says about the request, the key or the server."""
        with suppress(OSError, http.client.HTTPException):
            told = self._plain(error.read(MOST_BYTES).decode(errors="replace"))
            told = f"status {error.code}: {told or error.reason}"
            if error.code in NOT_TAKEN:
                return NotTaken(told)
            if error.code in (401, 403):
                what = f"the key in {KEY} is refused" if self._key else f"a key is needed: set {KEY}"
                return JudgeMissing(f"{self.endpoint}: {what} ({told})")
            if error.code == 404:
                return JudgeMissing(
                    f"{self.endpoint} has no model {self.model}, or no chat completions (the address usually ends in "
                    f"/v1): {told}"
                )
            if error.code in BUSY or error.code >= 500:
                return Passing(told, is_there=True, wait=seconds_in(error.headers.get("Retry-After")))
            return JudgeMissing(f"{self.endpoint}: {told}")
        return Passing(f"status {error.code}, and the connection was lost", is_there=True)

    def _plain(self, text: str) -> str:
        """The beginning of what a server said, on one line; a server may repeat the key that it got."""
        return "".join(letter if letter.isprintable() else " " for letter in self._without_key(text)[:300]).strip()

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "(key)") if self._key and len(self._key) >= SECRET else text


def key_from_environment() -> str | None:
    key = os.environ.get(KEY, "").strip()
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise SettingInvalid(f"{KEY}: expected printable ASCII without spaces, found something else (it is not shown)")
    return key or None


def check_address(endpoint: str, key: str | None) -> bool:
    """Whether the address is one of this machine. Refuses one that would give away a key: the address is kept in
    results, and without TLS everyone on the way reads what is sent."""
    if "@" in endpoint or "?" in endpoint:
        raise SettingInvalid(
            f"endpoint: expected no user, password or parameters, as results name the address: set {KEY} instead"
        )
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingInvalid(f"endpoint: expected an address like http://localhost:8000/v1, found {endpoint!r}")
    is_local = parts.hostname == "localhost"
    with suppress(ValueError):
        is_local = ipaddress.ip_address(parts.hostname).is_loopback
    if key and parts.scheme == "http" and not is_local:
        raise SettingInvalid(
            f"endpoint: {endpoint} is neither https nor on this machine, and the key in {KEY} would travel readable. "
            f"Give an https address, forward a local port (ssh -L 8000:localhost:8000 HOST), or unset {KEY}"
        )
    return is_local


def seconds_in(retry_after: str | None) -> float | None:
    """What a Retry-After header says: seconds, or a date."""
    with suppress(TypeError, ValueError, OverflowError):
        return max(0.0, float(retry_after or ""))
    with suppress(TypeError, ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    return None


class Answers:
    """The answers in a file, one JSON object a line: the digest of its request, the text, and who gave it."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, dict[str, Answer]()
        text = path.read_bytes() if path.is_file() else b""
        for line in text.splitlines():
            with suppress(ValueError, RecursionError, LookupError, TypeError):  # torn when the process was killed
                one = json.loads(line)
                if isinstance(one["answer"], str) and isinstance(one["model"], str):
                    self.found[str(one["key"])] = Answer(one["answer"], one["model"])
        self._starts_anew = bool(text) and not text.endswith(b"\n")

    def lacking(self, questions: Mapping[str, Question]) -> dict[str, Question]:
        """Those without an answer, by their digests."""
        return {key: question for key, question in questions.items() if key not in self.found}

    def keep(self, file: IO[bytes], key: str, answer: Answer) -> None:
        self.found[key] = answer
        line = json.dumps({"key": key, "answer": answer.text, "model": answer.model}).encode() + b"\n"
        file.write(b"\n" * self._starts_anew + line)
        file.flush()
        self._starts_anew = False


def ask_all(
    judge: Judge,
    todo: Mapping[str, Question],
    answers: Answers,
    at_once: int,
    advance: Callable[[int], None],
) -> dict[str, str]:
    """Ask questions, by their digests, several at once, and keep each answer as it arrives. Returns why the server did
    not take some: those are asked again next time."""
    waiting: queue.SimpleQueue[tuple[str, Question]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Answer | Exception]] = queue.SimpleQueue()
    stop, refused = threading.Event(), dict[str, str]()
    for item in todo.items():
        waiting.put(item)

    def work() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                key, question = waiting.get_nowait()
                try:
                    done.put((key, judge.ask(question, stop)))
                except NotTaken as error:
                    done.put((key, error))
                except Exception as error:  # noqa: BLE001  whatever it is, it is raised where it is waited for
                    done.put((key, error))  # before the others, which can only say that they were stopped
                    stop.set()

    answers.path.parent.mkdir(parents=True, exist_ok=True)
    with answers.path.open("ab") as file:

        def take(key: str, found: Answer | Exception) -> None:
            if isinstance(found, Answer):
                answers.keep(file, key, found)
            elif isinstance(found, NotTaken):
                refused[key] = str(found)
            else:
                raise found
            advance(1)

        for _ in range(min(at_once, len(todo))):  # daemons: the end of the program does not wait for a slow server
            threading.Thread(target=work, name="saemill-judge", daemon=True).start()
        try:
            for _ in todo:
                take(*done.get())
        finally:
            stop.set()
            while not done.empty():  # what has arrived meanwhile is not lost
                with suppress(Exception):
                    take(*done.get())
    return refused
