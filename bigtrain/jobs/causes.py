"""What went wrong, in one line, and whether to try again: the retry budget."""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from bigtrain.jobs.processes import signal_name
from bigtrain.run import ExitCode

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MOST_S: Final = 30.0


_OUT_OF_MEMORY: Final = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|^MemoryError", re.IGNORECASE)
_LESS_MEMORY: Final = "lower layout.micro_size, set engine.recompute to full, or spread the model over more ranks"
_PORT_TAKEN: Final = re.compile(r"EADDRINUSE|[Aa]ddress already in use")
_PEER_GONE: Final = re.compile(
    r"closed by (remote )?peer|reset by peer|[Bb]roken pipe|[Cc]onnection (refused|closed|was aborted)|remote process "
    r"exited|NCCL|socketPoll|Timed out waiting"
)
"""How the exceptions of gloo, NCCL and the store end whose other side is gone."""


class Kind(enum.Enum):
    """What ended a generation; the retry follows from it."""

    USER = "user"
    """Exit code 2: the user's mistake, which a retry does not repair."""
    EXCEPTION = "exception"
    SIGNAL = "signal"
    HANG = "hang"
    EARLY_EXIT = "early exit"
    AGENT_LOST = "agent lost"
    PREEMPTED = "preempted"
    """A node was lost after a notice that it would go; this is no failure of the run."""


@dataclass(frozen=True)
class Fault:
    """The first failure of a generation."""

    kind: Kind
    cause: str
    """One line that names rank, host, phase and step."""
    host: str
    rank: int | None = None
    step: int | None = None
    traceback: str | None = None
    tail: str = ""
    """The end of the rank's log, or its stacks where it hung."""
    silent_s: float | None = None
    """Seconds before it was seen in which the rank showed no sign of life, where it hung."""
    agent: str = ""
    """The node, as its placer names it."""

    def outranks(self, earlier: Fault) -> bool:
        """Whether this is the likelier root of both, though it was heard of later.

        Ranks whose peer is gone raise at once, while what took the peer away may be seen only later, on its own node.
        """
        return self._weight() > earlier._weight()

    @property
    def peer_gone(self) -> bool:
        """Whether it is an exception that says that another rank is gone."""
        last = (self.traceback or "").rstrip().rpartition("\n")[2]
        return self.kind is Kind.EXCEPTION and _PEER_GONE.search(last) is not None

    def _weight(self) -> int:
        if self.kind is not Kind.EXCEPTION:
            return 2
        return 0 if self.peer_gone else 1

    def signature(self) -> tuple[int | None, str] | None:
        """A key that is equal when the same exception is raised at the same step again; None without a traceback.

        Numbers and addresses inside the text are ignored: ports, times and pointers differ each time. Out of memory is
        the same wherever it strikes. That a peer is gone says nothing about what this rank does, nor does a port that
        another process took: the next attempt has another one.
        """
        if self.traceback is None or self._weight() == 0 or _PORT_TAKEN.search(_last_line(self.traceback)):
            return None
        if _OUT_OF_MEMORY.search(_last_line(self.traceback)):
            return None, ""
        return self.step, re.sub(r"0x[0-9a-fA-F]+|\d+", "#", self.traceback)


def fault_of_exit(message: Mapping[str, Any], host: str, reports_steps: bool = True) -> Fault:
    """The fault that the protocol's `exited` reports.

    Args:
        reports_steps: Whether the rank reports its step and exits with bigtrain's codes.
    """
    rank, step, phase = int(message["rank"]), int(message["step"]), str(message["phase"])
    traceback, tail = message["traceback"], str(message["tail"])
    place = f" at step {step}" if phase == "step" else f" at step {step}, in phase {phase}"
    if not reports_steps:
        place = ""
    if message["signal"] is not None:
        kind, what = Kind.SIGNAL, f"was killed by {signal_name(int(message['signal']))}"
    elif message["code"] == ExitCode.USER and reports_steps:
        kind, what = Kind.USER, "refused what it was given (exit code 2)"
    else:
        kind, what = Kind.EXCEPTION, f"exited with {message['code']}"
        # A rank that knows what is wrong prints one line of its own, without a traceback.
        own_lines = [line for line in tail.splitlines() if line.startswith("error: ")]
        if traceback:
            last = _last_line(traceback)
            what = f"raised {_shortened(last)}"
            if _OUT_OF_MEMORY.search(last):
                what = f"ran out of memory ({_LESS_MEMORY}): {_shortened(last)}"
            elif _PORT_TAKEN.search(last):
                what = f"found its port taken by another process: {_shortened(last)}"
        elif own_lines and reports_steps:
            what, traceback = f"reported: {_shortened(own_lines[-1].removeprefix('error: '))}", own_lines[-1]
    return Fault(kind, f"rank {rank} on host {host} {what}{place}", host, rank, step, traceback, tail)


def fault_of_hang(message: Mapping[str, Any], host: str) -> Fault:
    """The fault that the protocol's `hung` reports."""
    rank, step = int(message["rank"]), int(message["step"])
    state = ", its process is stopped" if message["stopped"] else ""
    cause = (
        f"rank {rank} on host {host} hangs in phase {message['phase']} at step {step}: no sign of life for "
        f"{message['age_s']:.0f} s (limit {message['limit_s']:g} s{state})"
    )
    silent_s = round(float(message["age_s"]), 3)
    return Fault(Kind.HANG, cause, host, rank, step, None, str(message["stacks"]), silent_s=silent_s)


def fault_of_early_exit(exited: Mapping[str, Any], host: str, then: Fault | None) -> Fault:
    """The fault of a rank that left cleanly while others had work to do; `then` is what that led to."""
    rank, step = int(exited["rank"]), int(exited["step"])
    cause = f"rank {rank} on host {host} exited with {exited['code']} at step {step} while other ranks went on"
    if then is None:
        return Fault(Kind.EARLY_EXIT, cause, host, rank, step, None, str(exited["tail"]))
    return Fault(Kind.EARLY_EXIT, f"{cause} ({then.cause})", host, rank, step, then.traceback, then.tail)


def fault_of_lost_agent(host: str, why: str) -> Fault:
    """The fault of an agent that died or went silent, and its ranks with it."""
    return Fault(Kind.AGENT_LOST, f"the agent on host {host} is lost: {why}", host)


def _last_line(traceback: str) -> str:
    return traceback.splitlines()[-1] if traceback else ""


def _shortened(line: str, most: int = 200) -> str:
    return line if len(line) <= most else line[: most - 3] + "..."


@dataclass(frozen=True)
class Verdict:
    """Whether to start again."""

    retry: bool
    delay_s: float = 0.0
    reason: str = ""
    """Why not, where `retry` is false."""


class RetryBudget:
    """Decides after each fault whether the run is started again.

    There is one budget for lost nodes and one for all that ranks do. `max_failures` restarts of each are free until a
    newer checkpoint is there, which makes both fresh. The first is immediate, the next wait 1, 2, 4 ... s, at most
    BACKOFF_MOST_S. Preemption costs nothing. A user's mistake is never retried, nor is an exception that struck at the
    same step before with the same traceback, nor memory that ran out before. Of a script whose step is not known,
    every fault is retried, as torchrun does.

    Args:
        max_failures: Restarts between two checkpoints.
        progress: The step of the newest checkpoint, 0 where there is none.
        reports_steps: Whether ranks report their steps.
    """

    def __init__(self, max_failures: int, progress: Callable[[], int], reports_steps: bool = True) -> None:
        self._max_failures = max_failures
        self._progress = progress
        self._reports_steps = reports_steps
        self._saved_step = progress()
        self._failures: Counter[str] = Counter()
        self._seen: set[tuple[int | None, str]] = set()

    def judge(self, fault: Fault) -> Verdict:
        """Count a fault and say what to do."""
        if fault.kind is Kind.USER:
            return Verdict(False, reason="a retry would not repair it")
        if fault.kind is Kind.PREEMPTED:
            return Verdict(True)
        signature = fault.signature() if self._reports_steps else None
        if signature is not None:
            if signature in self._seen:
                twice = "memory ran out twice" if signature[0] is None else "the same exception was raised twice"
                return Verdict(False, reason=f"{twice} at step {fault.step}")
            self._seen.add(signature)
        saved_step = self._progress()
        if saved_step > self._saved_step:
            self._saved_step = saved_step
            self._failures.clear()
        budget = "nodes lost" if fault.kind is Kind.AGENT_LOST else "failures"
        self._failures[budget] += 1
        count = self._failures[budget]
        if count > self._max_failures:
            since = " without a new checkpoint" if self._reports_steps else ""
            return Verdict(False, reason=f"{count} {budget}{since} (job.max_failures: {self._max_failures})")
        backoff_s = 0.0 if count == 1 else BACKOFF_FIRST_S * 2 ** (count - 2)
        return Verdict(True, min(backoff_s, BACKOFF_MOST_S))
