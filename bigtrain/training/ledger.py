"""Where an attempt's time goes, measured on the rank that logs: the `times` of each `saved` event."""

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
    """Seconds since the first step of this process by what they went into, all of a monotonic clock.

    What a fault throws away is what is not in the ledger of the last save: so each save carries a copy, and
    `bigtrain.tracking.history` adds up the copies from which the run went on.
    """

    order = 1

    def __init__(self) -> None:
        self._parts: dict[Part, float] = {"steps_s": 0.0, "data_s": 0.0, "saves_s": 0.0, "evaluation_s": 0.0}
        self._open: tuple[Part, float] | None = None
        self._at_save: dict[int, dict[str, float]] = {}

    def on_step(self, step: Step, progress: Progress) -> None:
        """Count a step, and apart from it the wait for its data."""
        self._parts["steps_s"] += max(0.0, step.seconds - step.data_wait_s)
        self._parts["data_s"] += min(step.data_wait_s, step.seconds)

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Count the time inside to a part."""
        began = time.monotonic()
        self._open = part, began
        try:
            yield
        finally:
            self._open = None
            self._parts[part] += time.monotonic() - began

    @contextlib.contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Count the time that a save keeps the training, and remember how things stood when it let go."""
        with self.measure("saves_s"):
            yield
        self._at_save[step] = self._now()

    def of_save(self, step: int) -> dict[str, float]:
        """The ledger when the save of `step` let the training go on; the present one where it has not yet."""
        return self._at_save.pop(step, None) or self._now()

    def _now(self) -> dict[str, float]:
        parts = dict(self._parts)
        if (under_way := self._open) is not None:
            parts[under_way[0]] += time.monotonic() - under_way[1]
        return {part: round(seconds, 6) for part, seconds in parts.items()}


def process_age_s() -> float | None:
    """Seconds since this process was started, its imports included; None where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
