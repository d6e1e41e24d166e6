"""Several nodes simulated on one machine: nodes are lost, announced to leave, and return within tenths of a second.

Agents, ranks and connections are real. Only the machine, its network and its disks are shared by all nodes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bigtrain.children import module_command
from bigtrain.jobs.nodes import Need, Node, choose
from bigtrain.jobs.placing import Notice, PlacementCancelled, Placer, agent_environment
from bigtrain.jobs.protocol import SILENCE_S, AgentConnection, Listener, PeerLost, new_token


class Machines(Placer):
    """A placer whose nodes are agents on this machine, named by single letters.

    Args:
        names: The available nodes, one letter each. A test may change the attribute `there` during a run.
        sizes: Numbers of nodes on which the run may be placed.
        logs: Directory of the agents' log.
        silence_s: How long agent and controller wait for a message from each other.
    """

    name = "machines"
    elastic = True

    def __init__(self, names: str, sizes: tuple[int, ...], logs: Path, silence_s: float = SILENCE_S) -> None:
        self.there = list(names)
        self.sizes = sizes
        self.silence_s = silence_s
        self.leaving: dict[str, float | None] = {}
        self.excluded: set[str] = set()
        self.distrusted: list[str] = []
        self.placements: list[str] = []
        self.waits = 0
        self._logs = logs
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: list[AgentConnection] = []

    def pid(self, name: str) -> int:
        """Process id of a node's agent."""
        return self._agents[name].pid

    def lose(self, name: str) -> None:
        """Simulate the loss of a node: remove it and kill its agent."""
        self.there.remove(name)
        self._agents[name].kill()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start an agent for each chosen node; see `Placer.place`."""
        self.release()
        while (nodes := self._choose()) is None:
            if cancelled():
                raise PlacementCancelled
            self.waits += 1
            time.sleep(0.02)
        token = new_token()
        listener = Listener(token, silence_s=self.silence_s)
        self._logs.mkdir(parents=True, exist_ok=True)
        for name in nodes:
            with open(self._logs / "agent.log", "ab") as log:
                environment = agent_environment(os.environ, listener.address, token, f"{name}.{self._logs}")
                command = module_command("bigtrain.jobs.agent")
                self._agents[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        connected: dict[str, AgentConnection] = {}
        while len(connected) < len(nodes):
            connection = listener.accept(timeout_s=60)
            assert connection is not None
            connection.agent = connection.agent.partition(".")[0]
            connected[connection.agent] = AgentConnection(
                connection.channel, f"host-{connection.agent}", connection.pid, connection.agent
            )
        listener.close()
        self._connections = [connected[name] for name in nodes]
        self.placements.append("".join(nodes))
        return self._connections

    def release(self) -> None:
        """End all agents; see `Placer.release`."""
        for connection in self._connections:
            with contextlib.suppress(PeerLost):
                connection.channel.send("done")
            connection.channel.close()
        self._connections = []
        for process in self._agents.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._agents = {}

    def distrust(self, agent: str) -> None:
        """Record the node in `distrusted`; it stays available."""
        self.distrusted.append(agent)

    def exclude(self, agent: str) -> bool:
        """Exclude a node if enough other nodes are available, and return whether it is excluded."""
        if len(set(self.there) - self.excluded - {agent}) < min(self.sizes):
            return False
        self.excluded.add(agent)
        return True

    def leave(self, agent: str) -> None:
        """Do not choose the node again."""
        self.leaving[agent] = None

    def notices(self) -> list[Notice]:
        """Notices for the placed nodes that are in `leaving`."""
        placed = [connection.agent for connection in self._connections]
        return [Notice(name, f"host-{name}", self.leaving[name]) for name in placed if name in self.leaving]

    def larger(self) -> int:
        """Number of nodes on which the run could be placed, if it is larger than now; else 0."""
        chosen = self._choose() or []
        return len(chosen) if len(chosen) > len(self._connections) else 0

    def _choose(self) -> list[str] | None:
        nodes = [Node(name, f"host-{name}", {}, {"CPU": 1}, {"CPU": 1}) for name in self.there]
        need = Need(tuple(sorted(self.sizes, reverse=True)), {"CPU": 1})
        previous = list(self.placements[-1]) if self.placements else []
        chosen = choose(nodes, need, previous, self.excluded | set(self.leaving))
        return None if chosen is None else [node.name for node in chosen]
