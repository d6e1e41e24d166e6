"""One life of all ranks: from their start on every agent to the end of the last one."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from bigtrain.heartbeat import Control
from bigtrain.jobs.causes import (
    Fault,
    Kind,
    fault_of_early_exit,
    fault_of_exit,
    fault_of_hang,
    fault_of_lost_agent,
)
from bigtrain.jobs.protocol import AgentConnection, Message, PeerLost, ProtocolError
from bigtrain.run import ExitCode

LOOK_S: Final = 0.1
KILL_TIMEOUT_S: Final = 10.0
"""How long an agent may take to end its ranks before it counts as lost."""
EXIT_GRACE_S: Final = 10.0
"""How long ranks may go on after the first one left, unless they are saving or stopping."""

EXAMINE_S: Final = 3.5
"""How long the agents may take to report on their ranks once one rank hangs; an examination takes at most 2.5 s."""

_MAY_OUTLAST_OTHERS: Final = ("save", "stopping", "evaluation")


@dataclass(frozen=True)
class Launch:
    """What every generation of a run starts in the same way."""

    module: str
    arguments: list[str]
    procs: int
    """Ranks on each node."""
    limits: dict[str, float]
    """Seconds of silence allowed, by phase."""
    exit_grace_s: float | None = EXIT_GRACE_S
    """How long ranks may go on after the first one left cleanly; None: without limit."""
    stop_grace_s: float | None = None
    """How long ranks may take to end after a request to stop, before SIGKILL; None: as long as `limits` allow."""
    reports_steps: bool = True
    """Whether ranks report their steps and exit with bigtrain's codes; a user's own script does neither."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Variables that a rank gets unless its node sets them."""


@dataclass
class GenerationOutcome:
    """How a generation ended: by a fault, or with the exit codes of its ranks."""

    fault: Fault | None = None
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code of each rank that left by itself, cleanly."""
    step: int = 0
    """The furthest step that a rank reported."""
    killed: bool = False
    """Whether the ranks were ended by SIGKILL on request, or because they took too long to stop."""
    overdue: bool = False
    """Whether they had been asked to stop and did not end within `Launch.stop_grace_s`."""
    lost: list[str] = field(default_factory=list)
    """Agents that must be replaced."""


class Generation:
    """Starts ranks on agents and follows them until no process is left.

    Args:
        number: Which life this is, counted within the controller.
        agents: One a node, in the order of node ranks.
        launch: What to start.
        environment: What the ranks get on top of torchrun's variables.
        logs: Directory of this attempt's logs, on each node.
        stop_level: Asked all the time: 0 go on, 1 stop and save, 2 end at once.
        on_notice: Called when an agent was asked to stop by its machine.
    """

    def __init__(
        self,
        number: int,
        agents: list[AgentConnection],
        launch: Launch,
        environment: dict[str, str],
        logs: str,
        stop_level: Callable[[], int],
        on_notice: Callable[[AgentConnection], None],
    ) -> None:
        self._number = number
        self._agents = agents
        self._launch = launch
        self._environment = environment
        self._logs = logs
        self._stop_level = stop_level
        self._on_notice = on_notice
        self._outcome = GenerationOutcome()
        self._alive = set(range(len(agents)))
        self._ended: set[int] = set()
        """Nodes whose ranks have all ended; their agents are kept for the next generation."""
        self._phases: dict[int, tuple[str, float]] = {}
        self._first_exit: tuple[float, Message, int] | None = None
        self._hangs: dict[int, Message] = {}
        """What each node reports of its ranks, once one of them hangs."""
        self._overdue_at: float | None = None
        self._killed_at: float | None = None
        self._stop_sent_at: float | None = None
        self._placed = False

    def live(self) -> GenerationOutcome:
        """Run until every agent has said `ended` or is lost."""
        with selectors.DefaultSelector() as selector:
            for node, agent in enumerate(self._agents):
                selector.register(agent.channel, selectors.EVENT_READ, node)
            self._send(0, "port")
            looked_at = 0.0
            while self._alive:
                for key, _ in selector.select(LOOK_S):
                    self._hear(key.data)
                now = time.monotonic()
                # With a thousand agents something arrives all the time, and each would be looked at each time.
                if now - looked_at < LOOK_S and self._alive:
                    continue
                looked_at = now
                # An agent that hears nothing ends itself, so those whose ranks have ended are kept alive as well.
                for node in sorted(self._alive | self._ended):
                    self._keep_alive(node)
                known = self._alive | self._ended
                for key in [key for key in selector.get_map().values() if key.data not in known]:
                    selector.unregister(key.fileobj)
                self._check_hang()
                self._check_stop()
                self._check_early_exit()
                self._check_kill()
        return self._outcome

    def _send(self, node: int, type: str, **fields: Any) -> None:
        try:
            self._agents[node].channel.send(type, **fields)
        except PeerLost as error:
            self._lose(node, str(error))

    def _lose(self, node: int, why: str) -> None:
        """An agent is gone: a fault, unless all its ranks had ended before."""
        had_ended = node in self._ended
        self._drop(node)
        if had_ended:
            return
        self._fail(node, fault_of_lost_agent(self._agents[node].host, why))

    def _drop(self, node: int) -> None:
        self._alive.discard(node)
        self._ended.discard(node)
        self._outcome.lost.append(self._agents[node].agent)

    def _hear(self, node: int) -> None:
        """Handle what an agent sends; one whose connection breaks is lost, and the generation with it."""
        if node not in self._alive | self._ended:
            return
        try:
            for message in self._agents[node].channel.receive():
                self._handle(node, message)
        except (PeerLost, ProtocolError) as error:
            self._lose(node, str(error))

    def _keep_alive(self, node: int) -> None:
        try:
            self._agents[node].channel.keep_alive()
        except PeerLost as error:
            self._lose(node, str(error))

    def _handle(self, node: int, message: Message) -> None:
        kind = message["type"]
        if kind == "port":
            self._place(int(message["port"]))
        elif kind == "notice":
            self._on_notice(self._agents[node])
        elif message.get("generation") != self._number:
            return
        elif kind == "beat":
            for rank, (step, phase, _) in message["ranks"].items():
                self._phases[int(rank)] = (phase, time.monotonic())
                self._outcome.step = max(self._outcome.step, step)
        elif kind == "overdue":
            self._examine(node)
        elif kind == "hung":
            self._hangs[node] = message
            self._examine(node)
            self._check_hang()
        elif kind == "exited":
            self._on_exit(node, message)
        elif kind == "ended":
            self._alive.discard(node)
            self._ended.add(node)

    def _examine(self, first: int) -> None:
        """Have the other nodes examine their ranks: those that wait for the one that hangs are as silent as it is."""
        if self._overdue_at is not None:
            return
        self._overdue_at = time.monotonic()
        for node in sorted(self._alive - {first}):
            self._send(node, "examine", generation=self._number)

    def _check_hang(self) -> None:
        """Name the rank that hangs, once all nodes have reported or had their time."""
        if self._overdue_at is None or not self._hangs:
            return
        over = time.monotonic() - self._overdue_at > EXAMINE_S
        if not over and self._killed_at is None and not self._alive <= set(self._hangs):
            return
        node = min(self._hangs, key=lambda node: _blame(self._hangs[node]))
        fault = fault_of_hang(self._hangs[node], self._agents[node].host)
        earlier = self._outcome.fault
        if earlier is not None and earlier.kind is Kind.HANG and not self._outcome.killed:
            # A report that came after the decision may name the cause.
            self._outcome.fault = replace(fault, agent=self._agents[node].agent)
            return
        self._fail(node, fault)

    def _place(self, master_port: int) -> None:
        master = "127.0.0.1" if len(self._agents) == 1 else self._agents[0].channel.peer_address
        procs = self._launch.procs
        for node in range(len(self._agents)):
            self._send(
                node,
                "place",
                generation=self._number,
                module=self._launch.module,
                arguments=self._launch.arguments,
                environment=self._environment,
                logs=self._logs,
                limits=self._launch.limits,
                defaults=self._launch.defaults,
                first_rank=node * procs,
                procs=procs,
                world_size=len(self._agents) * procs,
                node_rank=node,
                master_address=master,
                master_port=master_port,
            )
        self._placed = True

    def _on_exit(self, node: int, message: Message) -> None:
        host = self._agents[node].host
        self._phases.pop(int(message["rank"]), None)
        self._outcome.step = max(self._outcome.step, int(message["step"]))
        if message["ended"]:
            return
        if message["code"] in (ExitCode.FINISHED, ExitCode.STOPPED):
            self._outcome.codes[int(message["rank"])] = int(message["code"])
            if self._first_exit is None:
                self._first_exit = (time.monotonic(), message, node)
            return
        fault = fault_of_exit(message, host, self._launch.reports_steps)
        may_go_on = self._launch.exit_grace_s is None and not fault.peer_gone
        if self._first_exit is not None and message["phase"] not in _MAY_OUTLAST_OTHERS and not may_go_on:
            # The others fail because their peer has left: name the one that left.
            _, first, node = self._first_exit
            fault = fault_of_early_exit(first, self._agents[node].host, fault)
        self._fail(node, fault)

    def _fail(self, node: int, fault: Fault) -> None:
        # What follows our own kill is no fault; what follows the first fault is mostly its consequence.
        earlier = self._outcome.fault
        if not self._outcome.killed and (earlier is None or fault.outranks(earlier)):
            self._outcome.fault = replace(fault, agent=self._agents[node].agent)
        self._kill()

    def _kill(self) -> None:
        if self._killed_at is not None:
            return
        self._killed_at = time.monotonic()
        for node in sorted(self._alive):
            self._send(node, "kill", generation=self._number)
        if not self._placed:
            self._alive.clear()

    def _check_stop(self) -> None:
        level = self._stop_level()
        if level >= 2 and self._killed_at is None:
            self._outcome.killed = True
            self._kill()
        elif level == 1 and self._stop_sent_at is None and self._placed:
            self._stop_sent_at = time.monotonic()
            for node in sorted(self._alive):
                self._send(node, "control", word=int(Control.STOP))
        self._check_stop_grace()

    def _check_stop_grace(self) -> None:
        grace_s = self._launch.stop_grace_s
        if grace_s is None or self._stop_sent_at is None or self._killed_at is not None:
            return
        if time.monotonic() - self._stop_sent_at > grace_s:
            self._outcome.killed = self._outcome.overdue = True
            self._kill()

    def _check_early_exit(self) -> None:
        grace_s = self._launch.exit_grace_s
        if self._first_exit is None or self._killed_at is not None or grace_s is None:
            return
        since, message, node = self._first_exit
        # A beat tells where a rank was when it came: only one from after the grace counts.
        grace_over = since + grace_s
        if any(phase not in _MAY_OUTLAST_OTHERS and seen > grace_over for phase, seen in self._phases.values()):
            self._fail(node, fault_of_early_exit(message, self._agents[node].host, None))

    def _check_kill(self) -> None:
        if self._killed_at is not None and time.monotonic() - self._killed_at > KILL_TIMEOUT_S:
            # Whatever they were to be ended for remains the cause.
            for node in sorted(self._alive):
                self._drop(node)


def _blame(hung: Message) -> tuple[bool, int, bool, float]:
    """The order of ranks that may have caused a hang: stopped, behind, unable to answer, silent for longest."""
    return not hung["stopped"], int(hung["step"]), bool(hung["answered"]), -float(hung["age_s"])
