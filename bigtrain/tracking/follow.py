"""Reading a JSON-lines file while another process appends to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Reads each object of a growing JSON-lines file once, without reading old lines again.

    A file that was truncated (a resume truncates metrics.jsonl) is read again from its start; `follow` reports this, so
    that the caller discards the earlier objects. An incomplete last line is left for the next call.

    Args:
        path: The file, which need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._offset = 0
        self._inode: int | None = None

    def follow(self) -> tuple[list[dict[str, Any]], bool]:
        """Read the objects written since the last call.

        Returns:
            The objects, and whether the file was truncated or replaced, so that they begin at its start.
        """
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
