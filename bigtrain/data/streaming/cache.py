"""A directory of fetched files with a size limit, shared by all ranks and runs of a machine.

    ROOT/.lock                          held by the one process that counts and evicts files
    ROOT/KEY/index.json, ...            small files of one source, never evicted
    ROOT/KEY/shard.tar                  complete and verified; its users hold a shared lock on it
    ROOT/KEY/.shard.tar.part-SIZE       incomplete; counts as SIZE bytes, so that it reserves the space
    ROOT/KEY/.shard.tar.lock            held by the process that fetches the shard, while others wait for the shard

Locks are flock locks, which end with the process that holds them, however it ends. An incomplete file of a killed
process is completed by the next process that needs it, or evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from bigtrain.config import CorruptionError, UserError
from bigtrain.storage import hash_file, locks
from bigtrain.storage.objects import Cancelled

logger = logging.getLogger(__name__)

ARRIVALS = 3
"""Number of fetches of a file, after which a hash that differs from the index is an error."""
REMOVALS = 100
"""How often other processes may empty the cache while one file is fetched, before the fetch fails."""
_POLL_S = 0.02
_PART = ".part-"


class NoRoom(Exception):
    """All files of the cache are in use. A retry can succeed after one of them is released."""


class HeldShard:
    """A file of the cache that is not evicted until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Allow the eviction of the file. Memory maps of the file stay valid."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Cache:
    """See the module's docstring.

    Args:
        root: A directory on a local disk; created if it does not exist.
        limit_bytes: Maximum bytes of the files of all sources. It is exceeded only for an urgent file, if all other
            files are in use.

    Raises:
        UserError: The directory cannot be created or written.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._prepare(root)

    def _prepare(self, directory: Path) -> None:
        """Create the root, and a directory in it, if they do not exist."""
        for removals_left in reversed(range(REMOVALS + 1)):
            try:
                directory.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644))
                return
            except OSError as error:
                # Another process may empty the cache between the two calls.
                if isinstance(error, (FileNotFoundError, FileExistsError)) and removals_left:
                    continue
                raise UserError(
                    f"the cache of shards cannot be written: {error.strerror}",
                    str(self.root),
                    "Set streaming.cache_dir.",
                ) from None

    def directory(self, source: str, fingerprint: str) -> Path:
        """The directory for the files of one source.

        Args:
            source: URL or path of the data.
            fingerprint: Fingerprint of the data.
        """
        # The key includes the source, so that a source with forged hashes cannot plant shards for another one.
        key = hashlib.sha256(f"{source}\n{fingerprint}".encode()).hexdigest()[:32]
        path = self.root / key
        self._prepare(path)
        return path

    def get(
        self,
        path: Path,
        *,
        size: int,
        hash: str | None,
        fill: Callable[[BinaryIO], None],
        urgent: bool,
        check: bool = True,
        cancelled: threading.Event | None = None,
    ) -> HeldShard:
        """The file at `path`; if it does not exist, `fill` makes it.

        Args:
            size: Bytes to reserve for the file.
            hash: The hash that the file must have; None if `fill` guarantees the content.
            fill: Completes the file, which may already hold its first bytes.
            urgent: Whether to exceed the limit if all files are in use.
            check: Whether to hash a file that already exists.
            cancelled: When it is set, waiting for another process ends with Cancelled.

        Raises:
            NoRoom: All files are in use, and the file is not urgent.
            CorruptionError: The content from `fill` had another hash, ARRIVALS times in a row.
        """
        for _ in range(REMOVALS):
            with contextlib.suppress(FileNotFoundError):
                return self._get(path, size, hash, fill, urgent, check, cancelled)
            # Another process has emptied the cache in the meantime.
            self._prepare(path.parent)
        return self._get(path, size, hash, fill, urgent, check, cancelled)

    def _get(
        self,
        path: Path,
        size: int,
        hash: str | None,
        fill: Callable[[BinaryIO], None],
        urgent: bool,
        check: bool,
        cancelled: threading.Event | None,
    ) -> HeldShard:
        while True:
            lease = self._lease(path)
            if lease is None:
                with self._alone(path, cancelled):
                    lease = self._lease(path) or self._make(path, size, hash, fill, urgent)
            elif check and hash is not None and hash_file(path) != hash:
                logger.warning("%s in the cache is damaged and is downloaded again", path)
                path.unlink(missing_ok=True)
                lease.release()
                continue
            if lease is not None:
                return lease

    def _lease(self, path: Path) -> HeldShard | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        locks.lock(descriptor, shared=True)
        if not os.fstat(descriptor).st_nlink:
            # It was evicted between the two calls.
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return HeldShard(path, descriptor)

    @contextlib.contextmanager
    def _alone(self, path: Path, cancelled: threading.Event | None) -> Iterator[None]:
        """Hold the lock of the only process that may make a file."""
        lock = path.with_name(f".{path.name}.lock")
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            if locks.lock(descriptor, wait=False) and _is_at(lock, descriptor):
                break
            os.close(descriptor)
            if cancelled is None:
                time.sleep(_POLL_S)
            elif cancelled.wait(_POLL_S):
                raise Cancelled
        try:
            yield
        finally:
            # If the cache was emptied, the lock file at this path may belong to another process.
            if _is_at(lock, descriptor):
                lock.unlink(missing_ok=True)
            os.close(descriptor)

    def _make(
        self, path: Path, size: int, hash: str | None, fill: Callable[[BinaryIO], None], urgent: bool
    ) -> HeldShard | None:
        part = path.with_name(f".{path.name}{_PART}{size}")
        self._reserve(part, size, urgent)
        with open(part, "r+b") as file:
            for arrival in range(ARRIVALS):
                fill(file)
                file.flush()
                if hash is None or hash_file(part) == hash:
                    break
                logger.warning(
                    "the bytes of the downloaded %s differ from its index (download %d)", path.name, arrival + 1
                )
                file.truncate(0)
            else:
                part.unlink()
                raise CorruptionError(
                    f"{path.name} was downloaded {ARRIVALS} times, each time with bytes that differ from its index",
                    str(path),
                    "Upload the shard again, or index it again: it then counts as different data.",
                )
            os.fsync(file.fileno())
            os.replace(part, path)
        return self._lease(path)

    def _reserve(self, part: Path, size: int, urgent: bool) -> None:
        """Create `part`, after evicting the least recently used files if space is needed."""
        with locks.locked(self.root / ".lock"):
            if part.exists():
                return
            files = sorted(self._files())
            used = sum(count for _, count, _ in files)
            for _, count, path in files:
                if used + size <= self.limit_bytes:
                    break
                used -= count if _evict(path) else 0
            if used + size > self.limit_bytes:
                if not urgent:
                    raise NoRoom
                logger.warning(
                    "the cache %s is over its limit of %d bytes: all of its %d bytes are in use",
                    self.root, self.limit_bytes, used,
                )  # fmt: skip
            part.touch()

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield time of last use (ns), bytes and path of all files that count towards the limit."""
        for directory in os.scandir(self.root):
            if not directory.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(directory.path):
                if entry.name.startswith(".") and _PART not in entry.name:
                    continue
                if entry.name.endswith(".json"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    reserved = entry.name.rpartition(_PART)[2] if _PART in entry.name else ""
                    count = int(reserved) if reserved.isdigit() else status.st_size
                    yield status.st_mtime_ns, count, Path(entry.path)


def _evict(path: Path) -> bool:
    """Remove a file if no process uses it. Returns whether it is gone."""
    lock = path
    if _PART in path.name:
        lock = path.with_name(path.name.partition(_PART)[0] + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | (os.O_CREAT if lock != path else 0), 0o644)
    except OSError:
        return not path.exists()
    try:
        if not locks.lock(descriptor, wait=False) or not _is_at(lock, descriptor):
            return False
        path.unlink(missing_ok=True)
        if lock != path:
            lock.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)
