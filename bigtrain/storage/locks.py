"""Locks between processes of one machine by flock, which the kernel releases when their holder ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file or directory until its descriptor is closed.

    Args:
        descriptor: Descriptor of the open file or directory.
        shared: Whether other processes may hold a shared lock at the same time.
        wait: Whether to wait until another holder releases the lock; otherwise the result is False at once.

    Returns:
        Whether the lock was taken.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the exclusive lock of a file or directory. A directory is locked itself, so it needs no lock file.

    Args:
        path: The file or directory to lock.
        make: Whether to create the file if it does not exist.
    """
    flags = os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    descriptor = os.open(path, flags, 0o644)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)
