"""Tiny ranks without torch, run by the real launcher, agent and controller."""

from __future__ import annotations

import contextlib
import os
import shutil
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
from bigtrain.jobs.launch import run_controlled
from bigtrain.jobs.placers.local import LocalPlacer
from bigtrain.jobs.placing import Placer
from bigtrain.jobs.protocol import SILENCE_S
from bigtrain.testing.machines import Machines

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
        shutil.copy(Path(__file__).with_name("tiny_steps.py"), self.path)

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
        placer = placer or LocalPlacer(self.path / "logs" / "agent.log", options.pop("silence_s", SILENCE_S))
        return run_controlled(self.path, placer, **options)

    def start(self, nproc: int = 2) -> subprocess.Popen[bytes]:
        """Run it by a controller in a process of its own."""
        script = (
            "import sys; from pathlib import Path\n"
            "from bigtrain.jobs.launch import run_controlled\n"
            "from bigtrain.jobs.config import JobConfig\n"
            "from bigtrain.jobs.placers.local import LocalPlacer\n"
            "run = Path(sys.argv[1])\n"
            "sys.exit(run_controlled(run, LocalPlacer(run / 'logs/agent.log'),\n"
            "    nproc=int(sys.argv[2]), job=JobConfig(), rank_module='tiny_rank',\n"
            "    event=lambda name, /, **fields: None))\n"
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


def _descriptors() -> set[tuple[str, str]]:
    """Number and target of each open descriptor; pipes and sockets have targets of their own."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            found.add((entry.name, os.readlink(entry.path)))
    # The one that lists them has whichever number is free.
    return {(number, target) for number, target in found if target != f"/proc/{os.getpid()}/fd"}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A run whose every process, descriptor and temporary file must be gone at the end of the test."""
    job = Job(tmp_path / "tiny")
    job.path.mkdir()
    before = _descriptors()
    yield job
    assert job.processes() == []
    # By what they lead to: those of an earlier test may be collected as garbage meanwhile.
    left = _descriptors() - before
    assert not left
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


@pytest.fixture
def machines(job: Job) -> Callable[..., Machines]:
    """Makes the placer whose nodes are agents of this machine."""
    return lambda names, sizes, **options: Machines(names, sizes, job.path / "logs", **options)
