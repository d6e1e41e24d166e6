"""What happened in a sweep: an append-only file of JSON lines, synced line by line, from which any driver goes on.

    created   format_version, sweep          planned   trial {...}         chose    size, lr, factor
    started   trial, attempt, slot           ended     trial, code, cause, retry
    finished  trial, result {...}            refused   trial, cause        retry    trial

A kill can tear the last line; it is passed over, and the next one begins on a line of its own. What a torn line would
have said is found out again: a trial whose end was not recorded is started again, and its run says that it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bigtrain import storage
from bigtrain.config import CorruptionError, UserError, nearest
from bigtrain.run import RunDirectory, names
from bigtrain.sweeps.trials import Trial

FORMAT_VERSION = 1
State = Literal["waiting", "running", "stopped", "finished", "failed", "refused"]


class SweepDirectory:
    """Where a sweep keeps everything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "sweep.yaml"
        self.record = path / "sweep.json"
        self.journal = path / "journal.jsonl"
        self.lease = path / names.LEASE
        self.trials = path / "trials"
        """A run directory each: the `--runs-dir` of the trials."""
        self.configs = path / "configs"
        self.logs = path / names.LOGS
        self.bench = path / "bench.json"
        self.plan = path / "plan.json"
        self.page = path / "plan.html"
        self.runs = path / "runs.jsonl"
        """A row a finished run, as `bigtrain scaling fit` reads it."""
        self.tuning = path / "tuning.jsonl"
        """A row a run that tuned a learning rate, as `bigtrain scaling rates` reads it."""
        self.law = path / "law"

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a sweep was ever started here."""
        return self.journal.exists()

    def run(self, trial: str) -> RunDirectory:
        """The run of a trial."""
        return RunDirectory(self.trials / trial)

    def log(self, trial: str) -> Path:
        """What a trial's launcher prints."""
        return self.logs / f"{trial}.log"


def find_sweep(text: str, runs_dir: Path) -> SweepDirectory:
    """A sweep given by its name under `runs_dir`, or by a path.

    Raises:
        UserError: There is none; names the nearest.
    """
    for path in (runs_dir / text, Path(text)):
        if SweepDirectory(path).exists():
            return SweepDirectory(path)
    names = [path.parent.name for path in runs_dir.glob("*/journal.jsonl")]
    close = nearest(text, names)
    known = f"There are: {', '.join(sorted(names))}." if names else "There are none; see --runs-dir."
    raise UserError(f"There is no sweep '{text}'", str(runs_dir), f"Did you mean '{close}'?" if close else known)


@dataclass
class TrialRecord:
    """What the journal says of one trial."""

    trial: Trial
    state: State = "waiting"
    attempts: int = 0
    failures: int = 0
    """Crashes since the last progress or request to retry."""
    cause: str | None = None
    result: dict[str, Any] | None = None

    @property
    def settled(self) -> bool:
        """Whether it will not run any more by itself."""
        return self.state in ("finished", "failed", "refused")


@dataclass
class SweepState:
    """The state after all lines of the journal, in the order in which trials were planned."""

    trials: dict[str, TrialRecord] = field(default_factory=dict)
    chosen: dict[int, float] = field(default_factory=dict)
    """The learning rate of each size that was tuned."""

    def complete(self, record: TrialRecord) -> bool:
        """Whether a trial has done its part: a learning rate that failed has, once its size has another one."""
        return record.state == "finished" or (
            record.state == "failed" and record.trial.kind == "tuning" and record.trial.size in self.chosen
        )

    def planned(self) -> list[Trial]:
        """All trials."""
        return [record.trial for record in self.trials.values()]

    def get(self, name: str) -> TrialRecord:
        """One trial's record.

        Raises:
            UserError: There is none of that name; names the nearest.
        """
        if name not in self.trials:
            close = nearest(name, self.trials)
            raise UserError(
                f"There is no trial '{name}' in this sweep", None,
                f"Did you mean '{close}'?" if close else "See `bigtrain sweep status`.",
            )  # fmt: skip
        return self.trials[name]


class Journal:
    """The file, and the state that it has come to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_state(path)

    def append(self, event: str, /, **fields: Any) -> None:
        """Add one line and sync it; what it says holds when this returns."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        storage.append_line(self.path, line)
        storage.fsync_file(self.path)
        _apply(self.state, line)


def read_state(path: Path) -> SweepState:
    """The state that a journal has come to; that of nothing where there is none.

    Raises:
        UserError: A newer bigtrain wrote it.
        CorruptionError: It is no journal.
    """
    state = SweepState()
    for number, line in enumerate(storage.read_lines(path)):
        version = line.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"The journal has format version {version}; this bigtrain reads up to {FORMAT_VERSION}", str(path),
                "Upgrade bigtrain.",
            )  # fmt: skip
        try:
            _apply(state, line)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"Line {number + 1} of the journal makes no sense: {error!r}", str(path)) from None
    return state


def _apply(state: SweepState, line: dict[str, Any]) -> None:
    event = line["event"]
    if event == "planned":
        trial = Trial.parse(line["trial"])
        state.trials[trial.name] = TrialRecord(trial)
        return
    if event == "chose":
        state.chosen[int(line["size"])] = float(line["lr"])
        return
    if event not in ("started", "ended", "finished", "refused", "retry"):
        return
    record = state.trials[line["trial"]]
    if event == "started":
        record.state, record.attempts = "running", record.attempts + 1
    elif event == "ended":
        record.cause = line.get("cause")
        record.failures = int(line.get("failures", 0))
        record.state = "waiting" if line["retry"] else ("stopped" if line["code"] == 75 else "failed")
    elif event == "finished":
        record.state, record.cause, record.result = "finished", None, dict(line["result"])
    elif event == "refused":
        record.state, record.cause = "refused", line["cause"]
    else:
        record.state, record.failures, record.cause = "waiting", 0, None


def results(records: Iterable[TrialRecord]) -> list[dict[str, Any]]:
    """Rows of the finished runs that a law is fitted to."""
    return [record.result for record in records if record.result is not None and record.trial.kind == "branch"]
