"""Output streams for commands that must continue when nobody reads their output any more."""

from __future__ import annotations

import contextlib
import os
from typing import Any, TextIO, cast


def enduring(stream: TextIO) -> TextIO:
    """A stream that discards its output once the reader has exited or the terminal is closed.

    So a run of days survives `| head` and the closing of the window in which it was started. Its metrics and events are
    in the run directory anyway.
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
        # Redirect the descriptor itself, so that buffered text and other writers to it do not fail later either.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
