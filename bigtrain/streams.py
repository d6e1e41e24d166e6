"""Output of commands that must not end because nobody reads it any more."""

from __future__ import annotations

import contextlib
import os
from typing import Any, TextIO, cast


def enduring(stream: TextIO) -> TextIO:
    """A stream that drops what is written once its reader has left or its terminal is closed.

    A run of days outlives `| head` and the window that it was started in; its record is in its directory.
    """
    return stream if isinstance(stream, _Enduring) else cast(TextIO, _Enduring(stream))


class _Enduring:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        # The descriptor itself, so that what is buffered, and other writers to it, do not fail later.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
