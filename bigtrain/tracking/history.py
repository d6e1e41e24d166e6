"""A run's past as columns and times: what status and report compute from metrics.jsonl and events.jsonl."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.run import names
from bigtrain.storage import read_lines
from bigtrain.tracking.metrics import is_recorded, step_rows
from bigtrain.tracking.numbers import finite, timestamp

FloatArray = npt.NDArray[np.float64]

BEGINS = ("started", "resumed", "restarted")
ENDS = ("stopped", "finished", "failed")
_RECENT = 50


@dataclass(frozen=True)
class Columns:
    """metrics.jsonl as arrays of one length, one entry a logged step; what is missing is NaN."""

    step: npt.NDArray[np.int64]
    values: dict[str, FloatArray]

    def __len__(self) -> int:
        return len(self.step)

    def get(self, name: str) -> FloatArray:
        """The column of that name, all NaN where no step has it."""
        found = self.values.get(name)
        return found if found is not None else np.full(len(self.step), np.nan)

    def last(self, name: str) -> float | None:
        """The newest number in that column, or None."""
        column = self.get(name)
        known = np.flatnonzero(np.isfinite(column))
        return float(column[known[-1]]) if len(known) else None

    @property
    def sources(self) -> list[str]:
        """The names of a mixture's sources, sorted; none where there is one source."""
        return sorted(name.removeprefix("epochs/") for name in self.values if name.startswith("epochs/"))

    @property
    def recorded(self) -> list[str]:
        """The metrics that were recorded by name, and those of evaluators apart from the loss; sorted."""
        return sorted(filter(is_recorded, self.values))

    @property
    def seconds(self) -> FloatArray:
        """Seconds that each logged interval of steps took: tokens over tokens a second; 0 where not known."""
        tokens, rate = self.get("tokens"), self.get("tokens_per_s")
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.diff(tokens, prepend=0.0) / rate
        return np.where(np.isfinite(seconds) & (seconds > 0), seconds, 0.0)

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of one recent step, or None where not known."""
        steps = np.diff(self.step, prepend=0)[-_RECENT:]
        seconds = self.seconds[-_RECENT:]
        known = (seconds > 0) & (steps > 0)
        return float(np.median(seconds[known] / steps[known])) if known.any() else None


def read_columns(path: str | os.PathLike[str]) -> Columns:
    """metrics.jsonl as columns, each step once; made for a million steps."""
    steps = array("q")
    columns: dict[str, array[float]] = {}
    nan = float("nan")
    for row in step_rows(path):
        while steps and steps[-1] >= row["step"]:
            steps.pop()
            for column in columns.values():
                del column[len(steps) :]
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            column = columns.setdefault(name, array("d"))
            column.extend([nan] * (len(steps) - len(column)))
            column.append(value)
        steps.append(row["step"])
    for column in columns.values():
        column.extend([nan] * (len(steps) - len(column)))
    return Columns(
        np.array(steps, dtype=np.int64),
        {name: np.array(column, dtype=np.float64) for name, column in columns.items()},
    )


def read_events(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The events in the order in which they were written; what has no name is passed over."""
    return [event for event in read_lines(path) if isinstance(event.get("event"), str)]


def newest(events: Sequence[dict[str, Any]], name: str) -> Any:
    """The newest value of a field that only some events carry, or None."""
    return next((event[name] for event in reversed(events) if event.get(name) is not None), None)


def state(events: Sequence[dict[str, Any]], alive: bool) -> str:
    """pending, running, waiting, stopped, finished or failed.

    Args:
        events: The run's events, oldest first.
        alive: Whether somebody holds the run's lease. A run that nobody holds and that has not said how it
            ended was killed: it has failed, and can be resumed.
    """
    last = next((e["event"] for e in reversed(events) if e["event"] in (*BEGINS, *ENDS, "fault", "waiting")), None)
    if last is None:
        return "pending"
    if last in ("finished", "failed"):
        return "finished" if last == "finished" else ("pending" if alive else "failed")
    if last == "stopped":
        return "pending" if alive else "stopped"
    if not alive:
        return "failed"
    return "running" if last in BEGINS else "waiting"


def record_s(run_dir: Path, events: Sequence[dict[str, Any]]) -> float:
    """Seconds from its last event to the last thing that a run which nobody holds has written."""
    last = timestamp(events[-1].get("time")) if events else None
    try:
        return max(0.0, (run_dir / names.METRICS).stat().st_mtime - last) if last is not None else 0.0
    except FileNotFoundError:
        return 0.0


def eta_s(columns: Columns, total_steps: int | None) -> float | None:
    """Seconds to the last step at the recent pace, or None where not known."""
    pace = columns.step_seconds
    if pace is None or total_steps is None or not len(columns):
        return None
    return max(0, total_steps - int(columns.step[-1])) * pace


def whole(value: Any) -> int | None:
    """The value as a whole number, or None."""
    number = finite(value)
    return int(number) if number is not None else None
