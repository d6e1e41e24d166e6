"""The placer for a Ray cluster: one `fit()` of Ray Train is one placement of fixed size, with one agent on each node.

The placer chooses the nodes among those that are alive and free, and requests each one from Ray by its id. So `fit()`
waits for a placement group only if one of the nodes is lost meanwhile. `fit()` runs in a thread, without Ray Train's
own retries. Its workers only hold their nodes: each worker starts a node agent as a separate process, which connects
to the controller, and ends when the agent ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bigtrain.jobs.nodes import Need, Node, choose, missing
from bigtrain.jobs.placer_kinds import PLACERS
from bigtrain.jobs.placers.ray.fit import END_S, LOOK_S, Fit, Order, Secret, ended, failure
from bigtrain.jobs.placers.ray.watch import ClusterWatch, View, look
from bigtrain.jobs.placing import (
    Notice,
    PlacementCancelled,
    PlacementFailed,
    PlacementRefused,
    PlacementRequest,
    Placer,
)
from bigtrain.jobs.processes import allow_descriptors
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

PATIENCE_FIRST_S: Final = 30.0
"""How long the first placement waits for all nodes before it uses fewer; a cluster's nodes start one by one."""
PATIENCE_S: Final = 4.0
"""The same for later placements: long enough for a live node, whose agent was killed, to prove that it is alive."""
NEVER_S: Final = 20.0
"""How long the first placement waits for a cluster without autoscaler to grow, if the run cannot fit on it."""
FIT_S: Final = 180.0
"""How long a `fit()` may take until all agents have connected; on two cores, idle and busy, it took 6 to 50 s."""
SAY_AFTER_S: Final = 1.0
"""How long nodes must be missing before this is printed; the last placement's nodes take a moment to become free."""
FIT_TRIES: Final = 3
SPARE_DESCRIPTORS: Final = 1024
"""Number of open files reserved for Ray in the driver, in addition to one connection to each agent."""


@PLACERS.register
class RayPlacer(Placer):
    """Places a run on the Ray cluster that this process is connected to.

    Args:
        job: The run's `job` section.
        logs: The run's log directory, which all nodes must share; an agent's output goes to agent_HOST_NODE.log.
        say: Prints one line for the user.
        silence_s: Seconds without a message after which agent and controller count each other as dead.
        procs: Ranks on each node; by default `cluster_procs(job)`.
        sizes: Numbers of nodes that the layout allows; by default all from `min_nodes` to `nodes`.
        paths: Files and directories that each node must be able to read before ranks are started.
        on_event: Writes the events `waiting` and `placed` to the run's events.jsonl.
    """

    name = "ray"
    elastic = True

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
        self._procs = cluster_procs(job) if procs is None else procs
        self._gpus = _gpus_of_a_node(job) > 0
        each = {"GPU": float(self._procs)} if self._gpus else {}
        each["CPU"] = float(self._procs)
        legal = range(job.least_nodes, job.nodes + 1) if sizes is None else sizes
        self._need = Need(tuple(sorted(legal, reverse=True)), each, job.labels, job.topology)
        self._logs = logs.absolute()
        self._say = say
        self._event = on_event or (lambda event, /, **fields: None)
        self._silence_s = silence_s
        self._paths = tuple(str(path) for path in (self._logs, *paths))
        self._watch = ClusterWatch()
        self._nodes: list[str] = []
        """Names of the last placement's nodes, in the order of node ranks."""
        self._hosts: dict[str, str] = {}
        self._connections: list[AgentConnection] = []
        self._fit: Fit | None = None
        self._broken = False
        self._excluded: set[str] = set()
        self._leaving: set[str] = set()
        self._asked_autoscaler = False

    @classmethod
    def of(cls, request: PlacementRequest) -> RayPlacer:
        """See `Placer.of`. This process must be connected to the cluster."""
        return cls(
            request.job,
            logs=request.logs,
            say=request.say,
            procs=request.procs,
            sizes=request.sizes,
            paths=request.paths,
            on_event=request.on_event,
        )

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        """See `Placer.procs`."""
        return cluster_procs(job)

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Wait for nodes, and start an agent on each; see `Placer.place`."""
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
            self._broken = False  # Only an earlier try was broken.
            self._nodes = [node.name for node in nodes]
            self._hosts = {node.name: node.host for node in nodes}
            self._event("placed", nodes=len(nodes), hosts=[node.host for node in nodes])
            return self._connections
        raise PlacementFailed(reason)

    def release(self) -> None:
        """End all agents and Ray Train's actors; see `Placer.release`."""
        fit, broken = self._fit, self._broken
        self._end_placement()
        self._watch.stop()
        self._ask_autoscaler(0)
        # A broken `fit()` ends when Ray notices, or with this process: do not wait for it.
        if fit is not None and not broken:
            fit.join(END_S)

    def distrust(self, agent: str) -> None:
        """Do not use the node until a task that is sent to it has finished; see `Placer.distrust`."""
        self._broken = True
        self._watch.distrust(agent)

    def exclude(self, agent: str) -> bool:
        """Exclude a node, unless no placement is possible without it; see `Placer.exclude`."""
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
        """Do not use the node again; see `Placer.leave`."""
        self._leaving.add(agent)

    def notices(self) -> list[Notice]:
        """The nodes of this placement that Ray drains; see `Placer.notices`."""
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
        """See `Placer.larger`."""
        view = self._watch.view()
        if view is None or view.stale or len(self._nodes) >= self._need.sizes[0]:
            return 0
        avoid = self._avoided(view)
        # The nodes of the current placement are not free in Ray's view, but can be used again.
        nodes = [
            Node(node.name, node.host, node.labels, node.total, node.total) if node.name in self._nodes else node
            for node in view.nodes
        ]
        chosen = choose(nodes, self._need, self._nodes, avoid)
        return len(chosen) if chosen is not None and len(chosen) > len(self._nodes) else 0

    def _avoided(self, view: View) -> dict[str, str]:
        """Reasons why nodes must not be used now, by node name."""
        reasons = dict.fromkeys((*view.draining, *self._leaving), "is being preempted")
        reasons |= dict.fromkeys(self._watch.unproven(), "does not answer")
        return reasons | dict.fromkeys(self._excluded, "is excluded after two failures")

    def _wait_for_nodes(self, cancelled: Callable[[], bool]) -> list[Node]:
        """Wait until a placement is possible; one with fewer nodes than `job.nodes` is accepted after some time."""
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
        """The nodes to use now and an empty text, or None and a text that says what the run waits for."""
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
        """Request nodes from the autoscaler; 0 withdraws the request."""
        if bool(nodes) == self._asked_autoscaler:
            return
        from ray.autoscaler.sdk import request_resources

        # The request goes to the head node, which may be gone at the end of a run, so do not wait for it.
        threading.Thread(
            target=request_resources, kwargs={"bundles": [dict(self._need.each)] * nodes}, daemon=True
        ).start()
        self._asked_autoscaler = bool(nodes)

    def _start(self, nodes: list[Node], cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start a `fit()` on these nodes, and wait until the agent of each node has connected."""
        import ray

        token, placement = new_token(), uuid.uuid4().hex
        listener = Listener(token, host=ray.util.get_node_ip_address(), silence_s=self._silence_s)
        order = Order(listener.address, Secret(token), placement, str(self._logs), self._paths, self._silence_s)
        connected: dict[str, AgentConnection] = {}
        fit = self._fit = Fit(order, nodes, self._need, self._gpus)
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
                    raise failure(fit.error, nodes)
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
                raise ended(fit, nodes, error, cancelled) from error
            raise
        finally:
            listener.close()
        return [connected[node.name] for node in nodes]

    def _gone(self, nodes: list[Node]) -> list[Node]:
        """The nodes that are no longer in the cluster; a `fit()` would wait for them."""
        view = self._watch.view()
        if view is None or view.stale:
            return []
        living = {node.name for node in view.nodes}
        return [node for node in nodes if node.name not in living]

    def _end_placement(self) -> None:
        """End the agents; if one was lost, close the connections without `done`, so that `fit()` fails at once."""
        connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(PeerLost):  # The agent is gone already.
                if not self._broken:
                    connection.channel.send("done")
            connection.channel.close()
        self._broken = False
        self._fit = None


def _named(nodes: Sequence[Node]) -> str:
    return ", ".join(node.host for node in nodes)


def cluster_procs(job: JobConfig) -> int:
    """Ranks on each node of the cluster that this process is connected to.

    The number of `job`; for auto, one for each GPU, or 1 without GPUs.
    """
    return max(1, _gpus_of_a_node(job)) if job.procs_per_node == "auto" else job.procs_per_node


def _gpus_of_a_node(job: JobConfig) -> int:
    """The largest number of GPUs of a node with the job's labels, or of a node that the autoscaler can add."""
    view, need = look(), Need((1,), {}, job.labels)
    there = [node.total for node in view.nodes if need.fits(node.total, node.labels)]
    return max((int(total.get("GPU", 0)) for total in [*there, *(kind.total for kind in view.kinds or ())]), default=0)
