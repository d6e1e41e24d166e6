"""The shared memory page by which a rank shows its agent that it is alive, and the agent asks the rank to stop.

The page is an anonymous memory file (memfd) that the agent creates and the rank inherits. It has no name, and the
kernel frees it with its last user. It holds two 64-bit words, each written by one side in one store:

    word 0, written by the rank:   step (32 bits) | phase (4 bits) | time of the beat (28 bits)
    word 1, written by the agent:  the control word (RUN, STOP, SAVE)

The time is CLOCK_MONOTONIC, which all processes of a machine share, in ticks of 2^24 ns (17 ms), modulo 2^28 ticks
(52 days). Since a beat is one store, a reader never sees the step of one beat with the time of another. This holds
whichever threads beat, and whenever the rank is killed. The agent reads the page without help of the rank, so it also
gets the last beat of a blocked rank, for example one in C code that holds the GIL.

This module imports the standard library only, since both ranks and agents import it.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import fcntl
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Literal, NamedTuple

from bigtrain import variables

PAGE_BYTES = 16
ANSWERED = "state written on request: no thread of this rank holds the GIL"
"""The line that a rank logs when the agent requests its state. If a thread holds the GIL, the rank cannot write it."""

Phase = Literal["start", "step", "save", "evaluation", "data", "stopping"]
PHASES: tuple[Phase, ...] = ("start", "step", "save", "evaluation", "data", "stopping")

_MEMFD_NAME = "bigtrain-page"
_CODES = {phase: code << 28 for code, phase in enumerate(PHASES)}
_TICK_SHIFT = 24
_TICK_S = (1 << _TICK_SHIFT) / 1e9
_TICK_MASK = (1 << 28) - 1
_STEP_MASK = (1 << 32) - 1


class Control(enum.IntEnum):
    """The agent's request to a rank; the rank reads it between steps."""

    RUN = 0
    STOP = 1
    """Save a checkpoint, then exit with status 75."""
    SAVE = 2
    """Save a checkpoint and continue training."""


class Heartbeat:
    """The rank's side of its page; without an agent, nobody reads the page."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Heartbeat:
        """The page that the agent passed to this process; without one, a private page without effect.

        A child process of a rank inherits the environment variable but not the page. The file descriptor is therefore
        used only if it refers to such a page: another file may have the same descriptor number.
        """
        text = (os.environ if environment is None else environment).get(variables.PAGE, "")
        if text.isdigit() and _is_page(int(text)):
            descriptor = int(text)
            os.set_inheritable(descriptor, False)
            return cls(_map(descriptor))
        return cls(memoryview(bytearray(PAGE_BYTES)).cast("Q"))

    def beat(self, step: int, phase: Phase) -> None:
        """Record that the rank is alive at `step`, in `phase`; a call takes about 0.4 microseconds."""
        tick = (time.monotonic_ns() >> _TICK_SHIFT) & _TICK_MASK
        self._words[0] = (step & _STEP_MASK) << 32 | _CODES[phase] | tick

    def control(self) -> Control:
        """The agent's request. Ranks may read a change at different steps, so they must agree before they act on it."""
        return Control(self._words[1])


class Beat(NamedTuple):
    """The rank's last beat, as read from its page."""

    step: int
    phase: Phase
    age_s: float
    """Seconds since the rank wrote the beat."""


class HeartbeatPage:
    """The agent's side of a rank's page; a context manager that closes the page at the end."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, PAGE_BYTES)
        # If a rank shrank the file, the agent's next access would kill the agent with SIGBUS.
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._words = _map(self.descriptor)
        # The time before the first beat counts as the start.
        Heartbeat(self._words).beat(0, "start")

    def read(self) -> Beat:
        """Read the rank's last beat."""
        word = self._words[0]
        ticks = ((time.monotonic_ns() >> _TICK_SHIFT) - word) & _TICK_MASK
        code = word >> 28 & 0xF
        return Beat(word >> 32, PHASES[code] if code < len(PHASES) else "step", ticks * _TICK_S)

    def set_control(self, control: Control) -> None:
        """Set the request to the rank, which sees it when it next calls `Heartbeat.control`."""
        self._words[1] = int(control)

    def close(self) -> None:
        """Release the agent's file descriptor and view; the rank's own mapping stays valid."""
        os.close(self.descriptor)
        self._words.release()

    def __enter__(self) -> HeartbeatPage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class StopRequest:
    """Whether this process has received SIGTERM, the request to stop."""

    requested: bool = False


def install_rank_signals(describe: Callable[[], str] | None = None) -> StopRequest:
    """Install handlers: SIGTERM requests a stop, and SIGUSR1 dumps every thread's stack to the rank's log (stderr).

    The dump needs neither the GIL nor the main thread. A rank calls this function first, on its main thread.

    Args:
        describe: Returns a text about the state of the rank. SIGUSR2 has it written to the log, for a rank that hangs.
            A separate thread calls it, which needs the GIL but not the main thread.

    Returns:
        The request that SIGTERM sets. The rank reads it between steps, like `Heartbeat.control`.
    """
    request = StopRequest()

    def on_terminate(number: int, frame: FrameType | None) -> None:
        request.requested = True

    signal.signal(signal.SIGTERM, on_terminate)
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    if describe is not None:
        _describe_on_signal(describe)
    return request


def _describe_on_signal(describe: Callable[[], str]) -> None:
    # Python runs a signal handler only when the main thread executes Python code; a main thread that hangs never does.
    # The wakeup pipe receives the signal's number at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def serve() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGUSR2 in numbers:
                print(ANSWERED, file=sys.stderr, flush=True)  # First: the agent waits for it.
                print(describe(), file=sys.stderr, flush=True)

    threading.Thread(target=serve, name="describe", daemon=True).start()


def _map(descriptor: int) -> memoryview:
    # The memoryview keeps the mapping alive; each item is written by one 8-byte store.
    return memoryview(mmap.mmap(descriptor, PAGE_BYTES)).cast("Q")


def _is_page(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{_MEMFD_NAME}")
    return False
