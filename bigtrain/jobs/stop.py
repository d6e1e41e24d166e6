"""`bigtrain stop` for what runs on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time

from bigtrain.config import UserError
from bigtrain.run import Lease, Leased

WAIT_S = 600.0
BETWEEN_SIGNALS_S = 0.15
"""Long enough for the launcher to take them for two requests."""


def stop(run: Leased, now: bool, noun: str = "run") -> str:
    """Ask the process that holds a run, or a sweep, to save and end it, and wait until it has.

    Args:
        now: End it at once instead; it resumes from its last checkpoint.
        noun: What it is, for the messages.

    Returns:
        A line that says how it went.

    Raises:
        UserError: Nothing runs here.
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
    return f"{run.name}: stopped; `bigtrain {'train' if noun == 'run' else f'{noun} resume'}` resumes it"
