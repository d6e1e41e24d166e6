"""The parts of a run's wall time: goodput, and the time lost to anything else.

The parts always sum up to the wall time, also if metrics or events are missing:

    wall time         from the launch to the end, without the time between a stop (or the end) and the next launch
      start-up        from a launch to the first step: imports, building the model, loading
      steps           training steps that were kept; their share of the wall time is the goodput
      data            waiting for the data of these steps
      saves           training waits for a checkpoint
      evaluation
      done again      steps between the last checkpoint before a fault and the fault, which are repeated
      hangs           from the last heartbeat of a rank that hung to the end of all ranks
      restarts        from a fault to the first step after it: waiting for machines, start-up, loading
      other           the rest of attempts that ended without a fault: logging, closing

Rank 0 measures the times of steps, data, saves and evaluation up to each checkpoint (`times` of the event `saved`). For
steps after the last checkpoint, the times are computed from metrics.jsonl. Intervals between events of one machine are
measured by its monotonic clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from bigtrain.run import boot_hash
from bigtrain.tracking.history import ENDS, Columns, whole
from bigtrain.tracking.numbers import finite, span, timestamp

PARTS: Final = {
    "start_up": "start-up",
    "data": "waiting for data",
    "saves": "saves",
    "evaluation": "evaluation",
    "again": "steps done again",
    "hangs": "hangs",
    "restarts": "restarts",
    "other": "other",
}
"""Keys of the parts of lost wall time, and their names for the user."""

_MEASURED: Final = ("steps_s", "data_s", "saves_s", "evaluation_s")

Event = dict[str, Any]


@dataclass(frozen=True)
class Goodput:
    """The parts of a run's wall time, in seconds."""

    wall_s: float
    """The wall time."""
    steps_s: float
    """Seconds in steps that were kept."""
    lost_s: dict[str, float]
    """The other seconds, by the keys of PARTS."""
    energy_j: float | None = None
    """Energy in joules that the machine used during the wall time; None if it could not be measured."""

    @property
    def share(self) -> float | None:
        """The goodput: seconds in kept steps divided by wall time, between 0 and 1; None before the first launch."""
        return self.steps_s / self.wall_s if self.wall_s > 0 else None

    def plain(self) -> dict[str, float]:
        """The parts as a dictionary for JSON. The names end in _s, and the other values sum up to wall_s."""
        return {"wall_s": self.wall_s, "steps_s": self.steps_s, **{f"{n}_s": s for n, s in self.lost_s.items()}}

    def __str__(self) -> str:
        """A line for the user: `goodput 91.2% of 12m10s (start-up 9s, saves 21s); this machine used 1.2 kWh`."""
        if self.share is None:
            return "goodput n/a"
        lost = [f"{PARTS[name]} {span(seconds)}" for name, seconds in self.lost_s.items() if seconds >= 0.5]
        line = f"goodput {self.share:.1%} of {span(self.wall_s)}" + (f" ({', '.join(lost)})" if lost else "")
        return line if self.energy_j is None else f"{line}; this machine used {self.energy_j / 3.6e6:.3g} kWh"


@dataclass
class _Attempt:
    """An attempt, from its event of start or resume to its end."""

    seconds: float
    step: int
    """The step from which the attempt continued."""
    saved: list[Event]
    """The events `saved` of the attempt."""
    fault: Event | None = None
    """The fault that ended the attempt, if any."""


class _Timeline:
    """Processes the events in order, and assigns each interval to an attempt or to a part of the lost time."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.lost_s = dict.fromkeys(PARTS, 0.0)
        self.attempts: list[_Attempt] = []
        self._mark = 0.0
        self._state: Literal["idle", "start_up", "restarts", "running"] = "idle"
        self._step = 0
        self._saved: list[Event] = []

    def take(self, event: Event, at: float) -> None:
        """Process the next event, `at` seconds after the first event."""
        name = event["event"]
        if name in ("started", "resumed"):
            start_s = finite(event.get("start_s")) or 0.0
            if self._state == "idle":
                self._mark, self._state = at - start_s, "start_up"
            elif self._state == "running":  # The launcher was killed before it could record the failure.
                self._leave(max(self._mark, at - start_s), "restarts", {})
            self._leave(at, "running")
            self._step, self._saved = whole(event.get("step")) or 0, []
        elif name == "fault":
            if self._state == "idle":
                self._mark = at
            self._leave(at, "restarts", event)
        elif name == "restarted" and self._state == "running":  # It was saved, to continue on other machines.
            self._leave(at, "restarts")
        elif name in ENDS and self._state != "idle":
            self._leave(at, "idle")
        elif name == "saved" and self._state == "running":
            self._saved.append(event)

    def end(self, at: float) -> None:
        """Process the time after the last event; `at` is the end, in seconds after the first event."""
        if self._state != "idle":
            self._leave(at, "idle")

    def _leave(self, at: float, state: Literal["idle", "restarts", "running"], fault: Event | None = None) -> None:
        seconds = max(0.0, at - self._mark)
        if self._state == "running":
            self.attempts.append(_Attempt(seconds, self._step, self._saved, fault))
        elif self._state != "idle":
            self.lost_s[self._state] += seconds
        self.wall_s += seconds if self._state != "idle" else 0.0
        self._mark, self._state = max(at, self._mark), state


def goodput(events: Sequence[Event], columns: Columns, until: float | None = None) -> Goodput:
    """Compute the parts of the wall time since the first launch.

    Args:
        events: The run's events, oldest first.
        columns: Columns of metrics.jsonl, which has the steps that were kept.
        until: Seconds after the last event at which the wall time of a run without an end event ends; None: now.
    """
    events = [event for event in events if timestamp(event.get("time")) is not None]
    if not events:
        return Goodput(0.0, 0.0, dict.fromkeys(PARTS, 0.0))
    timeline, at = _Timeline(), 0.0
    for before, event in zip([events[0], *events], events, strict=False):
        at += _interval_s(before, event)
        timeline.take(event, at)
    timeline.end(at + (since_s(events[-1]) if until is None else until))
    steps_s = 0.0
    for number, attempt in enumerate(timeline.attempts):
        later = [other.step for other in timeline.attempts[number + 1 :]]
        steps_s += _divide(attempt, later, columns, timeline.lost_s)
    used = [joules for event in events if (joules := finite(event.get("energy_j"))) is not None]
    return Goodput(timeline.wall_s, steps_s, timeline.lost_s, sum(used) if used else None)


def _divide(attempt: _Attempt, later: list[int], columns: Columns, lost_s: dict[str, float]) -> float:
    """Add an attempt's lost time to `lost_s`, and return its seconds in steps that were kept.

    Args:
        attempt: The attempt.
        later: The steps from which later attempts continued.
        columns: Columns of metrics.jsonl.
        lost_s: Seconds by the keys of PARTS, changed in place.
    """
    saved = {int(event["step"]): event for event in attempt.saved if isinstance(event.get("step"), int)}
    # If no attempt follows a fault yet, the next one will continue from the last checkpoint.
    last = sys.maxsize if attempt.fault is None else max(saved, default=attempt.step)
    kept = min(later, default=last)
    measured = dict.fromkeys(_MEASURED, 0.0)
    covered = max((step for step, event in saved.items() if step <= kept and _times(event)), default=None)
    if covered is not None:
        measured |= _times(saved[covered])
    rows = (columns.step > (attempt.step if covered is None else covered)) & (columns.step <= kept)
    waited = np.nan_to_num(columns.get("data_wait_s")[rows])
    measured["data_s"] += float(waited.sum())
    measured["steps_s"] += float(np.maximum(0.0, columns.seconds[rows] - waited).sum())
    left, steps_s = attempt.seconds, 0.0
    for name, seconds in measured.items():
        part = min(max(0.0, seconds), left)
        left -= part
        if name == "steps_s":
            steps_s = part
        else:
            lost_s[name.removesuffix("_s")] += part
    if attempt.fault is None:
        lost_s["other"] += left
        return steps_s
    # Silence before a fault is a hang of a rank, or the time between the kill of a launcher and the next launch.
    silent = min(finite(attempt.fault.get("silent_s")) or 0.0, left)
    lost_s["hangs" if attempt.fault.get("kind") == "hang" else "restarts"] += silent
    lost_s["again"] += left - silent
    return steps_s


def _times(event: Event) -> dict[str, float]:
    times = event.get("times")
    known = {name: finite(times.get(name)) for name in _MEASURED} if isinstance(times, dict) else {}
    return {name: seconds for name, seconds in known.items() if seconds is not None}


def _interval_s(before: Event, event: Event) -> float:
    """Seconds between two events: by the monotonic clock if both are of one machine and boot, else by Unix time."""
    uptimes = finite(before.get("uptime_s")), finite(event.get("uptime_s"))
    if before.get("boot") and before.get("boot") == event.get("boot") and None not in uptimes:
        assert uptimes[0] is not None
        assert uptimes[1] is not None
        return max(0.0, uptimes[1] - uptimes[0])
    return max(0.0, (timestamp(event["time"]) or 0.0) - (timestamp(before["time"]) or 0.0))


def since_s(event: Event) -> float:
    """Seconds from an event to now."""
    return _interval_s(event, {"time": time.time(), "uptime_s": time.monotonic(), "boot": boot_hash()})
