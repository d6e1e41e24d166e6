"""Runs of tiny ranks on real Ray nodes of this machine: Ray Train places real agents, which start real processes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
START_S = 400.0
"""Far above what Ray needs (15 s on an idle machine): a busy machine is no failure."""

RANK = """
import tiny_steps
saved, world = tiny_steps.saved(run), int(os.environ["WORLD_SIZE"])
tiny_steps.go(run, page, {last}, pause_s=0.05)
"""


class RayNodes:
    """A Ray cluster on this machine with token authentication: a head that runs nothing, and nodes of two CPUs."""

    def __init__(self, count: int) -> None:
        # Ray's sockets are in it, whose paths may be 107 characters long.
        self.directory = Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))
        (self.directory / "ray").mkdir()
        token = self.directory / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(self.directory),
            "RAY_USAGE_STATS_ENABLED": "0",
            # On a busy machine a node's own agent takes its time.
            "RAY_agent_register_timeout_ms": "240000",
            "RAY_raylet_start_wait_time_s": "240",
            # Otherwise agents and ranks are the last to get a turn.
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.directory / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "ray_nodes.py"), str(self.directory), str(count), "2"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )
        try:
            self.address = self._address()
        except BaseException:
            self.end()
            raise

    def _address(self) -> str:
        deadline = time.monotonic() + START_S
        file = self.directory / "address"
        while not file.exists() or not file.read_text():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return file.read_text()

    def do(self, command: str) -> None:
        """One command of ray_nodes.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ok\n"

    def end(self) -> None:
        """Take it down and look at what is left."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait(60)
        # Ray's own agents outlive their raylet by a moment, and write.
        deadline = time.monotonic() + 30
        while self.directory.exists():
            assert time.monotonic() < deadline
            shutil.rmtree(self.directory, ignore_errors=True)
            time.sleep(0.2)


@dataclass
class Run:
    """A run by a driver in a process of its own."""

    path: Path
    nodes: RayNodes
    driver: subprocess.Popen[bytes] | None = None

    def write(self, last: str) -> None:
        """The ranks' module; `last` gives their last step from `attempt`, `world` and the step `saved`."""
        prelude = (HERE / "conftest.py").read_text().split('PRELUDE = """')[1].split('"""')[0].replace("\\\\n", "\\n")
        self.path.mkdir(exist_ok=True)
        shutil.copy(HERE / "tiny_steps.py", self.path)
        (self.path / "tiny_rank.py").write_text(prelude + RANK.format(last=last))

    def start(self, job: dict[str, Any], **environment: str) -> None:
        """Start the driver."""
        with open(self.path / "driver.log", "ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(HERE / "ray_driver.py"), str(self.path), self.nodes.address, json.dumps(job)],
                stdout=log,
                stderr=log,
                env=self.nodes.environment
                | {"PYTHONPATH": f"{self.path}:{ROOT}", "OMP_NUM_THREADS": "1"}
                | environment,
            )

    def wait(self) -> tuple[int, str]:
        """Exit code and words of the driver."""
        assert self.driver is not None
        try:
            return self.driver.wait(timeout=START_S), self.said()
        except subprocess.TimeoutExpired:
            pytest.fail(f"the driver does not end: {self.said()}\n{self.events()}")

    def said(self) -> str:
        """The words of the driver."""
        return (self.path / "driver.log").read_text()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The recorded events."""
        try:
            lines = (self.path / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if name in (None, event["event"])]

    def until(self, *names: str) -> None:
        """Wait until the ranks have written all of these files."""
        deadline = time.monotonic() + START_S
        while not all((self.path / name).exists() for name in names):
            assert self.driver is not None
            assert self.driver.poll() is None, self.said()
            assert time.monotonic() < deadline, f"{self.said()}\n{self.events()}"
            time.sleep(0.02)

    def placed(self, attempt: int, world: int) -> list[str]:
        """Where each rank of an attempt ran."""
        return [(self.path / f"node_{attempt}_{rank}").read_text() for rank in range(world)]

    def steps(self, rank: int = 0) -> list[tuple[int, int, int, float]]:
        """(attempt, step, world size, time) of each step that a rank did."""
        lines = (self.path / f"steps_{rank}").read_text().splitlines()
        return [(int(a), int(b), int(c), float(d)) for a, b, c, d in map(str.split, lines)]

    def processes(self) -> list[int]:
        """Living processes of the run: its ranks, which carry its directory, and agents of this cluster."""
        marks = (f"BIGTRAIN_RUN={self.path}".encode(), b"bigtrain.jobs.agent")
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/environ").read_bytes() + b"\0" + Path(f"/proc/{pid}/cmdline").read_bytes()
                if any(entry in marks for entry in text.split(b"\0")) and str(self.nodes.directory).encode() in text:
                    found.append(pid)
        return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Three nodes; a test that ends one adds another."""
    nodes = RayNodes(3)
    yield nodes
    nodes.end()


@pytest.fixture
def run(tmp_path: Path, nodes: RayNodes) -> Iterator[Run]:
    """A run that must leave no process behind."""
    nodes.do("ensure 3")
    run = Run(tmp_path / "tiny", nodes)
    yield run
    if run.driver is not None and run.driver.poll() is None:
        run.driver.kill()
        run.driver.wait()
    deadline = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < deadline, f"still alive: {run.processes()}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_a_killed_rank_and_a_killed_raylet_and_survivors_keep_their_place(
    run: Run, nodes: RayNodes
) -> None:
    run.write(last="20 if attempt == 2 else 10**6")
    run.start({"nodes": 2, "procs_per_node": 1})
    run.until("at_0_0", "at_1_0")
    os.kill(int((run.path / "started_0_1").read_text().split()[1]), signal.SIGKILL)
    run.until("at_0_1", "at_1_1")
    before = run.placed(1, 2)
    assert before == run.placed(0, 2), "the rank was not restarted in place"
    nodes.do(f"kill {before[1]}")
    code, said = run.wait()
    assert code == 0, said
    after = run.placed(2, 2)
    assert after[0] == before[0]
    assert after[1] != before[1]
    rank_killed, node_lost = run.events("fault")
    assert "rank 1" in rank_killed["cause"]
    assert "killed by SIGKILL" in rank_killed["cause"]
    assert "agent on host" in node_lost["cause"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_fewer_nodes_and_grows_when_one_comes_back(run: Run, nodes: RayNodes) -> None:
    run.write(last="10**6 if attempt < 2 else saved + 10")
    run.start({"nodes": 3, "min_nodes": 2, "procs_per_node": 1})
    run.until("at_0_0", "at_1_0", "at_2_0")
    first = run.placed(0, 3)
    nodes.do(f"kill {first[0]}")
    run.until("at_0_1", "at_1_1")
    assert run.placed(1, 2) == first[1:], "survivors close up in their order"
    nodes.do("ensure 3")
    code, said = run.wait()
    assert code == 0, said
    grown = run.placed(2, 3)
    assert grown[:2] == first[1:]
    [node_lost] = run.events("fault")
    assert "agent on host" in node_lost["cause"]
    after = [step for attempt, step, *_ in run.steps(0) if attempt > 0]
    assert after == list(range(1, len(after) + 1)), "no step is done twice when it grows"
    assert run.events("restarted")[-1]["cause"] == "3 nodes are available"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_drained_node_loses_no_step(run: Run, nodes: RayNodes) -> None:
    run.write(last="10**6 if attempt < 1 else saved + 10")
    run.start({"nodes": 2, "procs_per_node": 1, "max_failures": 0})
    run.until("at_0_0", "at_1_0")
    leaves = run.placed(0, 2)[1]
    nodes.do(f"drain {leaves} 20")
    code, said = run.wait()
    assert code == 0, said
    assert not run.events("fault")
    [notice] = run.events("notice")
    assert "will be preempted in" in notice["cause"]
    assert leaves not in run.placed(1, 2)
    done = [step for _, step, *_ in run.steps(0)]
    assert done == list(range(1, len(done) + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_frozen_node_is_seen_by_its_silence_and_not_taken_again(run: Run, nodes: RayNodes) -> None:
    run.write(last="10**6 if attempt < 1 else 10")
    run.start({"nodes": 2, "procs_per_node": 1}, DRIVER_SILENCE_S="3")
    run.until("at_0_0", "at_1_0")
    frozen = run.placed(0, 2)[1]
    agent = int(Path(f"/proc/{(run.path / 'started_0_1').read_text().split()[1]}/stat").read_text().split()[3])
    nodes.do(f"stop {frozen}")
    os.kill(agent, signal.SIGSTOP)
    code, said = run.wait()
    nodes.do(f"continue {frozen}")
    assert code == 0, said
    [fault] = run.events("fault")
    assert "nothing was heard" in fault["cause"]
    assert frozen not in run.placed(1, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_waits_says_for_what_and_ends_at_once_on_ctrl_c(run: Run) -> None:
    run.write(last="10**6")
    run.start({"nodes": 30, "min_nodes": 3, "procs_per_node": 1, "labels": {"rack": "7"}})
    deadline = time.monotonic() + START_S
    while not run.events("waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "labelled rack=7" in run.events("waiting")[0]["cause"]
    assert run.driver is not None
    asked = time.monotonic()
    run.driver.send_signal(signal.SIGINT)
    while not run.events("stopped"):
        assert time.monotonic() - asked < 60
        time.sleep(0.01)
    [stopped] = run.events("stopped")
    print(f"stopped {stopped['monotonic'] - asked:.2f} s after Ctrl-C")
    assert run.wait()[0] == 75


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_cluster_can_never_hold_is_refused(run: Run) -> None:
    run.write(last="10**6")
    run.start({"nodes": 2, "procs_per_node": 64})
    code, said = run.wait()
    assert code == 2, said
    assert "can never fit: the run needs 2 nodes with 64 CPU each" in said
    assert not run.events("placed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_path_that_a_node_does_not_see_is_refused_before_ranks_start(run: Run) -> None:
    run.write(last="10**6")
    run.start({"nodes": 1, "procs_per_node": 1}, DRIVER_PATHS='["/nowhere/shards"]')
    code, said = run.wait()
    assert code == 2, said
    assert "does not see /nowhere/shards" in said
    assert not (run.path / "started_0_0").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_leaves_no_process(run: Run) -> None:
    run.write(last="10**6")
    run.start({"nodes": 2, "procs_per_node": 1})
    run.until("at_0_0", "at_1_0")
    assert len(run.processes()) >= 4
    assert run.driver is not None
    run.driver.kill()
    run.driver.wait()
    deadline = time.monotonic() + 60
    while run.processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
