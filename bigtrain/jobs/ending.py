"""How a run's end is reported: a summary, and the notification that `job.notify` configures."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TextIO

from bigtrain.hardware.energy import EnergyMeter
from bigtrain.jobs.notify import notify
from bigtrain.run import RunConfig, RunDirectory
from bigtrain.tracking.status import run_goodput, status


class RunRecord:
    """Writes a launcher's events; each carries the energy that its machine used since the one before.

    Args:
        machines: How many the run takes; of several, one's energy would pass for that of all, and none is recorded.
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
        """Append one line to events.jsonl."""
        joules = self._meter.take()
        energy = {} if joules is None else {"energy_j": round(joules, 3)}
        self._directory.event(event, **fields, **energy)


def tell_end(directory: RunDirectory, config: RunConfig, code: int, stream: TextIO) -> None:
    """Print the run's summary and send the notification; nothing that goes wrong here is more than a line.

    Args:
        code: How the run ended, a code of ExitCode.
    """
    print(f"{directory.name}: {run_goodput(directory.path)}", file=stream, flush=True)
    if config.job.notify is not None:
        said = notify(directory, config, status(directory.path, alive=False), code)
        if said is not None:
            print(f"{directory.name}: {said}", file=stream, flush=True)
