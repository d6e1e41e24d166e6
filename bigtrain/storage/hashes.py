"""Hashes, written with the name of their algorithm: "xxh3:HEX" for integrity, "sha256:HEX" where origin matters."""

from __future__ import annotations

import hashlib
import mmap
import os
from typing import Any, Protocol

import xxhash

CHUNK_BYTES = 1 << 20


class Digest(Protocol):
    """A hash in the making, of hashlib or xxhash."""

    def update(self, data: Any, /) -> None:
        """Add bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of what was added so far."""
        ...


def new_digest() -> Digest:
    """An XXH3-128 hash in the making, for `named`."""
    return xxhash.xxh3_128()


def named(digest: Digest) -> str:
    """The hash of a digest of `new_digest` as "xxh3:HEX"."""
    return f"xxh3:{digest.hexdigest()}"


def hash_bytes(data: bytes) -> str:
    """The XXH3-128 hash of some bytes, as "xxh3:HEX": proves integrity, not origin."""
    return named(xxhash.xxh3_128(data))


def hash_file(path: str | os.PathLike[str]) -> str:
    """The XXH3-128 hash of a file's bytes, as "xxh3:HEX": proves integrity, not origin."""
    digest = new_digest()
    # Mapped, so that it goes back to the system at once: allocators keep megabytes for each thread that hashes.
    with mmap.mmap(-1, CHUNK_BYTES) as buffer, memoryview(buffer) as chunk, open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return named(digest)


def hash_text(text: str | bytes) -> str:
    """The SHA-256 hash of a text, as "sha256:HEX"."""
    return f"sha256:{hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()}"
