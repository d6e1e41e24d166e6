"""The journal of a sweep: an append-only file of JSON lines, one event each, from which any driver can resume.

    created   format_version, sweep          planned   trial {...}         chose    size, lr, losses
    started   trial, attempt, slot           ended     trial, code, cause, retry, failures
    finished  trial, result {...}            refused   trial, cause        retry    trial

Each line is synced to disk before the driver continues. A kill can leave an incomplete last line; readers skip it, and
the next event starts on a new line. The lost event is recovered: a trial whose end was not recorded is started again,
and its run then reports that it has finished.
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
    """The paths of the files in a sweep's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "sweep.yaml"
        self.record = path / "sweep.json"
        self.journal = path / "journal.jsonl"
        self.lease = path / names.LEASE
        self.trials = path / "trials"
        """The run directories of the trials; it is their `--runs-dir`."""
        self.configs = path / "configs"
        self.logs = path / names.LOGS
        self.bench = path / "bench.json"
        self.plan = path / "plan.json"
        self.page = path / "plan.html"
        self.runs = path / "runs.jsonl"
        """One row per finished branch, for `bigtrain scaling fit`."""
        self.tuning = path / "tuning.jsonl"
        """One row per run that tuned a learning rate, for `bigtrain scaling rates`."""
        self.law = path / "law"

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a sweep was ever started here."""
        return self.journal.exists()

    def run(self, trial: str) -> RunDirectory:
        """The run directory of a trial."""
        return RunDirectory(self.trials / trial)

    def log(self, trial: str) -> Path:
        """Path of the file with the output of a trial's launcher."""
        return self.logs / f"{trial}.log"


def find_sweep(text: str, runs_dir: Path) -> SweepDirectory:
    """Find a sweep by its name under `runs_dir`, or by its path.

    Raises:
        UserError: There is no such sweep; the error suggests the nearest name.
    """
    for path in (runs_dir / text, Path(text)):
        if SweepDirectory(path).exists():
            return SweepDirectory(path)
    names = [path.parent.name for path in runs_dir.glob("*/journal.jsonl")]
    close = nearest(text, names)
    known = f"Choose one of: {', '.join(sorted(names))}." if names else "There are no sweeps; see --runs-dir."
    raise UserError(f"There is no sweep '{text}'", str(runs_dir), f"Did you mean '{close}'?" if close else known)


@dataclass
class TrialRecord:
    """The state of one trial, as the journal records it."""

    trial: Trial
    state: State = "waiting"
    attempts: int = 0
    """How often the trial was started."""
    failures: int = 0
    """Crashes since the last new checkpoint or request to retry."""
    cause: str | None = None
    """Why the trial failed, was stopped or was refused; None otherwise."""
    result: dict[str, Any] | None = None
    """The trial's row (`bigtrain.sweeps.results.row_of`); None until it has finished."""

    @property
    def settled(self) -> bool:
        """Whether the trial will not run again without a request to retry."""
        return self.state in ("finished", "failed", "refused")


@dataclass
class SweepState:
    """The state of a sweep after all lines of its journal."""

    trials: dict[str, TrialRecord] = field(default_factory=dict)
    """Trials by name, in the order in which they were planned."""
    chosen: dict[int, float] = field(default_factory=dict)
    """The learning rate of each size that was tuned, by target N."""

    def complete(self, record: TrialRecord) -> bool:
        """Whether the sweep needs nothing more from a trial.

        This holds for a trial that has finished, and for a failed tuning trial once its size has a learning rate.
        """
        return record.state == "finished" or (
            record.state == "failed" and record.trial.kind == "tuning" and record.trial.size in self.chosen
        )

    def planned(self) -> list[Trial]:
        """All trials, in the order in which they were planned."""
        return [record.trial for record in self.trials.values()]

    def get(self, name: str) -> TrialRecord:
        """The record of one trial.

        Raises:
            UserError: There is no trial of this name; the error suggests the nearest name.
        """
        if name not in self.trials:
            close = nearest(name, self.trials)
            raise UserError(
                f"There is no trial '{name}' in this sweep", None,
                f"Did you mean '{close}'?" if close else "See `bigtrain sweep status`.",
            )  # fmt: skip
        return self.trials[name]


class Journal:
    """The journal's file, and the sweep's state after all of its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_state(path)

    def append(self, event: str, /, **fields: Any) -> None:
        """Append one event and sync it to disk before returning; the state is updated as well."""
        line = {"time": round(time.time(), 3), "event": event, **fields}
        storage.append_line(self.path, line)
        storage.fsync_file(self.path)
        _apply(self.state, line)


def read_state(path: Path) -> SweepState:
    """Read the state of a sweep from its journal; without a file, it is a state without trials.

    Raises:
        UserError: A newer bigtrain wrote the journal.
        CorruptionError: A line is not a valid event.
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
            raise CorruptionError(
                f"Line {number + 1} of the journal is not a valid entry: {error!r}", str(path)
            ) from None
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
    """Rows of the finished branches, to which a law is fitted."""
    return [record.result for record in records if record.result is not None and record.trial.kind == "branch"]
