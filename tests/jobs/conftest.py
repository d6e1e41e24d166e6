"""Tiny ranks without torch, run by the real launcher, agent and controller."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import launch_local, run_controlled
from bigtrain.jobs.nodes import Need, Node, choose
from bigtrain.jobs.placer import Notice, PlacementCancelled, Placer, agent_environment
from bigtrain.jobs.protocol import AgentConnection, Listener, PeerLost, new_token

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from bigtrain.heartbeat import Control, Heartbeat, install_rank_signals
stop = install_rank_signals()
page = Heartbeat.from_environment()
rank, attempt = int(os.environ["RANK"]), int(os.environ["BIGTRAIN_ATTEMPT"])
run = Path(os.environ["BIGTRAIN_RUN"])

def note(name):
    (run / f"{name}_{attempt}_{rank}").write_text(f"{time.monotonic()} {os.getpid()}")

def train(steps, first=1, at=None):
    for step in range(first, first + steps):
        page.beat(step, "step")
        if at is not None:
            at(step)
        if page.control() is Control.STOP:
            page.beat(step, "stopping")
            sys.exit(75)
        time.sleep(0.02)

def publish(step):
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "LATEST").write_text(f"step_{step:08d}\\n")
note("started")
"""


@dataclass
class Job:
    """A run directory with one rank module, and what its controller said."""

    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def write_rank(self, body: str) -> None:
        """The module that each rank runs, after the prelude above."""
        (self.path / "tiny_rank.py").write_text(PRELUDE + body)

    def environment(self) -> dict[str, str]:
        """What the ranks need to find their module."""
        return {"PYTHONPATH": os.pathsep.join((str(self.path), str(ROOT)))}

    def record(self, event: str, /, **fields: Any) -> None:
        """What a controller calls for each event."""
        self.events.append({"event": event, "monotonic": time.monotonic(), **fields})

    def launch(self, nproc: int = 2, job: JobConfig | None = None, placer: Placer | None = None, **options: Any) -> int:
        """Run it in this process, by the real launcher, on this machine or where `placer` says."""
        options = {
            "nproc": nproc,
            "job": job or JobConfig(),
            "event": self.record,
            "rank_module": "tiny_rank",
            "environment": self.environment(),
            "say": self.said.append,
            **options,
        }
        if placer is not None:
            return run_controlled(self.path, placer, **options)
        return launch_local(self.path, **options)

    def start(self, nproc: int = 2) -> subprocess.Popen[bytes]:
        """Run it by a controller in a process of its own."""
        script = (
            "import sys; from pathlib import Path\n"
            "from bigtrain.jobs.launch import launch_local\n"
            "from bigtrain.jobs.config import JobConfig\n"
            "sys.exit(launch_local(Path(sys.argv[1]), nproc=int(sys.argv[2]), job=JobConfig(),\n"
            "    event=lambda name, /, **fields: None, rank_module='tiny_rank'))\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", script, str(self.path), str(nproc)], env=os.environ | self.environment()
        )

    def log(self, attempt: int, rank: int) -> str:
        """What a rank wrote."""
        return (self.path / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log").read_text()

    def noted(self, name: str, attempt: int, rank: int) -> tuple[float, int]:
        """Time and process id of a rank's note; waits for it."""
        path = self.path / f"{name}_{attempt}_{rank}"
        deadline = time.monotonic() + 60
        while not (path.exists() and (words := path.read_text().split())):
            assert time.monotonic() < deadline, f"{path.name} was not written"
            time.sleep(0.01)
        return float(words[0]), int(words[1])

    def named(self, event: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [entry for entry in self.events if entry["event"] == event]

    def processes(self) -> list[int]:
        """Living processes that carry this run in their environment: its ranks and all their children."""
        mark = f"BIGTRAIN_RUN={self.path}".encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _environment(pid)]

    def is_alive(self, pid: int) -> bool:
        """Whether a process is there and no zombie."""
        return _environment(pid) != []

    def wait_until_gone(self, timeout_s: float) -> float:
        """Seconds until no process of the run is left."""
        start = time.monotonic()
        while self.processes():
            assert time.monotonic() - start < timeout_s, f"still alive: {self.processes()}"
            time.sleep(0.02)
        return time.monotonic() - start


def _environment(pid: int) -> list[bytes]:
    try:
        return [entry for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if entry]
    except OSError:
        return []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A run whose every process, descriptor and temporary file must be gone at the end of the test."""
    job = Job(tmp_path / "tiny")
    job.path.mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield job
    assert job.processes() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert {path.name for path in (job.path / "logs").iterdir()} <= {"agent.log"} | {
        f"attempt_{number}" for number in range(9)
    }


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool], float], float]:
    """Waits until a condition holds; returns the seconds it took."""

    def wait(condition: Callable[[], bool], timeout_s: float) -> float:
        start = time.monotonic()
        while not condition():
            assert time.monotonic() - start < timeout_s, "the condition did not come true in time"
            time.sleep(0.01)
        return time.monotonic() - start

    return wait


class Pace(threading.Thread):
    """A clock that goes slower where the machine is busy: it ticks as often as a thread that sleeps is woken."""

    TICK_S = 0.005

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ticks: list[float] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(self.TICK_S):
            self._ticks.append(time.monotonic())

    def end(self) -> None:
        """Stop the clock."""
        self._ended.set()
        self.join()

    def between(self, start: float, end: float) -> float:
        """Seconds that an idle machine would have needed from `start` to `end`, both of time.monotonic, at most."""
        return self.TICK_S * sum(start < tick < end for tick in self._ticks)


@pytest.fixture
def pace() -> Iterator[Pace]:
    """A clock for what is promised in seconds, on a machine that may be busy."""
    pace = Pace()
    pace.start()
    yield pace
    pace.end()


class Machines:
    """A placer whose nodes are agents of this machine: real processes and connections, only the machines are not.

    Nodes can be lost, announced to go, and come back, in tenths of a second. Ray's nodes are in test_ray.py.
    """

    def __init__(self, names: str, sizes: tuple[int, ...], logs: Path, silence_s: float = 10.0) -> None:
        self.there = list(names)
        self.sizes = sizes
        self.silence_s = silence_s
        self.leaving: dict[str, float | None] = {}
        self.left_out: set[str] = set()
        self.distrusted: list[str] = []
        self.placements: list[str] = []
        self.waits = 0
        self._logs = logs
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: list[AgentConnection] = []

    def pid(self, name: str) -> int:
        """The agent of a node."""
        return self._agents[name].pid

    def lose(self, name: str) -> None:
        """A node dies, with all that runs on it."""
        self.there.remove(name)
        self._agents[name].kill()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
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
                command = [sys.executable, "-m", "bigtrain.jobs.agent"]
                self._agents[name] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        connected = {}
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
        self.distrusted.append(agent)

    def exclude(self, agent: str) -> bool:
        if len(set(self.there) - self.left_out - {agent}) < min(self.sizes):
            return False
        self.left_out.add(agent)
        return True

    def leave(self, agent: str) -> None:
        self.leaving[agent] = None

    def notices(self) -> list[Notice]:
        placed = [connection.agent for connection in self._connections]
        return [Notice(name, f"host-{name}", self.leaving[name]) for name in placed if name in self.leaving]

    def larger(self) -> int:
        chosen = self._choose() or []
        return len(chosen) if len(chosen) > len(self._connections) else 0

    def _choose(self) -> list[str] | None:
        nodes = [Node(name, f"host-{name}", {}, {"CPU": 1}, {"CPU": 1}) for name in self.there]
        need = Need(tuple(sorted(self.sizes, reverse=True)), {"CPU": 1})
        previous = list(self.placements[-1]) if self.placements else []
        chosen = choose(nodes, need, previous, self.left_out | set(self.leaving))
        return None if chosen is None else [node.name for node in chosen]


@pytest.fixture
def machines(job: Job) -> Callable[..., Machines]:
    """Makes the placer whose nodes are agents of this machine."""
    return lambda names, sizes, **options: Machines(names, sizes, job.path / "logs", **options)
