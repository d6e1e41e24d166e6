"""The placer for a Slurm allocation: one agent on each node, started as the tasks of one job step.

`bigtrain train` runs in the batch script and holds the controller. srun passes the token to the nodes in the
environment, never in an argument list. Shortly before the time limit, Slurm sends REQUEUE_SIGNAL to the batch script
(`#SBATCH --signal=B:USR1@120`): the ranks save, and the job is requeued and resumes the run later.

Uses only the standard library, Slurm's commands srun, scontrol and sinfo, and the variables of an allocation.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bigtrain import variables
from bigtrain.children import module_command
from bigtrain.jobs.placer_kinds import PLACERS
from bigtrain.jobs.placers.local import AGENT_LOG, LocalPlacer, procs_of_node, too_many_nodes
from bigtrain.jobs.placing import PlacementCancelled, PlacementFailed, PlacementRequest, Placer, agent_environment
from bigtrain.jobs.protocol import SILENCE_S, AgentConnection, Listener, PeerLost, ProtocolError, keep_alive, new_token
from bigtrain.run import ExitCode
from bigtrain.signals import on_signals

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig
    from bigtrain.jobs.controller import Controller

REQUEUE_SIGNAL: Final = signal.SIGUSR1
"""The signal that Slurm sends to the batch script before the time limit."""
STEP_START_S: Final = 300.0
"""How long the agents may take to connect; on a node that boots from the network, the first imports are slow."""
STRAGGLER_S: Final = 30.0
"""How long the other agents may take after the first one connected, in placements after the first one."""
DONE_S: Final = 5.0
"""How long srun may take to end after the agents got `done`."""
TERMINATE_S: Final = 40.0
"""How long srun may take to end a step by force; Slurm waits 30 s for the processes of a node that does not answer."""
COMMAND_S: Final = 60.0

_OUT_OF_ORDER: Final = ("down", "fail", "boot", "pow", "unk")


class SlurmError(Exception):
    """A command of Slurm failed; the text says which and why."""


def in_allocation() -> bool:
    """Whether this process runs in a Slurm job."""
    return bool(os.environ.get("SLURM_JOB_ID"))


def allocated_nodes() -> int:
    """Number of nodes of the Slurm job."""
    text = os.environ.get("SLURM_JOB_NUM_NODES", "")
    return int(text) if text.isdigit() else 1


def hostnames() -> list[str]:
    """The nodes of the allocation, in Slurm's order.

    Raises:
        SlurmError: scontrol cannot be run, or cannot expand the node list.
    """
    return _scontrol("show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")).split()


def requeue() -> None:
    """Put this job back into the queue; Slurm ends its processes here and starts the job again later.

    Raises:
        SlurmError: Slurm refuses, for example because the job was submitted with --no-requeue.
    """
    _scontrol("requeue", os.environ["SLURM_JOB_ID"])


def requeue_and_say(run_name: str, say: Callable[[str], None]) -> None:
    """Requeue this job and print the result. A refusal by Slurm is only printed, because the run has been saved."""
    job = os.environ["SLURM_JOB_ID"]
    try:
        requeue()
    except SlurmError as error:
        say(f"{run_name}: job {job} could not be requeued ({error}); submit it again to resume")
    else:
        say(f"{run_name}: job {job} is back in the queue and resumes when it starts")


def out_of_order(names: list[str]) -> set[str]:
    """The nodes among `names` that Slurm reports as down, failing or not answering.

    Raises:
        SlurmError: sinfo cannot be run.
    """
    listing = _output("sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %t")
    states = (line.split() for line in listing.splitlines() if len(line.split()) == 2)
    return {name for name, state in states if state.endswith("*") or state.startswith(_OUT_OF_ORDER)}


def _scontrol(*arguments: str) -> str:
    return _output("scontrol", *arguments)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip() or f'exit {done.returncode}'}")
    return done.stdout


def reachable_address(others: list[str]) -> str:
    """The address of this machine from which packets to the first of the hosts `others` are sent.

    The own host name is not used, because a node's /etc/hosts may map it to a loopback address.
    """
    for name in [*others, socket.gethostname()]:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((name, 9))  # UDP: sends nothing
            return str(probe.getsockname()[0])
    return "127.0.0.1"


@PLACERS.register
class SlurmPlacer(Placer):
    """Places a run on the nodes of the Slurm allocation in which this process runs.

    If no agent comes from a node, the node is not used in later job steps. For this the allocation must be made with
    --no-kill; otherwise Slurm ends the whole job when a node fails (and, with --requeue, starts the job again).

    Args:
        sizes: Numbers of nodes that the layout allows. The placer uses the largest number that is available.
        log_path: File that receives the output of srun and the agents.
        say: Prints one line for the user.
        silence_s: Seconds without a message after which agent and controller count each other as dead.
        start_s: Seconds that the agents may take to connect.
        straggler_s: See STRAGGLER_S.
    """

    name = "slurm"

    def __init__(
        self,
        sizes: Sequence[int],
        log_path: Path,
        *,
        say: Callable[[str], None],
        silence_s: float = SILENCE_S,
        start_s: float = STEP_START_S,
        straggler_s: float = STRAGGLER_S,
    ) -> None:
        self._sizes = sorted(sizes, reverse=True)
        self._log_path = log_path
        self._say = say
        self._silence_s = silence_s
        self._start_s = start_s
        self._straggler_s = straggler_s
        self._srun: subprocess.Popen[bytes] | None = None
        self._connections: list[AgentConnection] = []
        self._lost: set[str] = set()
        self._placed = False

    @classmethod
    def of(cls, request: PlacementRequest) -> Placer:
        """See `Placer.of`. A run on one node uses `LocalPlacer`, without srun."""
        log_path = request.logs / AGENT_LOG
        return LocalPlacer(log_path) if request.job.nodes == 1 else cls(request.sizes, log_path, say=request.say)

    @classmethod
    def is_here(cls) -> bool:
        """See `Placer.is_here`."""
        return in_allocation()

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        """See `Placer.procs`."""
        there = allocated_nodes()
        if job.nodes > there:
            raise too_many_nodes(job, there, f"this Slurm job has {there}")
        return procs_of_node(job)

    @classmethod
    def run(cls, controller: Controller, run_name: str, say: Callable[[str], None]) -> int:
        """See `Placer.run`. On REQUEUE_SIGNAL the run saves and stops, and the job is requeued."""
        requeue_on = RequeueOnSignal()
        with requeue_on.listening(controller):
            code = controller.run()
        if requeue_on.asked and code == ExitCode.STOPPED:
            requeue_and_say(run_name, say)
        return code

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start one agent on each node, and wait until all have connected; see `Placer.place`.

        Node ranks follow the order of the nodes in the allocation, so the same nodes always get the same ranks.
        """
        self.release()
        try:
            return self._place(cancelled)
        except SlurmError as error:
            raise PlacementFailed(str(error)) from error

    def _place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        allocated = hostnames()
        if self._placed:
            # Slurm refuses a job step that names a node which is down.
            down = out_of_order(allocated) - self._lost
            if down:
                self._exclude(sorted(down), "Slurm reports {} as down")
        while True:
            names = self._choose([name for name in allocated if name not in self._lost])
            connections = self._step(names, cancelled)
            missing = [name for name in names if name not in connections]
            if not missing:
                self._placed = True
                self._connections = [connections[name] for name in names]
                return self._connections
            self._exclude(missing, "no agent connected from {}")
            self._connections = list(connections.values())
            self.release()

    def _choose(self, names: list[str]) -> list[str]:
        """The first of these nodes: the largest number of them that the layout allows."""
        for size in self._sizes:
            if size <= len(names):
                if self._placed and size < self._sizes[0]:
                    self._say(f"continuing with {size} of {self._sizes[0]} nodes")
                return names[:size]
        lost = f" left: {', '.join(sorted(self._lost))} lost" if self._lost else ""
        job = os.environ["SLURM_JOB_ID"]
        raise PlacementFailed(f"the run needs at least {self._sizes[-1]} nodes, but job {job} has {len(names)}{lost}")

    def _exclude(self, names: list[str], why: str) -> None:
        self._say(f"{why.format(', '.join(names))}: continuing without {'it' if len(names) == 1 else 'them'}")
        self._lost.update(names)

    def _step(self, names: list[str], cancelled: Callable[[], bool]) -> dict[str, AgentConnection]:
        """Start a job step on the nodes `names`, and wait for its agents; returns the connected ones by node name."""
        token = new_token()
        here = socket.gethostname().partition(".")[0]
        address = reachable_address([name for name in names if name.partition(".")[0] != here])
        listener = Listener(token, host=address, silence_s=self._silence_s)
        connections: dict[str, AgentConnection] = {}
        try:
            srun = self._start(names, listener.address, token)
            deadline = time.monotonic() + self._start_s
            while len(connections) < len(names) and time.monotonic() < deadline:
                if cancelled():
                    raise PlacementCancelled
                connection = listener.accept(timeout_s=0.1)
                if connection is not None:
                    connections[_node_of(connection)] = connection
                    # After an earlier placement, a late agent most likely means a lost node: wait less.
                    if self._placed:
                        deadline = min(deadline, time.monotonic() + self._straggler_s)
                elif srun.poll() is not None:
                    break
                _tend(connections)
            if not connections:
                code = srun.poll()
                how = f"srun ended with {code}" if code is not None else f"none connected within {self._start_s:.0f} s"
                raise PlacementFailed(f"no agent could be started: {how}; see {self._log_path}")
            return connections
        except BaseException:
            self._connections = list(connections.values())
            self.release()
            raise
        finally:
            listener.close()

    def _start(self, names: list[str], address: str, token: str) -> subprocess.Popen[bytes]:
        count = len(names)
        command = [
            "srun",
            f"--nodes={count}",
            f"--ntasks={count}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(names)}",
        ]
        # Each agent gets all cores and devices of its node and the environment of the batch script. The exit of an
        # agent or the loss of a node does not end the step, because the controller decides about that.
        command += ["--cpu-bind=none", "--export=ALL", "--kill-on-bad-exit=0", "--no-kill", "--wait=0"]
        # Slurm may not have removed the step of a lost node yet.
        command += ["--overlap", *module_command("bigtrain.jobs.agent")]
        environment = agent_environment(os.environ, address, token, uuid.uuid4().hex)
        environment[variables.NODE_NAME_IN] = "SLURMD_NODENAME"
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self._log_path, "ab") as log:
                self._srun = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    # Ctrl-C in the terminal must reach only the controller.
                    start_new_session=True,
                )
        except OSError as error:
            raise SlurmError(f"srun cannot be run: {error}") from error
        return self._srun

    def release(self) -> None:
        """End the job step: the agents end themselves, and Slurm kills what is left."""
        connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(PeerLost):  # The agent is gone already.
                connection.channel.send("done")
            connection.channel.close()
        srun, self._srun = self._srun, None
        if srun is None:
            return
        if not connections:
            srun.terminate()
        try:
            srun.wait(DONE_S)
        except subprocess.TimeoutExpired:
            srun.terminate()  # On SIGTERM, srun ends the step by force on every node.
            try:
                srun.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                srun.kill()
                srun.wait()


def _node_of(connection: AgentConnection) -> str:
    return connection.agent.rpartition(" ")[2]


def _tend(connections: dict[str, AgentConnection]) -> None:
    """Keep the connections alive while others are still awaited; agents that are gone are closed and removed."""
    for name, connection in list(connections.items()):
        try:
            keep_alive([connection], 0.0)
        except (PeerLost, ProtocolError):
            connection.channel.close()
            del connections[name]


class RequeueOnSignal:
    """Turns REQUEUE_SIGNAL into a request to save and stop; `asked` is True once the signal has arrived."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self, controller: Controller) -> Iterator[None]:
        """Handle the signal while the context is active."""

        def on_signal() -> None:
            self.asked = True
            controller.request_save_and_stop()

        with on_signals(on_signal, REQUEUE_SIGNAL):
            yield
