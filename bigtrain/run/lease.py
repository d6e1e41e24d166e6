"""The lease of a run directory: one process at a time may write to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from bigtrain import storage
from bigtrain.config.errors import UserError
from bigtrain.run.events import boot_id
from bigtrain.storage.locks import locked

LEASE_RENEWAL_S: Final = 10.0
LEASE_LIFE_S: Final = 60.0
"""A holder on another machine that has not renewed its lease for this long is dead."""


@dataclass(frozen=True)
class LeaseHolder:
    """The process that may write to a run directory."""

    number: int
    host: str
    boot: str
    pid: int
    started: int
    renewed: float
    directory: int = 0
    """Inode of the directory, which a rename keeps and a copy does not; 0 where an earlier version took the lease."""

    @classmethod
    def parse(cls, value: dict[str, Any]) -> LeaseHolder:
        """The content of lease.json; a ValueError or TypeError where it is damaged."""
        holder = cls(**value)
        numbers = (holder.number, holder.pid, holder.started, holder.renewed)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("a field of the lease is not a number")
        return holder

    def is_here(self) -> bool:
        """Whether its process, where it lives, is one of this machine and of this boot."""
        return (self.host, self.boot) == (socket.gethostname(), boot_id())

    def alive(self) -> bool:
        """Whether the holder still runs: by its process here, by its last renewal on another machine."""
        if self.pid == 0:
            return False
        if self.is_here():
            return _process_start(self.pid) == self.started
        # A renewal in the future says that a clock was wrong, not that someone lives.
        return abs(time.time() - self.renewed) < LEASE_LIFE_S


class Leased(Protocol):
    """A directory that one process at a time may write to: a run's, or a sweep's."""

    path: Path
    lease: Path

    @property
    def name(self) -> str:
        """Its name for people."""
        ...


class Lease:
    """The right to write to a run directory; its number grows at every take-over, which shuts out the last holder."""

    def __init__(self, directory: Leased, number: int, predecessor: LeaseHolder | None = None) -> None:
        self.directory = directory
        self.number = number
        self.predecessor = predecessor
        """The holder that died without giving the lease back, where there was one."""
        self._released = threading.Event()

    @staticmethod
    def holder(directory: Leased) -> LeaseHolder | None:
        """Who holds, or last held, the lease."""
        try:
            found = LeaseHolder.parse(json.loads(directory.lease.read_text()))
            if found.directory in (0, directory.path.stat().st_ino):
                return found
            # Copied with its directory: the process holds the original.
            return replace(found, pid=0)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @classmethod
    def acquire(cls, directory: Leased, published: int = 0, noun: str = "run") -> Lease:
        """Take the lease of a run directory.

        Args:
            published: The highest number under which a checkpoint was published, should lease.json be lost.
            noun: What the directory is, for the message.

        Raises:
            UserError: A live process holds it.
        """
        directory.path.mkdir(parents=True, exist_ok=True)
        with locked(directory.path):
            last = cls.holder(directory)
            if last is not None and last.alive():
                raise in_use(directory, last, noun)
            dead = last if last is not None and last.pid else None
            lease = cls(directory, max(last.number if last else 0, published) + 1, dead)
            lease._write(os.getpid())
        return lease

    def held(self) -> bool:
        """Whether no one has taken the lease over."""
        holder = self.holder(self.directory)
        return holder is not None and holder.number == self.number

    def release(self) -> None:
        """Give the lease back, keeping its number."""
        self._released.set()
        # Where it cannot be written, the end of this process gives the lease back.
        with contextlib.suppress(OSError), locked(self.directory.path):
            if self.held():
                self._write(0)

    def keep(self) -> None:
        """Renew the lease in the background until it is released or lost."""

        def renew() -> None:
            while not self._released.wait(LEASE_RENEWAL_S):
                with contextlib.suppress(OSError), locked(self.directory.path):
                    if self._released.is_set() or not self.held():
                        return
                    self._write(os.getpid())

        threading.Thread(target=renew, name="lease", daemon=True).start()

    def _write(self, pid: int) -> None:
        started = _process_start(pid) or 0 if pid else 0
        holder = LeaseHolder(
            self.number, socket.gethostname(), boot_id(), pid, started, time.time(), self.directory.path.stat().st_ino
        )
        storage.write_json(self.directory.lease, holder.__dict__)


def in_use(directory: Leased, holder: LeaseHolder, noun: str = "run") -> UserError:
    """The refusal of a directory that someone else holds."""
    command = "bigtrain stop" if noun == "run" else f"bigtrain {noun} stop"
    return UserError(
        f"The {noun} '{directory.name}' is in use by process {holder.pid} on {holder.host}",
        str(directory.path),
        f"Wait for it, stop it with `{command} {directory.name}`, or choose another --name.",
    )


def lease_check(directory: Leased, number: int) -> Callable[[], bool]:
    """A check for a rank: True as long as the attempt it belongs to holds the run."""
    return Lease(directory, number).held


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which tells it from a later one of the same id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
