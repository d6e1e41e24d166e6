"""The trials of one slot, trained one after another on agents that stay alive between them.

Slots of this machine and slots of a cluster share this code. A trial waits only for the start of its ranks, not for a
launcher, an agent or a placement. The agents are placed again after a trial that did not finish, and after the loss
of an agent.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from bigtrain.config import UserError
from bigtrain.jobs.controller import Controller, EventWriter
from bigtrain.jobs.placing import Notice, PlacementCancelled, Placer
from bigtrain.jobs.protocol import AgentConnection, PeerLost, ProtocolError, keep_alive
from bigtrain.run import ExitCode

Say = Callable[[str], None]
LOOK_S: Final = 0.05
BETWEEN_SIGNALS_S: Final = 0.15
"""Seconds between two requests to stop, long enough for a controller to count them as two."""


@dataclass(eq=False)
class GangTrial:
    """A trial that a gang trains, with the requests to stop it."""

    config: Path
    """The trial's YAML."""
    runs_dir: Path
    log: Path
    """File to which the trial's output is appended."""
    code: int | None = None
    """Exit code of the trial; None until it has ended."""
    _asked: int = 0
    _ask: Callable[[], None] | None = None
    # Reentrant, because a signal handler may request a stop while its own thread holds the lock.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def stop(self, now: bool) -> None:
        """Ask the trial to save a checkpoint and exit; with `now`, ask it to exit at once."""
        for press in range(2 if now else 1):
            if press:
                time.sleep(BETWEEN_SIGNALS_S)
            with self._lock:
                self._asked += 1
                if self._ask is not None:
                    self._ask()

    @property
    def is_stopping(self) -> bool:
        """Whether the trial was asked to stop."""
        return self._asked > 0

    @contextlib.contextmanager
    def heard(self, controller: Controller) -> Iterator[None]:
        """Pass requests to stop on to the trial's controller, including a request that came before the controller."""
        with self._lock:
            self._ask = controller.request_stop
            if self._asked:
                self._ask()
        yield


class Gang:
    """The agents of one slot, which train its trials one after another.

    Args:
        train: A function that trains one trial and returns its exit code. It takes this gang, from which it gets its
            placer (`Gang.placer`), the trial, and the stream for output.
    """

    def __init__(self, train: Callable[[Gang, GangTrial, TextIO], int]) -> None:
        self._train_one = train
        self._placer: KeptPlacer | None = None

    def placer(self, build: Callable[[], KeptPlacer]) -> KeptPlacer:
        """The placer that keeps the agents; `build` makes it for the first trial."""
        if self._placer is None:
            self._placer = build()
        return self._placer

    def train(self, trial: GangTrial, stream: TextIO) -> int:
        """Train a trial and return its exit code. No failure of the trial ends the slot."""
        code: int = ExitCode.FAILED
        try:
            code = ExitCode.STOPPED if trial.is_stopping else self._train_one(self, trial, stream)
        except UserError as error:
            print(f"error: {error}", file=stream)
            code = error.exit_code
        except Exception:  # noqa: BLE001 - a fault of one trial is none of the next
            traceback.print_exc(file=stream)
        if self._placer is not None and code != ExitCode.FINISHED:
            self._placer.drop()
        return code

    def keep(self, seconds: float) -> None:
        """Keep the agents alive for so many seconds, while the slot waits for its next trial."""
        if self._placer is None or not self._placer.keep(seconds):
            time.sleep(seconds)

    def close(self) -> None:
        """Release the agents and their nodes."""
        if self._placer is not None:
            self._placer.close()


class KeptPlacer(Placer):
    """A placer whose agents stay alive after a run, so that the next run starts on them at once.

    Args:
        build: A function that makes the placer that starts the agents. It takes a function that prints a line and one
            that writes an event.
        placing: Lock that is held during a placement, shared by all slots that choose from the same nodes.
    """

    def __init__(self, build: Callable[[Say, EventWriter], Placer], placing: threading.Lock | None = None) -> None:
        self._say: Say = lambda line: None
        self._event: EventWriter = lambda event, /, **fields: None
        # `begin` replaces both for each run that uses the agents.
        self._inner = build(lambda line: self._say(line), lambda event, /, **fields: self._event(event, **fields))
        self.elastic = self._inner.elastic
        self._placing = placing or threading.Lock()
        self._agents: list[AgentConnection] = []
        self._fresh = False
        """Whether a run has begun that has not been placed yet."""

    def begin(self, say: Say, event: EventWriter) -> None:
        """Hand the agents to another run, which prints lines with `say` and records events with `event`."""
        self._say, self._event, self._fresh = say, event, True

    def keep(self, seconds: float) -> bool:
        """Keep the agents alive for so many seconds; without agents, return False at once."""
        if not self._agents:
            return False
        try:
            keep_alive(self._agents, seconds)
        except (PeerLost, ProtocolError):
            self._lost(self._agents)
            self.drop()
        return True

    def _lost(self, agents: list[AgentConnection]) -> None:
        """Distrust all agents, because one of them does not answer."""
        for agent in agents:
            self._inner.distrust(agent.agent)

    def drop(self) -> None:
        """Discard the agents, so that the next run is placed again."""
        self._agents = []

    def close(self) -> None:
        """Release the agents and their nodes."""
        self._agents = []
        self._inner.release()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """See `Placer.place`. The first placement of a run reuses the agents of the previous run if they all answer."""
        fresh, self._fresh = self._fresh, False
        if fresh and self.keep(0.0) and self._agents:
            if cancelled():
                raise PlacementCancelled
            self._event("placed", nodes=len(self._agents), hosts=[agent.host for agent in self._agents], kept=True)
            return self._agents
        self._agents = []
        while not self._placing.acquire(timeout=LOOK_S):
            if cancelled():
                raise PlacementCancelled
        try:
            self._agents = self._inner.place(cancelled)
        finally:
            self._placing.release()
        return self._agents

    def release(self) -> None:
        """Do nothing: the next placement ends these agents, and `close` ends the last ones."""

    def distrust(self, agent: str) -> None:
        """See `Placer.distrust`."""
        self._inner.distrust(agent)

    def exclude(self, agent: str) -> bool:
        """See `Placer.exclude`."""
        return self._inner.exclude(agent)

    def leave(self, agent: str) -> None:
        """See `Placer.leave`."""
        self._inner.leave(agent)

    def notices(self) -> list[Notice]:
        """See `Placer.notices`."""
        return self._inner.notices()

    def larger(self) -> int:
        """See `Placer.larger`."""
        return self._inner.larger()
