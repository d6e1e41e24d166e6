"""Handlers of signals that stand for as long as something lasts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what schedulers send."""


@contextlib.contextmanager
def on_signals(action: Callable[[], object], *numbers: signal.Signals) -> Iterator[None]:
    """Call `action` at each of these signals; the former handlers return at the end.

    Python lets only the main thread set handlers: in another one this does nothing.
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
    """Call `action` when the terminal is closed; under nohup, which has the signal ignored, nothing is done."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    with on_signals(action, signal.SIGHUP):
        yield
