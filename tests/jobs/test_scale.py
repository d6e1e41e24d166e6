"""The controller with a thousand agents: real clients of the protocol on real sockets; their ranks do not exist."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.controller import Controller
from bigtrain.jobs.generation import Launch
from bigtrain.jobs.placing import PlacementFailed, Placer, agent_environment
from bigtrain.jobs.processes import allow_descriptors
from bigtrain.jobs.protocol import AgentConnection, Listener, keep_alive, new_token

HERE = Path(__file__).resolve().parent
AGENTS = 1000
HALTING = 100
"""Agents that answer late each time."""
PLACED_S = 10.0
SEEN_S = 2.0
IDLE_SHARE = 0.2
WATCHED_S = 5.0


class Crowd(Placer):
    """A placer of agents that live in one process."""

    def __init__(self, count: int, log: Path) -> None:
        self.count = count
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.agents: list[AgentConnection] = []
        self.began = self.connected = 0.0
        """When the first agent had greeted, and the last."""
        self.placed = 0

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        if self.placed:
            raise PlacementFailed("once is enough")
        token = new_token()
        listener = Listener(token)
        environment = agent_environment(os.environ, listener.address, token, "crowd")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "crowd.py"), str(self.count), str(HALTING)],
                env=environment,
                stdin=subprocess.PIPE,
                stderr=log,
            )
        connected: dict[str, AgentConnection] = {}
        spoke = time.monotonic()
        while len(connected) < self.count:
            connection = listener.accept(timeout_s=60)
            assert connection is not None
            if not connected:
                self.began = time.monotonic()
            connected[connection.agent] = connection
            if time.monotonic() - spoke > 0.5:
                keep_alive(list(connected.values()), 0.0)
                spoke = time.monotonic()
        self.connected = time.monotonic()
        listener.close()
        self.placed += 1
        self.agents = [connected[name] for name in sorted(connected)]
        return self.agents

    def tell(self, line: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def release(self) -> None:
        for agent in self.agents:
            agent.channel.close()
        self.agents = []
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture
def many_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_descriptors(2 * AGENTS)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "garble", "lose"])
def test_a_thousand_agents_are_placed_watched_and_one_lost_is_seen(
    fault: str, tmp_path: Path, pace: Any, many_files: None
) -> None:
    events: list[dict[str, Any]] = []
    crowd = Crowd(AGENTS, tmp_path / "crowd.log")
    controller = Controller(
        tmp_path,
        crowd,
        JobConfig(nodes=AGENTS, max_failures=0),
        "crowd",
        lambda event, /, **fields: events.append({"event": event, "monotonic": time.monotonic(), **fields}),
        say=lambda line: None,
        launch=Launch("no_module", [], 8, dict.fromkeys(("start", "step", "save"), 60.0)),
    )
    shares, lost_at = [], []

    def watch() -> None:
        while not crowd.placed:
            time.sleep(0.05)
        time.sleep(1.0)  # The messages of the start are through.
        if fault == "die":  # Until then all are alike, and to watch one of them is enough.
            cpu, wall = time.process_time(), time.monotonic()
            time.sleep(WATCHED_S)
            shares.append((time.process_time() - cpu) / (time.monotonic() - wall))
        lost_at.append(time.monotonic())
        crowd.tell(f"{fault} {AGENTS // 2}")

    # In the controller's process, so that its time is the controller's but for a few sleeps.
    watcher = threading.Thread(target=watch)
    watcher.start()
    assert controller.run() == 1
    watcher.join()
    [lost] = [event for event in events if event["event"] == "fault"]
    print(f"{AGENTS} agents connected within {crowd.connected - crowd.began:.2f} s of the first")
    print(f"an idle controller of them takes {[f'{share:.1%}' for share in shares]} of a core")
    print(f"{fault}: seen and all ended {lost['monotonic'] - lost_at[0]:.2f} s after")
    assert crowd.placed == 1
    assert pace.between(crowd.began, crowd.connected) < PLACED_S
    assert "agent on host" in lost["cause"]
    if fault == "die":
        assert shares[0] < IDLE_SHARE
        assert pace.between(lost_at[0], lost["monotonic"]) < SEEN_S
    else:
        # The next frame is a beat, up to a second later; a missing one shows in the one after it.
        assert pace.between(lost_at[0], lost["monotonic"]) < SEEN_S + 2.0
