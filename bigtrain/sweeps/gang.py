"""One slot's trials, one after another, on agents that it keeps: what slots of this machine and of a cluster share.

What the next trial waits for is its ranks' start, and not that of a launcher, an agent or a placement. After a trial
that did not finish the agents are placed again, as they are where one was lost.
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
"""Long enough for a controller to take two requests for two."""


@dataclass(eq=False)
class GangTrial:
    """A trial that a gang is to train."""

    config: Path
    runs_dir: Path
    log: Path
    """Takes what it prints, after what is there."""
    code: int | None = None
    """How it ended."""
    _asked: int = 0
    _ask: Callable[[], None] | None = None
    # A signal handler may ask while this thread holds it.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def stop(self, now: bool) -> None:
        """Ask it to save itself and exit, or to end at once."""
        for press in range(2 if now else 1):
            if press:
                time.sleep(BETWEEN_SIGNALS_S)
            with self._lock:
                self._asked += 1
                if self._ask is not None:
                    self._ask()

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._asked > 0

    @contextlib.contextmanager
    def heard(self, controller: Controller) -> Iterator[None]:
        """Pass requests to stop on to its controller, also one that came before there was anybody to ask."""
        with self._lock:
            self._ask = controller.request_stop
            if self._asked:
                self._ask()
        yield


class Gang:
    """The trials of one slot.

    Args:
        train: Trains one of them by a placer that it has from `placer`, given where it prints; returns its code.
    """

    def __init__(self, train: Callable[[Gang, GangTrial, TextIO], int]) -> None:
        self._train_one = train
        self._placer: KeptPlacer | None = None

    def placer(self, build: Callable[[], KeptPlacer]) -> KeptPlacer:
        """What keeps the agents; built for the first trial."""
        if self._placer is None:
            self._placer = build()
        return self._placer

    def train(self, trial: GangTrial, stream: TextIO) -> int:
        """Train a trial; whatever ends it, the slot goes on. Returns its code."""
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
        """Wait for the next trial, keeping the agents alive."""
        if self._placer is None or not self._placer.keep(seconds):
            time.sleep(seconds)

    def close(self) -> None:
        """Give the agents back."""
        if self._placer is not None:
            self._placer.close()


class KeptPlacer(Placer):
    """A placer whose agents outlast a run: the next one starts on them at once.

    Args:
        build: Makes the placer, given what prints a line and what writes an event.
        placing: Held while nodes are looked for and taken, where others look for the same.
    """

    def __init__(self, build: Callable[[Say, EventWriter], Placer], placing: threading.Lock | None = None) -> None:
        self._say: Say = lambda line: None
        self._event: EventWriter = lambda event, /, **fields: None
        # Both change with the run that has the agents.
        self._inner = build(lambda line: self._say(line), lambda event, /, **fields: self._event(event, **fields))
        self.elastic = self._inner.elastic
        self._placing = placing or threading.Lock()
        self._agents: list[AgentConnection] = []
        self._fresh = False
        """Whether a run has begun that has no agents yet."""

    def begin(self, say: Say, event: EventWriter) -> None:
        """Another run has the agents from now on."""
        self._say, self._event, self._fresh = say, event, True

    def keep(self, seconds: float) -> bool:
        """Wait, keeping the agents alive; False, at once, where there are none."""
        if not self._agents:
            return False
        try:
            keep_alive(self._agents, seconds)
        except (PeerLost, ProtocolError):
            self._lost(self._agents)
            self.drop()
        return True

    def _lost(self, agents: list[AgentConnection]) -> None:
        """One of them does not answer."""
        for agent in agents:
            self._inner.distrust(agent.agent)

    def drop(self) -> None:
        """Place anew for the next run."""
        self._agents = []

    def close(self) -> None:
        """Give the nodes back."""
        self._agents = []
        self._inner.release()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """The agents of the run before, where they live and this run has lost none; see `Placer.place`."""
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
        """Nothing: the next placement ends this one, and `close` the last."""

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
