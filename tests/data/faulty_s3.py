"""An S3 endpoint that fails: a proxy before moto's server that spoils its answers for shards as it is told."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Spoil = Callable[["Proxy", http.client.HTTPResponse, bytes], None]


class FaultyS3(ThreadingHTTPServer):
    """The n-th GET of each tar is answered by the n-th of `faults`, later ones soundly."""

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int], faults: list[Spoil]) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.upstream, self.faults = upstream, faults
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is not news."""


class Proxy(BaseHTTPRequestHandler):
    server: FaultyS3

    def do_GET(self) -> None:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        name = self.path.partition("?")[0].rpartition("/")[2]
        number = len(self.server.faults)
        if self.command == "GET" and name.endswith(".tar"):
            with self.server.lock:
                number = self.server.requests[name]
                self.server.requests[name] += 1
        faults = self.server.faults
        (faults[number] if number < len(faults) else sound)(self, answer, body)

    do_HEAD = do_GET

    def headers_of(self, answer: http.client.HTTPResponse, length: int) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        told = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", told or str(length))
        self.end_headers()

    def body(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def sound(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    proxy.headers_of(answer, len(body))
    if proxy.command != "HEAD":
        proxy.body(body)


def failing(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    proxy.send_error(500)


def truncated(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    proxy.headers_of(answer, len(body))
    proxy.body(body[: len(body) // 2])
    proxy.close_connection = True


def reset(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    proxy.headers_of(answer, len(body))
    proxy.body(body[: len(body) // 2])
    # Linger of zero: the client gets a reset and not an end.
    proxy.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
    proxy.connection.close()


def stalled(seconds: float) -> Spoil:
    def answer_late(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
        proxy.headers_of(answer, len(body))
        proxy.body(body[: len(body) // 2])
        time.sleep(seconds)

    return answer_late


def other_bytes(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    changed = bytearray(body)
    changed[len(body) // 2] ^= 1
    sound(proxy, answer, bytes(changed))


@contextlib.contextmanager
def serving(upstream: tuple[str, int], faults: list[Spoil]) -> Iterator[FaultyS3]:
    """The proxy, running in a thread."""
    with FaultyS3(upstream, faults) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
