"""Files that are there whole or not at all: atomic writes, hashes, JSON lines that survive a torn tail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

HASH_CHUNK_BYTES = 1 << 22


def hash_file(path: str | os.PathLike[str]) -> str:
    """The XXH3-128 hash of a file's bytes, as "xxh3:HEX": proves integrity, not origin."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def hash_text(text: str) -> str:
    """The SHA-256 hash of a text, as "sha256:HEX"."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


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


def append_line(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Append one object to a JSON-lines file in a single write, so that several processes may share it."""
    data = json.dumps(value, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line, which a kill can leave, is passed over."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def cut_lines(path: str | os.PathLike[str], keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the leading objects of a JSON-lines file while `keep` holds, and drop the rest atomically."""
    source = Path(path)
    if not source.exists():
        return
    kept = []
    for value in read_lines(source):
        if not keep(value):
            break
        kept.append(json.dumps(value, allow_nan=False, separators=(", ", ": ")))
    write_atomic(source, "".join(line + "\n" for line in kept))
