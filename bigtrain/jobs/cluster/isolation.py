"""Isolated nodes on one machine: each has its own network, PID, mount, IPC and UTS namespaces; a bridge connects them.

    python -m bigtrain.jobs.cluster.isolation JSON       the first process of a node, in the node's namespaces

Each node has its own address, host name, /proc, /tmp and /dev/shm. Linux, root and iproute2 are required.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bigtrain.children import module_command, with_source
from bigtrain.config import UserError

LINK_S: Final = 20.0
"""How long a node waits for its network interface, and `Network.start_node` for the node's first process."""
PRIVATE: Final = ("/tmp", "/dev/shm")

_NAMESPACES: Final = ("--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child")


def obstacle() -> str | None:
    """Why isolated nodes cannot be made on this machine, or None."""
    for tool in ("unshare", "ip", "mount"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` command"
    name = f"btp{os.getpid()}"
    try:
        _command("unshare", *_NAMESPACES, "true")
        _command("ip", "link", "add", name, "type", "bridge")
        _command("ip", "link", "delete", name)
    except UserError as error:
        return error.what
    return None


@dataclass(frozen=True)
class Network:
    """A network bridge of this machine with a private /24 subnet; node number N has the address SUBNET.(N+2)."""

    bridge: str
    """Name of the bridge's network interface."""
    subnet: str
    """The first three numbers of the subnet, such as "10.213.7"."""

    @classmethod
    def choose(cls, mark: str) -> Network:
        """Choose a subnet in which this machine has no address; `mark`, in hexadecimal, makes the choice differ."""
        used = set(re.findall(r"inet (\d+\.\d+\.\d+)\.", _command("ip", "-4", "-o", "addr")))
        start = int(mark[:4], 16)
        subnets = (f"10.{200 + (start + i) % 50}.{(start + i) // 50 % 250}" for i in range(50 * 250))
        return cls(f"bt{mark[:8]}", next(subnet for subnet in subnets if subnet not in used))

    def ip(self, number: int) -> str:
        """IPv4 address of a node."""
        return f"{self.subnet}.{number + 2}"

    def link(self, number: int) -> str:
        """Name of the network interface of this machine that leads to a node."""
        return f"{self.bridge}{number}"

    def create(self) -> None:
        """Create the bridge."""
        _command("ip", "link", "add", self.bridge, "type", "bridge")
        _command("ip", "addr", "add", f"{self.subnet}.1/24", "dev", self.bridge)
        _command("ip", "link", "set", self.bridge, "up")

    def start_node(
        self, number: int, command: list[str], environment: dict[str, str], log: Path, visible: list[Path]
    ) -> int:
        """Start a command as a node: in its own namespaces, connected to the bridge.

        Args:
            number: Number of the node, from 0.
            command: The command and its arguments.
            environment: Environment variables of the command.
            log: File that receives the command's output.
            visible: Paths under /tmp that the node sees; the rest of /tmp is hidden from it.

        Returns:
            Process id of the node's first process, in this machine's PID namespace. The node ends with this process.
        """
        node = {
            "command": command,
            "address": f"{self.ip(number)}/24",
            "hostname": f"node{number}",
            "visible": [str(path.resolve()) for path in visible],
            "python_path": environment.get("PYTHONPATH"),
        }
        with open(log, "ab") as output:
            outer = subprocess.Popen(
                ["unshare", *_NAMESPACES, *module_command("bigtrain.jobs.cluster.isolation", json.dumps(node))],
                env=with_source(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        pid = _child(outer)
        _command("ip", "link", "add", self.link(number), "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _command("ip", "link", "set", self.link(number), "master", self.bridge, "up")
        return pid


def remove_network(bridge: str, links: list[str]) -> None:
    """Remove a bridge and the network interfaces that lead to its nodes; missing ones are ignored."""
    for name in (*links, bridge):
        with contextlib.suppress(UserError):
            _command("ip", "link", "delete", name)


def is_alive(pid: int) -> bool:
    """Whether a node's first process is running."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _child(outer: subprocess.Popen[bytes]) -> int:
    """The id of the process that `unshare` forks into the new namespaces; waits until it exists."""
    deadline = time.monotonic() + LINK_S
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while time.monotonic() < deadline and outer.poll() is None:
        with contextlib.suppress(OSError):
            if found := children.read_text().split():
                return int(found[0])
        time.sleep(0.01)
    raise UserError("A node's namespaces could not be made", fix="See the log of the node.")


def _command(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"`{' '.join(arguments[:3])}` fails: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _hide(visible: list[str]) -> None:
    """Mount a new /proc, /tmp and /dev/shm in this namespace; of the machine's /tmp only `visible` paths are kept."""
    _command("mount", "--make-rprivate", "/")
    _command("mount", "-t", "proc", "proc", "/proc")
    _command("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    hidden = [path for path in visible if Path(path).is_relative_to("/tmp")]
    # A mount on /tmp hides everything below it, so bind each path elsewhere until /tmp is mounted.
    stage = Path("/dev/shm/stage")
    for index, path in enumerate(hidden):
        (stage / str(index)).mkdir(parents=True)
        _command("mount", "--bind", path, str(stage / str(index)))
    _command("mount", "-t", "tmpfs", "tmpfs", "/tmp")
    for index, path in enumerate(hidden):
        Path(path).mkdir(parents=True, exist_ok=True)
        _command("mount", "--bind", str(stage / str(index)), path)
        _command("umount", str(stage / str(index)))
    for place in PRIVATE:
        Path(place).chmod(0o1777)
    shutil.rmtree(stage, ignore_errors=True)


def _connect(address: str) -> None:
    deadline = time.monotonic() + LINK_S
    while "eth0:" not in Path("/proc/net/dev").read_text():
        if time.monotonic() > deadline:
            raise UserError("The node's network interface did not appear")
        time.sleep(0.01)
    _command("ip", "link", "set", "lo", "up")
    _command("ip", "addr", "add", address, "dev", "eth0")
    _command("ip", "link", "set", "eth0", "up")


def main() -> int:
    """Set up the namespaces, run the node's command, and reap orphaned processes until the command ends."""
    node = json.loads(sys.argv[1])
    socket.sethostname(node["hostname"])
    _hide(node["visible"])
    _connect(node["address"])
    # This process's PYTHONPATH, which finds bigtrain's source, must not reach the node's command.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if node["python_path"]:
        environment["PYTHONPATH"] = node["python_path"]
    child = subprocess.Popen(node["command"], env=environment, cwd="/")
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
