"""A placer of one's own, as `--plugin` takes it: an agent on each host of SSH_HOSTS, started by the command `ssh`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable

from bigtrain.config import UserError
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.placer_kinds import PLACERS
from bigtrain.jobs.placing import PlacementCancelled, PlacementFailed, PlacementRequest, Placer, agent_environment
from bigtrain.jobs.protocol import AgentConnection, Listener, PeerLost, new_token

CONNECT_S = 60.0
REMOTE = "import json, os, sys; os.environ.update(json.loads(sys.stdin.readline())); os.execv(sys.executable, {words})"


@PLACERS.register
class SshPlacer(Placer):
    """Hosts that one reaches by ssh, with the same paths."""

    name = "ssh"

    def __init__(self, request: PlacementRequest) -> None:
        self._request = request
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[AgentConnection] = []

    @classmethod
    def of(cls, request: PlacementRequest) -> SshPlacer:
        return cls(request)

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        hosts = os.environ.get("SSH_HOSTS", "").split()
        if job.nodes > len(hosts):
            raise UserError(f"job.nodes is {job.nodes}, and SSH_HOSTS names {len(hosts)}", "job.nodes")
        return 1 if job.procs_per_node == "auto" else job.procs_per_node

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        self.release()
        hosts = os.environ["SSH_HOSTS"].split()[: self._request.job.nodes]
        token = new_token()
        listener = Listener(token, host=os.environ.get("SSH_LISTEN", "127.0.0.1"))
        try:
            for host in hosts:
                self._start(host, listener.address, token)
            found: dict[str, AgentConnection] = {}
            deadline = time.monotonic() + CONNECT_S
            while len(found) < len(hosts):
                if cancelled():
                    raise PlacementCancelled
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    raise PlacementFailed(f"{len(found)} of {len(hosts)} hosts have an agent")
                if (connection := listener.accept(timeout_s=0.1)) is not None:
                    connection.agent = connection.agent.partition(" ")[0]
                    found[connection.agent] = connection
            self._connections = [found[host] for host in hosts]
            return self._connections
        except BaseException:
            self.release()
            raise
        finally:
            listener.close()

    def release(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(PeerLost):
                connection.channel.send("done")
            connection.channel.close()
        for process in self._processes:
            if not self._connections:
                process.terminate()
            process.wait(30)
        self._connections, self._processes = [], []

    def _start(self, host: str, address: str, token: str) -> None:
        # The token goes through standard input: an argument list is for everybody to read.
        environment = agent_environment({}, address, token, f"{host} {uuid.uuid4().hex}")
        words = [sys.executable, "-P", "-m", "bigtrain.jobs.agent"]
        command = shlex.join([sys.executable, "-c", REMOTE.format(words=words)])
        self._request.logs.mkdir(parents=True, exist_ok=True)
        with open(self._request.logs / "agent.log", "ab") as log:
            process = subprocess.Popen(["ssh", host, command], stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert process.stdin is not None
        process.stdin.write(json.dumps(environment).encode() + b"\n")
        process.stdin.close()
        self._processes.append(process)
