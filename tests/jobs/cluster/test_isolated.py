"""Runs on nodes that share nothing but a network and one directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster import isolation
from bigtrain.jobs.cluster.local import ClusterRecord, raise_local, take_down
from tests.jobs.cluster.conftest import Client, marked

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# Long enough for a fault to strike in the middle: a client sees a step a second or two after it was done.
STEPS = {
    "duration": "300 steps", "checkpoint": {"every": "20 steps"}, "evaluation": {"every": "150 steps", "batches": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(short_directory: Path, text_shards: Path) -> Path:
    """The one directory that all nodes see, with the shards in it."""
    path = short_directory / "shared"
    shutil.copytree(text_shards, path / "shards")
    return path


@pytest.fixture(scope="module")
def isolated(short_directory: Path, shared: Path) -> Iterator[ClusterRecord]:
    """Four isolated nodes, of which the faults take two; processes, cables and directories must be gone at the end."""
    if (why := isolation.obstacle()) is not None:
        pytest.skip(f"namespaces are forbidden here: {why}")
    directory = short_directory / "isolated"
    record = raise_local(directory, nodes=4, procs_per_node=2, isolated=True, shared=[shared], say=lambda line: None)
    yield record
    take_down(directory)
    assert marked(record.mark) == []
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert record.bridge is not None
    assert record.bridge not in links


@pytest.fixture
def client(isolated: ClusterRecord, tmp_path: Path) -> Client:
    return Client(isolated.address, Path(isolated.token_file), tmp_path)


def on(shared: Path) -> dict[str, Any]:
    """The data section of a run on the nodes."""
    return {"data": {"train": str(shared / "shards" / "train"), "validation": str(shared / "shards" / "validation")}}


def submitted(client: Any, config: Path, runs: Path) -> None:
    done = client("submit", config, "--runs-dir", runs)
    assert done.returncode == 0, done.stderr


def finished(client: Any, name: str) -> None:
    deadline = time.monotonic() + 600
    while (status := client.json("status", name))["state"] != "finished":
        assert time.monotonic() < deadline, status
        assert status["state"] != "failed", client("logs", name).stdout
        time.sleep(1)


def test_isolated_nodes_compute_what_one_machine_does(
    client: Any, blind: Any, shared: Path, write_config: Any, result: Any, on_one_machine: Any
) -> None:
    config = write_config(name="apart", job={"nodes": 3, "procs_per_node": 2}, batch={"size": 6}, **on(shared))
    away = blind(client, shared)
    done = away("submit", config, "--runs-dir", shared / "runs", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    placed = [event for event in away.json("events", "apart")["events"] if event["event"] == "placed"]
    assert sorted(placed[0]["hosts"]) == ["node0", "node1", "node2"]
    assert result(shared / "runs" / "apart") == on_one_machine(6, batch={"size": 6})


def test_what_a_node_does_not_see_is_named_before_the_gang_starts(
    client: Any, isolated: ClusterRecord, shared: Path, write_config: Any
) -> None:
    job = {"nodes": 3, "procs_per_node": 2}
    config = write_config(name="unshared", job=job, **on(shared))
    own = client("submit", config, "--runs-dir", "/tmp/own", "--wait")
    assert own.returncode == 2
    assert "does not see /tmp/own/unshared" in own.stderr

    assert isolated.nodes[2].pid is not None
    enter = ["nsenter", "--target", str(isolated.nodes[2].pid), "--mount", "--"]
    place = str(shared / "shards")
    subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        missing = client("submit", config, "--runs-dir", shared / "runs", "--wait")
        assert missing.returncode == 2
        assert f"node2 does not see {place}/train" in missing.stderr
    finally:
        subprocess.run([*enter, "umount", place], check=True)


def test_doctor_fails_where_the_runs_are_not_shared(client: Any, shared: Path) -> None:
    sound = client.json("doctor", "--runs-dir", shared / "runs")
    assert sound["failed"] == 0, sound
    links = [check for check in sound["checks"] if check["name"] == "network"]
    assert len(links) == 6, "each pair of nodes"
    assert all(check["state"] == "ok" for check in links)
    done = client("doctor", "--runs-dir", "/tmp/own")
    assert done.returncode == 1
    assert "does not see the head's directory of runs" in done.stdout


@pytest.mark.parametrize("fault", ["rank", "link", "node"])
def test_a_fault_costs_no_sample(
    fault: str, client: Any, isolated: ClusterRecord, shared: Path, write_config: Any, result: Any, on_one_machine: Any
) -> None:
    # The head is the first node; where it runs ranks, another carries the fault.
    config = write_config(name=f"fault-{fault}", job={"nodes": 2, "procs_per_node": 1}, **STEPS, **on(shared))
    submitted(client, config, shared / "runs")
    client.wait_for(f"fault-{fault}", lambda status: (status["step"] or 0) >= 6)
    events = client.json("events", f"fault-{fault}")["events"]
    host = next(host for host in events[0]["hosts"] if host != "node0")
    node = isolated.nodes[int(host.removeprefix("node"))]
    assert node.pid is not None
    if fault == "rank":
        ranks = [pid for pid in marked(isolated.mark) if b"bigtrain.training.rank" in _words(pid)]
        os.kill(ranks[0], signal.SIGKILL)
    elif fault == "link":
        subprocess.run(["ip", "link", "set", str(node.link), "down"], check=True)
    else:
        os.kill(node.pid, signal.SIGKILL)
    try:
        finished(client, f"fault-{fault}")
    finally:
        if fault == "link":
            subprocess.run(["ip", "link", "set", str(node.link), "up"], check=True)
    status = client.json("status", f"fault-{fault}")
    assert status["restarts"] >= 1
    assert result(shared / "runs" / f"fault-{fault}") == on_one_machine(2, **STEPS)


def test_a_killed_head_ends_the_job_and_the_same_name_resumes(
    short_directory: Path, shared: Path, isolated: ClusterRecord, tmp_path: Path, write_config: Any, result: Any,
    on_one_machine: Any,
) -> None:  # fmt: skip
    config = write_config(name="headless", job={"nodes": 1, "procs_per_node": 1}, **STEPS, **on(shared))
    directory = short_directory / "second"
    record = raise_local(directory, nodes=1, procs_per_node=1, isolated=True, shared=[shared], say=lambda line: None)
    client = Client(record.address, Path(record.token_file), tmp_path)
    submitted(client, config, shared / "runs")
    client.wait_for("headless", lambda status: (status["step"] or 0) >= 6)
    assert record.nodes[0].pid is not None
    os.kill(record.nodes[0].pid, signal.SIGKILL)
    take_down(directory)

    record = raise_local(directory, nodes=1, procs_per_node=1, isolated=True, shared=[shared], say=lambda line: None)
    try:
        client = Client(record.address, Path(record.token_file), tmp_path)
        done = client("submit", config, "--runs-dir", shared / "runs", "--wait", "--json")
        assert done.returncode == 0, done.stderr
    finally:
        take_down(directory)
    assert result(shared / "runs" / "headless") == on_one_machine(1, **STEPS)


def _words(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
