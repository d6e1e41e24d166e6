"""Files on servers and object stores. Reads start at any byte, and failed requests are retried.

The scheme of a URL opens it as a `Place`, see `bigtrain.storage.scheme`. Object stores are accessed through fsspec.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from bigtrain import variables
from bigtrain.config import UserError

OBJECT_CHUNK_BYTES = 1 << 23
FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 30.0

T = TypeVar("T")


def cache_home() -> Path:
    """The default directory for fetched files: BIGTRAIN_CACHE if set, else ~/.cache/bigtrain."""
    given = os.environ.get(variables.CACHE)
    return Path(given) if given else Path.home() / ".cache" / "bigtrain"


class RemoteError(UserError):
    """A server or object store failed or refused a request; exit code 1, since a later attempt may succeed."""

    exit_code = 1


class Transient(Exception):
    """A failure that may be temporary, so the request is retried.

    Args:
        reason: The message.
        wait_s: Seconds to wait before the retry, as the server requests; 0: no request.
        start_again: Whether the bytes read so far must be discarded.
    """

    def __init__(self, reason: str, wait_s: float = 0.0, start_again: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.start_again = wait_s, start_again


@dataclass(frozen=True)
class Patience:
    """Timeout of a request to a server, and number of retries."""

    timeout_s: float = 20.0
    retries: int = 8

    def backoff_s(self, failures: int, asked_s: float) -> float:
        """Seconds until the next attempt. They double with each failure; jitter spreads the ranks' retries.

        Args:
            failures: Number of failures in a row, at least 1.
            asked_s: Seconds that the server requests; taken into account up to LONGEST_BACKOFF_S.
        """
        grown = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        return max(grown, min(asked_s, LONGEST_BACKOFF_S))


@dataclass(frozen=True)
class Body:
    """The contents of a file, from some byte on, in a server's response."""

    start: int
    """Byte offset in the file of the first chunk: the requested one, or 0 if the server does not support ranges."""
    total: int | None
    """Size of the complete file in bytes; None if the server does not report it."""
    chunks: Iterator[bytes]


class Place(Protocol):
    """A directory on a server."""

    url: str

    def open(self, name: str, start: int) -> AbstractContextManager[Body]:
        """Open a file, from byte `start` on.

        Raises:
            Transient: The request failed and may be retried. Reading the chunks may raise it too.
            RemoteError: The request failed for good, for example with status 404.
        """
        ...


class ObjectPlace:
    """A prefix of a bucket on an object store.

    Args:
        url: URL of the prefix.
        files: An fsspec filesystem.
        root: Path of the prefix in this filesystem.
    """

    def __init__(self, url: str, files: Any, root: str) -> None:
        self.url, self._files, self._root = url, files, root

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        """Open an object, from byte `start` on; see `Place.open`."""
        path = f"{self._root}/{name}"
        with self._errors(name):
            total = int(self._files.size(path))
        yield Body(start, total, self._chunks(path, name, start, total))

    def names(self) -> list[str]:
        """Sorted names of the objects and prefixes directly under this prefix."""
        with self._errors(""):
            found = self._files.ls(self._root, detail=False)
        return sorted(path.rpartition("/")[2] for path in found)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object under `prefix`/, at any depth, by its path relative to it."""
        under = f"{self._root}/{prefix}"
        with self._errors(prefix, "no such bucket"):
            found = self._files.find(under, detail=True)
        return {path.removeprefix(f"{under}/"): int(facts["size"] or 0) for path, facts in found.items()}

    def put(self, source: Path, name: str) -> None:
        """Upload a file; the object exists completely or not at all. Large files are uploaded in parallel parts.

        Args:
            source: The local file.
            name: Name of the object.

        Raises:
            FileNotFoundError: The local file does not exist.
            Transient, RemoteError: The request failed; see `Place.open`.
        """
        os.stat(source)
        with self._errors(name, "no such bucket"):
            self._files.put_file(str(source), f"{self._root}/{name}")

    def put_bytes(self, data: bytes, name: str) -> None:
        """Upload bytes as one object; see `put`."""
        with self._errors(name, "no such bucket"):
            self._files.pipe_file(f"{self._root}/{name}", data)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects in this order; missing objects are ignored."""
        for name in names:
            with self._errors(name), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}")

    def _chunks(self, path: str, name: str, start: int, total: int) -> Iterator[bytes]:
        for begin in range(start, total, OBJECT_CHUNK_BYTES):
            with self._errors(name):
                data = self._files.cat_file(path, start=begin, end=min(total, begin + OBJECT_CHUNK_BYTES))
            yield data

    @contextlib.contextmanager
    def _errors(self, name: str, missing: str = "no such object") -> Iterator[None]:
        url = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError:
            raise RemoteError(missing, url, "Correct the URL, or put the object there.") from None
        except PermissionError as error:
            raise RemoteError(f"access is refused: {error}", url, "Check the credentials in the environment.") from None
        except Exception as error:  # noqa: BLE001 - each store's library raises kinds of its own
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise RemoteError(f"there are no credentials: {error}", url) from None
            raise Transient(f"{type(error).__name__}: {error}") from None


def patiently(action: Callable[[], T], patience: Patience, where: str, cancelled: threading.Event | None = None) -> T:
    """Call `action` and return its result; it is retried after each Transient.

    Args:
        action: The request.
        patience: Number of retries, and the waits between them.
        where: URL for the error.
        cancelled: An event that ends the wait for the next attempt.

    Raises:
        RemoteError: The action failed more often in a row than `patience` allows.
        Cancelled: `cancelled` was set during the wait for the next attempt.
    """
    cancelled = cancelled or threading.Event()
    failures = 0
    while True:
        try:
            return action()
        except Transient as problem:
            failures += 1
            if failures > patience.retries:
                tries = f"{failures} failures in a row" if failures > 1 else "one failure"
                raise RemoteError(f"the server failed ({tries}): {problem}", where) from None
            if cancelled.wait(patience.backoff_s(failures, problem.wait_s)):
                raise Cancelled from None


def fetch(
    place: Place,
    name: str,
    file: BinaryIO,
    *,
    size: int | None,
    limit: int,
    patience: Patience,
    cancelled: threading.Event | None = None,
) -> None:
    """Append to `file` the bytes that it lacks of a remote file; `file` may already hold the first part.

    Args:
        place: The directory on the server.
        name: Name of the remote file in it.
        file: The local file, open for reading and writing.
        size: Bytes that the remote file must have; None: the size that the server reports.
        limit: Largest number of bytes to accept.
        patience: Number of retries, and the waits between them.
        cancelled: An event that ends the fetch with Cancelled.

    Raises:
        RemoteError: The server does not have the file, or failed more often in a row than `patience` allows.
        Cancelled: `cancelled` was set.
    """
    cancelled = cancelled or threading.Event()
    failures, best = 0, file.seek(0, os.SEEK_END)
    while True:
        try:
            _attempt(place, name, file, size, limit, cancelled)
            return
        except Transient as problem:
            reached = file.seek(0, os.SEEK_END)
            # Only bytes beyond the largest offset so far count as progress: a server without ranges restarts at byte 0.
            failures = 1 if reached > best else failures + 1
            best = max(best, reached)
            if problem.start_again:
                file.truncate(0)
            if failures > patience.retries:
                raise RemoteError(
                    f"the file could not be read ({failures} failures in a row): {problem}",
                    f"{place.url}/{name}",
                    "Check that the server is up, and run the same command again: it continues from where it stopped.",
                ) from None
            if cancelled.wait(patience.backoff_s(failures, problem.wait_s)):
                raise Cancelled from None


class Cancelled(Exception):
    """The caller has cancelled the request."""


def _attempt(place: Place, name: str, file: BinaryIO, size: int | None, limit: int, cancelled: threading.Event) -> None:
    have = file.seek(0, os.SEEK_END)
    if size is not None and have == size:
        return
    if size is not None and have > size:
        file.truncate(0)
        have = 0
    with place.open(name, have) as body:
        if body.total is not None and body.total != (body.total if size is None else size):
            raise Transient(f"the server says that the file has {body.total} bytes, but the index says {size}")
        wanted = body.total if size is None else size
        if (wanted or 0) > limit:
            raise RemoteError(f"the file has {wanted} bytes; at most {limit} are read", f"{place.url}/{name}")
        file.seek(body.start)
        file.truncate(body.start)
        have = body.start
        for chunk in body.chunks:
            if cancelled.is_set():
                raise Cancelled
            have += len(chunk)
            if have > (limit if wanted is None else wanted):
                raise Transient("the server sent more bytes than the file has", start_again=True)
            file.write(chunk)
    if wanted is not None and have < wanted:
        raise Transient(f"the file ended after {have} of {wanted} bytes")
