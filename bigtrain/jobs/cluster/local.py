"""A Ray cluster on this machine for tests: several nodes as detached processes, with token authentication.

All processes of a cluster and their descendants have the variable BIGTRAIN_CLUSTER in their environment; `take_down`
ends exactly these processes. Isolated nodes run in their own namespaces (see `bigtrain.jobs.cluster.isolation`).
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
"""How long one node may take to start; on an idle machine it takes 3 to 7 s."""


@dataclass(frozen=True)
class NodeRecord:
    """One node of a cluster on this machine."""

    name: str
    ip: str
    pid: int | None = None
    """Id of the first process of an isolated node; the node ends with this process."""
    link: str | None = None
    """The network interface of this machine that leads to an isolated node."""


@dataclass(frozen=True)
class ClusterRecord:
    """The content of cluster.json, which `cluster down` needs to end the cluster."""

    mark: str
    """The value of BIGTRAIN_CLUSTER in all processes of the cluster."""
    address: str
    """URL of the dashboard."""
    token_file: str
    temporary: str
    """Ray's temporary directory, which is removed with the cluster."""
    nodes: list[NodeRecord] = field(default_factory=list)
    bridge: str | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, directory: Path) -> ClusterRecord:
        """Read the record of the cluster in a directory.

        Raises:
            UserError: There is no cluster, a newer bigtrain started it, or the record is damaged.
        """
        path = directory / "cluster.json"
        try:
            value = json.loads(path.read_text())
            if value["format_version"] > FORMAT_VERSION:
                raise UserError("A newer bigtrain started this cluster", str(path), "Stop it with that version.")
            nodes = [NodeRecord(**node) for node in value.pop("nodes")]
            return cls(**value, nodes=nodes)
        except FileNotFoundError:
            raise UserError(
                "There is no local cluster", str(directory), "Start one with `bigtrain cluster local`."
            ) from None
        except (ValueError, TypeError, KeyError):
            raise UserError("cluster.json is damaged", str(path)) from None

    def write(self, directory: Path) -> None:
        """Write the record to cluster.json in a directory."""
        storage.write_json(directory / "cluster.json", asdict(self))


def default_directory() -> Path:
    """The default directory in which this user's cluster is recorded."""
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
    """Start a cluster of `nodes` Ray nodes; the first one is the head node.

    Args:
        directory: Directory for the cluster's record, cluster.json, and its token.
        nodes: Number of nodes.
        procs_per_node: Number of CPUs that each node offers, and of GPUs if the machine has enough for all nodes.
        isolated: Whether each node gets its own network, PID, mount, IPC and UTS namespaces, with its own /tmp and
            /dev/shm.
        shared: Directories under /tmp that isolated nodes see; nodes that are not isolated see everything.
        say: Prints one line for the user.

    Raises:
        UserError: A cluster is recorded in `directory` already, namespaces are not possible, a shared directory does
            not exist, or a node does not start.
    """
    if (directory / "cluster.json").exists():
        raise UserError(
            "A local cluster is already running",
            str(directory),
            "Stop it with `bigtrain cluster down`, or give another --dir.",
        )
    if isolated and (why := isolation.obstacle()) is not None:
        raise UserError(f"Isolated nodes cannot be made here: {why}", "--isolated", "Omit --isolated.")
    for path in shared or []:
        if not path.is_dir():
            raise UserError(f"There is no directory {path} to share", "--shared")
    directory.mkdir(parents=True, exist_ok=True)
    token_file = directory / "token"
    _write_token(token_file)
    mark = secrets.token_hex(8)
    # A short path: Ray's sockets lie below it, and a socket's path has at most 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="bigtrain-", dir="/tmp"))
    network = isolation.Network.choose(mark) if isolated else None
    record = ClusterRecord(
        mark, "", str(token_file), str(temporary), bridge=None if network is None else network.bridge
    )
    record.write(directory)  # Written before any process starts, so that `cluster down` works after a kill.
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
    """End every process of the cluster that is recorded in a directory, and remove its files and networks.

    Returns:
        The number of nodes that the cluster had.

    Raises:
        UserError: There is no cluster.
    """
    record = ClusterRecord.read(directory)
    end_marked(record.mark, variable=variables.CLUSTER)
    if record.bridge is not None:
        isolation.remove_network(record.bridge, [node.link for node in record.nodes if node.link])
    _remove(Path(record.temporary))
    for name in ("token", "cluster.json"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # The directory may hold files that bigtrain did not write.
        directory.rmdir()
    return len(record.nodes)


def _remove(directory: Path) -> None:
    """Remove a directory to which ending processes may still write."""
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
            # Each node has its own directory; otherwise nodes would delete and unpack each other's packages.
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
            # Start one node after another: several that start at once may take the same node name.
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
    # The nodes must run the submitted source, not the checkout of the shell that starts the cluster.
    entries = [entry for entry in environment.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    if kept := [entry for entry in entries if not (Path(entry) / "bigtrain" / "__init__.py").exists()]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    environment |= {
        variables.CLUSTER: record.mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": record.token_file,
        # Otherwise agents and ranks, which Ray's workers start, would run at Ray's niceness of 15.
        "RAY_worker_niceness": "0",
        # On a busy machine, Ray's processes take longer to start than Ray's default timeouts.
        "RAY_agent_register_timeout_ms": str(int(START_S * 1000)),
        "RAY_raylet_start_wait_time_s": str(int(START_S)),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", os.defpath))),
    }
    if record.bridge is None:
        # Files that killed processes of Ray leave are removed with the cluster; isolated nodes have their own /tmp.
        environment["TMPDIR"] = record.temporary
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(number * gpus + index) for index in range(gpus))
    return environment


def _run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run `ray start`, which starts daemons and exits."""
    with open(log, "ab") as output:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, timeout=START_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"A node did not start within {START_S:.0f} s", str(log)) from None
    if done.returncode != 0:
        raise UserError("A node did not start:\n    " + "\n    ".join(_tail(log)), fix="See the lines above.")


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
