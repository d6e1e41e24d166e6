"""A log is followed through a connection that breaks, a server that is away, and silence."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from bigtrain.jobs.cluster import dashboard
from bigtrain.jobs.cluster.dashboard import Dashboard, NotThere


class Unreliable(http.server.BaseHTTPRequestHandler):
    """The log interface of a dashboard that hangs up after a few bytes; Ray's own cannot be made to.

    Like Ray's, it says nothing before the first byte of a followed file, and knows files by lines from their end.
    """

    protocol_version = "HTTP/1.1"
    directory: ClassVar[Path]
    hang_up_after: ClassVar[int] = 7
    refuse: ClassVar[int] = 0
    streams: ClassVar[int] = 0

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        name = parse_qs(parts.query)["filename"][0]
        if Unreliable.refuse:
            Unreliable.refuse -= 1
            self.send_error(503)
            return
        try:
            data = (self.directory / name).read_bytes()
        except FileNotFoundError:
            data = b"A file is not found at: there"
            self.send_response(500)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        if parts.path.endswith("file"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        Unreliable.streams += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = data[: Unreliable.streams * self.hang_up_after]
        self.wfile.write(f"{len(sent):x}\r\n".encode() + sent + b"\r\n")
        self.wfile.flush()
        self.close_connection = True  # In the middle of the answer: no last chunk comes.

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def unreliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray looks for a token there.
    monkeypatch.setattr(dashboard, "RECONNECT_S", 0.01)
    monkeypatch.setattr(dashboard, "STATE_POLL_S", 0.05)
    Unreliable.directory, Unreliable.streams, Unreliable.refuse = tmp_path, 0, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unreliable)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield Dashboard(f"http://127.0.0.1:{server.server_port}", None)
    server.shutdown()
    server.server_close()


def test_each_byte_comes_once_through_broken_connections_and_an_absent_server(
    unreliable: Dashboard, tmp_path: Path
) -> None:
    text = b"".join(b"line %d\n" % number for number in range(20))
    log = tmp_path / "rank_0.log"
    log.write_bytes(b"")  # As a rank leaves it for long.
    threads = threading.active_count()
    end = time.monotonic() + 1.5

    def write() -> None:
        with open(log, "ab") as file:
            for start in range(0, len(text), 11):
                time.sleep(0.02)
                Unreliable.refuse = 1 if start % 33 == 0 else 0
                file.write(text[start : start + 11])
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    got = b"".join(unreliable.follow("node", "rank_0.log", lambda: not writer.is_alive() and time.monotonic() > end))
    writer.join()
    assert got == text
    assert Unreliable.streams > 3, "no connection broke"
    assert threading.active_count() <= threads + 2  # The server's own.


def test_a_log_that_stays_empty_ends_with_its_run(unreliable: Dashboard, tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").write_bytes(b"")
    looks = iter([False, False, True])
    assert list(unreliable.follow("node", "rank_0.log", lambda: next(looks))) == []


def test_a_missing_log_is_reported(unreliable: Dashboard) -> None:
    with pytest.raises(NotThere):
        list(unreliable.follow("node", "none.log", lambda: False))


def test_a_server_that_stays_away_is_given_up(
    unreliable: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "GONE_S", 0.2)
    (tmp_path / "rank_0.log").write_bytes(b"text\n")
    Unreliable.refuse = 10**6
    with pytest.raises(dashboard.DashboardGone):
        list(unreliable.follow("node", "rank_0.log", lambda: False))
