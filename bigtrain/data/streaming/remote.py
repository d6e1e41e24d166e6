"""Reading shards over http, https, s3 and gs.

HTTP goes through the standard library; no redirect leaves http and https, or falls from https to http. Object stores
are `bigtrain.storage.objects`'.
"""

from __future__ import annotations

import contextlib
import email.message
import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import IO
from urllib.parse import quote

from bigtrain.config import UserError
from bigtrain.config.urls import STORES
from bigtrain.data.config import check_url
from bigtrain.storage.objects import Body, ObjectPlace, Patience, Place, RemoteError, Transient, open_objects, patiently

CHUNK_BYTES = 1 << 16
"""So little that allocators use the same memory again for the next; of larger ones they keep some for each thread."""

MAX_TARS = 10_000_000

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def open_place(url: str, patience: Patience) -> Place:
    """The directory that a URL names.

    Raises:
        UserError: A scheme that is not allowed, or one whose library is not installed.
    """
    try:
        url = check_url(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    if url.partition(":")[0] in STORES:
        return open_objects(url, patience)
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
        names = [name for name in place.names() if name.endswith(".tar")]
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

    def look() -> None:
        with place.open(name, 0) as body:
            if body.total not in (None, size):
                raise RemoteError(
                    f"the file has {body.total} bytes; indexed were {size}",
                    f"{place.url}/{name}",
                    "upload the shard and its index again",
                )

    patiently(look, patience, f"{place.url}/{name}")
