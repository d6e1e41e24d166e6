"""The cause of a failure in one line, and the retry budget, which decides whether the run is restarted."""

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
"""Matches the last line of the exceptions that gloo, NCCL and the store raise when another rank is gone."""


class Kind(enum.Enum):
    """What ended a generation; the retry budget decides by it."""

    USER = "user"
    """A rank exited with code 2: a user error, which a retry does not fix."""
    EXCEPTION = "exception"
    SIGNAL = "signal"
    HANG = "hang"
    EARLY_EXIT = "early exit"
    AGENT_LOST = "agent lost"
    PREEMPTED = "preempted"
    """A node was lost after a notice that it would be taken away; this does not count as a failure of the run."""


@dataclass(frozen=True)
class Fault:
    """The first failure of a generation."""

    kind: Kind
    cause: str
    """One line that names the rank, host, phase and step."""
    host: str
    rank: int | None = None
    step: int | None = None
    traceback: str | None = None
    tail: str = ""
    """The end of the rank's log; for a hang, the stacks of the rank's threads."""
    silent_s: float | None = None
    """For a hang: seconds since the rank's last heartbeat, when the hang was detected."""
    agent: str = ""
    """Name of the node, as the placer gave it."""

    def outranks(self, earlier: Fault) -> bool:
        """Whether this fault is more likely the root cause than `earlier`, although it was reported later.

        Ranks that lose a peer raise at once. The fault that ended the peer may be reported later, by the peer's node.
        """
        return self._weight() > earlier._weight()

    @property
    def peer_gone(self) -> bool:
        """Whether this fault is an exception that reports the loss of another rank."""
        last = (self.traceback or "").rstrip().rpartition("\n")[2]
        return self.kind is Kind.EXCEPTION and _PEER_GONE.search(last) is not None

    def _weight(self) -> int:
        if self.kind is not Kind.EXCEPTION:
            return 2
        return 0 if self.peer_gone else 1

    def signature(self) -> tuple[int | None, str] | None:
        """A key that is equal if the same exception is raised again at the same step; None if there is no such key.

        Numbers and addresses in the traceback are ignored, because ports, times and pointers differ in each attempt.
        All out-of-memory errors have the same key, at any step. There is no key without a traceback. There is none
        for the loss of a peer either, which is not this rank's fault, nor for a port that another process uses,
        since the next attempt uses another port.
        """
        if self.traceback is None or self._weight() == 0 or _PORT_TAKEN.search(_last_line(self.traceback)):
            return None
        if _OUT_OF_MEMORY.search(_last_line(self.traceback)):
            return None, ""
        return self.step, re.sub(r"0x[0-9a-fA-F]+|\d+", "#", self.traceback)


def fault_of_exit(message: Mapping[str, Any], host: str, reports_steps: bool = True) -> Fault:
    """The fault that an `exited` message of the protocol reports.

    Args:
        message: The message.
        host: Host name of the rank's node.
        reports_steps: Whether the rank reports its step and exits with bigtrain's exit codes.
    """
    rank, step, phase = int(message["rank"]), int(message["step"]), str(message["phase"])
    traceback, tail = message["traceback"], str(message["tail"])
    place = f" at step {step}" if phase == "step" else f" at step {step}, in phase {phase}"
    if not reports_steps:
        place = ""
    if message["signal"] is not None:
        kind, what = Kind.SIGNAL, f"was killed by {signal_name(int(message['signal']))}"
    elif message["code"] == ExitCode.USER and reports_steps:
        kind, what = Kind.USER, "refused its config or data (exit code 2)"
    else:
        kind, what = Kind.EXCEPTION, f"exited with {message['code']}"
        # A rank that knows what is wrong prints one line that starts with "error: ", without a traceback.
        own_lines = [line for line in tail.splitlines() if line.startswith("error: ")]
        if traceback:
            last = _last_line(traceback)
            what = f"raised {_shortened(last)}"
            if _OUT_OF_MEMORY.search(last):
                what = f"ran out of memory ({_LESS_MEMORY}): {_shortened(last)}"
            elif _PORT_TAKEN.search(last):
                what = f"could not listen on its port, which is in use: {_shortened(last)}"
        elif own_lines and reports_steps:
            what, traceback = f"reported: {_shortened(own_lines[-1].removeprefix('error: '))}", own_lines[-1]
    return Fault(kind, f"rank {rank} on host {host} {what}{place}", host, rank, step, traceback, tail)


def fault_of_hang(message: Mapping[str, Any], host: str) -> Fault:
    """The fault that a `hung` message of the protocol reports."""
    rank, step = int(message["rank"]), int(message["step"])
    state = ", its process is stopped" if message["stopped"] else ""
    cause = (
        f"rank {rank} on host {host} hangs in phase {message['phase']} at step {step}: no heartbeat for "
        f"{message['age_s']:.0f} s (limit {message['limit_s']:g} s{state})"
    )
    silent_s = round(float(message["age_s"]), 3)
    return Fault(Kind.HANG, cause, host, rank, step, None, str(message["stacks"]), silent_s=silent_s)


def fault_of_early_exit(exited: Mapping[str, Any], host: str, then: Fault | None) -> Fault:
    """The fault of a rank that exited cleanly while other ranks still had work to do.

    Args:
        exited: The rank's `exited` message.
        host: Host name of the rank's node.
        then: The fault of another rank that followed from the exit, if there is one.
    """
    rank, step = int(exited["rank"]), int(exited["step"])
    cause = f"rank {rank} on host {host} exited with {exited['code']} at step {step} while other ranks continued"
    if then is None:
        return Fault(Kind.EARLY_EXIT, cause, host, rank, step, None, str(exited["tail"]))
    return Fault(Kind.EARLY_EXIT, f"{cause} ({then.cause})", host, rank, step, then.traceback, then.tail)


def fault_of_lost_agent(host: str, why: str) -> Fault:
    """The fault of an agent that died or went silent; its ranks are lost too.

    Args:
        host: Host name of the agent's node.
        why: How the controller noticed the loss.
    """
    return Fault(Kind.AGENT_LOST, f"the agent on host {host} is lost: {why}", host)


def _last_line(traceback: str) -> str:
    return traceback.splitlines()[-1] if traceback else ""


def _shortened(line: str, most: int = 200) -> str:
    return line if len(line) <= most else line[: most - 3] + "..."


@dataclass(frozen=True)
class Verdict:
    """The decision whether to restart a run after a fault."""

    retry: bool
    delay_s: float = 0.0
    """Seconds to wait before the restart."""
    reason: str = ""
    """If `retry` is false: why the run is not restarted."""


class RetryBudget:
    """Decides after each fault whether the run is restarted.

    There is one budget for lost nodes and one for failures of ranks. Each allows `max_failures` restarts; a new
    checkpoint resets both. The first restart is immediate; the next ones wait 1, 2, 4, ... s, at most BACKOFF_MOST_S.
    A preemption does not count against a budget. Not retried are user errors, an exception that was raised before at
    the same step with the same traceback, and a second out-of-memory error. For a user's own script, whose step is
    not known, every fault is retried within the budget, as torchrun does.

    Args:
        max_failures: Number of restarts allowed between two checkpoints.
        progress: Returns the step of the newest checkpoint, or 0 if there is none.
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
        """Count a fault, and decide whether to restart the run."""
        if fault.kind is Kind.USER:
            return Verdict(False, reason="a retry would fail in the same way")
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
