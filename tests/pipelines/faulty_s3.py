"""A proxy before an S3 server that spoils some of the requests, in the ways that networks do."""

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("busy", "lost_request", "lost_answer", "late_answer")
"""Answered with 503; cut off before it was passed on; after; answered when nobody waits."""


class FaultyS3:
    """Use as a context manager; `url` is that of the proxy."""

    def __init__(self, endpoint: str, probability: float, seed: int, late_s: float) -> None:
        self._server, self._late_s = urlsplit(endpoint).netloc, late_s
        self._rng, self._probability = random.Random(seed), probability
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()

    def __enter__(self) -> "FaultyS3":
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy._pass_on(self, body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        with self._lock:
            spoilt = self._rng.random() < self._probability
            fault = self._rng.choice(FAULTS) if spoilt else "none"
            self.requests[fault] += 1
        if fault == "busy":
            self._answer(handler, 503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fault == "lost_request":
            handler.close_connection = True
            return
        connection = http.client.HTTPConnection(self._server, timeout=60)
        try:
            connection.request(handler.command, handler.path, body, dict(handler.headers))
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if fault == "lost_answer":
            handler.close_connection = True
            return
        if fault == "late_answer":
            time.sleep(self._late_s)
            handler.close_connection = True
        length = response.getheader("Content-Length") if handler.command == "HEAD" else None
        headers = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("content-length", "connection", "transfer-encoding")
        ]
        try:
            self._answer(handler, response.status, headers, answer, length)
        except OSError:  # who asked has gone
            handler.close_connection = True

    @staticmethod
    def _answer(
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        length: str | None = None,
    ) -> None:
        handler.send_response_only(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", length or str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)
