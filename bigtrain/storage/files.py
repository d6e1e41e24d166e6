"""Atomic writes of local files, which exist completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_directory = fsync_file
"""Force a directory's entries (creations and renames in it) to the disk."""


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file atomically: readers, and the disk after a crash, have the old file or the new one, never a part.

    The bytes are written to a temporary file in the same directory and synced. Then the file is renamed and the
    directory synced.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON value atomically, indented for human readers."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
