"""The scheme http://HOST/PATH, through the standard library: it reads files, but lists no directories.

Redirects to schemes other than http and https, and from https to http, are refused.
"""

from __future__ import annotations

import contextlib
import email.message
import http.client
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO
from urllib.parse import quote

from bigtrain.storage.objects import Body, Patience, Place, RemoteError, Transient
from bigtrain.storage.scheme import SCHEMES, Scheme

CHUNK_BYTES = 1 << 16
"""Bytes of one read. Allocators reuse the memory of small chunks; for larger ones they keep memory for each thread."""

_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@SCHEMES.register
class Http(Scheme):
    """A web server, which can hold shards but no checkpoints."""

    name = "http"

    def open(self, url: str, patience: Patience) -> Place:
        """Open the directory of a checked URL; see `Scheme.open`."""
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
        """Open a file, from byte `start` on; see `Place.open`."""
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
            raise RemoteError(
                "the server encodes the file, although the request forbids it",
                url,
                "Serve the file without an encoding.",
            )
        length = answer.headers.get("Content-Length", "")
        begin, total = 0, int(length) if length.isdigit() else None
        if answer.status == http.client.PARTIAL_CONTENT:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != start:
                raise Transient("the server answered with another range than the requested one", start_again=True)
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
            raise RemoteError("the server redirects from https to a URL that is not encrypted", req.full_url)
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
    return RemoteError(said, url, "Correct the URL, or put the file there.")
