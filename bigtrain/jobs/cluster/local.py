"""A Ray cluster on this machine: several nodes as detached processes, with token authentication, to try things on.

Each process of a cluster carries BIGTRAIN_CLUSTER in its environment, and so does all that it starts: `take_down` ends
exactly those. Isolated nodes live in namespaces of their own (see `bigtrain.jobs.cluster.isolation`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bigtrain import storage, variables
from bigtrain.children import module_command
from bigtrain.config import UserError
from bigtrain.jobs.cluster import isolation
from bigtrain.jobs.cluster.dashboard import Dashboard, DashboardGone
from bigtrain.jobs.devices import visible_gpus
from bigtrain.jobs.processes import end_marked, free_port

FORMAT_VERSION: Final = 1
OBJECT_STORE_BYTES: Final = 100_000_000
REMOVE_S: Final = 5.0
START_S: Final = 120.0
"""How long one node may take to come up; on an idle machine it takes 3 to 7 s."""


@dataclass(frozen=True)
class NodeRecord:
    """One node of a cluster on this machine."""

    name: str
    ip: str
    pid: int | None = None
    """The first process of an isolated node; its end is the node's."""
    link: str | None = None
    """The network interface of this machine that leads to an isolated node."""


@dataclass(frozen=True)
class ClusterRecord:
    """What `cluster down` needs to know: the content of cluster.json."""

    mark: str
    """The value of BIGTRAIN_CLUSTER in each of its processes."""
    address: str
    token_file: str
    temporary: str
    """Ray's own directory, gone with the cluster."""
    nodes: list[NodeRecord] = field(default_factory=list)
    bridge: str | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, directory: Path) -> ClusterRecord:
        """The cluster that was raised at a directory.

        Raises:
            UserError: There is none, or a newer bigtrain raised it.
        """
        path = directory / "cluster.json"
        try:
            value = json.loads(path.read_text())
            if value["format_version"] > FORMAT_VERSION:
                raise UserError("A newer bigtrain raised this cluster", str(path), "Take it down with that one.")
            nodes = [NodeRecord(**node) for node in value.pop("nodes")]
            return cls(**value, nodes=nodes)
        except FileNotFoundError:
            raise UserError("There is no cluster", str(directory), "Raise one with `bigtrain cluster local`.") from None
        except (ValueError, TypeError, KeyError):
            raise UserError("cluster.json is damaged", str(path)) from None

    def write(self, directory: Path) -> None:
        """Record it."""
        storage.write_json(directory / "cluster.json", asdict(self))


def default_directory() -> Path:
    """Where the cluster of this user is recorded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigtrain" / "cluster"


def raise_local(
    directory: Path,
    *,
    nodes: int,
    procs_per_node: int,
    isolated: bool = False,
    shared: list[Path] | None = None,
    say: Callable[[str], None],
) -> ClusterRecord:
    """Raise a cluster of `nodes` Ray nodes, the first of which is its head.

    Args:
        directory: Where it is recorded: cluster.json and the token.
        procs_per_node: CPUs that each node offers, and GPUs where the machine has that many.
        isolated: Each node in network, PID, mount and UTS namespaces of its own, with its own /tmp and /dev/shm.
        shared: Directories that isolated nodes see nevertheless; others see everything.

    Raises:
        UserError: A cluster is recorded there already, namespaces are forbidden, or a node does not come up.
    """
    if (directory / "cluster.json").exists():
        raise UserError(
            "A cluster is up already", str(directory), "Take it down with `bigtrain cluster down`, or give --dir."
        )
    if isolated and (why := isolation.obstacle()) is not None:
        raise UserError(f"Isolated nodes cannot be made here: {why}", "--isolated", "Leave --isolated out.")
    for path in shared or []:
        if not path.is_dir():
            raise UserError(f"There is no directory {path} to share", "--shared")
    directory.mkdir(parents=True, exist_ok=True)
    token_file = directory / "token"
    _write_token(token_file)
    mark = secrets.token_hex(8)
    # Ray's sockets live under it, and their paths may have 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="bigtrain-", dir="/tmp"))
    network = isolation.Network.choose(mark) if isolated else None
    record = ClusterRecord(
        mark, "", str(token_file), str(temporary), bridge=None if network is None else network.bridge
    )
    record.write(directory)  # Before anything is started, so that `cluster down` finds it after a kill.
    try:
        if network is not None:
            network.create()
        record = _start_nodes(record, directory, network, nodes, procs_per_node, shared or [], say)
        _wait_for_nodes(record, nodes)
    except BaseException:
        take_down(directory)
        raise
    return record


def take_down(directory: Path) -> int:
    """End every process of the cluster recorded at a directory and remove what it left.

    Returns:
        How many nodes it had.

    Raises:
        UserError: There is none.
    """
    record = ClusterRecord.read(directory)
    end_marked(record.mark, variable=variables.CLUSTER)
    if record.bridge is not None:
        isolation.remove_network(record.bridge, [node.link for node in record.nodes if node.link])
    _remove(Path(record.temporary))
    for name in ("token", "cluster.json"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # It may hold files that bigtrain did not write.
        directory.rmdir()
    return len(record.nodes)


def _remove(directory: Path) -> None:
    """Remove a directory that processes may still write to, whose end is under way."""
    deadline = time.monotonic() + REMOVE_S
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.05)


def _start_nodes(
    record: ClusterRecord,
    directory: Path,
    network: isolation.Network | None,
    nodes: int,
    procs: int,
    shared: list[Path],
    say: Callable[[str], None],
) -> ClusterRecord:
    head_port = 6379 if network is not None else free_port()
    dashboard_port = 8265 if network is not None else free_port()
    gpus = procs if visible_gpus() >= nodes * procs else 0
    head_ip = "127.0.0.1" if network is None else network.ip(0)
    record = ClusterRecord(**(vars(record) | {"address": f"http://{head_ip}:{dashboard_port}"}))
    for number in range(nodes):
        ip = head_ip if network is None else network.ip(number)
        command = [
            *_ray_start(ip, procs, gpus),
            *(_head(head_port, dashboard_port, head_ip) if number == 0 else [f"--address={head_ip}:{head_port}"]),
        ]
        if network is None:
            command += [f"--dashboard-agent-listen-port={free_port()}"]
            # Nodes that shared Ray's directory would delete and unpack each other's packages.
            command += [f"--temp-dir={record.temporary}/{number}"]
        environment = _environment(record, number, gpus)
        log = Path(record.temporary) / f"node_{number}.log"
        name = f"{record.mark}-{number}"
        if network is None:
            _run(command, environment, log)
            node = NodeRecord(name, ip)
        else:
            visible = [*shared, directory, Path(sys.prefix)]
            pid = network.start_node(number, [*command, "--block"], environment, log, visible)
            node = NodeRecord(name, ip, pid, network.link(number))
        record = ClusterRecord(**(vars(record) | {"nodes": [*record.nodes, node]}))
        record.write(directory)
        say(f"node {number + 1} of {nodes} started")
        if network is not None:
            # One after another: workers look for the head, and several at once take the same node's name.
            _wait_for_nodes(record, number + 1)
    return record


def _ray_start(ip: str, procs: int, gpus: int) -> Iterator[str]:
    yield from (*module_command("ray.scripts.scripts", "start"), f"--node-ip-address={ip}")
    yield from (f"--num-cpus={procs}", f"--num-gpus={gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}")
    yield from ("--disable-usage-stats", "--include-log-monitor=false", "--min-worker-port=0", "--max-worker-port=0")


def _head(port: int, dashboard_port: int, host: str) -> Iterator[str]:
    yield from ("--head", f"--port={port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}")
    yield f"--ray-client-server-port={free_port()}"


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _environment(record: ClusterRecord, number: int, gpus: int) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "BIGTRAIN_"))}
    # The nodes run the source that is submitted, not the checkout of the shell which raised them.
    entries = [entry for entry in environment.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    if kept := [entry for entry in entries if not (Path(entry) / "bigtrain" / "__init__.py").exists()]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    environment |= {
        variables.CLUSTER: record.mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": record.token_file,
        # Workers start agents, and agents ranks: all would run at Ray's niceness of 15.
        "RAY_worker_niceness": "0",
        # On a busy machine Ray's own patience ends before its processes have started.
        "RAY_agent_register_timeout_ms": str(int(START_S * 1000)),
        "RAY_raylet_start_wait_time_s": str(int(START_S)),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", os.defpath))),
    }
    if record.bridge is None:
        # What Ray's processes leave when they are killed goes with the cluster; isolated nodes have their own /tmp.
        environment["TMPDIR"] = record.temporary
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(number * gpus + index) for index in range(gpus))
    return environment


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run `ray start`, which leaves daemons behind."""
    with open(log, "ab") as output:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, timeout=START_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"A node did not come up within {START_S:.0f} s", str(log)) from None
    if done.returncode != 0:
        raise UserError("A node did not come up:\n    " + "\n    ".join(_tail(log)), fix="See the lines above.")


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()[-8:]


def _wait_for_nodes(record: ClusterRecord, count: int) -> None:
    dashboard = Dashboard(record.address, Path(record.token_file))
    deadline = time.monotonic() + START_S
    found: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        for node in record.nodes:
            if node.pid is not None and not isolation.is_alive(node.pid):
                log = Path(record.temporary) / f"node_{node.name.rpartition('-')[2]}.log"
                raise UserError(f"Node {node.name} ended:\n    " + "\n    ".join(_tail(log)))
        with contextlib.suppress(DashboardGone):
            found = dashboard.nodes()
            if len(found) >= count:
                return
        time.sleep(0.2)
    raise UserError(f"{len(found)} of {count} nodes are up after {START_S:.0f} s")
