"""JSON-lines files, to which several processes may append, and which remain readable after a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_WAITING_LINES = 100_000


def append_line(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Append one object to a JSON-lines file in a single write, so that several processes may append to the file.

    Raises:
        OSError: The line was written in part or not at all. Readers skip an incomplete last line.
    """
    data = json.dumps(value, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            # End the incomplete last line first; otherwise this line would become a part of it.
            data = b"\n" + data
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


class LineLog:
    """Appends to a JSON-lines file; while the disk is full, lines wait in memory, in order, without an error.

    Args:
        path: The file, which the first append creates.
        limit: Largest number of waiting lines; beyond it the oldest are dropped.
    """

    def __init__(self, path: str | os.PathLike[str], limit: int = MAX_WAITING_LINES) -> None:
        self.path = Path(path)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=limit)

    def append(self, value: dict[str, Any]) -> None:
        """Append one object, after the waiting lines."""
        self._waiting.append(value)
        first = len(self._waiting) == 1
        try:
            while self._waiting:
                append_line(self.path, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if first:
                logger.warning("%s cannot be written; its lines are kept in memory: %s", self.path, error)


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the objects of a JSON-lines file. Incomplete lines, which a kill can leave, are skipped."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            value = _object(line)
            if value is not None:
                yield value


def cut_lines(path: str | os.PathLike[str], keep: Callable[[dict[str, Any]], bool]) -> None:
    """Truncate a JSON-lines file before the first object for which `keep` is false, or before an incomplete last line.

    The file is truncated in place, so a kill leaves it either unchanged or truncated.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        end = 0
        for line in file:
            value = _object(line)
            if not line.endswith(b"\n") or (value is not None and not keep(value)):
                break
            end += len(line)
        file.truncate(end)
        os.fsync(file.fileno())


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a complete line; None for any other line."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
