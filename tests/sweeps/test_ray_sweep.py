"""Fault case 35 on a real Ray cluster of this machine: real trials on gangs that slots keep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.run import ExitCode
from bigtrain.storage import read_lines
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.results import between_trials_s
from bigtrain.sweeps.status import sweep_status
from tests.jobs.test_ray import RayNodes

pytestmark = pytest.mark.cluster

DEADLINE_S = 600.0
HUGE = {"layers": 200, "width": 65536, "heads": 512, "mlp_width": 262144}
"""1e13 parameters: no node of this decade holds them."""
SIZES: list[Any] = [
    {"params": 3000, "tokens_per_param": [4, 8]},
    {"params": 1300, "tokens_per_param": [8]},
    {"params": 6000, "tokens_per_param": [3]},
    {"params": 10_000_000_000_000, "model": HUGE, "tokens": [1000]},
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    nodes = RayNodes(2)
    yield nodes
    nodes.end()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


def processes(mark: bytes) -> list[int]:
    """Living ranks of runs whose path begins so."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(entry.startswith(b"BIGTRAIN_RUN=" + mark) for entry in environment):
            found.append(pid)
    return found


@pytest.mark.timeout(1200)
def test_six_trials_on_two_gangs_through_a_killed_rank_a_refusal_and_a_killed_driver(
    nodes: RayNodes, write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_sweep(sizes=SIZES, slots={"on": "ray", "count": 2})
    directory = SweepDirectory(tmp_path / "runs" / "tiny")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bigtrain.cli", "sweep", "run", str(path)], cwd=tmp_path, stderr=subprocess.PIPE,
            text=True, env=nodes.environment | {"RAY_ADDRESS": nodes.address},
        )  # fmt: skip

    def lines(event: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(directory.journal) if line["event"] == event]

    first = start()
    try:
        running = until(lambda: [line["trial"] for line in lines("started")][:2] or first.poll() is not None)
        assert running is not True, first.communicate()[1]
        run = directory.run(running[0])
        until(lambda: len(list(read_lines(run.metrics))) > 5)
        for pid in processes(str(run.path).encode()):
            os.kill(pid, signal.SIGKILL)
        until(lambda: [event for event in read_lines(run.events) if event["event"] == "restarted"])
        until(lambda: lines("finished"))
    finally:
        first.kill()
        first.communicate()
    assert [line["trial"] for line in lines("refused")] == ["n10T-s1337-d4"]
    finished = {line["trial"] for line in lines("finished")}
    before = len(lines("started"))
    second = start()
    try:
        _, said = second.communicate(timeout=DEADLINE_S)
    finally:
        second.kill()
    print(said)
    assert second.returncode == ExitCode.FAILED, said
    assert "n10T-s1337-d4: refused" in said
    status = sweep_status(directory)
    assert (status["finished"], status["refused"], len(status["trials"])) == (5, 1, 6)
    again = [line["trial"] for line in lines("started")[before:]]
    assert not finished & set(again)
    for trial in (row["trial"] for row in status["trials"] if row["state"] == "finished"):
        steps = [row["step"] for row in read_lines(directory.run(trial).metrics)]
        assert len(steps) == len(set(steps))
        assert len([line for line in lines("finished") if line["trial"] == trial]) == 1
    # The second driver asked Ray for two gangs, and every later trial began on one that was there.
    began = lines("started")[before]["time"]
    events = [event for trial in again for event in read_lines(directory.run(trial).events) if event["time"] > began]
    placed = [event.get("kept", False) for event in events if event["event"] == "placed"]
    assert (placed.count(False), placed.count(True)) == (2, len(again) - 2)
    assert len(between_trials_s(directory)) >= 2
    assert "between two trials on a slot" in said
    until(lambda: not processes(str(directory.path).encode()))
    assert json.loads((directory.path / "lease.json").read_text())["pid"] == 0
