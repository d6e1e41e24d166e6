"""Where the driver of a job shows its client what it may see: a directory under the Ray session's logs.

    bigtrain/ID/status.json    what `bigtrain status` says, and the exit code at the end; written by the driver
    bigtrain/ID/run            a link to the run directory: events.jsonl and the ranks' logs are read through it

The dashboard serves files below that directory to whoever holds the cluster's token, also after the driver's end.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bigtrain import storage

FORMAT_VERSION: Final = 1
WRITE_EVERY_S: Final = 1.0
SHARE: Final = 0.02
"""Of the driver's time, at most this share goes into the status: it grows with the run's length."""


def board_path(id: str) -> str:
    """The board's place under the log directory."""
    return f"bigtrain/{id}"


class Board:
    """The driver's side.

    Args:
        directory: The board; made where it is not there.
        id: The submission.
    """

    def __init__(self, directory: Path, id: str) -> None:
        self._directory = directory
        self._state: dict[str, Any] = {
            "format_version": FORMAT_VERSION, "submission": id, "phase": "checking", "times": {},
            "exit_code": None, "error": None, "status": None, "notes": [],
        }  # fmt: skip
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._read: Callable[[], dict[str, Any]] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._write()

    def link(self, run: Path) -> None:
        """Show a run directory."""
        with contextlib.suppress(FileExistsError):
            (self._directory / "run").symlink_to(run)

    def phase(self, name: str, at: float | None = None, **fields: Any) -> None:
        """Say how far the job is, and when it got there in seconds since the epoch."""
        with self._lock:
            self._state |= {"phase": name, **fields}
            self._state["times"].setdefault(name, time.time() if at is None else at)
        self._write()

    def note(self, line: str) -> None:
        """Add a line that a person should read at the start."""
        with self._lock:
            self._state["notes"] = [*self._state["notes"], line]
        self._write()

    def follow(self, status: Callable[[], dict[str, Any]]) -> None:
        """Write the run's status again and again until `end`."""
        self._read = status
        self._thread = threading.Thread(target=self._keep, name="board", daemon=True)
        self._thread.start()

    def end(self, exit_code: int, **fields: Any) -> None:
        """Write how the job ended; `error` is what `--json` prints for a user's mistake."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._read is not None:
            self._take(self._read)
        self.phase("over", exit_code=exit_code, **fields)

    def _keep(self) -> None:
        wait_s = 0.0
        while not self._ended.wait(wait_s):
            began = time.monotonic()
            assert self._read is not None
            self._take(self._read)
            wait_s = max(WRITE_EVERY_S, (time.monotonic() - began) / SHARE)

    def _take(self, read: Callable[[], dict[str, Any]]) -> None:
        with contextlib.suppress(OSError):  # The next look may succeed; the run does not depend on it.
            status = read()
            with self._lock:
                self._state["status"] = status
            self._write()

    def _write(self) -> None:
        with self._lock:
            text = json.dumps(self._state)
        with contextlib.suppress(OSError):  # The head's disk may be full; the run goes on.
            storage.write_atomic(self._directory / "status.json", text + "\n")
