"""Context managers that install signal handlers for the duration of a `with` block."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""The signals that request a stop: Ctrl-C sends SIGINT, and schedulers send SIGTERM."""


@contextlib.contextmanager
def on_signals(action: Callable[[], object], *numbers: signal.Signals) -> Iterator[None]:
    """Call `action` at each of these signals; the former handlers are restored at the end.

    Python lets only the main thread set handlers: in another thread this context manager does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        action()

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def on_hangup(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` when the terminal is closed (SIGHUP); under nohup, which ignores SIGHUP, it is not called."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    with on_signals(action, signal.SIGHUP):
        yield
