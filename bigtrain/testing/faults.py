"""A rank that does itself harm at a given step: `python -m bigtrain.testing.faults`, as the rank module of a run.

    BIGTRAIN_FAULT='{"kind": "kill", "rank": 1, "step": 12, "phase": "step", "attempts": 1}'

It is `bigtrain.training.rank`, and when it beats at that step and phase, in one of the first `attempts` attempts, the
fault strikes. So a test of a user's own model can check that it survives what happens to ranks. FAULT_FILE, if set, is
written at that moment, with the time (time.monotonic, which all processes of a machine share).
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
    # A little later, from beside: then the step is under way.
    threading.Timer(WITHIN_STEP_S, os.kill, (os.getpid(), signal.SIGSTOP)).start()


def _hold_gil() -> None:
    # A C call through PyDLL keeps the GIL; a mutex that is locked twice, unlike a sleep, outlasts any signal.
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
"""What can be planted, by name."""


class FaultyHeartbeat(Heartbeat):
    """A heartbeat at which a fault strikes."""

    def beat(self, step: int, phase: Phase) -> None:
        """Beat, and strike where it is time."""
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
    """Run as a rank."""
    setattr(rank, "Heartbeat", FaultyHeartbeat)  # noqa: B010 - the name that the module imported
    return rank.main()


if __name__ == "__main__":
    sys.exit(main())
