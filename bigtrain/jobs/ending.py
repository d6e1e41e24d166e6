"""Reporting the end of a run: a printed summary, and the notification that `job.notify` configures."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TextIO

from bigtrain.hardware.energy import EnergyMeter
from bigtrain.jobs.notify import notify
from bigtrain.run import RunConfig, RunDirectory
from bigtrain.tracking.status import run_goodput, status


class RunRecord:
    """Writes a launcher's events; each event holds the energy in joules that the machine used since the last event.

    Args:
        machines: Number of nodes of the run. With several nodes no energy is recorded, because only the energy of
            this one can be measured.
    """

    def __init__(self, directory: RunDirectory, machines: int) -> None:
        self._directory = directory
        self._meter = EnergyMeter() if machines == 1 else EnergyMeter([])

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.stop()

    def event(self, event: str, /, **fields: Any) -> None:
        """Append one event to events.jsonl."""
        joules = self._meter.take()
        energy = {} if joules is None else {"energy_j": round(joules, 3)}
        self._directory.event(event, **fields, **energy)


def tell_end(directory: RunDirectory, config: RunConfig, code: int, stream: TextIO) -> None:
    """Print the run's summary and send the notification; a failed notification is reported in one line.

    Args:
        code: How the run ended, as a value of ExitCode.
    """
    print(f"{directory.name}: {run_goodput(directory.path)}", file=stream, flush=True)
    if config.job.notify is not None:
        said = notify(directory, config, status(directory.path, alive=False), code)
        if said is not None:
            print(f"{directory.name}: {said}", file=stream, flush=True)
