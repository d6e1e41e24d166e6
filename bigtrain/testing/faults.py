"""A rank that fails on purpose at a given step: `python -m bigtrain.testing.faults`, as the rank module of a run.

    BIGTRAIN_FAULT='{"kind": "kill", "rank": 1, "step": 12, "phase": "step", "attempts": 1}'

It runs `bigtrain.training.rank`. The fault occurs at the heartbeat of that step and phase, in each of the first
`attempts` attempts of the run. Tests of a user's model can use it to check that a run recovers from failures of ranks.
If BIGTRAIN_FAULT_FILE names a file, the time of the fault is written to it (time.monotonic, which all processes of a
machine share).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bigtrain import variables
from bigtrain.heartbeat import Heartbeat, Phase
from bigtrain.training import rank

WITHIN_STEP_S: Final = 0.005
SLOW_S: Final = 0.2
_MUTEX_BYTES: Final = 64  # At least sizeof(pthread_mutex_t); zeros are an unlocked one.


def _stop() -> None:
    # From another thread and a little later, when the step has begun.
    threading.Timer(WITHIN_STEP_S, os.kill, (os.getpid(), signal.SIGSTOP)).start()


def _hold_gil() -> None:
    # A C call through PyDLL keeps the GIL. Locking a mutex twice blocks forever; a sleep could be ended by a signal.
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(_MUTEX_BYTES)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def _raise() -> None:
    raise ValueError(f"planted, in process {os.getpid()}")


FAULTS: Final[dict[str, Callable[[], object]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": _stop,
    "stop at once": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hold the GIL": _hold_gil,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "raise": _raise,
    "sleep": lambda: time.sleep(SLOW_S),
}
"""The faults by name: the values of "kind"."""


class FaultyHeartbeat(Heartbeat):
    """A heartbeat that triggers the fault."""

    def beat(self, step: int, phase: Phase) -> None:
        """Send the heartbeat, and trigger the fault if its rank, step, phase and attempt are reached."""
        super().beat(step, phase)
        fault = json.loads(os.environ.get(variables.FAULT, "{}"))
        if not fault or int(os.environ["RANK"]) != fault["rank"]:
            return
        now = phase == fault.get("phase", "step")
        due = step >= fault["step"] if fault["kind"] == "sleep" else step == fault["step"]
        if now and due and int(os.environ.get(variables.ATTEMPT, "0")) < fault.get("attempts", 1):
            if variables.FAULT_FILE in os.environ:
                Path(os.environ[variables.FAULT_FILE]).write_text(f"{time.monotonic()}")
            FAULTS[fault["kind"]]()


def main() -> int:
    """Run this process as a rank that triggers the fault."""
    setattr(rank, "Heartbeat", FaultyHeartbeat)  # noqa: B010 - the name that the module imported
    return rank.main()


if __name__ == "__main__":
    sys.exit(main())
