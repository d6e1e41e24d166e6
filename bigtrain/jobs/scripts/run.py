"""`bigtrain run`: runs a user's own script on this machine or on the nodes of this Slurm job."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO

from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.controller import next_attempt
from bigtrain.jobs.ending import RunRecord
from bigtrain.jobs.launch import launch_here
from bigtrain.jobs.placer_kinds import kind_of
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launch import check_directory, held, script_environment, script_launch
from bigtrain.jobs.scripts.launcher import adapt
from bigtrain.jobs.takeover import outlast
from bigtrain.run import ExitCode, RunDirectory
from bigtrain.streams import enduring

LOOK_S: Final = 0.1


def run_script(
    call: ScriptCall,
    directory: RunDirectory,
    job: JobConfig,
    launcher: str = "torchrun",
    *,
    stream: TextIO | None = None,
    say: Callable[[str], None],
) -> int:
    """Run a script to its end, and show the output of its ranks meanwhile.

    Args:
        call: How the script is called from this working directory.
        directory: The run directory, for logs, events and the lease.
        job: The `job` section.
        launcher: The launcher for which the script is written, with options; see `bigtrain.jobs.scripts.launcher`.
        stream: Receives the ranks' output; standard output by default.
        say: Prints one line of bigtrain's own for the user.

    Returns:
        A value of ExitCode.

    Raises:
        UserError: A check before the start of the first rank failed.
    """
    name = call.file if call.module else Path(call.file).name
    check_directory(directory, name)
    procs = kind_of(job).procs(job)
    call = adapt(call, launcher, job.nodes, procs)
    outlast(directory, say)
    with held(directory, name), RunRecord(directory, machines=job.nodes) as record:
        output = _Output(directory, job.nodes * procs, enduring(stream or sys.stdout))
        output.start()
        try:
            code = launch_here(
                directory.path,
                job=job,
                launch=script_launch(call, job, procs),
                environment=script_environment(call, directory, job),
                event=record.event,
                say=say,
            )
        finally:
            output.finish()
    if code == ExitCode.FINISHED:
        say(f"{directory.name}: finished")
    return code


class _Output(threading.Thread):
    """A thread that copies new lines of the ranks' logs to a stream, prefixed by the rank if there are several."""

    def __init__(self, directory: RunDirectory, world_size: int, stream: TextIO) -> None:
        super().__init__(name="output", daemon=True)
        self._logs = directory.logs
        self._first = next_attempt(directory.path)
        self._world_size = world_size
        self._stream = stream
        self._ended = threading.Event()
        self._offsets: dict[Path, int] = {}

    def run(self) -> None:
        """Copy complete lines until `finish` is called, and then the rest of the logs."""
        while not self._ended.wait(LOOK_S):
            self._copy(whole_lines=True)
        self._copy(whole_lines=False)

    def finish(self) -> None:
        """Copy the rest of the logs, and wait for the thread to end."""
        self._ended.set()
        self.join()

    def _copy(self, whole_lines: bool) -> None:
        for attempt in range(self._first, next_attempt(self._logs.parent)):
            for rank in range(self._world_size):
                self._copy_one(rank, self._logs / f"attempt_{attempt}" / f"rank_{rank}.log", whole_lines)

    def _copy_one(self, rank: int, path: Path, whole_lines: bool) -> None:
        try:
            with open(path, "rb") as log:
                log.seek(self._offsets.get(path, 0))
                data = log.read()
        except OSError:
            return
        if whole_lines:
            data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        self._offsets[path] = self._offsets.get(path, 0) + len(data)
        prefix = f"[rank {rank}] " if self._world_size > 1 else ""
        for line in data.decode(errors="replace").splitlines():
            self._stream.write(f"{prefix}{line}\n")
        self._stream.flush()
