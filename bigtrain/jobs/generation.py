"""A generation: one start of all ranks, from the placement on every agent to the end of the last process."""

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
"""How long ranks may continue after the first rank exited, unless they are saving, evaluating or stopping."""

EXAMINE_S: Final = 3.5
"""How long the agents may take to report on their ranks after a rank hangs; an examination takes at most 2.5 s."""

_MAY_OUTLAST_OTHERS: Final = ("save", "stopping", "evaluation")


@dataclass(frozen=True)
class Launch:
    """What the ranks run and how long they may take: the same for every generation of a run."""

    module: str
    """The module that each rank runs as `python -m`."""
    arguments: list[str]
    procs: int
    """Ranks on each node."""
    limits: dict[str, float]
    """Longest allowed time without a heartbeat in seconds, by phase."""
    exit_grace_s: float | None = EXIT_GRACE_S
    """How long ranks may continue after the first rank exited cleanly; None: no limit."""
    stop_grace_s: float | None = None
    """Time between a request to stop and SIGKILL, in seconds; None: only `limits` apply."""
    reports_steps: bool = True
    """Whether ranks report their steps and exit with bigtrain's exit codes; a user's own script does neither."""
    defaults: dict[str, str] = field(default_factory=dict)
    """Environment variables that a rank gets unless its node sets them."""


@dataclass
class GenerationOutcome:
    """How a generation ended: by a fault, or with the clean exit codes of its ranks."""

    fault: Fault | None = None
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code (0 or 75) of each rank that exited cleanly, by rank."""
    step: int = 0
    """The highest step that a rank reported."""
    killed: bool = False
    """Whether the ranks were killed because of a second request to stop, or because they took too long to stop."""
    overdue: bool = False
    """Whether the ranks did not end within `Launch.stop_grace_s` after a request to stop."""
    lost: list[str] = field(default_factory=list)
    """Names of the agents that are lost and must be replaced."""


class Generation:
    """Starts ranks on agents and watches them until no process is left.

    Args:
        number: Number of this generation, counted by the controller.
        agents: One agent for each node, in the order of node ranks.
        launch: What the ranks run.
        environment: Variables that the ranks get in addition to torchrun's variables.
        logs: Directory of this attempt's logs, on each node.
        stop_level: Called repeatedly; returns 0 to continue, 1 to save and exit, 2 to end at once.
        on_notice: Called with an agent whose machine asked it to stop.
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
        """The `hung` message of each node, by node."""
        self._overdue_at: float | None = None
        self._killed_at: float | None = None
        self._stop_sent_at: float | None = None
        self._placed = False

    def live(self) -> GenerationOutcome:
        """Run until every agent has sent `ended` or is lost."""
        with selectors.DefaultSelector() as selector:
            for node, agent in enumerate(self._agents):
                selector.register(agent.channel, selectors.EVENT_READ, node)
            self._send(0, "port")
            looked_at = 0.0
            while self._alive:
                for key, _ in selector.select(LOOK_S):
                    self._hear(key.data)
                now = time.monotonic()
                # With a thousand agents a message arrives all the time: check the agents only every LOOK_S.
                if now - looked_at < LOOK_S and self._alive:
                    continue
                looked_at = now
                # An agent that receives nothing ends itself, so agents whose ranks have ended get beats as well.
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
        """Drop an agent that is gone; this is a fault unless all its ranks had ended before."""
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
        """Handle the messages of an agent. An agent whose connection breaks is lost, which ends the generation."""
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
        """Have the other nodes examine their ranks.

        Ranks that wait for the hanging rank are as silent as that rank, so all nodes must be compared.
        """
        if self._overdue_at is not None:
            return
        self._overdue_at = time.monotonic()
        for node in sorted(self._alive - {first}):
            self._send(node, "examine", generation=self._number)

    def _check_hang(self) -> None:
        """Determine the rank that hangs, once all nodes have reported or EXAMINE_S is over."""
        if self._overdue_at is None or not self._hangs:
            return
        over = time.monotonic() - self._overdue_at > EXAMINE_S
        if not over and self._killed_at is None and not self._alive <= set(self._hangs):
            return
        node = min(self._hangs, key=lambda node: _blame(self._hangs[node]))
        fault = fault_of_hang(self._hangs[node], self._agents[node].host)
        earlier = self._outcome.fault
        if earlier is not None and earlier.kind is Kind.HANG and not self._outcome.killed:
            # A report that came after the decision may name the rank that caused the hang.
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
            # This rank failed because a peer had exited: report the rank that exited.
            _, first, node = self._first_exit
            fault = fault_of_early_exit(first, self._agents[node].host, fault)
        self._fail(node, fault)

    def _fail(self, node: int, fault: Fault) -> None:
        # Failures after a requested kill are not faults. Failures after the first fault are mostly its consequences.
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
        # A beat reports the phase at the time it was received, so only beats received after the grace time count.
        grace_over = since + grace_s
        if any(phase not in _MAY_OUTLAST_OTHERS and seen > grace_over for phase, seen in self._phases.values()):
            self._fail(node, fault_of_early_exit(message, self._agents[node].host, None))

    def _check_kill(self) -> None:
        if self._killed_at is not None and time.monotonic() - self._killed_at > KILL_TIMEOUT_S:
            # The recorded fault stays the cause.
            for node in sorted(self._alive):
                self._drop(node)


def _blame(hung: Message) -> tuple[bool, int, bool, float]:
    """Sort key for the likeliest cause of a hang: a stopped process, lowest step, no answer, longest silence."""
    return not hung["stopped"], int(hung["step"]), bool(hung["answered"]), -float(hung["age_s"])
