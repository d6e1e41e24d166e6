"""The board: a directory under the Ray session's logs by which the driver of a job informs its client.

    bigtrain/ID/status.json    what `bigtrain status` prints, and the exit code at the end; written by the driver
    bigtrain/ID/run            a link to the run directory, through which events.jsonl and the ranks' logs are read

The dashboard serves files below the log directory to all clients with the cluster's token, even after the driver's
end.
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
"""The largest share of the driver's time that is spent on the status; one status takes longer as the run grows."""


def board_path(id: str) -> str:
    """The board's path relative to the log directory."""
    return f"bigtrain/{id}"


class Board:
    """The driver's side of the board.

    Args:
        directory: The board's directory, which is created if it does not exist.
        id: Id of the submission.
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
        """Link the run directory to the board."""
        with contextlib.suppress(FileExistsError):
            (self._directory / "run").symlink_to(run)

    def phase(self, name: str, at: float | None = None, **fields: Any) -> None:
        """Write the job's current phase and the time at which it began.

        Args:
            name: The phase.
            at: Seconds since the epoch; None: now.
            fields: Other fields of status.json to change.
        """
        with self._lock:
            self._state |= {"phase": name, **fields}
            self._state["times"].setdefault(name, time.time() if at is None else at)
        self._write()

    def note(self, line: str) -> None:
        """Add a line that the client prints for the user when the job starts."""
        with self._lock:
            self._state["notes"] = [*self._state["notes"], line]
        self._write()

    def follow(self, status: Callable[[], dict[str, Any]]) -> None:
        """Write the run's status repeatedly, in a thread, until `end` is called."""
        self._read = status
        self._thread = threading.Thread(target=self._keep, name="board", daemon=True)
        self._thread.start()

    def end(self, exit_code: int, **fields: Any) -> None:
        """Write how the job ended.

        Args:
            exit_code: The run's exit code.
            fields: Other fields of status.json, such as `error`: the object that `--json` prints for a user error.
        """
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
        with contextlib.suppress(OSError):  # The next try may succeed; the run does not depend on the board.
            status = read()
            with self._lock:
                self._state["status"] = status
            self._write()

    def _write(self) -> None:
        with self._lock:
            text = json.dumps(self._state)
        with contextlib.suppress(OSError):  # The disk of the head node may be full; the run continues.
            storage.write_atomic(self._directory / "status.json", text + "\n")
