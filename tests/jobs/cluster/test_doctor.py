"""What `bigtrain doctor` says of nodes that differ, lack something, or hardly reach each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.cluster import probe
from bigtrain.jobs.cluster.doctor import network_checks, node_checks

PLANTED: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "another torch": ("versions", "failed", lambda node: node["versions"].update(torch="1.0")),
    "a late clock": ("clock", "failed", lambda node: node.update(clock_s=30.0)),
    "its own directory of runs": ("shared", "failed", lambda node: node.update(sees_mark=False)),
    "a full disk": ("disk", "failed", lambda node: node["disk"].update(free_bytes=1000, write_bytes_per_s=None)),
    "a read-only disk": ("disk", "failed", lambda node: node.update(disk={"error": "Read-only file system"})),
    "little shared memory": ("/dev/shm", "failed", lambda node: node.update(shared_memory_bytes=1000)),
    "a secrets file that others read": ("keys", "failed", lambda node: node.update(keys_error="its mode is 0644")),
    "another NCCL interface": (
        "collectives",
        "note",
        lambda node: node["communication"].update(NCCL_SOCKET_IFNAME="x"),
    ),
    "no W&B": ("wandb", "note", lambda node: node.update(wandb_reachable=False)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The real answer of this machine, as one with a key and a reachable W&B would give it."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "mark").touch()
    answer = probe.describe(str(runs), "mark", None)
    assert answer["disk"]["write_bytes_per_s"] > 0
    assert [path.name for path in runs.iterdir()] == ["mark"]
    return answer | {"keys": {"WANDB_API_KEY": True, "HF_TOKEN": True}, "wandb_reachable": True, "clock_s": 0.0}


@pytest.mark.parametrize("planted", [None, *PLANTED])
def test_each_thing_that_is_wrong_with_a_node_is_found_and_nothing_else(
    planted: str | None, sound: dict[str, Any]
) -> None:
    node = copy.deepcopy(sound)
    expected = {}
    if planted is not None:
        name, state, plant = PLANTED[planted]
        plant(node)
        expected = {name: state}
    checks = node_checks("b", node, sound)
    assert {check.name: check.state for check in checks if check.state != "ok"} == expected
    assert all(check.fix for check in checks if check.state != "ok"), "it says what to do"


def test_a_slow_link_and_a_closed_one_are_found_among_the_others() -> None:
    rates = {("a", "b"): 1e9, ("a", "c"): 1.1e9, ("b", "c"): 0.9e9, ("a", "d"): 1e8, ("b", "d"): "Connection refused"}
    states = {check.where: check.state for check in network_checks(rates)}
    assert states == {
        "a -> b": "ok", "a -> c": "ok", "b -> c": "ok", "a -> d": "failed", "b -> d": "failed"
    }  # fmt: skip


def test_a_bandwidth_is_measured_only_with_who_knows_the_token(tmp_path: Path) -> None:
    receiver, sender = probe.NetworkProbe("127.0.0.1"), probe.NetworkProbe("127.0.0.1")
    rate = sender.send(*receiver.listen())
    assert isinstance(rate, float)
    assert rate > 0
    address, port, token = receiver.listen()
    assert isinstance(sender.send(address, port, bytes(len(token))), str)
