"""Exit codes: how a command ends, for the scripts and schedulers that act on it."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """How a command ends."""

    FINISHED = 0
    FAILED = 1
    USER = 2
    """A mistake of the user, which no retry repairs."""
    STOPPED = 75
    """Stopped on request, and resumable."""
