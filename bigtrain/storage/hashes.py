"""Hashes, prefixed with the name of their algorithm.

"xxh3:HEX" detects damage. "sha256:HEX" is used where a hash must also resist forgery.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from typing import Any, Protocol

import xxhash

CHUNK_BYTES = 1 << 20


class Digest(Protocol):
    """An incremental hash object of hashlib or xxhash."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all bytes added so far, in hexadecimal."""
        ...


def new_digest() -> Digest:
    """A new incremental XXH3-128 hash, for `named`."""
    return xxhash.xxh3_128()


def named(digest: Digest) -> str:
    """The value of a digest from `new_digest`, as "xxh3:HEX"."""
    return f"xxh3:{digest.hexdigest()}"


def hash_bytes(data: bytes) -> str:
    """The XXH3-128 hash of `data` as "xxh3:HEX"; it detects damage, but not forgery."""
    return named(xxhash.xxh3_128(data))


def hash_file(path: str | os.PathLike[str]) -> str:
    """The XXH3-128 hash of a file's bytes as "xxh3:HEX"; it detects damage, but not forgery."""
    digest = new_digest()
    # An mmap is returned to the system at once; an allocator would keep megabytes for each thread that hashes.
    with mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as chunk, open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return named(digest)


def hash_text(text: str | bytes) -> str:
    """The SHA-256 hash of a text or of bytes, as "sha256:HEX"."""
    return f"sha256:{hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()}"
