"""Exit codes of the commands, for scripts and schedulers."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit code of a command."""

    FINISHED = 0
    FAILED = 1
    USER = 2
    """The user made a mistake, so a retry would fail again."""
    STOPPED = 75
    """The run was stopped on request and can be resumed."""
