"""The shared page through which a rank shows its agent that it lives, and the agent asks it to stop.

The page is an anonymous memory file (memfd) that the agent creates and the rank inherits: it has no name and
vanishes with its last user. It holds two 64-bit words, each written by one side in one store:

    word 0, written by the rank:   step (32 bits) | phase (4 bits) | time of the beat (28 bits)
    word 1, written by the agent:  the control word (RUN, STOP, SAVE)

The time is CLOCK_MONOTONIC, which all processes of a machine share, in ticks of 2^24 ns (17 ms), modulo 2^28 ticks
(52 days). Since a beat is one store, a reader never sees the step of one beat with the time of another, whichever
threads beat and whenever the rank is killed. Reading needs nothing of the rank: one that holds the GIL is seen.

Standard library only: ranks and agents both import it.
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
"""The line that a rank logs when the agent requests its state; a rank that holds the GIL cannot write it."""

Phase = Literal["start", "step", "save", "evaluation", "data", "stopping"]
PHASES: tuple[Phase, ...] = ("start", "step", "save", "evaluation", "data", "stopping")

_MEMFD_NAME = "bigtrain-page"
_CODES = {phase: code << 28 for code, phase in enumerate(PHASES)}
_TICK_SHIFT = 24
_TICK_S = (1 << _TICK_SHIFT) / 1e9
_TICK_MASK = (1 << 28) - 1
_STEP_MASK = (1 << 32) - 1


class Control(enum.IntEnum):
    """What the agent asks of a rank; read between steps."""

    RUN = 0
    STOP = 1
    """Save, then exit with 75."""
    SAVE = 2
    """Save, and go on."""


class Heartbeat:
    """The rank's side of its page. Without an agent it is a page that nobody reads."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Heartbeat:
        """The page that the agent passed to this process, else a page of no effect.

        A child process of a rank inherits the variable but not the page: the descriptor is used only if it really
        is such a page, never another file that happens to have its number.
        """
        text = (os.environ if environment is None else environment).get(variables.PAGE, "")
        if text.isdigit() and _is_page(int(text)):
            descriptor = int(text)
            os.set_inheritable(descriptor, False)
            return cls(_map(descriptor))
        return cls(memoryview(bytearray(PAGE_BYTES)).cast("Q"))

    def beat(self, step: int, phase: Phase) -> None:
        """Say that the rank is alive at `step`, in `phase`; costs about 0.4 microseconds."""
        tick = (time.monotonic_ns() >> _TICK_SHIFT) & _TICK_MASK
        self._words[0] = (step & _STEP_MASK) << 32 | _CODES[phase] | tick

    def control(self) -> Control:
        """The agent's request. Ranks may see a change at different steps: they must agree before they act."""
        return Control(self._words[1])


class Beat(NamedTuple):
    """One reading of a page."""

    step: int
    phase: Phase
    age_s: float
    """Seconds since the rank wrote it."""


class HeartbeatPage:
    """The agent's side of a rank's page; as a context manager it is closed at the end."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create(_MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, PAGE_BYTES)
        # A rank that shrank the file would kill the agent by SIGBUS.
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._words = _map(self.descriptor)
        # The time before the first beat counts as the start.
        Heartbeat(self._words).beat(0, "start")

    def read(self) -> Beat:
        """The rank's last beat."""
        word = self._words[0]
        ticks = ((time.monotonic_ns() >> _TICK_SHIFT) - word) & _TICK_MASK
        code = word >> 28 & 0xF
        return Beat(word >> 32, PHASES[code] if code < len(PHASES) else "step", ticks * _TICK_S)

    def set_control(self, control: Control) -> None:
        """Ask the rank for something; it sees it at its next look."""
        self._words[1] = int(control)

    def close(self) -> None:
        """Give the memory back; the rank's own mapping stays valid."""
        os.close(self.descriptor)
        self._words.release()

    def __enter__(self) -> HeartbeatPage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class StopRequest:
    """Whether this process was asked by SIGTERM to stop."""

    requested: bool = False


def install_rank_signals(describe: Callable[[], str] | None = None) -> StopRequest:
    """Make SIGTERM a request to stop and SIGUSR1 a dump of every thread's stack into the rank's log.

    The dump needs neither the GIL nor the main thread. Call it first thing in a rank, on the main thread.

    Args:
        describe: What else is to be known of a rank that hangs; SIGUSR2 has it written to the log. It is called in a
            thread of its own, which needs the GIL, but not the main thread.

    Returns:
        The request that SIGTERM fills in: to be looked at between steps, like `Heartbeat.control`.
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
    # Python runs a handler only once the main thread is back in Python, which one that hangs is not. The number of
    # the signal goes into the pipe at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def serve() -> None:
        while numbers := os.read(reader, 64):
            if signal.SIGUSR2 in numbers:
                print(ANSWERED, file=sys.stderr, flush=True)  # At once: that it can answer is waited for.
                print(describe(), file=sys.stderr, flush=True)

    threading.Thread(target=serve, name="describe", daemon=True).start()


def _map(descriptor: int) -> memoryview:
    # The memoryview keeps the mapping alive; its items are written by one 8-byte store each.
    return memoryview(mmap.mmap(descriptor, PAGE_BYTES)).cast("Q")


def _is_page(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{_MEMFD_NAME}")
    return False
