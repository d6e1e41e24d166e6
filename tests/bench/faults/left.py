"""What a fault leaves behind, looked for while the run goes on: processes, ports, shared memory, temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from tests.bench.faults.measured import Measured
from tests.bench.faults.run import Run

GONE_S: Final = 15.0
"""How long something may take to go: an agent that cannot be reached ends its ranks after 10 s of silence."""
APART_VARIABLE: Final = "BIGTRAIN_BENCH_APART"
SHARED_MEMORY: Final = Path("/dev/shm")
CACHE: Final = "torchinductor_"
"""torch's cache of compiled code, one for all processes of a user and kept on purpose."""


def go_apart(module: str, arguments: list[str]) -> None:
    """Go on in a mount namespace with a /dev/shm of one's own, where that is allowed.

    So nothing of others, who may come and go meanwhile, is taken for what a run has left.
    """
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", str(SHARED_MEMORY)]
    if APART_VARIABLE in os.environ:
        return
    try:
        allowed = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        print("/dev/shm is shared with others: what they leave there is counted, too", file=sys.stderr)
        return
    os.environ[APART_VARIABLE] = "1"
    inside = f'mount -t tmpfs tmpfs {SHARED_MEMORY} && exec "$@"'
    os.execvp(
        "unshare",
        [*probe[:4], "sh", "-c", inside, "sh", sys.executable, "-m", module, *arguments],
    )  # fmt: skip


class Leavings:
    """Compares what is there after each fault with what was there before the first.

    Args:
        temporary: The run's TMPDIR, and that of its nodes.
        cluster: Directory of the Ray cluster, where there is one: its agents carry it in their environment.
    """

    def __init__(self, run: Run, temporary: Path, results: Measured, cluster: Path | None = None) -> None:
        self._run = run
        self._temporary = temporary
        self._results = results
        self._cluster = cluster
        self._ports = self._files = 0
        self._known = False

    def note(self) -> None:
        """Take down, once, what a run without faults has; it has settled."""
        if not self._known:
            self._ports, self._files = len(self._listening()), len(self._temporary_files())
            self._known = True

    def look(self) -> None:
        """Look after a fault, once the run goes on."""
        deadline = time.monotonic() + GONE_S
        while (found := list(self._find())) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._results.add(len(found))
        self._results.found += found

    def look_at_the_end(self) -> None:
        """Look after the end of the run: nothing at all may be there."""
        deadline = time.monotonic() + GONE_S
        while (found := [*self._old_processes(""), *self._temporary_files()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        self._results.add(len(found))
        self._results.found += found

    def _find(self) -> Iterator[str]:
        yield from self._old_processes(self._run.environment(0)["BIGTRAIN_ATTEMPT"])
        if len(ports := self._listening()) > self._ports:
            yield f"ports {ports}, {self._ports} before"
        if len(files := self._temporary_files()) > self._files:
            yield f"files {files}, {self._files} before"

    def _old_processes(self, attempt: str) -> Iterator[str]:
        """Ranks of other attempts and what they started; agents that have no rank of this one."""
        placements = set()
        agents = {}
        for pid, variables in self._marked():
            placement = variables.get("BIGTRAIN_PLACEMENT", "")
            if variables.get("BIGTRAIN_RUN") is None:
                agents[pid] = placement
            elif variables["BIGTRAIN_ATTEMPT"] == attempt:
                placements.add(placement)
            else:
                yield f"process {pid} of attempt {variables['BIGTRAIN_ATTEMPT']}"
        yield from (f"agent {pid}" for pid, placement in agents.items() if placement not in placements)

    def _marked(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Processes of the run, and agents of its cluster, with their variables."""
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if variables.get("BIGTRAIN_RUN") == str(self._run.path.resolve()) or (
                    self._cluster is not None
                    and variables.get("RAY_TMPDIR") == str(self._cluster)
                    and "bigtrain.jobs.agent" in process.cmdline()
                ):
                    yield process.pid, variables
            except (psutil.Error, OSError):
                continue

    def _listening(self) -> list[int]:
        """TCP ports on which a process of the run listens."""
        pids = [pid for pid, _ in self._marked()]
        processes = [
            psutil.Process(self._run.process.pid),
            *(psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)),
        ]
        ports = set()
        for process in processes:
            try:
                ports |= {
                    connection.laddr.port
                    for connection in process.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                }
            except psutil.Error:
                continue
        return sorted(ports)

    def _temporary_files(self) -> list[str]:
        """What lies in the places for temporary files, and half-written checkpoints."""
        here = [*self._temporary.iterdir(), *(SHARED_MEMORY.iterdir() if APART_VARIABLE in os.environ else ())]
        found = [path for path in here if not path.name.startswith(CACHE)]
        return sorted(map(str, [*found, *self._run.path.rglob("*.tmp-*")]))
