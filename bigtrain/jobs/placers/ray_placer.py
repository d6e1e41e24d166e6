"""The placer for a Ray cluster: one Ray Train `fit()` is one placement of a fixed size, one agent a node.

The nodes are chosen here, among those that are alive and free, and named to Ray one by one; so `fit()` waits for a
placement group only where one of them is lost meanwhile. It runs in a thread, without retries of its own. Its workers
do nothing but hold their node: each starts a node agent as a process of its own, which connects back to the controller,
and ends with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bigtrain import variables
from bigtrain.children import module_command
from bigtrain.jobs.placers.nodes import Need, Node, choose, missing
from bigtrain.jobs.placers.placer import (
    Notice,
    PlacementCancelled,
    PlacementFailed,
    PlacementRefused,
    agent_environment,
)
from bigtrain.jobs.placers.ray_cluster import ClusterWatch, View, look
from bigtrain.jobs.processes import allow_descriptors, end_marked, is_stopped
from bigtrain.jobs.protocol import (
    SILENCE_S,
    AgentConnection,
    Listener,
    PeerLost,
    ProtocolError,
    keep_alive,
    new_token,
)

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig

LOOK_S: Final = 0.1
PATIENCE_FIRST_S: Final = 30.0
"""How long the first placement waits for all its nodes before it takes fewer; a cluster's nodes come up one by one."""
PATIENCE_S: Final = 4.0
"""The same for later placements: long enough for a node whose agent alone was killed to show that it lives."""
NEVER_S: Final = 20.0
"""How long a cluster that could not carry the run may take to grow, before the first placement."""
FIT_S: Final = 180.0
"""How long a `fit()` may take until its agents have connected; on two cores, idle and busy, it took 6 to 50 s."""
SAY_AFTER_S: Final = 1.0
"""How long something must be missing before it is said: the last placement's nodes are free only after a moment."""
FIT_TRIES: Final = 3
SPARE_DESCRIPTORS: Final = 1024
"""Open files of a driver besides one connection to each agent: Ray's."""
END_S: Final = 10.0
"""How long a `fit()` may take to end after its agents; nothing waits for it but the end of the run."""
SEEN_S: Final = 5.0
"""How long a shared directory may take to show a new file on another node."""

_NOT_THERE: Final = "bigtrain: this node does not see "
_TRAIN_SETTINGS: Final = {
    # As it is, a lost worker is looked for every 2 s, and one that is silent for 10 minutes.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # The controller reads drains itself, and no worker reports anything.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The agent's working directory is the job's.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class _Order:
    """What each worker of a placement is told; `repr` shows no token, because Ray prints what fails."""

    address: str
    secret: _Secret
    placement: str
    logs: str
    paths: tuple[str, ...]
    silence_s: float


class _Secret:
    """A text that does not print itself."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return "_Secret(...)"


class RayPlacer:
    """Places a run on the Ray cluster that this process is connected to.

    Args:
        job: How many nodes, with which labels.
        logs: The run's directory of logs, which all nodes must share; an agent's own words go to agent_HOST_NODE.log.
        say: Prints one line for a person.
        silence_s: How long agent and controller wait for a word from each other.
        procs: Ranks on each node; by default as `job` says (see `cluster_procs`).
        sizes: Numbers of nodes at which the run can be laid out; by default all from `min_nodes` to `nodes`.
        paths: Files and directories that each node must see before ranks are started.
        on_event: Writes `waiting` and `placed` into the run's record.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        logs: Path,
        say: Callable[[str], None],
        silence_s: float = SILENCE_S,
        procs: int | None = None,
        sizes: Sequence[int] | None = None,
        paths: Sequence[Path] = (),
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self.procs = cluster_procs(job) if procs is None else procs
        self._gpus = _gpus_of_a_node(job) > 0
        each = {"GPU": float(self.procs)} if self._gpus else {}
        each["CPU"] = float(self.procs)
        legal = range(job.least_nodes, job.nodes + 1) if sizes is None else sizes
        self._need = Need(tuple(sorted(legal, reverse=True)), each, job.labels, job.topology)
        self._logs = logs.absolute()
        self._say = say
        self._event = on_event or (lambda event, /, **fields: None)
        self._silence_s = silence_s
        self._paths = tuple(str(path) for path in (self._logs, *paths))
        self._watch = ClusterWatch()
        self._nodes: list[str] = []
        """Names of the last placement's nodes, in its order."""
        self._hosts: dict[str, str] = {}
        self._connections: list[AgentConnection] = []
        self._fit: _Fit | None = None
        self._broken = False
        self._excluded: set[str] = set()
        self._leaving: set[str] = set()
        self._asked_autoscaler = False

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Wait for nodes, start an agent on each; see `Placer.place`."""
        self._end_placement()
        self._watch.start()
        self._logs.mkdir(parents=True, exist_ok=True)
        reason = ""
        for _ in range(FIT_TRIES):
            nodes = self._wait_for_nodes(cancelled)
            try:
                self._connections = self._start(nodes, cancelled)
            except PlacementRefused:
                raise
            except PlacementFailed as error:
                reason = str(error)
                self._say(f"the placement on {_named(nodes)} failed: {reason}")
                for node in nodes:
                    self.distrust(node.name)
                continue
            self._broken = False  # What came before it was.
            self._nodes = [node.name for node in nodes]
            self._hosts = {node.name: node.host for node in nodes}
            self._event("placed", nodes=len(nodes), hosts=[node.host for node in nodes])
            return self._connections
        raise PlacementFailed(reason)

    def release(self) -> None:
        """End all agents, and Ray Train's own actors; see `Placer.release`."""
        fit, broken = self._fit, self._broken
        self._end_placement()
        self._watch.stop()
        self._ask_autoscaler(0)
        # One that was broken off ends when Ray notices, or with this process.
        if fit is not None and not broken:
            fit.join(END_S)

    def distrust(self, agent: str) -> None:
        """Take the node no more until a task that is sent to it has come back."""
        self._broken = True
        self._watch.distrust(agent)

    def exclude(self, agent: str) -> bool:
        """Leave a node out, unless no placement would be possible without it."""
        view = self._watch.view()
        if view is None:
            return False
        avoid = {*self._avoided(view), agent}
        able = [node for node in view.nodes if node.name not in avoid and self._need.fits(node.total, node.labels)]
        if len(able) < self._need.sizes[-1]:
            return False
        self._excluded.add(agent)
        return True

    def leave(self, agent: str) -> None:
        """The node has said itself that it is to be taken away."""
        self._leaving.add(agent)

    def notices(self) -> list[Notice]:
        """Nodes of this placement that Ray drains."""
        view = self._watch.view()
        if view is None:
            return []
        passed = time.monotonic() - view.taken_at
        return [
            Notice(name, self._hosts[name], None if until is None else until - passed)
            for name, until in view.draining.items()
            if name in self._hosts
        ]

    def larger(self) -> int:
        """How many nodes could be had now, where that is more than there are."""
        view = self._watch.view()
        if view is None or view.stale or len(self._nodes) >= self._need.sizes[0]:
            return 0
        avoid = self._avoided(view)
        # Its own nodes are not free, because it has them.
        nodes = [
            Node(node.name, node.host, node.labels, node.total, node.total) if node.name in self._nodes else node
            for node in view.nodes
        ]
        chosen = choose(nodes, self._need, self._nodes, avoid)
        return len(chosen) if chosen is not None and len(chosen) > len(self._nodes) else 0

    def _avoided(self, view: View) -> dict[str, str]:
        """Nodes that are not to be taken now, each with the reason."""
        reasons = dict.fromkeys((*view.draining, *self._leaving), "is being taken away")
        reasons |= dict.fromkeys(self._watch.unproven(), "does not answer")
        return reasons | dict.fromkeys(self._excluded, "was left out after two failures")

    def _wait_for_nodes(self, cancelled: Callable[[], bool]) -> list[Node]:
        """Wait until a placement is possible; a smaller one than could be only after some patience."""
        first = not self._nodes
        began = time.monotonic()
        said = ""
        while True:
            if cancelled():
                raise PlacementCancelled
            waited = time.monotonic() - began
            chosen, text = self._look(first, waited)
            if chosen is not None:
                return chosen
            if text != said and waited > SAY_AFTER_S:
                said = text
                self._say(text)
                self._event("waiting", cause=text)
            time.sleep(LOOK_S)

    def _look(self, first: bool, waited_s: float) -> tuple[list[Node] | None, str]:
        """The nodes to take now, or what is waited for."""
        view = self._watch.view()
        if view is None or view.stale:
            return None, "waiting for the cluster's head to answer"
        avoid = self._avoided(view)
        chosen = choose(view.nodes, self._need, self._nodes, avoid)
        patience_s = PATIENCE_FIRST_S if first else PATIENCE_S
        if chosen is not None and (len(chosen) == self._need.sizes[0] or waited_s > patience_s):
            return chosen, ""
        self._ask_autoscaler(self._need.sizes[0] if view.kinds is not None else 0)
        lacking = missing(view.nodes, self._need, view.kinds, avoid)
        if lacking.never and first and (view.kinds is not None or waited_s > NEVER_S):
            raise PlacementRefused(f"the run can never fit: {lacking.text}")
        if chosen is not None:
            return None, f"waiting {patience_s:.0f} s for {self._need.sizes[0]} nodes, before {len(chosen)} are taken"
        return None, f"waiting: {lacking.text}"

    def _ask_autoscaler(self, nodes: int) -> None:
        """Tell the autoscaler how many nodes are wanted; 0 takes the wish back."""
        if bool(nodes) == self._asked_autoscaler:
            return
        from ray.autoscaler.sdk import request_resources

        # It goes to the head, which may be gone at the end of a run.
        threading.Thread(
            target=request_resources, kwargs={"bundles": [dict(self._need.each)] * nodes}, daemon=True
        ).start()
        self._asked_autoscaler = bool(nodes)

    def _start(self, nodes: list[Node], cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start a `fit()` on these nodes and wait until each one's agent has connected."""
        import ray

        token, placement = new_token(), uuid.uuid4().hex
        listener = Listener(token, host=ray.util.get_node_ip_address(), silence_s=self._silence_s)
        order = _Order(listener.address, _Secret(token), placement, str(self._logs), self._paths, self._silence_s)
        connected: dict[str, AgentConnection] = {}
        fit = self._fit = _Fit(order, nodes, self._need, self._gpus)
        fit.start()
        spoke = time.monotonic()
        deadline = spoke + FIT_S
        allow_descriptors(len(nodes) + SPARE_DESCRIPTORS)
        try:
            while len(connected) < len(nodes):
                if cancelled():
                    raise PlacementCancelled
                connection = listener.accept(timeout_s=LOOK_S)
                if connection is not None:
                    connection.agent = connection.agent.partition(".")[0]
                    connected[connection.agent] = connection
                if time.monotonic() - spoke > LOOK_S:
                    keep_alive(list(connected.values()), 0.0)
                    spoke = time.monotonic()
                if not fit.is_alive():
                    raise _failure(fit.error, nodes)
                if gone := self._gone(nodes):
                    raise PlacementFailed(f"{_named(gone)} was lost")
                if time.monotonic() > deadline:
                    silent = [node.host for node in nodes if node.name not in connected]
                    raise PlacementFailed(f"no agent from {', '.join(silent)} within {FIT_S:.0f} s")
        except (PlacementCancelled, PlacementFailed, PeerLost, ProtocolError) as error:
            self._broken = True
            for connection in connected.values():
                connection.channel.close()
            if isinstance(error, (PeerLost, ProtocolError)):
                raise _ended(fit, nodes, error, cancelled) from error
            raise
        finally:
            listener.close()
        return [connected[node.name] for node in nodes]

    def _gone(self, nodes: list[Node]) -> list[Node]:
        """Which of these nodes the cluster has no more; a `fit()` would wait for them."""
        view = self._watch.view()
        if view is None or view.stale:
            return []
        living = {node.name for node in view.nodes}
        return [node for node in nodes if node.name not in living]

    def _end_placement(self) -> None:
        """Let go of the agents; where one was lost, the others break the connection so that Ray Train fails at once."""
        connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(PeerLost):  # It is gone already.
                if not self._broken:
                    connection.channel.send("done")
            connection.channel.close()
        self._broken = False
        self._fit = None


class _Fit(threading.Thread):
    """One `fit()` of Ray Train in a thread; `error` is what ended it, if not its agents."""

    def __init__(self, order: _Order, nodes: list[Node], need: Need, gpus: bool) -> None:
        super().__init__(name="ray-train-fit", daemon=True)
        self._order = order
        self._nodes = nodes
        self._need = need
        self._gpus = gpus
        self.error: Exception | None = None

    def run(self) -> None:
        """Run `fit()` to its end."""
        for name, value in _TRAIN_SETTINGS.items():
            os.environ.setdefault(name, value)
        import ray
        from ray.exceptions import RayError
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        order = self._order
        # Ray Train insists on a directory for checkpoints, which it never gets. In Ray's own it goes with the session,
        # should this process be killed.
        storage = Path(ray._private.worker._global_node.get_session_dir_path(), f"bigtrain-{order.placement}")
        try:
            trainer = DataParallelTrainer(
                lambda: _hold_node(order),
                scaling_config=ScalingConfig(
                    num_workers=len(self._nodes),
                    use_gpu=self._gpus,
                    resources_per_worker=dict(self._need.each),
                    placement_strategy="STRICT_SPREAD",
                    label_selector=[
                        {ray._raylet.RAY_NODE_ID_KEY: node.name, **self._need.labels} for node in self._nodes
                    ],
                ),
                run_config=RunConfig(
                    name=order.placement,
                    storage_path=str(storage),
                    logging_config=LoggingConfig(log_level="CRITICAL"),
                    # By default Ray Train asks for ever for nodes that are gone, and starts anew what was preempted.
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                ),
            )
            trainer.fit()
        except (TrainingFailedError, RayError, RuntimeError, ValueError, OSError) as error:
            self.error = error
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def _ended(fit: _Fit, nodes: list[Node], lost: Exception, cancelled: Callable[[], bool]) -> PlacementFailed:
    """Why an agent was lost that had just connected: where one node refuses, Ray Train ends all, and then says so."""
    deadline = time.monotonic() + END_S
    while fit.is_alive() and time.monotonic() < deadline:
        if cancelled():
            raise PlacementCancelled
        time.sleep(LOOK_S)
    if fit.is_alive() or fit.error is None:
        return PlacementFailed(f"an agent was lost again at once: {lost}")
    return _failure(fit.error, nodes)


def _failure(error: Exception | None, nodes: list[Node]) -> PlacementFailed:
    """Why a `fit()` ended before its agents had connected."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        for line in str(failure).splitlines():
            if _NOT_THERE in line:
                where, _, path = line.partition(_NOT_THERE)[2].partition(": ")
                return PlacementRefused(f"host {where} does not see {path}: all nodes must share it, at this path")
    first = next(iter(failures.values()), error)
    lines = [line for line in str(first).splitlines() if line.strip()] or ["it ended without a word"]
    return PlacementFailed(lines[-1].strip())


def _named(nodes: Sequence[Node]) -> str:
    return ", ".join(node.host for node in nodes)


def _hold_node(order: _Order) -> None:
    """The function of a Ray Train worker: start this node's agent, and last as long as it.

    Raises:
        RuntimeError: A path is not there; or the agent ended otherwise than by its controller's leave, so that Ray
            Train gives the other nodes free.
    """
    import ray

    raylet = os.getppid()
    context = ray.get_runtime_context()
    host = socket.gethostname()
    _check_paths(order, host)
    mark = f"{context.get_node_id()}.{order.placement}"
    inherited = dict(os.environ)
    # Ray sets both in its workers: as many threads as all ranks together may have, and a debugger of its own.
    for name in ("OMP_NUM_THREADS", "PYTHONBREAKPOINT"):
        _restore(name, inherited)
    environment = agent_environment(inherited, order.address, order.secret.text, mark)
    # The agent ends itself with this process: a `preexec_fn` is not safe among Ray's threads.
    environment[variables.AGENT_PARENT] = str(os.getpid())
    with open(Path(order.logs, f"agent_{host}_{mark[:8]}.log"), "ab") as log:
        process = subprocess.Popen(
            module_command("bigtrain.jobs.agent"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(process, order.silence_s, raylet)
    finally:
        process.kill()
        process.wait()
        end_marked(mark)
    if os.getppid() != raylet:
        # Ray leaves the workers of a killed raylet behind, with nobody to speak to.
        os._exit(1)
    if process.returncode != 0:
        raise RuntimeError(f"the agent on {host} ended with {process.returncode}")


def _wait(process: subprocess.Popen[bytes], silence_s: float, raylet: int) -> None:
    """Wait for the agent, or for its end to be due: the raylet is gone, or the agent is stopped.

    Args:
        silence_s: One that is stopped for so long has been given up by its controller.
    """
    stopped_since: float | None = None
    while process.poll() is None and os.getppid() == raylet:
        time.sleep(LOOK_S)
        if not is_stopped(process.pid):
            stopped_since = None
        elif stopped_since is None:
            stopped_since = time.monotonic()
        elif time.monotonic() - stopped_since > silence_s:
            return


def _check_paths(order: _Order, host: str) -> None:
    deadline = time.monotonic() + SEEN_S
    for path in order.paths:
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{_NOT_THERE}{host}: {path}")
            time.sleep(LOOK_S)


def _restore(name: str, environment: dict[str, str]) -> None:
    """Give a variable that Ray has set in this worker the value that it has on the node."""
    try:
        of_node = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return
    environment.pop(name, None)
    for entry in of_node:
        key, _, value = entry.partition(b"=")
        if key == name.encode():
            environment[name] = os.fsdecode(value)


def cluster_procs(job: JobConfig) -> int:
    """Ranks on each node of the cluster that this process is connected to: as `job` says, or one a GPU, else 1."""
    return max(1, _gpus_of_a_node(job)) if job.procs_per_node == "auto" else job.procs_per_node


def _gpus_of_a_node(job: JobConfig) -> int:
    """GPUs of the node with the most that carries the job's labels, or could be brought by the autoscaler."""
    view, need = look(), Need((1,), {}, job.labels)
    there = [node.total for node in view.nodes if need.fits(node.total, node.labels)]
    return max((int(total.get("GPU", 0)) for total in [*there, *(kind.total for kind in view.kinds or ())]), default=0)
