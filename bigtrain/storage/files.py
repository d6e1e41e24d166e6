"""Local files that are there whole or not at all."""

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
    """Write a file so that a reader, or a crash, sees the old one or the new one and never a part.

    The bytes go to a temporary file beside it, are synced, renamed, and the directory is synced.
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
    """Write one JSON value atomically, indented so that a person can read it."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
