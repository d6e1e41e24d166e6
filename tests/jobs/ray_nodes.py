"""Ray nodes on this machine, in a process of their own that reads commands from its standard input.

    python ray_nodes.py DIRECTORY COUNT CPUS

It writes the head's address into DIRECTORY/address. Each line is then a command, answered by "ok": `ensure COUNT`
(nodes that nothing was done to), `kill NODE` (its raylet; a node is named by the start of its id), `stop NODE` and
`continue NODE` (SIGSTOP and SIGCONT to the raylet), `drain NODE SECONDS`, `end`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Raise the nodes, obey, and take them down."""
    directory, count, cpus = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes: list[Any] = []
    harmed: set[str] = set()
    try:
        for _ in range(count):
            nodes.append(cluster.add_node(num_cpus=cpus))
        (directory / "address").write_text(cluster.address)
        for line in sys.stdin:
            command, *arguments = line.split()
            node = next((node for node in nodes if arguments and node.node_id.startswith(arguments[0])), None)
            if command == "end":
                break
            if command == "ensure":
                while len(nodes) - len(harmed) < int(arguments[0]):
                    nodes.append(cluster.add_node(num_cpus=cpus))
                print("ok", flush=True)
                continue
            harmed.add(node.node_id)
            if command == "drain":
                until_ms = int((time.time() + float(arguments[1])) * 1000)
                reason = 2  # DRAIN_NODE_REASON_PREEMPTION
                GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot", until_ms)
            else:
                number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}[command]
                os.kill(raylet(node), number)
            print("ok", flush=True)
    finally:
        for node in nodes:
            if node.any_processes_alive():
                os.kill(raylet(node), signal.SIGCONT)
        cluster.shutdown()


def raylet(node: Any) -> int:
    """Process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


if __name__ == "__main__":
    main()
