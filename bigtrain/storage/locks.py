"""Locks between processes of one machine: flock's, which end with their holder, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file or directory until its descriptor is closed.

    Args:
        shared: Others may hold it too, if their lock is shared as well.
        wait: Wait for another holder to end; otherwise return False at once.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the lock of a file, or of a directory itself, so that no lock file is left in it.

    Args:
        make: Create the file if there is none.
    """
    flags = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    descriptor = os.open(path, flags, 0o644)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)
