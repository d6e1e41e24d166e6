"""Reading a JSON-lines file while another process appends to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Yields each object of a growing JSON-lines file once, reading only what is new.

    A file that was cut (a resume rewrites metrics.jsonl) is read again from its start: `follow` says so, and
    the reader forgets what it had. A line that is not yet whole is left for the next time.

    Args:
        path: The file; it may not be there yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offset = 0
        self._inode: int | None = None

    def follow(self) -> tuple[list[dict[str, Any]], bool]:
        """The objects written since the last call, and whether the file was cut and they start it anew."""
        if not self._path.exists():
            return [], False
        with open(self._path, "rb") as file:
            found = os.fstat(file.fileno())
            was_cut = self._inode is not None and (found.st_ino != self._inode or found.st_size < self._offset)
            if was_cut:
                self._offset = 0
            self._inode = found.st_ino
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return _objects(data[:whole]), was_cut


def _objects(data: bytes) -> list[dict[str, Any]]:
    values = []
    for line in data.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values
