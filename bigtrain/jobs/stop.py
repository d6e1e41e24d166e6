"""`bigtrain stop` for runs and sweeps on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bigtrain.config import UserError
from bigtrain.run import Lease, Leased, RunDirectory

WAIT_S = 600.0
BETWEEN_SIGNALS_S = 0.15
"""Seconds between two signals; long enough for the launcher to count them as two requests."""


def each(names: Sequence[str], end: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Stop several runs at the same time. A run that cannot be stopped does not keep the others from being stopped.

    Args:
        names: Names of the runs.
        end: Stops one run and returns a line that says how it ended.
        say: Prints these lines.

    Raises:
        UserError: A run could not be stopped. The message names all such runs.
    """
    failed: list[UserError] = []
    with ThreadPoolExecutor(len(names)) as pool:
        for future in [pool.submit(end, name) for name in names]:
            try:
                say(future.result())
            except UserError as error:
                failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise UserError("\n    ".join(str(error.what) for error in failed))


def stop(run: Leased, now: bool, noun: str = "run") -> str:
    """Request the launcher of a run or a sweep to save and end it, and wait until it has ended.

    Args:
        run: The directory of the run or sweep.
        now: End the run at once instead, without saving; it can be resumed from its last checkpoint.
        noun: "run" or "sweep", for the messages.

    Returns:
        A line that says how to resume.

    Raises:
        UserError: The run is not running, runs on another machine, or has not ended within WAIT_S.
    """
    holder = Lease.holder(run)
    if holder is None or not holder.alive():
        raise UserError(f"The {noun} '{run.name}' is not running", str(run.path))
    if holder.host != socket.gethostname():
        raise UserError(f"The {noun} '{run.name}' runs on {holder.host}", fix="Stop it there.")
    os.kill(holder.pid, signal.SIGTERM)
    if now:
        time.sleep(BETWEEN_SIGNALS_S)
        if holder.alive():
            os.kill(holder.pid, signal.SIGTERM)
    deadline = time.monotonic() + WAIT_S
    while (still := Lease.holder(run)) is not None and still.number == holder.number and still.alive():
        if time.monotonic() > deadline:
            raise UserError(f"The {noun} '{run.name}' has not ended within {WAIT_S:.0f} s", fix="Try --now.")
        time.sleep(0.1)
    return f"{run.name}: stopped; {_again(run, noun)}"


def _again(run: Leased, noun: str) -> str:
    """A sentence that says how to resume what was stopped."""
    if noun != "run":
        return f"`bigtrain {noun} resume {run.name}` resumes it"
    directory = RunDirectory(run.path)
    if directory.exists() and "script" in directory.recipe():
        return "the command that started it starts it again"
    return f"`bigtrain resume {run.name}` resumes it"
