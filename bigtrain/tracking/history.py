"""The history of a run as columns and times, computed from metrics.jsonl and events.jsonl for status and report."""

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
from bigtrain.tracking.metrics import is_recorded, part_losses, step_rows
from bigtrain.tracking.numbers import finite, timestamp

FloatArray = npt.NDArray[np.float64]

BEGINS = ("started", "resumed", "restarted")
ENDS = ("stopped", "finished", "failed")
_RECENT = 50


@dataclass(frozen=True)
class Columns:
    """The columns of a metrics.jsonl with n logged steps; missing values are NaN."""

    step: npt.NDArray[np.int64]
    """The logged steps, shape (n,), increasing."""
    values: dict[str, FloatArray]
    """The other columns by name, float64, shape (n,)."""

    def __len__(self) -> int:
        return len(self.step)

    def get(self, name: str) -> FloatArray:
        """The column with this name, shape (n,); all NaN if no step has such a value."""
        found = self.values.get(name)
        return found if found is not None else np.full(len(self.step), np.nan)

    def last(self, name: str) -> float | None:
        """The newest finite value in the column with this name, or None if there is none."""
        column = self.get(name)
        known = np.flatnonzero(np.isfinite(column))
        return float(column[known[-1]]) if len(known) else None

    @property
    def sources(self) -> list[str]:
        """The sorted names of a mixture's sources; empty if the data are not a mixture."""
        return sorted(name.removeprefix("epochs/") for name in self.values if name.startswith("epochs/"))

    @property
    def parts(self) -> list[str]:
        """The names of the model's parts that have a loss of their own, in the order of the file."""
        return part_losses(self.values)

    @property
    def recorded(self) -> list[str]:
        """The sorted names of the metrics that models, callbacks and evaluators have recorded by name."""
        return sorted(filter(is_recorded, self.values))

    @property
    def seconds(self) -> FloatArray:
        """Seconds of each logged interval of steps, shape (n,): tokens (or images) over their rate; 0 if unknown."""
        tokens, rate = self.get("tokens"), self.get("tokens_per_s")
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.diff(tokens, prepend=0.0) / rate
        return np.where(np.isfinite(seconds) & (seconds > 0), seconds, 0.0)

    @property
    def wait_ms(self) -> FloatArray:
        """Milliseconds per step that each logged interval waited for data, shape (n,)."""
        return np.asarray(1e3 * self.get("data_wait_s") / np.maximum(np.diff(self.step, prepend=0), 1))

    @property
    def step_seconds(self) -> float | None:
        """Median seconds per step over the recent logged intervals, or None if unknown."""
        steps = np.diff(self.step, prepend=0)[-_RECENT:]
        seconds = self.seconds[-_RECENT:]
        known = (seconds > 0) & (steps > 0)
        return float(np.median(seconds[known] / steps[known])) if known.any() else None


def read_columns(path: str | os.PathLike[str]) -> Columns:
    """Read a metrics.jsonl as columns, each step once; fast enough for a million steps."""
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
    """Read the events in the order of the file; lines without an event name are skipped."""
    return [event for event in read_lines(path) if isinstance(event.get("event"), str)]


def newest(events: Sequence[dict[str, Any]], name: str) -> Any:
    """The newest value of a field that only some events have, or None if there is none."""
    return next((event[name] for event in reversed(events) if event.get(name) is not None), None)


def state(events: Sequence[dict[str, Any]], alive: bool) -> str:
    """The state of a run: "pending", "running", "waiting", "stopped", "finished" or "failed".

    Args:
        events: The run's events, oldest first.
        alive: Whether a process holds the run's lease. A run without a holder and without an event of its end was
            killed: its state is "failed", and it can be resumed.
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
    """Seconds from the last event to the last write of metrics.jsonl, for a run whose lease is not held."""
    last = timestamp(events[-1].get("time")) if events else None
    try:
        return max(0.0, (run_dir / names.METRICS).stat().st_mtime - last) if last is not None else 0.0
    except FileNotFoundError:
        return 0.0


def eta_s(columns: Columns, total_steps: int | None) -> float | None:
    """Estimated seconds to the last step at the recent speed, or None if unknown."""
    pace = columns.step_seconds
    if pace is None or total_steps is None or not len(columns):
        return None
    return max(0, total_steps - int(columns.step[-1])) * pace


def whole(value: Any) -> int | None:
    """The value truncated to an integer, or None if it is not a finite number."""
    number = finite(value)
    return int(number) if number is not None else None
