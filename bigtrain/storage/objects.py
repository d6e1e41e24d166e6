"""Files on servers and object stores: read from any byte on, and tried again where it breaks.

A place is opened by its URL's scheme, see `bigtrain.storage.scheme`; object stores are filesystems of fsspec.
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
    """Where what was fetched lies, unless a config says otherwise: BIGTRAIN_CACHE, else ~/.cache/bigtrain."""
    given = os.environ.get(variables.CACHE)
    return Path(given) if given else Path.home() / ".cache" / "bigtrain"


class RemoteError(UserError):
    """A file that could not be read from its server: exit code 1, since another try may do it."""

    exit_code = 1


class Transient(Exception):
    """A failure that may pass.

    Args:
        start_again: Whether what was read so far is of no use.
    """

    def __init__(self, reason: str, wait_s: float = 0.0, start_again: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.start_again = wait_s, start_again


@dataclass(frozen=True)
class Patience:
    """How long a call to a server is waited for, and how often it is tried again."""

    timeout_s: float = 20.0
    retries: int = 8

    def backoff_s(self, failures: int, asked_s: float) -> float:
        """Seconds before the next try: doubling, with jitter so that ranks do not come back together."""
        grown = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        return max(grown, min(asked_s, LONGEST_BACKOFF_S))


@dataclass(frozen=True)
class Body:
    """What a server answers with."""

    start: int
    """Byte of the file at which the chunks begin: the requested one, or 0 where the server supports no ranges."""
    total: int | None
    """Size of the complete file in bytes; None where the server does not report it."""
    chunks: Iterator[bytes]


class Place(Protocol):
    """A directory on a server."""

    url: str

    def open(self, name: str, start: int) -> AbstractContextManager[Body]:
        """A file's bytes from `start` on.

        Raises:
            Transient: Worth another try, as is what reading the chunks raises.
            RemoteError: Not worth one, such as 404.
        """
        ...


class ObjectPlace:
    """A prefix of a bucket.

    Args:
        files: A filesystem of fsspec.
        root: Path of the prefix in it.
    """

    def __init__(self, url: str, files: Any, root: str) -> None:
        self.url, self._files, self._root = url, files, root

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        """See `Place`."""
        path = f"{self._root}/{name}"
        with self._errors(name):
            total = int(self._files.size(path))
        yield Body(start, total, self._chunks(path, name, start, total))

    def names(self) -> list[str]:
        """What lies in it directly, sorted."""
        with self._errors(""):
            found = self._files.ls(self._root, detail=False)
        return sorted(path.rpartition("/")[2] for path in found)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object under PREFIX/, at any depth, by its name from there."""
        under = f"{self._root}/{prefix}"
        with self._errors(prefix, "no such bucket"):
            found = self._files.find(under, detail=True)
        return {path.removeprefix(f"{under}/"): int(facts["size"] or 0) for path, facts in found.items()}

    def put(self, source: Path, name: str) -> None:
        """Store a file; it is there whole or not at all. Large ones go in parts, several at once.

        Raises:
            FileNotFoundError: There is no such file here.
            Transient, RemoteError: As `open`.
        """
        os.stat(source)
        with self._errors(name, "no such bucket"):
            self._files.put_file(str(source), f"{self._root}/{name}")

    def put_bytes(self, data: bytes, name: str) -> None:
        """Store a few bytes under a name; see `put`."""
        with self._errors(name, "no such bucket"):
            self._files.pipe_file(f"{self._root}/{name}", data)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects in this order; one that is not there is no error."""
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
            raise RemoteError(f"access is refused: {error}", url, "see the credentials in the environment") from None
        except Exception as error:  # noqa: BLE001 - each store's library raises kinds of its own
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise RemoteError(f"there are no credentials: {error}", url) from None
            raise Transient(f"{type(error).__name__}: {error}") from None


def patiently(action: Callable[[], T], patience: Patience, where: str, cancelled: threading.Event | None = None) -> T:
    """The result of an action that is tried again where it fails with Transient.

    Raises:
        RemoteError: It failed more often in a row than patience allows.
        Cancelled: `cancelled` was set while it waited for the next try.
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
    """Complete `file` with the bytes of a remote file that it lacks; it may hold the first part.

    Args:
        size: Bytes that the remote file must have; None: what the server says.
        limit: Bytes that are accepted at most.
        cancelled: Ends the fetch with Cancelled.

    Raises:
        RemoteError: The server does not have it, or failed more often than patience allows.
    """
    cancelled = cancelled or threading.Event()
    failures, best = 0, file.seek(0, os.SEEK_END)
    while True:
        try:
            _attempt(place, name, file, size, limit, cancelled)
            return
        except Transient as problem:
            reached = file.seek(0, os.SEEK_END)
            # Only bytes never reached before count as progress: a server without ranges begins at 0 each time.
            failures = 1 if reached > best else failures + 1
            best = max(best, reached)
            if problem.start_again:
                file.truncate(0)
            if failures > patience.retries:
                raise RemoteError(
                    f"the file could not be read ({failures} failures in a row): {problem}",
                    f"{place.url}/{name}",
                    "see whether the server is up; the same command goes on from where it was",
                ) from None
            if cancelled.wait(patience.backoff_s(failures, problem.wait_s)):
                raise Cancelled from None


class Cancelled(Exception):
    """A fetch that the caller has cancelled."""


def _attempt(place: Place, name: str, file: BinaryIO, size: int | None, limit: int, cancelled: threading.Event) -> None:
    have = file.seek(0, os.SEEK_END)
    if size is not None and have == size:
        return
    if size is not None and have > size:
        file.truncate(0)
        have = 0
    with place.open(name, have) as body:
        if body.total is not None and body.total != (body.total if size is None else size):
            raise Transient(f"the server says that the file has {body.total} bytes; indexed were {size}")
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
                raise Transient("the server sends more bytes than the file has", start_again=True)
            file.write(chunk)
    if wanted is not None and have < wanted:
        raise Transient(f"the file ended after {have} of {wanted} bytes")
