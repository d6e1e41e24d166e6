"""Reading files over http, https, s3 and gs: streams of bytes that may begin anywhere, tried again where they break.

HTTP goes through the standard library; no redirect leaves http and https, or falls from https to http. S3 and GCS go
through fsspec, whose s3fs and gcsfs are extras of this package and take credentials from the environment.
"""

from __future__ import annotations

import contextlib
import email.message
import http.client
import importlib.util
import os
import random
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Protocol
from urllib.parse import quote

from bigtrain.config import UserError
from bigtrain.data.config import check_url

CHUNK_BYTES = 1 << 20
OBJECT_CHUNK_BYTES = 1 << 23
FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 30.0

MAX_TARS = 10_000_000

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}


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
    """How long a server is borne with."""

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
    """Byte of the file at which the chunks begin: that asked for, or 0 where the server knows no ranges."""
    total: int | None
    """Bytes of the whole file; None where the server does not say."""
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


def open_place(url: str, patience: Patience) -> Place:
    """The directory that a URL names.

    Raises:
        UserError: A scheme that is not allowed, or one whose library is not installed.
    """
    try:
        url = check_url(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    scheme = url.partition(":")[0]
    if scheme in _EXTRAS:
        module, extra = _EXTRAS[scheme]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"reading {scheme}:// needs {module}", url, f"pip install 'bigtrain[{extra}]'")
        return ObjectPlace(url, patience.timeout_s)
    return HttpPlace(url, patience.timeout_s)


class HttpPlace:
    """A directory on a web server."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self._timeout_s = url, timeout_s
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
            _NoDowngrade(),
        ):
            self._opener.add_handler(handler)

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        """See `Place`."""
        url = f"{self.url}/{quote(name)}"
        headers = {"User-Agent": "bigtrain", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with self._opener.open(urllib.request.Request(url, headers=headers), timeout=self._timeout_s) as answer:
                yield self._body(answer, start, url)
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(error, url) from None
        except (http.client.HTTPException, OSError) as error:
            raise self._network_error(error, url) from None

    def _body(self, answer: http.client.HTTPResponse, start: int, url: str) -> Body:
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise RemoteError("the server encodes the file although asked not to", url, "serve it as it is")
        length = answer.headers.get("Content-Length", "")
        begin, total = 0, int(length) if length.isdigit() else None
        if answer.status == http.client.PARTIAL_CONTENT:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise Transient("the server answered with another range than the one asked for", start_again=True)
            begin, total = start, None if match[2] == "*" else int(match[2])
        return Body(begin, total, iter(lambda: answer.read1(CHUNK_BYTES), b""))

    def _network_error(self, error: Exception, url: str) -> Exception:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return RemoteError(f"the server's certificate is not trusted: {reason.verify_message}", url)
        if isinstance(reason, TimeoutError):
            return Transient(f"the server was silent for {self._timeout_s:g} s")
        return Transient(str(reason) or type(reason).__name__)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: email.message.Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and not newurl.startswith("https:"):
            raise RemoteError("the server redirects from https to a place that is not encrypted", req.full_url)
        if not newurl.startswith(("http:", "https:")):
            raise RemoteError("the server redirects away from http and https", req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _status_error(error: urllib.error.HTTPError, url: str) -> Exception:
    said = f"the server answered {error.code} {error.reason}"
    if error.code == 416:
        return Transient(said, start_again=True)
    if error.code in _TRANSIENT_STATUS:
        after = error.headers.get("Retry-After", "")
        return Transient(said, wait_s=float(after) if after.isdigit() else 0.0)
    return RemoteError(said, url, "mend the URL, or put the file there")


class ObjectPlace:
    """A prefix of a bucket, through fsspec."""

    def __init__(self, url: str, timeout_s: float) -> None:
        import fsspec

        options: dict[str, Any] = {}
        if url.startswith("s3:"):
            # Trying again is done here, once for all kinds of places.
            limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 1}}
            options["config_kwargs"] = limits
        self.url = url
        self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)

    @contextlib.contextmanager
    def open(self, name: str, start: int) -> Iterator[Body]:
        """See `Place`."""
        path = f"{self._root}/{name}"
        with self._errors(name):
            total = int(self._files.size(path))
        yield Body(start, total, self._chunks(path, name, start, total))

    def list(self) -> list[str]:
        """The names of the tars in it, sorted."""
        with self._errors(""):
            return sorted(
                name for path in self._files.ls(self._root, detail=False)
                if (name := path.rpartition("/")[2]).endswith(".tar")
            )  # fmt: skip

    def _chunks(self, path: str, name: str, start: int, total: int) -> Iterator[bytes]:
        for begin in range(start, total, OBJECT_CHUNK_BYTES):
            with self._errors(name):
                data = self._files.cat_file(path, start=begin, end=min(total, begin + OBJECT_CHUNK_BYTES))
            yield data

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        url = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError:
            raise RemoteError("no such object", url, "mend the URL, or put the file there") from None
        except PermissionError as error:
            raise RemoteError(f"access is refused: {error}", url, "see the credentials in the environment") from None
        except Exception as error:  # noqa: BLE001 - each store's library raises kinds of its own
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise RemoteError(f"there are no credentials: {error}", url) from None
            raise Transient(f"{type(error).__name__}: {error}") from None


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
            # Only bytes never reached before count as progress: a server without ranges begins anew each time.
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
    """A fetch that nobody waits for any more."""


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


def tars_at(urls: Sequence[str], patience: Patience) -> tuple[Place, list[str]]:
    """The directory and the names of the tars that some URLs name.

    Raises:
        UserError: Not a tar, several directories, a name twice, a pattern of too many.
        RemoteError: A directory of an object store cannot be listed.
    """
    found = [url for pattern in urls for url in _expanded(pattern)]
    if len(found) == 1 and not found[0].endswith(".tar"):
        place = open_place(found[0], patience)
        if not isinstance(place, ObjectPlace):
            raise UserError(
                "a web server lists no directory", found[0], "name its tars: .../shard-{000000..000099}.tar"
            )
        names = place.list()
        if not names:
            raise UserError("there is no .tar file", found[0])
        return place, names
    parents = {url.rpartition("/")[0] for url in found}
    names = [url.rpartition("/")[2] for url in found]
    wrong = next((name for name in names if not name.endswith(".tar") or name[0] == "." or "%" in name), None)
    if wrong is not None:
        raise UserError(f"{wrong!r} is not the name of a .tar file", found[0])
    if len(parents) != 1 or len(set(names)) != len(names):
        raise UserError("the tars do not lie in one directory, each once", found[0], "index each directory by itself")
    return open_place(parents.pop(), patience), names


def _expanded(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MAX_TARS or len(match[1]) > len(match[2]):
        raise UserError(f"the range {match[0]} is not one of 1 to {MAX_TARS} numbers", pattern)
    for number in range(first, last + 1):
        text = str(number).zfill(len(match[1]))
        yield from _expanded(pattern[: match.start()] + text + pattern[match.end() :])


def exists(place: Place, name: str, size: int, patience: Patience) -> None:
    """Look whether a file is there with the right size, without reading it.

    Raises:
        RemoteError: It is not.
    """
    failures = 0
    while True:
        try:
            with place.open(name, 0) as body:
                if body.total not in (None, size):
                    raise RemoteError(
                        f"the file has {body.total} bytes; indexed were {size}",
                        f"{place.url}/{name}",
                        "upload the shard and its index again",
                    )
                return
        except Transient as problem:
            failures += 1
            if failures > patience.retries:
                raise RemoteError(f"the file could not be read: {problem}", f"{place.url}/{name}") from None
            threading.Event().wait(patience.backoff_s(failures, problem.wait_s))
