"""A judge on loopback that answers from what it is asked, and fails as it is told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "fake-judge-2026"  # as it names itself


def passages_in(prompt: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)


def is_to_explain(prompt: str) -> bool:
    return "What do the marked tokens have in common?" in prompt


def perfect(prompt: str) -> str:
    """Explains by the list of all marked words, and names the passages that have one of them."""
    if is_to_explain(prompt):
        return ", ".join(sorted(set(re.findall("<<(.*?)>>", "\n".join(passages_in(prompt))))))
    if "description, it is active on: " not in prompt:
        return "Yes"
    explanation = prompt.partition("description, it is active on: ")[2].partition("\n")[0]
    words = {word.strip() for word in explanation.split(",")}
    named = [number for number, text in enumerate(passages_in(prompt), 1) if words & set(text.split())]
    return ", ".join(map(str, named)) or "none"


def ignorant(prompt: str) -> str:
    return "tokens" if is_to_explain(prompt) else "none"


class FakeJudge:
    def __init__(self, answer: Callable[[str], str] = perfect) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Callable[[BaseHTTPRequestHandler], bool | None]] = []
        """Taken one by one, each instead of an answer; one that returns True lets the answer follow."""
        self.stuck = threading.Event()
        """Let go of requests that hang."""
        self.url = ""

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(body)
        self.headers.append(dict(handler.headers))
        if self.faults and not self.faults.pop(0)(handler):
            return
        text = self.answer(body["messages"][-1]["content"])
        send(handler, 200, {"model": NAME, "choices": [{"message": {"role": "assistant", "content": text}}]})


def send(handler: BaseHTTPRequestHandler, status: int, body: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in (("Content-Length", str(len(data))), *headers):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def failing(status: int, message: str = "no", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda handler: send(handler, status, {"error": {"message": message}}, named)


def torn(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


@contextmanager
def serving(judge: FakeJudge, port: int = 0):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path == "/v1/chat/completions":
                judge.reply(self)
            else:
                send(self, 404, {"error": "not here"})

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that has gone."""

    server = Quiet(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        judge.stuck.set()
        server.shutdown()
        server.server_close()
        thread.join()
