"""Helpers for the tests of tracking: a W&B offline file's reader, a stand-in server, a run directory."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

START_S = 1_790_000_000.0


def _records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    data = path.read_bytes()
    position, partial = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield partial
            partial = b""


@pytest.fixture
def read_wandb() -> Callable[[Path], list[Any]]:
    """Every record that W&B has written under a run directory, as its protocol's messages."""

    def read(run_dir: Path) -> list[Any]:
        from wandb.proto import wandb_internal_pb2

        found = []
        for file in sorted(run_dir.glob("wandb/*run-*/*.wandb")):
            for data in _records(file):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(data)
                found.append(record)
        return found

    return read


@pytest.fixture
def wandb_history(read_wandb: Callable[[Path], list[Any]]) -> Callable[[Path], list[dict[str, Any]]]:
    """The logged steps of a run directory's W&B files, in order."""

    def history(run_dir: Path) -> list[dict[str, Any]]:
        rows = []
        for record in read_wandb(run_dir):
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(row)
        return rows

    return history


@contextmanager
def _serve(answer: str) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            if answer == "hang":
                released.wait(60)
                return
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(500)
            self.end_headers()

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def wandb_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A server in W&B's place that hangs or answers 500; the environment points to it, with a key."""

    @contextmanager
    def serve(answer: str) -> Iterator[list[str]]:
        with _serve(answer) as (url, asked):
            monkeypatch.setenv("WANDB_BASE_URL", url)
            monkeypatch.setenv("WANDB_API_KEY", "canary" + "0" * 34)
            yield asked

    return serve


@pytest.fixture
def write_lines() -> Callable[..., None]:
    """Append objects to a JSON-lines file."""

    def write(path: Path, *values: dict[str, Any]) -> None:
        with open(path, "a") as file:
            file.writelines(json.dumps(value) + "\n" for value in values)

    return write


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """An empty run directory of the name `tiny`."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    return directory


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """One object of metrics.jsonl, a step of 100 tokens that took one second."""

    def make(step: int, **fields: Any) -> dict[str, Any]:
        base = {
            "step": step, "tokens": 100 * step, "loss": 4.0 / (step + 1), "lr": 9.8e-4, "grad_norm": 1.0,
            "tokens_per_s": 100.0, "mfu": None, "memory_bytes": 2**30, "data_wait_s": 0.0,
        }  # fmt: skip
        return {**base, **fields}

    return make


@pytest.fixture
def event() -> Callable[..., dict[str, Any]]:
    """One object of events.jsonl, `at` seconds after the run's first moment."""

    def make(name: str, at: float = 0.0, **fields: Any) -> dict[str, Any]:
        return {"time": START_S + at, "event": name, "attempt": 0, **fields}

    return make


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition holds, and fail where it does not within a minute."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < deadline, "the condition did not hold within 60 s"
            time.sleep(0.02)

    return wait
