"""Runs on nodes that share nothing but a network and one directory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster import isolation
from bigtrain.jobs.cluster.local import ClusterRecord, NodeRecord, raise_local, take_down
from bigtrain.storage import read_lines
from tests.jobs.cluster.conftest import Client, Result, marked, on_shared, wait_for_step, wait_until_gone

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

GANG = {"job": {"nodes": 3, "procs_per_node": 2}, "batch": {"size": 6}}
STEPS = {
    "duration": "200 steps", "checkpoint": {"every": "20 steps"}, "evaluation": {"every": "100 steps", "batches": 2},
}  # fmt: skip
TAKES_A_NODE = ("frozen", "link", "raylet")


@pytest.fixture(scope="module")
def isolated(short_directory: Path, shared: Path) -> Iterator[ClusterRecord]:
    """Three isolated nodes and a spare for each fault that takes one; nothing of them may be left at the end."""
    if (why := isolation.obstacle()) is not None:
        pytest.skip(f"namespaces are forbidden here: {why}")
    directory = short_directory / "isolated"
    nodes = 3 + len(TAKES_A_NODE)
    record = raise_local(
        directory, nodes=nodes, procs_per_node=2, isolated=True, shared=[shared], say=lambda line: None
    )
    yield record
    take_down(directory)
    assert marked(record.mark) == []
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert record.bridge is not None
    assert record.bridge not in links


@pytest.fixture
def client(isolated: ClusterRecord, tmp_path: Path) -> Client:
    return Client(isolated.address, Path(isolated.token_file), tmp_path)


@pytest.fixture(scope="module")
def known() -> dict[str, Result]:
    """What one machine computes, for all faults alike."""
    return {}


def test_isolated_nodes_compute_what_one_machine_does(
    client: Any, blind: Any, shared: Path, write_config: Any, result: Any, on_one_machine: Any
) -> None:
    config = write_config(name="apart", **GANG, **on_shared(shared))
    away = blind(client, shared)
    done = away("submit", config, "--runs-dir", shared / "runs", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    placed = [event for event in away.json("events", "apart")["events"] if event["event"] == "placed"]
    assert sorted(placed[0]["hosts"]) == ["node0", "node1", "node2"]
    assert result(shared / "runs" / "apart") == on_one_machine(6, batch=GANG["batch"])


def test_what_a_node_does_not_see_is_named_before_the_gang_starts(
    client: Any, isolated: ClusterRecord, shared: Path, write_config: Any
) -> None:
    config = write_config(name="unshared", **GANG, **on_shared(shared))
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


def test_doctor_fails_where_the_runs_are_not_shared(client: Any, isolated: ClusterRecord, shared: Path) -> None:
    sound = client.json("doctor", "--runs-dir", shared / "runs")
    assert sound["failed"] == 0, sound
    links = [check for check in sound["checks"] if check["name"] == "network"]
    assert len(links) == len(isolated.nodes) * (len(isolated.nodes) - 1) // 2, "each pair of nodes"
    assert all(check["state"] == "ok" for check in links)
    rest = {"versions", "clock", "shared", "disk", "/dev/shm", "collectives", "wandb"}
    for node in range(len(isolated.nodes)):
        assert {check["name"] for check in sound["checks"] if check["where"].startswith(f"node{node} (")} >= rest
    done = client("doctor", "--runs-dir", "/tmp/own")
    assert done.returncode == 1
    assert "does not see the head's directory of runs" in done.stdout


@pytest.mark.parametrize("fault", ["rank", *TAKES_A_NODE])
def test_a_fault_costs_no_sample(
    fault: str, client: Any, isolated: ClusterRecord, shared: Path, write_config: Any, result: Any,
    on_one_machine: Any, known: dict[str, Result],
) -> None:  # fmt: skip
    name = f"fault-{fault}"
    config = write_config(name=name, **GANG, **STEPS, **on_shared(shared))
    client.submit(config, shared / "runs")
    wait_for_step(shared / "runs" / name, 6)
    hosts = next(read_lines(shared / "runs" / name / "events.jsonl"))["hosts"]
    # The head is the first node; where it runs ranks, another carries the fault.
    node = isolated.nodes[int(next(host for host in hosts if host != "node0").removeprefix("node"))]
    strike(fault, node)
    client.finish(name)
    assert client.json("status", name)["restarts"] >= 1
    # Also on the node that cannot be reached, without help.
    wait_until_gone(shared / "runs" / name)
    if fault in TAKES_A_NODE:
        assert node.pid is not None
        with contextlib.suppress(ProcessLookupError):  # A node ends with its raylet.
            os.kill(node.pid, signal.SIGKILL)
        faults = [event for event in client.json("events", name)["events"] if event["event"] == "fault"]
        assert f"the agent on host node{isolated.nodes.index(node)} is lost" in faults[0]["cause"]
    if not known:
        known["alone"] = on_one_machine(6, batch=GANG["batch"], **STEPS)
    assert result(shared / "runs" / name) == known["alone"]


def strike(fault: str, node: NodeRecord) -> None:
    """Do to a node what the fault is."""
    ranks, agents, raylets = (processes(node, word) for word in (b"training.rank", b"jobs.agent", b"raylet/raylet"))
    assert len(ranks) == 2
    if fault == "rank":
        os.kill(ranks[0], signal.SIGKILL)
    elif fault == "frozen":
        for pid in (*raylets, *agents):
            os.kill(pid, signal.SIGSTOP)
    elif fault == "link":
        subprocess.run(["ip", "link", "set", str(node.link), "down"], check=True)
    else:
        os.kill(raylets[0], signal.SIGKILL)


def processes(node: NodeRecord, word: bytes) -> list[int]:
    """Living processes of a node one of whose first words ends so."""
    space, found = os.readlink(f"/proc/{node.pid}/ns/pid"), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:3]
            if os.readlink(f"/proc/{pid}/ns/pid") == space and any(part.endswith(word) for part in words):
                found.append(int(pid))
        except OSError:
            continue
    return found
