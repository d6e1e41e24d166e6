"""Measures on rank 0 what an attempt spends its time on; each `saved` event carries the result as `times`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from bigtrain.training.callback import Callback, Step
from bigtrain.training.progress import Progress

Part = Literal["steps_s", "data_s", "saves_s", "evaluation_s"]


class Ledger(Callback):
    """Seconds that this process spends on steps, data, saves and evaluation, measured with a monotonic clock.

    After a fault, the time since the last save is lost. So each save carries a copy of the ledger, and
    `bigtrain.tracking.history` adds up the copies of the saves from which the run was resumed.
    """

    order = 1

    def __init__(self) -> None:
        self._parts: dict[Part, float] = {"steps_s": 0.0, "data_s": 0.0, "saves_s": 0.0, "evaluation_s": 0.0}
        self._open: tuple[Part, float] | None = None
        self._at_save: dict[int, dict[str, float]] = {}

    def on_step(self, step: Step, progress: Progress) -> None:
        """Add the time of a step, and separately the time that it waited for data."""
        self._parts["steps_s"] += max(0.0, step.seconds - step.data_wait_s)
        self._parts["data_s"] += min(step.data_wait_s, step.seconds)

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Add the time spent inside the context to a part."""
        began = time.monotonic()
        self._open = part, began
        try:
            yield
        finally:
            self._open = None
            self._parts[part] += time.monotonic() - began

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Add the time for which a save blocks the training, and keep a copy of the ledger at its end."""
        with self.measure("saves_s"):
            yield
        self._at_save[step] = self._now()

    def of_save(self, step: int) -> dict[str, float]:
        """The ledger when the save of `step` let the training continue; the current one if it still blocks."""
        return self._at_save.pop(step, None) or self._now()

    def _now(self) -> dict[str, float]:
        parts = dict(self._parts)
        if (under_way := self._open) is not None:
            parts[under_way[0]] += time.monotonic() - under_way[1]
        return {part: round(seconds, 6) for part, seconds in parts.items()}


def process_age_s() -> float | None:
    """Seconds since this process was started, including its imports; None if the system does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
