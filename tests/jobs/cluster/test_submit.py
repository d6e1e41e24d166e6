"""A run on a cluster, seen from a client that has only the dashboard's address and token."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster.local import ClusterRecord
from bigtrain.storage import read_lines

pytestmark = pytest.mark.timeout(900)

ENDLESS = {"duration": "100000 steps", "evaluation": {"every": "100000 steps"}, "checkpoint": {"every": "20 steps"}}


def read_until(process: Any, pattern: str) -> str:
    """What a process has printed up to the line that fits a pattern."""
    text = ""
    for line in process.stdout:
        text += line
        if re.search(pattern, line):
            return text
    raise AssertionError(f"no {pattern!r} in:\n{text}")


@pytest.mark.parametrize(("nodes", "procs"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.cluster)])
def test_a_run_outlives_its_client_and_equals_one_machine(
    nodes: int, procs: int, client: Any, blind: Any, write_config: Any, tmp_path: Path, result: Any,
    on_one_machine: Any,
) -> None:  # fmt: skip
    runs, world = tmp_path / "shared", nodes * procs
    runs.mkdir()
    name, batch = f"tiny{world}", {"size": 12}
    config = write_config(name=name, job={"nodes": nodes, "procs_per_node": procs}, batch=batch)
    away = blind(client, runs)
    following = away.start("submit", config, "--runs-dir", runs, "--follow")
    seen = read_until(following, r"^step \d+/8 ")
    following.kill()  # The laptop is closed.
    following.communicate()
    assert f"{name}: submitted as {name}-0" in seen
    assert f"{world} processes, fsdp (dp_shard {world}), fp32, from step 0" in seen

    log = away("logs", name, "-f")  # From its beginning, and on to the end of the run.
    assert log.returncode == 0, log.stderr
    assert log.stdout.startswith(f"{name}: 0.06M parameters")
    assert f"\n{name}: finished\n" in log.stdout
    assert away("logs", name, "-f", "--rank", world - 1).returncode == 0
    status = away.json("status", name)
    assert (status["state"], status["step"], status["nodes"], status["restarts"]) == ("finished", 8, nodes, 0)
    names = [event["event"] for event in away.json("events", name)["events"]]
    assert names == ["placed", "started", "saved", "saved", "finished"]
    assert status in away.json("status")["runs"]
    assert result(runs / name) == on_one_machine(world, batch=batch)


@pytest.mark.cluster
def test_a_stop_saves_and_a_resume_goes_on_where_it_was(client: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config(name="endless", job={"nodes": 2, "procs_per_node": 1}, **ENDLESS)
    waiting = client.start("submit", config, "--runs-dir", tmp_path / "runs", "--wait")
    client.wait_for("endless", lambda status: (status["step"] or 0) >= 3)
    again = client("submit", config, "--runs-dir", tmp_path / "runs")
    assert again.returncode == 2
    assert "is on the cluster already, as endless-0" in again.stderr

    stopped = client("stop", "endless")
    assert stopped.returncode == 0, stopped.stderr
    assert "endless: stopped" in stopped.stdout
    assert waiting.wait(60) == 75
    waiting.communicate()
    status = client.json("status", "endless")
    assert status["state"] == "stopped"
    saved = [event["step"] for event in client.json("events", "endless")["events"] if event["event"] == "saved"]
    assert saved[-1] == status["step"], "the last step was not saved"

    resumed = client("resume", "endless")
    assert resumed.returncode == 0, resumed.stderr
    assert "submitted as endless-1" in resumed.stderr
    client.wait_for("endless", lambda now: (now["step"] or 0) > status["step"])
    assert "stopped" in client("stop", "endless", "--now").stdout
    names = [event["event"] for event in client.json("events", "endless")["events"]]
    assert names.count("started") + names.count("resumed") == 2
    assert "resumed" in names

    kept = (tmp_path / "runs" / "endless" / "checkpoints").glob("step_????????")
    oldest = min(int(path.name.removeprefix("step_")) for path in kept)
    back = client("resume", "endless", "--step", oldest)
    assert back.returncode == 0, back.stderr
    client.wait_for("endless", lambda now: now["state"] == "running")
    assert "stopped" in client("stop", "endless", "--now").stdout
    first = [event for event in client.json("events", "endless")["events"] if event["event"] == "resumed"]
    assert first[-1]["step"] == oldest


@pytest.mark.cluster
def test_a_killed_driver_is_seen_and_the_same_name_resumes(
    client: Any, cluster: ClusterRecord, write_config: Any, tmp_path: Path, result: Any, on_one_machine: Any
) -> None:
    from tests.jobs.cluster.conftest import driver_pid, marked

    sections = {"duration": "300 steps", "checkpoint": {"every": "20 steps"}, "evaluation": {"every": "300 steps"}}
    config = write_config(name="driverless", job={"nodes": 2, "procs_per_node": 1}, **sections)
    assert client("submit", config, "--runs-dir", tmp_path / "shared").returncode == 0
    client.wait_for("driverless", lambda status: (status["step"] or 0) >= 6)
    os.kill(driver_pid(cluster.mark, "driverless-0"), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while client.json("status", "driverless")["state"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run = f"BIGTRAIN_RUN={tmp_path / 'shared' / 'driverless'}".encode()
    while any(run in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in _readable(marked(cluster.mark))):
        assert time.monotonic() < deadline, "ranks outlive their driver"
        time.sleep(0.1)

    done = client("submit", config, "--runs-dir", tmp_path / "shared", "--wait")
    assert done.returncode == 0, done.stderr
    events = client.json("events", "driverless")["events"]
    causes = [event.get("cause", "") for event in events if event["event"] == "fault"]
    assert any("ended without releasing its lease" in cause for cause in causes)
    assert result(tmp_path / "shared" / "driverless") == on_one_machine(2, **sections)


def _readable(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        found.append(pid)
    return found


@pytest.mark.cluster
def test_what_a_submission_takes_until_the_first_step(
    client: Any, write_config: Any, tmp_path: Path, pace: Any, bigtrain: Any
) -> None:
    began = time.monotonic()
    assert bigtrain("train", write_config(name="here"), "--nproc", 2).returncode == 0
    alone = pace.between(began, began + _first_step(tmp_path / "runs" / "here", began))

    config = write_config(name="there", job={"nodes": 2, "procs_per_node": 1})
    began = time.monotonic()
    times = client.json("submit", config, "--runs-dir", tmp_path / "shared")["times"]
    while not (tmp_path / "shared" / "there" / "metrics.jsonl").exists():
        time.sleep(0.05)
    clock = time.time() - time.monotonic()  # From one clock to the other.
    times |= {"first step": time.monotonic() + clock}
    order = sorted(times, key=times.get)
    split = {f"{a} -> {b}": pace.between(times[a] - clock, times[b] - clock) for a, b in pairwise(order)}
    own = sum(split.get(part, 0.0) for part in ("submitted -> sent", "connected -> checked", "checked -> placing"))
    total = pace.between(began, times["first step"] - clock)
    print(f"first step after {total:.1f} s ({alone:.1f} s on one machine), bigtrain's own {own:.2f} s: {split}")
    assert list(split) == [f"{a} -> {b}" for a, b in pairwise(order)]
    assert own < total / 2


def _first_step(run: Path, began: float) -> float:
    """Seconds from `began` (monotonic) to the first saved checkpoint, a few steps after the first one."""
    started = next(event for event in read_lines(run / "events.jsonl") if event["event"] == "saved")
    return float(started["time"] - (time.time() - time.monotonic()) - began)


@pytest.mark.cluster
def test_a_run_ends_after_its_longest_duration(client: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config(name="short", job={"nodes": 1, "procs_per_node": 1}, **ENDLESS)
    done = client("submit", config, "--runs-dir", tmp_path / "runs", "--max-duration", "25 s", "--wait", "--json")
    assert done.returncode == 75, done.stderr
    assert client.json("status", "short")["state"] == "stopped"


@pytest.mark.cluster
def test_a_mistake_on_the_cluster_ends_the_submission_with_its_line(
    client: Any, write_config: Any, tmp_path: Path, free_of_runs: Callable[[], None]
) -> None:
    config = write_config(name="blunder", data={"train": "/nowhere/train"})
    refused = client("submit", config, "--runs-dir", tmp_path / "runs", "--json")
    assert refused.returncode == 2
    assert "/nowhere/train" in refused.stdout
    free_of_runs()


@pytest.fixture
def free_of_runs(tmp_path: Path) -> Callable[[], None]:
    """Checks that nothing was written where runs live."""
    return lambda: None if not (tmp_path / "runs").exists() else pytest.fail("a run directory was made")
