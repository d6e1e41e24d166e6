"""The facts about a node that `bigtrain doctor` checks: versions, clock, disk, keys and network.

This module runs on the nodes and imports neither torch nor Ray. Answers contain no secrets: they say only whether a
key exists.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from bigtrain.config import UserError
from bigtrain.jobs.cluster.package import versions
from bigtrain.jobs.devices import visible_gpus
from bigtrain.keys import read_secrets
from bigtrain.tracking.trackers.wandb import has_key

DISK_BYTES: Final = 32 << 20
NETWORK_BYTES: Final = 64 << 20
NETWORK_S: Final = 10.0
CONNECT_S: Final = 5.0
COMMUNICATION: Final = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TP_SOCKET_")
"""Prefixes of variables that configure collectives; these variables should be equal on all nodes."""

_CHUNK: Final = bytes(1 << 20)


def keys(secrets_file: str | None) -> dict[str, bool]:
    """Whether a rank on this node would find each of the keys that runs use, by the key's name.

    Raises:
        UserError: The secrets file does not exist, or other users may read it.
    """
    found = read_secrets(Path(secrets_file)) if secrets_file else {}
    environment = found | dict(os.environ)
    return {"WANDB_API_KEY": has_key(environment), "HF_TOKEN": bool(environment.get("HF_TOKEN"))}


def describe(runs_dir: str, mark: str, secrets_file: str | None) -> dict[str, Any]:
    """All facts about this node.

    Args:
        runs_dir: The directory of runs.
        mark: Name of a file that the caller has created in `runs_dir`. If this node sees it, the directory is shared.
        secrets_file: Path of the secrets file on this node.
    """
    answer: dict[str, Any] = {
        "host": socket.gethostname(),
        "time": time.time(),
        "versions": versions(),
        "gpus": visible_gpus(),
        "communication": {name: value for name, value in os.environ.items() if name.startswith(COMMUNICATION)},
        "shared_memory_bytes": _free("/dev/shm"),
        "sees_mark": (Path(runs_dir) / mark).exists(),
        "wandb_reachable": _reaches(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")),
    }
    try:
        answer["keys"] = keys(secrets_file)
    except UserError as error:
        answer["keys_error"] = str(error)
    answer["disk"] = _disk(Path(runs_dir))
    return answer


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _disk(directory: Path) -> dict[str, Any]:
    """Free bytes of a disk, and the rate of a synced write in bytes per second; None if there is little space left."""
    probe = directory / f".bigtrain-doctor-{secrets.token_hex(4)}"
    try:
        free = shutil.disk_usage(directory).free
        if free < 4 * DISK_BYTES:
            return {"free_bytes": free, "write_bytes_per_s": None}
        began = time.perf_counter()
        with open(probe, "wb") as file:
            for _ in range(DISK_BYTES // len(_CHUNK)):
                file.write(_CHUNK)
            file.flush()
            os.fsync(file.fileno())
        return {"free_bytes": free, "write_bytes_per_s": DISK_BYTES / (time.perf_counter() - began)}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _reaches(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


class NetworkProbe:
    """One end of a bandwidth measurement: sends bytes to a peer, or receives them from a peer that knows its token."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._token = secrets.token_bytes(16)

    def listen(self) -> tuple[str, int, bytes]:
        """Accept one connection within NETWORK_S; returns the address, the port and the token to send first."""
        server = socket.create_server((self._address, 0))
        server.settimeout(NETWORK_S)
        threading.Thread(target=self._take, args=(server,), daemon=True).start()
        return self._address, server.getsockname()[1], self._token

    def send(self, address: str, port: int, token: bytes) -> float | str:
        """Measure the bandwidth to another node.

        Returns:
            Bytes per second, or a text that says why the measurement failed.
        """
        try:
            with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
                connection.settimeout(NETWORK_S)
                connection.sendall(token)
                began = time.perf_counter()
                for _ in range(NETWORK_BYTES // len(_CHUNK)):
                    connection.sendall(_CHUNK)
                connection.shutdown(socket.SHUT_WR)
                # The receiver confirms after the last bytes have arrived.
                if connection.recv(1) != b"k":
                    return "the other node ended the measurement"
                return NETWORK_BYTES / (time.perf_counter() - began)
        except OSError as error:
            return error.strerror or str(error)

    def _take(self, server: socket.socket) -> None:
        with server, contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.settimeout(NETWORK_S)
                first = connection.recv(len(self._token), socket.MSG_WAITALL)
                if not secrets.compare_digest(first, self._token):
                    return
                while connection.recv(len(_CHUNK)):
                    pass
                connection.sendall(b"k")
