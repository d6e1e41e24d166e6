"""The lease of a run directory, which gives one process at a time the right to write to it."""

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
"""Seconds without a renewal after which a holder on another machine counts as dead."""


@dataclass(frozen=True)
class LeaseHolder:
    """The process that holds, or last held, a lease; the contents of lease.json."""

    number: int
    """Number of the lease; each acquisition increases it."""
    host: str
    boot: str
    """See `bigtrain.run.events.boot_id`."""
    pid: int
    """Process id; 0 once the lease has been released."""
    started: int
    """Start time of the process, in clock ticks since boot."""
    renewed: float
    """Unix time of the last renewal, in seconds."""
    directory: int = 0
    """Inode of the directory, which a rename keeps and a copy does not; 0 if an earlier version wrote lease.json."""

    @classmethod
    def parse(cls, value: dict[str, Any]) -> LeaseHolder:
        """Create a holder from the contents of lease.json.

        Raises:
            TypeError: A field is missing, unknown or not a number.
        """
        holder = cls(**value)
        numbers = (holder.number, holder.pid, holder.started, holder.renewed)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("a field of the lease is not a number")
        return holder

    def is_here(self) -> bool:
        """Whether the holder's process was started on this machine and since its last boot."""
        return (self.host, self.boot) == (socket.gethostname(), boot_id())

    def alive(self) -> bool:
        """Whether the holder still runs: on this machine by its process, on another one by its last renewal."""
        if self.pid == 0:
            return False
        if self.is_here():
            return _process_start(self.pid) == self.started
        # A renewal in the future means that a clock was wrong, not that the holder is alive.
        return abs(time.time() - self.renewed) < LEASE_LIFE_S


class Leased(Protocol):
    """A directory with a lease: that of a run or of a sweep."""

    path: Path
    lease: Path

    @property
    def name(self) -> str:
        """Name of the run or sweep, for messages."""
        ...


class Lease:
    """The right to write to a run directory. Each acquisition increases its number and fences off earlier holders."""

    def __init__(self, directory: Leased, number: int, predecessor: LeaseHolder | None = None) -> None:
        self.directory = directory
        self.number = number
        self.predecessor = predecessor
        """The former holder, if it died without releasing the lease."""
        self._released = threading.Event()

    @staticmethod
    def holder(directory: Leased) -> LeaseHolder | None:
        """The process that holds, or last held, the lease; None if lease.json is missing or damaged."""
        try:
            found = LeaseHolder.parse(json.loads(directory.lease.read_text()))
            if found.directory in (0, directory.path.stat().st_ino):
                return found
            # The directory is a copy: the process holds the lease of the original.
            return replace(found, pid=0)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @classmethod
    def acquire(cls, directory: Leased, published: int = 0, noun: str = "run") -> Lease:
        """Acquire the lease of a directory, which is created if it does not exist.

        Args:
            directory: The directory of a run or sweep.
            published: Highest lease number under which a checkpoint was published, in case lease.json is lost.
            noun: Kind of the directory ("run", "sweep"), for the message.

        Raises:
            UserError: A process that is alive holds the lease.
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
        """Whether lease.json still has this lease's number, so that no other process has acquired the lease."""
        holder = self.holder(self.directory)
        return holder is not None and holder.number == self.number

    def release(self) -> None:
        """Release the lease; lease.json keeps its number."""
        self._released.set()
        # If lease.json cannot be written, the end of this process releases the lease.
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
    """The error that another process holds the lease of a directory."""
    command = "bigtrain stop" if noun == "run" else f"bigtrain {noun} stop"
    return UserError(
        f"The {noun} '{directory.name}' is in use by process {holder.pid} on {holder.host}",
        str(directory.path),
        f"Wait for it, stop it with `{command} {directory.name}`, or choose another --name.",
    )


def lease_check(directory: Leased, number: int) -> Callable[[], bool]:
    """A function by which a rank checks that its attempt, with this lease number, still holds the lease."""
    return Lease(directory, number).held


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which differs for a later process with the same id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
