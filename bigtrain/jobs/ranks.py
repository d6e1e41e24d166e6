"""One rank as a process: started with torchrun's environment variables, watched, and ended with all its children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from bigtrain import variables
from bigtrain.children import module_command
from bigtrain.heartbeat import HeartbeatPage
from bigtrain.jobs.processes import bound_to_parent, is_stopped
from bigtrain.jobs.template import Template, TemplateFailed

TAIL_BYTES: Final = 1 << 16
TRACEBACK_CHARACTERS: Final = 16_000
_TRACEBACK: Final = "Traceback (most recent call last):"
_CHAIN: Final = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


@dataclass(frozen=True)
class Placement:
    """The ranks that one agent starts in one generation: the fields of the protocol's `place` message."""

    generation: int
    module: str
    arguments: list[str]
    environment: dict[str, str]
    logs: str
    limits: dict[str, float]
    first_rank: int
    procs: int
    world_size: int
    node_rank: int
    master_address: str
    master_port: int
    defaults: dict[str, str] = field(default_factory=dict)
    """Environment variables that a rank gets unless its node sets them."""

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Placement:
        """Parse a `place` message.

        Raises:
            KeyError: A field is missing.
        """
        return cls(**{name: message[name] for name in cls.__dataclass_fields__})

    def rank_environment(self, local_rank: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """All environment variables of one rank: those of the agent, without secrets, torchrun's and the run's own."""
        secret = (variables.JOB_TOKEN, variables.CONTROLLER)
        environment = {
            key: value for key, value in inherited.items() if key not in secret and not key.startswith("TORCHELASTIC_")
        }
        environment = {**self.defaults, **environment}
        # torchrun's default of 1 leaves cores idle; with PyTorch's own default, every rank would use all cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.procs)))
        environment.setdefault("PYTHONUNBUFFERED", "1")
        paths = [known["PYTHONPATH"] for known in (environment, self.environment) if known.get("PYTHONPATH")]
        environment |= self.environment
        if paths:
            # The agent's path comes first, because it contains bigtrain itself.
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment |= {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(self.node_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.procs),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }
        return environment


class RankProcess:
    """A running rank. It leads its own session, and the kernel kills it when the agent dies.

    Args:
        placement: The ranks of this machine.
        local_rank: The rank's number on this machine.
        inherited: The environment of the agent.
        template: Forks the rank if it is ready; otherwise, or if None, the rank starts as a new process.
    """

    def __init__(
        self, placement: Placement, local_rank: int, inherited: Mapping[str, str], template: Template | None = None
    ) -> None:
        self.rank = placement.first_rank + local_rank
        self.log_path = Path(placement.logs, f"rank_{self.rank}.log")
        self.page = HeartbeatPage()
        environment = placement.rank_environment(local_rank, inherited)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with open(self.log_path, "ab") as log:
                self.pid = self._start(placement, environment, log, template)
        except BaseException:
            self.page.close()
            raise
        self.exit_descriptor = self._open_exit_descriptor()

    def _start(
        self, placement: Placement, environment: dict[str, str], log: IO[bytes], template: Template | None
    ) -> int:
        descriptor = self.page.descriptor
        if template is not None and template.ready:
            with contextlib.suppress(TemplateFailed):
                return template.fork(environment, placement.arguments, log.fileno(), descriptor)
        self._process = subprocess.Popen(
            module_command(placement.module, *placement.arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment | {variables.PAGE: str(descriptor)},
            pass_fds=(descriptor,),
            start_new_session=True,
            # A preexec_fn is safe here, because the agent has one thread.
            preexec_fn=bound_to_parent(),
        )
        return self._process.pid

    def _open_exit_descriptor(self) -> int | None:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # Some sandboxes have no pidfd; then the agent sees the exit at its next poll.
            return None

    def has_exited(self) -> bool:
        """Whether the process has exited. It is not reaped, so its process id and process group are not reused."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def was_killed(self) -> bool:
        """Whether a signal from outside ended the process; SIGABRT does not count, because processes raise it."""
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return state is not None and state.si_code != os.CLD_EXITED and state.si_status != signal.SIGABRT

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by a signal, such as SIGSTOP."""
        return is_stopped(self.pid)

    def dump_stacks(self) -> None:
        """Request the rank to write its stacks and last collectives to its log; a stopped rank is continued for it."""
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the rank's process group; returns at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kill the rest of the process group, wait for the rank, and free its heartbeat page.

        Returns:
            The rank's exit code, or the negative number of the signal that ended it.
        """
        self.kill()
        if self._process is not None:
            code = self._process.wait()
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if self.exit_descriptor is not None:
            os.close(self.exit_descriptor)
        self.page.close()
        return code

    def log_size(self) -> int:
        """Current size of the rank's log in bytes."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_tail(self, start: int = 0) -> str:
        """The rank's log from byte `start` to its end, but at most the last TAIL_BYTES bytes."""
        try:
            log = open(self.log_path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:  # The run directory was removed.
            return ""
        with log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(start, end - TAIL_BYTES))
            return log.read().decode(errors="replace")


def last_traceback(text: str) -> str | None:
    """The last Python traceback in a log, with the chained exceptions before it; None if there is no traceback."""
    start = text.rfind(_TRACEBACK)
    if start < 0:
        return None
    while (before := text.rfind(_TRACEBACK, 0, start)) >= 0 and any(line in text[before:start] for line in _CHAIN):
        start = before
    return text[start:].rstrip()[-TRACEBACK_CHARACTERS:]
