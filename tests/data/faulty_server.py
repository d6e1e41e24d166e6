"""A real HTTP server that serves a directory and fails on request."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler", bytes, int], None]
"""Answers a request for a file's bytes from a start."""


class FaultyServer(ThreadingHTTPServer):
    """Serves `root`; the n-th request for a file is answered by the n-th of its faults, later ones soundly."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: dict[str, list[Fault]] = {}
        """By file name; "*.tar" stands for every tar."""
        self.always: Fault | None = None
        self.delay_s = 0.0
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.ranges: dict[str, list[int]] = defaultdict(list)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, name: str) -> Fault | None:
        with self.lock:
            number = self.requests[name]
            self.requests[name] += 1
        wanted = self.faults.get(name) or (self.faults.get("*.tar", []) if name.endswith(".tar") else [])
        return wanted[number] if number < len(wanted) else self.always

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a client has closed the connection."""


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        path = self.server.root / self.path.lstrip("/")
        time.sleep(self.server.delay_s)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.server.ranges[name].append(start)
        fault = self.server.fault(name)
        if not path.is_file():
            self.send_error(404)
            return
        (fault or sound)(self, path.read_bytes(), start)

    def head(self, length: int, start: int, total: int) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def body(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(data)
            self.wfile.flush()
            self.server.bytes_sent[self.path.rpartition("/")[2]] += len(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def sound(handler: Handler, data: bytes, start: int) -> None:
    handler.head(len(data) - start, start, len(data))
    handler.body(data[start:])


def status(code: int) -> Fault:
    return lambda handler, data, start: handler.send_error(code)


def truncated(handler: Handler, data: bytes, start: int) -> None:
    """Half of what is missing, then the end."""
    handler.head(len(data) - start, start, len(data))
    handler.body(data[start : (start + len(data)) // 2])
    handler.close_connection = True


def reset(handler: Handler, data: bytes, start: int) -> None:
    handler.head(len(data) - start, start, len(data))
    handler.body(data[start : (start + len(data)) // 2])
    # Linger of zero: the client gets a reset and not an end.
    handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def stall(seconds: float) -> Fault:
    def answer(handler: Handler, data: bytes, start: int) -> None:
        handler.head(len(data) - start, start, len(data))
        handler.body(data[start : (start + len(data)) // 2])
        time.sleep(seconds)

    return answer


def wrong_length(handler: Handler, data: bytes, start: int) -> None:
    """Says less than there is, and sends what it says."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) // 3))
    handler.end_headers()
    handler.body(data[: len(data) // 3])


def no_length(handler: Handler, data: bytes, start: int) -> None:
    """The whole file until the connection ends."""
    handler.send_response(200)
    handler.end_headers()
    handler.body(data)
    handler.close_connection = True


def no_range(handler: Handler, data: bytes, start: int) -> None:
    handler.head(len(data), 0, len(data))
    handler.body(data)


def no_range_truncated(handler: Handler, data: bytes, start: int) -> None:
    handler.head(len(data), 0, len(data))
    handler.body(data[: len(data) // 2])
    handler.close_connection = True


def other_bytes(handler: Handler, data: bytes, start: int) -> None:
    """One bit is another."""
    changed = bytearray(data)
    changed[-1500 if len(data) > 3000 else -1] ^= 1
    sound(handler, bytes(changed), start)


def redirected(place: str) -> Fault:
    def answer(handler: Handler, data: bytes, start: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", place)
        handler.end_headers()

    return answer


@contextlib.contextmanager
def serving(root: Path) -> Iterator[FaultyServer]:
    """The server, running in a thread."""
    with FaultyServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
