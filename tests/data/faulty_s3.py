"""An S3 endpoint that fails on request: a proxy before moto's server that spoils what is read and written."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Chooses = Callable[[str, str], bool]
Spoil = Callable[["Proxy", http.client.HTTPResponse, bytes], None]

_SAYS_LENGTH = ("content-length", "content-md5", "x-amz-checksum", "x-amz-sdk", "x-amz-decoded")


class FaultyS3(ThreadingHTTPServer):
    """The n-th request for each object that `chooses` is answered by the n-th of `faults`, later ones soundly.

    Args:
        chooses: By method and name: by default the GETs of tars.
    """

    daemon_threads = True

    def __init__(self, upstream: tuple[str, int], faults: list[Spoil], chooses: Chooses) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.upstream, self.faults, self.chooses = upstream, faults, chooses
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing where a client has closed the connection."""


class Proxy(BaseHTTPRequestHandler):
    server: FaultyS3
    # S3's clients ask "Expect: 100-continue" before they send, which older versions do not know.
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        spoil = self._fault()
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        if spoil is half_stored:
            sent, spoil = sent[: len(sent) // 2], sound
            headers = {name: value for name, value in headers.items() if not name.lower().startswith(_SAYS_LENGTH)}
            headers["Content-Length"] = str(len(sent))
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        connection.request(self.command, self.path, sent or None, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        spoil(self, answer, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _fault(self) -> Spoil:
        path = self.path.partition("?")[0]
        if not self.server.chooses(self.command, path.rpartition("/")[2]):
            return sound
        key = path.rpartition("/")[2] if self.command == "GET" else f"{self.command} {path}"
        with self.server.lock:
            number = self.server.requests[key]
            self.server.requests[key] += 1
        return self.server.faults[number] if number < len(self.server.faults) else sound

    def headers_of(self, answer: http.client.HTTPResponse, length: int) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        declared = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", declared or str(length))
        self.send_header("Connection", "close")
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
    cut(proxy, answer, body)


def cut(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    """No answer."""
    # Linger of zero: the client gets a reset and not an end.
    proxy.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
    proxy.connection.close()
    proxy.close_connection = True


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


def wrong_length(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    """Says less than there is, and sends what it says."""
    sound(proxy, answer, body[: len(body) // 3])


def half_stored(proxy: Proxy, answer: http.client.HTTPResponse, body: bytes) -> None:
    """Half of what was sent is stored, and the answer is that all is well: the proxy does it before it asks."""
    raise AssertionError("the proxy sends half instead")


def _tars(command: str, name: str) -> bool:
    return command == "GET" and name.endswith(".tar")


@contextlib.contextmanager
def serving(upstream: tuple[str, int], faults: list[Spoil], chooses: Chooses = _tars) -> Iterator[FaultyS3]:
    """The proxy, running in a thread."""
    with FaultyS3(upstream, faults, chooses) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
