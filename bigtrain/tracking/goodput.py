"""Where a run's wall time went: goodput, and what the rest was spent on.

The parts sum up to the wall time exactly, whatever is missing from the record:

    wall time         from the launch to the end, without the time between a stop (or the end) and the next launch
      start-up        from a launch to the first step: imports, building the model, loading
      steps           of which the result is made; their share of the wall time is the goodput
      data            waiting for the data of these steps
      saves           in which the training waited for a checkpoint
      evaluation
      done again      between the checkpoint from which a run went on and the fault before it
      hangs           from the last sign of life of a rank that hung to the end of all ranks
      restarts        from a fault to the first step after it: waiting for machines, start-up, loading
      other           the rest of attempts that ended well: logging, closing

Steps, data, saves and evaluation are those that rank 0 measured up to each checkpoint (`times` of the event `saved`);
for steps that no such event covers yet, what metrics.jsonl says. Intervals between events of one machine come from
its monotonic clock.
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
"""What wall time is lost to, and what that is called."""

_MEASURED: Final = ("steps_s", "data_s", "saves_s", "evaluation_s")

Event = dict[str, Any]


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall time: of steps that are part of the result, and the rest by the names of PARTS."""

    wall_s: float
    steps_s: float
    lost_s: dict[str, float]
    energy_j: float | None = None
    """Energy of the machine meanwhile, where it can be read."""

    @property
    def share(self) -> float | None:
        """Steps over wall time, between 0 and 1; None before the run has begun."""
        return self.steps_s / self.wall_s if self.wall_s > 0 else None

    def plain(self) -> dict[str, float]:
        """The parts for JSON, their names ending in _s; they sum up to wall_s."""
        return {"wall_s": self.wall_s, "steps_s": self.steps_s, **{f"{n}_s": s for n, s in self.lost_s.items()}}

    def __str__(self) -> str:
        """`goodput 91.2% of 12m10s (start-up 9s, saves 21s); energy 1.20 kWh`."""
        if self.share is None:
            return "goodput n/a"
        lost = [f"{PARTS[name]} {span(seconds)}" for name, seconds in self.lost_s.items() if seconds >= 0.5]
        line = f"goodput {self.share:.1%} of {span(self.wall_s)}" + (f" ({', '.join(lost)})" if lost else "")
        return line if self.energy_j is None else f"{line}; this machine used {self.energy_j / 3.6e6:.3g} kWh"


@dataclass
class _Attempt:
    """Ranks at work, from their first step to their end."""

    seconds: float
    step: int
    """Where it went on from."""
    saved: list[Event]
    fault: Event | None = None
    """What ended it, where that was a fault."""


class _Timeline:
    """Walks through the events and gives each interval between two of them to its part."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.lost_s = dict.fromkeys(PARTS, 0.0)
        self.attempts: list[_Attempt] = []
        self._mark = 0.0
        self._state: Literal["idle", "start_up", "restarts", "running"] = "idle"
        self._step = 0
        self._saved: list[Event] = []

    def take(self, event: Event, at: float) -> None:
        """The next event, `at` seconds after some fixed moment."""
        name = event["event"]
        if name in ("started", "resumed"):
            start_s = finite(event.get("start_s")) or 0.0
            if self._state == "idle":
                self._mark, self._state = at - start_s, "start_up"
            elif self._state == "running":  # Nobody was there to say that it had failed.
                self._leave(max(self._mark, at - start_s), "restarts", {})
            self._leave(at, "running")
            self._step, self._saved = whole(event.get("step")) or 0, []
        elif name == "fault":
            if self._state == "idle":
                self._mark = at
            self._leave(at, "restarts", event)
        elif name == "restarted" and self._state == "running":  # Saved, to go on with other machines.
            self._leave(at, "restarts")
        elif name in ENDS and self._state != "idle":
            self._leave(at, "idle")
        elif name == "saved" and self._state == "running":
            self._saved.append(event)

    def end(self, at: float) -> None:
        """What came after the last event."""
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
    """Where the time since the first launch went.

    Args:
        events: The run's events, oldest first.
        columns: The steps that were kept.
        until: Seconds after the last event up to which a run without an end is counted; None: now.
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
    """Add an attempt's time to what it was lost to; returns the rest, its seconds in steps that were kept."""
    saved = {int(event["step"]): event for event in attempt.saved if isinstance(event.get("step"), int)}
    # A run that has failed would go on from its last checkpoint.
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
    # A hang is a fault of the run; a launcher that was killed was missed only by the next.
    silent = min(finite(attempt.fault.get("silent_s")) or 0.0, left)
    lost_s["hangs" if attempt.fault.get("kind") == "hang" else "restarts"] += silent
    lost_s["again"] += left - silent
    return steps_s


def _times(event: Event) -> dict[str, float]:
    times = event.get("times")
    known = {name: finite(times.get(name)) for name in _MEASURED} if isinstance(times, dict) else {}
    return {name: seconds for name, seconds in known.items() if seconds is not None}


def _interval_s(before: Event, event: Event) -> float:
    """Seconds between two events: by the monotonic clock of their machine where it is one, else by the time of day."""
    uptimes = finite(before.get("uptime_s")), finite(event.get("uptime_s"))
    if before.get("boot") and before.get("boot") == event.get("boot") and None not in uptimes:
        assert uptimes[0] is not None
        assert uptimes[1] is not None
        return max(0.0, uptimes[1] - uptimes[0])
    return max(0.0, (timestamp(event["time"]) or 0.0) - (timestamp(before["time"]) or 0.0))


def since_s(event: Event) -> float:
    """Seconds since an event."""
    return _interval_s(event, {"time": time.time(), "uptime_s": time.monotonic(), "boot": boot_hash()})
