"""The placer for this machine: starts one agent as a child process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bigtrain.children import module_command
from bigtrain.config import UserError
from bigtrain.jobs.devices import visible_gpus
from bigtrain.jobs.placer_kinds import PLACERS
from bigtrain.jobs.placing import PlacementCancelled, PlacementFailed, PlacementRequest, Placer, agent_environment
from bigtrain.jobs.processes import end_marked, is_stopped
from bigtrain.jobs.protocol import SILENCE_S, AgentConnection, Listener, PeerLost, new_token

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig

AGENT_LOG: Final = "agent.log"
"""File in the log directory with the output of agents."""
AGENT_START_S: Final = 60.0
"""How long an agent may take to connect; on an idle machine it takes 0.1 s."""
DONE_S: Final = 2.0
"""How long an agent may take to exit after the message `done`."""


@PLACERS.register
class LocalPlacer(Placer):
    """Places a run on this machine.

    Args:
        log_path: File that receives the agent's output.
        silence_s: Seconds without a message after which agent and controller count each other as dead.
    """

    name = "local"

    def __init__(self, log_path: Path, silence_s: float = SILENCE_S) -> None:
        self._log_path = log_path
        self._silence_s = silence_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: AgentConnection | None = None
        self._mark = ""

    @classmethod
    def of(cls, request: PlacementRequest) -> LocalPlacer:
        """See `Placer.of`."""
        return cls(request.logs / AGENT_LOG)

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        """See `Placer.procs`; the default is one rank for each GPU, or 1 without GPUs."""
        if job.nodes > 1:
            raise too_many_nodes(job, 1, "this is one machine")
        return procs_of_node(job)

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start the agent and wait for it to connect; see `Placer.place`."""
        self.release()
        token = new_token()
        listener = Listener(token, silence_s=self._silence_s)
        try:
            process = self._start(listener.address, token)
            deadline = time.monotonic() + AGENT_START_S
            while time.monotonic() < deadline:
                if cancelled():
                    raise PlacementCancelled
                connection = listener.accept(timeout_s=0.1)
                if connection is not None:
                    self._connection = connection
                    return [connection]
                if process.poll() is not None:
                    raise PlacementFailed(
                        f"the agent exited with {process.returncode} before it connected; see {self._log_path}"
                    )
            raise PlacementFailed(f"the agent did not connect within {AGENT_START_S:.0f} s")
        except BaseException:
            self.release()
            raise
        finally:
            listener.close()

    def release(self) -> None:
        """End the agent and everything that it started, even if the agent no longer answers."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(PeerLost):  # The agent is gone already.
                connection.channel.send("done")
            connection.channel.close()
        if process is None:
            return
        if connection is None or is_stopped(process.pid):
            process.kill()
        try:
            process.wait(DONE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end_marked(self._mark)

    def _start(self, address: str, token: str) -> subprocess.Popen[bytes]:
        self._mark = uuid.uuid4().hex
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                module_command("bigtrain.jobs.agent"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=agent_environment(os.environ, address, token, self._mark),
                # Ctrl-C in the terminal must reach only the controller.
                start_new_session=True,
            )
        return self._process


def procs_of_node(job: JobConfig) -> int:
    """Ranks on each node: the number of `job`; for auto, one for each GPU of this machine, or 1 without GPUs."""
    return max(1, visible_gpus()) if job.procs_per_node == "auto" else job.procs_per_node


def too_many_nodes(job: JobConfig, there: int, place: str) -> UserError:
    """The error for a job that needs more nodes than there are.

    Args:
        job: The `job` section.
        there: Number of nodes that there are.
        place: A clause that says so, such as "this Slurm job has 3".
    """
    return UserError(
        f"job.nodes is {job.nodes}, but {place}",
        where="job.nodes",
        fix=f"Set job.nodes to {there}; or start the run in a job with {job.nodes} nodes, of "
        f"`sbatch --nodes {job.nodes}` (launch/slurm.sbatch) or on a Ray cluster.",
    )
