"""The client of a Ray cluster's dashboard: the HTTP requests that bigtrain needs, without importing Ray.

Ray Jobs' own client imports Ray, which takes longer than the rest of a command. bigtrain needs only a few requests:

    GET  /api/version, /api/v0/cluster_metadata                the cluster's versions of Ray and Python
    GET  /api/v0/nodes, /api/cluster_status                    the nodes, and whether an autoscaler adds more
    GET, PUT /api/packages/gcs/NAME                            look for a package, upload a package
    POST /api/jobs/   GET /api/jobs/[ID]   POST .../stop       submissions
    GET  /api/v0/logs/file|stream?node_id=..&filename=..       a file under a node's log directory, whole or followed

The token is sent in a header of each request. It is not encrypted, so use TLS outside a private network.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from bigtrain.config import UserError

TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 10.0
RECONNECT_S: Final = 1.0
GONE_S: Final = 60.0
"""How long a dashboard that has answered before may be unreachable before a command gives up."""
STREAM_POLL_S: Final = 0.2
STATE_POLL_S: Final = 1.0

ACTIVE: Final = ("PENDING", "RUNNING")
"""States of a Ray job that has not ended."""


class DashboardGone(Exception):
    """The dashboard does not answer now, but may answer later."""


class NotThere(Exception):
    """The dashboard answers that the requested object does not exist."""


def read_token(path: Path | None) -> str | None:
    """Read the cluster's token from `path`, or if that is None, from the places where Ray looks for it.

    These are RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, and ~/.ray/auth_token. None if there is no token.

    Raises:
        UserError: The file does not exist or is empty, or other users may read it.
    """
    if path is None:
        if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
            return token
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
        if named is None and not path.exists():
            return None
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except OSError as error:
        raise UserError(f"The token cannot be read: {error.strerror}", str(path), "Give --token-file FILE.") from None
    if mode & 0o077:
        raise UserError(
            f"Others may read the token: its mode is {mode & 0o777:04o}", str(path), f"Run `chmod 600 {path}`."
        )
    if not token:
        raise UserError("The token file is empty", str(path))
    return token


def check_address(address: str, token: str | None) -> str:
    """Complete and check the dashboard's address; returns its full URL.

    Raises:
        UserError: The address is not a URL, or there is no token and the host is not this machine.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
        raise UserError(
            f"'{address}' is not the address of a Ray dashboard", "--address", "Write http://HOST:8265, or https://..."
        )
    if token is None and not is_loopback(host):
        raise UserError(
            f"There is no token for {host}: anyone who can reach a Ray dashboard without a token can run code there",
            "--address",
            "Give --token-file FILE or set RAY_AUTH_TOKEN_PATH; start the cluster with RAY_AUTH_MODE=token.",
        )
    shown = f"[{host}]" if ":" in host else host
    default = 443 if parts.scheme == "https" else 8265
    return f"{parts.scheme}://{shown}:{port or default}{parts.path.rstrip('/')}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_private(host: str) -> bool:
    """Whether a host is on this machine or in an address range that is not routed over the internet."""
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return True  # A host that cannot be resolved cannot be reached.
    return all(ipaddress.ip_address(place).is_private or ipaddress.ip_address(place).is_link_local for place in found)


@dataclass(frozen=True)
class RayJob:
    """The state of a submission in Ray Jobs."""

    id: str
    status: str
    exit_code: int | None
    node: str | None
    """Id of the node on which the driver runs; None if it has not started."""
    metadata: dict[str, str]
    message: str
    started: float
    """Start time in seconds since the epoch."""

    @property
    def active(self) -> bool:
        """Whether the job has not ended."""
        return self.status in ACTIVE

    @classmethod
    def parse(cls, value: dict[str, Any]) -> RayJob:
        """Parse a job of the dashboard's answer."""
        return cls(
            str(value.get("submission_id")),
            str(value.get("status")),
            value.get("driver_exit_code"),
            value.get("driver_node_id"),
            dict(value.get("metadata") or {}),
            str(value.get("message") or ""),
            float(value.get("start_time") or 0) / 1000,
        )


class Dashboard:
    """The dashboard of a Ray cluster.

    Args:
        address: The address, as a user writes it: HOST, HOST:PORT or a URL.
        token_file: File with the token; None: the places where Ray looks for it (see `read_token`).
    """

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        token = read_token(token_file)
        self.url = check_address(address, token)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        parts = urlsplit(self.url)
        self.is_exposed = parts.scheme == "http" and not is_private(parts.hostname or "")
        """Whether the token is sent unencrypted to a host outside private networks."""
        # A proxy must not see the token of a cluster on a private network.
        private = is_private(parts.hostname or "")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if private else []))

    def versions(self) -> tuple[str, str]:
        """Versions of Ray and of Python on the cluster.

        Raises:
            UserError: No Ray dashboard answers at this address, or it refuses the token.
        """
        try:
            ray = self._json("GET", "/api/version", timeout_s=CONNECT_TIMEOUT_S)["ray_version"]
            python = self._json("GET", "/api/v0/cluster_metadata", timeout_s=CONNECT_TIMEOUT_S)["data"]["pythonVersion"]
        except (DashboardGone, NotThere, KeyError, TypeError) as error:
            raise self.unreachable(error) from None
        return str(ray), str(python)

    def unreachable(self, error: Exception) -> UserError:
        """The user error for a dashboard that does not answer."""
        why = str(error) if isinstance(error, DashboardGone) else "the server is not a Ray dashboard"
        return UserError(
            f"No Ray dashboard answers at {self.url}: {why}",
            "--address",
            "Check that the cluster is up, and that its port 8265 is reachable from here (kubectl port-forward, an "
            "ssh tunnel).",
        )

    def require_authentication(self) -> None:
        """Refuse a cluster that accepts requests without a token.

        Raises:
            UserError: The cluster requires no token and is not on this machine.
        """
        mode = self._json("GET", "/api/authentication_mode").get("authentication_mode")
        if mode != "token" and not is_loopback(urlsplit(self.url).hostname or ""):
            raise UserError(
                f"The cluster at {self.url} accepts requests without a token: anyone who can reach it can run code "
                "there",
                "--address",
                "Start it with RAY_AUTH_MODE=token on every node.",
            )

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive: node_id, node_ip, is_head_node, resources_total, labels."""
        answer = self._json("GET", "/api/v0/nodes?detail=1&limit=10000")
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def has_autoscaler(self) -> bool:
        """Whether an autoscaler adds nodes to this cluster."""
        status = (self._json("GET", "/api/cluster_status").get("data") or {}).get("clusterStatus") or {}
        report = status.get("autoscalerReport") or {}
        kinds = (report.get("nodeTypeMapping") or {}).values()
        # Without an autoscaler, Ray's monitor reports each node as its own kind, named node_ID.
        return bool(report) and any(not str(kind).startswith("node_") for kind in kinds)

    def has_package(self, name: str) -> bool:
        """Whether a package has been uploaded; this request also keeps the package for some more minutes."""
        try:
            self._request("GET", f"/api/packages/gcs/{name}")
        except NotThere:
            return False
        return True

    def put_package(self, name: str, data: bytes) -> None:
        """Upload a package."""
        self._request("PUT", f"/api/packages/gcs/{name}", data, "application/octet-stream")

    def submit(self, id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Start a job on the head node.

        Raises:
            UserError: Ray refuses the job.
        """
        body = {"entrypoint": entrypoint, "submission_id": id, "runtime_env": runtime_env, "metadata": metadata}
        self._request("POST", "/api/jobs/", json.dumps(body).encode(), "application/json")

    def jobs(self) -> list[RayJob]:
        """All submissions that the cluster remembers, oldest first."""
        found = [RayJob.parse(value) for value in self._json("GET", "/api/jobs/") if value.get("submission_id")]
        return sorted(found, key=lambda job: job.started)

    def job(self, id: str) -> RayJob:
        """One submission.

        Raises:
            NotThere: There is no submission with this id.
        """
        return RayJob.parse(self._json("GET", f"/api/jobs/{quote(id)}"))

    def stop(self, id: str) -> None:
        """Send SIGTERM to a job's processes."""
        self._request("POST", f"/api/jobs/{quote(id)}/stop", b"")

    def job_log(self, id: str) -> str:
        """The output of a job's driver so far."""
        return str(self._json("GET", f"/api/jobs/{quote(id)}/logs").get("logs", ""))

    def files(self, node: str, pattern: str) -> list[str]:
        """Names of the files under a node's log directory that match a glob pattern."""
        query = urlencode({"node_id": node, "glob": pattern})
        found = self._json("GET", f"/api/v0/logs?{query}")["data"]["result"]
        return sorted(name for names in found.values() for name in names)

    def file(self, node: str, name: str, lines: int = -1) -> bytes:
        """The content of a file under a node's log directory: its last `lines` lines; -1: the whole file.

        Raises:
            NotThere: There is no such file.
        """
        query = urlencode({"node_id": node, "filename": name, "lines": lines})
        try:
            return self._request("GET", f"/api/v0/logs/file?{query}")
        except DashboardGone as error:
            if "not found" in str(error):
                raise NotThere(name) from None
            raise

    def follow(self, node: str, name: str, over: Callable[[], bool]) -> Iterator[bytes]:
        """Yield the bytes of a growing file, each byte once, even if connections are lost.

        Args:
            node: Id of the node.
            name: The file's path, relative to the node's log directory.
            over: Called about once a second; returns whether nothing more will be written. Then the rest of the file is
                read, and the iteration ends.

        Raises:
            NotThere: There is no such file.
            DashboardGone: The dashboard was unreachable for longer than GONE_S.
        """
        seen, away_since = 0, None
        while True:
            try:
                if over():
                    rest = self.file(node, name)
                    if len(rest) > seen:
                        yield rest[seen:]
                    return
                # For an empty file the dashboard sends nothing, not even the headers of the answer.
                if not seen and not self.file(node, name, lines=1):
                    away_since = None
                    time.sleep(STATE_POLL_S)
                    continue
                for chunk in self._stream(node, name, seen, over):
                    away_since = None
                    if chunk:
                        seen += len(chunk)
                        yield chunk
            except DashboardGone:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > GONE_S:
                    raise
                time.sleep(RECONNECT_S)

    def _stream(self, node: str, name: str, skip: int, over: Callable[[], bool]) -> Iterator[bytes]:
        """Follow a file over one connection; yields b"" once it is open. Ends when it breaks or `over` returns True.

        Args:
            skip: Number of bytes at the start of the file that are not yielded.
        """
        query = urlencode({"node_id": node, "filename": name, "lines": -1, "interval": STREAM_POLL_S})
        response = self._open("GET", f"/api/v0/logs/stream?{query}", None, None, TIMEOUT_S)
        connection = _connection(response)
        if connection is not None:
            connection.settimeout(None)  # A log may be silent for hours.
        chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # A read that times out would lose bytes that have arrived, so a thread reads without a timeout.
        reader = threading.Thread(target=_drain, args=(response, chunks), name="log-stream", daemon=True)
        reader.start()
        asked = time.monotonic()
        try:
            yield b""
            while True:
                try:
                    chunk = chunks.get(timeout=STATE_POLL_S)
                except queue.Empty:
                    chunk = b""
                if chunk is None:
                    raise DashboardGone("the connection was closed")
                dropped, skip = min(skip, len(chunk)), max(0, skip - len(chunk))
                if chunk[dropped:]:
                    yield chunk[dropped:]
                if time.monotonic() - asked >= STATE_POLL_S:
                    asked = time.monotonic()
                    if over():
                        return
        finally:
            if connection is not None:
                with contextlib.suppress(OSError):  # The connection may have ended already.
                    connection.shutdown(socket.SHUT_RDWR)
            reader.join()
            response.close()

    def _json(self, method: str, path: str, timeout_s: float = TIMEOUT_S) -> Any:
        data = self._request(method, path, timeout_s=timeout_s)
        try:
            return json.loads(data)
        except ValueError:
            raise NotThere(f"{path}: the answer is not JSON") from None

    def _request(
        self, method: str, path: str, data: bytes | None = None, kind: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> bytes:
        with self._open(method, path, data, kind, timeout_s) as response:
            try:
                return response.read()
            except (OSError, http.client.HTTPException) as error:
                raise DashboardGone(f"the connection broke: {error}") from None

    def _open(
        self, method: str, path: str, data: bytes | None, kind: str | None, timeout_s: float | None
    ) -> http.client.HTTPResponse:
        headers = self._headers | ({"Content-Type": kind} if kind else {})
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            return self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace").strip()
            if error.code in (401, 403):
                raise self._refused(error.code) from None
            if error.code == 404:
                raise NotThere(text or path) from None
            if error.code == 400 or (error.code == 500 and "already exists" in text):
                raise UserError("Ray refuses the job: " + (text.splitlines() or ["no reason given"])[-1]) from None
            raise DashboardGone(f"{error.code} {(text.splitlines() or [''])[-1]}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise DashboardGone(str(getattr(reason, "strerror", None) or reason)) from None

    def _refused(self, code: int) -> UserError:
        if not self._headers:
            return UserError(
                f"The cluster at {self.url} requires a token",
                fix="Give --token-file FILE, or set RAY_AUTH_TOKEN_PATH.",
            )
        return UserError(
            f"The cluster at {self.url} does not accept this token ({code})",
            fix="Give the file of this cluster's token: --token-file FILE, or RAY_AUTH_TOKEN_PATH.",
        )


def _drain(response: http.client.HTTPResponse, chunks: queue.SimpleQueue[bytes | None]) -> None:
    try:
        while chunk := response.read1(1 << 16):
            chunks.put(chunk)
    except (OSError, ValueError, http.client.HTTPException):
        pass  # Any error just ends the stream.
    chunks.put(None)


def _connection(response: http.client.HTTPResponse) -> socket.socket | None:
    """The socket of a response, if it can be found; shutting it down ends a blocked read in another thread."""
    connection = getattr(getattr(getattr(response, "fp", None), "raw", None), "_sock", None)
    return connection if isinstance(connection, socket.socket) else None
