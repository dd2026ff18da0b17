"""A proxy for an S3 server that drops, delays, throttles and truncates like a real network."""

from __future__ import annotations

import http.client
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("lost request", "lost answer", "cut answer", "throttled", "slow")
HANGS = 5  # seconds without an answer: longer than the client waits
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on, except for a share of them that get a random fault."""

    daemon_threads = True

    def __init__(self, server: str, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = urlsplit(server).netloc
        self.share = 0.0
        self.kinds: tuple[str, ...] = KINDS
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self.draw, self.turn = random.Random(seed), threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self) -> str | None:
        with self.turn:
            self.requests += 1
            if self.draw.random() >= self.share:
                return None
            kind = self.draw.choice(self.kinds)
            self.faults[kind] += 1
            return kind

    def handle_error(self, request, client_address) -> None:
        """Ignores clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def pass_on(self) -> None:
        body = self._body()
        fault = self.server.fault()
        if fault == "lost request":
            self.close_connection = True
            return
        if fault == "hanging":
            time.sleep(HANGS)
            self.close_connection = True
            return
        if fault == "throttled":
            self._answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "slow":
            time.sleep(0.05)
        connection = http.client.HTTPConnection(self.server.target, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP:
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data, headers = answer.read(), {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        connection.close()
        if fault == "no condition":  # as in refusals by MinIO and others
            data = re.sub(rb"<Condition>.*?</Condition>", b"", data)
        if fault == "lost answer":
            self.close_connection = True
            return
        self._answer(answer.status, headers, data, cut=fault == "cut answer")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
